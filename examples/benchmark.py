# SPDX-License-Identifier: Apache-2.0
"""
Times this package beside diffusers, and the dynamic transformer beside its static form.

    make bench          (or: python examples/benchmark.py)
    python examples/benchmark.py --only static dynamic
    python examples/benchmark.py --only caches --pipeline outputs/dit-0.6

Each pair runs in alternation in one process. A ratio is the median over the rounds of (reference time / our time) of the
same round, so that a slow moment of the machine meets both; above 1 ours is faster.

Prints Markdown tables and writes `bench.json`, in which a call replaces only the sections that it ran. Weights are
random, the routers set to a budget (`set_routers`); only `caches` needs a trained pipeline. On a CPU the transformers
have fewer layers than the public sizes, which each row states; on a GPU they have all.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from diffusers import (
    DiTTransformer2DModel,
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    UNet2DModel,
)

from diffusers_dyna import DynaDiTPipeline, DynaDiTTransformer2DModel, DynaUNet2DModel, FlowMatchODEScheduler
from diffusers_dyna.conversion import convert_diffusers_dit
from diffusers_dyna.models import DYNA_DIT_CONFIGS, transformer_dyna_dit
from diffusers_dyna.models.transformer_dyna_dit import GATE_TEMPERATURE
from diffusers_dyna.training.budget import budget_loss
from diffusers_dyna.training.loop import describe_environment, write_json


MIN_ROUNDS = 5
NUM_STEPS, GUIDANCE_SCALE = 20, 4.0
TIMED_STEPS = range(8, 12)  # of the schedule's, where not all are timed; neighbours, as in a trajectory
LAYERS_ON_CPU = {"S": 6, "B": 6, "XL": 4}
QUICK_SIZES = {"S": (4, 8), "B": (8, 8), "XL": (8, 16)}  # heads, channels of a head
# The least ratio (reference time / our time) that is asked for, and the largest share of a step for the decisions.
TARGETS = {"static": 1.05, "realised": 1.0, "pipeline": 2.2, "training": 1 / 1.15, "overhead": 0.02}
PLAN_CAPS = (2**30, 2**27)  # bytes; the first is the default of `prepare_timesteps`
STEPS_WITH_CACHES = (20, 8, 4)
CACHES = {
    "none": None,
    "FirstBlockCache": lambda steps, ratios: FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda steps, ratios: MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios),
    "TaylorSeer": lambda steps, ratios: TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32),
    "TaylorSeer lite": lambda steps, ratios: TaylorSeerCacheConfig(
        cache_interval=3, taylor_factors_dtype=torch.float32, use_lite_mode=True
    ),
}


# Measuring


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    ours: Callable[[], None],
    reference: Callable[[], None],
    rounds: int,
    warmup: int = 2,
    max_seconds: float = math.inf,
) -> dict:
    """
    Times two callables in turn; every other round starts with the other one.

    Args:
        ours (`Callable`): what is measured.
        reference (`Callable`): what it is compared with.
        rounds (`int`): timed rounds of both.
        warmup (`int`, defaults to `2`): rounds before them that are not timed.
        max_seconds (`float`, defaults to no limit): after this time no round begins, once there are `MIN_ROUNDS`.

    Returns:
        `dict` with the medians `ours` and `reference` in seconds, `ratio`, and its quartiles `ratio_q1`, `ratio_q3`.
    """
    seconds = {ours: [], reference: []}
    end = time.perf_counter() + max_seconds
    for i in range(warmup + rounds):
        if i >= warmup + MIN_ROUNDS and time.perf_counter() > end:
            break
        for function in (ours, reference) if i % 2 else (reference, ours):
            start = time.perf_counter()
            function()
            synchronize()
            if i >= warmup:
                seconds[function].append(time.perf_counter() - start)
    ratios = [theirs / mine for theirs, mine in zip(seconds[reference], seconds[ours], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ours": statistics.median(seconds[ours]),
        "reference": statistics.median(seconds[reference]),
        "ratio": statistics.median(ratios),
        "ratio_q1": quartiles[0],
        "ratio_q3": quartiles[2],
        "rounds": len(ratios),
    }


def compare(ours: Callable[[], None], reference: Callable[[], None], args, target: float | None = None) -> dict:
    """`alternate` as the command line says; with a target for the ratio, whether it is met."""
    row = alternate(ours, reference, args.rounds, warmup=1, max_seconds=args.max_seconds)
    return row if target is None else {**row, "target": target, "met": row["ratio"] >= target}


def median_seconds(function: Callable[[], None], rounds: int) -> float:
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def deviation(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the reference."""
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).abs().max() / reference.std()).item()


def linear_flops(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(input_shape) * weight_shape[0]


def counted_macs(function: Callable[[], None], batch_size: int) -> float:
    """Multiply-accumulates per sample that torch saw. What runs on CPUs only, its counter must be told of."""
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda query, key, value, *args, out_shape=None, **kwargs: sdpa_flop(query, key, value)
        )
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        mapping[torch.ops.mkldnn._linear_pointwise] = linear_flops
    if hasattr(torch.ops.mkl, "_mkl_linear"):
        # the packed weight, which has no shape of its own, and the original
        mapping[torch.ops.mkl._mkl_linear] = lambda x, packed, weight, *args, **kwargs: linear_flops(x, weight)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops() / 2 / batch_size


# Models and their inputs


def public_config(size: str, num_tokens: int, args) -> dict:
    """The config of a public size with patches of 2 x 2, at another number of tokens, with the layers of this run."""
    config = {**DYNA_DIT_CONFIGS[f"DiT-{size}/2"], "sample_size": 2 * math.isqrt(num_tokens)}
    if args.quick:
        config["num_attention_heads"], config["attention_head_dim"] = QUICK_SIZES[size]
    if args.layers or args.quick or args.device == "cpu":
        config["num_layers"] = args.layers or (2 if args.quick else LAYERS_ON_CPU[size])
    return config


def cast(model: DynaDiTTransformer2DModel, dtype: torch.dtype, device: str) -> DynaDiTTransformer2DModel:
    """As `from_pretrained` with `torch_dtype`: what decisions hang on stays in float32."""
    torch.nn.Module.to(model, device, dtype)  # the model's own warns of what is mended below
    model.eval()
    for name, module in model.named_modules():
        if name.split(".")[-1] in model._keep_in_fp32_modules:
            module.float()
    return model


def make_model(size: str, num_tokens: int, dtype: torch.dtype, args, **config) -> DynaDiTTransformer2DModel:
    """A transformer with torch's own random weights: with those that training starts from it would return zeros."""
    torch.manual_seed(0)
    model = DynaDiTTransformer2DModel(**{**public_config(size, num_tokens, args), **config})
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d)):
            module.reset_parameters()
    return cast(model, dtype, args.device)


def make_pair(size: str, num_tokens: int, dtype: torch.dtype, args) -> tuple:
    """diffusers' DiT with its own random weights, and ours that was converted from it: `(ours, reference)`."""
    torch.manual_seed(0)
    config = public_config(size, num_tokens, args)
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "patch_size", "in_channels")
    reference = DiTTransformer2DModel(
        **{name: config[name] for name in names},
        out_channels=2 * config["in_channels"],
        num_embeds_ada_norm=config["num_classes"],
    ).eval()
    first, *others = reference.transformer_blocks
    for block in others:  # trained ones are equal
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    ours = cast(convert_diffusers_dit(reference), dtype, args.device)
    return ours, torch.nn.Module.to(reference, args.device, dtype)


def schedule(device: str) -> torch.Tensor:
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(NUM_STEPS, device=device)
    return scheduler.timesteps


def make_inputs(model, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and labels of which every other one is the null class, as guidance has them."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    sample = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    labels = torch.tensor([207, 1000]).repeat(batch_size)[:batch_size]
    return sample.to(model.device, model.dtype), labels.to(model.device)


def describe(size: str, model, batch_size: int) -> dict:
    config = model.config
    all_layers = DYNA_DIT_CONFIGS[f"DiT-{size}/2"]["num_layers"]
    return {
        "model": f"{size}/2, {config.num_layers} of {all_layers} layers",
        "input": f"{batch_size} x {(config.sample_size // config.patch_size) ** 2}",
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def set_routers(model: DynaDiTTransformer2DModel, timesteps: torch.Tensor, budget: float, seed: int = 0) -> None:
    """
    Draws routers whose decisions vary with timestep and layer, and shifts them until the mean compute ratio is the
    budget. Heads, channel groups and tokens all take part: one shift moves the logits of all three, those of the tokens
    half a unit above the others, and a second, small one of the tokens alone makes up for counts being whole.

    Args:
        model (`DynaDiTTransformer2DModel`): a model in capacity mode. Only its routers change.
        timesteps (`torch.Tensor` of shape `(num_timesteps,)`): times over which the mean is taken, at least 2.
        budget (`float`): mean compute ratio, in (0, 1).
        seed (`int`, defaults to `0`): of the routers.

    Raises:
        `RuntimeError`: if the mean is not within 0.005 of the budget.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def curves(size: int) -> torch.Tensor:
        """Slow in the time, as trained routers are, so that neighbouring steps often share a decision; (times, size)."""
        phases = torch.rand(2, size, generator=generator)
        return draw(size) * torch.cos(math.pi * (timesteps.cpu()[:, None] / 1000 * (0.5 + phases[0]) + 2 * phases[1]))

    times = model.config.timestep_scale * timesteps.float() + model.config.timestep_shift
    temb = model.time_embedding(model.time_proj(times)).cpu()
    centre, common = temb.mean(dim=0), curves(1)
    inverse = torch.linalg.pinv(temb - centre)
    routers = []  # with their first biases, and what one unit of shift is
    for block in model.transformer_blocks:
        for router in (block.attn_rate, block.mlp_rate, block.token_rate):
            is_token, size = router is block.token_rate, router.out_features
            spread = 0.6 if is_token else 0.6 * GATE_TEMPERATURE
            logits = spread * (common + curves(1) + curves(size))
            weight = (inverse @ (logits - logits.mean(dim=0))).T
            router.weight.copy_(weight)
            bias = spread * (draw(1) + draw(size)) - weight @ centre + 0.5 * is_token
            routers.append((router, bias.to(model.device), is_token))

    def mean_ratio(shift: float, token_shift: float) -> float:
        for router, bias, is_token in routers:
            router.bias.copy_(bias + (shift + token_shift if is_token else GATE_TEMPERATURE * shift))
        return model.predict_compute_ratio(timesteps).mean().item()

    def bisect(function: Callable[[float], float]) -> float:
        low, high = -10.0, 10.0
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (low, middle) if function(middle) > budget else (middle, high)
        return low

    shift = bisect(lambda value: mean_ratio(value, 0.0))
    reached = mean_ratio(shift, bisect(lambda value: mean_ratio(shift, value)))
    if abs(reached - budget) > 0.005:
        raise RuntimeError(f"The routers reach a compute ratio of {reached:.3f} instead of {budget}.")


def trajectory(model, timesteps, inputs, complete_model: bool = False, steps=None) -> Callable[[], torch.Tensor]:
    """A callable that makes calls of prepared timesteps, all on the same sample, and returns the last output."""
    sample, labels = inputs
    steps = range(len(timesteps)) if steps is None else steps

    @torch.no_grad()
    def run():
        for step in steps:
            model.set_plan_step(step)
            torch.compiler.cudagraph_mark_step_begin()
            output = model(sample, timesteps[step], labels, complete_model=complete_model).sample
        return output.clone()  # the next call of a CUDA graph writes to the same memory

    return run


@torch.no_grad()
def decisions(model, timesteps, inputs, steps=None) -> dict:
    """What the prepared calls computed: masks of `(calls * batch_size, layers, ...)`, and the mean compute ratio."""
    outputs = []
    for step in range(len(timesteps)) if steps is None else steps:
        model.set_plan_step(step)
        outputs.append(model(inputs[0], timesteps[step], inputs[1], output_masks=True))
    return {
        "heads": torch.cat([output.attn_masks for output in outputs]),
        "groups": torch.cat([output.mlp_masks for output in outputs]),
        "tokens": torch.cat([output.token_masks for output in outputs]),
        "compute_ratio": torch.cat([output.compute_ratio for output in outputs]).mean().item(),
    }


@torch.no_grad()
def macs(model, timestep: torch.Tensor, inputs) -> dict:
    """
    Multiply-accumulates of one unprepared call per sample, as the model says and as torch counts them, without the rows
    that fill up the MLP's on a CPU.
    """
    model.clear_plan()
    sample, labels = inputs
    masks = model(sample, timestep, labels, output_masks=True)
    with patch.object(transformer_dyna_dit, "_fill_up", lambda count, batch_size, device: count):
        row = {
            "static_macs": model.compute_macs()["total"],
            "static_macs_counted": counted_macs(
                lambda: model(sample, timestep, labels, complete_model=True), len(sample)
            ),
            "dynamic_macs": model.compute_macs(masks=masks)["total"],
            "dynamic_macs_counted": counted_macs(lambda: model(sample, timestep, labels), len(sample)),
        }
    row["macs_agree"] = all(abs(row[f"{k}_macs_counted"] / row[f"{k}_macs"] - 1) < 0.01 for k in ("static", "dynamic"))
    return row


def static_row(size: str, ours, reference, batch_size: int, args) -> dict:
    sample, labels = make_inputs(ours, batch_size)
    timestep = schedule(args.device)[7]

    @torch.no_grad()
    def run_ours():
        torch.compiler.cudagraph_mark_step_begin()
        return ours(sample, timestep, labels, complete_model=True).sample.clone()

    @torch.no_grad()
    def run_reference():
        torch.compiler.cudagraph_mark_step_begin()
        return reference(sample, timestep.expand(batch_size), labels).sample.clone()

    return {
        "what": "static model, one call",
        "against": "diffusers' DiT",
        **describe(size, ours, batch_size),
        **compare(run_ours, run_reference, args, TARGETS["static"]),
        "deviation": deviation(run_ours(), run_reference()),
    }


def dynamic_row(size: str, model, batch_size: int, budget: float, args, steps: Sequence[int] = TIMED_STEPS) -> dict:
    """Some calls of a schedule that is prepared as a whole, as the pipeline does; `overhead` has what preparing costs."""
    timesteps, inputs = schedule(args.device), make_inputs(model, batch_size)
    set_routers(model, timesteps, budget)
    model.prepare_timesteps(timesteps, inputs[1])
    dynamic, static = (trajectory(model, timesteps, inputs, form, steps) for form in (False, True))
    timed = compare(dynamic, static, args)
    masks = decisions(model, timesteps, inputs, steps)
    compute_ratio = masks.pop("compute_ratio")
    return {
        "what": f"dynamic at {budget}, {len(steps)} of {len(timesteps)} calls",
        "against": "the same, static",
        **describe(size, model, batch_size),
        **timed,
        "compute_ratio": compute_ratio,
        "realised": timed["ratio"] * compute_ratio,
        "target": TARGETS["realised"],
        "met": timed["ratio"] * compute_ratio >= TARGETS["realised"],
        **{name: mask.mean().item() for name, mask in masks.items()},
        # how many different numbers of heads, groups and tokens the layers of these calls had
        "mixed_widths": [len(mask.sum(dim=2).unique()) for mask in masks.values()],
        "plan_mb": model.plan_bytes / 1e6,
        **macs(model, timesteps[0], inputs),
    }


# Sections: each returns its rows, and the first line of its docstring is printed above its table


def bench_unet(args) -> list[dict]:
    """The reference configuration, 10 classes, beside `diffusers.UNet2DModel` of the same shape and weights."""
    torch.manual_seed(0)
    device = args.device
    reference = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
        num_class_embeds=10,
    ).to(device)
    ours = DynaUNet2DModel(num_classes=10).to(device)
    # All but the first layer of the time embedding, which takes 256 features instead of 64.
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("time_embedding.linear_1")}
    ours.load_state_dict(weights, strict=False)

    def train_step(model):
        batch = torch.randn(2, 32, 3, 32, 32, device=device)
        timesteps, labels = 1000 * torch.rand(32, device=device), torch.randint(10, (32,), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step():
            model.train()
            F.mse_loss(model(batch[0], timesteps, labels).sample, batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def sample(model):
        noise, labels = torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)
        scheduler = FlowMatchODEScheduler()

        @torch.no_grad()
        def draw():
            model.eval()
            state = noise
            scheduler.set_timesteps(5, device=device)
            for t in scheduler.timesteps:
                state = scheduler.step(model(state, t, labels).sample, t, state).prev_sample

        return draw

    rows = []
    for what, make in (("U-Net training step, batch 32", train_step), ("U-Net sampling, batch 16, 5 steps", sample)):
        row = {"what": what, "against": "UNet2DModel", "dtype": "float32"}
        rows.append({**row, **alternate(make(ours), make(reference), args.rounds)})
    return rows


def bench_import(args) -> list[dict]:
    """Imports in fresh processes; the second row is what one pays for any pipeline of diffusers."""

    def run(statement):
        return lambda: subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)

    rows = []
    for statement in ("import diffusers", "from diffusers import DiffusionPipeline"):
        timed = alternate(run("import diffusers_dyna"), run(statement), args.import_rounds, warmup=1)
        rows.append({"what": "import diffusers_dyna", "against": f"`{statement}`", **timed})
    return rows


def bench_static(args) -> list[dict]:
    """The complete model beside diffusers' DiT with the same weights; deviation in standard deviations of the output."""
    dtypes = (torch.float32, torch.bfloat16)
    return [static_row("XL", *make_pair("XL", args.tokens[0], dtype, args), 2, args) for dtype in dtypes]


def bench_dynamic(args) -> list[dict]:
    """What is skipped beside what is gained: realised is speed-up x compute ratio, 1 is all of it."""
    rows = []
    for size in ("S", "B", "XL"):
        for num_tokens in args.tokens:
            model = make_model(size, num_tokens, torch.float32, args)
            rows += [dynamic_row(size, model, batch, budget, args) for batch in (1, 2, 8) for budget in (0.7, 0.5)]
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("XL", args.tokens[0], dtype, args)
        rows += [dynamic_row("XL", model, 2, budget, args, range(NUM_STEPS)) for budget in (0.7, 0.5)]
    return rows


def bench_pipeline(args) -> list[dict]:
    """One guided image in 20 steps, decisions and plan included, beside diffusers' DiT in `DiTPipeline`'s loop."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        ours, reference = make_pair("XL", args.tokens[0], dtype, args)
        set_routers(ours, schedule(args.device), 0.5)
        pipe = DynaDiTPipeline(ours, FlowMatchODEScheduler())
        pipe.set_progress_bar_config(disable=True)
        latents = make_inputs(ours, 1)[0]

        def draw(**options):
            arguments = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE, "latents": latents}
            return pipe([207], output_type="latent", **arguments, **options)

        def draw_reference():
            return diffusers_loop(reference, latents)

        for what, target, options in (
            ("pipeline at 0.5", TARGETS["pipeline"], {}),
            ("pipeline, static", None, {"complete_model": True}),
        ):
            row = {"what": what, "against": "diffusers' DiT", **describe("XL", ours, 2)}
            row |= compare(lambda: draw(**options), draw_reference, args, target)
            row["compute_ratio"] = draw(**options, output_compute_ratio=True).compute_ratio
            if options:
                row["deviation"] = deviation(draw(**options).images, draw_reference())
            rows.append(row)
    return rows


@torch.no_grad()
def diffusers_loop(model: DiTTransformer2DModel, latents: torch.Tensor) -> torch.Tensor:
    """What `DiTPipeline` does with guidance, up to the VAE, with our scheduler."""
    scheduler, num_channels = FlowMatchODEScheduler(), model.config.in_channels
    labels = torch.tensor([207, 1000], device=latents.device)
    scheduler.set_timesteps(NUM_STEPS, device=latents.device)
    latents = torch.cat([latents] * 2)
    for t in scheduler.timesteps:
        half = latents[: len(latents) // 2]
        latents = torch.cat([half, half])
        output = model(latents, timestep=t[None].expand(len(latents)), class_labels=labels).sample
        eps, rest = output[:, :num_channels], output[:, num_channels:]
        cond_eps, uncond_eps = torch.split(eps, len(eps) // 2)
        half_eps = uncond_eps + GUIDANCE_SCALE * (cond_eps - uncond_eps)
        output = torch.cat([torch.cat([half_eps, half_eps]), rest], dim=1)
        latents = scheduler.step(torch.split(output, num_channels, dim=1)[0], t, latents).prev_sample
    return latents.chunk(2)[0]


def bench_training(args) -> list[dict]:
    """A training step of the masked form with the budget loss beside one of the static form, AdamW included."""
    rows = []
    for size, config in (("B", {}), ("XL", {"num_layers": 2})):
        for batch_size in (2, 8):
            model = make_model(size, args.tokens[0], torch.float32, args, **config)
            set_routers(model, schedule(args.device), 0.5)
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            sample, labels = make_inputs(model, batch_size)
            target = torch.randn(batch_size, model.out_channels, *sample.shape[2:]).to(sample)
            timesteps = torch.linspace(50, 950, batch_size, device=args.device)

            def step(complete_model):
                output = model(sample, timesteps, labels, complete_model, output_masks=not complete_model)
                loss = F.mse_loss(output.sample, target)
                if not complete_model:
                    ratio = output.compute_ratio
                    loss = loss + 2 * budget_loss(ratio, ratio.detach().mean(), 0.5)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            timed = compare(lambda: step(False), lambda: step(True), args, TARGETS["training"])
            row = {"what": "training step, masked", "against": "the same, static", **describe(size, model, batch_size)}
            rows.append({**row, **timed, "masked_over_static": 1 / timed["ratio"]})
    return rows


def bench_overhead(args) -> list[dict]:
    """
    What deciding and preparing add to 20 calls at 0.5, and their share of these calls.

    `decisions` is `prepare_timesteps` without labels: all routers of all steps. `scoring` is that of the tokens and their
    order, in the layers that leave out any. `decision_share` is the sum of both. `filling` is what a new plan's cut weights
    take, with `sets_per_layer` of heads and of groups. `plan_share` is all of it: preparing, the modulations of all steps
    included, scoring and filling; `net_share` is that without the modulations, which the static model has to compute too,
    in its calls.
    """
    model = make_model("XL", args.tokens[0], torch.float32, args)
    timesteps, inputs = schedule(args.device), make_inputs(model, 2)
    set_routers(model, timesteps, 0.5)
    run = trajectory(model, timesteps, inputs)
    num_tokens, dim = (model.config.sample_size // 2) ** 2, model.proj_out.in_features
    tokens = torch.randn(2, num_tokens, dim).to(inputs[0])
    conditioning = torch.randn(2, dim).to(inputs[0])

    def prepare():
        model.prepare_timesteps(timesteps, inputs[1])

    @torch.no_grad()
    def score():
        for block in model.transformer_blocks:
            block.token_selection(tokens).argsort(dim=1, descending=True, stable=True)

    @torch.no_grad()
    def modulate():
        for block in model.transformer_blocks:
            block.modulation(conditioning)

    decided = median_seconds(lambda: model.prepare_timesteps(timesteps), args.rounds)
    prepared = median_seconds(prepare, args.rounds)
    modulations = median_seconds(modulate, args.rounds) * len(timesteps)
    masks = decisions(model, timesteps, inputs)
    num_scored = (masks["tokens"][::2] == 0).any(dim=2).sum().item()  # over calls and layers
    scoring = median_seconds(score, args.rounds) * num_scored / len(model.transformer_blocks)
    fillings = []
    for _ in range(args.rounds):
        prepare()
        fillings.append(walk_plan(model) - walk_plan(model, again=True))
    filling = statistics.median(fillings)
    calls = median_seconds(run, args.rounds)
    num_sets = [sum(len(layer.unique(dim=0)) for layer in masks[name].unbind(1)) for name in ("heads", "groups")]
    row = {
        **describe("XL", model, 2),
        "calls_seconds": calls,
        "decisions_seconds": decided,
        "scoring_seconds": scoring,
        "prepare_seconds": prepared,
        "static_modulations_seconds": modulations,
        "filling_seconds": filling,
        "sets_per_layer": [round(number / len(model.transformer_blocks), 1) for number in num_sets],
        "plan_mb": model.plan_bytes / 1e6,
        "decision_share": (decided + scoring) / calls,
        "plan_share": (prepared + filling + scoring) / calls,
        "net_share": (prepared + filling + scoring - modulations) / calls,
        "target": TARGETS["overhead"],
    }
    return [{**row, "met": max(row["decision_share"], row["net_share"]) <= row["target"]}]


@torch.no_grad()
def walk_plan(model: DynaDiTTransformer2DModel, again: bool = False) -> float:
    """Seconds for the cut weights of all layers at all prepared steps in turn; `again`: of those that are there."""
    store, seconds = model._plan.cut_weights, 0.0
    for decisions_of_step in model._plan.decisions:
        for block, decision in zip(model.transformer_blocks, decisions_of_step, strict=True):
            (_, heads), (_, groups) = decision.heads[0], decision.groups[0]
            for layer, active in zip(block._cut_layers(), (heads, heads, groups, groups), strict=True):
                if again:
                    store.get(layer, active, ())
                start = time.perf_counter()
                store.get(layer, active, ())
                synchronize()
                seconds += time.perf_counter() - start
    return seconds


def bench_memory(args) -> list[dict]:
    """Peak memory of 20 calls in fresh processes: the dynamic form may take the cap of its plan more."""

    def measure(*arguments):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_memory, *arguments, args).result()

    rows, static = [], measure(1.0, PLAN_CAPS[0])
    for cap in PLAN_CAPS:
        dynamic = measure(0.5, cap)
        row = {"what": "20 calls at 0.5", **static["row"], "static_mb": static["mb"], "dynamic_mb": dynamic["mb"]}
        row |= {"plan_mb": dynamic["plan_mb"], "cap_mb": cap / 1e6}
        is_met = row["dynamic_mb"] <= row["static_mb"] + row["cap_mb"] and row["plan_mb"] <= row["cap_mb"]
        rows.append({**row, "met": is_met})
    return rows


def peak_memory(budget: float, cap: int, args) -> dict:
    """To be called in a process of its own. A budget of 1 is the static form."""
    torch.set_num_threads(args.threads)
    model = make_model("XL", args.tokens[0], torch.float32, args)
    timesteps, inputs = schedule(args.device), make_inputs(model, 2)
    if budget < 1:
        set_routers(model, timesteps, budget)
        model.prepare_timesteps(timesteps, inputs[1], max_plan_bytes=cap)
    trajectory(model, timesteps, inputs, complete_model=budget == 1)()
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        # Not `ru_maxrss`, which a process inherits from the one that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {"row": describe("XL", model, 2), "mb": peak / 1e6, "plan_mb": model.plan_bytes / 1e6}


def bench_caches(args) -> list[dict]:
    """Feature caches and few steps on a trained pipeline; deviations are relative L2 distances of the latents."""
    pipe, cached = (DynaDiTPipeline.from_pretrained(args.pipeline).to(args.device) for _ in range(2))
    config = pipe.transformer.config
    has_guidance = config.num_classes is not None and pipe.transformer.null_class_label is not None
    labels = None if config.num_classes is None else [i % config.num_classes for i in range(8)]

    def draw(pipe, steps, **options):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options |= {"generator": generator, "output_type": "latent"}
        options |= {"num_images_per_prompt": 8} if labels is None else {}
        scale = GUIDANCE_SCALE if has_guidance else 1.0
        return pipe(labels, num_inference_steps=steps, guidance_scale=scale, **options).images

    def distance(images, expected):
        return ((images - expected).norm() / expected.norm()).item()

    rows, images = [], {}
    for steps in STEPS_WITH_CACHES:  # the most first
        for form in ("static", "dynamic"):
            options = {"complete_model": form == "static"}
            ratios = calibrate(cached, lambda: draw(cached, steps, **options), steps)
            for name, make_config in CACHES.items():
                if make_config is not None:
                    cached.transformer.enable_cache(make_config(steps, ratios))
                images[name] = draw(cached, steps, **options)
                timed = compare(
                    lambda: draw(cached, steps, **options), lambda: draw(pipe, steps, complete_model=True), args
                )
                if make_config is not None:
                    cached.transformer.disable_cache()
                if not rows:
                    longest, longest_seconds = images[name], timed["ours"]
                rows.append(
                    {
                        "what": f"{form}, {steps} steps",
                        "cache": name,
                        "against": "static, as many steps, no cache",
                        **timed,
                        "over_static_20_steps": longest_seconds / timed["ours"],
                        "from_uncached": distance(images[name], images["none"]),
                        "from_static_20_steps": distance(images[name], longest),
                    }
                )
    return rows


def calibrate(pipe: DynaDiTPipeline, run: Callable[[], None], steps: int) -> list[float]:
    """The ratios of MagCache, which it prints at the end of a run."""
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run()
    pipe.transformer.disable_cache()
    return json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))


def bench_compile(args) -> list[dict]:
    """Repeated blocks compiled (fullgraph) beside eager: steady calls, the first calls, and the graphs that were made."""
    rows = []
    timesteps = schedule(args.device)
    dtype, modes = torch.float32, (None,)
    if args.device == "cuda":
        dtype, modes = torch.bfloat16, (None, "reduce-overhead")
    for mode in modes:
        for complete_model in (True, False):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            eager, compiled = (make_model("XL", args.tokens[0], dtype, args) for _ in range(2))
            inputs = make_inputs(eager, 2)
            for model in (eager, compiled):
                set_routers(model, timesteps, 0.5)
            compiled.compile_repeated_blocks(fullgraph=True, mode=mode)
            for model in (eager, compiled):
                model.prepare_timesteps(timesteps, inputs[1])
            run_eager, run = (
                trajectory(model, timesteps, inputs, complete_model, TIMED_STEPS) for model in (eager, compiled)
            )
            start = time.perf_counter()
            output = run()
            synchronize()
            first_seconds = time.perf_counter() - start
            rows.append(
                {
                    "what": f"{'static' if complete_model else 'dynamic at 0.5'}, {len(TIMED_STEPS)} calls, compiled",
                    "against": "eager",
                    "mode": mode or "default",
                    **describe("XL", eager, 2),
                    **compare(run, run_eager, args),
                    "first_calls_seconds": first_seconds,
                    "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
                    "deviation": deviation(output, run_eager()),
                }
            )
    return rows


def bench_gpu(args) -> list[dict]:
    """All layers of XL in bfloat16, eager, compiled and with CUDA graphs: static beside diffusers', dynamic beside static."""
    rows = []
    for mode, name in ((None, ""), ("default", ", compiled"), ("reduce-overhead", ", CUDA graphs")):
        ours, reference = make_pair("XL", args.tokens[0], torch.bfloat16, args)
        if mode is not None:
            torch._dynamo.reset()
            ours.compile_repeated_blocks(fullgraph=True, mode=mode)
            for block in reference.transformer_blocks:  # diffusers' DiT does not name its repeated blocks
                block.compile(fullgraph=True, mode=mode)
        for batch_size in (1, 8, 32):
            of_batch = [static_row("XL", ours, reference, batch_size, args)]
            of_batch += [dynamic_row("XL", ours, batch_size, budget, args) for budget in (0.7, 0.5)]
            rows += [{**row, "what": row["what"] + name} for row in of_batch]
    return rows


def bench_curve(args) -> list[dict]:
    """Time of the dynamic form over that of the static form, by compute ratio; drawn into `curve.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="ideal")
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("XL", args.tokens[0], dtype, args)
        of_dtype = [dynamic_row("XL", model, 2, budget / 10, args) for budget in range(3, 10)]
        times = [1 / row["ratio"] for row in of_dtype]
        axes.plot([row["compute_ratio"] for row in of_dtype], times, marker="o", label=of_dtype[0]["dtype"])
        rows += of_dtype
    axes.set(xlabel="compute ratio", ylabel="time / time of the static form", xlim=(0, 1), ylim=(0, None))
    axes.set_title(f"{rows[0]['model']}, {rows[0]['input']} tokens")
    axes.legend()
    figure.savefig(args.output_dir / "curve.png", dpi=150)
    plt.close(figure)
    return rows


SECTIONS = {
    "unet": bench_unet,
    "import": bench_import,
    "static": bench_static,
    "dynamic": bench_dynamic,
    "pipeline": bench_pipeline,
    "training": bench_training,
    "overhead": bench_overhead,
    "memory": bench_memory,
    "caches": bench_caches,
    "compile": bench_compile,
    "gpu": bench_gpu,
    "curve": bench_curve,
}


def find_missing(args) -> dict[str, str]:
    """The sections that cannot run here, and what they need."""
    missing = {}
    if args.pipeline is None:
        missing["caches"] = "`--pipeline` with the folder of a trained DynaDiTPipeline"
    if args.device != "cuda":
        missing["gpu"] = "a CUDA device"
        if not Path("/proc/self/status").exists():
            missing["memory"] = "Linux, or a CUDA device"
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            missing["compile"] = "a C++ compiler"
    if importlib.util.find_spec("matplotlib") is None:
        missing["curve"] = "matplotlib: pip install matplotlib"
    return missing


# Results

HEADINGS = {"ours": "ours (s)", "reference": "reference (s)", "ratio": "ratio (quartiles)"}
MACS = ("static_macs", "static_macs_counted", "dynamic_macs", "dynamic_macs_counted")
JSON_ONLY = ("ratio_q1", "ratio_q3", "rounds", *MACS)


def print_table(rows: list[dict]) -> None:
    """A Markdown table with a column for every key of the rows but those of `JSON_ONLY`."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in JSON_ONLY]
    headings = [HEADINGS.get(key, key.replace("_seconds", " (s)").replace("_mb", " (MB)")) for key in keys]
    print("| " + " | ".join(headings).replace("_", " ") + " |")
    print("|---" * len(keys) + "|")
    for row in rows:
        print("| " + " | ".join(format_cell(key, row) for key in keys) + " |")


def format_cell(key: str, row: dict) -> str:
    value = row.get(key, "")
    if key == "ratio" and key in row:
        return f"**{value:.2f}** ({row['ratio_q1']:.2f} - {row['ratio_q3']:.2f})"
    if isinstance(value, list):
        return " / ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="Default: all that can run."
    )
    parser.add_argument("--rounds", type=int, default=15, help="Timed rounds of each pair, at least 2. Default: 15.")
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=60,
        help=f"Time of a pair of transformers after which it is not repeated beyond {MIN_ROUNDS} rounds. Default: 60.",
    )
    parser.add_argument("--import_rounds", type=int, default=5, help="Fresh processes of each kind. Default: 5.")
    parser.add_argument(
        "--layers", type=int, help=f"Of every transformer. Default: {LAYERS_ON_CPU} on a CPU, else all."
    )
    parser.add_argument("--pipeline", type=Path, help="Folder of a trained DynaDiTPipeline, for the section caches.")
    parser.add_argument("--quick", action="store_true", help="Tiny models and few rounds: whether everything runs.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads. Default: all cores.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"), help="Default: outputs/bench.")
    args = parser.parse_args()
    if args.rounds < 2 or args.import_rounds < 2:
        parser.error("`--rounds` and `--import_rounds` must be at least 2: a row has quartiles.")
    torch.set_num_threads(args.threads)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.tokens = (16, 64) if args.quick else (256, 1024)
    if args.quick:
        args.rounds, args.import_rounds = 2, 2

    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "bench.json"
    sections = json.loads(path.read_text()).get("sections", {}) if path.exists() else {}
    missing = find_missing(args)
    for name in args.only:
        if name in missing:
            print(f"Section {name} is left out: it needs {missing[name]}.\n")
            continue
        rows = SECTIONS[name](args)
        environment = describe_environment(Path(__file__).parent)
        sections[name] = {"rows": rows, "threads": args.threads, "quick": args.quick, **environment}
        write_json(path, {"sections": sections})
        print(f"### {name}\n\n{SECTIONS[name].__doc__.strip().splitlines()[0]}\n")
        print_table(rows)
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        print(f"\n{environment['hardware']}, {versions}, commit {environment['commit']}.\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
