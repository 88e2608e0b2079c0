# SPDX-License-Identifier: Apache-2.0
"""What a training loop needs besides its model, its data and its objective."""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel


def make_lr_schedule(
    name: str, learning_rate: float, num_warmup_steps: int, num_training_steps: int
) -> Callable[[int], float]:
    """
    The learning rate as a function of the optimizer step. It has no state and does not know about processes or
    accumulation, so nothing can advance it at the wrong pace and nothing has to be restored.

    Args:
        name (`str`): `lr_scheduler` of [`~diffusers.optimization.get_scheduler`].
        learning_rate (`float`): peak.
        num_warmup_steps (`int`): optimizer steps of linear warm-up.
        num_training_steps (`int`): optimizer steps in all.

    Returns:
        `Callable[[int], float]`: from the number of optimizer steps done to the rate of the next one.
    """
    optimizer = torch.optim.SGD([torch.zeros(())], lr=learning_rate)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps)
    multiplier = schedule.lr_lambdas[0]
    return lambda step: learning_rate * multiplier(step)


def make_ema(parameters: Iterable[torch.nn.Parameter], decay: float, warmup_steps: int | None = None) -> EMAModel:
    """
    An exponential moving average of the weights that reaches its decay after a stated number of steps.

    The length of the average, 1 / (1 - decay_t), grows evenly from 1 step to 1 / (1 - decay) over `warmup_steps`
    optimizer steps and stays there. [`~diffusers.training_utils.EMAModel`]'s own rule reaches 0.9999 after 90,000
    steps whatever the run.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): what to average.
        decay (`float`): final decay, in [0, 1).
        warmup_steps (`int`, *optional*):
            0 averages with the full decay from the second step on, as fits fine-tuning. `None` is
            10 / (1 - decay): the average is always over about the last tenth of the run so far.

    Returns:
        [`~diffusers.training_utils.EMAModel`].
    """
    length = 1 / (1 - decay)
    if warmup_steps is None:
        warmup_steps = 10 * length
    if warmup_steps == 0 or length == 1:
        return EMAModel(parameters, decay=decay, min_decay=decay, foreach=True)
    # EMAModel's warm-up is 1 - (1 + step / inv_gamma) ** -power: with power 1, a length of 1 + step / inv_gamma.
    inv_gamma = warmup_steps / (length - 1)
    return EMAModel(parameters, decay=decay, use_ema_warmup=True, inv_gamma=inv_gamma, power=1.0, foreach=True)


class NonFiniteGuard:
    """
    Counts optimizer steps whose gradient norm is not finite; these are to be skipped.

    Args:
        max_in_a_row (`int`): how many in a row to bear.
        total (`int`, defaults to `0`): how many there were before, in a run that continues.
    """

    def __init__(self, max_in_a_row: int, total: int = 0):
        self.max_in_a_row, self.total, self.in_a_row = max_in_a_row, total, 0

    def is_finite(self, grad_norm: torch.Tensor | float, step: int) -> bool:
        """
        Args:
            grad_norm (`torch.Tensor` of shape `()` or `float`): norm of all gradients, the same on every process.
            step (`int`): optimizer step, for the message.

        Returns:
            `bool`: whether the step may be taken.

        Raises:
            `FloatingPointError`: at the last step in a row that can be borne.
        """
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            raise FloatingPointError(
                f"The gradient was not finite in {self.in_a_row} steps in a row, up to step {step}, and the weights "
                "did not change in them. Continue from a checkpoint with a lower `--learning_rate`, a lower "
                "`--max_grad_norm`, or another `--mixed_precision`."
            )
        return False


class StopRequest:
    """
    Turns the first SIGINT (Ctrl-C) or SIGTERM into a flag, so that a run can save and leave; a second one kills.

    Attributes:
        signal_number (`int`): the signal that came, or 0.
    """

    def __init__(self):
        self.signal_number = 0
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, signal_number, frame):
        self.signal_number = signal_number
        self.restore()

    def restore(self) -> None:
        """Gives the signals back to the handlers that they had."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class TrainingLog:
    """
    One JSON object a line and optimizer step. A run that continues at step N first drops what was logged after it.

    Args:
        path (`str` or `Path`): the file.
        first_step (`int`, defaults to `0`): steps done; lines of later steps are dropped.
    """

    def __init__(self, path: str | Path, first_step: int = 0):
        path = Path(path)
        kept = []
        if first_step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line + "\n")
                except ValueError:
                    break  # the line that a kill cut off, always the last
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, **values) -> None:
        """Appends a line. A value that is not finite becomes null: JSON has no word for it."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(values) + "\n")


def check_resume(saved: dict, current: dict, defaults: dict | None = None) -> None:
    """
    Compares what defines a run with what defined the run that a checkpoint is from.

    Args:
        saved (`dict`): name to JSON value, from the checkpoint.
        current (`dict`): the same of this run.
        defaults (`dict`, *optional*): what a name stands for that the checkpoint is too old to have.

    Raises:
        `ValueError`: listing every difference.
    """
    current = json.loads(json.dumps(current))  # tuples become lists, as in the checkpoint
    saved = {**{name: value for name, value in (defaults or {}).items() if name in current}, **saved}
    different = [name for name in sorted(saved.keys() | current.keys()) if saved.get(name) != current.get(name)]
    if different:
        lines = [f"  {name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now" for name in different]
        raise ValueError(
            "The checkpoint is from another run than this one:\n"
            + "\n".join(lines)
            + "\nUse the same values to continue it. To start another run from its weights, give them as "
            "`--pretrained_model_name_or_path`, with a new `--output_dir`."
        )


def default_tracker() -> str | None:
    """`"tensorboard"` where it is installed, else `None`."""
    return "tensorboard" if importlib.util.find_spec("tensorboard") else None


def describe_environment(repository: str | Path) -> dict:
    """
    Args:
        repository (`str` or `Path`): folder whose git commit to state.

    Returns:
        `dict` with `hardware`, `versions` of the packages that matter, and `commit` (`None` outside git; with
        `-dirty` where tracked files differ from it).
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        hardware = f"{count} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"CPU, {torch.get_num_threads()} threads, {_cpu_name()}"
    packages = ("diffusers_dyna", "torch", "diffusers", "accelerate", "transformers")
    versions = {"python": platform.python_version()}
    for package in packages:
        versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"hardware": hardware, "versions": versions, "commit": commit}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_json(path: str | Path, value) -> None:
    """
    Writes a JSON file beside its name and renames it, so that the file is never half there.

    Args:
        path (`str` or `Path`): the file.
        value (`Any`): any JSON value.
    """
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)
