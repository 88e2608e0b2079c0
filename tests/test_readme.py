# SPDX-License-Identifier: Apache-2.0
"""Runs every code block of the README, in order, in a copy of the repository, as somebody who follows it would."""

import ast
import builtins
import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .conversion.test_convert_dit import random_state
from .hub.loopback_hub import LoopbackHub
from .testing_utils import tiny_text_encoder, tiny_tokenizer


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def read_blocks():
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_block_has_a_language_that_is_run():
    blocks = read_blocks()
    assert len(blocks) >= 8
    assert {language for language, _ in blocks} == {"bash", "python"}
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("```") == 2 * len(blocks)


def test_links_to_files_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    assert len(targets) >= 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("pipeline_*.py")), ids=lambda path: path.stem)
def test_examples_of_the_pipelines(path):
    """They compile, use no name that they do not define, and load a pipeline that the README trains."""
    text = getattr(importlib.import_module(f"diffusers_dyna.pipelines.{path.stem}"), "EXAMPLE_DOC_STRING", None)
    if text is None:
        assert path.stem == "pipeline_dyna_dit_base"
        return
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(text.replace("```", "")))
    nodes = list(ast.walk(ast.parse(code)))
    defined = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert {node.id for node in names} - defined - set(vars(builtins)) == set()
    folders = re.findall(r'\.from_pretrained\("(.*?)"\)', code)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(folders) == 1 and f'.from_pretrained("{folders[0]}")' in readme


def save_stable_diffusion_3(folder: Path) -> None:
    """A pipeline of the same classes with random weights, small enough for a test, without the third text encoder."""
    characters = list(map(chr, range(33, 127)))
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4, use_quant_conv=False,
            use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
        ),
        text_encoder=CLIPTextModelWithProjection(config), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=tokenizer,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A copy of the repository with the data that the README names as the reader's own."""
    for name in ("diffusers_dyna", "pipelines", "examples", "tools", "Makefile", "setup.cfg", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    rng = np.random.default_rng(0)
    rows = []
    for label, name in enumerate(("rose", "tulip")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            image = PIL.Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"{i}.jpg")
            rows.append({"image": image, "label": label})
    captioned = tmp_path / "captioned"
    shutil.copytree(tmp_path / "photos" / "rose", captioned)
    lines = [{"file_name": path.name, "text": ["1", "2 3"]} for path in sorted(captioned.iterdir())]
    (captioned / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["rose", "tulip"])})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "data" / "flowers")
    # A file in DiT's layout, of the smallest preset: the one that is named would be 2.7 GB.
    sizes = {"layers": 12, "width": 384, "mlp_width": 1536, "grid": 4, "patch": 8, "rows": 1001}
    torch.save(random_state(**sizes, channels=4, out_channels=8), tmp_path / "DiT-XL-2-256x256.pt")
    # In the place of a repository of the Hub: a folder of that name comes first.
    save_stable_diffusion_3(tmp_path / "stabilityai" / "stable-diffusion-3.5-medium")
    text_encoder = tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2"
    tokenizer = tiny_tokenizer(list("0123456789"))
    tokenizer.save_pretrained(text_encoder)
    tiny_text_encoder(len(tokenizer)).save_pretrained(text_encoder)
    return tmp_path


def test_the_swap_of_a_scheduler_runs(tmp_path, monkeypatch):
    """The block that changes the scheduler of a pipeline of diffusers, without waiting for the others."""
    (block,) = (block for language, block in read_blocks() if "StableDiffusion3Pipeline" in block)
    save_stable_diffusion_3(tmp_path / "stabilityai" / "stable-diffusion-3.5-medium")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block, scope)
    assert scope["image"].size == (8, 8)
    assert scope["pipe"].scheduler.config.solver == "abm3"
    assert scope["pipe"].scheduler.config.shift == 3.0
    assert len(scope["pipe"].scheduler.timesteps) == 20


@pytest.mark.slow
def test_every_block_runs(checkout, tmp_path_factory):
    with LoopbackHub() as hub:
        environment = {
            **os.environ,
            **hub.environment(tmp_path_factory.mktemp("home")),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "ACCELERATE_USE_CPU": "true",
        }
        python = ""
        for language, block in read_blocks():
            if language == "python":
                # A block that loads something stands alone; the others go on from the one before.
                stands_alone = ".from_pretrained(" in block
                python = ("" if stands_alone else python) + block.replace("my-name", hub.user)
                command = [sys.executable, "-c", python]
            else:
                # The environment is there already; runs of thousands of steps are cut to two.
                block = block.replace("make demo", "python examples/demo.py").replace("make test", "true")
                block = re.sub(r"^(pip install|\. \.venv).*", "true", block, flags=re.MULTILINE)
                block = re.sub(r"--max_train_steps \d{4,}", "--max_train_steps 2", block)
                command = ["bash", "-euo", "pipefail", "-c", block]
            result = subprocess.run(
                command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900
            )
            assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
    assert (checkout / "outputs" / "three.png").exists()
    assert (checkout / "outputs" / "dynamic-three.png").exists()
    assert (checkout / "outputs" / "caption-three.png").exists()
    for name in ("edited", "styled", "filled", "filled-by-caption", "filled-without-training", "enlarged"):
        assert (checkout / "outputs" / f"{name}.png").exists()
    models = ("dit-static", "dit-0.6", "dit-xl-2", "text-digits", "text-inpaint", "dit-inpaint", "dit-upscale")
    for name in ("digits", "photos", "flowers", "captioned", *models):
        assert (checkout / "outputs" / name / "model_index.json").exists()
