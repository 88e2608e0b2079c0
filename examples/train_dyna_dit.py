# SPDX-License-Identifier: Apache-2.0
"""
Trains a dynamic diffusion transformer, from scratch or from a static, converted or dynamic checkpoint, in pixels or in
the latents of a VAE, by flow matching or DDPM.

A static model of Fashion-MNIST on a CPU, then the same model at a budget of 0.6, and its control, fine-tuned for just
as long without one:

    python examples/train_dyna_dit.py --static --dataset fashion-mnist --data_root data/fashion-mnist --resolution 32 \
        --patch_size 4 --num_layers 6 --num_attention_heads 8 --attention_head_dim 16 --output_dir outputs/static
    python examples/train_dyna_dit.py --pretrained_model_name_or_path outputs/static --sort_by_importance --budget 0.6 \
        --router_learning_rate 1e-2 --dataset fashion-mnist --data_root data/fashion-mnist --resolution 32 \
        --output_dir outputs/budget-0.6
    python examples/train_dyna_dit.py --pretrained_model_name_or_path outputs/static --static \
        --dataset fashion-mnist --data_root data/fashion-mnist --resolution 32 --output_dir outputs/control

A converted DiT-XL/2 to a budget of 0.5, as the paper does it, on eight GPUs (not run by the authors):

    python examples/convert_checkpoint.py --checkpoint_path DiT-XL-2-256x256.pt --source dit --output_dir dit-xl
    accelerate launch --config_file examples/configs/multi_gpu.yaml examples/train_dyna_dit.py \
        --pretrained_model_name_or_path dit-xl --sort_by_importance --budget 0.5 --router_mode threshold \
        --vae stabilityai/sd-vae-ft-ema --train_data_dir imagenet/train --resolution 256 --random_flip \
        --objective epsilon --learn_sigma --time_sampling stratified --learning_rate 1e-4 --lr_scheduler constant \
        --train_batch_size 32 --max_train_steps 200000 --complete_loss_steps 30000 --skip_grad_norm 200 \
        --ema_warmup_steps 0 --mixed_precision bf16 --output_dir outputs/dydit-xl-0.5

`examples/configs/` has launch configurations for one device, data parallel, FSDP and DeepSpeed; several processes on a
CPU are started with `ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/train_dyna_dit.py ...`.

Stop it whenever you like (Ctrl-C saves first; even a kill loses only what came after the last checkpoint) and repeat
the command with `--resume_from_checkpoint latest`: the weights end the same, bit for bit on one machine. Publish with
`--push_to_hub`, or later with `diffusers_dyna.hub.publish`.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import torch

from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from diffusers_dyna import DYNA_DIT_CONFIGS, DynaDiTPipeline, DynaDiTTransformer2DModel
from diffusers_dyna.conversion import sort_by_importance
from diffusers_dyna.hub import check_can_publish
from diffusers_dyna.training import activity, arguments, budget, data, latents, loop, objectives
from diffusers_dyna.training.randomness import keyed_randn, keyed_seed, keyed_uniform
from diffusers_dyna.training.run import TrainingRun, make_loader


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
NUM_ACTIVITY_IMAGES, NUM_ACTIVITY_TIMES = 8, 20


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_data_arguments(parser)
    group = parser.add_argument_group("latents")
    group.add_argument("--vae", help="AutoencoderKL, a name or a path, whose latents to train on. Default: pixels.")
    group.add_argument("--vae_subfolder", help="Folder of the VAE in there, such as vae of a whole pipeline.")
    group.add_argument("--latent_cache_dir", help="Where its latents are kept. Default: latents in --output_dir.")
    group.add_argument("--vae_batch_size", type=int, default=32, help="Images encoded at a time. Default: 32.")
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
        "--class_dropout_prob", type=float, help="Share of labels dropped, for guidance; in [0, 1]. Default: 0.1."
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
    arguments.add_objective_arguments(parser)
    parser.add_argument(
        "--learn_sigma",
        action="store_true",
        help="Learn the variances too, by the variational bound; with --objective epsilon.",
    )
    arguments.add_optimization_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="outputs/dyna-dit")
    return parser


def check_arguments(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raises on everything that can be known to be wrong before data and model are touched."""
    arguments.check_arguments(args)
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
    if args.class_dropout_prob is not None and not 0 <= args.class_dropout_prob <= 1:
        raise ValueError(f"`--class_dropout_prob` {args.class_dropout_prob} must be in [0, 1].")
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
    if args.vae is not None and args.streaming:
        raise ValueError("`--vae` caches the latents of all images, so it cannot be used with `--streaming`.")
    given = [name for name in ("preset", *SHAPE) if getattr(args, name) is not None]
    if args.pretrained_model_name_or_path is not None and given:
        raise ValueError(
            f"{', '.join(f'`--{name}`' for name in given)} and `--pretrained_model_name_or_path` both define the model."
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_arguments(args, parser.parse_args([]))
        # One process asks for all: the Hub limits how often a token may be checked.
        if args.push_to_hub and os.environ.get("RANK", "0") == "0":
            check_can_publish(args.hub_model_id or Path(args.output_dir).name)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


def make_transformer(
    args: argparse.Namespace, checkpoint: Path | None, size: int, channels: int, num_classes: int | None
) -> DynaDiTTransformer2DModel:
    """The model at the start of a run, for inputs of `channels` x `size` x `size`; or that of a checkpoint."""
    if checkpoint is not None and (checkpoint / "transformer").is_dir():
        return DynaDiTTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
    expected = {"sample_size": size, "in_channels": channels, "num_classes": num_classes}
    expected["learn_sigma"] = args.learn_sigma
    if args.class_dropout_prob is not None:
        expected["class_dropout_prob"] = args.class_dropout_prob
    path = args.pretrained_model_name_or_path
    if path is None:
        config = DYNA_DIT_CONFIGS[args.preset] if args.preset else {}
        shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
        return DynaDiTTransformer2DModel(
            **{**config, **expected, **shape, "router_mode": args.router_mode or "capacity"}
        )

    subfolder = "transformer" if (Path(path) / "transformer").is_dir() or not Path(path).is_dir() else None
    transformer = DynaDiTTransformer2DModel.from_pretrained(path, subfolder=subfolder)
    different = [
        f"`{name}`={transformer.config[name]!r} instead of {value!r}"
        for name, value in expected.items()
        if transformer.config[name] != value
    ]
    if different:
        raise ValueError(
            f"`--pretrained_model_name_or_path` {path} does not fit this run: it has {', '.join(different)}. Use the "
            "`--resolution`, the data and the flags that it was trained with."
        )
    if args.router_mode not in (None, transformer.config.router_mode):
        routers, weights = transformer.router_parameters(), transformer.state_dict()
        transformer = DynaDiTTransformer2DModel.from_config(transformer.config, router_mode=args.router_mode)
        kept = {name: weight for name, weight in weights.items() if name not in routers}
        transformer.load_state_dict(kept, strict=False)
    if args.static:
        # Routers that were trained would make the saved pipeline dynamic again.
        for block in transformer.transformer_blocks:
            transformer.initialize_routers(block)
    return transformer


def make_activity_batch(source: data.ImageSource, transform, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A few images from all over the data with their classes, the same at every validation."""
    images = data.TrainingImages(source, transform, seed)
    count = min(NUM_ACTIVITY_IMAGES, len(source))
    batch = data.collate_examples([images[i, i * len(source) // count] for i in range(count)])
    return batch["pixel_values"], batch["class_labels"] if source.id2label is not None else None


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong is found before anything is written
    run = TrainingRun(args, "train_dyna_dit", "transformer", can_shard=True)
    accelerator = run.accelerator
    source = data.open_image_source(args)
    resolution = args.resolution or source.native_size or 32
    vae, channels, size = None, source.channels, resolution
    transform = data.ImageTransform(resolution, channels, args.center_crop, args.random_flip)
    if args.vae is not None:
        vae = AutoencoderKL.from_pretrained(args.vae, subfolder=args.vae_subfolder).to(accelerator.device)
        vae.requires_grad_(False).eval()
        transform = data.ImageTransform(resolution, vae.config.in_channels, args.center_crop, args.random_flip)
        channels, size = vae.config.latent_channels, resolution // latents.downsampling_factor(vae)
    num_classes = len(source.id2label) if source.id2label is not None else None
    set_seed(keyed_seed(args.seed, "weights") % 2**32)  # numpy takes 32 bits
    transformer = make_transformer(args, run.checkpoint, size, channels, num_classes)
    if args.sort_by_importance and run.checkpoint is None:
        sort_by_importance(transformer)
    scheduler = objectives.make_training_scheduler(
        args.objective,
        args.ddpm_num_steps,
        args.ddpm_beta_schedule,
        args.learn_sigma,
        in_latents=vae is not None,
        path=args.path,
        prediction_type=args.prediction_type,
    )
    if vae is not None:
        source = latents.build_latent_cache(
            args.latent_cache_dir or run.output_dir / "latents",
            source,
            transform,
            vae,
            accelerator,
            batch_size=args.vae_batch_size,
            num_workers=args.dataloader_num_workers,
            max_bad_images=args.max_bad_images,
        )
        transform = latents.LatentTransform(vae)

    # 2. Model, optimizer, averages, data
    routers = list(transformer.router_parameters().values())
    groups = None
    if args.static:
        for parameter in routers:
            parameter.requires_grad_(False)
    else:
        is_router = {id(parameter) for parameter in routers}
        groups = [
            {"params": [p for p in transformer.parameters() if id(p) not in is_router]},
            {"params": routers, "lr_scale": (args.router_learning_rate or args.learning_rate) / args.learning_rate},
        ]
    run.start(
        transformer,
        scheduler,
        lambda model: DynaDiTPipeline(model, scheduler, vae=vae, id2label=source.id2label),
        source,
        lambda run: make_loader(run, transform),
        identity={"resolution": resolution},
        defaults=vars(make_parser().parse_args([])),
        parameter_groups=groups,
    )
    activity_images = activity_labels = None
    if run.is_main and not args.static:
        if not args.streaming:  # of a stream it is the last batch
            activity_images, activity_labels = make_activity_batch(source, transform, args.seed)
        activity_log = loop.TrainingLog(run.output_dir / "activity_log.jsonl", run.state["step"])

    def measure_activity(model: DynaDiTTransformer2DModel) -> dict:
        sample = activity_images.to(accelerator.device)
        noise = keyed_randn(args.seed, "activity", range(len(sample)), sample.shape[1:]).to(accelerator.device)
        sigmas = (torch.arange(NUM_ACTIVITY_TIMES) + 0.5) / NUM_ACTIVITY_TIMES
        timesteps = objectives.sigmas_to_timesteps(scheduler, sigmas).to(accelerator.device)
        noisy = torch.stack([scheduler.add_noise(sample, noise, time.expand(len(sample))) for time in timesteps])
        labels = activity_labels.to(accelerator.device) if activity_labels is not None else None
        return activity.measure_activity(model, noisy, timesteps, labels)

    def log_activity(step: int, model: DynaDiTTransformer2DModel) -> None:
        """What inference costs by timestep and by layer, of the averaged weights."""
        measured = measure_activity(model)
        tokens = measured["tokens"].mean(dim=(1, 3))
        line = {
            "step": step + 1,
            "compute_ratio": measured["compute_ratio"].mean().item(),
            "timesteps": measured["timesteps"].tolist(),
            "compute_ratio_by_timestep": measured["compute_ratio"].tolist(),
            "heads_by_layer": measured["attn"].mean(dim=(0, 2)).tolist(),
            "groups_by_layer": measured["mlp"].mean(dim=(0, 2)).tolist(),
            "tokens_by_layer": tokens.mean(dim=0).tolist(),
        }
        activity_log.write(**line)
        accelerator.log({"deterministic_compute_ratio": line["compute_ratio"]}, step=step + 1)

    # 3. Train
    num_tokens = (size // transformer.config.patch_size) ** 2
    num_gates = 2 * (transformer.config.num_attention_heads - 1) + num_tokens
    with_complete_loss = not args.static and args.complete_loss_steps > 0
    is_capacity = transformer.config.router_mode == "capacity"
    # In threshold mode training throws coins, and inference costs what `activity_log.jsonl` says.
    ratio_name = "compute_ratio" if is_capacity else "sampled_compute_ratio"
    for step in run.steps():
        names = ["loss", "diffusion_loss", *([] if args.static else [ratio_name])]
        sums = {name: torch.zeros((), device=accelerator.device) for name in names}
        target_ratio = budget.budget_at(step, args.budget, args.budget_warmup_steps, args.budget_decay_steps)
        mean_ratio = None
        if is_capacity and not (args.static or run.is_sharded):
            # Known before the forward pass, over all processes and micro-batches.
            mean_ratio = transformer.predict_compute_ratio(run.step_timesteps(step), size).mean()
        for batch in run.micro_batches(step):
            with accelerator.accumulate(run.model):
                gate_noise = None
                if not (args.static or is_capacity):
                    shape = (transformer.config.num_layers, num_gates)
                    gate_noise = keyed_uniform(args.seed, "gates", batch.indices, shape).float().to(accelerator.device)

                def predict(complete_model: bool):
                    output = run.model(
                        batch.noisy_sample,
                        batch.timesteps,
                        batch.class_labels,
                        complete_model=complete_model,
                        output_masks=not complete_model,
                        class_dropout_mask=batch.class_dropout_mask,
                        gate_noise=gate_noise,
                    )
                    prediction, variance = output.sample.float(), None
                    if args.learn_sigma:
                        prediction, variance = prediction.chunk(2, dim=1)
                    loss = objectives.mse_loss(prediction, batch.target, batch.loss_weights)
                    if args.learn_sigma:
                        loss = loss + objectives.variational_bound(
                            scheduler, prediction.detach(), variance, batch.sample, batch.noisy_sample, batch.timesteps
                        )
                    return loss, output.compute_ratio

                loss, compute_ratio = predict(complete_model=args.static)
                sums["diffusion_loss"] += loss.detach()
                if not args.static:
                    sums[ratio_name] += compute_ratio.detach().mean()
                    known_ratio = mean_ratio
                    if known_ratio is None:  # of the micro-batch, over all processes
                        known_ratio = accelerator.reduce(compute_ratio.detach().mean(), reduction="mean")
                    loss = loss + args.budget_loss_weight * budget.budget_loss(
                        compute_ratio, known_ratio, target_ratio
                    )
                    if with_complete_loss and step < args.complete_loss_steps:
                        loss = loss + predict(complete_model=True)[0]
                accelerator.backward(loss)
                sums["loss"] += loss.detach()
                run.optimizer_step(step)
        run.end_step(step, **sums)
        if args.streaming and run.is_main:
            activity_images, activity_labels = (
                None if values is None else values[:NUM_ACTIVITY_IMAGES]
                for values in (batch.sample, batch.class_labels)
            )

        if run.is_time_to_validate(step):
            with run.averaged_pipeline() as pipeline:
                if run.is_main:
                    run.save_samples(step, pipeline)
                    if not args.static:
                        log_activity(step, pipeline.transformer)

    # 4. The pipeline, from the averages
    def write_extras(pipeline: DynaDiTPipeline, folder: Path) -> dict:
        if args.static or activity_images is None:
            return {"budget": None if args.static else args.budget}
        measured = measure_activity(pipeline.transformer)
        if importlib.util.find_spec("matplotlib"):
            activity.plot_activity(measured, folder / "activity.png")
            activity.plot_tokens(measured, activity_images, folder / "tokens.png")
        else:
            accelerator.print("Drew no pictures of what the routers do: `pip install matplotlib`.")
        return {"budget": args.budget, "compute_ratio": measured["compute_ratio"].mean().item()}

    run.finish(write_extras)


if __name__ == "__main__":
    main(parse_args())
