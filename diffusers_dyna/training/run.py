# SPDX-License-Identifier: Apache-2.0
"""
What a training script does besides its model and its objective: launch, resume, draw batches, step, log, save, publish.
The loop itself, and all that the model sees, stay in the script.
"""

import argparse
import atexit
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.utils import make_image_grid

from . import arguments, checkpoints, data, latents, loop, objectives
from .randomness import keyed_randn, keyed_seed, keyed_uniform


WHOLE_MODEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass
class NoisyBatch:
    """
    One micro-batch on the device, as the model sees it and as it is to be answered.

    Args:
        indices (`list[int]`): global indices of the samples.
        sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): clean data.
        noisy_sample (`torch.Tensor` with the shape of `sample`): what the model is given.
        target (`torch.Tensor` with the shape of `sample`): what it should predict.
        timesteps (`torch.Tensor` of shape `(batch_size,)`): times of the samples.
        class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): their classes.
        class_dropout_mask (`torch.Tensor` of shape `(batch_size,)`, *optional*): whose class is dropped.
        extra_channels (`torch.Tensor` of shape `(batch_size, condition_channels, height, width)`, *optional*):
            What the model is given beside the noisy sample, after its channels.
        extra_arguments (`dict[str, torch.Tensor]`): further arguments of the model, a row for each sample.
        caption_dropout_mask (`torch.Tensor` of shape `(batch_size,)`, *optional*): whose caption is dropped.
        loss_weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): what their errors count; `None` is 1.
    """

    indices: list[int]
    sample: torch.Tensor
    noisy_sample: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    class_labels: torch.Tensor | None
    class_dropout_mask: torch.Tensor | None
    extra_channels: torch.Tensor | None
    extra_arguments: dict[str, torch.Tensor]
    caption_dropout_mask: torch.Tensor | None
    loss_weights: torch.Tensor | None

    def model_input(self, noisy_sample: torch.Tensor) -> torch.Tensor:
        """
        Args:
            noisy_sample (`torch.Tensor` with the shape of `sample`): of these samples, at any time.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels + condition_channels, height, width)`: what the model is
            given.
        """
        return noisy_sample if self.extra_channels is None else torch.cat([noisy_sample, self.extra_channels], dim=1)

    def first(self, count: int) -> "NoisyBatch":
        """
        Args:
            count (`int`): how many samples.

        Returns:
            [`NoisyBatch`] of the first ones.
        """

        def cut(value):
            if isinstance(value, dict):
                return {name: entry[:count] for name, entry in value.items()}
            return None if value is None else value[:count]

        return NoisyBatch(*(cut(getattr(self, field.name)) for field in fields(self)))


class TrainingRun:
    """
    One run of a training script. In the script's order: create it, [`start`] it with the model, then

        for step in run.steps():
            for batch in run.micro_batches(step):
                with run.accelerator.accumulate(run.model):
                    ...
                    run.accelerator.backward(loss)
                    run.optimizer_step(step)
            run.end_step(step, loss=...)
        run.finish(...)

    Args:
        args (`argparse.Namespace`): with the arguments of `add_data_arguments`, `add_optimization_arguments` and
            `add_run_arguments`, checked.
        name (`str`): of the script, for the tracker.
        component (`str`): of the pipeline, that is trained: `"unet"` or `"transformer"`.
        can_shard (`bool`, defaults to `False`): whether FSDP and DeepSpeed launches are allowed.

    Attributes:
        accelerator ([`~accelerate.Accelerator`]): devices, processes, precision.
        checkpoint (`Path`, *optional*): what the run continues from.
        state (`dict`): what `training_state.json` of a checkpoint holds.

    Raises:
        `ValueError`: for a launch that cannot be saved, or a checkpoint that does not fit `output_dir`.
    """

    def __init__(self, args: argparse.Namespace, name: str, component: str, can_shard: bool = False):
        self.args, self.name, self.component = args, name, component
        self.output_dir = Path(args.output_dir)
        tracker = args.report_to or loop.default_tracker()
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(
                str(self.output_dir), logging_dir=str(self.output_dir / args.logging_dir)
            ),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.is_sharded = self.accelerator.distributed_type not in WHOLE_MODEL
        if self.is_sharded and not can_shard:
            raise ValueError(
                f"This script saves a model that is whole on every process, but was launched with "
                f"{self.accelerator.distributed_type.value}. Launch it on one device or data-parallel (`--multi_gpu`)."
            )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            plugin = self.accelerator.state.deepspeed_plugin
            if plugin.zero_stage > 2:
                raise ValueError(
                    f"DeepSpeed ZeRO stage {plugin.zero_stage} leaves no process a whole model to save. Use stage 2, or "
                    "FSDP."
                )
            if args.use_ema:
                raise ValueError(
                    "`--use_ema` does not work with DeepSpeed, which keeps the weights in half precision: their average "
                    "would not move. Give `--no-use_ema`, or use FSDP."
                )
            if args.skip_grad_norm is not None:
                raise ValueError("`--skip_grad_norm` does not work with DeepSpeed, which steps by itself.")
        self.is_main = self.accelerator.is_main_process
        if self.is_main:
            checkpoints.sweep_partial_folders(self.output_dir)
        self.accelerator.wait_for_everyone()
        self.checkpoint = checkpoints.find_checkpoint(self.output_dir, args.resume_from_checkpoint)
        # The default convolution algorithms of cuDNN add up gradients in a changing order.
        torch.backends.cudnn.deterministic = True

    @property
    def total_batch_size(self) -> int:
        """Samples of one optimizer step, over all processes and accumulation."""
        return self.args.train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps

    def step_timesteps(self, step: int) -> torch.Tensor:
        """
        Args:
            step (`int`): an optimizer step.

        Returns:
            `torch.Tensor` of shape `(total_batch_size,)`: the times of all its samples, also of other processes.
        """
        indices = range(step * self.total_batch_size, (step + 1) * self.total_batch_size)
        return self._timesteps(indices).to(self.accelerator.device)

    def _timesteps(self, indices) -> torch.Tensor:
        args = self.args
        sigmas = objectives.sample_sigmas(
            args.time_sampling,
            args.seed,
            indices,
            self.total_batch_size,
            args.logit_mean,
            args.logit_std,
            args.mode_scale,
            args.time_shift,
        )
        return objectives.sigmas_to_timesteps(self.scheduler, sigmas)

    def start(
        self,
        unwrapped: nn.Module,
        scheduler: SchedulerMixin,
        make_pipeline: Callable[[nn.Module], DiffusionPipeline],
        source: data.ImageSource,
        make_loader: Callable[["TrainingRun"], data.DataLoader | data.StreamingLoader],
        identity: dict,
        defaults: dict,
        parameter_groups: list[dict] | None = None,
        prepare: Callable[[dict], tuple[torch.Tensor, torch.Tensor | None, dict]] | None = None,
        validation_inputs: dict | None = None,
    ) -> None:
        """
        Everything between the model and the first step: optimizer, averages, state of the checkpoint, data, log.

        Args:
            unwrapped (`torch.nn.Module`): the model, a `ModelMixin`.
            scheduler ([`~diffusers.SchedulerMixin`]): the one that is saved.
            make_pipeline (`Callable`): from a model to the pipeline that is saved.
            source ([`ImageSource`]): the images.
            make_loader (`Callable`): from this run to its batches; see [`make_loader`].
            identity (`dict`): what defines the run besides the arguments.
            defaults (`dict`): default of every argument; a checkpoint that is older than an argument was made with it.
            parameter_groups (`list[dict]`, *optional*):
                Groups for the optimizer, with `lr_scale` relative to `--learning_rate`. `None` is all parameters.
            prepare (`Callable`, *optional*):
                From a batch of [`collate_examples`] to what the task makes of it: clean samples, their
                `extra_channels` (or `None`) and their `extra_arguments`, see [`NoisyBatch`], on the device. All that
                it draws must be a function of the seed and of `sample_indices`. `None` trains on `pixel_values` as
                they are.
            validation_inputs (`dict`, *optional*):
                What the pipeline is called with to draw `--num_validation_images` samples, lists of that length, where
                it is not each class in turn. Empty is `None`.

        Raises:
            `ValueError`: if the checkpoint is from another run.
        """
        args, accelerator = self.args, self.accelerator
        self.unwrapped, self.scheduler, self.make_pipeline, self.source = unwrapped, scheduler, make_pipeline, source
        self.prepare = prepare or (lambda batch: (batch["pixel_values"].to(accelerator.device), None, {}))
        self.validation_inputs = validation_inputs
        self.identity = {name: value for name, value in vars(args).items() if name not in arguments.FREE_ON_RESUME}
        self.identity |= {
            "data_fingerprint": source.fingerprint(),
            "mixed_precision": accelerator.mixed_precision,
            # The other schedules depend on where they end.
            "max_train_steps": None if args.lr_scheduler.startswith("constant") else args.max_train_steps,
            "total_batch_size": self.total_batch_size,
            **identity,
        }
        if args.coupling == "ot":
            self.identity["train_batch_size"] = args.train_batch_size  # another one has other pairs
        self.state = {
            "step": 0,
            "identity": self.identity,
            "train_seconds": 0.0,
            "nonfinite_steps": 0,
            "skipped_steps": 0,
            "last_loss": None,
            "ema_updates": 0,
            "stream": None,
            "environment": loop.describe_environment(Path(__file__).parent),
        }
        if self.checkpoint is not None:
            self.state |= json.loads((self.checkpoint / checkpoints.STATE_NAME).read_text())
            if self.state["step"] > args.max_train_steps:
                raise ValueError(
                    f"`--max_train_steps` {args.max_train_steps} is below the {self.state['step']} steps of "
                    f"{self.checkpoint.name}."
                )
            # What is free may have been part of the identity when the checkpoint was made.
            free = arguments.FREE_ON_RESUME - self.identity.keys()
            saved = {name: value for name, value in self.state["identity"].items() if name not in free}
            loop.check_resume(saved, self.identity, defaults)

        if args.gradient_checkpointing:
            unwrapped.enable_gradient_checkpointing()
        unwrapped.train()
        trained = [parameter for parameter in unwrapped.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups or [{"params": trained}],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        self.learning_rate_at = loop.make_lr_schedule(
            args.lr_scheduler, args.learning_rate, args.lr_warmup_steps, args.max_train_steps
        )
        self.model, self.optimizer = accelerator.prepare(unwrapped, self.optimizer)
        self.ema = None
        if args.use_ema:
            self.ema = loop.make_ema(unwrapped.parameters(), args.ema_decay, args.ema_warmup_steps)
        accelerator.register_save_state_pre_hook(self._save_model)
        accelerator.register_load_state_pre_hook(self._load_model)
        if self.checkpoint is not None:
            accelerator.load_state(str(self.checkpoint))
            if self.ema is not None:
                self._load_ema()

        self.loader = make_loader(self)
        if self.state["stream"] is not None:
            self.loader.load_state_dict(self.state["stream"])
        self._batches = iter(self.loader)
        # Workers ignore the signals by which multiprocessing would end them at exit, and wait for this instead.
        atexit.register(self._release_workers)
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            loop.write_json(self.output_dir / "args.json", vars(args))
            self._log = loop.TrainingLog(self.output_dir / "training_log.jsonl", self.state["step"])
        accelerator.init_trackers(self.name, {name: str(value) for name, value in vars(args).items()})
        self._guard = loop.NonFiniteGuard(args.max_nonfinite_steps, self.state["nonfinite_steps"])
        self._bad_images: dict[str, None] = {}

    def _release_workers(self) -> None:
        self._batches = None

    def _save_model(self, models, weights, folder) -> None:
        if not self.is_sharded:
            weights.clear()  # accelerate would save them once more
            if self.is_main:
                self.unwrapped.save_pretrained(Path(folder) / self.component)

    def _load_model(self, models, folder) -> None:
        if not self.is_sharded:
            models.clear()
            saved = type(self.unwrapped).from_pretrained(folder, subfolder=self.component)
            self.unwrapped.load_state_dict(saved.state_dict())

    def _shard_of_ema(self, folder: Path) -> Path:
        return folder / f"ema-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.safetensors"

    def _load_ema(self) -> None:
        if self.is_sharded:
            shard = load_file(self._shard_of_ema(self.checkpoint))
            for i, parameter in enumerate(self.ema.shadow_params):
                _local(parameter).copy_(shard[str(i)])
        else:
            averaged = type(self.unwrapped).from_pretrained(self.checkpoint, subfolder=f"{self.component}_ema")
            self.ema.load_state_dict({**self.ema.state_dict(), "shadow_params": list(averaged.parameters())})
            self.ema.to(self.accelerator.device)
        self.ema.optimization_step = self.state["ema_updates"]

    def steps(self) -> Iterator[int]:
        """
        Yields every optimizer step that is left, from 0, with the learning rate set, and saves after those where it is
        time.

        Raises:
            `SystemExit`: after saving, when a signal asked to stop.
        """
        args = self.args
        self._stop = loop.StopRequest()
        first_step = self.state["step"]
        self._start = time.monotonic() - self.state["train_seconds"]
        num_params = sum(parameter.numel() for parameter in self.unwrapped.parameters())
        self.accelerator.print(
            f"{self.source.name}: {self.source.num_images or 'a stream of'} images, {num_params:,} parameters, total "
            f"batch size {self.total_batch_size}, steps {first_step} to {args.max_train_steps}"
        )
        self.progress = tqdm(total=args.max_train_steps, initial=first_step, disable=not self.is_main, mininterval=1)
        for step in range(first_step, args.max_train_steps):
            self._step_start = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate_at(step) * group.get("lr_scale", 1.0)
            yield step
            # Here the script has validated too: what a checkpoint is ahead of is on disk.
            is_due = self.state["step"] == args.max_train_steps or self.state["step"] % args.checkpointing_steps == 0
            if is_due or self._stop_signal:
                self.save()
            if self._stop_signal:
                self.progress.close()
                self.accelerator.end_training()
                self.accelerator.print(
                    f"Stopped at step {self.state['step']}. Go on with --resume_from_checkpoint latest."
                )
                raise SystemExit(128 + (self._stop.signal_number or 15))
        self.progress.close()
        self._stop.restore()
        self._release_workers()
        atexit.unregister(self._release_workers)

    def micro_batches(self, step: int) -> Iterator[dict]:
        """
        Args:
            step (`int`): the optimizer step.

        Yields:
            [`NoisyBatch`]: the batches of the step. Every draw is a function of the seed and of a sample's index.

        Raises:
            `ValueError`: where more images than `--max_bad_images` cannot be read.
        """
        for micro_step in range(self.args.gradient_accumulation_steps):
            batch = next(self._batches)
            # Dropout draws from the global generator: seeding it here makes it a function of the step.
            torch.manual_seed(keyed_seed(self.args.seed, "step", step, micro_step, self.accelerator.process_index))
            yield self.add_noise(batch)
            for name in batch["bad_images"]:
                if name not in self._bad_images:
                    self._bad_images[name] = None
                    tqdm.write(f"Skipped an image that cannot be read: {name}")
            if len(self._bad_images) > self.args.max_bad_images:
                raise ValueError(
                    f"More than `--max_bad_images` {self.args.max_bad_images} images cannot be read: "
                    f"{', '.join(self._bad_images)}"
                )

    def add_noise(self, batch: dict) -> NoisyBatch:
        """
        Args:
            batch (`dict`): of [`collate_examples`].

        Returns:
            [`NoisyBatch`]: what a step makes of it. Every draw is a function of the seed and of a sample's index.
        """
        args, device, indices = self.args, self.accelerator.device, batch["sample_indices"]
        config = self.unwrapped.config
        sample, extra_channels, extra_arguments = self.prepare(batch)
        class_labels = dropout_mask = given_labels = caption_dropout_mask = None
        if self.source.id2label is not None:
            class_labels = given_labels = batch["class_labels"]
            if self.unwrapped.null_class_label is not None:
                dropout_mask = keyed_uniform(args.seed, "class_dropout", indices) < config.class_dropout_prob
                given_labels = class_labels.masked_fill(dropout_mask, self.unwrapped.null_class_label)
                dropout_mask = dropout_mask.to(device)
            class_labels = class_labels.to(device)
        if "encoder_hidden_states" in extra_arguments and self.unwrapped.has_null_caption:
            caption_dropout_mask = keyed_uniform(args.seed, "caption_dropout", indices) < config.caption_dropout_prob
            caption_dropout_mask = caption_dropout_mask.to(device)
        noise = keyed_randn(args.seed, "noise", indices, sample.shape[1:])
        if args.coupling == "ot":
            noise = noise[objectives.optimal_coupling(sample.cpu(), noise, given_labels)]
        noise, timesteps = noise.to(device), self._timesteps(indices).to(device)
        return NoisyBatch(
            indices,
            sample,
            self.scheduler.add_noise(sample, noise, timesteps),
            objectives.training_target(self.scheduler, sample, noise, timesteps),
            timesteps,
            class_labels,
            dropout_mask,
            extra_channels,
            extra_arguments,
            caption_dropout_mask,
            objectives.loss_weights(args.weighting_scheme, self.scheduler, timesteps, args.snr_gamma),
        )

    def optimizer_step(self, step: int) -> None:
        """
        Where the gradients of the global batch are complete: clips them, and steps unless they are to be skipped.

        Args:
            step (`int`): the optimizer step, for the message.

        Raises:
            `FloatingPointError`: after too many gradients in a row that are not finite.
        """
        accelerator = self.accelerator
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(self.unwrapped.parameters(), self.args.max_grad_norm)
            self.grad_norm = float(
                self.model.get_global_grad_norm() if norm is None else norm
            )  # DeepSpeed has its own
            is_finite = self._guard.is_finite(self.grad_norm, step)
            limit = self.args.skip_grad_norm
            is_skipped = is_finite and limit is not None and self.grad_norm > limit
            self.state["skipped_steps"] += is_skipped
            # With fp16, the gradient scaler skips a step that is not finite itself and lowers its scale.
            if not is_skipped and (is_finite or accelerator.scaler is not None):
                self.optimizer.step()
            elif accelerator.scaler is not None:
                accelerator.scaler.update()
            if is_finite and not is_skipped and self.ema is not None:
                self.ema.step(self.unwrapped.parameters())
        self.optimizer.zero_grad()

    def end_step(self, step: int, **sums: torch.Tensor) -> None:
        """
        Logs a step.

        Args:
            step (`int`): the optimizer step that was done.
            sums (`torch.Tensor` of shape `()`):
                What to log, `loss` among them: sums over this process's micro-batches of their means.
        """
        args, accelerator = self.args, self.accelerator
        step += 1
        # One reduction a step: the means of the global batch, and whether any process was asked to stop.
        local = [value.detach().float() / args.gradient_accumulation_steps for value in sums.values()]
        local.append(torch.tensor(float(self._stop.signal_number), device=accelerator.device))
        *means, self._stop_signal = accelerator.reduce(torch.stack(local), reduction="mean").tolist()
        values = dict(zip(sums, means, strict=True))
        self.state["step"] = step
        self.state["last_loss"] = values["loss"] if math.isfinite(values["loss"]) else None
        self.state["nonfinite_steps"] = self._guard.total
        self.state["train_seconds"] = time.monotonic() - self._start
        values |= {
            "lr": self.learning_rate_at(step - 1),
            "grad_norm": self.grad_norm,
            "images_per_second": self.total_batch_size / (time.monotonic() - self._step_start),
            "ema_decay": (self.ema.cur_decay_value or 0.0) if self.ema is not None else 0.0,
            "nonfinite_steps": self._guard.total,
        }
        if args.skip_grad_norm is not None:
            values["skipped_steps"] = self.state["skipped_steps"]
        self.progress.update()
        self.progress.set_postfix(
            {name: f"{values[name]:.3g}" for name in (*sums, "lr", "images_per_second")}, refresh=False
        )
        accelerator.log(values, step=step)
        if self.is_main:
            self._log.write(step=step, **values)

    def _clear_plan(self) -> None:
        """To be called after weights were written through `.data`, which a transformer's plan cannot see."""
        if hasattr(self.unwrapped, "clear_plan"):
            self.unwrapped.clear_plan()

    @contextlib.contextmanager
    def averaged_pipeline(self) -> Iterator[DiffusionPipeline | None]:
        """
        The pipeline with the averaged weights, for as long as the block lasts. To be entered by all processes where
        [`is_sharded`]; it is `None` on the others then.
        """
        self.unwrapped.eval()
        if self.ema is not None:
            self.ema.store(self.unwrapped.parameters())
            self.ema.copy_to(self.unwrapped.parameters())
            self._clear_plan()
        try:
            if self.is_sharded:
                state_dict = self.accelerator.get_state_dict(self.model)
                pipeline = None
                if self.is_main:
                    whole = type(self.unwrapped).from_config(self.unwrapped.config)
                    whole.load_state_dict(state_dict)
                    pipeline = self.make_pipeline(whole.to(self.accelerator.device).eval())
                yield pipeline
            else:
                yield self.make_pipeline(self.unwrapped)
        finally:
            if self.ema is not None:
                self.ema.restore(self.unwrapped.parameters())
                self._clear_plan()
            self.unwrapped.train()

    def save(self) -> None:
        """Writes all that the run needs to go on, in `checkpoint-<step>`."""
        if self.ema is not None:
            self.state["ema_updates"] = self.ema.optimization_step
        if isinstance(self.loader, data.StreamingLoader):
            self.state["stream"] = self.loader.state_dict()

        def write(folder: Path) -> None:
            # A checkpoint is between two optimizer steps: a run that goes on may have other micro-steps.
            self.accelerator.step = 0
            self.accelerator.save_state(str(folder))
            if self.is_sharded and self.ema is not None:
                shard = {str(i): _local(parameter) for i, parameter in enumerate(self.ema.shadow_params)}
                save_file(shard, self._shard_of_ema(folder))
            if self.is_main:
                if self.ema is not None and not self.is_sharded:
                    with self.averaged_pipeline() as pipeline:
                        getattr(pipeline, self.component).save_pretrained(folder / f"{self.component}_ema")
                self.scheduler.save_pretrained(folder / "scheduler")
                loop.write_json(folder / checkpoints.STATE_NAME, self.state)

        checkpoints.save_checkpoint(
            self.accelerator, self.output_dir, self.state["step"], write, self.args.checkpoints_total_limit
        )

    def is_time_to_validate(self, step: int) -> bool:
        """
        Args:
            step (`int`): the optimizer step that was done.

        Returns:
            `bool`: whether this process enters [`averaged_pipeline`] to look at the model after it.
        """
        return (step + 1) % self.args.validation_steps == 0 and (self.is_main or self.is_sharded)

    def draw_samples(self, pipeline: DiffusionPipeline) -> list:
        """
        Samples of every class in turn, or of `validation_inputs`, from generators of their own: training draws the same
        with and without them.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]): from [`averaged_pipeline`].

        Returns:
            `list[PIL.Image.Image]`.
        """
        args, model = self.args, getattr(pipeline, self.component)
        num_classes, num_images = model.config.num_classes, args.num_validation_images
        inputs = self.validation_inputs
        if not inputs and num_classes is None:
            inputs = {"class_labels": None, "num_images_per_prompt": num_images}
        elif not inputs:
            inputs = {"class_labels": [i % num_classes for i in range(num_images)]}
        has_null = model.null_class_label is not None or getattr(model, "has_null_caption", False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            **inputs,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale if has_null else 1.0,
            generator=[
                torch.Generator().manual_seed(keyed_seed(args.seed, "validation", i)) for i in range(num_images)
            ],
        ).images

    def save_samples(self, step: int, pipeline: DiffusionPipeline) -> None:
        """
        Draws the grid of a validation into `samples/` and the tracker.

        Args:
            step (`int`): the optimizer step that was done.
            pipeline ([`~diffusers.DiffusionPipeline`]): from [`averaged_pipeline`].
        """
        if not self.args.num_validation_images:
            return
        grid = make_grid(self.draw_samples(pipeline))
        (self.output_dir / "samples").mkdir(exist_ok=True)
        grid.save(self.output_dir / "samples" / f"step-{step + 1}.png")
        for writer in self.accelerator.trackers:
            if writer.name == "tensorboard":
                pixels = torch.frombuffer(bytearray(grid.convert("RGB").tobytes()), dtype=torch.uint8)
                pixels = pixels.view(grid.height, grid.width, 3)
                writer.writer.add_image("samples", pixels, step + 1, dataformats="HWC")

    def finish(self, write_extras: Callable[[DiffusionPipeline, Path], dict] | None = None) -> None:
        """
        Saves the pipeline with the averaged weights beside the checkpoints, and publishes it where asked.

        Args:
            write_extras (`Callable`, *optional*):
                Given the pipeline and the folder that becomes the pipeline's; returns more facts for the model card.
        """
        if self.is_main or self.is_sharded:
            with self.averaged_pipeline() as pipeline:
                if self.is_main:
                    self._save_pipeline(pipeline, write_extras)
        if self.is_main and self.args.push_to_hub:
            from ..hub import publish

            published = publish(
                self.output_dir,
                self.args.hub_model_id or self.output_dir.name,
                private=self.args.hub_private_repo,
                license=self.args.hub_license,
            )
            self.accelerator.print(f"Published at {published.url}")
        self.accelerator.end_training()

    def _save_pipeline(self, pipeline: DiffusionPipeline, write_extras) -> None:
        args, state = self.args, self.state
        partial = self.output_dir / f"{checkpoints.PARTIAL_PREFIX}pipeline"
        partial.mkdir()
        summary = {
            "objective": args.objective,
            "steps": state["step"],
            "train_batch_size": self.total_batch_size,
            "images_seen": state["step"] * self.total_batch_size,
            "train_hours": state["train_seconds"] / 3600,
            "seed": args.seed,
            "final_loss": state["last_loss"],
            "nonfinite_steps": state["nonfinite_steps"],
            "ema_decay": args.ema_decay if self.ema is not None else None,
            "dataset": {
                "name": self.source.name,
                "num_images": self.source.num_images,
                "num_classes": self.unwrapped.config.num_classes,
                **self.source.facts,
            },
            "args": self.identity,
            **state["environment"],
        }
        pipeline.save_pretrained(partial)
        if args.num_validation_images:
            make_grid(self.draw_samples(pipeline)).save(partial / "samples.png")
            summary["sample_grid"] = {
                "file": "samples.png",
                "seed": args.seed,
                "guidance_scale": args.validation_guidance_scale,
                "num_inference_steps": args.validation_inference_steps,
                "scheduler": type(self.scheduler).__name__,
            }
        if write_extras is not None:
            summary |= write_extras(pipeline, partial)
        loop.write_json(partial / "training_summary.json", summary)
        checkpoints.commit_pipeline(partial, self.output_dir)
        self.accelerator.print(f"Saved the pipeline to {self.output_dir}")


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter that FSDP may have split."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def make_loader(run: TrainingRun, transform: data.ImageTransform) -> data.DataLoader | data.StreamingLoader:
    """
    The batches of a run that trains on pixels.

    Args:
        run ([`TrainingRun`]): started as far as its step.
        transform ([`ImageTransform`]): from image to tensor.

    Returns:
        `DataLoader` or [`StreamingLoader`].
    """
    args, accelerator = run.args, run.accelerator
    if args.streaming:
        if args.shuffle_buffer_size:
            accelerator.print("With --shuffle_buffer_size a resumed run does not see the same rows: not bit for bit.")
        return data.StreamingLoader(
            run.source,
            transform,
            args.train_batch_size,
            args.seed,
            accelerator.num_processes,
            accelerator.process_index,
            args.shuffle_buffer_size,
            args.dataloader_num_workers,
        )
    return data.make_dataloader(run.source, transform, make_sampler(run), args.seed, args.dataloader_num_workers)


def load_vae(args: argparse.Namespace, device: torch.device) -> AutoencoderKL | None:
    """
    Args:
        args (`argparse.Namespace`): with the arguments of `add_latent_arguments`.
        device (`torch.device`): where it encodes.

    Returns:
        [`~diffusers.AutoencoderKL`], frozen; `None` for a run in pixels.
    """
    if args.vae is None:
        return None
    vae = AutoencoderKL.from_pretrained(args.vae, subfolder=args.vae_subfolder).to(device)
    return vae.requires_grad_(False).eval()


def cache_latents(
    run: TrainingRun, source: data.ImageSource, transform: data.ImageTransform, vae: AutoencoderKL
) -> latents.LatentSource:
    """
    Args:
        run ([`TrainingRun`]): not started yet.
        source ([`ImageSource`]): the images.
        transform ([`ImageTransform`]): how they become the VAE's input.
        vae ([`~diffusers.AutoencoderKL`]): of [`load_vae`].

    Returns:
        [`LatentSource`]: the latents of all images, in the folder that the arguments name.
    """
    args = run.args
    return latents.build_latent_cache(
        args.latent_cache_dir or run.output_dir / "latents",
        source,
        transform,
        vae,
        run.accelerator,
        batch_size=args.vae_batch_size,
        num_workers=args.dataloader_num_workers,
        max_bad_images=args.max_bad_images,
    )


def make_sampler(run: TrainingRun) -> data.GlobalBatchSampler:
    """
    Args:
        run ([`TrainingRun`]): started as far as its step.

    Returns:
        [`GlobalBatchSampler`] of this process, from the first sample that the run has not seen.
    """
    args, accelerator = run.args, run.accelerator
    return data.GlobalBatchSampler(
        len(run.source),
        args.train_batch_size,
        args.seed,
        accelerator.num_processes,
        accelerator.process_index,
        first_micro_step=run.state["step"] * args.gradient_accumulation_steps,
    )


def make_grid(images: list):
    """
    Args:
        images (`list[PIL.Image.Image]`): of one size.

    Returns:
        `PIL.Image.Image`: all of them, as square as it gets, small ones enlarged.
    """
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    size = max(64, images[0].width)
    blank = images[0].copy()
    blank.paste(0, (0, 0, *blank.size))
    return make_image_grid(images + [blank] * (rows * columns - len(images)), rows, columns, resize=size)
