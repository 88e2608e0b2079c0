# SPDX-License-Identifier: Apache-2.0
"""What is measured of the routers, and its pictures."""

import sys

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_dyna.training.activity import measure_activity, plot_activity, plot_tokens

from ..testing_utils import tiny_dyna_dit


def test_activity_is_what_the_model_reports_at_each_timestep():
    model = tiny_dyna_dit(num_classes=3)
    config = model.config
    noisy = torch.randn(4, 2, config.in_channels, config.sample_size, config.sample_size)
    timesteps, labels = torch.tensor([10.0, 300.0, 600.0, 990.0]), torch.tensor([0, 2])
    activity = measure_activity(model, noisy, timesteps, labels)
    assert activity["attn"].shape == (4, config.num_layers, config.num_attention_heads)
    for i, timestep in enumerate(timesteps):
        with torch.no_grad():
            output = model(noisy[i], timestep, labels, output_masks=True)
        torch.testing.assert_close(activity["compute_ratio"][i], output.compute_ratio.mean())
        torch.testing.assert_close(activity["tokens"][i], output.token_masks)
        torch.testing.assert_close(activity["mlp"][i], output.mlp_masks[0])
    assert activity["compute_ratio"].unique().numel() > 1


def make_activity(tokens):
    """Two timesteps, one image, two layers, four groups; everything is on but what `tokens` leaves out."""
    on = torch.ones(2, 2, 4)
    return {
        "timesteps": torch.tensor([100.0, 900.0]),
        "compute_ratio": torch.tensor([0.5, 1.0]),
        "attn": on,
        "mlp": on,
        "tokens": tokens,
    }


def test_the_maps_show_the_tokens_where_they_are_in_the_image(tmp_path):
    """Darker where more layers took them: the right half of a wide image."""
    pytest.importorskip("matplotlib")
    tokens = torch.zeros(2, 1, 2, 2, 4)
    tokens[..., 2:] = 1  # of 2 rows and 4 columns
    plot_tokens(make_activity(tokens.flatten(3)), torch.zeros(1, 1, 8, 16), tmp_path / "tokens.png", num_times=2)
    pixels = np.asarray(PIL.Image.open(tmp_path / "tokens.png").convert("L"), dtype=float)
    last_map = pixels[pixels.shape[0] // 2, -pixels.shape[1] // 3 :]
    quarter = len(last_map) // 4
    assert last_map[:quarter].mean() > last_map[-quarter:].mean() + 50


def test_the_rasters_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    plot_activity(make_activity(torch.ones(2, 1, 2, 8)), tmp_path / "on.png")
    off = make_activity(torch.ones(2, 1, 2, 8))
    off["attn"] = torch.zeros(2, 2, 4)
    plot_activity(off, tmp_path / "off.png")
    on, off = (np.asarray(PIL.Image.open(tmp_path / name).convert("L"), dtype=float) for name in ("on.png", "off.png"))
    top = slice(on.shape[0] // 10, on.shape[0] // 5)
    assert off[top].mean() > on[top].mean() + 50


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_activity(make_activity(torch.ones(2, 1, 2, 8)), tmp_path / "x.png")
