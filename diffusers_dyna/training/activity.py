# SPDX-License-Identifier: Apache-2.0
"""What the routers of a dynamic transformer leave on, measured and drawn."""

from pathlib import Path

import torch


@torch.no_grad()
def measure_activity(
    transformer,
    noisy_sample: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    **extra_arguments: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """
    What the routers leave on, by the rule of inference.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]): in evaluation mode.
        noisy_sample (`torch.Tensor` of shape `(num_timesteps, batch_size, channels, height, width)`):
            The same images at every timestep, with the channels of their condition.
        timesteps (`torch.Tensor` of shape `(num_timesteps,)`): their times.
        class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): their classes.
        extra_arguments (`torch.Tensor`): further arguments of the transformer, such as `encoder_hidden_states`.

    Returns:
        `dict` of tensors on the CPU: `timesteps` and `compute_ratio` of shape `(num_timesteps,)`; `attn` and `mlp` of
        shape `(num_timesteps, num_layers, num_attention_heads)`, 1 where a head or group was on; `tokens` of shape
        `(num_timesteps, batch_size, num_layers, num_tokens)`, 1 where a token took the MLP.
    """
    outputs = [
        transformer(sample, timestep, class_labels, output_masks=True, **extra_arguments)
        for sample, timestep in zip(noisy_sample, timesteps, strict=True)
    ]
    return {
        "timesteps": timesteps.float().cpu(),
        "compute_ratio": torch.stack([output.compute_ratio.mean() for output in outputs]).cpu(),
        "attn": torch.stack([output.attn_masks.mean(dim=0) for output in outputs]).cpu(),
        "mlp": torch.stack([output.mlp_masks.mean(dim=0) for output in outputs]).cpu(),
        "tokens": torch.stack([output.token_masks for output in outputs]).cpu(),
    }


def plot_activity(activity: dict[str, torch.Tensor], path: str | Path) -> None:
    """
    Draws which heads and channel groups were on, the share of tokens that took the MLP, and the compute ratio, over
    timestep and layer.

    Args:
        activity (`dict`): from [`measure_activity`].
        path (`str` or `Path`): image file to write.

    Raises:
        `ImportError`: without matplotlib.
    """
    num_layers, num_groups = activity["attn"].shape[1:]
    times = activity["timesteps"].tolist()
    figure = _make_figure(8, 2 + 0.9 * num_layers)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[num_layers, num_layers, num_layers / 2, 2])
    panels = (
        ("heads that were on", activity["attn"].flatten(1), num_groups),
        ("channel groups of the MLP that were on", activity["mlp"].flatten(1), num_groups),
        ("share of tokens that took the MLP", activity["tokens"].mean(dim=(1, 3)), 1),
    )
    for axis, (title, values, rows) in zip(axes, panels, strict=False):
        mesh = axis.pcolormesh(
            times, range(values.shape[1]), values.T, vmin=0, vmax=1, cmap="Blues", shading="nearest"
        )
        axis.hlines([i * rows - 0.5 for i in range(1, num_layers)], *axis.get_xlim(), color="black", linewidth=0.5)
        axis.set_yticks([(i + 0.5) * rows - 0.5 for i in range(num_layers)], range(num_layers))
        axis.invert_yaxis()
        axis.set_ylabel("layer")
        axis.set_title(title, fontsize="medium")
    figure.colorbar(mesh, ax=axes[2])
    axes[3].plot(times, activity["compute_ratio"].tolist(), marker=".")
    axes[3].set_ylim(0, 1.05)
    axes[3].set_title("compute ratio", fontsize="medium")
    axes[3].set_xlabel("timestep")
    figure.savefig(path, dpi=100)


def plot_tokens(activity: dict[str, torch.Tensor], images: torch.Tensor, path: str | Path, num_times: int = 5) -> None:
    """
    Draws where in the images the tokens took the MLP: one row an image, one column a timestep, darker for more layers.

    Args:
        activity (`dict`): from [`measure_activity`].
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            The clean images that were measured, in [-1, 1]; or latents, whose first channel is shown.
        path (`str` or `Path`): image file to write.
        num_times (`int`, defaults to `5`): timesteps to show, spread evenly.

    Raises:
        `ImportError`: without matplotlib.
    """
    tokens = activity["tokens"].mean(dim=2)  # (T, B, N): share of the layers
    height, width = images.shape[2:]
    columns = round((tokens.shape[2] * width / height) ** 0.5)
    maps = tokens.unflatten(2, (-1, columns))
    shown = torch.linspace(0, len(tokens) - 1, num_times).round().long().tolist()
    figure = _make_figure(1.3 * (num_times + 1), 1.3 * len(images) + 0.4)
    axes = figure.subplots(len(images), num_times + 1, squeeze=False)
    for row, image in zip(range(len(images)), images.cpu(), strict=True):
        is_rgb = len(image) == 3
        pixels = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) if is_rgb else image[0]
        axes[row, 0].imshow(pixels, cmap="gray")
        for column, time in enumerate(shown, start=1):
            axes[row, column].imshow(maps[time, row], vmin=0, vmax=1, cmap="Blues")
            axes[0, column].set_title(f"{activity['timesteps'][time]:.0f}", fontsize="medium")
    axes[0, 0].set_title("image", fontsize="medium")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=100)


def _make_figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing what the routers do needs matplotlib: `pip install matplotlib`.") from error
    return Figure(figsize=(width, height), layout="constrained")
