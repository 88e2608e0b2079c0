# SPDX-License-Identifier: Apache-2.0
"""Images from images: changed by noise, edited by inversion, or drawn in the style of a reference."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# For type hints only: a published copy goes without the package.
from diffusers_dyna.models.transformer_dyna_dit import DynaDiTTransformer2DModel

from .pipeline_dyna_dit_base import DynaDiTConditions, DynaDiTPipelineBase, DynaDiTPipelineOutput


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from diffusers_dyna import DynaDiTImg2ImgPipeline

        >>> pipe = DynaDiTImg2ImgPipeline.from_pretrained("outputs/dit-0.6")
        >>> photo = Image.open("photo.png")
        >>> three = pipe(class_labels=3, style_image=photo).images[0]  # a 3 in the style of a picture
        >>> eight = pipe(image=three, strength=0.7, class_labels=8, source_class_labels=3).images[0]  # edited to an 8
        ```
"""

ImageInput = (
    PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]
)


class DynaDiTImg2ImgPipeline(DynaDiTPipelineBase):
    r"""
    Pipeline for images from images by a [`DynaDiTTransformer2DModel`], unconditional, conditioned on a class, a text or
    both, on the latents of a VAE or on pixels. Three ways, which go together:

    - `image` and `strength`: the image is noised, and denoised under `class_labels` or `prompt`
      ([SDEdit](https://huggingface.co/papers/2108.01073)).
    - `source_class_labels` or `source_prompt`: the noise is the one that the image comes from. The ODE is run from data
      to noise under the class or text of the image ([`invert`]), and then back under another one. What the two have in
      common stays.
    - `style_image`: the reference is inverted, and while the images are drawn, their self-attention also attends to the
      reference at the same noise level, with normalised queries and keys
      ([StyleAligned](https://huggingface.co/papers/2312.02133)).

    Args:
        transformer ([`DynaDiTTransformer2DModel`]):
            Predicts the velocity (flow matching) or the noise (DDPM), and with `learn_sigma` the variance too.
        scheduler ([`~diffusers.SchedulerMixin`]):
            The scheduler that the transformer was trained for, or another of its kind; see [`DynaDiTPipeline`].
            Inversion and style need [`FlowMatchODEScheduler`].
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            Encodes images, and decodes the latents that the transformer draws. `None` where it draws pixels, in [-1, 1].
        text_encoder ([`~transformers.PreTrainedModel`], *optional*):
            Text encoder of a transformer that takes text; see [`DynaDiTTextToImagePipeline`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer of `text_encoder`.
        id2label (`dict[int, str]`, *optional*):
            Name of each class, saved with the pipeline. Several names of one class are separated by commas.

    Raises:
        `ValueError`: if the transformer was made for another task, if the hidden states of `text_encoder` have another
            width than the text that it reads, or the latents of `vae` another number of channels.
        `TypeError`: on a `text_encoder` that has a decoder too, and on a `vae` whose scale factor is not known.
    """

    _optional_components = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: DynaDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self._register(
            "generate|text-to-image",
            id2label,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )

    def check_inputs(
        self,
        *,
        prompt: str | list[str] | None,
        image: ImageInput | None,
        strength: float,
        class_labels,
        negative_prompt: str | list[str] | None,
        source_prompt: str | list[str] | None,
        source_class_labels,
        style_image: ImageInput | None,
        style_strength: float,
        style_prompt: str | list[str] | None,
        style_class_labels,
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
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        max_sequence_length: int | None,
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
        for name, value in (("strength", strength), ("style_strength", style_strength)):
            self.check_number(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}`={value} must be in [0, 1].")
        self.check_text("source_prompt", source_prompt)
        self.check_text("style_prompt", style_prompt)
        self.check_tensor("latents", latents)
        has_source = source_class_labels is not None or source_prompt is not None
        if image is None and style_image is None:
            raise ValueError("`image` must be given, or a `style_image` to draw an image from noise in its style.")
        if image is None and has_source:
            raise ValueError("`source_class_labels` or `source_prompt` tells what `image` shows, which was not given.")
        if has_source and latents is not None:
            raise ValueError(
                "`latents` were given beside `source_class_labels` or `source_prompt`, with which the noise is that of "
                "the inversion. Give one of them."
            )
        if style_image is None and (style_class_labels is not None or style_prompt is not None):
            raise ValueError(
                "`style_class_labels` or `style_prompt` tells what `style_image` shows, which was not given."
            )
        others = []
        if has_source:
            self._check_inversion("`source_class_labels` or `source_prompt`")
            others.append(("source", source_class_labels, source_prompt))
        if style_image is not None:
            self._check_inversion("`style_image`")
            others.append(("style", style_class_labels, style_prompt))
        for name, labels, text in others:
            try:
                self.check_conditions(1.0, labels, text)
            except (TypeError, ValueError) as error:
                raise type(error)(f"`{name}_class_labels` or `{name}_prompt`: {error}") from error

    def _check_inversion(self, what: str) -> None:
        # by name, since a published copy of this file goes without the class
        if "FlowMatchODEScheduler" not in [cls.__name__ for cls in type(self.scheduler).__mro__]:
            raise ValueError(
                f"{what} needs a scheduler that goes from data to noise, but the pipeline has "
                f"{type(self.scheduler).__name__}. For a model trained by flow matching, set `pipe.scheduler = "
                "FlowMatchODEScheduler.from_config(pipe.scheduler.config)`."
            )

    @torch.no_grad()
    def invert(
        self,
        image: ImageInput,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray | None = None,
        strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        complete_model: bool = False,
        width_mult: float | None = None,
        max_plan_bytes: int = 2**30,
        attention_kwargs: dict | None = None,
    ) -> torch.Tensor:
        r"""
        The noise that images come from: the ODE of the scheduler from data to noise, under the images' own class or
        text and without guidance. Drawn from it by the same steps, the images come back, the closer the more steps
        there are. Of `strength` 1, it goes into `latents` of this pipeline, with `strength` 1, or of
        [`DynaDiTPipeline`] and [`DynaDiTTextToImagePipeline`].

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): images, see [`preprocess_image`].
            prompt (`str` or `list[str]`, *optional*): what the images show, one text or one for each image.
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What the images show, one label or one for each image. `None` is the null class.
            strength (`float`, defaults to `1.0`):
                How far to go, in [0, 1]: to the noise level at which a call with this `strength` begins. 0 stays at the
                images.
            height (`int`, *optional*): height of the image in pixels; `None` is that of the transformer's `sample_size`.
            width (`int`, *optional*): width of the image in pixels; `None` is that of the transformer's `sample_size`.
            num_inference_steps (`int`, defaults to `50`): steps of the scheduler from data to pure noise.
            timesteps (`list[float]`, *optional*): grid of the way back, falling, as [`__call__`] takes it.
            sigmas (`list[float]`, *optional*): grid of the way back, falling, as [`__call__`] takes it.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states in the place of `prompt`, see [`encode_prompt`].
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                True, or 1, for the tokens of `prompt_embeds` that count; `None` is all.
            max_sequence_length (`int`, *optional*): most tokens of a prompt.
            complete_model (`bool`, defaults to `False`):
                Run every head, channel group and token: the static model.
            width_mult (`float`, *optional*):
                Width of the transformer in (0, 1] for this call. `None` leaves the width that it has.
            max_plan_bytes (`int`, defaults to `2**30`):
                Memory for what the transformer prepares for the call, see its `prepare_timesteps`.
            attention_kwargs (`dict`, *optional*): passed on to the transformer; `scale` is the weight of a LoRA.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`: latents at the noise level
            that was reached, float32.

        Raises:
            `ValueError`, `TypeError`: on an argument that does not fit the model, and with a scheduler that does not go
                from data to noise.
        """
        height, width = self.default_size(height, width)
        self.check_common_inputs(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_interval=None,
            guidance_channels=None,
            num_images_per_prompt=1,
            eta=0.0,
            output_type="latent",
            callback_on_step_end_tensor_inputs=None,
        )
        self.check_conditions(
            1.0,
            class_labels,
            prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )
        self.check_number("strength", strength)
        if not 0 <= strength <= 1:
            raise ValueError(f"`strength`={strength} must be in [0, 1].")
        self._check_inversion("`invert`")
        image = self.preprocess_image(image, height, width)
        batch_size = self.get_batch_size(
            image=image, class_labels=class_labels, prompt=prompt, prompt_embeds=prompt_embeds
        )
        self._begin_run(1.0, attention_kwargs=attention_kwargs)
        conditions = self.prepare_conditions(
            batch_size,
            1,
            self._execution_device,
            class_labels,
            prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )
        _, states = self._invert(
            image,
            conditions,
            batch_size,
            strength,
            (int(num_inference_steps) if num_inference_steps is not None else None, timesteps, sigmas),
            complete_model=complete_model,
            width_mult=width_mult,
            max_plan_bytes=max_plan_bytes,
        )
        self.maybe_free_model_hooks()
        return states[-1]

    def preprocess_image(self, image: ImageInput, height: int, width: int, name: str = "image") -> torch.Tensor:
        """
        Images of any kind as one batch of one size.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                Images, see [`read_image`], also of several sizes; or, as one tensor, latents of the VAE.
            height (`int`): height in pixels to resize to.
            width (`int`): width in pixels to resize to.
            name (`str`, defaults to `"image"`): name of the argument, for messages.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`, float32, in [-1, 1]; latents as they are.

        Raises:
            `TypeError`: on something else than images.
            `ValueError`: on a wrong number of channels, on values outside [0, 1] and on latents of another size.
        """
        channels = self.transformer.config.in_channels
        if self.vae is not None and torch.is_tensor(image) and image.ndim == 4:
            if image.shape[1] == channels != self.vae.config.in_channels:
                size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
                if image.shape[2:] != size:
                    raise ValueError(
                        f"`{name}` is latents of height and width {tuple(image.shape[2:])}, but for `height`={height} and "
                        f"`width`={width} they must have {size}."
                    )
                return image.float()
        return self.image_processor.normalize(self.read_image(image, name, size=(height, width)))

    def _encode(self, image: torch.Tensor) -> torch.Tensor:
        """What [`preprocess_image`] returned as latents, the mode of the VAE's posterior."""
        if self.vae is not None and image.shape[1] != self.vae.config.in_channels:
            return image.to(self._execution_device)  # latents
        return self.encode_image(image.to(self._execution_device), sample_mode="argmax")

    def _invert(
        self,
        image: torch.Tensor,
        conditions: DynaDiTConditions,
        batch_size: int,
        strength: float,
        grid: tuple[int | None, list[float] | None, list[float] | None],
        **kwargs,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        The way from images to the noise level at which a trajectory of `strength` on `grid` begins, without guidance:
        the noise levels of shape `(num_calls + 1,)`, and the latents at each of them.
        """
        num_inference_steps, timesteps, sigmas = grid
        device = self._execution_device
        latents = _repeat(self._encode(image), batch_size)
        self.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        num_steps = -(-len(self.get_timesteps(strength)) // self.scheduler.order) if strength > 0 else 0
        calls = self.set_timesteps(num_inference_steps, device, timesteps, sigmas, reverse=True)
        states = [latents]

        def keep(i: int, next_i: int, latents: torch.Tensor) -> torch.Tensor:
            states.append(latents)
            return latents

        if num_steps > 0:
            guidance_scale, self._guidance_scale = self._guidance_scale, 1.0
            self.denoise(calls[: num_steps * self.scheduler.order], latents, conditions, after_step=keep, **kwargs)
            self._guidance_scale = guidance_scale
        return self.scheduler.sigmas[: len(states)], states

    def _with_references(
        self, conditions: DynaDiTConditions, references: DynaDiTConditions, num_rows: int, num_references: int
    ) -> DynaDiTConditions:
        """
        Conditions with rows of references behind the `num_rows` of the images; also in the null half, if there is one,
        where a reference has the null condition of the first image that uses it.
        """
        users = torch.arange(num_references) * (num_rows // num_references)

        def join(rows: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
            conditional, *null = rows.split(num_rows)
            return torch.cat(
                [conditional, more, *(half[i] for half in null for i in (slice(None), users.to(rows.device)))]
            )

        joined = DynaDiTConditions()
        if conditions.class_labels is not None:
            joined = replace(joined, class_labels=join(conditions.class_labels, references.class_labels))
        texts = (conditions.encoder_hidden_states, references.encoder_hidden_states)
        if any(text is not None for text in texts):
            like = texts[0] if texts[0] is not None else texts[1]
            rows = (num_rows * (2 if self.do_classifier_free_guidance else 1), num_references)
            longest = max(text.shape[1] for text in texts if text is not None)
            filled = []
            for part, text, n in zip((conditions, references), texts, rows, strict=True):
                mask, dropped = part.encoder_attention_mask, part.caption_dropout_mask
                if text is None:  # the null caption, for which any states will do
                    text, dropped = like.new_zeros(n, longest, like.shape[2]), like.new_ones(n, dtype=torch.bool)
                mask = torch.ones_like(text[..., 0], dtype=torch.bool) if mask is None else mask
                dropped = torch.zeros_like(text[:, 0, 0], dtype=torch.bool) if dropped is None else dropped
                pad = longest - text.shape[1]
                pads = (F.pad(text, (0, 0, 0, pad)), F.pad(mask, (0, pad)))
                filled.append((*pads, dropped))
            text, mask, dropped = (join(*pair) for pair in zip(*filled, strict=True))
            joined = replace(
                joined,
                encoder_hidden_states=text,
                encoder_attention_mask=None if mask.all() else mask,
                caption_dropout_mask=dropped if dropped.any() else None,
            )
        return joined

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray | None = None,
        source_prompt: str | list[str] | None = None,
        source_class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray | None = None,
        style_image: ImageInput | None = None,
        style_strength: float = 0.5,
        style_prompt: str | list[str] | None = None,
        style_class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        latents: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        complete_model: bool = False,
        width_mult: float | None = None,
        max_plan_bytes: int = 2**30,
        output_compute_ratio: bool = False,
    ) -> DynaDiTPipelineOutput | tuple:
        r"""
        Changes an image, or draws one in the style of another.

        Each of images, labels and prompts comes alone, for all, or as many times as there are results.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What the result shows, for a transformer that reads text. Without it and `prompt_embeds`, the learned
                null caption stands.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Where to start: one image, or one for each prompt or label, see [`preprocess_image`]; resized to `height`
                and `width`, and encoded by the VAE as the mode of its posterior. `None`, with `style_image`, starts at
                noise.
            strength (`float`, defaults to `0.6`):
                Share of the steps to take, in [0, 1], rounded up to whole ones; no matter without `image`. The image is
                noised to the noise level of the first of them. 0 takes none: the image is encoded and decoded by the
                VAE. 1 takes all from the noise level at which the grid begins: of flow matching this is pure noise, and
                nothing of the image is left unless it is inverted; of DDPM and its relatives, what their schedule leaves
                of the image stays in it.
            num_inference_steps (`int`, defaults to `50`):
                Steps of the scheduler from pure noise. `strength` is the share of them that is taken, and an inversion
                takes as many.
            timesteps (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `timesteps`.
            sigmas (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `sigmas`.
            guidance_scale (`float`, defaults to `1.0`):
                Classifier-free guidance ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)):
                null + scale * (conditional - null). 1 and below is off; on, a step evaluates the transformer on both
                halves. Inversions go without.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from, one text or as many as prompts. `None` guides away from the learned null
                caption. Only with guidance.
            num_images_per_prompt (`int`, defaults to `1`):
                Results for each image, prompt or label. An inversion draws nothing: those of one image are equal.
            eta (`float`, defaults to `0.0`): the noise of `DDIMScheduler`, in [0, 1]; ignored by others.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the images reproducible. A list has one for each image.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states in the place of `prompt`, see [`encode_prompt`].
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states in the place of `negative_prompt`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (float in [0, 1], channels last), `"pt"` (float in [0, 1], channels first) or
                `"latent"` (the transformer's own range, neither decoded nor clipped).
            return_dict (`bool`, defaults to `True`): return a [`DynaDiTPipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*): passed on to the transformer; `scale` is the weight of a LoRA.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step, with a solver of order 2 and more after
                each call of the transformer, which `step` counts; may return changed tensors. It sees
                the images, not the references, and no inversion.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors that the callback gets, of `"latents"`, `"prompt_embeds"` and `"negative_prompt_embeds"`.
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What the result shows, as labels or as names of `id2label`. `None` is the null class.
            source_prompt (`str` or `list[str]`, *optional*):
                What `image` shows. Given, the image is not noised by random noise, but inverted under this text, see
                [`invert`].
            source_class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What `image` shows, as a class; as `source_prompt`.
            style_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Reference whose style the result takes: one for all, or one for each prompt or label; as `image`.
            style_strength (`float`, defaults to `0.5`):
                How much of it, in [0, 1]: how far queries and keys of the self-attention are brought to mean and
                deviation of the reference's, and the factor of the attention weights of the reference. 0 has no effect; 1
                is the paper's, with which small models take over shapes too.
            style_prompt (`str` or `list[str]`, *optional*):
                What `style_image` shows, under which it is inverted; `None` is the learned null caption.
            style_class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What `style_image` shows, as a class; `None` is the null class.
            height (`int`, *optional*): height of the image in pixels; `None` is that of the transformer's `sample_size`.
            width (`int`, *optional*): width of the image in pixels; `None` is that of the transformer's `sample_size`.
            guidance_rescale (`float`, defaults to `0.0`):
                How far to bring the standard deviation of a guided prediction back to that of the conditional one, in
                [0, 1] ([arXiv 2305.08891](https://huggingface.co/papers/2305.08891), equations 15 and 16).
            guidance_interval (`tuple[float, float]`, *optional*):
                Noise levels, `timestep / num_train_timesteps` in [0, 1] with 1 the noise, from the lowest to the highest
                at which to guide ([arXiv 2404.07724](https://huggingface.co/papers/2404.07724)). The steps outside cost
                half as much. `None` guides at all.
            guidance_channels (`int`, *optional*):
                Number of leading channels to guide; the others are those of the condition. `None` guides all.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                Standard normal noise to noise the image with, or to start from, instead of drawing it; such as
                [`invert`] returns for `strength` 1.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                True, or 1, for the tokens of `prompt_embeds` that count; `None` is all.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                True, or 1, for the tokens of `negative_prompt_embeds` that count; `None` is all.
            max_sequence_length (`int`, *optional*):
                Most tokens of a prompt; the rest is cut off, with a warning. `None` is what the tokenizer and the text
                encoder take.
            complete_model (`bool`, defaults to `False`):
                Run every head, channel group and token: the static model.
            width_mult (`float`, *optional*):
                Width of the transformer in (0, 1] for this call. `None` leaves the width that it has.
            max_plan_bytes (`int`, defaults to `2**30`):
                Memory for what the transformer prepares for the call, see its `prepare_timesteps`.
            output_compute_ratio (`bool`, defaults to `False`):
                Also return which share of the complete model's compute the run took, inversions and references
                included; `None` for a `strength` of 0, which computes nothing.

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
            image=image,
            strength=strength,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            source_prompt=source_prompt,
            source_class_labels=source_class_labels,
            style_image=style_image,
            style_strength=style_strength,
            style_prompt=style_prompt,
            style_class_labels=style_class_labels,
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
            latents=latents,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if image is not None:
            image = self.preprocess_image(image, height, width)
        if style_image is not None:
            style_image = self.preprocess_image(style_image, height, width, "style_image")
        source = {"image": image, "source_class_labels": source_class_labels, "source_prompt": source_prompt}
        style = {"style_image": style_image, "style_class_labels": style_class_labels, "style_prompt": style_prompt}
        batch_size = self.get_batch_size(
            **source, **style, class_labels=class_labels, prompt=prompt, prompt_embeds=prompt_embeds
        )
        num_rows = batch_size * num_images_per_prompt
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._check_generators(generator, num_rows)  # also where an inversion leaves nothing to draw

        # 2. Conditions, of the source and the style without guidance
        device = self._execution_device
        strength = 1.0 if image is None else strength
        is_inverted = strength > 0 and (source_class_labels is not None or source_prompt is not None)
        is_styled = strength > 0 and style_image is not None and style_strength > 0
        self._begin_run(1.0, guidance_rescale, attention_kwargs)
        if is_inverted:
            num_sources = self.get_batch_size(**source)
            source_conditions = self.prepare_conditions(
                num_sources, 1, device, source_class_labels, source_prompt, max_sequence_length=max_sequence_length
            )
        if is_styled:
            num_references = self.get_batch_size(**style)
            style_conditions = self.prepare_conditions(
                num_references, 1, device, style_class_labels, style_prompt, max_sequence_length=max_sequence_length
            )
        self._begin_run(guidance_scale, guidance_rescale, attention_kwargs)
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

        # 3. Inversions
        num_inference_steps = int(num_inference_steps) if num_inference_steps is not None else None
        grid = (num_inference_steps, timesteps, sigmas)
        how = {
            "complete_model": complete_model,
            "width_mult": width_mult,
            "max_plan_bytes": max_plan_bytes,
            "output_compute_ratio": output_compute_ratio,
        }
        if is_inverted:
            _, states = self._invert(image, source_conditions, num_sources, strength, grid, **how)
            inverted = _repeat(states[-1], num_rows)
        if is_styled:
            style_levels, style_states = self._invert(
                style_image, style_conditions, num_references, strength, grid, **how
            )

        # 4. Time grid and latents
        timesteps = self.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        timesteps = self.get_timesteps(strength) if strength > 0 else timesteps[:0]
        if is_inverted:
            latents = inverted
        elif image is None:
            latents = self.prepare_latents(num_rows, height, width, generator, latents, device)
        else:
            image_latents = _repeat(self._encode(image), num_rows)
            if strength > 0:
                latents = self.prepare_latents(
                    num_rows, height, width, generator, latents, device, image_latents, timesteps[0]
                )
            elif latents is not None and latents.shape != image_latents.shape:
                raise ValueError(
                    f"`latents` must have shape {tuple(image_latents.shape)}, but has shape {tuple(latents.shape)}."
                )
            else:
                latents = image_latents

        # 5. Loop, with the references behind the images
        sharing, after_step = nullcontext(), None
        callback, callback_tensors = callback_on_step_end, callback_on_step_end_tensor_inputs
        if is_styled:
            begin_index = self.scheduler.begin_index
            levels = self.scheduler.sigmas[begin_index : begin_index + len(timesteps), None]
            # Of states at one level the last, which is not a stage of a step but its end.
            nearest = len(style_states) - 1 - (levels - style_levels.flip(0)).abs().argmin(dim=1)
            conditions = self._with_references(conditions, style_conditions, num_rows, num_references)

            def after_step(i: int, next_i: int, latents: torch.Tensor) -> torch.Tensor:
                if next_i < len(timesteps):
                    latents = torch.cat([latents[:num_rows], style_states[nearest[next_i]]])
                return latents

            latents = torch.cat([latents, style_states[nearest[0]]])
            references = [num_rows + row * num_references // num_rows for row in range(num_rows)]
            references += range(num_rows, num_rows + num_references)
            if self.do_classifier_free_guidance:
                references += [row + len(latents) for row in references]
            sharing = self.transformer.share_attention(references, style_strength)
            if callback is not None:
                callback = _without_references(callback, callback_tensors, num_rows, num_references)
                callback_tensors = self._callback_tensor_inputs

        compute_ratio = None
        if strength > 0:
            with sharing:
                latents, compute_ratio = self.denoise(
                    timesteps,
                    latents,
                    conditions,
                    generator=generator,
                    eta=eta,
                    guidance_interval=guidance_interval,
                    guidance_channels=guidance_channels,
                    after_step=after_step,
                    callback_on_step_end=callback,
                    callback_on_step_end_tensor_inputs=callback_tensors,
                    **how,
                )

        # 6. Images
        images = self.postprocess(latents[:num_rows], output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, compute_ratio) if output_compute_ratio else (images,)
        return DynaDiTPipelineOutput(images=images, compute_ratio=compute_ratio)


def _repeat(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    return tensor.repeat_interleave(num_rows // len(tensor), dim=0)


def _without_references(callback: Callable, names: list[str], num_rows: int, num_references: int) -> Callable:
    """
    The callback of a user, who knows of the first `num_rows` rows only. The references behind them keep what they have;
    a new negative text is also that of the references, each that of the first image which uses it.
    """

    def wrapped(pipe, i: int, t: torch.Tensor, tensors: dict) -> dict:
        own = {name: None if tensor is None else tensor[:num_rows] for name, tensor in tensors.items()}
        changed = pipe._changed_tensors(callback(pipe, i, t, {name: own[name] for name in names}), own)
        for name, new in changed.items():
            is_negative = name == "negative_prompt_embeds"
            references = new[:: num_rows // num_references] if is_negative else tensors[name][num_rows:]
            changed[name] = torch.cat([new, references])
        return changed

    return wrapped
