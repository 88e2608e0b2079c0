# SPDX-License-Identifier: Apache-2.0
"""Adaptive integration and likelihood, against flows and densities that are known in closed form."""

import math
import sys

import pytest
import torch

from diffusers_dyna import FlowMatchODEScheduler, flow_log_likelihood, integrate_flow
from diffusers_dyna.schedulers.flow_integration import METHODS

from ..testing_utils import randn, tiny_dyna_dit, tiny_unet


pytest.importorskip("torchdiffeq")
PATHS = ("linear", "gvp", "vp")
QUIET = {"progress_bar": False}


def coefficients(path, sigma):
    """a, b, a' and b b' of x = a data + b noise; b' itself has no limit at the data on VP."""
    if path == "linear":
        return 1 - sigma, sigma, -torch.ones_like(sigma), sigma
    if path == "gvp":
        a, b = torch.cos(math.pi * sigma / 2), torch.sin(math.pi * sigma / 2)
        return a, b, -math.pi / 2 * b, math.pi / 2 * a * b
    a = torch.exp(-(sigma**2) * (20 - 0.1) / 4 - sigma * 0.1 / 2)
    b = torch.sqrt(-torch.expm1(2 * torch.log(a)))
    a_prime = -a * (sigma * (20 - 0.1) / 2 + 0.1 / 2)
    return a, b, a_prime, -a * a_prime


class Mixture:
    """
    Data from Gaussians with weights, means of shape (K, D) and covariances of shape (K, D, D), with the exact velocity:
    E[data | x] and E[noise | x] / b of each component, weighted by how likely the component is.
    """

    def __init__(self, path, weights, means, covariances):
        self.path = path
        self.weights, self.means, self.covariances = (
            torch.tensor(v, dtype=torch.float64) for v in (weights, means, covariances)
        )
        self.timesteps = []

    def marginal(self, sigma):
        a, b, _, _ = coefficients(self.path, torch.as_tensor(sigma, dtype=torch.float64))
        covariances = a**2 * self.covariances + b**2 * torch.eye(self.means.shape[1])
        components = torch.distributions.MultivariateNormal(a * self.means, covariances)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(self.weights), components)

    def __call__(self, x, timestep):
        assert timestep.shape == (len(x),)
        assert (timestep == timestep[0]).all()
        self.timesteps.append(float(timestep[0]))
        sigma = timestep[0].double() / 1000
        a, b, a_prime, b_b_prime = coefficients(self.path, sigma)
        components = self.marginal(sigma).component_distribution
        points = x.double()[:, None, :]
        shares = torch.softmax(self.weights.log() + components.log_prob(points), dim=1)
        whitened = torch.linalg.solve(components.covariance_matrix, (points - components.mean)[..., None])[..., 0]
        # v = a' E[data | x] + b' E[noise | x], and E[noise | x] = b * whitened
        data = self.means + a * torch.einsum("kij,nkj->nki", self.covariances, whitened)
        velocity = a_prime * data + b_b_prime * whitened
        return (shares[..., None] * velocity).sum(1).to(x.dtype)


def gaussian(path, mean=(0.4, -0.3, 0.1), num_dims=3):
    factor = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.25, 0.6]], dtype=torch.float64)
    return Mixture(path, [1.0], [list(mean)], [(factor @ factor.T).tolist()])


def two_gaussians(path):
    covariances = [[[0.05, 0.03], [0.03, 0.06]], [[0.1, 0.0], [0.0, 0.02]]]
    return Mixture(path, [0.3, 0.7], [[-0.5, 0.4], [0.3, -0.2]], covariances)


class TestIntegrateFlow:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("method", METHODS)
    def test_the_flow_of_a_gaussian(self, path, method):
        """Isotropic: (x - a mean) / sqrt(a^2 std^2 + b^2) stays as it is along the flow."""
        mean, std = 0.4, 0.3
        flow = Mixture(path, [1.0], [[mean] * 2], [(std**2 * torch.eye(2)).tolist()])
        noise = randn(5, 2).double()
        output = integrate_flow(flow, noise, rtol=1e-7, atol=1e-7, method=method, **QUIET)
        a, b, _, _ = coefficients(path, torch.tensor(1.0, dtype=torch.float64))
        expected = mean + std * (noise - a * mean) / (a**2 * std**2 + b**2).sqrt()
        torch.testing.assert_close(output.sample, expected, atol=2e-5, rtol=0)
        assert output.nfe == len(flow.timesteps)
        assert min(flow.timesteps) >= 0 and max(flow.timesteps) <= 1000

    @pytest.mark.parametrize("path", PATHS)
    def test_noise_to_data_to_noise(self, path):
        flow, noise = two_gaussians(path), randn(6, 2).double()
        data = integrate_flow(flow, noise, rtol=1e-9, atol=1e-9, **QUIET).sample
        assert (data - noise).abs().max() > 0.5
        back = integrate_flow(flow, data, rtol=1e-9, atol=1e-9, sigma_start=0.0, sigma_end=1.0, **QUIET).sample
        torch.testing.assert_close(back, noise, atol=1e-5, rtol=0)

    def test_part_of_the_way(self):
        flow, noise = gaussian("linear"), randn(4, 3).double()
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
        noise, outputs = randn(6, 2).double(), []
        for tolerance in (1e-10, 1e-6, 1e-3):
            outputs.append(integrate_flow(two_gaussians("linear"), noise, tolerance, tolerance, **QUIET))
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
        output = integrate_flow(gaussian("linear"), noise)
        assert not output.sample.requires_grad
        shown = capfd.readouterr().err
        assert f"{output.nfe} calls" in shown and "sigma=0.0000" in shown
        integrate_flow(gaussian("linear"), noise, **QUIET)
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
        torch.testing.assert_close(output.sample, sample.double(), atol=1e-3, rtol=0)


class TestLogLikelihood:
    @pytest.mark.parametrize("path", PATHS)
    def test_a_gaussian(self, path):
        # On VP a little of the data is left at sigma = 1: without a mean it is seen in the deviations only.
        flow = gaussian(path, mean=(0.0, 0.0, 0.0) if path == "vp" else (0.4, -0.3, 0.1))
        data = flow.marginal(0).sample((7,))
        output = flow_log_likelihood(flow, data, "exact", rtol=1e-8, atol=1e-8, **QUIET)
        expected = flow.marginal(0).log_prob(data)
        tolerance = {"atol": 1e-3 if path == "vp" else 1e-6, "rtol": 0}
        torch.testing.assert_close(output.log_likelihood, expected, **tolerance)
        torch.testing.assert_close(output.bits_per_dim, -expected / (3 * math.log(2)) + 7, **tolerance)
        assert output.nfe == len(flow.timesteps)
        noise = integrate_flow(flow, data, 1e-8, 1e-8, sigma_start=0.0, sigma_end=1.0, **QUIET).sample
        torch.testing.assert_close(output.noise, noise, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("path", PATHS)
    def test_a_mixture(self, path):
        flow = two_gaussians(path)
        data = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5), indexing="ij"), -1)
        data = data.reshape(25, 2).double()
        output = flow_log_likelihood(flow, data, "exact", num_levels=None, rtol=1e-7, atol=1e-7, **QUIET)
        expected = flow.marginal(0).log_prob(data)
        torch.testing.assert_close(output.log_likelihood, expected, atol=1e-2 if path == "vp" else 1e-4, rtol=0)
        torch.testing.assert_close(output.bits_per_dim, -output.log_likelihood / (2 * math.log(2)))

    def test_the_prior_has_a_deviation_and_the_flow_a_first_sigma(self):
        """From sigma 0.1 on VP with the exact deviation at sigma 1, the density is exactly that of the states there."""
        flow = Mixture("vp", [1.0], [[0.0, 0.0]], [(0.25 * torch.eye(2)).tolist()])
        states = flow.marginal(0.1).sample((4,))
        prior_std = flow.marginal(1).component_distribution.stddev[0, 0].item()
        settings = {"sigma_min": 0.1, "num_levels": None, "rtol": 1e-9, "atol": 1e-9}
        output = flow_log_likelihood(flow, states, "exact", prior_std=prior_std, **settings, **QUIET)
        torch.testing.assert_close(output.log_likelihood, flow.marginal(0.1).log_prob(states), atol=1e-7, rtol=0)
        assert min(flow.timesteps) >= 100 - 1e-6

    @pytest.mark.parametrize("divergence", ["rademacher", "gaussian"])
    def test_hutchinson_is_unbiased(self, divergence):
        flow = gaussian("linear")
        data = flow.marginal(0).sample((1,)).expand(4000, 3)
        exact = flow.marginal(0).log_prob(data[:1])
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
        flow, data = gaussian("linear"), gaussian("linear").marginal(0).sample((3,))

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


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rtol": 0}, "`rtol`=0 must be above 0"),
            ({"atol": -1e-5}, "`atol`=-1e-05 must be above 0"),
            ({"rtol": float("nan")}, "`rtol`=nan must be above 0"),
            ({"method": "rk4"}, "`method`='rk4' is unknown. Use one of 'dopri5', 'dopri8', 'bosh3'"),
            ({"sigma_end": -0.1}, r"from sigma = 1.0 to -0.1: they must differ and be in \[0, 1\]"),
            ({"sigma_start": 0.0}, "from sigma = 0.0 to 0.0: they must differ"),
        ],
    )
    def test_integrate_flow(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            integrate_flow(gaussian("linear"), randn(2, 3), **arguments)

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
        ],
    )
    def test_flow_log_likelihood(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            flow_log_likelihood(gaussian("linear"), randn(2, 3), **arguments)

    @pytest.mark.parametrize("function", [integrate_flow, flow_log_likelihood])
    def test_samples_and_velocities(self, function):
        with pytest.raises(ValueError, match=r"floating point tensor .* but is torch.int64 of shape \(2, 3\)"):
            function(gaussian("linear"), torch.zeros(2, 3, dtype=torch.int64), **QUIET)
        with pytest.raises(ValueError, match="`sample` must be .* but is list"):
            function(gaussian("linear"), [0.0], **QUIET)
        with pytest.raises(ValueError, match=r"velocity of shape \(2, 2\) for a sample of shape \(2, 3\)"):
            function(lambda x, t: x[:, :2], randn(2, 3), **QUIET)
        with pytest.raises(TypeError, match="`model_fn` returned a tuple instead of a tensor"):
            function(lambda x, t: (x,), randn(2, 3), **QUIET)
        with pytest.raises(FloatingPointError, match="not finite at timestep .* end at a sigma above 0"):
            function(lambda x, t: x / 0, randn(2, 3), **QUIET)

    def test_a_velocity_without_gradient(self):
        with pytest.raises(ValueError, match="returned a velocity without gradient. Leave out `torch.no_grad`"):
            flow_log_likelihood(lambda x, t: x.detach(), randn(2, 3), **QUIET)

    def test_torchdiffeq_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchdiffeq", None)
        with pytest.raises(ImportError, match=r'needs torchdiffeq: `pip install "diffusers-dyna\[ode\]"`'):
            integrate_flow(gaussian("linear"), randn(2, 3), **QUIET)
