# SPDX-License-Identifier: Apache-2.0
"""What the model of a task is given, against the same written out; and the masks and low-resolution images themselves."""

import numpy as np
import PIL.Image
import pytest
import torch

from accelerate import Accelerator
from diffusers import AutoencoderKL

from diffusers_dyna import FlowMatchODEScheduler
from diffusers_dyna.training import masks
from diffusers_dyna.training.captions import build_caption_cache
from diffusers_dyna.training.degradation import downscale, enlarge
from diffusers_dyna.training.masks import MASK_KINDS, random_mask, random_masks
from diffusers_dyna.training.randomness import keyed_generator, keyed_randn, keyed_uniform
from diffusers_dyna.training.tasks import (
    combine,
    encode_images,
    make_captioning,
    make_inpainting,
    make_upscaling,
)

from ..testing_utils import randn, tiny_text_encoder, tiny_tokenizer


CPU = torch.device("cpu")


def make_batch(indices=(3, 9, 4), channels=1, size=16):
    pixels = torch.stack([randn(channels, size, size, seed=i).clamp(-1, 1) for i in indices])
    return {"pixel_values": pixels, "sample_indices": list(indices)}


def tiny_vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=3,
            sample_size=16,
            scaling_factor=0.5,
            shift_factor=0.25,
        ).eval()


class TestMasks:
    @pytest.mark.parametrize("size", [(8, 8), (32, 32), (28, 20)])
    @pytest.mark.parametrize("kind", list(MASK_KINDS))
    def test_every_kind_is_binary_and_paints_something(self, kind, size):
        for i in range(100):
            mask = random_mask(kind, *size, keyed_generator(0, "test", i))
            assert mask.shape == (1, *size)
            assert mask.dtype == torch.float32
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
            assert mask.any()
            assert mask.all() == (kind == "whole")

    def test_kinds_are_what_they_say(self):
        def kept(mask):
            return (mask[0] == 0).nonzero()

        shares = {"brush": [], "box": [], "outpaint": []}
        edges = set()
        for i in range(300):
            for kind, found in shares.items():
                mask = random_mask(kind, 40, 30, keyed_generator(1, "test", i))
                found.append(mask.mean().item())
            rows, columns = kept(mask).unbind(1)  # the last one is of outpainting: what is kept is one box
            height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
            assert len(rows) == height * width
            assert (10 <= height <= 30 or height == 40) and (7 <= width <= 23 or width == 30)
            assert not (height == 40 and width == 30)
            edges.add((height.item() == 40, width.item() == 30))
        assert edges == {(False, False), (True, False), (False, True)}
        # One box is 4 % to 36 % of the image; of what is drawn, all but the extremes occur.
        assert min(shares["box"]) >= 0.03 and max(shares["box"]) > 0.45
        assert 0.1 < np.mean(shares["brush"]) < 0.5
        assert min(shares["outpaint"]) >= 0.2 and max(shares["outpaint"]) > 0.85

    def test_shares_of_the_kinds(self, monkeypatch):
        drawn = []
        monkeypatch.setattr(
            masks, "random_mask", lambda kind, height, width, generator: drawn.append(kind) or torch.ones(1, 1, 1)
        )
        random_masks(0, range(4000), 8, 8)
        for kind, share in MASK_KINDS.items():  # 4,000 draws: the standard error is at most 0.8 %
            assert drawn.count(kind) / 4000 == pytest.approx(share, abs=0.04)

    def test_a_mask_is_a_function_of_its_sample(self):
        together = random_masks(5, [7, 8, 2], 16, 12)
        for row, index in zip(together, [7, 8, 2], strict=True):
            assert torch.equal(random_masks(5, [index], 16, 12)[0], row)
        assert not torch.equal(random_masks(6, [7, 8, 2], 16, 12), together)

    def test_an_unknown_kind(self):
        with pytest.raises(
            ValueError, match="`kind`='star' is unknown. Use one of 'brush', 'box', 'outpaint', 'whole'"
        ):
            random_mask("star", 8, 8, torch.Generator())


class TestDegradation:
    def test_downscaling_is_pillow_s_box(self):
        pixels = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
        for factor in (2, 4):
            image = PIL.Image.fromarray(pixels.astype(np.float32), mode="F")
            expected = np.asarray(image.resize((20 // factor, 12 // factor), PIL.Image.Resampling.BOX))
            actual = downscale(torch.from_numpy(pixels).float()[None, None] / 127.5 - 1, factor)
            np.testing.assert_allclose((actual[0, 0].numpy() + 1) * 127.5, expected, atol=1e-3)

    def test_enlarging_keeps_constants_and_stays_in_range(self):
        assert torch.equal(enlarge(torch.full((1, 1, 4, 4), 0.5), (16, 8)), torch.full((1, 1, 16, 8), 0.5))
        steps = torch.tensor([-1.0, -1.0, 1.0, 1.0]).expand(1, 1, 4, 4)
        enlarged = enlarge(steps, (8, 8))
        assert enlarged.min() == -1 and enlarged.max() == 1  # a cubic overshoots at a step
        # Half-way between two pixels of an even ramp, away from the edges, a cubic is the ramp.
        ramp = torch.linspace(-0.7, 0.7, 8).expand(1, 1, 8, 8)
        expected = torch.linspace(-0.7 - 0.05, 0.7 + 0.05, 16)
        torch.testing.assert_close(enlarge(ramp, (16, 16))[0, 0, 8, 4:12], expected[4:12], atol=1e-2, rtol=0)

    def test_a_factor_that_does_not_divide(self):
        with pytest.raises(
            ValueError, match="`factor`=4 must divide height and width of `images`, 10 x 12. Crop them to 8 x"
        ):
            downscale(torch.zeros(1, 1, 10, 12), 4)


class TestInpainting:
    def test_in_pixels(self):
        batch = make_batch()
        sample, condition, conditions = make_inpainting(7, CPU)(batch)
        mask = random_masks(7, batch["sample_indices"], 16, 16)
        assert torch.equal(sample, batch["pixel_values"])
        assert condition.shape == (3, 2, 16, 16)
        assert torch.equal(condition[:, :1], mask)
        assert torch.equal(condition[:, 1:][mask == 0], sample[mask == 0])
        assert not condition[:, 1:][mask == 1].any()
        assert conditions == {}

    def test_in_latents(self):
        vae, batch = tiny_vae(), make_batch()
        sample, condition, _ = make_inpainting(7, CPU, vae)(batch)
        mask = random_masks(7, batch["sample_indices"], 16, 16)
        with torch.no_grad():
            posterior = vae.encode(batch["pixel_values"]).latent_dist
            masked = vae.encode(batch["pixel_values"] * (1 - mask)).latent_dist.mode()
        noise = keyed_randn(7, "posterior", batch["sample_indices"], (3, 8, 8))
        torch.testing.assert_close(sample, (posterior.mean + posterior.std * noise - 0.25) * 0.5)
        torch.testing.assert_close(condition[:, 1:], (masked - 0.25) * 0.5)
        touched = mask.reshape(3, 1, 8, 2, 8, 2).amax(dim=(3, 5))
        assert torch.equal(condition[:, :1], touched)
        assert (touched != mask[:, :, ::2, ::2]).any()
        assert not sample.requires_grad


class TestUpscaling:
    @pytest.mark.parametrize("path", ["linear", "gvp"])
    def test_in_pixels(self, path):
        scheduler, batch = FlowMatchODEScheduler(path=path), make_batch()
        indices = batch["sample_indices"]
        sample, condition, conditions = make_upscaling(7, CPU, scheduler, 4, 350.0)(batch)
        level = 350 * keyed_uniform(7, "noise_level", indices).float()
        low = torch.nn.functional.avg_pool2d(batch["pixel_values"], 4)
        low = torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic").clamp(-1, 1)
        noise = keyed_randn(7, "low_resolution_noise", indices, (1, 16, 16))
        sigma = level[:, None, None, None] / 1000
        a, b = (
            (1 - sigma, sigma)
            if path == "linear"
            else (torch.cos(sigma * torch.pi / 2), torch.sin(sigma * torch.pi / 2))
        )
        torch.testing.assert_close(condition, a * low + b * noise)
        assert torch.equal(sample, batch["pixel_values"])
        assert torch.equal(conditions["noise_level"], level)
        assert not torch.allclose(noise, keyed_randn(7, "noise", indices, (1, 16, 16)))  # that of the sample

    def test_without_noise_it_is_what_evaluation_makes(self):
        batch = make_batch()
        _, condition, conditions = make_upscaling(7, CPU, FlowMatchODEScheduler(), 2, 0.0)(batch)
        torch.testing.assert_close(condition, enlarge(downscale(batch["pixel_values"], 2), (16, 16)))
        assert not conditions["noise_level"].any()

    def test_in_latents(self):
        vae, batch = tiny_vae(), make_batch()
        sample, condition, conditions = make_upscaling(7, CPU, FlowMatchODEScheduler(), 2, 0.0, vae)(batch)
        noise = keyed_randn(7, "posterior", batch["sample_indices"], (3, 8, 8))
        torch.testing.assert_close(sample, encode_images(vae, batch["pixel_values"], noise))
        low = enlarge(downscale(batch["pixel_values"], 2), (16, 16))
        with torch.no_grad():
            expected = (vae.encode(low).latent_dist.mode() - 0.25) * 0.5
        torch.testing.assert_close(condition, expected)

    def test_every_sample_has_a_level_of_its_own(self):
        prepare = make_upscaling(7, CPU, FlowMatchODEScheduler(), 2, 1000.0)
        level = prepare(make_batch(range(200), size=4))[2]["noise_level"]
        assert level.min() < 50 and level.max() > 950
        assert torch.equal(prepare(make_batch([120], size=4))[2]["noise_level"], level[120:121])


class TestCaptioning:
    def test_states_of_a_caption_of_each_image(self, tmp_path):
        words = ["a", "red", "blue", "square"]
        captions = [["a red square"], ["a blue square", "blue"], ["red"]]
        encoder, tokenizer = tiny_text_encoder(8), tiny_tokenizer(words)
        texts = build_caption_cache(tmp_path, captions, encoder, tokenizer, Accelerator())
        batch = {**make_batch(range(20)), "image_indices": [0, 1] * 10}
        sample, condition, conditions = make_captioning(7, CPU, texts)(batch)
        assert torch.equal(sample, batch["pixel_values"])
        assert condition is None
        drawn = texts.draw(7, range(20), [0, 1] * 10)
        assert set(drawn) == {"a red square", "a blue square", "blue"}
        lengths = torch.tensor([2 + len(caption.split()) for caption in drawn])
        assert torch.equal(conditions["encoder_attention_mask"], torch.arange(5) < lengths[:, None])
        with torch.no_grad():
            expected = encoder(**tokenizer(drawn[1], return_tensors="pt")).last_hidden_state[0]
        states = conditions["encoder_hidden_states"][1, : len(expected)]
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
        # Where every caption is as long as the longest one, there is nothing to mask.
        _, _, conditions = make_captioning(7, CPU, texts)({**make_batch(), "image_indices": [0, 0, 0]})
        assert set(conditions) == {"encoder_hidden_states"}

    def test_beside_a_low_resolution_image(self):
        """The draws of both parts are those of each alone."""
        batch, states = make_batch(), randn(3, 2, 4)
        upscaling = make_upscaling(7, CPU, FlowMatchODEScheduler(), 2, 350.0)

        def captioning(given):
            assert given is batch
            return given["pixel_values"], None, {"encoder_hidden_states": states}

        sample, condition, conditions = combine(upscaling, captioning)(batch)
        expected_sample, expected_condition, expected = upscaling(batch)
        assert torch.equal(sample, expected_sample) and torch.equal(condition, expected_condition)
        assert conditions.keys() == {"noise_level", "encoder_hidden_states"}
        assert torch.equal(conditions["noise_level"], expected["noise_level"])
        assert conditions["encoder_hidden_states"] is states
