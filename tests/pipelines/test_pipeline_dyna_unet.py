# SPDX-License-Identifier: Apache-2.0
"""
`DynaUNetPipeline` against the sampling loop written out by hand, with the two halves of guidance in calls of their
own, for flow-matching and for noise-predicting schedulers of diffusers; and against `DDPMPipeline` and `DDIMPipeline`.
"""

import copy
import inspect
import io
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from diffusers_dyna import DynaUNet2DModel, DynaUNetPipeline, FlowMatchODEScheduler, FlowMatchSDEScheduler

from ..testing_utils import UNCONDITIONAL, logged_warnings, randn, tiny_unet


# Two orders of summation of the same float32 products, through the layers of the U-Net and a few steps.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
LABELS = {0: "cat, tabby", 1: "dog", 2: "bird, dog house"}

FLOW_SCHEDULERS = {
    "ODE Euler": lambda: FlowMatchODEScheduler(shift=2.0),
    "ODE Heun": lambda: FlowMatchODEScheduler(solver="heun"),
    "ODE Runge-Kutta": lambda: FlowMatchODEScheduler(solver="rk4"),
    "ODE Adams": lambda: FlowMatchODEScheduler(solver="abm3"),
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
    "DPM++ SDE": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "UniPC": lambda: UniPCMultistepScheduler(),
    "EulerDiscrete": lambda: EulerDiscreteScheduler(),
    "HeunDiscrete": lambda: HeunDiscreteScheduler(),
}
SCHEDULERS = FLOW_SCHEDULERS | NOISE_SCHEDULERS


def make_pipeline(scheduler=None, id2label=None, **overrides) -> DynaUNetPipeline:
    pipe = DynaUNetPipeline(tiny_unet(**overrides), scheduler or FlowMatchODEScheduler(), id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, *args, num_inference_steps=3, output_type="latent", **kwargs) -> torch.Tensor:
    return pipe(*args, num_inference_steps=num_inference_steps, output_type=output_type, **kwargs).images


@torch.no_grad()
def written_out_loop(
    unet, scheduler, labels: list[int], steps: int, scale: float, generator=None, grid=None, **step_kwargs
) -> torch.Tensor:
    """The trajectory as a reader of the papers would write it."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(**(grid or {"num_inference_steps": steps}))
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_kwargs["generator"] = generator
    sample = randn_tensor((len(labels), unet.config.in_channels, 8, 8), generator=generator)
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = unet(scaled, t, torch.tensor(labels)).sample
        if scale > 1:
            null = unet(scaled, t, None).sample
            output = null + scale * (output - null)
        sample = scheduler.step(output, t, sample, **step_kwargs).prev_sample
    return sample


# The loop and guidance


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_loop(name, scale):
    scheduler = SCHEDULERS[name]()
    pipe = make_pipeline(scheduler)
    # the pipeline's choice for this scheduler, whose own default grid wastes its last step
    grid = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if name == "FlowMatchEulerDiscrete" else None
    expected = written_out_loop(pipe.unet, scheduler, [0, 2], 4, scale, generators(0, 1), grid)
    actual = draw(pipe, [0, 2], num_inference_steps=4, guidance_scale=scale, generator=generators(0, 1))
    assert expected.std() > 0.05 and torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    # told to the scheduler, so that it need not search for the first timestep
    assert getattr(pipe.scheduler, "begin_index", 0) == 0
    # a second call starts from a fresh state
    again = draw(pipe, [0, 2], num_inference_steps=4, guidance_scale=scale, generator=generators(0, 1))
    assert torch.equal(again, actual)


def test_guidance_extrapolates_from_the_null_class_to_the_class():
    """One Euler step from noise: linear in the model output, so in the scale."""
    pipe = make_pipeline()
    latents = randn(2, 3, 8, 8)
    labels = [0, 1]
    classes, null = draw(pipe, labels, latents=latents, num_inference_steps=1), None
    with torch.no_grad():
        null = latents - pipe.unet(latents, 1000.0, None).sample
    assert (classes - null).abs().max() > 0.05
    guided = draw(pipe, labels, latents=latents, num_inference_steps=1, guidance_scale=4.0)
    torch.testing.assert_close(guided, null + 4.0 * (classes - null), **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0])
def test_guidance_of_one_and_below_is_off(scale):
    pipe = make_pipeline()
    batches = []
    pipe.unet.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    off = draw(pipe, [0, 1], generator=generators(0, 1), guidance_scale=scale)
    assert batches == [2, 2, 2] and not pipe.do_classifier_free_guidance
    torch.testing.assert_close(off, draw(pipe, [0, 1], generator=generators(0, 1)))


def test_guidance_is_one_call_of_both_halves():
    pipe = make_pipeline()
    calls = []
    pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    draw(pipe, ["1"] if pipe.id2label else [1, 0], guidance_scale=2.0)
    assert calls == [[1, 0, 3, 3]] * 3


@pytest.mark.parametrize("steps", [1, 4])
def test_number_of_model_calls(steps):
    for solver, calls in (("euler", steps), ("heun", 2 * steps - 1)):
        pipe = make_pipeline(FlowMatchODEScheduler(solver=solver))
        seen = []
        pipe.unet.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[1].item()))
        draw(pipe, 0, num_inference_steps=steps)
        assert seen == pipe.scheduler.timesteps.tolist()
        assert len(seen) == calls == pipe.num_timesteps


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_equals_the_ddim_pipeline(eta):
    unet, scheduler = tiny_unet(**UNCONDITIONAL), DDIMScheduler()
    oracle = DDIMPipeline(unet, scheduler)
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(3, generators(0, 1, 2), eta=eta, num_inference_steps=5, output_type="np").images
    pipe = make_pipeline(DDIMScheduler(), **UNCONDITIONAL)
    arguments = {"num_inference_steps": 5, "num_images_per_prompt": 3, "eta": eta}
    actual = draw(pipe, output_type="np", generator=generators(0, 1, 2), **arguments)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.05


def test_equals_the_ddpm_pipeline():
    oracle = DDPMPipeline(tiny_unet(**UNCONDITIONAL), DDPMScheduler())
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(2, generators(0, 1), num_inference_steps=5, output_type="np").images
    pipe = make_pipeline(DDPMScheduler(), **UNCONDITIONAL)
    arguments = {"num_inference_steps": 5, "num_images_per_prompt": 2}
    actual = draw(pipe, output_type="np", generator=generators(0, 1), **arguments)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_two_schedulers_of_one_ode_meet():
    """Our Euler and diffusers' draw the same picture, and Heun with many steps draws nearly that one."""
    pipe = make_pipeline()
    ours = draw(pipe, 1, generator=generators(3), num_inference_steps=6)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(draw(pipe, 1, generator=generators(3), num_inference_steps=6), ours)


# Seeds and batches


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "name, eta",
    [("ODE Euler", 0.0), ("ODE Heun", 0.0), ("DDPM", 0.0), ("DDIM", 1.0), ("DPM++ SDE", 0.0), ("EulerDiscrete", 0.0)],
)
def test_picture_of_a_seed_does_not_depend_on_its_batch(name, eta, scale):
    pipe = make_pipeline(SCHEDULERS[name]())
    labels, seeds = [2, 0, 1], [5, 6, 7]
    batch = draw(pipe, labels, generator=generators(*seeds), guidance_scale=scale, eta=eta)
    for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        alone = draw(pipe, label, generator=generators(seed), guidance_scale=scale, eta=eta)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-3, atol=1e-4 * batch.abs().max().item())
        # a generator that is not in a list is the same
        single = draw(pipe, label, generator=generators(seed)[0], guidance_scale=scale, eta=eta)
        assert torch.equal(single, alone)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_same_seed_same_picture_and_nothing_from_the_global_generator():
    pipe = make_pipeline(DDPMScheduler())
    state = torch.get_rng_state()
    first = draw(pipe, [0, 1], generator=generators(4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, draw(pipe, [0, 1], generator=generators(4, 4)))
    assert not torch.equal(first, draw(pipe, [0, 1], generator=generators(4, 5)))


def test_images_per_label():
    pipe = make_pipeline()
    images = draw(pipe, [2, 0], num_images_per_prompt=2, generator=generators(0, 1, 2, 3), guidance_scale=2.0)
    expected = draw(pipe, [2, 2, 0, 0], generator=generators(0, 1, 2, 3), guidance_scale=2.0)
    assert torch.equal(images, expected) and len(images) == 4


def test_no_label_draws_without_a_class():
    pipe = make_pipeline()
    images = draw(pipe, num_images_per_prompt=2, generator=generators(0, 1))
    with torch.no_grad():
        expected = written_out_loop(pipe.unet, pipe.scheduler, [3, 3], 3, 1.0, generators(0, 1))
    torch.testing.assert_close(images, expected, **CLOSE)


def test_given_latents():
    pipe = make_pipeline(EulerDiscreteScheduler())
    latents = torch.cat([randn_tensor((1, 3, 8, 8), generator=g) for g in generators(0, 1)])
    copy_of_latents = latents.clone()
    images = draw(pipe, [0, 1], latents=latents)
    # standard normal noise, scaled by the scheduler's 14.6 in the pipeline
    assert torch.equal(images, draw(pipe, [0, 1], generator=generators(0, 1)))
    assert torch.equal(latents, copy_of_latents)
    assert torch.equal(images, draw(pipe, [0, 1], latents=latents.double()))


# Grids


def test_user_grids_reach_the_scheduler():
    for scheduler in (FlowMatchODEScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        pipe = make_pipeline(scheduler)
        draw(pipe, 0, sigmas=[1.0, 0.5])
        torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1.0, 0.75, 0.0]))
    pipe = make_pipeline()
    draw(pipe, 0, timesteps=[900.0, 100.5])
    torch.testing.assert_close(pipe.scheduler.timesteps, torch.tensor([900.0, 100.5]))
    pipe = make_pipeline(DDPMScheduler())
    draw(pipe, 0, timesteps=[900, 100], num_inference_steps=None)
    assert pipe.scheduler.timesteps.tolist() == [900, 100]


def test_default_grid_of_diffusers_euler_is_even():
    pipe = make_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))
    draw(pipe, 0, num_inference_steps=2)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1.0, 0.75, 0.0]))


@pytest.mark.parametrize("name", ["ODE Euler", "ODE Heun", "FlowMatchHeunDiscrete", "DDPM", "HeunDiscrete"])
@pytest.mark.parametrize("sigmas", [None, [1.0, 0.8, 0.2]])
def test_progress_bar_counts_steps(name, sigmas):
    if sigmas is not None and not name.startswith("ODE"):
        sigmas = None
    pipe = make_pipeline(SCHEDULERS[name]())
    pipe.set_progress_bar_config(file=io.StringIO())
    bars = []

    def progress_bar(*args, **kwargs):
        bars.append(DynaUNetPipeline.progress_bar(pipe, *args, **kwargs))
        return bars[-1]

    pipe.progress_bar = progress_bar
    draw(pipe, 0, sigmas=sigmas)
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3)]


# Labels


def test_forms_of_the_label():
    pipe = make_pipeline(id2label=LABELS)
    expected = draw(pipe, [0, 1], generator=generators(0, 1))
    forms = [
        (0, 1),
        ["tabby", "dog"],
        ["cat, tabby", 1],
        [np.int64(0), np.int32(1)],
        torch.tensor([0, 1]),
        torch.tensor([0, 1], dtype=torch.int32),
    ]
    for form in forms:
        assert torch.equal(draw(pipe, form, generator=generators(0, 1)), expected)
    single = draw(pipe, 0, generator=generators(0))
    for form in ("cat", ["cat"], "tabby", "cat, tabby", torch.tensor(0), torch.tensor([0]), np.int64(0)):
        # not one image for each letter
        assert torch.equal(draw(pipe, form, generator=generators(0)), single)


def test_get_label_ids():
    pipe = make_pipeline(id2label=LABELS)
    assert pipe.get_label_ids("cat") == [0]
    assert pipe.get_label_ids(["bird", "dog", "dog house", 2, "bird, dog house"]) == [2, 1, 2, 2, 2]
    result = pipe.get_label_ids([np.int64(1)])
    assert result == [1] and type(result[0]) is int
    assert pipe.id2label == LABELS
    assert make_pipeline().id2label is None


def test_name_that_two_classes_share():
    pipe = make_pipeline(id2label={0: "crane, bird", 1: "crane", 2: "dog"})
    assert pipe.get_label_ids(["bird", "crane, bird"]) == [0, 0]
    with pytest.raises(ValueError, match=r"name 'crane', which the classes \[0, 1\] share. Give the label instead"):
        pipe("crane")


@pytest.mark.parametrize(
    "labels, error, message",
    [
        ("cow", ValueError, r"unknown class name 'cow'. Known names: 'cat, tabby', 'dog', 'bird, dog house'"),
        ("Cat", ValueError, "unknown class name 'Cat'"),
        ("", ValueError, "unknown class name ''"),
        (3, ValueError, "has the label 3, but the model has 3 classes: use 0 to 2"),
        ([0, -1], ValueError, "has the label -1, but the model has 3 classes"),
        ([], ValueError, "`class_labels` is empty"),
        (1.0, TypeError, "`class_labels` must hold labels or names, but has 1.0"),
        ([True], TypeError, "`class_labels` must hold labels or names, but has True"),
        ([None], TypeError, "`class_labels` must hold labels or names, but has None"),
        ([[0]], TypeError, r"`class_labels` must hold labels or names, but has \[0\]"),
        (torch.tensor([0.5]), TypeError, "`class_labels` must hold labels or names, but has 0.5"),
    ],
)
def test_wrong_labels(labels, error, message):
    with pytest.raises(error, match=message):
        make_pipeline(id2label=LABELS)(labels)


def test_wrong_names():
    with pytest.raises(ValueError, match=r"unknown class name 'cat'. Known names: none \(no `id2label`\)"):
        make_pipeline()("cat")
    # the null class, 3, has no name
    with pytest.raises(ValueError, match="has the label 3, but the model has 3 classes"):
        make_pipeline(id2label={3: "nothing"})("nothing")


# Outputs


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = make_pipeline(in_channels=channels, out_channels=channels)

    def images(output_type):
        result = pipe([0, 1], num_inference_steps=2, generator=generators(0, 1), output_type=output_type)
        assert isinstance(result, ImagePipelineOutput)
        return result.images

    latent, pt, numpy, pil = (images(output_type) for output_type in ("latent", "pt", "np", "pil"))
    assert latent.shape == (2, channels, 8, 8) and latent.abs().max() > 1
    assert torch.equal(pt, (latent * 0.5 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(numpy, pt.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in pil] == [mode, mode]
    assert all(isinstance(image, PIL.Image.Image) and image.size == (8, 8) for image in pil)
    bytes_ = np.stack([np.asarray(image).reshape(8, 8, channels) for image in pil])
    np.testing.assert_array_equal(bytes_, (numpy * 255).round().astype(np.uint8))
    default = pipe([0, 1], num_inference_steps=2, generator=generators(0, 1)).images
    assert [image.tobytes() for image in default] == [image.tobytes() for image in pil]


def test_tuple_is_the_output_class():
    pipe = make_pipeline()
    result = pipe(0, num_inference_steps=2, generator=generators(0), output_type="pt", return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1
    assert torch.equal(result[0], draw(pipe, 0, num_inference_steps=2, output_type="pt", generator=generators(0)))


def test_sizes():
    pipe = make_pipeline()
    assert draw(pipe, 0, height=6, width=12).shape == (1, 3, 6, 12)
    assert draw(pipe, 0, height=16).shape == (1, 3, 16, 8)
    (image,) = pipe(0, height=6, width=12, num_inference_steps=1).images
    assert image.size == (12, 6)
    wide = make_pipeline(sample_size=(4, 8), attention_resolutions=(8,))
    assert draw(wide, 0).shape == (1, 3, 4, 8)


def test_no_gradient_and_no_change_of_the_components():
    pipe = make_pipeline()
    pipe.unet.train()
    state = copy.deepcopy(pipe.unet.state_dict())
    images = draw(pipe, 0)
    assert not images.requires_grad and images.grad_fn is None
    assert pipe.unet.training
    assert all(torch.equal(value, state[name]) for name, value in pipe.unet.state_dict().items())


# Callbacks and what they read


@pytest.mark.parametrize("name, calls", [("ODE Euler", 3), ("ODE Heun", 5), ("DDPM", 3)])
def test_callback_sees_every_call(name, calls):
    pipe = make_pipeline(SCHEDULERS[name]())
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe and list(tensors) == ["latents"]
        assert pipeline.guidance_scale == 1.5 and pipeline.do_classifier_free_guidance
        assert pipeline.current_timestep == timestep and pipeline.num_timesteps == calls
        seen.append((step, timestep.item(), tensors["latents"].clone()))
        return tensors

    images = draw(pipe, 0, guidance_scale=1.5, callback_on_step_end=callback)
    assert [step for step, *_ in seen] == list(range(calls))
    assert [time for _, time, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], images)
    assert pipe.current_timestep is None


def test_callback_changes_the_latents():
    pipe = make_pipeline()

    def callback(pipeline, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    images = draw(pipe, 1, generator=generators(0), callback_on_step_end=callback)
    with torch.no_grad():
        # after the second of three steps of 1/3 the state is 0, at sigma = 1/3
        velocity = pipe.unet(torch.zeros(1, 3, 8, 8), pipe.scheduler.timesteps[2], torch.tensor([1])).sample
    torch.testing.assert_close(images, -velocity / 3, **CLOSE)


def test_callback_changes_guidance():
    """As diffusers' callbacks do: another scale, and none, which leaves the class."""
    pipe = make_pipeline()
    channels = pipe.unet.config.in_channels
    scales = {0: 4.0, 1: 0.0}

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = scales.get(step, 0.0)
        return tensors

    latents = state = randn(1, channels, 8, 8)
    with torch.no_grad():
        for time, scale in ((1.0, 2.0), (2 / 3, 4.0), (1 / 3, 1.0)):
            conditional = pipe.unet(state, 1000 * time, torch.tensor([1])).sample
            null = pipe.unet(state, 1000 * time, torch.tensor([pipe.unet.null_class_label])).sample
            state = state - (null + scale * (conditional - null)) / 3
    actual = pipe(
        1, latents=latents, num_inference_steps=3, guidance_scale=2.0, callback_on_step_end=change, output_type="pt"
    ).images
    torch.testing.assert_close(actual, (state / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_callback_interrupts():
    pipe = make_pipeline()
    kept = []

    def callback(pipeline, step, timestep, tensors):
        kept.append(tensors["latents"])
        pipeline._interrupt = step == 1
        return tensors

    images = draw(pipe, 0, num_inference_steps=5, callback_on_step_end=callback)
    assert len(kept) == 2 and pipe.interrupt
    assert torch.equal(images, kept[1])
    pipe(0, num_inference_steps=1)
    assert not pipe.interrupt


def test_callback_classes_name_their_tensors():
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            callback_kwargs["latents"] = callback_kwargs["latents"] / 2
            return callback_kwargs

    pipe = make_pipeline()

    def images(callback):
        return draw(pipe, 0, num_inference_steps=1, generator=generators(0), callback_on_step_end=callback)

    plain = images(None)
    torch.testing.assert_close(images(Halve(cutoff_step_ratio=1.0)), plain / 2)
    both = MultiPipelineCallbacks([Halve(cutoff_step_ratio=1.0), Halve(cutoff_step_ratio=1.0)])
    torch.testing.assert_close(images(both), plain / 4)


def test_callback_without_tensors():
    seen = []
    draw(
        make_pipeline(),
        0,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(dict(tensors)) or tensors,
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}, {}, {}]


# Precision, devices


def test_bfloat16_keeps_the_state_in_float32():
    pipe = make_pipeline()
    expected = draw(pipe, [0, 1], guidance_scale=2.0, generator=generators(0, 1), num_inference_steps=8)
    pipe.to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    dtypes = []
    pipe.unet.register_forward_hook(lambda module, args, output: dtypes.append((args[0].dtype, args[1].dtype)))

    def callback(pipeline, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)
        return tensors

    arguments = {"guidance_scale": 2.0, "num_inference_steps": 8, "callback_on_step_end": callback}
    actual = draw(pipe, [0, 1], generator=generators(0, 1), **arguments)
    assert set(dtypes) == {(torch.bfloat16, torch.float32), torch.float32}
    assert actual.dtype == torch.float32
    # a state in bfloat16 would have no more than 8 significant bits
    assert not torch.equal(actual.bfloat16().float(), actual)
    # the velocity is bfloat16's, of two calls whose difference is doubled
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.15)
    assert draw(pipe, 0, output_type="np").dtype == np.float32


def test_bfloat16_starts_from_the_noise_of_float32():
    pipe = make_pipeline()
    pipe.to(torch.bfloat16)
    velocities = []
    pipe.unet.register_forward_hook(lambda module, args, output: velocities.append(output[0].float()))
    images = draw(pipe, 0, num_inference_steps=1, generator=generators(3))
    assert torch.equal(images, randn(1, 3, 8, 8, seed=3) - velocities[0])


def test_layerwise_casting_in_the_pipeline():
    pipe = make_pipeline()
    pipe.to(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    images = draw(pipe, [0, 1], guidance_scale=2.0)
    assert images.dtype == torch.float32 and torch.isfinite(images).all()
    assert pipe.unet.conv_in.weight.dtype == torch.float8_e4m3fn


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without an accelerator")
def test_cpu_offload_needs_an_accelerator():
    pipe = make_pipeline()
    with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
        pipe.enable_model_cpu_offload()
    assert pipe.model_cpu_offload_seq == "unet"


def test_offload_hooks_on_cpu():
    """The hooks of `enable_model_cpu_offload`, with the CPU as the device that they move the U-Net to."""
    pipe = make_pipeline()
    expected = draw(pipe, 0, generator=generators(0))
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        (hook,) = pipe._all_hooks
        assert torch.equal(draw(pipe, 0, generator=generators(0)), expected)
        assert pipe._all_hooks[0] is not hook  # the end of a call freed the model and put a new hook on it
    pipe.remove_all_hooks()

    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(draw(pipe, 0, generator=generators(0)), expected)


# Saving and loading


def test_save_and_load(tmp_path):
    pipe = make_pipeline(FlowMatchODEScheduler(solver="heun", shift=2.0), id2label=LABELS)
    expected = draw(pipe, ["tabby", 2], guidance_scale=2.0, generator=generators(0, 1))
    pipe.save_pretrained(tmp_path / "first")
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "DynaUNetPipeline",
        "id2label": {"0": "cat, tabby", "1": "dog", "2": "bird, dog house"},
        "scheduler": ["diffusers_dyna", "FlowMatchODEScheduler"],
        "unet": ["diffusers_dyna", "DynaUNet2DModel"],
    }

    for cls in (DynaUNetPipeline, DiffusionPipeline):
        with logged_warnings() as warnings:
            loaded = cls.from_pretrained(tmp_path / "first")
        assert warnings == []
        assert type(loaded) is DynaUNetPipeline and type(loaded.unet) is DynaUNet2DModel
        assert loaded.id2label == pipe.id2label == LABELS
        assert loaded.config.id2label == pipe.config.id2label
        loaded.set_progress_bar_config(disable=True)
        actual = draw(loaded, ["tabby", 2], guidance_scale=2.0, generator=generators(0, 1))
        assert torch.equal(actual, expected)

    loaded.save_pretrained(tmp_path / "second")
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in ("first", "second"))
        second.pop("_name_or_path", None)
        assert second == first
    files = [
        sorted(str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*"))
        for folder in ("first", "second")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("make_scheduler", [DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_save_and_load_with_a_scheduler_of_diffusers(make_scheduler, tmp_path):
    make_pipeline(make_scheduler(), **UNCONDITIONAL).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", make_scheduler.__name__] and index["id2label"] is None
    with logged_warnings() as warnings:
        loaded = DynaUNetPipeline.from_pretrained(tmp_path)
    assert warnings == []
    assert type(loaded.scheduler) is make_scheduler and loaded.id2label is None
    # components can be given, in the place of what is saved
    scheduler = FlowMatchODEScheduler()
    assert DynaUNetPipeline.from_pretrained(tmp_path, scheduler=scheduler).scheduler is scheduler


def test_load_in_bfloat16(tmp_path):
    make_pipeline(id2label=LABELS).save_pretrained(tmp_path)
    loaded = DynaUNetPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    assert draw(loaded, "dog").dtype == torch.float32


def test_components_and_from_pipe():
    pipe = make_pipeline(id2label=LABELS)
    assert set(pipe.components) == {"unet", "scheduler"}
    other = DynaUNetPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and other.id2label == LABELS
    names = set(inspect.signature(DynaUNetPipeline.__init__).parameters) - {"self"}
    assert names == {"unet", "scheduler", "id2label"}


def test_every_argument_of_a_call_is_documented():
    for method in (DynaUNetPipeline.__call__, DynaUNetPipeline.__init__):
        doc = method.__doc__ or DynaUNetPipeline.__doc__
        for name in inspect.signature(method).parameters:
            assert name == "self" or f"            {name} (" in doc or f"        {name} (" in doc, name


# What is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"height": 9}, r"`height` and `width` must be positive and divisible by 2, but are 9 and 8"),
        ({"width": 9}, r"`height` and `width` must be .* 8 and 9"),
        ({"height": 0}, r"`height` and `width` must be positive .* 0 and 8"),
        ({"num_inference_steps": 0}, r"`num_inference_steps`=0 must be a whole number, at least 1"),
        ({"num_inference_steps": 2.5}, r"`num_inference_steps`=2.5 must be a whole number"),
        ({"num_inference_steps": None}, r"`num_inference_steps`=None must be a whole number"),
        ({"eta": 1.5}, r"`eta`=1.5 must be in \[0, 1\]"),
        ({"eta": -0.1}, r"`eta`=-0.1 must be in \[0, 1\]"),
        ({"num_images_per_prompt": 0}, r"`num_images_per_prompt`=0 must be at least 1"),
        ({"output_type": "jpg"}, r"`output_type`='jpg' must be 'pil', 'np', 'pt' or 'latent'"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
            r"`callback_on_step_end_tensor_inputs` has \['noise'\], but only \['latents'\]",
        ),
        ({"guidance_scale": math.nan}, "`guidance_scale`=nan must be a finite number. Use `guidance_scale=1` for no"),
        ({"guidance_scale": None}, "`guidance_scale`=None must be a finite number"),
        ({"class_labels": None, "guidance_scale": 2.0}, r"`guidance_scale`=2.0 needs `class_labels` and a U-Net"),
        ({"generator": generators(0, 1)}, r"`generator` is a list of 2, but 1 images are to be drawn"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"`latents` must have shape \(1, 3, 8, 8\), but has shape \(2, 3"),
        ({"latents": torch.zeros(1, 3, 8, 10)}, r"`latents` must have shape \(1, 3, 8, 8\)"),
        ({"sigmas": [1.0], "timesteps": [1000.0]}, r"Only one of `timesteps` or `sigmas` can be passed"),
    ],
)
@pytest.mark.parametrize("name", ["ODE Euler", "FlowMatchEulerDiscrete"])
def test_wrong_inputs(arguments, message, name):
    with pytest.raises(ValueError, match=message):
        make_pipeline(SCHEDULERS[name]())(**{"class_labels": 0, "num_inference_steps": 2, **arguments})


def test_wrong_inputs_for_the_unet_at_hand():
    with pytest.raises(ValueError, match="`class_labels` were given, but the U-Net is unconditional"):
        make_pipeline(**UNCONDITIONAL)(0)
    with pytest.raises(ValueError, match="needs `class_labels` and a U-Net trained with a null class"):
        make_pipeline(**UNCONDITIONAL)(guidance_scale=2.0)
    no_null = make_pipeline(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`class_labels` must be given: the U-Net has 3 classes and no null class"):
        no_null()
    with pytest.raises(ValueError, match="`guidance_scale`=1.5 needs .* null class.*Use `guidance_scale=1`"):
        no_null(0, guidance_scale=1.5)


def test_grid_that_the_scheduler_cannot_take():
    with pytest.raises(ValueError, match="does not support custom sigmas schedules"):
        make_pipeline(DDPMScheduler())(0, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="`sigmas` must fall strictly"):
        make_pipeline()(0, sigmas=[0.5, 1.0])


def test_what_callers_may_pass_in_another_form():
    pipe = make_pipeline(FlowMatchEulerDiscreteScheduler())
    expected = draw(pipe, [0, 1], generator=generators(0, 1))
    assert torch.equal(draw(pipe, np.array([0, 1]), generator=tuple(generators(0, 1))), expected)
    assert torch.equal(draw(pipe, [0, 1], generator=generators(0, 1), num_inference_steps=3.0), expected)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)  # and returns nothing

    assert torch.equal(draw(pipe, [0, 1], generator=generators(0, 1), callback_on_step_end=callback), expected)
    assert seen == [0, 1, 2]
