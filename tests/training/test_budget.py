# SPDX-License-Identifier: Apache-2.0
"""The budget's schedule and loss."""

import pytest
import torch

from diffusers_dyna.training.budget import budget_at, budget_loss


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (99, 1.0), (100, 0.9995), (599, 0.75), (1099, 0.5), (1100, 0.5), (9999, 0.5)]
)
def test_budget_is_one_then_linear_then_constant(step, expected):
    assert budget_at(step, 0.5, warmup_steps=100, decay_steps=1000) == pytest.approx(expected)


def test_a_budget_without_decay_steps_applies_after_the_warm_up():
    assert [budget_at(step, 0.6, 2, 0) for step in range(4)] == pytest.approx([1.0, 1.0, 0.6, 0.6])


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5])
def test_a_budget_outside_its_range(budget):
    with pytest.raises(ValueError, match=r"`budget`=.* must be in \(0, 1\]"):
        budget_at(0, budget, 0, 0)


def test_the_loss_squares_the_mean_of_the_global_batch():
    """Two processes or micro-batches with half of the batch each: mean of their gradients == gradient of the whole."""
    ratios = torch.tensor([0.9, 0.8, 0.5, 0.3], requires_grad=True)
    whole = (ratios.mean() - 0.4) ** 2
    (expected,) = torch.autograd.grad(whole, ratios)
    losses = [budget_loss(half, ratios.detach().mean(), 0.4) for half in ratios.chunk(2)]
    for loss in losses:
        torch.testing.assert_close(loss, whole)
    (gradient,) = torch.autograd.grad(sum(losses) / 2, ratios)
    torch.testing.assert_close(gradient, expected)
