# SPDX-License-Identifier: Apache-2.0
"""
Draws images with a saved pipeline into one `.npz` file, as the evaluators of the field and `examples/evaluate.py` read
it: `arr_0` of shape `(num_images, height, width, channels)`, uint8, and `labels` of shape `(num_images,)`.

    python examples/sample.py --pipeline_path outputs/digits --num_images 500 --guidance_scale 2 \
        --num_inference_steps 20 --output outputs/digits.npz

On several GPUs, and in several processes on a CPU (they share the folder of `--output`):

    accelerate launch --multi_gpu --num_processes 8 examples/sample.py --pipeline_path ... --output ...
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/sample.py --pipeline_path ... --output ...

A text-to-image pipeline draws the lines of a text file, given by `--prompts`. Pipelines that change an image are not for
this script.

Noise, label and prompt of image i are functions of (seed, i) alone, so neither the batch size nor the number of processes
changes what is drawn, up to the rounding with which a device computes batches of different sizes. Beside the `.npz`,
a `.json` of the same name has the protocol: all arguments, the scheduler, versions, commit, evaluations of the model
and seconds for an image and, where the pipeline reports it, the share of the model's compute that ran.
"""

import argparse
import inspect
import os
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm

from accelerate import Accelerator
from diffusers import DiffusionPipeline

import diffusers_dyna  # noqa: F401  lets diffusers find the classes of this package
from diffusers_dyna.training.loop import describe_environment, write_json
from diffusers_dyna.training.randomness import keyed_generator, keyed_seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pipeline_path", required=True, help="A saved pipeline: a folder or a name on the Hub.")
    parser.add_argument("--num_images", type=int, required=True, help="Images in all.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images of a process at a time. Default: 64.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Steps of the scheduler. Default: 50.")
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="Classifier-free guidance; 1 is off. Default: 1."
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        help="equal: image i has class i modulo the number of classes (the default); random: drawn evenly; or labels, "
        "which the images take in turn. Not for a model without classes.",
    )
    parser.add_argument(
        "--prompts", help="Text file of a text-to-image pipeline, a prompt a line, which the images take in turn."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise and of random labels. Default: 0.")
    parser.add_argument("--output", type=Path, required=True, help="The .npz file.")
    parser.add_argument("--images_dir", type=Path, help="Also write each image as <index>.png into this folder.")
    parser.add_argument("--complete_model", action="store_true", help="Run a dynamic model without skipping anything.")
    parser.add_argument("--width_mult", type=float, help="Share of a dynamic model's width, in (0, 1].")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="Of the model. Default: float32.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="Default: what accelerate chooses.")
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "num_inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"`--{name}` {getattr(args, name)} must be at least 1.")
    if args.output.suffix != ".npz":
        parser.error(f"`--output` {args.output} must end in .npz.")
    return args


def choose_labels(labels: list[str] | None, num_images: int, num_classes: int | None, seed: int) -> np.ndarray | None:
    """
    The label of every image, each a function of its index.

    Args:
        labels (`list[str]`, *optional*): the words of `--labels`; `None` is `["equal"]` where there are classes.
        num_images (`int`): images in all.
        num_classes (`int`, *optional*): classes of the model; `None` for a model without.
        seed (`int`): of random labels.

    Returns:
        `np.ndarray` of shape `(num_images,)`, int64, or `None` for a model without classes.

    Raises:
        `ValueError`: on labels that the model does not have.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(f"`--labels` {' '.join(labels)} was given, but the model has no classes. Leave it out.")
        return None
    if labels is None or labels == ["equal"]:
        return np.arange(num_images) % num_classes
    if labels == ["random"]:
        generators = [keyed_generator(seed, "label", i) for i in range(num_images)]
        return np.array([torch.randint(num_classes, (), generator=generator).item() for generator in generators])
    if not all(label.isdecimal() and int(label) < num_classes for label in labels):
        raise ValueError(
            f"`--labels` {' '.join(labels)} must be equal, random, or labels from 0 to {num_classes - 1}."
        )
    return np.resize([int(label) for label in labels], num_images)


def choose_prompts(path: str | None, pipe: DiffusionPipeline) -> list[str] | None:
    """
    The prompts of the images, which take them in turn.

    Args:
        path (`str`, *optional*): text file in UTF-8, a prompt a line; empty lines do not count.
        pipe ([`~diffusers.DiffusionPipeline`]): that draws them.

    Returns:
        `list[str]`, or `None` for a pipeline without text.

    Raises:
        `ValueError`: where a pipeline of texts has none, another one has some, or the pipeline needs an image.
    """
    accepted, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    if "image" in accepted:
        raise ValueError(f"{name} needs an image, and this script has none. Call the pipeline itself.")
    if "prompt" not in accepted:
        if path is not None:
            raise ValueError(f"`--prompts` {path} was given, but {name} reads no text. Leave it out.")
        return None
    if path is None:
        raise ValueError(f"`--prompts` is missing: {name} draws texts. Give a text file, a prompt a line.")
    if not Path(path).is_file():
        raise ValueError(f"`--prompts` {path} is not a file. Give a text file, a prompt a line.")
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"`--prompts` {path} is empty. Write a prompt a line.")
    return prompts


def optional_arguments(pipe: DiffusionPipeline, args: argparse.Namespace) -> dict:
    """
    The arguments of a dynamic model that were asked for, and the report of its compute where there is one.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): that gets them.
        args (`argparse.Namespace`): of this script.

    Returns:
        `dict`: for the call of the pipeline.

    Raises:
        `ValueError`: where the pipeline does not take what was asked for.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    asked = {}
    if args.complete_model:
        asked["complete_model"] = True
    if args.width_mult is not None:
        asked["width_mult"] = args.width_mult
    for name in asked:
        if name not in accepted:
            raise ValueError(
                f"`--{name}` is for dynamic models: {type(pipe).__name__} does not take `{name}`. Leave it out."
            )
    if "output_compute_ratio" in accepted:
        asked["output_compute_ratio"] = True
    return asked


def main(args: argparse.Namespace) -> None:
    # 1. Processes, pipeline, labels
    accelerator = Accelerator(cpu=args.device == "cpu")
    num_processes, rank = accelerator.num_processes, accelerator.process_index
    if num_processes < int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but accelerate sees {num_processes}. For several "
            "processes on a CPU set ACCELERATE_USE_CPU=true."
        )
    if args.device is not None and accelerator.device.type != args.device:
        raise ValueError(f"`--device` {args.device} was asked for, but accelerate found {accelerator.device}.")
    if args.num_images < num_processes:
        raise ValueError(f"`--num_images` {args.num_images} is less than the {num_processes} processes.")
    pipe = DiffusionPipeline.from_pretrained(args.pipeline_path, dtype=getattr(torch, args.dtype))
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = choose_prompts(args.prompts, pipe)
    num_classes = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).config.num_classes
    labels = choose_labels(args.labels, args.num_images, num_classes if prompts is None else None, args.seed)
    options = optional_arguments(pipe, args)
    for folder in (args.output.parent, args.images_dir):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    # 2. This process's images, the next ones after those of the process before it
    own = np.array_split(np.arange(args.num_images), num_processes)[rank]
    batches = [own[first : first + args.batch_size] for first in range(0, len(own), args.batch_size)]
    images, compute_ratios, seconds = [], [], 0.0
    for indices in tqdm(batches, disable=not accelerator.is_main_process):
        start = time.perf_counter()
        if prompts is not None:
            conditions = {"prompt": [prompts[i % len(prompts)] for i in indices]}
        elif labels is not None:
            conditions = {"class_labels": labels[indices].tolist()}
        else:
            conditions = {"num_images_per_prompt": len(indices)}
        output = pipe(
            **conditions,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(keyed_seed(args.seed, "sample", i)) for i in indices],
            output_type="np",
            **options,
        )
        seconds += time.perf_counter() - start
        if not np.isfinite(output.images).all():
            raise FloatingPointError(
                f"The images {indices[0]} to {indices[-1]} are not finite. Try another `--dtype` than {args.dtype}."
            )
        images.append((output.images * 255).round().astype(np.uint8))
        if "output_compute_ratio" in options:
            compute_ratios += [output.compute_ratio] * len(indices)
        if args.images_dir is not None:
            for i, image in zip(indices, images[-1], strict=True):
                image = image[..., 0] if image.shape[-1] == 1 else image
                PIL.Image.fromarray(image).save(args.images_dir / f"{i:06d}.png")

    # 3. One file, in the order of the indices
    rank_files = [Path(f"{args.output}.partial-{i}") for i in range(num_processes)]
    with rank_files[rank].open("wb") as file:
        np.savez(file, images=np.concatenate(images), compute_ratios=np.array(compute_ratios), seconds=seconds)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        parts = [dict(np.load(file)) for file in rank_files]
        arrays = {"arr_0": np.concatenate([part["images"] for part in parts])}
        if labels is not None:
            arrays["labels"] = labels
        compute_ratios = np.concatenate([part["compute_ratios"] for part in parts])
        num_evaluations = pipe.num_timesteps * (2 if pipe.do_classifier_free_guidance else 1)
        protocol = {
            **vars(args),
            "output": str(args.output),
            "images_dir": str(args.images_dir) if args.images_dir is not None else None,
            "labels": (args.labels or ["equal"]) if labels is not None else None,
            "prompts": prompts,
            "pipeline": type(pipe).__name__,
            "scheduler": {
                "class": type(pipe.scheduler).__name__,
                **{name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
            },
            "image_shape": list(arrays["arr_0"].shape[1:]),
            "evaluations_per_image": num_evaluations,
            "seconds_per_image": sum(float(part["seconds"]) for part in parts) / args.num_images,
            "compute_ratio": float(compute_ratios.mean()) if len(compute_ratios) else None,
            "num_processes": num_processes,
            **describe_environment(Path(__file__).parent),
        }
        partial = Path(f"{args.output}.partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        write_json(args.output.with_suffix(".json"), protocol)
        os.replace(partial, args.output)
        for file in rank_files:
            file.unlink()
        print(
            f"Drew {args.num_images} images with {num_evaluations} evaluations and "
            f"{protocol['seconds_per_image']:.4f} s each: {args.output}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
