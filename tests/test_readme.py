# SPDX-License-Identifier: Apache-2.0
"""Runs every code block of the README, in order, in a copy of the repository, as somebody who follows it would."""

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

from .conversion.test_convert_dit import random_state
from .hub.loopback_hub import LoopbackHub


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
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["rose", "tulip"])})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "data" / "flowers")
    # A file in DiT's layout, of the smallest preset: the one that is named would be 2.7 GB.
    sizes = {"layers": 12, "width": 384, "mlp_width": 1536, "grid": 4, "patch": 8, "rows": 1001}
    torch.save(random_state(**sizes, channels=4, out_channels=8), tmp_path / "DiT-XL-2-256x256.pt")
    return tmp_path


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
    for name in ("digits", "photos", "flowers", "dit-static", "dit-0.6", "dit-xl-2"):
        assert (checkout / "outputs" / name / "model_index.json").exists()
