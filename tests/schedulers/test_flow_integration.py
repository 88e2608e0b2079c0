# SPDX-License-Identifier: Apache-2.0
"""Adaptive integration and likelihood, against flows and densities that are known in closed form."""

import math
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.overrides import TorchFunctionMode

from diffusers_dyna import FlowMatchODEScheduler, flow_log_likelihood, integrate_flow
from diffusers_dyna.schedulers.flow_integration import METHODS
from diffusers_dyna.schedulers.scheduling_flow_match import PATHS

from ..testing_utils import randn, tiny_dyna_dit, tiny_unet
from .mixtures import Gaussian, Mixture


needs_torchdiffeq = pytest.mark.skipif(find_spec("torchdiffeq") is None, reason="needs torchdiffeq")
QUIET = {"progress_bar": False}


class Flow:
    """The exact velocity of a Gaussian mixture, as a model: it is called with timesteps, and notes them."""

    def __init__(self, path="linear", means=((-0.5, 0.4, 0.1), (0.3, -0.2, 0.5)), std=(0.2, 0.35), weights=(0.3, 0.7)):
        means, std, weights = (torch.tensor(values, dtype=torch.float64) for values in (means, std, weights))
        self.mixture, self.timesteps = Mixture(weights.log(), means, std, path), []

    def __call__(self, x, timestep):
        assert timestep.shape == (len(x),) and (timestep == timestep[0]).all()
        self.timesteps.append(float(timestep[0]))
        return self.mixture.velocity(x.double(), float(timestep[0]) / 1000).to(x.dtype)

    def density(self, sigma=0.0):
        c = self.mixture.path.coefficients(sigma)
        std = ((c.a * self.mixture.std) ** 2 + c.b**2).sqrt()
        components = torch.distributions.Normal(c.a * self.mixture.means, std[:, None].expand_as(self.mixture.means))
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=self.mixture.log_weights),
            torch.distributions.Independent(components, 1),
        )


def gaussian(path="linear", mean=0.0):
    return Flow(path, means=((mean, -mean, mean),), std=(0.4,), weights=(1.0,))


class LikeMPS(TorchFunctionMode):
    """Tensors say that they are on MPS, where there is no float64, and those that came from `cpu()` may have it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")

        def move(value):
            return torch.device("cpu") if isinstance(value, torch.device) else value

        is_on_cpu = func is torch.Tensor.cpu or any(getattr(value, "is_on_cpu", False) for value in args)
        func = torch.clone if func is torch.Tensor.cpu else func
        result = func(*map(move, args), **{name: move(value) for name, value in (kwargs or {}).items()})
        if torch.is_tensor(result):
            if result.dtype == torch.float64 and not is_on_cpu:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype.")
            result.is_on_cpu = is_on_cpu
        return result


@needs_torchdiffeq
class TestIntegrateFlow:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("method", METHODS)
    def test_the_flow_of_a_gaussian(self, path, method):
        distribution, timesteps = Gaussian(mean=0.4, std=0.3, path=path), []

        def velocity(x, timestep):
            timesteps.append(float(timestep[0]))
            return distribution.velocity(x, timesteps[-1] / 1000)

        noise = randn(5, 2).double()
        output = integrate_flow(velocity, noise, rtol=1e-7, atol=1e-7, method=method, **QUIET)
        torch.testing.assert_close(output.sample, distribution.solution(noise, 1.0), atol=2e-5, rtol=0)
        assert output.nfe == len(timesteps)
        assert min(timesteps) >= 0 and max(timesteps) <= 1000

    @pytest.mark.parametrize("path", PATHS)
    def test_noise_to_data_to_noise(self, path):
        flow, noise = Flow(path), randn(6, 3).double()
        data = integrate_flow(flow, noise, rtol=1e-9, atol=1e-9, **QUIET).sample
        assert (data - noise).abs().max() > 0.5
        back = integrate_flow(flow, data, rtol=1e-9, atol=1e-9, sigma_start=0.0, sigma_end=1.0, **QUIET).sample
        torch.testing.assert_close(back, noise, atol=1e-5, rtol=0)

    def test_part_of_the_way(self):
        flow, noise = Flow(), randn(4, 3).double()
        middle = integrate_flow(flow, noise, rtol=1e-9, atol=1e-9, sigma_end=0.35, **QUIET).sample
        assert min(flow.timesteps) >= 350
        end = integrate_flow(flow, middle, rtol=1e-9, atol=1e-9, sigma_start=0.35, **QUIET).sample
        whole = integrate_flow(flow, noise, rtol=1e-9, atol=1e-9, **QUIET).sample
        torch.testing.assert_close(end, whole, atol=1e-7, rtol=0)

    def test_no_call_lies_beyond_the_ends(self):
        """A constant velocity: the solver would like to step far beyond, and tries so for its first step."""
        timesteps = []

        def slow(x, timestep):
            timesteps.append(float(timestep[0]))
            return torch.full_like(x, 1e-4)

        output = integrate_flow(slow, torch.ones(2, 3), sigma_start=0.2, sigma_end=0.6, **QUIET)
        assert 200 - 1e-3 <= min(timesteps) <= max(timesteps) <= 600 + 1e-3
        torch.testing.assert_close(output.sample, torch.full((2, 3), 1 + 0.4e-4))

    def test_smaller_tolerances_cost_more_calls_and_are_closer(self):
        noise, outputs = randn(6, 3).double(), []
        for tolerance in (1e-10, 1e-6, 1e-3):
            outputs.append(integrate_flow(Flow(), noise, tolerance, tolerance, **QUIET))
        errors = [(output.sample - outputs[0].sample).abs().max() for output in outputs[1:]]
        assert outputs[0].nfe > outputs[1].nfe > outputs[2].nfe
        assert errors[0] < 0.1 * errors[1]

    def test_a_hard_sample_is_not_hidden_by_easy_ones(self):
        """Only the first of 1000 samples moves fast: a norm over the whole batch would let it err 30 times more."""
        rate = torch.full((1000, 1), 1e-3, dtype=torch.float64)
        rate[0] = 40.0

        def decay(x, timestep):
            return rate[: len(x)] * torch.sin(rate[: len(x)] * timestep[:, None] / 1000) * x

        def error(x):
            output = integrate_flow(decay, x, 1e-6, 1e-6, **QUIET).sample
            return float((output[0] / x[0]).log().abs() - abs(math.cos(40.0) - 1))

        start = torch.ones(1000, 1, dtype=torch.float64)
        assert abs(error(start)) <= 3 * abs(error(start[:1])) + 1e-6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_the_state_is_more_exact_than_the_model(self, dtype):
        seen = set()

        def velocity(x, timestep):
            seen.add((x.dtype, timestep.dtype))
            return torch.full_like(x, 0.03)

        noise = torch.ones(2, 4, dtype=dtype)
        output = integrate_flow(velocity, noise, **QUIET)
        assert seen == {(dtype, torch.float64 if dtype == torch.float64 else torch.float32)}
        assert output.sample.dtype == dtype
        torch.testing.assert_close(output.sample, torch.full_like(noise, 0.97))

    def test_it_records_no_gradient_and_shows_progress(self, capfd):
        noise = randn(2, 3).double().requires_grad_()
        output = integrate_flow(Flow(), noise)
        assert not output.sample.requires_grad
        shown = capfd.readouterr().err
        assert f"{output.nfe} calls" in shown and "sigma=0.0000" in shown
        integrate_flow(Flow(), noise, **QUIET)
        assert capfd.readouterr().err == ""

    def test_a_model_of_this_package(self):
        """As many steps of the scheduler as it takes to agree. Random weights are a wild function of time: it stands."""
        model, labels = tiny_unet(in_channels=1, out_channels=1).double(), torch.tensor([0, 2])

        def velocity(x, timestep):
            return model(x, 400.0, labels).sample

        noise = sample = randn(2, 1, 8, 8).double()
        scheduler = FlowMatchODEScheduler(solver="heun")
        scheduler.set_timesteps(100)
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                sample = scheduler.step(velocity(sample, timestep), timestep, sample).prev_sample
        output = integrate_flow(velocity, noise, **QUIET)
        assert (sample - noise).abs().max() > 0.5
        torch.testing.assert_close(output.sample, sample, atol=1e-3, rtol=0)

    def test_the_dynamic_transformer_skips(self):
        model, seen = tiny_dyna_dit(learn_sigma=False), []

        def velocity(x, timestep):
            output = model(x, timestep, torch.tensor([1, 2]), output_masks=True)
            seen.append(output.compute_ratio.mean().item())
            return output.sample

        output = integrate_flow(velocity, randn(2, 4, 8, 8), 1e-2, 1e-2, **QUIET)
        assert output.sample.isfinite().all() and output.nfe == len(seen)
        assert sum(seen) / len(seen) < 0.95


@needs_torchdiffeq
class TestLogLikelihood:
    @pytest.mark.parametrize("path", PATHS)
    def test_a_gaussian(self, path):
        # On VP a little of the data is left at sigma = 1; without a mean it is seen in the deviation only.
        flow = gaussian(path, mean=0.0 if path == "vp" else 0.3)
        data, std = flow.density().sample((7,)), flow.density(1.0).variance.sqrt()[0].item()
        assert std == pytest.approx(1, abs=1e-4)
        output = flow_log_likelihood(flow, data, "exact", prior_std=std, rtol=1e-8, atol=1e-8, **QUIET)
        expected = flow.density().log_prob(data)
        torch.testing.assert_close(output.log_likelihood, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(output.bits_per_dim, -expected / (3 * math.log(2)) + 7, atol=1e-6, rtol=0)
        assert output.nfe == len(flow.timesteps)
        noise = integrate_flow(flow, data, 1e-8, 1e-8, sigma_start=0.0, sigma_end=1.0, **QUIET).sample
        torch.testing.assert_close(output.noise, noise, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("path", PATHS)
    def test_a_mixture(self, path):
        flow = Flow(path)
        data = torch.cartesian_prod(*[torch.linspace(-0.8, 0.8, 3, dtype=torch.float64)] * 3)
        output = flow_log_likelihood(flow, data, "exact", num_levels=None, rtol=1e-7, atol=1e-7, **QUIET)
        expected = flow.density().log_prob(data)
        assert expected.max() - expected.min() > 5
        # On VP the states at sigma = 1 are not quite a standard normal.
        torch.testing.assert_close(output.log_likelihood, expected, atol=2e-2 if path == "vp" else 1e-4, rtol=0)
        torch.testing.assert_close(output.bits_per_dim, -output.log_likelihood / (3 * math.log(2)))

    def test_the_prior_has_a_deviation_and_the_flow_a_first_sigma(self):
        """From sigma 0.1 on VP with the exact deviation at sigma 1, the density is exactly that of the states there."""
        flow = gaussian("vp")
        states = flow.density(0.1).sample((4,))
        settings = {"sigma_min": 0.1, "num_levels": None, "rtol": 1e-9, "atol": 1e-9}
        prior_std = flow.density(1.0).variance.sqrt()[0].item()
        output = flow_log_likelihood(flow, states, "exact", prior_std=prior_std, **settings, **QUIET)
        torch.testing.assert_close(output.log_likelihood, flow.density(0.1).log_prob(states), atol=1e-7, rtol=0)
        assert min(flow.timesteps) >= 100 - 1e-6

    @pytest.mark.parametrize("divergence", ["rademacher", "gaussian"])
    def test_hutchinson_is_unbiased(self, divergence):
        flow = Flow()  # whose Jacobian is not diagonal
        data = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64).expand(4000, 3)
        exact = flow.density().log_prob(data[:1])
        spread = {}
        for num_probes in (1, 8):
            output = flow_log_likelihood(
                flow, data, divergence, num_probes, torch.Generator().manual_seed(0), num_levels=None, **QUIET
            )
            standard_error = output.log_likelihood.std() / math.sqrt(4000)
            assert standard_error > 1e-3
            assert abs(output.log_likelihood.mean() - exact) < 4 * standard_error
            spread[num_probes] = output.log_likelihood.var()
        assert spread[1] / spread[8] == pytest.approx(8, rel=0.15)

    def test_generators(self):
        flow, data = Flow(), 0.4 * randn(3, 3).double()

        def generators():
            return [torch.Generator().manual_seed(i) for i in range(3)]

        settings = {"rtol": 1e-9, "atol": 1e-9, **QUIET}
        whole = flow_log_likelihood(flow, data, num_probes=2, generator=generators(), **settings)
        again = flow_log_likelihood(flow, data, num_probes=2, generator=generators(), **settings)
        assert torch.equal(whole.log_likelihood, again.log_likelihood)
        for i, generator in enumerate(generators()):
            one = flow_log_likelihood(flow, data[i : i + 1], num_probes=2, generator=generator, **settings)
            torch.testing.assert_close(one.log_likelihood[0], whole.log_likelihood[i], atol=1e-6, rtol=0)
        other = flow_log_likelihood(flow, data, generator=torch.Generator().manual_seed(7), **settings)
        assert not torch.allclose(other.log_likelihood, whole.log_likelihood)

    def test_models_of_this_package(self):
        """exp(log p) is the prior at the noise times the volume that the flow makes of a small cube at the data."""
        model = tiny_dyna_dit(sample_size=4, in_channels=1, learn_sigma=False).double()
        labels = torch.tensor([3])

        def complete(x, timestep):  # random weights are a wild function of time: it stands
            return model(x, 400.0, labels.expand(len(x)), complete_model=True).sample

        data = randn(1, 1, 4, 4).double()
        settings = {"rtol": 1e-6, "atol": 1e-6, **QUIET}
        exact = flow_log_likelihood(complete, data, "exact", num_levels=None, **settings)
        steps = 1e-3 * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
        moved = integrate_flow(
            complete, torch.cat([data + steps, data - steps]), 1e-8, 1e-8, sigma_start=0.0, sigma_end=1.0, **QUIET
        ).sample.flatten(1)
        volume = torch.linalg.slogdet((moved[:16] - moved[16:]) / 2e-3).logabsdet
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(exact.noise).sum()
        assert abs(volume) > 0.1  # the model does something
        torch.testing.assert_close(exact.log_likelihood[0], prior + volume, atol=1e-3, rtol=0)

        many = flow_log_likelihood(
            complete,
            data.expand(64, 1, 4, 4),
            num_probes=4,
            generator=torch.Generator().manual_seed(0),
            num_levels=None,
            rtol=1e-4,
            atol=1e-4,
            **QUIET,
        ).log_likelihood
        assert abs(many.mean() - exact.log_likelihood[0]) < 4 * many.std() / 8 + 1e-2

    def test_a_unet_in_float32(self):
        model = tiny_unet()
        output = flow_log_likelihood(
            lambda x, t: model(x, t, torch.tensor([0, 2])).sample,
            randn(2, 3, 8, 8).clamp(-1, 1),
            rtol=1e-3,
            atol=1e-3,
            **QUIET,
        )
        assert output.bits_per_dim.shape == (2,) and output.bits_per_dim.isfinite().all()
        assert output.bits_per_dim.dtype == torch.float32
        assert all(parameter.grad is None for parameter in model.parameters())


@needs_torchdiffeq
def test_mps():
    """dx/dsigma = x / 2 in 3 dimensions: data exp(-1/2) noise, and a divergence of 3/2."""

    def velocity(x, timestep):
        return x / 2

    sample = randn(2, 3)
    integrate_flow(velocity, sample, **QUIET)  # imports torchdiffeq, whose tables are in float64
    with LikeMPS():
        with pytest.raises(TypeError, match="float64"):
            sample.double()
        state = integrate_flow(velocity, sample, **QUIET).sample
        output = flow_log_likelihood(velocity, sample, num_levels=None, **QUIET)
    torch.testing.assert_close(state, math.exp(-0.5) * sample)
    torch.testing.assert_close(output.noise, math.exp(0.5) * sample)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(output.noise).sum(1) + 1.5
    torch.testing.assert_close(output.log_likelihood, expected)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rtol": 0}, "`rtol`=0 must be above 0"),
            ({"atol": -1e-5}, "`atol`=-1e-05 must be above 0"),
            ({"rtol": float("nan")}, "`rtol`=nan must be above 0"),
            ({"num_train_timesteps": 0}, "`num_train_timesteps`=0 must be at least 1"),
            ({"method": "rk4"}, "`method`='rk4' is unknown. Use one of 'dopri5', 'dopri8', 'bosh3'"),
            ({"sigma_end": -0.1}, r"from sigma = 1.0 to -0.1: they must differ and be in \[0, 1\]"),
            ({"sigma_start": 0.0}, "from sigma = 0.0 to 0.0: they must differ"),
            ({"num_train_timesteps": 0}, "`num_train_timesteps`=0 must be at least 1"),
        ],
    )
    def test_integrate_flow(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            integrate_flow(Flow(), randn(2, 3), **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"divergence": "hutchinson"},
                "`divergence`='hutchinson' is unknown. Use one of 'rademacher', 'gaussian'",
            ),
            ({"num_probes": 0}, "`num_probes`=0 must be at least 1"),
            ({"divergence": "exact", "num_probes": 2}, "`num_probes`=2 must be .* 1 where `divergence` is 'exact'"),
            ({"num_levels": 1}, "`num_levels`=1 must be at least 2, or None"),
            ({"prior_std": 0.0}, "`prior_std`=0.0 must be above 0"),
            ({"sigma_min": 1.0}, "from sigma = 1.0 to 1.0: they must differ"),
            ({"rtol": 0}, "`rtol`=0 must be above 0"),
            ({"num_train_timesteps": float("nan")}, "`num_train_timesteps`=nan must be at least 1"),
            ({"generator": [torch.Generator()]}, "`generator` has 1 entries for a batch of 2. Give one for each"),
            ({"generator": [torch.Generator()] * 3}, "`generator` has 3 entries for a batch of 2"),
        ],
    )
    def test_flow_log_likelihood(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            flow_log_likelihood(Flow(), randn(2, 3), **arguments)

    @pytest.mark.parametrize("function", [integrate_flow, flow_log_likelihood])
    def test_samples(self, function):
        with pytest.raises(ValueError, match=r"floating point tensor .* but is torch.int64 of shape \(2, 3\)"):
            function(Flow(), torch.zeros(2, 3, dtype=torch.int64), **QUIET)
        with pytest.raises(ValueError, match="`sample` must be .* but is list"):
            function(Flow(), [0.0], **QUIET)

    @needs_torchdiffeq
    @pytest.mark.parametrize("function", [integrate_flow, flow_log_likelihood])
    def test_velocities(self, function):
        with pytest.raises(ValueError, match=r"velocity of shape \(2, 2\) for a sample of shape \(2, 3\)"):
            function(lambda x, t: x[:, :2], randn(2, 3), **QUIET)
        with pytest.raises(TypeError, match="`model_fn` returned a tuple instead of a tensor"):
            function(lambda x, t: (x,), randn(2, 3), **QUIET)
        with pytest.raises(FloatingPointError, match="not finite at timestep .* end at a sigma above 0"):
            function(lambda x, t: x / 0, randn(2, 3), **QUIET)

    @needs_torchdiffeq
    def test_a_velocity_without_gradient(self):
        with pytest.raises(ValueError, match="returned a velocity without gradient. Leave out `torch.no_grad`"):
            flow_log_likelihood(lambda x, t: x.detach(), randn(2, 3), **QUIET)

    def test_torchdiffeq_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchdiffeq", None)
        with pytest.raises(ImportError, match=r'needs torchdiffeq: `pip install "diffusers-dyna\[ode\]"`'):
            integrate_flow(Flow(), randn(2, 3), **QUIET)
