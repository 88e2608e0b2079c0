# SPDX-License-Identifier: Apache-2.0
"""Flow-matching schedulers, in one file that also works when copied alone into a Hub repository."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


PATHS = ("linear",)
# What a config of diffusers' flow-matching schedulers can ask for and these do not do: an error, not another picture.
UNSUPPORTED_KEYS = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
# Model calls of one step. Only the last step of a multi-stage solver may use fewer: see `FlowMatchODEScheduler`.
SOLVER_STAGES = {"euler": 1, "heun": 2}


@dataclass
class FlowMatchODESchedulerOutput(BaseOutput):
    """
    Output of [`FlowMatchODEScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` with the shape of the sample): the model input of the next call.
    """

    prev_sample: torch.Tensor


class FlowMatchODEScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Integrates the probability flow ODE dx/dsigma = v(x, sigma) of a flow-matching model
    ([arXiv 2210.02747](https://huggingface.co/papers/2210.02747)) from noise to data.

    Convention, as in diffusers: sigma = 1 is noise and sigma = 0 is data, `timestep = num_train_timesteps * sigma` as
    a float, `x = (1 - sigma) * sample + sigma * noise`, and the model predicts the velocity `noise - sample`.

    The default grid of N steps is sigma = 1, 1 - 1/N, ..., 1/N and ends exactly at 0. `shift` moves it once, to
    shift * sigma / (1 + (shift - 1) * sigma) ([arXiv 2403.03206](https://huggingface.co/papers/2403.03206), eq. 23).
    `timesteps` has one entry a model call, so `len(timesteps)` is the number of function evaluations (NFE).

    | `solver` | order | model calls for N steps |
    |---|---|---|
    | `"euler"` | 1 | N |
    | `"heun"` ([arXiv 2206.00364](https://huggingface.co/papers/2206.00364), algorithm 1) | 2 | 2N - 1; the last step is Euler's, so that the model is never asked at sigma = 0 |

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
        solver (`str`, defaults to `"euler"`): `"euler"` or `"heun"`.
        path (`str`, defaults to `"linear"`): `"linear"`.

    Raises:
        `ValueError`: on an unknown solver, path or shift type, and on a shift that is not positive.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    order = 1

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
    ):
        if solver not in SOLVER_STAGES:
            raise ValueError(f"`solver`={solver!r} is unknown. Use one of {', '.join(map(repr, SOLVER_STAGES))}.")
        if path not in PATHS:
            raise ValueError(f"`path`={path!r} is unknown. Use one of {', '.join(map(repr, PATHS))}.")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"`time_shift_type`={time_shift_type!r} is unknown. Use 'exponential' or 'linear'.")
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps`={num_train_timesteps} must be at least 1.")
        self.set_shift(shift)

        self.order = SOLVER_STAGES[solver]
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._begin_index = None
        self._reset_steps()

        sigmas = np.linspace(1, 0, num_train_timesteps + 1, dtype=np.float32)[:-1]
        if not use_dynamic_shifting:
            sigmas = self._apply_shift(sigmas, mu=None)
        self.sigmas = torch.from_numpy(np.append(sigmas, np.float32(0)))
        self.timesteps = self.sigmas[:-1] * num_train_timesteps

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

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """
        Sets the grid of the next trajectory. Exactly one of the number of steps, `sigmas` and `timesteps` defines it;
        the number may be repeated beside one of the others.

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

        Raises:
            `ValueError`: on a grid that is empty, out of range, not decreasing, or given twice, and on a config from
                another scheduler that asks for what this one does not do.
        """
        unsupported = [name for name in UNSUPPORTED_KEYS if self.config.get(name)]
        if unsupported:
            raise ValueError(
                f"The config that this scheduler was made from sets {', '.join(f'`{name}`' for name in unsupported)}, "
                f"which {type(self).__name__} does not have. Do without it by `from_config({{**config, "
                f"{unsupported[0]!r}: None}})`, or keep the other scheduler."
            )
        if not self.config.use_dynamic_shifting:
            mu = None
        elif mu is None and timesteps is None:
            raise ValueError("`mu` must be given where `use_dynamic_shifting` is True.")
        elif mu is not None and not mu > 0 and self.config.time_shift_type == "linear":
            raise ValueError(f"`mu`={mu} must be above 0 where `time_shift_type` is 'linear'.")
        if sigmas is not None and timesteps is not None:
            raise ValueError("`sigmas` and `timesteps` both define the grid. Give one of them.")

        if sigmas is not None:
            grid = self._check_grid("sigmas", sigmas, 1, num_inference_steps)
            grid = self._apply_shift(grid, mu)
        elif timesteps is not None:
            maximum = self.config.num_train_timesteps
            grid = self._check_grid("timesteps", timesteps, maximum, num_inference_steps) / np.float32(maximum)
        else:
            if num_inference_steps is None or int(num_inference_steps) != num_inference_steps:
                raise ValueError(f"`num_inference_steps`={num_inference_steps} must be a whole number of steps.")
            if num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps`={num_inference_steps} must be at least 1.")
            grid = np.linspace(1, 1 / num_inference_steps, int(num_inference_steps)).astype(np.float32)
            grid = self._apply_shift(grid, mu)

        self.num_inference_steps = len(grid)
        self.sigmas = torch.from_numpy(np.append(grid, np.float32(0)))
        timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        if self.config.solver == "heun":
            # t0 | t1 t1 | t2 t2 | ...: each step's second stage is at the next step's first.
            timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        self.timesteps = timesteps.to(device)
        self._begin_index = None
        self._reset_steps()

    def _reset_steps(self) -> None:
        self._step_index = None
        self._step_start = None  # sample and velocity at the start of a step, between its stages

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

    # The forward process

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The point (1 - sigma) * sample + sigma * noise on the path.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): data.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                Any time in [0, num_train_timesteps], on the grid or off it.
            noise (`torch.Tensor` with the shape of `sample`): standard normal noise.

        Returns:
            `torch.Tensor` with the shape and dtype of `sample`.
        """
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        if timestep.ndim > 1 or (timestep.ndim == 1 and len(timestep) not in (1, len(sample))):
            raise ValueError(
                f"`timestep` must be one time or one per sample, shape ({len(sample)},), but has shape "
                f"{tuple(timestep.shape)}."
            )
        sigma = (timestep / self.config.num_train_timesteps).reshape(-1, *[1] * (sample.ndim - 1))
        return ((1 - sigma) * sample + sigma * noise).to(sample.dtype)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """[`scale_noise`] under the name and argument order of the other schedulers of diffusers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What a model learns to predict at `timesteps`: the velocity dx/dsigma of the path, `noise - sample`."""
        return noise - sample

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: the model takes the state as it is."""
        return sample

    # The reverse process

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """
        The index into `timesteps` at which a trajectory that starts at `timestep` begins.

        Args:
            timestep (`float` or `torch.Tensor` of shape `()`): in [0, num_train_timesteps].
            schedule_timesteps (`torch.Tensor` of shape `(num_calls,)`, *optional*): a grid instead of `timesteps`.

        Returns:
            `int`: the index of a first stage.

        Raises:
            `ValueError`: if no entry of the grid is within 0.4 %, twice what rounding to bfloat16 moves it.
        """
        schedule = (self.timesteps if schedule_timesteps is None else schedule_timesteps).cpu().double()
        timestep = float(timestep)
        distance = (schedule - timestep).abs()
        if not distance.min() <= 0.004 * abs(timestep):
            raise ValueError(
                f"`timestep`={timestep} is not on the grid {schedule.tolist()}. Pass an entry of `timesteps`, or call "
                "`set_begin_index`."
            )
        # Where two stages share a time, a trajectory begins with the later one, the first stage of its step.
        return int((distance == distance.min()).nonzero()[-1])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMatchODESchedulerOutput | tuple[torch.Tensor]:
        """
        Takes the result of one model call and returns the input of the next.

        Args:
            model_output (`torch.Tensor`): the velocity that the model predicts at `timestep` and `sample`.
            timestep (`float` or `torch.Tensor`):
                The entry of `timesteps` of this call. Read at the first call only, where no `begin_index` is set.
            sample (`torch.Tensor` with the shape of `model_output`): the model's input.
            generator (`torch.Generator`, *optional*): not used; the ODE draws nothing.
            return_dict (`bool`, defaults to `True`): return a `FlowMatchODESchedulerOutput` instead of a tuple.

        Returns:
            [`FlowMatchODESchedulerOutput`] or a tuple that holds `prev_sample`, in the dtype of `model_output`;
            computed in float32.

        Raises:
            `ValueError`: before `set_timesteps`, after the last call, and for a `timestep` that is not on the grid.
        """
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is not set. Call `set_timesteps` before `step`.")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        if self._step_index >= len(self.timesteps):
            raise ValueError(
                f"All {len(self.timesteps)} calls of this trajectory are done. Call `set_timesteps` to start another."
            )

        step, stage = divmod(self._step_index, self.order)
        sample, velocity = sample.float(), model_output.float()
        if stage == 0:
            self._step_start = (sample, velocity) if self.order > 1 else None
        elif self._step_start is None:
            raise ValueError(
                f"A trajectory cannot begin at index {self._step_index}, inside a step: it must be a multiple of "
                f"`order`={self.order}."
            )
        else:  # Heun: from the start of the step again, with the mean of the velocities at its two ends
            sample, first_velocity = self._step_start
            velocity = (first_velocity + velocity) / 2
        step_size = self.sigmas[step + 1] - self.sigmas[step]
        prev_sample = (sample + step_size * velocity).to(model_output.dtype)

        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchODESchedulerOutput(prev_sample=prev_sample)
