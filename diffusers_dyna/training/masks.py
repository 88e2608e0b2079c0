# SPDX-License-Identifier: Apache-2.0
"""
Random masks for inpainting: brush strokes, boxes, all but a part, the whole image. 1 is to be painted, 0 is kept.

The kinds are those of free-form inpainting ([arXiv 1806.03589](https://huggingface.co/papers/1806.03589), section 4.2 and
algorithm 1) and of LaMa ([arXiv 2109.07161](https://huggingface.co/papers/2109.07161), section 2.3), with sizes relative
to the image.
"""

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from .randomness import keyed_generator


# Kind and share of the masks.
MASK_KINDS = {"brush": 0.45, "box": 0.3, "outpaint": 0.2, "whole": 0.05}


def random_masks(seed: int, indices: Sequence[int], height: int, width: int) -> torch.Tensor:
    """
    The masks of samples: a kind drawn by the shares of `MASK_KINDS`, then a mask of that kind.

    Args:
        seed (`int`): seed of the run.
        indices (`Sequence[int]`): global index of each sample.
        height (`int`): of the masks in pixels, at least 4.
        width (`int`): of the masks in pixels, at least 4.

    Returns:
        `torch.Tensor` of shape `(len(indices), 1, height, width)`, float32, 1 where to paint, 0 elsewhere. No mask is
        empty.
    """
    kinds, shares = list(MASK_KINDS), torch.tensor(list(MASK_KINDS.values()))
    masks = []
    for index in indices:
        generator = keyed_generator(seed, "mask", index)
        kind = kinds[int(torch.multinomial(shares, 1, generator=generator))]
        masks.append(random_mask(kind, height, width, generator))
    return torch.stack(masks)


def random_mask(kind: str, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """
    One mask.

    | `kind` | paint |
    |---|---|
    | `"brush"` | 1 to 4 strokes of 2 to 6 straight parts, with round ends, 1/12 to 1/4 of the shorter side wide |
    | `"box"` | 1 to 3 boxes, each side 1/5 to 3/5 of the image's |
    | `"outpaint"` | everything but a box, or a strip of rows or of columns, whose sides are 1/4 to 3/4 of the image's |
    | `"whole"` | everything |

    Args:
        kind (`str`): a name of the table.
        height (`int`): of the mask in pixels, at least 4.
        width (`int`): of the mask in pixels, at least 4.
        generator (`torch.Generator`): for all that is drawn.

    Returns:
        `torch.Tensor` of shape `(1, height, width)`, float32, 1 where to paint, 0 elsewhere; not empty.

    Raises:
        `ValueError`: on an unknown kind.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def integer(low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    def box(low: float, high: float) -> tuple[slice, slice]:
        sides = []
        for length in (height, width):
            side = max(1, round(length * uniform(low, high)))
            first = integer(0, length - side)
            sides.append(slice(first, first + side))
        return tuple(sides)

    if kind == "whole":
        return torch.ones(1, height, width)
    if kind == "box":
        mask = torch.zeros(1, height, width)
        for _ in range(integer(1, 3)):
            rows, columns = box(1 / 5, 3 / 5)
            mask[:, rows, columns] = 1
        return mask
    if kind == "outpaint":
        mask = torch.ones(1, height, width)
        rows, columns = box(1 / 4, 3 / 4)
        kept = integer(0, 2)
        rows = slice(0, height) if kept == 1 else rows
        columns = slice(0, width) if kept == 2 else columns
        mask[:, rows, columns] = 0
        return mask
    if kind != "brush":
        raise ValueError(f"`kind`={kind!r} is unknown. Use one of {', '.join(map(repr, MASK_KINDS))}.")

    image = PIL.Image.new("L", (width, height))
    draw = PIL.ImageDraw.Draw(image)
    shorter = min(height, width)
    for _ in range(integer(1, 4)):
        brush = max(1.0, shorter * uniform(1 / 12, 1 / 4))
        points = [(uniform(0, width - 1), uniform(0, height - 1))]
        angle = uniform(0, 2 * math.pi)
        for _ in range(integer(2, 6)):
            angle += uniform(-2, 2)  # turns, but seldom back
            length = shorter * uniform(1 / 8, 1 / 3)
            x, y = points[-1][0] + length * math.cos(angle), points[-1][1] + length * math.sin(angle)
            points.append((min(max(x, 0), width - 1), min(max(y, 0), height - 1)))
        draw.line(points, fill=1, width=round(brush))
        for x, y in points:
            draw.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=1)
    return torch.from_numpy(np.array(image, dtype=np.float32))[None]
