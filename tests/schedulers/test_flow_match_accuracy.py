# SPDX-License-Identifier: Apache-2.0
"""The paths against reference data of SiT, and the orders of the solvers on distributions with a known velocity."""

import math

import numpy as np
import pytest
import torch

from diffusers_dyna import FlowMatchODEScheduler, FlowMatchPath

from .mixtures import reference_mixture


PATHS = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}  # ours to SiT's


def randn64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integrate(scheduler, sample: torch.Tensor, velocity) -> torch.Tensor:
    for timestep in scheduler.timesteps:
        model_output = velocity(sample, timestep.item() / scheduler.config.num_train_timesteps)
        sample = scheduler.step(model_output, timestep, sample).prev_sample
    return sample


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# The paths. SiT has t = 1 - sigma and velocities of the opposite sign.


@pytest.mark.parametrize("path", PATHS)
def test_reference_points(path):
    mixture, reference = reference_mixture(path)
    prefix = f"point.{PATHS[path]}"
    for i, t in enumerate(reference[f"{prefix}.t"].tolist()):
        point = {name: reference[f"{prefix}.{name}"][i : i + 1] for name in ("x", "velocity", "score", "noise")}
        velocity = mixture.velocity(point["x"], 1 - t)
        close(velocity, -point["velocity"])
        for source, prediction in (("velocity", velocity), ("score", point["score"]), ("epsilon", point["noise"])):
            for target, expected in (("velocity", velocity), ("score", point["score"]), ("epsilon", point["noise"])):
                close(mixture.path.convert(prediction, point["x"], 1 - t, source, target), expected)


@pytest.mark.parametrize("path", PATHS)
def test_reference_plan(path):
    _, reference = reference_mixture()
    prefix, flow = f"plan.{PATHS[path]}", FlowMatchPath(path)
    data, noise = reference[f"{prefix}.x1"], reference[f"{prefix}.x0"]
    sigma = 1 - reference[f"point.{PATHS[path]}.t"]
    close(flow.interpolate(data, noise, sigma), reference[f"{prefix}.xt"])
    close(flow.velocity(data, noise, sigma), -reference[f"{prefix}.ut"])


@pytest.mark.parametrize("path", PATHS)
def test_reference_euler(path):
    mixture, reference = reference_mixture(path)
    expected, end = reference[f"ode.{PATHS[path]}.euler.n11"], 1e-3 if path == "vp" else 0.0
    sigmas, sample = torch.linspace(1, end, 11, dtype=torch.float64), reference["init"]
    for start, stop in zip(sigmas[:-1], sigmas[1:], strict=True):
        sample = sample + (stop - start) * mixture.velocity(sample, start)
    close(sample, expected)

    scheduler = FlowMatchODEScheduler(path=path, sigma_min=end)
    scheduler.set_timesteps(10)
    # the grid of a scheduler is float32
    close(integrate(scheduler, reference["init"], mixture.velocity), expected, atol=3e-6)


# The order: dividing the steps by 2 divides the error by 2^order


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "config, order, steps",
    [
        ({"solver": "euler"}, 1, 160),
        ({"solver": "heun"}, 2, 80),
        ({"solver": "midpoint"}, 2, 160),
        ({"solver": "rk4"}, 4, 40),
        ({"solver": "ab2"}, 2, 80),
        ({"solver": "ab3"}, 3, 80),
        ({"solver": "multistep", "solver_order": 2}, 2, 160),
        ({"solver": "multistep", "solver_order": 3}, 3, 80),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_order_on_a_mixture(config, order, steps, path):
    mixture, _ = reference_mixture(path)
    noise = randn64(16, 6)
    errors = []
    exact = FlowMatchODEScheduler(path=path, solver="rk4")
    exact.set_timesteps(320)
    expected = integrate(exact, noise, mixture.velocity)
    for number in (steps, 2 * steps):
        scheduler = FlowMatchODEScheduler(path=path, **config)
        scheduler.set_timesteps(number)
        errors.append((integrate(scheduler, noise, mixture.velocity) - expected).square().mean().sqrt().item())
    # the order is a limit: at these steps the next terms of the error still show
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [3, 4])
def test_abm_is_adams_bashforth_moulton(order, path):
    """Against the textbook form, which keeps the corrected state and the steps' velocities, on an uneven grid."""
    mixture, _ = reference_mixture(path)
    scheduler = FlowMatchODEScheduler(path=path, solver=f"abm{order}")
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.7, 0.6, 0.35, 0.2, 0.1])
    *sigmas, end = scheduler.sigmas.tolist()

    def integral(nodes, start, end):
        """Of the polynomial through (sigma, velocity), by Lagrange's form and a Gauss-Legendre rule that is exact."""
        total = 0
        for point, weight in zip(*np.polynomial.legendre.leggauss(order), strict=True):
            u = start + (end - start) * (point + 1) / 2
            for sigma, velocity in nodes:
                others = [other for other, _ in nodes if other != sigma]
                factor = math.prod((u - other) / (sigma - other) for other in others)
                total = total + (end - start) * weight / 2 * factor * velocity
        return total

    predicted = corrected = noise = randn64(4, 6)
    nodes = []
    for i, sigma in enumerate(sigmas):
        nodes = [*nodes, (sigma, mixture.velocity(predicted, sigma))]
        if 0 < i < order:  # all steps so far, from the noise on
            corrected = noise + integral(nodes, sigmas[0], sigma)
        elif i > 0:
            corrected = corrected + integral(nodes[-order:], sigmas[i - 1], sigma)
        predicted = corrected + integral(nodes[-order:], sigma, [*sigmas, end][i + 1])
    close(integrate(scheduler, noise, mixture.velocity), predicted, atol=1e-5)
