# SPDX-License-Identifier: Apache-2.0
"""
What a compute budget costs in quality and saves in time, on Fashion-MNIST, small enough for a CPU.

For every seed: a static transformer is trained; from it, models with the budgets 0.8 and 0.6 and, just as long and with
the same settings, a control without a budget. Each draws the same images (noise and labels by index), which a
classifier trained on real images reads and compares.

    python examples/budget_evidence.py --data_root data/fashion-mnist --output_dir outputs/evidence

It goes on where it was stopped, so it can be given hours in parts; `results.json` and `results.md` hold what is done so
far. Once there is a classifier, several seeds can be trained beside each other, each with `--threads 1` of its own. Time
is measured by a last call with `--measure_speed`, on a machine that does nothing else.

A seed whose static model is not read as asked `MIN_ACCURACY` of the time, at the guidance of `SAMPLING`, goes no further:
its budgets would say nothing. More steps in `STATIC` mend that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from benchmark import alternate

from diffusers_dyna import DynaDiTPipeline
from diffusers_dyna.training.loop import describe_environment, write_json


EXAMPLES = Path(__file__).parent
MIN_ACCURACY = 0.9
NUM_IMAGES = 500
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 4.0, "batch_size": 50}
SHAPE = {"patch_size": 4, "num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 16}
TRAINING = {
    "train_batch_size": 32,
    "time_sampling": "stratified",
    "ema_decay": 0.999,
    "mixed_precision": "bf16",
    "checkpointing_steps": 500,
    "checkpoints_total_limit": 1,
    "validation_steps": 1000,
    "report_to": "none",
}
STATIC = {**TRAINING, **SHAPE, "static": True, "learning_rate": 1e-3, "max_train_steps": 4000}
FINE_TUNING = {**TRAINING, "learning_rate": 3e-4, "max_train_steps": 1000}
BUDGET = {"sort_by_importance": True, "router_learning_rate": 3e-2, "budget_decay_steps": 500}
ARMS = {
    "control": {"static": True},
    "budget 0.8": {**BUDGET, "budget": 0.8},
    "budget 0.6": {**BUDGET, "budget": 0.6},
}


def run(script: str, *words: str, **options) -> None:
    """Runs a script of this folder. An option that is True is a flag."""
    command = [sys.executable, str(EXAMPLES / script), *words]
    for name, value in options.items():
        command += [f"--{name}", *([] if value is True else [str(value)])]
    subprocess.run(command, check=True)


def train(folder: Path, **options) -> None:
    if not (folder / "model_index.json").exists():
        run("train_dyna_dit.py", output_dir=folder, resume_from_checkpoint="latest", **options)


def measure(folder: Path, seed: int, classifier: Path, data: dict) -> dict:
    """Draws and reads the images of a trained pipeline, once."""
    result = folder / "evaluation.json"
    if not result.exists():
        samples = folder / "samples.npz"
        if not samples.exists():
            run("sample.py", pipeline_path=folder, num_images=NUM_IMAGES, output=samples, seed=seed, **SAMPLING)
        run("evaluate.py", "compare", samples=samples, features=classifier, output=result, **data)
    drawn = json.loads((folder / "samples.json").read_text())
    read = json.loads(result.read_text())
    summary = json.loads((folder / "training_summary.json").read_text())
    return {
        "frechet_distance": read["frechet_distance"],
        "frechet_distance_of_held_out": read["frechet_distance_of_held_out"],
        "accuracy": read["class_accuracy"],
        "accuracy_of_held_out": read["class_accuracy_of_held_out"],
        "compute_ratio": drawn["compute_ratio"],
        "train_hours": summary["train_hours"],
        "images_seen": summary["images_seen"],
        "commit": summary["commit"],
    }


def measure_speed(folders: dict[str, Path], rounds: int) -> dict[str, dict]:
    """Seconds an image of every budget beside the control's complete model; alternating, in this process."""
    pipes = {name: DynaDiTPipeline.from_pretrained(folder) for name, folder in folders.items()}
    labels = [i % 10 for i in range(SAMPLING["batch_size"])]
    settings = {key: SAMPLING[key] for key in ("num_inference_steps", "guidance_scale")}

    def draw(name, **options):
        pipes[name].set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipes[name](labels, generator=generator, output_type="latent", **settings, **options)

    timed = {}
    for name in folders:
        if name == "control":
            continue
        compute_ratio = draw(name, output_compute_ratio=True).compute_ratio
        if not 0.2 <= compute_ratio <= 0.9:
            raise ValueError(f"{folders[name]} runs {compute_ratio:.0%} of the compute: its time would say nothing.")
        times = alternate(lambda: draw(name), lambda: draw("control", complete_model=True), rounds, warmup=1)
        timed[name] = {
            "seconds_per_image": times["ours"] / len(labels),
            "speed_up": times["ratio"],
            "speed_up_quartiles": [times["ratio_q1"], times["ratio_q3"]],
            "realised": times["ratio"] * compute_ratio,
        }
        timed["control"] = {"seconds_per_image": times["reference"] / len(labels), "speed_up": 1.0}
    return timed


def write_results(output_dir: Path) -> None:
    """Joins the seeds that are done: mean and, in brackets, the range."""
    rows = []
    for path in sorted(output_dir.glob("seed-*/results.json")):
        results = json.loads(path.read_text())
        speed_path = path.with_name("speed.json")
        speed = json.loads(speed_path.read_text()) if speed_path.exists() else {}
        for arm, row in results["measured"].items():
            rows.append({"seed": results["seed"], "arm": arm, **row, **speed.get(arm, {})})
    protocol = {
        "num_images": NUM_IMAGES,
        "sampling": SAMPLING,
        "static": STATIC,
        "fine_tuning": FINE_TUNING,
        "arms": ARMS,
    }
    write_json(output_dir / "results.json", {"rows": rows, "protocol": protocol, **describe_environment(EXAMPLES)})

    columns = {
        "accuracy": "read as asked",
        "frechet_distance": "Frechet distance",
        "compute_ratio": "compute ratio",
        "seconds_per_image": "s/image",
        "speed_up": "speed-up",
        "realised": "speed-up x compute ratio",
    }
    lines = ["| model | seeds | " + " | ".join(columns.values()) + " |", "|---" * (2 + len(columns)) + "|"]
    for arm in ("static", *ARMS):
        of_arm = [row for row in rows if row["arm"] == arm]
        cells = []
        for name in columns:
            values = [row[name] for row in of_arm if row.get(name) is not None]
            spread = f" ({min(values):.3g} - {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}" if values else "")
        if of_arm:
            lines.append(f"| {arm} | {len(of_arm)} | " + " | ".join(cells) + " |")
    floors = [row["frechet_distance_of_held_out"] for row in rows]
    lines.append(
        f"\n{NUM_IMAGES} images a row, guidance {SAMPLING['guidance_scale']}, {SAMPLING['num_inference_steps']} steps. The "
        f"same number of real images held out: Frechet distance {statistics.mean(floors):.3g}, read as labelled "
        f"{rows[0]['accuracy_of_held_out']:.3g}."
    )
    (output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="Folder with the IDX files of Fashion-MNIST.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evidence"), help="Default: outputs/evidence.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Default: 0 1 2.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads. Default: all cores.")
    parser.add_argument("--measure_speed", action="store_true", help="Train nothing: time the seeds that are done.")
    parser.add_argument("--speed_rounds", type=int, default=5, help="Timed rounds, at least 2. Default: 5.")
    args = parser.parse_args()
    if args.speed_rounds < 2:
        parser.error(f"`--speed_rounds` {args.speed_rounds} must be at least 2.")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = {"dataset": "fashion-mnist", "data_root": args.data_root, "resolution": 32}
    classifier = args.output_dir / "classifier.safetensors"
    if not classifier.exists():
        run("evaluate.py", "train-classifier", output=classifier, **data)

    for seed in args.seeds:
        folder = args.output_dir / f"seed-{seed}"
        folders = {arm: folder / arm.replace(" ", "-") for arm in ARMS}
        if args.measure_speed:
            write_json(folder / "speed.json", measure_speed(folders, args.speed_rounds))
            continue
        train(folder / "static", seed=seed, **data, **STATIC)
        measured = {"static": measure(folder / "static", seed, classifier, data)}
        if measured["static"]["accuracy"] < MIN_ACCURACY:
            print(
                f"Seed {seed}: the static model is read as asked {measured['static']['accuracy']:.1%} of the time only."
            )
        else:
            for arm, options in ARMS.items():
                start = {"pretrained_model_name_or_path": folder / "static"}
                train(folders[arm], seed=seed, **start, **data, **FINE_TUNING, **options)
                measured[arm] = measure(folders[arm], seed, classifier, data)
        write_json(folder / "results.json", {"seed": seed, "measured": measured})
        write_results(args.output_dir)
    write_results(args.output_dir)


if __name__ == "__main__":
    main()
