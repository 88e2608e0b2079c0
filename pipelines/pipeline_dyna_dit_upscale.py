# SPDX-License-Identifier: Apache-2.0
"""Images enlarged by a dynamic diffusion transformer, on latents or on pixels, in tiles where they are large."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from diffusers import AutoencoderKL, PyramidAttentionBroadcastConfig, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# For type hints only: a published copy goes without the package.
from diffusers_dyna.models.transformer_dyna_dit import DynaDiTTransformer2DModel

from .pipeline_dyna_dit_base import DynaDiTConditions, DynaDiTPipelineBase, DynaDiTPipelineOutput


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from PIL import Image
        >>> from diffusers_dyna import DynaDiTUpscalePipeline

        >>> pipe = DynaDiTUpscalePipeline.from_pretrained("outputs/dit-upscale")
        >>> image = Image.open("small.png")
        >>> generator = torch.Generator().manual_seed(0)
        >>> pipe(image=image, noise_level=20, generator=generator).images[0].save("large.png")
        ```
"""


@dataclass
class DynaDiTTiledConditions(DynaDiTConditions):
    """
    [`DynaDiTConditions`] of a prediction in tiles, of which the transformer is given all rows again for each tile.

    Args:
        num_tiles (`int`, defaults to `1`): the most tiles of a call.
    """

    num_tiles: int = 1

    @cached_property
    def repeated(self) -> DynaDiTConditions:
        """
        The rows of a call, tile after tile; fewer tiles have its leading rows. Made once, since the transformer finds
        what it prepared by the memory of what it is given.
        """
        values = {field.name: getattr(self, field.name) for field in fields(DynaDiTConditions)}
        if self.num_tiles > 1:
            has_rows = [name for name, value in values.items() if torch.is_tensor(value) and value.ndim > 0]
            values.update({name: torch.cat([values[name]] * self.num_tiles) for name in has_rows})
        return DynaDiTConditions(**values)

    def model_kwargs(self) -> dict:
        """The arguments of the transformer for a call with `num_tiles` tiles."""
        return self.repeated.model_kwargs()


class DynaDiTUpscalePipeline(DynaDiTPipelineBase):
    r"""
    Pipeline for super-resolution by a [`DynaDiTTransformer2DModel`], class-conditional, text-conditional or neither, on
    the latents of a VAE or on pixels.

    The transformer is given the low-resolution image, enlarged by bicubic interpolation, as further channels: encoded,
    and noised along the scheduler's path at a level that it is told
    ([arXiv 2106.15282](https://huggingface.co/papers/2106.15282), section 4.1). Images larger than those that it was
    made for are predicted in overlapping tiles, in each step, and blended.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]):
            Trained for super-resolution: with `noise_level_conditioning`, and `condition_channels` = `in_channels`.
        scheduler ([`~diffusers.SchedulerMixin`]):
            The flow-matching scheduler that the transformer was trained for, or another of its kind; see
            [`DynaDiTPipeline`]. Others are refused: their noise levels are not those of the low-resolution image.
        vae ([`~diffusers.AutoencoderKL`], *optional*):
            Encodes the image and decodes the latents. `None` where the transformer draws pixels, in [-1, 1].
        text_encoder ([`~transformers.PreTrainedModel`], *optional*):
            The text encoder that a text-conditional transformer was trained with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer of `text_encoder`.
        id2label (`dict[int, str]`, *optional*):
            Name of each class, saved with the pipeline. Several names of one class are separated by commas.
        upscale_factor (`int`, defaults to `2`):
            How many times larger height and width become: what the transformer was trained for, at least 2; saved with
            the pipeline.
        max_noise_level (`float`, defaults to `1000.0`):
            The highest `noise_level` that the transformer was trained with, in [0, 1000]; saved with the pipeline.

    Raises:
        `ValueError`: if the components do not fit each other, if the transformer was made for another task, or on a
            factor or noise level out of range.
        `TypeError`: on a `text_encoder` that has a decoder too, on a `vae` whose scale factor is not known,
            and on a factor or noise level that is no number.
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
        upscale_factor: int = 2,
        max_noise_level: float = 1000.0,
    ):
        super().__init__()
        self._register(
            "upscale",
            id2label,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.check_number("upscale_factor", upscale_factor)
        if upscale_factor % 1 != 0 or upscale_factor < 2:
            raise ValueError(
                f"`upscale_factor`={upscale_factor} must be a whole number, at least 2: the factor that the transformer "
                "was trained for."
            )
        self.check_number("max_noise_level", max_noise_level)
        if not 0 <= max_noise_level <= 1000:
            raise ValueError(f"`max_noise_level`={max_noise_level} must be in [0, 1000], in units of timestep.")
        self.register_to_config(upscale_factor=int(upscale_factor), max_noise_level=float(max_noise_level))

    def check_inputs(
        self,
        *,
        prompt: str | list[str] | None,
        class_labels,
        negative_prompt: str | list[str] | None,
        noise_level: float,
        tile_size: tuple[int, int],
        tile_overlap: int,
        tile_batch_size: int,
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
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument for everything a call cannot work with."""
        # A scheduler made from the config of another keeps keys that it does not know.
        takes_flow_sigmas = "use_flow_sigmas" in inspect.signature(type(self.scheduler).__init__).parameters
        if not (hasattr(self.scheduler, "scale_noise") or takes_flow_sigmas and self.scheduler.config.use_flow_sigmas):
            raise ValueError(
                f"`scheduler` is {type(self.scheduler).__name__} without flow matching, but super-resolution noises the "
                "low-resolution image along a path of flow matching. Use FlowMatchODEScheduler."
            )
        scale = self.config.upscale_factor
        factor = self.transformer.config.patch_size * self.vae_scale_factor
        if height % factor or width % factor:
            step = factor // math.gcd(factor, scale)  # of the low-resolution image
            sides = (height // scale, width // scale)
            nearest = [max(1, int(side / step + 0.5)) * step for side in sides]
            raise ValueError(
                f"`image` has {sides[0]} x {sides[1]} pixels (height x width), which makes {height} x {width} of "
                f"`upscale_factor` {scale}, but that must be divisible by {factor} (`patch_size` x scale factor of the "
                f"VAE). The nearest valid size of `image` is {nearest[0]} x {nearest[1]}: crop, pad or resize it."
            )
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
        self.check_number("noise_level", noise_level)
        if not 0 <= noise_level <= self.config.max_noise_level:
            raise ValueError(
                f"`noise_level`={noise_level} must be in [0, {self.config.max_noise_level:g}], in units of timestep: the "
                "levels that the transformer was trained with (`max_noise_level`)."
            )
        if len(tile_size) != 2 or any(side % factor for side in tile_size):
            nearest = [max(1, int(side / factor + 0.5)) * factor for side in tile_size]
            raise ValueError(
                f"`tile_size`={tile_size} must be height and width in pixels of the result, divisible by {factor}. The "
                f"nearest valid one is {nearest}."
            )
        self.check_integer("tile_overlap", tile_overlap, lowest=0)
        if tile_overlap >= min(tile_size):
            raise ValueError(
                f"`tile_overlap`={tile_overlap} must be pixels of the result, less than `tile_size` "
                f"({min(tile_size)})."
            )
        if tile_overlap % self.vae_scale_factor:
            raise ValueError(
                f"`tile_overlap`={tile_overlap} must be divisible by the scale factor {self.vae_scale_factor} of the VAE. "
                f"Use {tile_overlap - tile_overlap % self.vae_scale_factor}."
            )
        self.check_integer("tile_batch_size", tile_batch_size)

    def prepare_condition(
        self,
        pixels: torch.Tensor,
        noise_level: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """
        What the transformer sees of the low-resolution image: enlarged (bicubic, clamped), encoded to the mean of the
        VAE's posterior, and noised.

        Args:
            pixels (`torch.Tensor` of shape `(batch_size, channels, low_height, low_width)`): in [-1, 1].
            noise_level (`float`): in units of timestep.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): of the noise.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, float32.
        """
        size = [side * self.config.upscale_factor for side in pixels.shape[2:]]
        enlarged = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)
        latents = self.encode_image(enlarged, sample_mode="argmax")
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        if hasattr(self.scheduler, "path"):
            return self.scheduler.scale_noise(latents, noise_level, noise)
        sigma = noise_level / 1000  # diffusers' own have the linear path, and take no level beside their grid
        return (1 - sigma) * latents + sigma * noise

    @staticmethod
    def tile_weights(length: int, tile_length: int, overlap: int) -> tuple[list[int], torch.Tensor]:
        """
        Where tiles begin along one side, and how much each counts. In an overlap, the weights of a tile rise as
        sin^2 while those of its neighbour fall; they sum to 1 everywhere.

        Args:
            length (`int`): of the side.
            tile_length (`int`): of a tile, at most `length`.
            overlap (`int`): of neighbours, less than `tile_length`. The last tile ends at the border, so that it may
                overlap its neighbour further.

        Returns:
            `tuple`: the first index of each tile, and weights of shape `(num_tiles, tile_length)`, float32.
        """
        starts = [*range(0, length - tile_length, tile_length - overlap), length - tile_length]
        distance = torch.arange(tile_length, dtype=torch.float64) + 0.5
        distance = torch.minimum(distance, distance.flip(0))  # to the nearer end
        window = torch.sin(torch.pi / 2 * (distance / max(overlap, 1)).clamp(max=1)) ** 2
        total = torch.zeros(length, dtype=torch.float64)
        for start in starts:
            total[start : start + tile_length] += window
        return starts, torch.stack([window / total[start : start + tile_length] for start in starts]).float()

    def _predict(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        conditions: DynaDiTTiledConditions,
        cache_name: str,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tiles = self._tiles
        if len(tiles) == 1:
            return super()._predict(hidden_states, timestep, conditions, cache_name, **kwargs)

        num_rows, _, height, width = hidden_states.shape
        has_one_state = isinstance(getattr(self.transformer, "_cache_config", None), PyramidAttentionBroadcastConfig)
        if has_one_state and len(tiles) > self._tile_batch_size:
            raise ValueError(
                f"`tile_batch_size`={self._tile_batch_size} predicts the {len(tiles)} tiles in several calls, but the cache "
                "PyramidAttentionBroadcast holds one call only and would take one tile for another. Use "
                f"`tile_batch_size={len(tiles)}`, or another cache."
            )
        repeated = conditions.repeated
        prediction, compute_ratios = 0, []
        for start in range(0, len(tiles), self._tile_batch_size):
            chunk = tiles[start : start + self._tile_batch_size]
            output, compute_ratio = super()._predict(
                torch.cat([hidden_states[:, :, rows, columns] for rows, columns, _ in chunk]),
                timestep,
                repeated if len(chunk) == conditions.num_tiles else repeated.rows(len(chunk) * num_rows),
                f"{cache_name}_{start}",
                **kwargs,
            )
            for (rows, columns, weights), tile in zip(chunk, output.float().chunk(len(chunk)), strict=True):
                if isinstance(prediction, int):
                    prediction = tile.new_zeros(num_rows, tile.shape[1], height, width)
                prediction[:, :, rows, columns] += weights.to(tile.device) * tile
            compute_ratios.append(compute_ratio)
        if compute_ratios[0] is None:
            return prediction, None
        return prediction, torch.cat(compute_ratios).view(len(tiles), num_rows).mean(dim=0)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        noise_level: float | None = None,
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
        tile_size: int | tuple[int, int] | None = None,
        tile_overlap: int | None = None,
        tile_batch_size: int = 8,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        complete_model: bool = False,
        width_mult: float | None = None,
        max_plan_bytes: int = 2**30,
        output_compute_ratio: bool = False,
    ) -> DynaDiTPipelineOutput | tuple:
        r"""
        Enlarges images by `upscale_factor`.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What the image shows, for a transformer that reads text; one for all images or one for each.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                The low-resolution image. Arrays have shape `(batch_size, height, width, channels)`, tensors
                `(batch_size, channels, height, width)`, both in [0, 1]; the batch may be left out. A single image serves
                all prompts and labels.
            num_inference_steps (`int`, defaults to `50`): steps of the scheduler.
            guidance_scale (`float`, defaults to `1.0`):
                Classifier-free guidance ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)):
                null + scale * (conditional - null). 1 and below is off; on, a step evaluates the transformer on both halves.
            noise_level (`float`, *optional*):
                How much noise to add to the low-resolution image, in units of timestep, in [0, `max_noise_level`]. With
                more, the result keeps less of it and has more of the model's own. `None` is 20, or `max_noise_level`
                where that is less.
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
                The tensors that the callback gets, of `"latents"`, `"prompt_embeds"` and `"negative_prompt_embeds"`.
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                What the image shows, as labels or as names of `id2label`; one for all images or one for each. `None` is
                the null class.
            tile_size (`int` or `tuple[int, int]`, *optional*):
                Side, or height and width, of the tiles in pixels of the result. `None` is the size that the transformer
                was made for. A side of the result that is not longer is not cut.
            tile_overlap (`int`, *optional*):
                By how many pixels of the result neighbouring tiles overlap. `None` is about a quarter of a tile.
            tile_batch_size (`int`, defaults to `8`): how many tiles of each image to predict at a time.
            timesteps (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `timesteps`.
            sigmas (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `sigmas`.
            guidance_rescale (`float`, defaults to `0.0`):
                How far to bring the standard deviation of a guided prediction back to that of the conditional one, in
                [0, 1] ([arXiv 2305.08891](https://huggingface.co/papers/2305.08891), equations 15 and 16).
            guidance_interval (`tuple[float, float]`, *optional*):
                Noise levels, `timestep / num_train_timesteps` in [0, 1] with 1 the noise, from the lowest to the highest
                at which to guide ([arXiv 2404.07724](https://huggingface.co/papers/2404.07724)). The steps outside cost
                half as much. `None` guides at all.
            guidance_channels (`int`, *optional*):
                Number of leading channels to guide; the others are those of the condition. `None` guides all.
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
        self.check_text("prompt", prompt)  # before the image, for a call that gives it in its place
        pixels = self.read_image(image)
        height, width = (side * self.config.upscale_factor for side in pixels.shape[2:])
        noise_level = min(20.0, self.config.max_noise_level) if noise_level is None else noise_level
        tile_size = self.default_size() if tile_size is None else tile_size
        tile_size = tuple(tile_size) if isinstance(tile_size, (list, tuple)) else (tile_size, tile_size)
        for side in tile_size:
            self.check_integer("tile_size", side)
        if tile_overlap is None:
            tile_overlap = min(tile_size) // (4 * self.vae_scale_factor) * self.vae_scale_factor
        self.check_inputs(
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            noise_level=noise_level,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            tile_batch_size=tile_batch_size,
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
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        num_inference_steps = int(num_inference_steps) if num_inference_steps is not None else None
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._begin_run(guidance_scale, guidance_rescale, attention_kwargs)
        device = self._execution_device

        # 2. Tiles, in latents: rows, columns and weights of each
        sides = []
        for length, tile_length in zip((height, width), tile_size, strict=True):
            length, tile_length = (side // self.vae_scale_factor for side in (length, min(tile_length, length)))
            overlap = min(tile_overlap // self.vae_scale_factor, tile_length - 1)
            starts, weights = self.tile_weights(length, tile_length, overlap)
            sides.append(
                [(slice(start, start + tile_length), row) for start, row in zip(starts, weights, strict=True)]
            )
        self._tiles = [
            (rows, columns, row_weights[:, None] * column_weights)
            for rows, row_weights in sides[0]
            for columns, column_weights in sides[1]
        ]
        self._tile_batch_size = tile_batch_size

        # 3. Conditions, time grid, noise
        batch_size = self.get_batch_size(
            image=pixels, class_labels=class_labels, prompt=prompt, prompt_embeds=prompt_embeds
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
            noise_level=float(noise_level),
        )
        conditions = DynaDiTTiledConditions(**vars(conditions), num_tiles=min(tile_batch_size, len(self._tiles)))
        timesteps = self.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        latents = self.prepare_latents(batch_size * num_images_per_prompt, height, width, generator, latents, device)

        # 4. The low-resolution image, one row for each result
        copies = batch_size // len(pixels) * num_images_per_prompt
        pixels = self.image_processor.normalize(pixels).to(device).repeat_interleave(copies, dim=0)
        condition = self.prepare_condition(pixels, noise_level, generator)

        # 5. Loop
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
            condition_channels=lambda i: condition,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 6. Images
        images = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, compute_ratio) if output_compute_ratio else (images,)
        return DynaDiTPipelineOutput(images=images, compute_ratio=compute_ratio)
