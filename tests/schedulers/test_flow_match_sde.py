# SPDX-License-Identifier: Apache-2.0
"""`FlowMatchSDEScheduler` against exact samples, and against the moments of a Gaussian, which it maps linearly."""

import inspect
import json
import math

import pytest
import torch

from diffusers_dyna import FlowMatchODEScheduler, FlowMatchSDEScheduler
from diffusers_dyna.schedulers import FlowMatchSDESchedulerOutput, scheduling_flow_match

from ..testing_utils import logged_warnings, randn
from .mixtures import Gaussian, reference_mixture


PATHS = ["linear", "gvp", "vp"]
FORMS = ["constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm"]
LAST_STEPS = ["none", "mean", "tweedie", "euler"]


def norm_for(form: str) -> float:
    """Near the data a constant diffusion of order 1 is stiffer than any step of these tests."""
    return 0.005 if form == "constant" else 1.0


def integrate(scheduler, sample, velocity, generator=None):
    for timestep in scheduler.timesteps:
        model_output = velocity(sample, timestep.item() / scheduler.config.num_train_timesteps)
        sample = scheduler.step(model_output, timestep, sample, generator=generator).prev_sample
    return sample


def start(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64), generator


def kolmogorov_smirnov(sample: torch.Tensor, mean: float, std: float) -> float:
    """The largest distance between the distribution of a sample and a normal one."""
    expected = torch.special.ndtr((sample.flatten().sort().values - mean) / std)
    steps = torch.linspace(0, 1, len(expected) + 1, dtype=expected.dtype)
    return max((expected - steps[:-1]).max(), (steps[1:] - expected).max()).item()


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, zero in the mean for two samples of one distribution."""
    n, m = len(x), len(y)
    between = torch.cdist(x, y).mean()
    return (2 * between - torch.cdist(x, x).sum() / (n * (n - 1)) - torch.cdist(y, y).sum() / (m * (m - 1))).item()


# Exact samples


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_gaussian_data(last_step, form, path):
    data, number = Gaussian(path=path), 8000
    scheduler = FlowMatchSDEScheduler(
        path=path, diffusion_form=form, diffusion_norm=norm_for(form), last_step=last_step, last_step_size=0.01
    )
    scheduler.set_timesteps(100)
    noise, generator = start((number, 1))
    sample = integrate(scheduler, noise, data.velocity, generator)
    # the last step removes noise of std b(0.01) = 0.01, on "vp" 0.045, or more than there is; 100 steps leave 1 %
    assert sample.mean().item() == pytest.approx(data.mean, abs=0.02)
    assert sample.std().item() == pytest.approx(data.deviation, rel=0.05)
    assert kolmogorov_smirnov(sample, data.mean, data.deviation) < 0.03  # 0.018 is the 1 % quantile of exact samples


@pytest.mark.parametrize("solver, last_step", [*(("euler", name) for name in LAST_STEPS), ("heun", "tweedie")])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_mixture_data(form, path, solver, last_step):
    """In 6 dimensions, where an error of the score would show in the weights of the components."""
    mixture, _ = reference_mixture(path)
    scheduler = FlowMatchSDEScheduler(
        path=path, solver=solver, diffusion_form=form, diffusion_norm=norm_for(form), last_step=last_step
    )
    scheduler.set_timesteps(60)
    noise, generator = start((1000, 6))
    sample = integrate(scheduler, noise, mixture.velocity, generator)
    exact = mixture.sample(1000, generator)
    spread = exact.var(dim=0).mean()
    torch.testing.assert_close(sample.mean(dim=0), exact.mean(dim=0), rtol=0, atol=0.2)
    assert sample.var(dim=0).mean().item() == pytest.approx(spread.item(), rel=0.1)
    assert abs(energy_distance(sample, exact)) < 0.03


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("last_step", ["none", "tweedie"])
def test_constant_diffusion(last_step, path, solver):
    """Of a norm that moves the samples, to a sigma where 60 steps can follow it: noised data comes out."""
    mixture, _ = reference_mixture(path)
    scheduler = FlowMatchSDEScheduler(
        path=path, solver=solver, diffusion_form="constant", diffusion_norm=0.3, last_step=last_step, sigma_min=0.1,
        last_step_size=0.15,
    )  # fmt: skip
    scheduler.set_timesteps(60)
    noise, generator = start((1000, 6))
    sample = integrate(scheduler, noise, mixture.velocity, generator)
    exact = mixture.path.interpolate(mixture.sample(1000, generator), start((1000, 6), seed=1)[0], 0.1)
    assert abs(energy_distance(sample, exact)) < 0.03
    assert sample.var(dim=0).mean().item() == pytest.approx(exact.var(dim=0).mean().item(), rel=0.1)


# Exact moments: data and noise are Gaussian, so that the last sample is linear in the first one and the noise of each
# step. Rows that each have one of them give all coefficients, without chance.


def moments(scheduler, data, monkeypatch) -> tuple[float, float]:
    """Mean and standard deviation of what comes out for a standard normal."""
    steps = scheduler.num_inference_steps
    drawn = []

    def unit_noise(shape, **kwargs):
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[len(drawn)] = 1
        drawn.append(None)
        return noise

    monkeypatch.setattr(scheduling_flow_match, "randn_tensor", unit_noise)
    first = torch.zeros(steps + 2, 1, dtype=torch.float64)
    first[steps] = 1
    end = integrate(scheduler, first, data.velocity).flatten()
    return end[-1].item(), (end[:-1] - end[-1]).square().sum().sqrt().item()


@pytest.mark.parametrize(
    "form, path", [(form, path) for form in FORMS for path in PATHS if form != "sbdm" or path == "vp"]
)
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_weak_order(solver, order, form, path, monkeypatch):
    """The distribution at sigma = 0.25, far from stiff. On "linear" and "gvp", sbdm's D is infinite at sigma = 1."""
    data, end = Gaussian(0.5, 0.6, path), 0.25
    c = data.path.coefficients(end)
    expected = (c.a * data.mean).item(), ((c.a * data.deviation) ** 2 + c.b**2).sqrt().item()
    if path == "vp":  # the noise end of "vp" holds a little data, which a start from a standard normal leaves out
        expected = None
    results = []
    for number in (40, 80, 160):
        scheduler = FlowMatchSDEScheduler(
            path=path, solver=solver, diffusion_form=form, diffusion_norm=0.3, last_step="none", sigma_min=end
        )
        scheduler.set_timesteps(number)
        results.append(moments(scheduler, data, monkeypatch))
    for i in range(2):
        values = [result[i] for result in results]
        if expected is not None:
            assert abs(values[2] - expected[i]) < (0.01 if order == 1 else 1e-3)
        differences = abs(values[0] - values[1]), abs(values[1] - values[2])
        if (i, path) == (0, "linear"):  # the mean goes along a straight line
            assert max(differences) < 1e-9
        else:
            assert math.log2(differences[0] / differences[1]) >= order - 0.25


def test_one_step_is_sits():
    """x <- x - h v + h D score + sqrt(2 D h) noise."""
    scheduler = FlowMatchSDEScheduler(diffusion_form="linear", diffusion_norm=0.7)
    scheduler.set_timesteps(sigmas=[0.8, 0.5])
    sample, velocity = randn(2, 3), randn(2, 3, seed=1)
    actual = scheduler.step(velocity, 800.0, sample, generator=torch.Generator().manual_seed(3)).prev_sample
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    score = -(sample + 0.2 * velocity) / 0.8
    diffusion = 0.7 * 0.8
    expected = sample - 0.3 * velocity + 0.3 * diffusion * score + math.sqrt(2 * diffusion * 0.3) * noise
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("last_step", LAST_STEPS[1:])
def test_last_step(last_step):
    scheduler = FlowMatchSDEScheduler(last_step=last_step)
    scheduler.set_timesteps(sigmas=[0.04])
    sample, velocity = randn(2, 3), randn(2, 3, seed=1)
    noise = sample + 0.96 * velocity
    expected = sample - 0.04 * velocity - (0.04 * 0.04 * noise / 0.04 if last_step == "mean" else 0)
    torch.testing.assert_close(scheduler.step(velocity, 40.0, sample).prev_sample, expected)


@pytest.mark.parametrize("form, at_08", [
    ("constant", 2.0), ("sigma", 1.6), ("linear", 1.6), ("decreasing", (1 - 2 * math.cos(0.8 * math.pi)) ** 2 / 4),
    ("increasing-decreasing", 2 * math.sin(0.8 * math.pi) ** 2), ("sbdm", 2 * (0.8 + 0.64 / 0.2)),
])  # fmt: skip
def test_diffusion_forms(form, at_08):
    scheduler = FlowMatchSDEScheduler(diffusion_form=form, diffusion_norm=2.0)
    assert scheduler._diffusion(0.8, size=0.01) == pytest.approx(at_08)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_without_diffusion_it_is_the_ode(solver, form):
    mixture, noise = reference_mixture()[0], start((8, 6))[0]
    sde = FlowMatchSDEScheduler(solver=solver, diffusion_norm=0.0, diffusion_form=form)
    if form == "decreasing":  # whose norm is that of the cosine
        assert sde._diffusion(0.3, size=0.1) == sde._diffusion(0.9, size=0.1) == 0.25
        return
    ends = []
    for scheduler in (FlowMatchODEScheduler(solver=solver), sde):
        scheduler.set_timesteps(sigmas=[0.99, 0.6, 0.3])
        ends.append(integrate(scheduler, noise, mixture.velocity))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("path", PATHS)
def test_last_step_to_sigma_min(path):
    """The mean of the data given x, with the noise of `sigma_min`; before, the steps of the SDE go on to there."""
    scheduler = FlowMatchSDEScheduler(path=path, last_step="tweedie", sigma_min=0.2)
    scheduler.set_timesteps(sigmas=[0.3])
    data, noise = randn(2, 3).double(), randn(2, 3, seed=1).double()
    sample, velocity = scheduler.path.interpolate(data, noise, 0.3), scheduler.path.velocity(data, noise, 0.3)
    expected = scheduler.path.interpolate(data, noise, 0.2)
    # the grid is float32
    torch.testing.assert_close(scheduler.step(velocity, 300.0, sample).prev_sample, expected, rtol=0, atol=1e-6)


def test_timesteps():
    ends = []
    for arguments in ({"timesteps": [999, 500, 100.1]}, {"sigmas": [0.999, 0.5, 0.1001]}):
        scheduler = FlowMatchSDEScheduler(shift=1.0 if "sigmas" in arguments else 3.0)  # times are never shifted
        scheduler.set_timesteps(**arguments)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor([999, 500, 100.1]))
        noise, generator = start((8, 6))
        ends.append(integrate(scheduler, noise, reference_mixture()[0].velocity, generator))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("form, norm", [("sbdm", 1.0), ("constant", 3.0)])
def test_diffusion_that_no_step_can_follow(form, norm, solver):
    """It is held to what takes all noise away, so that the state has the size of the noise throughout."""
    data = Gaussian()
    scheduler = FlowMatchSDEScheduler(diffusion_form=form, diffusion_norm=norm, last_step="tweedie", solver=solver)
    scheduler.set_timesteps(20)
    sample, generator = start((8000, 1))
    for timestep in scheduler.timesteps:
        velocity = data.velocity(sample, timestep.item() / 1000)
        sample = scheduler.step(velocity, timestep, sample, generator=generator).prev_sample
        assert sample.std() < 2.5
    assert sample.mean().item() == pytest.approx(data.mean, abs=0.1)
    assert sample.std().item() == pytest.approx(data.deviation, rel=0.25)


# The grid


@pytest.mark.parametrize("config, mu", [({}, None), ({"shift": 3.0}, None), ({"use_dynamic_shifting": True}, 1.1)])
def test_default_grid_has_the_last_step_size(config, mu):
    for steps in (2, 10):
        scheduler = FlowMatchSDEScheduler(**config)
        scheduler.set_timesteps(steps, mu=mu)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
        assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0
        assert scheduler.sigmas[-2].item() == pytest.approx(0.04, rel=1e-5)
    scheduler.set_timesteps(1, mu=mu)
    assert scheduler.sigmas.tolist() == [1, 0]


def test_grid_without_a_last_step():
    for solver, calls in (("euler", [1, 0.67, 0.34]), ("heun", [1, 0.67, 0.67, 0.34, 0.34, 0.01])):
        scheduler = FlowMatchSDEScheduler(last_step="none", sigma_min=0.01, solver=solver)
        scheduler.set_timesteps(3)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([*calls, 0.01]))
        torch.testing.assert_close(scheduler.timesteps, torch.tensor(calls) * 1000)
    scheduler = FlowMatchSDEScheduler(last_step="none")
    scheduler.set_timesteps(3)
    assert scheduler.sigmas[-1].item() == pytest.approx(0.001)


def test_calls_of_heun():
    scheduler = FlowMatchSDEScheduler(solver="heun")
    scheduler.set_timesteps(3)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000, 520.0, 520.0, 40.0, 40.0]))


def test_start_of_sbdm_is_finite():
    """Its diffusion is infinite where a = 0."""
    for path, first in (("linear", 0.999), ("gvp", 0.999), ("vp", 1.0)):
        scheduler = FlowMatchSDEScheduler(path=path, diffusion_form="sbdm")
        scheduler.set_timesteps(4)
        assert scheduler.sigmas[0].item() == pytest.approx(first)
        assert math.isfinite(scheduler._diffusion(scheduler.sigmas[0].item(), size=1e-5))


# Generators


def test_generators():
    def run(sample, generator):
        scheduler = FlowMatchSDEScheduler()
        scheduler.set_timesteps(4)
        return integrate(scheduler, sample, lambda x, sigma: x * sigma, generator)

    sample = randn(3, 2, 4)
    batch = run(sample, [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
    for row, seed in enumerate((1, 2, 3)):
        one = run(sample[row : row + 1], torch.Generator().manual_seed(seed))
        assert torch.equal(one, batch[row : row + 1])
        assert torch.equal(one, run(sample[row : row + 1], [torch.Generator().manual_seed(seed)]))
    assert not torch.equal(
        run(sample, torch.Generator().manual_seed(1)), run(sample, torch.Generator().manual_seed(2))
    )


def test_noise_has_the_precision_of_the_state():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(4)
    sample = randn(2, 3).bfloat16()
    output = scheduler.step(sample, scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(0))
    assert output.prev_sample.dtype == torch.bfloat16 and scheduler._state.dtype == torch.float32
    assert torch.equal(scheduler._state.bfloat16(), output.prev_sample)


# The habits of diffusers' own scheduler tests


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_save_and_load(solver, tmp_path):
    config = {"solver": solver, "path": "gvp", "diffusion_form": "sbdm", "last_step": "tweedie", "last_step_size": 0.1}
    scheduler = FlowMatchSDEScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    with logged_warnings() as warnings:
        loaded = FlowMatchSDEScheduler.from_pretrained(tmp_path)
    assert warnings == []
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FlowMatchSDEScheduler"
    assert {name: saved[name] for name in config} == config
    ends = []
    for one in (scheduler, loaded):
        one.set_timesteps(5)
        ends.append(integrate(one, randn(2, 3), lambda x, sigma: x * sigma, torch.Generator().manual_seed(0)))
    assert torch.equal(*ends)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_tuple_is_the_output_class(solver):
    results = []
    for return_dict in (True, False):
        scheduler, generator = FlowMatchSDEScheduler(solver=solver), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(3)
        sample = randn(2, 3)
        for timestep in scheduler.timesteps:
            output = scheduler.step(sample / 2, timestep, sample, generator=generator, return_dict=return_dict)
            assert isinstance(output, FlowMatchSDESchedulerOutput if return_dict else tuple)
            sample = output[0]
        results.append(sample)
    assert torch.equal(*results)


def test_public_attributes():
    scheduler, sample = FlowMatchSDEScheduler(), randn(2, 3)
    assert (scheduler.init_noise_sigma, scheduler.order, len(scheduler)) == (1.0, 1, 1000)
    assert scheduler.step_index is None and scheduler.begin_index is None and scheduler.has_compatibles
    assert scheduler.scale_model_input(sample, 1.0) is sample
    torch.testing.assert_close(scheduler.add_noise(sample, 2 * sample, torch.tensor([500.0, 1000.0])),
                               torch.stack([1.5 * sample[0], 2 * sample[1]]))  # fmt: skip
    parameters = list(inspect.signature(FlowMatchSDEScheduler.__init__).parameters.values())[1:]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("shape", [(1,), (2, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_full_loop_keeps_shape_inputs_and_place(solver, shape):
    scheduler, sample = FlowMatchSDEScheduler(solver=solver), randn(*shape)
    ends = []
    for _ in range(2):  # the second trajectory forgets the first
        scheduler.set_timesteps(5)
        ends.append(integrate(scheduler, sample, lambda x, sigma: x * sigma, torch.Generator().manual_seed(0)))
        assert ends[-1].shape == shape and scheduler.step_index == len(scheduler.timesteps)
        scheduler.set_timesteps(3)
        for timestep in scheduler.timesteps[:2]:
            scheduler.step(sample, timestep, sample)
    assert torch.equal(*ends) and torch.equal(sample, randn(*shape))
    scheduler.step(sample, scheduler.timesteps[2], sample)
    for timestep in scheduler.timesteps[3:]:
        scheduler.step(sample, timestep, sample)
    with pytest.raises(ValueError, match="calls of this trajectory are done"):
        scheduler.step(sample, 40.0, sample)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_start_in_the_middle(solver):
    """Image-to-image: exact samples noised to a time of the grid come out as exact samples."""
    data = Gaussian()
    scheduler = FlowMatchSDEScheduler(solver=solver, last_step="tweedie")
    scheduler.set_timesteps(60)
    begin = 30 * scheduler.order
    noise, generator = start((8000, 1))
    image = data.sample(8000, generator)
    sample = scheduler.scale_noise(image, scheduler.timesteps[begin], noise)
    scheduler.set_begin_index(begin)
    for timestep in scheduler.timesteps[begin:]:
        output = data.velocity(sample, timestep.item() / 1000)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    assert kolmogorov_smirnov(sample, data.mean, data.deviation) < 0.03
    assert torch.corrcoef(torch.stack([sample, image]).squeeze(-1))[0, 1] < 0.99  # and are not the same ones


@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "sample"])
@pytest.mark.parametrize("path", PATHS)
def test_every_prediction_type_is_the_same_sde(prediction_type, path):
    mixture, _ = reference_mixture(path)

    def prediction(sample, sigma):
        return mixture.path.convert(mixture.velocity(sample, sigma), sample, sigma, "velocity", prediction_type)

    ends = []
    for kind, model in ((prediction_type, prediction), ("velocity", mixture.velocity)):
        scheduler = FlowMatchSDEScheduler(path=path, prediction_type=kind, solver="heun")
        scheduler.set_timesteps(sigmas=[0.99, 0.6, 0.3, 0.1])
        noise, generator = start((8, 6))
        ends.append(integrate(scheduler, noise, model, generator))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)  # the times of the model are float32


def test_inverted_time_is_the_same_sde():
    mixture, _ = reference_mixture()
    ends = []
    for invert in (False, True):
        scheduler = FlowMatchSDEScheduler(invert_sigmas=invert, solver="heun")
        scheduler.set_timesteps(6)

        def velocity(sample, time, invert=invert):
            return -mixture.velocity(sample, 1 - time) if invert else mixture.velocity(sample, time)

        noise, generator = start((8, 6))
        ends.append(integrate(scheduler, noise, velocity, generator))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


def test_configs_of_other_schedulers():
    ode = FlowMatchODEScheduler(shift=3.0, path="vp", solver="heun")
    sde = FlowMatchSDEScheduler.from_config(ode.config)
    assert (sde.shift, sde.path.name, sde.order) == (3.0, "vp", 2)
    assert FlowMatchODEScheduler.from_config(sde.config).config.solver == "heun"
    assert FlowMatchODEScheduler in sde.compatibles and FlowMatchSDEScheduler in ode.compatibles


# What is refused


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"solver": "ab2"},
            r"`solver`='ab2' draws no noise: it is a solver of FlowMatchODEScheduler. Use one of 'eul",
        ),
        ({"solver": "milstein"}, r"`solver`='milstein' is unknown. Use one of 'euler', 'heun'"),
        ({"diffusion_form": "cosine"}, r"`diffusion_form`='cosine' is unknown. Use one of 'constant', 'sigma'"),
        ({"diffusion_norm": -1.0}, r"`diffusion_norm`=-1.0 must be at least 0"),
        ({"last_step": "Mean"}, r"`last_step`='Mean' is unknown. Use one of 'none', 'mean', 'tweedie', 'euler'"),
        ({"last_step_size": 0.0}, r"`last_step_size`=0.0 must be in \(0, 1\). For no last step, `last_step`='none'"),
        ({"path": "cosine"}, r"`path`='cosine' is unknown"),
        ({"prediction_type": "v"}, r"`prediction_type`='v' is unknown"),
    ],
)
def test_wrong_config(config, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler(**config)


def test_a_config_of_a_deterministic_solver_is_refused():
    with pytest.raises(ValueError, match="by `from_config\\(config, solver='euler'\\)`"):
        FlowMatchSDEScheduler.from_config(FlowMatchODEScheduler(solver="rk4").config)
    FlowMatchSDEScheduler.from_config(FlowMatchODEScheduler(solver="rk4").config, solver="euler")


def test_wrong_calls():
    scheduler, sample = FlowMatchSDEScheduler(), randn(2, 3)
    with pytest.raises(ValueError, match="Call `set_timesteps` before `step`"):
        scheduler.step(sample, 1000.0, sample)
    with pytest.raises(ValueError, match="`num_inference_steps`=0 must be at least 1"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="`reverse`=True is for FlowMatchODEScheduler: the SDE goes from noise"):
        scheduler.set_timesteps(4, reverse=True)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`generator` has 3 entries for 2 samples. Give one, or one for each sample"):
        scheduler.step(sample, 1000.0, sample, generator=[torch.Generator()] * 3)
    scheduler.step(sample, 1000.0, sample)
    with pytest.raises(ValueError, match=r"`timestep`=1000.0 is out of order: call 1 of this trajectory is at 680"):
        scheduler.step(sample, 1000.0, sample)
