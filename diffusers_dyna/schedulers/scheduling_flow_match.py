# SPDX-License-Identifier: Apache-2.0
"""
Flow-matching paths and schedulers, in one file that also works when copied alone into a Hub repository.

A path mixes data x0 and noise eps to x = a(sigma) x0 + b(sigma) eps, sigma = 0 is data and sigma = 1 is noise. The
schedulers integrate what a model predicts about x back to data: [`FlowMatchODEScheduler`] draws nothing,
[`FlowMatchSDEScheduler`] draws noise on the way.
"""

import importlib
import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


PATHS = ("linear", "gvp", "vp")
PREDICTION_TYPES = ("velocity", "epsilon", "score", "sample")
GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# What a config of another scheduler can ask for and these do not do: an error, not another picture. ("sigma_max" begins
# a grid of EDM's sigmas.)
UNSUPPORTED_KEYS = ("stochastic_sampling", "thresholding", "sigma_max")
# How far a grid stays from sigma = 0 or 1 where a coefficient is not finite there; 1e-3 as in SiT.
EDGE = 1e-3

# Explicit Runge-Kutta methods. Each row makes the input of the next model call, the last row the result of the step:
# its start plus the step size times the weighted velocities of the calls so far. The sums of the rows are the times of
# the calls, in steps.
RUNGE_KUTTA = {
    "euler": ((1.0,),),
    "heun": ((1.0,), (1 / 2, 1 / 2)),
    "midpoint": ((1 / 2,), (0.0, 1.0)),
    "rk4": ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),  # Kutta's 3/8 rule
}
# The step to sigma = 0 in the place of a rule with a call at its end: one order less, which in a single step does not
# lower the order of the trajectory, and no call at sigma = 0. For "rk4" it is Heun's third-order rule.
FINAL_STEP = {"heun": RUNGE_KUTTA["euler"], "rk4": ((1 / 3,), (0.0, 2 / 3), (1 / 4, 0.0, 3 / 4))}
# Number of predictions, and whether the prediction at the end of a step corrects that step.
ADAMS = {"ab2": (2, False), "ab3": (3, False), "abm3": (3, True)}
ODE_SOLVERS = (*RUNGE_KUTTA, *ADAMS, "multistep")
SDE_SOLVERS = ("euler", "heun")
DIFFUSION_FORMS = ("constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm")
LAST_STEPS = ("none", "mean", "tweedie", "euler")

# Nodes and weights on [0, 1] of the Gauss-Legendre rule for the weights of "multistep".
_NODES, _WEIGHTS = ((x + shift) / 2 for x, shift in zip(np.polynomial.legendre.leggauss(64), (1, 0)))


def _check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"`{name}`={value!r} is unknown. Use one of {', '.join(map(repr, choices))}.")


class FlowMatchPathCoefficients(NamedTuple):
    """
    A [`FlowMatchPath`] at some noise levels, float64.

    Args:
        a (`torch.Tensor`): factor of the data.
        b (`torch.Tensor`): factor of the noise.
        da (`torch.Tensor`): derivative of `a` with respect to sigma.
        db (`torch.Tensor`): derivative of `b`; infinite at sigma = 0 of the path "vp".
        b_db (`torch.Tensor`): `b * db`, finite everywhere.
        det (`torch.Tensor`): `a * db - b * da`; infinite where `db` is.
        db_det (`torch.Tensor`): `db / det`, finite everywhere.
    """

    a: torch.Tensor
    b: torch.Tensor
    da: torch.Tensor
    db: torch.Tensor
    b_db: torch.Tensor
    det: torch.Tensor
    db_det: torch.Tensor


@dataclass(frozen=True)
class FlowMatchPath:
    r"""
    The path x = a(sigma) * data + b(sigma) * noise from data (sigma = 0) to noise (sigma = 1), and what follows from
    it by algebra.

    | `name` | a | b |
    |---|---|---|
    | `"linear"` ([arXiv 2209.03003](https://huggingface.co/papers/2209.03003)) | 1 - sigma | sigma |
    | `"gvp"` ([arXiv 2303.08797](https://huggingface.co/papers/2303.08797)) | cos(pi sigma / 2) | sin(pi sigma / 2) |
    | `"vp"` ([arXiv 2011.13456](https://huggingface.co/papers/2011.13456), beta from 0.1 to 20) | exp(-19.9 sigma^2 / 4 - 0.1 sigma / 2) | sqrt(1 - a^2) |

    [SiT](https://huggingface.co/papers/2401.08740) has the same paths in t = 1 - sigma, with velocities of the
    opposite sign.

    Args:
        name (`str`, defaults to `"linear"`): `"linear"`, `"gvp"` or `"vp"`.

    Raises:
        `ValueError`: on an unknown name.
    """

    name: str = "linear"

    def __post_init__(self):
        _check_choice("path", self.name, PATHS)

    def coefficients(self, sigma: float | torch.Tensor) -> FlowMatchPathCoefficients:
        """
        The factors of data and noise and their derivatives, in forms that lose no digits near either end.

        Args:
            sigma (`float` or `torch.Tensor`): noise levels in [0, 1].

        Returns:
            [`FlowMatchPathCoefficients`] of float64 tensors with the shape of `sigma`.
        """
        sigma = sigma if torch.is_tensor(sigma) else torch.tensor(sigma, dtype=torch.float64)
        s = sigma.to("cpu" if sigma.device.type == "mps" else sigma.device, torch.float64)  # MPS has no float64
        one = torch.ones_like(s)
        if self.name == "linear":
            return FlowMatchPathCoefficients(1 - s, s, -one, one, s, one, one)
        if self.name == "gvp":
            # cos(pi s / 2) is 6e-17 at s = 1, this is 0
            a, b, rate = torch.sin((1 - s) * (math.pi / 2)), torch.sin(s * (math.pi / 2)), math.pi / 2
            return FlowMatchPathCoefficients(a, b, -rate * b, rate * a, rate * a * b, rate * one, a)
        log_a, d_log_a = -s * s * (19.9 / 4) - s * (0.1 / 2), -s * (19.9 / 2) - 0.1 / 2
        a, b = torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a))
        da, b_db = a * d_log_a, -a * a * d_log_a
        return FlowMatchPathCoefficients(a, b, da, b_db / b, b_db, -da / b, a)

    def _factors(self, sigma: float | torch.Tensor, sample: torch.Tensor) -> FlowMatchPathCoefficients:
        """The coefficients such that they multiply rows of `sample` and leave its precision as it is."""
        coefficients = self.coefficients(sigma)
        if coefficients.a.ndim == 0:
            return coefficients
        dtype, shape = torch.promote_types(sample.dtype, torch.float32), (-1, *[1] * (sample.ndim - 1))
        return FlowMatchPathCoefficients(*(value.reshape(shape).to(sample.device, dtype) for value in coefficients))

    def interpolate(self, sample: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """
        The point a * sample + b * noise.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): data.
            noise (`torch.Tensor` with the shape of `sample`): standard normal noise.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): noise levels in [0, 1].

        Returns:
            `torch.Tensor` with the shape of `sample`.
        """
        c = self._factors(sigma, sample)
        return c.a * sample + c.b * noise

    def velocity(self, sample: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """
        The derivative of [`interpolate`] with respect to sigma; on "linear", `noise - sample`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): data.
            noise (`torch.Tensor` with the shape of `sample`): standard normal noise.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                Noise levels in [0, 1]; not 0 on "vp", where the derivative is infinite.

        Returns:
            `torch.Tensor` with the shape of `sample`.
        """
        c = self._factors(sigma, sample)
        return c.da * sample + c.db * noise

    def convert(
        self, prediction: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor, source: str, target: str
    ) -> torch.Tensor:
        """
        Turns one kind of prediction at the point x into another: with the data x0 and the noise eps that it stands
        for, x = a x0 + b eps, velocity = a' x0 + b' eps and score = -eps / b.

        From velocity, everything is finite at every sigma but the score at sigma = 0 of "linear" and "gvp". From
        noise or score, data and velocity are not known where a = 0 (sigma = 1 of "linear" and "gvp"); from data, the
        rest is not known at sigma = 0; from noise, the velocity is not known at sigma = 0 of "vp".

        Args:
            prediction (`torch.Tensor` of shape `(batch_size, ...)`): what the model predicts.
            sample (`torch.Tensor` with the shape of `prediction`): the point x, which the model was given.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): noise levels of x in [0, 1].
            source (`str`): what `prediction` is: `"velocity"`, `"epsilon"` (noise), `"score"` or `"sample"` (data).
            target (`str`): what it is turned into, one of the same.

        Returns:
            `torch.Tensor` with the shape of `prediction`; infinite or nan where the result is not known.

        Raises:
            `ValueError`: on an unknown `source` or `target`.
        """
        _check_choice("source", source, PREDICTION_TYPES)
        _check_choice("target", target, PREDICTION_TYPES)
        if source == target:
            return prediction
        c = self._factors(sigma, sample)
        if source == "velocity":
            if target == "sample":
                return c.db_det * sample - (c.b / c.det) * prediction
            scale = c.det if target == "epsilon" else c.b * c.b * c.da - c.a * c.b_db  # the latter is -b * det
            return (c.a / scale) * prediction - (c.da / scale) * sample
        if source == "sample":
            data, noise = prediction, (sample - c.a * prediction) / c.b
        else:
            noise = prediction if source == "epsilon" else -c.b * prediction
            data = (sample - c.b * noise) / c.a
        if target == "sample":
            return data
        if target == "epsilon":
            return noise
        if target == "score":
            return -noise / c.b
        return c.da * data + (-c.b_db * prediction if source == "score" else c.db * noise)


@dataclass
class FlowMatchODESchedulerOutput(BaseOutput):
    """
    Output of [`FlowMatchODEScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` with the shape of the sample): the model input of the next call.
    """

    prev_sample: torch.Tensor


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """
    Output of [`FlowMatchSDEScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` with the shape of the sample): the model input of the next call.
    """

    prev_sample: torch.Tensor


class _FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """What the schedulers of this file share: the grid, the forward process, the place in the trajectory."""

    _compatibles = [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchODEScheduler",
        "FlowMatchSDEScheduler",
    ]
    order = 1

    @classmethod
    def from_config(cls, config: dict | None = None, return_unused_kwargs: bool = False, **kwargs):
        """
        Makes a scheduler from the config of another. Of DPM++ or UniPC in flow form (`use_flow_sigmas`, as Sana and Wan
        have it), `flow_shift` becomes `shift` and "flow_prediction" becomes "velocity".

        Args:
            config (`dict`): the other's `config`.
            return_unused_kwargs (`bool`, defaults to `False`): return what was not used of it too.
            **kwargs: values in the place of those of the config.

        Returns:
            The scheduler, or a tuple of it and a dictionary.

        Raises:
            `ValueError`: on a config that asks for what this scheduler does not do.
        """
        if isinstance(config, dict):
            for name in UNSUPPORTED_KEYS:
                if config.get(name):
                    raise ValueError(
                        f"The config sets `{name}`, which {cls.__name__} does not have. Do without it by "
                        f"`from_config({{**config, {name!r}: None}})`, or keep the other scheduler."
                    )
            if config.get("use_flow_sigmas"):
                shift = config.get("flow_shift", 1.0)
                if "shift" not in kwargs and config.get("shift", shift) != shift:
                    raise ValueError(
                        f"The config has both `shift`={config['shift']} and `flow_shift`={shift}. Pass one of them as "
                        "`shift` to `from_config`."
                    )
                # its `sigma_min` is the last of a Karras grid before 0, not where ours ends
                names = cls._get_init_keys(cls) - {"sigma_min"}
                config = {"shift": shift, **{name: value for name, value in config.items() if name in names}}
                if config.get("prediction_type") == "flow_prediction":
                    config["prediction_type"] = "velocity"
            elif config.get("beta_schedule") or config.get("trained_betas") is not None:
                raise ValueError(
                    "The config is that of a diffusion scheduler: it has betas (`beta_schedule`, `trained_betas`) and "
                    "no `use_flow_sigmas`. Keep that scheduler, or, for a model trained by flow matching, make "
                    f"{cls.__name__} without the config, with the `path`, `prediction_type` and `shift` of the model."
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _setup(self, solvers: tuple[str, ...]) -> None:
        """Checks the config and makes the grid that training scripts of diffusers read."""
        config = self.config
        _check_choice("solver", config.solver, solvers)
        _check_choice("prediction_type", config.prediction_type, PREDICTION_TYPES)
        _check_choice("time_shift_type", config.time_shift_type, ("exponential", "linear"))
        self.path = FlowMatchPath(config.path)
        if config.num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps`={config.num_train_timesteps} must be at least 1.")
        if sum(bool(config[name]) for name in GRIDS) > 1:
            raise ValueError(f"Only one of {', '.join(f'`{name}`' for name in GRIDS)} can be True.")
        for name in ("shift_terminal", "sigma_min"):
            if config[name] is not None and not 0 <= config[name] < 1:
                raise ValueError(f"`{name}`={config[name]} must be in [0, 1), or None.")
        self.set_shift(config.shift)

        self.order = len(RUNGE_KUTTA.get(config.solver, RUNGE_KUTTA["euler"]))
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._begin_index = None
        self._reset_steps()

        sigmas = np.linspace(1, 0, config.num_train_timesteps + 1, dtype=np.float32)[:-1]
        if not config.use_dynamic_shifting:
            sigmas = self._apply_shift(sigmas, mu=None)
        self.sigmas = self._flip_time(torch.from_numpy(np.append(sigmas, np.float32(0))))
        self.timesteps = self.sigmas[:-1] * config.num_train_timesteps

    # Properties and setters that pipelines use

    @property
    def shift(self) -> float:
        """The factor of the timestep shift."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Changes the factor of the timestep shift from the next `set_timesteps` on."""
        if not shift > 0:
            raise ValueError(f"`shift`={shift} must be above 0. 1 leaves the grid as it is.")
        self._shift = shift

    @property
    def step_index(self) -> int | None:
        """Number of model calls made, an index into `timesteps`; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index into `timesteps` of the first call, where a pipeline has set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index into `timesteps` of the first call, a multiple of `order`. To be called by pipelines."""
        if begin_index < 0:
            raise ValueError(f"`begin_index`={begin_index} must be an index into `timesteps`, at least 0.")
        self._begin_index = begin_index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # The grid

    def _set_grid(self, num_inference_steps, device, sigmas, mu, timesteps, reverse: bool = False) -> None:
        """`set_timesteps` of all schedulers."""
        maximum, times = self.config.num_train_timesteps, None
        if not self.config.use_dynamic_shifting:
            mu = None
        elif mu is None and (timesteps is None or sigmas is not None):
            raise ValueError("`mu` must be given where `use_dynamic_shifting` is True.")
        elif mu is not None and not mu > 0 and self.config.time_shift_type == "linear":
            raise ValueError(f"`mu`={mu} must be above 0 where `time_shift_type` is 'linear'.")

        if timesteps is not None:
            times = self._check_grid("timesteps", timesteps, maximum, num_inference_steps)
            grid = times / np.float32(maximum)
        if sigmas is not None:
            grid = self._check_grid("sigmas", sigmas, 1, num_inference_steps)
            if times is not None and (len(times) != len(grid) or self.order > 1):
                raise ValueError(
                    f"`sigmas` and `timesteps` have {len(grid)} and {len(times)} entries, and `solver`="
                    f"{self.config.solver!r} has {self.order} calls a step. Both together, the times are what the model "
                    "is given at the sigmas: as many, and one call a step. Give one of them, or another solver."
                )
        elif times is None:
            if not isinstance(num_inference_steps, numbers.Real) or num_inference_steps % 1 != 0:
                raise ValueError(f"`num_inference_steps`={num_inference_steps!r} must be a whole number of steps.")
            if num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps`={num_inference_steps} must be at least 1.")
            grid = self._default_grid(int(num_inference_steps), mu).astype(np.float32)
        if times is None or sigmas is not None:
            grid = self._space(self._apply_shift(grid, mu))

        end = self.config.sigma_min or 0.0
        if grid[0] > 1 - 1e-6 and not self._can_start_at_noise():
            grid[0] = max(1 - EDGE, (1 + grid[1]) / 2 if len(grid) > 1 else 0)
            if times is not None:
                times[0] = min(times[0], grid[0] * maximum)
        if end == 0 and not self._can_reach_data(reverse):
            end = min(EDGE, grid[-1] / 2)
        if not (np.isfinite(grid).all() and np.all(np.diff(grid) < 0)):
            raise ValueError(
                f"The shift or the spacing leaves no strictly falling float32 numbers: {grid.tolist()}. Use a shift or "
                "`mu` that moves the grid less, or fewer steps."
            )
        if not end < grid[-1]:
            raise ValueError(f"The grid ends at `sigma_min`={end}, but its last step already starts at {grid[-1]}.")
        grid = np.append(grid, np.float32(end))
        if reverse:
            grid = grid[::-1].copy()

        self.num_inference_steps = len(grid) - 1
        rule = RUNGE_KUTTA.get(self.config.solver, RUNGE_KUTTA["euler"])
        self._rules = [rule] * (self.num_inference_steps - 1) + [self._final_rule(rule, end=grid[-1])]
        ends = self._flip_time(torch.from_numpy(grid)).tolist()
        calls = [
            start + sum(row) * (end - start)
            for start, end, rule in zip(ends[:-1], ends[1:], self._rules, strict=True)
            for row in ((), *rule[:-1])
        ]
        self.sigmas = torch.tensor([*calls, ends[-1]], dtype=torch.float32)
        model_times = self.sigmas[:-1] * maximum
        if times is not None:  # as they are, not by way of sigma and back
            times = np.append(times, np.float32(end * maximum))
            times = maximum - times if self.config.invert_sigmas else times
            model_times[:: self.order] = torch.tensor((times[::-1] if reverse else times)[:-1].tolist())
        self._call_timesteps = model_times.tolist()
        self.timesteps = model_times.to(device)
        self._begin_index = None
        self._reset_steps()

    def _default_grid(self, num_steps: int, mu: float | None) -> np.ndarray:
        """The even grid before the shift, without its end."""
        end = self._unshift(self.config.sigma_min or 0.0, mu)
        return np.linspace(1, end + (1 - end) / num_steps, num_steps)

    def _can_start_at_noise(self) -> bool:
        """Whether what the solver needs follows from a prediction at sigma = 1."""
        return self.config.path == "vp" or self.config.prediction_type in ("velocity", "sample")

    def _final_rule(self, rule: tuple, end: float) -> tuple:
        """The Runge-Kutta rule of the last step of the grid, which goes to `end`."""
        return rule

    def _flip_time(self, sigmas):
        """From the noise level to the time of the model with `invert_sigmas`, and back."""
        return 1 - sigmas if self.config.invert_sigmas else sigmas

    @staticmethod
    def _check_grid(name: str, grid, maximum: float, num_inference_steps: int | None) -> np.ndarray:
        grid = np.array(grid.tolist() if torch.is_tensor(grid) else grid, dtype=np.float32)
        if grid.ndim != 1 or not len(grid):
            raise ValueError(f"`{name}` must be a list with at least one entry, but has shape {grid.shape}.")
        if num_inference_steps is not None and num_inference_steps != len(grid):
            raise ValueError(f"`{name}` has {len(grid)} entries, but `num_inference_steps` is {num_inference_steps}.")
        # The last entry is above 0 where this holds, so that the appended 0 continues the grid.
        if not (np.all(np.diff(grid) < 0) and 0 < grid[-1] and grid[0] <= maximum):
            raise ValueError(
                f"`{name}` must fall strictly from at most {maximum} to above 0 (the final 0 is appended), but is "
                f"{grid.tolist()}."
            )
        return grid

    def _apply_shift(self, sigmas: np.ndarray, mu: float | None) -> np.ndarray:
        """The timestep shift, in the float32 operations of diffusers' schedulers, so that the grids agree exactly."""
        if mu is None:
            return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        odds = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return odds / (odds + (1 / sigmas - 1))

    def _unshift(self, sigma: float, mu: float | None) -> float:
        """The noise level that the shift moves to `sigma`."""
        factor = self.shift if mu is None else math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return sigma / (sigma + factor * (1 - sigma))

    def _space(self, sigmas: np.ndarray) -> np.ndarray:
        """The shifted grid with the end and the spacing that the config asks for, as in diffusers' schedulers."""
        config = self.config
        if config.shift_terminal:
            if len(sigmas) < 2:
                raise ValueError("`shift_terminal` moves the last of at least 2 steps, but the grid has 1.")
            rest = 1 - sigmas
            sigmas = 1 - rest / (rest[-1] / (1 - config.shift_terminal))
        first, last, ramp = sigmas[0].item(), sigmas[-1].item(), np.linspace(0, 1, len(sigmas))
        if config.use_karras_sigmas:  # arXiv 2206.00364, eq. 5, with rho = 7
            sigmas = (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7
        elif config.use_exponential_sigmas:
            sigmas = np.exp(np.linspace(math.log(first), math.log(last), len(sigmas)))
        elif config.use_beta_sigmas:  # arXiv 2407.12173
            try:
                special = importlib.import_module("scipy.special")
            except ImportError as error:
                raise ImportError("`use_beta_sigmas` needs scipy: pip install scipy") from error
            sigmas = last + special.betaincinv(0.6, 0.6, 1 - ramp) * (first - last)
        return sigmas.astype(np.float32)

    # The forward process

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The point a * sample + b * noise on the path; (1 - sigma) * sample + sigma * noise on "linear".

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): data.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                Any time in [0, num_train_timesteps], on the grid or off it.
            noise (`torch.Tensor` with the shape of `sample`): standard normal noise.

        Returns:
            `torch.Tensor` with the shape and dtype of `sample`.

        Raises:
            `ValueError`: if there is neither one time nor one per sample.
        """
        return self.path.interpolate(*self._pair(sample, noise, timestep)).to(sample.dtype)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """[`scale_noise`] under the name and argument order of the other schedulers of diffusers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The velocity of the path at `timesteps`: its derivative with respect to sigma, `noise - sample` on "linear".
        With `invert_sigmas`, the derivative with respect to 1 - sigma.
        """
        velocity = self.path.velocity(*self._pair(sample, noise, timesteps)).to(sample.dtype)
        return -velocity if self.config.invert_sigmas else velocity

    def get_target(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        What a model with the `prediction_type` of the config learns to predict.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): data.
            noise (`torch.Tensor` with the shape of `sample`): the noise that [`scale_noise`] mixed in.
            timesteps (`torch.Tensor` of shape `()` or `(batch_size,)`):
                In [0, num_train_timesteps]; not sigma = 0 for the score, nor for the velocity of "vp".

        Returns:
            `torch.Tensor` with the shape and dtype of `sample`: [`get_velocity`], `noise`, `sample`, or the score
            -noise / b.
        """
        prediction_type = self.config.prediction_type
        if prediction_type == "velocity":
            return self.get_velocity(sample, noise, timesteps)
        if prediction_type == "sample":
            return sample
        data, noise, sigma = self._pair(sample, noise, timesteps)
        return self.path.convert(noise, data, sigma, "epsilon", prediction_type).to(sample.dtype)

    def _pair(self, sample: torch.Tensor, noise: torch.Tensor, timestep: float | torch.Tensor) -> tuple:
        """Data and noise in at least float32, and their noise levels."""
        dtype = torch.promote_types(sample.dtype, torch.float32)
        timestep = torch.as_tensor(timestep, dtype=dtype, device=sample.device)
        if timestep.ndim > 1 or (timestep.ndim == 1 and len(timestep) not in (1, len(sample))):
            raise ValueError(
                f"`timestep` must be one time or one per sample, shape ({len(sample)},), but has shape "
                f"{tuple(timestep.shape)}."
            )
        return sample.to(dtype), noise.to(dtype), self._flip_time(timestep / self.config.num_train_timesteps)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: the model takes the state as it is."""
        return sample

    # The place in the trajectory

    def _reset_steps(self) -> None:
        self._step_index = self._first_index = None
        self._start = None  # the state at the start of the step
        self._history = []  # what earlier calls predicted, oldest first
        self._state = self._returned_dtype = None  # what the last call returned, before it was rounded

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """
        The index into `timesteps` at which a trajectory that starts at `timestep` begins.

        Args:
            timestep (`float` or `torch.Tensor` of shape `()`): in [0, num_train_timesteps].
            schedule_timesteps (`torch.Tensor` of shape `(num_calls,)`, *optional*): a grid instead of `timesteps`.

        Returns:
            `int`: the index of the first call of a step.

        Raises:
            `ValueError`: if no step starts at it, but for rounding.
        """
        schedule = (self.timesteps if schedule_timesteps is None else schedule_timesteps)[:: self.order].cpu().double()
        distance = (schedule - float(timestep)).abs()
        if not distance.min() <= self._rounding(timestep):
            raise ValueError(
                f"`timestep`={float(timestep)} is not on the grid {schedule.tolist()}. Pass an entry of `timesteps` at which "
                "a step starts, or call `set_begin_index`."
            )
        return int(distance.argmin()) * self.order

    @staticmethod
    def _rounding(timestep: float | torch.Tensor) -> float:
        """How far `timestep` may be from the time that it stands for: twice what rounding to bfloat16 moves it."""
        is_short = torch.is_tensor(timestep) and timestep.dtype in (torch.bfloat16, torch.float16)
        return (0.004 if is_short else 1e-6) * abs(float(timestep))

    def _begin_call(self, timestep: float | torch.Tensor, sample: torch.Tensor) -> tuple[int, int, torch.Tensor]:
        """The step and its stage that this call belongs to, and the sample with the precision that rounding took."""
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is not set. Call `set_timesteps` before `step`.")
        index = self._step_index
        if index is None:
            index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
            self._first_index = index
            if index % self.order:
                raise ValueError(
                    f"A trajectory cannot begin at index {index}, inside a step: it must be a multiple of "
                    f"`order`={self.order}."
                )
        if index >= len(self.timesteps):
            raise ValueError(
                f"All {len(self.timesteps)} calls of this trajectory are done. Call `set_timesteps` to start another."
            )
        # A time on another device is not read: the loop would wait for the device.
        if not torch.is_tensor(timestep) or (timestep.device.type == "cpu" and timestep.numel() == 1):
            expected = self._call_timesteps[index]
            if not abs(float(timestep) - expected) <= self._rounding(timestep):
                raise ValueError(
                    f"`timestep`={float(timestep)} is out of order: call {index} of this trajectory is at {expected}."
                )
        self._step_index = index

        dtype = torch.promote_types(sample.dtype, torch.float32)
        state, self._state = self._state, None
        if state is None or state.shape != sample.shape or state.device != sample.device:
            return *divmod(index, self.order), sample.to(dtype)
        # What the caller has changed is the caller's; the rest is what it was before it was rounded.
        is_ours = sample == state.to(self._returned_dtype)
        return *divmod(index, self.order), torch.where(is_ours, state, sample.to(dtype))

    def _end_call(self, state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Advances by one call and returns the sample for the caller."""
        self._step_index += 1
        if dtype != state.dtype:
            self._state, self._returned_dtype = state, dtype
        return state.to(dtype)

    def _convert(self, model_output: torch.Tensor, sample: torch.Tensor, index: int, target: str) -> torch.Tensor:
        """The prediction of call `index` as a `target` of [`FlowMatchPath.convert`]."""
        source = self.config.prediction_type
        if source == "velocity" and self.config.invert_sigmas:
            model_output = -model_output
        sigma = self._flip_time(self.sigmas[index].item())
        return self.path.convert(model_output.to(sample.dtype), sample, sigma, source, target)


class FlowMatchODEScheduler(_FlowMatchScheduler):
    r"""
    Integrates the probability flow ODE dx/dsigma = v(x, sigma) of a flow-matching model
    ([arXiv 2210.02747](https://huggingface.co/papers/2210.02747)) from noise to data.

    Convention, as in diffusers: sigma = 1 is noise and sigma = 0 is data, `timestep = num_train_timesteps * sigma` as
    a float, and on the default path `x = (1 - sigma) * sample + sigma * noise` the model predicts the velocity
    `noise - sample`.

    The default grid of N steps is sigma = 1, 1 - 1/N, ..., 1/N and ends exactly at 0. `shift` moves it once, to
    shift * sigma / (1 + (shift - 1) * sigma) ([arXiv 2403.03206](https://huggingface.co/papers/2403.03206), eq. 23).
    `timesteps` has one entry a model call, so `len(timesteps)` is the number of function evaluations (NFE); `sigmas` has
    the same entries, and the end.

    | `solver` | order | model calls for N steps |
    |---|---|---|
    | `"euler"` | 1 | N |
    | `"heun"` ([arXiv 2206.00364](https://huggingface.co/papers/2206.00364), algorithm 1) | 2 | 2N - 1, the last step is Euler's; 2N where the grid ends above 0 |
    | `"midpoint"` | 2 | 2N |
    | `"rk4"`: Kutta's 3/8 rule, as in torchdiffeq | 4 | 4N - 1, the last step is Heun's third-order rule; 4N where the grid ends above 0 |
    | `"ab2"`, `"ab3"`: Adams-Bashforth with variable steps | 2, 3 | N |
    | `"abm3"`: Adams-Bashforth, each step corrected (Adams-Moulton) by the prediction at its end | 3 | N |
    | `"multistep"`: exponential, on predictions of the data | `solver_order` | N |

    The model is never asked at sigma = 0: a last step that ends there takes a rule of one order less, which does not
    lower the order of the trajectory.

    "multistep" interpolates the predictions of the data by a polynomial in sigma and integrates
    d(x / b) = data d(a / b) exactly, as the exponential integrators of
    [arXiv 2204.13902](https://huggingface.co/papers/2204.13902) do; in reverse, d(x / a) = noise d(b / a).
    The multistep methods start at order 1. While fewer predictions than their order are there, each new one also
    corrects the steps before it, by the integral of the better polynomial over them: orders 2 and 3 hold from the
    first step on without additional calls.

    Between the calls the state keeps the precision that rounding to the dtype of the model takes from what `step`
    returns, at least float32. Where the caller changes the sample between two steps, the change counts.

    Args:
        num_train_timesteps (`int`, defaults to `1000`): the timestep that stands for sigma = 1.
        shift (`float`, defaults to `1.0`): factor above 0 of the timestep shift; above 1, more steps near the noise.
        use_dynamic_shifting (`bool`, defaults to `False`):
            Shift by `mu`, which the caller derives from the resolution and gives to `set_timesteps`, instead of
            `shift`.
        base_shift (`float`, defaults to `0.5`): `mu` at `base_image_seq_len`; read by pipelines only.
        max_shift (`float`, defaults to `1.15`): `mu` at `max_image_seq_len`; read by pipelines only.
        base_image_seq_len (`int`, defaults to `256`): tokens of the smallest image; read by pipelines only.
        max_image_seq_len (`int`, defaults to `4096`): tokens of the largest image; read by pipelines only.
        time_shift_type (`str`, defaults to `"exponential"`): `"exponential"` or `"linear"`, how `mu` acts.
        solver (`str`, defaults to `"euler"`): a solver of the table.
        path (`str`, defaults to `"linear"`): `"linear"`, `"gvp"` or `"vp"`, see [`FlowMatchPath`].
        solver_order (`int`, defaults to `2`): order of "multistep", 2 or 3.
        prediction_type (`str`, defaults to `"velocity"`):
            What the model predicts: `"velocity"`, `"epsilon"` (the noise), `"score"` or `"sample"` (the data). From
            noise or score at sigma = 1 of "linear" and "gvp" no velocity follows, so such a grid starts at 0.999 where
            it would start at 1. Near there the velocity has the error of the prediction times 1 / a: prefer "velocity".
        sigma_min (`float`, *optional*):
            Where the grid ends, in [0, 1). None stands for 0, on every path: only a call at sigma = 0 would need more.
        shift_terminal (`float`, *optional*): stretches the shifted grid such that its last step starts here.
        use_karras_sigmas (`bool`, defaults to `False`): Karras spacing between the ends of the shifted grid.
        use_exponential_sigmas (`bool`, defaults to `False`): the same with even steps of log(sigma).
        use_beta_sigmas (`bool`, defaults to `False`): the same with quantiles of Beta(0.6, 0.6); needs scipy.
        invert_sigmas (`bool`, defaults to `False`):
            For models of the opposite convention: they are given num_train_timesteps * (1 - sigma) and predict
            `sample - noise`. `sigmas` and `timesteps` then hold 1 - sigma and rise.

    Raises:
        `ValueError`: on an unknown solver, path, prediction or shift type, and on a value out of its range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
        solver: str = "euler",
        path: str = "linear",
        solver_order: int = 2,
        prediction_type: str = "velocity",
        sigma_min: float | None = None,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        invert_sigmas: bool = False,
    ):
        _check_choice("solver_order", solver_order, (2, 3))
        self._setup(ODE_SOLVERS)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
        reverse: bool = False,
    ) -> None:
        """
        Sets the grid of the next trajectory, by the number of steps, `sigmas` or `timesteps`; the number may be
        repeated beside the others.

        Args:
            num_inference_steps (`int`, *optional*): steps on the default grid.
            device (`str` or `torch.device`, *optional*): where `timesteps` go. `sigmas` stay on the CPU.
            sigmas (`list[float]`, *optional*):
                The noise levels before the shift, strictly decreasing in (0, 1], without the final 0, which is
                appended.
            mu (`float`, *optional*):
                Amount of the resolution-dependent shift. Needed with `use_dynamic_shifting`; without it, it changes
                nothing, since the pipelines of diffusers pass it to every scheduler.
            timesteps (`list[float]`, *optional*):
                Strictly decreasing in (0, num_train_timesteps], without the final 0. Taken as they are: never shifted.
                Beside `sigmas`, as CogView4 gives them, the times that the model is told at the shifted sigmas; for
                solvers of one call a step.
            reverse (`bool`, defaults to `False`):
                Go from data to noise on the same grid: the noise that a picture comes from. The model is asked at
                sigma = 0 then; where no velocity is known there ("vp", or a model that predicts the data), the grid
                starts at `sigma_min` or 0.001.

        Raises:
            `ValueError`: on a grid that is empty, out of range or not decreasing, or whose parts do not agree.
        """
        self._reverse = reverse
        self._set_grid(num_inference_steps, device, sigmas, mu, timesteps, reverse)

    def _can_reach_data(self, reverse: bool) -> bool:
        """Whether sigma = 0 can be an end of the grid: in reverse, the model is asked there."""
        return not reverse or (self.config.path != "vp" and self.config.prediction_type != "sample")

    def _final_rule(self, rule: tuple, end: float) -> tuple:
        return FINAL_STEP.get(self.config.solver, rule) if end == 0 else rule

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        per_token_timesteps: torch.Tensor | None = None,
    ) -> FlowMatchODESchedulerOutput | tuple[torch.Tensor]:
        """
        Takes the result of one model call and returns the input of the next.

        Args:
            model_output (`torch.Tensor`): what the model predicts at `timestep` and `sample`.
            timestep (`float` or `torch.Tensor`):
                The entry of `timesteps` of this call. It finds the first call where no `begin_index` is set, which
                reads it once from its device, and is checked at the others if it is on the CPU.
            sample (`torch.Tensor` with the shape of `model_output`): the model's input.
            generator (`torch.Generator`, *optional*): not used; the ODE draws nothing.
            return_dict (`bool`, defaults to `True`): return a `FlowMatchODESchedulerOutput` instead of a tuple.
            per_token_timesteps (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                A time for each token of a sample of shape `(batch_size, num_tokens, channels)`, which goes on to the
                next lower sigma of the grid, by "euler" only. As in diffusers' scheduler, `model_output` is the
                negative velocity here, and the result is not rounded.

        Returns:
            [`FlowMatchODESchedulerOutput`] or a tuple that holds `prev_sample`, in the dtype of `model_output`;
            computed in float32, or float64 where `sample` is.

        Raises:
            `ValueError`: before `set_timesteps`, after the last call, and for a `timestep` that is not on the grid or
                out of order.
        """
        step, stage, sample = self._begin_call(timestep, sample)
        if per_token_timesteps is not None:
            prev_sample = self._end_call(self._step_per_token(model_output, sample, per_token_timesteps), sample.dtype)
            return FlowMatchODESchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

        if self.config.solver == "multistep":
            target = "epsilon" if self._reverse else "sample"
            prediction = self._convert(model_output, sample, self._step_index, target)
        elif self.config.prediction_type == "velocity":
            prediction = model_output.to(sample.dtype)
        else:
            prediction = self._convert(model_output, sample, self._step_index, "velocity")
            prediction = -prediction if self.config.invert_sigmas else prediction

        start, *_, end = self.sigmas[step * self.order : (step + 1) * self.order + 1].tolist()
        if self.config.solver in RUNGE_KUTTA:
            if stage == 0:
                self._start, self._history = sample, []
            self._history.append(prediction)
            state, weights = self._start, [(end - start) * weight for weight in self._rules[step][stage]]
            if stage == len(self._rules[step]) - 1:
                self._start = None
        else:
            order, corrects = ADAMS.get(self.config.solver, (self.config.solver_order, False))
            self._history = [*self._history, prediction][-(order + corrects) :]
            scale, weights = self._multistep_weights(order, corrects, end)
            state = sample if scale == 1 else scale * sample
        for weight, prediction in zip(weights, self._history, strict=True):
            if weight != 0:
                state = state + weight * prediction
        prev_sample = self._end_call(state, model_output.dtype)
        return FlowMatchODESchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _multistep_weights(self, order: int, corrects: bool, end: float) -> tuple[float, list[float]]:
        """`scale` and `weights` such that x(end) = scale * x + sum of weights * history."""
        nodes = self.sigmas[: self._step_index + 1][-len(self._history) :].tolist()
        now, start = nodes[-1], nodes[-1]
        if self._step_index - self._first_index < order:
            start = nodes[0]  # all predictions so far are at hand: integrate anew from the first on
        elif corrects:
            start = nodes[-2]
        scale = self._flow_factor(end) / self._flow_factor(now)
        weights = np.zeros(len(nodes))
        weights[-order:] = self._integral(nodes[-order:], start, end)
        if start != now:  # what x has of it already, by the polynomial of the last step
            weights[:-1][-order:] -= scale * self._integral(nodes[:-1][-order:], start, now)
        return scale, weights.tolist()

    def _flow_factor(self, sigma: float) -> float:
        """x divided by this changes by the integral of the predictions alone."""
        if self.config.solver in ADAMS:
            return 1.0
        coefficients = self.path.coefficients(self._flip_time(sigma))
        return (coefficients.a if self._reverse else coefficients.b).item()

    def _integral(self, nodes: list[float], start: float, end: float) -> np.ndarray:
        """
        The weights of predictions at `nodes` in the change of x from `start` to `end` that they make.

        With u from 0 to 1 between the two, the weights integrate the powers of u exactly. For "multistep" the
        integral is f(end) * integral of u^k d(g / f), with f = b and g = a, in reverse the other way round; by parts,
        nothing in it is infinite where f(end) = 0.
        """
        powers = np.arange(len(nodes))
        if self.config.solver in ADAMS:
            moments = (end - start) / (powers + 1)
        else:
            sigmas = torch.tensor([start, end, *(start + (end - start) * _NODES)], dtype=torch.float64)
            c = self.path.coefficients(self._flip_time(sigmas))
            f, g = (c.a.numpy(), c.b.numpy()) if self._reverse else (c.b.numpy(), c.a.numpy())
            moments = np.full(len(nodes), g[1])
            moments[0] -= f[1] * g[0] / f[0]
            for k in powers[1:]:
                moments[k] -= f[1] * k * np.sum(_WEIGHTS * _NODES ** (k - 1) * g[2:] / f[2:])
        u = (np.array(nodes) - start) / (end - start)
        return np.linalg.solve(u ** powers[:, None], moments)

    def _step_per_token(
        self, model_output: torch.Tensor, sample: torch.Tensor, per_token_timesteps: torch.Tensor
    ) -> torch.Tensor:
        if (self.config.solver, self.config.prediction_type) != ("euler", "velocity") or self._reverse:
            raise ValueError(
                "`per_token_timesteps` works with `solver`='euler' and `prediction_type`='velocity', from noise to "
                f"data. The config has {self.config.solver!r} and {self.config.prediction_type!r}."
            )
        current = per_token_timesteps / self.config.num_train_timesteps
        sigmas = self.sigmas.to(sample.device)[:, None, None]
        following = (sigmas * (sigmas < current[None] - 1e-6)).amax(dim=0)
        return sample + (current - following)[..., None] * model_output


class FlowMatchSDEScheduler(_FlowMatchScheduler):
    r"""
    Integrates the reverse-time SDE of a flow-matching model from noise to data: the flow of
    [`FlowMatchODEScheduler`], and noise that is drawn and removed on the way
    ([SiT](https://huggingface.co/papers/2401.08740), eq. 4 and table 1),

    dx = (-v + D score) ds + sqrt(2 D) dW as sigma falls by ds, with D(sigma) >= 0 by `diffusion_form`:

    | `diffusion_form` | D, with n = `diffusion_norm` |
    |---|---|
    | `"constant"` | n |
    | `"sigma"` | n b(sigma) |
    | `"linear"` | n sigma |
    | `"decreasing"` | (1 - n cos(pi sigma))^2 / 4, with n = 1 from 1 at the noise to 0 |
    | `"increasing-decreasing"` | n sin(pi sigma)^2 |
    | `"sbdm"` | n (b b' - b^2 a' / a): the diffusion whose forward process has no drift but x a' / a |

    Every D >= 0 has the same distributions at all sigma. In a step of size h it is held to at most b^2 / h, since more
    would take away more noise than there is: "sbdm" near the noise, where its D has no bound, "constant" near the data.

    A pipeline that gives `step` no generator, as those of Stable Diffusion 3 and Flux, draws from torch's global one.

    The grid of N steps runs from 1 ("sbdm" on "linear" and "gvp": 0.999) to `last_step_size`, from where one last step
    without noise goes to sigma = 0. `timesteps` has one entry a model call, as with the ODE: N for `solver` "euler"
    (Euler-Maruyama), 2N - 1 (with `last_step` "none", 2N) for "heun" (the trapezoidal rule with the noise of the step
    in its second stage: weak order 2).

    Args:
        num_train_timesteps (`int`, defaults to `1000`): as in [`FlowMatchODEScheduler`].
        shift (`float`, defaults to `1.0`): as in [`FlowMatchODEScheduler`].
        use_dynamic_shifting (`bool`, defaults to `False`): as in [`FlowMatchODEScheduler`].
        base_shift (`float`, defaults to `0.5`): as in [`FlowMatchODEScheduler`].
        max_shift (`float`, defaults to `1.15`): as in [`FlowMatchODEScheduler`].
        base_image_seq_len (`int`, defaults to `256`): as in [`FlowMatchODEScheduler`].
        max_image_seq_len (`int`, defaults to `4096`): as in [`FlowMatchODEScheduler`].
        time_shift_type (`str`, defaults to `"exponential"`): as in [`FlowMatchODEScheduler`].
        solver (`str`, defaults to `"euler"`): `"euler"` or `"heun"`.
        path (`str`, defaults to `"linear"`): `"linear"`, `"gvp"` or `"vp"`, see [`FlowMatchPath`].
        prediction_type (`str`, defaults to `"velocity"`): as in [`FlowMatchODEScheduler`].
        diffusion_form (`str`, defaults to `"sigma"`): a form of the table.
        diffusion_norm (`float`, defaults to `1.0`): at least 0; 0 leaves the ODE, but for "decreasing".
        last_step (`str`, defaults to `"mean"`):
            The step to the end of the grid: `"mean"` is the step of the SDE without its noise, which takes away too
            much where D is not small; `"euler"` is that of the ODE; `"tweedie"` is the mean of the data given x, and at
            `sigma_min` has its noise. `"none"` has all N steps with noise and ends at `sigma_min`, or 0.001.
        last_step_size (`float`, defaults to `0.04`):
            Where the last step of the default grid starts, after the shift, in (0, 1). A grid of the caller's own has
            it at its last entry.
        sigma_min (`float`, *optional*): where the grid ends, in [0, 1). None stands for 0, with `"none"` for 0.001.
        shift_terminal (`float`, *optional*): as in [`FlowMatchODEScheduler`], instead of `last_step_size`.
        use_karras_sigmas (`bool`, defaults to `False`): as in [`FlowMatchODEScheduler`].
        use_exponential_sigmas (`bool`, defaults to `False`): as in [`FlowMatchODEScheduler`].
        use_beta_sigmas (`bool`, defaults to `False`): as in [`FlowMatchODEScheduler`].
        invert_sigmas (`bool`, defaults to `False`): as in [`FlowMatchODEScheduler`].

    Raises:
        `ValueError`: on an unknown solver, one of the ODE's among them, path, prediction, diffusion form or last step,
            and on a value out of its range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
        solver: str = "euler",
        path: str = "linear",
        prediction_type: str = "velocity",
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float = 0.04,
        sigma_min: float | None = None,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        invert_sigmas: bool = False,
    ):
        if solver in ODE_SOLVERS and solver not in SDE_SOLVERS:
            raise ValueError(
                f"`solver`={solver!r} draws no noise: it is a solver of FlowMatchODEScheduler. Use one of "
                f"{', '.join(map(repr, SDE_SOLVERS))} here, by `from_config(config, solver='euler')` if the config is "
                "another scheduler's."
            )
        _check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        _check_choice("last_step", last_step, LAST_STEPS)
        if not diffusion_norm >= 0:
            raise ValueError(f"`diffusion_norm`={diffusion_norm} must be at least 0.")
        if not 0 < last_step_size < 1:
            raise ValueError(
                f"`last_step_size`={last_step_size} must be in (0, 1). For no last step, `last_step`='none'."
            )
        self._setup(SDE_SOLVERS)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
        reverse: bool = False,
    ) -> None:
        """
        Sets the grid of the next trajectory, as [`FlowMatchODEScheduler.set_timesteps`].

        Args:
            num_inference_steps (`int`, *optional*): steps on the default grid, the last step among them.
            device (`str` or `torch.device`, *optional*): where `timesteps` go. `sigmas` stay on the CPU.
            sigmas (`list[float]`, *optional*): as in [`FlowMatchODEScheduler.set_timesteps`].
            mu (`float`, *optional*): as in [`FlowMatchODEScheduler.set_timesteps`].
            timesteps (`list[float]`, *optional*): as in [`FlowMatchODEScheduler.set_timesteps`].
            reverse (`bool`, defaults to `False`): only of the ODE.

        Raises:
            `ValueError`: on a grid that is empty, out of range or not decreasing, or whose parts do not agree.
        """
        if reverse:
            raise ValueError(
                "`reverse`=True is for FlowMatchODEScheduler: the SDE goes from noise to data. Use that scheduler, "
                "or `scale_noise`, which goes the other way at once."
            )
        self._set_grid(num_inference_steps, device, sigmas, mu, timesteps)

    def _default_grid(self, num_steps: int, mu: float | None) -> np.ndarray:
        if self.config.last_step == "none":
            return super()._default_grid(num_steps, mu)
        return np.linspace(1, self._unshift(self.config.last_step_size, mu), num_steps)

    def _can_start_at_noise(self) -> bool:
        return super()._can_start_at_noise() and (self.config.diffusion_form != "sbdm" or self.config.path == "vp")

    def _can_reach_data(self, reverse: bool) -> bool:
        return self.config.last_step != "none"

    def _final_rule(self, rule: tuple, end: float) -> tuple:
        return rule if self.config.last_step == "none" else RUNGE_KUTTA["euler"]

    def _diffusion(self, sigma: float, size: float) -> float:
        """D at a noise level, for a step of a size."""
        c, norm, form = self.path.coefficients(sigma), self.config.diffusion_norm, self.config.diffusion_form
        if form == "decreasing":
            diffusion = (1 - norm * math.cos(math.pi * sigma)) ** 2 / 4
        elif form == "increasing-decreasing":
            diffusion = norm * math.sin(math.pi * sigma) ** 2
        elif form == "sbdm":
            diffusion = norm * (c.b_db - c.b**2 * c.da / c.a).item()
        else:
            diffusion = norm * {"constant": 1.0, "sigma": c.b.item(), "linear": sigma}[form]
        return min(diffusion, c.b.item() ** 2 / size)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple[torch.Tensor]:
        """
        Takes the result of one model call and returns the input of the next.

        Args:
            model_output (`torch.Tensor`): what the model predicts at `timestep` and `sample`.
            timestep (`float` or `torch.Tensor`): as in [`FlowMatchODEScheduler.step`].
            sample (`torch.Tensor` with the shape of `model_output`): the model's input.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Draws the noise; a list has one for all or one for each sample of the batch.
            return_dict (`bool`, defaults to `True`): return a `FlowMatchSDESchedulerOutput` instead of a tuple.

        Returns:
            [`FlowMatchSDESchedulerOutput`] or a tuple that holds `prev_sample`, in the dtype of `model_output`;
            computed in float32, or float64 where `sample` is.

        Raises:
            `ValueError`: before `set_timesteps`, after the last call, for a `timestep` that is not on the grid or
                out of order, and for a list of generators of another length.
        """
        if isinstance(generator, list) and len(generator) not in (1, len(sample)):
            raise ValueError(
                f"`generator` has {len(generator)} entries for {len(sample)} samples. Give one, or one for each sample."
            )
        step, stage, sample = self._begin_call(timestep, sample)
        ends = self.sigmas[step * self.order : (step + 1) * self.order + 1].tolist()
        start, end = self._flip_time(ends[0]), self._flip_time(ends[-1])
        size = start - end
        velocity = self._convert(model_output, sample, self._step_index, "velocity")
        last_step = self.config.last_step if step == self.num_inference_steps - 1 else "none"
        if last_step == "tweedie":
            data = self._convert(model_output, sample, self._step_index, "sample")
            noise = self._convert(model_output, sample, self._step_index, "epsilon")
            state = self.path.interpolate(data, noise, end)
        elif last_step == "euler":
            state = sample - size * velocity
        else:
            diffusion = self._diffusion(end if stage else start, size)
            drift = diffusion * self._convert(model_output, sample, self._step_index, "score") - velocity
            if stage == 1:
                first_state, first_drift, noise = self._start
                state, self._start = first_state + size / 2 * (first_drift + drift) + noise, None
            else:
                state = sample + size * drift
                if last_step == "none":
                    if self.config.solver == "heun":  # the noise of both ends, for weak order 2
                        diffusion = (diffusion + self._diffusion(end, size)) / 2
                    noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                    noise = math.sqrt(2 * diffusion * size) * noise
                    self._start = (sample, drift, noise) if self.config.solver == "heun" else None
                    state = state + noise
        prev_sample = self._end_call(state, model_output.dtype)
        return FlowMatchSDESchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
