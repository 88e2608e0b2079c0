# SPDX-License-Identifier: Apache-2.0
"""
What a model of a task is given: clean samples and their conditions, made from a batch of images. For the `prepare` of
[`TrainingRun.start`]. [`ImageTask`] is what the scripts of the transformer do the same, whatever conditions the model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor

from . import data, latents, objectives
from .captions import EncodedCaptions
from .degradation import downscale, enlarge
from .masks import random_masks
from .randomness import keyed_randn, keyed_uniform
from .run import TrainingRun, cache_latents, load_vae
from .shards import hash_weights


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """
    Latents of images: `(mean + std * noise - shift_factor) * scaling_factor`.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): its config has `scaling_factor` and `shift_factor`.
        pixels (`torch.Tensor` of shape `(batch_size, channels, height, width)`): in [-1, 1].
        noise (`torch.Tensor` with the shape of the latents, *optional*):
            Standard normal noise, for a draw from the posterior. `None` is its mean.

    Returns:
        `torch.Tensor` of shape `(batch_size, latent_channels, latent_height, latent_width)`, float32.
    """
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    latents = posterior.mean.float()
    if noise is not None:
        latents = latents + posterior.std.float() * noise.to(latents.device)
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def _encode_samples(vae: AutoencoderKL, pixels: torch.Tensor, seed: int, indices: list[int]) -> torch.Tensor:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (vae.config.latent_channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
    return encode_images(vae, pixels, keyed_randn(seed, "posterior", indices, shape))


def make_inpainting(seed: int, device: torch.device, vae: AutoencoderKL | None = None) -> Callable[[dict], tuple]:
    """
    Inpainting: the condition is the mask of [`random_masks`] and the image without what is to be painted,
    `image * (1 - mask)`, where 0 is mid-gray.

    With a VAE both images are encoded as the batch comes: no cache can hold the masked ones. That is two passes of its
    encoder for every sample. The masked image has the mean of its posterior; a latent is masked where any of its pixels
    is.

    Args:
        seed (`int`): seed of the run.
        device (`torch.device`): where the model is.
        vae ([`~diffusers.AutoencoderKL`], *optional*): on that device. `None` is in pixels.

    Returns:
        `Callable`: from a batch of [`collate_examples`] to samples (C channels), condition (1 + C channels) and `{}`.
    """

    def prepare(batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
        indices, pixels = batch["sample_indices"], batch["pixel_values"].to(device)
        masks = random_masks(seed, indices, *pixels.shape[2:]).to(device)
        masked = pixels * (1 - masks)
        if vae is None:
            return pixels, torch.cat([masks, masked], dim=1), {}
        masked = encode_images(vae, masked)
        masks = F.adaptive_max_pool2d(masks, masked.shape[2:])
        return _encode_samples(vae, pixels, seed, indices), torch.cat([masks, masked], dim=1), {}

    return prepare


def make_upscaling(
    seed: int,
    device: torch.device,
    scheduler: SchedulerMixin,
    factor: int,
    max_noise_level: float,
    vae: AutoencoderKL | None = None,
) -> Callable[[dict], tuple]:
    """
    Super-resolution with noise-level augmentation ([arXiv 2106.15282](https://huggingface.co/papers/2106.15282),
    section 4.1): the condition is the image, scaled down by [`downscale`] and back up by [`enlarge`], and noised along the
    path of the scheduler at a level of its own, uniform in [0, max_noise_level], which the model is told.

    With a VAE, scaling is done in pixels, and both images are encoded as the batch comes, the low-resolution one to the
    mean of its posterior: two passes of the encoder for every sample.

    Args:
        seed (`int`): seed of the run.
        device (`torch.device`): where the model is.
        scheduler ([`FlowMatchODEScheduler`]): of the run.
        factor (`int`): of both sides, which it divides.
        max_noise_level (`float`): in units of timestep, in [0, 1000].
        vae ([`~diffusers.AutoencoderKL`], *optional*): on that device. `None` is in pixels.

    Returns:
        `Callable`: from a batch of [`collate_examples`] to samples (C channels), condition (C channels) and `noise_level`.
    """

    def prepare(batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
        indices, pixels = batch["sample_indices"], batch["pixel_values"].to(device)
        samples = pixels
        low = enlarge(downscale(pixels, factor), pixels.shape[2:])
        if vae is not None:
            samples, low = _encode_samples(vae, pixels, seed, indices), encode_images(vae, low)
        noise_level = max_noise_level * keyed_uniform(seed, "noise_level", indices).float().to(device)
        noise = keyed_randn(seed, "low_resolution_noise", indices, low.shape[1:]).to(device)
        return samples, scheduler.add_noise(low, noise, noise_level), {"noise_level": noise_level}

    return prepare


def make_captioning(seed: int, device: torch.device, texts: EncodedCaptions) -> Callable[[dict], tuple]:
    """
    Text to image: the condition is the states of one caption of each image. The mask of the tokens is left out where
    nothing is masked.

    Args:
        seed (`int`): seed of the run.
        device (`torch.device`): where the model is.
        texts ([`EncodedCaptions`]): of the images.

    Returns:
        `Callable`: from a batch of [`collate_examples`] to samples, `None`, and `encoder_hidden_states` with
        `encoder_attention_mask`.
    """

    def prepare(batch: dict) -> tuple[torch.Tensor, None, dict]:
        states, mask = texts.encode(texts.draw(seed, batch["sample_indices"], batch["image_indices"]))
        conditions = {"encoder_hidden_states": states.to(device)}
        if not mask.all():
            conditions["encoder_attention_mask"] = mask.to(device)
        return batch["pixel_values"].to(device), None, conditions

    return prepare


def combine(prepare: Callable[[dict], tuple], captioning: Callable[[dict], tuple]) -> Callable[[dict], tuple]:
    """
    Args:
        prepare (`Callable`): of [`make_inpainting`] or [`make_upscaling`].
        captioning (`Callable`): of [`make_captioning`].

    Returns:
        `Callable`: from a batch to the samples and the condition of `prepare`, and the arguments of both.
    """

    def combined(batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
        samples, condition, conditions = prepare(batch)
        return samples, condition, {**conditions, **captioning(batch)[2]}

    return combined


class ImageTask:
    """
    The images of a run and what its `--task` makes of them: what is asked of the transformer, what it is given, and what
    the pipeline is called with in a validation.

    Args:
        run ([`TrainingRun`]): not started yet, with the arguments of `add_task_arguments`, `add_data_arguments`,
            `add_latent_arguments` and `add_objective_arguments`, checked.
        with_captions (`bool`, defaults to `False`): read captions instead of classes.

    Attributes:
        source ([`ImageSource`]): the images.
        transform (`Callable`): from an image of `source` to a tensor.
        vae ([`~diffusers.AutoencoderKL`], *optional*): of `--vae`.
        scheduler ([`~diffusers.SchedulerMixin`]): of the run.
        config (`dict`): what images and task ask of the transformer's config.
        facts (`dict`): what the pipeline of the task is made with, beside its components.
        identity (`dict`): what defines the run besides the arguments.

    Raises:
        `ValueError`: if the data is missing or not as the arguments say, or `--upscale_factor` does not divide its size.
    """

    def __init__(self, run: TrainingRun, with_captions: bool = False):
        self.run, self.args = run, run.args
        args = run.args
        self.source = data.open_image_source(args, with_captions)
        resolution = args.resolution or self.source.native_size or 32
        if args.task == "upscale" and resolution % args.upscale_factor:
            raise ValueError(
                f"`--upscale_factor` {args.upscale_factor} must divide the resolution {resolution}. Give "
                "`--resolution`."
            )
        self.vae = load_vae(args, run.accelerator.device)
        image_channels = channels = self.source.channels
        size = resolution
        if self.vae is not None:
            image_channels, channels = self.vae.config.in_channels, self.vae.config.latent_channels
            size = resolution // latents.downsampling_factor(self.vae)
        self.transform = data.ImageTransform(resolution, image_channels, args.center_crop, args.random_flip)
        self.scheduler = objectives.make_training_scheduler(
            args.objective,
            args.ddpm_num_steps,
            args.ddpm_beta_schedule,
            args.learn_sigma,
            in_latents=self.vae is not None,
            path=args.path,
            prediction_type=args.prediction_type,
        )
        self.config = {
            "sample_size": size,
            "in_channels": channels,
            "learn_sigma": args.learn_sigma,
            "condition_channels": {"generate": 0, "inpaint": channels + 1, "upscale": channels}[args.task],
            "noise_level_conditioning": args.task == "upscale",
        }
        self.facts, self.identity = {}, {"resolution": resolution}
        if args.task == "upscale":
            max_noise_level = 350.0 if args.max_noise_level is None else args.max_noise_level
            self.facts = {"upscale_factor": args.upscale_factor, "max_noise_level": max_noise_level}
        if args.task != "generate" and self.vae is not None:
            self.identity["vae"] = hash_weights(self.vae)

    def make_validation_inputs(self) -> dict:
        """
        What the pipeline of the task is called with for the samples of a validation, beside classes to draw and captions:
        images from all over the data. To be called before [`cache_latents`].

        Returns:
            `dict` for [`TrainingRun.start`], empty where there is nothing.
        """
        args, source, count = self.args, self.source, self.args.num_validation_images
        if args.task == "generate" or not count:
            return {}
        images = data.TrainingImages(source, self.transform, args.seed)
        batch = data.collate_examples([images[i, i * len(source) // count] for i in range(count)])
        pixels, inputs = batch["pixel_values"], {}
        if source.id2label is not None:
            inputs["class_labels"] = batch["class_labels"].tolist()
        if args.task == "inpaint":
            # A box in the middle and the right half in turn: holes that are left when a VAE makes the masks small.
            masks, side = torch.full((count, 1, *pixels.shape[2:]), -1.0), pixels.shape[2]
            masks[0::2, :, side // 4 : side - side // 4, side // 4 : side - side // 4] = 1
            masks[1::2, :, :, side // 2 :] = 1
            inputs["mask_image"] = _to_images(masks)
        else:
            pixels = downscale(pixels, args.upscale_factor)
        return {"image": _to_images(pixels), **inputs}

    def cache_latents(self) -> None:
        """Where the model draws latents and is given nothing that changes with the sample, `source` is their cache then."""
        if self.args.task == "generate" and self.vae is not None:
            self.source = cache_latents(self.run, self.source, self.transform, self.vae)
            self.transform = latents.LatentTransform(self.vae)

    def make_prepare(self, texts: EncodedCaptions | None = None) -> Callable[[dict], tuple] | None:
        """
        Args:
            texts ([`EncodedCaptions`], *optional*): of the images.

        Returns:
            `Callable` for [`TrainingRun.start`]; `None` where the images are all that the model is given.
        """
        seed, device = self.args.seed, self.run.accelerator.device
        captioning = None if texts is None else make_captioning(seed, device, texts)
        if self.args.task == "generate":
            return captioning
        if self.args.task == "inpaint":
            prepare = make_inpainting(seed, device, self.vae)
        else:
            factor, max_noise_level = self.facts["upscale_factor"], self.facts["max_noise_level"]
            prepare = make_upscaling(seed, device, self.scheduler, factor, max_noise_level, self.vae)
        return prepare if captioning is None else combine(prepare, captioning)


def _to_images(pixels: torch.Tensor) -> list:
    """Images of Pillow from pixels in [-1, 1]."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy((pixels / 2 + 0.5).clamp(0, 1)))
