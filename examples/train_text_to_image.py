# SPDX-License-Identifier: Apache-2.0
"""
Trains a dynamic diffusion transformer to draw what a caption says, to fill holes in images or to enlarge them as it
says, from scratch or from a pipeline of classes or captions, in pixels or in the latents of a VAE.

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

Inpainting and super-resolution with captions, from the weights, text encoder and tokenizer of that model (what is new
starts at zero):

    python examples/train_text_to_image.py --task inpaint --train_data_dir pictures --resolution 32 \
        --pretrained_model_name_or_path outputs/text-static --static --output_dir outputs/text-inpaint
    python examples/train_text_to_image.py --task upscale --upscale_factor 2 --train_data_dir pictures --resolution 32 \
        --pretrained_model_name_or_path outputs/text-static --static --output_dir outputs/text-upscale

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
from pathlib import Path

from diffusers_dyna import DynaDiTInpaintPipeline, DynaDiTTextToImagePipeline, DynaDiTUpscalePipeline
from diffusers_dyna.training import arguments, captions, data, dynamic, tasks
from diffusers_dyna.training.run import TrainingRun, make_loader


PIPELINES = {
    "generate": DynaDiTTextToImagePipeline,
    "inpaint": DynaDiTInpaintPipeline,
    "upscale": DynaDiTUpscalePipeline,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_task_arguments(parser)
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
        help="Tokens of a caption; longer ones are cut. All batches are padded to the longest caption of the data, at a "
        "cost in each step. Default: what the tokenizer says, 128 where it does not.",
    )
    group.add_argument("--caption_cache_dir", help="Where embeddings are kept. Default: captions in --output_dir.")
    group.add_argument(
        "--text_batch_size",
        type=int,
        default=32,
        help="Captions encoded at a time. Another one may round their embeddings differently. Default: 32.",
    )
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
    group.add_argument(
        "--text_conditioning",
        choices=dynamic.TEXT_CONDITIONINGS,
        help="What reads a caption: cross-attention all its states; modulation their mean, which does for encoders of "
        "sentences such as all-MiniLM and costs next to nothing; or both. Default: as the weights it starts from, or "
        "cross_attention (with --caption_memory, modulation).",
    )
    group.add_argument(
        "--caption_memory",
        action="store_true",
        help="The mean is looked up in a memory with a learned entry for each caption of the data, for data of some "
        "thousand captions at most: a known caption is learned in fewer steps, and a new one gets a mixture of what its "
        "nearest ones have. Default: as the weights it starts from, with the captions that they know, or none.",
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
    """Raises on everything about this model that can be known to be wrong before data and model are touched."""
    arguments.check_transformer_arguments(args, defaults)
    for name in ("text_batch_size", "max_sequence_length", "cross_attention_dim"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`--{name}` {getattr(args, name)} must be at least 1.")
    if args.caption_dropout_prob is not None and not 0 <= args.caption_dropout_prob <= 1:
        raise ValueError(f"`--caption_dropout_prob` {args.caption_dropout_prob} must be in [0, 1].")
    if args.validation_prompts is not None and not args.num_validation_images:
        raise ValueError(
            "`--validation_prompts` are for samples, but `--num_validation_images` is 0. Leave one of them out."
        )
    if args.coupling == "ot":
        raise ValueError(
            "`--coupling ot` is for models of classes or without conditions: every caption is a condition of its own, so "
            "that no two images could change their noise."
        )
    if args.caption_memory and args.text_conditioning == "cross_attention":
        raise ValueError(
            "`--caption_memory` is read with the mean of a caption's states, but `--text_conditioning cross_attention` has "
            "none. Use modulation or both."
        )
    arguments.check_task_arguments(args)
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
    return arguments.parse_args(make_parser(), argv, check_arguments)


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
    task = tasks.ImageTask(run, with_captions=True)
    text_encoder, tokenizer = captions.load_text_encoder(*find_text_encoder(args))
    text_encoder.to(accelerator.device)
    # Saved with the tokenizer, so that the pipeline cuts its prompts where training cut the captions.
    tokenizer.model_max_length = captions.check_sequence_length(args.max_sequence_length, text_encoder, tokenizer)
    expected = {**task.config, "num_classes": None, "caption_channels": text_encoder.config.hidden_size}
    if args.caption_dropout_prob is not None:
        expected["caption_dropout_prob"] = args.caption_dropout_prob
    if args.caption_memory:
        expected["caption_memory_size"] = len(captions.distinct(task.source.captions))
    transformer = dynamic.make_transformer(args, run.checkpoint, expected, with_text=True)
    texts = captions.build_caption_cache(
        args.caption_cache_dir or run.output_dir / "captions",
        task.source.captions,
        text_encoder,
        tokenizer,
        accelerator,
        batch_size=args.text_batch_size,
    )
    if args.caption_memory and run.checkpoint is None:
        texts.write_to_memory(transformer)

    def make_pipeline(model):
        components = {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": task.vae}
        return PIPELINES[args.task](model, task.scheduler, **components, **task.facts)

    # The steps read the cache and validation its own prompts, encoded once: the encoder leaves the device.
    validation_inputs = task.make_validation_inputs()
    if args.num_validation_images:
        embeds, mask, _, _ = make_pipeline(transformer).encode_prompt(
            make_validation_prompts(args, task.source), do_classifier_free_guidance=False, device=accelerator.device
        )
        validation_inputs |= {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    text_encoder.to("cpu")
    task.cache_latents()

    # 2. Model, optimizer, averages, data
    run.start(
        transformer,
        task.scheduler,
        make_pipeline,
        task.source,
        lambda run: make_loader(run, task.transform),
        identity={**task.identity, "captions": texts.fingerprint()},
        defaults=vars(make_parser().parse_args([])),
        parameter_groups=dynamic.parameter_groups(transformer, args),
        prepare=task.make_prepare(texts),
        validation_inputs=validation_inputs,
    )
    loss = dynamic.DynamicLoss(run, num_text_tokens=texts.num_tokens)
    activity = dynamic.ActivityLog(run, task.transform)

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
