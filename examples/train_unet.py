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
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers.utils import make_image_grid

from diffusers_dyna import DynaUNet2DModel, DynaUNetPipeline
from diffusers_dyna.hub import check_can_publish, publish
from diffusers_dyna.training import arguments, checkpoints, data, loop, objectives
from diffusers_dyna.training.randomness import keyed_randn, keyed_seed, keyed_uniform


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
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
    args = parser.parse_args(argv)
    try:
        arguments.check_arguments(args)
        # One process asks for all: the Hub limits how often a token may be checked.
        if args.push_to_hub and os.environ.get("RANK", "0") == "0":
            check_can_publish(args.hub_model_id or Path(args.output_dir).name)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


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


def draw_samples(pipeline: DynaUNetPipeline, args: argparse.Namespace) -> list:
    """Samples of every class in turn, from generators of their own: training draws the same with and without them."""
    num_classes = pipeline.unet.config.num_classes
    num_images = args.num_validation_images
    seeds = [keyed_seed(args.seed, "validation", i) for i in range(num_images)]
    has_null_class = pipeline.unet.null_class_label is not None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        class_labels=[i % num_classes for i in range(num_images)] if num_classes is not None else None,
        num_images_per_prompt=num_images if num_classes is None else 1,
        num_inference_steps=args.validation_inference_steps,
        guidance_scale=args.validation_guidance_scale if has_null_class else 1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images


def make_grid(images: list):
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    size = max(64, images[0].width)
    blank = images[0].copy()
    blank.paste(0, (0, 0, *blank.size))
    return make_image_grid(images + [blank] * (rows * columns - len(images)), rows, columns, resize=size)


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)

    # 1. Everything that can be wrong is found before anything is written
    tracker = args.report_to or loop.default_tracker()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / args.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"This script saves a model that is whole on every process, but was launched with "
            f"{accelerator.distributed_type.value}. Launch it on one device or data-parallel (`--multi_gpu`)."
        )
    is_main = accelerator.is_main_process
    if is_main:
        checkpoints.sweep_partial_folders(output_dir)
    accelerator.wait_for_everyone()
    checkpoint = checkpoints.find_checkpoint(output_dir, args.resume_from_checkpoint)
    # The default convolution algorithms of cuDNN add up gradients in a changing order.
    torch.backends.cudnn.deterministic = True

    source = data.open_image_source(args)
    resolution = args.resolution or source.native_size or 32
    set_seed(keyed_seed(args.seed, "weights") % 2**32)  # numpy takes 32 bits
    unet = make_unet(args, source, resolution)
    scheduler = objectives.make_training_scheduler(args.objective, args.ddpm_num_steps, args.ddpm_beta_schedule)
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    identity = {name: value for name, value in vars(args).items() if name not in arguments.FREE_ON_RESUME}
    identity |= {
        "data_fingerprint": source.fingerprint(),
        "mixed_precision": accelerator.mixed_precision,
        # The other schedules depend on where they end.
        "max_train_steps": None if args.lr_scheduler.startswith("constant") else args.max_train_steps,
        "resolution": resolution,
        "total_batch_size": total_batch_size,
    }
    state = {
        "step": 0,
        "identity": identity,
        "train_seconds": 0.0,
        "nonfinite_steps": 0,
        "last_loss": None,
        "ema_updates": 0,
        "stream": None,
        "environment": loop.describe_environment(Path(__file__).parent),
    }
    if checkpoint is not None:
        state = json.loads((checkpoint / "training_state.json").read_text())
        if state["step"] > args.max_train_steps:
            raise ValueError(
                f"`--max_train_steps` {args.max_train_steps} is below the {state['step']} steps of {checkpoint.name}."
            )
        loop.check_resume(state["identity"], identity)

    # 2. Model, optimizer, averages
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    learning_rate_at = loop.make_lr_schedule(
        args.lr_scheduler, args.learning_rate, args.lr_warmup_steps, args.max_train_steps
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = loop.make_ema(unet.parameters(), args.ema_decay, args.ema_warmup_steps) if args.use_ema else None

    def save_unet(models, weights, folder):
        weights.clear()  # accelerate would save them once more
        if is_main:
            unet.save_pretrained(Path(folder) / "unet")

    def load_unet(models, folder):
        models.clear()
        unet.load_state_dict(DynaUNet2DModel.from_pretrained(folder, subfolder="unet").state_dict())

    accelerator.register_save_state_pre_hook(save_unet)
    accelerator.register_load_state_pre_hook(load_unet)

    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        if ema is not None:
            averaged = DynaUNet2DModel.from_pretrained(checkpoint, subfolder="unet_ema")
            ema.load_state_dict({**ema.state_dict(), "shadow_params": list(averaged.parameters())})
            ema.optimization_step = state["ema_updates"]
            ema.to(accelerator.device)

    # 3. Data
    transform = data.ImageTransform(resolution, source.channels, args.center_crop, args.random_flip)
    if args.streaming:
        loader = data.StreamingLoader(
            source,
            transform,
            args.train_batch_size,
            args.seed,
            accelerator.num_processes,
            accelerator.process_index,
            args.shuffle_buffer_size,
            args.dataloader_num_workers,
        )
        if state["stream"] is not None:
            loader.load_state_dict(state["stream"])
        if args.shuffle_buffer_size:
            accelerator.print("With --shuffle_buffer_size a resumed run does not see the same rows: not bit for bit.")
    else:
        sampler = data.GlobalBatchSampler(
            len(source),
            args.train_batch_size,
            args.seed,
            accelerator.num_processes,
            accelerator.process_index,
            first_micro_step=state["step"] * args.gradient_accumulation_steps,
        )
        loader = data.make_dataloader(source, transform, sampler, args.seed, args.dataloader_num_workers)
    batches = iter(loader)

    # 4. Output
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        loop.write_json(output_dir / "args.json", vars(args))
        log = loop.TrainingLog(output_dir / "training_log.jsonl", state["step"])
    accelerator.init_trackers("train_unet", {name: str(value) for name, value in vars(args).items()})

    @contextlib.contextmanager
    def averaged_pipeline() -> Iterator[DynaUNetPipeline]:
        """The pipeline with the averaged weights, for as long as the block lasts."""
        unet.eval()
        if ema is not None:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
        try:
            yield DynaUNetPipeline(unet, scheduler, id2label=source.id2label)
        finally:
            if ema is not None:
                ema.restore(unet.parameters())
            unet.train()

    def save(step: int, train_seconds: float) -> None:
        """All that a run needs to go on, in `checkpoint-<step>`."""
        state.update(
            step=step,
            train_seconds=train_seconds,
            nonfinite_steps=guard.total,
            ema_updates=ema.optimization_step if ema is not None else 0,
            stream=loader.state_dict() if args.streaming else None,
        )

        def write(folder: Path) -> None:
            # A checkpoint is between two optimizer steps: a run that goes on may have other micro-steps.
            accelerator.step = 0
            accelerator.save_state(str(folder))
            if is_main:
                if ema is not None:
                    with averaged_pipeline() as pipeline:
                        pipeline.unet.save_pretrained(folder / "unet_ema")
                scheduler.save_pretrained(folder / "scheduler")
                loop.write_json(folder / "training_state.json", state)

        checkpoints.save_checkpoint(accelerator, output_dir, step, write, args.checkpoints_total_limit)

    # 5. Train
    guard = loop.NonFiniteGuard(args.max_nonfinite_steps, state["nonfinite_steps"])
    stop = loop.StopRequest()
    bad_images: dict[str, None] = {}
    first_step, first_seconds, start = state["step"], state["train_seconds"], time.monotonic()
    num_params = sum(parameter.numel() for parameter in unet.parameters())
    accelerator.print(
        f"{source.name}: {source.num_images or 'a stream of'} images at {resolution}x{resolution}, {num_params:,} "
        f"parameters, total batch size {total_batch_size}, steps {first_step} to {args.max_train_steps}"
    )
    progress = tqdm(total=args.max_train_steps, initial=first_step, disable=not is_main, mininterval=1)
    step = first_step
    while step < args.max_train_steps:
        step_start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        loss_sum = torch.zeros((), device=accelerator.device)
        for micro_step in range(args.gradient_accumulation_steps):
            batch = next(batches)
            indices = batch["sample_indices"]
            # Dropout draws from the global generator: seeding it here makes it a function of the step.
            torch.manual_seed(keyed_seed(args.seed, "step", step, micro_step, accelerator.process_index))
            with accelerator.accumulate(model):
                sample = batch["pixel_values"].to(accelerator.device)
                noise = keyed_randn(args.seed, "noise", indices, sample.shape[1:]).to(accelerator.device)
                sigmas = objectives.sample_sigmas(
                    args.time_sampling, args.seed, indices, total_batch_size, args.logit_mean, args.logit_std
                )
                timesteps = objectives.sigmas_to_timesteps(scheduler, sigmas).to(accelerator.device)
                class_labels = dropout_mask = None
                if source.id2label is not None:
                    class_labels = batch["class_labels"].to(accelerator.device)
                    if unet.null_class_label is not None:
                        dropout_mask = keyed_uniform(args.seed, "class_dropout", indices)
                        dropout_mask = (dropout_mask < unet.config.class_dropout_prob).to(accelerator.device)

                noisy_sample = scheduler.add_noise(sample, noise, timesteps)
                target = objectives.training_target(scheduler, sample, noise, timesteps)
                prediction = model(noisy_sample, timesteps, class_labels, class_dropout_mask=dropout_mask).sample
                loss = F.mse_loss(prediction.float(), target.float())
                accelerator.backward(loss)
                loss_sum += loss.detach()

                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                    is_finite = guard.is_finite(grad_norm, step)
                    # With fp16, the gradient scaler skips the step itself and lowers its scale.
                    if is_finite or accelerator.scaler is not None:
                        optimizer.step()
                    if is_finite and ema is not None:
                        ema.step(unet.parameters())
                optimizer.zero_grad()

            for name in batch["bad_images"]:
                if name not in bad_images:
                    bad_images[name] = None
                    tqdm.write(f"Skipped an image that cannot be read: {name}")
            if len(bad_images) > args.max_bad_images:
                raise ValueError(
                    f"More than `--max_bad_images` {args.max_bad_images} images cannot be read: {', '.join(bad_images)}"
                )
        step += 1

        # One reduction a step: the loss of the global batch, and whether any process was asked to stop.
        mean_loss, stop_signal = accelerator.reduce(
            torch.stack([loss_sum / args.gradient_accumulation_steps, loss_sum.new_tensor(float(stop.signal_number))]),
            reduction="mean",
        ).tolist()
        seconds = time.monotonic() - step_start
        train_seconds = first_seconds + time.monotonic() - start
        state["last_loss"] = mean_loss if math.isfinite(mean_loss) else None
        values = {
            "loss": mean_loss,
            "lr": learning_rate_at(step - 1),
            "grad_norm": float(grad_norm),
            "images_per_second": total_batch_size / seconds,
            "ema_decay": (ema.cur_decay_value or 0.0) if ema is not None else 0.0,
            "nonfinite_steps": guard.total,
        }
        progress.update()
        progress.set_postfix(
            loss=f"{mean_loss:.4f}",
            lr=f"{values['lr']:.2e}",
            images_s=f"{values['images_per_second']:.0f}",
            refresh=False,
        )
        accelerator.log(values, step=step)
        if is_main:
            log.write(step=step, **values)

        is_last = step == args.max_train_steps
        if stop_signal or is_last or step % args.checkpointing_steps == 0:
            save(step, train_seconds)
        if stop_signal:
            progress.close()
            accelerator.end_training()
            accelerator.print(f"Stopped at step {step}. Go on with --resume_from_checkpoint latest.")
            raise SystemExit(128 + (stop.signal_number or 15))
        if is_main and args.num_validation_images and step % args.validation_steps == 0:
            with averaged_pipeline() as pipeline:
                grid = make_grid(draw_samples(pipeline, args))
            (output_dir / "samples").mkdir(exist_ok=True)
            grid.save(output_dir / "samples" / f"step-{step}.png")
            for writer in accelerator.trackers:
                if writer.name == "tensorboard":
                    pixels = torch.frombuffer(bytearray(grid.convert("RGB").tobytes()), dtype=torch.uint8)
                    writer.writer.add_image(
                        "samples", pixels.view(grid.height, grid.width, 3), step, dataformats="HWC"
                    )
    progress.close()
    stop.restore()

    # 6. The pipeline, from the averages
    if is_main:
        partial = output_dir / f"{checkpoints.PARTIAL_PREFIX}pipeline"
        partial.mkdir()
        summary = {
            "objective": args.objective,
            "steps": state["step"],
            "train_batch_size": total_batch_size,
            "images_seen": state["step"] * total_batch_size,
            "train_hours": state["train_seconds"] / 3600,
            "seed": args.seed,
            "final_loss": state["last_loss"],
            "nonfinite_steps": state["nonfinite_steps"],
            "ema_decay": args.ema_decay if ema is not None else None,
            "dataset": {
                "name": source.name,
                "num_images": source.num_images,
                "num_classes": unet.config.num_classes,
                **source.facts,
            },
            "args": identity,
            **state["environment"],
        }
        with averaged_pipeline() as pipeline:
            pipeline.save_pretrained(partial)
            if args.num_validation_images:
                make_grid(draw_samples(pipeline, args)).save(partial / "samples.png")
                summary["sample_grid"] = {
                    "file": "samples.png",
                    "seed": args.seed,
                    "guidance_scale": args.validation_guidance_scale,
                    "num_inference_steps": args.validation_inference_steps,
                    "scheduler": type(scheduler).__name__,
                }
        loop.write_json(partial / "training_summary.json", summary)
        checkpoints.commit_pipeline(partial, output_dir)
        accelerator.print(f"Saved the pipeline to {output_dir}")
        if args.push_to_hub:
            published = publish(
                output_dir,
                args.hub_model_id or output_dir.name,
                private=args.hub_private_repo,
                license=args.hub_license,
            )
            accelerator.print(f"Published at {published.url}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
