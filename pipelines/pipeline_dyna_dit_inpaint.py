# SPDX-License-Identifier: Apache-2.0
"""Parts of images painted anew by a dynamic diffusion transformer, on latents or on pixels."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# For type hints only: a published copy goes without the package.
from diffusers_dyna.models.transformer_dyna_dit import DynaDiTTransformer2DModel

from .pipeline_dyna_dit_base import DynaDiTPipelineBase, DynaDiTPipelineOutput


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from PIL import Image
        >>> from diffusers_dyna import DynaDiTInpaintPipeline

        >>> pipe = DynaDiTInpaintPipeline.from_pretrained("outputs/dit-inpaint")
        >>> image, mask = Image.open("picture.png"), Image.open("mask.png")
        >>> generator = torch.Generator().manual_seed(0)
        >>> pipe(image=image, mask_image=mask, class_labels=3, generator=generator).images[0].save("filled.png")
        ```
"""

ONE_STEP_SOLVERS = ("euler", "heun", "midpoint", "rk4")


class DynaDiTInpaintPipeline(DynaDiTPipelineBase):
    r"""
    Pipeline that paints the masked part of images by a [`DynaDiTTransformer2DModel`], class-conditional,
    text-conditional or neither, on the latents of a VAE or on pixels. It works with two kinds of transformers:

    - one trained for inpainting, which is given the mask and the image without what is to be painted as
      `condition_channels` = `in_channels` + 1 further channels;
    - any other, without training ([arXiv 2201.09865](https://huggingface.co/papers/2201.09865)).

    In both, after each step the known part is set to that of the image on the scheduler's path, mixed with the noise
    that the trajectory started from; an exact prediction, knowing that part, would lead it along the same points. At
    the end it is the image itself, whose known pixels come back unchanged. With a VAE this is done to its latents, and
    each of those with a pixel to paint is painted; without training, from pure noise, a mask that leaves none of them is
    refused, since the image would not be seen. The decoder then moves all pixels, so the known ones of the image are put
    over the result, as the overlay of diffusers' pipelines does; a VAE that decodes poorly can leave a seam.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]): trained for inpainting, or to draw images.
        scheduler ([`~diffusers.SchedulerMixin`]):
            The scheduler that the transformer was trained for, or another of its kind; see [`DynaDiTPipeline`].
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            Encodes the image and decodes the latents. `None` where the transformer draws pixels, in [-1, 1].
        text_encoder ([`~transformers.PreTrainedModel`], *optional*):
            The text encoder that a text-conditional transformer was trained with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer of `text_encoder`.
        id2label (`dict[int, str]`, *optional*):
            Name of each class, saved with the pipeline. Several names of one class are separated by commas.

    Raises:
        `ValueError`: if the components do not fit each other, or the transformer was made for super-resolution.
        `TypeError`: on a `text_encoder` that has a decoder too, and on a `vae` whose scale factor is not known.
    """

    _optional_components = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]

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
            "inpaint|generate|text-to-image",
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
        image,
        mask_image,
        masked_image_latents: torch.Tensor | None,
        class_labels,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        padding_mask_crop: int | None,
        strength: float,
        num_inference_steps: int | None,
        timesteps: list[float] | None,
        sigmas: list[float] | None,
        guidance_scale: float,
        guidance_rescale: float,
        guidance_interval: tuple[float, float] | None,
        guidance_channels: int | None,
        num_images_per_prompt: int,
        eta: float,
        jump_length: int,
        jump_n_sample: int,
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
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )
        self.check_number("strength", strength)
        if not 0 < strength <= 1:
            raise ValueError(
                f"`strength`={strength} must be in (0, 1]. 1 paints from pure noise, 0 would paint nothing."
            )
        if padding_mask_crop is not None:
            self.check_integer("padding_mask_crop", padding_mask_crop, lowest=0)
            if output_type != "pil":
                raise ValueError(
                    f"`padding_mask_crop` pastes the result into the image of Pillow, so `output_type` must be 'pil', "
                    f"but is {output_type!r}."
                )
            for name, value in (("image", image), ("mask_image", mask_image)):
                if not isinstance(value, PIL.Image.Image):
                    raise ValueError(
                        f"`padding_mask_crop` needs a single image of Pillow as `{name}`, but it is a "
                        f"{type(value).__name__}. Call the pipeline for each image, or leave `padding_mask_crop` out."
                    )
            if image.size != mask_image.size:
                self._raise_sizes(image.size[::-1], mask_image.size[::-1])
        is_asked_for = "masked_image_latents" in (callback_on_step_end_tensor_inputs or [])
        if (masked_image_latents is not None or is_asked_for) and self.transformer.config.condition_channels == 0:
            raise ValueError(
                "`masked_image_latents` is what a transformer trained for inpainting is given, but this one is not "
                "(`condition_channels` is 0). Leave it out, also of `callback_on_step_end_tensor_inputs`."
            )
        self.check_tensor("masked_image_latents", masked_image_latents)
        shape = (self.transformer.config.in_channels, *(side // self.vae_scale_factor for side in (height, width)))
        if masked_image_latents is not None and masked_image_latents.shape[1:] != shape:
            raise ValueError(
                f"`masked_image_latents` must have shape (batch_size, {', '.join(map(str, shape))}), but has shape "
                f"{tuple(masked_image_latents.shape)}."
            )
        self.check_integer("jump_length", jump_length)
        self.check_integer("jump_n_sample", jump_n_sample)
        solver = self.scheduler.config.get("solver", "euler")
        if jump_n_sample > 1 and not (hasattr(self.scheduler, "scale_noise") and solver in ONE_STEP_SOLVERS):
            raise ValueError(
                f"`jump_n_sample`={jump_n_sample} goes back to earlier noise levels of a flow-matching scheduler whose "
                f"steps know nothing of earlier ones, but the pipeline has {type(self.scheduler).__name__} with the "
                f"solver {solver!r}. Use FlowMatchODEScheduler with `solver` in {ONE_STEP_SOLVERS}, or "
                "`jump_n_sample=1`."
            )

    @staticmethod
    def _raise_sizes(image_size: tuple[int, int], mask_size: tuple[int, int]) -> None:
        raise ValueError(
            f"`image` and `mask_image` must have the same height and width, but are {image_size[0]} x {image_size[1]} "
            f"and {mask_size[0]} x {mask_size[1]}."
        )

    def prepare_image_and_mask(
        self, image, mask_image, height: int | None, width: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Image and mask as tensors of one size.

        Args:
            image (see [`read_image`]): what to paint in.
            mask_image (see [`read_image`]): with one channel, or an image of Pillow, whose luminance is taken.
            height (`int`, *optional*): in pixels, to resize to; `None` is that of the image.
            width (`int`, *optional*): in pixels, to resize to; `None` is that of the image.

        Returns:
            `tuple`: images of shape `(batch_size, channels, height, width)` in [0, 1], and masks of shape
            `(batch_size, 1, height, width)`, 1 where to paint and 0 elsewhere.

        Raises:
            `TypeError`, `ValueError`: on images or masks that are none or do not fit each other.
        """
        pixels, mask = self.read_image(image), self.read_image(mask_image, "mask_image", channels=1)
        if pixels.shape[2:] != mask.shape[2:]:
            self._raise_sizes(tuple(pixels.shape[2:]), tuple(mask.shape[2:]))
        if len(mask) not in (1, len(pixels)) and len(pixels) > 1:
            raise ValueError(
                f"`mask_image` must have one mask for all images or one for each of the {len(pixels)}, but has {len(mask)}."
            )
        size = (height or pixels.shape[2], width or pixels.shape[3])
        self.check_size(*size)
        if size != tuple(pixels.shape[2:]):
            pixels = self.read_image(pixels, size=size)
            mask = F.interpolate(mask, size=size, mode="bilinear", antialias=True)
        num_rows = max(len(pixels), len(mask))
        mask = (mask >= 0.5).float()
        return pixels.expand(num_rows, -1, -1, -1), mask.expand(num_rows, -1, -1, -1)

    def check_mask(self, mask: torch.Tensor, needs_known_latents: bool = False) -> None:
        """
        Raises a `ValueError` on a mask of shape `(batch_size, 1, height, width)` that is empty or covers all; with
        `needs_known_latents` also on one that covers every latent.
        """
        scale = self.vae_scale_factor
        size = f"{mask.shape[2]} x {mask.shape[3]}"
        for i, share in enumerate(mask.mean(dim=(1, 2, 3)).tolist()):
            if share == 0:
                raise ValueError(
                    f"`mask_image` {i} is empty (at {size}, the size that is painted): there is nothing to paint. Make it "
                    "white, 1, where to paint."
                )
            if share == 1:
                raise ValueError(
                    f"`mask_image` {i} covers all (at {size}, the size that is painted): nothing would be kept. Make it "
                    "black, 0, where to keep the image, or the margin of `padding_mask_crop` larger. To draw without an "
                    "image, use DynaDiTPipeline or DynaDiTTextToImagePipeline; to change all of it, "
                    "DynaDiTImg2ImgPipeline."
                )
            if needs_known_latents and F.max_pool2d(mask[i], scale).all():
                raise ValueError(
                    f"`mask_image` {i} covers every latent (at {size}, the size that is painted): each stands for {scale} x "
                    f"{scale} pixels and is painted if one of them is, so nothing of the image would be known. Make it "
                    f"black, 0, in whole blocks of {scale} x {scale} where to keep the image, or the margin of "
                    "`padding_mask_crop` larger. To start from the image, use a `strength` below 1."
                )

    def get_steps(self, num_calls: int, jump_length: int, jump_n_sample: int) -> list[int]:
        """
        The order of the model calls under resampling (arXiv 2201.09865, section 4.2): the grid is cut into runs of
        `jump_length` steps, and each run but the first is taken `jump_n_sample` times. Back at the start of the first,
        which is pure noise unless `strength` is below 1, nothing would be left of what was painted.

        Args:
            num_calls (`int`): entries of the time grid.
            jump_length (`int`): steps to go back by.
            jump_n_sample (`int`): how many times to take them.

        Returns:
            `list[int]`: indices into the time grid.
        """
        run_length = jump_length * self.scheduler.order
        runs = [range(start, min(start + run_length, num_calls)) for start in range(0, num_calls, run_length)]
        return [*runs[0], *(i for run in runs[1:] for _ in range(jump_n_sample) for i in run)]

    def renoise(
        self, latents: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor, generator=None
    ) -> torch.Tensor:
        r"""
        The way back along the path x = a * data + b * noise: (a' / a) x + sqrt(b'^2 - (a' b / a)^2) * noise has the
        distribution of the state at the higher noise level. For a path of variances it is one step of the forward
        process (arXiv 2201.09865, algorithm 1, line 10). The known part, for which lines 4 and 5 draw new noise each
        time, is set back with the noise of the trajectory here.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`): at `sigma`.
            sigma (`torch.Tensor` of shape `()`): entry of `scheduler.sigmas`, below pure noise.
            next_sigma (`torch.Tensor` of shape `()`): entry of `scheduler.sigmas`, with more noise.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): of the noise.

        Returns:
            `torch.Tensor` with the shape of `latents`.
        """
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        factors = []
        for level in (sigma.double().cpu(), next_sigma.double().cpu()):
            if self.scheduler.config.get("invert_sigmas"):
                level = 1 - level
            if hasattr(self.scheduler, "path"):
                level = self.scheduler.path.coefficients(level)
                factors.append((level.a, level.b))
            else:  # diffusers' own have the linear path
                factors.append((1 - level, level))
        (a, b), (next_a, next_b) = factors
        ratio = next_a / a
        return ratio.item() * latents + (next_b**2 - (ratio * b) ** 2).sqrt().item() * noise

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        masked_image_latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | np.ndarray | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        jump_length: int = 1,
        jump_n_sample: int = 1,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        complete_model: bool = False,
        width_mult: float | None = None,
        max_plan_bytes: int = 2**30,
        output_compute_ratio: bool = False,
    ) -> DynaDiTPipelineOutput | tuple:
        r"""
        Paints the masked part of images.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to paint, for a transformer that reads text; one for all images or one for each.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                What to paint in. Arrays have shape `(batch_size, height, width, channels)`, tensors `(batch_size,
                channels, height, width)`, both in [0, 1]; the batch may be left out. A single image serves all masks,
                prompts and labels.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                White, 1, where to paint; black, 0, where to keep the image; cut at 0.5. Of the size of `image`, with one
                channel, which may be left out; of an image of Pillow the luminance is taken. One for all images or one
                for each.
            masked_image_latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                What a transformer trained for inpainting is given of the image, one for all or one for each, in the place
                of the image that is grey where to paint, encoded as [`encode_image`] does.
            height (`int`, *optional*):
                In pixels, to resize image and mask to. `None` is that of the image; with `padding_mask_crop`, that of the
                transformer's `sample_size`.
            width (`int`, *optional*): in pixels, as `height`.
            padding_mask_crop (`int`, *optional*):
                Paint in a part of the image only, at `height` and `width`: the smallest of their shape that has the mask
                in it, and this margin, in pixels. The result is pasted into the image. For a small mask in a large image;
                single images of Pillow only. `None` paints in the whole image.
            strength (`float`, defaults to `1.0`):
                How much of the trajectory to take, in (0, 1]: below 1 the masked part is not painted from pure noise but
                from the image, noised, in as many of the steps.
            num_inference_steps (`int`, defaults to `50`): steps of the scheduler.
            timesteps (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `timesteps`.
            sigmas (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `sigmas`.
            guidance_scale (`float`, defaults to `1.0`):
                Classifier-free guidance ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)):
                null + scale * (conditional - null). 1 and below is off; on, a step evaluates the transformer on both halves.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from, one text or as many as prompts. `None` guides away from the learned null
                caption. Only with guidance.
            num_images_per_prompt (`int`, defaults to `1`): results for each image.
            eta (`float`, defaults to `0.0`): the noise of `DDIMScheduler`, in [0, 1]; ignored by others.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the images reproducible. A list has one for each image.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                Standard normal noise to start from, instead of drawing it.
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
                each call of the transformer, which `step` counts; may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors that the callback gets, of `"latents"`, `"prompt_embeds"`, `"negative_prompt_embeds"` and
                `"mask"`, that of the latents, which decides what is kept, and, of a transformer trained for inpainting,
                `"masked_image_latents"`; both have one row for each result. With `padding_mask_crop` the mask stays.
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What the image shows, as labels or as names of `id2label`; one for all images or one for each. `None` is
                the null class.
            guidance_rescale (`float`, defaults to `0.0`):
                How far to bring the standard deviation of a guided prediction back to that of the conditional one, in
                [0, 1] ([arXiv 2305.08891](https://huggingface.co/papers/2305.08891), equations 15 and 16).
            guidance_interval (`tuple[float, float]`, *optional*):
                Noise levels, `timestep / num_train_timesteps` in [0, 1] with 1 the noise, from the lowest to the highest
                at which to guide ([arXiv 2404.07724](https://huggingface.co/papers/2404.07724)). The steps outside cost
                half as much. `None` guides at all.
            guidance_channels (`int`, *optional*):
                Number of leading channels to guide; the others are those of the condition. `None` guides all.
            jump_length (`int`, defaults to `1`): steps to go back by in resampling.
            jump_n_sample (`int`, defaults to `1`):
                How many times to take each run of `jump_length` steps (resampling), so that what is painted comes to fit
                what is known, at as many times the cost: after each but the last, noise is added back. 1 is off. For
                flow-matching schedulers with solvers of one step.
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
        self.check_text("prompt", prompt)  # before the images, for a call that gives them in its place
        if padding_mask_crop is None:
            pixels, mask = self.prepare_image_and_mask(image, mask_image, height, width)
            height, width = pixels.shape[2:]
        else:
            height, width = self.default_size(height, width)
        self.check_inputs(
            prompt=prompt,
            image=image,
            mask_image=mask_image,
            masked_image_latents=masked_image_latents,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            padding_mask_crop=padding_mask_crop,
            strength=strength,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            jump_length=jump_length,
            jump_n_sample=jump_n_sample,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if padding_mask_crop is not None:
            # Without transparency, by which the result would be pasted. The mask is cut at 0.5 before the crop, so that
            # what is pasted and what is kept fit.
            image = self.convert_image(image, (self.transformer if self.vae is None else self.vae).config.in_channels)
            binary_mask = self.convert_image(mask_image, 1, "mask_image").point(lambda value: 255 * (value >= 128))
            self.check_mask(self.read_image(binary_mask, channels=1))
            box = self.image_processor.get_crop_region(binary_mask, width, height, pad=padding_mask_crop)
            cropped = [
                self.image_processor.resize(entry.crop(box), height, width, resize_mode="fill")
                for entry in (image, binary_mask)
            ]
            pixels, mask = self.prepare_image_and_mask(*cropped, height, width)
        # A transformer trained for it is given the known pixels themselves, and below a strength of 1 the image is the
        # start. Otherwise the known latents are all that the transformer sees of the image.
        is_trained = self.transformer.config.condition_channels > 0
        self.check_mask(mask, needs_known_latents=not is_trained and strength == 1)
        num_inference_steps = int(num_inference_steps) if num_inference_steps is not None else None
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._begin_run(guidance_scale, guidance_rescale, attention_kwargs)
        device = self._execution_device

        # 2. Conditions, time grid
        batch_size = self.get_batch_size(
            image=pixels,
            masked_image_latents=masked_image_latents,
            class_labels=class_labels,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
        )
        conditions = self.prepare_conditions(
            batch_size,
            num_images_per_prompt,
            device,
            class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )
        timesteps = self.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        if strength < 1:
            timesteps = self.get_timesteps(strength)

        # 3. Image and mask, one row for each image to paint, and the noise of the trajectory
        num_rows = batch_size * num_images_per_prompt

        def repeat(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=torch.float32).repeat_interleave(num_rows // len(tensor), dim=0)

        pixels, mask = repeat(pixels), repeat(mask)
        normalized = self.image_processor.normalize(pixels)
        image_latents = self.encode_image(normalized, sample_mode="argmax")
        tensors = {"mask": F.max_pool2d(mask, self.vae_scale_factor)}  # all to be painted, and what it touches
        if is_trained:
            if masked_image_latents is None:
                masked_image_latents = self.encode_image(normalized * (1 - mask), sample_mode="argmax")
            tensors["masked_image_latents"] = repeat(masked_image_latents)
        noise = self.prepare_latents(num_rows, height, width, generator, latents, device)
        noise = noise / getattr(self.scheduler, "init_noise_sigma", 1.0)
        start = {"image_latents": image_latents, "timestep": timesteps[0]} if strength < 1 else {}
        latents = self.prepare_latents(num_rows, height, width, generator, noise, device, **start)

        # 4. Loop
        def condition_channels(i: int) -> torch.Tensor:
            return torch.cat([tensors["mask"], tensors["masked_image_latents"]], dim=1)

        def set_known_part(i: int, next_i: int, latents: torch.Tensor) -> torch.Tensor:
            if next_i <= i:
                sigmas = self.scheduler.sigmas[-len(timesteps) - 1 :]
                latents = self.renoise(latents, sigmas[i + 1], sigmas[next_i], generator)
            elif (i + 1) % self.scheduler.order and next_i < len(timesteps):
                return latents  # a stage inside a step
            known = image_latents
            if next_i < len(timesteps):
                known = self.add_noise(image_latents, noise, timesteps[next_i])
            return torch.where(tensors["mask"] > 0, latents, known)

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
            condition_channels=condition_channels if is_trained else None,
            after_step=set_known_part,
            steps=self.get_steps(len(timesteps), jump_length, jump_n_sample),
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_tensors=tensors,
        )

        # 5. Images
        if not torch.equal(tensors["mask"], F.max_pool2d(mask, self.vae_scale_factor)):  # changed by the callback
            if padding_mask_crop is not None:
                raise ValueError(
                    "`callback_on_step_end` changed `mask`, but with `padding_mask_crop` the result is pasted by "
                    "`mask_image`. Leave one of them out."
                )
            mask = F.interpolate(tensors["mask"], scale_factor=self.vae_scale_factor)
        if output_type == "latent":
            images = latents
        else:
            # Known pixels as they came, without what the VAE or the rounding of [-1, 1] makes of them.
            images = torch.where(mask > 0, self.postprocess(latents, "pt"), pixels)
            images = self.image_processor.postprocess(images, output_type, do_denormalize=[False] * num_rows)
        if padding_mask_crop is not None:
            images = [
                self.image_processor.apply_overlay(binary_mask, image, painted, box).convert(painted.mode)
                for painted in images
            ]
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, compute_ratio) if output_compute_ratio else (images,)
        return DynaDiTPipelineOutput(images=images, compute_ratio=compute_ratio)
