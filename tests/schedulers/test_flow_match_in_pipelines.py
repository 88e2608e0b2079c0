# SPDX-License-Identifier: Apache-2.0
"""The schedulers in pipelines of diffusers, at random size, in the place of the scheduler that they come with."""

import inspect

import pytest
import torch

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from diffusers_dyna import FlowMatchODEScheduler, FlowMatchSDEScheduler

from ..testing_utils import randn


STEPS = 3
SIGMAS = [1.0, 2 / 3, 1 / 3]


def build(seed: int, model_class, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(**config).eval()


class StableDiffusion3:
    gives_generator = False  # to `step`: the noise of an SDE comes from the global one

    def __init__(self):
        self.model = build(
            0, SD3Transformer2DModel, sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
            out_channels=4,
        )  # fmt: skip
        self.pipe = StableDiffusion3Pipeline(
            transformer=self.model, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
            tokenizer_3=None,
        )  # fmt: skip
        self.arguments = {
            "prompt_embeds": randn(1, 5, 32), "pooled_prompt_embeds": randn(1, 64),
            "negative_prompt_embeds": randn(1, 5, 32, seed=1), "negative_pooled_prompt_embeds": randn(1, 64, seed=1),
            "latents": randn(1, 4, 8, 8), "height": 64, "width": 64, "sigmas": SIGMAS,
        }  # fmt: skip


class Flux:
    gives_generator = False

    def __init__(self):
        self.model = build(
            0, FluxTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )  # fmt: skip
        self.pipe = FluxPipeline(
            transformer=self.model, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None,
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        )  # fmt: skip
        self.arguments = {
            "prompt_embeds": randn(1, 5, 32), "pooled_prompt_embeds": randn(1, 32),
            "latents": randn(1, 16, 4), "height": 64, "width": 64,
        }  # fmt: skip


class Sana:
    gives_generator = True

    def __init__(self):
        self.model = build(
            0, SanaTransformer2DModel, patch_size=1, in_channels=4, out_channels=4, num_layers=1,
            num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
            cross_attention_dim=8, caption_channels=8, sample_size=8,
        )  # fmt: skip
        self.pipe = SanaPipeline(
            transformer=self.model, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
            text_encoder=None, tokenizer=None,
        )  # fmt: skip
        self.arguments = {
            "prompt_embeds": randn(1, 5, 8), "prompt_attention_mask": torch.ones(1, 5),
            "negative_prompt": None, "negative_prompt_embeds": randn(1, 5, 8, seed=1),
            "negative_prompt_attention_mask": torch.ones(1, 5), "use_resolution_binning": False,
            "latents": randn(1, 4, 8, 8), "height": 256, "width": 256, "sigmas": SIGMAS,
        }  # fmt: skip


class PixArt:
    """Its scheduler is not a flow's, and diffusers' flow schedulers lack what the pipeline asks of one."""

    gives_generator = True

    def __init__(self):
        self.model = build(
            0, PixArtTransformer2DModel, sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
            num_attention_heads=3, caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=4,
            attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, use_additional_conditions=False,
        )  # fmt: skip
        self.pipe = PixArtAlphaPipeline(
            transformer=self.model, scheduler=FlowMatchODEScheduler(), vae=None, text_encoder=None, tokenizer=None
        )
        self.arguments = {
            "prompt_embeds": randn(1, 5, 32), "prompt_attention_mask": torch.ones(1, 5),
            "negative_prompt": None, "negative_prompt_embeds": randn(1, 5, 32, seed=1),
            "negative_prompt_attention_mask": torch.ones(1, 5), "use_resolution_binning": False,
            "latents": randn(1, 4, 8, 8), "height": 64, "width": 64, "sigmas": SIGMAS,
        }  # fmt: skip


PIPELINES = [StableDiffusion3, Flux, Sana, PixArt]


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda pipeline: pipeline.__name__)
def case(request):
    case = request.param()
    case.pipe.set_progress_bar_config(disable=True)
    case.original = case.pipe.scheduler
    return case


def run(case, scheduler) -> tuple[torch.Tensor, int]:
    """The latents and the number of model calls."""
    calls = []
    torch.manual_seed(0)
    handle = case.model.register_forward_hook(lambda *_: calls.append(None))
    case.pipe.scheduler = scheduler
    try:
        latents = case.pipe(
            **case.arguments,
            num_inference_steps=STEPS,
            output_type="latent",
            **({"generator": torch.Generator().manual_seed(0)} if case.gives_generator else {}),
        ).images
    finally:
        handle.remove()
    assert latents.isfinite().all()
    return latents, len(calls)


def test_euler_is_diffusers_euler(case):
    if isinstance(case.original, FlowMatchODEScheduler):
        pytest.skip("this pipeline does not take diffusers' flow schedulers")
    expected, expected_calls = run(case, FlowMatchEulerDiscreteScheduler.from_config(case.original.config))
    actual, calls = run(case, FlowMatchODEScheduler.from_config(case.original.config))
    assert calls == expected_calls == STEPS
    # the schedulers agree bit for bit; two evaluations of a network agree to rounding
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # and back
    back = FlowMatchEulerDiscreteScheduler.from_config(FlowMatchODEScheduler.from_config(case.original.config).config)
    torch.testing.assert_close(run(case, back)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "solver, expected_calls",
    [("heun", 5), ("midpoint", 6), ("rk4", 11), ("ab2", 3), ("ab3", 3), ("abm3", 3), ("multistep", 3)],
)
def test_other_solvers(case, solver, expected_calls):
    euler, _ = run(case, FlowMatchODEScheduler.from_config(case.original.config))
    actual, calls = run(case, FlowMatchODEScheduler.from_config(case.original.config, solver=solver))
    assert calls == expected_calls
    assert not torch.equal(actual, euler)
    # three steps of a random network: nearer to Euler than Euler to its start; another sign would be twice as far
    assert (actual - euler).square().mean() < 0.6 * (euler - case.arguments["latents"]).square().mean()


@pytest.mark.parametrize("solver, expected_calls", [("euler", 3), ("heun", 5)])
def test_sde(case, solver, expected_calls):
    config = case.original.config
    actual, calls = run(case, FlowMatchSDEScheduler.from_config(config, solver=solver))
    assert calls == expected_calls
    again, _ = run(case, FlowMatchSDEScheduler.from_config(config, solver=solver))
    torch.testing.assert_close(again, actual, rtol=1e-5, atol=1e-5)
    without_noise, _ = run(case, FlowMatchSDEScheduler.from_config(config, solver=solver, diffusion_norm=0.0))
    assert (without_noise - actual).abs().max() > 0.1


def test_user_callback_wins(case):
    """A callback that replaces the latents at each step, as inpainting does."""
    if "callback_on_step_end" not in inspect.signature(case.pipe.__call__).parameters:
        pytest.skip("this pipeline has no such callback")
    case.pipe.scheduler = FlowMatchODEScheduler.from_config(case.original.config, solver="abm3")
    target = torch.full_like(case.arguments["latents"], 0.25)
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        return {"latents": target if i == STEPS - 1 else kwargs["latents"]}

    latents = case.pipe(
        **case.arguments, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=callback
    ).images
    assert seen == list(range(STEPS)) and torch.equal(latents, target)
