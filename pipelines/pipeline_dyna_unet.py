# SPDX-License-Identifier: Apache-2.0
"""Images from a U-Net on pixels, unconditional or conditioned on a class."""

import inspect
import math
import numbers
from collections.abc import Callable

import numpy as np
import torch

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import retrieve_timesteps
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

# For type hints only: a published copy goes without the package.
from diffusers_dyna.models.unet_dyna_2d import DynaUNet2DModel


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_dyna import DynaUNetPipeline

        >>> pipe = DynaUNetPipeline.from_pretrained("outputs/demo/model")
        >>> generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
        >>> images = pipe(["0", "1", 2], guidance_scale=2.0, num_inference_steps=20, generator=generator).images
        >>> images[0].save("zero.png")
        ```
"""


class DynaUNetPipeline(DiffusionPipeline):
    r"""
    Pipeline for images drawn by a [`DynaUNet2DModel`], unconditional or class-conditional, in pixel space.

    Args:
        unet ([`DynaUNet2DModel`]): predicts the velocity (flow matching) or the noise (DDPM).
        scheduler ([`~diffusers.SchedulerMixin`]):
            The scheduler that the U-Net was trained for, or another of its kind: [`FlowMatchODEScheduler`] and
            diffusers' flow-matching schedulers for a velocity, `DDPMScheduler`, `DDIMScheduler`,
            `DPMSolverMultistepScheduler` and their relatives for the noise.
        id2label (`dict[int, str]`, *optional*):
            Name of each class, saved with the pipeline. Several names of one class are separated by commas.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: DynaUNet2DModel, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        # JSON has string keys only; they are written as such, so that a saved pipeline equals the one in memory.
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()} if id2label is not None else None)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def id2label(self) -> dict[int, str] | None:
        """Name of each class, by label."""
        names = self.config.id2label
        return {int(label): name for label, name in names.items()} if names is not None else None

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(self, label: int | str | list[int | str]) -> list[int]:
        """
        Maps class names to labels; labels are returned as they are.

        Args:
            label (`int`, `str` or a list of them): labels, or names as in `id2label`.

        Returns:
            `list[int]`: one label per entry.

        Raises:
            `ValueError`: on a label out of range, an unknown name, or a name that several classes share.
        """
        num_classes = self.unet.config.num_classes
        labels_by_name: dict[str, list[int]] = {}
        for class_label, names in (self.id2label or {}).items():
            for name in {names, *(name.strip() for name in names.split(","))}:
                labels_by_name.setdefault(name, []).append(class_label)

        label_ids = []
        for entry in label if isinstance(label, (list, tuple)) else [label]:
            if isinstance(entry, str):
                if entry not in labels_by_name:
                    known = ", ".join(map(repr, self.id2label.values())) if self.id2label else "none (no `id2label`)"
                    raise ValueError(f"`class_labels` has the unknown class name {entry!r}. Known names: {known}.")
                if len(labels_by_name[entry]) > 1:
                    raise ValueError(
                        f"`class_labels` has the name {entry!r}, which the classes {labels_by_name[entry]} share. "
                        "Give the label instead."
                    )
                entry = labels_by_name[entry][0]
            if not isinstance(entry, (int, np.integer)) or isinstance(entry, bool):
                raise TypeError(f"`class_labels` must hold labels or names, but has {entry!r} ({type(entry)}).")
            if not 0 <= entry < num_classes:
                raise ValueError(
                    f"`class_labels` has the label {entry}, but the model has {num_classes} classes: use 0 to "
                    f"{num_classes - 1}."
                )
            label_ids.append(int(entry))
        return label_ids

    def check_inputs(
        self,
        class_labels,
        height: int,
        width: int,
        num_inference_steps: int | None,
        timesteps: list[float] | None,
        sigmas: list[float] | None,
        guidance_scale: float,
        num_images_per_prompt: int,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        """Raises a `ValueError` that names the argument for everything a call cannot work with."""
        factor = 2 ** (len(self.unet.config.channel_mults) - 1)
        if height % factor or width % factor or height < 1 or width < 1:
            raise ValueError(
                f"`height` and `width` must be positive and divisible by {factor}, but are {height} and {width}."
            )
        if num_inference_steps is None:
            has_steps = timesteps is not None or sigmas is not None
        else:
            has_steps = int(num_inference_steps) == num_inference_steps and num_inference_steps >= 1
        if not has_steps:
            raise ValueError(f"`num_inference_steps`={num_inference_steps} must be a whole number, at least 1.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta`={eta} must be in [0, 1].")
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt`={num_images_per_prompt} must be at least 1.")
        if class_labels is not None and self.unet.config.num_classes is None:
            raise ValueError("`class_labels` were given, but the U-Net is unconditional (`num_classes` is None).")
        if class_labels is None and self.unet.config.num_classes is not None and self.unet.null_class_label is None:
            raise ValueError(
                f"`class_labels` must be given: the U-Net has {self.unet.config.num_classes} classes and no null class."
            )
        # nan is not above 1 and would turn guidance off
        if not isinstance(guidance_scale, numbers.Real) or not math.isfinite(guidance_scale):
            raise ValueError(
                f"`guidance_scale`={guidance_scale!r} must be a finite number. Use `guidance_scale=1` for no guidance."
            )
        if guidance_scale > 1 and (class_labels is None or self.unet.null_class_label is None):
            raise ValueError(
                f"`guidance_scale`={guidance_scale} needs `class_labels` and a U-Net trained with a null class "
                "(`class_dropout_prob` above 0). Use `guidance_scale=1`."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type`={output_type!r} must be 'pil', 'np', 'pt' or 'latent'.")
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but only "
                f"{self._callback_tensor_inputs} can be passed on."
            )

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """
        The noise that a trajectory starts from, in float32 whatever the dtype of the U-Net: the state is kept in full
        precision, and rounding does not add up over the steps.

        Args:
            batch_size (`int`): number of images.
            height (`int`): in pixels.
            width (`int`): in pixels.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                With a list, an image depends on its own generator only and not on the batch it is in.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to use instead of drawing it.
            device (`torch.device`): where the U-Net runs.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, height, width)`, float32, scaled for the scheduler.

        Raises:
            `ValueError`: on a list of generators or on latents that do not fit the batch.
        """
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {batch_size} images are to be drawn.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, but has shape {tuple(latents.shape)}.")
        else:
            latents = latents.to(device=device, dtype=torch.float32)
        # FlowMatchEulerDiscreteScheduler has no `init_noise_sigma`: its noise has unit variance.
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict:
        """The optional arguments of `step` that this scheduler takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        extra_step_kwargs = {}
        if "generator" in accepted:
            extra_step_kwargs["generator"] = generator
        if "eta" in accepted:
            extra_step_kwargs["eta"] = eta
        return extra_step_kwargs

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draws images.

        Args:
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What to draw, as labels or as names of `id2label`. `None` draws without a class.
            height (`int`, *optional*): height in pixels; `None` is the U-Net's `sample_size`.
            width (`int`, *optional*): width in pixels; `None` is the U-Net's `sample_size`.
            num_inference_steps (`int`, defaults to `50`): steps of the scheduler.
            timesteps (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `timesteps`.
            sigmas (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `sigmas`.
            guidance_scale (`float`, defaults to `1.0`):
                Classifier-free guidance ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)):
                null + scale * (class - null). 1 and below is off; on, every step evaluates the U-Net on both halves.
            num_images_per_prompt (`int`, defaults to `1`): images for each entry of `class_labels`.
            eta (`float`, defaults to `0.0`): the noise of `DDIMScheduler`, in [0, 1]; ignored by others.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the images reproducible. A list has one for each image.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to start from, instead of drawing it.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (float in [0, 1], channels last), `"pt"` (float in [0, 1], channels first) or
                `"latent"` (the U-Net's own range, about [-1, 1], not clipped).
            return_dict (`bool`, defaults to `True`): return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step, with a solver of order 2 and more after
                each call of the U-Net, which `step` counts; may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors that the callback gets.

        Examples:

        Returns:
            [`~diffusers.ImagePipelineOutput`] or a tuple whose first element is the images.

        Raises:
            `ValueError`, `TypeError`: on an argument that does not fit the model.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]

        # 1. Check inputs
        sample_size = self.unet.config.sample_size
        default_height, default_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        height = default_height if height is None else height
        width = default_width if width is None else width
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        self.check_inputs(
            class_labels,
            height,
            width,
            num_inference_steps,
            timesteps,
            sigmas,
            guidance_scale,
            num_images_per_prompt,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        num_inference_steps = int(num_inference_steps) if num_inference_steps is not None else None
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._guidance_scale = guidance_scale
        self._interrupt = False
        self._current_timestep = None
        device = self._execution_device

        # 2. Labels; the null class goes last, in the same call of the U-Net
        batch_size = num_images_per_prompt
        label_ids = None
        if class_labels is not None:
            label_ids = [i for i in self.get_label_ids(class_labels) for _ in range(num_images_per_prompt)]
            batch_size = len(label_ids)
            if batch_size == 0:
                raise ValueError("`class_labels` is empty. Give at least one label.")
            null_labels = [self.unet.null_class_label] * batch_size if self.do_classifier_free_guidance else []
            label_ids = torch.tensor(label_ids + null_labels, device=device)

        # 3. Time grid. The default grid of FlowMatchEulerDiscreteScheduler spends its last step near sigma = 0 and
        # shifts twice there; the even grid that it is given instead is the one our own scheduler makes.
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) and timesteps is None and sigmas is None:
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        self._num_timesteps = len(timesteps)
        num_inference_steps = -(-len(timesteps) // self.scheduler.order)  # with a grid of the user's, its own number

        # 4. Noise
        latents = self.prepare_latents(batch_size, height, width, generator, latents, device)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 5. Loop
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t

                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(model_input, t)
                model_input = model_input.to(self.unet.dtype)
                if self.do_classifier_free_guidance:
                    model_input = torch.cat([model_input, model_input])

                labels = None if label_ids is None else label_ids[: len(model_input)]
                model_output = self.unet(model_input, t, class_labels=labels, return_dict=False)[0].float()
                if self.do_classifier_free_guidance:
                    conditional, unconditional = model_output.chunk(2)
                    model_output = unconditional + self.guidance_scale * (conditional - unconditional)

                latents = self.scheduler.step(model_output, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = (callback_outputs or {}).pop("latents", latents)

                if i == len(timesteps) - 1 or (i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
        self._current_timestep = None

        # 6. Images
        image = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)
