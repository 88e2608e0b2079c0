# SPDX-License-Identifier: Apache-2.0
"""What a model is trained to predict, and at which times."""

import math
from collections.abc import Sequence

import torch

from diffusers import DDPMScheduler, SchedulerMixin

from ..schedulers import FlowMatchODEScheduler
from .randomness import keyed_generator, keyed_uniform


OBJECTIVES = ("flow", "epsilon")
TIME_SAMPLINGS = ("uniform", "logit_normal", "stratified")


def make_training_scheduler(
    objective: str,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    learn_sigma: bool = False,
    in_latents: bool = False,
) -> SchedulerMixin:
    """
    The scheduler that corrupts the data in training and is saved with the pipeline.

    Args:
        objective (`str`): `"flow"` (velocity, linear path) or `"epsilon"` (the noise of DDPM).
        num_train_timesteps (`int`, defaults to `1000`): steps of DDPM; flow matching is continuous.
        beta_schedule (`str`, defaults to `"linear"`): `beta_schedule` of [`~diffusers.DDPMScheduler`].
        learn_sigma (`bool`, defaults to `False`): whether DDPM's variances are learned, see [`variational_bound`].
        in_latents (`bool`, defaults to `False`): whether the data is not in [-1, 1], so that nothing may be clipped.

    Returns:
        [`FlowMatchODEScheduler`] or [`~diffusers.DDPMScheduler`].

    Raises:
        `ValueError`: on an unknown objective.
    """
    if objective == "flow":
        return FlowMatchODEScheduler()
    if objective == "epsilon":
        return DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_schedule=beta_schedule,
            variance_type="learned_range" if learn_sigma else "fixed_small",
            clip_sample=not in_latents,
        )
    raise ValueError(f"`objective`={objective!r} is unknown. Use one of {', '.join(map(repr, OBJECTIVES))}.")


def sample_sigmas(
    time_sampling: str,
    seed: int,
    indices: Sequence[int],
    total_batch_size: int,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> torch.Tensor:
    """
    Continuous noise levels for samples of one optimizer step, 1 is noise.

    Every sample's level comes from its global index, so any split of the batch over processes and accumulation draws
    the same.

    Args:
        time_sampling (`str`):
            `"uniform"`; `"logit_normal"` ([arXiv 2403.03206](https://huggingface.co/papers/2403.03206), section
            3.1): sigma = sigmoid(logit_mean + logit_std * n) with n standard normal, so a positive mean stands for
            more noise; or `"stratified"`: uniform, exactly one sample of the global batch in each of its
            `total_batch_size` equal intervals.
        seed (`int`): seed of the run.
        indices (`Sequence[int]`): global indices of the samples.
        total_batch_size (`int`): samples of one optimizer step over all processes and accumulation.
        logit_mean (`float`, defaults to `0.0`): mean of the logit.
        logit_std (`float`, defaults to `1.0`): standard deviation of the logit.

    Returns:
        `torch.Tensor` of shape `(len(indices),)`, float32 in [0, 1].

    Raises:
        `ValueError`: on an unknown `time_sampling`.
    """
    uniform = keyed_uniform(seed, "time", indices)
    if time_sampling == "stratified":
        steps = [index // total_batch_size for index in indices]
        # Which interval a position of the batch gets changes from step to step: every micro-batch covers all times.
        strata = {
            step: torch.randperm(total_batch_size, generator=keyed_generator(seed, "strata", step))
            for step in set(steps)
        }
        stratum = torch.stack([strata[step][i % total_batch_size] for i, step in zip(indices, steps, strict=True)])
        sigmas = (stratum + uniform) / total_batch_size
    elif time_sampling == "logit_normal":
        sigmas = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(uniform))
    elif time_sampling == "uniform":
        sigmas = uniform
    else:
        raise ValueError(
            f"`time_sampling`={time_sampling!r} is unknown. Use one of {', '.join(map(repr, TIME_SAMPLINGS))}."
        )
    return sigmas.float()


def sigmas_to_timesteps(scheduler: SchedulerMixin, sigmas: torch.Tensor) -> torch.Tensor:
    """
    The times that the model is given: continuous for flow matching, one of the discrete steps for DDPM.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): from [`make_training_scheduler`].
        sigmas (`torch.Tensor` of shape `(batch_size,)`): noise levels in [0, 1].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: float32 in [0, 1000], or int64 in [0, num_train_timesteps).
    """
    timesteps = sigmas * scheduler.config.num_train_timesteps
    if isinstance(scheduler, FlowMatchODEScheduler):
        return timesteps
    return timesteps.long().clamp(max=scheduler.config.num_train_timesteps - 1)


def training_target(
    scheduler: SchedulerMixin, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """
    What the model should predict: for a scheduler of this package what its `prediction_type` says, for one of
    diffusers the noise (epsilon prediction) or the velocity.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): from [`make_training_scheduler`].
        sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): clean data.
        noise (`torch.Tensor` with the shape of `sample`): the noise that was mixed in.
        timesteps (`torch.Tensor` of shape `(batch_size,)`): times of the samples.

    Returns:
        `torch.Tensor` with the shape of `sample`.
    """
    if hasattr(scheduler, "get_target"):
        return scheduler.get_target(sample, noise, timesteps)
    return noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(sample, noise, timesteps)


def variational_bound(
    scheduler: DDPMScheduler,
    noise_prediction: torch.Tensor,
    variance_prediction: torch.Tensor,
    sample: torch.Tensor,
    noisy_sample: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """
    One term of the variational bound, in bits per dimension, which trains the learned variances (Improved DDPM,
    [arXiv 2102.09672](https://huggingface.co/papers/2102.09672), equations 4 to 6, 14 and 15). Its weight beside the mean
    squared error is 1: the paper's 0.001 times the 1000 steps that one drawn step stands for.

    Args:
        scheduler ([`~diffusers.DDPMScheduler`]): with `prediction_type="epsilon"`.
        noise_prediction (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Detached by the caller: the bound is to train the variances only.
        variance_prediction (`torch.Tensor` with the shape of `sample`):
            v, where the log-variance is the mix (v + 1) / 2 of log beta and (1 - v) / 2 of the posterior's.
        sample (`torch.Tensor` with the shape of `noise_prediction`):
            Clean data. The last term reads it as 8-bit values in [-1, 1]; DiT keeps it so for latents.
        noisy_sample (`torch.Tensor` with the shape of `sample`): its noisy form.
        timesteps (`torch.Tensor` of shape `(batch_size,)`): int64 steps.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    betas, alphas_bar = scheduler.betas.double(), scheduler.alphas_cumprod.double()
    previous_bar = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
    posterior_variance = betas * (1 - previous_bar) / (1 - alphas_bar)
    posterior_variance[0] = posterior_variance[1]  # 0 at the first step, where it stands for the next one
    tables = {
        "log_beta": betas.log(),
        "log_posterior": posterior_variance.log(),
        "of_clean": betas * previous_bar.sqrt() / (1 - alphas_bar),
        "of_noisy": (1 - previous_bar) * scheduler.alphas.double().sqrt() / (1 - alphas_bar),
        "signal": alphas_bar.sqrt(),
        "noise": (1 - alphas_bar).sqrt(),
    }
    at = {
        name: table.to(timesteps.device)[timesteps].to(sample.dtype)[:, None, None, None]
        for name, table in tables.items()
    }

    predicted_sample = (noisy_sample - at["noise"] * noise_prediction) / at["signal"]
    true_mean = at["of_clean"] * sample + at["of_noisy"] * noisy_sample
    mean = at["of_clean"] * predicted_sample + at["of_noisy"] * noisy_sample
    share = (variance_prediction + 1) / 2
    log_variance = share * at["log_beta"] + (1 - share) * at["log_posterior"]

    difference = at["log_posterior"] - log_variance
    divergence = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean) ** 2 * (-log_variance).exp())
    first = _discretized_log_likelihood(sample, mean, log_variance)
    terms = torch.where((timesteps == 0)[:, None, None, None], -first, divergence)
    return terms.mean() / math.log(2)


def _discretized_log_likelihood(sample: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log-probability of the 8-bit bin around each value in [-1, 1]; the outermost bins reach to infinity."""
    scale = (-0.5 * log_variance).exp()
    above = torch.special.ndtr((sample + 1 / 255 - mean) * scale)
    below = torch.special.ndtr((sample - 1 / 255 - mean) * scale)
    above = torch.where(sample > 0.999, 1.0, above)
    below = torch.where(sample < -0.999, 0.0, below)
    return (above - below).clamp(min=1e-12).log()
