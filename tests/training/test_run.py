# SPDX-License-Identifier: Apache-2.0
"""The parts of a run that need a device that the scripts' tests do not have."""

import types

import pytest
import torch

from diffusers_dyna.training.loop import NonFiniteGuard
from diffusers_dyna.training.run import TrainingRun


@pytest.mark.parametrize("norm, steps, skipped, updates", [(1.0, 1, 0, 0), (9.0, 0, 1, 1), (float("nan"), 1, 0, 0)])
def test_fp16_steps_and_skips(norm, steps, skipped, updates):
    """
    The gradient scaler itself passes over a step that is not finite; one that is too large is skipped by the run, and
    the scaler is told to go on.
    """
    calls = {"step": 0, "update": 0, "ema": 0}

    def count(name):
        return lambda *args: calls.update({name: calls[name] + 1})

    run = object.__new__(TrainingRun)
    run.args = types.SimpleNamespace(max_grad_norm=1.0, skip_grad_norm=5.0)
    run.accelerator = types.SimpleNamespace(
        sync_gradients=True,
        clip_grad_norm_=lambda parameters, max_norm: torch.tensor(norm),
        scaler=types.SimpleNamespace(update=count("update")),
    )
    run.optimizer = types.SimpleNamespace(step=count("step"), zero_grad=lambda: None)
    run.ema = types.SimpleNamespace(step=count("ema"))
    run.unwrapped, run.state = torch.nn.Linear(1, 1), {"skipped_steps": 0}
    run._guard = NonFiniteGuard(max_in_a_row=5)
    run.optimizer_step(0)
    assert (calls["step"], calls["update"], run.state["skipped_steps"]) == (steps, updates, skipped)
    assert calls["ema"] == (norm == 1.0)
