# SPDX-License-Identifier: Apache-2.0
"""What leaves the machine when a pipeline is published, and what stops a publication before anything is created."""

import ast
import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

import diffusers_dyna
from diffusers_dyna.hub import check_can_publish, publish
from diffusers_dyna.hub.publishing import with_relative_imports_inlined, without_package_imports

from .conftest import write_training_summary


REPO = "ada/digits"
MAIN_FILES = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]
CODE_FILES = ["pipeline.py", "scheduler/scheduling_flow_match.py", "unet/unet_dyna_2d.py"]


@pytest.fixture
def pipeline_dir(saved_pipeline_dir, tmp_path):
    """A copy of the saved pipeline that a test may change."""
    return shutil.copytree(saved_pipeline_dir, tmp_path / "run" / "model")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder, number_of_shards):
    """Splits the weights of a model into shards with an index, as diffusers does for large models."""
    whole = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    weight_map = {}
    for i in range(number_of_shards):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-{number_of_shards:05}.safetensors"
        part = dict(list(weights.items())[i::number_of_shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_two_arguments_are_enough(hub, pipeline_dir):
    published = publish(pipeline_dir, REPO)

    assert sorted(hub.files(REPO)) == MAIN_FILES
    assert sorted(hub.files(REPO, "remote-code")) == sorted(MAIN_FILES + CODE_FILES)
    assert published.repo_id == REPO
    assert published.url == f"{hub.url}/{REPO}"
    repo = hub.repos[REPO]
    assert repo.branches == {"main": published.commit, "remote-code": published.remote_code_commit}
    assert [commit.branch for commit in repo.commits.values()] == ["main", "remote-code", "main"]
    assert not repo.private
    weights = (pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hub.files(REPO)["unet/diffusion_pytorch_model.safetensors"] == weights


def test_a_name_without_owner_belongs_to_the_user(hub, pipeline_dir):
    assert publish(pipeline_dir, "digits").repo_id == REPO
    assert f'DynaUNetPipeline.from_pretrained("{REPO}")' in hub.files(REPO)["README.md"].decode()


def test_records_of_both_revisions(hub, pipeline_dir):
    publish(pipeline_dir, REPO)
    main = json.loads(hub.files(REPO)["model_index.json"])
    assert main == json.loads((pipeline_dir / "model_index.json").read_text())
    assert main["unet"] == ["diffusers_dyna", "DynaUNet2DModel"]

    remote_code = json.loads(hub.files(REPO, "remote-code")["model_index.json"])
    assert remote_code.pop("_class_name") == ["pipeline", "DynaUNetPipeline"]
    assert remote_code.pop("unet") == ["unet_dyna_2d", "DynaUNet2DModel"]
    assert remote_code.pop("scheduler") == ["scheduling_flow_match", "FlowMatchODEScheduler"]
    assert remote_code.items() <= main.items()


def test_a_component_of_diffusers_stays_one(hub, pipeline_dir):
    pipeline = diffusers_dyna.DynaUNetPipeline.from_pretrained(pipeline_dir)
    pipeline.scheduler = DDPMScheduler()
    shutil.rmtree(pipeline_dir)
    pipeline.save_pretrained(pipeline_dir)
    publish(pipeline_dir, REPO)
    remote_code = hub.files(REPO, "remote-code")
    assert json.loads(remote_code["model_index.json"])["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert [path for path in remote_code if path.endswith(".py")] == ["pipeline.py", "unet/unet_dyna_2d.py"]


def test_nothing_else_and_no_local_path_leaves_the_machine(hub, pipeline_dir, tmp_path):
    write_training_summary(pipeline_dir)
    # What training, editors and older versions of diffusers and transformers leave behind.
    for name in (
        "optimizer.bin",
        "unet/optimizer.bin",
        "unet/optimizer.safetensors",
        "unet/training_state.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/notes.txt",
        "scheduler/scheduler.pkl",
        "checkpoint-10/model.safetensors",
        "logs/events.out.tfevents.1",
        ".env",
        "other.png",
    ):
        (pipeline_dir / name).parent.mkdir(exist_ok=True)
        (pipeline_dir / name).write_text(str(tmp_path))
    save_file({"step": torch.ones(1)}, pipeline_dir / "unet" / "optimizer.safetensors")
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        edit_json(pipeline_dir / name, _name_or_path=str(pipeline_dir))

    publish(pipeline_dir, REPO)

    assert sorted(hub.files(REPO)) == sorted([*MAIN_FILES, "samples.png"])
    assert sorted(hub.files(REPO, "remote-code")) == sorted([*MAIN_FILES, *CODE_FILES, "samples.png"])
    sent = [content for commit in hub.repos[REPO].commits.values() for content in commit.files.values()]
    for content in sent + list(hub.lfs_objects.values()) + hub.uploads:
        for private in (str(tmp_path), "_name_or_path", "secret", hub.token, "hf_abcdef"):
            assert private.encode() not in content


def test_tokenizer_files_go_along(hub, pipeline_dir, monkeypatch):
    class WithTokenizer(diffusers_dyna.DynaUNetPipeline):
        _optional_components = ["tokenizer"]

        def __init__(self, unet, scheduler, tokenizer=None, id2label=None):
            super().__init__(unet, scheduler, id2label)

    monkeypatch.setattr(diffusers_dyna, "DynaUNetPipeline", WithTokenizer)
    edit_json(pipeline_dir / "model_index.json", tokenizer=["transformers", "BertTokenizer"])
    (pipeline_dir / "tokenizer").mkdir()
    (pipeline_dir / "tokenizer" / "vocab.txt").write_text("[UNK]\n")
    (pipeline_dir / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(pipeline_dir), "vocab_file": "/data/vocab.txt", "do_lower_case": True})
    )
    (pipeline_dir / "tokenizer" / "train.log").write_text("")
    monkeypatch.setattr("diffusers_dyna.hub.publishing._add_code", lambda folder, target: None)
    publish(pipeline_dir, REPO)
    files = {path: content for path, content in hub.files(REPO).items() if path.startswith("tokenizer/")}
    assert sorted(files) == ["tokenizer/tokenizer_config.json", "tokenizer/vocab.txt"]
    assert json.loads(files["tokenizer/tokenizer_config.json"]) == {"do_lower_case": True}


def test_the_pictures_of_a_dynamic_run_go_along(hub, pipeline_dir):
    for name in ("activity.png", "tokens.png", "private.png"):
        (pipeline_dir / name).write_bytes(b"png")
    publish(pipeline_dir, REPO)
    assert sorted(hub.files(REPO)) == sorted([*MAIN_FILES, "activity.png", "tokens.png"])


def test_publishing_again_replaces_its_own_files_and_keeps_those_of_others(hub, pipeline_dir):
    shard(pipeline_dir / "unet", 3)
    first = publish(pipeline_dir, REPO)
    for branch in ("main", "remote-code"):
        others = {"LICENSE": b"mine", "unet/README.txt": b"mine", "figures/one.png": b"mine"}
        code = {"unet/unet_old_name.py": b""} if branch == "remote-code" else {}
        hub.repos[REPO].add_commit(branch, "by hand", {**hub.files(REPO, branch), **others, **code})
    assert "unet/diffusion_pytorch_model-00003-of-00003.safetensors" in hub.files(REPO)

    diffusers_dyna.DynaUNetPipeline.from_pretrained(pipeline_dir).save_pretrained(pipeline_dir)
    for old in (pipeline_dir / "unet").glob("*-of-*"):
        old.unlink()
    (pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink(missing_ok=True)
    second = publish(pipeline_dir, REPO)

    kept = ["LICENSE", "figures/one.png", "unet/README.txt"]
    assert sorted(hub.files(REPO)) == sorted(MAIN_FILES + kept)
    assert sorted(hub.files(REPO, "remote-code")) == sorted(MAIN_FILES + CODE_FILES + kept)
    assert second.commit != first.commit
    # What was pinned is still there.
    assert "unet/unet_dyna_2d.py" in hub.files(REPO, first.remote_code_commit)


def test_publishing_the_same_again_changes_nothing(hub, pipeline_dir):
    first = publish(pipeline_dir, REPO)
    assert publish(pipeline_dir, REPO) == first
    assert len(hub.repos[REPO].commits) == 3


def test_weights_are_uploaded_once_for_both_revisions(hub, pipeline_dir):
    publish(pipeline_dir, REPO)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1


def test_a_card_in_the_folder_is_used_as_it_is(hub, pipeline_dir):
    own_card = "---\nlicense: mit\n---\r\n\r\n# Written by hand\n"
    (pipeline_dir / "README.md").write_bytes(own_card.encode())
    publish(pipeline_dir, REPO, tags=["unused"])
    for branch in ("main", "remote-code"):
        assert hub.files(REPO, branch)["README.md"] == own_card.encode()


def test_the_card_of_main_pins_the_code(hub, pipeline_dir):
    published = publish(pipeline_dir, REPO)
    assert f'revision="{published.remote_code_commit}"' in hub.files(REPO)["README.md"].decode()
    remote_code_card = hub.files(REPO, "remote-code")["README.md"].decode()
    assert 'revision="remote-code"' in remote_code_card
    assert "Pin it to a commit" in remote_code_card


def test_private_only_when_asked(hub, pipeline_dir):
    publish(pipeline_dir, REPO)
    publish(pipeline_dir, "lab/hidden", private=True)
    assert not hub.repos[REPO].private
    assert hub.repos["lab/hidden"].private

    publish(pipeline_dir, "lab/hidden")
    assert hub.repos["lab/hidden"].private, "an existing repository keeps its visibility"
    publish(pipeline_dir, "lab/hidden", private=True)


def test_private_is_refused_where_a_public_repository_exists(hub, pipeline_dir):
    publish(pipeline_dir, REPO)
    commits = len(hub.repos[REPO].commits)
    with pytest.raises(
        ValueError, match=r"`private=True` was asked for, but the repository `ada/digits` exists and is"
    ):
        publish(pipeline_dir, REPO, private=True)
    assert len(hub.repos[REPO].commits) == commits


def remove(path):
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def write(path, text):
    return lambda folder: (folder / path).write_text(text)


def record(**changes):
    return lambda folder: edit_json(folder / "model_index.json", **changes)


def truncate(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_a_shard(folder):
    shard(folder / "unet", 2)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def use_a_plain_diffusers_pipeline(folder):
    shutil.rmtree(folder)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


GRID = {"sample_grid": {"file": "samples.png"}}
ESCAPING_GRID = {"sample_grid": {"file": "../samples.png"}}


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, r"`pipeline_dir`='.*model' is not a folder\. Give the folder that `save_pretrained`"),
        (remove("model_index.json"), r"holds no pipeline: it has no `model_index\.json`"),
        (write("model_index.json", "{"), r"`model_index\.json` in `pipeline_dir` is not valid JSON"),
        (write("model_index.json", "[]"), r"`model_index\.json` in `pipeline_dir` must hold a JSON object"),
        (
            use_a_plain_diffusers_pipeline,
            r"class 'DDPMPipeline', but only those of diffusers_dyna can be published: Dyna",
        ),
        (record(_class_name=["pipeline", "DynaUNetPipeline"]), r"holds a pipeline of class \['pipeline', 'DynaUNet"),
        (record(_class_name="FlowMatchODEScheduler"), r"holds a pipeline of class 'FlowMatchODEScheduler', but only"),
        (
            record(unet=["__main__", "Net"]),
            r"Component `unet` .* recorded as __main__\.Net, which nobody else can load",
        ),
        (record(unet=["diffusers_modules.local.unet", "Net"]), r"nobody else can load"),
        (record(unet=["diffusers_dyna", "Gone"]), r"is a 'Gone', which this version of diffusers_dyna does not have"),
        (remove("unet"), r"`pipeline_dir` has no folder `unet`, which `model_index\.json` names"),
        (
            remove("unet/diffusion_pytorch_model.safetensors"),
            r"`unet` in `pipeline_dir` has no `\.safetensors` weights",
        ),
        (truncate, r"`unet/diffusion_pytorch_model\.safetensors` in `pipeline_dir` is no complete safetensors file"),
        (lose_a_shard, r"lacks the weights \['diffusion_pytorch_model-00002-of-00002\.safetensors'\]"),
        (write("training_summary.json", "nothing"), r"`training_summary\.json` in `pipeline_dir` is not valid JSON"),
        (write("training_summary.json", json.dumps(GRID)), r"names the file 'samples\.png', which is no PNG picture"),
        (
            write("training_summary.json", json.dumps(ESCAPING_GRID)),
            r"names the file '\.\./samples\.png', which is no",
        ),
        (
            write("README.md", "---\nlicense: [\n---\n"),
            r"The metadata of `README\.md` in `pipeline_dir` cannot be read",
        ),
    ],
)
def test_a_bad_folder_stops_before_anything_is_created(hub, pipeline_dir, damage, message):
    write("../samples.png", "outside")(pipeline_dir)
    damage(pipeline_dir)
    with pytest.raises(ValueError, match=message):
        publish(pipeline_dir, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo_id, message",
    [
        ("a/b/c", r"`repo_id`='a/b/c' is no name of a repository: .* Use 'owner/name' or 'name'\."),
        ("./outputs", r"`repo_id`='\./outputs' is no name of a repository"),
        ("ada/two words", r"`repo_id`='ada/two words' is no name of a repository"),
        ("", r"`repo_id`"),
    ],
)
def test_a_bad_repo_id_stops_before_anything_is_created(hub, pipeline_dir, repo_id, message):
    for attempt in (lambda: publish(pipeline_dir, repo_id), lambda: check_can_publish(repo_id)):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert hub.requests == []


def log_out(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def mistype_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def read_only(hub, monkeypatch):
    hub.role = "read"


@pytest.mark.parametrize(
    "situation, repo_id, message",
    [
        (
            log_out,
            REPO,
            r"Publishing `ada/digits` .* but there is none\. Log in with `hf auth login`, or set .*`HF_TOKEN`",
        ),
        (mistype_token, REPO, r"The Hub does not accept the access token\. Log in with `hf auth login`"),
        (read_only, REPO, r"needs an access token with the right to write, but this one may only read"),
        (lambda *_: None, "bob/digits", r"`repo_id`='bob/digits' belongs to 'bob', but .* for ada, lab only"),
    ],
)
def test_a_token_that_will_not_do_stops_before_anything_is_created(
    hub, pipeline_dir, monkeypatch, situation, repo_id, message
):
    situation(hub, monkeypatch)
    for attempt in (lambda: publish(pipeline_dir, repo_id), lambda: check_can_publish(repo_id)):
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert "hf_" not in str(error.value).replace("HF_TOKEN", "")
    assert hub.uploads == []
    assert hub.repos == {}


def test_check_can_publish_names_the_repository_and_creates_nothing(hub, monkeypatch):
    assert check_can_publish("digits") == "ada/digits"
    assert check_can_publish("lab/digits") == "lab/digits"
    monkeypatch.delenv("HF_TOKEN")
    assert check_can_publish("digits", token=hub.token) == "ada/digits"
    assert hub.uploads == []


def test_a_token_can_be_passed(hub, pipeline_dir, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert publish(pipeline_dir, REPO, token=hub.token).repo_id == REPO
    assert sorted(hub.files(REPO)) == MAIN_FILES


def public_classes():
    classes = [getattr(diffusers_dyna, name) for name in diffusers_dyna.__all__]
    return [cls for cls in classes if inspect.isclass(cls)]


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_the_file_of_every_class_works_alone(cls, tmp_path, monkeypatch):
    file = Path(inspect.getsourcefile(cls))
    source = file.read_text()
    if issubclass(cls, DiffusionPipeline):
        source = without_package_imports(with_relative_imports_inlined(file), file.name)
        assert source.count("SPDX-License-Identifier") == 1 and ast.get_docstring(ast.parse(source))
        assert "from ." not in source
    file = tmp_path / "alone.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("alone", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alone", module)
    spec.loader.exec_module(module)
    assert getattr(module, cls.__name__) is not cls
    of_package = [
        value for value in vars(module).values() if getattr(value, "__module__", "").startswith("diffusers_dyna")
    ]
    assert of_package == []


IMPORT = "from diffusers_dyna.models.unet_dyna_2d import DynaUNet2DModel\n"


@pytest.mark.parametrize(
    "source, message",
    [
        (IMPORT + "model = DynaUNet2DModel()\n", r"`p\.py` uses DynaUNet2DModel in line 2\. .* in type hints only"),
        (
            IMPORT + "def f(x: DynaUNet2DModel):\n    isinstance(x, DynaUNet2DModel)\n",
            r"uses DynaUNet2DModel in line 3",
        ),
        ("from diffusers_dyna.models.unet_dyna_2d import DynaUNetAttnProcessor\n", r"neither a model nor a scheduler"),
        ("import diffusers_dyna\n", r"still imports diffusers_dyna .*: 'import diffusers_dyna'"),
        ("def f():\n    from diffusers_dyna.hub import publish\n", r"still imports diffusers_dyna"),
        ('"""\nfrom diffusers_dyna import DynaUNetPipeline\n"""\n', r"still imports diffusers_dyna"),
    ],
)
def test_code_that_would_need_the_package_is_not_published(source, message):
    with pytest.raises(ValueError, match=message):
        without_package_imports(source, "p.py")


def test_imports_of_type_hints_become_base_classes():
    source = (
        "from diffusers_dyna.models.unet_dyna_2d import (\n    DynaUNet2DModel as Net,\n)\n"
        "from diffusers_dyna.schedulers.scheduling_flow_match import FlowMatchODEScheduler  # why\n"
        "def f(net: Net | None, scheduler: FlowMatchODEScheduler) -> Net: ...\n"
    )
    rewritten = without_package_imports(source, "p.py").splitlines()
    assert rewritten[0].startswith("from diffusers import ModelMixin as Net  # ")
    assert rewritten[1].startswith("from diffusers import SchedulerMixin as FlowMatchODEScheduler  # ")
    assert rewritten[2] == source.splitlines()[-1]


def test_a_module_beside_the_file_is_taken_in(tmp_path):
    (tmp_path / "deep.py").write_text('# SPDX-License-Identifier: X\n"""Deep."""\n\nONE = 1\n')
    (tmp_path / "base.py").write_text(
        "# SPDX-License-Identifier: X\nimport math\nfrom .deep import ONE\n\nTWO = 2 * ONE\n"
    )
    (tmp_path / "top.py").write_text(
        '# SPDX-License-Identifier: X\n"""Top."""\nimport math\n\nfrom .base import (\n    TWO,\n)\n\n\nTHREE = TWO + 1\n'
    )
    source = with_relative_imports_inlined(tmp_path / "top.py")
    assert (
        source.split()
        == (
            '# SPDX-License-Identifier: X """Top.""" import math import math ONE = 1 TWO = 2 * ONE THREE = TWO + 1'
        ).split()
    )
    names = {}
    exec(source, names)
    assert names["THREE"] == 3


@pytest.mark.parametrize(
    "line", ["from . import deep", "from ..deep import ONE", "from .deep import ONE as one", "from .deep import *"]
)
def test_another_import_from_beside_the_file_is_refused(line, tmp_path):
    (tmp_path / "top.py").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"`top\.py` has the import .* can take in a file beside it only"):
        with_relative_imports_inlined(tmp_path / "top.py")


@pytest.mark.slow
def test_publishing_from_a_fresh_process_prints_no_token(pipeline_dir, tmp_path):
    from .loopback_hub import LoopbackHub

    code = f"from diffusers_dyna.hub import publish; print(publish({str(pipeline_dir)!r}, 'digits'))"
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert sorted(hub.files(REPO)) == MAIN_FILES
        assert hub.token not in done.stdout + done.stderr
        assert f"url='{hub.url}/{REPO}'" in done.stdout
