# SPDX-License-Identifier: Apache-2.0
"""
A cache of what a VAE makes of the images, for training in latents.

It holds the mean and the standard deviation of the VAE's posterior, for each image and, with random flips, for its
mirror image. So every epoch draws its flips and its latents anew, keyed by the sample as in pixels. The files are those
of [`build_shards`].
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.utils import logging

from .data import ImageSource, ImageTransform
from .shards import INDEX_NAME, ShardReader, build_shards, hash_identity, hash_weights


logger = logging.get_logger(__name__)


class LatentSource(ImageSource):
    """
    The moments in a complete cache, in the place of the images that they were made from. Shards are memory-mapped. With
    [`LatentTransform`] it goes into `data.make_dataloader`; the `pixel_values` of its batches are latents then.

    Args:
        cache_dir (`str` or `Path`): folder that [`build_latent_cache`] has finished.
        source ([`ImageSource`]): the images; gives name, labels and facts.

    Attributes:
        channels (`int`): of the latents.
        native_size (`int`): side of the latents.
        bad_images (`dict[int, str]`): why an image has no latents.
    """

    def __init__(self, cache_dir: str | Path, source: ImageSource):
        index = json.loads((Path(cache_dir) / INDEX_NAME).read_text())
        self.source = source
        self.name, self.labels, self.id2label, self.facts = source.name, source.labels, source.id2label, source.facts
        self.num_images, self.captions = source.num_images, source.captions
        self.identity = index["identity"]
        self.shard_size = self.identity["shard_size"]
        self.bad_images = {int(i): reason for i, reason in index["bad_images"].items()}
        self.shards = ShardReader(cache_dir)
        *_, self.channels, self.native_size, _ = self.shards.get_slice(0, "moments").get_shape()

    def read(self, index: int) -> torch.Tensor:
        """
        Args:
            index (`int`): of the image.

        Returns:
            `torch.Tensor` of shape `(views, 2, channels, height, width)`: the image and, in a cache with flips, its
            mirror image; mean and standard deviation of each.

        Raises:
            `ValueError`: for an image that could not be read, saying why.
        """
        if index in self.bad_images:
            raise ValueError(self.bad_images[index])
        shard, row = divmod(index, self.shard_size)
        return self.shards.get_slice(shard, "moments")[row]

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def fingerprint(self) -> str:
        """Changes with the images' own fingerprint, the VAE, and how they were encoded."""
        return hash_identity(self.identity)


class LatentTransform:
    """
    Draws a latent from its posterior: `(mean + std * noise - shift_factor) * scaling_factor`. Takes the place of
    [`ImageTransform`] and flips the same samples as it does.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): its config has `scaling_factor` and `shift_factor`.
    """

    def __init__(self, vae: AutoencoderKL):
        self.scaling_factor, self.shift_factor = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    def __call__(self, moments: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        Args:
            moments (`torch.Tensor` of shape `(views, 2, channels, height, width)`): of [`LatentSource.read`].
            generator (`torch.Generator`): for the flip and the noise.

        Returns:
            `torch.Tensor` of shape `(channels, height, width)`, float32.
        """
        _, _, flip = torch.rand(3, generator=generator).tolist()  # the draws of `ImageTransform`
        mean, std = moments[1 if len(moments) == 2 and flip < 0.5 else 0].float()
        noise = torch.randn(mean.shape, generator=generator)
        return (mean + std * noise - self.shift_factor) * self.scaling_factor


@torch.no_grad()
def build_latent_cache(
    cache_dir: str | Path,
    source: ImageSource,
    transform: ImageTransform,
    vae: AutoencoderKL,
    accelerator: Accelerator,
    batch_size: int = 32,
    shard_size: int = 2048,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    max_bad_images: int = 10,
) -> LatentSource:
    """
    Opens a latent cache, after encoding what it lacks. To be called by all processes, on a folder that all of them see;
    see [`build_shards`].

    Whether images still have the content that was encoded is not checked, only their number, order, names and labels:
    delete the folder after editing them. Encoding repeats bit for bit on one machine at the same `batch_size` (on a
    GPU with `torch.backends.cudnn.deterministic`). It draws nothing from the global generators.

    Args:
        cache_dir (`str` or `Path`): folder of the cache; need not exist.
        source ([`ImageSource`]): the images. One that cannot be read is recorded, and the loader replaces it as it
            does in pixels.
        transform ([`ImageTransform`]): how they become the VAE's input. With `random_flip` both flips are encoded.
        vae ([`~diffusers.AutoencoderKL`]): on the device and in the dtype to encode with.
        accelerator ([`~accelerate.Accelerator`]): the run's.
        batch_size (`int`, defaults to `32`): images to encode at a time; another one may round differently.
        shard_size (`int`, defaults to `2048`): images of a shard, which is in memory while it is made.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            What to store. float32 is exactly what the VAE gives. `torch.float16` takes half the disk (for 1.28 million
            images with flips as 4 x 32 x 32 latents 42 GB, not 84) and rounds by 1 part in 2048, or 3e-8, at
            most.
        num_workers (`int`, defaults to `0`): processes that read images ahead; 0 reads them in this one.
        max_bad_images (`int`, defaults to `10`): unreadable images to bear.

    Returns:
        [`LatentSource`].

    Raises:
        `TypeError`: for another class of VAE, which has no posterior.
        `ValueError`: if the images cannot be cached or do not fit the VAE, the latents are not finite, too many images
            cannot be read, or the folder holds a damaged cache or that of other images, settings or weights.
    """
    _check_inputs(source, transform, vae, batch_size, shard_size, dtype)

    def encode(shards: list[int]):
        bad_images = {}
        for shard, moments, bad_in_shard in _encode(
            source, transform, vae, shards, batch_size, shard_size, dtype, num_workers
        ):
            bad_images |= bad_in_shard
            _check_bad_images(source, bad_images, max_bad_images)
            yield shard, {"moments": moments}, {"bad_images": bad_in_shard}

    identity = _make_identity(source, transform, vae, shard_size, dtype)
    build_shards(cache_dir, identity, len(source), encode, accelerator, "latent", "images")
    latents = LatentSource(cache_dir, source)
    _check_bad_images(source, latents.bad_images, max_bad_images)
    return latents


def _check_inputs(source, transform, vae, batch_size: int, shard_size: int, dtype: torch.dtype) -> None:
    if not isinstance(vae, AutoencoderKL):
        raise TypeError(
            f"`vae` is of class {type(vae).__name__}, but the cache stores the posterior of an AutoencoderKL. Give one."
        )
    if source.num_images is None:
        raise ValueError(
            f"`source` {source.name} is a stream, which has no images by index. Read it without streaming."
        )
    if not transform.center_crop:
        raise ValueError(
            "`transform` crops at random places (`center_crop`=False), but the cache holds one crop of an image. Crop "
            "the middle, or train without the cache."
        )
    if transform.channels != vae.config.in_channels:
        raise ValueError(
            f"`transform` gives {transform.channels} channels, but `vae` takes {vae.config.in_channels}. Make it with "
            "`channels=vae.config.in_channels`."
        )
    factor = downsampling_factor(vae)
    if transform.resolution % factor:
        raise ValueError(
            f"The resolution {transform.resolution} must be a multiple of {factor}, by which `vae` shrinks."
        )
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"`{name}`={value} must be at least 1.")
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"`dtype`={dtype} must be torch.float32 or torch.float16.")


def downsampling_factor(vae: AutoencoderKL) -> int:
    """
    Args:
        vae ([`~diffusers.AutoencoderKL`]): the VAE.

    Returns:
        `int`: side of an image over the side of its latents.
    """
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _make_identity(source, transform, vae, shard_size: int, dtype: torch.dtype) -> dict:
    """What decides on the content of the cache, as plain JSON values."""
    identity = {
        "data_fingerprint": source.fingerprint(),
        "num_images": len(source),
        "resolution": transform.resolution,
        "center_crop": transform.center_crop,
        "random_flip": transform.random_flip,
        "dtype": str(dtype),
        "shard_size": shard_size,
        "vae.dtype": str(vae.dtype),
        "vae.weights": hash_weights(vae),
    }
    # Names with an underscore say where the weights are from and which version of diffusers read them.
    identity |= {f"vae.{name}": value for name, value in vae.config.items() if not name.startswith("_")}
    return json.loads(json.dumps(identity))  # tuples become lists, as in a file


def _check_bad_images(source: ImageSource, bad_images: dict[int, str], max_bad_images: int) -> None:
    if len(bad_images) > max_bad_images:
        names = [f"{source.describe(i)} ({reason})" for i, reason in sorted(bad_images.items())]
        raise ValueError(
            f"More than `max_bad_images` {max_bad_images} images cannot be read: {', '.join(names[: max_bad_images + 1])}"
        )


class _UnflippedImages(Dataset):
    """Image index -> the index with the pixels or, where the image cannot be read, with the reason."""

    def __init__(self, source: ImageSource, transform: ImageTransform):
        self.source, self.transform = source, ImageTransform(transform.resolution, transform.channels)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str]:
        try:
            image = self.source.read(index)
        except Exception as error:
            return index, f"{type(error).__name__}: {error}"
        return index, self.transform(image, torch.Generator())


def _encode(
    source, transform, vae, shards: list[int], batch_size: int, shard_size: int, dtype: torch.dtype, num_workers: int
) -> Iterator[tuple[int, torch.Tensor, dict[int, str]]]:
    """Yields each shard, its moments, and why images in it cannot be read; the rows of those are NaN."""
    images_of = {shard: range(len(source))[shard * shard_size :][:shard_size] for shard in shards}
    batches_of = {
        shard: [list(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
        for shard, images in images_of.items()
    }
    loader = DataLoader(
        _UnflippedImages(source, transform),
        batch_sampler=[batch for batches in batches_of.values() for batch in batches],
        collate_fn=list,
        num_workers=num_workers,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    batches = iter(loader)
    num_views = 2 if transform.random_flip else 1
    side = transform.resolution // downsampling_factor(vae)
    for shard, images in images_of.items():
        moments = torch.full((len(images), num_views, 2, vae.config.latent_channels, side, side), torch.nan).to(dtype)
        bad_images = {}
        for _ in batches_of[shard]:
            batch = dict(next(batches))
            good = {i: pixels for i, pixels in batch.items() if isinstance(pixels, torch.Tensor)}
            for i, reason in batch.items():
                if i not in good:
                    bad_images[i] = reason
                    logger.warning(f"{source.describe(i)} cannot be read ({reason}). Another takes its place.")
            if not good:
                continue
            pixel_values = torch.stack(list(good.values())).to(vae.device, vae.dtype)
            for view in range(num_views):
                posterior = vae.encode(pixel_values.flip(-1) if view else pixel_values).latent_dist
                encoded = torch.stack([posterior.mean, posterior.std], dim=1).to("cpu", dtype)
                for i, row in zip(good, encoded, strict=True):
                    if not row.isfinite().all():
                        raise ValueError(
                            f"`vae` in {vae.dtype} gives latents of {source.describe(i)} that are not finite in "
                            f"{dtype}. Encode and store in float32; if they are not finite there, the weights are bad."
                        )
                    moments[i - images.start, view] = row
        yield shard, moments, bad_images
