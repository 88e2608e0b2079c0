# SPDX-License-Identifier: Apache-2.0
"""The tools in `tools/`: what they decide and find, on made-up input. Nothing is installed."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_docstrings = load_tool("check_docstrings")
check_rules = load_tool("check_rules")
install_torch = load_tool("install_torch")
lower_bounds = load_tool("lower_bounds")


def make_report(*requires_dist: str) -> dict:
    return {"install": [{"metadata": {"name": "torch", "version": "2.13.0", "requires_dist": list(requires_dist)}}]}


CPU_REPORT = make_report("filelock", "sympy>=1.13.3", 'opt-einsum>=3.3; extra == "opt-einsum"')
CUDA_REPORT = make_report(
    "filelock",
    f'cuda-bindings<14,>=13.0.3; sys_platform == "{sys.platform}"',
    f'nvidia-cudnn-cu13==9.20.0.48; sys_platform == "{sys.platform}"',
    'triton==3.7.1; sys_platform == "another"',
)


class FakeRun:
    """
    Takes the place of `subprocess.run`: answers as told and notes what it was asked to install.

    Args:
        report (`dict`, *optional*): what pip's dry run prints; `None` lets it fail.
        failing (`tuple[str, ...]`, defaults to `()`): installers that fail: `"uv by pip"`, `"torch by uv"`, ...
        knows_fast_deps (`bool`, defaults to `True`): whether pip takes `--use-feature=fast-deps`.
        num_gpus (`int`, defaults to `0`): whether `nvidia-smi` succeeds.
    """

    def __init__(self, report, failing=(), knows_fast_deps=True, num_gpus=0):
        self.report, self.failing, self.knows_fast_deps, self.num_gpus = report, failing, knows_fast_deps, num_gpus
        self.installed, self.commands = [], []

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0 if self.num_gpus else 9)
        if "--dry-run" in command:
            is_known = self.knows_fast_deps or "--use-feature=fast-deps" not in command
            is_answered = self.report is not None and is_known
            return subprocess.CompletedProcess(command, int(not is_answered), json.dumps(self.report))
        installer = command[2]
        name = f"{'uv' if installer == 'pip' and command[-1] == 'uv' else 'torch'} by {installer}"
        self.installed.append(name)
        return subprocess.CompletedProcess(command, int(name in self.failing))


REQUIREMENT = ["torch", "--constraint", "constraints.txt"]


@pytest.fixture(autouse=True)
def nvidia_smi_exists(monkeypatch):
    monkeypatch.setattr(install_torch.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("run", "installed"),
    [
        pytest.param(FakeRun({"install": []}), [], id="already installed"),
        pytest.param(FakeRun(CPU_REPORT), ["torch by pip"], id="pip takes a build without CUDA"),
        pytest.param(FakeRun(CUDA_REPORT, num_gpus=1), ["torch by pip"], id="a GPU"),
        pytest.param(FakeRun(CUDA_REPORT), ["uv by pip", "torch by uv"], id="no GPU"),
        pytest.param(
            FakeRun(CUDA_REPORT, knows_fast_deps=False), ["uv by pip", "torch by uv"], id="a pip without fast-deps"
        ),
        pytest.param(FakeRun(None), ["torch by pip"], id="pip cannot tell, and its own error follows"),
    ],
)
def test_install_torch_chooses_the_build(run, installed):
    assert install_torch.install_torch(REQUIREMENT, run) == 0
    assert run.installed == installed


@pytest.mark.parametrize("failing", ["uv by pip", "torch by uv"])
def test_install_torch_takes_the_default_build_where_uv_fails(failing, capsys):
    run = FakeRun(CUDA_REPORT, failing=(failing,))
    assert install_torch.install_torch(REQUIREMENT, run) == 0
    assert run.installed[-1] == "torch by pip"
    assert "taking the default one, with gigabytes of CUDA packages" in capsys.readouterr().out


def test_install_torch_reports_failure_and_passes_the_constraint():
    run = FakeRun(CUDA_REPORT, failing=("torch by uv", "torch by pip"))
    assert install_torch.install_torch(REQUIREMENT, run) == 1
    uv = run.commands[-2]
    assert uv[:5] == [sys.executable, "-m", "uv", "pip", "install"]
    assert uv[5:] == ["--python", sys.executable, "--torch-backend=cpu", *REQUIREMENT]
    assert all(command[-3:] == REQUIREMENT for command in run.commands if "--dry-run" in command)


def test_cuda_packages_reads_the_markers():
    assert install_torch.cuda_packages(CPU_REPORT) == []
    assert install_torch.cuda_packages(CUDA_REPORT) == ["cuda-bindings", "nvidia-cudnn-cu13"]
    assert install_torch.cuda_packages(make_report("triton==3.7.1", "tritonclient", "pytorch-triton")) == [
        "triton",
        "pytorch-triton",
    ]


def test_lower_bounds_become_pins():
    setup_cfg = """
[options]
install_requires =
    torch>=2.6
    huggingface_hub>=1.23,<3
[options.extras_require]
train =
    datasets>=4.0
dev =
    pytest>=8.3
"""
    assert lower_bounds.lower_bounds(setup_cfg) == {"huggingface-hub": "1.23", "datasets": "4.0"}


def test_every_requirement_has_a_bound_and_a_tested_version():
    setup_cfg = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {lower_bounds.normalized(name) for name in re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE)}
    requirements = re.findall(r"^    ([\w.-]+)[=>]=[\d.]+$", setup_cfg.partition("install_requires")[2], re.MULTILINE)
    lines = re.findall(r"^    (.+)$", setup_cfg.partition("install_requires")[2], re.MULTILINE)
    assert len(requirements) == len(lines), lines
    assert {lower_bounds.normalized(name) for name in requirements} <= pinned


GOOD_DOCSTRINGS = '''
def shift(sigmas, amount=1.0, *factors, scale=None):
    """
    Shifts.

    Args:
        sigmas (`torch.Tensor` of shape `(N,)`, such as
            those of a scheduler): noise levels.
        amount (`float`, defaults to `1.0`):
            How much; note: `1` changes nothing.

        *factors (`float`): more of them.
        scale (`float`, *optional*, defaults to `2 * amount`): factor.

    Returns:
        `torch.Tensor`: shifted noise levels.
    """


class Scheduler:
    """
    Of a kind.

    Args:
        order (`int`): its order.
    """

    def __init__(self, order):
        self.order = order

    def set_order(self, order):
        """Sets the order."""

    def _private(self, order):
        """
        Summary.

        More.
        """


@dataclass
class Output:
    """
    Of a step.

    Args:
        sample (`torch.Tensor`): the sample.
    """

    sample: torch.Tensor
'''


def test_good_docstrings_pass():
    assert list(check_docstrings.check(GOOD_DOCSTRINGS)) == []


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("*factors, scale", "*factors, other, scale", 2, "`shift`: `Args:` lacks `other`"),
        ("        order (`int`): its order.\n", "        sort (`int`): its.\n", 20, "has `sort`, which the signature"),
        ("sigmas, amount=1.0,", "amount=1.0, sigmas=None,", 2, "`Args:` has the order ['sigmas', 'amount'"),
        ("*factors (`float`): more", "*factors: more", 2, "`factors` has no type"),
        ("defaults to `1.0`", "defaults to `2.0`", 2, "`amount` defaults to 1.0, but is documented as 2.0"),
        ("amount=1.0", "amount", 2, "`amount` is documented with a default, 1.0, but has none"),
        ('"""Sets the order."""', '"""Sets.\n\n        At once.\n        """', 31, "no `Args:` section for `order`"),
        ("    sample: torch.Tensor\n", "    mean: torch.Tensor\n", 43, "`Output`: `Args:` lacks `mean`"),
        ('"""Sets the order."""\n\n    def _private', '"""Sets."""\n\n    def private', 34, "no `Args:` section"),
    ],
)
def test_bad_docstrings_are_found(old, new, line, message):
    assert GOOD_DOCSTRINGS.count(old) == 1
    found = list(check_docstrings.check(GOOD_DOCSTRINGS.replace(old, new)))
    assert any(message in text and number == line for number, text in found), found


def test_public_code_needs_a_docstring():
    assert [text for _, text in check_docstrings.check("def f(): ...\nclass C: ...\ndef _g(): ...")] == [
        "`f` has no docstring",
        "`C` has no docstring",
    ]


HEADER = "# SPDX-License-Identifier: Apache-2.0\n"


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("tests/test_x.py", "import torch\n", "does not begin with"),
        ("examples/x.py", HEADER + "x = 1  # TO" + "DO: more\n", "do it or leave it out"),
        ("tests/test_x.py", HEADER + "from torchvision import io\n", "torchvision is not a dependency"),
        ("diffusers_dyna/models/x.py", HEADER + "from .y import z\n", "travels alone"),
        ("diffusers_dyna/models/x.py", HEADER + "import numpy as np\n", "travels alone"),
        ("diffusers_dyna/schedulers/x.py", HEADER + "def f():\n    from peft import y\n", "travels alone"),
        ("diffusers_dyna/training/x.py", HEADER + "from examples import y\n", "not installed with it"),
        ("pipelines/x.py", HEADER + "assert 1\n", "raise a ValueError or TypeError"),
    ],
)
def test_broken_rules_are_found(path, source, message):
    found = list(check_rules.check(path, source))
    assert len(found) == 1 and message in found[0][1], found


def test_what_the_rules_allow():
    model = HEADER + "import math\nimport torch\nfrom diffusers import ModelMixin\nfrom einops import rearrange\n"
    assert list(check_rules.check("diffusers_dyna/models/x.py", model)) == []
    assert list(check_rules.check("diffusers_dyna/models/__init__.py", HEADER + "from .x import y\n")) == []
    assert list(check_rules.check("tests/test_x.py", HEADER + "assert 1\n")) == []


def test_no_folder_has_the_name_of_a_diffusers_pipeline():
    """diffusers would record the classes in it under its own module, and could not load them again."""
    diffusers = Path(importlib.util.find_spec("diffusers").origin).parent
    theirs = {path.name for path in (diffusers / "pipelines").iterdir() if path.is_dir()} - {"__pycache__"}
    ours = {path.name for path in (ROOT / "diffusers_dyna").rglob("*") if path.is_dir()}
    assert "dit" in theirs and not ours & theirs
