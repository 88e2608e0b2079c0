# SPDX-License-Identifier: Apache-2.0
"""What a model is trained to predict, at which times, from which pairs of data and noise, and what an error counts."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from ..schedulers import FlowMatchODEScheduler
from ..schedulers.scheduling_flow_match import EDGE
from .randomness import keyed_generator, keyed_uniform


OBJECTIVES = ("flow", "epsilon")
# Without the score: its target -noise / b grows without bound toward the data. A model of the noise has it, by -1 / b.
PREDICTION_TYPES = ("velocity", "epsilon", "sample")
TIME_SAMPLINGS = ("uniform", "logit_normal", "mode", "cosmap", "stratified")
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "cosmap", "min_snr")
COUPLINGS = ("independent", "ot")
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # outside, "mode" is not a distribution: its map of [0, 1] turns back


def make_training_scheduler(
    objective: str,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    learn_sigma: bool = False,
    in_latents: bool = False,
    path: str = "linear",
    prediction_type: str = "velocity",
) -> SchedulerMixin:
    """
    The scheduler that corrupts the data in training and is saved with the pipeline.

    Args:
        objective (`str`): `"flow"` (flow matching) or `"epsilon"` (the noise of DDPM).
        num_train_timesteps (`int`, defaults to `1000`): steps of DDPM; flow matching is continuous.
        beta_schedule (`str`, defaults to `"linear"`): `beta_schedule` of [`~diffusers.DDPMScheduler`].
        learn_sigma (`bool`, defaults to `False`): whether DDPM's variances are learned, see [`variational_bound`].
        in_latents (`bool`, defaults to `False`): whether the data is not in [-1, 1], so that nothing may be clipped.
        path (`str`, defaults to `"linear"`): of flow matching, see [`FlowMatchPath`].
        prediction_type (`str`, defaults to `"velocity"`):
            Of flow matching: `"velocity"`, `"epsilon"` (the noise) or `"sample"` (the data).

    Returns:
        [`FlowMatchODEScheduler`] or [`~diffusers.DDPMScheduler`].

    Raises:
        `ValueError`: on an unknown objective.
    """
    if objective == "flow":
        return FlowMatchODEScheduler(path=path, prediction_type=prediction_type)
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
    mode_scale: float = 1.29,
    time_shift: float = 1.0,
) -> torch.Tensor:
    r"""
    Continuous noise levels for samples of one optimizer step, 1 is noise.

    Every sample's level comes from its global index, so any split of the batch over processes and accumulation draws
    the same. With u uniform in [0, 1), and the sections of
    [arXiv 2403.03206](https://huggingface.co/papers/2403.03206) (SD3), whose t = 1 is noise as here:

    | `time_sampling` | sigma | |
    |---|---|---|
    | `"uniform"` | u | |
    | `"logit_normal"` | sigmoid(logit_mean + logit_std * n), n standard normal | section 3.1; a positive mean is more noise |
    | `"mode"` | 1 - u - mode_scale * (cos(pi u / 2)^2 - 1 + u) | section 3.1; above 0 more of the middle, below 0 more of the ends |
    | `"cosmap"` | 1 - 1 / (tan(pi u / 2) + 1) | section 3.1; density 2 / (pi (1 - 2 sigma + 2 sigma^2)) |
    | `"stratified"` | u | exactly one sample of the global batch in each of its `total_batch_size` equal intervals |

    `time_shift` moves any of them to time_shift * sigma / (1 + (time_shift - 1) * sigma) (equation 23).

    Args:
        time_sampling (`str`): a name of the table.
        seed (`int`): seed of the run.
        indices (`Sequence[int]`): global indices of the samples.
        total_batch_size (`int`): samples of one optimizer step over all processes and accumulation.
        logit_mean (`float`, defaults to `0.0`): mean of the logit.
        logit_std (`float`, defaults to `1.0`): standard deviation of the logit.
        mode_scale (`float`, defaults to `1.29`): of `"mode"`, in [-1, 2 / (pi - 2)]; 0 is uniform.
        time_shift (`float`, defaults to `1.0`): factor of the shift, above 0; above 1 is more noise.

    Returns:
        `torch.Tensor` of shape `(len(indices),)`, float32 in [0, 1].

    Raises:
        `ValueError`: on an unknown `time_sampling`, and on a scale or shift that is out of range.
    """
    if not MODE_SCALES[0] <= mode_scale <= MODE_SCALES[1]:
        raise ValueError(f"`mode_scale`={mode_scale} must be in [-1, 2 / (pi - 2) = {MODE_SCALES[1]:.4f}].")
    if not time_shift > 0:
        raise ValueError(f"`time_shift`={time_shift} must be above 0. 1 leaves the times as they are.")
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
    elif time_sampling == "mode":
        sigmas = 1 - uniform - mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    elif time_sampling == "cosmap":
        sine, cosine = torch.sin(math.pi * uniform / 2), torch.cos(math.pi * uniform / 2)
        sigmas = sine / (sine + cosine)  # 1 - 1 / (tangent + 1)
    elif time_sampling == "uniform":
        sigmas = uniform
    else:
        raise ValueError(
            f"`time_sampling`={time_sampling!r} is unknown. Use one of {', '.join(map(repr, TIME_SAMPLINGS))}."
        )
    return (time_shift * sigmas / (1 + (time_shift - 1) * sigmas)).clamp(0, 1).float()


def sigmas_to_timesteps(scheduler: SchedulerMixin, sigmas: torch.Tensor) -> torch.Tensor:
    """
    The times that the model is given: continuous for flow matching, one of the discrete steps for DDPM. On the path
    "vp" the levels are squeezed into [0.001, 1], since its velocity has no bound toward the data; the scheduler's grids
    keep off it as well.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): from [`make_training_scheduler`].
        sigmas (`torch.Tensor` of shape `(batch_size,)`): noise levels in [0, 1].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: float32 in [0, 1000], or int64 in [0, num_train_timesteps).
    """
    if isinstance(scheduler, FlowMatchODEScheduler):
        if scheduler.config.path == "vp":
            sigmas = EDGE + (1 - EDGE) * sigmas
        return sigmas * scheduler.config.num_train_timesteps
    timesteps = sigmas * scheduler.config.num_train_timesteps
    return timesteps.long().clamp(max=scheduler.config.num_train_timesteps - 1)


def training_target(
    scheduler: SchedulerMixin, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """
    What the model should predict: the noise of DDPM, or what the `prediction_type` of a flow says.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): from [`make_training_scheduler`].
        sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): clean data.
        noise (`torch.Tensor` with the shape of `sample`): the noise that was mixed in.
        timesteps (`torch.Tensor` of shape `(batch_size,)`): times of the samples.

    Returns:
        `torch.Tensor` with the shape of `sample`.
    """
    if isinstance(scheduler, DDPMScheduler):
        return noise
    return scheduler.get_target(sample, noise, timesteps)


def loss_weights(
    weighting_scheme: str, scheduler: SchedulerMixin, timesteps: torch.Tensor, snr_gamma: float = 5.0
) -> torch.Tensor | None:
    r"""
    What the squared error of each sample counts.

    | `weighting_scheme` | weight | for |
    |---|---|---|
    | `"none"` | 1 | everything |
    | `"sigma_sqrt"` ([`~diffusers.training_utils.compute_loss_weighting_for_sd3`]) | sigma^-2, with sigma at least 0.001, the smallest one of diffusers' scripts | velocity on the linear path |
    | `"cosmap"` (the same; SD3, [arXiv 2403.03206](https://huggingface.co/papers/2403.03206), section 3.1) | 2 / (pi (1 - 2 sigma + 2 sigma^2)): the density of the times of that name | velocity on the linear path |
    | `"min_snr"` ([arXiv 2303.09556](https://huggingface.co/papers/2303.09556)) | min(SNR, snr_gamma) of the error of the data that the prediction stands for | everything |

    With x = a data + b noise, the SNR is (a / b)^2. An error e of the noise is an error b e / a of the data, so that
    min-SNR weighs it with min(SNR, snr_gamma) / SNR, as in the paper; an error e of the velocity is one of
    b e / (a b' - b a'), on the linear path sigma e, so that it is weighed with min((1 - sigma)^2, snr_gamma sigma^2).

    Args:
        weighting_scheme (`str`): a name of the table.
        scheduler ([`~diffusers.SchedulerMixin`]): from [`make_training_scheduler`].
        timesteps (`torch.Tensor` of shape `(batch_size,)`): times of the samples.
        snr_gamma (`float`, defaults to `5.0`): where the SNR is cut; the paper's value.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32, or `None` where all weights are 1.

    Raises:
        `ValueError`: on an unknown `weighting_scheme`.
    """
    if weighting_scheme == "none":
        return None
    if weighting_scheme not in WEIGHTING_SCHEMES:
        raise ValueError(
            f"`weighting_scheme`={weighting_scheme!r} is unknown. Use one of "
            f"{', '.join(map(repr, WEIGHTING_SCHEMES))}."
        )
    if isinstance(scheduler, DDPMScheduler):
        snr = compute_snr(scheduler, timesteps)
        return snr.clamp(max=snr_gamma) / snr
    sigmas = timesteps / scheduler.config.num_train_timesteps
    if weighting_scheme != "min_snr":
        return compute_loss_weighting_for_sd3(weighting_scheme, sigmas.clamp(min=1e-3))
    c = scheduler.path.coefficients(sigmas)
    weights = {
        "velocity": torch.minimum(c.a**2, snr_gamma * c.b**2) / c.det**2,
        "epsilon": (snr_gamma * (c.b / c.a) ** 2).clamp(max=1),
        "sample": ((c.a / c.b) ** 2).clamp(max=snr_gamma),
    }[scheduler.config.prediction_type]
    return weights.to(timesteps.device, torch.float32)


def mse_loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """
    The mean over the batch of each sample's weight times its mean squared error, in float32.

    Args:
        prediction (`torch.Tensor` of shape `(batch_size, ...)`): of the model.
        target (`torch.Tensor` with the shape of `prediction`): from [`training_target`].
        weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): from [`loss_weights`]. `None` is 1 for all.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    prediction, target = prediction.float(), target.float()
    if weights is None:
        return F.mse_loss(prediction, target)
    return (weights * (prediction - target).square().flatten(1).mean(dim=1)).mean()


def optimal_coupling(
    sample: torch.Tensor, noise: torch.Tensor, class_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Which noise goes with which data such that the sum of their squared Euclidean distances is the smallest: minibatch
    optimal transport (OT-CFM, [arXiv 2302.00482](https://huggingface.co/papers/2302.00482); BatchOT,
    [arXiv 2304.14772](https://huggingface.co/papers/2304.14772)), solved exactly. Every noise is used once, so the batch
    stays a batch of the same data and the same noise. (torchcfm has the same plan, but draws pairs from it with
    replacement.) It is a function of the batch at hand: batches of another size have other pairs.

    With `class_labels`, pairs are formed within each class only. Across classes, the noise of a class would no longer
    be standard normal, while sampling starts every class from standard normal noise
    ([arXiv 2503.10636](https://huggingface.co/papers/2503.10636)). With few samples of a class in a batch, little is
    left to choose.

    The ODE of a model trained so is right for every path; its score is not -E[noise | x] / b, so that SDE samplers
    are not.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, ...)`): data.
        noise (`torch.Tensor` with the shape of `sample`): standard normal noise.
        class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            The condition that the model is given. Samples whose label is dropped are a class of their own.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, int64: `noise[result]` goes with `sample`.

    Raises:
        `ImportError`: where scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Optimal coupling needs scipy: `pip install scipy`.") from error

    # |x - e|^2 = |x|^2 + |e|^2 - 2 x . e, and the first two have the same sum for all assignments.
    benefit = sample.flatten(1).double() @ noise.flatten(1).double().T
    if class_labels is None:
        class_labels = torch.zeros(len(sample), dtype=torch.int64)
    coupling = torch.arange(len(sample))
    for label in class_labels.unique():
        members = (class_labels == label).nonzero().squeeze(1).cpu()
        _, columns = linear_sum_assignment(benefit[members][:, members].cpu().numpy(), maximize=True)
        coupling[members] = members[torch.from_numpy(columns)]
    return coupling.to(sample.device)


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
