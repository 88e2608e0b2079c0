# SPDX-License-Identifier: Apache-2.0
"""What the pipelines of the dynamic diffusion transformer share: conditions, time grid, latents, the denoising loop."""

import difflib
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import retrieve_timesteps
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

# Which pipeline draws with which transformer.
TASKS = {
    "generate": "DynaDiTPipeline",
    "text-to-image": "DynaDiTTextToImagePipeline",
    "inpaint": "DynaDiTInpaintPipeline",
    "upscale": "DynaDiTUpscalePipeline",
}


@dataclass
class DynaDiTPipelineOutput(BaseOutput):
    """
    Output of the pipelines of the dynamic diffusion transformer.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): one entry per image, as `output_type` says.
        compute_ratio (`float`, *optional*):
            Multiply-accumulates of the transformer's blocks over those of the complete model, the mean of all images
            and model calls, those of the null class included. `None` unless it was asked for.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    compute_ratio: float | None = None


@dataclass
class DynaDiTConditions:
    """
    What a trajectory is conditioned on, one row per image; with guidance the rows of all images and then, in the same
    order, the rows of their null half.

    Args:
        class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): labels, the null class included.
        encoder_hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*): text states.
        encoder_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            Boolean, True where to attend; `None` attends to all.
        caption_dropout_mask (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Boolean, True where the learned null caption stands in for the text states.
        noise_level (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`, *optional*):
            Noise level of the condition channels, in [0, 1000] as a timestep.
    """

    class_labels: torch.Tensor | None = None
    encoder_hidden_states: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    caption_dropout_mask: torch.Tensor | None = None
    noise_level: float | torch.Tensor | None = None

    def rows(self, num_rows: int) -> "DynaDiTConditions":
        """The first `num_rows` rows: views of the same memory, in which the transformer finds what it prepared."""
        values = vars(self).items()
        has_rows = {name for name, value in values if torch.is_tensor(value) and value.ndim > 0}
        return replace(self, **{name: value[:num_rows] for name, value in values if name in has_rows})

    def model_kwargs(self) -> dict:
        """The arguments of the transformer, those of other tasks left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if name == "class_labels" or value is not None}


class DynaDiTPipelineBase(DiffusionPipeline, SanaLoraLoaderMixin):
    r"""
    What the pipelines of the dynamic diffusion transformer share. A pipeline adds its own `__init__`, which calls
    [`_register`], its `check_inputs`, and a `__call__` in this order:

    1. [`check_common_inputs`], [`check_conditions`], and then `_begin_run`, which keeps the guidance scale;
    2. [`prepare_conditions`] for the rows of all images;
    3. [`set_timesteps`], and with a `strength` [`get_timesteps`], which leaves the first steps out;
    4. [`prepare_latents`], from noise or from what [`encode_image`] made of an image;
    5. [`denoise`], the loop;
    6. [`decode_latents`] and the image processor, as [`postprocess`].

    LoRA weights of the transformer are loaded and saved as in diffusers' pipelines (`load_lora_weights`,
    `save_lora_weights`, `fuse_lora`, `unfuse_lora`, `set_adapters`), whose keys begin with `transformer.`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]

    # Components

    def _register(self, task: str, id2label: dict | None = None, **components) -> None:
        """
        Checks that the components fit each other and the task, and registers them.

        Args:
            task (`str`):
                `"generate"`, `"text-to-image"`, `"inpaint"` or `"upscale"`, or several of them with `|` between them:
                what the transformer may have been trained for.
            id2label (`dict[int, str]`, *optional*): name of each class; saved by pipelines that take it.
            components: all components by name, `None` for what the pipeline goes without.
        """
        transformer, vae = components["transformer"], components["vae"]
        if "noise_level_conditioning" not in getattr(transformer, "config", {}):
            raise TypeError(
                f"`transformer` is {type(transformer).__name__}. Use a DynaDiTTransformer2DModel; `diffusers_dyna.conversion` "
                "makes one of public weights of DiT, SiT and DyDiT."
            )
        config = transformer.config
        trained_for = self._task_of(transformer)
        if trained_for not in task.split("|"):
            raise ValueError(
                f"`transformer` was made for another task ({trained_for}) than {type(self).__name__} "
                f"({task.replace('|', ', ')}). Use {TASKS[trained_for]}."
            )
        # The image without what is to be painted, and the mask; the low-resolution image.
        condition_channels = {"inpaint": config.in_channels + 1, "upscale": config.in_channels}.get(trained_for, 0)
        if config.condition_channels != condition_channels:
            raise ValueError(
                f"`transformer` has `condition_channels`={config.condition_channels}, but for the task {trained_for} with "
                f"`in_channels`={config.in_channels} there must be {condition_channels}. Use a transformer trained for it."
            )
        if vae is not None and "block_out_channels" not in vae.config:  # which tell by how much it shrinks an image
            raise TypeError(
                f"`vae` is {type(vae).__name__}, whose config has no `block_out_channels`. Use a VAE such as AutoencoderKL "
                "or AutoencoderTiny."
            )
        if vae is not None and vae.config.latent_channels != config.in_channels:
            raise ValueError(
                f"`vae` has latents of {vae.config.latent_channels} channels, but `transformer` takes "
                f"{config.in_channels}. Use the VAE that the transformer was trained with."
            )
        text_encoder = components.get("text_encoder")
        if getattr(getattr(text_encoder, "config", None), "is_encoder_decoder", False):
            raise TypeError(
                f"`text_encoder` is {type(text_encoder).__name__}, which has a decoder too. Use a class of the encoder "
                "alone, for T5 T5EncoderModel."
            )
        if text_encoder is not None and self._text_channels(transformer) is not None:
            width = _hidden_size(text_encoder)
            if width != self._text_channels(transformer):
                raise ValueError(
                    f"`text_encoder` has hidden states of width {width}, but `transformer` reads text of width "
                    f"{self._text_channels(transformer)} (`caption_channels`, else `cross_attention_dim`). Use the text "
                    "encoder that the transformer was trained with."
                )
        self.register_modules(**components)
        if "id2label" in inspect.signature(type(self).__init__).parameters:
            # JSON has string keys only; they are written as such, so that a saved pipeline equals the one in memory.
            self.register_to_config(
                id2label={str(k): v for k, v in id2label.items()} if id2label is not None else None
            )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @staticmethod
    def _text_channels(transformer) -> int | None:
        """Width of the text states that the transformer takes, `None` for one without text."""
        return transformer.config.caption_channels or transformer.config.cross_attention_dim

    @staticmethod
    def _task_of(transformer) -> str:
        config = transformer.config
        if config.noise_level_conditioning:
            return "upscale"
        if config.condition_channels > 0:
            return "inpaint"
        return "text-to-image" if transformer.takes_text else "generate"

    @property
    def id2label(self) -> dict[int, str] | None:
        """Name of each class, by label."""
        names = self.config.get("id2label")
        return {int(label): name for label, name in names.items()} if names is not None else None

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DynaDiTPipelineBase":
        """
        A pipeline of this class from the components of another one, which both then share. Unlike diffusers' own, which
        casts them to float32, it leaves their dtypes as they are unless it is given one.

        Args:
            pipeline (`DiffusionPipeline`): where the components and the settings come from.
            kwargs (`dict`):
                Components and settings of this class in the place of those of `pipeline`, and further arguments of
                diffusers' `from_pipe`; `dtype`, or `torch_dtype`, casts the components, those of `pipeline` with them.

        Returns:
            The new pipeline.
        """
        # Those that a pipeline of classes does not have: what is said then is that the transformer takes no text.
        for name in {"text_encoder", "tokenizer"} & inspect.signature(cls.__init__).parameters.keys():
            if not hasattr(pipeline, name):
                kwargs.setdefault(name, None)
        if any(kwargs.get(name) is not None for name in ("dtype", "torch_dtype", "custom_pipeline")):
            return super().from_pipe(pipeline, **kwargs)
        # diffusers ends with `to(dtype=...)` of the new pipeline: it is made as a class in which that does nothing.
        uncast = type(cls.__name__, (cls,), {"to": lambda self, dtype: self})
        new_pipeline = super(DynaDiTPipelineBase, uncast).from_pipe(pipeline, **kwargs)
        new_pipeline.__class__ = cls
        return new_pipeline

    # What a call is doing

    def _begin_run(
        self, guidance_scale: float, guidance_rescale: float = 0.0, attention_kwargs: dict | None = None
    ) -> None:
        """Keeps what the properties below tell, for callbacks."""
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        self._current_timestep = None
        self._compute_ratios = []  # of all model calls of the run

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

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

    # Checks

    @staticmethod
    def check_integer(name: str, value, lowest: int = 1) -> None:
        """Raises a `ValueError` for an argument that is no integer, or less than `lowest`."""
        if not isinstance(value, numbers.Integral) or value < lowest:
            raise ValueError(f"`{name}`={value!r} must be a whole number, at least {lowest}.")

    @staticmethod
    def check_number(name: str, value) -> None:
        """Raises a `TypeError` for an argument that is no number."""
        if not isinstance(value, numbers.Real):
            raise TypeError(f"`{name}`={value!r} must be a number.")

    @staticmethod
    def check_names(name: str, value) -> None:
        """Raises a `TypeError` for an argument that is neither a list of names nor `None`."""
        is_list = isinstance(value, (list, tuple, set)) and all(isinstance(entry, str) for entry in value)
        if value is not None and not is_list:
            example = [value] if isinstance(value, str) else ["latents"]
            raise TypeError(f"`{name}`={value!r} must be a list of names, such as {example}.")

    @staticmethod
    def check_tensor(name: str, value) -> None:
        """Raises a `TypeError` for an argument that is neither a tensor nor `None`."""
        if value is not None and not torch.is_tensor(value):
            raise TypeError(f"`{name}` must be a tensor, but is {type(value).__name__}. Use `torch.as_tensor`.")

    @staticmethod
    def check_text(name: str, value) -> None:
        """Raises a `TypeError` for an argument that is neither a text, a list of them nor `None`."""
        entries = value if isinstance(value, (list, tuple)) else [value]
        others = [type(entry).__name__ for entry in entries if not isinstance(entry, str)]
        if value is not None and others:
            hint = " It is the first argument of a call: give an image as `image=`." if name == "prompt" else ""
            raise TypeError(
                f"`{name}` must be a text or a list of texts, but {'has' if isinstance(value, (list, tuple)) else 'is'} {others[0]}.{hint}"
            )

    def default_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width in pixels; where they are `None`, those of the images that the transformer was made for."""
        size = self.transformer.config.sample_size
        sides = zip((height, width), (size, size) if isinstance(size, int) else size, strict=True)
        return tuple(own * self.vae_scale_factor if side is None else side for side, own in sides)

    def check_size(self, height: int, width: int) -> None:
        """Raises a `ValueError` that names the nearest valid size, for a size in pixels that does not divide."""
        self.check_integer("height", height)
        self.check_integer("width", width)
        patch_size = self.transformer.config.patch_size
        factor = patch_size * self.vae_scale_factor
        if height % factor or width % factor:
            nearest = [max(1, int(size / factor + 0.5)) * factor for size in (height, width)]
            raise ValueError(
                f"`height` and `width` must be divisible by {factor} (`patch_size` {patch_size} x scale "
                f"factor {self.vae_scale_factor} of the VAE), but are {height} and {width}. The nearest valid size is "
                f"{nearest[0]} and {nearest[1]}."
            )

    def check_common_inputs(
        self,
        *,
        height: int,
        width: int,
        num_inference_steps: int | None,
        timesteps: list[float] | None,
        sigmas: list[float] | None,
        guidance_interval: tuple[float, float] | None,
        guidance_channels: int | None,
        num_images_per_prompt: int,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
        guidance_rescale: float = 0.0,
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument for what all pipelines take."""
        if self.transformer.training:
            raise ValueError(
                "`transformer` is in training mode, in which it drops labels and computes everything. Call "
                "`pipe.transformer.eval()` first."
            )
        config = self.transformer.config
        self.check_size(height, width)
        if num_inference_steps is None:
            has_steps = timesteps is not None or sigmas is not None
        else:
            self.check_number("num_inference_steps", num_inference_steps)
            has_steps = num_inference_steps % 1 == 0 and num_inference_steps >= 1
        if not has_steps:
            raise ValueError(f"`num_inference_steps`={num_inference_steps} must be a whole number, at least 1.")
        self.check_number("eta", eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta`={eta} must be in [0, 1].")
        self.check_integer("num_images_per_prompt", num_images_per_prompt)

        self.check_number("guidance_rescale", guidance_rescale)
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale`={guidance_rescale} must be in [0, 1].")
        if guidance_interval is not None and not (
            isinstance(guidance_interval, (list, tuple))
            and len(guidance_interval) == 2
            and all(isinstance(level, numbers.Real) for level in guidance_interval)
            and 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(
                f"`guidance_interval`={guidance_interval!r} must be two noise levels in [0, 1], the lower one first."
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
        self.check_names("callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs)
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but only "
                f"{self._callback_tensor_inputs} can be passed on."
            )

        if self.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(
                "The scheduler has `use_dynamic_shifting`, whose `mu` no size of this model tells. Load it by "
                "`from_config(config, use_dynamic_shifting=False, shift=...)`."
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

    # Conditions

    def get_label_ids(self, label: int | str | list[int | str] | torch.Tensor | np.ndarray) -> list[int]:
        """
        Maps class names to labels; labels are returned as they are.

        Args:
            label (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`):
                Labels, or names as in `id2label`.

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

        label = label.tolist() if isinstance(label, (torch.Tensor, np.ndarray)) else label
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

    @staticmethod
    def get_batch_size(**given) -> int:
        """
        Number of different conditions, each of which is there once or as many times as the others; 1 without any.

        Args:
            given (`dict`):
                Labels, texts and images under the names of the arguments, single or as a list or batch; `None` is left
                out.

        Returns:
            `int`: at least 1.

        Raises:
            `ValueError`: on an empty list, and on different numbers other than 1.
        """
        sizes = {}
        for name, value in given.items():
            if value is not None:
                is_many = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0
                sizes[name] = len(value) if is_many else 1
                if sizes[name] == 0:
                    raise ValueError(f"`{name}` is empty. Give at least one {name.split('_')[-1].rstrip('s')}.")
        if len(set(sizes.values()) - {1}) > 1:
            listed = ", ".join(f"`{name}` {size}" for name, size in sizes.items())
            raise ValueError(f"There must be as many of each, or one for all, but there are: {listed}.")
        return max(sizes.values(), default=1)

    def check_conditions(
        self,
        guidance_scale: float,
        class_labels=None,
        prompt=None,
        negative_prompt=None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        """Raises a `ValueError` or `TypeError` for labels, texts or guidance that the transformer cannot work with."""
        self.check_number("guidance_scale", guidance_scale)
        if not math.isfinite(guidance_scale):  # nan is not above 1 and would turn guidance off
            raise ValueError(
                f"`guidance_scale`={guidance_scale} must be finite. Use `guidance_scale=1` for no guidance."
            )
        self.check_text("prompt", prompt)
        self.check_text("negative_prompt", negative_prompt)
        num_classes, null_class_label = self.transformer.config.num_classes, self.transformer.null_class_label
        if class_labels is not None and num_classes is None:
            raise ValueError(
                "`class_labels` were given, but the transformer is unconditional (`num_classes` is None)."
            )
        if class_labels is None and num_classes is not None and null_class_label is None:
            raise ValueError(
                f"`class_labels` must be given: the transformer has {num_classes} classes and no null class."
            )
        has_prompt = prompt is not None or prompt_embeds is not None
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        width = self._text_channels(self.transformer)
        if width is None:
            if has_prompt or has_negative:
                raise ValueError(
                    "`prompt` or one of its kind was given, but the transformer has no text conditioning. Use a "
                    "transformer trained on captions."
                )
            if guidance_scale > 1 and (class_labels is None or null_class_label is None):
                raise ValueError(
                    f"`guidance_scale`={guidance_scale} needs `class_labels` and a transformer trained with a null "
                    "class (`class_dropout_prob` above 0). Use `guidance_scale=1`."
                )
            return

        for prefix, text, embeds, mask in (
            ("", prompt, prompt_embeds, prompt_attention_mask),
            ("negative_", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if text is not None and embeds is not None:
                raise ValueError(f"`{prefix}prompt` and `{prefix}prompt_embeds` were both given. Give one of them.")
            if text is not None and (self.text_encoder is None or self.tokenizer is None):
                raise ValueError(
                    f"`{prefix}prompt` needs `text_encoder` and `tokenizer`, which the pipeline was loaded without. "
                    f"Give `{prefix}prompt_embeds`."
                )
            self.check_tensor(f"{prefix}prompt_embeds", embeds)
            self.check_tensor(f"{prefix}prompt_attention_mask", mask)
            if embeds is None and mask is not None:
                raise ValueError(
                    f"`{prefix}prompt_attention_mask` was given without `{prefix}prompt_embeds`. It is made from "
                    "texts; give it beside embeddings only."
                )
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape):
                raise ValueError(
                    f"`{prefix}prompt_embeds` must have shape (batch_size, num_tokens, {width}), but has shape "
                    f"{tuple(embeds.shape)}."
                )
            if mask is not None and mask.shape != embeds.shape[:2]:
                raise ValueError(
                    f"`{prefix}prompt_attention_mask` must have shape {tuple(embeds.shape[:2])}, as "
                    f"`{prefix}prompt_embeds`, but has shape {tuple(mask.shape)}."
                )
            if mask is not None and not mask.bool().any(dim=1).all():
                raise ValueError(
                    f"`{prefix}prompt_attention_mask` masks all tokens of a text. Leave one to attend to."
                )

        if max_sequence_length is not None:
            self.check_integer("max_sequence_length", max_sequence_length)
        has_null = self.transformer.has_null_caption
        if not has_prompt and not has_null:
            raise ValueError(
                "`prompt` or `prompt_embeds` must be given: the transformer has no null caption "
                "(`caption_dropout_prob` is 0)."
            )
        if has_negative and not has_prompt:
            raise ValueError("`negative_prompt` was given without a `prompt`: there is nothing to guide.")
        if has_negative and guidance_scale <= 1:
            logger.warning(
                f"`negative_prompt` has no effect without guidance: `guidance_scale`={guidance_scale} must be above 1."
            )
        can_guide = (has_prompt or class_labels is not None) and (has_null or has_negative)
        if guidance_scale > 1 and not (can_guide and (num_classes is None or null_class_label is not None)):
            raise ValueError(
                f"`guidance_scale`={guidance_scale} needs a `prompt`, and a `negative_prompt` or a transformer trained "
                "with a null caption (`caption_dropout_prob` above 0), and with a null class if it has classes. Use "
                "`guidance_scale=1`."
            )
        if has_negative:
            number = self.get_batch_size(prompt=prompt, prompt_embeds=prompt_embeds)
            given = negative_prompt_embeds if negative_prompt is None else negative_prompt
            if not isinstance(given, str) and len(given) not in (1, number):
                name = "negative_prompt" if negative_prompt is not None else "negative_prompt_embeds"
                raise ValueError(
                    f"`{name}` has {len(given)} entries, but there are {number} prompts. Give 1 or {number}."
                )

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Encodes texts: the last hidden states of the text encoder, padded to the longest text of a batch.

        Args:
            prompt (`str` or `list[str]`, *optional*): texts to draw.
            do_classifier_free_guidance (`bool`, defaults to `True`): without it, nothing negative is encoded.
            negative_prompt (`str` or `list[str]`, *optional*): texts to guide away from, one or as many as prompts.
            num_images_per_prompt (`int`, defaults to `1`): copies of each row.
            device (`torch.device`, *optional*): where the transformer runs.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states in the place of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states in the place of `negative_prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                True, or 1, where to attend; `None` attends to all.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                As `prompt_attention_mask`.
            max_sequence_length (`int`, *optional*):
                Most tokens of a text; what is longer is cut, with a warning. `None` is what the tokenizer and the text
                encoder take, 128 where they tell no number.

        Returns:
            `tuple`: `prompt_embeds`, `prompt_attention_mask`, `negative_prompt_embeds` and
            `negative_prompt_attention_mask`, in the dtype of the transformer and boolean. A mask is `None` where
            nothing is masked. The negative ones are `None` without a negative text: the learned null caption, which
            needs no encoder, stands in the null half.
        """
        device = device or self._execution_device
        encoded = []
        for name, text, embeds, mask in (
            ("prompt", prompt, prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if name == "negative_prompt" and not do_classifier_free_guidance:
                text = embeds = None
            if text is not None:
                embeds, mask = self._encode_text(name, text, max_sequence_length, device)
            if embeds is None:
                encoded += [None, None]
                continue
            embeds = embeds.to(device=device, dtype=self.transformer.dtype)
            mask = None if mask is None or mask.bool().all() else mask.to(device=device, dtype=torch.bool)
            if name == "negative_prompt" and len(embeds) == 1 and encoded[0] is not None:
                copies = len(encoded[0])  # one negative text for all prompts
            else:
                copies = num_images_per_prompt
            encoded.append(embeds.repeat_interleave(copies, dim=0))
            encoded.append(None if mask is None else mask.repeat_interleave(copies, dim=0))
        return tuple(encoded)

    def _encode_text(self, name: str, text: str | list[str], max_sequence_length: int | None, device) -> tuple:
        texts = [text] if isinstance(text, str) else list(text)
        # transformers gives a huge number where nothing is known
        most = min(
            self.tokenizer.model_max_length, getattr(self.text_encoder.config, "max_position_embeddings", 2**30)
        )
        longest = max_sequence_length or (most if most < 2**16 else 128)
        if longest > most:
            raise ValueError(
                f"`max_sequence_length`={longest} is more than the {most} tokens that `text_encoder` takes."
            )
        tokens = self.tokenizer(texts, padding="longest", max_length=longest, truncation=True, return_tensors="pt")
        for entry, ids in zip(texts, self.tokenizer(texts, verbose=False).input_ids, strict=True):
            if len(ids) > longest:
                logger.warning(
                    f"`{name}` has {len(ids)} tokens, but the first {longest} count. This part was cut off: "
                    f"{self.tokenizer.decode(ids[longest - 1 :], skip_special_tokens=True)!r}."
                )
            if len(ids) == 0:
                raise ValueError(f"`{name}` {entry!r} has no tokens. Write a text that the tokenizer knows.")
        mask = tokens.attention_mask.to(device)
        output = self.text_encoder(input_ids=tokens.input_ids.to(device), attention_mask=mask)
        return output.last_hidden_state, mask

    def prepare_conditions(
        self,
        batch_size: int,
        num_images_per_prompt: int,
        device: torch.device,
        class_labels=None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        noise_level: float | None = None,
    ) -> DynaDiTConditions:
        """
        The conditions of all rows of a run. Without labels or a prompt, the null class and the null caption stand in
        for them; with guidance (see `_begin_run`), the null half follows.

        Args:
            batch_size (`int`):
                Rows before `num_images_per_prompt`: what [`get_batch_size`] returned, or the number of images given;
                single labels and prompts are repeated.
            num_images_per_prompt (`int`): copies of each row, which stand beside each other.
            device (`torch.device`): where the transformer runs.
            class_labels (`int`, `str`, a list of them, or `torch.Tensor` or `np.ndarray` of shape `(batch_size,)`, *optional*):
                Labels or names.
            prompt (`str` or `list[str]`, *optional*): see [`encode_prompt`], as for the following ones.
            negative_prompt (`str` or `list[str]`, *optional*): texts in the null half.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*): text states.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*): of `prompt_embeds`.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`, *optional*):
                Text states of the null half.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                Of `negative_prompt_embeds`.
            max_sequence_length (`int`, *optional*): most tokens of a text.
            noise_level (`float`, *optional*): for a transformer that takes it, in [0, 1000].

        Returns:
            [`DynaDiTConditions`]: `batch_size * num_images_per_prompt` rows, twice as many with guidance.
        """
        num_rows = batch_size * num_images_per_prompt
        guided = self.do_classifier_free_guidance
        conditions = DynaDiTConditions(noise_level=noise_level)

        null_class_label = self.transformer.null_class_label
        label_ids = None
        if class_labels is not None:
            label_ids = self.get_label_ids(class_labels)
            label_ids = label_ids * batch_size if len(label_ids) == 1 else label_ids
            label_ids = [label for label in label_ids for _ in range(num_images_per_prompt)]
        elif null_class_label is not None:
            label_ids = [null_class_label] * num_rows
        if label_ids is not None:
            label_ids += [null_class_label] * num_rows if guided else []
            conditions.class_labels = torch.tensor(label_ids, device=device)

        if prompt is not None or prompt_embeds is not None:
            embeds, mask, negative_embeds, negative_mask = self.encode_prompt(
                prompt,
                guided,
                negative_prompt,
                num_images_per_prompt,
                device,
                prompt_embeds,
                negative_prompt_embeds,
                prompt_attention_mask,
                negative_prompt_attention_mask,
                max_sequence_length,
            )
            states = [(embeds, mask)]
            if guided:
                has_negative = negative_embeds is not None
                states.append((negative_embeds, negative_mask) if has_negative else (torch.zeros_like(embeds), None))
                if not has_negative:
                    conditions.caption_dropout_mask = torch.arange(2 * num_rows, device=device) >= num_rows
            conditions.encoder_hidden_states, conditions.encoder_attention_mask = _stack_texts(states, num_rows)
        return conditions

    # Time grid

    def set_timesteps(
        self,
        num_inference_steps: int | None,
        device: torch.device,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Sets the scheduler's grid, from its first step on.

        Args:
            num_inference_steps (`int`, *optional*): steps, on the scheduler's own grid.
            device (`torch.device`): where the transformer runs.
            timesteps (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `timesteps`.
            sigmas (`list[float]`, *optional*): grid for schedulers whose `set_timesteps` takes `sigmas`.
            kwargs (`dict`): further arguments of the scheduler's `set_timesteps`, as `reverse=True` of our ODE scheduler.

        Returns:
            `torch.Tensor` of shape `(num_calls,)`: the times of the transformer's calls, `scheduler.timesteps`.
        """
        # The default grid of FlowMatchEulerDiscreteScheduler spends its last step near sigma = 0 and shifts twice
        # there; the even grid that it is given instead is the one our own scheduler makes.
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) and timesteps is None and sigmas is None:
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        self._grid = {"device": device, "timesteps": timesteps, "sigmas": sigmas, **kwargs}
        self._grid["num_inference_steps"] = num_inference_steps
        self._restart_scheduler(0)
        return self.scheduler.timesteps

    def _restart_scheduler(self, begin_index: int) -> None:
        """A fresh trajectory on the grid that was set, from the call `begin_index` on."""
        retrieve_timesteps(self.scheduler, **self._grid)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin_index)

    def get_timesteps(self, strength: float) -> torch.Tensor:
        """
        Leaves out the first steps of the grid, and tells the scheduler where the trajectory begins.

        Args:
            strength (`float`): share of the steps to take, in (0, 1]; `1` takes all, from pure noise.

        Returns:
            `torch.Tensor` of shape `(num_calls,)`: the last entries of `scheduler.timesteps`; the first of them is the
            time of the latents to start from, see [`prepare_latents`].

        Raises:
            `ValueError`: if no step is left.
        """
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        num_steps = -(-len(timesteps) // order)
        begin_index = int(max(num_steps - num_steps * strength, 0)) * order
        if begin_index >= len(timesteps):
            raise ValueError(f"`strength`={strength} leaves none of the {num_steps} steps. Use a larger one.")
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin_index)
        return timesteps[begin_index:]

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict:
        """The optional arguments of `step` that this scheduler takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        extra_step_kwargs = {}
        if "generator" in accepted:
            extra_step_kwargs["generator"] = generator
        if "eta" in accepted:
            extra_step_kwargs["eta"] = eta
        return extra_step_kwargs

    # Latents

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
        image_latents: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        What a trajectory starts from, in float32 whatever the dtype of the transformer: the state is kept in full
        precision, and rounding does not add up over the steps.

        Args:
            batch_size (`int`): number of images.
            height (`int`): of the image, in pixels.
            width (`int`): of the image, in pixels.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                With a list, an image depends on its own generator only and not on the batch it is in.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                Standard normal noise to use instead of drawing it.
            device (`torch.device`): where the transformer runs.
            image_latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, *optional*):
                A clean image, as [`encode_image`] makes it, to start from instead of pure noise.
            timestep (`torch.Tensor` of shape `()`, *optional*):
                Time to which `image_latents` are noised: the first of [`get_timesteps`].

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
        self._check_generators(generator, batch_size)
        self.check_tensor("latents", latents)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, but has shape {tuple(latents.shape)}.")
        else:
            latents = latents.to(device=device, dtype=torch.float32)
        if image_latents is not None:
            return self.add_noise(image_latents.to(device=device, dtype=torch.float32), latents, timestep)
        # FlowMatchEulerDiscreteScheduler has no `init_noise_sigma`: its noise has unit variance.
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @staticmethod
    def _check_generators(generator, num_images: int) -> None:
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {num_images} images are to be drawn.")

    def add_noise(self, sample: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """
        The state of a clean sample at a time of the scheduler's grid. Schedulers of diffusers read the noise level off
        the place of the trajectory: only its start, or after a step its next time, is right for them.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`): clean latents.
            noise (`torch.Tensor` with the shape of `sample`): standard normal noise.
            timestep (`torch.Tensor` of shape `()`): an entry of `scheduler.timesteps`.

        Returns:
            `torch.Tensor` with the shape of `sample`.
        """
        timesteps = timestep.expand(len(sample))
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(sample, timesteps, noise)
        return self.scheduler.add_noise(sample, noise, timesteps)

    def read_image(
        self, image, name: str = "image", channels: int | None = None, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """
        Images of any kind as one batch.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                Images, of one size unless `size` is given. Images of Pillow are converted to the number of channels;
                arrays have shape `(batch_size, height, width, channels)`, tensors `(batch_size, channels, height,
                width)`, both in [0, 1], and may go without the batch, and without the channels where there is one.
            name (`str`, defaults to `"image"`): the argument, for messages.
            channels (`int`, *optional*): `None` is that of what the pipeline draws.
            size (`tuple[int, int]`, *optional*):
                Height and width in pixels to resize to, bicubic with antialiasing. `None` is that of the images.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: float32 in [0, 1].

        Raises:
            `TypeError`: on something else than images, and where there is none.
            `ValueError`: on several sizes, on a wrong number of channels, and on values outside [0, 1].
        """
        if image is None:
            raise TypeError(f"`{name}` was not given. Give an image of Pillow, an array or a tensor as `{name}=`.")
        if channels is None:
            channels = (self.transformer if self.vae is None else self.vae).config.in_channels
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        kinds = {
            next((kind for kind in (PIL.Image.Image, np.ndarray, torch.Tensor) if isinstance(one, kind)), None)
            for one in images
        }
        if len(kinds) != 1 or None in kinds:
            raise TypeError(
                f"`{name}` must be an image of Pillow, an array, a tensor, or a list of one of these kinds, but is "
                f"{type(image).__name__}{f' of {sorted({type(one).__name__ for one in images})}' if images != [image] else ''}."
            )
        batches = []
        for one in images:
            if isinstance(one, PIL.Image.Image):
                one = np.asarray(self.convert_image(one, channels, name), dtype=np.float32) / 255
            shape = tuple(one.shape)
            is_array = isinstance(one, np.ndarray)
            one = torch.as_tensor(one.copy() if is_array else one)  # any strides
            if one.ndim == 2:
                one = one[None, None]
            elif one.ndim == 3:
                has_channels = shape[-1 if is_array else 0] == channels
                one = one[None] if has_channels else one.unsqueeze(-1 if is_array else 1)
            if is_array and len(shape) > 2:
                one = one.permute(0, 3, 1, 2)
            if one.ndim != 4 or one.shape[1] != channels or 0 in shape:
                expected = "(height, width, channels)" if is_array else "(channels, height, width)"
                raise ValueError(
                    f"`{name}` must have shape {expected} with {channels} channels, or a batch of them, but has shape {shape}."
                )
            one = one.float()
            lowest, highest = one.min().item(), one.max().item()
            if not 0 <= lowest <= highest <= 1:
                raise ValueError(
                    f"`{name}` must have values in [0, 1], but they are in [{lowest:g}, {highest:g}]. Divide bytes by "
                    "255, and shift what is in [-1, 1] by `image / 2 + 0.5`."
                )
            if size is not None and one.shape[2:] != size:
                one = F.interpolate(one, size=size, mode="bicubic", antialias=True).clamp(0, 1)
            batches.append(one)
        sizes = sorted({tuple(batch.shape[2:]) for batch in batches})
        if len(sizes) > 1:
            listed = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(f"`{name}` has images of several sizes: {listed}. Call the pipeline for each of them.")
        return torch.cat(batches)

    @staticmethod
    def convert_image(image: PIL.Image.Image, channels: int, name: str = "image") -> PIL.Image.Image:
        """
        Args:
            image (`PIL.Image.Image`): of any mode with 8 bits a channel. What is transparent becomes opaque.
            channels (`int`): 1 for gray, 3 for RGB.
            name (`str`, defaults to `"image"`): the argument, for messages.

        Returns:
            `PIL.Image.Image`: of mode L or RGB.

        Raises:
            `ValueError`: on another number of channels, and on modes of more bits, which Pillow would cut at 255.
        """
        if channels not in (1, 3):
            raise ValueError(f"`{name}` must have {channels} channels. Give a tensor instead of an image of Pillow.")
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"`{name}` is an image of Pillow of mode {image.mode!r}, of more than 8 bits. Give an array with values in "
                "[0, 1], such as `numpy.asarray(image) / 65535` for 16 bits."
            )
        return image.convert("L" if channels == 1 else "RGB")

    def encode_image(
        self,
        image: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_mode: str = "sample",
    ) -> torch.Tensor:
        """
        Encodes images by the VAE.

        Args:
            image (`torch.Tensor` of shape `(batch_size, channels, height, width)`): in [-1, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Draws from the VAE's posterior. A list has one for each image.
            sample_mode (`str`, defaults to `"sample"`): `"sample"` draws, `"argmax"` is the mean of the posterior.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`, float32, scaled by
            `vae.config.scaling_factor`. Without a VAE, the image itself.
        """
        if self.vae is None:
            return image.float()
        config = self.vae.config
        if isinstance(generator, list):
            self._check_generators(generator, len(image))
            rows = [self.encode_image(image[i : i + 1], one, sample_mode) for i, one in enumerate(generator)]
            return torch.cat(rows)
        output = self.vae.encode(image.to(self.vae.dtype))
        if not hasattr(output, "latent_dist"):  # AutoencoderTiny has none
            latents = output.latents
        else:
            latents = output.latent_dist.sample(generator) if sample_mode == "sample" else output.latent_dist.mode()
        return (latents.float() - (config.get("shift_factor") or 0.0)) * config.scaling_factor

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

    def postprocess(
        self, latents: torch.Tensor, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Latents as images of the given `output_type`; `"latent"` is the latents as they are."""
        image = latents if output_type == "latent" else self.decode_latents(latents)
        return self.image_processor.postprocess(image, output_type=output_type)

    # The loop

    def denoise(
        self,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        conditions: DynaDiTConditions,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        complete_model: bool = False,
        width_mult: float | None = None,
        max_plan_bytes: int = 2**30,
        output_compute_ratio: bool = False,
        condition_channels: Callable[[int], torch.Tensor] | None = None,
        after_step: Callable[[int, int, torch.Tensor], torch.Tensor] | None = None,
        steps: list[int] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback_tensors: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, float | None]:
        r"""
        The denoising loop, on the grid and from the place that [`set_timesteps`] and [`get_timesteps`] told the
        scheduler; also the way from data to noise, on a reversed grid.

        The guidance scale, its rescaling and `attention_kwargs` are those of `_begin_run`. A guided step evaluates the
        transformer on both halves in one call of [`_predict`], the others on the first half.

        Args:
            timesteps (`torch.Tensor` of shape `(num_calls,)`):
                What [`set_timesteps`] or [`get_timesteps`] returned. A solver of order 2 and more has several calls,
                so several entries, for each step.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, latent_height, latent_width)`):
                The state at the first of them, float32. Rows may be added that the caller sets by `after_step`, such as
                references whose attention others share; they have rows in `conditions` too.
            conditions ([`DynaDiTConditions`]):
                `batch_size` rows, with guidance as many again for the null half.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): the noise of the scheduler's steps.
            eta (`float`, defaults to `0.0`): the noise of `DDIMScheduler`, in [0, 1].
            guidance_interval (`tuple[float, float]`, *optional*):
                Noise levels in [0, 1] to guide at; `None` guides at all.
            guidance_channels (`int`, *optional*): number of leading channels to guide; `None` guides all.
            complete_model (`bool`, defaults to `False`): run every head, channel group and token.
            width_mult (`float`, *optional*): width of the transformer, in (0, 1], for this run.
            max_plan_bytes (`int`, defaults to `2**30`): memory for what the transformer prepares.
            output_compute_ratio (`bool`, defaults to `False`): measure the share of the complete model's compute.
            condition_channels (`Callable`, *optional*):
                Called as `condition_channels(i)` before call `i`; returns the tensor of shape `(batch_size,
                condition_channels, latent_height, latent_width)` that goes behind the channels of the state.
            after_step (`Callable`, *optional*):
                Called after call `i` of the scheduler as `after_step(i, next_i, latents)`; returns the latents to go
                on from. `next_i` is the entry of `timesteps` at which the next call is, `len(timesteps)` after the
                last one. The latents are at entry `i + 1`; where `next_i` is an earlier one, as `steps` may want it,
                `after_step` has to add the noise that lies between, and the scheduler is at `next_i` by then. With a
                solver of order 2 and more, the latents are a stage inside a step unless `(i + 1) % scheduler.order ==
                0` or `i` is the last call.
            steps (`list[int]`, *optional*):
                Entries of `timesteps` in the order in which to call the transformer; `None` is each once. Where an
                entry is not the one after the last, the scheduler starts afresh there (without what a multistep solver
                remembers): it has to be the first call of a step.
            callback_on_step_end (`Callable`, *optional*):
                Called after each call of the scheduler, so several times in a step of order 2 and more, as
                `callback(pipe, i, timestep, tensors)` with the number `i` of the entry of `timesteps`; may return
                changed tensors. It comes after `after_step`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `("latents",)`):
                The tensors that the callback gets: `"latents"`, and of a model with text `"prompt_embeds"` and
                `"negative_prompt_embeds"`, the two halves of its text states; `None` where the null caption stands.
            callback_tensors (`dict[str, torch.Tensor]`, *optional*):
                Further tensors that the callback may get and change; what it returns is put here, for
                `condition_channels` and `after_step` to look at.

        Returns:
            `tuple`: the final latents, and the compute ratio, the mean of all images and calls since `_begin_run`, or
            `None`.
        """
        steps = list(range(len(timesteps))) if steps is None else steps
        callback_tensors = {} if callback_tensors is None else callback_tensors
        self._num_timesteps = len(steps)
        num_steps = -(-len(steps) // self.scheduler.order)  # with a grid of the user's, its own number
        num_warmup_steps = len(steps) - num_steps * self.scheduler.order
        begin_index = getattr(self.scheduler, "begin_index", None) or 0
        # In float32 whatever the dtype of the transformer: bfloat16 has no 745.3.
        model_timesteps = timesteps.to(torch.float32)
        lowest, highest = guidance_interval or (0.0, 1.0)
        noise_levels = [time / self.scheduler.config.num_train_timesteps for time in model_timesteps.tolist()]
        has_null_half = self.do_classifier_free_guidance
        in_interval = [has_null_half and lowest <= level <= highest for level in noise_levels]
        conditions_of = {True: conditions, False: conditions.rows(len(latents))}  # for guided steps, and for others

        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        num_channels = self.transformer.config.in_channels
        learned_variance = self._learned_variance()
        was_guided = None
        width_before = self.transformer.width_mult
        try:
            if width_mult is not None:
                self.transformer.set_width(width_mult)
            if not complete_model:
                self.transformer.prepare_timesteps(
                    model_timesteps, **conditions_of[any(in_interval)].model_kwargs(), max_plan_bytes=max_plan_bytes
                )

            with self.progress_bar(total=num_steps) as progress_bar:
                for call, (i, next_i) in enumerate(zip(steps, [*steps[1:], len(timesteps)], strict=True)):
                    if self.interrupt:
                        continue
                    t = timesteps[i]
                    self._current_timestep = t
                    # A callback may have changed the scale, or switched guidance off.
                    is_guided = in_interval[i] and self.do_classifier_free_guidance

                    model_input = latents
                    if hasattr(self.scheduler, "scale_model_input"):
                        model_input = self.scheduler.scale_model_input(model_input, t)
                    if condition_channels is not None:
                        model_input = torch.cat([model_input, condition_channels(i).to(model_input)], dim=1)
                    model_input = model_input.to(self.transformer.dtype)
                    if is_guided:
                        model_input = torch.cat([model_input, model_input])
                    if not complete_model:
                        self.transformer.set_plan_step(i)
                    # What a feature cache holds is of no use to another run, nor to a batch with another half.
                    if is_guided != was_guided:
                        self.transformer._reset_stateful_cache()
                    was_guided = is_guided
                    model_output, compute_ratio = self._predict(
                        model_input,
                        model_timesteps[i],
                        conditions_of[is_guided],
                        "cond_uncond" if is_guided else "cond",
                        complete_model=complete_model,
                        output_masks=output_compute_ratio,
                        attention_kwargs=self.attention_kwargs,
                    )
                    if output_compute_ratio:
                        self._compute_ratios.append(compute_ratio)

                    model_output = model_output.float()
                    if is_guided:
                        model_output = self._guide(*model_output.chunk(2), guidance_channels or num_channels)
                    if not learned_variance:
                        model_output = model_output[:, :num_channels]

                    latents = self.scheduler.step(model_output, t, latents, **extra_step_kwargs, return_dict=False)[0]
                    if next_i not in (i + 1, len(timesteps)):
                        self._restart_scheduler(begin_index + next_i)
                    if after_step is not None:
                        latents = after_step(i, next_i, latents)

                    if callback_on_step_end is not None:
                        texts = _halves_of_text(conditions, len(latents))
                        tensors = {"latents": latents, "prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
                        tensors |= callback_tensors
                        given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        changed = self._changed_tensors(callback_on_step_end(self, i, t, given), tensors)
                        tensors |= changed
                        latents = tensors["latents"]
                        callback_tensors.update({name: tensors[name].to(latents) for name in callback_tensors})
                        if changed.keys() & {"prompt_embeds", "negative_prompt_embeds"}:
                            new_texts = (tensors["prompt_embeds"], tensors["negative_prompt_embeds"])
                            conditions = _with_texts(conditions, len(latents), *new_texts)
                            conditions_of = {True: conditions, False: conditions.rows(len(latents))}

                    if call == len(steps) - 1 or (
                        call + 1 > num_warmup_steps and (call + 1) % self.scheduler.order == 0
                    ):
                        progress_bar.update()
        finally:
            if not complete_model:
                self.transformer.set_plan_step(None)
                self.transformer.clear_plan()
            if width_mult is not None:
                self.transformer.set_width(width_before)
        self._current_timestep = None
        return latents, torch.cat(self._compute_ratios).mean().item() if output_compute_ratio else None

    def _predict(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        conditions: DynaDiTConditions,
        cache_name: str,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        One evaluation of the transformer in the loop. A pipeline that predicts in tiles replaces it, and calls this
        one for each tile, each with a `cache_name` of its own.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels + condition_channels, latent_height, latent_width)`):
                The state and behind it the condition channels, in the transformer's dtype; both halves of a guided step.
            timestep (`torch.Tensor` of shape `()`): time, float32.
            conditions ([`DynaDiTConditions`]): as many rows as `hidden_states`.
            cache_name (`str`): name of the cache context.
            kwargs: `complete_model`, `output_masks` and `attention_kwargs` of the transformer.

        Returns:
            `tuple`: the prediction of shape `(batch_size, out_channels, latent_height, latent_width)`, and with
            `output_masks` the compute ratio of each image, of shape `(batch_size,)`, else `None`.
        """
        with self.transformer.cache_context(cache_name):
            output = self.transformer(hidden_states, timestep, **conditions.model_kwargs(), **kwargs)
        return output.sample, output.compute_ratio

    @staticmethod
    def _changed_tensors(returned: dict | None, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """What a callback returned in the place of `tensors`, checked to fit; `None` leaves them."""
        returned = returned or {}
        changed = {name: new for name, new in returned.items() if new is not None and new is not tensors.get(name)}
        for name, new in changed.items():
            if name not in tensors:
                raise ValueError(
                    f"`callback_on_step_end` returned {name!r}, but only {list(tensors)} can be changed here."
                )
            expected = tensors["prompt_embeds" if name == "negative_prompt_embeds" else name]
            if expected is None:
                raise ValueError(f"`callback_on_step_end` returned `{name}`, but the run has no text to replace.")
            if new.shape != expected.shape:
                raise ValueError(
                    f"`{name}` from `callback_on_step_end` must have shape {tuple(expected.shape)}, as given, but has "
                    f"shape {tuple(new.shape)}."
                )
        return changed

    def _guide(self, model_output: torch.Tensor, null_output: torch.Tensor, num_channels: int) -> torch.Tensor:
        """Classifier-free guidance of the leading channels, the others are those of the conditional half."""
        conditional, null = model_output[:, :num_channels], null_output[:, :num_channels]
        guided = null + self.guidance_scale * (conditional - null)
        if self.guidance_rescale > 0:  # https://huggingface.co/papers/2305.08891, equations 15 and 16
            dims = list(range(1, guided.ndim))
            factor = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
            guided = guided * (self.guidance_rescale * factor + (1 - self.guidance_rescale))
        return torch.cat([guided, model_output[:, num_channels:]], dim=1)


def _hidden_size(text_encoder) -> int:
    """Width of the last hidden states of a text encoder of transformers."""
    config = text_encoder.config
    for name in ("hidden_size", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ValueError(
        f"`text_encoder` ({type(text_encoder).__name__}) has neither `hidden_size` nor `d_model` in its config. Use a "
        "text encoder of transformers, such as CLIPTextModel, T5EncoderModel or BertModel."
    )


def _halves_of_text(conditions: DynaDiTConditions, num_rows: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Text states of the conditional half and of the null half, `None` where there is no text."""
    text = conditions.encoder_hidden_states
    if text is None:
        return None, None
    is_dropped = conditions.caption_dropout_mask
    has_negative = len(text) > num_rows and (is_dropped is None or not is_dropped[num_rows])
    return text[:num_rows], text[num_rows:] if has_negative else None


def _with_texts(
    conditions: DynaDiTConditions,
    num_rows: int,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
) -> DynaDiTConditions:
    """Other text states of the same shape, in new memory; without a negative text the null half stays."""
    text = conditions.encoder_hidden_states
    if negative_prompt_embeds is None:
        return replace(conditions, encoder_hidden_states=torch.cat([prompt_embeds, text[num_rows:]]))
    is_dropped = conditions.caption_dropout_mask
    if is_dropped is not None:  # a negative text in the place of the null caption
        is_dropped = is_dropped & (torch.arange(len(is_dropped), device=is_dropped.device) < num_rows)
        is_dropped = is_dropped if is_dropped.any() else None
    text = torch.cat([prompt_embeds, negative_prompt_embeds])
    return replace(conditions, encoder_hidden_states=text, caption_dropout_mask=is_dropped)


def _stack_texts(states: list[tuple[torch.Tensor, torch.Tensor | None]], num_rows: int) -> tuple:
    """Text states and masks of halves as one batch of the longest length, each half repeated to `num_rows`."""
    longest = max(embeds.shape[1] for embeds, _ in states)
    all_embeds, all_masks = [], []
    for embeds, mask in states:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask
        padding = longest - embeds.shape[1]
        copies = num_rows // len(embeds)
        all_embeds.append(F.pad(embeds, (0, 0, 0, padding)).repeat_interleave(copies, dim=0))
        all_masks.append(F.pad(mask, (0, padding)).repeat_interleave(copies, dim=0))
    masks = torch.cat(all_masks)
    return torch.cat(all_embeds), None if masks.all() else masks
