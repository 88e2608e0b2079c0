# SPDX-License-Identifier: Apache-2.0
"""
`DynaDiTUpscalePipeline` against loops written out by hand, over steps and over tiles; and a tiny model trained in the
test, whose results are the given image, enlarged, without seams.
"""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import diffusers_dyna.pipelines.pipeline_dyna_dit_upscale as module
from diffusers_dyna import DynaDiTInpaintPipeline, DynaDiTPipeline, DynaDiTUpscalePipeline, FlowMatchODEScheduler
from diffusers_dyna.training.degradation import downscale, enlarge
from diffusers_dyna.training.tasks import make_upscaling

from ..testing_utils import randn
from .dyna_dit_common import (
    TEXT,
    DynaDiTPipelineTests,
    assert_close,
    generators,
    quiet,
    tiny_dit,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
    train_tiny,
)
from .test_pipeline_dyna_dit import CACHES


def make_pipeline(scheduler=None, vae=None, upscale_factor=2, max_noise_level=350.0, **overrides):
    channels = overrides.get("in_channels", 3)
    transformer = tiny_dit(**{"condition_channels": channels, "noise_level_conditioning": True, **overrides})
    scheduler = scheduler or FlowMatchODEScheduler()
    levels = {"upscale_factor": upscale_factor, "max_noise_level": max_noise_level}
    return quiet(DynaDiTUpscalePipeline(transformer, scheduler, vae, **levels))


def pictures(*entries: int, height: int = 4, width: int = 4) -> torch.Tensor:
    rows = [randn(1, 3, height, width, seed=10 + entry) for entry in entries]
    return torch.cat(rows).mul(0.3).add(0.5).clamp(0, 1)


def enlarged(pipe, image, *, num_inference_steps=3, output_type="latent", **kwargs) -> torch.Tensor:
    arguments = {"num_inference_steps": num_inference_steps, "output_type": output_type, **kwargs}
    return pipe(image=image, **arguments).images


class TestStandard(DynaDiTPipelineTests):
    pipeline_class = DynaDiTUpscalePipeline

    def make(self, **overrides):
        return make_pipeline(**overrides)

    def arguments(self, *entries):
        labels = [entry % 3 for entry in entries]
        return {"image": pictures(*entries), "class_labels": labels, "guidance_scale": 2.0, "noise_level": 100}

    @pytest.mark.parametrize("make_scheduler", [FlowMatchODEScheduler, FlowMatchEulerDiscreteScheduler])
    def test_image_of_a_seed_does_not_depend_on_its_batch(self, make_scheduler):  # DDPMScheduler is refused
        super().test_image_of_a_seed_does_not_depend_on_its_batch(make_scheduler)


class TestTiled(TestStandard):
    def arguments(self, *entries):
        return {**super().arguments(*entries), "tile_size": 4, "tile_overlap": 2, "tile_batch_size": 9}


# The loop


def call(pipe, model_input, t, label, scale, **kwargs):
    """Both halves of guidance in calls of their own, with labels as tensors of one entry."""
    output, null_output = (
        pipe.transformer(model_input, t, class_labels=labels, **kwargs).sample[:, :3]
        for labels in (torch.tensor([label]), torch.tensor([3]))
    )
    return null_output + scale * (output - null_output)


@pytest.mark.parametrize("path, factor", [("linear", 2), ("gvp", 2), ("linear", 4)])
@torch.no_grad()
def test_loop(path, factor):
    """Row by row. The generator of a row gives the noise to start from, then that of the low-resolution image."""
    pipe = make_pipeline(FlowMatchODEScheduler(path=path), upscale_factor=factor)
    images, level = pictures(0, 1, height=8 // factor, width=12 // factor), 150.0
    arguments = {"class_labels": [2, 1], "guidance_scale": 2.0, "noise_level": level, "tile_size": (8, 12)}
    actual = enlarged(pipe, images, generator=generators(0, 1), **arguments)
    for row, (label, generator) in enumerate(zip((2, 1), generators(0, 1))):
        sample = torch.randn(1, 3, 8, 12, generator=generator)
        low = F.interpolate(2 * images[row : row + 1] - 1, scale_factor=factor, mode="bicubic").clamp(-1, 1)
        angle = torch.tensor(np.pi / 2 * level / 1000)
        a, b = (angle.cos(), angle.sin()) if path == "gvp" else (1 - level / 1000, level / 1000)
        low = a * low + b * torch.randn(1, 3, 8, 12, generator=generator)
        scheduler = FlowMatchODEScheduler(path=path)
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            output = call(pipe, torch.cat([sample, low], dim=1), t, label, 2.0, noise_level=level)
            sample = scheduler.step(output, t, sample).prev_sample
        assert_close(actual[row : row + 1], sample)


def flow_dpm_solver() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize("make_scheduler", [FlowMatchODEScheduler, FlowMatchEulerDiscreteScheduler, flow_dpm_solver])
@pytest.mark.parametrize("has_vae", [False, True])
def test_condition_channels_are_those_of_training(make_scheduler, has_vae):
    """Down to the noise, drawn here and handed to the scheduler of training; and the level that the model is told."""
    vae = tiny_vae(shift_factor=0.3) if has_vae else None
    pipe = make_pipeline(make_scheduler(), vae, **({"in_channels": 4} if has_vae else {}))
    pixels = 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) - 1
    batch = {"sample_indices": [5, 6], "pixel_values": pixels}
    prepare = make_upscaling(7, torch.device("cpu"), FlowMatchODEScheduler(), 2, 0.0, vae)  # at level 0
    _, condition, _ = prepare(batch)
    draws = [torch.randn(2, *condition[0].shape, generator=generator) for generator in generators(0, 1)]
    noise = torch.stack([draw[1] for draw in draws])

    seen, levels = [], []

    def watch(module, args, kwargs):
        seen.append(args[0].clone())
        levels.append(kwargs["noise_level"])

    pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    image = downscale(pixels, 2) / 2 + 0.5
    for level in (0, 20, 20.7, 350):
        arguments = {"noise_level": level} if level != 20 else {}
        del seen[:], levels[:]
        enlarged(
            pipe, image, class_labels=0, generator=generators(0, 1), guidance_scale=2.0, tile_size=16, **arguments
        )
        expected = FlowMatchODEScheduler().add_noise(condition, noise, torch.full((2,), float(level)))
        assert len(seen) == 3 and set(levels) == {float(level)}
        for model_input in seen:
            given = model_input[:, pipe.transformer.config.in_channels :]
            assert_close(given, torch.cat([expected, expected]), atol=1e-5)


def test_forms_of_images():
    pipe = make_pipeline()
    levels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    array = levels.astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = enlarged(pipe, tensor, class_labels=2, generator=generators(0))
    assert expected.shape == (1, 3, 8, 12)
    for image in (
        PIL.Image.fromarray(levels),
        [PIL.Image.fromarray(levels)],
        array,
        array[None],
        [array],
        tensor[None],
    ):
        assert_close(enlarged(pipe, image, class_labels=2, generator=generators(0)), expected)


def test_how_images_and_labels_are_combined():
    pipe = make_pipeline()
    images = pictures(0, 1)
    expected = enlarged(pipe, images, class_labels=[2, 2], generator=generators(0, 1))
    assert_close(enlarged(pipe, images, class_labels=2, generator=generators(0, 1)), expected)
    labels = enlarged(pipe, images[:1], class_labels=[2, 0], generator=generators(0, 1))
    assert_close(labels[:1], expected[:1])
    assert_close(labels[1:], enlarged(pipe, images[:1], class_labels=0, generator=generators(1)))


def test_prompts():
    parts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    transformer = tiny_dit(**TEXT, condition_channels=3, noise_level_conditioning=True)
    pipe = quiet(DynaDiTUpscalePipeline(transformer, FlowMatchODEScheduler(), **parts))
    arguments = {"guidance_scale": 2.0, "negative_prompt": "blue", "tile_overlap": 2}
    image = pictures(0, width=7)
    results = enlarged(pipe, image, prompt=["a red square", "dark"], generator=generators(0, 0), **arguments)
    assert (results[0] - results[1]).abs().max() > 0.01
    for tile_batch_size in (1, 2):  # what is prepared for the text serves tiles one by one
        arguments["tile_batch_size"] = tile_batch_size
        assert_close(enlarged(pipe, image, prompt="dark", generator=generators(0), **arguments), results[1:])


# Tiles


@pytest.mark.parametrize("length", [8, 9, 11, 12, 13, 20, 33])
@pytest.mark.parametrize("overlap", [0, 1, 2, 5, 7])
def test_weights_of_tiles(length, overlap):
    starts, weights = DynaDiTUpscalePipeline.tile_weights(length, 8, overlap)
    assert starts[0] == 0 and starts[-1] == length - 8 and weights.shape == (len(starts), 8)
    gaps = np.diff(starts)
    assert (gaps > 0).all() and (gaps <= 8 - overlap).all() and (gaps[:-1] == 8 - overlap).all()
    total = torch.zeros(length)
    for start, weight in zip(starts, weights):
        total[start : start + 8] += weight
    torch.testing.assert_close(total, torch.ones(length))
    assert (weights > 0).all()


def test_weights_rise_and_fall_smoothly():
    """In an overlap of 4 they are sin^2 of pi / 2 * (1/8, 3/8, 5/8, 7/8), and 1 where a tile is alone."""
    starts, weights = DynaDiTUpscalePipeline.tile_weights(12, 8, 4)
    rise = torch.sin(torch.pi / 2 * torch.tensor([1, 3, 5, 7]) / 8) ** 2
    assert starts == [0, 4]
    torch.testing.assert_close(weights[0], torch.cat([torch.ones(4), rise.flip(0)]))
    torch.testing.assert_close(weights[1], torch.cat([rise, torch.ones(4)]))


@pytest.mark.parametrize("tile_size, tile_overlap", [(8, 2), (8, 0), ((4, 12), 3), ((12, 8), 6)])
def test_tiles_of_a_pointwise_prediction_are_the_whole(monkeypatch, tile_size, tile_overlap):
    """A prediction that hangs on nothing around a pixel is the same however it is cut."""

    def predict(self, hidden_states, timestep, conditions, cache_name, **kwargs):
        assert hidden_states.shape[2] <= 20 and hidden_states.shape[3] <= 26
        shapes.append(tuple(hidden_states.shape[2:]))
        return torch.tanh(hidden_states[:, :3] * 1.5 - hidden_states[:, 3:]), None

    shapes = []
    monkeypatch.setattr(module.DynaDiTPipelineBase, "_predict", predict)
    pipe, image = make_pipeline(learn_sigma=False), pictures(0, 1, height=10, width=13)
    whole = enlarged(pipe, image, class_labels=0, generator=generators(0, 1), tile_size=(20, 26))
    assert set(shapes) == {(20, 26)} and len(shapes) == 3
    del shapes[:]
    arguments = {"tile_size": tile_size, "tile_overlap": tile_overlap}
    tiled = enlarged(pipe, image, class_labels=0, generator=generators(0, 1), **arguments)
    assert set(shapes) == {tile_size if isinstance(tile_size, tuple) else (tile_size, tile_size)}
    assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile_batch_size", [1, 2, 8])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@torch.no_grad()
def test_loop_over_tiles(scale, tile_batch_size):
    """Tile by tile, weighed by hand and divided by the sum of the weights; the compute ratio is the mean of all."""
    pipe = make_pipeline()
    images, level = pictures(0, 1, height=6, width=8), 100.0
    output = pipe(
        image=images,
        class_labels=[2, 1],
        guidance_scale=scale,
        noise_level=level,
        generator=generators(0, 1),
        tile_overlap=4,
        tile_batch_size=tile_batch_size,
        num_inference_steps=3,
        output_type="latent",
        output_compute_ratio=True,
    )
    rise = torch.sin(torch.pi / 2 * (torch.arange(4) + 0.5) / 4) ** 2
    window = torch.cat([rise, rise.flip(0)])
    window = window[:, None] * window
    ratios = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: ratios.append(output.compute_ratio))
    ask = {"output_masks": True, "noise_level": level}
    for row, (label, generator) in enumerate(zip((2, 1), generators(0, 1))):
        sample = torch.randn(1, 3, 12, 16, generator=generator)
        low = F.interpolate(2 * images[row : row + 1] - 1, scale_factor=2, mode="bicubic").clamp(-1, 1)
        low = 0.9 * low + 0.1 * torch.randn(1, 3, 12, 16, generator=generator)
        for t, next_t in ((1000, 2000 / 3), (2000 / 3, 1000 / 3), (1000 / 3, 0)):
            total, weights = torch.zeros(1, 3, 12, 16), torch.zeros(12, 16)
            for top in (0, 4):
                for left in (0, 4, 8):
                    tile = (slice(None), slice(None), slice(top, top + 8), slice(left, left + 8))
                    model_input = torch.cat([sample[tile], low[tile]], dim=1)
                    time, labels = torch.tensor(float(t)), torch.tensor([label])
                    if scale > 1:
                        prediction = call(pipe, model_input, time, label, scale, **ask)
                    else:
                        prediction = pipe.transformer(model_input, time, class_labels=labels, **ask).sample
                    total[tile] += window * prediction[:, :3]
                    weights[tile[2:]] += window
            sample = sample + (next_t - t) / 1000 * total / weights
        assert_close(output.images[row : row + 1], sample)
    handle.remove()
    assert output.compute_ratio == pytest.approx(torch.cat(ratios).mean().item()) and output.compute_ratio < 0.95


@pytest.mark.parametrize("tile_batch_size", [1, 4, 8, 9])
@pytest.mark.parametrize("scale, negative", [(1.0, None), (2.0, None), (2.0, "dark")])
def test_text_is_computed_once(scale, negative, tile_batch_size):
    """Keys and values of all tiles, of the last few too, are those that the plan holds."""
    parts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    transformer = tiny_dit(**TEXT, condition_channels=3, noise_level_conditioning=True)
    pipe = quiet(DynaDiTUpscalePipeline(transformer, FlowMatchODEScheduler(), **parts))
    calls, sizes = [], []
    for block in transformer.transformer_blocks:
        block.cross_attn.to_kv.forward = lambda *args, forward=block.cross_attn.to_kv.forward, **kwargs: (
            calls.append(1) or forward(*args, **kwargs)
        )
    transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    arguments = {"guidance_scale": scale, "negative_prompt": negative, "tile_batch_size": tile_batch_size}
    prompts = {"prompt": ["red", "a blue square"], "generator": generators(0, 1), "tile_overlap": 4}
    enlarged(pipe, pictures(0, 1, height=8, width=8), **prompts, **arguments)  # 9 tiles
    rows = 4 if scale > 1 else 2
    chunks = {1: [1] * 9, 4: [4, 4, 1], 8: [8, 1], 9: [9]}[tile_batch_size]
    assert sizes == 3 * [rows * chunk for chunk in chunks]
    assert len(calls) == len(transformer.transformer_blocks)


def test_text_of_steps_without_guidance_is_computed_once():
    """One tile at a time, where their rows lead those of the guided steps."""
    parts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    transformer = tiny_dit(**TEXT, condition_channels=3, noise_level_conditioning=True)
    pipe = quiet(DynaDiTUpscalePipeline(transformer, FlowMatchODEScheduler(), **parts))
    calls = []
    for block in transformer.transformer_blocks:
        block.cross_attn.to_kv.forward = lambda *args, forward=block.cross_attn.to_kv.forward, **kwargs: (
            calls.append(1) or forward(*args, **kwargs)
        )
    arguments = {"guidance_scale": 2.0, "guidance_interval": (0.5, 0.8), "tile_batch_size": 1}
    for tile_size in (16, 8):
        del calls[:]
        enlarged(pipe, pictures(0, height=8, width=8), prompt="red", tile_size=tile_size, **arguments)
        assert len(calls) == len(transformer.transformer_blocks)


def test_text_of_a_callback_reaches_all_tiles():
    parts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    transformer = tiny_dit(**TEXT, condition_channels=3, noise_level_conditioning=True)
    pipe = quiet(DynaDiTUpscalePipeline(transformer, FlowMatchODEScheduler(), **parts))
    image, latents = pictures(0, height=8, width=8), randn(1, 3, 16, 16)
    arguments = {"guidance_scale": 2.0, "tile_overlap": 4, "noise_level": 0, "latents": latents}
    text = pipe.encode_prompt("dark", do_classifier_free_guidance=False)[0]
    red = pipe.encode_prompt("red", do_classifier_free_guidance=False)[0]
    assert text.shape == red.shape

    def change(pipe, i, t, tensors):
        return {"prompt_embeds": text} if i == 0 else {}

    inputs = ["prompt_embeds"]
    changed = enlarged(pipe, image, prompt_embeds=red, callback_on_step_end=change,
                       callback_on_step_end_tensor_inputs=inputs, **arguments)  # fmt: skip
    states = []
    enlarged(
        pipe,
        image,
        prompt_embeds=red,
        callback_on_step_end=lambda pipe, i, t, tensors: states.append(tensors["latents"]) or {},
        **arguments,
    )
    rest = enlarged(pipe, image, prompt_embeds=text, sigmas=[2 / 3, 1 / 3], num_inference_steps=None,
                    **{**arguments, "latents": states[0]})  # fmt: skip
    assert_close(changed, rest, atol=1e-4)
    assert (changed - states[-1]).abs().max() > 0.01


@pytest.mark.parametrize("name", CACHES)
def test_feature_caches_hold_each_tile_for_itself(name):
    """Tiles one by one and all at a time are the same prediction; the cache that cannot tell them apart is refused."""
    pipe, image = make_pipeline(), pictures(0, height=6, width=8)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    arguments = {"class_labels": 0, "num_inference_steps": 6, "tile_overlap": 4}
    at_a_time = enlarged(pipe, image, tile_batch_size=6, generator=generators(0), **arguments)
    if name == "PyramidAttentionBroadcast":
        with pytest.raises(
            ValueError, match="`tile_batch_size`=4 predicts the 6 tiles .* Use `tile_batch_size=6`, or"
        ):
            enlarged(pipe, image, tile_batch_size=4, generator=generators(0), **arguments)
    else:
        one_by_one = enlarged(pipe, image, tile_batch_size=1, generator=generators(0), **arguments)
        assert_close(one_by_one, at_a_time, atol=1e-3)
    pipe.transformer.disable_cache()
    exact = enlarged(pipe, image, tile_batch_size=4, generator=generators(0), **arguments)
    assert (at_a_time - exact).abs().max() > 0.1


def test_tile_of_the_whole_image():
    """Not cut: one call, at the image's own size, whatever the overlap."""
    pipe, image = make_pipeline(), pictures(0, height=6, width=5)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    exact = enlarged(pipe, image, class_labels=0, generator=generators(0), tile_size=(12, 10))
    larger = enlarged(pipe, image, class_labels=0, generator=generators(0), tile_size=16, tile_overlap=8)
    assert set(seen) == {(1, 6, 12, 10)} and len(seen) == 6
    assert_close(larger, exact)


def test_default_tiles_have_the_size_of_the_transformer():
    pipe = make_pipeline(sample_size=(8, 4))
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    image = pictures(0, height=6, width=2)
    result = enlarged(pipe, image, class_labels=0, num_inference_steps=1)
    assert result.shape == (1, 3, 12, 4) and seen == [(2, 6, 8, 4)]
    small = enlarged(pipe, image[:, :, :1], class_labels=0, num_inference_steps=1)  # at its own size
    assert small.shape == (1, 3, 2, 4) and seen[1:] == [(1, 6, 2, 4)]


# What is saved


def test_saved_factor_and_noise_level(tmp_path):
    make_pipeline(upscale_factor=4, max_noise_level=123.0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["upscale_factor"] == 4 and saved["max_noise_level"] == 123.0
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert enlarged(loaded, pictures(0, height=2, width=3), class_labels=0).shape == (1, 3, 8, 12)
    with pytest.raises(ValueError, match=r"`noise_level`=124 must be in \[0, 123\]"):
        enlarged(loaded, pictures(0), class_labels=0, noise_level=124)
    again = DynaDiTUpscalePipeline.from_pipe(loaded)
    assert again.config.upscale_factor == 4 and again.transformer is loaded.transformer


def test_default_noise_level():
    """20, or what there is below it."""
    seen = []
    for highest in (350.0, 5.0):
        pipe = make_pipeline(max_noise_level=highest)
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["noise_level"]), with_kwargs=True
        )
        enlarged(pipe, pictures(0), class_labels=0, num_inference_steps=1)
    assert seen == [20.0, 5.0]


# A trained model


def draw_smooth(count: int, generator: torch.Generator, size: int = 8) -> torch.Tensor:
    """Waves with a period of 16 pixels and more, of any direction and phase."""
    place = torch.arange(size) + 0.5
    angle, phase, frequency = (
        torch.rand(3, count, 1, 1, generator=generator) * torch.tensor([6.3, 6.3, 0.4])[:, None, None, None]
    )
    wave = torch.sin(frequency * (angle.cos() * place[:, None] + angle.sin() * place) + phase)
    return 0.9 * wave[:, None]


def train_on_waves(factor: int) -> DynaDiTUpscalePipeline:
    def draw(count, generator):
        images = draw_smooth(count, generator)
        levels = 500 * torch.rand(count, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        low = FlowMatchODEScheduler().add_noise(enlarge(downscale(images, factor), (8, 8)), noise, levels)
        return images, low, {"noise_level": levels}

    transformer = train_tiny(draw, steps=200, condition_channels=1, noise_level_conditioning=True)
    levels = {"upscale_factor": factor, "max_noise_level": 500.0}
    return quiet(DynaDiTUpscalePipeline(transformer, FlowMatchODEScheduler(), **levels))


@pytest.fixture(scope="module")
def pipe_of_waves():
    return train_on_waves(2)


def test_results_are_the_image_enlarged(pipe_of_waves):
    """The image: each result is near its own image and far from the others'. Ignored, it would be near neither."""
    images = draw_smooth(8, torch.Generator().manual_seed(1)) / 2 + 0.5
    low = downscale(images, 2)
    results = enlarged(pipe_of_waves, low, num_inference_steps=10, output_type="pt", generator=generators(*range(8)))
    distances = (results[:, None] - images).abs().mean(dim=(2, 3, 4))
    assert distances.diagonal().max() < 0.08
    assert (distances.argmin(dim=1) == torch.arange(8)).all()


def test_results_are_the_image_enlarged_by_four():
    """Of four pixels: each result is near its own image, and the means of its quarters are those pixels."""
    pipe, images = train_on_waves(4), draw_smooth(8, torch.Generator().manual_seed(1)) / 2 + 0.5
    low = downscale(images, 4)
    assert low.shape == (8, 1, 2, 2)
    results = enlarged(pipe, low, num_inference_steps=10, output_type="pt", generator=generators(*range(8)))
    assert results.shape == images.shape
    distances = (results[:, None] - images).abs().mean(dim=(2, 3, 4))
    assert distances.diagonal().max() < 0.1
    assert (distances.argmin(dim=1) == torch.arange(8)).all()
    assert (downscale(results, 4) - low).abs().mean() < 0.2 * low.std()


def test_noise_level_lets_go_of_the_image(pipe_of_waves):
    """More of it, and the result keeps less of the image."""
    images = draw_smooth(8, torch.Generator().manual_seed(1)) / 2 + 0.5
    low = downscale(images, 2)
    errors = []
    for level in (0, 250, 500):
        arguments = {"noise_level": level, "num_inference_steps": 10, "output_type": "pt"}
        results = enlarged(pipe_of_waves, low, generator=generators(*range(8)), **arguments)
        errors.append((downscale(results, 2) - low).abs().mean().item())
    assert errors[0] < errors[1] < errors[2] < 0.15


def test_no_seams(pipe_of_waves):
    """
    Where tiles meet, neighbouring pixels differ no more than elsewhere; without an overlap, they do. That the weights of
    the tiles are smooth is tested above.
    """
    images = draw_smooth(4, torch.Generator().manual_seed(1), size=32) / 2 + 0.5
    low = downscale(images, 2)

    def jumps(tile_overlap, borders):
        results = enlarged(
            pipe_of_waves,
            low,
            noise_level=250,
            num_inference_steps=10,
            tile_overlap=tile_overlap,
            generator=generators(*range(4)),
            output_type="pt",
        )
        assert (results - images).abs().mean() < 0.1
        gradients = [(wave[..., 1:] - wave[..., :-1])[..., 1::2] for wave in (results, images)]  # from patch to patch
        rough = (gradients[0] - gradients[1]).square().mean(dim=(0, 1, 2))
        is_border = torch.tensor([place in borders for place in range(2, 32, 2)])
        return (rough[is_border].mean() / rough[~is_border].mean()).item()

    # With 4 pixels of overlap, tiles start at 4, 8, ... and end at 8, 12, ...
    assert jumps(4, range(4, 32, 4)) < 1.4
    assert jumps(0, range(8, 32, 8)) > 1.8


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"image": pictures(0, height=5, width=4)},
            r"`image` has 5 x 4 pixels .* makes 10 x 8 of `upscale_factor` 2, but that must be divisible by 4 .* The nearest "
            r"valid size of `image` is 6 x 4",
        ),
        ({"image": pictures(0, height=1, width=1)}, r"`image` has 1 x 1 pixels .* is 2 x 2: crop, pad or resize it"),
        ({"image": pictures(0) * 2}, r"`image` must have values in \[0, 1\]"),
        ({"image": torch.rand(1, 1, 4, 4)}, r"`image` must have shape .* with 3 channels"),
        ({"noise_level": 351}, r"`noise_level`=351 must be in \[0, 350\], in units of timestep"),
        ({"tile_batch_size": 2.0}, "`tile_batch_size`=2.0 must be a whole number, at least 1"),
        ({"noise_level": -1}, r"`noise_level`=-1 must be in \[0, 350\]"),
        ({"tile_size": 6}, r"`tile_size`=\(6, 6\) must be .* divisible by 4. The nearest valid one is \[8, 8\]"),
        ({"tile_size": (4, 0)}, "`tile_size`=0 must be a whole number, at least 1"),
        ({"tile_size": 8.0}, "`tile_size`=8.0 must be a whole number, at least 1"),
        ({"tile_size": (4, 4, 4)}, r"`tile_size`=\(4, 4, 4\) must be height and width in pixels"),
        ({"tile_overlap": 8}, r"`tile_overlap`=8 must be .* less than `tile_size` \(8\)"),
        ({"tile_overlap": -1}, "`tile_overlap`=-1 must be a whole number, at least 0"),
        ({"tile_overlap": 2.0}, "`tile_overlap`=2.0 must be a whole number, at least 0"),
        ({"tile_size": (8, 16), "tile_overlap": 9}, r"`tile_overlap`=9 must be .* less than `tile_size` \(8\)"),
        ({"tile_batch_size": 0}, "`tile_batch_size`=0 must be a whole number, at least 1"),
        (
            {"image": pictures(0, 1), "class_labels": [0, 1, 2]},
            "as many of each, or one for all, but there are: `image` 2, `class_labels` 3",
        ),
        ({"prompt": "red"}, "`prompt` or one of its kind was given, but the transformer has no text conditioning"),
    ],
)
def test_bad_input(arguments, message):
    pipe = make_pipeline(patch_size=4)
    given = {"image": pictures(0), "class_labels": 0, "num_inference_steps": 3, "output_type": "latent"}
    with pytest.raises(ValueError, match=message):
        pipe(**{**given, **arguments})


def test_bad_input_with_a_vae():
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4)
    with pytest.raises(ValueError, match=r"`image` has 5 x 8 pixels .* divisible by 4 .* is 6 x 8"):
        enlarged(pipe, pictures(0, height=5, width=8), class_labels=0)
    with pytest.raises(
        ValueError, match=r"`tile_overlap`=3 must be divisible by the scale factor 2 of the VAE. Use 2."
    ):
        enlarged(pipe, pictures(0), class_labels=0, tile_overlap=3)
    assert enlarged(pipe, pictures(0, height=12, width=8), class_labels=0, output_type="pt").shape == (1, 3, 24, 16)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        DDPMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        lambda: DDIMScheduler.from_config(flow_dpm_solver().config),  # keeps `use_flow_sigmas` in its config
    ],
)
def test_schedulers_without_flow_matching(make_scheduler):
    pipe = make_pipeline(make_scheduler(), learn_sigma=False)
    name = type(pipe.scheduler).__name__
    with pytest.raises(ValueError, match=f"`scheduler` is {name} without flow matching.* Use FlowMatchODEScheduler."):
        enlarged(pipe, pictures(0), class_labels=0)


def test_no_image():
    with pytest.raises(
        TypeError, match="`image` was not given. Give an image of Pillow, an array or a tensor as `image=`"
    ):
        make_pipeline()()
    with pytest.raises(
        TypeError, match="`prompt` must be a text .* first argument of a call: give an image as `image=`"
    ):
        make_pipeline()(pictures(0))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"upscale_factor": 1}, "`upscale_factor`=1 must be a whole number, at least 2"),
        ({"upscale_factor": 2.5}, "`upscale_factor`=2.5 must be a whole number, at least 2"),
        ({"upscale_factor": "2"}, "`upscale_factor`='2' must be a number"),
        ({"upscale_factor": None}, "`upscale_factor`=None must be a number"),
        ({"upscale_factor": math.inf}, "`upscale_factor`=inf must be a whole number, at least 2"),
        ({"max_noise_level": 1001}, r"`max_noise_level`=1001 must be in \[0, 1000\]"),
        ({"max_noise_level": "a"}, "`max_noise_level`='a' must be a number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_pipeline(**settings)


def test_transformers_of_other_tasks():
    with pytest.raises(ValueError, match="`transformer` was made for another task .generate.* Use DynaDiTPipeline"):
        DynaDiTUpscalePipeline(tiny_dit(), FlowMatchODEScheduler())
    inpainter, upscaler = tiny_dit(condition_channels=4), make_pipeline().transformer
    with pytest.raises(ValueError, match="another task .inpaint.* Use DynaDiTInpaintPipeline"):
        DynaDiTUpscalePipeline(inpainter, FlowMatchODEScheduler())
    for other in (DynaDiTPipeline, DynaDiTInpaintPipeline):
        with pytest.raises(ValueError, match="another task .upscale.* Use DynaDiTUpscalePipeline"):
            other(upscaler, FlowMatchODEScheduler())
    strange = tiny_dit(condition_channels=1, noise_level_conditioning=True)
    with pytest.raises(
        ValueError, match="`condition_channels`=1, but for the task upscale with `in_channels`=3 there must be 3"
    ):
        DynaDiTUpscalePipeline(strange, FlowMatchODEScheduler())
