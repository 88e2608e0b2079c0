# SPDX-License-Identifier: Apache-2.0
"""
`FlowMatchODEScheduler` against diffusers' flow-matching schedulers, and against a data distribution whose velocity and
whose solution of the ODE are known in closed form.
"""

import inspect
import json
import math
import re

import numpy as np
import pytest
import torch

from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_dyna import FlowMatchODEScheduler, FlowMatchSDEScheduler
from diffusers_dyna.schedulers import FlowMatchODESchedulerOutput

from ..testing_utils import EULER_KEEPS_GIVEN_TIMES, logged_warnings, randn


SOLVERS = ["euler", "heun", "midpoint", "rk4", "ab2", "ab3", "abm3", "multistep"]
SHAPE = (4, 3, 8, 8)


def toy_velocity(sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
    """Some velocity that depends on the sample and on the time, with no meaning."""
    return sample * float(timestep) / (1000 + float(timestep)) - 0.3


def run(scheduler, sample: torch.Tensor, velocity=toy_velocity, begin_index: int = 0) -> tuple[torch.Tensor, int]:
    """The end of the trajectory and the number of model calls."""
    calls = 0
    for timestep in scheduler.timesteps[begin_index:]:
        sample = scheduler.step(velocity(sample, timestep), timestep, sample).prev_sample
        calls += 1
    return sample, calls


class GaussianData:
    """
    Data N(mean, std^2) under the linear path x = a x0 + sigma eps, a = 1 - sigma: x is Gaussian with variance
    D = a^2 std^2 + sigma^2, the velocity is E[eps - x0 | x], and x keeps its quantile along the ODE.
    """

    mean, std = 0.7, 0.4

    def deviation(self, sigma: float) -> float:
        return math.sqrt((1 - sigma) ** 2 * self.std**2 + sigma**2)

    def velocity(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        sigma = float(timestep) / 1000
        covariance = sigma - (1 - sigma) * self.std**2
        return covariance / self.deviation(sigma) ** 2 * (sample - (1 - sigma) * self.mean) - self.mean

    def solution(self, sample: torch.Tensor, sigma: float, end: float = 0.0) -> torch.Tensor:
        quantile = (sample - (1 - sigma) * self.mean) / self.deviation(sigma)
        return (1 - end) * self.mean + self.deviation(end) * quantile


# The grid


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_default_grid_is_even_and_ends_at_zero(steps):
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(steps)
    # float32 rounds each entry to 6e-8
    expected = torch.tensor([1 - i / steps for i in range(steps)] + [0.0])
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0, atol=1.2e-7)
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)
    assert scheduler.num_inference_steps == steps


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_heun_asks_for_the_model_2n_minus_1_times(steps):
    scheduler = FlowMatchODEScheduler(solver="heun", shift=2.0)
    scheduler.set_timesteps(steps)
    euler = FlowMatchODEScheduler(shift=2.0)
    euler.set_timesteps(steps)
    times = euler.timesteps.tolist()
    assert scheduler.timesteps.tolist() == times[:1] + [time for time in times[1:] for _ in range(2)]
    assert len(scheduler.timesteps) == 2 * steps - 1
    assert scheduler.order == 2


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_is_applied_once(shift):
    scheduler = FlowMatchODEScheduler(shift=shift)
    scheduler.set_timesteps(4)
    for _ in range(2):  # setting the grid a second time starts from the unshifted one again
        scheduler.set_timesteps(4)
        expected = torch.tensor([shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25)] + [0.0])
        # float32 rounding of three operations
        torch.testing.assert_close(scheduler.sigmas, expected, rtol=3e-7, atol=0)


def test_last_step_is_not_wasted():
    """With two steps and `shift=3`, diffusers' default grid is [1, 0.009, 0]."""
    scheduler = FlowMatchODEScheduler(shift=3.0)
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.0]))


def test_grid_before_set_timesteps_serves_training():
    """Training scripts of diffusers pick entries of `timesteps`, and `sigmas` has the same positions."""
    ours, theirs = FlowMatchODEScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert len(ours) == len(ours.timesteps) == 1000
    # i/1000 is rounded in another order: one unit in the last place of 1000
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1.3e-4)
    torch.testing.assert_close(ours.sigmas[:-1], theirs.sigmas, rtol=0, atol=1.2e-7)
    assert ours.sigmas[-1] == 0


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_user_grids(convert):
    scheduler = FlowMatchODEScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=convert([1.0, 0.5, 0.2]))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.6 / 1.4, 0.0]))
    assert scheduler.num_inference_steps == 3

    scheduler.set_timesteps(3, timesteps=convert([900.0, 254.0, 0.5]))
    assert scheduler.timesteps.tolist() == [900, 254, 0.5]  # never shifted
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.9, 0.254, 0.0005, 0.0]))


@pytest.mark.parametrize("timesteps", [[999, 333.3, 7, 0.1], list(range(1000, 0, -1))], ids=["uneven", "all"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_user_timesteps_are_taken_as_they_are(solver, timesteps):
    """t / 1000 * 1000 is not always t in float32."""
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(timesteps=timesteps)
    assert torch.equal(scheduler.timesteps[:: scheduler.order], torch.tensor(timesteps, dtype=torch.float32))
    scheduler.set_timesteps(timesteps=timesteps, reverse=True)
    expected = torch.tensor([0, *timesteps[:0:-1]], dtype=torch.float32)
    assert torch.equal(scheduler.timesteps[:: scheduler.order], expected)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_each_call_has_its_sigma(solver, reverse, steps):
    """As in diffusers, its Heun included: pipelines index `sigmas` by the call."""
    scheduler = FlowMatchODEScheduler(solver=solver, shift=3.0)
    scheduler.set_timesteps(steps, reverse=reverse)
    assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1
    assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert scheduler.sigmas[-1] == (1 if reverse else 0)
    if solver == "heun" and not reverse:
        theirs = FlowMatchHeunDiscreteScheduler()
        theirs.set_timesteps(steps)
        ours = FlowMatchODEScheduler(solver="heun")
        ours.set_timesteps(sigmas=theirs.timesteps[::2] / 1000)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}])
@pytest.mark.parametrize("timesteps", [[1000, 500, 1], [900, 254, 3]])
def test_sigmas_and_the_times_that_the_model_is_told(config, timesteps):
    """As CogView4 and GLM-Image call it: the sigmas are shifted, the times are not."""
    arguments = {"sigmas": [1.0, 0.5, 0.001], "timesteps": np.array(timesteps, dtype=np.float32), "mu": 0.4}
    theirs, ours = FlowMatchEulerDiscreteScheduler(**config), FlowMatchODEScheduler(**config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(**arguments)
    assert torch.equal(ours.sigmas, theirs.sigmas) and ours.timesteps.tolist() == timesteps
    if EULER_KEEPS_GIVEN_TIMES:
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(run(ours, randn(*SHAPE))[0], run(theirs, randn(*SHAPE))[0])
    for solver in ("abm3", "multistep"):
        ours = FlowMatchODEScheduler(**config, solver=solver)
        ours.set_timesteps(**arguments)
        assert torch.equal(ours.sigmas, theirs.sigmas) and ours.timesteps.tolist() == timesteps
        assert run(ours, randn(*SHAPE))[1] == 3
    if "shift" not in config:
        with pytest.raises(ValueError, match="`mu` must be given where `use_dynamic_shifting`"):
            ours.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1000, 1])
    heun = FlowMatchODEScheduler(**config, solver="heun")
    with pytest.raises(
        ValueError, match="have 3 and 3 entries, and `solver`='heun' has 2 calls a step. Both together"
    ):
        heun.set_timesteps(**arguments)


def test_user_timesteps_need_no_mu():
    scheduler = FlowMatchODEScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(timesteps=[900.0, 254.0])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.9, 0.254, 0.0]))


def test_mu_without_dynamic_shifting_changes_nothing():
    """Pipelines of diffusers (Flux, QwenImage, Z-Image, ...) pass `mu` whether the scheduler uses it or not."""
    scheduler = FlowMatchODEScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    expected = scheduler.sigmas
    scheduler.set_timesteps(5, mu=1.15)
    assert torch.equal(scheduler.sigmas, expected)


def test_num_train_timesteps_is_the_unit_of_time():
    scheduler = FlowMatchODEScheduler(num_train_timesteps=10)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([10.0, 8.0, 6.0, 4.0, 2.0]))
    assert len(scheduler) == 10
    noised = scheduler.scale_noise(torch.zeros(1, 2), 4.0, torch.ones(1, 2))
    torch.testing.assert_close(noised, torch.full((1, 2), 0.4))


def test_set_shift_acts_from_the_next_grid_on():
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(2)
    scheduler.set_shift(3.0)
    assert scheduler.shift == 3.0
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.5, 0.0]))
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.0]))


# diffusers' schedulers as oracles


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize(
    "config, mu",
    [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"shift": 0.7}, None),
        ({"use_dynamic_shifting": True}, 0.8),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
        ({"use_dynamic_shifting": True, "shift": 3.0}, 0.8),
    ],
)
def test_euler_is_diffusers_euler_bit_for_bit(config, mu, steps):
    sigmas = np.linspace(1, 1 / steps, steps)
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(sigmas=sigmas, mu=mu)
    ours = FlowMatchODEScheduler(**config)
    for arguments in ({"sigmas": sigmas}, {"sigmas": sigmas.tolist()}, {"num_inference_steps": steps}):
        ours.set_timesteps(**arguments, mu=mu)
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert torch.equal(ours.timesteps, theirs.timesteps)

    expected, _ = run(theirs, randn(*SHAPE))
    actual, calls = run(ours, randn(*SHAPE))
    assert calls == steps
    assert torch.equal(actual, expected)


def test_euler_trajectory_with_rounded_model_output():
    """What `step` returns has the dtype of the model output; the state keeps what rounding takes from it."""
    theirs, ours = FlowMatchEulerDiscreteScheduler(), FlowMatchODEScheduler()
    sigmas = [1.0, 0.7, 0.4, 0.1]
    theirs.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    sample, velocity = randn(*SHAPE), randn(*SHAPE, seed=1).bfloat16()
    state = sample
    for i, timestep in enumerate(ours.timesteps):
        actual = ours.step(velocity, timestep, sample).prev_sample
        assert actual.dtype == torch.bfloat16
        # bit for bit the float32 trajectory, rounded; diffusers rounds the increment and the state at each step, hence
        # some units of bfloat16 (2^-8) of tolerance against it
        state = state + (ours.sigmas[i + 1] - ours.sigmas[i]) * velocity.float()
        assert torch.equal(actual, state.bfloat16())
        expected = theirs.step(velocity, timestep, sample).prev_sample
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-7)
        sample = actual


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_heun_is_diffusers_heun(shift, steps):
    theirs = FlowMatchHeunDiscreteScheduler(shift=shift)
    theirs.sigma_min = 0.2  # of 0.001, by which they divide, rounding would be all that one sees
    theirs.set_timesteps(steps)
    ours = FlowMatchODEScheduler(solver="heun")
    # their default grid as it is, without the shift
    ours.set_timesteps(sigmas=theirs.timesteps[::2] / 1000)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1.2e-7, atol=0)

    expected, _ = run(theirs, randn(*SHAPE))
    actual, calls = run(ours, randn(*SHAPE))
    assert calls == 2 * steps - 1
    # they divide by sigma what they multiplied by it: float32 rounding over a few steps, values of order 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("other", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_from_config_both_ways(other):
    ours = FlowMatchODEScheduler.from_config(other(shift=3.0, num_train_timesteps=500).config)
    assert (ours.shift, ours.config.num_train_timesteps) == (3.0, 500)
    back = other.from_config(ours.config)
    assert (back.config.shift, back.config.num_train_timesteps) == (3.0, 500)
    assert FlowMatchODEScheduler.from_config(back.config).config.shift == 3.0
    assert other in FlowMatchODEScheduler().compatibles
    # the solver survives the way through a scheduler that does not know it
    heun = FlowMatchODEScheduler(solver="heun")
    assert FlowMatchODEScheduler.from_config(other.from_config(heun.config).config).config.solver == "heun"
    assert FlowMatchODEScheduler.from_config(ours.config, solver="heun").order == 2


# What the Hub has for Sana and for Wan
DPM_CONFIG = {"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_CONFIGS = [DPMSolverMultistepScheduler(**DPM_CONFIG).config, UniPCMultistepScheduler(**DPM_CONFIG).config]


@pytest.mark.parametrize("config", FLOW_CONFIGS, ids=["DPM++", "UniPC"])
def test_from_a_flow_config_of_a_diffusion_scheduler(config, tmp_path):
    """The same flow: of a model, the same data at every sigma, on the shifted grid."""
    with logged_warnings() as warnings:
        scheduler = FlowMatchODEScheduler.from_config(config)
    assert warnings == []
    assert (scheduler.config.prediction_type, scheduler.shift, scheduler.config.path) == ("velocity", 3.0, "linear")
    scheduler.set_timesteps(4)
    reference = FlowMatchODEScheduler(shift=3.0)
    reference.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, reference.timesteps)
    theirs = (DPMSolverMultistepScheduler if "algorithm_type" in config else UniPCMultistepScheduler)(**DPM_CONFIG)
    theirs.set_timesteps(1)
    sample, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    theirs._step_index = 0
    sigma = theirs.sigmas[0].item()
    expected = scheduler.path.convert(output, sample, sigma, "velocity", "sample")
    torch.testing.assert_close(theirs.convert_model_output(output, sample=sample), expected)

    assert FlowMatchODEScheduler.from_config(config, shift=5.0, solver="abm3").shift == 5.0
    assert FlowMatchSDEScheduler.from_config(config, prediction_type="velocity").shift == 3.0
    scheduler = FlowMatchODEScheduler.from_config({**config, "_class_name": "DPMSolverMultistepScheduler"}, shift=2.0)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchODEScheduler.from_pretrained(tmp_path)
    assert (loaded.config.prediction_type, loaded.shift) == ("velocity", 2.0)
    # through a scheduler of diffusers that reads `shift`
    euler = FlowMatchEulerDiscreteScheduler.from_config(config)
    with pytest.raises(ValueError, match="The config has both `shift`=1.0 and `flow_shift`=3.0. Pass one of them"):
        FlowMatchODEScheduler.from_config(euler.config)
    assert FlowMatchODEScheduler.from_config(euler.config, shift=1.0).shift == 1.0


@pytest.mark.parametrize("scheduler", [FlowMatchODEScheduler, FlowMatchSDEScheduler])
@pytest.mark.parametrize(
    "other, message",
    [
        (
            DDPMScheduler(),
            "The config is that of a diffusion scheduler: it has betas .* make FlowMatch.*Scheduler with",
        ),
        (DDPMScheduler(trained_betas=[0.1] * 1000, beta_schedule=None), "The config is that of a diffusion scheduler"),
        (DPMSolverMultistepScheduler(), "The config is that of a diffusion scheduler"),
        (
            DPMSolverMultistepScheduler(**DPM_CONFIG, thresholding=True),
            "The config sets `thresholding`, which FlowMatch",
        ),
        (EDMEulerScheduler(), "The config sets `sigma_max`, which FlowMatch"),
    ],
    ids=["DDPM", "betas", "DPM++", "thresholding", "EDM"],
)
def test_config_of_another_process(scheduler, other, message):
    """Integrated along our path, its model would make a wrong picture without a word."""
    with pytest.raises(ValueError, match=message):
        scheduler.from_config(other.config)


GRIDS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize("shape", [{}, {"shift_terminal": 0.05}, *({name: True} for name in GRIDS)], ids=str)
@pytest.mark.parametrize("config, mu", [({}, None), ({"shift": 3.0}, None), ({"use_dynamic_shifting": True}, 0.8)])
@pytest.mark.parametrize("invert", [False, True])
def test_grids_are_those_of_diffusers(config, mu, shape, steps, invert):
    config = {**config, **shape, "invert_sigmas": invert}
    sigmas = np.linspace(1, 1 / steps, steps)
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(sigmas=sigmas, mu=mu)
    ours = FlowMatchODEScheduler.from_config(theirs.config)
    for arguments in ({"sigmas": sigmas}, {"num_inference_steps": steps}):
        ours.set_timesteps(**arguments, mu=mu)
        # the quantiles of scipy's two forms of the same function differ in the last digits
        tolerance = 1e-6 if config.get("use_beta_sigmas") else 0
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1000 * tolerance)
    if not config.get("use_beta_sigmas"):
        assert torch.equal(run(ours, randn(*SHAPE))[0], run(theirs, randn(*SHAPE))[0])


def test_shift_terminal_of_one_step():
    with pytest.raises(ValueError, match="`shift_terminal` moves the last of at least 2 steps, but the grid has 1"):
        FlowMatchODEScheduler(shift_terminal=0.1).set_timesteps(1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_inverted_time_is_the_same_flow(solver, prediction_type):
    """A model of the opposite convention: time 1 - sigma, and the velocity `sample - noise`."""
    data = GaussianData()
    ends = []
    for invert in (False, True):

        def prediction(sample, timestep, invert=invert):
            sigma = timestep.double() / 1000
            velocity = data.velocity(sample, 1000 * (1 - sigma if invert else sigma))
            if prediction_type == "sample":
                return sample - (1 - sigma if invert else sigma) * velocity
            return -velocity if invert else velocity

        scheduler = FlowMatchODEScheduler(solver=solver, invert_sigmas=invert, prediction_type=prediction_type)
        scheduler.set_timesteps(4)
        ends.append(run(scheduler, randn(5).double(), prediction)[0])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    sample, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    scheduler = FlowMatchODEScheduler(invert_sigmas=True)
    torch.testing.assert_close(scheduler.scale_noise(sample, 250.0, noise), 0.25 * sample + 0.75 * noise)
    assert torch.equal(scheduler.get_velocity(sample, noise, 250.0), sample - noise)


def test_a_time_for_each_token():
    """As in LTX-Video: some tokens are cleaner than others, and each goes on to the next sigma of the grid."""
    sample, output = randn(2, 6, 3), randn(2, 6, 3, seed=1)
    times = torch.tensor([[0.0, 100, 250, 260, 500, 1000], [750, 749.99, 20, 1, 999, 400]])
    ends = []
    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchODEScheduler()):
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        arguments = {"per_token_timesteps": times, "return_dict": False}
        ends.append(scheduler.step(output, scheduler.timesteps[0], sample, **arguments)[0])
        assert scheduler.step_index == 1
    assert torch.equal(*ends)
    assert torch.equal(ends[1][0, 0], sample[0, 0])  # a clean token stays
    scheduler = FlowMatchODEScheduler(solver="ab2")
    scheduler.set_timesteps(4)
    with pytest.raises(
        ValueError, match="`per_token_timesteps` works with `solver`='euler' and .* has 'ab2' and 'vel"
    ):
        scheduler.step(output, scheduler.timesteps[0], sample, per_token_timesteps=times)


# The precision of the state


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_keeps_what_rounding_takes(solver, dtype):
    """With the same model outputs, what comes out in 16 bits is the float32 trajectory, rounded once."""
    full, rounded = FlowMatchODEScheduler(solver=solver), FlowMatchODEScheduler(solver=solver)
    for scheduler in (full, rounded):
        scheduler.set_timesteps(20)
    sample = randn(*SHAPE).to(dtype)
    expected, actual = sample.float(), sample
    for i, timestep in enumerate(full.timesteps):
        output = randn(*SHAPE, seed=i + 1).to(dtype)
        expected = full.step(output.float(), timestep, expected).prev_sample
        actual = rounded.step(output, timestep, actual).prev_sample
        assert actual.dtype == dtype
        if i % 3 == 0:
            actual = actual.clone()  # as a pipeline that moves or chunks its latents
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("solver", SOLVERS)
def test_change_of_the_caller_counts(solver):
    """Inpainting replaces a part of the sample between two steps: there its values count, elsewhere the state."""
    full, rounded = FlowMatchODEScheduler(solver=solver), FlowMatchODEScheduler(solver=solver)
    for scheduler in (full, rounded):
        scheduler.set_timesteps(3)
    sample = randn(*SHAPE).bfloat16()
    expected, actual = sample.float(), sample
    for i, timestep in enumerate(full.timesteps):
        output = randn(*SHAPE, seed=i + 1).bfloat16()
        expected = full.step(output.float(), timestep, expected).prev_sample
        actual = rounded.step(output, timestep, actual).prev_sample
        if i == rounded.order - 1:  # the first step is done
            mask, known = randn(*SHAPE, seed=98) > 0, randn(*SHAPE, seed=99).bfloat16()
            actual = torch.where(mask, known, actual)  # or in place:
            expected[mask] = known[mask].float()
    assert torch.equal(actual, expected.bfloat16())


def test_change_in_place_and_of_the_shape_counts():
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(2)
    first = scheduler.step(randn(*SHAPE).bfloat16(), 1000.0, randn(*SHAPE).bfloat16()).prev_sample
    first.fill_(0.5)
    zero = torch.zeros(SHAPE, dtype=torch.bfloat16)
    assert torch.equal(scheduler.step(zero, 500.0, first).prev_sample, torch.full_like(zero, 0.5))

    scheduler.set_timesteps(2)
    first = scheduler.step(randn(*SHAPE).bfloat16(), 1000.0, randn(*SHAPE).bfloat16()).prev_sample
    assert torch.equal(scheduler.step(zero[:2], 500.0, first[:2]).prev_sample, first[:2])


def test_double_precision_is_kept():
    scheduler = FlowMatchODEScheduler(solver="rk4")
    scheduler.set_timesteps(2)
    sample, _ = run(scheduler, randn(*SHAPE).double())
    assert sample.dtype == torch.float64 and not torch.equal(sample, sample.float().double())


# A distribution with a known solution


@pytest.mark.parametrize("solver, order, steps", [("euler", 1, (32, 64, 128, 256)), ("heun", 2, (10, 20, 40, 80))])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(solver, order, steps, shift):
    """Halving the step divides the error by 2^order."""
    data = GaussianData()
    noise = torch.linspace(-2, 2, 41)
    expected = data.solution(noise, sigma=1.0)
    torch.testing.assert_close(expected, data.mean + data.std * noise)  # a standard normal becomes the data
    errors = []
    for number in steps:
        scheduler = FlowMatchODEScheduler(solver=solver, shift=shift)
        scheduler.set_timesteps(number)
        sample, calls = run(scheduler, noise, data.velocity)
        assert calls == len(scheduler.timesteps) == (number if solver == "euler" else 2 * number - 1)
        errors.append((sample - expected).square().mean().sqrt().item())
    # 1e-5 is a hundred roundings of float32: the errors are those of the method
    assert 1e-5 < errors[-1] < errors[0] < 0.06
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
    # the order is a limit; at these steps the next term of the error moves it by up to a tenth
    torch.testing.assert_close(torch.tensor(orders), torch.full((3,), float(order)), rtol=0, atol=0.12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("with_begin_index", [True, False])
def test_start_in_the_middle(solver, with_begin_index):
    """Image-to-image: data is noised to a time of the grid and integrated from there."""
    data = GaussianData()
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(200)
    begin_index = 120 * scheduler.order
    timestep = scheduler.timesteps[begin_index]
    assert timestep.item() == pytest.approx(400.0, abs=1e-3)

    image, noise = data.mean + data.std * randn(41), randn(41, seed=1)
    sample = scheduler.scale_noise(image, timestep, noise)
    torch.testing.assert_close(sample, 0.6 * image + 0.4 * noise)
    if with_begin_index:
        scheduler.set_begin_index(begin_index)
        assert scheduler.begin_index == begin_index
    actual, calls = run(scheduler, sample, data.velocity, begin_index)
    assert calls == {"heun": 159, "midpoint": 160, "rk4": 319}.get(solver, 80)
    assert scheduler.step_index == len(scheduler.timesteps)
    # Euler's error at 80 steps of 1/200 is at most 8e-3 of values of order 1; of the others, 6e-4
    tolerance = 1e-2 if solver == "euler" else 8e-4
    torch.testing.assert_close(actual, data.solution(sample, sigma=0.4), rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_begin_index_and_search_agree(solver):
    results = []
    for set_begin_index in (True, False):
        scheduler = FlowMatchODEScheduler(solver=solver, shift=3.0)
        scheduler.set_timesteps(6)
        if set_begin_index:
            scheduler.set_begin_index(2 * scheduler.order)
        results.append(run(scheduler, randn(*SHAPE), begin_index=2 * scheduler.order)[0])
    assert torch.equal(*results)


# The forward process


@pytest.mark.parametrize("timestep", [0.0, 0.37, 254, 254.0, 745.3, 1000.0])
def test_noise_at_any_timestep(timestep):
    """254 is on no grid: no lookup is involved, before `set_timesteps` and after it."""
    sample, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    sigma = timestep / 1000
    expected = (1 - sigma) * sample + sigma * noise
    scheduler = FlowMatchODEScheduler(shift=3.0)
    for _ in range(2):
        for time in (timestep, torch.tensor(timestep), torch.full((4,), timestep), torch.tensor([timestep])):
            torch.testing.assert_close(scheduler.scale_noise(sample, time, noise), expected)
            torch.testing.assert_close(scheduler.add_noise(sample, noise, time), expected)
        scheduler.set_timesteps(7)
        scheduler.set_begin_index(3)  # diffusers would take the time of index 3 here, whatever was asked


def test_noise_with_one_timestep_per_sample():
    sample, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    timesteps = torch.tensor([0.0, 100.25, 500.0, 1000.0])
    scheduler = FlowMatchODEScheduler()
    batch = scheduler.scale_noise(sample, timesteps, noise)
    for i, timestep in enumerate(timesteps.tolist()):
        row = scheduler.scale_noise(sample[i : i + 1], timestep, noise[i : i + 1])
        assert torch.equal(batch[i : i + 1], row)
    assert torch.equal(batch[0], sample[0]) and torch.equal(batch[3], noise[3])


def test_noise_is_diffusers_noise_on_the_grid():
    ours, theirs = FlowMatchODEScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    sample, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.4, 0.1])
    timesteps = ours.timesteps[[2, 0, 3, 1]]
    torch.testing.assert_close(
        ours.scale_noise(sample, timesteps, noise), theirs.scale_noise(sample, timesteps, noise)
    )


def test_noise_keeps_the_dtype_and_rounds_once():
    sample, noise = randn(*SHAPE).bfloat16(), randn(*SHAPE, seed=1).bfloat16()
    scheduler = FlowMatchODEScheduler()
    actual = scheduler.add_noise(sample, noise, torch.tensor([745.3, 3.0, 999.0, 1000.0]))
    sigma = torch.tensor([0.7453, 0.003, 0.999, 1.0]).reshape(4, 1, 1, 1)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, ((1 - sigma) * sample.float() + sigma * noise.float()).bfloat16())
    row = scheduler.add_noise(sample[:1], noise[:1], 745.3)  # one time for all
    assert torch.equal(row, actual[:1])


def test_velocity_is_the_derivative_of_the_path():
    scheduler = FlowMatchODEScheduler()
    sample, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    velocity = scheduler.get_velocity(sample, noise, torch.full((4,), 500.0))
    difference = scheduler.scale_noise(sample, 600.0, noise) - scheduler.scale_noise(sample, 400.0, noise)
    # the path is a straight line; float32 rounding divided by the 0.2 between the two points
    torch.testing.assert_close(difference / 0.2, velocity, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_target_is_what_the_prediction_type_says(path):
    """The exact target of a pair, as the model output, leads from any point of its path to the data."""
    sample, noise = randn(*SHAPE).double(), randn(*SHAPE, seed=1).double()
    timesteps = torch.tensor([100.0, 300.0, 600.0, 900.0])
    for prediction_type in ("velocity", "epsilon", "score", "sample"):
        scheduler = FlowMatchODEScheduler(path=path, prediction_type=prediction_type)
        target = scheduler.get_target(sample, noise, timesteps)
        if prediction_type in ("epsilon", "sample"):
            assert torch.equal(target, noise if prediction_type == "epsilon" else sample)
        noisy = scheduler.add_noise(sample, noise, timesteps)
        sigma = timesteps.double() / 1000
        actual = scheduler.path.convert(target, noisy, sigma, prediction_type, "sample")
        torch.testing.assert_close(actual, sample, rtol=1e-6, atol=1e-6)
        assert scheduler.get_target(sample.bfloat16(), noise.bfloat16(), timesteps).dtype == torch.bfloat16


def test_one_step_with_the_exact_velocity_of_a_pair_restores_the_data():
    """Sign and direction in one: noise, minus (noise - data), is data."""
    sample, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    for solver in SOLVERS:
        scheduler = FlowMatchODEScheduler(solver=solver)
        scheduler.set_timesteps(5)
        velocity = scheduler.get_velocity(sample, noise, scheduler.timesteps[:1])
        end, _ = run(scheduler, noise, lambda *_, velocity=velocity: velocity)
        torch.testing.assert_close(end, sample, rtol=1e-5, atol=1e-5)


# The habits of diffusers' own scheduler tests


def test_public_attributes():
    scheduler = FlowMatchODEScheduler()
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == FlowMatchODEScheduler.order == 1
    assert scheduler.step_index is None and scheduler.begin_index is None
    sample = randn(*SHAPE)
    assert scheduler.scale_model_input(sample, 1.0) is sample and scheduler.scale_model_input(sample) is sample
    assert scheduler.has_compatibles
    assert all(
        parameter.default is not inspect.Parameter.empty
        for name, parameter in inspect.signature(FlowMatchODEScheduler.__init__).parameters.items()
        if name != "self"
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_save_and_load(solver, tmp_path):
    config = {"solver": solver, "shift": 2.5, "num_train_timesteps": 500}
    scheduler = FlowMatchODEScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    with logged_warnings() as warnings:
        loaded = FlowMatchODEScheduler.from_pretrained(tmp_path)
    assert warnings == []
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FlowMatchODEScheduler"
    assert {name: saved[name] for name in config} == config

    loaded.set_timesteps(5)
    scheduler.set_timesteps(5)
    assert torch.equal(loaded.timesteps, scheduler.timesteps)
    assert torch.equal(run(loaded, randn(*SHAPE))[0], run(scheduler, randn(*SHAPE))[0])
    assert FlowMatchODEScheduler.from_config(loaded.config).config == loaded.config


@pytest.mark.parametrize("solver", SOLVERS)
def test_tuple_is_the_output_class(solver):
    results = []
    for return_dict in (True, False):
        scheduler = FlowMatchODEScheduler(solver=solver)
        scheduler.set_timesteps(3)
        sample = randn(*SHAPE)
        for timestep in scheduler.timesteps:
            output = scheduler.step(toy_velocity(sample, timestep), timestep, sample, return_dict=return_dict)
            assert isinstance(output, FlowMatchODESchedulerOutput if return_dict else tuple)
            sample = output[0]
        results.append(sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(1,), (2, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_step_keeps_the_shape_and_the_inputs(solver, shape):
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(2)
    sample, velocity = randn(*shape), randn(*shape, seed=1)
    copies = sample.clone(), velocity.clone()
    for timestep in scheduler.timesteps:
        assert scheduler.step(velocity, timestep, sample).prev_sample.shape == shape
    assert torch.equal(sample, copies[0]) and torch.equal(velocity, copies[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_step_draws_nothing(solver):
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    states = torch.get_rng_state(), generator.get_state()
    sample = randn(*SHAPE)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(toy_velocity(sample, timestep), timestep, sample, generator=generator).prev_sample
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(generator.get_state(), states[1])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("calls_before", [1, 2, 3, 5])
def test_set_timesteps_forgets_the_last_trajectory(solver, calls_before):
    """Also one that was left between the two stages of a Heun step."""
    fresh = FlowMatchODEScheduler(solver=solver)
    fresh.set_timesteps(4)
    expected, _ = run(fresh, randn(*SHAPE))

    used = FlowMatchODEScheduler(solver=solver)
    used.set_timesteps(9)
    used.set_begin_index(0)
    for timestep in used.timesteps[:calls_before]:
        used.step(randn(*SHAPE, seed=2), timestep, randn(*SHAPE, seed=3))
    assert used.step_index == calls_before
    used.set_timesteps(4)
    assert used.step_index is None and used.begin_index is None
    assert torch.equal(run(used, randn(*SHAPE))[0], expected)


def test_batch_rows_are_independent():
    for solver in SOLVERS:
        scheduler = FlowMatchODEScheduler(solver=solver)
        scheduler.set_timesteps(3)
        batch, _ = run(scheduler, randn(*SHAPE))
        scheduler.set_timesteps(3)
        row, _ = run(scheduler, randn(*SHAPE)[1:2])
        assert torch.equal(batch[1:2], row)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rounded_or_integer_timesteps_find_their_place(solver):
    """A pipeline in bfloat16 may hand back the timesteps as bfloat16; whole ones arrive as integers."""
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(8)
    for index in range(0, len(scheduler.timesteps), scheduler.order):
        timestep = scheduler.timesteps[index]
        for form in (timestep, timestep.bfloat16(), timestep.double(), timestep.item(), timestep.reshape(1)):
            assert scheduler.index_for_timestep(form) == index
        assert scheduler.index_for_timestep(timestep.item(), scheduler.timesteps) == index
    assert scheduler.index_for_timestep(1000) == 0
    assert scheduler.index_for_timestep(torch.tensor(500)) == 4 * scheduler.order


# What is refused


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"solver": "dopri5"},
            r"`solver`='dopri5' is unknown. Use one of 'euler', 'heun', 'midpoint', 'rk4', 'ab2', ",
        ),
        ({"path": "cosine"}, r"`path`='cosine' is unknown. Use one of 'linear', 'gvp', 'vp'"),
        ({"solver_order": 4}, r"`solver_order`=4 is unknown. Use one of 2, 3"),
        (
            {"prediction_type": "v"},
            r"`prediction_type`='v' is unknown. Use one of 'velocity', 'epsilon', 'score', 'sam",
        ),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, r"Only one of `use_karras_sigmas`, .* can be True"),
        ({"sigma_min": 1.0}, r"`sigma_min`=1.0 must be in \[0, 1\), or None"),
        ({"shift_terminal": -0.1}, r"`shift_terminal`=-0.1 must be in \[0, 1\), or None"),
        ({"time_shift_type": "cosine"}, r"`time_shift_type`='cosine' is unknown"),
        ({"num_train_timesteps": 0}, r"`num_train_timesteps`=0 must be at least 1"),
        ({"shift": 0}, r"`shift`=0 must be above 0"),
        ({"shift": -1.0}, r"`shift`=-1.0 must be above 0"),
        ({"shift": float("nan")}, r"`shift`=nan must be above 0"),
    ],
)
def test_wrong_config(config, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchODEScheduler(**config)


def test_wrong_shift_later():
    scheduler = FlowMatchODEScheduler(shift=2.0)
    with pytest.raises(ValueError, match="`shift`=0 must be above 0"):
        scheduler.set_shift(0)
    assert scheduler.shift == 2.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, r"`num_inference_steps`=None must be a whole number"),
        ({"num_inference_steps": 2.5}, r"`num_inference_steps`=2.5 must be a whole number"),
        ({"num_inference_steps": 0}, r"`num_inference_steps`=0 must be at least 1"),
        ({"num_inference_steps": -3}, r"`num_inference_steps`=-3 must be at least 1"),
        ({"sigmas": [1.0, 0.5], "timesteps": [9.0]}, r"`sigmas` and `timesteps` have 2 and 1 entries, and `solver`="),
        ({"num_inference_steps": "4"}, r"`num_inference_steps`='4' must be a whole number"),
        ({"num_inference_steps": float("inf")}, r"`num_inference_steps`=inf must be a whole number"),
        ({"sigmas": []}, r"`sigmas` must be a list with at least one entry, but has shape \(0,\)"),
        ({"sigmas": [[1.0, 0.5]]}, r"`sigmas` must be a list .* shape \(1, 2\)"),
        ({"sigmas": 1.0}, r"`sigmas` must be a list .* shape \(\)"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, r"`sigmas` has 2 entries, but `num_inference_steps` is 3"),
        ({"timesteps": [900.0], "num_inference_steps": 3}, r"`timesteps` has 1 entries"),
        ({"sigmas": [1.0, 0.5, 0.0]}, r"`sigmas` must fall strictly from at most 1 to above 0 \(the final 0 is app"),
        ({"sigmas": [0.2, 0.5]}, r"`sigmas` must fall strictly"),
        ({"sigmas": [0.5, 0.5]}, r"`sigmas` must fall strictly"),
        ({"sigmas": [1.5, 0.5]}, r"`sigmas` must fall strictly from at most 1"),
        ({"sigmas": [float("nan")]}, r"`sigmas` must fall strictly"),
        ({"timesteps": [1001.0, 1.0]}, r"`timesteps` must fall strictly from at most 1000"),
    ],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_wrong_grid(arguments, message, solver):
    with pytest.raises(ValueError, match=message):
        FlowMatchODEScheduler(solver=solver).set_timesteps(**arguments)


def test_wrong_mu():
    scheduler = FlowMatchODEScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="`mu` must be given where `use_dynamic_shifting`"):
        scheduler.set_timesteps(4)
    linear = FlowMatchODEScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    for mu in (0.0, -0.5):
        with pytest.raises(ValueError, match=f"`mu`={mu} must be above 0"):
            linear.set_timesteps(4, mu=mu)


def test_wrong_noise_timestep():
    sample = randn(*SHAPE)
    for timestep in (torch.zeros(3), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"`timestep` must be one time or one per sample, shape \(4,\)"):
            FlowMatchODEScheduler().scale_noise(sample, timestep, sample)


def test_step_before_set_timesteps():
    sample = randn(*SHAPE)
    with pytest.raises(ValueError, match="Call `set_timesteps` before `step`"):
        FlowMatchODEScheduler().step(sample, 1000.0, sample)


@pytest.mark.parametrize("solver", SOLVERS)
def test_step_after_the_last_call(solver):
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(3)
    sample, calls = run(scheduler, randn(*SHAPE))
    with pytest.raises(ValueError, match=f"All {calls} calls of this trajectory are done"):
        scheduler.step(sample, 1.0, sample)


@pytest.mark.parametrize("timestep", [0, 3, 0.0, 700.0, 1200.0, float("nan")])
def test_step_off_the_grid(timestep):
    """Also the index of a loop (0, 1, 2, ...) in the place of the timestep."""
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(4)
    sample = randn(*SHAPE)
    with pytest.raises(ValueError, match=rf"`timestep`={float(timestep)} is not on the grid \[1000.0, 750.0"):
        scheduler.step(sample, timestep, sample)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("index", [0, 2, 3])
def test_step_out_of_order(solver, index):
    scheduler = FlowMatchODEScheduler(solver=solver)
    scheduler.set_timesteps(9)
    sample = randn(*SHAPE)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    wrong, right = scheduler.timesteps[index * scheduler.order], scheduler.timesteps[1]
    message = re.escape(f"`timestep`={wrong.item()} is out of order: call 1 of this trajectory is at {right.item()}.")
    for timestep in (wrong, wrong.item()):
        with pytest.raises(ValueError, match=message):
            scheduler.step(sample, timestep, sample)
    scheduler.step(sample, right.bfloat16(), sample)  # nothing was lost, and a rounded time will do
    assert scheduler.step_index == 2


@pytest.mark.parametrize("steps", [250, 1000, 4000])
def test_step_out_of_order_on_a_fine_grid(steps):
    """Neighbours are nearer than what rounding to 16 bits moves a time, so that only such a one may be between them."""
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(steps)
    sample = randn(*SHAPE)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    for index in (0, 2):
        with pytest.raises(ValueError, match="is out of order: call 1 of this trajectory is at 99"):
            scheduler.step(sample, scheduler.timesteps[index], sample)
    assert scheduler.index_for_timestep(scheduler.timesteps[steps // 2]) == steps // 2
    with pytest.raises(ValueError, match="is not on the grid"):
        scheduler.index_for_timestep((scheduler.timesteps[0] + scheduler.timesteps[1]) / 2)
    scheduler.step(sample, scheduler.timesteps[1].half(), sample)


def test_begin_index_and_timestep_disagree():
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    sample = randn(*SHAPE)
    with pytest.raises(ValueError, match="`timestep`=1000.0 is out of order: call 2 of this trajectory is at 500.0"):
        scheduler.step(sample, scheduler.timesteps[0], sample)


def test_heun_cannot_begin_inside_a_step():
    scheduler = FlowMatchODEScheduler(solver="heun")
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    sample = randn(*SHAPE)
    with pytest.raises(ValueError, match="cannot begin at index 1, inside a step: .* multiple of `order`=2"):
        scheduler.step(sample, scheduler.timesteps[1], sample)


def test_a_config_that_asks_for_more_is_refused():
    config = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config
    with pytest.raises(ValueError, match="sets `stochastic_sampling`, which FlowMatchODEScheduler does not have"):
        FlowMatchODEScheduler.from_config(config)
    scheduler = FlowMatchODEScheduler.from_config({**config, "stochastic_sampling": None})
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_grid_that_does_not_fall_to_its_end():
    scheduler = FlowMatchODEScheduler(sigma_min=0.1)
    scheduler.set_timesteps(3)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.7, 0.4, 0.1]))
    with pytest.raises(ValueError, match="The grid ends at `sigma_min`=0.1, but its last step already starts at 0.05"):
        scheduler.set_timesteps(sigmas=[1.0, 0.05])


@pytest.mark.parametrize("config, mu", [({"shift": 0.5}, None), ({"use_dynamic_shifting": True}, -1.0)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_default_grid_with_a_shift_falls_to_its_end(steps, config, mu):
    """The even grid goes to what the shift moves to `sigma_min`."""
    scheduler = FlowMatchODEScheduler(**config, sigma_min=0.1)
    scheduler.set_timesteps(steps, mu=mu)
    shift = math.exp(mu) if mu else 0.5
    start = scheduler.sigmas.double() / (shift + (1 - shift) * scheduler.sigmas.double())
    torch.testing.assert_close(start.diff(), start.diff().mean().expand(steps), rtol=1e-5, atol=0)
    assert scheduler.sigmas[-1].item() == pytest.approx(0.1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("config, mu", [({"shift": 1e8}, None), ({"use_dynamic_shifting": True}, 40.0)], ids=str)
def test_shift_that_leaves_no_steps(config, mu, solver):
    with pytest.raises(ValueError, match=r"leaves no strictly falling float32 numbers: \[1.0, .* Use a shift or `mu`"):
        FlowMatchODEScheduler(**config, solver=solver).set_timesteps(5, mu=mu)


def test_begin_index_below_zero():
    with pytest.raises(ValueError, match="`begin_index`=-1 must be an index into `timesteps`"):
        FlowMatchODEScheduler().set_begin_index(-1)


# Where the tensors are


@pytest.mark.parametrize("prediction_type", ["velocity", "epsilon"])
@pytest.mark.parametrize(
    "cls, solver", [*((FlowMatchODEScheduler, s) for s in SOLVERS), (FlowMatchSDEScheduler, "heun")]
)
def test_loop_reads_nothing_from_the_device(cls, solver, prediction_type):
    """A tensor on the meta device has no values: reading one, for which a GPU would be waited for, is an error."""
    scheduler = cls(solver=solver, prediction_type=prediction_type, path="gvp")
    scheduler.set_timesteps(4, device="meta")
    scheduler.set_begin_index(0)
    sample = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta")
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.empty_like(sample), timestep, sample).prev_sample
        assert sample.device.type == "meta" and sample.dtype == torch.bfloat16
    assert scheduler.sigmas.device.type == "cpu"
