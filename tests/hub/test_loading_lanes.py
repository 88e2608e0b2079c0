# SPDX-License-Identifier: Apache-2.0
"""
The ways to load a published pipeline, each in a fresh process, from the Hub and from a local folder, compared by the
images that come out with those of the pipeline before it was saved.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from huggingface_hub import constants

import diffusers_dyna
from diffusers_dyna import (
    DynaDiTPipeline,
    DynaDiTTextToImagePipeline,
    DynaDiTTransformer2DModel,
    FlowMatchODEScheduler,
)
from diffusers_dyna.hub import publish

from ..pipelines.dyna_dit_common import TEXT, tiny_dit, tiny_text_encoder, tiny_tokenizer
from .conftest import save_tiny_pipeline, write_training_summary
from .loopback_hub import LoopbackHub


@dataclass(frozen=True)
class Family:
    """
    One pipeline of the package.

    Args:
        save (`Callable`): saves a tiny pipeline in a folder and returns it.
        pipeline (`str`): name of its class.
        components (`dict[str, str]`): module and name of each component's class.
        call (`str`): arguments of a call as code, without generator and output type.
        card_call (`dict`): what the example in the card draws, but for the pictures that it reads.
        settings (`tuple[str, ...]`): further arguments of the pipeline's class, saved in its config.
        pictures (`tuple[str, ...]`): arguments for which the example in the card reads a picture.
    """

    save: Callable
    pipeline: str
    components: dict[str, str]
    call: str
    card_call: dict
    settings: tuple[str, ...] = ("id2label",)
    pictures: tuple[str, ...] = ()

    def arguments(self) -> dict:
        return eval(f"dict({self.call})", {"numpy": np})


def save_tiny_dit_pipeline(folder):
    """Saves an 8x8 pipeline in pixel space, with fixed random weights and routers that switch things off."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = DynaDiTTransformer2DModel(
            sample_size=8,
            in_channels=1,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_classes=10,
            learn_sigma=False,
        )
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                # DiT starts them at zero, where every block is the identity, and the routers with everything on.
                if "modulation" in name or "norm_out" in name or "proj_out" in name:
                    parameter.normal_(std=0.3)
                elif "_rate" in name:
                    parameter.normal_(std=20.0 if name.endswith("weight") else 2.0)
    id2label = {label: f"digit {label}" for label in range(10)}
    pipeline = DynaDiTPipeline(transformer.eval(), FlowMatchODEScheduler(), id2label=id2label)
    pipeline.save_pretrained(folder)
    return pipeline


def save_tiny_text_pipeline(folder):
    """Saves an 8x8 pipeline in pixel space that reads text, with its text encoder and tokenizer."""
    transformer = tiny_dit(**TEXT, in_channels=1, learn_sigma=False)
    pipeline = DynaDiTTextToImagePipeline(transformer, FlowMatchODEScheduler(), tiny_text_encoder(), tiny_tokenizer())
    pipeline.save_pretrained(folder)
    return pipeline


def saver(pipeline_class, **config):
    """A function that saves a tiny pipeline which is given images, with classes or with text."""

    def save(folder):
        transformer = tiny_dit(in_channels=1, learn_sigma=False, **config)
        parts = (
            {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
            if "caption_channels" in config
            else {}
        )
        pipeline = pipeline_class(transformer, FlowMatchODEScheduler(), **parts)
        pipeline.save_pretrained(folder)
        return pipeline

    return save


DIT = {
    "transformer": "diffusers_dyna.DynaDiTTransformer2DModel",
    "scheduler": "diffusers_dyna.FlowMatchODEScheduler",
}
WITH_TEXT = {**DIT, "text_encoder": "transformers.BertModel", "tokenizer": "transformers.PreTrainedTokenizerFast"}
LABELS = 'class_labels=[3, "digit 7"], num_inference_steps=3, guidance_scale=2.0'
PROMPTS = 'prompt=["a big red square", "dark"], num_inference_steps=3, guidance_scale=2.0'
IMAGE = "image=numpy.linspace(0, 1, 64, dtype=numpy.float32).reshape(1, 8, 8, 1)"
MASK = "mask_image=numpy.tri(8, dtype=numpy.float32).reshape(1, 8, 8, 1)"
FAMILIES = {
    "unet": Family(
        save=save_tiny_pipeline,
        pipeline="DynaUNetPipeline",
        components={"unet": "diffusers_dyna.DynaUNet2DModel", "scheduler": "diffusers_dyna.FlowMatchODEScheduler"},
        call=LABELS,
        card_call={"class_labels": [0, 1]},
    ),
    "dit": Family(
        save=save_tiny_dit_pipeline,
        pipeline="DynaDiTPipeline",
        components=DIT,
        call=LABELS,
        card_call={"class_labels": [0, 1]},
    ),
    "text": Family(
        save=save_tiny_text_pipeline,
        pipeline="DynaDiTTextToImagePipeline",
        components=WITH_TEXT,
        call=PROMPTS,
        card_call={"prompt": "a lighthouse on a cliff"},
        settings=(),
    ),
    "img2img": Family(
        save=saver(diffusers_dyna.DynaDiTImg2ImgPipeline, **TEXT),
        pipeline="DynaDiTImg2ImgPipeline",
        components=WITH_TEXT,
        call=f"{PROMPTS}, {IMAGE}",
        card_call={"prompt": "a lighthouse on a cliff"},
        pictures=("image",),
    ),
    "inpaint": Family(
        save=saver(diffusers_dyna.DynaDiTInpaintPipeline, condition_channels=2),
        pipeline="DynaDiTInpaintPipeline",
        components=DIT,
        call=f"class_labels=[1, 2], num_inference_steps=3, guidance_scale=2.0, {IMAGE}, {MASK}",
        card_call={"class_labels": [0]},
        pictures=("image", "mask_image"),
    ),
    "upscale": Family(
        save=saver(diffusers_dyna.DynaDiTUpscalePipeline, condition_channels=1, noise_level_conditioning=True),
        pipeline="DynaDiTUpscalePipeline",
        components=DIT,
        call=f"class_labels=[1, 2], num_inference_steps=3, {IMAGE}",
        card_call={"class_labels": [0]},
        settings=("id2label", "upscale_factor", "max_noise_level"),
        pictures=("image",),
    ),
}

WITHOUT_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_dyna":
            raise ModuleNotFoundError("No module named " + repr(name))

sys.meta_path.insert(0, Blocker())
try:
    import diffusers_dyna
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("diffusers_dyna can be imported")
"""

LOAD = {
    "package": "from diffusers_dyna import {pipeline}; pipe = {pipeline}.from_pretrained({source!r})",
    "diffusers": (
        "import diffusers_dyna; from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained({source!r})"
    ),
    "remote-code": (
        WITHOUT_PACKAGE + "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained({source!r}, trust_remote_code=True{revision})"
    ),
    "subfolders": (
        "import diffusers_dyna, pydoc\n"
        "parts = {{name: pydoc.locate(cls).from_pretrained({source!r}, subfolder=name)"
        " for name, cls in {components!r}.items()}}\n"
        "pipe = diffusers_dyna.{pipeline}(**parts, **{settings!r})"
    ),
}

DRAW = """
import numpy, torch
images = pipe({call}, generator=torch.Generator().manual_seed(5), output_type="np").images
numpy.save("images.npy", images)
print("class of the pipeline:", type(pipe).__module__)
"""


@dataclass(frozen=True)
class Published:
    hub: LoopbackHub
    repo_id: str
    family: Family
    local: dict[str, str]  # folder with the files of each revision
    remote_code_commit: str
    images: np.ndarray  # of the pipeline in memory, before it was saved
    settings: dict  # further arguments of the pipeline's class


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """A published pipeline, the images it makes, and what was published as local folders too."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = family.save(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(**family.arguments(), generator=torch.Generator().manual_seed(5), output_type="np").images
    assert np.ptp(images) > 0.1, "images that are all alike would compare equal whatever was loaded"
    write_training_summary(folder / "model")

    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("NO_PROXY", "127.0.0.1")
        repo = publish(folder / "model", "digits", token=hub.token)
        local = {}
        for branch in ("main", "remote-code"):
            local[branch] = str(folder / branch)
            for path, content in hub.files(repo.repo_id, branch).items():
                file = folder / branch / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        settings = {name: pipeline.config[name] for name in family.settings}
        yield Published(hub, repo.repo_id, family, local, repo.remote_code_commit, images, settings)


def run(code: str, published: Published, folder: Path) -> subprocess.CompletedProcess:
    """Runs code in a fresh process with empty caches."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=published.hub.environment(folder / "home"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )


def load_and_draw(lane: str, published: Published, folder: Path, source: str, revision: str | None = None) -> str:
    """Loads in the given way, checks the images, and returns what the process printed."""
    family = published.family
    code = LOAD[lane].format(
        source=source,
        revision=f", revision={revision!r}" if revision else "",
        pipeline=family.pipeline,
        components=family.components,
        settings=published.settings,
    ) + DRAW.format(call=family.call)
    done = run(code, published, folder)
    assert done.returncode == 0, done.stderr
    # Same weights, code and noise on one machine; the number of threads may differ between the processes.
    np.testing.assert_allclose(np.load(folder / "images.npy"), published.images, rtol=0, atol=1e-5)
    assert "Expected types" not in done.stderr
    assert "pip install" not in done.stderr
    module = "diffusers_modules" if lane == "remote-code" else "diffusers_dyna"
    assert f"class of the pipeline: {module}." in done.stdout
    return done.stdout + done.stderr


def test_package_class_from_the_hub(published, tmp_path):
    load_and_draw("package", published, tmp_path, published.repo_id)


# The pipelines that can work with the components of another one.
TWINS = {
    "DynaDiTPipeline": ("DynaDiTImg2ImgPipeline", "DynaDiTInpaintPipeline"),
    "DynaDiTTextToImagePipeline": ("DynaDiTImg2ImgPipeline", "DynaDiTInpaintPipeline"),
    "DynaDiTImg2ImgPipeline": ("DynaDiTTextToImagePipeline", "DynaDiTInpaintPipeline"),
}


def test_from_pipe_of_a_loaded_pipeline(published):
    """There and back, with the very same components and names."""
    family = published.family
    cls = getattr(diffusers_dyna, family.pipeline)
    pipe = cls.from_pretrained(published.local["main"])
    for name in TWINS.get(family.pipeline, (family.pipeline,)):
        twin = getattr(diffusers_dyna, name).from_pipe(pipe)
        back = cls.from_pipe(twin)
        for component in family.components:
            assert getattr(pipe, component) is getattr(twin, component) is getattr(back, component)
        for setting in family.settings:
            assert back.config[setting] == pipe.config[setting] == published.settings[setting]
    back.set_progress_bar_config(disable=True)
    images = back(**family.arguments(), generator=torch.Generator().manual_seed(5), output_type="np").images
    np.testing.assert_allclose(images, published.images, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["package", "diffusers", "subfolders"])
def test_local_folder(published, tmp_path, lane):
    load_and_draw(lane, published, tmp_path, published.local["main"])


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["diffusers", "subfolders"])
def test_hub(published, tmp_path, lane):
    load_and_draw(lane, published, tmp_path, published.repo_id)


@pytest.mark.slow
def test_remote_code_from_the_branch(published, tmp_path):
    load_and_draw("remote-code", published, tmp_path, published.repo_id, revision="remote-code")


@pytest.mark.slow
def test_remote_code_from_a_local_folder(published, tmp_path):
    load_and_draw("remote-code", published, tmp_path, published.local["remote-code"])


@pytest.mark.slow
def test_remote_code_does_not_run_without_trust(published, tmp_path):
    code = LOAD["remote-code"].replace("trust_remote_code=True", "trust_remote_code=False")
    done = run(code.format(source=published.repo_id, revision=", revision='remote-code'"), published, tmp_path)
    assert done.returncode != 0
    assert "Pass `trust_remote_code=True`" in done.stderr


def test_the_packageless_process_can_really_not_import_it(published, tmp_path):
    done = run(WITHOUT_PACKAGE + "import diffusers_dyna.hub", published, tmp_path)
    assert "ModuleNotFoundError: No module named 'diffusers_dyna'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("with_package", [True, False], ids=["package", "remote code"])
def test_the_code_in_the_card_runs(published, tmp_path, with_package):
    card = published.hub.files(published.repo_id)["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert len(blocks) == 2
    snippet = blocks[0] if with_package else blocks[1]
    assert with_package or f'revision="{published.remote_code_commit}"' in snippet

    pictures = {"image": Image.linear_gradient("L").resize((8, 8)), "mask_image": Image.new("L", (8, 8))}
    pictures["mask_image"].paste(255, (2, 3, 6, 7))
    pictures["image"].save(tmp_path / "image.png")
    pictures["mask_image"].save(tmp_path / "mask.png")
    done = run(snippet if with_package else WITHOUT_PACKAGE + snippet, published, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr

    # The picture that the card promises: settings and seed of the sample grid.
    expected = published.family.save(tmp_path / "again")(
        **published.family.card_call,
        **{name: pictures[name] for name in published.family.pictures},
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    drawn = np.asarray(Image.open(tmp_path / "sample.png"), dtype=int)
    assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 1  # one grey level, for rounding


@pytest.mark.slow
def test_remote_code_from_the_commit_survives_later_publications(published, tmp_path):
    """What a card has pinned keeps loading the weights and the code of its time."""
    repo = published.hub.repos[published.repo_id]
    files = published.hub.files(published.repo_id, "remote-code")
    later = {**files, "pipeline.py": b"raise RuntimeError('code of a later commit')\n"}
    before = dict(repo.branches)
    repo.add_commit("remote-code", "later", later)
    try:
        load_and_draw("remote-code", published, tmp_path, published.repo_id, revision=published.remote_code_commit)
    finally:
        repo.branches.update(before)
