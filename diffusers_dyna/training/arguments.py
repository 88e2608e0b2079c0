# SPDX-License-Identifier: Apache-2.0
"""Command-line arguments that the training scripts share, with the names that diffusers' scripts use."""

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..hub import check_can_publish
from ..models import DYNA_DIT_CONFIGS
from ..schedulers.scheduling_flow_match import PATHS
from .data import BUILT_IN_DATASETS
from .objectives import (
    COUPLINGS,
    MODE_SCALES,
    OBJECTIVES,
    PREDICTION_TYPES,
    TIME_SAMPLINGS,
    WEIGHTING_SCHEMES,
)


TASKS = ("generate", "inpaint", "upscale")
BUDGET = (
    "budget",
    "budget_loss_weight",
    "budget_warmup_steps",
    "budget_decay_steps",
    "complete_loss_steps",
    "router_learning_rate",
    "sort_by_importance",
)
SHAPE = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio", "qk_norm")
# These may differ between a run and its continuation: they change neither the weights of a step nor its data.
FREE_ON_RESUME = {
    "cache_dir",
    "caption_cache_dir",  # the encoder's weights and the captions are in the fingerprint of the captions
    "checkpointing_steps",
    "checkpoints_total_limit",
    "data_root",
    "dataloader_num_workers",
    "gradient_accumulation_steps",  # only the total batch size has to stay, and is compared by itself
    "gradient_checkpointing",
    "hub_license",
    "hub_model_id",
    "hub_private_repo",
    "latent_cache_dir",  # the VAE's weights and settings are in the fingerprint of the latents
    "logging_dir",
    "max_bad_images",
    "max_nonfinite_steps",
    "max_train_steps",
    "num_validation_images",
    "output_dir",
    "pretrained_model_name_or_path",  # a run goes on from the checkpoint's weights
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "text_batch_size",
    "text_encoder",
    "text_encoder_subfolder",
    "train_batch_size",
    "train_data_dir",
    "validation_guidance_scale",
    "validation_inference_steps",
    "validation_prompts",
    "validation_steps",
    "vae",
    "vae_batch_size",
    "vae_subfolder",
}


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """What the model is to do with an image."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task",
        choices=TASKS,
        default="generate",
        help="generate: whole images; inpaint: what is under a mask, by random masks; upscale: super-resolution. "
        "Default: generate.",
    )
    group.add_argument(
        "--upscale_factor", type=int, choices=(2, 4), help="Of --task upscale: from which part of --resolution."
    )
    group.add_argument(
        "--max_noise_level",
        type=float,
        help="Of --task upscale: the low-resolution image is noised at a level from 0 to this one, in units of "
        "timestep, in [0, 1000]. Default: 350.",
    )


def add_data_arguments(parser: argparse.ArgumentParser, with_captions: bool = False) -> None:
    """
    Which images, with their classes or captions. One of `--dataset`, `--train_data_dir` and `--dataset_name` applies.

    Args:
        parser (`argparse.ArgumentParser`): to add them to.
        with_captions (`bool`, defaults to `False`): the arguments of captions in the place of those of classes.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=BUILT_IN_DATASETS,
        help="digits: 1,797 digits of 8x8 from scikit-learn (the default); fashion-mnist: IDX files in --data_root."
        + (" The name of its class is the caption of an image." if with_captions else ""),
    )
    group.add_argument("--data_root", help="Folder with the IDX files of --dataset fashion-mnist, plain or .gz.")
    group.add_argument(
        "--train_data_dir",
        help="Folder of images with metadata.jsonl or metadata.csv: the column file_name, and --caption_column. Only the "
        "metadata at the top is read, whose file_name may lead into folders below."
        if with_captions
        else "Folder of images; an image's class is the name of its first folder.",
    )
    group.add_argument("--dataset_name", help="Data set of the `datasets` library: a name on the Hub or a local path.")
    group.add_argument("--dataset_config_name", help="Configuration of --dataset_name.")
    group.add_argument("--dataset_split", default="train", help="Split of --dataset_name. Default: train.")
    group.add_argument("--image_column", default="image", help="Image column of --dataset_name. Default: image.")
    group.add_argument("--cache_dir", help="Where `datasets` keeps what it downloads.")
    if with_captions:
        group.add_argument(
            "--caption_column",
            default="text",
            help="Column with an image's caption, or a list of captions of which each sample draws one. Default: text.",
        )
        parser.set_defaults(streaming=False, shuffle_buffer_size=0)
    else:
        group.add_argument("--label_column", default="label", help="Class column of --dataset_name. Default: label.")
        group.add_argument(
            "--streaming", action="store_true", help="Read --dataset_name as a stream, without a download."
        )
        group.add_argument(
            "--shuffle_buffer_size",
            type=int,
            default=0,
            help="Rows of a stream to draw from. Default: 0, the stream's order, which is what resumes exactly.",
        )
        group.add_argument("--unconditional", action="store_true", help="Ignore the classes.")
    group.add_argument("--resolution", type=int, help="Side of the images in pixels. Default: the data's own, or 32.")
    group.add_argument(
        "--center_crop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Crop the middle of images that are not square, or a random place. Default: the middle.",
    )
    group.add_argument("--random_flip", action="store_true", help="Mirror every other image.")
    group.add_argument(
        "--max_bad_images", type=int, default=10, help="Unreadable images to skip before giving up. Default: 10."
    )
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that read images. Default: 0, the main one."
    )


def add_latent_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether to train in the latents of a VAE."""
    group = parser.add_argument_group("latents")
    group.add_argument("--vae", help="AutoencoderKL, a name or a path, whose latents to train on. Default: pixels.")
    group.add_argument("--vae_subfolder", help="Folder of the VAE in there, such as vae of a whole pipeline.")
    group.add_argument("--latent_cache_dir", help="Where its latents are kept. Default: latents in --output_dir.")
    group.add_argument("--vae_batch_size", type=int, default=32, help="Images encoded at a time. Default: 32.")


def add_transformer_arguments(parser: argparse.ArgumentParser):
    """
    The shape of a dynamic transformer, or the weights it starts from.

    Args:
        parser (`argparse.ArgumentParser`): to add them to.

    Returns:
        The group, for what else a script's model has.
    """
    group = parser.add_argument_group("model (defaults are DynaDiTTransformer2DModel's)")
    group.add_argument("--pretrained_model_name_or_path", help="Start from these weights: a pipeline or transformer.")
    group.add_argument("--preset", choices=list(DYNA_DIT_CONFIGS), help="A public size, such as DiT-S/2.")
    group.add_argument("--patch_size", type=int, help="Side of a patch. Default: 2.")
    group.add_argument("--num_layers", type=int, help="Transformer blocks. Default: 12.")
    group.add_argument("--num_attention_heads", type=int, help="Heads, and channel groups of the MLP. Default: 6.")
    group.add_argument("--attention_head_dim", type=int, help="Width of a head. Default: 64.")
    group.add_argument("--mlp_ratio", type=float, help="Hidden width of the MLP over the width. Default: 4.")
    group.add_argument(
        "--qk_norm", choices=("layer_norm", "rms_norm"), help="Norm of queries and keys. Default: none."
    )
    group.add_argument(
        "--learn_sigma",
        action="store_true",
        help="Learn the variances too, by the variational bound; with --objective epsilon.",
    )
    group.add_argument(
        "--router_mode",
        choices=("capacity", "threshold"),
        help="The routers' rule. Default: that of the weights it starts from, else capacity.",
    )
    group.add_argument(
        "--sort_by_importance",
        action="store_true",
        help="Before the first step, order heads and channels by magnitude: the first group, always on, matters most.",
    )
    return group


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """What a dynamic transformer may cost."""
    group = parser.add_argument_group("budget")
    group.add_argument(
        "--static",
        action="store_true",
        help="Train the complete model, without routers: before a budget, or beside one as its control.",
    )
    group.add_argument("--budget", type=float, default=0.7, help="Compute ratio to reach, in (0, 1]. Default: 0.7.")
    group.add_argument("--budget_loss_weight", type=float, default=2.0, help="Weight of its loss. Default: 2.")
    group.add_argument("--budget_warmup_steps", type=int, default=100, help="Steps at a budget of 1. Default: 100.")
    group.add_argument(
        "--budget_decay_steps", type=int, default=1000, help="Steps from there to --budget. Default: 1000."
    )
    group.add_argument(
        "--complete_loss_steps",
        type=int,
        default=0,
        help="Train the complete model too, on the same noise, for the first so many steps. Default: 0.",
    )
    group.add_argument("--router_learning_rate", type=float, help="Of the routers. Default: --learning_rate.")


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """What is learned, and at which times."""
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="flow",
        help="flow: flow matching (default); epsilon: the noise of DDPM.",
    )
    group.add_argument(
        "--path",
        choices=PATHS,
        default="linear",
        help="Of --objective flow, from data to noise: linear; gvp, cosine and sine; vp, DDPM's in continuous time. "
        "Default: linear.",
    )
    group.add_argument(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        default="velocity",
        help="What the model of --objective flow predicts: velocity, epsilon (the noise) or sample (the image). Default: "
        "velocity.",
    )
    group.add_argument(
        "--time_sampling",
        choices=TIME_SAMPLINGS,
        default="uniform",
        help="Distribution of the training times in [0, 1], 1 is noise. logit_normal, mode, cosmap: SD3's, which prefer "
        "the middle; stratified: uniform, spread evenly over every global batch. Default: uniform.",
    )
    group.add_argument(
        "--logit_mean", type=float, default=0.0, help="Mean of the logit; positive is more noise. Default: 0."
    )
    group.add_argument("--logit_std", type=float, default=1.0, help="Standard deviation of the logit. Default: 1.")
    group.add_argument(
        "--mode_scale",
        type=float,
        default=1.29,
        help="Scale of --time_sampling mode, in [-1, 1.7519]; 0 is uniform, below 0 prefers the ends. Default: 1.29.",
    )
    group.add_argument(
        "--time_shift",
        type=float,
        default=1.0,
        help="Shift the times to s t / (1 + (s - 1) t); above 1 is more noise, as for large images. The grid of the saved "
        "scheduler is not shifted by it. Default: 1.",
    )
    group.add_argument(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        default="none",
        help="What the error of a sample counts, by its time. sigma_sqrt, cosmap: those of diffusers' scripts, with "
        "--objective flow; min_snr: the signal-to-noise ratio, up to --snr_gamma, of the error of the data. Default: "
        "none, all the same.",
    )
    group.add_argument("--snr_gamma", type=float, default=5.0, help="Of --weighting_scheme min_snr. Default: 5.")
    group.add_argument(
        "--coupling",
        choices=COUPLINGS,
        default="independent",
        help="ot, with --objective flow: noise and images of a micro-batch are paired such that the squared distances are "
        "smallest, within each class (dropped labels are one), which straightens the paths. It needs scipy, depends on "
        "--train_batch_size, and does little where a class has few images in a micro-batch. Sample by an ODE then: it "
        "does not fit SDE samplers. Default: independent.",
    )
    group.add_argument("--ddpm_num_steps", type=int, default=1000, help="Steps of --objective epsilon. Default: 1000.")
    group.add_argument(
        "--ddpm_beta_schedule",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        default="linear",
        help="beta_schedule of DDPMScheduler. Default: linear.",
    )


def add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    """The optimizer, its schedule, and averaging."""
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--train_batch_size", type=int, default=64, help="Images of one process and one micro-step. Default: 64."
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Micro-steps of one optimizer step. Default: 1."
    )
    group.add_argument("--max_train_steps", type=int, default=2000, help="Optimizer steps in all. Default: 2000.")
    group.add_argument("--learning_rate", type=float, default=3e-4, help="Peak learning rate. Default: 3e-4.")
    group.add_argument(
        "--lr_scheduler",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
        default="constant_with_warmup",
        help="Shape of the learning rate. Default: constant_with_warmup.",
    )
    group.add_argument(
        "--lr_warmup_steps",
        type=int,
        default=100,
        help="Optimizer steps of linear warm-up, whatever the processes and accumulation. Default: 100.",
    )
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Default: 0.9.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Default: 0.999.")
    group.add_argument("--adam_weight_decay", type=float, default=0.0, help="Default: 0.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Default: 1e-8.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Norm to clip gradients to. Default: 1.")
    group.add_argument(
        "--skip_grad_norm", type=float, help="Skip a step whose gradient norm is above this. Default: none is skipped."
    )
    group.add_argument(
        "--max_nonfinite_steps",
        type=int,
        default=20,
        help="Steps in a row with a gradient that is not finite, each of them skipped, before giving up. Default: 20.",
    )
    group.add_argument(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Average the weights; the averages draw the samples and are what is saved. Default: on.",
    )
    group.add_argument("--ema_decay", type=float, default=0.9999, help="Decay of the average. Default: 0.9999.")
    group.add_argument(
        "--ema_warmup_steps",
        type=int,
        help="The length of the average, 1 / (1 - decay), grows evenly from 1 step to its full value over these "
        "optimizer steps; 0 is full at once. Default: 10 / (1 - ema_decay), an average over the last tenth.",
    )
    group.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="Default: what `accelerate launch` was told, else no.",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="Less memory for a third more time.")
    group.add_argument("--seed", type=int, default=0, help="Seed of everything that is drawn. Default: 0.")


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Where things are written, and when."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=output_dir, help=f"Folder of the run. Default: {output_dir}.")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Save every so many steps. Default: 500.")
    group.add_argument(
        "--checkpoints_total_limit", type=int, help="Checkpoints to keep, the newest ones. Default: all."
    )
    group.add_argument(
        "--resume_from_checkpoint",
        help="'latest' (starts afresh where there is none) or the name or path of a checkpoint.",
    )
    group.add_argument(
        "--validation_steps", type=int, default=500, help="Draw a grid of samples every so many steps. Default: 500."
    )
    group.add_argument("--num_validation_images", type=int, default=16, help="Samples in it; 0 for none. Default: 16.")
    group.add_argument("--validation_guidance_scale", type=float, default=2.0, help="Their guidance. Default: 2.")
    group.add_argument("--validation_inference_steps", type=int, default=20, help="Their steps. Default: 20.")
    group.add_argument(
        "--report_to",
        help="Tracker of `accelerate`, such as tensorboard, wandb or none. Default: tensorboard where it is installed.",
    )
    group.add_argument("--logging_dir", default="logs", help="Folder of the tracker, in --output_dir. Default: logs.")
    group.add_argument("--push_to_hub", action="store_true", help="Publish the pipeline when the run is done.")
    group.add_argument("--hub_model_id", help="Repository to publish to. Default: the name of --output_dir.")
    group.add_argument("--hub_license", help="Licence of the weights, as the Hub names it, such as apache-2.0.")
    group.add_argument("--hub_private_repo", action="store_true", help="Create that repository as private.")


def parse_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    check: Callable[[argparse.Namespace, argparse.Namespace], None],
) -> argparse.Namespace:
    """
    The arguments of a script, checked; what is wrong with them ends the process with a message.

    Args:
        parser (`argparse.ArgumentParser`): with all groups of [`check_arguments`].
        argv (`list[str]`, *optional*): `None` is what the process was started with.
        check (`Callable`): of the script: given the arguments and their defaults, raises a `ValueError`.

    Returns:
        `argparse.Namespace`.
    """
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        check(args, parser.parse_args([]))
        # One process asks for all: the Hub limits how often a token may be checked.
        if args.push_to_hub and os.environ.get("RANK", "0") == "0":
            check_can_publish(args.hub_model_id or Path(args.output_dir).name)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises on everything that can be known to be wrong before data and model are touched.

    Args:
        args (`argparse.Namespace`): of a parser with all groups of this file.

    Raises:
        `ValueError`: naming the argument, its value and what is allowed.
    """
    at_least = {
        "max_train_steps": 1,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "checkpointing_steps": 1,
        "validation_steps": 1,
        "max_nonfinite_steps": 1,
        "ddpm_num_steps": 1,
        "lr_warmup_steps": 0,
        "num_validation_images": 0,
        "validation_inference_steps": 1,
        "max_bad_images": 0,
        "dataloader_num_workers": 0,
        "shuffle_buffer_size": 0,
    }
    for name, minimum in at_least.items():
        if getattr(args, name) < minimum:
            raise ValueError(f"`--{name}` {getattr(args, name)} must be at least {minimum}.")
    for name, minimum in (("checkpoints_total_limit", 1), ("ema_warmup_steps", 0), ("resolution", 1)):
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            raise ValueError(f"`--{name}` {getattr(args, name)} must be at least {minimum}.")
    for name in ("learning_rate", "max_grad_norm", "skip_grad_norm", "logit_std", "time_shift", "snr_gamma"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"`--{name}` {getattr(args, name)} must be above 0.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"`--ema_decay` {args.ema_decay} must be in [0, 1).")
    if not MODE_SCALES[0] <= args.mode_scale <= MODE_SCALES[1]:
        raise ValueError(f"`--mode_scale` {args.mode_scale} must be in [-1, 2 / (pi - 2) = {MODE_SCALES[1]:.4f}].")
    if args.objective != "flow" and (args.path != "linear" or args.prediction_type != "velocity"):
        raise ValueError("`--path` and `--prediction_type` are for `--objective flow`.")
    is_linear_velocity = (args.objective, args.path, args.prediction_type) == ("flow", "linear", "velocity")
    if args.weighting_scheme in ("sigma_sqrt", "cosmap") and not is_linear_velocity:
        raise ValueError(
            f"`--weighting_scheme {args.weighting_scheme}` is for the velocity of `--objective flow` on `--path linear`. "
            "Use min_snr or none."
        )
    if args.coupling == "ot" and args.objective != "flow":
        raise ValueError(
            "`--coupling ot` is for `--objective flow`: DDPM's reverse process is right for independent noise only."
        )
    if args.coupling == "ot" and importlib.util.find_spec("scipy") is None:
        raise ValueError("`--coupling ot` needs scipy: `pip install scipy`.")

    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"`--output_dir` {args.output_dir} is a file. Give a folder, which need not exist.")
    if args.report_to not in (None, "none"):
        known = sorted(str(tracker) for tracker in LOGGER_TYPE_TO_CLASS)
        if args.report_to not in known:
            raise ValueError(f"`--report_to` {args.report_to} is unknown. Use none or one of {', '.join(known)}.")
        if args.report_to not in [str(tracker) for tracker in get_available_trackers()]:
            raise ValueError(f"`--report_to` {args.report_to} is not installed: `pip install {args.report_to}`.")
    sources = [name for name in ("dataset", "train_data_dir", "dataset_name") if getattr(args, name) is not None]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(f'`--{name}`' for name in sources)} each name the data. Give one of them.")
    if args.dataset == "fashion-mnist" and args.data_root is None:
        raise ValueError("`--dataset fashion-mnist` needs `--data_root`, the folder with its IDX files.")
    if args.streaming and args.dataset_name is None:
        raise ValueError("`--streaming` is for `--dataset_name`.")
    if args.shuffle_buffer_size and not args.streaming:
        raise ValueError("`--shuffle_buffer_size` is for `--streaming`: other data is shuffled as a whole.")
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"`--train_data_dir` {args.train_data_dir} is not a folder.")
    if args.dataset_name is not None and importlib.util.find_spec("datasets") is None:
        raise ValueError("`--dataset_name` needs the `datasets` library: `pip install datasets`.")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("`--mixed_precision fp16` needs a GPU. On a CPU use bf16 or no.")


def check_transformer_arguments(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """
    Raises on everything about a dynamic transformer that can be known to be wrong before data and model are touched.

    Args:
        args (`argparse.Namespace`): of a parser with the latents, transformer and budget groups.
        defaults (`argparse.Namespace`): what the parser gives without arguments.

    Raises:
        `ValueError`: naming the argument, its value and what is allowed.
    """
    given = [name for name in BUDGET if getattr(args, name) != getattr(defaults, name)]
    if args.static and given:
        raise ValueError(
            f"{', '.join(f'`--{name}`' for name in given)} and `--static`, which has no budget, are both set."
        )
    for name in ("pretrained_model_name_or_path", "vae"):
        path = getattr(args, name)
        is_local = path is not None and (path.startswith((".", "/", "~")) or path.count("/") != 1)
        if is_local and not Path(path).is_dir() and args.resume_from_checkpoint is None:
            raise ValueError(
                f"`--{name}` {path} is not a folder. Give a saved model, or its name on the Hub (owner/name)."
            )
    if not 0 < args.budget <= 1:
        raise ValueError(f"`--budget` {args.budget} must be in (0, 1]; 1 is the complete model.")
    for name in ("budget_warmup_steps", "budget_decay_steps", "complete_loss_steps"):
        if getattr(args, name) < 0:
            raise ValueError(f"`--{name}` {getattr(args, name)} must be at least 0.")
    for name in ("budget_loss_weight", "router_learning_rate", "vae_batch_size"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"`--{name}` {getattr(args, name)} must be above 0.")
    if args.learn_sigma and args.objective != "epsilon":
        raise ValueError("`--learn_sigma` is for `--objective epsilon`: a flow has no variances to learn.")
    if args.vae is None and (args.latent_cache_dir or args.vae_subfolder):
        raise ValueError("`--latent_cache_dir` and `--vae_subfolder` are for `--vae`.")
    given = [name for name in ("preset", *SHAPE) if getattr(args, name) is not None]
    if args.pretrained_model_name_or_path is not None and given:
        raise ValueError(
            f"{', '.join(f'`--{name}`' for name in given)} and `--pretrained_model_name_or_path` both define the model."
        )


def check_task_arguments(args: argparse.Namespace) -> None:
    """
    Raises on everything about a task that can be known to be wrong before data and model are touched.

    Args:
        args (`argparse.Namespace`): of a parser with the task, data, latents and objective groups.

    Raises:
        `ValueError`: naming the argument, its value and what is allowed.
    """
    if args.task == "generate":
        if args.vae is not None and args.streaming:
            raise ValueError("`--vae` caches the latents of all images, so it cannot be used with `--streaming`.")
    else:
        if args.streaming:
            raise ValueError(f"`--task {args.task}` draws its samples from images by index, not from `--streaming`.")
        if args.latent_cache_dir is not None:
            raise ValueError(
                f"`--latent_cache_dir` is for `--task generate`: with `--task {args.task}` images are encoded as they "
                "come, since their conditions change."
            )
        if args.coupling == "ot":
            raise ValueError(
                f"`--coupling ot` is for `--task generate`: with `--task {args.task}` every image has a condition of "
                "its own, so that no two could change their noise."
            )
    if args.task != "upscale":
        for name in ("upscale_factor", "max_noise_level"):
            if getattr(args, name) is not None:
                raise ValueError(f"`--{name}` is for `--task upscale`.")
    else:
        if args.upscale_factor is None:
            raise ValueError("`--task upscale` needs `--upscale_factor`, 2 or 4.")
        if args.max_noise_level is not None and not 0 <= args.max_noise_level <= 1000:
            raise ValueError(f"`--max_noise_level` {args.max_noise_level} must be in [0, 1000]; 0 adds no noise.")
        if args.resolution is not None and args.resolution % args.upscale_factor:
            raise ValueError(
                f"`--upscale_factor` {args.upscale_factor} must divide `--resolution` {args.resolution}. Use "
                f"{args.resolution - args.resolution % args.upscale_factor} pixels."
            )
        if args.objective != "flow":
            raise ValueError("`--task upscale` is for `--objective flow`: its noise levels are not steps of DDPM.")
