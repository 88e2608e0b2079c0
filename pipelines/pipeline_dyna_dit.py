# SPDX-License-Identifier: Apache-2.0
"""Images from a dynamic diffusion transformer, on latents or on pixels, unconditional or conditioned on a class."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch

from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import retrieve_timesteps
from diffusers.utils import BaseOutput, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

# For type hints only: a published copy goes without the package.
from diffusers_dyna.models.transformer_dyna_dit import DynaDiTTransformer2DModel


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_dyna import DynaDiTPipeline

        >>> pipe = DynaDiTPipeline.from_pretrained("outputs/dit/model")
        >>> generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        >>> output = pipe([3, 7], guidance_scale=2.0, generator=generator, output_compute_ratio=True)
        >>> output.images[0].save("three.png")
        >>> print(f"{output.compute_ratio:.0%} of the complete model's compute")
        ```
"""


@dataclass
class DynaDiTPipelineOutput(BaseOutput):
    """
    Output of [`DynaDiTPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): one entry per image, as `output_type` says.
        compute_ratio (`float`, *optional*):
            Multiply-accumulates of the transformer's blocks over those of the complete model, the mean of all images
            and model calls, those of the null class included. `None` unless it was asked for.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    compute_ratio: float | None = None


class DynaDiTPipeline(DiffusionPipeline):
    r"""
    Pipeline for images drawn by a [`DynaDiTTransformer2DModel`], unconditional or class-conditional, on the latents of
    a VAE or on pixels.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]):
            Predicts the velocity (flow matching) or the noise (DDPM), and with `learn_sigma` the variance too.
        scheduler ([`~diffusers.SchedulerMixin`]):
            The scheduler that the transformer was trained for, or another of its kind: [`FlowMatchODEScheduler`] and
            diffusers' flow-matching schedulers for a velocity, `DDPMScheduler`, `DDIMScheduler`,
            `DPMSolverMultistepScheduler` and their relatives for the noise.
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            Decodes the latents that the transformer draws. `None` where it draws pixels, in [-1, 1].
        id2label (`dict[int, str]`, *optional*):
            Name of each class, saved with the pipeline. Several names of one class are separated by commas.

    Raises:
        `ValueError`: if the latents of `vae` have another number of channels than the transformer.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: DynaDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        if vae is not None and vae.config.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"`vae` has latents of {vae.config.latent_channels} channels, but `transformer` takes "
                f"{transformer.config.in_channels}. Use the VAE that the transformer was trained with."
            )
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        # JSON has string keys only; they are written as such, so that a saved pipeline equals the one in memory.
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()} if id2label is not None else None)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

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
    def attention_kwargs(self) -> dict | None:
        return self._attention_kwargs

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
        num_classes = self.transformer.config.num_classes
        labels_by_name: dict[str, list[int]] = {}
        for class_label, names in (self.id2label or {}).items():
            for name in {names, *(name.strip() for name in names.split(","))}:
                labels_by_name.setdefault(name, []).append(class_label)

        label_ids = []
        for entry in label if isinstance(label, (list, tuple)) else [label]:
            if isinstance(entry, str):
                if entry not in labels_by_name:
                    raise ValueError(
                        f"`class_labels` has the unknown class name {entry!r}. {self._close_names(entry, labels_by_name)}"
                    )
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

    @staticmethod
    def _close_names(name: str, known_names: list[str]) -> str:
        if not known_names:
            return "The pipeline knows no names (no `id2label`): give the label."
        by_folded = {known.casefold(): known for known in known_names}
        close = [by_folded[folded] for folded in difflib.get_close_matches(name.casefold(), by_folded, n=5)]
        if not close:
            return "No name in `id2label` is close to it."
        return f"Close names: {', '.join(map(repr, close))}."

    def check_inputs(
        self,
        class_labels,
        height: int,
        width: int,
        num_inference_steps: int | None,
        timesteps: list[float] | None,
        sigmas: list[float] | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float] | None,
        guidance_channels: int | None,
        num_images_per_prompt: int,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        """Raises a `ValueError` that names the argument for everything a call cannot work with."""
        if self.transformer.training:
            raise ValueError(
                "`transformer` is in training mode, in which it drops labels and computes everything. Call "
                "`pipe.transformer.eval()` first."
            )
        config = self.transformer.config
        factor = config.patch_size * self.vae_scale_factor
        if height % factor or width % factor or height < 1 or width < 1:
            raise ValueError(
                f"`height` and `width` must be positive and divisible by {factor} (`patch_size` "
                f"{config.patch_size} x scale factor {self.vae_scale_factor} of the VAE), but are {height} and {width}."
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

        null_class_label = self.transformer.null_class_label
        if class_labels is not None and config.num_classes is None:
            raise ValueError(
                "`class_labels` were given, but the transformer is unconditional (`num_classes` is None)."
            )
        if class_labels is None and config.num_classes is not None and null_class_label is None:
            raise ValueError(
                f"`class_labels` must be given: the transformer has {config.num_classes} classes and no null class."
            )
        if guidance_scale > 1 and (class_labels is None or null_class_label is None):
            raise ValueError(
                f"`guidance_scale`={guidance_scale} needs `class_labels` and a transformer trained with a null class "
                "(`class_dropout_prob` above 0). Use `guidance_scale=1`."
            )
        if guidance_interval is not None and not (
            len(guidance_interval) == 2 and 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(
                f"`guidance_interval`={guidance_interval} must be two noise levels in [0, 1], the lower one first."
            )
        if guidance_channels is not None and guidance_channels not in range(1, config.in_channels + 1):
            raise ValueError(
                f"`guidance_channels`={guidance_channels} must be a number of channels from 1 to {config.in_channels}. "
                "Use None for all."
            )

        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type`={output_type!r} must be 'pil', 'np', 'pt' or 'latent'.")
        if output_type == "pil" and self.vae is None and config.in_channels not in (1, 3):
            raise ValueError(
                f"`output_type`='pil' needs 1 or 3 channels, but the transformer draws {config.in_channels} and the "
                "pipeline has no `vae` that decodes them. Give it one, or use 'latent'."
            )
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but only "
                f"{self._callback_tensor_inputs} can be passed on."
            )

        learned_variance = self._learned_variance()
        if learned_variance and self.transformer.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"The scheduler has `variance_type`={learned_variance!r}, but the transformer predicts no variance "
                "(`learn_sigma` is False). Use a scheduler with a fixed variance."
            )
        # diffusers' multistep solvers cut what they are given to three channels under a learned variance.
        if learned_variance and hasattr(self.scheduler, "convert_model_output") and config.in_channels != 3:
            raise ValueError(
                f"{type(self.scheduler).__name__} takes a learned variance with 3 channels only, but the transformer "
                f"has {config.in_channels}. It makes no use of the variance: load it by "
                "`from_config(config, variance_type=None)`."
            )

    def _learned_variance(self) -> str | None:
        """The `variance_type` of a scheduler that expects the variance from the model, else None."""
        # A scheduler made from the config of another keeps keys that it does not know.
        if "variance_type" not in inspect.signature(type(self.scheduler).__init__).parameters:
            return None
        variance_type = self.scheduler.config.variance_type
        return variance_type if variance_type in ("learned", "learned_range") else None

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
        The noise that a trajectory starts from, in float32 whatever the dtype of the transformer: the state is kept in
        full precision, and rounding does not add up over the steps.

        Args:
            batch_size (`int`): number of images.
            height (`int`): of the image, in pixels.
            width (`int`): of the image, in pixels.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                With a list, an image depends on its own generator only and not on the batch it is in.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                Standard normal noise to use instead of drawing it.
            device (`torch.device`): where the transformer runs.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, float32, scaled for the
            scheduler.

        Raises:
            `ValueError`: on a list of generators or on latents that do not fit the batch.
        """
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
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

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents by the VAE.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`):
                Latents, scaled by `vae.config.scaling_factor`. Without a VAE, the image itself.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`, float32, about [-1, 1].
        """
        if self.vae is None:
            return latents
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

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
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        complete_model: bool = False,
        width_mult: float | None = None,
        max_plan_bytes: int = 2**30,
        attention_kwargs: dict | None = None,
        output_type: str = "pil",
        output_compute_ratio: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DynaDiTPipelineOutput | tuple:
        r"""
        Draws images.

        Args:
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What to draw, as labels or as names of `id2label`. `None` draws without a class.
            height (`int`, *optional*): height of the image in pixels; `None` is that of the transformer's `sample_size`.
            width (`int`, *optional*): width of the image in pixels; `None` is that of the transformer's `sample_size`.
            num_inference_steps (`int`, defaults to `50`): steps of the scheduler.
            timesteps (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `timesteps`.
            sigmas (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `sigmas`.
            guidance_scale (`float`, defaults to `1.0`):
                Classifier-free guidance ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)):
                null + scale * (class - null). 1 and below is off; on, a step evaluates the transformer on both halves.
            guidance_interval (`tuple[float, float]`, *optional*):
                Noise levels, `timestep / num_train_timesteps` in [0, 1] with 1 the noise, from the lowest to the highest
                at which to guide ([arXiv 2404.07724](https://huggingface.co/papers/2404.07724)). The steps outside cost
                half as much. `None` guides at all.
            guidance_channels (`int`, *optional*):
                Number of leading channels to guide; the others are those of the class. `None` guides all. The published
                samples of DiT and SiT have 3.
            num_images_per_prompt (`int`, defaults to `1`): images for each entry of `class_labels`.
            eta (`float`, defaults to `0.0`): the noise of `DDIMScheduler`, in [0, 1]; ignored by others.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the images reproducible. A list has one for each image.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                Standard normal noise to start from, instead of drawing it.
            complete_model (`bool`, defaults to `False`):
                Run every head, channel group and token: the static model.
            width_mult (`float`, *optional*):
                Width of the transformer in (0, 1] for this call. `None` leaves the width that it has.
            max_plan_bytes (`int`, defaults to `2**30`):
                Memory for what the transformer prepares for the call, see its `prepare_timesteps`.
            attention_kwargs (`dict`, *optional*): passed on to the transformer; `scale` is the weight of a LoRA.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (float in [0, 1], channels last), `"pt"` (float in [0, 1], channels first) or
                `"latent"` (the transformer's own range, neither decoded nor clipped).
            output_compute_ratio (`bool`, defaults to `False`):
                Also return which share of the complete model's compute the run took.
            return_dict (`bool`, defaults to `True`): return a [`DynaDiTPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, tensors)`, may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors that the callback gets.

        Examples:

        Returns:
            [`DynaDiTPipelineOutput`] or a tuple of the images and, with `output_compute_ratio`, the ratio.

        Raises:
            `ValueError`, `TypeError`: on an argument that does not fit the model.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]

        # 1. Check inputs
        sample_size = self.transformer.config.sample_size
        default_height, default_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        height = default_height * self.vae_scale_factor if height is None else height
        width = default_width * self.vae_scale_factor if width is None else width
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
            guidance_interval,
            guidance_channels,
            num_images_per_prompt,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        num_inference_steps = int(num_inference_steps) if num_inference_steps is not None else None
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        self._current_timestep = None
        device = self._execution_device

        # 2. Labels; the null class goes last, in the same call of the transformer
        null_class_label = self.transformer.null_class_label
        label_ids = guided_label_ids = None
        batch_size = num_images_per_prompt
        if class_labels is not None:
            label_ids = [i for i in self.get_label_ids(class_labels) for _ in range(num_images_per_prompt)]
            batch_size = len(label_ids)
            if batch_size == 0:
                raise ValueError("`class_labels` is empty. Give at least one label.")
        elif null_class_label is not None:
            label_ids = [null_class_label] * batch_size
        if label_ids is not None:
            label_ids = torch.tensor(label_ids, device=device)
        if self.do_classifier_free_guidance:
            guided_label_ids = torch.cat([label_ids, torch.full_like(label_ids, null_class_label)])

        # 3. Time grid. The default grid of FlowMatchEulerDiscreteScheduler spends its last step near sigma = 0 and
        # shifts twice there; the even grid that it is given instead is the one our own scheduler makes.
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) and timesteps is None and sigmas is None:
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        self._num_timesteps = len(timesteps)
        num_inference_steps = -(-len(timesteps) // self.scheduler.order)  # with a grid of the user's, its own number
        # In float32 whatever the dtype of the transformer: bfloat16 has no 745.3.
        model_timesteps = timesteps.to(torch.float32)
        lowest, highest = guidance_interval or (0.0, 1.0)
        noise_levels = [time / self.scheduler.config.num_train_timesteps for time in model_timesteps.tolist()]
        guided = [self.do_classifier_free_guidance and lowest <= level <= highest for level in noise_levels]

        # 4. Noise
        latents = self.prepare_latents(batch_size, height, width, generator, latents, device)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 5. Loop
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        num_channels = self.transformer.config.in_channels
        learned_variance = self._learned_variance()
        compute_ratios = []
        width_before = self.transformer.width_mult
        try:
            if width_mult is not None:
                self.transformer.set_width(width_mult)
            if not complete_model:
                plan_labels = guided_label_ids if any(guided) else label_ids
                self.transformer.prepare_timesteps(
                    model_timesteps, class_labels=plan_labels, max_plan_bytes=max_plan_bytes
                )

            with self.progress_bar(total=num_inference_steps) as progress_bar:
                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    self._current_timestep = t

                    model_input = latents
                    if hasattr(self.scheduler, "scale_model_input"):
                        model_input = self.scheduler.scale_model_input(model_input, t)
                    model_input = model_input.to(self.transformer.dtype)
                    if guided[i]:
                        model_input = torch.cat([model_input, model_input])
                    if not complete_model:
                        self.transformer.set_plan_step(i)
                    # What a feature cache holds is of no use to another run, nor to a batch with another half.
                    if i == 0 or guided[i] != guided[i - 1]:
                        self.transformer._reset_stateful_cache()
                    with self.transformer.cache_context("cond_uncond" if guided[i] else "cond"):
                        output = self.transformer(
                            model_input,
                            model_timesteps[i],
                            class_labels=guided_label_ids if guided[i] else label_ids,
                            complete_model=complete_model,
                            output_masks=output_compute_ratio,
                            attention_kwargs=attention_kwargs,
                        )
                    if output_compute_ratio:
                        compute_ratios.append(output.compute_ratio)

                    model_output = output.sample.float()
                    if guided[i]:
                        model_output, unconditional = model_output.chunk(2)
                        conditional = model_output[:, : guidance_channels or num_channels]
                        unconditional = unconditional[:, : conditional.shape[1]]
                        guided_output = unconditional + guidance_scale * (conditional - unconditional)
                        model_output = torch.cat([guided_output, model_output[:, conditional.shape[1] :]], dim=1)
                    if not learned_variance:
                        model_output = model_output[:, :num_channels]

                    latents = self.scheduler.step(model_output, t, latents, **extra_step_kwargs, return_dict=False)[0]

                    if callback_on_step_end is not None:
                        callback_kwargs = {}
                        for name in callback_on_step_end_tensor_inputs:
                            callback_kwargs[name] = locals()[name]
                        callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                        latents = (callback_outputs or {}).pop("latents", latents)

                    if i == len(timesteps) - 1 or (i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                        progress_bar.update()
        finally:
            if not complete_model:
                self.transformer.set_plan_step(None)
                self.transformer.clear_plan()
            if width_mult is not None:
                self.transformer.set_width(width_before)
        self._current_timestep = None

        # 6. Images
        image = latents if output_type == "latent" else self.decode_latents(latents)
        image = self.image_processor.postprocess(image, output_type=output_type)
        compute_ratio = torch.cat(compute_ratios).mean().item() if output_compute_ratio else None
        self.maybe_free_model_hooks()

        if not return_dict:
            return (image, compute_ratio) if output_compute_ratio else (image,)
        return DynaDiTPipelineOutput(images=image, compute_ratio=compute_ratio)
