# SPDX-License-Identifier: Apache-2.0
"""Images from a dynamic diffusion transformer, on latents or on pixels, unconditional or conditioned on a class."""

from collections.abc import Callable

import numpy as np
import torch

from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring

# For type hints only: a published copy goes without the package.
from diffusers_dyna.models.transformer_dyna_dit import DynaDiTTransformer2DModel

from .pipeline_dyna_dit_base import DynaDiTPipelineBase, DynaDiTPipelineOutput


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_dyna import DynaDiTPipeline

        >>> pipe = DynaDiTPipeline.from_pretrained("outputs/dit-0.6")
        >>> generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        >>> output = pipe([3, 7], guidance_scale=2.0, generator=generator, output_compute_ratio=True)
        >>> output.images[0].save("three.png")
        >>> print(f"{output.compute_ratio:.0%} of the complete model's compute")
        ```
"""


class DynaDiTPipeline(DynaDiTPipelineBase):
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
        `TypeError`: on a `vae` whose scale factor is not known.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: DynaDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self._register("generate", id2label, transformer=transformer, scheduler=scheduler, vae=vae)

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
        self.check_common_inputs(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self.check_conditions(guidance_scale, class_labels)

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
                Called as `callback(pipe, step, timestep, tensors)` after each step, with a solver of order 2 and more after
                each call of the transformer, which `step` counts; may return changed tensors.
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
        height, width = self.default_size(height, width)
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
        self._begin_run(guidance_scale, attention_kwargs=attention_kwargs)
        device = self._execution_device

        # 2. Labels, time grid, noise
        batch_size = self.get_batch_size(class_labels=class_labels)
        conditions = self.prepare_conditions(batch_size, num_images_per_prompt, device, class_labels)
        timesteps = self.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        latents = self.prepare_latents(batch_size * num_images_per_prompt, height, width, generator, latents, device)

        # 3. Loop
        latents, compute_ratio = self.denoise(
            timesteps,
            latents,
            conditions,
            generator=generator,
            eta=eta,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            complete_model=complete_model,
            width_mult=width_mult,
            max_plan_bytes=max_plan_bytes,
            output_compute_ratio=output_compute_ratio,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 4. Images
        images = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, compute_ratio) if output_compute_ratio else (images,)
        return DynaDiTPipelineOutput(images=images, compute_ratio=compute_ratio)
