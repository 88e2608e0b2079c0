# SPDX-License-Identifier: Apache-2.0
"""
`DynaDiTPipeline` against the sampling loop written out by hand, with the two halves of guidance in calls of their own
and no trajectory prepared, for flow-matching and for noise-predicting schedulers of diffusers; and against
`DiTPipeline`.
"""

import copy
import inspect
import io
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from diffusers_dyna import DynaDiTPipeline, DynaDiTTransformer2DModel, FlowMatchODEScheduler, FlowMatchSDEScheduler
from diffusers_dyna.pipelines import DynaDiTPipelineOutput

from ..testing_utils import UNCONDITIONAL, logged_warnings, randn
from .dyna_dit_common import DynaDiTPipelineTests, assert_close, generators, tiny_dit, tiny_vae


LABELS = {0: "cat, tabby", 1: "dog", 2: "bird, dog house"}

LATENT = {"in_channels": 4}

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
    "DDPM learned range": lambda: DDPMScheduler(variance_type="learned_range"),
    "DDIM": lambda: DDIMScheduler(),
    "DDIM of learned range": lambda: DDIMScheduler.from_config(DDPMScheduler(variance_type="learned_range").config),
    "DPM++": lambda: DPMSolverMultistepScheduler(),
    "DPM++ learned range": lambda: DPMSolverMultistepScheduler(variance_type="learned_range"),
    "DPM++ SDE": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "UniPC": lambda: UniPCMultistepScheduler(),
    "EulerDiscrete": lambda: EulerDiscreteScheduler(),
    "HeunDiscrete": lambda: HeunDiscreteScheduler(),
}
SCHEDULERS = FLOW_SCHEDULERS | NOISE_SCHEDULERS


def make_pipeline(scheduler=None, id2label=None, vae=None, **overrides) -> DynaDiTPipeline:
    pipe = DynaDiTPipeline(tiny_dit(**overrides), scheduler or FlowMatchODEScheduler(), vae, id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *args, num_inference_steps=3, output_type="latent", **kwargs) -> torch.Tensor:
    return pipe(*args, num_inference_steps=num_inference_steps, output_type=output_type, **kwargs).images


@torch.no_grad()
def written_out_loop(
    transformer,
    scheduler,
    labels: list[int],
    steps: int,
    scale: float = 1.0,
    generator=None,
    grid=None,
    interval=(0.0, 1.0),
    guided_channels=None,
    learned_variance=False,
    **model_kwargs,
) -> torch.Tensor:
    """The trajectory as a reader of the papers would write it."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(**(grid or {"num_inference_steps": steps}))
    step_kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    channels = transformer.config.in_channels
    sample = randn_tensor((len(labels), channels, 8, 8), generator=generator)
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = transformer(scaled, t.float(), torch.tensor(labels), **model_kwargs).sample
        if scale > 1 and interval[0] <= t / 1000 <= interval[1]:
            null = transformer(scaled, t.float(), None, **model_kwargs).sample
            k = guided_channels or channels
            output[:, :k] = null[:, :k] + scale * (output[:, :k] - null[:, :k])
        output = output if learned_variance else output[:, :channels]
        sample = scheduler.step(output, t, sample, **step_kwargs).prev_sample
    return sample


def record(monkeypatch, transformer, name: str, log: list | None = None) -> list:
    """Logs the name and the arguments of every call of a method of the transformer, which still does its work."""
    log, method = [] if log is None else log, getattr(transformer, name)

    def recorded(*args, **kwargs):
        log.append((name, args, kwargs))
        return method(*args, **kwargs)

    monkeypatch.setattr(transformer, name, recorded)
    return log


class TestStandard(DynaDiTPipelineTests):
    pipeline_class = DynaDiTPipeline

    def make(self, **overrides):
        return make_pipeline(**overrides)

    def arguments(self, *entries):
        return {"class_labels": [entry % 3 for entry in entries], "guidance_scale": 2.0}


@pytest.mark.parametrize("router_mode", ["capacity", "threshold"])
def test_the_model_of_these_tests_is_dynamic(router_mode):
    """The masks are mixed, and not the same for every layer, timestep and image."""
    model = tiny_dit(router_mode=router_mode)
    with torch.no_grad():
        outputs = [
            model(randn(2, 3, 8, 8), torch.tensor(t), torch.tensor([0, 1]), output_masks=True)
            for t in (1000.0, 900.0, 750.0, 600.0, 500.0, 333.3, 250.0, 100.0)
        ]
    ratios = torch.stack([output.compute_ratio for output in outputs])
    assert 0.2 < ratios.mean() < 0.9 and ratios.std() > 0.01
    for name in ("attn_masks", "mlp_masks", "token_masks"):
        masks = torch.stack([getattr(output, name) for output in outputs])  # (S, B, L, ...)
        assert masks.float().std(dim=0).max() > 0, f"{name} are the same at every timestep"
        assert (masks[:, :, 0] != masks[:, :, 1]).any(), f"{name} are the same in every layer"
    assert (outputs[0].token_masks[0] != outputs[0].token_masks[1]).any(), "the tokens are those of every image"


# The loop and guidance


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_loop(name, scale):
    scheduler = SCHEDULERS[name]()
    pipe = make_pipeline(scheduler)
    # the pipeline's choice for this scheduler, whose own default grid wastes its last step
    grid = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if name == "FlowMatchEulerDiscrete" else None
    learned_variance = name == "DDPM learned range"
    expected = written_out_loop(
        pipe.transformer, scheduler, [0, 2], 4, scale, generators(0, 1), grid, learned_variance=learned_variance
    )
    actual = draw(pipe, [0, 2], num_inference_steps=4, guidance_scale=scale, generator=generators(0, 1))
    assert expected.std() > 0.05 and torch.isfinite(expected).all()
    assert_close(actual, expected)
    # told to the scheduler, so that it need not search for the first timestep
    assert getattr(pipe.scheduler, "begin_index", 0) == 0
    # a second call starts from a fresh state
    again = draw(pipe, [0, 2], num_inference_steps=4, guidance_scale=scale, generator=generators(0, 1))
    assert torch.equal(again, actual)


@pytest.mark.parametrize("overrides", [{"router_mode": "threshold"}, {"learn_sigma": False}, LATENT], ids=str)
def test_loop_of_other_models(overrides):
    pipe = make_pipeline(**overrides)
    expected = written_out_loop(pipe.transformer, pipe.scheduler, [0, 2], 4, 2.5, generators(0, 1))
    actual = draw(pipe, [0, 2], num_inference_steps=4, guidance_scale=2.5, generator=generators(0, 1))
    assert_close(actual, expected)


def test_flow_matching_is_euler_by_hand():
    pipe = make_pipeline()
    state = latents = randn(2, 3, 8, 8)
    with torch.no_grad():
        for time in (1.0, 0.75, 0.5, 0.25):
            velocity = pipe.transformer(state, torch.tensor(1000 * time), torch.tensor([1, 2])).sample[:, :3]
            state = state - 0.25 * velocity
    actual = draw(pipe, [1, 2], num_inference_steps=4, latents=latents)
    torch.testing.assert_close(actual, state, rtol=1e-5, atol=1e-5)


def test_equals_the_pipeline_of_diffusers():
    """`DiTPipeline` with this transformer, whose null class must be its hard-coded 1000."""
    transformer, vae = tiny_dit(in_channels=4, num_classes=1000), tiny_vae()
    pipe = DynaDiTPipeline(transformer, DDIMScheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [207, 360], "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "np"}
    actual = pipe(**arguments, generator=generators(0, 1)).images

    oracle_transformer = tiny_dit(in_channels=4, num_classes=1000)
    oracle_transformer.register_to_config(out_channels=8)
    oracle = DiTPipeline(oracle_transformer, vae, DDIMScheduler())
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(**arguments, generator=generators(0, 1)).images
    assert expected.std() > 0.05
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_guidance_extrapolates_from_the_null_class_to_the_class():
    """One Euler step from noise: linear in the model output, so in the scale."""
    pipe = make_pipeline()
    latents = randn(2, 3, 8, 8)
    labels = [0, 1]
    classes, null = draw(pipe, labels, latents=latents, num_inference_steps=1), None
    with torch.no_grad():
        null = latents - pipe.transformer(latents, 1000.0, None).sample[:, :3]
    assert (classes - null).abs().max() > 0.05
    guided = draw(pipe, labels, latents=latents, num_inference_steps=1, guidance_scale=4.0)
    assert_close(guided, null + 4.0 * (classes - null))


@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0])
def test_guidance_of_one_and_below_is_off(scale):
    pipe = make_pipeline()
    batches = []
    pipe.transformer.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    off = draw(pipe, [0, 1], generator=generators(0, 1), guidance_scale=scale)
    assert batches == [2, 2, 2] and not pipe.do_classifier_free_guidance
    torch.testing.assert_close(off, draw(pipe, [0, 1], generator=generators(0, 1)))


def record_labels(pipe) -> list[list[int] | None]:
    calls = []

    def hook(module, args, kwargs, output):
        labels = kwargs.get("class_labels")
        calls.append(labels.tolist() if labels is not None else None)

    pipe.transformer.register_forward_hook(hook, with_kwargs=True)
    return calls


def test_guidance_is_one_call_of_both_halves():
    pipe = make_pipeline()
    calls = record_labels(pipe)
    draw(pipe, [1, 0], guidance_scale=2.0)
    assert calls == [[1, 0, 3, 3]] * 3


def test_guidance_interval():
    pipe = make_pipeline()
    calls = record_labels(pipe)
    arguments = {"num_inference_steps": 5, "guidance_scale": 2.5}
    actual = draw(pipe, 1, generator=generators(0), guidance_interval=(0.4, 0.8), **arguments)
    assert calls == [[1], [1, 3], [1, 3], [1, 3], [1]]  # at 1, 0.8, 0.6, 0.4 and 0.2
    expected = written_out_loop(
        pipe.transformer, pipe.scheduler, [1], 5, 2.5, generators(0), interval=(0.3999, 0.8001)
    )
    assert_close(actual, expected)
    everywhere = draw(pipe, 1, generator=generators(0), **arguments)
    assert (everywhere - actual).abs().max() > 0.01
    assert torch.equal(draw(pipe, 1, generator=generators(0), guidance_interval=(0, 1), **arguments), everywhere)

    del calls[:]
    nowhere = draw(pipe, 1, generator=generators(0), guidance_interval=(0.85, 0.95), **arguments)
    assert calls == [[1]] * 5
    assert_close(nowhere, draw(pipe, 1, generator=generators(0), num_inference_steps=5))


def test_guidance_interval_of_a_noise_scheduler():
    """Whole timesteps of 1000."""
    pipe = make_pipeline(DDIMScheduler())
    calls = record_labels(pipe)
    draw(pipe, 1, num_inference_steps=5, guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    assert pipe.scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
    assert calls == [[1], [1], [1, 3], [1, 3], [1, 3]]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_guidance_channels(channels):
    pipe = make_pipeline()
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5, "guidance_channels": channels}
    actual = draw(pipe, [0, 2], generator=generators(0, 1), **arguments)
    expected = written_out_loop(
        pipe.transformer, pipe.scheduler, [0, 2], 4, 2.5, generators(0, 1), guided_channels=channels
    )
    assert_close(actual, expected)
    every = draw(pipe, [0, 2], generator=generators(0, 1), num_inference_steps=4, guidance_scale=2.5)
    assert torch.equal(actual, every) == (channels == 3)


def test_guidance_channels_are_those_of_the_model():
    """The published way of DiT, whose model guides three channels by default."""
    pipe = make_pipeline(**LATENT)
    latents = randn(2, 4, 8, 8)
    actual = draw(pipe, [0, 2], latents=latents, num_inference_steps=1, guidance_scale=4.0, guidance_channels=3)
    with torch.no_grad():
        output = pipe.transformer.forward_with_cfg(
            torch.cat([latents, latents]), 1000.0, torch.tensor([0, 2, 3, 3]), guidance_scale=4.0
        )
    assert_close(actual, latents - output.sample[:2, :4])


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variance_is_that_of_the_class(variance_type):
    """The last channels that the scheduler gets are not guided."""
    pipe = make_pipeline(DDPMScheduler(variance_type=variance_type))
    seen = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: seen.append(output) or step(output, *args, **kwargs)
    latents = randn(1, 3, 8, 8)
    draw(pipe, 1, latents=latents, guidance_scale=3.0, num_inference_steps=1)
    with torch.no_grad():
        expected = pipe.transformer(latents, pipe.scheduler.timesteps[0].float(), torch.tensor([1])).sample
        null = pipe.transformer(latents, pipe.scheduler.timesteps[0].float(), None).sample
    assert seen[0].shape == (1, 6, 8, 8)
    assert_close(seen[0][:, 3:], expected[:, 3:])
    assert_close(seen[0][:, :3], null[:, :3] + 3.0 * (expected - null)[:, :3])


@pytest.mark.parametrize("steps", [1, 4])
def test_number_of_model_calls(steps):
    for solver, calls in (("euler", steps), ("heun", 2 * steps - 1)):
        pipe = make_pipeline(FlowMatchODEScheduler(solver=solver))
        seen = []
        pipe.transformer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[1].item()))
        draw(pipe, 0, num_inference_steps=steps)
        assert seen == pipe.scheduler.timesteps.tolist()
        assert len(seen) == calls == pipe.num_timesteps


def test_two_schedulers_of_one_ode_meet():
    """Our Euler and diffusers' draw the same picture."""
    pipe = make_pipeline()
    ours = draw(pipe, 1, generator=generators(3), num_inference_steps=6)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(draw(pipe, 1, generator=generators(3), num_inference_steps=6), ours)


# What is dynamic


@pytest.mark.parametrize("name", ["ODE Euler", "ODE Heun", "DDPM"])
def test_trajectory_is_told_to_the_model(name, monkeypatch):
    pipe = make_pipeline(SCHEDULERS[name]())
    log = []
    for method in ("prepare_timesteps", "set_plan_step", "clear_plan"):
        record(monkeypatch, pipe.transformer, method, log)
    pipe.transformer.register_forward_pre_hook(lambda *args: log.append("call"))
    draw(pipe, [2, 0], guidance_scale=2.0, max_plan_bytes=12345)

    method, (timesteps,), options = log[0]
    assert method == "prepare_timesteps" and timesteps.dtype == torch.float32
    assert timesteps.tolist() == pipe.scheduler.timesteps.tolist()
    assert list(options) == ["class_labels", "max_plan_bytes"]
    assert options["class_labels"].tolist() == [2, 0, 3, 3] and options["max_plan_bytes"] == 12345
    steps = [entry for i in range(len(timesteps)) for entry in (("set_plan_step", (i,), {}), "call")]
    first = log.index(steps[0])
    assert log[first:] == [*steps, ("set_plan_step", (None,), {}), ("clear_plan", (), {})]
    assert "call" not in log[:first]


def test_trajectory_has_the_labels_of_its_calls(monkeypatch):
    pipe = make_pipeline()
    prepared = record(monkeypatch, pipe.transformer, "prepare_timesteps")
    draw(pipe, [2, 0])
    draw(pipe, [2, 0], guidance_scale=2.0, guidance_interval=(0.5, 1.0))
    draw(pipe, [2, 0], guidance_scale=2.0, guidance_interval=(0.0, 0.0001))  # no step is guided
    labels = [kwargs["class_labels"].tolist() for _, _, kwargs in prepared]
    assert labels == [[2, 0], [2, 0, 3, 3], [2, 0]]


def test_complete_model(monkeypatch):
    pipe = make_pipeline()
    prepared = record(monkeypatch, pipe.transformer, "prepare_timesteps")
    dynamic = draw(pipe, [0, 2], generator=generators(0, 1))
    complete = draw(pipe, [0, 2], generator=generators(0, 1), complete_model=True)
    expected = written_out_loop(
        pipe.transformer, pipe.scheduler, [0, 2], 3, 1.0, generators(0, 1), complete_model=True
    )
    assert_close(complete, expected)
    assert (complete - dynamic).abs().max() > 0.01
    assert len(prepared) == 1  # by the dynamic run


def test_width():
    pipe = make_pipeline()
    full = draw(pipe, [0, 2], generator=generators(0, 1))
    narrow = draw(pipe, [0, 2], generator=generators(0, 1), width_mult=0.5)
    assert pipe.transformer.width_mult == 1.0
    assert (narrow - full).abs().max() > 0.01
    assert torch.equal(draw(pipe, [0, 2], generator=generators(0, 1)), full)

    pipe.transformer.set_width(0.5)
    expected = written_out_loop(pipe.transformer, pipe.scheduler, [0, 2], 3, 1.0, generators(0, 1))
    assert_close(narrow, expected)
    # without the argument, the width is the model's own
    assert_close(draw(pipe, [0, 2], generator=generators(0, 1)), expected)
    assert_close(draw(pipe, [0, 2], generator=generators(0, 1), width_mult=1.0), full)
    assert pipe.transformer.width_mult == 0.5


def test_failed_call_leaves_nothing_behind(monkeypatch):
    pipe = make_pipeline()
    expected = draw(pipe, 0, generator=generators(0), guidance_scale=2.0)
    log = record(monkeypatch, pipe.transformer, "clear_plan")
    record(monkeypatch, pipe.transformer, "set_plan_step", log)

    def callback(pipeline, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, 0, guidance_scale=2.0, width_mult=0.5, callback_on_step_end=callback)
    assert log[-3:] == [("set_plan_step", (0,), {}), ("set_plan_step", (None,), {}), ("clear_plan", (), {})]
    assert pipe.transformer.width_mult == 1.0
    assert torch.equal(draw(pipe, 0, generator=generators(0), guidance_scale=2.0), expected)

    def prepare_timesteps(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(pipe.transformer, "prepare_timesteps", prepare_timesteps)
    with pytest.raises(MemoryError):
        draw(pipe, 0, width_mult=0.5)
    assert pipe.transformer.width_mult == 1.0


@pytest.mark.parametrize("router_mode", ["capacity", "threshold"])
def test_compute_ratio(router_mode):
    pipe = make_pipeline(router_mode=router_mode)
    arguments = {"num_inference_steps": 4, "generator": generators(0, 1), "output_type": "latent"}
    output = pipe([0, 2], guidance_scale=2.0, output_compute_ratio=True, **arguments)
    assert isinstance(output, DynaDiTPipelineOutput) and type(output.compute_ratio) is float

    ratios, sample = [], randn_tensor((2, 3, 8, 8), generator=generators(0, 1))
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            halves = [
                pipe.transformer(sample, t, labels, output_masks=True) for labels in (torch.tensor([0, 2]), None)
            ]
            ratios += [half.compute_ratio for half in halves]
            conditional, null = (half.sample[:, :3] for half in halves)
            sample = pipe.scheduler.step(null + 2.0 * (conditional - null), t, sample).prev_sample
    assert_close(output.images, sample)
    expected = torch.cat(ratios).mean().item()
    assert 0.2 < expected < 0.9
    assert output.compute_ratio == pytest.approx(expected, abs=1e-5)


def test_compute_ratio_is_given_where_it_is_asked_for():
    pipe = make_pipeline()
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    assert pipe(0, **arguments).compute_ratio is None
    assert len(pipe(0, return_dict=False, **arguments)) == 1
    images, ratio = pipe(0, return_dict=False, output_compute_ratio=True, generator=generators(0), **arguments)
    output = pipe(0, output_compute_ratio=True, generator=generators(0), **arguments)
    assert torch.equal(images, output.images) and ratio == output.compute_ratio < 1
    assert pipe(0, output_compute_ratio=True, complete_model=True, **arguments).compute_ratio == 1.0


CACHES = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "MagCache": lambda pipe: MagCacheConfig(mag_ratios=[1.0] * 6, num_inference_steps=6, retention_ratio=0.2),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=["transformer_blocks"],
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


@pytest.mark.parametrize(
    "guidance", [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.9)}], ids=str
)
@pytest.mark.parametrize("name", CACHES)
def test_feature_caches(name, guidance):
    """They skip calls, and keep nothing from one batch size, or from one run, to the next."""
    pipe = make_pipeline()
    arguments = {"num_inference_steps": 6, **guidance}
    exact = draw(pipe, [0, 2], generator=generators(0, 1), **arguments)
    calls = []
    for block in pipe.transformer.transformer_blocks:
        block.attn.qkv.register_forward_hook(lambda *args: calls.append(1))
    draw(pipe, [0, 2], generator=generators(0, 1), **arguments)
    number_of_calls = len(calls)

    pipe.transformer.enable_cache(CACHES[name](pipe))
    del calls[:]
    cached = draw(pipe, [0, 2], generator=generators(0, 1), **arguments)
    assert 0 < len(calls) < number_of_calls
    assert torch.isfinite(cached).all() and not torch.equal(cached, exact)
    # a layer of random weights changes a lot from step to step
    assert (cached - exact).std() < 0.7 * exact.std()

    def callback(pipeline, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, [0, 2], callback_on_step_end=callback, **arguments)
    assert torch.equal(draw(pipe, [0, 2], generator=generators(0, 1), **arguments), cached)
    pipe.transformer.disable_cache()
    assert_close(draw(pipe, [0, 2], generator=generators(0, 1), **arguments), exact)


def test_cache_contexts(monkeypatch):
    pipe = make_pipeline()
    log = record(monkeypatch, pipe.transformer, "cache_context")
    draw(pipe, 1, num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.4, 0.8))
    assert [args for _, args, _ in log] == [("cond",), ("cond_uncond",), ("cond_uncond",), ("cond",)]


def test_lora_scale():
    peft = pytest.importorskip("peft")
    pipe = make_pipeline()
    plain = draw(pipe, [0, 2], generator=generators(0, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=8, target_modules=["qkv", "fc1"], init_lora_weights=False)
        )
    full = draw(pipe, [0, 2], generator=generators(0, 1))
    assert (full - plain).abs().max() > 0.01
    half = draw(pipe, [0, 2], generator=generators(0, 1), attention_kwargs={"scale": 0.5})
    assert pipe.attention_kwargs == {"scale": 0.5}
    expected = written_out_loop(
        pipe.transformer, pipe.scheduler, [0, 2], 3, 1.0, generators(0, 1), attention_kwargs={"scale": 0.5}
    )
    assert_close(half, expected)
    assert (half - full).abs().max() > 0.01
    assert_close(draw(pipe, [0, 2], generator=generators(0, 1), attention_kwargs={"scale": 0.0}), plain)


# Seeds and batches


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "name, eta",
    [("ODE Euler", 0.0), ("DDPM", 0.0), ("DDPM learned range", 0.0), ("DDIM", 1.0), ("DPM++ SDE", 0.0)],
)
def test_picture_of_a_seed_does_not_depend_on_its_batch(name, eta, scale):
    pipe = make_pipeline(SCHEDULERS[name]())
    labels, seeds = [2, 0, 1], [5, 6, 7]
    batch = draw(pipe, labels, generator=generators(*seeds), guidance_scale=scale, eta=eta)
    for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        alone = draw(pipe, label, generator=generators(seed), guidance_scale=scale, eta=eta)
        assert_close(batch[i : i + 1], alone)
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
    calls = record_labels(pipe)
    images = draw(pipe, num_images_per_prompt=2, generator=generators(0, 1))
    assert calls == [[3, 3]] * 3  # named, so that the model can prepare what depends on the label
    expected = written_out_loop(pipe.transformer, pipe.scheduler, [3, 3], 3, 1.0, generators(0, 1))
    assert_close(images, expected)


@pytest.mark.parametrize("name", ["ODE Euler", "DDPM learned range"])
def test_unconditional_model(name, monkeypatch):
    pipe = make_pipeline(SCHEDULERS[name](), **UNCONDITIONAL)
    prepared = record(monkeypatch, pipe.transformer, "prepare_timesteps")
    calls = record_labels(pipe)
    images = draw(pipe, num_images_per_prompt=2, generator=generators(0, 1))
    assert images.shape == (2, 3, 8, 8) and images.std() > 0.05
    assert calls == [None] * 3 and prepared[0][2]["class_labels"] is None
    assert_close(draw(pipe, generator=generators(1)), images[1:])


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
        bars.append(DynaDiTPipeline.progress_bar(pipe, *args, **kwargs))
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
        np.array([0, 1]),
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
    assert make_pipeline(id2label={str(label): name for label, name in LABELS.items()}).id2label == LABELS
    assert make_pipeline().id2label is None


def test_name_that_two_classes_share():
    pipe = make_pipeline(id2label={0: "crane, bird", 1: "crane", 2: "dog"})
    assert pipe.get_label_ids(["bird", "crane, bird"]) == [0, 0]
    with pytest.raises(ValueError, match=r"name 'crane', which the classes \[0, 1\] share. Give the label instead"):
        pipe("crane")


@pytest.mark.parametrize(
    "labels, error, message",
    [
        ("cow", ValueError, r"unknown class name 'cow'. No name in `id2label` is close to it"),
        ("dogs", ValueError, r"unknown class name 'dogs'. Close names: 'dog', 'dog house'\."),
        ("TABBY", ValueError, r"unknown class name 'TABBY'. Close names: 'tabby'"),
        (["cat", "doghouse"], ValueError, r"unknown class name 'doghouse'. Close names: 'dog house'"),
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
    with pytest.raises(ValueError, match=r"unknown class name 'cat'. The pipeline knows no names \(no `id2label`\)"):
        make_pipeline()("cat")
    # the null class, 3, has no name
    with pytest.raises(ValueError, match="has the label 3, but the model has 3 classes"):
        make_pipeline(id2label={3: "nothing"})("nothing")


# Outputs


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_output_types(channels, mode, learn_sigma):
    pipe = make_pipeline(in_channels=channels, learn_sigma=learn_sigma)

    def images(output_type):
        result = pipe([0, 1], num_inference_steps=2, generator=generators(0, 1), output_type=output_type)
        assert isinstance(result, DynaDiTPipelineOutput)
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
    wide = make_pipeline(sample_size=(4, 8))
    assert draw(wide, 0).shape == (1, 3, 4, 8)


def test_wide_picture_by_hand():
    pipe = make_pipeline()
    latents = randn(1, 3, 4, 12)
    with torch.no_grad():
        expected = latents - pipe.transformer(latents, 1000.0, torch.tensor([1])).sample[:, :3]
    assert_close(draw(pipe, 1, height=4, width=12, latents=latents, num_inference_steps=1), expected)


def test_no_gradient_and_no_change_of_the_components():
    pipe = make_pipeline()
    state = copy.deepcopy(pipe.transformer.state_dict())
    images = draw(pipe, 0, width_mult=0.5)
    assert not images.requires_grad and images.grad_fn is None
    assert not pipe.transformer.training
    assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())


# The VAE


@pytest.mark.parametrize("shift_factor", [None, 0.3])
def test_vae(shift_factor):
    vae = tiny_vae(shift_factor=shift_factor)
    pipe = make_pipeline(vae=vae, **LATENT)
    assert pipe.vae_scale_factor == 2
    latents = draw(pipe, [0, 1], generator=generators(0, 1))
    assert latents.shape == (2, 4, 8, 8)
    images = draw(pipe, [0, 1], generator=generators(0, 1), output_type="pt")
    with torch.no_grad():
        decoded = vae.decode(latents / 0.5 + (shift_factor or 0.0)).sample
    assert images.shape == (2, 3, 16, 16) and images.std() > 0.01
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    (image,) = pipe(0, height=12, width=32, num_inference_steps=1).images
    assert image.size == (32, 12) and image.mode == "RGB"


def test_vae_of_one_channel():
    pipe = make_pipeline(vae=tiny_vae(in_channels=1, out_channels=1), **LATENT)
    (image,) = pipe(0, num_inference_steps=1).images
    assert image.size == (16, 16) and image.mode == "L"


def test_vae_in_bfloat16():
    pipe = make_pipeline(vae=tiny_vae(), **LATENT)
    expected = draw(pipe, 0, generator=generators(0), output_type="pt")
    pipe.vae.to(torch.bfloat16)
    images = draw(pipe, 0, generator=generators(0), output_type="pt")
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=0.03)  # eight bits, through the decoder
    assert draw(pipe, 0, output_type="np").dtype == np.float32


def test_vae_that_does_not_fit():
    with pytest.raises(ValueError, match=r"`vae` has latents of 4 channels, but `transformer` takes 3. Use the VAE"):
        make_pipeline(vae=tiny_vae())


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
        time = pipe.scheduler.timesteps[2]
        velocity = pipe.transformer(torch.zeros(1, 3, 8, 8), time, torch.tensor([1])).sample[:, :3]
    assert_close(images, -velocity / 3)


def test_dynamic_shifting_is_refused():
    pipe = make_pipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="`use_dynamic_shifting`, whose `mu` no size of this model tells"):
        draw(pipe, 1)


def test_callback_switches_guidance_off():
    """As diffusers' callbacks do: from then on the class is drawn, in calls of its own."""
    pipe = make_pipeline()
    calls = record_labels(pipe)

    def switch_off(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
        return tensors

    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5, "generator": generators(0)}
    actual = draw(pipe, 1, callback_on_step_end=switch_off, **arguments)
    assert calls == [[1, 3], [1, 3], [1], [1]]
    arguments["generator"] = generators(0)
    assert_close(actual, draw(pipe, 1, guidance_interval=(0.6, 1.0), **arguments))


def test_callback_changes_the_scale_of_guidance():
    pipe = make_pipeline()

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = 4.0
        return tensors

    latents = state = randn(1, 3, 8, 8)
    with torch.no_grad():
        for time, scale in ((1.0, 2.0), (0.5, 4.0)):
            conditional = pipe.transformer(state, 1000 * time, torch.tensor([1])).sample[:, :3]
            null = pipe.transformer(state, 1000 * time, None).sample[:, :3]
            state = state - 0.5 * (null + scale * (conditional - null))
    actual = draw(pipe, 1, latents=latents, num_inference_steps=2, guidance_scale=2.0, callback_on_step_end=change)
    assert_close(actual, state)


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
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(dict(tensors)),  # returns nothing
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}, {}, {}]


# Precision, devices


def test_bfloat16_keeps_the_state_and_the_time_in_float32():
    pipe = make_pipeline()
    expected = draw(pipe, [0, 1], guidance_scale=2.0, generator=generators(0, 1), num_inference_steps=7)
    pipe.to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    dtypes, times = [], []

    def hook(module, args, output):
        dtypes.append((args[0].dtype, args[1].dtype))
        times.append(args[1].item())

    pipe.transformer.register_forward_hook(hook)

    def callback(pipeline, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)
        return tensors

    arguments = {"guidance_scale": 2.0, "num_inference_steps": 7, "callback_on_step_end": callback}
    actual = draw(pipe, [0, 1], generator=generators(0, 1), **arguments)
    assert set(dtypes) == {(torch.bfloat16, torch.float32), torch.float32}
    assert times == pytest.approx([1000 * (7 - i) / 7 for i in range(7)], rel=1e-6)  # 857.14, not 856
    assert actual.dtype == torch.float32
    # a state in bfloat16 would have no more than 8 significant bits
    assert not torch.equal(actual.bfloat16().float(), actual)
    # the velocity is bfloat16's, of two calls whose difference is doubled; now and then another token is chosen
    assert (actual - expected).abs().mean() < 0.05 * expected.std()
    assert draw(pipe, 0, output_type="np").dtype == np.float32


def test_bfloat16_starts_from_the_noise_of_float32():
    pipe = make_pipeline()
    pipe.to(torch.bfloat16)
    velocities = []
    pipe.transformer.register_forward_hook(
        lambda module, args, output: velocities.append(output.sample[:, :3].float())
    )
    images = draw(pipe, 0, num_inference_steps=1, generator=generators(3))
    assert torch.equal(images, randn(1, 3, 8, 8, seed=3) - velocities[0])


def test_layerwise_casting_in_the_pipeline():
    pipe = make_pipeline()
    pipe.to(torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    images = draw(pipe, [0, 1], guidance_scale=2.0)
    assert images.dtype == torch.float32 and torch.isfinite(images).all()
    assert pipe.transformer.transformer_blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without an accelerator")
def test_cpu_offload_needs_an_accelerator():
    pipe = make_pipeline()
    with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
        pipe.enable_model_cpu_offload()
    assert pipe.model_cpu_offload_seq == "transformer->vae"


def test_offload_hooks_on_cpu():
    """The hooks of the ways to offload, with the CPU as the device that they move the models to."""
    pipe = make_pipeline(vae=tiny_vae(), **LATENT)
    arguments = {"guidance_scale": 2.0, "output_type": "pt"}
    expected = draw(pipe, 0, generator=generators(0), **arguments)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        hook = pipe._all_hooks[0]
        assert len(pipe._all_hooks) == 2
        torch.testing.assert_close(draw(pipe, 0, generator=generators(0), **arguments), expected)
        assert pipe._all_hooks[0] is not hook  # the end of a call freed the models and put new hooks on them
    pipe.remove_all_hooks()

    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(draw(pipe, 0, generator=generators(0), **arguments), expected)


def test_sequential_offload_on_cpu():
    """A model whose weights are on the meta device but while a layer runs."""
    pipe = make_pipeline()
    expected = draw(pipe, 0, generator=generators(0), guidance_scale=2.0)
    cpu_offload(pipe.transformer, "cpu")
    assert pipe.transformer.pos_embed.proj.weight.device.type == "meta"
    assert_close(draw(pipe, 0, generator=generators(0), guidance_scale=2.0), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["none", "model", "sequential", "group"])
def test_offload_on_a_gpu(way):
    pipe = make_pipeline(vae=tiny_vae(), **LATENT)
    arguments = {"guidance_scale": 2.0, "output_type": "pt", "output_compute_ratio": True}
    expected = draw(pipe, [0, 1], generator=generators(0, 1), **arguments)
    if way == "none":
        pipe.to("cuda")
    elif way == "model":
        pipe.enable_model_cpu_offload()
    elif way == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level")
    for _ in range(2):
        images = draw(pipe, [0, 1], generator=generators(0, 1), **arguments)
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-2)  # TF32 in the VAE's convolutions


# Saving and loading


def test_save_and_load(tmp_path):
    pipe = make_pipeline(FlowMatchODEScheduler(solver="heun", shift=2.0), id2label=LABELS)
    expected = draw(pipe, ["tabby", 2], guidance_scale=2.0, generator=generators(0, 1))
    pipe.save_pretrained(tmp_path / "first")
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "DynaDiTPipeline",
        "id2label": {"0": "cat, tabby", "1": "dog", "2": "bird, dog house"},
        "scheduler": ["diffusers_dyna", "FlowMatchODEScheduler"],
        "transformer": ["diffusers_dyna", "DynaDiTTransformer2DModel"],
        "vae": [None, None],
    }

    for cls in (DynaDiTPipeline, DiffusionPipeline):
        with logged_warnings() as warnings:
            loaded = cls.from_pretrained(tmp_path / "first")
        assert warnings == []
        assert type(loaded) is DynaDiTPipeline and type(loaded.transformer) is DynaDiTTransformer2DModel
        assert loaded.id2label == pipe.id2label == LABELS and loaded.vae is None
        assert loaded.config.id2label == pipe.config.id2label
        loaded.set_progress_bar_config(disable=True)
        actual = draw(loaded, ["tabby", 2], guidance_scale=2.0, generator=generators(0, 1))
        assert torch.equal(actual, expected)

    loaded.save_pretrained(tmp_path / "second")
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in ("first", "second"))
        second.pop("_name_or_path", None)
        assert second == first
    files = [
        sorted(str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*"))
        for folder in ("first", "second")
    ]
    assert files[0] == files[1]


IN_A_FRESH_PROCESS = """
import sys, numpy, torch
from diffusers_dyna import DynaDiTPipeline
pipe = DynaDiTPipeline.from_pretrained(sys.argv[1])
generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
output = pipe(["tabby", 2], guidance_scale=2.0, num_inference_steps=3, generator=generator, output_type="np",
              output_compute_ratio=True)
numpy.savez(sys.argv[2], images=output.images, compute_ratio=output.compute_ratio)
"""


def test_load_in_a_fresh_process(tmp_path):
    """With a VAE; `tests/hub` has the pipeline without one, and the other ways to load it."""
    pipe = make_pipeline(vae=tiny_vae(), id2label=LABELS, **LATENT)
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np", "output_compute_ratio": True}
    expected = pipe(["tabby", 2], generator=generators(0, 1), **arguments)
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path / "model"), str(tmp_path / "drawn.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    with np.load(tmp_path / "drawn.npz") as drawn:
        # the number of threads may differ between the processes
        np.testing.assert_allclose(drawn["images"], expected.images, rtol=0, atol=1e-4)
        assert drawn["compute_ratio"] == pytest.approx(expected.compute_ratio)


@pytest.mark.parametrize("make_scheduler", [DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_save_and_load_with_a_scheduler_of_diffusers(make_scheduler, tmp_path):
    make_pipeline(make_scheduler(), **UNCONDITIONAL).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", make_scheduler.__name__] and index["id2label"] is None
    with logged_warnings() as warnings:
        loaded = DynaDiTPipeline.from_pretrained(tmp_path)
    assert warnings == []
    assert type(loaded.scheduler) is make_scheduler and loaded.id2label is None
    # components can be given, in the place of what is saved
    scheduler = FlowMatchODEScheduler()
    assert DynaDiTPipeline.from_pretrained(tmp_path, scheduler=scheduler).scheduler is scheduler


def test_load_in_bfloat16(tmp_path):
    make_pipeline(id2label=LABELS).save_pretrained(tmp_path)
    loaded = DynaDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.transformer.transformer_blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert draw(loaded, "dog").dtype == torch.float32


def test_components_and_from_pipe():
    pipe = make_pipeline(id2label=LABELS, vae=tiny_vae(), **LATENT)
    assert set(pipe.components) == {"transformer", "scheduler", "vae"}
    other = DynaDiTPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer and other.vae is pipe.vae and other.id2label == LABELS
    names = set(inspect.signature(DynaDiTPipeline.__init__).parameters) - {"self"}
    assert names == {"transformer", "scheduler", "vae", "id2label"}


def test_every_argument_of_a_call_is_documented():
    for method in (DynaDiTPipeline.__call__, DynaDiTPipeline.__init__):
        doc = method.__doc__ or DynaDiTPipeline.__doc__
        for name in inspect.signature(method).parameters:
            assert name == "self" or f"            {name} (" in doc or f"        {name} (" in doc, name


# What is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"height": 9},
            r"`height` and `width` must be divisible by 2 \(`patch_size` 2 x scale factor 1 of the VAE\), "
            "but are 9 and 8",
        ),
        ({"width": 9}, r"`height` and `width` must be .* 8 and 9"),
        ({"height": 0}, "`height`=0 must be a whole number, at least 1"),
        ({"num_inference_steps": 0}, r"`num_inference_steps`=0 must be a whole number, at least 1"),
        ({"num_inference_steps": 2.5}, r"`num_inference_steps`=2.5 must be a whole number"),
        ({"num_inference_steps": None}, r"`num_inference_steps`=None must be a whole number"),
        ({"eta": 1.5}, r"`eta`=1.5 must be in \[0, 1\]"),
        ({"eta": -0.1}, r"`eta`=-0.1 must be in \[0, 1\]"),
        ({"num_images_per_prompt": 0}, r"`num_images_per_prompt`=0 must be a whole number, at least 1"),
        ({"output_type": "jpg"}, r"`output_type`='jpg' must be 'pil', 'np', 'pt' or 'latent'"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
            r"`callback_on_step_end_tensor_inputs` has \['noise'\], but only \['latents'\]",
        ),
        (
            {"class_labels": None, "guidance_scale": 2.0},
            r"`guidance_scale`=2.0 needs `class_labels` and a transformer",
        ),
        ({"guidance_interval": (0.8, 0.2)}, r"`guidance_interval`=\(0.8, 0.2\) must be two noise levels in \[0, 1\]"),
        ({"guidance_interval": (0.2, 800)}, r"`guidance_interval`=\(0.2, 800\) must be two noise levels"),
        ({"guidance_interval": (0.2, 0.4, 0.8)}, r"`guidance_interval`=.* must be two noise levels"),
        (
            {"guidance_channels": 0},
            r"`guidance_channels`=0 must be a number of channels from 1 to 3. Use None for all",
        ),
        ({"guidance_channels": 4}, r"`guidance_channels`=4 must be a number of channels from 1 to 3"),
        ({"guidance_channels": 1.5}, r"`guidance_channels`=1.5 must be a number of channels"),
        ({"width_mult": 0.0}, r"`width_mult`=0.0 must be in \(0, 1\]"),
        ({"width_mult": 1.5}, r"`width_mult`=1.5 must be in \(0, 1\]"),
        ({"generator": generators(0, 1)}, r"`generator` is a list of 2, but 1 images are to be drawn"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"`latents` must have shape \(1, 3, 8, 8\), but has shape \(2, 3"),
        ({"latents": torch.zeros(1, 3, 8, 10)}, r"`latents` must have shape \(1, 3, 8, 8\)"),
        ({"sigmas": [1.0], "timesteps": [1000.0]}, r"Only one of `timesteps` or `sigmas` can be passed"),
    ],
)
@pytest.mark.parametrize("name", ["ODE Euler", "FlowMatchEulerDiscrete"])
def test_wrong_inputs(arguments, message, name):
    pipe = make_pipeline(SCHEDULERS[name]())
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": 0, "num_inference_steps": 2, **arguments})
    assert pipe.transformer.width_mult == 1.0


def test_wrong_inputs_for_the_transformer_at_hand():
    with pytest.raises(ValueError, match="`class_labels` were given, but the transformer is unconditional"):
        make_pipeline(**UNCONDITIONAL)(0)
    with pytest.raises(ValueError, match="needs `class_labels` and a transformer trained with a null class"):
        make_pipeline(**UNCONDITIONAL)(guidance_scale=2.0)
    no_null = make_pipeline(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`class_labels` must be given: the transformer has 3 classes and no null"):
        no_null()
    with pytest.raises(ValueError, match="`guidance_scale`=1.5 needs .* null class.*Use `guidance_scale=1`"):
        no_null(0, guidance_scale=1.5)
    with pytest.raises(ValueError, match=r"`output_type`='pil' needs 1 or 3 channels, but the transformer draws 4"):
        make_pipeline(**LATENT)(0)
    large = make_pipeline(vae=tiny_vae(), patch_size=4, **LATENT)
    with pytest.raises(ValueError, match=r"divisible by 8 \(`patch_size` 4 x scale factor 2 of the VAE\).* 16 and 20"):
        large(0, width=20)
    with pytest.raises(ValueError, match=r"`latents` must have shape \(1, 4, 8, 8\), but has shape \(1, 4, 16, 16\)"):
        large(0, latents=torch.zeros(1, 4, 16, 16))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variance_that_the_transformer_does_not_predict(variance_type):
    pipe = make_pipeline(DDPMScheduler(variance_type=variance_type), learn_sigma=False)
    message = f"`variance_type`='{variance_type}', but the transformer predicts no variance .*fixed variance"
    with pytest.raises(ValueError, match=message):
        pipe(0)


def test_learned_variance_of_the_multistep_solvers():
    """diffusers' cut the model's output to three channels, so that latents of four break in their arithmetic."""
    config = DDPMScheduler(variance_type="learned_range").config
    pipe = make_pipeline(DPMSolverMultistepScheduler.from_config(config), **LATENT)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler takes a learned variance with 3 channels only"):
        draw(pipe, 0)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, variance_type=None)
    assert torch.isfinite(draw(pipe, 0)).all()


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


def test_a_transformer_in_training_mode():
    pipe = make_pipeline()
    pipe.transformer.train()
    with pytest.raises(ValueError, match="`transformer` is in training mode, .* Call `pipe.transformer.eval"):
        pipe([0], num_inference_steps=1)
