# SPDX-License-Identifier: Apache-2.0
"""The compute budget of a dynamic transformer: its schedule and its loss."""

import torch

from accelerate import Accelerator


def budget_at(step: int, budget: float, warmup_steps: int, decay_steps: int) -> float:
    """
    The compute ratio that is asked for at an optimizer step: 1, then linear to the budget (DyDiT, arXiv 2410.03456,
    appendix, for the recipe).

    Args:
        step (`int`): optimizer step, from 0.
        budget (`float`): final compute ratio, in (0, 1].
        warmup_steps (`int`): steps at 1.
        decay_steps (`int`): steps from 1 to the budget after them.

    Returns:
        `float` in [budget, 1].

    Raises:
        `ValueError`: for a budget outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise ValueError(f"`budget`={budget} must be in (0, 1]; 1 is the complete model.")
    if step < warmup_steps:
        return 1.0
    progress = min((step - warmup_steps + 1) / max(decay_steps, 1), 1.0)
    return 1.0 + progress * (budget - 1.0)


def budget_loss(compute_ratio: torch.Tensor, budget: float, accelerator: Accelerator) -> torch.Tensor:
    """
    (mean compute ratio - budget)^2, the mean taken over the micro-batches of all processes before it is squared. The
    gradient is that of the whole even though every process knows only its own samples: gradients are averaged over
    processes.

    Args:
        compute_ratio (`torch.Tensor` of shape `(batch_size,)`): of this process's samples, with gradients.
        budget (`float`): the ratio that is asked for.
        accelerator ([`~accelerate.Accelerator`]): the run's.

    Returns:
        `torch.Tensor` of shape `()`, the same value on every process.
    """
    local = compute_ratio.mean()
    excess = accelerator.reduce(local.detach(), reduction="mean") - budget
    return excess**2 + 2 * excess * (local - local.detach())
