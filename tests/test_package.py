# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: everything can be imported, quietly, and diffusers finds the public classes."""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
import torch

import diffusers
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

import diffusers_dyna
from diffusers_dyna import DynaDiTPipeline, FlowMatchODEScheduler

from .testing_utils import tiny_dyna_dit, tiny_unet


SUBPACKAGES = ["conversion", "hub", "models", "pipelines", "schedulers", "training"]


def module_names() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(diffusers_dyna.__path__, prefix="diffusers_dyna."))


def run_python(code: str, cwd) -> subprocess.CompletedProcess:
    """A fresh process, in a folder from which the source tree cannot be imported by its position."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_all_importable():
    names = module_names()
    assert {"diffusers_dyna.models.unet_dyna_2d", "diffusers_dyna.schedulers.scheduling_flow_match"} <= set(names)
    # `pipelines` lies beside the package and is mapped into it
    importlib.import_module("diffusers_dyna.pipelines.pipeline_dyna_unet")
    for name in names:
        importlib.import_module(name)


@pytest.mark.parametrize("name", ["diffusers_dyna", *(f"diffusers_dyna.{name}" for name in SUBPACKAGES)])
def test_public_names_exist(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(public) == len(set(public))
    for attribute in public:
        assert getattr(module, attribute) is not None
    if name in ("diffusers_dyna", "diffusers_dyna.models", "diffusers_dyna.pipelines", "diffusers_dyna.schedulers"):
        assert public


def test_public_classes_are_those_of_the_subpackages():
    for name in (
        "DynaUNet2DModel",
        "DynaUNetPipeline",
        "FlowMatchODEScheduler",
        "FlowMatchSDEScheduler",
        "FlowMatchPath",
    ):
        assert name in diffusers_dyna.__all__
    for subpackage in ("models", "pipelines", "schedulers"):
        module = importlib.import_module(f"diffusers_dyna.{subpackage}")
        for name in set(module.__all__) & set(diffusers_dyna.__all__):
            assert getattr(diffusers_dyna, name) is getattr(module, name)
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", diffusers_dyna.__version__)


def test_registered_with_diffusers():
    assert "diffusers_dyna" in LOADABLE_CLASSES
    # diffusers reads these names off the module that a component is recorded with
    assert diffusers_dyna.ModelMixin is diffusers.ModelMixin
    assert diffusers_dyna.SchedulerMixin is diffusers.SchedulerMixin
    public = {name: getattr(diffusers_dyna, name) for name in diffusers_dyna.__all__}
    classes = {name: value for name, value in public.items() if isinstance(value, type)}
    assert public.keys() - classes.keys() == {"DYNA_DIT_CONFIGS", "flow_log_likelihood", "integrate_flow"}
    for name, cls in classes.items():
        assert getattr(diffusers, name) is cls
    assert "ModelMixin" in ALL_IMPORTABLE_CLASSES


def test_registration_replaces_nothing(monkeypatch):
    """A class that diffusers has by this name one day stays diffusers' own; doing it twice changes nothing."""
    theirs, entry = object(), {"SomeMixin": ["save_pretrained", "from_pretrained"]}
    monkeypatch.setattr(diffusers, "DynaUNetPipeline", theirs)
    monkeypatch.setitem(LOADABLE_CLASSES, "diffusers_dyna", entry)
    diffusers_dyna._register_with_diffusers()
    assert diffusers.DynaUNetPipeline is theirs
    assert LOADABLE_CLASSES["diffusers_dyna"] is entry


def test_no_folder_is_named_like_a_pipeline_of_diffusers():
    """diffusers would record a component that lies in such a folder as its own, and not find it again."""
    import diffusers.pipelines

    taken = {module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__)}
    assert "dit" in taken
    assert [name for name in module_names() if taken & set(name.split("."))] == []


def test_model_and_scheduler_files_stand_alone(tmp_path):
    """Copied alone into another folder, as onto the Hub, they work in a process that never imports the package."""
    for name in ("models.unet_dyna_2d", "schedulers.scheduling_flow_match"):
        source = importlib.import_module(f"diffusers_dyna.{name}").__file__
        shutil.copy(source, tmp_path / f"copied_{name.split('.')[1]}.py")
    code = (
        "import sys\n"
        "from copied_unet_dyna_2d import DynaUNet2DModel\n"
        "from copied_scheduling_flow_match import FlowMatchODEScheduler\n"
        "assert DynaUNet2DModel.__module__ == 'copied_unet_dyna_2d'\n"
        "FlowMatchODEScheduler().set_timesteps(2)\n"
        "assert 'diffusers_dyna' not in sys.modules\n"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_fresh_process_is_silent_and_loads_what_was_saved(tmp_path):
    """No warning on import or on loading, and nothing imported that only an extra of the package needs."""
    pipe = diffusers_dyna.DynaUNetPipeline(tiny_unet(), diffusers_dyna.FlowMatchODEScheduler(), id2label={0: "cat"})
    pipe.save_pretrained(tmp_path / "pipe")
    code = (
        "import sys, diffusers_dyna\n"
        "assert not {'datasets', 'tensorboard', 'matplotlib', 'torchdiffeq'} & set(sys.modules)\n"
        "from diffusers import DiffusionPipeline\n"
        "from diffusers.utils.logging import disable_progress_bar\n"
        "disable_progress_bar()\n"
        "pipe = DiffusionPipeline.from_pretrained('pipe')\n"
        "assert type(pipe) is diffusers_dyna.DynaUNetPipeline and pipe.id2label == {0: 'cat'}\n"
        "assert type(pipe.unet) is diffusers_dyna.DynaUNet2DModel\n"
        "assert 'diffusers_dyna.hub' not in sys.modules and callable(diffusers_dyna.hub.publish)\n"
    )
    result = run_python(code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_cache_dit_finds_the_blocks():
    """With a threshold that everything is below, all but the first block are left out after the warm-up."""
    cache_dit = pytest.importorskip("cache_dit")
    pipe = DynaDiTPipeline(tiny_dyna_dit(num_layers=4), FlowMatchODEScheduler())
    pipe.set_progress_bar_config(disable=True)
    calls = []
    for block in pipe.transformer.transformer_blocks:
        block.register_forward_hook(lambda module, *args: calls.append(module))

    def draw():
        calls.clear()
        generator = torch.Generator().manual_seed(0)
        output = pipe([1, 2], num_inference_steps=10, generator=generator, output_type="pt", output_compute_ratio=True)
        return output.images, output.compute_ratio, len(calls)

    images, compute_ratio, count = draw()
    config = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4, "residual_diff_threshold": 1e6}
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**config))
    _, cached_ratio, cached_count = draw()
    assert count == 40
    assert cached_count == 4 * 4 + 6
    assert cached_ratio < 0.8 * compute_ratio  # a block that did not run counts as off
    cache_dit.disable_cache(pipe)
    assert torch.equal(draw()[0], images)
