# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import sys

import pytest
import torch

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from diffusers_dyna import FlowMatchODEScheduler
from diffusers_dyna.training.objectives import (
    TIME_SAMPLINGS,
    loss_weights,
    make_training_scheduler,
    mse_loss,
    optimal_coupling,
    sample_sigmas,
    sigmas_to_timesteps,
    training_target,
    variational_bound,
)
from diffusers_dyna.training.randomness import keyed_uniform


def test_uniform_and_logit_normal_have_their_distributions():
    uniform = sample_sigmas("uniform", 0, range(8192), 64).sort().values
    logits = torch.logit(sample_sigmas("logit_normal", 0, range(8192), 64, logit_mean=0.5, logit_std=0.7).double())
    # Kolmogorov-Smirnov at the 1 % level: 1.63 / sqrt(8192) = 0.018; standard errors of mean and std 0.008 and 0.006
    assert (uniform - (torch.arange(8192) + 0.5) / 8192).abs().max() < 0.018
    assert abs(logits.mean() - 0.5) < 0.03
    assert abs(logits.std() - 0.7) < 0.025


def test_a_positive_logit_mean_is_more_noise():
    # diffusers' training idiom has the opposite sign from the paper (sigma = 1 is noise here and there)
    assert sample_sigmas("logit_normal", 0, range(256), 64, logit_mean=1.0).mean() > 0.6


@pytest.mark.parametrize("mode_scale", [-1.0, 0.0, 0.81, 1.29, 2 / (math.pi - 2)])
def test_mode_is_that_of_diffusers(monkeypatch, mode_scale):
    uniform = keyed_uniform(0, "time", range(1000))
    sigmas = sample_sigmas("mode", 0, range(1000), 64, mode_scale=mode_scale)
    monkeypatch.setattr(torch, "rand", lambda size, device, generator: uniform)
    expected = compute_density_for_timestep_sampling("mode", 1000, mode_scale=mode_scale)
    torch.testing.assert_close(sigmas, expected.float())
    # a monotonous map of [0, 1] onto itself, and symmetric: neither end is preferred
    assert (sigmas[uniform.argsort()].diff() <= 1e-7).all()
    assert abs(sigmas.mean() - 0.5) < 0.03
    # the density is 1 / |dsigma / du|, in the middle 1 / (1 + scale - scale pi / 2)
    low, high = ((uniform - u).abs().argmin() for u in (0.48, 0.52))
    slope = (sigmas[low] - sigmas[high]) / (uniform[high] - uniform[low])
    assert slope == pytest.approx(1 + mode_scale - mode_scale * math.pi / 2, abs=5e-3)


def test_cosmap_has_its_density():
    """The integral of the density that diffusers gives as a weight is the uniform number that was drawn."""
    uniform, sigmas = keyed_uniform(0, "time", range(1000)), sample_sigmas("cosmap", 0, range(1000), 64).double()
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    density = compute_loss_weighting_for_sd3("cosmap", grid)
    cumulative = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, grid)])
    assert cumulative[-1] == pytest.approx(1, abs=1e-8)
    torch.testing.assert_close(cumulative[(sigmas * 20000).round().long()], uniform, atol=1e-4, rtol=0)


@pytest.mark.parametrize("time_sampling", TIME_SAMPLINGS)
def test_the_shift_is_that_of_the_schedulers(time_sampling):
    sigmas = sample_sigmas(time_sampling, 0, range(64), 16)
    shifted = sample_sigmas(time_sampling, 0, range(64), 16, time_shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=sigmas.sort(descending=True).values.tolist())
    torch.testing.assert_close(shifted.sort(descending=True).values, scheduler.sigmas[:-1])
    assert shifted.mean() > sigmas.mean()  # above 1 is more noise


def test_a_shift_of_the_logit_normal_moves_its_mean():
    shifted = sample_sigmas("logit_normal", 0, range(256), 64, logit_mean=0.3, logit_std=0.8, time_shift=3.0)
    expected = sample_sigmas("logit_normal", 0, range(256), 64, logit_mean=0.3 + math.log(3), logit_std=0.8)
    torch.testing.assert_close(shifted, expected)


@pytest.mark.parametrize("total_batch_size", [8, 12])
def test_stratified_has_one_sample_in_every_interval_of_every_global_batch(total_batch_size):
    sigmas = sample_sigmas("stratified", 0, range(5 * total_batch_size), total_batch_size)
    for batch in sigmas.view(5, total_batch_size):
        assert sorted((batch * total_batch_size).long().tolist()) == list(range(total_batch_size))
    orders = {tuple(batch.argsort().tolist()) for batch in sigmas.view(5, total_batch_size)}
    assert len(orders) > 1


@pytest.mark.parametrize("time_sampling", TIME_SAMPLINGS)
def test_any_split_of_a_batch_draws_the_same_times(time_sampling):
    whole = sample_sigmas(time_sampling, 1, range(32, 48), 16)
    parts = [sample_sigmas(time_sampling, 1, range(first, first + 4), 16) for first in (32, 36, 40, 44)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sample_sigmas(time_sampling, 2, range(32, 48), 16))


def test_flow_targets_and_times():
    scheduler = make_training_scheduler("flow")
    assert isinstance(scheduler, FlowMatchODEScheduler)
    sample, noise = torch.randn(2, 4, 1, 8, 8)
    sigmas = torch.tensor([0.0, 0.25, 0.7453, 1.0])
    timesteps = sigmas_to_timesteps(scheduler, sigmas)
    torch.testing.assert_close(timesteps, 1000 * sigmas)
    target = training_target(scheduler, sample, noise, timesteps)
    torch.testing.assert_close(target, noise - sample)
    # the velocity is the derivative of the path: moving by it along sigma leads to the noise, and back to the data
    noisy = scheduler.add_noise(sample, noise, timesteps)
    remaining = (1 - sigmas).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy + remaining * target, noise)
    torch.testing.assert_close(noisy - (1 - remaining) * target, sample)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction_type", ["velocity", "epsilon", "sample"])
def test_targets_of_other_paths(path, prediction_type):
    scheduler = make_training_scheduler("flow", path=path, prediction_type=prediction_type)
    sample, noise = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    timesteps = sigmas_to_timesteps(scheduler, torch.tensor([0.0, 0.25, 0.7453, 1.0], dtype=torch.float64))
    target = training_target(scheduler, sample, noise, timesteps)
    if prediction_type != "velocity":
        assert torch.equal(target, {"epsilon": noise, "sample": sample}[prediction_type])
        return
    # the derivative of what the model is given, by finite differences
    times, step = timesteps.clamp(1, 999), 1e-3
    ahead, behind = (scheduler.add_noise(sample, noise, times + sign * step) for sign in (1, -1))
    target = training_target(scheduler, sample, noise, times)
    torch.testing.assert_close(target, (ahead - behind) / (2 * step / 1000), rtol=1e-4, atol=1e-4)


def test_vp_times_keep_off_the_data():
    scheduler = make_training_scheduler("flow", path="vp")
    sigmas = torch.linspace(0, 1, 101)
    timesteps = sigmas_to_timesteps(scheduler, sigmas)
    torch.testing.assert_close(timesteps, 1 + 999 * sigmas)
    sample, noise = torch.randn(2, 101, 1, 4, 4)
    assert training_target(scheduler, sample, noise, timesteps).abs().max() < 100


def test_epsilon_targets_and_times():
    scheduler = make_training_scheduler("epsilon", num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
    assert isinstance(scheduler, DDPMScheduler)
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    timesteps = sigmas_to_timesteps(scheduler, torch.tensor([0.0, 0.0199, 0.02, 0.999, 1.0]))
    assert timesteps.tolist() == [0, 0, 1, 49, 49]
    sample, noise = torch.randn(2, 5, 1, 8, 8)
    assert training_target(scheduler, sample, noise, timesteps) is noise


def test_unknown_names():
    with pytest.raises(ValueError, match="`objective`='score' is unknown. Use one of 'flow', 'epsilon'"):
        make_training_scheduler("score")
    with pytest.raises(ValueError, match="`time_sampling`='beta' is unknown. Use one of 'uniform', 'logit_normal'"):
        sample_sigmas("beta", 0, [0], 1)
    with pytest.raises(ValueError, match="`weighting_scheme`='mode' is unknown. Use one of 'none', 'sigma_sqrt'"):
        loss_weights("mode", make_training_scheduler("flow"), torch.ones(2))


@pytest.mark.parametrize("mode_scale", [-1.01, 1.76, float("nan")])
def test_values_out_of_range(mode_scale):
    with pytest.raises(ValueError, match=r"`mode_scale`=.* must be in \[-1, 2 / \(pi - 2\) = 1.7519\]"):
        sample_sigmas("mode", 0, [0], 1, mode_scale=mode_scale)
    with pytest.raises(ValueError, match="`time_shift`=0 must be above 0. 1 leaves the times as they are"):
        sample_sigmas("uniform", 0, [0], 1, time_shift=0)


class TestLossWeights:
    sigmas = torch.tensor([1e-5, 0.01, 0.3, 0.5, 0.8, 1.0])

    @pytest.mark.parametrize("weighting_scheme", ["sigma_sqrt", "cosmap"])
    def test_those_of_diffusers(self, weighting_scheme):
        scheduler = make_training_scheduler("flow")
        weights = loss_weights(weighting_scheme, scheduler, 1000 * self.sigmas)
        expected = compute_loss_weighting_for_sd3(weighting_scheme, self.sigmas[1:])
        torch.testing.assert_close(weights[1:], expected)
        assert weights[0] <= 1.001e6  # as at the smallest level of diffusers' scripts
        assert loss_weights("none", scheduler, 1000 * self.sigmas) is None

    def test_cosmap_times_and_cosmap_weights_are_the_same_loss(self):
        loss = torch.sin  # any function of sigma
        by_time = loss(sample_sigmas("cosmap", 0, range(8192), 64)).mean()
        sigmas = sample_sigmas("stratified", 0, range(8192), 8192)
        weights = loss_weights("cosmap", make_training_scheduler("flow"), 1000 * sigmas)
        assert abs(by_time - (weights * loss(sigmas)).mean()) < 0.01

    @pytest.mark.parametrize("prediction_type", ["ddpm", "velocity", "epsilon", "sample"])
    @pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
    def test_min_snr_weighs_the_error_of_the_data(self, path, prediction_type):
        """An error of the prediction, turned into one of the data by the path's algebra, counts min(SNR, gamma)."""
        noisy, target, error = torch.randn(3, 4, 1, 8, 8, dtype=torch.float64)
        if prediction_type == "ddpm":
            scheduler = make_training_scheduler("epsilon")
            timesteps = sigmas_to_timesteps(scheduler, self.sigmas[1:-1])
            a_bar = scheduler.alphas_cumprod[timesteps].double()[:, None, None, None]
            a, b = a_bar.sqrt(), (1 - a_bar).sqrt()
            data = [(noisy - b * prediction) / a for prediction in (target, target + error)]
        else:
            scheduler = make_training_scheduler("flow", path=path, prediction_type=prediction_type)
            timesteps, sigmas = 1000 * self.sigmas[1:-1], self.sigmas[1:-1].double()
            ones, zeros = torch.ones_like(noisy), torch.zeros_like(noisy)
            a, b = scheduler.path.interpolate(ones, zeros, sigmas), scheduler.path.interpolate(zeros, ones, sigmas)
            data = [
                scheduler.path.convert(prediction, noisy, sigmas, prediction_type, "sample")
                for prediction in (target, target + error)
            ]
        snr = (a / b).square()[:, 0, 0, 0]
        assert (snr > 5).any() and (snr < 5).any()
        expected = (snr.clamp(max=5) * (data[1] - data[0]).square().flatten(1).mean(1)).mean()
        weights = loss_weights("min_snr", scheduler, timesteps, snr_gamma=5.0)
        assert weights.dtype == torch.float32
        actual = (weights * error.square().flatten(1).mean(1)).mean()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("prediction_type", ["velocity", "epsilon", "sample"])
    def test_min_snr_at_the_ends(self, prediction_type):
        scheduler = make_training_scheduler("flow", prediction_type=prediction_type)
        weights = loss_weights("min_snr", scheduler, torch.tensor([0.0, 1000.0]))
        assert (
            weights.tolist() == {"velocity": [0.0, 0.0], "epsilon": [0.0, 1.0], "sample": [5.0, 0.0]}[prediction_type]
        )

    def test_the_loss_is_the_mean_over_samples(self):
        prediction, target = torch.randn(2, 4, 3, 8, 8)
        weights = torch.tensor([0.0, 1.0, 2.0, 5.0])
        rows = [torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target)]
        torch.testing.assert_close(mse_loss(prediction, target, weights), sum(map(torch.mul, weights, rows)) / 4)
        torch.testing.assert_close(mse_loss(prediction.bfloat16(), target), sum(rows) / 4, rtol=1e-2, atol=0)
        halves = [mse_loss(prediction[i : i + 2], target[i : i + 2], weights[i : i + 2]) for i in (0, 2)]
        torch.testing.assert_close(sum(halves) / 2, mse_loss(prediction, target, weights))


class TestOptimalCoupling:
    def cost(self, sample, noise):
        return (sample - noise).square().sum().item()

    @pytest.mark.parametrize("seed", range(5))
    def test_no_permutation_is_cheaper(self, seed):
        torch.manual_seed(seed)
        sample, noise = torch.randn(2, 6, 1, 2, 2)
        costs = {order: self.cost(sample, noise[list(order)]) for order in itertools.permutations(range(6))}
        coupling = optimal_coupling(sample, noise)
        assert tuple(coupling.tolist()) == min(costs, key=costs.get)
        assert costs[tuple(coupling.tolist())] < costs[tuple(range(6))]

    def test_classes_keep_their_noise(self):
        torch.manual_seed(0)
        sample, noise = torch.randn(2, 9, 1, 2, 2)
        labels = torch.tensor([2, 0, 1, 0, 2, 0, 0, 7, 2])
        coupling = optimal_coupling(sample, noise, labels)
        assert sorted(coupling.tolist()) == list(range(9))
        assert torch.equal(labels[coupling], labels)
        assert coupling[2] == 2 and coupling[7] == 7  # alone in their class
        for label in (0, 2):
            members = (labels == label).nonzero().squeeze(1)
            alone = members[optimal_coupling(sample[members], noise[members])]
            assert torch.equal(coupling[members], alone)
        assert self.cost(sample, noise[coupling]) < self.cost(sample, noise)

    def test_one_class_is_none(self):
        torch.manual_seed(0)
        sample, noise = torch.randn(2, 32, 3, 4, 4)
        coupling = optimal_coupling(sample, noise)
        assert torch.equal(coupling, optimal_coupling(sample, noise, torch.full((32,), 4)))
        assert torch.equal(coupling, optimal_coupling(sample, noise))

    def test_noise_that_is_the_data_in_another_order_is_found(self):
        sample = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        assert torch.equal(order[optimal_coupling(sample, sample[order])], torch.arange(64))

    def test_scipy_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
        with pytest.raises(ImportError, match="Optimal coupling needs scipy: `pip install scipy`"):
            optimal_coupling(torch.zeros(2, 1), torch.zeros(2, 1))


class TestVariationalBound:
    """Against the same quantities by Bayes' rule on the schedule's Gaussians, with `torch.distributions`."""

    def make(self, timestep):
        scheduler = make_training_scheduler("epsilon", learn_sigma=True)
        sample = torch.rand(2, 3, 4, 4).double() * 2 - 1
        noise, prediction = torch.randn_like(sample), torch.randn_like(sample)
        variance = torch.rand_like(sample) * 2 - 1
        timesteps = torch.full((2,), timestep)
        noisy = scheduler.add_noise(sample, noise, timesteps).double()
        return scheduler, sample, prediction, variance, timesteps, noisy

    @pytest.mark.parametrize("timestep", [1, 2, 500, 999])
    def test_later_steps_are_divergences_of_gaussians(self, timestep):
        scheduler, sample, prediction, variance, timesteps, noisy = self.make(timestep)
        beta = scheduler.betas[timestep].double()
        alpha_bar, previous = scheduler.alphas_cumprod[[timestep, timestep - 1]].double()
        # q(x_{t-1} | x_t, x_0): a Gaussian prior around x_0 times the likelihood of x_t.
        precision = 1 / (1 - previous) + (1 - beta) / beta

        def posterior_mean(clean):
            return (previous.sqrt() * clean / (1 - previous) + (1 - beta).sqrt() * noisy / beta) / precision

        predicted = (noisy - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
        log_variance = (variance + 1) / 2 * beta.log() - (1 - variance) / 2 * precision.log()
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(posterior_mean(sample), precision**-0.5),
            torch.distributions.Normal(posterior_mean(predicted), (log_variance / 2).exp()),
        )
        actual = variational_bound(scheduler, prediction, variance, sample, noisy, timesteps)
        torch.testing.assert_close(actual, expected.mean() / math.log(2), rtol=2e-3, atol=1e-6)  # float32 schedule

    def test_the_variance_is_the_schedulers(self):
        scheduler, sample, prediction, variance, timesteps, noisy = self.make(500)
        log_variance = scheduler._get_variance(500, predicted_variance=variance, variance_type="learned_range")
        lowest = scheduler._get_variance(500, variance_type="fixed_small").double()
        # With the true noise the means agree, and the divergence is that of the variances alone.
        noise = (noisy - scheduler.alphas_cumprod[500].sqrt() * sample) / (1 - scheduler.alphas_cumprod[500]).sqrt()
        actual = variational_bound(scheduler, noise, variance, sample, noisy, timesteps)
        difference = lowest.log() - log_variance
        expected = 0.5 * (difference.exp() - 1 - difference)
        torch.testing.assert_close(actual, expected.mean() / math.log(2), rtol=1e-2, atol=1e-4)

    def test_the_last_step_is_a_distribution_over_the_256_values(self):
        scheduler, _, _, _, timesteps, _ = self.make(0)
        values = (torch.arange(256).double() * 2 / 255 - 1)[:, None, None, None]
        noisy = torch.full_like(values, 0.3)
        bits = [
            variational_bound(
                scheduler, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), value[None], noisy[:1], timesteps[:1]
            )
            for value in values
        ]
        assert sum(2.0 ** -float(bit) for bit in bits) == pytest.approx(1.0, abs=1e-3)

    def test_gradient_trains_the_variance(self):
        scheduler, sample, prediction, variance, timesteps, noisy = self.make(300)
        variance.requires_grad_()
        variational_bound(scheduler, prediction, variance, sample, noisy, timesteps).backward()
        assert variance.grad.abs().min() > 0


def test_learned_variances_are_saved_with_the_scheduler():
    assert make_training_scheduler("epsilon", learn_sigma=True).config.variance_type == "learned_range"
    assert make_training_scheduler("epsilon").config.variance_type == "fixed_small"
