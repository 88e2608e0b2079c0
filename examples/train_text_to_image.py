# SPDX-License-Identifier: Apache-2.0
"""
Trains a dynamic diffusion transformer to draw what a caption says, from scratch or from a pipeline of classes or
captions, in pixels or in the latents of a VAE.

A minute on a CPU, where the names of the digits are the captions, with any text encoder of transformers:

    python examples/train_text_to_image.py --text_encoder path/to/all-MiniLM-L6-v2 --dataset digits --patch_size 2 \
        --num_layers 4 --num_attention_heads 4 --attention_head_dim 16 --static --max_train_steps 500 \
        --output_dir outputs/text-digits

Your own pictures: a folder with metadata.jsonl, one line a picture, such as
{"file_name": "a/fox.png", "text": "a fox in the snow"}. First the complete model, then the same at a budget of 0.6:

    python examples/train_text_to_image.py --train_data_dir pictures --resolution 32 \
        --text_encoder path/to/all-MiniLM-L6-v2 --static --patch_size 4 --num_layers 6 --num_attention_heads 8 \
        --attention_head_dim 16 --output_dir outputs/text-static
    python examples/train_text_to_image.py --train_data_dir pictures --resolution 32 \
        --pretrained_model_name_or_path outputs/text-static --sort_by_importance --budget 0.6 \
        --router_learning_rate 1e-2 --output_dir outputs/text-0.6

From a model of classes (what reads the captions starts at zero, the classes become the null class), in the latents of a
VAE, on eight GPUs (not run by the authors):

    accelerate launch --config_file examples/configs/multi_gpu.yaml examples/train_text_to_image.py \
        --pretrained_model_name_or_path dit-xl --vae stabilityai/sd-vae-ft-ema --text_encoder google/flan-t5-base \
        --dataset_name owner/captioned-images --caption_column caption --resolution 256 --random_flip \
        --objective epsilon --learn_sigma --budget 0.5 --mixed_precision bf16 --output_dir outputs/text-xl

Stop it whenever you like (Ctrl-C saves first; even a kill loses only what came after the last checkpoint) and repeat
the command with `--resume_from_checkpoint latest`: the weights end the same, bit for bit on one machine. Publish with
`--push_to_hub`, or later with `diffusers_dyna.hub.publish`.
"""

import argparse
import os
from pathlib import Path

from accelerate.utils import set_seed

from diffusers_dyna import DynaDiTTextToImagePipeline
from diffusers_dyna.conversion import sort_by_importance
from diffusers_dyna.hub import check_can_publish
from diffusers_dyna.training import arguments, captions, data, dynamic, latents, objectives, tasks
from diffusers_dyna.training.randomness import keyed_seed
from diffusers_dyna.training.run import TrainingRun, cache_latents, load_vae, make_loader


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_data_arguments(parser, with_captions=True)
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text_encoder",
        help="Text encoder of transformers with its tokenizer, a name or a path: CLIP, T5, or one like BERT. Default: "
        "that of --pretrained_model_name_or_path.",
    )
    group.add_argument(
        "--text_encoder_subfolder",
        help="Folder of the encoder in there. Beside text_encoder, the tokenizer is in tokenizer.",
    )
    group.add_argument(
        "--max_sequence_length",
        type=int,
        help="Tokens of a caption; longer ones are cut. Default: what the tokenizer says, 128 where it does not.",
    )
    group.add_argument("--caption_cache_dir", help="Where embeddings are kept. Default: captions in --output_dir.")
    group.add_argument("--text_batch_size", type=int, default=32, help="Captions encoded at a time. Default: 32.")
    arguments.add_latent_arguments(parser)
    group = arguments.add_transformer_arguments(parser)
    group.add_argument(
        "--cross_attention_dim", type=int, help="Width of what cross-attention reads. Default: the model's width."
    )
    group.add_argument(
        "--caption_dropout_prob",
        type=float,
        help="Share of captions dropped, for guidance; in [0, 1]. Default: 0.1, or that of the weights it starts from.",
    )
    arguments.add_budget_arguments(parser)
    arguments.add_objective_arguments(parser)
    arguments.add_optimization_arguments(parser)
    arguments.add_run_arguments(parser, output_dir="outputs/text-to-image")
    parser.add_argument(
        "--validation_prompts",
        nargs="+",
        help="What the samples of a validation show, in turn. Default: captions from all over the data.",
    )
    return parser


def check_arguments(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raises on everything that can be known to be wrong before data and model are touched."""
    arguments.check_arguments(args)
    arguments.check_transformer_arguments(args, defaults)
    for name in ("text_batch_size", "max_sequence_length", "cross_attention_dim"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`--{name}` {getattr(args, name)} must be at least 1.")
    if args.caption_dropout_prob is not None and not 0 <= args.caption_dropout_prob <= 1:
        raise ValueError(f"`--caption_dropout_prob` {args.caption_dropout_prob} must be in [0, 1].")
    if args.coupling == "ot":
        raise ValueError(
            "`--coupling ot` is for models of classes or without conditions: every caption is a condition of its own, so "
            "that no two images could change their noise."
        )
    find_text_encoder(args)


def find_text_encoder(args: argparse.Namespace) -> tuple[str, str | None]:
    """Path and subfolder of the text encoder: the one that is named, or that of the pipeline to start from."""
    path, subfolder = args.text_encoder, args.text_encoder_subfolder
    if path is None:
        path, subfolder = args.pretrained_model_name_or_path, "text_encoder"
        if path is None or (Path(path).is_dir() and not (Path(path) / subfolder).is_dir()):
            raise ValueError(
                "`--text_encoder` is missing. Give a text encoder of transformers, a name or a path, such as "
                "openai/clip-vit-base-patch32, or start from a pipeline that has one."
            )
        if args.text_encoder_subfolder is not None:
            raise ValueError("`--text_encoder_subfolder` is for `--text_encoder`.")
    captions.find_text_encoder(path, subfolder)
    return path, subfolder


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


def make_validation_prompts(args: argparse.Namespace, source: data.ImageSource) -> list[str]:
    """As many prompts as samples: those that were given, in turn, or captions from all over the data."""
    count = args.num_validation_images
    if args.validation_prompts is not None:
        return [args.validation_prompts[i % len(args.validation_prompts)] for i in range(count)]
    return [source.captions[i * len(source) // count][0] for i in range(count)]


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong is found before anything is written
    run = TrainingRun(args, "train_text_to_image", "transformer", can_shard=True)
    accelerator = run.accelerator
    source = data.open_image_source(args, with_captions=True)
    resolution = args.resolution or source.native_size or 32
    vae = load_vae(args, accelerator.device)
    channels, size = source.channels, resolution
    transform = data.ImageTransform(resolution, channels, args.center_crop, args.random_flip)
    if vae is not None:
        transform = data.ImageTransform(resolution, vae.config.in_channels, args.center_crop, args.random_flip)
        channels, size = vae.config.latent_channels, resolution // latents.downsampling_factor(vae)
    text_encoder, tokenizer = captions.load_text_encoder(*find_text_encoder(args))
    text_encoder.to(accelerator.device)
    # Saved with the tokenizer, so that the pipeline cuts its prompts where training cut the captions.
    tokenizer.model_max_length = captions.check_sequence_length(args.max_sequence_length, text_encoder, tokenizer)
    expected = {
        "sample_size": size,
        "in_channels": channels,
        "num_classes": None,
        "learn_sigma": args.learn_sigma,
        "condition_channels": 0,
        "noise_level_conditioning": False,
        "caption_channels": text_encoder.config.hidden_size,
    }
    if args.caption_dropout_prob is not None:
        expected["caption_dropout_prob"] = args.caption_dropout_prob
    set_seed(keyed_seed(args.seed, "weights") % 2**32)  # numpy takes 32 bits
    transformer = dynamic.make_transformer(args, run.checkpoint, expected, with_text=True)
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
    texts = captions.build_caption_cache(
        args.caption_cache_dir or run.output_dir / "captions",
        source.captions,
        text_encoder,
        tokenizer,
        accelerator,
        batch_size=args.text_batch_size,
    )
    validation_inputs = {"prompt": make_validation_prompts(args, source)}
    if vae is not None:
        source, transform = cache_latents(run, source, transform, vae), latents.LatentTransform(vae)

    # 2. Model, optimizer, averages, data
    run.start(
        transformer,
        scheduler,
        lambda model: DynaDiTTextToImagePipeline(model, scheduler, text_encoder, tokenizer, vae),
        source,
        lambda run: make_loader(run, transform),
        identity={"resolution": resolution, "captions": texts.fingerprint()},
        defaults=vars(make_parser().parse_args([])),
        parameter_groups=dynamic.parameter_groups(transformer, args),
        prepare=tasks.make_captioning(args.seed, accelerator.device, texts),
        validation_inputs=validation_inputs,
    )
    loss = dynamic.DynamicLoss(run, num_text_tokens=texts.num_tokens)
    activity = dynamic.ActivityLog(run, transform)

    # 3. Train
    for step in run.steps():
        loss.start_step(step)
        for batch in run.micro_batches(step):
            with accelerator.accumulate(run.model):
                accelerator.backward(loss(batch))
                run.optimizer_step(step)
        run.end_step(step, **loss.sums)

        if run.is_time_to_validate(step):
            with run.averaged_pipeline() as pipeline:
                if run.is_main:
                    run.save_samples(step, pipeline)
                    activity.log(step, pipeline.transformer)

    # 4. The pipeline, from the averages
    run.finish(activity.write_extras)


if __name__ == "__main__":
    main(parse_args())
