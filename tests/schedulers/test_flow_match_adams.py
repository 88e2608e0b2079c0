# SPDX-License-Identifier: Apache-2.0
"""The corrected Adams rule against its textbook form, on an uneven grid."""

import math

import numpy as np
import pytest
import torch

from diffusers_dyna import FlowMatchODEScheduler

from .mixtures import reference_mixture


def integral(nodes: list[tuple[float, torch.Tensor]], start: float, end: float) -> torch.Tensor:
    """Of the polynomial through (sigma, velocity), by Lagrange's form and a Gauss-Legendre rule that is exact for it."""
    total = 0
    for point, weight in zip(*np.polynomial.legendre.leggauss(len(nodes)), strict=True):
        u = start + (end - start) * (point + 1) / 2
        for sigma, velocity in nodes:
            factor = math.prod((u - other) / (sigma - other) for other, _ in nodes if other != sigma)
            total = total + (end - start) * weight / 2 * factor * velocity
    return total


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_abm3_is_adams_bashforth_moulton(path):
    """The textbook keeps the corrected state; the scheduler adds the correction to the state that was predicted."""
    mixture, _ = reference_mixture(path)
    scheduler = FlowMatchODEScheduler(path=path, solver="abm3")
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.7, 0.6, 0.35, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    sample = noise = torch.randn(4, 6, generator=generator, dtype=torch.float64)

    sigmas = scheduler.sigmas.tolist()
    predicted = corrected = noise
    nodes = []
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        nodes.append((sigma, mixture.velocity(predicted, sigma)))
        if 0 < i < 3:  # all steps so far, from the noise on
            corrected = noise + integral(nodes, sigmas[0], sigma)
        elif i > 0:
            corrected = corrected + integral(nodes[-3:], sigmas[i - 1], sigma)
        predicted = corrected + integral(nodes[-3:], sigma, following)

        velocity = mixture.velocity(sample, scheduler.timesteps[i].item() / 1000)
        sample = scheduler.step(velocity, scheduler.timesteps[i], sample).prev_sample
        # timesteps are float32
        torch.testing.assert_close(sample, predicted, rtol=0, atol=1e-5)
