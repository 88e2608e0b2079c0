# SPDX-License-Identifier: Apache-2.0
"""
Trains a dynamic diffusion transformer to draw images of classes, to fill holes in images or to enlarge them, from
scratch or from a static, converted or dynamic checkpoint, in pixels or in the latents of a VAE, by flow matching or DDPM.

A static model of Fashion-MNIST on a CPU, then the same model at a budget of 0.6, and its control, fine-tuned for just
as long without one:

    python examples/train_dyna_dit.py --static --dataset fashion-mnist --data_root data/fashion-mnist --resolution 32 \
        --patch_size 4 --num_layers 6 --num_attention_heads 8 --attention_head_dim 16 --output_dir outputs/static
    python examples/train_dyna_dit.py --pretrained_model_name_or_path outputs/static --sort_by_importance --budget 0.6 \
        --router_learning_rate 1e-2 --dataset fashion-mnist --data_root data/fashion-mnist --resolution 32 \
        --output_dir outputs/budget-0.6
    python examples/train_dyna_dit.py --pretrained_model_name_or_path outputs/static --static \
        --dataset fashion-mnist --data_root data/fashion-mnist --resolution 32 --output_dir outputs/control

Inpainting from the weights of that static model (what is new starts at zero), and super-resolution of the images' own
28 pixels from 14:

    python examples/train_dyna_dit.py --task inpaint --static --pretrained_model_name_or_path outputs/static \
        --dataset fashion-mnist --data_root data/fashion-mnist --resolution 32 --output_dir outputs/inpaint
    python examples/train_dyna_dit.py --task upscale --upscale_factor 2 --static --dataset fashion-mnist \
        --data_root data/fashion-mnist --patch_size 4 --num_layers 6 --num_attention_heads 8 --attention_head_dim 16 \
        --output_dir outputs/upscale

Either goes on to a budget as above, from `--pretrained_model_name_or_path outputs/inpaint` with the same `--task`.

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
import os
from pathlib import Path

import torch

from accelerate.utils import set_seed
from diffusers.image_processor import VaeImageProcessor

from diffusers_dyna import DynaDiTInpaintPipeline, DynaDiTPipeline, DynaDiTUpscalePipeline
from diffusers_dyna.conversion import sort_by_importance
from diffusers_dyna.hub import check_can_publish
from diffusers_dyna.training import arguments, data, dynamic, latents, objectives, tasks
from diffusers_dyna.training.degradation import downscale
from diffusers_dyna.training.randomness import keyed_seed
from diffusers_dyna.training.run import TrainingRun, cache_latents, load_vae, make_loader
from diffusers_dyna.training.shards import hash_weights


PIPELINES = {"generate": DynaDiTPipeline, "inpaint": DynaDiTInpaintPipeline, "upscale": DynaDiTUpscalePipeline}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task",
        choices=tasks.TASKS,
        default="generate",
        help="generate: images of classes; inpaint: what is under a mask, by random masks; upscale: super-resolution. "
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
    arguments.add_data_arguments(parser)
    arguments.add_latent_arguments(parser)
    group = arguments.add_transformer_arguments(parser)
    group.add_argument(
        "--class_dropout_prob", type=float, help="Share of labels dropped, for guidance; in [0, 1]. Default: 0.1."
    )
    arguments.add_budget_arguments(parser)
    arguments.add_objective_arguments(parser)
    arguments.add_optimization_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="outputs/dyna-dit")
    return parser


def check_arguments(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raises on everything that can be known to be wrong before data and model are touched."""
    arguments.check_arguments(args)
    arguments.check_transformer_arguments(args, defaults)
    if args.class_dropout_prob is not None and not 0 <= args.class_dropout_prob <= 1:
        raise ValueError(f"`--class_dropout_prob` {args.class_dropout_prob} must be in [0, 1].")
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


def make_validation_inputs(args: argparse.Namespace, source: data.ImageSource, transform) -> dict | None:
    """What the pipeline of a task is called with for the samples of a validation: images from all over the data."""
    count = args.num_validation_images
    if args.task == "generate" or not count:
        return None
    images = data.TrainingImages(source, transform, args.seed)
    batch = data.collate_examples([images[i, i * len(source) // count] for i in range(count)])
    pixels = batch["pixel_values"]
    inputs = {"class_labels": batch["class_labels"].tolist() if source.id2label is not None else None}
    if args.task == "inpaint":
        # A box in the middle and the right half in turn: holes that are left when a VAE makes the masks small.
        masks, side = torch.full((count, 1, *pixels.shape[2:]), -1.0), pixels.shape[2]
        masks[0::2, :, side // 4 : side - side // 4, side // 4 : side - side // 4] = 1
        masks[1::2, :, :, side // 2 :] = 1
        inputs["mask_image"] = to_images(masks)
    else:
        pixels = downscale(pixels, args.upscale_factor)
    return {"image": to_images(pixels), **inputs}


def to_images(pixels: torch.Tensor) -> list:
    """Images of Pillow from pixels in [-1, 1]."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy((pixels / 2 + 0.5).clamp(0, 1)))


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong is found before anything is written
    run = TrainingRun(args, "train_dyna_dit", "transformer", can_shard=True)
    accelerator = run.accelerator
    source = data.open_image_source(args)
    resolution = args.resolution or source.native_size or 32
    if args.task == "upscale" and resolution % args.upscale_factor:
        raise ValueError(
            f"`--upscale_factor` {args.upscale_factor} must divide the resolution {resolution}. Give `--resolution`."
        )
    vae = load_vae(args, accelerator.device)
    channels, size = source.channels, resolution
    transform = data.ImageTransform(resolution, channels, args.center_crop, args.random_flip)
    if vae is not None:
        transform = data.ImageTransform(resolution, vae.config.in_channels, args.center_crop, args.random_flip)
        channels, size = vae.config.latent_channels, resolution // latents.downsampling_factor(vae)
    expected = {
        "sample_size": size,
        "in_channels": channels,
        "num_classes": len(source.id2label) if source.id2label is not None else None,
        "learn_sigma": args.learn_sigma,
        "condition_channels": {"generate": 0, "inpaint": channels + 1, "upscale": channels}[args.task],
        "noise_level_conditioning": args.task == "upscale",
        "cross_attention_dim": None,
    }
    if args.class_dropout_prob is not None:
        expected["class_dropout_prob"] = args.class_dropout_prob
    set_seed(keyed_seed(args.seed, "weights") % 2**32)  # numpy takes 32 bits
    transformer = dynamic.make_transformer(args, run.checkpoint, expected)
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
    validation_inputs = make_validation_inputs(args, source, transform)
    prepare, facts = None, {}
    identity = {"resolution": resolution}
    if args.task == "generate" and vae is not None:
        source, transform = cache_latents(run, source, transform, vae), latents.LatentTransform(vae)
    elif args.task == "inpaint":
        prepare = tasks.make_inpainting(args.seed, accelerator.device, vae)
    elif args.task == "upscale":
        max_noise_level = 350.0 if args.max_noise_level is None else args.max_noise_level
        facts = {"upscale_factor": args.upscale_factor, "max_noise_level": max_noise_level}
        prepare = tasks.make_upscaling(
            args.seed, accelerator.device, scheduler, args.upscale_factor, max_noise_level, vae
        )
    if args.task != "generate" and vae is not None:
        identity["vae"] = hash_weights(vae)

    # 2. Model, optimizer, averages, data
    run.start(
        transformer,
        scheduler,
        lambda model: PIPELINES[args.task](model, scheduler, vae=vae, id2label=source.id2label, **facts),
        source,
        lambda run: make_loader(run, transform),
        identity=identity,
        defaults=vars(make_parser().parse_args([])),
        parameter_groups=dynamic.parameter_groups(transformer, args),
        prepare=prepare,
        validation_inputs=validation_inputs,
    )
    loss = dynamic.DynamicLoss(run)
    activity = dynamic.ActivityLog(run, transform)

    # 3. Train
    for step in run.steps():
        loss.start_step(step)
        for batch in run.micro_batches(step):
            with accelerator.accumulate(run.model):
                accelerator.backward(loss(batch))
                run.optimizer_step(step)
        run.end_step(step, **loss.sums)
        activity.keep(batch)

        if run.is_time_to_validate(step):
            with run.averaged_pipeline() as pipeline:
                if run.is_main:
                    run.save_samples(step, pipeline)
                    activity.log(step, pipeline.transformer)

    # 4. The pipeline, from the averages
    run.finish(activity.write_extras)


if __name__ == "__main__":
    main(parse_args())
