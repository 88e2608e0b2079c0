# SPDX-License-Identifier: Apache-2.0
"""
Times this package beside diffusers, each pair in alternating runs of one process.

    make bench          (or: python examples/benchmark.py)

Prints a table and writes `outputs/bench/bench.json`. A ratio is the median over the rounds of (reference time / our
time) of the same round, so that a slow moment of the machine meets both; above 1 ours is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers import UNet2DModel

from diffusers_dyna import DynaUNet2DModel, FlowMatchODEScheduler
from diffusers_dyna.training.loop import describe_environment


def alternate(ours: Callable[[], None], reference: Callable[[], None], rounds: int, warmup: int = 2) -> dict:
    """
    Times two callables in turn; every other round starts with the other one.

    Args:
        ours (`Callable`): what is measured.
        reference (`Callable`): what it is compared with.
        rounds (`int`): timed rounds of both.
        warmup (`int`, defaults to `2`): rounds before them that are not timed.

    Returns:
        `dict` with the medians `ours` and `reference` in seconds, `ratio`, and its quartiles `ratio_q1`, `ratio_q3`.
    """
    seconds = {ours: [], reference: []}
    for i in range(warmup + rounds):
        for function in (ours, reference) if i % 2 else (reference, ours):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[function].append(time.perf_counter() - start)
    ratios = [theirs / mine for theirs, mine in zip(seconds[reference], seconds[ours], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ours": statistics.median(seconds[ours]),
        "reference": statistics.median(seconds[reference]),
        "ratio": statistics.median(ratios),
        "ratio_q1": quartiles[0],
        "ratio_q3": quartiles[2],
        "rounds": rounds,
    }


def bench_unet(device: str, rounds: int) -> list[dict]:
    """The reference configuration, 10 classes, beside `diffusers.UNet2DModel` of the same shape and weights."""
    torch.manual_seed(0)
    reference = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
        num_class_embeds=10,
    ).to(device)
    ours = DynaUNet2DModel(num_classes=10).to(device)
    # All but the first layer of the time embedding, which takes 256 features instead of 64.
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("time_embedding.linear_1")}
    ours.load_state_dict(weights, strict=False)

    def train_step(model):
        batch = torch.randn(2, 32, 3, 32, 32, device=device)
        timesteps, labels = 1000 * torch.rand(32, device=device), torch.randint(10, (32,), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step():
            model.train()
            F.mse_loss(model(batch[0], timesteps, labels).sample, batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def sample(model):
        noise, labels = torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)
        scheduler = FlowMatchODEScheduler()

        @torch.no_grad()
        def draw():
            model.eval()
            state = noise
            scheduler.set_timesteps(5, device=device)
            for t in scheduler.timesteps:
                state = scheduler.step(model(state, t, labels).sample, t, state).prev_sample

        return draw

    rows = []
    for what, make in (("U-Net training step, batch 32", train_step), ("U-Net sampling, batch 16, 5 steps", sample)):
        rows.append({"what": what, "against": "UNet2DModel", **alternate(make(ours), make(reference), rounds)})
    return rows


def bench_import(rounds: int) -> list[dict]:
    """Fresh processes; the second row is what one pays for any pipeline of diffusers."""

    def run(statement):
        return lambda: subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)

    rows = []
    for statement in ("import diffusers", "from diffusers import DiffusionPipeline"):
        timed = alternate(run("import diffusers_dyna"), run(statement), rounds, warmup=1)
        rows.append({"what": "import diffusers_dyna", "against": f"`{statement}`", **timed})
    return rows


def print_table(rows: list[dict]) -> None:
    print("| what | against | ours (s) | reference (s) | ratio (quartiles) |")
    print("|---|---|---|---|---|")
    for row in rows:
        quartiles = f"{row['ratio_q1']:.2f} - {row['ratio_q3']:.2f}"
        times = f"{row['ours']:.3f} | {row['reference']:.3f}"
        print(f"| {row['what']} | {row['against']} | {times} | **{row['ratio']:.2f}** ({quartiles}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="Timed rounds of each pair. Default: 15.")
    parser.add_argument("--import_rounds", type=int, default=5, help="Fresh processes of each kind. Default: 5.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads. Default: all cores.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"), help="Default: outputs/bench.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    rows = bench_unet(device, args.rounds) + bench_import(args.import_rounds)
    report = {"rows": rows, "dtype": "float32", "threads": args.threads, **describe_environment(Path(__file__).parent)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    print_table(rows)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"\n{report['hardware']}, float32, {versions}, commit {report['commit']}, {args.rounds} rounds.")
    print(f"Written to {args.output_dir / 'bench.json'}")


if __name__ == "__main__":
    main()
