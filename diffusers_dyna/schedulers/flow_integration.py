# SPDX-License-Identifier: Apache-2.0
"""Adaptive integration of the flow ODE, and the likelihood that it gives, on torchdiffeq (`diffusers-dyna[ode]`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor


# torchdiffeq's explicit Runge-Kutta pairs, whose steps follow the estimated error; a grid is for the schedulers.
METHODS = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")
DIVERGENCES = ("rademacher", "gaussian", "exact")


@dataclass
class FlowIntegrationOutput(BaseOutput):
    """
    Output of [`integrate_flow`].

    Args:
        sample (`torch.Tensor` with the shape and dtype of the input): the state at `sigma_end`.
        nfe (`int`): calls of `model_fn`.
    """

    sample: torch.Tensor
    nfe: int


@dataclass
class FlowLikelihoodOutput(BaseOutput):
    """
    Output of [`flow_log_likelihood`].

    Args:
        bits_per_dim (`torch.Tensor` of shape `(batch_size,)`): -log2 of the probability of each sample, by dimension.
        log_likelihood (`torch.Tensor` of shape `(batch_size,)`): log of the density at each sample, in nats.
        noise (`torch.Tensor` with the shape and dtype of the sample): where the flow takes it at sigma = 1.
        nfe (`int`): calls of `model_fn`.
    """

    bits_per_dim: torch.Tensor
    log_likelihood: torch.Tensor
    noise: torch.Tensor
    nfe: int


@torch.no_grad()
def integrate_flow(
    model_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sample: torch.Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    sigma_start: float = 1.0,
    sigma_end: float = 0.0,
    num_train_timesteps: int = 1000,
    progress_bar: bool = True,
) -> FlowIntegrationOutput:
    """
    Solves dx/dsigma = v(x, sigma) with steps as small as the tolerances ask for: from noise (sigma = 1) to data, or the
    other way with `sigma_start` below `sigma_end`.

    The local error of every sample of the batch is held below atol + rtol * |x| in its root mean square, so a sample
    is as exact in a batch as alone; the steps are those of the hardest one. The model is called at no sigma outside the
    given ends. In float32, tolerances below about 1e-6 cost calls without gaining digits.

    Args:
        model_fn (`Callable`):
            From the state, in the dtype of `sample`, and its timesteps of shape `(batch_size,)` (`num_train_timesteps`
            * sigma, in the precision of the integration) to the velocity dx/dsigma. For a model of this package:
            `lambda x, t: transformer(x, t, class_labels).sample`.
        sample (`torch.Tensor` of shape `(batch_size, ...)`):
            The state at `sigma_start`. Integrated in float32, or in float64 where it is float64, whatever the model
            computes in.
        rtol (`float`, defaults to `1e-5`): relative tolerance, above 0.
        atol (`float`, defaults to `1e-5`): absolute tolerance, above 0.
        method (`str`, defaults to `"dopri5"`):
            torchdiffeq's `"dopri5"` (order 5), `"dopri8"`, `"bosh3"`, `"adaptive_heun"` or `"fehlberg2"`.
        sigma_start (`float`, defaults to `1.0`): where it begins, in [0, 1].
        sigma_end (`float`, defaults to `0.0`):
            Where it ends, in [0, 1]. On the VP path, whose velocity has no finite coefficients at 0, above 0.
        num_train_timesteps (`int`, defaults to `1000`): the timestep that stands for sigma = 1.
        progress_bar (`bool`, defaults to `True`):
            Show the calls made and the sigma reached; hidden by `diffusers.utils.logging.disable_progress_bar`.

    Returns:
        [`FlowIntegrationOutput`].

    Raises:
        `ValueError`: on a tolerance, method, sigma or `num_train_timesteps` that is out of range, and on a velocity of
            another shape.
        `TypeError`: where `model_fn` does not return a tensor.
        `FloatingPointError`: where the velocity is not finite.
        `ImportError`: where torchdiffeq is missing.
    """
    dtype = _state_dtype(sample)
    (state,), nfe = _integrate(
        lambda state, timestep: (model_fn(state.to(sample.dtype), timestep),),
        (sample.to(dtype),),
        sample.shape,
        rtol,
        atol,
        method,
        sigma_start,
        sigma_end,
        num_train_timesteps,
        progress_bar,
    )
    return FlowIntegrationOutput(sample=state.to(sample.dtype), nfe=nfe)


@torch.no_grad()
def flow_log_likelihood(
    model_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sample: torch.Tensor,
    divergence: str = "rademacher",
    num_probes: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    num_levels: int | None = 256,
    prior_std: float = 1.0,
    sigma_min: float = 0.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    num_train_timesteps: int = 1000,
    progress_bar: bool = True,
) -> FlowLikelihoodOutput:
    r"""
    The likelihood of data under a flow, by the instantaneous change of variables (FFJORD,
    [arXiv 1810.01367](https://huggingface.co/papers/1810.01367);
    [arXiv 2011.13456](https://huggingface.co/papers/2011.13456), equation 39):

        log p(x(0)) = log N(x(1); 0, prior_std^2) + integral over sigma from 0 to 1 of div v(x(sigma), sigma)

    The divergence is estimated as e . (dv/dx) e with random e (Hutchinson), the same e along a trajectory: unbiased in
    `log_likelihood` with any number of probes. `"exact"` sums the diagonal of dv/dx, one backward pass a dimension.

    `model_fn` runs with gradients, so a `DynaDiTTransformer2DModel` does not skip here. Call it with
    `complete_model=True`: the hard gates of its tokens have no derivative but the straight-through one of training,
    which is not that of the function it computes.

    Args:
        model_fn (`Callable`): as for [`integrate_flow`]; it must be differentiable, and treat samples independently.
        sample (`torch.Tensor` of shape `(batch_size, ...)`):
            Data. Where `num_levels` is given, in [-1, 1] and dequantised: for 8-bit `levels`,
            `(levels + torch.rand(levels.shape)) / 128 - 1`.
        divergence (`str`, defaults to `"rademacher"`):
            `"rademacher"` (e of +1 and -1, the smaller variance), `"gaussian"` or `"exact"`.
        num_probes (`int`, defaults to `1`): random e of each sample; each costs a backward pass. Not for `"exact"`.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): of the probes; a list has one a sample.
        num_levels (`int`, *optional*, defaults to `256`):
            Equal bins that the range [-1, 1] of the data has. Their width turns the density into a probability:
            bits/dim = -log2 p(x) / D + log2(num_levels / 2), which is + 7 for 8 bits. With uniform dequantisation that
            is an upper bound of the discrete negative log-likelihood. `None` is for continuous data, and adds nothing.
        prior_std (`float`, defaults to `1.0`): standard deviation of the states at sigma = 1, above 0.
        sigma_min (`float`, defaults to `0.0`):
            Where the flow begins, in [0, 1); above 0 on the VP path. The density is that of the states at this sigma.
        rtol (`float`, defaults to `1e-5`): relative tolerance, above 0.
        atol (`float`, defaults to `1e-5`): absolute tolerance, of the state and of the divergence a dimension.
        method (`str`, defaults to `"dopri5"`): as for [`integrate_flow`].
        num_train_timesteps (`int`, defaults to `1000`): the timestep that stands for sigma = 1.
        progress_bar (`bool`, defaults to `True`): as for [`integrate_flow`].

    Returns:
        [`FlowLikelihoodOutput`].

    Raises:
        `ValueError`: on an argument that is out of range, and on a velocity that does not fit the sample or has no
            gradient with respect to it.
        `TypeError`: where `model_fn` does not return a tensor.
        `FloatingPointError`: where the velocity is not finite.
        `ImportError`: where torchdiffeq is missing.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence`={divergence!r} is unknown. Use one of {', '.join(map(repr, DIVERGENCES))}.")
    if num_probes < 1 or (divergence == "exact" and num_probes != 1):
        raise ValueError(f"`num_probes`={num_probes} must be at least 1, and 1 where `divergence` is 'exact'.")
    if num_levels is not None and num_levels < 2:
        raise ValueError(f"`num_levels`={num_levels} must be at least 2, or None for continuous data.")
    if not prior_std > 0:
        raise ValueError(f"`prior_std`={prior_std} must be above 0.")
    dtype, num_dims = _state_dtype(sample), sample[0].numel()
    if isinstance(generator, list) and len(generator) != len(sample):
        raise ValueError(
            f"`generator` has {len(generator)} entries for a batch of {len(sample)}. Give one for each sample, or a single "
            "generator."
        )
    probes = []
    if divergence != "exact":
        probes = [randn_tensor(sample.shape, generator, sample.device, dtype) for _ in range(num_probes)]
    if divergence == "rademacher":
        probes = [torch.where(probe < 0, -1.0, 1.0).to(dtype) for probe in probes]

    def velocity_and_divergence(state: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            velocity = model_fn(state.to(sample.dtype), timestep)
            _check_velocity(velocity, sample.shape)
            if not velocity.requires_grad:
                raise ValueError(
                    "`model_fn` returned a velocity without gradient. Leave out `torch.no_grad` and "
                    "`torch.inference_mode` in and around it."
                )
            velocity = velocity.to(dtype)
            flat = velocity.flatten(1)
            if divergence == "exact":
                rows = (torch.autograd.grad(flat[:, i].sum(), state, retain_graph=True)[0] for i in range(num_dims))
                trace = sum(row.flatten(1)[:, i] for i, row in enumerate(rows))
            else:
                products = (torch.autograd.grad(velocity, state, e, retain_graph=True)[0] * e for e in probes)
                trace = sum(product.flatten(1).sum(1) for product in products) / num_probes
        return velocity.detach(), trace[:, None] / num_dims

    # The divergence a dimension, so that the tolerances mean the same for every size of the data.
    (noise, mean_divergence), nfe = _integrate(
        velocity_and_divergence,
        (sample.to(dtype), torch.zeros(len(sample), 1, dtype=dtype, device=sample.device)),
        sample.shape,
        rtol,
        atol,
        method,
        sigma_min,
        1.0,
        num_train_timesteps,
        progress_bar,
    )
    # In float64, which MPS lacks: half a million dimensions times 1e-7 would be seen.
    prior = -(noise.cpu().double() / prior_std).square().flatten(1).sum(1) / 2
    prior = prior - num_dims * (math.log(prior_std) + math.log(2 * math.pi) / 2)
    log_likelihood = prior + num_dims * mean_divergence[:, 0].cpu().double()
    bits_per_dim = -log_likelihood / (num_dims * math.log(2))
    if num_levels is not None:
        bits_per_dim = bits_per_dim + math.log2(num_levels / 2)
    return FlowLikelihoodOutput(
        bits_per_dim=bits_per_dim.to(sample.device, dtype),
        log_likelihood=log_likelihood.to(sample.device, dtype),
        noise=noise.to(sample.dtype),
        nfe=nfe,
    )


def _state_dtype(sample: torch.Tensor) -> torch.dtype:
    if not torch.is_tensor(sample) or not sample.is_floating_point() or sample.ndim < 2 or not sample.numel():
        got = f"{sample.dtype} of shape {tuple(sample.shape)}" if torch.is_tensor(sample) else type(sample).__name__
        raise ValueError(f"`sample` must be a floating point tensor of shape (batch_size, ...), but is {got}.")
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _check_velocity(velocity: torch.Tensor, shape: torch.Size) -> None:
    if not torch.is_tensor(velocity):
        raise TypeError(
            f"`model_fn` returned a {type(velocity).__name__} instead of a tensor. For a model of diffusers, take its "
            "`.sample`."
        )
    if velocity.shape != shape:
        raise ValueError(
            f"`model_fn` returned a velocity of shape {tuple(velocity.shape)} for a sample of shape {tuple(shape)}. They "
            "must be the same; leave out the variances that a model may predict too."
        )


def _integrate(
    derivative, state, shape, rtol, atol, method, sigma_start, sigma_end, num_train_timesteps, progress_bar
) -> tuple[tuple[torch.Tensor, ...], int]:
    """
    Integrates a tuple of tensors, all with the batch first, whose first derivative is the velocity, over sigma.
    `derivative` is given the first tensor and the timesteps.
    """
    if method not in METHODS:
        raise ValueError(f"`method`={method!r} is unknown. Use one of {', '.join(map(repr, METHODS))}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}`={value} must be above 0.")
    if not 1 <= num_train_timesteps < math.inf:
        raise ValueError(f"`num_train_timesteps`={num_train_timesteps} must be at least 1.")
    if not (0 <= sigma_start <= 1 and 0 <= sigma_end <= 1) or sigma_start == sigma_end:
        raise ValueError(
            f"The flow cannot be integrated from sigma = {sigma_start} to {sigma_end}: they must differ and be in [0, 1]."
        )
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            'Adaptive integration needs torchdiffeq: `pip install "diffusers-dyna[ode]"`, or `pip install torchdiffeq`.'
        ) from error

    batch_size, span, nfe = shape[0], sigma_end - sigma_start, 0
    bar = logging.tqdm(disable=not progress_bar, desc="Integrating the flow", unit=" calls")

    def rhs(progress: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # Progress goes from 0 to 1 in both directions. The trial of the first step size may lie beyond the end.
        nonlocal nfe
        sigma = sigma_start + span * min(max(float(progress), 0.0), 1.0)
        timestep = torch.full((batch_size,), num_train_timesteps * sigma, dtype=state[0].dtype, device=state[0].device)
        nfe += 1
        bar.update()
        bar.set_postfix(sigma=f"{sigma:.4f}", refresh=False)
        velocity, *rest = derivative(state[0], timestep)
        _check_velocity(velocity, shape)
        if not velocity.isfinite().all():
            raise FloatingPointError(
                f"`model_fn` returned a velocity that is not finite at timestep {num_train_timesteps * sigma:g}. Where "
                "the path has none at the data (VP), end at a sigma above 0."
            )
        return tuple(span * part.to(state[0].dtype) for part in (velocity, *rest))

    def norm(error_ratios: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The largest root mean square of a sample; torchdiffeq's own norm hides a bad one among the others."""
        return max(ratio.flatten(1).square().mean(1).sqrt().max() for ratio in error_ratios)

    time_dtype = torch.float32 if state[0].device.type == "mps" else torch.float64  # MPS has no float64
    ends = torch.tensor([0.0, 1.0], dtype=time_dtype, device=state[0].device)
    # `step_t`: the last step ends at the end. Without it, torchdiffeq steps beyond and interpolates.
    options = {"norm": norm, "step_t": ends[1:], "dtype": time_dtype}
    with bar:
        trajectory = odeint(rhs, state, ends, rtol=rtol, atol=atol, method=method, options=options)
    return tuple(part[-1] for part in trajectory), nfe
