# SPDX-License-Identifier: Apache-2.0
"""
Converts a local DiT, SiT, DyDiT or diffusers checkpoint to a `DynaDiTPipeline`. Nothing is downloaded.

    python examples/convert_checkpoint.py --checkpoint_path DiT-XL-2-256x256.pt --source dit --output_dir dit-xl-dyna \
        --vae sd-vae-ft-ema --id2label imagenet.json
    python examples/convert_checkpoint.py --checkpoint_path SiT-XL-2-256x256.pt --source sit --output_dir sit-xl-dyna
    python examples/convert_checkpoint.py --checkpoint_path DyDiT-XL.pth --output_dir dydit-xl

A folder of diffusers' `DiTPipeline` or `DiTTransformer2DModel`, whose VAE, scheduler and class names are taken along:

    python examples/convert_checkpoint.py --checkpoint_path DiT-XL-2-256 --source diffusers --output_dir dit-xl-dyna

To fine-tune a static model to a budget, add `--sort_by_importance`: what matters most is then never switched off.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, SchedulerMixin

from diffusers_dyna import DynaDiTPipeline, DynaDiTTransformer2DModel, FlowMatchODEScheduler
from diffusers_dyna.conversion import convert_diffusers_dit, convert_dit_checkpoint, sort_by_importance


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--checkpoint_path",
        required=True,
        help="Local .pt, .pth, .bin or .safetensors file, the .index.json of a sharded one, or a folder that holds one; "
        "with --source diffusers, a folder of diffusers.",
    )
    group.add_argument(
        "--source",
        choices=("dit", "dydit", "sit", "diffusers"),
        help="What wrote the checkpoint. Default: dydit where it has routers; a static checkpoint must be named.",
    )
    group.add_argument(
        "--num_attention_heads",
        type=int,
        help="Heads of a static checkpoint that has the width and depth of no preset. Default: the preset's.",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, help="Folder to write.")
    group.add_argument(
        "--router_mode",
        choices=("threshold", "capacity"),
        help="Rule of the routers. Default: threshold for dydit, which was trained with it; else capacity.",
    )
    group.add_argument(
        "--sort_by_importance",
        action="store_true",
        help="Reorder heads and MLP channels by magnitude, before fine-tuning to a budget. Not for dydit.",
    )
    group.add_argument("--seed", type=int, default=0, help="Draws the token selectors of a static source. Default: 0.")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="Of the transformer's weights, but for routers and embedders, which stay in float32. Default: float32.",
    )
    group.add_argument(
        "--as_pipeline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Write a whole pipeline, or the transformer alone. Default: the pipeline.",
    )
    group.add_argument(
        "--scheduler",
        choices=("ddim", "ddpm", "flow"),
        help="Of the pipeline: ddim or ddpm, both with DiT's linear betas, or flow. Default: what a folder of diffusers "
        "has, else flow for sit and ddim for the others.",
    )
    group.add_argument("--vae", help="Local folder of the pipeline's AutoencoderKL, or of a pipeline with one.")
    group.add_argument("--id2label", help='JSON file with the names of the classes: {"0": "tench", ...}.')
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises on everything that can be known to be wrong before weights are read."""
    if not Path(args.checkpoint_path).exists():
        raise ValueError(f"`--checkpoint_path` {args.checkpoint_path} does not exist. Nothing is downloaded.")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"`--output_dir` {args.output_dir} is a file. Give a folder, which need not exist.")
    if args.source == "dydit" and args.sort_by_importance:
        raise ValueError(
            "`--sort_by_importance` is for static sources: the routers of dydit know heads by their place."
        )
    if args.source == "diffusers" and args.num_attention_heads is not None:
        raise ValueError("`--num_attention_heads` is in the config of `--source diffusers`. Leave it out.")
    if not args.as_pipeline:
        for name in ("scheduler", "vae", "id2label"):
            if getattr(args, name) is not None:
                raise ValueError(f"`--{name}` is part of the pipeline, which `--no-as_pipeline` leaves out.")
    if args.scheduler is not None and (args.scheduler == "flow") != (args.source == "sit"):
        raise ValueError(
            f"`--scheduler {args.scheduler}` does not fit `--source {args.source or 'dydit'}`: sit predicts a velocity, "
            "which needs flow; the others predict the noise, which needs ddim or ddpm."
        )
    if args.vae is not None and not Path(args.vae).is_dir():
        raise ValueError(f"`--vae` {args.vae} is not a folder. Nothing is downloaded.")
    if args.id2label is not None:
        read_id2label(args.id2label)


def read_id2label(path: str) -> dict[int, str]:
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
        return {int(label): str(name) for label, name in names.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f'`--id2label` {path} must be a JSON file like {{"0": "tench", ...}}: {error}') from None


def make_scheduler(name: str, learn_sigma: bool) -> SchedulerMixin:
    if name == "flow":
        return FlowMatchODEScheduler()
    # DiT's diffusion; latents have values beyond the [-1, 1] that clipping would leave.
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    if name == "ddim":
        return DDIMScheduler(**settings)
    return DDPMScheduler(**settings, variance_type="learned_range" if learn_sigma else "fixed_large")


def load_vae(path: str | Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(path, subfolder="vae" if (Path(path) / "vae").is_dir() else None)


def convert(args: argparse.Namespace) -> DynaDiTTransformer2DModel:
    given = {name: getattr(args, name) for name in ("num_attention_heads", "router_mode")}
    given = {name: value for name, value in given.items() if value is not None}
    torch.manual_seed(args.seed)
    if args.source == "diffusers":
        transformer = convert_diffusers_dit(args.checkpoint_path, **given)
    else:
        transformer = convert_dit_checkpoint(args.checkpoint_path, args.source, **given)
    if args.sort_by_importance:
        sort_by_importance(transformer)
    for name, parameter in transformer.named_parameters():
        if not set(name.split(".")) & set(transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(getattr(torch, args.dtype))
    return transformer


def main(args: argparse.Namespace) -> None:
    transformer = convert(args)
    saved = transformer
    if args.as_pipeline:
        scheduler = vae = id2label = None
        folder = Path(args.checkpoint_path)
        if args.source == "diffusers" and (folder / "model_index.json").is_file():
            components = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            scheduler_class = getattr(diffusers, components["scheduler"][1])
            scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler")
            if (folder / "vae").is_dir():
                vae = load_vae(folder)
            id2label = components.get("id2label")
        if args.scheduler is not None or scheduler is None:
            default = "flow" if args.source == "sit" else "ddim"
            scheduler = make_scheduler(args.scheduler or default, transformer.config.learn_sigma)
        if args.vae is not None:
            vae = load_vae(args.vae)
        if args.id2label is not None:
            id2label = read_id2label(args.id2label)
        saved = DynaDiTPipeline(transformer, scheduler, vae=vae, id2label=id2label)
    saved.save_pretrained(args.output_dir)
    config = transformer.config
    print(
        f"Saved a {type(saved).__name__} to {args.output_dir}: {config.num_layers} layers, {config.num_attention_heads} "
        f"heads of {config.attention_head_dim}, {transformer.num_parameters():,} parameters, "
        f"router_mode={config.router_mode!r}"
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
