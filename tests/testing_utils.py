# SPDX-License-Identifier: Apache-2.0
"""What several test files share: a U-Net small enough for a test, and the messages that diffusers logs."""

import contextlib
import importlib.metadata
import logging

import pytest
import torch

from diffusers_dyna import DynaUNet2DModel


# diffusers 0.40 asks torch for the accelerator's type, also where there is none.
can_group_offload = pytest.mark.skipif(
    importlib.metadata.version("diffusers").startswith("0.40.") and not torch.accelerator.is_available(),
    reason="group offloading in diffusers 0.40 needs an accelerator",
)

TINY_UNET = {
    "sample_size": 8,
    "base_channels": 8,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_attention_heads": 2,
    "norm_num_groups": 4,
    "num_classes": 3,
    "class_dropout_prob": 0.1,
}
UNCONDITIONAL = {"num_classes": None, "class_dropout_prob": 0.0}


def randomize_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """
    Draws the affine parameters of every GroupNorm: at initialisation they are 1 and 0, so that one that is left out,
    or used in the place of another, would change nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.copy_(1 + 0.3 * torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    return model


def tiny_unet(seed: int = 0, **overrides) -> DynaUNet2DModel:
    """A U-Net of 9 k parameters in evaluation mode; the same weights for the same seed and configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DynaUNet2DModel(**{**TINY_UNET, **overrides})
    return randomize_(model, seed).eval()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def logged_warnings():
    """The list of the warnings that diffusers, transformers or this package log inside the `with` block."""
    messages = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "diffusers_dyna")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
