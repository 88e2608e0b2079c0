# SPDX-License-Identifier: Apache-2.0
"""The schedulers in pipelines of diffusers, at random size, in the place of the scheduler that they come with."""

import pytest
import torch

from diffusers import (
    AutoencoderKL,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from diffusers_dyna import FlowMatchODEScheduler, FlowMatchSDEScheduler

from ..testing_utils import EULER_KEEPS_GIVEN_TIMES, randn


STEPS = 3
SIGMAS = [1.0, 2 / 3, 1 / 3]


def build(seed: int, model_class, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(**config).eval()


class StableDiffusion3:
    gives_generator = False  # to `step`: the noise of an SDE comes from the global one
    grid, time_unit = {"sigmas": SIGMAS}, 1

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
    grid, time_unit = {"sigmas": SIGMAS, "mu": 0.5 - 240 * 0.65 / 3840}, 1000  # 16 tokens; `mu` is 0.5 at 256

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
    grid, time_unit = {"sigmas": SIGMAS}, 1

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
    grid, time_unit = {"sigmas": SIGMAS}, 1

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


class CogView4:
    """It gives `sigmas`, which are shifted, and `timesteps`, which the model is told."""

    gives_generator = False
    grid, time_unit = {"sigmas": [1, 0.5, 0.001], "timesteps": [1000, 500, 1], "mu": 0.25 + 0.75 * 4 / 16}, 1

    def __init__(self):
        self.model = build(
            0, CogView4Transformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
            attention_head_dim=8, num_attention_heads=2, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
        )
        self.pipe = CogView4Pipeline(
            transformer=self.model, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None
        )
        self.arguments = {
            "prompt_embeds": randn(1, 16, 16), "negative_prompt_embeds": randn(1, 16, 16, seed=1),
            "latents": randn(1, 4, 8, 8), "height": 64, "width": 64,
        }  # fmt: skip


PIPELINES = [StableDiffusion3, Flux, Sana, PixArt, CogView4]


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda pipeline: pipeline.__name__)
def case(request):
    case = request.param()
    case.pipe.set_progress_bar_config(disable=True)
    case.original = case.pipe.scheduler
    return case


def run(case, scheduler, **arguments) -> tuple[torch.Tensor, list]:
    """The latents, and input, time and output of each model call."""
    calls = []

    def record(model, args, kwargs, output):
        sample = args[0] if args else kwargs["hidden_states"]
        calls.append((sample, kwargs["timestep"] * case.time_unit, output[0]))

    torch.manual_seed(0)
    handle = case.model.register_forward_hook(record, with_kwargs=True)
    case.pipe.scheduler = scheduler
    try:
        latents = case.pipe(
            **{**case.arguments, "num_inference_steps": STEPS, **arguments},
            output_type="latent",
            **({"generator": torch.Generator().manual_seed(0)} if case.gives_generator else {}),
        ).images
    finally:
        handle.remove()
    assert latents.isfinite().all()
    return latents, calls


def replay(scheduler, sample: torch.Tensor, calls: list) -> torch.Tensor:
    """A loop by hand with the recorded outputs of the model, whose inputs must be those of the pipeline."""
    for timestep, (model_input, time, output) in zip(scheduler.timesteps[-len(calls) :], calls, strict=True):
        torch.testing.assert_close(model_input, sample)
        torch.testing.assert_close(time, timestep.expand(len(sample)))
        sample = scheduler.step(output, timestep, sample).prev_sample
    return sample


needs_given_times = pytest.mark.skipif(not EULER_KEEPS_GIVEN_TIMES, reason="needs diffusers 0.42")


@pytest.mark.parametrize(
    "case", [StableDiffusion3, Flux, Sana, pytest.param(CogView4, marks=needs_given_times)], indirect=True
)
def test_euler_is_diffusers_euler(case):
    expected, expected_calls = run(case, FlowMatchEulerDiscreteScheduler.from_config(case.original.config))
    actual, calls = run(case, FlowMatchODEScheduler.from_config(case.original.config))
    assert len(calls) == len(expected_calls) in (STEPS, 2 * STEPS)  # CogView4 calls twice for guidance
    # the schedulers agree bit for bit; two evaluations of a network agree to rounding
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # and back
    back = FlowMatchEulerDiscreteScheduler.from_config(FlowMatchODEScheduler.from_config(case.original.config).config)
    torch.testing.assert_close(run(case, back)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "solver, expected_calls",
    [("euler", 3), ("heun", 5), ("midpoint", 6), ("rk4", 11), ("ab2", 3), ("ab3", 3), ("abm3", 3), ("multistep", 3)],
)
def test_other_solvers(case, solver, expected_calls):
    """The pipeline gives the scheduler the calls of a loop by hand, and the model what the scheduler returns."""
    config = case.original.config
    if "timesteps" in case.grid and expected_calls != STEPS:
        with pytest.raises(ValueError, match="`sigmas` and `timesteps` have 3 and 3 entries, .* Give one of them"):
            run(case, FlowMatchODEScheduler.from_config(config, solver=solver))
        return
    actual, calls = run(case, FlowMatchODEScheduler.from_config(config, solver=solver), guidance_scale=1.0)
    assert len(calls) == expected_calls
    scheduler = FlowMatchODEScheduler.from_config(config, solver=solver)
    scheduler.set_timesteps(**case.grid)
    torch.testing.assert_close(actual, replay(scheduler, case.arguments["latents"], calls))
    euler, _ = run(case, FlowMatchODEScheduler.from_config(config), guidance_scale=1.0)
    assert torch.equal(actual, euler) == (solver == "euler")


@pytest.mark.parametrize("steps, begin", [(5, 2), (2, 0)])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4), ("abm3", 1)])
def test_image_to_image(solver, order, steps, begin):
    """A latent image is noised to a time of the grid, and integrated from there."""
    case = StableDiffusion3()
    vae = build(0, AutoencoderKL, block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    case.pipe = StableDiffusion3Img2ImgPipeline(**{**case.pipe.components, "vae": vae})
    case.pipe.set_progress_bar_config(disable=True)
    image = case.arguments.pop("latents")
    del case.arguments["sigmas"]  # of which the pipeline counts the calls as steps
    arguments = {
        "image": image, "strength": 0.6 if begin else 1.0, "num_inference_steps": steps, "height": 8, "width": 8,
        "guidance_scale": 1.0,
    }  # fmt: skip

    def noised(scheduler):
        torch.manual_seed(0)  # as `run`
        return scheduler.scale_noise(image, scheduler.timesteps[begin * scheduler.order], torch.randn(image.shape))

    actual, calls = run(case, FlowMatchODEScheduler(shift=3.0, solver=solver), **arguments)
    scheduler = FlowMatchODEScheduler(shift=3.0, solver=solver)
    scheduler.set_timesteps(steps)
    assert len(calls) == len(scheduler.timesteps) - begin * order
    torch.testing.assert_close(actual, replay(scheduler, noised(scheduler), calls))
    if solver == "euler":
        arguments["sigmas"] = [1 - i / steps for i in range(steps)]  # diffusers' default grid is another
        expected, _ = run(case, FlowMatchEulerDiscreteScheduler(shift=3.0), **arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver, expected_calls", [("euler", 3), ("heun", 5)])
def test_sde(case, solver, expected_calls):
    config = case.original.config
    if "timesteps" in case.grid and expected_calls != STEPS:
        with pytest.raises(ValueError, match="`sigmas` and `timesteps` have 3 and 3 entries, .* Give one of them"):
            run(case, FlowMatchSDEScheduler.from_config(config, solver=solver))
        return
    actual, calls = run(case, FlowMatchSDEScheduler.from_config(config, solver=solver))
    assert len(calls) in (expected_calls, 2 * expected_calls)
    again, _ = run(case, FlowMatchSDEScheduler.from_config(config, solver=solver))
    torch.testing.assert_close(again, actual, rtol=1e-5, atol=1e-5)
    without_noise, _ = run(case, FlowMatchSDEScheduler.from_config(config, solver=solver, diffusion_norm=0.0))
    assert (without_noise - actual).abs().max() > 0.1


@pytest.mark.parametrize("case", [StableDiffusion3, Flux, Sana, CogView4], indirect=True)
def test_user_callback_wins(case):
    """A callback that replaces the latents at each step, as inpainting does. PixArt's pipeline takes none."""
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
