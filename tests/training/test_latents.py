# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open

from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_dyna.training import shards
from diffusers_dyna.training.data import (
    ArraySource,
    GlobalBatchSampler,
    ImageFolderSource,
    ImageTransform,
    TrainingImages,
    load_digits,
    make_dataloader,
)
from diffusers_dyna.training.latents import LatentTransform, build_latent_cache
from diffusers_dyna.training.randomness import keyed_generator

from ..testing_utils import logged_warnings


NUM_IMAGES = 22


@pytest.fixture
def source():
    digits = load_digits()
    return ArraySource("digits", digits.images[:NUM_IMAGES], digits.labels[:NUM_IMAGES], tuple("0123456789"), {})


@pytest.fixture
def transform():
    return ImageTransform(8, 1, random_flip=True)


def tiny_vae(seed=0, **overrides):
    """A VAE of 8 x 8 pixels and 4 x 4 latents whose posterior differs from image to image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "in_channels": 1,
            "out_channels": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "latent_channels": 3,
            "sample_size": 8,
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
        }
        return AutoencoderKL(**{**config, **overrides})


class Processes:
    """As many accelerators as processes, each for a thread of its own."""

    def __init__(self, num_processes):
        self.num_processes, self.barrier = num_processes, threading.Barrier(num_processes)

    def build(self, *args, **options):
        with ThreadPoolExecutor(self.num_processes) as pool:
            runs = [
                pool.submit(build_latent_cache, *args, accelerator=FakeAccelerator(self, i), **options)
                for i in range(self.num_processes)
            ]
        return [run.result() for run in runs]


class FakeAccelerator:
    def __init__(self, processes, process_index):
        self.processes, self.process_index = processes, process_index
        self.num_processes, self.is_main_process = processes.num_processes, process_index == 0

    def wait_for_everyone(self):
        self.processes.barrier.wait(timeout=60)


def build(cache_dir, source, transform, vae, **options):
    options = {"batch_size": 4, "shard_size": 5, **options}
    return build_latent_cache(cache_dir, source, transform, vae, Accelerator(), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count_encoded(vae, monkeypatch):
    """The list of the batch sizes that `vae` encodes from here on."""
    sizes, encode = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    return sizes


class Killed(BaseException):
    pass


class TestContent:
    @pytest.mark.parametrize("random_flip", [True, False])
    def test_moments_are_those_of_the_vae(self, tmp_path, source, random_flip):
        vae = tiny_vae()
        cached = build(tmp_path, source, ImageTransform(8, 1, random_flip=random_flip), vae)
        assert len(list(tmp_path.glob("shard-*.safetensors"))) == 5
        assert cached.read(0).shape == (2 if random_flip else 1, 2, 3, 4, 4)
        for i in range(NUM_IMAGES):
            image = source.read(i)
            views = [image, image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)] if random_flip else [image]
            for view, moments in zip(views, cached.read(i), strict=True):
                pixels = torch.from_numpy(np.array(view) / 127.5 - 1).float()[None, None]
                with torch.no_grad():
                    posterior = vae.encode(pixels).latent_dist
                # A batch of one adds up in another order than a batch of four.
                torch.testing.assert_close(moments[0], posterior.mean[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(moments[1], posterior.std[0], rtol=1e-4, atol=1e-5)
        if random_flip:
            assert not torch.allclose(cached.read(2)[0], cached.read(2)[1], atol=1e-2)

    def test_what_the_source_says_is_passed_on(self, tmp_path, source, transform):
        cached = build(tmp_path, source, transform, tiny_vae())
        assert (len(cached), cached.channels, cached.native_size) == (NUM_IMAGES, 3, 4)
        assert (cached.name, cached.id2label, cached.facts) == (source.name, source.id2label, source.facts)
        assert cached.labels is source.labels
        assert cached.describe(3) == source.describe(3)
        other = build(tmp_path / "other", source, transform, tiny_vae(seed=1))
        assert len({source.fingerprint(), cached.fingerprint(), other.fingerprint()}) == 3

    def test_half_precision(self, tmp_path, source, transform):
        exact = build(tmp_path / "float32", source, transform, tiny_vae())
        half = build(tmp_path / "float16", source, transform, tiny_vae(), dtype=torch.float16)
        assert half.read(7).dtype == torch.float16
        torch.testing.assert_close(half.read(7).float(), exact.read(7), rtol=2**-11, atol=2**-24)

    def test_reading_ahead_changes_nothing_and_draws_nothing(self, tmp_path, source, transform):
        state = torch.get_rng_state()
        build(tmp_path / "here", source, transform, tiny_vae())
        build(tmp_path / "ahead", source, transform, tiny_vae(), num_workers=2)
        assert contents(tmp_path / "here") == contents(tmp_path / "ahead")
        assert torch.equal(torch.get_rng_state(), state)


class TestSampling:
    def batches(self, source, transform, num_batches, num_workers=0, **options):
        sampler = GlobalBatchSampler(len(source), options.pop("batch_size", 4), 0, **options)
        batches = iter(make_dataloader(source, transform, sampler, seed=0, num_workers=num_workers))
        return [next(batches) for _ in range(num_batches)]

    def test_a_latent_follows_its_sample(self, tmp_path, source, transform):
        vae = tiny_vae()
        cached = build(tmp_path, source, transform, vae)
        for batch in self.batches(cached, LatentTransform(vae), 12):
            for row, label, n in zip(batch["pixel_values"], batch["class_labels"], batch["sample_indices"]):
                image_index = GlobalBatchSampler(NUM_IMAGES, 1, 0).image_index(n)
                generator = keyed_generator(0, "augmentation", n)
                flip = torch.rand(3, generator=generator)[2] < 0.5
                mean, std = cached.read(image_index)[int(flip)]
                expected = 0.5 * (mean + std * torch.randn(3, 4, 4, generator=generator) - 0.25)
                torch.testing.assert_close(row, expected)
                assert label == source.labels[image_index]

    def test_the_flips_are_those_of_training_in_pixels(self, tmp_path, source, transform):
        vae = tiny_vae()
        with torch.no_grad():  # a posterior without spread: the latent is the mean
            vae.quant_conv.weight[3:] = 0
            vae.quant_conv.bias[3:] = -1000
        cached = build(tmp_path, source, transform, vae)
        pixels = self.batches(source, transform, 6)
        for in_pixels, in_latents in zip(pixels, self.batches(cached, LatentTransform(vae), 6), strict=True):
            with torch.no_grad():
                mean = vae.encode(in_pixels["pixel_values"]).latent_dist.mean
            # The clamped logarithm leaves a standard deviation of exp(-15).
            torch.testing.assert_close(in_latents["pixel_values"], (mean - 0.25) * 0.5, rtol=1e-4, atol=1e-5)
            assert in_pixels["sample_indices"] == in_latents["sample_indices"]
            assert torch.equal(in_pixels["class_labels"], in_latents["class_labels"])

    def test_every_epoch_draws_from_the_posterior(self, tmp_path, source, transform):
        vae = tiny_vae(shift_factor=None)
        mean, std = build(tmp_path, source, transform, vae).read(5)[0]
        draws = torch.stack(
            [LatentTransform(vae)(torch.stack([mean, std])[None], keyed_generator(0, "x", n)) for n in range(2000)]
        )
        # 2,000 draws: the standard errors are 2.2 % (of std) and 1.6 %; five of them hold for all 48 numbers.
        assert ((draws.mean(0) / 0.5 - mean) / std).abs().max() < 5 * 0.0224
        assert (draws.std(0) / 0.5 / std - 1).abs().max() < 5 * 0.0158

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_workers_processes_and_resuming_change_nothing(self, tmp_path, source, transform, num_workers):
        vae = tiny_vae()
        cached, draw = build(tmp_path, source, transform, vae), LatentTransform(vae)
        whole = torch.stack([batch["pixel_values"] for batch in self.batches(cached, draw, 9)])
        resumed = self.batches(cached, draw, 3, num_workers, first_micro_step=6)
        assert torch.equal(torch.stack([batch["pixel_values"] for batch in resumed]), whole[6:])
        parts = [
            self.batches(cached, draw, 9, num_workers, batch_size=2, num_processes=2, process_index=p) for p in (0, 1)
        ]
        shared = [torch.cat([part[step]["pixel_values"] for part in parts]) for step in range(9)]
        assert torch.equal(torch.stack(shared), whole)

    def test_a_spawned_worker_can_have_it(self, tmp_path, source, transform):
        cached = build(tmp_path, source, transform, tiny_vae())
        moments = cached.read(9)
        assert torch.equal(pickle.loads(pickle.dumps(cached)).read(9), moments)


class TestWriting:
    def test_two_processes_share_the_work_and_write_what_one_writes(self, tmp_path, source, transform, monkeypatch):
        build(tmp_path / "one", source, transform, tiny_vae())
        vae = tiny_vae()
        sizes = count_encoded(vae, monkeypatch)
        first, second = Processes(2).build(tmp_path / "two", source, transform, vae, batch_size=4, shard_size=5)
        assert sum(sizes) == 2 * NUM_IMAGES
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        assert torch.equal(first.read(21), second.read(21))

    def test_one_process_finishes_what_two_began(self, tmp_path, source, transform, monkeypatch):
        build(tmp_path / "whole", source, transform, tiny_vae())
        save_file = shards.save_file

        def save_until_killed(tensors, path, metadata):
            if "00003" in path.name:
                path.write_bytes(b"half a shard")
                raise Killed
            save_file(tensors, path, metadata)

        monkeypatch.setattr(shards, "save_file", save_until_killed)
        processes = Processes(2)
        monkeypatch.setattr(FakeAccelerator, "wait_for_everyone", lambda self: None)
        with pytest.raises(Killed):
            build_latent_cache(
                tmp_path / "cache", source, transform, tiny_vae(), FakeAccelerator(processes, 1), 4, shard_size=5
            )
        monkeypatch.undo()
        assert sorted(contents(tmp_path / "cache")) == [
            ".partial-shard-00003.safetensors",
            "shard-00001.safetensors",
        ]
        vae = tiny_vae()
        sizes = count_encoded(vae, monkeypatch)
        build(tmp_path / "cache", source, transform, vae)
        assert sum(sizes) == 2 * (NUM_IMAGES - 5)  # all but shard 1, in both flips
        assert contents(tmp_path / "cache") == contents(tmp_path / "whole")

    def test_only_what_is_missing_is_encoded(self, tmp_path, source, transform, monkeypatch):
        vae = tiny_vae()
        build(tmp_path, source, transform, vae)
        before = contents(tmp_path)
        sizes = count_encoded(vae, monkeypatch)
        build(tmp_path, source, transform, vae)
        assert sizes == []
        (tmp_path / "shard-00004.safetensors").unlink()
        build(tmp_path, source, transform, vae)
        assert sizes == [2, 2]  # 22 images in shards of 5 leave 2 for the last
        (tmp_path / "index.json").unlink()
        build(tmp_path, source, transform, vae)
        assert sizes == [2, 2]
        assert contents(tmp_path) == before

    def test_the_index_is_there_only_when_all_shards_are(self, tmp_path, source, transform, monkeypatch):
        vae = tiny_vae()
        build(tmp_path, source, transform, vae)
        (tmp_path / "shard-00002.safetensors").unlink()

        def kill(pixels):
            raise Killed

        monkeypatch.setattr(vae, "encode", kill)
        with pytest.raises(Killed):
            build(tmp_path, source, transform, vae)
        assert not (tmp_path / "index.json").exists()


class TestDamage:
    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_a_changed_shard_is_named_and_can_be_replaced(self, tmp_path, source, transform, num_processes):
        build(tmp_path, source, transform, tiny_vae())
        before = contents(tmp_path)
        shard = tmp_path / "shard-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
        accelerator = FakeAccelerator(Processes(num_processes), 0)
        with pytest.raises(ValueError, match="shard-00002.safetensors is damaged.*Delete this file and start again"):
            build_latent_cache(tmp_path, source, transform, tiny_vae(), accelerator, 4, shard_size=5)
        shard.unlink()
        build(tmp_path, source, transform, tiny_vae())
        assert contents(tmp_path) == before

    def test_a_shard_that_was_cut_off_before_the_index_was_written(self, tmp_path, source, transform):
        build(tmp_path, source, transform, tiny_vae())
        (tmp_path / "index.json").unlink()
        shard = tmp_path / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-8])
        with pytest.raises(ValueError, match="shard-00001.safetensors cannot be read .*delete it and start again"):
            build(tmp_path, source, transform, tiny_vae())

    def test_another_identity_is_listed(self, tmp_path, source, transform):
        build(tmp_path, source, transform, tiny_vae())
        vae = tiny_vae(seed=1, scaling_factor=1.0)
        for has_index in (True, False):
            if not has_index:
                (tmp_path / "index.json").unlink()
            with pytest.raises(ValueError, match="was made of other images, settings or weights") as error:
                build(tmp_path, source, ImageTransform(16, 1), vae, dtype=torch.float16)
            lines = str(error.value).split("\n")[1:-1]
            assert lines[:3] == [
                "  dtype: 'torch.float32' in the cache, 'torch.float16' now",
                "  random_flip: True in the cache, False now",
                "  resolution: 8 in the cache, 16 now",
            ]
            assert lines[3] == "  vae.scaling_factor: 0.5 in the cache, 1.0 now"
            assert lines[4].startswith("  vae.weights: ")
            assert len(lines) == 5
        source.labels = source.labels[::-1]
        with pytest.raises(ValueError, match="data_fingerprint: ") as error:
            build(tmp_path, source, transform, tiny_vae(), shard_size=6)
        assert "  shard_size: 5 in the cache, 6 now" in str(error.value)


class TestBadImages:
    @pytest.fixture
    def folder(self, tmp_path):
        rng = np.random.default_rng(0)
        for i in range(7):
            path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(path)
        for name in ("a/2.png", "b/1.png", "b/3.png", "b/5.png"):  # images 1, 4, 5 and 6, of them a whole shard
            (tmp_path / "images" / name).write_bytes(b"not a png")
        return tmp_path / "images"

    def test_they_are_named_and_replaced_as_in_pixels(self, tmp_path, folder):
        source, transform = ImageFolderSource(folder), ImageTransform(8, 3)
        vae = tiny_vae(in_channels=3, out_channels=3)
        with logged_warnings() as messages:
            cached = build(tmp_path / "cache", source, transform, vae, batch_size=2, shard_size=2)
        assert len(messages) == 4
        assert messages[0].startswith(f"{folder}/a/2.png cannot be read (UnidentifiedImageError: ")
        assert sorted(cached.bad_images) == [1, 4, 5, 6]
        for image_index, readable in ((0, 0), (1, 2), (5, 0)):
            example = TrainingImages(cached, LatentTransform(vae), seed=0)[(3, image_index)]
            in_pixels = TrainingImages(source, transform, seed=0)[(3, image_index)]
            expected = LatentTransform(vae)(cached.read(readable), keyed_generator(0, "augmentation", 3))
            assert torch.equal(example["pixel_values"], expected)
            assert example["pixel_values"].isfinite().all()
            assert example["class_label"] == in_pixels["class_label"]
            assert len(example["bad_images"]) == len(in_pixels["bad_images"])
            for bad, bad_in_pixels in zip(example["bad_images"], in_pixels["bad_images"], strict=True):
                assert bad.split(" ")[0] == bad_in_pixels.split(" ")[0]
                assert "UnidentifiedImageError" in bad

    def test_too_many(self, tmp_path, folder):
        source, transform = ImageFolderSource(folder), ImageTransform(8, 3)
        vae = tiny_vae(in_channels=3, out_channels=3)
        with pytest.raises(
            ValueError, match="More than `max_bad_images` 1 images cannot be read: .*2.png .*, .*1.png"
        ):
            build(tmp_path / "cache", source, transform, vae, shard_size=2, max_bad_images=1)
        # Stopped before the shard with one too many, so that it can be repaired.
        assert sorted(contents(tmp_path / "cache")) == ["shard-00000.safetensors", "shard-00001.safetensors"]
        build(tmp_path / "cache", source, transform, vae, shard_size=2)
        with pytest.raises(ValueError, match="More than `max_bad_images` 3 images cannot be read"):
            build(tmp_path / "cache", source, transform, vae, shard_size=2, max_bad_images=3)

    def test_a_repaired_image_is_encoded_when_its_shard_is_deleted(self, tmp_path, folder):
        source, transform = ImageFolderSource(folder), ImageTransform(8, 3)
        vae = tiny_vae(in_channels=3, out_channels=3)
        build(tmp_path / "cache", source, transform, vae, shard_size=2)
        PIL.Image.new("RGB", (8, 8), "red").save(folder / "a" / "2.png")
        (tmp_path / "cache" / "shard-00000.safetensors").unlink()
        assert sorted(build(tmp_path / "cache", source, transform, vae, shard_size=2).bad_images) == [4, 5, 6]


class TestBadInput:
    def test_latents_that_are_not_finite(self, tmp_path, source, transform, monkeypatch):
        vae = tiny_vae()
        encode = vae.encode

        def encode_with_nan(pixels):
            output = encode(pixels)
            if len(pixels) == 1:  # the batches are 4 + 1 images
                output.latent_dist.mean[:] = torch.nan
            return output

        monkeypatch.setattr(vae, "encode", encode_with_nan)
        with pytest.raises(
            ValueError, match="`vae` in torch.float32 gives latents of image 4 of digits that are not fin"
        ):
            build(tmp_path, source, transform, vae)
        assert contents(tmp_path) == {}

    def test_latents_beyond_half_precision(self, tmp_path, source, transform):
        vae = tiny_vae()
        with torch.no_grad():
            vae.quant_conv.bias[0] = 1e5
        with pytest.raises(ValueError, match="image 0 of digits that are not finite in torch.float16. .* in float32"):
            build(tmp_path, source, transform, vae, dtype=torch.float16)

    def test_images_and_vae_that_do_not_fit(self, tmp_path, source, transform):
        vae = tiny_vae()
        with pytest.raises(TypeError, match="`vae` is of class AutoencoderTiny, .* of an AutoencoderKL"):
            build(tmp_path, source, transform, AutoencoderTiny())
        with pytest.raises(ValueError, match="crops at random places .*Crop the middle"):
            build(tmp_path, source, ImageTransform(8, 1, center_crop=False), vae)
        with pytest.raises(ValueError, match="`transform` gives 3 channels, but `vae` takes 1"):
            build(tmp_path, source, ImageTransform(8, 3), vae)
        with pytest.raises(ValueError, match="The resolution 9 must be a multiple of 2, by which `vae` shrinks"):
            build(tmp_path, source, ImageTransform(9, 1), vae)
        with pytest.raises(ValueError, match="`batch_size`=0 must be at least 1"):
            build(tmp_path, source, transform, vae, batch_size=0)
        with pytest.raises(ValueError, match="`dtype`=torch.bfloat16 must be torch.float32 or torch.float16"):
            build(tmp_path, source, transform, vae, dtype=torch.bfloat16)
        source.num_images = None
        with pytest.raises(ValueError, match="`source` digits is a stream.* without streaming"):
            build(tmp_path, source, transform, vae)

    def test_a_shard_says_what_it_is(self, tmp_path, source, transform):
        build(tmp_path, source, transform, tiny_vae())
        with safe_open(tmp_path / "shard-00000.safetensors", framework="pt") as file:
            metadata = json.loads(file.metadata()["latent_cache"])
        assert metadata["identity"] == json.loads((tmp_path / "index.json").read_text())["identity"]
