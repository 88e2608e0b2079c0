# SPDX-License-Identifier: Apache-2.0
"""What is trained of a dynamic transformer, whatever it is conditioned on: its losses, its groups, its routers' log."""

import argparse
import importlib.util
import inspect
from pathlib import Path

import torch

from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from ..conversion import sort_by_importance
from ..models import DYNA_DIT_CONFIGS, DynaDiTTransformer2DModel
from . import activity, arguments, data, loop, objectives
from .budget import budget_at, budget_loss
from .randomness import keyed_randn, keyed_seed, keyed_uniform
from .run import NoisyBatch, TrainingRun
from .warm_start import adapt_transformer, load_transformer


TEXT_CONDITIONINGS = ("cross_attention", "modulation", "both")
NUM_ACTIVITY_IMAGES, NUM_ACTIVITY_TIMES = 8, 20


def make_transformer(
    args: argparse.Namespace, checkpoint: Path | None, expected: dict, with_text: bool = False
) -> DynaDiTTransformer2DModel:
    """
    The transformer at the start of a run, sorted where `--sort_by_importance`, or that of a checkpoint.

    Args:
        args (`argparse.Namespace`): with the arguments of `add_transformer_arguments` and `add_budget_arguments`.
        checkpoint (`Path`, *optional*): what the run continues from.
        expected (`dict`): what data and task ask of its config.
        with_text (`bool`, defaults to `False`):
            Whether it reads captions: as `args.text_conditioning` says, else as the weights to start from, else by
            modulation with `args.caption_memory` and by cross-attention without. `cross_attention_dim` is that of
            `args`, or of the weights to start from, or the width of the model.

    Returns:
        [`DynaDiTTransformer2DModel`].

    Raises:
        `ValueError`: if weights are given that do not fit, see [`adapt_transformer`], that read captions otherwise than
            `args` ask, or that have no caption projection where `args` asks for another `cross_attention_dim` than the
            width of the captions.
    """
    if checkpoint is not None and (checkpoint / "transformer").is_dir():
        return DynaDiTTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
    set_seed(keyed_seed(args.seed, "weights") % 2**32)  # numpy takes 32 bits
    transformer = _make_first_transformer(args, expected, with_text)
    if args.sort_by_importance and checkpoint is None:
        sort_by_importance(transformer)
    return transformer


def _make_first_transformer(args: argparse.Namespace, expected: dict, with_text: bool) -> DynaDiTTransformer2DModel:
    if args.pretrained_model_name_or_path is None:
        config = DYNA_DIT_CONFIGS[args.preset] if args.preset else {}
        shape = {name: getattr(args, name) for name in arguments.SHAPE if getattr(args, name) is not None}
        config = {**config, **expected, **shape, "router_mode": args.router_mode or "capacity"}
        if with_text:
            config |= _text_config(args, config)
        return DynaDiTTransformer2DModel(**config)
    path = args.pretrained_model_name_or_path
    transformer = load_transformer(path)
    if args.router_mode is not None:
        expected = {**expected, "router_mode": args.router_mode}
    if with_text:
        expected = {**expected, **_text_config(args, transformer.config)}
    if with_text and transformer.takes_text and not transformer.config.caption_channels:
        width = expected["caption_channels"]
        if args.cross_attention_dim not in (None, width):
            raise ValueError(
                f"`--cross_attention_dim` {args.cross_attention_dim} does not fit `--pretrained_model_name_or_path` "
                f"{path}: it has no caption projection, so that its cross-attention reads the states of the text "
                f"encoder, of width {width}, as they are. Leave it out."
            )
        expected["caption_channels"] = None
        if expected["cross_attention_dim"] is not None:
            expected["cross_attention_dim"] = width
    transformer = adapt_transformer(transformer, expected, f"`--pretrained_model_name_or_path` {path}")
    if args.static:
        # Routers that were trained would make the saved pipeline dynamic again.
        for block in transformer.transformer_blocks:
            transformer.initialize_routers(block)
    return transformer


def _text_config(args: argparse.Namespace, config: dict) -> dict:
    """How a model of this config reads, or is to read, captions. It can learn another way, and forgets none."""
    dim, is_pooled = config.get("cross_attention_dim"), config.get("caption_pooling", False)
    with_cross, with_mean = dim is not None, is_pooled
    if args.text_conditioning is not None:
        with_cross, with_mean = args.text_conditioning != "modulation", args.text_conditioning != "cross_attention"
    elif not (with_cross or with_mean):
        with_cross, with_mean = not args.caption_memory, args.caption_memory
    if (dim is not None and not with_cross) or (is_pooled and not with_mean):
        raise ValueError(
            f"`--text_conditioning` {args.text_conditioning} leaves out a way in which the weights to start from read "
            "captions. Use both, or leave it out."
        )
    if args.caption_memory and is_pooled and config["caption_memory_size"] is None:
        raise ValueError(
            "`--caption_memory` does not fit the weights to start from, which read the mean of a caption's states without "
            "a memory. Leave it out."
        )
    if args.caption_memory and not with_mean:
        raise ValueError(
            "`--caption_memory` is read with the mean of a caption's states, which the weights to start from do not read. "
            "Give `--text_conditioning both` too."
        )
    if args.cross_attention_dim is not None and not with_cross:
        raise ValueError(
            f"`--cross_attention_dim` {args.cross_attention_dim} is for cross-attention, but captions only modulate here. "
            "Give `--text_conditioning both`, or leave it out."
        )
    dim = (args.cross_attention_dim or dim or _width(config)) if with_cross else None
    return {"cross_attention_dim": dim, "caption_pooling": with_mean}


def _width(config: dict) -> int:
    defaults = inspect.signature(DynaDiTTransformer2DModel).parameters
    heads, head_dim = (
        config.get(name, defaults[name].default) for name in ("num_attention_heads", "attention_head_dim")
    )
    return heads * head_dim


def parameter_groups(transformer: DynaDiTTransformer2DModel, args: argparse.Namespace) -> list[dict] | None:
    """
    The groups of the optimizer: the routers may have a learning rate of their own. Where `args.static`, they are frozen.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]): to be trained.
        args (`argparse.Namespace`): with the arguments of `add_budget_arguments`.

    Returns:
        `list[dict]`, for [`TrainingRun.start`]; `None` where there is one group.
    """
    routers = list(transformer.router_parameters().values())
    if args.static:
        for parameter in routers:
            parameter.requires_grad_(False)
        return None
    is_router = {id(parameter) for parameter in routers}
    return [
        {"params": [p for p in transformer.parameters() if id(p) not in is_router]},
        {"params": routers, "lr_scale": (args.router_learning_rate or args.learning_rate) / args.learning_rate},
    ]


class DynamicLoss:
    """
    The loss of a run: the error of the prediction, the variational bound of learned variances, the budget, and the error
    of the complete model for the first `--complete_loss_steps`. In a step's order:

        loss.start_step(step)
        for batch in run.micro_batches(step):
            ...
            run.accelerator.backward(loss(batch))
        run.end_step(step, **loss.sums)

    Args:
        run ([`TrainingRun`]): started, with the arguments of `add_transformer_arguments` and
            `add_budget_arguments`.
        num_text_tokens (`int`, *optional*): tokens of a caption, for a model with captions.

    Attributes:
        sums (`dict[str, torch.Tensor]`): of this step's micro-batches, for the log.
    """

    def __init__(self, run: TrainingRun, num_text_tokens: int | None = None):
        self.run, self.args, self.config = run, run.args, run.unwrapped.config
        self.num_text_tokens = num_text_tokens
        self.is_capacity = self.config.router_mode == "capacity"
        # In threshold mode training throws coins, and inference costs what `activity_log.jsonl` says.
        self.ratio_name = "compute_ratio" if self.is_capacity else "sampled_compute_ratio"
        self.sums: dict[str, torch.Tensor] = {}

    def start_step(self, step: int) -> None:
        """
        Args:
            step (`int`): the optimizer step whose batches follow.
        """
        args, run = self.args, self.run
        names = ["loss", "diffusion_loss", *([] if args.static else [self.ratio_name])]
        self.sums = {name: torch.zeros((), device=run.accelerator.device) for name in names}
        self.target_ratio = budget_at(step, args.budget, args.budget_warmup_steps, args.budget_decay_steps)
        self.with_complete_loss = not args.static and step < args.complete_loss_steps
        self.mean_ratio = None
        if self.is_capacity and not (args.static or run.is_sharded):
            # Known before the forward pass, over all processes and micro-batches.
            text = {} if self.num_text_tokens is None else {"num_text_tokens": self.num_text_tokens}
            ratios = run.unwrapped.predict_compute_ratio(run.step_timesteps(step), self.config.sample_size, **text)
            self.mean_ratio = ratios.mean()

    def __call__(self, batch: NoisyBatch) -> torch.Tensor:
        """
        Args:
            batch ([`NoisyBatch`]): one of the step's.

        Returns:
            `torch.Tensor` of shape `()`: the loss to take gradients of.
        """
        args, accelerator = self.args, self.run.accelerator
        gate_noise = None
        if not (args.static or self.is_capacity):
            side = self.config.sample_size // self.config.patch_size
            shape = (self.config.num_layers, self.run.unwrapped.gate_noise_size(side**2))
            gate_noise = keyed_uniform(args.seed, "gates", batch.indices, shape).float().to(accelerator.device)

        loss, compute_ratio = self._predict(batch, args.static, gate_noise)
        self.sums["diffusion_loss"] += loss.detach()
        if not args.static:
            self.sums[self.ratio_name] += compute_ratio.detach().mean()
            mean_ratio = self.mean_ratio
            if mean_ratio is None:  # of the micro-batch, over all processes
                mean_ratio = accelerator.reduce(compute_ratio.detach().mean(), reduction="mean")
            loss = loss + args.budget_loss_weight * budget_loss(compute_ratio, mean_ratio, self.target_ratio)
            if self.with_complete_loss:
                loss = loss + self._predict(batch, True, gate_noise)[0]
        self.sums["loss"] += loss.detach()
        return loss

    def _predict(self, batch: NoisyBatch, complete_model: bool, gate_noise) -> tuple[torch.Tensor, torch.Tensor]:
        """The error of a prediction, and what it cost."""
        extra_arguments = batch.extra_arguments
        if batch.caption_dropout_mask is not None:
            extra_arguments = {**extra_arguments, "caption_dropout_mask": batch.caption_dropout_mask}
        output = self.run.model(
            batch.model_input(batch.noisy_sample),
            batch.timesteps,
            batch.class_labels,
            complete_model=complete_model,
            output_masks=not complete_model,
            class_dropout_mask=batch.class_dropout_mask,
            gate_noise=gate_noise,
            **extra_arguments,
        )
        prediction, variance = output.sample.float(), None
        if self.args.learn_sigma:
            prediction, variance = prediction.chunk(2, dim=1)
        loss = objectives.mse_loss(prediction, batch.target, batch.loss_weights)
        if self.args.learn_sigma:
            loss = loss + objectives.variational_bound(
                self.run.scheduler,
                prediction.detach(),
                variance,
                batch.sample,
                batch.noisy_sample,
                batch.timesteps,
            )
        return loss, output.compute_ratio


class ActivityLog:
    """
    What the routers leave on, by the rule of inference, on a few images: in `activity_log.jsonl` as the run goes, and drawn
    with the pipeline. Does nothing where `args.static`.

    Args:
        run ([`TrainingRun`]): started.
        transform (`Callable`): of the run's images, see [`ImageTransform`].
    """

    def __init__(self, run: TrainingRun, transform):
        self.run, self.args, self.batch = run, run.args, None
        if not run.is_main or self.args.static:
            return
        if not self.args.streaming:  # of a stream it is the last batch
            # A few images from all over the data, the same at every validation.
            source = run.source
            images = data.TrainingImages(source, transform, self.args.seed)
            count = min(NUM_ACTIVITY_IMAGES, len(source))
            batch = data.collate_examples([images[i, i * len(source) // count] for i in range(count)])
            self.batch = run.add_noise(batch)
        self._log = loop.TrainingLog(run.output_dir / "activity_log.jsonl", run.state["step"])

    def keep(self, batch: NoisyBatch) -> None:
        """
        Args:
            batch ([`NoisyBatch`]): the last one of a step, in the place of images of a stream.
        """
        if self.args.streaming and self.run.is_main:
            self.batch = batch.first(NUM_ACTIVITY_IMAGES)

    def measure(self, model: DynaDiTTransformer2DModel) -> dict[str, torch.Tensor]:
        """
        Args:
            model ([`DynaDiTTransformer2DModel`]): in evaluation mode.

        Returns:
            `dict` of [`measure_activity`].
        """
        batch, scheduler = self.batch, self.run.scheduler
        device = batch.sample.device
        noise = keyed_randn(self.args.seed, "activity", range(len(batch.sample)), batch.sample.shape[1:]).to(device)
        sigmas = (torch.arange(NUM_ACTIVITY_TIMES) + 0.5) / NUM_ACTIVITY_TIMES
        timesteps = objectives.sigmas_to_timesteps(scheduler, sigmas).to(device)
        noisy = [
            scheduler.add_noise(batch.sample, noise, timestep.expand(len(batch.sample))) for timestep in timesteps
        ]
        inputs = torch.stack([batch.model_input(sample) for sample in noisy])
        return activity.measure_activity(model, inputs, timesteps, batch.class_labels, **batch.extra_arguments)

    def log(self, step: int, model: DynaDiTTransformer2DModel) -> None:
        """
        What inference costs by timestep and by layer.

        Args:
            step (`int`): the optimizer step that was done.
            model ([`DynaDiTTransformer2DModel`]): with the averaged weights, in evaluation mode.
        """
        if self.args.static:
            return
        measured = self.measure(model)
        line = {
            "step": step + 1,
            "compute_ratio": measured["compute_ratio"].mean().item(),
            "timesteps": measured["timesteps"].tolist(),
            "compute_ratio_by_timestep": measured["compute_ratio"].tolist(),
            "heads_by_layer": measured["attn"].mean(dim=(0, 2)).tolist(),
            "groups_by_layer": measured["mlp"].mean(dim=(0, 2)).tolist(),
            "tokens_by_layer": measured["tokens"].mean(dim=(1, 3)).mean(dim=0).tolist(),
        }
        self._log.write(**line)
        self.run.accelerator.log({"deterministic_compute_ratio": line["compute_ratio"]}, step=step + 1)

    def write_extras(self, pipeline: DiffusionPipeline, folder: Path) -> dict:
        """
        For [`TrainingRun.finish`].

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]): with a `transformer`, the averaged one.
            folder (`Path`): where the pictures go, which need matplotlib.

        Returns:
            `dict`: the budget and the compute ratio that was measured.
        """
        if self.args.static or self.batch is None:
            return {"budget": None if self.args.static else self.args.budget}
        measured = self.measure(pipeline.transformer)
        if importlib.util.find_spec("matplotlib"):
            activity.plot_activity(measured, folder / "activity.png")
            activity.plot_tokens(measured, self.batch.sample, folder / "tokens.png")
        else:
            self.run.accelerator.print("Drew no pictures of what the routers do: `pip install matplotlib`.")
        return {"budget": self.args.budget, "compute_ratio": measured["compute_ratio"].mean().item()}
