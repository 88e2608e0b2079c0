# SPDX-License-Identifier: Apache-2.0
"""
Compares drawn images, as `examples/sample.py` writes them, with real ones: a Frechet distance on named features, and
how often a classifier that knows only real images reads a sample as the class that was asked for.

1. Features: a small classifier trained on the same real images that the model was trained on.

    python examples/evaluate.py train-classifier --dataset fashion-mnist --data_root fashion-mnist --resolution 32 \
        --output outputs/fashion_mnist_classifier.safetensors

2. Samples against the real images.

    python examples/evaluate.py compare --samples outputs/samples.npz \
        --features outputs/fashion_mnist_classifier.safetensors \
        --dataset fashion-mnist --data_root fashion-mnist --output outputs/result.json

The distance on a classifier's features is comparable only between results of the same classifier file, whose checksum
is in the result. It is FID only with the Inception network of FID, which is a download that this script does not make:
`--features inception:<path>` names a local copy of `inception-2015-12-05.pt`, the TorchScript file that NVIDIA
publishes with StyleGAN3. A TorchScript file is code: name one only if you trust it.

Real images are prepared as the training scripts prepare them, by [`~diffusers_dyna.training.data.ImageTransform`]: the
shorter side resized (Lanczos) to `--resolution`, then cropped; nothing is padded. Fashion-MNIST's 28 x 28 pixels at
`--resolution 32` are thus enlarged. What is held out is Fashion-MNIST's test set, and of other data a fifth, always the
same; the classifier is not trained on it. The result also has the distance of real held-out images, as many as there are
samples, to the same reference: what a perfect model would reach. A Frechet distance grows as its samples become fewer, so
compare equal numbers only.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_dyna.training import arguments, data
from diffusers_dyna.training.loop import describe_environment, write_json
from diffusers_dyna.training.randomness import keyed_generator, keyed_seed


INCEPTION_PREFIX = "inception:"
CLASSIFIER_WIDTHS = (16, 48, 128, 256)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train-classifier", allow_abbrev=False, help="Make a file for --features.")
    arguments.add_data_arguments(train)
    group = train.add_argument_group("training")
    group.add_argument("--num_epochs", type=int, default=6, help="Passes over the training images. Default: 6.")
    group.add_argument("--train_batch_size", type=int, default=128, help="Images a step. Default: 128.")
    group.add_argument("--learning_rate", type=float, default=3e-3, help="Peak; it falls to 0. Default: 3e-3.")
    group.add_argument("--seed", type=int, default=0, help="Seed of weights and order. Default: 0.")
    group.add_argument("--output", type=Path, required=True, help="The .safetensors file; a .json goes beside it.")

    compare = commands.add_parser("compare", allow_abbrev=False, help="Compare samples with real images.")
    compare.add_argument("--samples", type=Path, required=True, help="The .npz file of examples/sample.py.")
    compare.add_argument(
        "--features",
        required=True,
        help="A file of train-classifier, or inception:<path> for the TorchScript file inception-2015-12-05.pt.",
    )
    compare.add_argument("--reference", type=Path, help="Real images as .npz with `arr_0`, instead of the data below.")
    compare.add_argument("--output", type=Path, required=True, help="The .json file of the result.")
    arguments.add_data_arguments(compare)

    for command in (train, compare):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda.")
    args = parser.parse_args(argv)

    sources = [name for name in ("dataset", "train_data_dir", "dataset_name") if getattr(args, name) is not None]
    sources += ["reference"] if getattr(args, "reference", None) is not None else []
    if len(sources) != 1:
        allowed = "`--dataset`, `--train_data_dir`, `--dataset_name`"
        allowed += " and `--reference`" if args.command == "compare" else ""
        parser.error(f"Name the real images by exactly one of {allowed}; got {', '.join(sources) or 'none'}.")
    if args.dataset == "fashion-mnist" and args.data_root is None:
        parser.error("`--dataset fashion-mnist` needs `--data_root`, the folder with its IDX files.")
    if args.streaming:
        parser.error("`--streaming` has no fixed set of images to compare with. Leave it out.")
    if args.command == "train-classifier" and args.unconditional:
        parser.error("`--unconditional` leaves a classifier nothing to learn. Leave it out.")
    suffix = ".safetensors" if args.command == "train-classifier" else ".json"
    if args.output.suffix != suffix:
        parser.error(f"`--output` {args.output} must end in {suffix}.")
    return args


def read_split(args: argparse.Namespace, resolution: int | None, held_out: bool) -> tuple[data.ImageSource, dict]:
    """
    The real images that models are trained on, or those that are held out from them.

    Args:
        args (`argparse.Namespace`): with the arguments of `add_data_arguments`.
        resolution (`int`, *optional*): side of the images; `None` is the data's own, or 32.
        held_out (`bool`): whether to read the images that are held out.

    Returns:
        `tuple` of the [`~diffusers_dyna.training.data.ImageSource`] and a `dict` with `images`, an array of shape
        `(num_images, resolution, resolution, channels)`, uint8, and `labels` of shape `(num_images,)`, -1 without classes.

    Raises:
        `ValueError`: where the data is missing or too many images cannot be read.
    """
    if args.dataset == "fashion-mnist":
        source = data.load_fashion_mnist(args.data_root, "test" if held_out else "train")
        indices = range(len(source))
    else:
        source = data.open_image_source(args)
        # Not a function of any seed: a classifier must not have seen what another run holds out.
        order = torch.randperm(len(source), generator=keyed_generator(0, "held_out")).tolist()
        num_held_out = len(source) // 5
        indices = sorted(order[:num_held_out] if held_out else order[num_held_out:])
    resolution = resolution or source.native_size or 32
    transform = data.ImageTransform(resolution, source.channels, args.center_crop, args.random_flip)
    loader = DataLoader(
        data.TrainingImages(source, transform, seed=0),
        batch_size=256,
        sampler=[(i, i) for i in indices],
        collate_fn=data.collate_examples,
        num_workers=args.dataloader_num_workers,
    )
    images, labels, bad_images = [], [], []
    for batch in tqdm(loader, desc=f"Reading {source.name}", mininterval=1):
        images.append(((batch["pixel_values"] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        labels.append(batch["class_labels"].numpy())
        bad_images += batch["bad_images"]
        if len(bad_images) > args.max_bad_images:
            raise ValueError(
                f"More than `--max_bad_images` {args.max_bad_images} images cannot be read: {', '.join(bad_images)}"
            )
    return source, {"images": np.concatenate(images), "labels": np.concatenate(labels)}


def read_npz(flag: str, path: Path) -> dict:
    """
    Args:
        flag (`str`): the argument that named the file, for the message.
        path (`Path`): of an `.npz` file.

    Returns:
        `dict` with `images`, an array of shape `(num_images, height, width, channels)`, uint8, and `labels` of shape
        `(num_images,)` or `None`.

    Raises:
        `ValueError`: where the file is missing or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"`--{flag}` {path} is not a file. `examples/sample.py` writes one.")
    with np.load(path) as arrays:
        if "arr_0" not in arrays:
            raise ValueError(f"`--{flag}` {path} has {sorted(arrays)}, but the images must be under `arr_0`.")
        images, labels = arrays["arr_0"], arrays["labels"] if "labels" in arrays else None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"`--{flag}` {path} has images of {images.dtype} in shape {images.shape}, but they must be uint8 in shape "
            "(num_images, height, width, channels) with 1 or 3 channels."
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"`--{flag}` {path} has {len(images)} images, but labels of shape {labels.shape}.")
    return {"images": images, "labels": labels}


class ImageClassifier(nn.Module):
    """
    Convolutions of 3x3 with batch norm and ReLU, halving the size between them, then the mean over the image and one
    linear layer. 0.36 M parameters with the default widths, and images of any size from 8 x 8.

    Args:
        channels (`int`): 1 (gray) or 3 (RGB).
        num_classes (`int`): classes to tell apart.
        widths (`tuple[int, ...]`, defaults to `(16, 48, 128, 256)`):
            Channels of each convolution; the last one is the number of features.
    """

    def __init__(self, channels: int, num_classes: int, widths: tuple[int, ...] = CLASSIFIER_WIDTHS):
        super().__init__()
        self.widths = tuple(widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            for in_channels, width in zip((channels, *widths), widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.head = nn.Linear(widths[-1], num_classes)
        self.to(memory_format=torch.channels_last)  # a third less time on a CPU

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`): in [-1, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the features that the last layer reads, of shape
            `(batch_size, widths[-1])`, and the logits, of shape `(batch_size, num_classes)`.
        """
        hidden_states = pixel_values.contiguous(memory_format=torch.channels_last)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            hidden_states = F.max_pool2d(hidden_states, 2) if i > 0 else hidden_states
            hidden_states = F.relu(norm(conv(hidden_states)))
        features = hidden_states.mean(dim=(2, 3))
        return features, self.head(features)


def to_pixel_values(images: np.ndarray, device: str) -> torch.Tensor:
    """From uint8 of shape `(batch_size, height, width, channels)` to `(batch_size, channels, height, width)` in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(args: argparse.Namespace) -> None:
    """
    Trains the classifier, measures it on what was held out, and writes it to `--output`, with a `.json` beside it.

    Args:
        args (`argparse.Namespace`): of the command `train-classifier`.
    """
    source, train = read_split(args, args.resolution, held_out=False)
    _, held_out = read_split(args, args.resolution, held_out=True)
    start = time.monotonic()
    torch.manual_seed(keyed_seed(args.seed, "weights"))
    model = ImageClassifier(source.channels, len(source.id2label)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    batch_size = min(args.train_batch_size, len(train["images"]))
    steps_per_epoch = len(train["images"]) // batch_size
    num_steps = args.num_epochs * steps_per_epoch
    warmup_steps = max(1, num_steps // 10)
    progress = tqdm(total=num_steps, mininterval=1)
    for epoch in range(args.num_epochs):
        order = torch.randperm(len(train["images"]), generator=keyed_generator(args.seed, "order", epoch)).numpy()
        for i in range(steps_per_epoch):
            step = epoch * steps_per_epoch + i
            warmup = min(1, (step + 1) / warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
            chosen = order[i * batch_size : (i + 1) * batch_size]
            _, logits = model(to_pixel_values(train["images"][chosen], args.device))
            loss = F.cross_entropy(logits, torch.from_numpy(train["labels"][chosen]).to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()
    progress.close()
    seconds = time.monotonic() - start

    _, logits = run_classifier(model.eval(), held_out["images"], args.device)
    accuracy = (logits.argmax(1).numpy() == held_out["labels"]).mean().item()
    facts = {
        "dataset": source.name,
        "resolution": train["images"].shape[1],
        "channels": source.channels,
        "num_classes": len(source.id2label),
        "widths": list(model.widths),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_train_images": len(train["images"]),
        "num_held_out_images": len(held_out["images"]),
        "held_out_accuracy": accuracy,
        "num_epochs": args.num_epochs,
        "train_batch_size": batch_size,
        "learning_rate": args.learning_rate,
        "random_flip": args.random_flip,
        "seed": args.seed,
        "train_seconds": seconds,
        **describe_environment(Path(__file__).parent),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{args.output}.partial")
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, partial, metadata={"classifier": json.dumps(facts)})
    os.replace(partial, args.output)
    write_json(args.output.with_suffix(".json"), facts)
    print(
        f"{facts['num_parameters']:,} parameters, {seconds:.0f} s of training; reads {accuracy:.2%} of "
        f"{len(held_out['images'])} held-out images right: {args.output}"
    )


@torch.no_grad()
def run_classifier(model: ImageClassifier, images: np.ndarray, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        model ([`ImageClassifier`]): in evaluation mode.
        images (`np.ndarray` of shape `(num_images, height, width, channels)`): uint8.
        device (`str`): of the model.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: features of shape `(num_images, num_features)` and logits of shape
        `(num_images, num_classes)`, on the CPU.
    """
    batches = [model(to_pixel_values(images[i : i + 256], device)) for i in range(0, len(images), 256)]
    return torch.cat([features.cpu() for features, _ in batches]), torch.cat([logits.cpu() for _, logits in batches])


def load_classifier(path: Path, device: str) -> tuple[ImageClassifier, dict]:
    """
    Args:
        path (`Path`): a file of the command `train-classifier`.
        device (`str`): where the classifier is to run.

    Returns:
        `tuple[ImageClassifier, dict]`: in evaluation mode, and what is known about it.

    Raises:
        `ValueError`: where the file is missing or something else.
    """
    if not path.is_file():
        raise ValueError(f"`--features` {path} is not a file. Make one with the command train-classifier.")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["classifier"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # not iterable by itself
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"`--features` {path} was not written by the command train-classifier.") from error
    model = ImageClassifier(facts["channels"], facts["num_classes"], facts["widths"])
    model.load_state_dict(weights)
    return model.to(device).eval(), facts


def load_inception(path: Path, device: str) -> Callable[[np.ndarray], torch.Tensor]:
    """
    Args:
        path (`Path`): of `inception-2015-12-05.pt`, whose code is run.
        device (`str`): where it is to run.

    Returns:
        `Callable`: from images of shape `(num_images, height, width, channels)`, uint8, to features of shape
        `(num_images, 2048)`; gray images get three equal channels, and the network resizes them itself.

    Raises:
        `ValueError`: where the file is missing.
    """
    if not path.is_file():
        raise ValueError(
            f"`--features {INCEPTION_PREFIX}{path}`: there is no such file. FID needs the Inception weights as the "
            "TorchScript file inception-2015-12-05.pt, which NVIDIA publishes with StyleGAN3; this script downloads "
            "nothing. Without it, use features of the command train-classifier."
        )
    network = torch.jit.load(path, map_location=device).eval()

    @torch.no_grad()
    def extract(images: np.ndarray) -> torch.Tensor:
        batches = []
        for i in tqdm(range(0, len(images), 64), desc="Inception", mininterval=1):
            pixels = torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2)
            pixels = pixels.expand(-1, 3, -1, -1).contiguous().to(device)
            batches.append(network(pixels, return_features=True).cpu())
        return torch.cat(batches)

    return extract


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    r"""
    The squared Frechet distance of the Gaussians with the means and (unbiased) covariances of two sets of features
    ([arXiv 1706.08500](https://huggingface.co/papers/1706.08500), equation 6), as FID is reported:

        |mean_a - mean_b|^2 + trace(cov_a) + trace(cov_b) - 2 trace((cov_a cov_b)^(1/2))

    The eigenvalues of cov_a cov_b are those of the symmetric cov_a^(1/2) cov_b cov_a^(1/2), so the last trace is the sum
    of their square roots; neither needs covariances of full rank. All in float64.

    Args:
        features_a (`torch.Tensor` of shape `(num_a, num_features)`): one row an image, at least 2.
        features_b (`torch.Tensor` of shape `(num_b, num_features)`): one row an image, at least 2.

    Returns:
        `float`, 0 for equal means and covariances (up to rounding) and above otherwise.

    Raises:
        `ValueError`: on other shapes, or features that are not finite.
    """
    means, covariances = [], []
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_a.shape[-1]:
            raise ValueError(
                f"`{name}` has shape {tuple(features.shape)}; both need the shape (at least 2, num_features), with the "
                "same number of features."
            )
        if not features.isfinite().all():
            raise ValueError(f"`{name}` has values that are not finite.")
        features = features.double()
        means.append(features.mean(0))
        centered = features - means[-1]
        covariances.append(centered.T @ centered / (len(features) - 1))
    cov_a, cov_b = covariances
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return max(0.0, distance.item())


def compare(args: argparse.Namespace) -> None:
    """
    Compares samples with real images and writes the result to `--output`.

    Args:
        args (`argparse.Namespace`): of the command `compare`.

    Raises:
        `ValueError`: where samples, features and real images do not fit each other.
    """
    # 1. Features
    samples = read_npz("samples", args.samples)
    num_samples, height, width, channels = samples["images"].shape
    classifier = None
    if args.features.startswith(INCEPTION_PREFIX):
        path = Path(args.features.removeprefix(INCEPTION_PREFIX))
        extract = load_inception(path, args.device)
        features = {"metric": "FID", "features": "Inception, 2048 features of the last pooling layer"}
    else:
        path = Path(args.features)
        classifier, facts = load_classifier(path, args.device)

        def extract(images: np.ndarray) -> torch.Tensor:
            return run_classifier(classifier, images, args.device)[0]

        expected = (facts["resolution"], facts["resolution"], facts["channels"])
        if (height, width, channels) != expected:
            raise ValueError(
                f"`--samples` {args.samples} has images of shape {(height, width, channels)} (height, width, channels), "
                f"but the classifier `--features` {path} was trained on {expected}. Train one for these images."
            )
        features = {
            "metric": "Frechet distance on the features of a classifier; not FID",
            "features": f"{facts['widths'][-1]} features before the last layer of a classifier of {facts['dataset']}",
            "classifier": facts,
        }
        if samples["labels"] is not None and samples["labels"].max() >= facts["num_classes"]:
            raise ValueError(
                f"`--samples` {args.samples} has labels up to {samples['labels'].max()}, but the classifier "
                f"`--features` {path} knows {facts['num_classes']} classes."
            )
    features |= {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    # 2. Real images
    held_out = None
    if args.reference is not None:
        reference = read_npz("reference", args.reference)
        reference_facts = {"file": str(args.reference)}
    else:
        if height != width or args.resolution not in (None, height):
            raise ValueError(
                f"`--samples` {args.samples} has images of {height} x {width} pixels, but the real images are square "
                f"with `--resolution` {args.resolution}. Leave it out for the size of the samples."
            )
        source, reference = read_split(args, height, held_out=False)
        _, held_out = read_split(args, height, held_out=True)
        reference_facts = {"dataset": source.name, "random_flip": args.random_flip, **source.facts}
    if reference["images"].shape[1:] != samples["images"].shape[1:]:
        raise ValueError(
            f"`--samples` {args.samples} has images of shape {samples['images'].shape[1:]} (height, width, channels), "
            f"but the real ones have {reference['images'].shape[1:]}."
        )
    reference_facts["num_images"] = len(reference["images"])

    # 3. Figures
    reference_features = extract(reference["images"])
    result = {
        **features,
        "frechet_distance": frechet_distance(extract(samples["images"]), reference_features),
        "num_samples": num_samples,
        "reference": reference_facts,
    }
    if held_out is not None:
        order = torch.randperm(len(held_out["images"]), generator=keyed_generator(0, "floor")).numpy()
        floor = held_out["images"][np.sort(order[:num_samples])]
        result["frechet_distance_of_held_out"] = frechet_distance(extract(floor), reference_features)
        result["num_held_out"] = len(floor)
    if classifier is not None and samples["labels"] is not None:
        _, logits = run_classifier(classifier, samples["images"], args.device)
        is_right = logits.argmax(1).numpy() == samples["labels"]
        accuracy = is_right.mean().item()
        result["class_accuracy"] = accuracy
        result["class_accuracy_standard_error"] = math.sqrt(accuracy * (1 - accuracy) / num_samples)
        result["class_accuracy_by_label"] = {
            int(label): is_right[samples["labels"] == label].mean().item() for label in np.unique(samples["labels"])
        }
        result["class_accuracy_of_held_out"] = facts["held_out_accuracy"]
    protocol = args.samples.with_suffix(".json")
    result["samples"] = json.loads(protocol.read_text()) if protocol.is_file() else {"output": str(args.samples)}
    result["environment"] = describe_environment(Path(__file__).parent)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)

    print(f"{features['metric']} ({features['features']}), against {len(reference['images'])} real images:")
    print(f"  {num_samples} samples: {result['frechet_distance']:.4g}")
    if held_out is not None:
        print(f"  {result['num_held_out']} held-out real images: {result['frechet_distance_of_held_out']:.4g}")
    if "class_accuracy" in result:
        print(
            f"Read as asked: {result['class_accuracy']:.2%} (standard error "
            f"{result['class_accuracy_standard_error']:.2%}); held-out real images: {facts['held_out_accuracy']:.2%}"
        )


def main(args: argparse.Namespace) -> None:
    torch.backends.cudnn.allow_tf32 = False  # a GPU's figures are then those of a CPU, up to float32's rounding
    if args.command == "train-classifier":
        train_classifier(args)
    else:
        compare(args)


if __name__ == "__main__":
    main(parse_args())
