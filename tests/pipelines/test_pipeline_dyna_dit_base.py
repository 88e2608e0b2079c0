# SPDX-License-Identifier: Apache-2.0
"""
The loop that the pipelines of the dynamic transformer share, in the ways that the class-conditional pipeline does not use
it: from the middle of a grid, with steps taken again, with conditions in further channels, with added rows, in reverse.
"""

import inspect

import numpy as np
import PIL.Image
import pytest
import torch

import diffusers
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

import diffusers_dyna
from diffusers_dyna import FlowMatchODEScheduler, FlowMatchSDEScheduler
from diffusers_dyna.pipelines.pipeline_dyna_dit_base import DynaDiTConditions, DynaDiTPipelineBase

from ..testing_utils import randn
from .dyna_dit_common import TEXT, assert_close, generators, quiet, tiny_dit, tiny_vae


CPU = torch.device("cpu")
LABELS = [0, 2]


class AnyTaskPipeline(DynaDiTPipelineBase):
    """The base, for every transformer."""

    _optional_components = ["vae"]

    def __init__(self, transformer, scheduler, vae=None):
        super().__init__()
        self._register("generate|text-to-image|inpaint|upscale", transformer=transformer, scheduler=scheduler, vae=vae)


def make_pipeline(scheduler=None, vae=None, scale: float = 1.0, **overrides) -> AnyTaskPipeline:
    pipe = quiet(AnyTaskPipeline(tiny_dit(**overrides), scheduler or FlowMatchODEScheduler(), vae))
    pipe._begin_run(scale)
    return pipe


@torch.no_grad()
def denoise(pipe, timesteps, latents, **arguments) -> torch.Tensor:
    conditions = pipe.prepare_conditions(len(LABELS), 1, CPU, LABELS)
    return pipe.denoise(timesteps, latents, conditions, **arguments)[0]


@torch.no_grad()
def velocity_of(pipe, latents, timestep, labels=LABELS, **arguments) -> torch.Tensor:
    labels = None if labels is None else torch.tensor(labels)
    return pipe.transformer(latents, timestep, labels, **arguments).sample[:, :3]


# A part of a grid


SOLVERS = {
    "euler": lambda: FlowMatchODEScheduler(shift=2.0),
    "heun": lambda: FlowMatchODEScheduler(solver="heun"),
    "rk4": lambda: FlowMatchODEScheduler(solver="rk4"),
    "FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "FlowMatchHeun": lambda: FlowMatchHeunDiscreteScheduler(),
    "EulerDiscrete": lambda: EulerDiscreteScheduler(),
}


@pytest.mark.parametrize("strength, first", [(0.5, 3), (0.8, 1), (1.0, 0), (0.2, 4)])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_rest_of_a_trajectory(name, strength, first):
    """From the state of the whole trajectory at that step on, one ends where it ends."""
    pipe = make_pipeline(SOLVERS[name]())
    order = pipe.scheduler.order
    whole = pipe.set_timesteps(6 if strength == 0.5 else 5, CPU)
    states = [pipe.prepare_latents(2, 8, 8, generators(0, 1), None, CPU)]
    final = denoise(pipe, whole, states[0], after_step=lambda i, next_i, x: states.append(x) or x)

    pipe.set_timesteps(6 if strength == 0.5 else 5, CPU)
    timesteps = pipe.get_timesteps(strength)
    assert timesteps.tolist() == whole[first * order :].tolist()
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: calls.append(args[1].item()))
    again = denoise(pipe, timesteps, states[first * order])
    handle.remove()
    assert calls == pytest.approx(timesteps.tolist()) and pipe.num_timesteps == len(timesteps)
    assert_close(again, final)


def test_strength_that_leaves_nothing():
    pipe = make_pipeline()
    pipe.set_timesteps(4, CPU)
    with pytest.raises(ValueError, match=r"`strength`=0.0 leaves none of the 4 steps. Use a larger one"):
        pipe.get_timesteps(0.0)


@pytest.mark.parametrize(
    "make_scheduler, coefficients",
    [
        (FlowMatchODEScheduler, lambda t, s: (1 - t / 1000, t / 1000)),
        (FlowMatchSDEScheduler, lambda t, s: (1 - t / 1000, t / 1000)),
        (FlowMatchEulerDiscreteScheduler, lambda t, s: (1 - t / 1000, t / 1000)),
        (
            lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            lambda t, s: (1 - s.sigmas[2], s.sigmas[2]),
        ),
        (DDPMScheduler, lambda t, s: (s.alphas_cumprod[t.long()] ** 0.5, (1 - s.alphas_cumprod[t.long()]) ** 0.5)),
        (EulerDiscreteScheduler, lambda t, s: (torch.tensor(1.0), s.sigmas[2])),
    ],
    ids=["ODE", "SDE", "FlowMatchEuler", "DPM++ flow", "DDPM", "EulerDiscrete"],
)
def test_latents_of_an_image_are_on_the_path(make_scheduler, coefficients):
    pipe = make_pipeline(make_scheduler())
    pipe.set_timesteps(5, CPU)
    timesteps = pipe.get_timesteps(0.6)
    assert len(timesteps) == 3
    image = randn(2, 3, 8, 8, seed=4)
    latents = pipe.prepare_latents(2, 8, 8, generators(0, 1), None, CPU, image, timesteps[0])
    noise = torch.cat([randn(1, 3, 8, 8, seed=seed) for seed in (0, 1)])
    of_image, of_noise = coefficients(timesteps[0], pipe.scheduler)
    assert_close(latents, of_image * image + of_noise * noise)
    assert_close(pipe.prepare_latents(2, 8, 8, None, noise, CPU, image, timesteps[0]), latents)


def test_there_and_back():
    """Noise that an image comes from: up the grid, and down it again."""
    pipe = make_pipeline(FlowMatchODEScheduler(solver="heun"), num_layers=1, router_mode="threshold")
    image = 0.5 * randn(2, 3, 8, 8)
    arguments = {"complete_model": True}
    noise = denoise(pipe, pipe.set_timesteps(40, CPU, reverse=True), image, **arguments)
    back = denoise(pipe, pipe.set_timesteps(40, CPU), noise, **arguments)
    assert (noise - image).abs().mean() > 0.5
    assert (back - image).abs().mean() < 0.02


# Steps that are taken again


@pytest.mark.parametrize("name", ["euler", "FlowMatchEuler", "FlowMatchHeun", "heun", "ab3"])
def test_steps_taken_again(name):
    """Back to an earlier entry: a fresh trajectory from there, against one written with a scheduler of its own."""
    make_scheduler = SOLVERS.get(name, lambda: FlowMatchODEScheduler(solver="ab3"))
    pipe = make_pipeline(make_scheduler(), scale=2.0)
    order = pipe.scheduler.order
    timesteps = pipe.set_timesteps(4, CPU)
    first = list(range(2 * order))
    steps = [*first, *first[order:], *range(2 * order, len(timesteps))]  # the second step twice
    latents = randn(2, 3, 8, 8)
    seen = []

    def go_back(i, next_i, state):
        seen.append((i, next_i))
        return 2 * state + 1 if next_i <= i else state  # as good as noise

    actual = denoise(pipe, timesteps, latents, steps=steps, after_step=go_back)
    assert seen == list(zip(steps, [*steps[1:], len(timesteps)], strict=True))
    assert pipe.num_timesteps == len(steps)

    state = latents
    for part in (first, [*first[order:], *range(2 * order, len(timesteps))]):
        other = make_pipeline(make_scheduler())
        other.set_timesteps(4, CPU)
        other.scheduler.set_begin_index(part[0])
        for i in part:
            t = timesteps[i]
            output, null = velocity_of(pipe, state, t), velocity_of(pipe, state, t, None)
            state = other.scheduler.step(null + 2.0 * (output - null), t, state).prev_sample
        state = 2 * state + 1 if part is first else state
    assert_close(actual, state)


def test_steps_taken_again_in_a_part_of_the_grid():
    pipe = make_pipeline()
    pipe.set_timesteps(4, CPU)
    timesteps = pipe.get_timesteps(0.5)
    actual = denoise(pipe, timesteps, randn(2, 3, 8, 8), steps=[0, 0, 1])
    state = randn(2, 3, 8, 8)
    for time in (500.0, 500.0, 250.0):
        state = state - 0.25 * velocity_of(pipe, state, time)
    assert_close(actual, state)


# Conditions in channels, other predictions


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_condition_channels_go_behind_the_state(scale):
    pipe = make_pipeline(scale=scale, condition_channels=4)
    condition, latents = randn(2, 4, 8, 8, seed=5), randn(2, 3, 8, 8)
    calls = []
    timesteps = pipe.set_timesteps(3, CPU)
    actual = denoise(pipe, timesteps, latents, condition_channels=lambda i: calls.append(i) or condition * (i + 1))
    assert calls == [0, 1, 2]
    state = latents
    for i, t in enumerate(timesteps):
        both = torch.cat([state, condition * (i + 1)], dim=1)
        output, null = velocity_of(pipe, both, t), velocity_of(pipe, both, t, None)
        state = state - (null + scale * (output - null)) / 3
    assert_close(actual, state)


def test_only_the_state_is_scaled_for_the_scheduler():
    """EulerDiscrete divides it by its deviation."""
    pipe = make_pipeline(EulerDiscreteScheduler(), condition_channels=4)
    condition, latents = randn(2, 4, 8, 8, seed=5), randn(2, 3, 8, 8)
    timesteps = pipe.set_timesteps(1, CPU)
    sigma = pipe.scheduler.sigmas[0]
    actual = denoise(pipe, timesteps, latents, condition_channels=lambda i: condition)
    both = torch.cat([latents / (sigma**2 + 1) ** 0.5, condition], dim=1)
    assert_close(actual, latents - sigma * velocity_of(pipe, both, timesteps[0].float()))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_noise_level_is_prepared(scale, monkeypatch):
    pipe = make_pipeline(scale=scale, condition_channels=3, noise_level_conditioning=True)
    condition, latents = randn(2, 3, 8, 8, seed=5), randn(2, 3, 8, 8)
    conditions = pipe.prepare_conditions(2, 1, CPU, LABELS, noise_level=200.0)
    timesteps = pipe.set_timesteps(2, CPU)
    modulated = []
    for block in pipe.transformer.transformer_blocks:
        monkeypatch.setattr(block, "_modulate", lambda c, f=block._modulate: modulated.append(1) or f(c))
    with torch.no_grad():
        actual, _ = pipe.denoise(timesteps, latents, conditions, condition_channels=lambda i: condition)
    assert len(modulated) == len(pipe.transformer.transformer_blocks)  # for all steps at once
    state = latents
    for t in timesteps:
        both = torch.cat([state, condition], dim=1)
        output = velocity_of(pipe, both, t, noise_level=200.0)
        null = velocity_of(pipe, both, t, None, noise_level=200.0)
        state = state - (null + scale * (output - null)) / 2
    assert_close(actual, state)
    other = velocity_of(pipe, torch.cat([latents, condition], dim=1), 1000.0, noise_level=900.0)
    first = velocity_of(pipe, torch.cat([latents, condition], dim=1), 1000.0, noise_level=200.0)
    assert (other - first).abs().max() > 0.01


def test_predictions_in_parts(monkeypatch):
    """A prediction put together from halves of the image; every part has a feature cache of its own."""
    pipe = make_pipeline(scale=2.0)
    whole = pipe._predict
    names = []

    def in_halves(hidden_states, timestep, conditions, cache_name, **kwargs):
        assert len(hidden_states) == len(conditions.class_labels) == 4  # both halves of guidance
        names.append(cache_name)
        parts = [
            whole(part, timestep, conditions, f"{cache_name}_{i}", **kwargs)
            for i, part in enumerate(hidden_states.chunk(2, dim=3))
        ]
        return torch.cat([part[0] for part in parts], dim=3), torch.cat([part[1] for part in parts])

    monkeypatch.setattr(pipe, "_predict", in_halves)
    latents = randn(2, 3, 8, 16)
    timesteps = pipe.set_timesteps(2, CPU)
    conditions = pipe.prepare_conditions(2, 1, CPU, LABELS)
    with torch.no_grad():
        actual, ratio = pipe.denoise(timesteps, latents, conditions, output_compute_ratio=True)
    assert names == ["cond_uncond"] * 2 and 0 < ratio < 1
    state = latents
    for t in timesteps:
        columns = []
        for part in state.chunk(2, dim=3):
            output, null = velocity_of(pipe, part, t), velocity_of(pipe, part, t, None)
            columns.append(null + 2.0 * (output - null))
        state = state - torch.cat(columns, dim=3) / 2
    assert_close(actual, state)


def test_added_rows_are_set_at_each_step():
    """A reference beside the images, whose attention they share, follows its own path."""
    pipe = make_pipeline(scale=2.0)
    timesteps = pipe.set_timesteps(3, CPU)
    path = [randn(1, 3, 8, 8, seed=10 + i) for i in range(4)]
    labels = [*LABELS, 1]
    conditions = pipe.prepare_conditions(3, 1, CPU, labels)
    latents = torch.cat([randn(2, 3, 8, 8), path[0]])
    references = [2, 2, 2, 5, 5, 5]
    with torch.no_grad(), pipe.transformer.share_attention(references, 0.7):
        actual, _ = pipe.denoise(
            timesteps,
            latents,
            conditions,
            guidance_interval=(0.5, 1.0),
            after_step=lambda i, next_i, state: torch.cat([state[:2], path[next_i]]),
        )
    state = latents
    for i, t in enumerate(timesteps):
        with pipe.transformer.share_attention([2, 2, 2], 0.7):
            prediction = velocity_of(pipe, state, t, labels)
            if t >= 500:
                null = velocity_of(pipe, state, t, None)
                prediction = null + 2.0 * (prediction - null)
        state = torch.cat([(state - prediction / 3)[:2], path[i + 1]])
    assert_close(actual, state)


def test_rows_of_conditions_are_views():
    text = randn(4, 5, 16)
    conditions = DynaDiTConditions(torch.tensor([0, 1, 3, 3]), text, noise_level=200.0)
    first = conditions.rows(2)
    assert first.class_labels.tolist() == [0, 1] and first.encoder_hidden_states.shape == (2, 5, 16)
    assert first.encoder_hidden_states.data_ptr() == text.data_ptr()
    assert first.noise_level == 200.0 and first.encoder_attention_mask is None
    assert list(first.model_kwargs()) == ["class_labels", "encoder_hidden_states", "noise_level"]
    assert DynaDiTConditions().model_kwargs() == {"class_labels": None}


def test_conditions_of_classes_and_text():
    pipe = make_pipeline(**{**TEXT, "num_classes": 3, "class_dropout_prob": 0.1}, scale=2.0)
    texts = {"prompt_embeds": randn(2, 4, 16), "negative_prompt_embeds": randn(1, 6, 16, seed=1)}
    pipe.check_conditions(2.0, 1, **texts)
    assert pipe.get_batch_size(class_labels=1, prompt_embeds=texts["prompt_embeds"]) == 2
    conditions = pipe.prepare_conditions(2, 2, CPU, 1, **texts)
    assert conditions.class_labels.tolist() == [1] * 4 + [3] * 4
    assert conditions.caption_dropout_mask is None
    assert conditions.encoder_hidden_states.shape == (8, 6, 16)
    assert conditions.encoder_attention_mask.sum(dim=1).tolist() == [4] * 4 + [6] * 4
    assert torch.equal(conditions.encoder_hidden_states[2, :4], texts["prompt_embeds"][1])
    only_class = pipe.prepare_conditions(1, 1, CPU, 1)
    assert only_class.encoder_hidden_states is None and only_class.class_labels.tolist() == [1, 3]
    only_text = pipe.prepare_conditions(2, 1, CPU, **texts)
    assert only_text.class_labels.tolist() == [3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"as many of each, .*: `class_labels` 3, `prompt_embeds` 2"):
        pipe.get_batch_size(class_labels=[0, 1, 2], prompt_embeds=texts["prompt_embeds"])
    with pytest.raises(ValueError, match="`prompt` or one of its kind was given, but the transformer has no text"):
        make_pipeline().check_conditions(1.0, 0, prompt="red")


# The VAE


@pytest.mark.parametrize("shift_factor", [None, 0.3])
def test_encode_image(shift_factor):
    pipe = make_pipeline(vae=tiny_vae(shift_factor=shift_factor), in_channels=4)
    images = randn(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        latents = pipe.encode_image(images, generators(3, 4))
        posterior = pipe.vae.encode(images).latent_dist
    noise = torch.cat([randn(1, 4, 8, 8, seed=seed) for seed in (3, 4)])
    expected = (posterior.mean + posterior.std * noise - (shift_factor or 0.0)) * 0.5
    assert latents.dtype == torch.float32
    assert_close(latents, expected)
    with torch.no_grad():
        assert_close(pipe.encode_image(images[:1], generators(3)[0]), expected[:1])
        mode = (posterior.mean - (shift_factor or 0.0)) * 0.5
        assert_close(pipe.encode_image(images, sample_mode="argmax"), mode)
        with pytest.raises(ValueError, match="`generator` is a list of 3, but 2 images are to be drawn"):
            pipe.encode_image(images, generators(3, 4, 5))
        decoded = pipe.vae.decode(latents / 0.5 + (shift_factor or 0.0)).sample
        assert_close(pipe.decode_latents(latents), decoded)
        pipe.vae.to(torch.bfloat16)
        assert pipe.encode_image(images).dtype == torch.float32


def test_without_a_vae_the_image_is_the_latents():
    pipe = make_pipeline()
    image = randn(2, 3, 8, 8).clamp(-1, 1).double()
    assert torch.equal(pipe.encode_image(image), image.float())


def test_sizes_that_do_not_divide_name_the_nearest():
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4)
    with pytest.raises(ValueError, match=r"divisible by 4 \(`patch_size` 2 x .* 2 .*are 17 and 1. .* is 16 and 4\."):
        pipe.check_size(17, 1)
    pipe.check_size(20, 12)
    assert pipe.default_size() == (16, 16) and pipe.default_size(width=20) == (16, 20)


# Arguments


@pytest.mark.parametrize(
    "name, relative, first_left_out",
    [
        ("DynaDiTTextToImagePipeline", "SanaPipeline", "clean_caption"),
        ("DynaDiTImg2ImgPipeline", "StableDiffusionImg2ImgPipeline", "ip_adapter_image"),
        ("DynaDiTInpaintPipeline", "StableDiffusionInpaintPipeline", "ip_adapter_image"),
        ("DynaDiTUpscalePipeline", "StableDiffusionUpscalePipeline", "callback"),
    ],
)
def test_arguments_come_in_the_order_of_diffusers(name, relative, first_left_out):
    """Those of diffusers' pipeline of the same task, which by position go as far as ours has all; then our own."""
    ours = list(inspect.signature(getattr(diffusers_dyna, name).__call__).parameters)
    theirs = list(inspect.signature(getattr(diffusers, relative).__call__).parameters)
    theirs = [name.replace("cross_attention_kwargs", "attention_kwargs") for name in theirs]
    shared = [name for name in theirs if name in ours]
    assert ours[: len(shared)] == shared
    assert theirs[: theirs.index(first_left_out)] == shared[: theirs.index(first_left_out)]


def test_arguments_of_encode_prompt_come_in_the_order_of_diffusers():
    ours = list(inspect.signature(DynaDiTPipelineBase.encode_prompt).parameters)
    assert ours == [
        name for name in inspect.signature(diffusers.SanaPipeline.encode_prompt).parameters if name in ours
    ]


@pytest.mark.parametrize("task", ["TextToImage", "Img2Img", "Inpaint", "Upscale"])
def test_checks_take_their_many_arguments_by_name(task):
    _, *parameters = inspect.signature(
        getattr(diffusers_dyna, f"DynaDiT{task}Pipeline").check_inputs
    ).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}


def test_labels_of_all_kinds():
    pipe = make_pipeline()
    for labels in ([0, 2], torch.tensor([0, 2]), np.array([0, 2])):
        assert pipe.get_label_ids(labels) == [0, 2]
        assert pipe.get_batch_size(class_labels=labels, image=torch.zeros(1, 3, 8, 8), prompt=None) == 2
    for label in (2, torch.tensor(2)):
        assert pipe.get_label_ids(label) == [2]
        assert pipe.get_batch_size(class_labels=label, prompt="red") == 1
    assert pipe.get_batch_size() == 1
    with pytest.raises(ValueError, match="`style_prompt` is empty. Give at least one prompt"):
        pipe.get_batch_size(style_prompt=[])


def test_images_of_several_sizes_are_read_at_one():
    pipe = make_pipeline()
    images = [torch.rand(3, 8, 8), torch.rand(3, 12, 6)]
    read = pipe.read_image(images, size=(8, 8))
    resized = torch.nn.functional.interpolate(images[1][None], size=(8, 8), mode="bicubic", antialias=True)
    assert torch.equal(read[0], images[0])
    torch.testing.assert_close(read[1:], resized.clamp(0, 1))
    with pytest.raises(ValueError, match="`image` has images of several sizes: 8 x 8, 12 x 6"):
        pipe.read_image(images)


def test_arrays_of_any_strides_are_read():
    pipe = make_pipeline()
    array = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    flipped = array[::-1, :, ::-1]
    np.testing.assert_array_equal(pipe.read_image(flipped)[0].permute(1, 2, 0).numpy(), np.ascontiguousarray(flipped))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(mode):
    """Pillow would cut them at 255, without a word."""
    pipe = make_pipeline()
    values = np.linspace(0, 1, 64).reshape(8, 8)
    image = {
        "I;16": PIL.Image.fromarray((values * 65535).astype(np.uint16)),
        "I": PIL.Image.fromarray((values * 65535).astype(np.int32)),
        "F": PIL.Image.fromarray(values.astype(np.float32)),
    }[mode]
    assert image.mode == mode
    with pytest.raises(
        ValueError, match=f"`image` is an image of Pillow of mode '{mode}', of more than 8 bits. Give an"
    ):
        pipe.read_image(image)
    with pytest.raises(ValueError, match=f"`mask_image` is an image of Pillow of mode '{mode}'"):
        pipe.read_image([image], "mask_image", channels=1)


def test_transformers_of_other_libraries():
    model = diffusers.UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                                  up_block_types=("UpBlock2D",), norm_num_groups=2)  # fmt: skip
    for other in (model, torch.nn.Linear(2, 2)):
        with pytest.raises(
            TypeError, match=f"`transformer` is {type(other).__name__}. Use a DynaDiTTransformer2DModel"
        ):
            AnyTaskPipeline(other, FlowMatchODEScheduler())
