# SPDX-License-Identifier: Apache-2.0
"""
`DynaDiTImg2ImgPipeline` against loops written out by hand: noising by the formula of each family of schedulers, the ODE
run from data to noise, and references whose states stand in the batch beside the images. What image, strength, source
and style do is seen on a model that is trained in the test.
"""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_dyna import (
    DynaDiTImg2ImgPipeline,
    DynaDiTPipeline,
    DynaDiTTextToImagePipeline,
    DynaDiTTransformer2DModel,
    FlowMatchODEScheduler,
    FlowMatchSDEScheduler,
)
from diffusers_dyna.schedulers.scheduling_flow_match import ODE_SOLVERS

from ..testing_utils import UNCONDITIONAL, randn
from .dyna_dit_common import (
    TEXT,
    DynaDiTPipelineTests,
    assert_close,
    generators,
    leave_a_part_out,
    quiet,
    tiny_dit,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)


PROMPTS = ["a big red square", "blue", "small dark square"]
# Of a text model with classes too, whose images are told by both.
TEXT_AND_CLASSES = {**TEXT, "num_classes": 3, "class_dropout_prob": 0.1}

FLOW_SCHEDULERS = {
    **{f"ODE {solver}": lambda solver=solver: FlowMatchODEScheduler(solver=solver) for solver in ODE_SOLVERS},
    "ODE shifted": lambda: FlowMatchODEScheduler(shift=3.0),
    "SDE": lambda: FlowMatchSDEScheduler(),
    "FlowMatchEulerDiscrete": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "FlowMatchHeunDiscrete": lambda: FlowMatchHeunDiscreteScheduler(),
    "DPM++ flow": lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "UniPC flow": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}
NOISE_SCHEDULERS = {
    "DDPM": lambda: DDPMScheduler(),
    "DDIM": lambda: DDIMScheduler(),
    "DPM++": lambda: DPMSolverMultistepScheduler(),
    "UniPC": lambda: UniPCMultistepScheduler(),
    "EulerDiscrete": lambda: EulerDiscreteScheduler(),
    "HeunDiscrete": lambda: HeunDiscreteScheduler(),
}


def make_pipeline(scheduler=None, vae=None, id2label=None, **overrides) -> DynaDiTImg2ImgPipeline:
    transformer = tiny_dit(**overrides)
    text = {}
    if transformer.config.cross_attention_dim is not None:
        text = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    scheduler = scheduler or FlowMatchODEScheduler()
    return quiet(DynaDiTImg2ImgPipeline(transformer, scheduler, vae, **text, id2label=id2label))


def pictures(*seeds: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    """In [0, 1], as users give them; smooth, so that a VAE keeps something of them."""
    coarse = [torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return F.interpolate(torch.cat(coarse), size=size, mode="bilinear")


def draw(pipe, *args, num_inference_steps=4, output_type="latent", **kwargs) -> torch.Tensor:
    return pipe(*args, num_inference_steps=num_inference_steps, output_type=output_type, **kwargs).images


def noised(scheduler, sample: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
    """The state of a sample at an entry of `timesteps`, by the formula of the scheduler's family."""
    if isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        signal = scheduler.alphas_cumprod[scheduler.timesteps[index]]
        return signal**0.5 * sample + (1 - signal) ** 0.5 * noise
    sigma = scheduler.sigmas[index]
    if isinstance(scheduler, (EulerDiscreteScheduler, HeunDiscreteScheduler)):
        return sample + sigma * noise
    is_flow = scheduler.config.get("use_flow_sigmas", not hasattr(scheduler, "alphas_cumprod"))
    return (1 - sigma) * sample + sigma * noise if is_flow else (sample + sigma * noise) / (1 + sigma**2) ** 0.5


@torch.no_grad()
def predict(transformer, sample, t, labels=None, null=None, scale=1.0, **kwargs) -> torch.Tensor:
    """The guided prediction, each half in a call of its own. `labels` and `null` are arguments of the transformer."""
    t = torch.as_tensor(t, dtype=torch.float32)
    output = transformer(sample, t, **(labels or {}), **kwargs).sample[:, :3]
    if scale > 1:
        null_output = transformer(sample, t, **(null or {}), **kwargs).sample[:, :3]
        output = null_output + scale * (output - null_output)
    return output


@torch.no_grad()
def written_out_loop(transformer, scheduler, sample, begin: int, steps: int, labels, scale=1.0, generator=None):
    """From the entry `begin` of `timesteps` on, where `sample` is a state or a function of the scheduler."""
    scheduler = copy.deepcopy(scheduler)
    grid = {"num_inference_steps": steps}
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        grid = {"sigmas": [1 - i / steps for i in range(steps)]}  # the pipeline's choice
    scheduler.set_timesteps(**grid)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    sample = sample(scheduler) if callable(sample) else sample
    random = isinstance(scheduler, (DDPMScheduler, FlowMatchSDEScheduler))
    for t in scheduler.timesteps[begin:]:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = predict(transformer, scaled, t, {"class_labels": torch.tensor(labels)}, scale=scale)
        sample = scheduler.step(output, t, sample, **({"generator": generator} if random else {})).prev_sample
    return sample


def inverted_states(transformer, scheduler, sample, steps: int, calls: int | None = None, **conditions) -> list:
    """The states of the ODE from data to noise, at each call of the solver and at the end."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, reverse=True)
    states = [sample]
    for t in scheduler.timesteps[:calls]:
        output = predict(transformer, states[-1], t, conditions)
        states.append(scheduler.step(output, t, states[-1]).prev_sample)
    return states


def record_calls(pipe) -> list[int]:
    """The batch size of each call of the transformer."""
    batches = []
    pipe.transformer.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    return batches


class TestStandard(DynaDiTPipelineTests):
    """Noised images of a class."""

    pipeline_class = DynaDiTImg2ImgPipeline

    def make(self, **overrides):
        return make_pipeline(**overrides)

    def arguments(self, *entries):
        return {
            "image": pictures(*entries),
            "strength": 0.9,
            "class_labels": [entry % 3 for entry in entries],
            "guidance_scale": 2.0,
        }


class TestStandardWithText(DynaDiTPipelineTests):
    """Pictures drawn from noise, each in the style of a picture of its own, by a model of texts and classes."""

    pipeline_class = DynaDiTImg2ImgPipeline

    def make(self, **overrides):
        return make_pipeline(**{**TEXT_AND_CLASSES, **overrides})

    def arguments(self, *entries):
        return {
            "prompt": [PROMPTS[entry % 3] for entry in entries],
            "class_labels": [entry % 3 for entry in entries],
            "style_image": pictures(*entries),
            "style_prompt": [PROMPTS[(entry + 1) % 3] for entry in entries],
            "guidance_scale": 2.0,
        }

    @pytest.mark.parametrize("solver", ["euler", "heun", "abm3"])
    def test_image_of_a_seed_does_not_depend_on_its_batch(self, solver):
        super().test_image_of_a_seed_does_not_depend_on_its_batch(lambda: FlowMatchODEScheduler(solver=solver))


class TestStandardOfInversions(DynaDiTPipelineTests):
    """Pictures edited from their own class to another one, each in the style of a picture of its own."""

    pipeline_class = DynaDiTImg2ImgPipeline

    def make(self, **overrides):
        return make_pipeline(**{"num_layers": 2, **overrides})

    def arguments(self, *entries):
        return {
            "image": pictures(*entries),
            "strength": 0.9,
            "class_labels": [entry % 3 for entry in entries],
            "source_class_labels": [(entry + 1) % 3 for entry in entries],
            "style_image": pictures(*(entry + 7 for entry in entries)),
            "guidance_scale": 2.0,
        }

    @pytest.mark.parametrize("solver", ["euler", "heun", "abm3"])
    def test_image_of_a_seed_does_not_depend_on_its_batch(self, solver):
        super().test_image_of_a_seed_does_not_depend_on_its_batch(lambda: FlowMatchODEScheduler(solver=solver))

    def test_same_seed_same_image_and_nothing_from_the_global_generator(self):
        """Whatever the seed: nothing is drawn."""
        pipe, given = self.make(), generators(0, 1)
        states = [torch.get_rng_state(), *(one.get_state() for one in given)]
        first = self.draw(pipe, 0, 1, generator=given)
        assert all(map(torch.equal, states, [torch.get_rng_state(), *(one.get_state() for one in given)]))
        assert_close(self.draw(pipe, 0, 1, generator=generators(5, 6)), first)

    def test_latents_of_another_shape(self):
        with pytest.raises(ValueError, match="`latents` were given beside `source_class_labels`"):
            self.run(self.make(), 0, latents=torch.zeros(2, 3, 8, 10))


# Images and strength


@pytest.mark.parametrize("strength, begin", [(0.5, 2), (1.0, 0)])  # the half of 5 steps is rounded up
@pytest.mark.parametrize("name", FLOW_SCHEDULERS | NOISE_SCHEDULERS)
def test_loop(name, strength, begin):
    scheduler = (FLOW_SCHEDULERS | NOISE_SCHEDULERS)[name]()
    pipe = make_pipeline(scheduler)
    image, noise = pictures(0, 1), randn(2, 3, 8, 8)
    expected = written_out_loop(
        pipe.transformer,
        scheduler,
        lambda scheduler: noised(scheduler, 2 * image - 1, noise, begin * scheduler.order),
        begin * scheduler.order,
        5,
        [0, 2],
        scale=2.5,
        generator=torch.Generator().manual_seed(3),
    )
    actual = draw(
        pipe,
        image=image,
        strength=strength,
        class_labels=[0, 2],
        num_inference_steps=5,
        guidance_scale=2.5,
        latents=noise,
        generator=torch.Generator().manual_seed(3),
    )
    assert expected.std() > 0.05 and torch.isfinite(expected).all()
    assert_close(actual, expected)


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_strength_of_1_is_drawing_from_noise(name):
    """On the linear path nothing is left of the image at the first noise level, but for the SDE, where it is 0.999."""
    pipe = make_pipeline(FLOW_SCHEDULERS[name]())
    plain = quiet(DynaDiTPipeline.from_pipe(pipe))
    arguments = {"class_labels": [0, 1], "guidance_scale": 2.0, "latents": randn(2, 3, 8, 8)}
    expected = draw(plain, generator=generators(0, 1), **arguments)
    actual = draw(pipe, image=pictures(0), strength=1.0, generator=generators(0, 1), **arguments)
    tolerance = 0.02 if pipe.scheduler.sigmas[0] < 1 else 1e-4
    assert_close(actual, expected, atol=tolerance)


def test_strength_of_0_gives_the_image_back():
    pipe = make_pipeline()
    batches = record_calls(pipe)
    image = pictures(0, 1)
    output = pipe(image=image, strength=0.0, class_labels=[0, 1], output_type="pt", output_compute_ratio=True)
    torch.testing.assert_close(output.images, image)
    styled = draw(pipe, image=image, strength=0, source_class_labels=1, style_image=image[:1], output_type="pt")
    torch.testing.assert_close(styled, image)
    assert output.compute_ratio is None and batches == []

    pipe = make_pipeline(vae=tiny_vae(shift_factor=0.3), in_channels=4)
    image = pictures(0, size=16)
    with torch.no_grad():
        encoded = pipe.vae.encode(2 * image - 1).latent_dist.mode()
        expected = pipe.vae.decode(encoded).sample
    assert_close(draw(pipe, image=image, strength=0.0), 0.5 * (encoded - 0.3))
    assert_close(draw(pipe, image=image, strength=0.0, output_type="pt"), (expected / 2 + 0.5).clamp(0, 1))


def test_a_small_strength_takes_one_step():
    pipe = make_pipeline(FlowMatchODEScheduler(solver="heun"))
    batches = record_calls(pipe)
    draw(pipe, image=pictures(0), strength=1e-6, num_inference_steps=10)
    assert batches == [1]  # the last step of Heun's rule is Euler's
    draw(pipe, image=pictures(0), strength=0.11, num_inference_steps=10)
    assert batches[1:] == [1, 1, 1]


def test_kinds_of_images():
    pipe = make_pipeline()
    levels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    arrays = levels.astype(np.float32) / 255
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    pils = [PIL.Image.fromarray(image) for image in levels]
    arguments = {"class_labels": [0, 1], "latents": randn(2, 3, 8, 8)}
    expected = draw(pipe, image=tensors, **arguments)
    for kind in (pils, tuple(pils), arrays, list(arrays), list(tensors)):
        assert_close(draw(pipe, image=kind, **arguments), expected)
    # one image for both labels, and one label for both images
    assert_close(draw(pipe, image=pils[0], **arguments)[0], expected[0])
    assert (draw(pipe, image=pils[0], **arguments)[1] - expected[1]).abs().max() > 0.01
    assert_close(draw(pipe, image=pils, **{**arguments, "class_labels": 1})[1], expected[1])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_images_are_resized_and_converted(channels, mode):
    """To the size of the transformer, or to the one that was asked for; one by one, to gray or to RGB."""
    pipe = make_pipeline(in_channels=channels)
    plain = [PIL.Image.new("RGB", (40, 24), (255, 255, 255)), PIL.Image.new("L", (3, 5), 128)]
    images = draw(pipe, image=plain, strength=0.0, output_type="pil")
    assert [(image.mode, image.size) for image in images] == [(mode, (8, 8))] * 2
    assert [np.unique(np.asarray(image)).tolist() for image in images] == [[255], [128]]
    shape = draw(pipe, image=plain, height=4, width=12, style_image=plain[0]).shape
    assert shape == (2, channels, 4, 12)


def test_latents_of_the_vae_as_an_image():
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4)
    image, noise = pictures(0, size=16), randn(1, 4, 8, 8)
    with torch.no_grad():
        encoded = 0.5 * pipe.vae.encode(2 * image - 1).latent_dist.mode()
    assert_close(draw(pipe, image=encoded, latents=noise), draw(pipe, image=image, latents=noise))
    inverted = pipe.invert(image, num_inference_steps=4)
    assert_close(pipe.invert(encoded, num_inference_steps=4), inverted)


# Inversion


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_invert(solver):
    scheduler = FlowMatchODEScheduler(solver=solver, shift=2.0)
    pipe = make_pipeline(scheduler)
    image, labels = pictures(0, 1), torch.tensor([0, 2])
    states = inverted_states(pipe.transformer, scheduler, 2 * image - 1, 4, class_labels=labels)
    arguments = {"class_labels": [0, 2], "num_inference_steps": 4}
    assert_close(pipe.invert(image, **arguments), states[-1])
    assert_close(pipe.invert(image, strength=0.5, **arguments), states[2 * scheduler.order])
    assert_close(pipe.invert(image, strength=0.0, **arguments), states[0])
    # one image of two labels
    both = pipe.invert(image[0], **arguments)
    assert_close(both[0], states[-1][0])
    assert (both[1] - states[-1][1]).abs().max() > 0.01


def test_inversion_is_euler_by_hand():
    pipe = make_pipeline()
    image = pictures(0)
    state = 2 * image - 1
    for time in (0.0, 0.25, 0.5, 0.75):
        state = state + 0.25 * predict(pipe.transformer, state, 1000 * time, {"class_labels": torch.tensor([1])})
    inverted = pipe.invert(image, class_labels=1, num_inference_steps=4)
    torch.testing.assert_close(inverted, state, rtol=1e-5, atol=1e-5)
    assert inverted.dtype == torch.float32
    # the noise for the other pipelines too
    plain = quiet(DynaDiTPipeline.from_pipe(pipe))
    expected = draw(plain, 1, latents=inverted)
    assert_close(draw(pipe, image=image, class_labels=1, latents=inverted, strength=1.0), expected)
    assert_close(draw(pipe, image=image, class_labels=1, source_class_labels=1, strength=1.0), expected)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "abm3"])
@pytest.mark.parametrize("strength, begin", [(1.0, 0), (0.5, 2)])
def test_editing_is_inversion_and_the_way_back(solver, strength, begin):
    """Under the class of the image to the noise level, and with guidance under another one back."""
    scheduler = FlowMatchODEScheduler(solver=solver)
    pipe = make_pipeline(scheduler, id2label={0: "cat", 1: "dog", 2: "bird"})
    image, order = pictures(0, 1), scheduler.order
    source = torch.tensor([1, 1])
    states = inverted_states(
        pipe.transformer, scheduler, 2 * image - 1, 4, calls=(4 - begin) * order, class_labels=source
    )
    expected = written_out_loop(pipe.transformer, scheduler, states[-1], begin * order, 4, [0, 2], 2.5)
    arguments = {"image": image, "strength": strength, "guidance_scale": 2.5, "class_labels": ["cat", "bird"]}
    assert_close(draw(pipe, source_class_labels="dog", **arguments), expected)
    # one row for each image and label, whatever else is in the batch; nothing is drawn
    assert_close(draw(pipe, source_class_labels=[1, 1], num_images_per_prompt=2, **arguments)[1::2], expected)
    other = draw(pipe, source_class_labels="cat", **arguments)
    assert (other - expected).abs().max() > 0.01


@pytest.mark.parametrize("solver, tolerance, gain", [("euler", 0.1, 1.7), ("heun", 0.006, 2.5), ("ab2", 0.003, 3.0)])
def test_inversion_gives_the_image_back(solver, tolerance, gain):
    """
    Under its own class: the mean error in 20 steps of a smooth model is below the tolerance, falls with more steps as the
    order of the solver has it, and is far below that of random noise of the same level.
    """
    pipe = make_pipeline(FlowMatchODEScheduler(solver=solver))
    image = pictures(0, 1)
    arguments = {"image": image, "strength": 0.75, "class_labels": [0, 2], "complete_model": True}
    errors = [
        (draw(pipe, source_class_labels=[0, 2], num_inference_steps=steps, **arguments) - (2 * image - 1)).abs().mean()
        for steps in (10, 20, 40)
    ]
    assert errors[1] < tolerance
    assert errors[0] > gain * errors[1] and errors[1] > gain * errors[2]
    random = draw(pipe, num_inference_steps=20, generator=generators(0, 1), **arguments)
    assert (random - (2 * image - 1)).abs().mean() > 5 * errors[1]


@pytest.mark.parametrize(
    "settings",
    [{"path": "gvp"}, {"path": "vp"}, {"prediction_type": "epsilon"}, {"invert_sigmas": True}, {"sigma_min": 0.05}],
    ids=str,
)
def test_inversion_of_other_models(settings):
    """Grids that do not begin at pure noise, do not end at data, or rise: the way back starts where inversion ended."""
    pipe = make_pipeline(FlowMatchODEScheduler(solver="heun", **settings))
    image, labels = pictures(0, 1), [0, 2]
    arguments = {"image": image, "class_labels": labels, "complete_model": True, "num_inference_steps": 10}
    with torch.no_grad():
        pipe.transformer.proj_out.weight *= 0.3  # smoother
    back = draw(pipe, strength=0.8, source_class_labels=labels, **arguments)
    assert (back - (2 * image - 1)).abs().mean() < 0.01
    # a reference is at the noise level of its image: styled by itself, an image stays what it is
    same = draw(
        pipe, strength=0.8, source_class_labels=labels, style_image=image, style_class_labels=labels, **arguments
    )
    assert (same - (2 * image - 1)).abs().mean() < 0.02


def test_editing_by_text():
    """Each text encoded alone, without padding or a mask."""
    scheduler = FlowMatchODEScheduler()
    pipe = make_pipeline(**TEXT)
    image = pictures(0)

    def encode(text):
        with torch.no_grad():
            return pipe.text_encoder(pipe.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state

    states = inverted_states(
        pipe.transformer, scheduler, 2 * image - 1, 4, 3, encoder_hidden_states=encode(PROMPTS[0])
    )
    state = states[-1]
    for time in (0.75, 0.5, 0.25):
        text = {"encoder_hidden_states": encode(PROMPTS[1])}
        state = state - 0.25 * predict(pipe.transformer, state, 1000 * time, text, scale=2.0)
    arguments = {"image": image, "strength": 0.75, "guidance_scale": 2.0}
    actual = draw(pipe, PROMPTS[1], source_prompt=PROMPTS[0], **arguments)
    assert_close(actual, state)
    assert (draw(pipe, PROMPTS[1], source_prompt=PROMPTS[2], **arguments) - actual).abs().max() > 0.01

    inverted = pipe.invert(image, prompt_embeds=encode(PROMPTS[0]), strength=0.75, num_inference_steps=4)
    assert_close(inverted, states[-1])
    assert_close(pipe.invert(image, PROMPTS[0], strength=0.75, num_inference_steps=4), states[-1])


# Style


def state_of_call(solver: str, call: int, steps: int) -> int:
    """The entry of [`inverted_states`] at the time of a call of the way from noise to data."""
    if solver == "midpoint":  # between two steps, where the inversion was too
        return 2 * steps - call
    order = 2 if solver == "heun" else 1
    return order * (steps - (call + order - 1) // order)  # the end of a step, not the stage at the same time


@torch.no_grad()
def styled_loop(pipe, sample, states, solver, begin, steps, half, null_half, scale, strength, interval=(0, 1)):
    """One image beside its reference, whose states replace it at each call; the halves in calls of their own."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(begin)
    for call, t in list(enumerate(scheduler.timesteps))[begin:]:
        sample = torch.cat([sample[:1], states[state_of_call(solver, call, steps)]])
        with pipe.transformer.share_attention([1, 1], strength):
            is_guided = interval[0] <= t / 1000 <= interval[1]
            output = predict(pipe.transformer, sample, t, half, null_half, scale if is_guided else 1.0)
        sample = scheduler.step(output, t, sample).prev_sample
    return sample[:1]


@pytest.mark.parametrize("strength, begin", [(None, 0), (0.5, 2)])
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "abm3", "multistep"])
def test_style_of_classes(solver, strength, begin):
    scheduler = FlowMatchODEScheduler(solver=solver)
    pipe = make_pipeline(scheduler)
    references, noise, image = pictures(5, 6), randn(2, 3, 8, 8), pictures(0)
    rows = []
    for row, (label, style_label) in enumerate(((0, 1), (2, 3))):
        states = inverted_states(
            pipe.transformer, scheduler, 2 * references[row : row + 1] - 1, 4, class_labels=torch.tensor([style_label])
        )
        sample = noise[row : row + 1]
        if strength is not None:
            sample = 0.5 * (2 * image - 1) + 0.5 * sample
        half = {"class_labels": torch.tensor([label, style_label])}
        rows.append(
            styled_loop(pipe, sample, states, solver, begin * scheduler.order, 4, half, None, 2.5, 0.7, (0.4, 0.8))
        )
    given = {} if strength is None else {"image": image, "strength": strength}
    arguments = {
        "class_labels": [0, 2],
        "guidance_scale": 2.5,
        "guidance_interval": (0.4, 0.8),
        "latents": noise,
        **given,
    }
    with pytest.MonkeyPatch.context() as patch:  # the null class, 3, is not a label that a user can give
        patch.setattr(pipe, "get_label_ids", lambda labels: [labels] if isinstance(labels, int) else list(labels))
        actual = draw(pipe, style_image=references, style_class_labels=[1, 3], style_strength=0.7, **arguments)
    assert actual.shape == (2, 3, 8, 8)
    assert_close(actual, torch.cat(rows))
    # null class where no class is given
    unknown = draw(pipe, style_image=references, style_strength=0.7, **arguments)
    assert_close(unknown[1:], rows[1])
    assert (unknown[:1] - rows[0]).abs().max() > 0.01


@pytest.mark.parametrize("style_prompt", [None, "small dark square"])
@pytest.mark.parametrize("negative", [None, "bright"])
@pytest.mark.parametrize("prompt", [None, "a big red square"])
def test_style_of_texts(prompt, negative, style_prompt):
    """One reference for two images. Texts of other lengths, and null captions, in each of the four parts of a batch."""
    pipe = make_pipeline(**TEXT_AND_CLASSES)
    reference, noise = pictures(5), randn(2, 3, 8, 8)
    longest = 6

    def condition(text):
        """States that are padded with what must not count, mask, and whether the null caption stands."""
        if text is None:
            return randn(1, longest, 16, seed=9), torch.ones(1, longest, dtype=torch.bool), torch.tensor([True])
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipe.text_encoder(ids).last_hidden_state
        states = torch.cat([states, randn(1, longest - states.shape[1], 16, seed=9)], dim=1)
        return states, torch.arange(longest)[None] < ids.shape[1], torch.tensor([False])

    def arguments_of(labels, *texts):
        parts = [torch.cat(part) for part in zip(*map(condition, texts), strict=True)]
        names = ("encoder_hidden_states", "encoder_attention_mask", "caption_dropout_mask")
        return {"class_labels": torch.tensor(labels), **dict(zip(names, parts, strict=True))}

    negative = negative if prompt is not None else None
    states = inverted_states(pipe.transformer, pipe.scheduler, 2 * reference - 1, 4, **arguments_of([1], style_prompt))
    half, null_half = arguments_of([0, 1], prompt, style_prompt), arguments_of([3, 3], negative, negative)
    expected = torch.cat(
        [styled_loop(pipe, one, states, "euler", 0, 4, half, null_half, 2.0, 1.0) for one in noise.split(1)]
    )
    actual = draw(
        pipe,
        prompt,
        class_labels=0,
        negative_prompt=negative,
        style_image=reference[0],
        style_prompt=style_prompt,
        style_class_labels=1,
        style_strength=1.0,
        guidance_scale=2.0,
        latents=noise,
        num_images_per_prompt=2,
    )
    assert_close(actual, expected)


def test_a_reference_has_the_negative_prompt_of_its_image():
    pipe = make_pipeline(**TEXT)
    negative, references, noise = ["bright", "a small blue square"], pictures(5, 6), randn(2, 3, 8, 8)
    settings = {"guidance_scale": 2.5, "style_prompt": PROMPTS[2]}
    both = draw(pipe, PROMPTS[:2], negative_prompt=negative, style_image=references, latents=noise, **settings)
    for row in (0, 1):
        given = {"negative_prompt": negative[row], "style_image": references[row], "latents": noise[row : row + 1]}
        assert_close(both[row : row + 1], draw(pipe, PROMPTS[row], **given, **settings))
    other = draw(pipe, PROMPTS[:2], negative_prompt=negative[0], style_image=references, latents=noise, **settings)
    assert (other[1] - both[1]).abs().max() > 0.01


def test_style_of_an_unconditional_model():
    pipe = make_pipeline(**UNCONDITIONAL)
    noise, reference = randn(1, 3, 8, 8), pictures(5)
    states = inverted_states(pipe.transformer, pipe.scheduler, 2 * reference - 1, 4)
    expected = styled_loop(pipe, noise, states, "euler", 0, 4, None, None, 1.0, 0.5)
    assert_close(draw(pipe, style_image=reference, latents=noise), expected)


def test_image_source_and_style_together():
    pipe = make_pipeline()
    image, reference = pictures(0), pictures(5)
    labels = {"class_labels": torch.tensor([1])}
    sample = inverted_states(pipe.transformer, pipe.scheduler, 2 * image - 1, 4, 3, **labels)[-1]
    states = inverted_states(pipe.transformer, pipe.scheduler, 2 * reference - 1, 4, class_labels=torch.tensor([2]))
    half = {"class_labels": torch.tensor([0, 2])}
    expected = styled_loop(pipe, sample, states, "euler", 1, 4, half, None, 2.0, 0.5)
    arguments = {"style_image": reference, "style_class_labels": 2, "guidance_scale": 2.0}
    actual = draw(pipe, image=image, strength=0.75, class_labels=0, source_class_labels=1, **arguments)
    assert_close(actual, expected)


def test_style_strength_of_0_has_no_effect():
    pipe = make_pipeline()
    batches = record_calls(pipe)
    arguments = {"image": pictures(0), "class_labels": 1, "generator": None, "latents": randn(1, 3, 8, 8)}
    plain = draw(pipe, **arguments)
    del batches[:]
    assert_close(draw(pipe, style_image=pictures(5), style_strength=0.0, **arguments), plain)
    assert batches == [1, 1, 1]  # no inversion, no row of a reference
    weak, strong = (draw(pipe, style_image=pictures(5), style_strength=s, **arguments) for s in (1e-3, 1.0))
    assert 0 < (weak - plain).abs().max() < 0.1 * (strong - plain).abs().max()


def test_calls_of_the_transformer():
    """Inversion without guidance; then images and references, and again in the null half of guided steps."""
    pipe = make_pipeline()
    batches = record_calls(pipe)
    draw(
        pipe,
        image=pictures(0, 1),
        strength=0.5,
        class_labels=[0, 1],
        source_class_labels=2,
        style_image=pictures(5),
        num_images_per_prompt=2,
        guidance_scale=2.0,
        guidance_interval=(0.4, 1.0),
    )
    assert batches == [2, 2, 1, 1, 10, 5]


def test_everything_is_prepared(monkeypatch):
    """The rows of references are those of the plan too: each trajectory prepares once, and no call computes text anew."""
    pipe = make_pipeline(**TEXT_AND_CLASSES)
    calls = []
    for block in pipe.transformer.transformer_blocks:
        forward = block.cross_attn.to_kv.forward
        block.cross_attn.to_kv.forward = lambda *args, forward=forward, **kw: calls.append(1) or forward(*args, **kw)
    modulate = type(pipe.transformer.transformer_blocks[0])._modulate
    monkeypatch.setattr(
        type(pipe.transformer.transformer_blocks[0]),
        "_modulate",
        lambda block, conditioning: calls.append(2) or modulate(block, conditioning),
    )
    arguments = {"guidance_scale": 2.0, "guidance_interval": (0.4, 0.8), "class_labels": [0, 1]}
    draw(pipe, PROMPTS[:2], style_image=pictures(5), style_prompt=PROMPTS[2], style_class_labels=2, **arguments)
    num_layers = len(pipe.transformer.transformer_blocks)
    assert calls.count(1) == calls.count(2) == 2 * num_layers


def test_callbacks_do_not_see_references():
    pipe = make_pipeline(**TEXT)
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    arguments = {
        "prompt": PROMPTS[:2],
        "negative_prompt": "dark",
        "style_image": pictures(5),
        "guidance_scale": 2.0,
        "latents": randn(2, 3, 8, 8),
    }
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append({name: tensor.shape[0] for name, tensor in tensors.items()})

    plain = draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, **arguments)
    assert seen == [dict.fromkeys(names, 2)] * 4

    def swap(pipeline, step, timestep, tensors):
        """The prompts change places before the first step that hangs on them."""
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)} if step == 0 else {}

    swapped = draw(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names, **arguments)
    assert (swapped - plain).abs().max() > 0.01

    def same(pipeline, step, timestep, tensors):
        return {name: tensor.clone() for name, tensor in tensors.items()}

    cloned = draw(pipe, callback_on_step_end=same, callback_on_step_end_tensor_inputs=names, **arguments)
    assert_close(cloned, plain)

    for name, shape in (("latents", r"\(2, 3, 8, 8\)"), ("prompt_embeds", r"\(2, 6, 16\)")):
        message = rf"`{name}` from `callback_on_step_end` must have shape {shape}, as given, but has shape \(1, "
        with pytest.raises(ValueError, match=message):
            draw(
                pipe,
                callback_on_step_end=lambda pipeline, step, timestep, tensors, name=name: {name: tensors[name][:1]},
                callback_on_step_end_tensor_inputs=names,
                **arguments,
            )


@pytest.mark.parametrize("style_prompt", ["small", None])
@pytest.mark.parametrize("negative", [None, "bright"])
def test_callback_replaces_the_negative_text_of_references_too(negative, style_prompt):
    """From the second step on; a reference has that of the first image that uses it."""
    pipe = make_pipeline(**TEXT)
    reference, prompts, negatives = pictures(5), ["blue", "red"], ["dark", "square"]

    def replace(pipeline, step, timestep, tensors):
        if step == 0:
            states.append(tensors["latents"])
            return {"negative_prompt_embeds": encode(*negatives)}
        return {}

    def encode(*texts):
        return pipe.encode_prompt(list(texts), device="cpu")[0]  # as many tokens each, and no mask

    states = []
    actual = draw(
        pipe,
        prompts,
        negative_prompt=negative,
        style_image=reference,
        style_prompt=style_prompt,
        guidance_scale=2.0,
        latents=randn(2, 3, 8, 8),
        callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=["latents", "negative_prompt_embeds"],
    )
    is_null = {"caption_dropout_mask": torch.tensor([False, style_prompt is None])}
    style = {"encoder_hidden_states": encode("small"), "caption_dropout_mask": is_null["caption_dropout_mask"][1:]}
    inverted = inverted_states(pipe.transformer, pipe.scheduler, 2 * reference - 1, 4, **style)
    for row in (0, 1):
        half = {"encoder_hidden_states": encode(prompts[row], "small"), **is_null}
        null_half = {"encoder_hidden_states": encode(negatives[row], negatives[0])}
        sample = states[0][row : row + 1]
        expected = styled_loop(pipe, sample, inverted, "euler", 1, 4, half, null_half, 2.0, 0.5)
        assert_close(actual[row : row + 1], expected)


# What the arguments do, on a model that has learned something


STYLES, CLASSES = torch.tensor([0, 0, 1, 1] * 4), torch.tensor([0, 1, 0, 1] * 4)


def plain_images(style: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """In [-1, 1]: the class is in the second channel; the first one is a style, which classes share."""
    colours = torch.stack([2.0 * style - 1, 2.0 * label - 1, torch.zeros(len(style))], dim=1)
    return colours[:, :, None, None].expand(-1, -1, 8, 8)


@pytest.fixture(scope="module")
def trained_pipeline():
    """Trained in a few seconds on plain images with a little noise, without what its routers leave out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DynaDiTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=3,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_classes=2,
            learn_sigma=False,
        )
        optimizer = torch.optim.AdamW(leave_a_part_out(transformer).train().parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=100, pct_start=0.1)
        for _ in range(100):
            style, label = torch.randint(2, (2, 64))
            data = plain_images(style, label) + 0.1 * torch.randn(64, 3, 8, 8)
            noise, sigma = torch.randn(64, 3, 8, 8), torch.rand(64, 1, 1, 1)
            state = (1 - sigma) * data + sigma * noise
            prediction = transformer(state, 1000 * sigma.flatten(), label).sample
            optimizer.zero_grad()
            F.mse_loss(prediction, noise - data).backward()
            optimizer.step()
            schedule.step()
    return quiet(DynaDiTImg2ImgPipeline(transformer.eval(), FlowMatchODEScheduler(solver="midpoint")))


def held_out_images() -> torch.Tensor:
    """In [0, 1], of each style and class four."""
    return ((plain_images(STYLES, CLASSES) + 0.1 * randn(16, 3, 8, 8, seed=8)) / 2 + 0.5).clamp(0, 1)


def style_and_class(pipe, latents="noise", **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of the two channels of each of 16 images."""
    latents = randn(16, 3, 8, 8, seed=3) if latents == "noise" else None
    arguments = {"num_inference_steps": 8, "output_type": "latent", "output_compute_ratio": True, **arguments}
    images, compute_ratio = pipe(latents=latents, return_dict=False, **arguments)
    assert compute_ratio < 0.7  # in the skipping form
    return images[:, 0].mean(dim=(1, 2)), images[:, 1].mean(dim=(1, 2))


def test_the_image_counts_by_its_strength(trained_pipeline):
    """The more steps, the less is left of the image and its style, and the more it is of the other class."""
    own, other = 2.0 * STYLES - 1, 1 - 2.0 * CLASSES
    kept, changed = [], []
    for strength in (0.3, 0.6, 0.8, 1.0):
        style, label = style_and_class(
            trained_pipeline, image=held_out_images(), strength=strength, class_labels=(1 - CLASSES).tolist()
        )
        kept.append((style * own).mean().item())
        changed.append((label * other).mean().item())
    assert kept[0] > 0.8 and kept[1] > kept[2] > kept[3] and kept[3] < 0.3
    assert changed[0] < 0 and changed == sorted(changed) and changed[3] > 0.8


def test_inversion_keeps_what_the_classes_share(trained_pipeline):
    """To pure noise and under the other class: the style is kept, which random noise loses, and the class is new."""
    arguments = {"image": held_out_images(), "strength": 1.0, "class_labels": (1 - CLASSES).tolist()}
    own, other = 2.0 * STYLES - 1, 1 - 2.0 * CLASSES
    style, label = style_and_class(trained_pipeline, latents=None, source_class_labels=CLASSES.tolist(), **arguments)
    assert (style * own).min() > 0.2 and (style * own).mean() > 0.5 and (label * other).min() > 0.5
    style, label = style_and_class(trained_pipeline, **arguments)
    assert (style * own).mean() < 0.3 and (label * other).mean() > 0.8
    # With the class to come as the source, the image is its own reconstruction.
    style, label = style_and_class(
        trained_pipeline, latents=None, source_class_labels=(1 - CLASSES).tolist(), **arguments
    )
    assert (style * own).mean() > 0.8 and (label * other).mean() < -0.8


def test_inversion_of_a_trained_model_gives_the_image_back(trained_pipeline):
    """By Euler's method, with an error of the first order in the size of a step."""
    pipe = quiet(DynaDiTImg2ImgPipeline(trained_pipeline.transformer, FlowMatchODEScheduler()))
    image, labels = held_out_images(), CLASSES.tolist()
    arguments = {"image": image, "class_labels": labels, "strength": 1.0}
    errors = [
        (draw(pipe, source_class_labels=labels, num_inference_steps=n, **arguments) - (2 * image - 1)).abs().mean()
        for n in (20, 40, 80)
    ]
    assert errors[2] < 0.02 and errors[0] > 1.6 * errors[1] > 1.6**2 * errors[2]
    random = draw(pipe, num_inference_steps=80, generator=generators(*range(16)), **arguments)
    assert (random - (2 * image - 1)).abs().mean() > 10 * errors[2]


@pytest.mark.parametrize("style_class_labels", [None, 0])
def test_the_style_goes_over(trained_pipeline, style_class_labels):
    """From one reference to images of the other class that are drawn from noise, the more the greater its strength."""
    pulled = []
    for strength in (0.0, 0.1, 0.3, 1.0):
        dark, bright = (
            style_and_class(
                trained_pipeline,
                class_labels=[1] * 16,
                style_image=plain_images(torch.tensor([style]), torch.tensor([0])) / 2 + 0.5,
                style_class_labels=style_class_labels,
                style_strength=strength,
            )
            for style in (0, 1)
        )
        pulled.append((bright[0] - dark[0]).mean().item())
        if strength == 0.3:
            assert dark[0].mean() < -0.3 and bright[0].mean() > 0
            assert min(dark[1].mean(), bright[1].mean()) > 0.2  # and they are of the class that was asked for
    assert abs(pulled[0]) < 1e-3 and pulled == sorted(pulled) and pulled[-1] > 1.0


# Components


def test_from_pipe_shares_its_components_with_the_family(tmp_path):
    names = {0: "cat", 1: "dog", 2: "bird"}
    plain = DynaDiTPipeline(tiny_dit(in_channels=4), FlowMatchODEScheduler(), tiny_vae(), names)
    pipe = quiet(DynaDiTImg2ImgPipeline.from_pipe(plain))
    assert all(getattr(pipe, name) is component for name, component in plain.components.items())
    assert pipe.text_encoder is None and pipe.id2label == names
    back = DynaDiTPipeline.from_pipe(pipe)
    assert back.transformer is plain.transformer and back.id2label == names
    pipe.save_pretrained(tmp_path)
    assert DynaDiTImg2ImgPipeline.from_pretrained(tmp_path).id2label == names

    text = DynaDiTTextToImagePipeline(tiny_dit(**TEXT), FlowMatchODEScheduler(), tiny_text_encoder(), tiny_tokenizer())
    pipe = quiet(DynaDiTImg2ImgPipeline.from_pipe(text))
    assert all(getattr(pipe, name) is component for name, component in text.components.items())
    arguments = {"prompt": PROMPTS[:2], "guidance_scale": 2.0, "latents": randn(2, 3, 8, 8)}
    assert_close(draw(pipe, image=pictures(0), strength=1.0, **arguments), draw(quiet(text), **arguments))


def test_a_transformer_of_another_task():
    with pytest.raises(ValueError, match=r"made for another task \(inpaint\) .* Use DynaDiTInpaintPipeline"):
        make_pipeline(condition_channels=4)
    with pytest.raises(ValueError, match=r"made for another task \(upscale\) .* Use DynaDiTUpscalePipeline"):
        make_pipeline(condition_channels=3, noise_level_conditioning=True)


# Errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": 1.5}, r"`strength`=1.5 must be in \[0, 1\]"),
        ({"strength": -0.1}, r"`strength`=-0.1 must be in \[0, 1\]"),
        ({"style_image": pictures(5), "style_strength": 1.2}, r"`style_strength`=1.2 must be in \[0, 1\]"),
        ({"style_strength": None}, "`style_strength`=None must be a number"),
        ({"prompt": pictures(0)}, "`prompt` must be a text .* first argument of a call: give an image as `image=`"),
        ({"source_prompt": 3}, "`source_prompt` must be a text or a list of texts, but is int.$"),
        ({"image": None}, "`image` must be given, or a `style_image`"),
        ({"image": None, "style_image": pictures(5), "source_class_labels": 0}, "tells what `image` shows, which was"),
        (
            {"style_class_labels": 0},
            "`style_class_labels` or `style_prompt` tells what `style_image` shows, which was",
        ),
        (
            {"source_class_labels": 0, "latents": randn(1, 3, 8, 8)},
            "`latents` were given beside `source_class_labels`",
        ),
        ({"image": "photo.png"}, "`image` must be an image of Pillow, an array, a tensor"),
        ({"image": []}, "`image` must be an image of Pillow, an array, a tensor"),
        ({"style_image": 3}, "`style_image` must be an image of Pillow, an array, a tensor"),
        (
            {"image": 255 * pictures(0)},
            r"`image` must have values in \[0, 1\], but they are in .* Divide bytes by 255",
        ),
        ({"image": pictures(0, channels=2)}, "`image` must have shape .* with 3 channels"),
        (
            {"generator": generators(0, 1), "source_class_labels": 0},
            "`generator` is a list of 2, but 1 images are to be drawn",
        ),
        ({"generator": generators(0, 1), "strength": 0.0}, "`generator` is a list of 2, but 1 images are to be drawn"),
        (
            {"latents": torch.zeros(5, 1), "strength": 0.0},
            r"`latents` must have shape \(1, 3, 8, 8\), but has shape \(5, 1\)",
        ),
        ({"height": 9, "width": 8}, "`height` and `width` must be divisible by 2 .* 10 and 8"),
        (
            {"image": pictures(0, 1), "class_labels": [0, 1, 2]},
            "There must be as many of each, or one for all, but there are: `image` 2, `class_labels` 3",
        ),
        (
            {"class_labels": [0, 1], "style_image": pictures(0, 1, 2)},
            "as many of each, .* `style_image` 3, `class_labels` 2",
        ),
        (
            {"source_class_labels": [0, 1], "image": pictures(0, 1, 2)},
            "as many of each, .* `image` 3, `source_class_labels` 2",
        ),
        ({"source_class_labels": 7}, "`class_labels` has the label 7, but the model has 3 classes"),
        (
            {"source_prompt": "a cat"},
            "`source_class_labels` or `source_prompt`: `prompt` or one of its kind was given",
        ),
        (
            {"style_image": pictures(5), "style_prompt": "a cat"},
            "`style_class_labels` or `style_prompt`: `prompt` or one of its kind was given",
        ),
        ({"prompt": "a cat"}, "`prompt` or one of its kind was given, but the transformer has no text conditioning"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        draw(make_pipeline(), **{"image": pictures(0), **arguments})


def test_wrong_latents_as_an_image():
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4)
    with pytest.raises(ValueError, match=r"`image` is latents of height and width \(6, 6\), .* must have \(8, 8\)"):
        draw(pipe, image=randn(1, 4, 6, 6))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "SDE", "DDIM"])
@pytest.mark.parametrize(
    "arguments, what",
    [
        ({"source_class_labels": 0}, "`source_class_labels` or `source_prompt` needs"),
        ({"style_image": pictures(5)}, "`style_image` needs"),
    ],
)
def test_a_scheduler_that_cannot_invert(name, arguments, what):
    pipe = make_pipeline((FLOW_SCHEDULERS | NOISE_SCHEDULERS)[name]())
    message = (
        what + r" a scheduler that goes from data to noise.*FlowMatchODEScheduler.from_config\(pipe.scheduler.config"
    )
    with pytest.raises(ValueError, match=message):
        draw(pipe, image=pictures(0), **arguments)
    with pytest.raises(ValueError, match="`invert` needs a scheduler that goes from data to noise"):
        pipe.invert(pictures(0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": 2}, r"`strength`=2 must be in \[0, 1\]"),
        ({"class_labels": [0, 1, 2]}, "as many of each, or one for all, .* `image` 2, `class_labels` 3"),
        ({"num_inference_steps": 0}, "`num_inference_steps`=0 must be a whole number"),
        ({"prompt": "a cat"}, "the transformer has no text conditioning"),
        ({"width": 7}, "must be divisible by 2"),
    ],
)
def test_wrong_arguments_of_invert(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline().invert(pictures(0, 1), **arguments)


def test_what_the_null_condition_is_needed_for():
    """A model without a null class cannot invert a style of no class."""
    pipe = make_pipeline(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`style_class_labels` or `style_prompt`: `class_labels` must be given"):
        draw(pipe, class_labels=0, style_image=pictures(5))
    draw(pipe, class_labels=0, style_image=pictures(5), style_class_labels=1)


def test_attention_is_plain_again_after_an_error():
    pipe = make_pipeline()
    processors = [block.attn.processor for block in pipe.transformer.transformer_blocks]

    def fail(pipeline, step, timestep, tensors):
        shared = [block.attn.processor for block in pipe.transformer.transformer_blocks]
        assert all(new is not old for new, old in zip(shared, processors, strict=True))
        raise KeyboardInterrupt

    arguments = {"image": pictures(0), "class_labels": 1, "latents": randn(1, 3, 8, 8)}
    plain = draw(pipe, **arguments)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, style_image=pictures(5), callback_on_step_end=fail, **arguments)
    assert [block.attn.processor for block in pipe.transformer.transformer_blocks] == processors
    assert_close(draw(pipe, **arguments), plain)
