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

from diffusers_dyna import DynaDiTInpaintPipeline, DynaDiTPipeline, DynaDiTUpscalePipeline
from diffusers_dyna.training import arguments, dynamic, tasks
from diffusers_dyna.training.run import TrainingRun, make_loader


PIPELINES = {"generate": DynaDiTPipeline, "inpaint": DynaDiTInpaintPipeline, "upscale": DynaDiTUpscalePipeline}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_task_arguments(parser)
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
    """Raises on everything about this model that can be known to be wrong before data and model are touched."""
    arguments.check_transformer_arguments(args, defaults)
    if args.class_dropout_prob is not None and not 0 <= args.class_dropout_prob <= 1:
        raise ValueError(f"`--class_dropout_prob` {args.class_dropout_prob} must be in [0, 1].")
    arguments.check_task_arguments(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return arguments.parse_args(make_parser(), argv, check_arguments)


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong is found before anything is written
    run = TrainingRun(args, "train_dyna_dit", "transformer", can_shard=True)
    accelerator = run.accelerator
    task = tasks.ImageTask(run)
    id2label = task.source.id2label
    num_classes = len(id2label) if id2label is not None else None
    expected = {**task.config, "num_classes": num_classes, "cross_attention_dim": None, "caption_pooling": False}
    if args.class_dropout_prob is not None:
        expected["class_dropout_prob"] = args.class_dropout_prob
    transformer = dynamic.make_transformer(args, run.checkpoint, expected)
    validation_inputs = task.make_validation_inputs()
    task.cache_latents()

    def make_pipeline(model):
        return PIPELINES[args.task](model, task.scheduler, vae=task.vae, id2label=id2label, **task.facts)

    # 2. Model, optimizer, averages, data
    run.start(
        transformer,
        task.scheduler,
        make_pipeline,
        task.source,
        lambda run: make_loader(run, task.transform),
        identity=task.identity,
        defaults=vars(make_parser().parse_args([])),
        parameter_groups=dynamic.parameter_groups(transformer, args),
        prepare=task.make_prepare(),
        validation_inputs=validation_inputs,
    )
    loss = dynamic.DynamicLoss(run)
    activity = dynamic.ActivityLog(run, task.transform)

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
