# SPDX-License-Identifier: Apache-2.0
"""Images from a dynamic diffusion transformer that reads text, on latents or on pixels."""

from collections.abc import Callable

import numpy as np
import torch

from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# For type hints only: a published copy goes without the package.
from diffusers_dyna.models.transformer_dyna_dit import DynaDiTTransformer2DModel

from .pipeline_dyna_dit_base import DynaDiTPipelineBase, DynaDiTPipelineOutput


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_dyna import DynaDiTTextToImagePipeline

        >>> pipe = DynaDiTTextToImagePipeline.from_pretrained("outputs/text-digits")
        >>> generator = torch.Generator().manual_seed(0)
        >>> output = pipe("3", guidance_scale=2.0, generator=generator, output_compute_ratio=True)
        >>> output.images[0].save("three.png")
        >>> print(f"{output.compute_ratio:.0%} of the complete model's compute")
        ```
"""


class DynaDiTTextToImagePipeline(DynaDiTPipelineBase):
    r"""
    Pipeline for text-to-image generation by a [`DynaDiTTransformer2DModel`] that takes text, on the latents
    of a VAE or on pixels. LoRA weights are loaded by `load_lora_weights` and saved by `save_lora_weights`.

    Its `guidance_scale` is 4.5 by default, as in diffusers' PixArt and Sana pipelines. Those of the family that also take
    transformers without a null condition are not guided unless asked to.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]):
            Predicts the velocity (flow matching) or the noise (DDPM), and with `learn_sigma` the variance too.
        scheduler ([`~diffusers.SchedulerMixin`]):
            The scheduler that the transformer was trained for, or another of its kind; see [`DynaDiTPipeline`].
        text_encoder ([`~transformers.PreTrainedModel`]):
            The text encoder that the transformer was trained with, such as `CLIPTextModel`, `T5EncoderModel` or
            `BertModel`: its last hidden states are read. `None` where prompts come as `prompt_embeds`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of `text_encoder`.
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            Decodes the latents that the transformer draws. `None` where it draws pixels, in [-1, 1].
        id2label (`dict[int, str]`, *optional*):
            Name of each class of a transformer that has classes too, saved with the pipeline. Several names of one class
            are separated by commas.

    Raises:
        `ValueError`: if the transformer was made for another task, if the hidden states of `text_encoder` have another
            width than the text that it reads, or the latents of `vae` another number of channels.
        `TypeError`: on a `text_encoder` that has a decoder too, and on a `vae` whose scale factor is not known.
    """

    _optional_components = ["text_encoder", "tokenizer", "vae"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: DynaDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self._register(
            "text-to-image",
            id2label,
            transformer=transformer,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
        )

    def check_inputs(
        self,
        *,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_inference_steps: int | None,
        timesteps: list[float] | None,
        sigmas: list[float] | None,
        guidance_scale: float,
        guidance_rescale: float,
        guidance_interval: tuple[float, float] | None,
        guidance_channels: int | None,
        num_images_per_prompt: int,
        eta: float,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        max_sequence_length: int | None,
        class_labels,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument for everything a call cannot work with."""
        self.check_common_inputs(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self.check_conditions(
            guidance_scale,
            class_labels,
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            max_sequence_length,
        )

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray | None = None,
        complete_model: bool = False,
        width_mult: float | None = None,
        max_plan_bytes: int = 2**30,
        output_compute_ratio: bool = False,
    ) -> DynaDiTPipelineOutput | tuple:
        r"""
        Draws images.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw. Without it and `prompt_embeds`, the learned null caption stands, and `guidance_scale` has to
                be 1 unless there are `class_labels`.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from, one text or as many as prompts. `None` guides away from the learned null
                caption. Only with guidance.
            num_inference_steps (`int`, defaults to `50`): steps of the scheduler.
            timesteps (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `timesteps`.
            sigmas (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `sigmas`.
            guidance_scale (`float`, defaults to `4.5`):
                Classifier-free guidance ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)):
                null + scale * (text - null). 1 and below is off; on, a step evaluates the transformer on both halves. It
                needs a transformer trained with a null caption, or a `negative_prompt`.
            num_images_per_prompt (`int`, defaults to `1`): images for each prompt or label.
            height (`int`, *optional*): height of the image in pixels; `None` is that of the transformer's `sample_size`.
            width (`int`, *optional*): width of the image in pixels; `None` is that of the transformer's `sample_size`.
            eta (`float`, defaults to `0.0`): the noise of `DDIMScheduler`, in [0, 1]; ignored by others.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the images reproducible. A list has one for each image.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                Standard normal noise to start from, instead of drawing it.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states in the place of `prompt`, see [`encode_prompt`].
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                True, or 1, for the tokens of `prompt_embeds` that count; `None` is all.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states in the place of `negative_prompt`.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                True, or 1, for the tokens of `negative_prompt_embeds` that count; `None` is all.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (float in [0, 1], channels last), `"pt"` (float in [0, 1], channels first) or
                `"latent"` (the transformer's own range, neither decoded nor clipped).
            return_dict (`bool`, defaults to `True`): return a [`DynaDiTPipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*): passed on to the transformer; `scale` is the weight of a LoRA.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step, with a solver of order 2 and more after
                each call of the transformer, which `step` counts; may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors that the callback gets, of `"latents"`, `"prompt_embeds"` and `"negative_prompt_embeds"`.
            max_sequence_length (`int`, *optional*):
                Most tokens of a prompt; the rest is cut off, with a warning. `None` is what the tokenizer and the text
                encoder take.
            guidance_rescale (`float`, defaults to `0.0`):
                How far to bring the standard deviation of a guided prediction back to that of the text's, in [0, 1]
                ([arXiv 2305.08891](https://huggingface.co/papers/2305.08891), equations 15 and 16).
            guidance_interval (`tuple[float, float]`, *optional*):
                Noise levels, `timestep / num_train_timesteps` in [0, 1] with 1 the noise, from the lowest to the highest
                at which to guide ([arXiv 2404.07724](https://huggingface.co/papers/2404.07724)). The steps outside cost
                half as much. `None` guides at all.
            guidance_channels (`int`, *optional*):
                Number of leading channels to guide; the others are those of the text. `None` guides all.
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What to draw, for a transformer that has classes too, as labels or as names of `id2label`: one for all, or
                one for each prompt. `None` is the null class.
            complete_model (`bool`, defaults to `False`):
                Run every head, channel group and token: the static model.
            width_mult (`float`, *optional*):
                Width of the transformer in (0, 1] for this call. `None` leaves the width that it has.
            max_plan_bytes (`int`, defaults to `2**30`):
                Memory for what the transformer prepares for the call, see its `prepare_timesteps`.
            output_compute_ratio (`bool`, defaults to `False`):
                Also return which share of the complete model's compute the run took.

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
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            class_labels=class_labels,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        num_inference_steps = int(num_inference_steps) if num_inference_steps is not None else None
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._begin_run(guidance_scale, guidance_rescale, attention_kwargs)
        device = self._execution_device

        # 2. Text and labels, time grid, noise
        batch_size = self.get_batch_size(class_labels=class_labels, prompt=prompt, prompt_embeds=prompt_embeds)
        conditions = self.prepare_conditions(
            batch_size,
            num_images_per_prompt,
            device,
            class_labels,
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            max_sequence_length,
        )
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
