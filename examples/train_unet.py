# SPDX-License-Identifier: Apache-2.0
"""
Trains a U-Net by flow matching or DDPM on digits, Fashion-MNIST, an image folder or a data set of `datasets`.

Digits on a CPU (the data comes with scikit-learn):

    python examples/train_unet.py --output_dir outputs/digits --max_train_steps 2000

Your own images, one folder a class, on one GPU or on eight:

    accelerate launch --mixed_precision bf16 examples/train_unet.py --train_data_dir photos --resolution 64 \
        --attention_resolutions 16 8 --channel_mults 1 2 2 4 --random_flip --output_dir outputs/photos
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/train_unet.py ...

Several processes on a CPU:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/train_unet.py --output_dir outputs/digits

CIFAR-10 with the reference configuration, as a velocity and as a noise predictor (not run by the authors: the data is
a download from the Hub):

    accelerate launch examples/train_unet.py --dataset_name cifar10 --image_column img --random_flip \
        --objective flow --train_batch_size 128 --max_train_steps 400000 --learning_rate 2e-4 \
        --lr_warmup_steps 5000 --dropout 0.1 --output_dir outputs/cifar10-flow
    accelerate launch examples/train_unet.py --dataset_name cifar10 --image_column img --random_flip \
        --objective epsilon --train_batch_size 128 --max_train_steps 800000 --learning_rate 2e-4 \
        --lr_warmup_steps 5000 --dropout 0.1 --output_dir outputs/cifar10-ddpm

Stop it whenever you like (Ctrl-C saves first; even a kill loses only what came after the last checkpoint) and repeat
the command with `--resume_from_checkpoint latest`: the weights end the same, bit for bit on one machine. Publish with
`--push_to_hub`, or later with `diffusers_dyna.hub.publish`.
"""

import argparse
from pathlib import Path

import torch

from accelerate.utils import set_seed

from diffusers_dyna import DynaUNet2DModel, DynaUNetPipeline
from diffusers_dyna.training import arguments, data, objectives
from diffusers_dyna.training.randomness import keyed_seed
from diffusers_dyna.training.run import TrainingRun, make_loader


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_data_arguments(parser)
    group = parser.add_argument_group("model (defaults are DynaUNet2DModel's)")
    group.add_argument("--pretrained_model_name_or_path", help="Start from these weights: a saved pipeline or U-Net.")
    group.add_argument("--base_channels", type=int, help="Width of the first level. Default: 64.")
    group.add_argument("--channel_mults", type=int, nargs="+", help="Width of each level, relative. Default: 1 2 4.")
    group.add_argument("--num_res_blocks", type=int, help="Residual blocks a level. Default: 2.")
    group.add_argument("--attention_resolutions", type=int, nargs="*", help="Sizes with attention. Default: 8.")
    group.add_argument("--num_attention_heads", type=int, help="Default: 4.")
    group.add_argument("--norm_num_groups", type=int, help="Groups of each GroupNorm. Default: 32.")
    group.add_argument("--dropout", type=float, help="In [0, 1]. Default: 0.")
    group.add_argument(
        "--class_dropout_prob",
        type=float,
        help="Share of labels dropped, for guidance; in [0, 1]. Default: 0.1, and 0 without classes.",
    )
    arguments.add_objective_arguments(parser)
    arguments.add_optimization_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="outputs/unet")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return arguments.parse_args(make_parser(), argv, lambda args, defaults: None)


def make_unet(args: argparse.Namespace, source: data.ImageSource, resolution: int) -> DynaUNet2DModel:
    names = (
        "base_channels",
        "channel_mults",
        "num_res_blocks",
        "attention_resolutions",
        "num_attention_heads",
        "norm_num_groups",
        "dropout",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    num_classes = len(source.id2label) if source.id2label is not None else None
    if args.pretrained_model_name_or_path is None:
        if args.class_dropout_prob is not None:
            given["class_dropout_prob"] = args.class_dropout_prob
        elif num_classes is not None:
            given["class_dropout_prob"] = 0.1
        return DynaUNet2DModel(
            sample_size=resolution,
            in_channels=source.channels,
            out_channels=source.channels,
            num_classes=num_classes,
            **given,
        )
    if given:
        raise ValueError(
            f"{', '.join(f'`--{name}`' for name in given)} and `--pretrained_model_name_or_path` both define the model."
        )
    path = Path(args.pretrained_model_name_or_path)
    subfolder = "unet" if (path / "unet").is_dir() or not path.is_dir() else None
    unet = DynaUNet2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder=subfolder)
    expected = {"sample_size": resolution, "in_channels": source.channels, "num_classes": num_classes}
    if args.class_dropout_prob is not None:
        expected["class_dropout_prob"] = args.class_dropout_prob
    for name, value in expected.items():
        if unet.config[name] != value:
            raise ValueError(
                f"`--pretrained_model_name_or_path` {path} has `{name}`={unet.config[name]}, but this run needs {value}."
            )
    return unet


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong is found before anything is written
    run = TrainingRun(args, "train_unet", "unet")
    accelerator = run.accelerator
    source = data.open_image_source(args)
    resolution = args.resolution or source.native_size or 32
    transform = data.ImageTransform(resolution, source.channels, args.center_crop, args.random_flip)
    set_seed(keyed_seed(args.seed, "weights") % 2**32)  # numpy takes 32 bits
    unet = make_unet(args, source, resolution)
    scheduler = objectives.make_training_scheduler(
        args.objective,
        args.ddpm_num_steps,
        args.ddpm_beta_schedule,
        path=args.path,
        prediction_type=args.prediction_type,
    )

    # 2. Model, optimizer, averages, data
    run.start(
        unet,
        scheduler,
        lambda model: DynaUNetPipeline(model, scheduler, id2label=source.id2label),
        source,
        lambda run: make_loader(run, transform),
        identity={"resolution": resolution},
        defaults=vars(make_parser().parse_args([])),
    )

    # 3. Train
    for step in run.steps():
        loss_sum = torch.zeros((), device=accelerator.device)
        for batch in run.micro_batches(step):
            with accelerator.accumulate(run.model):
                prediction = run.model(
                    batch.noisy_sample,
                    batch.timesteps,
                    batch.class_labels,
                    class_dropout_mask=batch.class_dropout_mask,
                ).sample
                loss = objectives.mse_loss(prediction, batch.target, batch.loss_weights)
                accelerator.backward(loss)
                loss_sum += loss.detach()
                run.optimizer_step(step)
        run.end_step(step, loss=loss_sum)

        if run.is_time_to_validate(step):
            with run.averaged_pipeline() as pipeline:
                run.save_samples(step, pipeline)

    # 4. The pipeline, from the averages
    run.finish()


if __name__ == "__main__":
    main(parse_args())
