# SPDX-License-Identifier: Apache-2.0
"""What super-resolution is trained to undo. Evaluation makes its low-resolution images with the same functions."""

import torch
import torch.nn.functional as F


def downscale(images: torch.Tensor, factor: int) -> torch.Tensor:
    """
    The low-resolution image: the mean of each `factor` x `factor` pixels (`mode="area"` of
    [`torch.nn.functional.interpolate`], Pillow's `BOX`), a sensor with larger pixels. It has no overshoot, keeps [-1, 1]
    and needs no rounding to be the same everywhere.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): pixels in [-1, 1].
        factor (`int`): of both sides, at least 1.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height / factor, width / factor)`.

    Raises:
        `ValueError`: if `factor` does not divide both sides.
    """
    height, width = images.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"`factor`={factor} must divide height and width of `images`, {height} x {width}. Crop them to "
            f"{height - height % max(factor, 1)} x {width - width % max(factor, 1)}, or use another factor."
        )
    return F.interpolate(images, size=(height // factor, width // factor), mode="area")


def enlarge(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    A low-resolution image at the size of the result, as the model sees it beside the noisy sample: bicubic
    (`align_corners=False`, a = -0.75, as [`torch.nn.functional.interpolate`] has it), clamped to [-1, 1]. Also the
    baseline that super-resolution is compared with.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): pixels in [-1, 1].
        size (`tuple[int, int]`): height and width of the result.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, *size)` in [-1, 1].
    """
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)
