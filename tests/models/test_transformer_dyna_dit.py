# SPDX-License-Identifier: Apache-2.0
"""
`DynaDiTTransformer2DModel` against outputs of the public DyDiT code, against `diffusers.DiTTransformer2DModel` with the
same weights, against the model written out with loops, and its three forms against each other.
"""

import collections
import copy
import gc
import inspect
import json
import math
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diffusers import AutoModel, DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed

from diffusers_dyna import DYNA_DIT_CONFIGS, DynaDiTTransformer2DModel
from diffusers_dyna.models import transformer_dyna_dit
from diffusers_dyna.models.transformer_dyna_dit import (
    DynaDiTTransformer2DModelOutput,
    DynaLinear,
    DynaMLP,
    DynaQKVLinear,
    _capacity_gates,
    _capacity_token_gates,
    _keep_places,
    _linear,
    _threshold_gates,
    round_to_nearest,
)

from ..testing_utils import (
    TINY_DIT,
    UNCONDITIONAL,
    assert_mixed,
    counted_macs,
    dit_inputs,
    mixed_dyna_dit,
    randn,
    stored_bytes,
    tiny_dyna_dit,
)


# Two orders of summation of the same float32 products, through three layers with outputs of order 5.
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
# Angles of up to 900, rounded to float32 in another order, are 6e-5 apart; the layers amplify it.
SINUSOIDS = {"rtol": 1e-3, "atol": 1e-3}
MODES = ("capacity", "threshold")
GOLDEN = Path(__file__).parents[1] / "data" / "dydit_tiny.safetensors"


@torch.no_grad()
def run(model: torch.nn.Module, arguments: dict, **overrides) -> DynaDiTTransformer2DModelOutput:
    """The form that a user gets: skipping in evaluation mode."""
    return model(**{**arguments, **overrides})


def run_masked(model: torch.nn.Module, arguments: dict, **overrides) -> DynaDiTTransformer2DModelOutput:
    with torch.enable_grad():
        return model(**{**arguments, **overrides})


def assert_same_masks(actual, expected) -> None:
    for name in ("attn_masks", "mlp_masks", "token_masks", "compute_ratio"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-6, msg=name)


# The public DyDiT code as oracle


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    names = {
        "x_embedder.": "pos_embed.",
        "t_embedder.mlp.0": "time_embedding.linear_1",
        "t_embedder.mlp.2": "time_embedding.linear_2",
        "y_embedder.embedding_table": "class_embedding",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "attn.proj": "attn.to_out.0",
        "adaLN_modulation.1": "modulation",
        "_rate.router": "_rate",
        "mlp_head.0": "linear_1",
        "mlp_head.2": "linear_2",
    }
    state = {}
    for name, value in tensors.items():
        if name.startswith("state.") and name != "state.pos_embed":
            name = name.removeprefix("state.")
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            name = "transformer_" + name if name.startswith("blocks.") else name
            # DiT's last modulation has the shift first, AdaLayerNormContinuous the scale
            state[name] = value.roll(len(value) // 2, 0) if name.startswith("norm_out.") else value
    model = DynaDiTTransformer2DModel(
        **{**TINY_DIT, "attention_head_dim": 16, "num_classes": 10}, router_mode="threshold"
    )
    model.load_state_dict(state, strict=True)
    arguments = {
        "hidden_states": tensors["input.x"],
        "timestep": tensors["input.t"],
        "class_labels": tensors["input.y"],
    }
    return model.eval(), arguments, tensors


def assert_golden(output, tensors, name: str) -> None:
    torch.testing.assert_close(output.sample, tensors[f"out.{name}"], rtol=0, atol=1e-5)
    masks = name.replace("dynamic", "mask")
    assert torch.equal(output.attn_masks, tensors[f"{masks}.attn"])
    assert torch.equal(output.mlp_masks, tensors[f"{masks}.mlp"])
    assert torch.equal(output.token_masks, tensors[f"{masks}.token"].squeeze(-1))


def test_golden_inputs(golden):
    """What the data covers: several timesteps in a batch, the null class, outputs that are not small."""
    _, arguments, tensors = golden
    assert len(arguments["timestep"].unique()) > 1
    assert (arguments["class_labels"] == 10).any()
    assert (tensors["out.dynamic"] - tensors["out.complete"]).abs().max() > 0.1


def test_golden_complete(golden):
    model, arguments, tensors = golden
    for call in (run, run_masked):
        actual = call(model, arguments, complete_model=True).sample
        torch.testing.assert_close(actual, tensors["out.complete"], rtol=0, atol=1e-5)


def test_golden_positions(golden):
    model, _, tensors = golden
    torch.testing.assert_close(model.pos_embed.positions, tensors["state.pos_embed"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", [run, run_masked], ids=["skipping", "masked"])
def test_golden_dynamic(golden, call):
    model, arguments, tensors = golden
    output = call(model, arguments, output_masks=True)
    assert_mixed(output, timesteps_differ=True)
    assert_golden(output, tensors, "dynamic")
    arguments = {**arguments, "timestep": torch.full_like(arguments["timestep"], 640)}
    output = call(model, arguments, output_masks=True)
    assert_mixed(output, timesteps_differ=False)
    assert_golden(output, tensors, "dynamic_t640")


@pytest.mark.parametrize("max_plan_bytes", [2**30, 9000, 1])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("step", [1, None])
def test_golden_prepared(golden, max_plan_bytes, with_labels, step):
    model, arguments, tensors = golden
    labels = arguments["class_labels"] if with_labels else None
    same_time = {**arguments, "timestep": torch.full_like(arguments["timestep"], 640)}
    model.prepare_timesteps(torch.tensor([900.0, 640.0, 20.0]), labels, max_plan_bytes=max_plan_bytes)
    try:
        for _ in range(2):  # the second call finds the weights cut
            model.set_plan_step(step)
            assert_golden(run(model, same_time, output_masks=True), tensors, "dynamic_t640")
            # times that were not prepared, several in one batch
            assert_golden(run(model, arguments, output_masks=True), tensors, "dynamic")
    finally:
        model.clear_plan()


# diffusers' DiT as oracle


@pytest.fixture(scope="module")
def static_pair():
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=0.5,
    ).eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    state = theirs.state_dict()
    embedder = "transformer_blocks.0.norm1.emb."
    renamed = {
        f"time_embedding.{name}": state[f"{embedder}timestep_embedder.{name}"]
        for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    }
    renamed["class_embedding.weight"] = state[f"{embedder}class_embedder.embedding_table.weight"]
    for kind in ("weight", "bias"):
        renamed[f"pos_embed.proj.{kind}"] = state[f"pos_embed.proj.{kind}"]
        renamed[f"proj_out.{kind}"] = state[f"proj_out_2.{kind}"]
        shift, scale = state[f"proj_out_1.{kind}"].chunk(2)
        renamed[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        for i in range(2):
            prefix = f"transformer_blocks.{i}."
            qkv = [state[f"{prefix}attn1.to_{name}.{kind}"] for name in "qkv"]
            renamed[f"{prefix}attn.qkv.{kind}"] = torch.cat(qkv)
            renamed[f"{prefix}attn.to_out.0.{kind}"] = state[f"{prefix}attn1.to_out.0.{kind}"]
            renamed[f"{prefix}mlp.fc1.{kind}"] = state[f"{prefix}ff.net.0.proj.{kind}"]
            renamed[f"{prefix}mlp.fc2.{kind}"] = state[f"{prefix}ff.net.2.{kind}"]
            renamed[f"{prefix}modulation.{kind}"] = state[f"{prefix}norm1.linear.{kind}"]
    ours = DynaDiTTransformer2DModel(**{**TINY_DIT, "num_layers": 2}, downscale_freq_shift=1, mlp_norm_eps=0.5)
    missing, unexpected = ours.load_state_dict(renamed, strict=False)
    assert unexpected == [] and all("rate." in name or "token_selection" in name for name in missing)
    return theirs, ours.eval()


@pytest.mark.parametrize("size", [8, 12, 4], ids=["native", "larger", "smaller"])
def test_complete_is_diffusers_dit(static_pair, size):
    theirs, ours = static_pair
    arguments = dit_inputs(size=(size, size))
    arguments["timestep"] = torch.tensor([0, 501, 999])
    with torch.no_grad():
        expected = theirs(**arguments).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(run(ours, arguments, complete_model=True).sample, expected, **CLOSE)


@pytest.mark.parametrize("size", [(4, 12), (12, 4), (6, 10), (8, 8)])
def test_positions_are_those_of_patch_embed(size):
    model = tiny_dyna_dit()
    theirs = PatchEmbed(height=8, width=8, patch_size=2, in_channels=4, embed_dim=32)
    theirs.proj.load_state_dict(model.pos_embed.proj.state_dict())
    sample = randn(2, 4, *size)
    # both round angles of up to 8 to float32, in another order
    torch.testing.assert_close(model.pos_embed(sample), theirs(sample), rtol=1e-5, atol=1e-5)


def test_positions_of_a_native_size_that_is_not_square():
    """Its own positions are whole numbers, rows apart from columns; half the size has every second one."""
    model = tiny_dyna_dit(sample_size=(8, 16))
    positions = model.pos_embed.positions.unflatten(1, (4, 8))[0]
    frequencies = 10000 ** (-torch.arange(8, dtype=torch.float64) / 8)
    for i in range(4):
        for j in range(8):
            expected = torch.cat([function(k * frequencies) for k in (j, i) for function in (torch.sin, torch.cos)])
            torch.testing.assert_close(positions[i, j], expected.float(), rtol=0, atol=1e-6)
    half = model.pos_embed._make_positions(2, 4).unflatten(1, (2, 4))[0]
    torch.testing.assert_close(half, positions[::2, ::2], rtol=0, atol=1e-6)


# The model written out with loops as oracle


def top(scores: list[float], count: int) -> list[float]:
    """1 for the `count` highest; among equals the first."""
    chosen = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [float(i in chosen) for i in range(len(scores))]


def written_out(model, hidden_states, timestep, class_labels, complete_model=False, width=1.0):
    """The whole model, image by image and head by head. Returns the samples and the masks of heads, groups, tokens."""
    config, state = model.config, model.state_dict()
    heads, width_of_head, patch = config.num_attention_heads, config.attention_head_dim, config.patch_size
    dim = heads * width_of_head
    active = max(round(heads * width), 1)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, eps=1e-6):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()

    def group_mask(name, temb):
        logits = linear(name, temb).tolist()
        if complete_model:
            mask = [1.0] * heads
        elif config.router_mode == "threshold":
            mask = [1.0] + [float(logit > 0) for logit in logits]
        else:
            total = sum(1 / (1 + math.exp(-logit / 5)) for logit in logits)
            mask = [1.0] + top(logits, round(total))
        return [on * (i < active) for i, on in enumerate(mask)]

    samples, all_masks = [], []
    for image, time, label in zip(hidden_states, timestep.tolist(), class_labels.tolist(), strict=True):
        rows, columns = image.shape[1] // patch, image.shape[2] // patch
        tokens = model.pos_embed(image[None])[0]
        time = config.timestep_scale * time + config.timestep_shift
        angles = time * 10000 ** (-torch.arange(128, dtype=torch.float32) / 128)
        temb = linear("time_embedding.linear_1", torch.cat([angles.cos(), angles.sin()]))
        temb = linear("time_embedding.linear_2", F.silu(temb))
        embedding = temb + state["class_embedding.weight"][label]
        masks = []
        for i in range(config.num_layers):
            block = f"transformer_blocks.{i}."
            modulation = linear(f"{block}modulation", F.silu(embedding)).view(6, dim)
            attn_mask = group_mask(f"{block}attn_rate", temb)
            mlp_mask = group_mask(f"{block}mlp_rate", temb)
            x = norm(tokens) * (1 + modulation[1]) + modulation[0]
            qkv = linear(f"{block}attn.qkv", x).view(-1, 3, heads, width_of_head)
            outputs = []
            for head in range(heads):
                query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
                if config.qk_norm == "layer_norm":
                    query = norm(query) * state[f"{block}attn.norm_q.weight"] + state[f"{block}attn.norm_q.bias"]
                    key = norm(key) * state[f"{block}attn.norm_k.weight"] + state[f"{block}attn.norm_k.bias"]
                if config.qk_norm == "rms_norm":
                    query = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                    key = key / (key.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                    query, key = query * state[f"{block}attn.norm_q.weight"], key * state[f"{block}attn.norm_k.weight"]
                weights = torch.softmax(query @ key.T / math.sqrt(width_of_head), dim=-1)
                outputs.append(attn_mask[head] * (weights @ value))
            tokens = tokens + modulation[2] * linear(f"{block}attn.to_out.0", torch.cat(outputs, dim=-1))

            scores = F.relu(linear(f"{block}token_selection.linear_1", tokens))
            scores = linear(f"{block}token_selection.linear_2", scores)[:, 0].tolist()
            if complete_model:
                token_mask = [1.0] * len(scores)
            elif config.router_mode == "threshold":
                token_mask = [float(score > 0) for score in scores]
            else:
                rate = min(1.01 * torch.sigmoid(linear(f"{block}token_rate", temb)).item(), 1)
                token_mask = top(scores, round(rate * len(scores)))
            x = norm(tokens, config.mlp_norm_eps) * (1 + modulation[4]) + modulation[3]
            hidden = linear(f"{block}mlp.fc1", x).unflatten(1, (heads, -1))
            hidden = (hidden * torch.tensor(mlp_mask)[:, None]).flatten(1)
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            output = modulation[5] * linear(f"{block}mlp.fc2", hidden)
            tokens = tokens + torch.tensor(token_mask)[:, None] * output
            masks.append(attn_mask + mlp_mask + token_mask)
        scale, shift = linear("norm_out.linear", F.silu(embedding)).chunk(2)
        pixels = linear("proj_out", norm(tokens) * (1 + scale) + shift)
        pixels = pixels.view(rows, columns, patch, patch, -1).permute(4, 0, 2, 1, 3)
        samples.append(pixels.reshape(-1, rows * patch, columns * patch))
        all_masks.append(masks)
    masks = torch.tensor(all_masks).split([heads, heads, rows * columns], dim=2)
    return torch.stack(samples), masks


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("qk_norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("size", [(8, 8), (12, 4)])
def test_all_forms_are_the_written_formulas(router_mode, qk_norm, size):
    config = {"router_mode": router_mode, "qk_norm": qk_norm, "timestep_scale": 0.5, "timestep_shift": 3.0}
    arguments = dit_inputs(size=size)
    model = mixed_dyna_dit(arguments, **config, mlp_norm_eps=0.5, learn_sigma=False)
    with torch.no_grad():
        complete, _ = written_out(model, **arguments, complete_model=True)
        expected, masks = written_out(model, **arguments)
    torch.testing.assert_close(run(model, arguments, complete_model=True).sample, complete, **SINUSOIDS)
    for call in (run, run_masked):
        output = call(model, arguments, output_masks=True)
        assert_mixed(output, timesteps_differ=True)
        for actual, mask in zip((output.attn_masks, output.mlp_masks, output.token_masks), masks, strict=True):
            assert torch.equal(actual, mask)
        torch.testing.assert_close(output.sample, expected, **SINUSOIDS)
    assert (expected - complete).abs().max() > 0.1


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("width", [0.25, 0.5, 0.8])
def test_width_is_the_written_formulas(router_mode, width):
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments, router_mode=router_mode)
    full_width = run(model, arguments, complete_model=True).sample
    model.set_width(width)
    with torch.no_grad():
        complete, _ = written_out(model, **arguments, complete_model=True, width=width)
        expected, masks = written_out(model, **arguments, width=width)
    for call in (run, run_masked):
        torch.testing.assert_close(call(model, arguments, complete_model=True).sample, complete, **SINUSOIDS)
        output = call(model, arguments, output_masks=True)
        assert torch.equal(torch.cat([output.attn_masks, output.mlp_masks], 2), torch.cat(masks[:2], 2))
        assert torch.equal(output.token_masks, masks[2])
        torch.testing.assert_close(output.sample, expected, **SINUSOIDS)
    assert (complete - full_width).abs().max() > 0.1


# The three forms against each other, over random configurations


@st.composite
def cases(draw):
    """A configuration and the inputs of a call."""
    conditional = draw(st.booleans())
    patch_size = draw(st.sampled_from([1, 2]))
    config = {
        "router_mode": draw(st.sampled_from(MODES)),
        "num_layers": draw(st.integers(2, 3)),
        "num_attention_heads": draw(st.integers(2, 5)),
        "attention_head_dim": draw(st.sampled_from([8, 12])),
        "mlp_ratio": draw(st.sampled_from([4.0, 2.5, 1.0])),
        "qk_norm": draw(st.sampled_from([None, "layer_norm", "rms_norm", True])),
        "patch_size": patch_size,
        "sample_size": draw(st.sampled_from([8, (8, 4)])),
        "learn_sigma": draw(st.booleans()),
        "class_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
    }
    if not conditional:
        config |= UNCONDITIONAL
    size = (patch_size * draw(st.integers(3, 5)), patch_size * draw(st.integers(3, 5)))
    arguments = dit_inputs(draw(st.integers(1, 4)), size, same_time=draw(st.booleans()))
    if not conditional:
        del arguments["class_labels"]
    elif config["class_dropout_prob"] == 0:
        arguments["class_labels"] = arguments["class_labels"] % 5
    return config, arguments


over_cases = [
    settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    ),
    given(case=cases()),
]


def for_cases(test):
    for decorator in reversed(over_cases):
        test = decorator(test)
    return test


@for_cases
def test_skipping_is_masked_is_prepared(case):
    config, arguments = case
    model = mixed_dyna_dit(arguments, **config)
    masked = run_masked(model, arguments, output_masks=True)
    skipping = run(model, arguments, output_masks=True)
    assert_same_masks(skipping, masked)
    torch.testing.assert_close(skipping.sample, masked.sample, **CLOSE)

    model.prepare_timesteps(arguments["timestep"].unique(), arguments.get("class_labels"))
    for _ in range(2):
        prepared = run(model, arguments, output_masks=True)
        assert_same_masks(prepared, masked)
        torch.testing.assert_close(prepared.sample, masked.sample, **CLOSE)


@for_cases
def test_one_image_is_its_row_of_a_batch(case):
    config, arguments = case
    model = mixed_dyna_dit(arguments, **config)
    batch = run(model, arguments, output_masks=True)
    for i in range(len(arguments["timestep"])):
        row = run(model, {name: value[i : i + 1] for name, value in arguments.items()}, output_masks=True)
        for name in ("attn_masks", "mlp_masks", "token_masks", "compute_ratio"):
            torch.testing.assert_close(getattr(row, name)[0], getattr(batch, name)[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(row.sample[0], batch.sample[i], **CLOSE)


@for_cases
def test_all_on_and_full_width_are_complete(case):
    config, arguments = case
    model = mixed_dyna_dit(arguments, **config)
    complete = run(model, arguments, complete_model=True, output_masks=True)
    assert (complete.compute_ratio == 1).all() and complete.token_masks.all() and complete.attn_masks.all()
    assert (run(model, arguments).sample - complete.sample).abs().max() > 0.01
    model.set_width(1.0)
    assert torch.equal(run(model, arguments, complete_model=True).sample, complete.sample)
    for block in model.transformer_blocks:
        model.initialize_routers(block)
        torch.nn.init.zeros_(block.token_selection.linear_2.weight)  # drawn wider than the bias reaches
    for call in (run, run_masked):
        output = call(model, arguments, output_masks=True)
        assert_same_masks(output, complete)
        torch.testing.assert_close(output.sample, complete.sample, **CLOSE)


def gate_noise(model, batch_size: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    heads, layers = model.config.num_attention_heads, model.config.num_layers
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, layers, 2 * (heads - 1) + num_tokens, generator=generator)


def training_arguments(model, arguments: dict) -> dict:
    """Everything that a call in training mode would draw, given."""
    batch_size = len(arguments["timestep"])
    tokens = arguments["hidden_states"][0, 0].numel() // model.config.patch_size**2
    result = {**arguments, "gate_noise": gate_noise(model, batch_size, tokens), "output_masks": True}
    if model.null_class_label is not None:
        result["class_dropout_mask"] = torch.arange(batch_size) % 2 == 1
    return result


def loss(output) -> torch.Tensor:
    return (output.sample * randn(*output.sample.shape, seed=5)).mean() + output.compute_ratio.mean()


@for_cases
def test_gradient_reaches_every_parameter(case):
    config, arguments = case
    model = mixed_dyna_dit(arguments, **config).train()
    arguments = training_arguments(model, arguments)
    output = model(**arguments)
    assert 0.2 < output.compute_ratio.mean() < 0.95
    loss(output).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias of the keys moves all scores of a query alike, and softmax does not see it; nor does a quantile of the tokens'
    expected = ["norm_k.bias"]
    if config["router_mode"] == "capacity":  # where no ReLU cuts, the first bias moves all scores alike too
        expected += ["token_selection.linear_1.bias", "token_selection.linear_2.bias"]
    assert [name for name in without if not name.endswith(tuple(expected))] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # what is given is all that was drawn
    torch.manual_seed(3)
    torch.testing.assert_close(model(**arguments).sample, output.sample, **CLOSE)


@for_cases
def test_bfloat16_forms_agree(case):
    """Groups are exactly the same; a token whose score is within bfloat16's 2^-8 of its rival may change sides."""
    config, arguments = case
    model = mixed_dyna_dit(arguments, **config).to(torch.bfloat16)
    arguments = {**arguments, "hidden_states": arguments["hidden_states"].bfloat16()}
    skipping, masked = run(model, arguments, output_masks=True), run_masked(model, arguments, output_masks=True)
    assert skipping.sample.dtype == torch.bfloat16
    assert torch.equal(skipping.attn_masks, masked.attn_masks) and torch.equal(skipping.mlp_masks, masked.mlp_masks)
    assert (skipping.token_masks != masked.token_masks).float().mean() < 0.1
    difference = (skipping.sample - masked.sample).float()
    if torch.equal(skipping.token_masks, masked.token_masks):
        assert difference.square().mean().sqrt() < 0.03 * masked.sample.float().std()


# Routers


def test_capacity_counts():
    """k = round(sum of p) of the others beside group 0; the share of tokens is rounded per image."""
    logits = 15 * randn(200, 5)
    gates = _capacity_gates(logits)
    expected = torch.tensor([top(row, round(sum(1 / (1 + math.exp(-x / 5)) for x in row))) for row in logits.tolist()])
    assert torch.equal(gates, expected)
    assert set(gates.sum(dim=1).tolist()) >= {1.0, 2.0, 3.0, 4.0}

    scores, rate = randn(50, 10), torch.linspace(-0.0, 1.2, 50)
    expected = torch.tensor([top(row, round(min(r, 1) * 10)) for row, r in zip(scores.tolist(), rate.tolist())])
    assert torch.equal(_capacity_token_gates(scores, rate), expected)


@pytest.mark.parametrize("num_equal", [2, 6])
def test_capacity_ties(num_equal):
    """Among equals the first ones, in the masked and in the skipping form."""
    logits = torch.zeros(1, 6)
    assert _capacity_gates(logits)[0].tolist() == [1, 1, 1, 0, 0, 0]
    scores = torch.tensor([[0.0] * num_equal + [-1.0] * (6 - num_equal)])
    assert _capacity_token_gates(scores, torch.tensor([1 / 6]))[0].tolist() == [1, 0, 0, 0, 0, 0]
    model, arguments = tiny_dyna_dit(), dit_inputs()
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.token_selection.linear_2.weight)
    masked, skipping = run_masked(model, arguments, output_masks=True), run(model, arguments, output_masks=True)
    counts = masked.token_masks.sum(dim=2, keepdim=True)
    assert counts.unique().numel() > 3
    assert torch.equal(masked.token_masks, (torch.arange(16) < counts).float())
    assert_same_masks(skipping, masked)


@pytest.mark.parametrize("router_mode, noise", [("capacity", False), ("threshold", False), ("threshold", True)])
def test_gradient_of_the_group_gates(router_mode, noise):
    """Straight through: that of sigmoid(logit / 5), noise included."""
    logits = (6 * randn(4, 5)).requires_grad_()
    upstream = randn(4, 5, seed=1)
    uniform = torch.rand(4, 5, generator=torch.Generator().manual_seed(2))
    if router_mode == "capacity":
        gates, shifted = _capacity_gates(logits), logits
    else:
        gates = _threshold_gates(logits, uniform if noise else None)
        shifted = logits + (uniform.log() - (1 - uniform).log()) * noise
        assert torch.equal(gates, (shifted > 0).float())
    (gates * upstream).sum().backward()
    probability = 1 / (1 + torch.exp(-shifted.detach() / 5))
    torch.testing.assert_close(logits.grad, upstream * probability * (1 - probability) / 5)
    assert set(gates.unique().tolist()) == {0.0, 1.0}


def test_gradient_of_the_token_gates():
    """That of sigmoid((score - quantile(score, 1 - r)) / tau), by finite differences in float64 with torch.quantile."""
    scores, rate = randn(3, 9), torch.tensor([0.3, 0.55, 0.81])
    upstream = randn(3, 9, seed=1)

    def soft(scores, rate, spread):
        quantiles = torch.stack([torch.quantile(row, 1 - r.double()) for row, r in zip(scores, rate, strict=True)])
        return (torch.sigmoid((scores - quantiles[:, None]) / spread) * upstream).sum().item()

    exact = scores.double()
    spread = exact.std(dim=1, keepdim=True, correction=0)
    step = 1e-6
    expected = {"scores": torch.zeros(3, 9), "rate": torch.zeros(3)}
    for index in [(i, j) for i in range(3) for j in range(9)]:
        moved = [exact.clone(), exact.clone()]
        moved[0][index] += step
        moved[1][index] -= step
        expected["scores"][index] = (soft(moved[0], rate, spread) - soft(moved[1], rate, spread)) / (2 * step)
    for i in range(3):
        moved = [rate.double(), rate.double()]
        moved[0][i] += step
        moved[1][i] -= step
        expected["rate"][i] = (soft(exact, moved[0], spread) - soft(exact, moved[1], spread)) / (2 * step)

    scores.requires_grad_(), rate.requires_grad_()
    (_capacity_token_gates(scores, rate) * upstream).sum().backward()
    torch.testing.assert_close(scores.grad, expected["scores"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(rate.grad, expected["rate"], rtol=1e-3, atol=1e-5)
    assert (rate.grad.abs() > 1e-3).all()


def test_gradient_of_the_compute_ratio():
    """In capacity mode the budget pulls at the rates themselves: compare with the ratio written with soft gates."""
    model, arguments = (
        tiny_dyna_dit().train(),
        {**dit_inputs(), "class_dropout_mask": torch.zeros(3, dtype=torch.bool)},
    )
    output = model(**arguments, output_masks=True)
    assert_mixed(output, timesteps_differ=True)
    output.compute_ratio.sum().backward()

    with torch.no_grad():
        temb = model._embed_time(arguments["timestep"])
    dim, tokens = 32, 16
    attn_macs, mlp_macs = 4 * tokens * dim**2 + 2 * tokens**2 * dim, 8 * tokens * dim**2
    for i, block in enumerate(model.transformer_blocks):
        weights = {
            name: p.detach().clone().requires_grad_() for name, p in block.named_parameters() if "_rate" in name
        }
        heads, groups, rate = (
            temb @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            for name in ("attn_rate", "mlp_rate", "token_rate")
        )
        hard_groups, hard_tokens = output.mlp_masks[:, i].detach(), output.token_masks[:, i].detach()
        soft = attn_macs * torch.sigmoid(heads / 5).sum(dim=1) / 4
        soft = soft + mlp_macs * torch.sigmoid(groups / 5).sum(dim=1) / 4 * hard_tokens.mean(dim=1)
        soft = soft + mlp_macs * hard_groups.mean(dim=1) * 1.01 * torch.sigmoid(rate[:, 0])
        (soft / (attn_macs + mlp_macs) / 3).sum().backward()
        for name, weight in weights.items():
            actual = block.get_parameter(name).grad
            assert actual.abs().sum() > 0
            torch.testing.assert_close(actual, weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_threshold_training_is_a_coin_flip():
    """A gate is on with probability sigmoid(logit) in training, and where that is above a half in evaluation."""
    logits = torch.logit(torch.tensor([0.75, 0.25, 0.02])).expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4000, 3, generator=generator)
    # 4000 draws: a standard deviation of at most 0.007
    torch.testing.assert_close(_threshold_gates(logits, noise).mean(dim=0), logits[0].sigmoid(), rtol=0, atol=0.03)
    assert _threshold_gates(logits, None)[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("router_mode", MODES)
def test_training_mode(router_mode):
    """Capacity draws nothing; a threshold draws its noise, unless it is given."""
    arguments = {**dit_inputs(), "class_labels": torch.tensor([1, 2, 0])}
    model = mixed_dyna_dit(arguments, router_mode=router_mode, class_dropout_prob=0.0)
    evaluated = run(model, arguments, output_masks=True)
    model.train()
    noise = gate_noise(model, 3, 16)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    given_noise = [run(model, arguments, output_masks=True, gate_noise=noise) for _ in range(2)]
    assert torch.equal(given_noise[0].sample, given_noise[1].sample)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [run(model, arguments, output_masks=True) for _ in range(2)]
    if router_mode == "capacity":
        assert torch.equal(torch.get_rng_state(), state)
        for output in (*given_noise, *drawn):
            assert_same_masks(output, evaluated)
    else:
        assert (drawn[0].sample - drawn[1].sample).abs().max() > 1e-3
        assert (given_noise[0].sample - run(model, arguments, gate_noise=noise.flip(0)).sample).abs().max() > 1e-3


def test_order_of_the_gate_noise():
    """Heads first, then channel groups, then tokens; each a sample and a layer of its own."""
    model, arguments = tiny_dyna_dit(router_mode="threshold").train(), dit_inputs()
    arguments["class_dropout_mask"] = torch.zeros(3, dtype=torch.bool)
    noise = gate_noise(model, 3, 16)
    with torch.no_grad():
        temb = model._embed_time(arguments["timestep"])
        output = model(**arguments, gate_noise=noise, output_masks=True)
        logistic = torch.logit(noise)
        for i, block in enumerate(model.transformer_blocks):
            for name, masks, first in (("attn_rate", output.attn_masks, 0), ("mlp_rate", output.mlp_masks, 3)):
                logits = block.get_submodule(name)(temb) + logistic[:, i, first : first + 3]
                assert torch.equal(masks[:, i, 1:], (logits > 0).float())
        # a token's noise of nearly 1 turns it on, nearly 0 off
        noise[:, :, 6:] = 1e-6
        noise[:, :, 9] = noise[1, 2, 12] = 1 - 1e-6
        for block in model.transformer_blocks:
            torch.nn.init.zeros_(block.token_selection.linear_2.weight)
            torch.nn.init.zeros_(block.token_selection.linear_2.bias)
        tokens = model(**arguments, gate_noise=noise, output_masks=True).token_masks
    expected = torch.zeros(3, 3, 16)
    expected[:, :, 3] = expected[1, 2, 6] = 1
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("heads", [2, 6, 16])
def test_fresh_model_is_fully_on(router_mode, heads):
    """At any number of tokens, and with gradients that an optimizer can use."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": 4,
        "sample_size": 64,
        "patch_size": 1,
        "num_layers": 2,
    }
    model = DynaDiTTransformer2DModel(**{**TINY_DIT, **config}, router_mode=router_mode)
    for size in ((1, 1), (2, 3), (8, 8), (40, 50)):
        arguments = dit_inputs(2, size)
        assert (run(model.eval(), arguments, output_masks=True).compute_ratio == 1).all()
    model.train()
    noise = torch.full((2, 2, 2 * (heads - 1) + 64), 0.5)
    model(**dit_inputs(2, (8, 8)), output_masks=True, gate_noise=noise).compute_ratio.mean().backward()
    for block in model.transformer_blocks:
        for router in (block.attn_rate, block.mlp_rate, block.token_rate):
            if router is not None:
                # a sixteenth of the largest that a gate of 1 / (2 * heads) of a layer can have would be usable
                assert router.bias.grad.min() > 1e-5 * (1 if router_mode == "capacity" else 0.1)
    assert (model.transformer_blocks[0].mlp_rate.bias.grad > 0).all()


def layer_compute(output) -> torch.Tensor:
    mlp = output.mlp_masks.mean(dim=2) * output.token_masks.mean(dim=2)
    return ((output.attn_masks.mean(dim=2) + 2 * mlp) / 3).mean(dim=0)


@pytest.mark.parametrize("harms", [False, True], ids=["idle", "harmful"])
@pytest.mark.parametrize("router_mode", MODES)
def test_gates_learn_which_layer_is_useless(router_mode, harms):
    """
    Layer 1 adds nothing, or noise that the target does not have. With a budget of two thirds the routers alone, trained
    from all on, take its compute first.
    """
    torch.manual_seed(0)
    model = tiny_dyna_dit(1, router_mode=router_mode, learn_sigma=False)
    for i, block in enumerate(model.transformer_blocks):
        model.initialize_routers(block)
        if i == 1 and not harms:
            torch.nn.init.zeros_(block.modulation.weight)
            torch.nn.init.zeros_(block.modulation.bias)
    teacher = copy.deepcopy(model)
    for parameter in (teacher.transformer_blocks[1].modulation.weight, teacher.transformer_blocks[1].modulation.bias):
        torch.nn.init.zeros_(parameter)
    routers = [p for name, p in model.named_parameters() if "_rate" in name or "token_selection" in name]
    biases = [p for p in routers if p.ndim == 1]
    weights = [p for p in routers if p.ndim > 1]
    optimizer = torch.optim.Adam([{"params": biases, "lr": 0.3}, {"params": weights, "lr": 0.01}])
    model.train()
    generator = torch.Generator().manual_seed(0)
    for step in range(110):
        arguments = {
            "hidden_states": torch.randn(8, 4, 8, 8, generator=generator),
            "timestep": 1000 * torch.rand(8, generator=generator),
            "class_labels": torch.randint(5, (8,), generator=generator),
            "class_dropout_mask": torch.zeros(8, dtype=torch.bool),
        }
        target = run(teacher, arguments, complete_model=True).sample
        output = model(**arguments, output_masks=True)
        budget = 1 - (1 - 2 / 3) * min(step / 70, 1)
        value = F.mse_loss(output.sample, target) / target.var() + 20 * (output.compute_ratio.mean() - budget) ** 2
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    compute = layer_compute(run(model.eval(), {**arguments, "class_dropout_mask": None}, output_masks=True))
    assert compute[1] < 0.6 and compute[1] < min(compute[0], compute[2]) - 0.2, compute


# Costs


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (4, 12)])
def test_macs_are_those_of_the_flop_counter(router_mode, size, monkeypatch):
    """The complete model, a narrower one, and dynamic calls that really run less, but for what `_fill_up` adds."""
    monkeypatch.setattr(transformer_dyna_dit, "_fill_up", lambda count, batch_size, device: count)
    config = {"router_mode": router_mode, "mlp_ratio": 3.0, "sample_size": size}
    arguments = dit_inputs(size=size)
    model = mixed_dyna_dit(arguments, **config)
    complete = model.compute_macs()
    assert counted_macs(model, arguments, complete_model=True) == complete["total"]
    for same_time in (False, True):
        arguments = dit_inputs(size=size, same_time=same_time)
        output = run(model, arguments, output_masks=True)
        assert_mixed(output, timesteps_differ=not same_time)
        dynamic = model.compute_macs(masks=output)
        ratio = dynamic["blocks"] / complete["blocks"]
        assert ratio == pytest.approx(output.compute_ratio.mean().item(), rel=1e-6)
        assert dynamic["total"] < 0.9 * complete["total"]
        assert counted_macs(model, arguments) == pytest.approx(dynamic["total"], rel=1e-6)
    model.set_width(0.5)
    narrow = model.compute_macs()
    assert narrow["blocks"] == complete["blocks"] / 2
    assert counted_macs(model, arguments, complete_model=True) == narrow["total"]
    masks = run(model, arguments, complete_model=True, output_masks=True)
    assert masks.compute_ratio.tolist() == [0.5] * 3


def test_macs_of_another_size():
    model = tiny_dyna_dit()
    assert model.compute_macs((4, 12)) == tiny_dyna_dit(sample_size=(4, 12)).compute_macs()
    assert model.compute_macs(16) == model.compute_macs((16, 16)) == tiny_dyna_dit(sample_size=16).compute_macs()


def test_macs_of_a_prepared_trajectory():
    """Neither routers nor modulations run in the loop."""
    model, arguments = tiny_dyna_dit(), dit_inputs(same_time=True)
    output = run(model, arguments, output_masks=True)
    assert_mixed(output, timesteps_differ=False)
    total = model.compute_macs(masks=output)["total"]
    model.prepare_timesteps(torch.tensor([900.0, 333.25]), arguments["class_labels"])
    known = 3 * (6 * 32**2 + 2 * 3 * 32 + 32)
    assert counted_macs(model, arguments) == pytest.approx(total - known, rel=1e-6)


@pytest.mark.parametrize("width_mult", [1.0, 0.5])
def test_the_ratio_is_known_before_the_call(width_mult):
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments, router_mode="capacity")
    model.set_width(width_mult)
    output = run(model, arguments, output_masks=True)
    torch.testing.assert_close(model.predict_compute_ratio(arguments["timestep"]), output.compute_ratio)
    larger = {**arguments, "hidden_states": randn(3, 4, 8, 12)}
    output = run(model, larger, output_masks=True)
    torch.testing.assert_close(model.predict_compute_ratio(arguments["timestep"], (8, 12)), output.compute_ratio)
    with pytest.raises(ValueError, match="`router_mode`='threshold' has no compute ratio before a call"):
        tiny_dyna_dit(router_mode="threshold").predict_compute_ratio(arguments["timestep"])


def test_macs_of_xl():
    with torch.device("meta"):
        model = DynaDiTTransformer2DModel.from_config(DYNA_DIT_CONFIGS["DiT-XL/2"])
    macs = model.compute_macs()
    assert macs["blocks"] == 118_380_036_096 == 28 * (1_509_949_440 + 2_717_908_992)
    assert model.compute_macs((32, 32)) == macs
    assert 1.00 < macs["total"] / macs["blocks"] < 1.01
    # 4 times the tokens: 4 times the products, 16 times the scores
    scores = 28 * 2 * 256**2 * 1152
    assert model.compute_macs(64)["blocks"] == 4 * (macs["blocks"] - scores) + 16 * scores


@pytest.mark.parametrize("name", sorted(DYNA_DIT_CONFIGS))
def test_presets(name):
    """Table 1 of DiT, and the public parameter counts, positions included and routers not."""
    rows = {"S": (12, 384, 6, 33), "B": (12, 768, 12, 130), "L": (24, 1024, 16, 458), "XL": (28, 1152, 16, 675.1)}
    size, patch_size = name.removeprefix("DiT-").split("/")
    num_layers, dim, heads, millions = rows[size]
    config = DYNA_DIT_CONFIGS[name]
    assert config == {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "sample_size": 32,
        "patch_size": int(patch_size),
        "in_channels": 4,
        "num_classes": 1000,
        "class_dropout_prob": 0.1,
        "learn_sigma": True,
    }
    with torch.device("meta"):
        model = DynaDiTTransformer2DModel.from_config(config)
    assert model.pos_embed.proj.weight.shape == (dim, 4, int(patch_size), int(patch_size))
    assert len(model.transformer_blocks) == num_layers and model.class_embedding.weight.shape == (1001, dim)
    if patch_size == "2":
        static = [p for key, p in model.named_parameters() if "_rate." not in key and "token_selection" not in key]
        count = sum(p.numel() for p in static) + model.pos_embed.positions.numel()
        assert abs(count / 1e6 - millions) < (0.05 if size == "XL" else 0.6)


def test_twelve_presets():
    assert len(DYNA_DIT_CONFIGS) == 12
    json.dumps(DYNA_DIT_CONFIGS)


# Width


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((384, 1.0, 6), 384),
        ((384, 0.5, 6), 192),
        ((384, 0.1, 6), 64),
        ((384, 0.05, 6), 1),
        ((384, 0.05, 6, 64), 64),
        ((384, 0.7, 6), 256),
        ((6, 0.7, 6), 4),
        ((1152, 0.9, 16), 1008),
        ((10, 0.25, 4), 2),
    ],
)
def test_round_to_nearest(arguments, expected):
    actual = round_to_nearest(*arguments)
    assert isinstance(actual, int) and actual == expected


def test_dyna_linear_is_slicing():
    torch.manual_seed(0)
    both, inner, outer, fixed = (
        DynaLinear(12, 20, 4, dyna_dim=dyna_dim)
        for dyna_dim in ((True, True), (True, False), (False, True), (False, False))
    )
    x = randn(5, 12)
    for layer in (both, inner, outer, fixed):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.width_mult = 0.5
    torch.testing.assert_close(both(x[:, :6]), F.linear(x[:, :6], both.weight[:10, :6], both.bias[:10]))
    torch.testing.assert_close(inner(x[:, :6]), F.linear(x[:, :6], inner.weight[:, :6], inner.bias))
    torch.testing.assert_close(outer(x), F.linear(x, outer.weight[:10], outer.bias[:10]))
    torch.testing.assert_close(fixed(x), F.linear(x, fixed.weight, fixed.bias))
    rows, columns = [5, 6, 7, 8, 9, 15, 16, 17, 18, 19], [3, 4, 5, 9, 10, 11]
    expected = F.linear(x[:, columns], both.weight[rows][:, columns], both.bias[rows])
    torch.testing.assert_close(both(x[:, columns], (1, 3)), expected)
    no_bias = DynaLinear(12, 20, 4, bias=False)
    torch.testing.assert_close(no_bias(x[:, columns], (1, 3)), x[:, columns] @ no_bias.weight[rows][:, columns].T)


def test_dyna_qkv_linear_is_slicing():
    torch.manual_seed(0)
    layer, x = DynaQKVLinear(12, 4), randn(5, 12)
    rows = [s * 12 + 3 * g + i for g in (0, 3, 2) for s in range(3) for i in range(3)]
    torch.testing.assert_close(layer(x, (0, 3, 2)), F.linear(x, layer.weight[rows], layer.bias[rows]))
    torch.testing.assert_close(layer(x, (0, 1, 2, 3)), F.linear(x, layer.weight, layer.bias))
    layer.width_mult = 0.25
    rows = [s * 12 + i for s in range(3) for i in range(3)]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight[rows], layer.bias[rows]))


def test_low_rank_factors_of_a_cut_layer():
    torch.manual_seed(0)
    x, groups = randn(5, 12), (1, 2)
    for layer in (DynaQKVLinear(12, 4), DynaLinear(12, 20, 4), DynaLinear(12, 20, 4, dyna_dim=(True, False))):
        factors = [(randn(2, 12, seed=i), randn(layer.out_features, 2, seed=9 + i), 0.5 + i) for i in range(2)]
        whole = copy.deepcopy(layer)
        with torch.no_grad():
            for down, up, scale in factors:
                whole.weight += scale * up @ down
        part = x[:, 3:9] if layer.dyna_dim[0] else x
        torch.testing.assert_close(layer(part, groups, factors), whole(part, groups), rtol=1e-5, atol=1e-5)
        full = tuple(range(4))
        torch.testing.assert_close(layer(x, full, factors), whole(x), rtol=1e-5, atol=1e-5)


def test_set_width_and_back():
    model, arguments = tiny_dyna_dit(), dit_inputs()
    expected = run(model, arguments, output_masks=True)
    assert_mixed(expected, timesteps_differ=True)
    model.set_width(0.5)
    assert model.width_mult == 0.5
    output = run(model, arguments, output_masks=True)
    assert not output.attn_masks[:, :, 2:].any() and not output.mlp_masks[:, :, 2:].any()
    assert torch.equal(output.attn_masks[:, :, :2], expected.attn_masks[:, :, :2])
    assert (output.compute_ratio < expected.compute_ratio).any()
    model.set_width(1)
    assert torch.equal(run(model, arguments).sample, expected.sample)


def test_width_in_training():
    model = tiny_dyna_dit().train()
    model.set_width(0.5)
    loss(model(**training_arguments(model, dit_inputs()))).backward()
    block = model.transformer_blocks[0]
    assert block.mlp.fc1.weight.grad[:64].abs().sum() > 0 and block.mlp.fc1.weight.grad[64:].abs().sum() == 0
    assert block.attn.to_out[0].weight.grad[:, 16:].abs().sum() == 0


# Plans


def prepared(model, arguments, **options):
    """A plan for the timestep of `arguments`, in use."""
    model.prepare_timesteps(torch.tensor([900.0, arguments["timestep"][0]]), arguments["class_labels"], **options)
    model.set_plan_step(1)
    run(model, arguments)
    return model


def assert_plan_is_not_stale(model, arguments, **overrides) -> None:
    """The same output as without a plan."""
    actual = run(model, arguments, **overrides).sample
    fresh = copy.deepcopy(model)
    fresh.clear_plan()
    torch.testing.assert_close(actual, run(fresh, arguments, **overrides).sample, **CLOSE)


def optimizer_step(options, **arguments):
    def change(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
        loss(model(**{**training_arguments(model, dit_inputs(same_time=True)), **arguments})).backward()
        optimizer.step()
        model.eval()

    return change


def load_other_weights(assign):
    def change(model):
        other = tiny_dyna_dit(5, router_mode=model.config.router_mode)
        model.load_state_dict(other.state_dict(), assign=assign)

    return change


def train_and_evaluate(model):
    model.train()
    run(model, dit_inputs(same_time=True))
    model.eval()


CHANGES = {
    "AdamW": optimizer_step({"foreach": False}),
    "AdamW foreach": optimizer_step({"foreach": True}),
    "AdamW fused": optimizer_step({"fused": True}),
    "AdamW fused, static": optimizer_step({"fused": True}, complete_model=True, output_masks=True),
    "load_state_dict": load_other_weights(False),
    "load_state_dict assign": load_other_weights(True),
    "double": lambda model: model.to(torch.float64),
    "there and back": lambda model: [model.to(torch.float64), model.to(torch.float32)],
    "width": lambda model: model.set_width(0.5),
    "train": train_and_evaluate,
    "one layer": lambda model: torch.nn.init.normal_(model.transformer_blocks[1].mlp.fc1.weight),
    "inference mode": lambda model: torch.inference_mode()(model.transformer_blocks[0].modulation.bias.add_)(3.0),
}


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("change", list(CHANGES))
def test_plan_notices_changes(router_mode, change):
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, router_mode=router_mode)
    prepared(model, arguments)
    before = run(model, arguments).sample
    CHANGES[change](model)
    arguments["hidden_states"] = arguments["hidden_states"].to(model.dtype)
    assert_plan_is_not_stale(model, arguments)
    after = run(model, arguments).sample
    assert torch.allclose(before, after.float(), atol=1e-3) == (change in ("double", "there and back", "train"))


def test_weights_made_in_inference_mode_are_not_kept():
    """They do not tell when they are written to."""
    arguments = dit_inputs(same_time=True)
    with torch.inference_mode():
        model = mixed_dyna_dit(arguments, router_mode="capacity")
        prepared(model, arguments)
        before = run(model, arguments).sample
        model.transformer_blocks[0].mlp.fc1.weight.mul_(3.0)
        model.transformer_blocks[0].attn_rate.bias.neg_()
        after = run(model, arguments).sample
        fresh = copy.deepcopy(model)
        fresh.clear_plan()
        torch.testing.assert_close(after, run(fresh, arguments).sample)
        assert not torch.allclose(before, after, atol=1e-3)


def test_plan_with_other_inputs():
    """Labels and times that were not prepared, in any combination, and dropped or overwritten labels."""
    arguments = dit_inputs(same_time=True)
    model = prepared(tiny_dyna_dit(), arguments)
    for step in (1, 0, None):
        model.set_plan_step(step)
        for timestep in (333.25, 900.0, 41.0, torch.tensor([900.0, 333.25, 41.0])):
            assert_plan_is_not_stale(model, arguments, timestep=timestep)
            assert_plan_is_not_stale(model, arguments, timestep=timestep, class_labels=torch.tensor([0, 4, 2]))
            assert_plan_is_not_stale(model, arguments, timestep=timestep, class_labels=None)
    mask = torch.tensor([True, False, True])
    labels = torch.tensor([1, 2, 3])
    model.prepare_timesteps(torch.tensor([333.25]), labels)
    assert_plan_is_not_stale(model, arguments, class_labels=labels, class_dropout_mask=mask)
    labels.fill_(4)
    assert_plan_is_not_stale(model, arguments, class_labels=labels)
    # another size and another batch
    assert_plan_is_not_stale(model, {**arguments, "hidden_states": randn(3, 4, 4, 12)})
    assert_plan_is_not_stale(model, dit_inputs(2, same_time=True))


def test_plan_made_in_training_mode_drops_no_labels():
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit(class_dropout_prob=1.0).train()
    state = torch.get_rng_state()
    model.prepare_timesteps(torch.tensor([333.25]), arguments["class_labels"])
    assert torch.equal(torch.get_rng_state(), state)
    assert_plan_is_not_stale(model.eval(), arguments)
    assert set(model._plan.label_rows.tolist()) >= {0, 1, 2}


@pytest.mark.parametrize("router_mode", MODES)
def test_plan_of_an_unconditional_model(router_mode):
    arguments = dit_inputs(same_time=True)
    del arguments["class_labels"]
    model = mixed_dyna_dit(arguments, router_mode=router_mode, **UNCONDITIONAL)
    expected = run(model, arguments).sample
    model.prepare_timesteps(torch.tensor([900.0, 333.25]))
    for step in (1, None):
        model.set_plan_step(step)
        torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)


@pytest.mark.parametrize("rate_bias", [-200.0, 200.0], ids=["no tokens", "all tokens"])
def test_extreme_token_rates(rate_bias):
    model, arguments = tiny_dyna_dit(), dit_inputs(same_time=True)
    torch.nn.init.constant_(model.transformer_blocks[1].token_rate.bias, rate_bias)
    masked = run_masked(model, arguments, output_masks=True)
    assert masked.token_masks[:, 1].unique().tolist() == [float(rate_bias > 0)]
    for _ in range(2):
        skipping = run(model, arguments, output_masks=True)
        assert_same_masks(skipping, masked)
        torch.testing.assert_close(skipping.sample, masked.sample, **CLOSE)
        assert counted_macs(model, arguments) <= model.compute_macs(masks=masked)["total"] * (1 + 1e-6)
        model.prepare_timesteps(torch.tensor([333.25]))
    assert (run_masked(model.train(), arguments, output_masks=True).token_masks[:, 1] == float(rate_bias > 0)).all()


def cut_weights(model) -> list[torch.Tensor]:
    slots = model._plan.cut_weights.slots.values()
    return [tensor for layer in slots for tensor in (layer.weight, layer.bias) if tensor is not None]


def test_plan_memory():
    """Nothing that was prepared outlives `clear_plan`, and nothing above the limit is kept."""
    arguments = dit_inputs(same_time=True)
    model = prepared(tiny_dyna_dit(), arguments)
    plan = model._plan
    cut = cut_weights(model)
    assert plan.modulations and cut
    num_bytes = sum(map(stored_bytes, (*cut, *plan.modulations)))
    assert plan.cut_weights.num_bytes == model.plan_bytes == num_bytes
    references = [weakref.ref(tensor) for tensor in (*cut, *plan.modulations)] + [weakref.ref(plan)]
    del plan, cut
    model.clear_plan()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert model.plan_bytes == 0
    model.clear_plan()  # nothing to do

    expected = run(model, arguments).sample
    modulations = 2 * 3 * 3 * 6 * 32 * 4  # timesteps, labels, layers
    for limit in (1, modulations - 1, modulations, modulations + 20000, 2 * num_bytes):
        prepared(model, arguments, max_plan_bytes=limit)
        assert model._plan.cut_weights.num_bytes == model.plan_bytes <= limit
        assert bool(model._plan.modulations) == (limit >= modulations)
        assert (model.plan_bytes == num_bytes) == (limit == 2 * num_bytes)
        assert bool(cut_weights(model)) == (limit not in (1, modulations))
        torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)


def test_plan_copies_what_changes(monkeypatch):
    """From step to step each layer copies the groups that come or move, and holds memory for its largest set."""
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit()
    times = torch.linspace(20, 980, 25)
    expected = [run_masked(model, arguments, timestep=time, output_masks=True) for time in times]
    model.prepare_timesteps(times, arguments["class_labels"])
    copied = collections.Counter()
    cut = DynaLinear._cut

    def counted_cut(layer, groups, *args):
        copied[layer] += len(groups) if len(groups) < layer.num_heads else 0
        return cut(layer, groups, *args)

    monkeypatch.setattr(DynaLinear, "_cut", counted_cut)
    last, most = {}, collections.Counter()
    for step, time in enumerate(times):
        model.set_plan_step(step)
        for is_again in (False, True):
            copied.clear()
            output = run(model, arguments, timestep=time, output_masks=True)
            torch.testing.assert_close(output.sample, expected[step].sample, **CLOSE)
            for i, block in enumerate(model.transformer_blocks):
                for layers, masks in (
                    ((block.attn.qkv, block.attn.to_out[0]), output.attn_masks),
                    ((block.mlp.fc1, block.mlp.fc2), output.mlp_masks),
                ):
                    groups = set(masks[0, i].nonzero()[:, 0].tolist())
                    if len(groups) == 4:
                        groups = set(last.get(layers, ()))
                    before = set(last.get(layers, ()))
                    # one that goes may leave a hole for the last one to fill
                    bound = len(groups - before) + max(len(before) - len(groups), 0)
                    assert all(copied[layer] <= (0 if is_again else bound) for layer in layers)
                    last[layers] = groups
                    for layer in layers:
                        most[layer] = max(most[layer], len(groups))
    assert len(most) == 12 and len({tuple(groups) for groups in last.values()}) > 1
    for layer, slots in model._plan.cut_weights.slots.items():
        assert len(slots.weight) == most[layer]
        weight, bias = cut(layer, slots.groups, ())
        assert torch.equal(slots.cut[0], weight) and torch.equal(slots.cut[1], bias)
        assert (slots.cut[0] if layer.dyna_dim[1] else slots.cut[0].t()).is_contiguous()


def test_keep_places():
    """The same sets; who stays keeps the place, unless the set became too small for it."""
    sets = [(0, 1, 2), (0, 2, 3), (0, 2), (0, 2, 3, 4), tuple(range(6)), (0, 2, 3, 4), (1, 4)]
    ordered = _keep_places(sets, 6)
    assert [tuple(sorted(groups)) for groups in ordered] == sets
    assert ordered[4] == tuple(range(6))
    kept = [groups for groups in ordered if len(groups) < 6]
    for before, after in zip(kept, kept[1:], strict=False):
        stayed = [place for place, group in enumerate(before) if group in after and place < len(after)]
        assert [after[place] for place in stayed] == [before[place] for place in stayed]
    assert kept[0][:2] == (2, 0) or kept[0][:2] == (0, 2)  # used most


def test_plan_admits_the_first_layers():
    """Each for the largest set of the trajectory, as many as the limit allows; the others are cut in the call."""
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit()
    times = torch.tensor([900.0, 333.25])
    expected = [run_masked(model, arguments, timestep=time).sample for time in times]
    model.prepare_timesteps(times, arguments["class_labels"])
    everything = dict(model._plan.cut_weights.num_slots)
    first = [layer for layer in everything if everything[layer]][:3]
    modulations = 2 * 3 * 3 * 6 * 32 * 4  # timesteps, labels, layers
    weights = 0
    for layer in first:
        whole = layer.weight.nbytes + (layer.bias.nbytes if layer.dyna_dim[1] else 0)
        weights += whole * everything[layer] // 4
    model.prepare_timesteps(times, arguments["class_labels"], max_plan_bytes=modulations + weights)
    for step, time in enumerate(times):
        model.set_plan_step(step)
        torch.testing.assert_close(run(model, arguments, timestep=time).sample, expected[step], **CLOSE)
    assert list(model._plan.cut_weights.slots) == first
    assert model.plan_bytes == modulations + weights


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_of_the_mlp(router_mode, batch_size, monkeypatch):
    """On a CPU they are a multiple of 16, and what is made up leaves no trace."""
    model = tiny_dyna_dit(sample_size=32, router_mode=router_mode)
    inputs = {"hidden_states": randn(batch_size, 4, 32, 32, seed=1), "timestep": torch.tensor(400.0)}
    rows = []

    def forward(mlp, hidden_states, *args, **kwargs):
        rows.append(hidden_states.numel() // hidden_states.shape[-1])
        return original(mlp, hidden_states, *args, **kwargs)

    original = DynaMLP.forward
    expected = run_masked(model, inputs, output_masks=True)
    monkeypatch.setattr(DynaMLP, "forward", forward)
    actual = run(model, inputs, output_masks=True)
    assert_same_masks(actual, expected)
    torch.testing.assert_close(actual.sample, expected.sample, **CLOSE)
    selected = [int(count) for count in actual.token_masks.sum(dim=(0, 2))]
    images = batch_size if router_mode == "capacity" else 1  # where all images have the same count, each is filled up
    filled = [images * (count // images + -(count // images) % 16) for count in selected]
    assert [more if count >= 128 else count for count, more in zip(selected, filled, strict=True)] == rows
    assert filled != selected


def test_plan_after_an_interrupted_call(monkeypatch):
    """Wherever it stops: what was only half copied is copied again."""
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit(num_attention_heads=8, attention_head_dim=4)
    times = torch.tensor([900.0, 20.0])
    expected = [run_masked(model, arguments, timestep=time).sample for time in times]
    model.prepare_timesteps(times, arguments["class_labels"])
    cut, left = DynaLinear._cut, []

    def interrupted(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return cut(*args)

    num_interrupted = 0
    for num_cuts in range(40):
        for step, is_interrupted in ((0, False), (1, True), (0, False)):
            model.set_plan_step(step)
            with monkeypatch.context() as patch:
                if is_interrupted:
                    left[:] = [None] * num_cuts
                    patch.setattr(DynaLinear, "_cut", interrupted)
                try:
                    actual = run(model, arguments, timestep=times[step]).sample
                except KeyboardInterrupt:
                    num_interrupted += 1
                    continue
            torch.testing.assert_close(actual, expected[step], **CLOSE)
    assert num_interrupted > 6


def test_plan_of_inference_mode_serves_no_grad():
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit()
    times = torch.tensor([900.0, 333.25])
    expected = [run_masked(model, arguments, timestep=time).sample for time in times]
    model.prepare_timesteps(times, arguments["class_labels"])
    for step, context in ((0, torch.inference_mode()), (1, torch.no_grad()), (0, torch.inference_mode())):
        model.set_plan_step(step)
        with context:
            actual = model(**{**arguments, "timestep": times[step]}).sample.clone()
        torch.testing.assert_close(actual, expected[step], **CLOSE)
    assert model._plan.cut_weights.slots


# Products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (2, 0, 24)], ids=str)
def test_linear_without_gradients(dtype, with_gelu, with_bias, shape):
    """The same as with gradients, which torch's own linear takes."""
    x, weight = randn(*shape, seed=1).to(dtype), randn(40, 24, seed=2).to(dtype)
    bias = randn(40, seed=3).to(dtype) if with_bias else None
    with torch.enable_grad():
        expected = _linear(x, weight, bias, with_gelu)
    reference = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if with_gelu:
        reference = F.gelu(reference, approximate="tanh")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    with torch.no_grad():
        actual = _linear(x, weight, bias, with_gelu)
    for output in (expected, actual):
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), reference, rtol=0.01, atol=tolerance)


@torch.no_grad()
def test_linear_of_strided_weights_and_under_autocast():
    x, weight = randn(5, 24, seed=1), randn(40, 48, seed=2)[:, ::2]
    torch.testing.assert_close(_linear(x, weight, None), x @ weight.T, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert _linear(x, weight.contiguous(), None).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(_linear(x, weight.contiguous(), None), F.linear(x, weight.contiguous()))


def test_copies_start_without_a_plan():
    arguments = dit_inputs(same_time=True)
    model = prepared(tiny_dyna_dit(), arguments)
    expected = run(model, arguments).sample
    layer = copy.deepcopy(model.transformer_blocks[0].mlp.fc1)
    assert layer._cut_weights is None and model.transformer_blocks[0].mlp.fc1._cut_weights is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.plan_bytes == 0 < model.plan_bytes
        torch.testing.assert_close(run(other, arguments).sample, expected, **CLOSE)
        assert other._blocks == tuple(other.transformer_blocks)
        torch.nn.init.zeros_(other.transformer_blocks[0].attn.qkv.weight)
        assert (run(other, arguments).sample - expected).abs().max() > 1e-3
    torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)


def test_set_plan_step_without_a_plan_does_nothing():
    model = tiny_dyna_dit()
    model.set_plan_step(3)
    run(model, dit_inputs())


# The contract with diffusers


class Wrapper(torch.nn.Module):
    """What a feature cache puts in the place of the blocks."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden_states, *args, **kwargs):
        for block in self.blocks:
            hidden_states = block(hidden_states, *args, **kwargs)
        return hidden_states


@pytest.mark.parametrize("router_mode", MODES)
def test_one_module_in_the_place_of_all_blocks(router_mode):
    model, arguments = tiny_dyna_dit(router_mode=router_mode), dit_inputs()
    expected = run(model, arguments, output_masks=True)
    assert_mixed(expected, timesteps_differ=True)
    noise = gate_noise(model, 3, 16)
    trained = run(model.train(), arguments, output_masks=True, gate_noise=noise, class_dropout_mask=torch.zeros(3) > 0)
    model.eval()
    model.transformer_blocks = torch.nn.ModuleList([Wrapper(model.transformer_blocks)])
    for call in (run, run_masked):
        output = call(model, arguments, output_masks=True)
        assert_same_masks(output, expected)
        torch.testing.assert_close(output.sample, expected.sample, **CLOSE)
    model.prepare_timesteps(arguments["timestep"], arguments["class_labels"])
    torch.testing.assert_close(run(model, arguments).sample, expected.sample, **CLOSE)
    model.train()
    output = run(model, arguments, output_masks=True, gate_noise=noise, class_dropout_mask=torch.zeros(3) > 0)
    assert_same_masks(output, trained)


def test_blocks_are_called_alike():
    """The same arguments for every block, hidden states first, one tensor back."""
    model, calls = tiny_dyna_dit(), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    run(model, dit_inputs(), output_masks=True)
    assert len(calls) == 3
    for (args, output), (following, _) in zip(calls[:-1], calls[1:], strict=True):
        assert torch.is_tensor(output) and following[0] is output
        assert all(a is b for a, b in zip(args[1:], following[1:], strict=True))


def test_dict_is_tuple():
    model, arguments = tiny_dyna_dit(), dit_inputs()
    output = run(model, arguments, output_masks=True)
    fields = run(model, arguments, output_masks=True, return_dict=False)
    assert len(fields) == 5 and all(torch.equal(a, b) for a, b in zip(output.to_tuple(), fields, strict=True))
    assert len(run(model, arguments, return_dict=False)) == 1
    plain = run(model, arguments)
    assert plain.attn_masks is None and plain.compute_ratio is None
    assert output.sample.shape == (3, 8, 8, 8) and output.token_masks.shape == (3, 3, 16)
    assert output.attn_masks.shape == output.mlp_masks.shape == (3, 3, 4)
    assert torch.equal(plain.sample, output.sample)


@pytest.mark.parametrize("router_mode", MODES)
def test_save_and_load(router_mode, tmp_path):
    config = {"router_mode": router_mode, "sample_size": (8, 12), "qk_norm": "rms_norm", "timestep_shift": 2.0}
    arguments = dit_inputs(size=(8, 12))
    model = mixed_dyna_dit(arguments, **config)
    expected = run(model, arguments).sample
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("one", "shards"):
        loaded = DynaDiTTransformer2DModel.from_pretrained(tmp_path / folder)
        # the same weights at other addresses: products may be summed in another order
        torch.testing.assert_close(run(loaded, arguments).sample, expected, rtol=1e-5, atol=1e-5)
        state = loaded.state_dict()
        assert all(torch.equal(state.pop(name), value) for name, value in model.state_dict().items()) and not state
        assert not any("positions" in name for name in model.state_dict())
    loaded = AutoModel.from_pretrained(str(tmp_path / "one"))
    torch.testing.assert_close(run(loaded, arguments).sample, expected, rtol=1e-5, atol=1e-5)
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    parameters = inspect.signature(DynaDiTTransformer2DModel.__init__).parameters
    assert set(parameters) - {"self"} <= set(written)


def test_from_config():
    model = DynaDiTTransformer2DModel.from_config(DYNA_DIT_CONFIGS["DiT-S/2"], num_classes=10)
    assert model.class_embedding.weight.shape == (11, 384) and model.null_class_label == 10
    assert model.out_channels == 8 and model.config.router_mode == "capacity"


def test_copies():
    model, arguments = tiny_dyna_dit(), dit_inputs()
    expected = run(model, arguments).sample
    run_masked(model, arguments, output_masks=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, arguments).sample, expected)
        for block in other.transformer_blocks:
            torch.nn.init.constant_(block.attn_rate.bias, -99.0)
        masks = run(other, arguments, output_masks=True).attn_masks
        assert masks.sum() == 9  # group 0 only: the copy asks its own routers
    assert torch.equal(run(model, arguments).sample, expected)


@pytest.mark.parametrize("router_mode", MODES)
def test_gradient_checkpointing(router_mode):
    """The same masks and gradients, those of the budget included, from fewer stored activations."""
    gradients, stored = [], []
    for enabled in (False, True):
        model = tiny_dyna_dit(router_mode=router_mode).train()
        if enabled:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == enabled
        sizes = []
        torch.manual_seed(0)
        arguments = training_arguments(model, dit_inputs())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            output = model(**arguments)
            value = loss(output)
        value.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        gradients[-1] |= {"sample": output.sample, "ratio": output.compute_ratio, "tokens": output.token_masks}
        stored.append(sum(sizes))
        copy.deepcopy(model)  # no mask with its graph is left behind
    assert stored[1] < 0.5 * stored[0]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


def test_gradient_checkpointing_repeats_the_drawn_noise():
    gradients = []
    for enabled in (False, True):
        model = tiny_dyna_dit(router_mode="threshold").train()
        if enabled:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        loss(model(**dit_inputs(), output_masks=True)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


# Time and classes


def test_fractional_timesteps_count():
    """Also in bfloat16, whose numbers near 745 are 4 apart: the time is never rounded to it."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_dyna_dit().to(dtype)
        arguments = {**dit_inputs(), "hidden_states": dit_inputs()["hidden_states"].to(dtype)}
        outputs = [run(model, arguments, timestep=timestep, complete_model=True).sample for timestep in (745, 745.3)]
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("time", [745.25, 254])
def test_forms_of_the_timestep(time):
    model = tiny_dyna_dit()
    forms = [time, float(time), torch.tensor(time), torch.tensor([time]), torch.tensor([time] * 3)]
    forms += [torch.tensor(time, dtype=torch.float64)]
    outputs = [run(model, dit_inputs(), timestep=form).sample for form in forms]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_null_class():
    model, arguments = tiny_dyna_dit(), dit_inputs()
    assert model.null_class_label == 5 and model.class_embedding.num_embeddings == 6
    outputs = [run(model, arguments, class_labels=torch.full((3,), label)).sample for label in range(6)]
    for i in range(6):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 0.01
    assert torch.equal(run(model, arguments, class_labels=None).sample, outputs[5])
    assert torch.equal(run(model, arguments, class_labels=torch.full((3,), 1, dtype=torch.int32)).sample, outputs[1])
    mask = torch.tensor([True, False, False])
    expected = torch.cat([outputs[5][:1], outputs[1][1:]])
    actual = run(model, arguments, class_labels=torch.ones(3, dtype=torch.long), class_dropout_mask=mask).sample
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert tiny_dyna_dit(class_dropout_prob=0.0).null_class_label is None
    assert tiny_dyna_dit(**UNCONDITIONAL).null_class_label is None
    assert tiny_dyna_dit(num_classes=None).null_class_label is None


def test_label_dropout_has_the_asked_rate_and_draws_per_sample():
    model = tiny_dyna_dit(class_dropout_prob=0.3, num_layers=1).train()
    seen = []
    model.class_embedding.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    labels = torch.arange(5).repeat(180)
    torch.manual_seed(0)
    run(model, {}, hidden_states=torch.zeros(900, 4, 2, 2), timestep=500.0, class_labels=labels)
    dropped = seen[0] == 5
    # 900 draws: a standard deviation of 0.015
    assert abs(dropped.float().mean().item() - 0.3) < 0.06
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    seen.clear()
    run(model.eval(), {}, hidden_states=torch.zeros(900, 4, 2, 2), timestep=500.0, class_labels=labels)
    assert torch.equal(seen[0], labels)


def test_routers_see_the_time_and_not_the_class():
    """The cost of a trajectory is known before it starts, in capacity mode."""
    model = tiny_dyna_dit()
    first = run(model, dit_inputs(), output_masks=True)
    other = {**dit_inputs(), "hidden_states": randn(3, 4, 8, 8, seed=8), "class_labels": torch.tensor([4, 4, 0])}
    second = run(model, other, output_masks=True)
    assert_mixed(first, timesteps_differ=True)
    assert torch.equal(first.attn_masks, second.attn_masks) and torch.equal(first.mlp_masks, second.mlp_masks)
    assert torch.equal(first.token_masks.sum(dim=2), second.token_masks.sum(dim=2))
    assert (first.token_masks != second.token_masks).any()


@pytest.mark.parametrize("guidance_channels", [1, 3, 4])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_forward_with_cfg(guidance_channels, guidance_scale):
    model, half = tiny_dyna_dit(), randn(2, 4, 8, 8)
    labels = torch.tensor([1, 3, 5, 5])
    latents = torch.cat([half, randn(2, 4, 8, 8, seed=9)])  # the second half is not read
    with torch.no_grad():
        actual = model.forward_with_cfg(latents, 400.0, labels, guidance_scale, guidance_channels, output_masks=True)
        cond = model(half, 400.0, labels[:2]).sample
        uncond = model(half, 400.0, labels[2:]).sample
        fields = model.forward_with_cfg(latents, 400.0, labels, guidance_scale, guidance_channels, return_dict=False)
    guided = guidance_scale * cond + (1 - guidance_scale) * uncond
    expected = torch.cat([cond, uncond])
    expected[:, :guidance_channels] = torch.cat([guided, guided])[:, :guidance_channels]
    torch.testing.assert_close(actual.sample, expected, rtol=1e-4, atol=2e-4)
    assert torch.equal(fields[0], actual.sample) and len(fields) == 1
    assert_mixed(actual, timesteps_differ=False)
    with torch.no_grad():
        default = model.forward_with_cfg(latents, 400.0, labels, guidance_scale)
    same = torch.allclose(default.sample, actual.sample, rtol=1e-4, atol=2e-4)
    assert same == (guidance_channels == 3)


# What is refused


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"patch_size": 3}, r"`patch_size`=3 must divide `sample_size`=8\. Use 1, 2, 4, 8"),
        ({"patch_size": 0}, r"`patch_size`=0 must divide"),
        ({"sample_size": (8, 9)}, r"`patch_size`=2 must divide `sample_size`=\(8, 9\)"),
        ({"num_layers": 0}, r"`num_layers`=0 must be at least 1"),
        ({"num_attention_heads": 1}, r"`num_attention_heads`=1 must be at least 2"),
        ({"attention_head_dim": 0}, r"`num_attention_heads` \* `attention_head_dim` = 0"),
        ({"num_attention_heads": 2, "attention_head_dim": 3}, r"= 6, must be divisible by 4"),
        ({"mlp_ratio": 0.0}, r"`mlp_ratio`=0.0 gives the MLP 0 hidden channels"),
        ({"mlp_ratio": 1.05}, r"`mlp_ratio`=1.05 .* `num_attention_heads`=4 groups"),
        ({"num_classes": 0}, r"`num_classes`=0 must be at least 1, or None"),
        ({"class_dropout_prob": 1.5}, r"`class_dropout_prob`=1.5 must be in \[0, 1\]"),
        (
            {"qk_norm": "batch_norm"},
            r"`qk_norm`='batch_norm' is unknown. Use one of 'layer_norm', 'rms_norm', or None",
        ),
        ({"in_channels": 0}, "`in_channels`=0 must be at least 1"),
        ({"sample_size": (8,)}, r"`sample_size`=\(8,\) must be a number, or height and width"),
        ({"router_mode": "topk"}, r"`router_mode`='topk' is unknown. Use one of 'threshold', 'capacity'"),
    ],
)
def test_wrong_config(overrides, message):
    with pytest.raises(ValueError, match=message):
        DynaDiTTransformer2DModel(**{**TINY_DIT, **overrides})


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"hidden_states": torch.zeros(3, 3, 8, 8)},
            r"`hidden_states` must have shape \(batch_size, 4, height, width\)",
        ),
        ({"hidden_states": torch.zeros(4, 8, 8)}, r"`hidden_states` must have shape .* has shape \(4, 8, 8\)"),
        (
            {"hidden_states": torch.zeros(3, 4, 7, 8)},
            r"`hidden_states`, \(7, 8\), must be divisible by `patch_size`=2",
        ),
        ({"timestep": torch.zeros(2)}, r"`timestep` must be a number or have shape \(3,\).* shape \(2,\)"),
        ({"timestep": torch.zeros(3, 1)}, r"`timestep` must be a number .* shape \(3, 1\)"),
        ({"class_labels": torch.tensor([0, 1, 6])}, r"`class_labels` must be in \[0, 6\), but they hold \[6\]"),
        ({"class_labels": torch.tensor([0, -1, 1])}, r"`class_labels` must be in \[0, 6\), but they hold \[-1\]"),
        ({"class_labels": torch.tensor([0])}, r"`class_labels` must have shape \(3,\).* shape \(1,\)"),
        ({"class_dropout_mask": torch.tensor([1, 0, 1])}, r"`class_dropout_mask` must be boolean .* torch.int64"),
        ({"class_dropout_mask": torch.zeros(2) > 0}, r"`class_dropout_mask` must be boolean of shape \(3,\).* \(2,\)"),
        ({"gate_noise": torch.rand(3, 3, 21)}, r"`gate_noise` must have shape \(3, 3, 22\).* shape \(3, 3, 21\)"),
        ({"gate_noise": torch.rand(3, 22)}, r"`gate_noise` must have shape \(3, 3, 22\)"),
        ({"attention_kwargs": {"scal": 0.5}}, r"`attention_kwargs` has the unknown keys 'scal'. Use 'scale' only"),
    ],
)
def test_wrong_inputs(overrides, message):
    for call in (run, run_masked):
        with pytest.raises(ValueError, match=message):
            call(tiny_dyna_dit(), dit_inputs(), **overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"class_labels": 3}, "`class_labels` must be a tensor of integers, .* but it is int"),
        ({"class_labels": [1, 2, 3]}, "`class_labels` must be a tensor of integers, .* but it is list"),
        ({"class_labels": torch.ones(3)}, "`class_labels` must be a tensor of integers, .* but it is torch.float32"),
        ({"timestep": "noise"}, "`timestep` must be a number or a tensor, but it is a str"),
    ],
)
def test_inputs_of_the_wrong_type(overrides, message):
    with pytest.raises(TypeError, match=message):
        run(tiny_dyna_dit(), dit_inputs(), **overrides)


def test_wrong_class_inputs_of_models_without_them():
    mask = torch.tensor([True, False, False])
    with pytest.raises(ValueError, match="`class_labels` were given, but the model is unconditional"):
        run(tiny_dyna_dit(**UNCONDITIONAL), dit_inputs())
    no_null = tiny_dyna_dit(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`class_labels` must be given: the model has 5 classes and no null class"):
        run(no_null, dit_inputs(), class_labels=None)
    with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 5\), but they hold \[5\]"):
        run(no_null, dit_inputs())
    with pytest.raises(ValueError, match="`class_dropout_mask` was given, but the model has no null class"):
        run(no_null, dit_inputs(), class_labels=torch.tensor([0, 1, 2]), class_dropout_mask=mask)


@pytest.mark.parametrize("width_mult", [0, -0.5, 1.5, float("nan")])
def test_wrong_width(width_mult):
    model = tiny_dyna_dit()
    with pytest.raises(ValueError, match=rf"`width_mult`={width_mult} must be in \(0, 1\]; 1 is the full width"):
        model.set_width(width_mult)
    assert model.width_mult == 1
    with pytest.raises(ValueError, match="`width_mult`='half' must be in"):
        model.set_width("half")


def test_wrong_guidance():
    model, labels = tiny_dyna_dit(), torch.tensor([1, 5, 5])
    with pytest.raises(ValueError, match="`hidden_states` must hold both halves .* batch of 3 is odd"):
        model.forward_with_cfg(randn(3, 4, 8, 8), 1.0, labels, 2.0)
    for channels in (0, 5):
        with pytest.raises(ValueError, match=rf"`guidance_channels`={channels} must be in \[1, 4\]"):
            model.forward_with_cfg(randn(2, 4, 8, 8), 1.0, labels[:2], 2.0, guidance_channels=channels)


def test_wrong_plans():
    model = tiny_dyna_dit()
    for timesteps in (torch.tensor(3.0), torch.zeros(2, 2), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"`timesteps` must be a tensor of shape \(num_calls,\), but it is shape"):
            model.prepare_timesteps(timesteps)
    with pytest.raises(ValueError, match=r"`timesteps` must be a tensor of shape \(num_calls,\), but it is list"):
        model.prepare_timesteps([1.0, 2.0])
    with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 6\), but they hold \[7\]"):
        model.prepare_timesteps(torch.tensor([1.0]), torch.tensor([7]))
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(1,\)"):
        model.prepare_timesteps(torch.tensor([1.0]), torch.tensor(1))
    with pytest.raises(ValueError, match="`class_labels` were given, but the model is unconditional"):
        tiny_dyna_dit(**UNCONDITIONAL).prepare_timesteps(torch.tensor([1.0]), torch.tensor([1]))
    model.prepare_timesteps(torch.tensor([1.0, 2.0]))
    for step in (2, -1):
        with pytest.raises(ValueError, match=rf"`step`={step} must be in \[0, 2\), the prepared timesteps"):
            model.set_plan_step(step)


def test_wrong_macs():
    model = tiny_dyna_dit()
    with pytest.raises(ValueError, match=r"`sample_size`, \(9, 9\), must be divisible by `patch_size`=2"):
        model.compute_macs(9)
    message = r"`masks` must be an output of a call with `output_masks=True` at `sample_size`={}, which has {} tokens"
    with pytest.raises(ValueError, match=message.format(8, 16)):
        model.compute_macs(masks=run(model, dit_inputs()))
    with pytest.raises(ValueError, match=message.format(16, 64)):
        model.compute_macs(16, masks=run(model, dit_inputs(), output_masks=True))
