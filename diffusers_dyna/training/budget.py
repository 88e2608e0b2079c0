# SPDX-License-Identifier: Apache-2.0
"""The compute budget of a dynamic transformer: its schedule and its loss."""

import torch


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


def budget_loss(compute_ratio: torch.Tensor, mean_ratio: torch.Tensor | float, budget: float) -> torch.Tensor:
    """
    (mean compute ratio - budget)^2, the mean taken over the global batch before it is squared. Its gradient comes from
    the samples at hand; averaged over processes and micro-batches, as gradients are, it is that of the whole.

    Args:
        compute_ratio (`torch.Tensor` of shape `(batch_size,)`): of the samples at hand, with gradients.
        mean_ratio (`torch.Tensor` of shape `()` or `float`): mean over the global batch, without gradients.
        budget (`float`): the ratio that is asked for.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    local, excess = compute_ratio.mean(), mean_ratio - budget
    return excess**2 + 2 * excess * (local - local.detach())
