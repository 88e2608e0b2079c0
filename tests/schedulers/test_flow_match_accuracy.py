# SPDX-License-Identifier: Apache-2.0
"""The paths against reference data of SiT, and the orders of the solvers on distributions with a known velocity."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffusers_dyna import FlowMatchODEScheduler, FlowMatchPath

from .mixtures import Gaussian, Mixture, reference_mixture


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


def solve(mixture: Mixture, sample: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the ODE takes `sample`, by scipy's method of order 8 with steps as small as needed."""

    def velocity(sigma: float, flat: np.ndarray) -> np.ndarray:
        return mixture.velocity(torch.from_numpy(flat).reshape(sample.shape), sigma).flatten().numpy()

    solution = solve_ivp(velocity, (sigma, 0.0), sample.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-11)
    return torch.from_numpy(solution.y[:, -1]).reshape(sample.shape)


@pytest.fixture(scope="module")
def exact_end():
    """The mixture on a path, noise, and where the ODE takes it."""

    @functools.cache
    def make(path: str) -> tuple[Mixture, torch.Tensor, torch.Tensor]:
        mixture, noise = reference_mixture(path)[0], randn64(16, 6)
        return mixture, noise, solve(mixture, noise, 1.0)

    return make


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


@pytest.mark.parametrize("path", PATHS)
def test_conversions_return(path):
    """From any kind of prediction to any other and back, with one noise level per sample."""
    flow, data, noise = FlowMatchPath(path), randn64(4, 3, 2), randn64(4, 3, 2, seed=1)
    sigma = torch.tensor([0.001, 0.3, 0.8, 0.999], dtype=torch.float64)
    x = flow.interpolate(data, noise, sigma)
    b = flow.coefficients(sigma).b.reshape(4, 1, 1)
    kinds = {"sample": data, "epsilon": noise, "score": -noise / b, "velocity": flow.velocity(data, noise, sigma)}
    for source, prediction in kinds.items():
        for target, expected in kinds.items():
            actual = flow.convert(prediction, x, sigma, source, target)
            # x holds a thousandth of the noise or of the data at the outer two
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
            row = flow.convert(prediction[1:2], x[1:2], 0.3, source, target)
            torch.testing.assert_close(actual[1:2], row, rtol=1e-13, atol=1e-13)
            assert flow.convert(prediction.float(), x.float(), sigma, source, target).dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_coefficients(path):
    """The derivatives are those of a and b, and near the ends no digits are lost."""
    flow = FlowMatchPath(path)
    sigma = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    c = flow.coefficients(sigma)
    for value, derivative in ((c.a, c.da), (c.b, c.db)):
        close(torch.autograd.grad(value.sum(), sigma, retain_graph=True)[0], derivative, atol=1e-13)
    close(c.b_db, c.b * c.db, atol=1e-13)
    close(c.det, c.a * c.db - c.b * c.da, atol=1e-13)
    close(c.db_det, c.db / c.det, atol=1e-13)
    # b is proportional to sigma, on "vp" to its square root, down to the smallest numbers
    tiny = flow.coefficients(1e-12)
    expected = {"linear": 1e-12, "gvp": 1e-12 * math.pi / 2, "vp": 1e-6 * math.sqrt(0.1)}[path]
    assert tiny.b.item() == pytest.approx(expected, rel=1e-9)
    assert flow.coefficients(1.0).a.item() == (0 if path != "vp" else pytest.approx(math.exp(-5.025), rel=1e-14))


@pytest.mark.parametrize("path", PATHS)
def test_velocity_at_the_ends(path):
    """At sigma = 0 data and noise follow from the velocity, on "vp" too, where b' is infinite; at 1 the score does."""
    flow, x, velocity = FlowMatchPath(path), randn64(4, 3), randn64(4, 3, seed=1)
    close(flow.convert(velocity, x, 0.0, "velocity", "sample"), x)
    noise = {"linear": x + velocity, "gvp": velocity * 2 / math.pi, "vp": torch.zeros_like(x)}[path]
    close(flow.convert(velocity, x, 0.0, "velocity", "epsilon"), noise)
    assert flow.convert(velocity, x, 0.0, "score", "velocity").isfinite().all()
    for target in ("sample", "epsilon", "score"):
        assert flow.convert(velocity, x, 1.0, "velocity", target).isfinite().all()
    if path != "vp":
        close(flow.convert(velocity, x, 1.0, "velocity", "score"), -x)
    else:  # b b' is finite where b' is not, so that the score is too
        score = flow.convert(velocity, x, 0.0, "velocity", "score")
        close(flow.convert(score, x, 0.0, "score", "velocity"), velocity)


def test_unknown_names():
    x = randn64(1, 2)
    with pytest.raises(ValueError, match="`path`='cosine' is unknown. Use one of 'linear', 'gvp', 'vp'"):
        FlowMatchPath("cosine")
    with pytest.raises(ValueError, match="`source`='noise' is unknown. Use one of 'velocity', 'epsilon', 'score'"):
        FlowMatchPath().convert(x, x, 0.5, "noise", "sample")
    with pytest.raises(ValueError, match="`target`='x0' is unknown. Use one of 'velocity', 'epsilon', 'score'"):
        FlowMatchPath().convert(x, x, 0.5, "velocity", "x0")


# The order: with twice the steps, the error is divided by 2^order

SOLVERS = [
    ({"solver": "euler"}, 1, 160),
    ({"solver": "heun"}, 2, 80),
    ({"solver": "midpoint"}, 2, 160),
    ({"solver": "rk4"}, 4, 40),
    ({"solver": "ab2"}, 2, 80),
    ({"solver": "ab3"}, 3, 80),
    ({"solver": "abm3"}, 3, 80),
    ({"solver": "multistep", "solver_order": 2}, 2, 160),
    ({"solver": "multistep", "solver_order": 3}, 3, 80),
]
IDS = ["-".join(map(str, config.values())) for config, *_ in SOLVERS]


def measured_order(config: dict, path: str, steps: int, noise, velocity, expected) -> float:
    errors = []
    for number in (steps, 2 * steps):
        scheduler = FlowMatchODEScheduler(path=path, **config)
        scheduler.set_timesteps(number)
        errors.append((integrate(scheduler, noise, velocity) - expected).square().mean().sqrt().item())
    assert 1e-10 < errors[1] < 0.02, errors
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("config, order, steps", SOLVERS, ids=IDS)
def test_order_on_a_mixture(config, order, steps, path, exact_end):
    mixture, noise, expected = exact_end(path)
    measured = measured_order(config, path, steps, noise, mixture.velocity, expected)
    # the order is a limit: at these steps the next terms of the error still show
    upper = 0.35 if config["solver"] != "abm3" else 2
    assert order - 0.35 <= measured <= order + upper


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("config, order, steps", SOLVERS, ids=IDS)
def test_order_on_a_gaussian(config, order, steps, path):
    """At least: the velocity is linear in x, so that some terms of the error vanish."""
    data, noise = Gaussian(0.5, 1.3, path), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    expected = data.solution(noise, sigma=1.0)
    if path != "vp":
        close(expected, data.mean + data.deviation * noise)  # a standard normal becomes the data
    steps //= 2 if config["solver"] == "rk4" else 1
    assert measured_order(config, path, steps, noise, data.velocity, expected) >= order - 0.2


@pytest.mark.parametrize("config, order, steps", SOLVERS, ids=IDS)
def test_order_on_an_uneven_grid(config, order, steps, exact_end):
    """The multistep rules have variable steps: a shifted grid keeps the order."""
    mixture, noise, expected = exact_end("linear")
    config = {**config, "shift": 2.0}
    assert measured_order(config, "linear", steps, noise, mixture.velocity, expected) >= order - 0.35


@pytest.mark.parametrize("config, order, steps", SOLVERS, ids=IDS)
def test_order_of_a_start_in_the_middle(config, order, steps):
    """The multistep rules start anew there."""
    mixture, start = reference_mixture()[0], 0.7 * randn64(16, 6, seed=2)
    expected, errors = solve(mixture, start, 0.5), []
    steps *= 2 if config["solver"] == "rk4" else 1
    for number in (steps, 2 * steps):
        scheduler = FlowMatchODEScheduler(**config)
        scheduler.set_timesteps(number)
        begin = number // 2 * scheduler.order
        scheduler.set_begin_index(begin)
        sample = start
        for timestep in scheduler.timesteps[begin:]:
            sample = scheduler.step(mixture.velocity(sample, timestep.item() / 1000), timestep, sample).prev_sample
        errors.append((sample - expected).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[1]) >= order - 0.4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver, calls", [("midpoint", (2, 0)), ("rk4", (4, 1)), ("heun", (2, 1)), ("abm3", (1, 0))])
def test_one_entry_a_call(solver, calls, steps, path):
    scheduler = FlowMatchODEScheduler(solver=solver, path=path)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == calls[0] * steps - calls[1]
    assert scheduler.order == calls[0]
    assert scheduler.timesteps.min() > 0  # no model is asked at sigma = 0


def test_times_of_the_stages():
    for solver, expected in {
        "midpoint": [1000, 750, 500, 250],
        "rk4": [1000, 1000 - 500 / 3, 1000 - 1000 / 3, 500, 500, 500 - 500 / 3, 500 - 1000 / 3],
    }.items():
        scheduler = FlowMatchODEScheduler(solver=solver)
        scheduler.set_timesteps(2)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor(expected, dtype=torch.float32))


def test_stages_of_rk4_are_those_of_the_three_eighths_rule():
    """Against torchdiffeq's fixed-step "rk4", where it is installed."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    mixture, noise = reference_mixture()[0], randn64(8, 6)
    # away from sigma = 0, where the last step is another rule
    scheduler = FlowMatchODEScheduler(solver="rk4", sigma_min=0.25)
    scheduler.set_timesteps(3)
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    expected = odeint(lambda s, x: mixture.velocity(x, s), noise, grid, method="rk4")[-1]
    close(integrate(scheduler, noise, mixture.velocity), expected, atol=1e-6)


# Predictions of every kind


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["heun", "rk4", "ab3", "multistep"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "sample"])
def test_every_prediction_type_is_the_same_flow(prediction_type, solver, path):
    mixture, _ = reference_mixture(path)

    def prediction(sample, sigma):
        velocity = mixture.velocity(sample, sigma)
        return mixture.path.convert(velocity, sample, sigma, "velocity", prediction_type)

    noise = randn64(8, 6)
    scheduler = FlowMatchODEScheduler(solver=solver, path=path, prediction_type=prediction_type)
    scheduler.set_timesteps(12)
    reference = FlowMatchODEScheduler(solver=solver, path=path)
    reference.set_timesteps(sigmas=scheduler.sigmas[:: scheduler.order][:12])
    # the times of the stages are float32
    close(integrate(scheduler, noise, prediction), integrate(reference, noise, mixture.velocity), atol=1e-4)


@pytest.mark.parametrize("path, start", [("linear", 0.999), ("gvp", 0.999), ("vp", 1.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_no_data_follows_from_noise_alone(prediction_type, path, start):
    """Where a = 0 x is the noise: the grid starts just below, whoever made it."""
    scheduler = FlowMatchODEScheduler(path=path, prediction_type=prediction_type)
    for arguments in ({"num_inference_steps": 4}, {"sigmas": [1, 0.5]}, {"timesteps": [1000, 500]}):
        scheduler.set_timesteps(**arguments)
        assert scheduler.sigmas[0].item() == pytest.approx(start, rel=1e-6)
    scheduler.set_timesteps(sigmas=[1.0, 0.9995])  # and still falls
    assert scheduler.sigmas[0].item() == pytest.approx((1 + 0.9995) / 2 if path != "vp" else 1.0)
    scheduler.set_timesteps(sigmas=[0.9998, 0.5])  # a start that can be used stays
    assert scheduler.sigmas[0].item() == pytest.approx(0.9998)


# Data to noise


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("config, order, steps", SOLVERS, ids=IDS)
def test_there_and_back(config, order, steps, path):
    """Noise to data to noise: the error falls with the order of the solver."""
    mixture, _ = reference_mixture(path)
    noise = randn64(8, 6)
    errors = []
    steps = {1: 160, 2: 160, 3: 80, 4: 40}[order]
    for number in (steps, 2 * steps):
        scheduler = FlowMatchODEScheduler(path=path, sigma_min=1e-3 if path == "vp" else None, **config)
        scheduler.set_timesteps(number)
        data = integrate(scheduler, noise, mixture.velocity)
        scheduler.set_timesteps(number, reverse=True)
        assert (scheduler.timesteps.diff() >= 0).all() and scheduler.sigmas[-1] == 1
        assert (scheduler.sigmas[0] == 0) == (path != "vp")
        errors.append((integrate(scheduler, data, mixture.velocity) - noise).square().mean().sqrt().item())
    assert errors[1] < 0.05
    assert math.log2(errors[0] / errors[1]) >= order - 0.5


def test_reverse_grid():
    scheduler = FlowMatchODEScheduler(solver="heun")
    scheduler.set_timesteps(2, reverse=True)
    assert scheduler.sigmas.tolist() == [0, 0.5, 0.5, 1, 1]
    assert scheduler.timesteps.tolist() == [0, 500, 500, 1000]  # no rule is shortened at the noise
    for config in ({"path": "vp"}, {"prediction_type": "sample"}):
        scheduler = FlowMatchODEScheduler(**config)
        scheduler.set_timesteps(2, reverse=True)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.001, 0.5, 1]))
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == [1, 0.5, 0]


# What the multistep rules integrate exactly


@pytest.mark.parametrize("solver, degree", [("ab2", 1), ("ab3", 2), ("abm3", 2)])
def test_adams_rules_integrate_polynomials(solver, degree):
    """A velocity that is a polynomial in sigma, on an uneven grid: exact from the call on that completes it."""
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.6, 0.5, 0.3, 0.1])
    errors = []
    for power in (degree, degree + 1):
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.6, 0.5, 0.3, 0.1])
        start = torch.ones(2, dtype=torch.float64)
        end = integrate(scheduler, start, lambda x, sigma, power=power: torch.full_like(x, sigma**power))
        errors.append((end - (1 - 1 / (power + 1))).abs().max().item())
    assert errors[0] < 1e-7 < 1e-4 < errors[1]


def test_correction_makes_the_error_smaller():
    """Of a cubic velocity, Adams-Bashforth of order 3 leaves 3/8 h^4 in a step, Adams-Moulton 1/24 h^4."""
    errors = []
    for solver in ("ab3", "abm3"):
        scheduler = FlowMatchODEScheduler(solver=solver)
        scheduler.set_timesteps(200)
        end = integrate(scheduler, torch.ones(1, dtype=torch.float64), lambda x, sigma: torch.full_like(x, sigma**3))
        errors.append(abs(end.item() - 0.75))
    assert errors[0] / errors[1] == pytest.approx(9, abs=1)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("sigma_min", [0.2, None])
def test_multistep_integrates_polynomials_of_the_data(order, sigma_min):
    """With data = sum of c_k sigma^k, x = sigma (x(1) + integral of data d((1 - sigma) / sigma)) on "linear"."""
    coefficients, end = [0.3, -0.8, 0.5][:order], sigma_min or 0.0
    scheduler = FlowMatchODEScheduler(
        solver="multistep", solver_order=order, prediction_type="sample", sigma_min=sigma_min
    )
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.6, 0.5, 0.3])
    data = lambda x, sigma: torch.full_like(x, sum(c * sigma**k for k, c in enumerate(coefficients)))  # noqa: E731
    actual = integrate(scheduler, torch.ones(1, dtype=torch.float64), data)
    constant, linear, quadratic = [*coefficients, 0][:3]
    expected = end + constant * (1 - end) - (linear * end * math.log(end) if end else 0) + quadratic * end * (1 - end)
    assert actual.item() == pytest.approx(expected, abs=1e-6)
