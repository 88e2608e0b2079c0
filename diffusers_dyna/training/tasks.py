# SPDX-License-Identifier: Apache-2.0
"""
What a model of a task is given: clean samples and their conditions, made from a batch of images. For the `prepare` of
[`TrainingRun.start`].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from diffusers import AutoencoderKL, SchedulerMixin

from .captions import EncodedCaptions
from .degradation import downscale, enlarge
from .masks import random_masks
from .randomness import keyed_randn, keyed_uniform


TASKS = ("generate", "inpaint", "upscale")


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
    encoder for every sample. The masked image has the mean of its posterior; the mask is reduced to the size of the
    latents by `mode="nearest"`.

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
        masks = F.interpolate(masks, size=masked.shape[2:], mode="nearest")
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
