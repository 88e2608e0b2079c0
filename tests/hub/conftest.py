# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the Hub tests: a Hub over loopback, and a tiny pipeline saved in a folder."""

import json

import pytest
import torch
from PIL import Image

from huggingface_hub import constants

from diffusers_dyna import DynaUNet2DModel, DynaUNetPipeline, FlowMatchODEScheduler

from .loopback_hub import LoopbackHub


def save_tiny_pipeline(folder):
    """Saves an 8x8 class-conditional pipeline with fixed random weights in `folder`, and returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = DynaUNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            base_channels=8,
            channel_mults=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            num_attention_heads=2,
            norm_num_groups=4,
            num_classes=10,
            class_dropout_prob=0.1,
        )
    id2label = {label: f"digit {label}" for label in range(10)}
    pipeline = DynaUNetPipeline(unet.eval(), FlowMatchODEScheduler(), id2label=id2label)
    pipeline.save_pretrained(folder)
    return pipeline


def write_training_summary(folder):
    """Writes what a training script leaves beside the pipeline: its facts, and the sample grid."""
    Image.new("L", (32, 16), 128).save(folder / "samples.png")
    summary = {
        "dataset": {
            "name": "Optical digits",
            "num_images": 1797,
            "num_classes": 10,
            "license": "CC BY 4.0",
            "url": "https://archive.ics.uci.edu/dataset/80",
        },
        "objective": "flow",
        "steps": 2000,
        "train_batch_size": 128,
        "images_seen": 256000,
        "hardware": "2 CPU cores",
        "train_hours": 0.0216,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"diffusers": "0.42.1", "torch": "2.13.0"},
        "args": {
            "learning_rate": 1e-3,
            "output_dir": str(folder),
            "train_data_dir": "~/secret/digits",
            "logging_dir": None,
            "hub_token": "hf_abcdefghijklmnop",
            "channel_mults": [1, 2],
        },
        "seed": 0,
        "final_loss": 0.1834,
        "ema_decay": 0.999,
        "sample_grid": {
            "file": "samples.png",
            "seed": 7,
            "guidance_scale": 2.0,
            "num_inference_steps": 4,
            "scheduler": "FlowMatchODEScheduler",
        },
        "results": [
            {"metric": "SVM accuracy", "value": 0.98, "num_samples": 1000, "protocol": "100 images a class"},
        ],
    }
    (folder / "training_summary.json").write_text(json.dumps(summary))
    return summary


@pytest.fixture(scope="session")
def saved_pipeline_dir(tmp_path_factory):
    """The folder of a saved tiny pipeline; read it, but change only copies of it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub over loopback that this process talks to and is logged in to."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no_tokens"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
