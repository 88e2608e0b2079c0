# SPDX-License-Identifier: Apache-2.0
"""
Converted models against outputs of the public DyDiT code (`tests/data/dydit_tiny.safetensors`), against DiT and SiT
written out from their formulas, and against diffusers' `DiTTransformer2DModel`.
"""

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffusers import DiTTransformer2DModel

from diffusers_dyna import DynaDiTTransformer2DModel, FlowMatchODEScheduler
from diffusers_dyna.conversion import convert_diffusers_dit, convert_dit_checkpoint, sort_by_importance

from ..testing_utils import randn, tiny_dyna_dit


GOLDEN = Path(__file__).parents[1] / "data" / "dydit_tiny.safetensors"
ROUTERS = ("attn_rate", "mlp_rate", "token_selection")
# Two orders of summation of the same float32 products, through three layers with values of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def part(golden: dict, name: str) -> dict:
    return {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture
def dydit_state(golden):
    """Weights of the public DyDiT: width 64, 3 layers, 4 heads, 10 classes."""
    return {key: value.clone() for key, value in part(golden, "state").items()}


@pytest.fixture
def state(dydit_state):
    """The same without routers: weights as of DiT and SiT."""
    return {key: value for key, value in dydit_state.items() if not any(name in key for name in ROUTERS)}


@pytest.fixture
def inputs(golden):
    return golden["input.x"], golden["input.t"], golden["input.y"]


def positions(grid: int, width: int) -> torch.Tensor:
    """Row by row; columns in the first half of the channels, rows in the second, each sines and then cosines."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (
        place.flatten()[:, None] * frequencies for place in torch.meshgrid(*[torch.arange(grid)] * 2, indexing="ij")
    )
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()[None]


def random_state(layers=2, width=16, mlp_width=64, grid=2, patch=2, channels=3, out_channels=3, rows=4) -> dict:
    """Random weights of a DiT under the public names."""
    shapes = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch**2 * out_channels, width),
    }
    for i in range(layers):
        shapes[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        shapes[f"blocks.{i}.attn.proj"] = (width, width)
        shapes[f"blocks.{i}.mlp.fc1"] = (mlp_width, width)
        shapes[f"blocks.{i}.mlp.fc2"] = (width, mlp_width)
        shapes[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    state = {"pos_embed": positions(grid, width), "y_embedder.embedding_table.weight": randn(rows, width, seed=1)}
    for seed, (name, shape) in enumerate(shapes.items(), start=2):
        state[f"{name}.weight"] = randn(*shape, seed=seed) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.3 * randn(shape[0], seed=100 + seed)
    return state


def reference(state: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, heads: int) -> torch.Tensor:
    """DiT from its formulas: all output channels, at the time `t` that is embedded."""

    def linear(name, tokens):
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(tokens):
        centred = tokens - tokens.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    patch = state["x_embedder.proj.weight"].shape[-1]
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    pixels = x.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # (B, C, rows, p, columns, q)
    pixels = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * p * q)
    tokens = pixels @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"]
    tokens = tokens + state["pos_embed"]

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    conditioning = F.silu(time + state["y_embedder.embedding_table.weight"][y])

    i = 0
    while f"blocks.{i}.attn.qkv.weight" in state:
        block = f"blocks.{i}"
        modulation = linear(f"{block}.adaLN_modulation.1", conditioning)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        qkv = linear(f"{block}.attn.qkv", norm(tokens) * (1 + scale) + shift)
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        tokens = tokens + gate * linear(f"{block}.attn.proj", (weights @ value).transpose(1, 2).flatten(2))
        hidden = linear(f"{block}.mlp.fc1", norm(tokens) * (1 + mlp_scale) + mlp_shift)
        hidden = 0.5 * hidden * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        tokens = tokens + mlp_gate * linear(f"{block}.mlp.fc2", hidden)
        i += 1

    shift, scale = linear("final_layer.adaLN_modulation.1", conditioning)[:, None].chunk(2, dim=-1)
    pixels = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    pixels = pixels.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, p, q, C)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# DyDiT


@pytest.mark.parametrize("source", [None, "dydit"])
def test_dydit_is_the_public_code(golden, dydit_state, inputs, source):
    model = convert_dit_checkpoint(dydit_state, source=source)
    assert not model.training and model.dtype == torch.float32
    config = model.config
    assert (config.sample_size, config.patch_size, config.in_channels, config.learn_sigma) == (8, 2, 4, True)
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (3, 4, 16)
    assert (config.mlp_ratio, config.num_classes, model.null_class_label) == (4.0, 10, 10)
    assert (config.router_mode, config.timestep_scale, config.timestep_shift) == ("threshold", 1.0, 0.0)

    x, t, y = inputs
    for name, times in {"dynamic": t, "dynamic_t640": torch.full_like(t, 640)}.items():
        masks = part(golden, "mask" if name == "dynamic" else "mask_t640")
        assert all(0.1 < mask.mean() < 0.9 for mask in masks.values()), "the oracle decides nothing"
        for context in (torch.no_grad, torch.enable_grad):  # skipping, masked
            with context():
                output = model(x, times, y, output_masks=True)
            torch.testing.assert_close(output.sample, golden[f"out.{name}"], **CLOSE)
            torch.testing.assert_close(output.attn_masks, masks["attn"], rtol=0, atol=0)
            torch.testing.assert_close(output.mlp_masks, masks["mlp"], rtol=0, atol=0)
            torch.testing.assert_close(output.token_masks, masks["token"].squeeze(-1), rtol=0, atol=0)
    with torch.no_grad():
        complete = model(x, t, y, complete_model=True).sample
    torch.testing.assert_close(complete, golden["out.complete"], **CLOSE)


def test_dydit_in_capacity_mode_keeps_the_routers(dydit_state, inputs):
    """Only the keep rate of tokens, which DyDiT does not have, starts afresh: it keeps all."""
    model = convert_dit_checkpoint(dydit_state, router_mode="capacity")
    for i, block in enumerate(model.transformer_blocks):
        torch.testing.assert_close(block.mlp_rate.weight, dydit_state[f"blocks.{i}.mlp_rate.router.weight"])
    with torch.no_grad():
        output = model(*inputs, output_masks=True)
    assert output.token_masks.all() and not output.attn_masks.all()


# DiT and SiT


def test_reference_is_the_public_code(golden, state, inputs):
    torch.testing.assert_close(reference(state, *inputs, heads=4), golden["out.complete"], **CLOSE)


def test_dit(state, inputs):
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=4)
    assert model.config.router_mode == "capacity" and model.config.learn_sigma
    assert (model.config.timestep_scale, model.config.timestep_shift) == (1.0, 0.0)
    expected = reference(state, *inputs, heads=4)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs, complete_model=True).sample, expected, **CLOSE)
        # the routers of a static source start with everything on
        output = model(*inputs, output_masks=True)
    torch.testing.assert_close(output.sample, expected, **CLOSE)
    assert (output.compute_ratio == 1).all()


@pytest.mark.parametrize("router_mode", ["threshold", "capacity"])
def test_router_mode_of_a_static_source(state, inputs, router_mode):
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=4, router_mode=router_mode)
    assert model.config.router_mode == router_mode
    with torch.no_grad():
        assert (model(*inputs, output_masks=True).compute_ratio == 1).all()


@pytest.mark.parametrize("out_channels", [8, 4])
def test_sit_has_its_time_and_sign_turned(out_channels):
    """SiT: t = 0 is noise, velocity = data - noise. Here: timestep 1000 is noise, velocity = noise - data."""
    state = random_state(channels=4, out_channels=out_channels)
    model = convert_dit_checkpoint(state, source="sit", num_attention_heads=2)
    assert model.out_channels == 4 and not model.config.learn_sigma
    x, y, t = randn(3, 4, 4, 4), torch.tensor([0, 2, 3]), torch.tensor([0.0, 0.36, 1.0])
    with torch.no_grad():
        output = model(x, 1000 * (1 - t), y, complete_model=True).sample
    torch.testing.assert_close(output, -reference(state, x, t, y, heads=2)[:, :4], **CLOSE)


def test_sit_draws_with_our_scheduler_what_it_draws_with_its_own_steps():
    state = random_state(channels=4, out_channels=8)
    model = convert_dit_checkpoint(state, source="sit", num_attention_heads=2)
    noise, y, steps = randn(2, 4, 4, 4), torch.tensor([0, 2]), 5

    expected = noise
    for i in range(steps):
        expected = expected + reference(state, expected, torch.full((2,), i / steps), y, heads=2)[:, :4] / steps

    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(steps)
    sample = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(model(sample, timestep, y).sample, timestep, sample).prev_sample
    assert (expected - noise).abs().mean() > 0.3
    # five steps of a model whose derivative is of order 1 let the roundings grow
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


# What is inferred, and what is given


@pytest.mark.parametrize(
    "given, num_classes, has_null_class",
    [
        ({}, 3, True),
        ({"class_dropout_prob": 0.25}, 3, True),
        ({"num_classes": 3}, 3, True),
        ({"num_classes": 4}, 4, False),
        ({"class_dropout_prob": 0}, 4, False),
        ({"num_classes": 4, "class_dropout_prob": 0.0}, 4, False),
    ],
)
def test_classes(given, num_classes, has_null_class):
    state = random_state(rows=4)
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=2, **given)
    assert model.config.num_classes == num_classes
    assert model.config.class_dropout_prob == given.get("class_dropout_prob", 0.1 if has_null_class else 0)
    torch.testing.assert_close(model.class_embedding.weight.data, state["y_embedder.embedding_table.weight"])


def test_unconditional():
    state = random_state(rows=1)
    expected = reference(state, x := randn(2, 3, 4, 4), t := torch.tensor([3.0, 700.0]), torch.zeros(2, dtype=int), 2)
    row = state.pop("y_embedder.embedding_table.weight")
    with pytest.raises(ValueError, match=r"Missing: y_embedder.embedding_table.weight\."):
        convert_dit_checkpoint(state, source="dit", num_attention_heads=2)
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=2, num_classes=None)
    assert model.class_embedding is None
    with torch.no_grad():
        model.time_embedding.linear_2.bias += row[0]
        torch.testing.assert_close(model(x, t, complete_model=True).sample, expected, **CLOSE)


def test_heads_of_a_preset():
    model = convert_dit_checkpoint(random_state(layers=12, width=384, mlp_width=48), source="dit")
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (6, 64)


def test_mlp_width_survives_the_ratio():
    """40 * (116 / 40) is a little below 116 in floating point, and the model truncates."""
    width, mlp_width = next(
        (w, m) for w in range(8, 200, 8) for m in range(2, 200, 2) if int(w * (m / w)) != m and w % 4 == 0
    )
    state = random_state(width=width, mlp_width=mlp_width)
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=2)
    assert model.transformer_blocks[0].mlp.fc1.weight.shape == (mlp_width, width)


def test_tokens_that_are_not_a_square():
    state = random_state()
    state["pos_embed"] = positions(4, 16)[:, :8]  # 2 rows of 4 patches
    with pytest.raises(ValueError, match=r"`sample_size`=\(height, width\) must be given: 8 tokens are not a square"):
        convert_dit_checkpoint(state, source="dit", num_attention_heads=2)
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=2, sample_size=(4, 8))
    x, t, y = randn(2, 3, 4, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y).sample, reference(state, x, t, y, heads=2), **CLOSE)


def test_half_precision_becomes_float32():
    state = {key: value.bfloat16() for key, value in random_state().items()}
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=2)
    rounded = {key: value.float() for key, value in state.items()} | {"pos_embed": positions(2, 16)}
    x, t, y = randn(2, 3, 4, 4), torch.tensor([1.0, 500.0]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y).sample, reference(rounded, x, t, y, heads=2), **CLOSE)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_layers": 3}, "`num_layers`=3 contradicts the checkpoint, which has 2"),
        ({"learn_sigma": True}, "`learn_sigma`=True contradicts the checkpoint, which has False"),
        ({"qk_norm": "rms_norm"}, "`qk_norm`='rms_norm' contradicts the checkpoint, which has None"),
        ({"attention_head_dim": 16}, "`attention_head_dim`=16 contradicts the checkpoint, which has 8"),
        ({"num_attention_heads": 3}, "`num_attention_heads`=3 must divide the width 16"),
        (
            {"num_attention_heads": None},
            "`num_attention_heads` must be given: the checkpoint has 2 layers of width 16",
        ),
        ({"sample_size": 8}, "`sample_size`=8 does not fit the checkpoint, which has 4 tokens of 2x2"),
        ({"num_classes": 5}, "`num_classes`=5 does not fit the class table, which has 4 rows"),
        ({"num_classes": 4, "class_dropout_prob": 0.1}, "`num_classes`=4 does not fit the class table"),
    ],
)
def test_overrides_that_contradict_the_file(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_dit_checkpoint(random_state(), source="dit", **{"num_attention_heads": 2, **given})


def test_heads_of_routers_cannot_be_overridden(dydit_state):
    with pytest.raises(ValueError, match="`num_attention_heads`=8 contradicts the checkpoint, which has 4"):
        convert_dit_checkpoint(dydit_state, num_attention_heads=8)


# Sources


def test_a_static_file_must_be_named(state):
    with pytest.raises(
        ValueError, match="same keys and shapes, but differ in time and sign. Use source='dit' or source"
    ):
        convert_dit_checkpoint(state, num_attention_heads=4)


@pytest.mark.parametrize("source", ["dit", "sit"])
def test_a_static_source_with_routers(dydit_state, source):
    with pytest.raises(
        ValueError, match=f"`source`='{source}' does not fit the checkpoint, which has routers. Use 'dydit'"
    ):
        convert_dit_checkpoint(dydit_state, source=source)


def test_dydit_without_routers(state):
    with pytest.raises(ValueError, match="`source`='dydit' does not fit the checkpoint, which has no routers"):
        convert_dit_checkpoint(state, source="dydit")


def test_unknown_source(state):
    with pytest.raises(ValueError, match="`source`='DiT' is unknown. Use one of 'dit', 'dydit', 'sit'"):
        convert_dit_checkpoint(state, source="DiT")


# Faults in the weights


def test_all_faulty_keys_are_listed(dydit_state):
    for key in ("x_embedder.proj.weight", "blocks.1.attn.qkv.bias", "blocks.2.attn_rate.router.weight"):
        del dydit_state[key]
    dydit_state["blocks.0.attn.q_norm.weight"] = torch.ones(16)
    dydit_state["pos_drop"] = torch.ones(1)
    dydit_state["blocks.0.mlp.fc2.weight"] = torch.ones(64, 255)
    dydit_state["blocks.2.mlp_rate.router.bias"] = torch.ones(4)
    with pytest.raises(ValueError) as error:
        convert_dit_checkpoint(dydit_state)
    assert str(error.value).splitlines()[1:] == [
        "Missing: x_embedder.proj.weight, blocks.1.attn.qkv.bias, blocks.2.attn_rate.router.weight.",
        "Unexpected: blocks.0.attn.q_norm.weight, pos_drop.",
        "Misshapen: blocks.0.mlp.fc2.weight has shape (64, 255), not (any, 256), blocks.2.mlp_rate.router.bias has shape "
        "(4,), not (3,).",
    ]


@pytest.mark.parametrize(
    "key, shape, message",
    [
        ("final_layer.linear.weight", (20, 64), "final_layer.linear.weight has shape (20, 64), not (16, 64)"),
        ("blocks.1.adaLN_modulation.1.weight", (256, 64), "(256, 64), not (384, 64)"),
        ("blocks.1.mlp.fc1.bias", (64,), "blocks.1.mlp.fc1.bias has shape (64,), not (256,)"),
        ("x_embedder.proj.weight", (64, 16), "x_embedder.proj.weight has shape (64, 16), not (any, any, any, any)"),
        ("y_embedder.embedding_table.weight", (11, 32), "(11, 32), not (11, 64)"),
        ("y_embedder.embedding_table.weight", (0, 64), "(0, 64), not (any, 64)"),
        ("pos_embed", (16, 64), "pos_embed has shape (16, 64), not (1, any, 64)"),
    ],
)
def test_misshapen_weights(dydit_state, key, shape, message):
    dydit_state[key] = torch.ones(shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_dit_checkpoint(dydit_state)


def test_another_model_altogether():
    with pytest.raises(
        ValueError, match=r"Missing: pos_embed.*blocks\.0\.attn\.qkv\.weight.*\nUnexpected: conv_in\.weight\."
    ):
        convert_dit_checkpoint({"conv_in.weight": torch.ones(3)}, source="dit")


def test_weights_that_are_not_finite(state):
    state["blocks.1.mlp.fc1.weight"][3, 4] = math.nan
    state["t_embedder.mlp.0.bias"][7] = math.inf
    with pytest.raises(ValueError) as error:
        convert_dit_checkpoint(state, source="dit", num_attention_heads=4)
    assert "NaN or infinite values in" in str(error.value)
    assert "blocks.1.mlp.fc1.weight" in str(error.value) and "t_embedder.mlp.0.bias" in str(error.value)


def test_learned_positions(state):
    state["pos_embed"] = state["pos_embed"] + 1e-3 * randn(*state["pos_embed"].shape)
    with pytest.raises(ValueError, match="`pos_embed` of the checkpoint is not the fixed 2-D sin-cos table"):
        convert_dit_checkpoint(state, source="dit", num_attention_heads=4)


def test_what_is_no_state_dict():
    with pytest.raises(ValueError, match="The checkpoint holds state_dict, step, which are not tensors"):
        convert_dit_checkpoint({"state_dict": {}, "step": 3}, source="dit")
    with pytest.raises(ValueError, match="must be a mapping from names to tensors"):
        convert_dit_checkpoint({"model": {}}, source="dit")


# Files


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def other(state: dict) -> dict:
    return {key: value if key == "pos_embed" else value + 1 for key, value in state.items()}


def save_sharded(folder: Path, state: dict, name: str, save) -> None:
    folder.mkdir(exist_ok=True)
    shards = {name.format(1): list(state)[::2], name.format(2): list(state)[1::2]}
    for shard, keys in shards.items():
        save({key: state[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = name.replace("-{}-of-2", "") + ".index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "step": 3},
        lambda state: {"ema": state},
        lambda state: {"model": other(state), "ema": state, "args": argparse.Namespace(lr=1e-4, name="x")},
        lambda state: with_prefix("module.", state),
        lambda state: {"model": other(state), "ema": with_prefix("_orig_mod.module.", state)},
    ],
    ids=["model", "ema", "both", "module", "compiled"],
)
def test_wrapped(dydit_state, tmp_path, wrap):
    torch.save(wrap(dydit_state), tmp_path / "model.pt")
    for checkpoint in (wrap(dydit_state), tmp_path / "model.pt"):
        assert_same(convert_dit_checkpoint(checkpoint), convert_dit_checkpoint(dydit_state))


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    configs = [{key: value for key, value in m.config.items() if key[0] != "_"} for m in (model, expected)]
    assert configs[0] == configs[1]
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "legacy.pt", "model.safetensors"])
def test_files(dydit_state, tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(dydit_state, path)
    else:
        torch.save(dydit_state, path, _use_new_zipfile_serialization=name != "legacy.pt")
    expected = convert_dit_checkpoint(dydit_state)
    assert_same(convert_dit_checkpoint(path), expected)
    assert_same(convert_dit_checkpoint(str(path)), expected)


@pytest.mark.parametrize(
    "name, save", [("model-{}-of-2.safetensors", save_file), ("pytorch_model-{}-of-2.bin", torch.save)]
)
def test_sharded(dydit_state, tmp_path, name, save):
    save_sharded(tmp_path / "sharded", dydit_state, name, save)
    expected = convert_dit_checkpoint(dydit_state)
    assert_same(convert_dit_checkpoint(tmp_path / "sharded"), expected)
    index = next((tmp_path / "sharded").glob("*.index.json"))
    assert_same(convert_dit_checkpoint(index), expected)

    (tmp_path / "sharded" / name.format(2)).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"shards that do not exist beside it: {name.format(2)}.")):
        convert_dit_checkpoint(index)


def test_path_that_does_not_exist(tmp_path):
    message = "model.pt does not exist. Give a local file or folder: nothing is downloaded."
    with pytest.raises(FileNotFoundError, match=message):
        convert_dit_checkpoint(tmp_path / "model.pt", source="dit")


def test_folder_without_one_index(dydit_state, tmp_path):
    with pytest.raises(ValueError, match=r"must hold one \*.index.json, but holds none. Name the file to read"):
        convert_dit_checkpoint(tmp_path)
    save_sharded(tmp_path, dydit_state, "a-{}-of-2.bin", torch.save)
    save_sharded(tmp_path, dydit_state, "b-{}-of-2.bin", torch.save)
    with pytest.raises(ValueError, match="but holds a.bin.index.json, b.bin.index.json"):
        convert_dit_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"_class_name": "DiT"}', '{"weight_map": {"po'])
def test_index_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json has no `weight_map`, so it is not the index of a sharded"):
        convert_dit_checkpoint(tmp_path / "config.json")


calls = []


class Payload:
    """Unpickling it calls a function."""

    def __reduce__(self):
        return run_code, ()


def run_code():
    calls.append(1)


def test_code_in_a_file_is_not_run(dydit_state, tmp_path):
    torch.save({"model": dydit_state, "args": Payload()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="it holds Python objects other than tensors, which are not loaded"):
        convert_dit_checkpoint(tmp_path / "model.pt")
    assert not calls


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_damaged_file(dydit_state, tmp_path, name):
    path = tmp_path / name
    save_file(dydit_state, path) if name.endswith("safetensors") else torch.save(dydit_state, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{name} cannot be read: it is damaged"):
        convert_dit_checkpoint(path)


def test_unknown_ending(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="model.gguf must end in .safetensors, .pt, .pth or .bin"):
        convert_dit_checkpoint(tmp_path / "model.gguf")


def test_converted_model_saves_and_loads(state, inputs, tmp_path):
    model = convert_dit_checkpoint(state, source="sit", num_attention_heads=4)
    model.save_pretrained(tmp_path)
    assert_same(DynaDiTTransformer2DModel.from_pretrained(tmp_path), model)


# diffusers' DiT

TINY_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "norm_eps": 1e-2,  # far from the other norms' 1e-6, so that it shows in the output
}


def diffusers_dit(share_embedders: bool = True, **overrides) -> DiTTransformer2DModel:
    """diffusers' DiT with random weights, its zero-initialised layers included."""
    model = DiTTransformer2DModel(**{**TINY_DIT, **overrides}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    if share_embedders:
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.mark.parametrize("out_channels", [None, 3, 6])
def test_diffusers_dit(out_channels):
    theirs = diffusers_dit(out_channels=out_channels)
    ours = convert_diffusers_dit(theirs)
    assert not ours.training and ours.config.router_mode == "capacity"
    assert (ours.config.num_classes, ours.null_class_label) == (5, 5)
    x, t, y = randn(4, 3, 8, 8), torch.tensor([0, 17, 640, 999]), torch.tensor([0, 2, 4, 5])
    with torch.no_grad():
        expected = theirs(x, t, y).sample
        torch.testing.assert_close(ours(x, t, y, complete_model=True).sample, expected, **CLOSE)
        torch.testing.assert_close(ours(x, t, y).sample, expected, **CLOSE)


def test_diffusers_dit_from_a_folder(tmp_path):
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path / "dit")
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    torch.manual_seed(0)  # draws the fresh token selectors
    expected = convert_diffusers_dit(theirs, router_mode="threshold")
    for path in (tmp_path / "dit", str(tmp_path / "pipeline")):
        torch.manual_seed(0)
        assert_same(convert_diffusers_dit(path, router_mode="threshold"), expected)


def test_diffusers_dit_whose_embedders_differ():
    theirs = diffusers_dit()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[0] += 1e-6
    with pytest.raises(ValueError, match=r"\(`norm1.emb`\) of the blocks 2 differ from those of block 0"):
        convert_diffusers_dit(theirs)
    with pytest.raises(ValueError, match="of the blocks 1, 2 differ"):
        convert_diffusers_dit(diffusers_dit(share_embedders=False))


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"activation_fn": "geglu"},
            "`activation_fn`='geglu' in the config cannot be converted, only 'gelu-approximate'",
        ),
        ({"attention_bias": False}, "`attention_bias`=False in the config cannot be converted"),
        ({"norm_elementwise_affine": True}, "`norm_elementwise_affine`=True in the config cannot be converted"),
        ({"out_channels": 5}, "`out_channels`=5 in the config cannot be converted, only 3 or 6"),
    ],
)
def test_diffusers_dit_of_another_kind(tmp_path, given, message):
    theirs = diffusers_dit(**given)
    theirs.save_pretrained(tmp_path)
    for model_or_path in (theirs, tmp_path):
        with pytest.raises(ValueError, match=re.escape(message)):
            convert_diffusers_dit(model_or_path)


def test_diffusers_folder_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(ValueError, match="`_class_name`='PixArtTransformer2DModel' in the config cannot be converted"):
        convert_diffusers_dit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"norm_type": "ada_norm_single"}))
    with pytest.raises(ValueError, match="`norm_type`='ada_norm_single' in the config cannot be converted"):
        convert_diffusers_dit(tmp_path)
    with pytest.raises(ValueError, match="must be a folder with the config.json of a DiT"):
        convert_diffusers_dit(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert_diffusers_dit(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="`model_or_path` must be a DiTTransformer2DModel or a path"):
        convert_diffusers_dit(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "missing, unexpected, message",
    [
        (["proj_out_1.bias"], [], "Missing: proj_out_1.bias. Unexpected: none."),
        ([], ["extra"], "Missing: none. Unexpected: extra."),
    ],
)
def test_diffusers_folder_whose_weights_do_not_fit(tmp_path, missing, unexpected, message):
    diffusers_dit().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = {key: value for key, value in load_file(path).items() if key not in missing}
    save_file({**weights, **{key: torch.ones(1) for key in unexpected}}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"do not fit its config. {message}")):
        convert_diffusers_dit(tmp_path)


def test_diffusers_dit_with_nan():
    theirs = diffusers_dit()
    with torch.no_grad():
        theirs.proj_out_2.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite values in proj_out_2.weight"):
        convert_diffusers_dit(theirs)


# Sorting


def head_importance(block) -> torch.Tensor:
    dim, head_dim = block.attn.qkv.in_features, block.attn.head_dim
    result = []
    for head in range(dim // head_dim):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        value = block.attn.qkv.weight[2 * dim :][rows]
        output = block.attn.to_out[0].weight[:, rows]
        result.append(value.square().sum().sqrt() * output.square().sum().sqrt())
    return torch.stack(result)


def channel_importance(block) -> torch.Tensor:
    mlp = block.mlp
    return mlp.fc1.weight.square().sum(dim=1).sqrt() * mlp.fc2.weight.square().sum(dim=0).sqrt()


def is_descending(values: torch.Tensor) -> bool:
    return bool((values.diff() <= 1e-6 * values[0]).all())


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("router_mode", ["capacity", "threshold"])
def test_sort_by_importance(state, inputs, qk_norm, router_mode):
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=4, router_mode=router_mode)
    if qk_norm:
        weights = model.state_dict()
        model = DynaDiTTransformer2DModel.from_config(model.config, qk_norm=qk_norm).eval()
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            for block in model.transformer_blocks:
                block.attn.norm_q.weight.copy_(1 + 0.5 * randn(16))
    x, t, y = inputs
    with torch.no_grad():
        complete = model(x, t, y, complete_model=True).sample
        before = [(head_importance(block), channel_importance(block)) for block in model.transformer_blocks]
        assert not any(is_descending(values) for pair in before for values in pair), "nothing to sort"

        assert sort_by_importance(model) is model

        for (heads, channels), block in zip(before, model.transformer_blocks, strict=True):
            torch.testing.assert_close(head_importance(block), heads.sort(descending=True).values)
            torch.testing.assert_close(channel_importance(block), channels.sort(descending=True).values)
        # sums over heads and channels in another order
        torch.testing.assert_close(model(x, t, y, complete_model=True).sample, complete, **CLOSE)
        torch.testing.assert_close(model(x, t, y).sample, complete, **CLOSE)
        once = {key: value.clone() for key, value in model.state_dict().items()}
        torch.testing.assert_close(sort_by_importance(model).state_dict(), once, rtol=0, atol=0)


def test_sorting_the_heads_that_read_the_text():
    model = tiny_dyna_dit(num_classes=None, cross_attention_dim=24, caption_channels=16, qk_norm="rms_norm")
    for block in model.transformer_blocks:
        model.initialize_routers(block)

    def importances():
        for block in model.transformer_blocks:
            value = block.cross_attn.to_kv.weight[32:].unflatten(0, (4, 8)).norm(dim=(1, 2))
            yield value * block.cross_attn.to_out[0].weight.unflatten(1, (4, 8)).norm(dim=(0, 2))

    inputs = {"hidden_states": randn(2, 4, 8, 8), "timestep": 300.0, "encoder_hidden_states": randn(2, 5, 16, seed=1)}
    with torch.no_grad():
        before, expected = list(importances()), model(**inputs, complete_model=True).sample
        assert not all(is_descending(values) for values in before)
        sort_by_importance(model)
        for values, sorted_values in zip(before, importances(), strict=True):
            torch.testing.assert_close(sorted_values, values.sort(descending=True).values)
        torch.testing.assert_close(model(**inputs, complete_model=True).sample, expected, **CLOSE)
        model.transformer_blocks[2].cross_attn_rate.weight[0, 0] = 1e-3
    with pytest.raises(ValueError, match=r"trained routers \(blocks 2\)"):
        sort_by_importance(model)


def test_sorting_makes_a_narrow_model_better(state, inputs):
    """Most of the magnitude planted in the last head and in channels spread over all groups: half the width has it."""
    for i in range(3):
        state[f"blocks.{i}.attn.proj.weight"][:, :48] *= 0.05
        state[f"blocks.{i}.mlp.fc2.weight"][:, torch.arange(256) % 4 != 0] *= 0.05
    errors = []
    for is_sorted in (False, True):
        model = convert_dit_checkpoint(state, source="dit", num_attention_heads=4)
        if is_sorted:
            sort_by_importance(model)
        with torch.no_grad():
            complete = model(*inputs, complete_model=True).sample
            model.set_width(0.5)
            errors.append((model(*inputs, complete_model=True).sample - complete).square().mean())
    assert errors[1] < 0.1 * errors[0]


def test_sorting_in_half_precision(state):
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=4).to(torch.bfloat16)
    sort_by_importance(model)
    with torch.no_grad():
        for block in model.float().transformer_blocks:
            assert is_descending(head_importance(block)) and is_descending(channel_importance(block))


def test_trained_routers_are_not_sorted(dydit_state, state):
    with pytest.raises(ValueError, match=r"`model` has trained routers \(blocks 0, 1, 2\).*Sort before fine-tuning"):
        sort_by_importance(convert_dit_checkpoint(dydit_state))

    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=4)
    with torch.no_grad():
        model.transformer_blocks[1].mlp_rate.weight[0, 0] = 1e-3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"trained routers \(blocks 1\)"):
        sort_by_importance(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_adapters_are_not_sorted(state):
    peft = pytest.importorskip("peft")
    model = convert_dit_checkpoint(state, source="dit", num_attention_heads=4)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(ValueError, match="`model` has adapters, which would not be sorted with it"):
        sort_by_importance(model)
