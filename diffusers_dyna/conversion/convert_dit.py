# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of DiT, SiT, DyDiT and of diffusers' DiT as [`DynaDiTTransformer2DModel`]."""

import argparse
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffusers import DiTTransformer2DModel

from ..models import DYNA_DIT_CONFIGS, DynaDiTTransformer2DModel


SOURCES = ("dit", "dydit", "sit")
KINDS = ("weight", "bias")

# Names of the layers in the public files and here. All have a weight and a bias.
LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_embedding.linear_1",
    "t_embedder.mlp.2": "time_embedding.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
BLOCK_LAYERS = {
    "adaLN_modulation.1": "modulation",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ROUTER_LAYERS = {
    "attn_rate.router": "attn_rate",
    "mlp_rate.router": "mlp_rate",
    "token_selection.mlp_head.0": "token_selection.linear_1",
    "token_selection.mlp_head.2": "token_selection.linear_2",
}

# The same for diffusers' DiT, but for its queries, keys and values, which are three layers.
DIFFUSERS_LAYERS = {
    "pos_embed.proj": "pos_embed.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "time_embedding.linear_1",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "time_embedding.linear_2",
    "proj_out_1": "norm_out.linear",
    "proj_out_2": "proj_out",
}
DIFFUSERS_BLOCK_LAYERS = {
    "norm1.linear": "modulation",
    "attn1.to_out.0": "attn.to_out.0",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
# What the config of a convertible DiT of diffusers holds. Configs older than its own class name the class that it was
# split off from.
DIFFUSERS_CONFIG = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
}


def convert_dit_checkpoint(
    state_dict_or_path: Mapping[str, torch.Tensor] | str | Path, source: str | None = None, **config_overrides
) -> DynaDiTTransformer2DModel:
    r"""
    Reads a checkpoint in the layout of DiT ([arXiv 2212.09748](https://huggingface.co/papers/2212.09748)), SiT
    ([arXiv 2401.08740](https://huggingface.co/papers/2401.08740)) or DyDiT
    ([arXiv 2410.03456](https://huggingface.co/papers/2410.03456)). Nothing is downloaded.

    The model is called as any other of diffusers, whatever the source: a large `timestep` is noise, and a velocity is
    `noise - sample`.

    | `source` | time that is embedded | output |
    |---|---|---|
    | `"dit"`, `"dydit"` | `timestep` | the file's |
    | `"sit"` | `1 - timestep / 1000`: SiT's time is 0 at the noise and 1 at the data | minus the file's, a velocity of `sample - noise` |

    The time is kept in `timestep_scale` and `timestep_shift` of the config, the sign in `proj_out`. SiT's files have
    twice the output channels that SiT uses; the unused half is dropped.

    The config is read off the shapes. The number of heads is read off the routers; for a static file it is that of the
    preset of `DYNA_DIT_CONFIGS` with the same width and depth. The last row of the class table is taken for the null
    class; where a file has no null class, give `class_dropout_prob=0`.

    Args:
        state_dict_or_path (`Mapping[str, torch.Tensor]`, `str` or `Path`):
            The weights, or a local `.pt`, `.pth`, `.bin` (read with `weights_only=True`) or `.safetensors` file, the
            `*.index.json` of a sharded checkpoint, or a folder that holds one. Where a checkpoint has several sets of
            weights, `"ema"` is taken, else `"model"`; to convert another one, pass it as a mapping. `module.` and
            `_orig_mod.` in the keys are ignored.
        source (`str`, *optional*):
            `"dit"`, `"dydit"` or `"sit"`. `None` recognises DyDiT by its routers. A file without routers must be named:
            DiT's and SiT's have the same keys and shapes, but another time and sign.
        **config_overrides (`dict`):
            Arguments of [`DynaDiTTransformer2DModel`] that the file does not fix: `num_attention_heads` where no preset
            has the width and depth, `num_classes` and `class_dropout_prob`, `sample_size` where the tokens are not a
            square, `router_mode` (default: `"threshold"` for DyDiT, whose routers were trained with it, `"capacity"`
            for static sources).

    Returns:
        [`DynaDiTTransformer2DModel`]: in float32 and in evaluation mode. With a static source, the routers are as at
        initialisation: everything is on.

    Raises:
        `FileNotFoundError`: if the file, the folder or a shard does not exist.
        `ValueError`:
            On a file that cannot be read; a `source` that does not fit the routers; missing, unexpected and misshapen
            keys, all of which are listed; weights that are not finite; learned positions; a number of heads that is not
            known; an override that contradicts the file.
    """
    if source not in (None, *SOURCES):
        raise ValueError(f"`source`={source!r} is unknown. Use one of {', '.join(map(repr, SOURCES))}.")
    weights = _find_weights(_read(state_dict_or_path))
    has_routers = any(f".{layer}." in key for key in weights for layer in ROUTER_LAYERS)
    if source is None and not has_routers:
        raise ValueError(
            "`source` must be given for a checkpoint without routers: DiT's and SiT's files have the same keys and "
            "shapes, but differ in time and sign. Use source='dit' or source='sit'."
        )
    source = source or "dydit"
    if has_routers != (source == "dydit"):
        found, fitting = ("routers", "'dydit'") if has_routers else ("no routers", "'dit' or 'sit'")
        raise ValueError(f"`source`={source!r} does not fit the checkpoint, which has {found}. Use {fitting}.")

    has_classes = config_overrides.get("num_classes", 0) is not None
    sizes = _Sizes.of(weights)
    _check_keys(weights, sizes.layout(has_routers, has_classes))
    positions = weights["pos_embed"]
    weights = _to_finite_float32(weights)

    num_attention_heads = sizes.num_routed + 1 if has_routers else config_overrides.get("num_attention_heads")
    if num_attention_heads is None:
        presets = {
            (preset["num_layers"], preset["num_attention_heads"] * preset["attention_head_dim"]): preset
            for preset in DYNA_DIT_CONFIGS.values()
        }
        if (sizes.num_layers, sizes.width) not in presets:
            raise ValueError(
                f"`num_attention_heads` must be given: the checkpoint has {sizes.num_layers} layers of width "
                f"{sizes.width}, like no preset of `DYNA_DIT_CONFIGS`, and its shapes do not tell."
            )
        num_attention_heads = presets[sizes.num_layers, sizes.width]["num_attention_heads"]
    if num_attention_heads < 1 or sizes.width % num_attention_heads:
        raise ValueError(f"`num_attention_heads`={num_attention_heads} must divide the width {sizes.width}.")

    model = _make_model(
        config_overrides,
        fixed={
            "sample_size": _sample_size(sizes.num_tokens, sizes.patch_size, config_overrides.get("sample_size")),
            "patch_size": sizes.patch_size,
            "in_channels": sizes.in_channels,
            "num_layers": sizes.num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": sizes.width // num_attention_heads,
            "mlp_ratio": sizes.mlp_width / sizes.width,
            "learn_sigma": source != "sit" and sizes.out_channels == 2 * sizes.in_channels,
            "qk_norm": None,
        },
        defaults={
            **_classes(sizes.class_rows if has_classes else None, config_overrides),
            "router_mode": "threshold" if has_routers else "capacity",
            "timestep_scale": -0.001 if source == "sit" else 1.0,
            "timestep_shift": 1.0 if source == "sit" else 0.0,
        },
    )
    _check_positions(positions, model.pos_embed.positions)

    names = dict(LAYERS)
    for i in range(sizes.num_layers):
        for public, ours in {**BLOCK_LAYERS, **(ROUTER_LAYERS if has_routers else {})}.items():
            names[f"blocks.{i}.{public}"] = f"transformer_blocks.{i}.{ours}"
    converted = {f"{ours}.{kind}": weights[f"{public}.{kind}"] for public, ours in names.items() for kind in KINDS}
    if has_classes:
        converted["class_embedding.weight"] = weights["y_embedder.embedding_table.weight"]
    for kind in KINDS:
        converted[f"norm_out.linear.{kind}"] = _swap_halves(converted[f"norm_out.linear.{kind}"])
        if source == "sit":
            rows = converted[f"proj_out.{kind}"].unflatten(0, (-1, sizes.out_channels))  # (p * p, C, ...)
            converted[f"proj_out.{kind}"] = -rows[:, : sizes.in_channels].flatten(0, 1)
    return _load(model, converted)


def convert_diffusers_dit(
    model_or_path: DiTTransformer2DModel | str | Path, **config_overrides
) -> DynaDiTTransformer2DModel:
    r"""
    Takes over diffusers' own DiT, with equal outputs. Nothing is downloaded.

    It has a time and class embedder in each block; the converted model has one for all, so they must be equal. Against
    the public DiT code diffusers spaces the frequencies of the time otherwise (127 steps for 128 frequencies) and has
    1e-5 as the epsilon of one norm. Both are kept: for the public code's, give `downscale_freq_shift=0` and
    `mlp_norm_eps=1e-6`.

    Args:
        model_or_path ([`~diffusers.DiTTransformer2DModel`], `str` or `Path`):
            The model, or a local folder of it or of a pipeline that has it as `transformer`.
        **config_overrides (`dict`):
            Arguments of [`DynaDiTTransformer2DModel`] that the model does not fix, such as `router_mode` (default:
            `"capacity"`).

    Returns:
        [`DynaDiTTransformer2DModel`]: in float32 and in evaluation mode, with routers as at initialisation: everything
        is on.

    Raises:
        `FileNotFoundError`: if the folder does not exist.
        `TypeError`: on a model of another class.
        `ValueError`:
            On a config with another norm, activation or number of output channels, embedders that differ, a folder with
            missing or unexpected weights, weights that are not finite, and an override that contradicts the model.
    """
    if isinstance(model_or_path, (str, Path)):
        model_or_path = _load_diffusers_dit(Path(model_or_path))
    if not isinstance(model_or_path, DiTTransformer2DModel):
        raise TypeError(f"`model_or_path` must be a DiTTransformer2DModel or a path, but is a {type(model_or_path)}.")
    config = model_or_path.config
    _check_diffusers_config(config)
    weights = _to_finite_float32(model_or_path.state_dict())

    first = "transformer_blocks.0.norm1.emb."
    embedder_keys = [key.removeprefix(first) for key in weights if key.startswith(first)]
    differing = [
        str(i)
        for i in range(1, config.num_layers)
        if any(
            not torch.equal(weights[f"transformer_blocks.{i}.norm1.emb.{key}"], weights[first + key])
            for key in embedder_keys
        )
    ]
    if differing:
        raise ValueError(
            f"The time and class embedders (`norm1.emb`) of the blocks {', '.join(differing)} differ from those of "
            "block 0. The converted model has one embedder for all blocks: only a model whose embedders are equal can "
            "be converted."
        )

    width = config.num_attention_heads * config.attention_head_dim
    class_table = weights[f"{first}class_embedder.embedding_table.weight"]
    model = _make_model(
        config_overrides,
        fixed={
            "sample_size": config.sample_size,
            "patch_size": config.patch_size,
            "in_channels": config.in_channels,
            "num_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "attention_head_dim": config.attention_head_dim,
            "mlp_ratio": len(weights["transformer_blocks.0.ff.net.0.proj.weight"]) / width,
            "learn_sigma": config.out_channels == 2 * config.in_channels,
            "qk_norm": None,
        },
        defaults={
            **_classes(len(class_table), config_overrides),
            "router_mode": "capacity",
            "downscale_freq_shift": 1,
            "mlp_norm_eps": config.norm_eps,
        },
    )

    names = dict(DIFFUSERS_LAYERS)
    for i in range(config.num_layers):
        for theirs, ours in DIFFUSERS_BLOCK_LAYERS.items():
            names[f"transformer_blocks.{i}.{theirs}"] = f"transformer_blocks.{i}.{ours}"
    converted = {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for theirs, ours in names.items() for kind in KINDS}
    converted["class_embedding.weight"] = class_table
    for kind in KINDS:
        converted[f"norm_out.linear.{kind}"] = _swap_halves(converted[f"norm_out.linear.{kind}"])
        for i in range(config.num_layers):
            attn = f"transformer_blocks.{i}.attn1"
            converted[f"transformer_blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [weights[f"{attn}.{name}.{kind}"] for name in ("to_q", "to_k", "to_v")]
            )
    return _load(model, converted)


def sort_by_importance(model: DynaDiTTransformer2DModel) -> DynaDiTTransformer2DModel:
    r"""
    Reorders the heads of every attention layer and the hidden channels of every MLP by magnitude, most important first,
    in place. The complete model computes the same. Group 0, which is always on, then matters most, and a width below 1
    keeps what matters: the start for fine-tuning a static model to a budget (DyDiT,
    [arXiv 2410.03456](https://huggingface.co/papers/2410.03456)).

    The importance of a head is |V| |O|: the Frobenius norms of its rows of the value projection and of its columns of
    the output projection. That of a channel is |w1| |w2|: the norms of its row of `fc1` and of its column of `fc2`. A
    factor moved from one layer to the other leaves the products as they are. The groups of an MLP are equal runs of its
    sorted channels.

    Routers are left as they are, so they must not have been trained: they choose heads and groups by their place.

    Args:
        model ([`DynaDiTTransformer2DModel`]): a model whose routers have not been trained.

    Returns:
        [`DynaDiTTransformer2DModel`]: `model`.

    Raises:
        `ValueError`: on a model with trained routers or with adapters.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("`model` has adapters, which would not be sorted with it. Fuse and unload them first.")
    trained = [
        str(i)
        for i, block in enumerate(model.transformer_blocks)
        # They start at zero: the same for every head and every timestep.
        if any(router.weight.any() for router in block.group_routers())
    ]
    if trained:
        raise ValueError(
            f"`model` has trained routers (blocks {', '.join(trained)}), which choose heads and groups by their place. "
            "Sort before fine-tuning."
        )
    for block in model.transformer_blocks:
        _sort_heads_(block.attn, {block.attn.qkv: 3})
        if block.cross_attn is not None:
            _sort_heads_(block.cross_attn, {block.cross_attn.to_q: 1, block.cross_attn.to_kv: 2})

        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        importance = fc1.weight.detach().float().norm(dim=1) * fc2.weight.detach().float().norm(dim=0)
        order = importance.argsort(descending=True, stable=True)
        for parameter in fc1.parameters():
            _permute_(parameter, 0, (1, -1, 1), order)
        _permute_(fc2.weight, 1, (1, -1, 1), order)
    return model


@torch.no_grad()
def _sort_heads_(attn: torch.nn.Module, num_stacked: dict[torch.nn.Linear, int]) -> None:
    """Reorders the heads of an attention whose layers stack so many of query, key and value; the value is the last."""
    heads = attn.heads
    layer, stacked = list(num_stacked.items())[-1]
    value = layer.weight.detach().float().unflatten(0, (stacked, heads, -1))[-1]  # (heads, head_dim, D)
    output = attn.to_out[0].weight.detach().float().unflatten(1, (heads, -1))  # (D, heads, head_dim)
    importance = value.norm(dim=(1, 2)) * output.norm(dim=(0, 2))
    order = importance.argsort(descending=True, stable=True)
    for layer, stacked in num_stacked.items():
        for parameter in layer.parameters():
            _permute_(parameter, 0, (stacked, heads, -1), order)
    _permute_(attn.to_out[0].weight, 1, (1, heads, -1), order)


@torch.no_grad()
def _permute_(parameter: torch.Tensor, dim: int, sizes: tuple[int, int, int], order: torch.Tensor) -> None:
    """Reorders the middle one of the parts that dimension `dim` consists of."""
    parts = parameter.unflatten(dim, sizes)
    parameter.copy_(parts.index_select(dim + 1, order).flatten(dim, dim + 2))


# Reading files


def _read(state_dict_or_path) -> Mapping:
    if isinstance(state_dict_or_path, Mapping):
        return state_dict_or_path
    path = Path(state_dict_or_path)
    _check_exists(path)
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        if len(indices) != 1:
            found = ", ".join(index.name for index in indices) or "none"
            raise ValueError(
                f"The folder {path} must hold one *.index.json, but holds {found}. Name the file to read."
            )
        path = indices[0]
    if path.suffix != ".json":
        return _read_file(path)

    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text
        index = None
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{path} has no `weight_map`, so it is not the index of a sharded checkpoint.")
    shards = [path.parent / name for name in sorted(set(index["weight_map"].values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise FileNotFoundError(f"{path} names shards that do not exist beside it: {', '.join(absent)}.")
    return {key: weight for shard in shards for key, weight in _read_file(shard).items()}


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a local file or folder: nothing is downloaded.")


def _read_file(path: Path) -> Mapping:
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} must end in .safetensors, .pt, .pth or .bin.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts save their arguments with the weights: a plain object without code of its own.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of before torch 1.6 are no zip archives and cannot be mapped into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, or it holds Python objects other than tensors, which are not "
            "loaded since they could run code. Save the weights alone."
        ) from error


def _load_diffusers_dit(path: Path) -> DiTTransformer2DModel:
    _check_exists(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} must be a folder with the config.json of a DiT, or with its folder `transformer`.")
    _check_diffusers_config(DiTTransformer2DModel.load_config(folder))
    model, info = DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The weights in {folder} do not fit its config. Missing: {', '.join(info['missing_keys']) or 'none'}. "
            f"Unexpected: {', '.join(info['unexpected_keys']) or 'none'}."
        )
    return model


def _check_diffusers_config(config: Mapping) -> None:
    for name, allowed in DIFFUSERS_CONFIG.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"`{name}`={config[name]!r} in the config cannot be converted, only {allowed[0]!r}.")
    in_channels, out_channels = config.get("in_channels", 4), config.get("out_channels")
    if out_channels not in (None, in_channels, 2 * in_channels):
        raise ValueError(
            f"`out_channels`={out_channels} in the config cannot be converted, only {in_channels} or "
            f"{2 * in_channels}: `in_channels`, or twice as many with the variance."
        )


# Checking what was read


def _find_weights(checkpoint) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under plain names."""
    if isinstance(checkpoint, Mapping):
        for name in ("ema", "model"):
            if isinstance(checkpoint.get(name), Mapping):
                checkpoint = checkpoint[name]
                break
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise ValueError("The checkpoint must be a mapping from names to tensors, as such or under `ema` or `model`.")
    others = [str(key) for key, weight in checkpoint.items() if not isinstance(weight, torch.Tensor)]
    if others:
        raise ValueError(
            f"The checkpoint holds {', '.join(others)}, which are not tensors. Pass the weights as a mapping from "
            "names to tensors, as such or under `ema` or `model`."
        )
    # Left by `DistributedDataParallel` and `torch.compile`.
    wrappers = ("module", "_orig_mod")
    return {
        ".".join(part for part in key.split(".") if part not in wrappers): weight for key, weight in checkpoint.items()
    }


@dataclass
class _Sizes:
    """What the shapes of a public checkpoint tell. 0 is unknown: the weight is missing or has another rank."""

    num_layers: int
    width: int
    in_channels: int
    patch_size: int
    num_tokens: int
    class_rows: int
    mlp_width: int
    num_routed: int
    out_channels: int

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> "_Sizes":
        def shape(key: str, rank: int) -> tuple[int, ...]:
            found = tuple(weights[key].shape) if key in weights else ()
            return found if len(found) == rank else (0,) * rank

        blocks = [key.split(".")[1] for key in weights if key.startswith("blocks.")]
        width, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
        out_channels = in_channels
        if shape("final_layer.linear.weight", 2)[0] == patch_size**2 * 2 * in_channels:
            out_channels = 2 * in_channels
        return cls(
            num_layers=max((int(block) for block in blocks if block.isdecimal()), default=-1) + 1,
            width=width,
            in_channels=in_channels,
            patch_size=patch_size,
            num_tokens=shape("pos_embed", 3)[1],
            class_rows=shape("y_embedder.embedding_table.weight", 2)[0],
            mlp_width=shape("blocks.0.mlp.fc1.weight", 2)[0],
            num_routed=shape("blocks.0.attn_rate.router.weight", 2)[0],
            out_channels=out_channels,
        )

    def layout(self, has_routers: bool, has_classes: bool) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of such a checkpoint, in which 0 stands for any size."""
        width, mlp_width, patch_size = self.width, self.mlp_width, self.patch_size
        layers = {
            "x_embedder.proj": (width, self.in_channels, patch_size, patch_size),
            "t_embedder.mlp.0": (width, 256),
            "t_embedder.mlp.2": (width, width),
            "final_layer.adaLN_modulation.1": (2 * width, width),
            "final_layer.linear": (patch_size**2 * self.out_channels, width),
        }
        for i in range(max(self.num_layers, 1)):
            layers |= {
                f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
                f"blocks.{i}.attn.qkv": (3 * width, width),
                f"blocks.{i}.attn.proj": (width, width),
                f"blocks.{i}.mlp.fc1": (mlp_width, width),
                f"blocks.{i}.mlp.fc2": (width, mlp_width),
            }
            if has_routers:
                layers |= {
                    f"blocks.{i}.attn_rate.router": (self.num_routed, width),
                    f"blocks.{i}.mlp_rate.router": (self.num_routed, width),
                    f"blocks.{i}.token_selection.mlp_head.0": (width // 16, width),
                    f"blocks.{i}.token_selection.mlp_head.2": (1, width // 16),
                }
        shapes = {"pos_embed": (1, self.num_tokens, width)}
        if has_classes:
            shapes["y_embedder.embedding_table.weight"] = (self.class_rows, width)
        for name, shape in layers.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes


def _check_keys(weights: Mapping[str, torch.Tensor], layout: Mapping[str, tuple[int, ...]]) -> None:
    missing = [key for key in layout if key not in weights]
    unexpected = [key for key in weights if key not in layout]
    misshapen = []
    for key, expected in layout.items():
        shape = tuple(weights[key].shape) if key in weights else expected
        fits = len(shape) == len(expected) and all(want in (0, size) for size, want in zip(shape, expected))
        if key in weights and (not fits or 0 in shape):
            written = "".join(f"{size or 'any'}, " for size in expected)
            misshapen.append(f"{key} has shape {shape}, not ({written[: -1 if len(expected) == 1 else -2]})")
    faults = {"Missing": missing, "Unexpected": unexpected, "Misshapen": misshapen}
    if any(faults.values()):
        lines = [f"{name}: {', '.join(keys)}." for name, keys in faults.items() if keys]
        raise ValueError("\n".join(["The keys of the checkpoint are not those of a DiT, SiT or DyDiT:", *lines]))


def _to_finite_float32(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {key: weight.float() for key, weight in weights.items()}
    not_finite = [key for key, weight in weights.items() if not torch.isfinite(weight).all()]
    if not_finite:
        raise ValueError(f"The checkpoint holds NaN or infinite values in {', '.join(not_finite)}.")
    return weights


def _check_positions(stored: torch.Tensor, computed: torch.Tensor) -> None:
    # The values are in [-1, 1]. The sine of an angle of dozens is off by some 1e-6 in float32.
    tolerance = max(1e-4, torch.finfo(stored.dtype).eps)
    if (stored.float() - computed).abs().max() > tolerance:
        raise ValueError(
            "`pos_embed` of the checkpoint is not the fixed 2-D sin-cos table of DiT. Learned positions, and those of "
            "another size, are not supported."
        )


# Building the model


def _sample_size(num_tokens: int, patch_size: int, given: int | tuple[int, int] | None) -> int | tuple[int, int]:
    if given is None:
        side = math.isqrt(num_tokens)
        if side**2 != num_tokens:
            raise ValueError(f"`sample_size`=(height, width) must be given: {num_tokens} tokens are not a square.")
        return side * patch_size
    height, width = (given, given) if isinstance(given, int) else given
    if (height // patch_size) * (width // patch_size) != num_tokens:
        raise ValueError(
            f"`sample_size`={given} does not fit the checkpoint, which has {num_tokens} tokens of {patch_size}x"
            f"{patch_size}. Leave it out: the model takes other sizes when it is called."
        )
    return given


def _classes(num_rows: int | None, overrides: Mapping) -> dict:
    """`num_classes` and `class_dropout_prob` for a class table; `None` rows are no table."""
    if num_rows is None:
        return {"num_classes": None, "class_dropout_prob": 0.0}
    has_null_class = overrides.get("class_dropout_prob", float(overrides.get("num_classes") != num_rows)) > 0
    num_classes = overrides.get("num_classes", num_rows - has_null_class)
    if num_classes != num_rows - has_null_class:
        raise ValueError(
            f"`num_classes`={num_classes} does not fit the class table, which has {num_rows} rows: one a class, and "
            "one for the null class unless `class_dropout_prob` is 0."
        )
    return {"num_classes": num_classes, "class_dropout_prob": 0.1 if has_null_class else 0.0}


def _make_model(overrides: Mapping, fixed: Mapping, defaults: Mapping) -> DynaDiTTransformer2DModel:
    for name, value in fixed.items():
        if name in overrides and overrides[name] != value:
            raise ValueError(f"`{name}`={overrides[name]!r} contradicts the checkpoint, which has {value!r}.")
    return DynaDiTTransformer2DModel(**{**defaults, **overrides, **fixed})


def _swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """Shift and scale of the last layer, as every DiT has them, to scale and shift, as the model has them."""
    return torch.cat(tensor.chunk(2)[::-1])


def _load(model: DynaDiTTransformer2DModel, weights: Mapping[str, torch.Tensor]) -> DynaDiTTransformer2DModel:
    # Only the routers of a static source, and the keep rate of tokens of DyDiT, are left as they were drawn.
    model.load_state_dict({**model.state_dict(), **weights})
    return model.eval()
