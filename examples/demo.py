# SPDX-License-Identifier: Apache-2.0
"""
The whole way in a few minutes on a CPU: trains a U-Net by flow matching on the 1,797 real digits that come with
scikit-learn, saves it as a pipeline, loads that in a fresh process, draws digits as asked, and reads them back with a
classifier that knows only real digits.

    make demo          (or: python examples/demo.py)

Writes `outputs/demo/samples.png`, `outputs/demo/summary.json` and the pipeline in `outputs/demo/model`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from diffusers_dyna import DynaUNetPipeline
from diffusers_dyna.training.data import load_digits


SEED = 0
NUM_PER_CLASS = 50
GUIDANCE_SCALE = 2.0
NUM_INFERENCE_STEPS = 20
TRAINING_ARGUMENTS = {
    "base_channels": 32,
    "channel_mults": (1, 2),
    "attention_resolutions": (4,),
    "norm_num_groups": 8,
    "train_batch_size": 128,
    "max_train_steps": 800,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "ema_decay": 0.999,
    "checkpointing_steps": 400,
    "checkpoints_total_limit": 1,
    "validation_steps": 400,
    "report_to": "none",
    "seed": SEED,
}


def train(model_dir: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("train_unet.py")), "--output_dir", str(model_dir)]
    for name, value in TRAINING_ARGUMENTS.items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    subprocess.run(command, check=True)


def draw(model_dir: Path, output_path: Path) -> None:
    """Loads the saved pipeline and writes `NUM_PER_CLASS` images of each class, image i from a generator seeded i."""
    pipe = DynaUNetPipeline.from_pretrained(model_dir)
    pipe.set_progress_bar_config(desc="Drawing")
    labels = [label for label in range(10) for _ in range(NUM_PER_CLASS)]
    start = time.perf_counter()
    images = pipe(
        labels,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_INFERENCE_STEPS,
        generator=[torch.Generator().manual_seed(SEED + i) for i in range(len(labels))],
        output_type="np",
    ).images
    seconds = time.perf_counter() - start
    np.savez(output_path, images=images[..., 0], labels=labels, seconds=seconds)


def read(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """
    Shares of the given digits and of real digits held out that a classifier fitted on other real digits reads right.

    Args:
        images (`np.ndarray` of shape `(num_images, 8, 8)`): drawn digits in [0, 1].
        labels (`np.ndarray` of shape `(num_images,)`): what they were asked to be.

    Returns:
        `tuple[float, float]`: on the drawn digits, on the real ones.
    """
    source = load_digits()
    real = source.images.reshape(len(source), -1) / 255.0
    fit_images, held_out_images, fit_labels, held_out_labels = train_test_split(
        real, source.labels, test_size=0.25, random_state=SEED, stratify=source.labels
    )
    classifier = SVC(gamma="scale", C=10).fit(fit_images, fit_labels)
    drawn = images.reshape(len(images), -1)
    return classifier.score(drawn, labels), classifier.score(held_out_images, held_out_labels)


def draw_grid(images: np.ndarray, labels: np.ndarray) -> PIL.Image.Image:
    """Ten digits of each class, one class a row, with what was asked for on the left."""
    cell, margin, columns = 48, 4, 10
    font = PIL.ImageFont.load_default(size=24)
    grid = PIL.Image.new("L", ((columns + 1) * (cell + margin), 10 * (cell + margin)), 255)
    pen = PIL.ImageDraw.Draw(grid)
    for row in range(10):
        top = row * (cell + margin)
        pen.text((cell // 2, top + cell // 2), str(row), fill=0, font=font, anchor="mm")
        for column, image in enumerate(images[labels == row][:columns]):
            digit = PIL.Image.fromarray((image * 255).round().astype(np.uint8)).resize(
                (cell, cell), PIL.Image.Resampling.NEAREST
            )
            grid.paste(digit, ((column + 1) * (cell + margin), top))
    return grid


def main(output_dir: Path) -> None:
    start = time.monotonic()
    output_dir.mkdir(parents=True, exist_ok=True)
    model_dir, samples = output_dir / "model", output_dir / "samples.npz"
    if (model_dir / "args.json").exists():  # of an earlier demo; nothing else is ever removed
        shutil.rmtree(model_dir)

    print(
        f"1. Training a U-Net on 1,797 real digits of 8x8 pixels ({TRAINING_ARGUMENTS['max_train_steps']} steps).",
        flush=True,
    )
    train(model_dir)
    print("2. Drawing digits with the saved pipeline, in a fresh process.", flush=True)
    subprocess.run([sys.executable, __file__, "--draw", str(model_dir), str(samples)], check=True)

    print("3. Reading what was drawn.")
    with np.load(samples) as drawn:
        images, labels, seconds = drawn["images"], drawn["labels"], float(drawn["seconds"])
    accuracy, real_accuracy = read(images, labels)
    draw_grid(images, labels).save(output_dir / "samples.png")
    run = json.loads((model_dir / "training_summary.json").read_text())
    train_seconds = run["train_hours"] * 3600
    summary = {
        "class_accuracy": accuracy,
        "class_accuracy_of_real_digits": real_accuracy,
        "num_samples": len(images),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "train_steps": run["steps"],
        "train_seconds": train_seconds,
        "images_per_second": run["images_seen"] / train_seconds,
        "seconds_per_image": seconds / len(images),
        "total_seconds": time.monotonic() - start,
        "hardware": run["hardware"],
        "versions": run["versions"],
        "seed": SEED,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"\nTrained for {train_seconds:.0f} s ({summary['images_per_second']:.0f} images/s) and drew {len(images)} "
        f"digits at {1000 * summary['seconds_per_image']:.1f} ms each.\n"
        f"A classifier that was fitted on real digits reads {accuracy:.1%} of them as what was asked for "
        f"(real digits it has not seen: {real_accuracy:.1%}).\n"
        f"Look at {output_dir / 'samples.png'}: ten of each digit, the row's digit was asked for.\n"
        f"All figures are in {output_dir / 'summary.json'}; the pipeline is in {model_dir}, load it with\n"
        f'    DynaUNetPipeline.from_pretrained("{model_dir}")'
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="Default: outputs/demo.")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("MODEL", "NPZ"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        draw(*args.draw)
    else:
        main(args.output_dir)
