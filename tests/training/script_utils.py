# SPDX-License-Identifier: Apache-2.0
"""Running the training scripts of transformers as users do, or in this process, and comparing what they leave."""

import contextlib
import filecmp
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from accelerate.state import AcceleratorState


ROOT = Path(__file__).parents[2]
SHAPE = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8}
BUDGET = {
    "budget_warmup_steps": 2,
    "budget_decay_steps": 4,
    "budget": 0.5,
    "router_learning_rate": 1e-1,
}
TINY = {
    "train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 5,
    "lr_scheduler": "constant_with_warmup",
    "ema_decay": 0.9,
    "time_sampling": "stratified",
    "num_validation_images": 4,
    "validation_inference_steps": 2,
    "report_to": "none",
}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def arguments(output_dir, **options) -> list[str]:
    """Of a tiny model, with a budget unless `static`; `True` is a flag, a list several words."""
    words = []
    shape = {} if "pretrained_model_name_or_path" in options or "preset" in options else SHAPE
    budget = {} if "static" in options else BUDGET
    for name, value in {**shape, **TINY, **budget, "output_dir": output_dir, **options}.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def command(script: str, output_dir, processes: int = 1, **options) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        sys.executable,
        *([] if processes == 1 else launcher),
        str(ROOT / "examples" / script),
        *arguments(output_dir, **options),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(script: str, output_dir, processes: int = 1, **options):
    """In a process of its own."""
    result = subprocess.run(
        command(script, output_dir, processes, **options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result


def run_and_kill(script: str, output_dir, when_exists: str, **options) -> None:
    """Kills the run as soon as it has written `when_exists`."""
    process = subprocess.Popen(command(script, output_dir, **options), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output_dir / when_exists).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def load_script(script: str):
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / "examples" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running_here(script):
    """A function that runs the script in this process, which saves the seconds that importing takes; errors are raised."""

    def run(output_dir, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main(script.parse_args(arguments(output_dir, **options)))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def read_log(output_dir, name="training_log.jsonl"):
    return [json.loads(line) for line in (output_dir / name).read_text().splitlines()]


def assert_same_run(first, second, step):
    """Weights, averages, optimizer and generators of a checkpoint, and the pipeline, byte for byte."""
    names = [WEIGHTS, WEIGHTS.replace("transformer", "transformer_ema"), "optimizer.bin", "random_states_0.pkl"]
    names = [f"checkpoint-{step}/{name}" for name in names]
    for name in [*names, WEIGHTS, "model_index.json", "samples.png", "activity_log.jsonl"]:
        assert filecmp.cmp(first / name, second / name, shallow=False), name
    for expected, line in zip(read_log(first), read_log(second), strict=True):
        del expected["images_per_second"], line["images_per_second"]
        assert line == expected
