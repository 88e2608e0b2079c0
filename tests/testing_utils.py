# SPDX-License-Identifier: Apache-2.0
"""What several test files share: models small enough for a test, and the messages that diffusers logs."""

import contextlib
import logging
import math

import torch
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import diffusers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from diffusers_dyna import DynaDiTTransformer2DModel, DynaUNet2DModel


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
TINY_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_classes": 5,
    "class_dropout_prob": 0.1,
}


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


def randomize_dit_(model: DynaDiTTransformer2DModel, seed: int = 0) -> DynaDiTTransformer2DModel:
    """
    Draws every parameter, so that the layers that start at zero count, every router switches some of its gates with the
    timestep, and the scores of the tokens straddle zero.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = model.config.num_attention_heads * model.config.attention_head_dim
    unit = 1 / math.sqrt(dim)

    def draw(parameter, mean, std):
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        if model.caption_memory is not None:
            keys = torch.randn(model.caption_memory.keys.shape, generator=generator)
            model.caption_memory.keys.copy_(torch.nn.functional.normalize(keys, dim=1))
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                draw(parameter, 1.0, 0.3)
            elif name.endswith("bias"):
                draw(parameter, 0.0, 0.1)
            elif "class_embedding" in name or "null_caption" in name:
                draw(parameter, 0.0, 0.5)
            elif "pos_embed" not in name:
                draw(parameter, 0.0, 1.5 * unit)
        draw(model.time_embedding.linear_1.weight, 0.0, 0.1)  # 256 features, about half of them with the time
        draw(model.time_embedding.linear_2.weight, 0.0, 2 * unit)
        for block in model.transformer_blocks:
            for router in block.group_routers():
                draw(router.weight, 0.0, 6 * unit)
                draw(router.bias, 0.0, 2.0)
            selection = block.token_selection
            draw(selection.linear_1.weight, 0.0, 0.3 * unit)
            draw(selection.linear_1.bias, 2.0, 0.1)  # most of the ReLUs pass
            draw(selection.linear_2.weight, 0.0, 3.0)
            selection.linear_2.bias.copy_(-2 * selection.linear_2.weight.sum(dim=1))
            if block.token_rate is not None:
                draw(block.token_rate.weight, 0.0, unit)
                draw(block.token_rate.bias, 0.3, 0.3)
    return model


def tiny_dyna_dit(seed: int = 0, **overrides) -> DynaDiTTransformer2DModel:
    """A transformer of 60 k parameters in evaluation mode; the same weights for the same seed and configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DynaDiTTransformer2DModel(**{**TINY_DIT, **overrides})
    return randomize_dit_(model, seed).eval()


def masks_are_mixed(output, lowest: float = 0.2, highest: float = 0.9) -> bool:
    """
    Whether a call with `output_masks` exercises everything that is dynamic: part of the compute, sets of heads and groups
    that differ by layer, and other tokens for other images.
    """
    groups = torch.cat([output.attn_masks, output.mlp_masks], dim=2)  # (B, L, 2 * heads)
    tokens = output.token_masks  # (B, L, N)
    return bool(
        (output.compute_ratio >= lowest).all()
        and (output.compute_ratio <= highest).all()
        and (output.attn_masks == 0).any()
        and (output.mlp_masks == 0).any()
        and (groups[:, 0] != groups[:, 1]).any()
        and (len(groups) == 1 or (tokens[0] != tokens[1:]).any(dim=2).any(dim=1).all())
        and ((tokens == 0).any(dim=2) & (tokens == 1).any(dim=2)).any(dim=1).all()
    )


def assert_mixed(output, timesteps_differ: bool) -> None:
    """Fails where a comparison of dynamic outputs would prove nothing."""
    assert masks_are_mixed(output), (output.compute_ratio, output.attn_masks, output.mlp_masks, output.token_masks)
    groups = torch.cat([output.attn_masks, output.mlp_masks], dim=2)
    assert bool((groups[0] != groups[-1]).any()) == timesteps_differ, groups


def dit_inputs(batch_size: int = 3, size: tuple[int, int] = (8, 8), same_time: bool = False) -> dict:
    timestep = torch.full((batch_size,), 333.25) if same_time else torch.linspace(10.5, 900.0, batch_size)
    return {
        "hidden_states": randn(batch_size, 4, *size, seed=7),
        "timestep": timestep,
        "class_labels": torch.tensor([1, 2, 5, 0, 3])[:batch_size],
    }


def mixed_dyna_dit(arguments: dict, **config) -> DynaDiTTransformer2DModel:
    """
    The first draw of the weights with which `arguments` have mixed masks, other groups at other timesteps, and no layer
    that leaves out all tokens.
    """
    for seed in range(100):
        model = tiny_dyna_dit(seed, **config)
        with torch.no_grad():
            output = model(**arguments, output_masks=True)
        groups = torch.cat([output.attn_masks, output.mlp_masks], dim=2)
        is_same_time = len(arguments["timestep"].unique()) == 1
        timesteps_count = is_same_time or (groups[0] != groups[-1]).any()
        if (cross := output.cross_attn_masks) is not None:
            timesteps_count &= (cross == 0).any() and (is_same_time or (cross[0] != cross[-1]).any())
        if masks_are_mixed(output) and timesteps_count and (output.token_masks.sum(dim=(0, 2)) > 0).all():
            return model
    raise AssertionError(f"no mixed masks with {config}")


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


# Before diffusers 0.42 FlowMatchEuler told the model the shifted times where it was given `sigmas` and `timesteps`.
EULER_KEEPS_GIVEN_TIMES = Version(diffusers.__version__) >= Version("0.42.0.dev0")


def stored_bytes(tensor: torch.Tensor) -> int:
    """Memory of a tensor."""
    return tensor.untyped_storage().nbytes()


def attention_flops(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop(query, key, value)


def onednn_flops(input, weight, *args, out_shape, **kwargs) -> int:
    return 2 * math.prod(input) * weight[0]


def counted_macs(model, arguments: dict, **overrides) -> float:
    """Multiply-accumulates per sample that torch saw; its counter knows neither the CPU's attention nor oneDNN."""
    unknown = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        torch.ops.mkldnn._linear_pointwise: onednn_flops,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        model(**{**arguments, **overrides})
    return counter.get_total_flops() / 2 / len(arguments["hidden_states"])


def tiny_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, between [CLS] and [SEP]; [PAD] is 0 and [UNK] 1."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny_text_encoder(vocab_size: int, seed: int = 0) -> BertModel:
    """States of width 16 that differ from word to word."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config).eval()
