# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from diffusers import DDPMScheduler

from diffusers_dyna import FlowMatchODEScheduler
from diffusers_dyna.training.objectives import (
    make_training_scheduler,
    sample_sigmas,
    sigmas_to_timesteps,
    training_target,
    variational_bound,
)


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


@pytest.mark.parametrize("total_batch_size", [8, 12])
def test_stratified_has_one_sample_in_every_interval_of_every_global_batch(total_batch_size):
    sigmas = sample_sigmas("stratified", 0, range(5 * total_batch_size), total_batch_size)
    for batch in sigmas.view(5, total_batch_size):
        assert sorted((batch * total_batch_size).long().tolist()) == list(range(total_batch_size))
    orders = {tuple(batch.argsort().tolist()) for batch in sigmas.view(5, total_batch_size)}
    assert len(orders) > 1


@pytest.mark.parametrize("time_sampling", ["uniform", "logit_normal", "stratified"])
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
    with pytest.raises(ValueError, match="`time_sampling`='mode' is unknown. Use one of 'uniform', 'logit_normal'"):
        sample_sigmas("mode", 0, [0], 1)


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
