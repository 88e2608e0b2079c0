# SPDX-License-Identifier: Apache-2.0
"""The compute budget of a dynamic transformer: its schedule, its loss, and what the routers do with it."""

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


@torch.no_grad()
def measure_activity(
    transformer,
    noisy_sample: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    What the routers leave on, by the rule of inference.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]): in evaluation mode.
        noisy_sample (`torch.Tensor` of shape `(num_timesteps, batch_size, channels, height, width)`):
            The same images at every timestep.
        timesteps (`torch.Tensor` of shape `(num_timesteps,)`): their times.
        class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): their classes.

    Returns:
        `dict` of tensors on the CPU: `timesteps` and `compute_ratio` of shape `(num_timesteps,)`; `attn` and `mlp` of
        shape `(num_timesteps, num_layers, num_attention_heads)`, 1 where a head or group was on; `tokens` of shape
        `(num_timesteps, batch_size, num_layers, num_tokens)`, 1 where a token took the MLP.
    """
    outputs = [
        transformer(sample, timestep, class_labels, output_masks=True)
        for sample, timestep in zip(noisy_sample, timesteps, strict=True)
    ]
    return {
        "timesteps": timesteps.float().cpu(),
        "compute_ratio": torch.stack([output.compute_ratio.mean() for output in outputs]).cpu(),
        "attn": torch.stack([output.attn_masks.mean(dim=0) for output in outputs]).cpu(),
        "mlp": torch.stack([output.mlp_masks.mean(dim=0) for output in outputs]).cpu(),
        "tokens": torch.stack([output.token_masks for output in outputs]).cpu(),
    }
