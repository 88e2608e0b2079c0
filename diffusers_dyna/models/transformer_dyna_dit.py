# SPDX-License-Identifier: Apache-2.0
"""
A diffusion transformer whose compute follows timestep and token, in one file that also works when copied alone into a
Hub repository.

The model comes first: layers, attention and MLP, routers, the block, `DynaDiTTransformer2DModel`. Below it is what makes
products and prepared trajectories fast, and what lets adapters, quantisers and hooks work with cut weights.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    Timesteps,
    get_2d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook


ROUTER_MODES = ("threshold", "capacity")
QK_NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}
# Divides the logits of the gates wherever a gradient passes them (DyDiT, arXiv 2410.03456, section 3.4).
GATE_TEMPERATURE = 5.0
# In capacity mode the keep rate of the tokens is this times a sigmoid, cut at 1: all tokens are within reach of it.
TOKEN_RATE_SCALE = 1.01
# Stands for the groups of a call in compiled blocks, whose graphs must not hold which ones they are.
COMPILED = ()
# diffusers' hooks that change a module's weights, unlike those of feature caches.
WEIGHT_HOOKS = frozenset({"group_offloading", "layerwise_casting"})
CANNOT_CUT = (
    "`width_mult` below 1 needs weights that can be cut, but a layer is quantised, carries an adapter that is not a plain "
    "LoRA, or trains one with dropout. Merge the adapter, or use `set_width(1.0)`."
)


def _presets() -> dict[str, dict]:
    # Table 1 of DiT, arXiv 2212.09748
    sizes = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
    return {
        f"DiT-{size}/{patch_size}": {
            "sample_size": 32,
            "patch_size": patch_size,
            "in_channels": 4,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "num_classes": 1000,
            "class_dropout_prob": 0.1,
            "learn_sigma": True,
        }
        for size, (num_layers, num_attention_heads, attention_head_dim) in sizes.items()
        for patch_size in (2, 4, 8)
    }


DYNA_DIT_CONFIGS = _presets()


def round_to_nearest(input_size: int, width_mult: float, num_heads: int, min_value: int = 1) -> int:
    """
    A width as a whole number of heads.

    Args:
        input_size (`int`): the full width.
        width_mult (`float`): share of it to keep, in (0, 1].
        num_heads (`int`): heads, or channel groups, in the full width.
        min_value (`int`, defaults to `1`): the least width returned.

    Returns:
        `int`: `round(num_heads * width_mult) / num_heads * input_size`, at least `min_value`.
    """
    return max(int(round(num_heads * width_mult) * input_size / num_heads), min_value)


class DynaDenseLinear(nn.Linear):
    """A Linear that takes the faster of torch's products."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _linear(input, self.weight, self.bias)


class DynaLinear(nn.Linear):
    """
    A Linear whose inputs and outputs can shrink at run time: to a leading part of the groups (`width_mult`), or to any
    set of groups named in the call. The rows and columns are cut inside `forward`, where the hooks that cast, offload
    or replace weights have already run.

    Args:
        in_features (`int`): full width of the input.
        out_features (`int`): full width of the output.
        num_heads (`int`): groups that the dynamic sides consist of.
        bias (`bool`, defaults to `True`): whether a bias is added.
        dyna_dim (`tuple[bool, bool]`, defaults to `(True, True)`): whether the input and the output shrink.
        num_stacked (`int`, defaults to `1`):
            Matrices of the same width that the rows consist of, each cut to the same groups. With all groups the output
            comes as they are stacked, one matrix after the other; with some of them group after group.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int,
        bias: bool = True,
        dyna_dim: tuple[bool, bool] = (True, True),
        num_stacked: int = 1,
    ):
        super().__init__(in_features, out_features, bias)
        self.num_heads = num_heads
        self.dyna_dim = dyna_dim
        self.num_stacked = num_stacked
        self.width_mult = 1.0
        self._cut_weights = None  # while a trajectory is prepared: the store that the layers of the model share
        self._merged_adapters = ()  # into the weights, through `.data`
        self._traced_weights = None  # in a call of a compiled block: what stands for `groups=COMPILED`

    def __getstate__(self):
        return {**super().__getstate__(), "_cut_weights": None, "_traced_weights": None}

    def forward(
        self,
        input: torch.Tensor,
        groups: tuple[int, ...] | None = None,
        low_rank: list[tuple[torch.Tensor, torch.Tensor, float]] | None = None,
        with_gelu: bool = False,
    ) -> torch.Tensor:
        r"""
        Args:
            input (`torch.Tensor` of shape `(..., in_width)`):
                Where the input side is dynamic, only the channels of `groups`, in their order.
            groups (`tuple[int, ...]`, *optional*):
                Indices of the groups that take part, in the order that the channels have; of all groups, the layer's
                own. `None` is the leading part that `width_mult` names.
            low_rank (`list[tuple[torch.Tensor, torch.Tensor, float]]`, *optional*):
                LoRA factors `(A, B, scale)` of the full layer; the weight used is the cut of `weight + scale * B @ A`.
            with_gelu (`bool`, *optional*, defaults to `False`): apply GELU (tanh) to the output.

        Returns:
            `torch.Tensor` of shape `(..., out_width)`.
        """
        if groups is None:
            num_groups = round_to_nearest(self.num_heads, self.width_mult, self.num_heads)
            groups = tuple(range(num_groups))
        if groups == COMPILED:
            return _linear(input, *self._traced_weights, with_gelu)
        store = self._cut_weights
        if store is not None and not _is_transformed() and not torch.compiler.is_compiling():
            weight, bias = store.get(self, groups, low_rank or ())
        else:
            weight, bias = self._cut(groups, low_rank or ())
        return _linear(input, weight, bias, with_gelu)

    def _dense_weights(self, groups, low_rank) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias for a compiled graph, in which their width is dynamic."""
        get = self._cut if self._cut_weights is None else partial(self._cut_weights.get, self)
        weight, bias = get(groups, low_rank, self._is_rearranged())
        weight = weight.detach()
        if not self.dyna_dim[1]:
            weight = weight.t().contiguous().t()  # as the store has them: another layout would be another graph
        torch._dynamo.maybe_mark_dynamic(weight, 0 if self.dyna_dim[1] else 1)
        if self.dyna_dim[1] and bias is not None:
            bias = bias.detach()
            torch._dynamo.maybe_mark_dynamic(bias, 0)
        return weight, bias

    def _is_rearranged(self) -> bool:
        """Whether a cut to all groups differs from the layer's own weights: by its order, or stored by columns."""
        return self.num_stacked > 1 or self.dyna_dim[0]

    def _cut(self, groups, low_rank, with_full: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Weight and bias of some groups, adapters included. Those of all groups are the layer's own, in its own order,
        unless `with_full` asks for the order of a cut.
        """
        if len(groups) == self.num_heads and not with_full:
            groups = None
        weight = self._cut_columns(self._cut_rows(self.weight, groups), groups)
        for down, up, scale in low_rank:
            update = self._cut_rows(up, groups) @ self._cut_columns(down, groups)
            weight = weight + (scale * update).to(weight.dtype)
        return weight, None if self.bias is None else self._cut_rows(self.bias, groups)

    def _cut_rows(self, tensor, groups) -> torch.Tensor:
        if groups is None or not self.dyna_dim[1]:
            return tensor
        stacked = tensor.view(self.num_stacked, self.num_heads, -1, *tensor.shape[1:])
        return _take(stacked, groups, dim=1).transpose(0, 1).reshape(-1, *tensor.shape[1:])

    def _cut_columns(self, tensor, groups) -> torch.Tensor:
        if groups is None or not self.dyna_dim[0]:
            return tensor
        return _take(tensor.unflatten(1, (self.num_heads, -1)), groups, dim=1).flatten(1)


class DynaQKVLinear(DynaLinear):
    """
    Query, key and value in one product, each cut to the same heads.

    Args:
        dim (`int`): width of the input, and of each of the three outputs.
        num_heads (`int`): attention heads.
        bias (`bool`, defaults to `True`): whether a bias is added.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = True):
        super().__init__(dim, 3 * dim, num_heads, bias, dyna_dim=(False, True), num_stacked=3)


class DynaFloat32Linear(nn.Linear):
    """
    A Linear that computes in float32 whatever its weights, its input and autocast say: decisions hang on it, or the
    conditions of all blocks do.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _linear_in_float32(input, self.weight, self.bias)


def _linear_in_float32(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # Block-wise offloading leaves a router behind when the decisions of all blocks are taken at once.
    weight, bias = (None if tensor is None else tensor.to(input.device, torch.float32) for tensor in (weight, bias))
    input = input.float()
    if not torch.is_autocast_enabled(input.device.type):
        return _linear(input, weight, bias)
    with torch.autocast(input.device.type, enabled=False):
        return _linear(input, weight, bias)


class DynaTimestepEmbedding(nn.Module):
    """
    Linear, SiLU, Linear: [`~diffusers.models.embeddings.TimestepEmbedding`] in float32, of the sinusoidal features of a
    time or a noise level, or of a whole caption.

    Args:
        in_channels (`int`): features.
        time_embed_dim (`int`): width of the embedding.
    """

    def __init__(self, in_channels: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = DynaFloat32Linear(in_channels, time_embed_dim)
        self.linear_2 = DynaFloat32Linear(time_embed_dim, time_embed_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class DynaCaptionMemory(nn.Module):
    """
    A memory of captions, of those that a model was trained on: attention with fixed keys, the captions, and learned values
    (Hopfield layer, [arXiv 2008.02217](https://huggingface.co/papers/2008.02217), section 4). At a low temperature a caption
    that it holds reads the value of its own entry, and any other one a mixture of the values of those that are most like
    it, as semi-parametric diffusion ([arXiv 2204.11824](https://huggingface.co/papers/2204.11824)) is given retrieved
    examples. Before its keys are set, every caption reads the mean of the values.

    Args:
        num_entries (`int`): captions that it holds.
        width (`int`): of a caption.
        temperature (`float`): of the softmax over cosine similarities.

    Attributes:
        keys (`torch.Tensor` of shape `(num_entries, width)`):
            The captions, of length 1. A buffer: neither training nor an adapter changes it.
    """

    def __init__(self, num_entries: int, width: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("keys", torch.zeros(num_entries, width))
        self.values = DynaFloat32Linear(num_entries, width, bias=False)

    def forward(self, captions: torch.Tensor) -> torch.Tensor:
        """
        Args:
            captions (`torch.Tensor` of shape `(..., width)`): means of the states of captions, of any length.

        Returns:
            `torch.Tensor` of the shape of `captions`, float32.
        """
        # In bfloat16 similarities that differ by less than a usual temperature are one.
        similarities = _linear_in_float32(F.normalize(captions.float(), dim=-1), self.keys)
        return self.values(torch.softmax(similarities / self.temperature, dim=-1))


class DynaPatchEmbed(nn.Module):
    """
    Patches to tokens, plus fixed 2-D sin-cos positions. The positions of another size than the native one cover the
    same range, as in [`~diffusers.models.embeddings.PatchEmbed`]; unlike there, the native size need not be square.

    Args:
        grid_size (`tuple[int, int]`): rows and columns of patches at the native size.
        patch_size (`int`): side of a patch.
        in_channels (`int`): channels of the input.
        embed_dim (`int`): width of a token.
    """

    def __init__(self, grid_size: tuple[int, int], patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.grid_size = grid_size
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("positions", self._make_positions(*grid_size), persistent=False)

    def _make_positions(self, rows: int, columns: int, device=None) -> torch.Tensor:
        row = torch.arange(rows, device=device, dtype=torch.float32) * (self.grid_size[0] / rows)
        column = torch.arange(columns, device=device, dtype=torch.float32) * (self.grid_size[1] / columns)
        grid = torch.stack(torch.meshgrid(column, row, indexing="xy"))  # (2, rows, columns), columns first
        positions = get_2d_sincos_pos_embed_from_grid(self.embed_dim, grid[:, None], output_type="pt")
        return positions.float()[None]  # (1, rows * columns, D)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = self.proj(hidden_states)  # (B, D, rows, columns)
        rows, columns = hidden_states.shape[2:]
        positions = self.positions
        if (rows, columns) != self.grid_size:
            positions = self._make_positions(rows, columns, hidden_states.device)
        return hidden_states.flatten(2).transpose(1, 2).contiguous() + positions.to(dtype)  # (B, N, D)


class DynaAttnProcessor:
    """
    Multi-head attention of the tokens to each other or to a text, of all heads or of the active ones, through
    diffusers' backends.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "DynaAttention",
        hidden_states: torch.Tensor,
        head_mask: torch.Tensor | None = None,
        active_heads: tuple[int, ...] | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.is_cross_attention:
            query = _run_linear(attn.to_q, hidden_states, active_heads).unflatten(-1, (-1, attn.head_dim))
            key, value = attn.keys_and_values(encoder_hidden_states, active_heads) if key_value is None else key_value
            if attn.norm_q is not None:
                query = attn.norm_q(query)
        else:
            query, key, value = attn.split_heads(_run_linear(attn.qkv, hidden_states, active_heads), active_heads)
            if attn.norm_q is not None:
                query, key = attn.norm_q(query), attn.norm_k(key)
        hidden_states = self.attend(query, key, value, attention_mask)
        if head_mask is not None:
            hidden_states = hidden_states * head_mask[:, None, :, None].to(hidden_states.dtype)
        return _run_linear(attn.to_out[0], hidden_states.flatten(2), active_heads)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        r"""
        Args:
            query (`torch.Tensor` of shape `(batch_size, num_tokens, heads, head_dim)`): of the heads that are computed.
            key (`torch.Tensor` of shape `(batch_size, num_keys, heads, head_dim)`): of the same heads.
            value (`torch.Tensor` of shape `(batch_size, num_keys, heads, head_dim)`): of the same heads.
            attention_mask (`torch.Tensor` of shape `(batch_size, 1, 1, num_keys)`, *optional*):
                Boolean, False where a key is left out; or what is added to the logits. `None` is all.

        Returns:
            `torch.Tensor` with the shape of `query`.
        """
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).to(query.dtype)


class DynaSharedAttnProcessor(DynaAttnProcessor):
    """
    Self-attention in which samples also attend to the keys and values of a reference, with their own queries and keys
    brought to the mean and deviation of the reference's (StyleAligned,
    [arXiv 2312.02133](https://huggingface.co/papers/2312.02133), section 3.2).

    Args:
        references (`list[int]`):
            For each sample the index of its reference; its own where it has none. Of a smaller batch, the leading part
            counts.
        strength (`float`): share of the normalisation, and factor of the attention weights of the reference; in (0, 1].
        device (`torch.device`, *optional*): where the samples are.
    """

    def __init__(self, references: list[int], strength: float, device: torch.device | None = None):
        self.references, self.strength = references, strength
        styled = [sample for sample, reference in enumerate(references) if sample != reference]
        plain = [sample for sample, reference in enumerate(references) if sample == reference]
        sources = [references[sample] for sample in styled]
        # Made once: in the loop they would be copied to the device in every layer.
        self._plain, self._styled, self._sources = (
            torch.tensor(indices, dtype=torch.long, device=device) for indices in (plain, styled, sources)
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        batch_size, references = len(query), self.references[: len(query)]
        if batch_size > len(references) or max(references) >= batch_size:
            raise ValueError(
                f"`references`={self.references} of `share_attention` do not fit a batch of {batch_size} samples. Give "
                "one for each, and within the batch."
            )
        num_styled = sum(sample != reference for sample, reference in enumerate(references))
        if num_styled == 0:
            return super().attend(query, key, value, None)
        indices = (self._plain[: batch_size - num_styled], self._styled[:num_styled], self._sources[:num_styled])
        plain, styled, references = (index.to(query.device) for index in indices)
        output = torch.empty_like(query)
        if len(plain) > 0:
            output[plain] = super().attend(query[plain], key[plain], value[plain], None)
        own_query, own_key = (
            torch.lerp(tensor[styled], _match_statistics(tensor[styled], tensor[references]), self.strength)
            for tensor in (query, key)
        )
        bias = None
        if self.strength < 1:  # a logit that is larger by its logarithm has so many times the weight
            bias = query.new_zeros(1, 1, 1, 2 * key.shape[1])
            bias[..., key.shape[1] :] = math.log(self.strength)
        keys = torch.cat([own_key, key[references]], dim=1)
        values = torch.cat([value[styled], value[references]], dim=1)
        output[styled] = super().attend(own_query, keys, values, bias)
        return output


def _match_statistics(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """AdaIN: mean and deviation over the tokens, dimension 1, become those of the reference."""
    std, mean = torch.std_mean(tensor, dim=1, correction=0, keepdim=True)
    reference_std, reference_mean = torch.std_mean(reference, dim=1, correction=0, keepdim=True)
    return (tensor - mean) / (std + 1e-5) * reference_std + reference_mean


class DynaAttention(nn.Module, AttentionModuleMixin):
    """
    Self-attention, or cross-attention to a text, whose heads can be masked or left out.

    Args:
        dim (`int`): width of a token.
        num_heads (`int`): heads; must divide `dim`.
        qk_norm (`str`, *optional*): `"layer_norm"` or `"rms_norm"` of the queries and keys of each head.
        cross_attention_dim (`int`, *optional*): width of the text states. `None` is self-attention.
    """

    _default_processor_cls = DynaAttnProcessor
    _available_processors = [DynaAttnProcessor, DynaSharedAttnProcessor]
    _supports_qkv_fusion = False  # they are one product already

    def __init__(self, dim: int, num_heads: int, qk_norm: str | None = None, cross_attention_dim: int | None = None):
        super().__init__()
        self.heads = num_heads
        self.head_dim = dim // num_heads
        self.is_cross_attention = cross_attention_dim is not None
        if self.is_cross_attention:
            self.to_q = DynaLinear(dim, dim, num_heads, dyna_dim=(False, True))
            self.to_kv = DynaLinear(cross_attention_dim, 2 * dim, num_heads, dyna_dim=(False, True), num_stacked=2)
        else:
            self.qkv = DynaQKVLinear(dim, num_heads)
        self.norm_q = QK_NORMS[qk_norm](self.head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = QK_NORMS[qk_norm](self.head_dim, eps=1e-6) if qk_norm else None
        self.to_out = nn.ModuleList([DynaLinear(dim, dim, num_heads, dyna_dim=(True, False))])
        self.set_processor(self._default_processor_cls())

    def split_heads(self, stacked: torch.Tensor, active_heads: tuple[int, ...] | None) -> tuple[torch.Tensor, ...]:
        r"""
        Args:
            stacked (`torch.Tensor` of shape `(batch_size, num_tokens, width)`): of a layer with stacked matrices.
            active_heads (`tuple[int, ...]`, *optional*): the heads that it was computed for. `None` is all.

        Returns:
            `tuple` of a `torch.Tensor` of shape `(batch_size, num_tokens, heads, head_dim)` for each matrix.
        """
        num_stacked = 2 if self.is_cross_attention else 3
        is_cut = active_heads is not None and len(active_heads) < self.heads
        shape, dim = ((-1, num_stacked, self.head_dim), 3) if is_cut else ((num_stacked, -1, self.head_dim), 2)
        return stacked.unflatten(-1, shape).unbind(dim)

    def keys_and_values(
        self, encoder_hidden_states: torch.Tensor, active_heads: tuple[int, ...] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, num_text_tokens, cross_attention_dim)`): text.
            active_heads (`tuple[int, ...]`, *optional*): the only heads that are computed. `None` is all.

        Returns:
            `tuple` of keys, normalised where the layer does so, and values; both `torch.Tensor` of shape `(batch_size,
            num_text_tokens, heads, head_dim)`.
        """
        key, value = self.split_heads(_run_linear(self.to_kv, encoder_hidden_states, active_heads), active_heads)
        return key if self.norm_k is None else self.norm_k(key), value

    def forward(
        self,
        hidden_states: torch.Tensor,
        head_mask: torch.Tensor | None = None,
        active_heads: tuple[int, ...] | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, dim)`): tokens.
            head_mask (`torch.Tensor` of shape `(batch_size, num_active_heads)`, *optional*):
                Factors of the heads' outputs.
            active_heads (`tuple[int, ...]`, *optional*): the only heads that are computed. `None` is all.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, num_text_tokens, cross_attention_dim)`, *optional*):
                The text of cross-attention.
            attention_mask (`torch.Tensor` of shape `(batch_size, 1, 1, num_text_tokens)`, *optional*):
                Boolean, False where a token of the text is left out. `None` is all.
            key_value (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                Of the text, from [`keys_and_values`], of the active heads; in place of `encoder_hidden_states`.

        Returns:
            `torch.Tensor` with the shape of `hidden_states`.
        """
        text = {}
        if self.is_cross_attention:
            text = {
                "encoder_hidden_states": encoder_hidden_states,
                "attention_mask": attention_mask,
                "key_value": key_value,
            }
        return self.processor(self, hidden_states, head_mask=head_mask, active_heads=active_heads, **text)


class DynaMLP(nn.Module):
    """
    Linear, GELU (tanh), Linear, whose hidden channels can be masked or left out in groups. Masking acts before the
    activation; since GELU(0) = 0, leaving a group out is exactly the same.

    Args:
        dim (`int`): width of a token.
        hidden_dim (`int`): hidden channels.
        num_groups (`int`): channel groups; must divide `hidden_dim`.
    """

    def __init__(self, dim: int, hidden_dim: int, num_groups: int):
        super().__init__()
        self.fc1 = DynaLinear(dim, hidden_dim, num_groups, dyna_dim=(False, True))
        self.fc2 = DynaLinear(hidden_dim, dim, num_groups, dyna_dim=(True, False))

    def forward(
        self,
        hidden_states: torch.Tensor,
        channel_mask: torch.Tensor | None = None,
        active_groups: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, dim)` or `(num_tokens, dim)`): tokens.
            channel_mask (`torch.Tensor` of shape `(batch_size, num_active_groups)`, *optional*):
                Factors of the hidden channels of each group.
            active_groups (`tuple[int, ...]`, *optional*): the only groups that are computed. `None` is all.

        Returns:
            `torch.Tensor` with the shape of `hidden_states`.
        """
        if channel_mask is None:
            hidden_states = _run_linear(self.fc1, hidden_states, active_groups, with_gelu=True)
        else:
            hidden_states = _run_linear(self.fc1, hidden_states, active_groups)
            grouped = hidden_states.unflatten(-1, (channel_mask.shape[1], -1))
            hidden_states = (grouped * channel_mask[:, None, :, None].to(grouped.dtype)).flatten(2)
            hidden_states = F.gelu(hidden_states, approximate="tanh")
        return _run_linear(self.fc2, hidden_states, active_groups)


class DynaTokenSelection(nn.Module):
    """
    The score of each token for the MLP: Linear to a sixteenth of the width, ReLU, Linear, in float32.

    Args:
        dim (`int`): width of a token.
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden_dim = max(dim // 16, 1)
        self.linear_1 = DynaFloat32Linear(dim, hidden_dim)
        self.linear_2 = DynaFloat32Linear(hidden_dim, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.relu(self.linear_1(hidden_states))).squeeze(-1)  # (B, N)


def _threshold_gates(logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """DyDiT's gates: sigmoid(logit) > 0.5; in training a hard Gumbel-sigmoid with straight-through gradient."""
    if noise is not None:
        logits = logits + torch.logit(noise, eps=1e-6)
    return _straight_through((logits > 0).float(), torch.sigmoid(logits / GATE_TEMPERATURE))


def _capacity_gates(logits: torch.Tensor) -> torch.Tensor:
    """The top k, k = round(sum of p), p = sigmoid(logit / 5); the gradient is that of p."""
    probability = torch.sigmoid(logits / GATE_TEMPERATURE)
    count = probability.sum(dim=-1, keepdim=True).round()
    return _straight_through((_ranks(logits) < count).float(), probability)


def _capacity_token_gates(scores: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """
    The top round(rate * N) tokens of each image. The gradient is that of sigmoid((score - quantile) / spread), with the
    quantile at 1 - rate, so it reaches both the scores and the rate.
    """
    num_tokens = scores.shape[1]
    rate = rate.clamp(max=1)
    hard = (_ranks(scores) < (rate * num_tokens).round()[:, None]).float()
    if not scores.requires_grad:
        return hard
    position = (1 - rate) * (num_tokens - 1)
    below = position.detach().floor().long()
    above = (below + 1).clamp(max=num_tokens - 1)
    ascending = scores.sort(dim=1).values
    low, high = ascending.gather(1, below[:, None]), ascending.gather(1, above[:, None])
    quantile = low + (position - below)[:, None] * (high - low)
    spread = scores.detach().std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
    return _straight_through(hard, torch.sigmoid((scores - quantile) / spread))


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """0 for the highest score of each row; among equals the first comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """The value of `hard` with the gradient of `soft`."""
    return hard + (soft - soft.detach()) if soft.requires_grad else hard


# The distinct sets of heads or groups in a batch, each with the indices of its samples; `None` is all of them.
_Partition = list[tuple[torch.Tensor | None, tuple[int, ...] | None]]


@dataclass
class _BlockDecision:
    """
    What one block computes in the skipping form, known on the host. `token_rates` is one rate for all samples or one
    each, and `None` where a threshold decides.
    """

    heads: _Partition
    groups: _Partition
    cross_heads: _Partition | None = None  # of a text model
    token_rates: list[float] | None = None

    def partitions(self) -> list[_Partition]:
        return [part for part in (self.heads, self.groups, self.cross_heads) if part is not None]

    def token_counts(self, num_tokens: int) -> list[int]:
        # The float32 arithmetic of the masked form: its rates are float32, so only the product is rounded.
        return [round(struct.unpack("f", struct.pack("f", rate * num_tokens))[0]) for rate in self.token_rates]


def _partition(sets: list[tuple[int, ...]], device) -> _Partition:
    samples = {}
    for sample, active in enumerate(sets):
        samples.setdefault(active, []).append(sample)
    if len(samples) == 1:
        return [(None, sets[0])]
    return [(torch.tensor(rows, device=device), active) for active, rows in samples.items()]


@dataclass
class _Text:
    """The captions of a batch as the model is given them. Without states it is the null caption for all."""

    states: torch.Tensor | None  # (B, L, caption_channels)
    attention_mask: torch.Tensor | None  # (B, L)
    dropout_mask: torch.Tensor | None  # (B,)
    is_pooled: bool = False  # the model reads the mean of the states, which hangs on the mask

    @property
    def length(self) -> int:
        return 1 if self.states is None else self.states.shape[1]

    @property
    def sources(self) -> tuple[torch.Tensor | None, ...]:
        """What is prepared from a text is made of these."""
        return (self.states, self.dropout_mask, *((self.attention_mask,) if self.is_pooled else ()))

    def key_mask(self, device: torch.device) -> torch.Tensor | None:
        """False where a token is left out, (B, 1, 1, L)."""
        if self.attention_mask is None:
            return None
        mask = self.attention_mask.to(device)
        if self.dropout_mask is not None:  # all tokens of the null caption are the same, and there must be one
            mask = mask | self.dropout_mask.to(device)[:, None]
        return mask[:, None, None]

    def is_part_of(self, other: "_Text") -> bool:
        """Whether it is the memory that another text is: all of it, or the leading samples."""
        for tensor, whole in zip(self.sources, other.sources, strict=True):
            if tensor is None or whole is None:
                if tensor is not whole:
                    return False
            elif (
                len(tensor) > len(whole)
                or tensor.shape[1:] != whole.shape[1:]
                or tensor.stride() != whole.stride()
                or _signature([tensor]) != _signature([whole])
            ):
                return False
        return True


def _pool(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    The mean of the states (B, L, C) that the mask (B, L) leaves, scaled to a root mean square of 1: (B, C), float32. It is
    0 where nothing is left.
    """
    states = states.float()
    if mask is not None:
        states = states * mask.to(states)[..., None]
    # The sum has the direction of the mean.
    return F.normalize(states.sum(dim=1), dim=1) * states.shape[2] ** 0.5


@dataclass
class _Call:
    """What the blocks share in one call of the model."""

    form: str  # "complete", "masked" or "skipping", which of the complete model leaves out nothing
    num_active: int  # leading groups that `width_mult` leaves
    output_masks: bool = False
    gate_noise: torch.Tensor | None = None
    step: int | None = None  # of the prepared trajectory
    decisions: list[_BlockDecision] | None = None  # by layer
    modulations: list[torch.Tensor] | None = None  # by layer, (B, 6, D)
    text: torch.Tensor | None = None  # (B, L, cross_attention_dim), unless keys and values are prepared
    text_mask: torch.Tensor | None = None  # (B, 1, 1, L)
    keys_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # of the text, by layer, all heads


class DynaDiTBlock(nn.Module):
    """
    A transformer block with adaLN-Zero (DiT, arXiv 2212.09748) and DyDiT's routers
    ([arXiv 2410.03456](https://huggingface.co/papers/2410.03456), section 3).

    `attn_rate` and `mlp_rate` choose heads and channel groups from the time embedding alone; group 0 is always on.
    `token_selection` scores the tokens after attention; a token that is not selected skips the MLP. In capacity mode
    `token_rate` gives the share of tokens that are selected, from the time embedding too.

    With `cross_attention_dim`, cross-attention to a text comes after self-attention, as in PixArt-alpha
    ([arXiv 2310.00426](https://huggingface.co/papers/2310.00426)), with heads chosen by `cross_attn_rate`.

    Args:
        dim (`int`): width of a token.
        num_heads (`int`): attention heads and channel groups of the MLP.
        mlp_dim (`int`): hidden channels of the MLP.
        router_mode (`str`): `"threshold"` or `"capacity"`.
        layer_idx (`int`): place of the block in the model.
        qk_norm (`str`, *optional*): normalisation of queries and keys.
        mlp_norm_eps (`float`, defaults to `1e-6`): epsilon of the norm before the MLP.
        cross_attention_dim (`int`, *optional*): width of the text states. `None` has no cross-attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        router_mode: str,
        layer_idx: int,
        qk_norm: str | None = None,
        mlp_norm_eps: float = 1e-6,
        cross_attention_dim: int | None = None,
    ):
        super().__init__()
        self.num_groups = num_heads
        self.router_mode = router_mode
        self.layer_idx = layer_idx
        # As a tensor too: compiled blocks would be compiled once more for each number.
        self.register_buffer("layer_index", torch.tensor([layer_idx]), persistent=False)
        self.modulation = DynaDenseLinear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = DynaAttention(dim, num_heads, qk_norm)
        self.norm_cross = self.cross_attn = self.cross_attn_rate = None
        if cross_attention_dim is not None:
            self.norm_cross = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.cross_attn = DynaAttention(dim, num_heads, qk_norm, cross_attention_dim)
            self.cross_attn_rate = DynaFloat32Linear(dim, num_heads - 1)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=mlp_norm_eps)
        self.mlp = DynaMLP(dim, mlp_dim, num_heads)
        self.attn_rate = DynaFloat32Linear(dim, num_heads - 1)
        self.mlp_rate = DynaFloat32Linear(dim, num_heads - 1)
        self.token_selection = DynaTokenSelection(dim)
        self.token_rate = DynaFloat32Linear(dim, 1) if router_mode == "capacity" else None
        self._compiled = None  # `_forward_dense` and `_forward_traced`
        self.masks = None  # of the last call with `output_masks`: heads, groups, text heads, tokens, share of tokens

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, conditioning: torch.Tensor, call: _Call
    ) -> torch.Tensor:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, dim)`): tokens.
            temb (`torch.Tensor` of shape `(batch_size, dim)`): time embedding, float32, for the routers.
            conditioning (`torch.Tensor` of shape `(batch_size, dim)`): SiLU of time plus class embedding.
            call (`_Call`): what all blocks share in this call.

        Returns:
            `torch.Tensor` with the shape of `hidden_states`.
        """
        forward_dense, forward_traced = self._compiled or (self._forward_dense, None)
        if call.form != "skipping":
            return forward_dense(hidden_states, temb, conditioning, call)
        modulations = call.modulations
        modulation = self._modulate(conditioning) if modulations is None else modulations[self.layer_idx]
        if forward_traced is not None and self._can_trace(call.decisions[self.layer_idx], hidden_states.shape[1]):
            return self._call_traced(forward_traced, hidden_states, modulation, call)
        return self._forward_skipping(hidden_states, modulation, call)

    @property
    def has_text(self) -> bool:
        """Whether the block attends to a text."""
        return self.cross_attn is not None

    def group_routers(self) -> list[DynaFloat32Linear]:
        """The routers of the heads, of the channel groups and, with a text, of the heads that attend to it."""
        return [self.attn_rate, self.mlp_rate, *([self.cross_attn_rate] if self.has_text else [])]

    def _forward_dense(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, conditioning: torch.Tensor, call: _Call
    ) -> torch.Tensor:
        """The complete and the masked form."""
        modulation = self._modulate(conditioning)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation[:, :, None].unbind(1)  # (B, 1, D) each
        active = tuple(range(call.num_active)) if call.num_active < self.num_groups else None
        if call.form == "complete":
            masks = [None] * len(self.group_routers())
        else:
            masks = [mask[:, : call.num_active] for mask in self._group_masks(temb, call)]
        head_mask, channel_mask, *cross_mask = masks

        attn_output = self.attn(self.norm1(hidden_states) * scale + shift, head_mask, active)
        hidden_states = hidden_states + gate * attn_output
        if self.has_text:
            hidden_states = hidden_states + self._attend_to_text(hidden_states, call, active, *cross_mask)

        if call.form != "complete":
            token_mask, token_rate = self._token_mask(hidden_states, temb, call)
            mlp_gate = mlp_gate * token_mask[:, :, None].to(mlp_gate.dtype)
        mlp_output = self.mlp(self.norm2(hidden_states) * mlp_scale + mlp_shift, channel_mask, active)
        hidden_states = hidden_states + mlp_gate * mlp_output

        if call.output_masks:
            if call.form == "complete":
                masks = [temb.new_ones(len(temb), call.num_active)] * len(masks)
                token_mask = temb.new_ones(hidden_states.shape[:2])
                token_rate = token_mask.mean(dim=1)
            num_off = self.num_groups - call.num_active
            self.masks = (*(F.pad(mask, (0, num_off)) for mask in masks), token_mask, token_rate)
        return hidden_states

    def _group_masks(self, temb: torch.Tensor, call: _Call | None = None) -> list[torch.Tensor]:
        """Masks of what [`group_routers`] choose, (B, groups) each, at full width. Without a call: as in inference."""
        masks = []
        for i, router in enumerate(self.group_routers()):
            logits = router(temb)
            if self.router_mode == "capacity":
                gates = _capacity_gates(logits)
            else:
                gates = _threshold_gates(logits, self._noise(logits, call, i * (self.num_groups - 1)))
            masks.append(F.pad(gates, (1, 0), value=1.0))
        return masks

    def _token_mask(self, hidden_states: torch.Tensor, temb: torch.Tensor, call: _Call) -> tuple[torch.Tensor, ...]:
        """The mask of the tokens, (B, N), and the share that is on, (B,); both with gradients."""
        scores = self.token_selection(hidden_states)
        if self.router_mode == "threshold":
            first = len(self.group_routers()) * (self.num_groups - 1)
            mask = _threshold_gates(scores, self._noise(scores, call, first))
            return mask, mask.mean(dim=1)
        rate = self._keep_rate(temb)
        mask = _capacity_token_gates(scores, rate)
        # The budget acts on the rate itself: through the scores its pull would hang on their spread.
        return mask, _straight_through(mask.detach().mean(dim=1), rate)

    def _keep_rate(self, temb: torch.Tensor) -> torch.Tensor:
        """The share of tokens to keep, (B,). Values above 1 stand for 1."""
        return TOKEN_RATE_SCALE * torch.sigmoid(self.token_rate(temb).squeeze(1))

    def _noise(self, logits: torch.Tensor, call: _Call | None, first: int) -> torch.Tensor | None:
        if call is None or not self.training:
            return None
        if call.gate_noise is None:
            return torch.rand_like(logits)
        noise = call.gate_noise.index_select(1, self.layer_index)[:, 0]
        return noise[:, first : first + logits.shape[1]].to(logits)

    def _modulate(self, conditioning: torch.Tensor) -> torch.Tensor:
        """Shift, scale and gate of attention, and of the MLP, (..., 6, D); what the scales multiply is 1 + theirs."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(conditioning).chunk(6, dim=-1)
        return torch.stack([shift, 1 + scale, gate, mlp_shift, 1 + mlp_scale, mlp_gate], dim=-2)

    def _attend_to_text(
        self, hidden_states, call: _Call, active_heads, head_mask=None, rows=slice(None)
    ) -> torch.Tensor:
        """What cross-attention adds to some samples of the batch."""
        if call.keys_values is None:
            text = {"encoder_hidden_states": call.text[rows]}
        else:
            text = {"key_value": self._keys_and_values(call, active_heads, rows)}
        text_mask = None if call.text_mask is None else call.text_mask[rows]
        return self.cross_attn(
            self.norm_cross(hidden_states), head_mask, active_heads, attention_mask=text_mask, **text
        )

    def _keys_and_values(self, call: _Call, active_heads, rows=slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the text, for the active heads: prepared ones, or new ones."""
        if call.keys_values is None:
            return self.cross_attn.keys_and_values(call.text[rows], active_heads)
        key, value = (states[rows] for states in call.keys_values[self.layer_idx])
        if active_heads is None or len(active_heads) == self.num_groups:
            return key, value
        return _take(key, active_heads, dim=2), _take(value, active_heads, dim=2)

    def _forward_skipping(self, hidden_states: torch.Tensor, modulation: torch.Tensor, call: _Call) -> torch.Tensor:
        """The same as the masked form in evaluation mode, computing only what is on, in few passes over memory."""
        decision = call.decisions[self.layer_idx]
        modulation = modulation.unsqueeze(2)  # (B, 6, 1, D)

        shift, scale, gate = modulation[:, :3].unbind(1)
        attn_input = torch.addcmul(shift, self.norm1(hidden_states), scale)
        residual = hidden_states
        if len(decision.heads) == 1:
            attn_output = self.attn(attn_input, active_heads=decision.heads[0][1])
            hidden_states = torch.addcmul(residual, gate, attn_output).contiguous()
        else:
            hidden_states = torch.empty_like(residual, memory_format=torch.contiguous_format)
            for rows, heads in decision.heads:
                attn_output = self.attn(attn_input[rows], active_heads=heads)
                hidden_states[rows] = torch.addcmul(residual[rows], gate[rows], attn_output).to(residual.dtype)
        for rows, heads in decision.cross_heads or ():
            if rows is None:
                hidden_states += self._attend_to_text(hidden_states, call, heads)
            else:
                hidden_states[rows] += self._attend_to_text(hidden_states[rows], call, heads, rows=rows)

        selected, count = self._select_tokens(hidden_states, decision)
        if len(decision.groups) == 1:
            self._add_mlp(hidden_states, modulation[:, 3:], selected, count, decision.groups[0][1])
        else:
            for rows, groups in decision.groups:
                part = hidden_states[rows]
                part_selected = None if selected is None else selected[rows]
                self._add_mlp(part, modulation[rows, 3:], part_selected, count, groups)
                hidden_states[rows] = part

        if call.output_masks:
            self._keep_masks(decision, hidden_states, selected if count is None else selected[:, :count])
        return hidden_states

    def _select_tokens(
        self, hidden_states: torch.Tensor, decision: _BlockDecision
    ) -> tuple[torch.Tensor | None, int | None]:
        """
        The tokens that take the MLP: `None` is all; where the counts are known and the same for every image their
        indices, (B, count or more), and the count; else a boolean mask, (B, N).
        """
        batch_size, num_tokens, _ = hidden_states.shape
        if decision.token_rates is None:
            return self.token_selection(hidden_states) > 0, None
        counts = decision.token_counts(num_tokens)
        if min(counts) == num_tokens:
            return None, None
        scores = self.token_selection(hidden_states)
        if len(set(counts)) > 1:
            return _ranks(scores) < torch.tensor(counts, device=scores.device)[:, None], None
        ranked = scores.argsort(dim=1, descending=True, stable=True)
        return ranked[:, : _fill_up(counts[0], batch_size, scores.device)], counts[0]

    def _add_mlp(self, hidden_states: torch.Tensor, modulation: torch.Tensor, selected, count, groups) -> None:
        """Adds the gated output of the MLP to the selected tokens, in place; `modulation` is (B, 3, 1, D)."""
        batch_size, num_tokens, dim = hidden_states.shape
        shift, scale, gate = modulation.unbind(1)
        if selected is None:
            mlp_input = torch.addcmul(shift, self.norm2(hidden_states), scale)
            hidden_states.addcmul_(gate, self.mlp(mlp_input, active_groups=groups))
            return

        all_tokens = hidden_states.view(batch_size * num_tokens, dim)
        if count is not None:
            indices = (selected + torch.arange(batch_size, device=selected.device)[:, None] * num_tokens).flatten()
            tokens = all_tokens.index_select(0, indices).unflatten(0, selected.shape)
            mlp_output = self.mlp(torch.addcmul(shift, self.norm2(tokens), scale), active_groups=groups)
            tokens[:, :count].addcmul_(gate, mlp_output[:, :count])
            all_tokens.index_copy_(0, indices, tokens.flatten(0, 1))
            return

        counts = selected.sum(dim=1).tolist()  # of the images, whose tokens follow each other
        indices = selected.flatten().nonzero().squeeze(1)
        total = len(indices)
        if total == 0:
            return
        indices = F.pad(indices, (0, _fill_up(total, 1, indices.device) - total))
        tokens = all_tokens.index_select(0, indices)
        mlp_input = self.norm2(tokens)
        for image, part in enumerate(mlp_input[:total].split(counts)):
            part.mul_(scale[image]).add_(shift[image])
        mlp_output = self.mlp(mlp_input, active_groups=groups)[:total]
        tokens = tokens[:total]
        for image, (part, update) in enumerate(zip(tokens.split(counts), mlp_output.split(counts), strict=True)):
            part.addcmul_(gate[image], update)
        all_tokens.index_copy_(0, indices[:total], tokens)

    def _keep_masks(self, decision: _BlockDecision, hidden_states: torch.Tensor, selected) -> None:
        """`masks` of the skipping form; `selected` holds the tokens as indices or a boolean mask, `None` is all."""
        token_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.float32)
        if selected is not None and selected.dtype == torch.bool:
            token_mask = selected.float()
        elif selected is not None:
            token_mask = torch.zeros_like(token_mask).scatter(1, selected, 1.0)
        masks = []
        for partition in decision.partitions():
            masks.append(token_mask.new_zeros(len(token_mask), self.num_groups))
            for rows, active in partition:
                active = torch.tensor(range(self.num_groups) if active is None else active, device=token_mask.device)
                row = token_mask.new_zeros(self.num_groups).index_fill(0, active, 1.0)
                masks[-1][slice(None) if rows is None else rows] = row
        self.masks = (*masks, token_mask, token_mask.mean(dim=1))

    # Compiled blocks

    def compile(self, *args, **kwargs) -> None:
        """
        Compiles what the block computes. What it leaves out is decided outside of the graphs, so that a few of them
        serve every decision.

        Args:
            args (`tuple`): of `torch.compile`.
            kwargs (`dict`): of `torch.compile`.
        """
        self._compiled = tuple(
            torch.compile(function, *args, **kwargs) for function in (self._forward_dense, self._forward_traced)
        )

    def __getstate__(self):
        return {**super().__getstate__(), "_compiled": None}

    def _cut_layers(self) -> tuple[nn.Module, ...]:
        """Each a [`DynaLinear`], or what an adapter or a quantiser has put in its place."""
        layers = (self.attn.qkv, self.attn.to_out[0], self.mlp.fc1, self.mlp.fc2)
        if not self.has_text:
            return layers
        return (*layers, self.cross_attn.to_q, self.cross_attn.to_out[0], self.cross_attn.to_kv)

    def _can_trace(self, decision: _BlockDecision, num_tokens: int) -> bool:
        """
        What runs eagerly in a compiled block: sizes of 0 and 1, which would be compiled apart, samples with decisions of
        their own, and layers whose weights are there only while they run.
        """
        partitions = decision.partitions()
        if max(*map(len, partitions), len(decision.token_rates or [1])) > 1:
            return False
        counts = [] if decision.token_rates is None else decision.token_counts(num_tokens)
        if min(*(len(active) for ((_, active),) in partitions), *counts) < 2:
            return False
        return not any(_has_hooks(layer) or _has_hooks(_base_layer(layer)) for layer in self._cut_layers())

    def _call_traced(self, forward_traced, hidden_states: torch.Tensor, modulation, call: _Call) -> torch.Tensor:
        """Hands a graph the weights of what is active, of dynamic width, and the tokens to select, of dynamic length."""
        decision, num_tokens = call.decisions[self.layer_idx], hidden_states.shape[1]
        ranks = is_kept = count = None
        if decision.token_rates is not None and (count := decision.token_counts(num_tokens)[0]) < num_tokens:
            num_ranks = min(_fill_up(count, len(hidden_states), hidden_states.device), num_tokens)
            ranks = torch.arange(num_ranks, device=hidden_states.device)
            is_kept = (ranks < count)[:, None]
            for tensor in (ranks, is_kept):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        (_, heads), (_, groups) = decision.heads[0], decision.groups[0]
        layers, actives, text = self._cut_layers()[:6], [heads, heads, groups, groups], ()
        if self.has_text:
            ((_, cross_heads),) = decision.cross_heads
            actives += [cross_heads, cross_heads]
            key, value = (states.contiguous() for states in self._keys_and_values(call, cross_heads))
            for tensor in (key, value):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
            text = (key, value, call.text_mask)
        try:
            for layer, active in zip(layers, actives, strict=True):
                low_rank = [] if isinstance(layer, DynaLinear) else _low_rank_factors(layer)
                base_layer = _base_layer(layer)
                base_layer._traced_weights = base_layer._dense_weights(active, low_rank)
            hidden_states, selected = forward_traced(hidden_states, modulation, ranks, is_kept, *text)
        finally:
            for layer in layers:
                _base_layer(layer)._traced_weights = None
        if call.output_masks:
            self._keep_masks(decision, hidden_states, selected if ranks is None else selected[:, :count])
        return hidden_states

    def _forward_traced(self, hidden_states, modulation, ranks, is_kept, key=None, value=None, text_mask=None):
        """
        The skipping form for `torch.compile`: the new tokens, and those that were selected, of which `is_kept`, (count, 1),
        leaves some as they were.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation[:, :, None].unbind(1)  # (B, 1, D) each
        attn_output = self.attn(torch.addcmul(shift, self.norm1(hidden_states), scale), active_heads=COMPILED)
        hidden_states = torch.addcmul(hidden_states, gate, attn_output)
        if key is not None:
            hidden_states = hidden_states + self.cross_attn(
                self.norm_cross(hidden_states), None, COMPILED, attention_mask=text_mask, key_value=(key, value)
            )
        tokens, selected, indices = hidden_states, None, None
        if ranks is not None:
            scores = self.token_selection(hidden_states)
            selected = scores.argsort(dim=1, descending=True, stable=True).index_select(1, ranks)
            first = torch.arange(0, scores.numel(), scores.shape[1], device=scores.device)
            indices = (selected + first[:, None]).flatten()
            tokens = hidden_states.flatten(0, 1).index_select(0, indices).unflatten(0, selected.shape)
        elif self.router_mode == "threshold":  # how many are on is known on the device only, so all are computed
            selected = self.token_selection(hidden_states) > 0
            mlp_gate = mlp_gate * selected[:, :, None].to(mlp_gate.dtype)
        mlp_input = torch.addcmul(mlp_shift, self.norm2(tokens), mlp_scale)
        before, tokens = tokens, torch.addcmul(tokens, mlp_gate, self.mlp(mlp_input, active_groups=COMPILED))
        if indices is not None:
            tokens = torch.where(is_kept, tokens, before)
            tokens = hidden_states.flatten(0, 1).index_copy(0, indices, tokens.flatten(0, 1)).view_as(hidden_states)
        return tokens, selected


TransformerBlockRegistry.register(DynaDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))


@dataclass
class DynaDiTTransformer2DModelOutput(Transformer2DModelOutput):
    """
    Output of [`DynaDiTTransformer2DModel`]. `sample`, of shape `(batch_size, out_channels, height, width)`, is the
    prediction; the rest is `None` unless `output_masks` was set.

    Args:
        attn_masks (`torch.Tensor` of shape `(batch_size, num_layers, num_attention_heads)`):
            1 where a head was on. A block that a feature cache left out has zeros.
        mlp_masks (`torch.Tensor` of shape `(batch_size, num_layers, num_attention_heads)`):
            1 where a channel group of the MLP was on.
        token_masks (`torch.Tensor` of shape `(batch_size, num_layers, num_tokens)`): 1 where a token took the MLP.
        compute_ratio (`torch.Tensor` of shape `(batch_size,)`):
            Multiply-accumulates of the blocks over those of the complete model's blocks, in [0, 1]. In training it
            carries the gradient of the budget to the routers. The keys and values of a text count in neither.
        cross_attn_masks (`torch.Tensor` of shape `(batch_size, num_layers, num_attention_heads)`, *optional*):
            1 where a head that attends to the text was on. `None` for a model without text.
    """

    attn_masks: torch.Tensor | None = None
    mlp_masks: torch.Tensor | None = None
    token_masks: torch.Tensor | None = None
    compute_ratio: torch.Tensor | None = None
    cross_attn_masks: torch.Tensor | None = None


class DynaDiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    r"""
    A diffusion transformer (DiT, [arXiv 2212.09748](https://huggingface.co/papers/2212.09748)) whose compute follows
    timestep and token (DyDiT, [arXiv 2410.03456](https://huggingface.co/papers/2410.03456)), unconditional or
    conditioned on a class, on a text by cross-attention (PixArt-alpha,
    [arXiv 2310.00426](https://huggingface.co/papers/2310.00426)), and on images in further input channels.

    It runs in three forms. `complete_model=True` is the static model. In training, and wherever gradients are recorded,
    everything is computed and masked (**masked**), with straight-through gradients to the routers. In evaluation mode
    under `torch.no_grad` only what is on is computed (**skipping**): the weights are cut to the active heads and channel
    groups, and the MLP runs on the selected tokens. Masked and skipping give the same output.

    [`compile`] and `compile_repeated_blocks` keep the skipping form, with a few graphs for all blocks and timesteps;
    with `router_mode="threshold"` these skip heads and groups and mask tokens. `torch.compile(model)` and layers whose
    weights cannot be cut (quantised, DoRA) run masked.

    `DYNA_DIT_CONFIGS` holds the public sizes:
    `DynaDiTTransformer2DModel.from_config(DYNA_DIT_CONFIGS["DiT-S/2"], num_classes=10)`.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to `32`):
            Native height and width of the input. Other sizes work as long as `patch_size` divides them.
        patch_size (`int`, defaults to `2`): side of a patch.
        in_channels (`int`, defaults to `4`): channels of the input.
        num_layers (`int`, defaults to `12`): transformer blocks.
        num_attention_heads (`int`, defaults to `6`): heads, and channel groups of every MLP; at least 2.
        attention_head_dim (`int`, defaults to `64`): width of a head.
        mlp_ratio (`float`, defaults to `4.0`): hidden width of the MLP over the width of a token.
        num_classes (`int`, *optional*, defaults to `1000`):
            Number of classes, labels `0 ... num_classes - 1`. `None` is unconditional.
        class_dropout_prob (`float`, defaults to `0.1`):
            Share of labels replaced by the null class in training mode, for classifier-free guidance
            ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)). Above 0 the class table has one more row,
            and `num_classes` is the label of the null class. Without effect on an unconditional model.
        learn_sigma (`bool`, defaults to `True`): twice the channels in the output, the second half for the variance.
        qk_norm (`str` or `bool`, *optional*):
            `"layer_norm"` (or `True`) or `"rms_norm"` of each head's queries and keys; `None` or `False` for none.
        router_mode (`str`, defaults to `"capacity"`):
            `"threshold"` is DyDiT's rule, sigmoid(logit) > 0.5, trained with a hard Gumbel-sigmoid. `"capacity"` fixes
            the counts by the timestep alone, the same in training and inference: heads and groups keep the top
            1 + round(sum of p), p = sigmoid(logit / 5) of all but the first; tokens keep the top round(r N) by score,
            r the block's keep rate at this timestep.
        timestep_scale (`float`, defaults to `1.0`):
            The time that is embedded is `timestep_scale * timestep + timestep_shift`. A converted SiT has -0.001 and 1.
        timestep_shift (`float`, defaults to `0.0`): see `timestep_scale`.
        downscale_freq_shift (`float`, defaults to `0`):
            0 for DiT's frequencies, 10000 ** (-i / 128); 1 for those of diffusers' DiT, 10000 ** (-i / 127).
        mlp_norm_eps (`float`, defaults to `1e-6`): epsilon of the norm before the MLP; the others have 1e-6.
        condition_channels (`int`, defaults to `0`):
            Channels of the input after those of the noisy sample: a mask, a masked or a small image.
        cross_attention_dim (`int`, *optional*):
            Width of the text states that the keys and values of cross-attention are made of. `None` has no
            cross-attention.
        caption_channels (`int`, *optional*):
            Width of `encoder_hidden_states`, that of the text encoder; for cross-attention Linear, GELU (tanh), Linear
            project them to `cross_attention_dim`. `None` where they have that width already.
        caption_dropout_prob (`float`, defaults to `0.1`):
            Share of captions replaced by a learned null caption in training mode, for classifier-free guidance. At 0
            there is none. Without effect on a model without text.
        noise_level_conditioning (`bool`, defaults to `False`):
            Whether the noise level of an image among the condition channels is an input of its own, as in cascaded
            diffusion ([arXiv 2106.15282](https://huggingface.co/papers/2106.15282), section 4). Routers do not see it.
        caption_pooling (`bool`, defaults to `False`):
            Whether a caption as a whole modulates the blocks, as time and class do: the mean of its states, scaled to a
            root mean square of 1, through Linear, SiLU, Linear. With `cross_attention_dim` too, as the pooled text of
            Stable Diffusion 3 ([arXiv 2403.03206](https://huggingface.co/papers/2403.03206), section 4); without it the
            mean is all that is read, for encoders of sentences such as all-MiniLM, which are trained by it
            ([arXiv 1908.10084](https://huggingface.co/papers/1908.10084)). Routers do not see it.
        caption_memory_size (`int`, *optional*):
            Entries of a [`DynaCaptionMemory`] that stands between that mean and the model, for data of few captions; its
            keys are set by [`write_caption_memory`]. Negative prompts are looked up in it too. `None` has none.
        caption_memory_temperature (`float`, defaults to `0.005`):
            Of its softmax. Entries whose cosine similarity with a caption is several times this below the largest have no
            part in what it reads.

    Raises:
        `ValueError`: where the sizes do not fit together or a mode is unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DynaDiTBlock"]
    _repeated_blocks = ["DynaDiTBlock"]
    _router_modules = ["attn_rate", "mlp_rate", "cross_attn_rate", "token_rate", "token_selection"]
    _keep_in_fp32_modules = [
        "time_embedding",
        "class_embedding",
        "noise_level_embedding",
        "caption_embedding",
        "caption_memory",
        *_router_modules,
    ]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", *_keep_in_fp32_modules]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        qk_norm: str | bool | None = None,
        router_mode: str = "capacity",
        timestep_scale: float = 1.0,
        timestep_shift: float = 0.0,
        downscale_freq_shift: float = 0,
        mlp_norm_eps: float = 1e-6,
        condition_channels: int = 0,
        cross_attention_dim: int | None = None,
        caption_channels: int | None = None,
        caption_dropout_prob: float = 0.1,
        noise_level_conditioning: bool = False,
        caption_pooling: bool = False,
        caption_memory_size: int | None = None,
        caption_memory_temperature: float = 0.005,
    ):
        super().__init__()
        sizes = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        if len(sizes) != 2:
            raise ValueError(f"`sample_size`={sample_size} must be a number, or height and width.")
        height, width = sizes
        self._check_config(height, width)
        dim = num_attention_heads * attention_head_dim
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        qk_norm = "layer_norm" if qk_norm is True else qk_norm or None

        self.pos_embed = DynaPatchEmbed(
            (height // patch_size, width // patch_size), patch_size, in_channels + condition_channels, dim
        )
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=downscale_freq_shift)
        self.time_embedding = DynaTimestepEmbedding(256, dim)
        self.class_embedding = None
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + (class_dropout_prob > 0), dim)
        self.noise_level_embedding = DynaTimestepEmbedding(256, dim) if noise_level_conditioning else None
        self.null_caption = self.caption_projection = self.caption_embedding = self.caption_memory = None
        text_width = caption_channels or cross_attention_dim
        if self.takes_text and caption_dropout_prob > 0:
            self.null_caption = nn.Embedding(1, text_width)
        if cross_attention_dim is not None and caption_channels is not None:
            self.caption_projection = PixArtAlphaTextProjection(caption_channels, cross_attention_dim)
        if caption_pooling:
            self.caption_embedding = DynaTimestepEmbedding(text_width, dim)
        if caption_memory_size is not None:
            self.caption_memory = DynaCaptionMemory(caption_memory_size, text_width, caption_memory_temperature)
        num_heads, mlp_dim = num_attention_heads, round(dim * mlp_ratio)
        self.transformer_blocks = nn.ModuleList(
            [
                DynaDiTBlock(dim, num_heads, mlp_dim, router_mode, i, qk_norm, mlp_norm_eps, cross_attention_dim)
                for i in range(num_layers)
            ]
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = DynaDenseLinear(dim, patch_size**2 * self.out_channels)

        self.gradient_checkpointing = False
        # The blocks themselves, also while a feature cache has put something else into the list.
        self._blocks = tuple(self.transformer_blocks)
        self._width_mult = 1.0
        self._plan = None
        self._initialize_weights()

    def _check_config(self, height: int, width: int) -> None:
        config = self.config
        if config.patch_size < 1 or height % config.patch_size or width % config.patch_size:
            fitting = [str(size) for size in (1, 2, 4, 8, 16) if not (height % size or width % size)]
            raise ValueError(
                f"`patch_size`={config.patch_size} must divide `sample_size`={config.sample_size}. Use "
                f"{', '.join(fitting)}, or another size."
            )
        for name in ("num_layers", "in_channels"):
            if config[name] < 1:
                raise ValueError(f"`{name}`={config[name]} must be at least 1.")
        if config.num_attention_heads < 2:
            raise ValueError(
                f"`num_attention_heads`={config.num_attention_heads} must be at least 2: head 0 is always on, so there "
                "would be nothing to choose."
            )
        dim = config.num_attention_heads * config.attention_head_dim
        if config.attention_head_dim < 1 or dim % 4:
            raise ValueError(
                f"The width, `num_attention_heads` * `attention_head_dim` = {dim}, must be divisible by 4 for the "
                "positions: sine and cosine of rows and of columns."
            )
        if round(dim * config.mlp_ratio) < 1 or round(dim * config.mlp_ratio) % config.num_attention_heads:
            raise ValueError(
                f"`mlp_ratio`={config.mlp_ratio} gives the MLP {dim * config.mlp_ratio:g} hidden channels, which must "
                f"divide into `num_attention_heads`={config.num_attention_heads} groups."
            )
        if config.num_classes is not None and config.num_classes < 1:
            raise ValueError(
                f"`num_classes`={config.num_classes} must be at least 1, or None for an unconditional model."
            )
        for name in ("class_dropout_prob", "caption_dropout_prob"):
            if not 0 <= config[name] <= 1:
                raise ValueError(f"`{name}`={config[name]} must be in [0, 1].")
        if config.condition_channels < 0:
            raise ValueError(f"`condition_channels`={config.condition_channels} must be at least 0.")
        for name in ("cross_attention_dim", "caption_channels"):
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"`{name}`={config[name]} must be at least 1, or None.")
        if config.caption_channels is not None and not self.takes_text:
            raise ValueError(
                f"`caption_channels`={config.caption_channels} needs `cross_attention_dim`, the width that captions are "
                "projected to, or `caption_pooling`=True."
            )
        if config.caption_pooling and config.caption_channels is None and config.cross_attention_dim is None:
            raise ValueError(
                "`caption_pooling`=True needs `caption_channels`, the width of the text encoder's states."
            )
        if config.caption_memory_size is not None and (config.caption_memory_size < 1 or not config.caption_pooling):
            raise ValueError(
                f"`caption_memory_size`={config.caption_memory_size} must be at least 1, or None, and needs "
                "`caption_pooling`=True: the memory is read with the mean of a caption's states."
            )
        if not config.caption_memory_temperature > 0:
            raise ValueError(f"`caption_memory_temperature`={config.caption_memory_temperature} must be above 0.")
        if config.qk_norm not in (None, True, False, *QK_NORMS):
            raise ValueError(
                f"`qk_norm`={config.qk_norm!r} is unknown. Use one of {', '.join(map(repr, QK_NORMS))}, or None."
            )
        if config.router_mode not in ROUTER_MODES:
            raise ValueError(
                f"`router_mode`={config.router_mode!r} is unknown. Use one of {', '.join(map(repr, ROUTER_MODES))}."
            )

    def _initialize_weights(self) -> None:
        """DiT's initialisation: adaLN-Zero, so every block starts as the identity; all routers start with all on."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        time = self.time_embedding
        for module in (time.linear_1, time.linear_2, self.class_embedding, self.null_caption):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
        zeros = [*(block.modulation for block in self._blocks), self.norm_out.linear, self.proj_out]
        zeros += [block.cross_attn.to_out[0] for block in self._blocks if block.has_text]
        if self.noise_level_embedding is not None:
            zeros.append(self.noise_level_embedding.linear_2)
        if self.caption_memory is not None:
            nn.init.normal_(self.caption_memory.values.weight)  # of a root mean square of 1, as a mean of states
        for linear in zeros:
            nn.init.zeros_(linear.weight)
        for block in self._blocks:
            self.initialize_routers(block)

    def initialize_routers(self, block: DynaDiTBlock) -> None:
        """
        Sets the routers of a block to where training starts: all on, for every timestep, and within reach of a gradient.

        Args:
            block (`DynaDiTBlock`): one of `transformer_blocks`.
        """
        is_threshold = self.config.router_mode == "threshold"
        # In capacity mode a quarter of a group is missing from the sum, and the sum is rounded.
        odds = 4 * (block.num_groups - 1) - 1  # p = 1 - 0.25 / (groups - 1)
        bias = 15.0 if is_threshold else GATE_TEMPERATURE * math.log(odds)
        for router in block.group_routers():
            nn.init.zeros_(router.weight)
            nn.init.constant_(router.bias, bias)
        nn.init.constant_(block.token_selection.linear_2.bias, 35.0 if is_threshold else 0.0)
        if not is_threshold:
            nn.init.zeros_(block.token_rate.weight)
            nn.init.constant_(block.token_rate.bias, 5.0)

    @property
    def null_class_label(self) -> int | None:
        """The label of the null class, `num_classes`, or `None` for a model that has none."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    @property
    def takes_text(self) -> bool:
        """Whether the model reads captions: by cross-attention, by modulation, or both."""
        return self.config.cross_attention_dim is not None or self.config.caption_pooling

    @property
    def has_null_caption(self) -> bool:
        """Whether the model has a learned null caption, for guidance by text."""
        return self.null_caption is not None

    @torch.no_grad()
    def write_caption_memory(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None, start: int = 0
    ) -> None:
        """
        Sets what captions the memory of a model with `caption_memory_size` holds: the keys of entries `start` and on.

        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(num_captions, num_text_tokens, caption_channels)`):
                States of the captions from the text encoder.
            encoder_attention_mask (`torch.Tensor` of shape `(num_captions, num_text_tokens)`, *optional*):
                Boolean, True where a token of the text counts.
            start (`int`, defaults to `0`): entry of the first of them.

        Raises:
            `ValueError`: if the model has no memory, it does not have that many entries or is not here to be written
                (offloaded), or a shape or value does not fit.
        """
        count = len(encoder_hidden_states)
        if self.caption_memory is None:
            raise ValueError("The model has no memory of captions (`caption_memory_size` is None).")
        if not 0 <= start <= self.config.caption_memory_size - count:
            raise ValueError(
                f"`start`={start} must be at least 0 and leave room for {count} captions among the "
                f"{self.config.caption_memory_size} entries of the memory (`caption_memory_size`)."
            )
        self._check_text(_Text(encoder_hidden_states, encoder_attention_mask, None), count, "captions")
        keys = self.caption_memory.keys
        if keys.is_meta:
            raise ValueError("The memory is on the meta device, as under offloading. Write to it before that.")
        captions = _pool(encoder_hidden_states, encoder_attention_mask)
        if not (captions.isfinite().all() and captions.any(dim=1).all()):
            raise ValueError("`encoder_hidden_states` must be finite, and their mean must not be 0.")
        self.clear_plan()
        keys[start : start + count] = F.normalize(captions, dim=1).to(keys)

    @property
    def width_mult(self) -> float:
        """Share of the heads and channel groups that may be active, from the first on; see [`set_width`]."""
        return self._width_mult

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that decide what is computed, by name; everything else is the complete model's."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if any(module in name.split(".") for module in self._router_modules)
        }

    def gate_noise_size(self, num_tokens: int) -> int:
        """
        Args:
            num_tokens (`int`): tokens of an image.

        Returns:
            `int`: uniform numbers for the gates of one layer and sample, see `gate_noise` of `forward`.
        """
        num_routers = 2 if self.config.cross_attention_dim is None else 3
        return num_routers * (self.config.num_attention_heads - 1) + num_tokens

    def set_width(self, width_mult: float) -> None:
        """
        Limits every attention layer and MLP to the leading part of its heads and channel groups, rounded to whole ones
        and at least one. Routers choose among those.

        Args:
            width_mult (`float`): share of the full width, in (0, 1].

        Raises:
            `ValueError`: outside (0, 1], or where a layer's weights cannot be cut.
        """
        if not isinstance(width_mult, (int, float)) or not 0 < width_mult <= 1:
            raise ValueError(f"`width_mult`={width_mult!r} must be in (0, 1]; 1 is the full width.")
        if width_mult < 1 and not self._can_cut():
            raise ValueError(CANNOT_CUT)
        self._width_mult = width_mult
        for layer in self._dynamic_layers():
            layer.width_mult = width_mult

    @contextmanager
    def share_attention(self, references: Sequence[int], strength: float = 1.0) -> Iterator[None]:
        """
        Within the block, samples also attend to the self-attention keys and values of a reference in their batch, whose
        style they take: StyleAligned ([arXiv 2312.02133](https://huggingface.co/papers/2312.02133), section 3.2). It goes
        with heads that are left out, and the processors that were there come back at its end.

        Args:
            references (`Sequence[int]`):
                For each sample of the batch the index of its reference, its own index where it has none. A smaller batch
                takes the leading part.
            strength (`float`, defaults to `1.0`):
                In [0, 1]: how far the queries and keys move to the mean and deviation of the reference's, and what the
                attention weights of its keys are multiplied by. 0 changes nothing.

        Raises:
            `ValueError`: on an index outside of the batch, or a strength outside of [0, 1].
        """
        references = [int(reference) for reference in references]
        if not all(0 <= reference < len(references) for reference in references):
            raise ValueError(
                f"`references`={references} must be indices of the {len(references)} samples that it has."
            )
        if not 0 <= strength <= 1:
            raise ValueError(f"`strength`={strength} must be in [0, 1]; 0 changes nothing.")
        layers = [block.attn for block in self._blocks] if strength > 0 else []
        processors = [layer.processor for layer in layers]
        try:
            for layer, processor in zip(layers, processors, strict=True):
                device = self.pos_embed.proj.weight.device  # "meta" while it is offloaded
                shared = DynaSharedAttnProcessor(references, strength, None if device.type == "meta" else device)
                shared._attention_backend = processor._attention_backend
                shared._parallel_config = processor._parallel_config
                layer.set_processor(shared)
            yield
        finally:
            for layer, processor in zip(layers, processors, strict=True):
                layer.set_processor(processor)

    def compile(self, *args, **kwargs) -> None:
        """
        Compiles block by block, as `compile_repeated_blocks` does: what a call leaves out is decided on the host, between
        graphs. `torch.compile(model)`, one graph for everything, computes all of it and masks.

        Args:
            args (`tuple`): of `torch.compile`.
            kwargs (`dict`): of `torch.compile`.
        """
        self.compile_repeated_blocks(*args, **kwargs)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """
        As in [`~diffusers.ModelMixin`]. What was prepared is dropped: compiled blocks hold their weights in another way.

        Args:
            args (`tuple`): of `torch.compile`.
            kwargs (`dict`): of `torch.compile`.
        """
        self.clear_plan()
        super().compile_repeated_blocks(*args, **kwargs)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        complete_model: bool = False,
        output_masks: bool = False,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
        class_dropout_mask: torch.Tensor | None = None,
        gate_noise: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        caption_dropout_mask: torch.Tensor | None = None,
        noise_level: torch.Tensor | float | None = None,
    ) -> DynaDiTTransformer2DModelOutput | tuple[torch.Tensor, ...]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels + condition_channels, height, width)`):
                Noisy samples, and after them what else the model is given as an image.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, `float` or `int`):
                Flow time in [0, 1000], 1000 is pure noise; or the step of a discrete diffusion schedule.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Integer labels in [0, num_classes), or `num_classes` for the null class. `None` on a model with a null
                class means the null class for all.
            complete_model (`bool`, *optional*, defaults to `False`):
                Run every head, channel group and token; the static model, routers not evaluated.
            output_masks (`bool`, *optional*, defaults to `False`): also return what was on, and the compute ratio.
            attention_kwargs (`dict`, *optional*): `scale`, the strength of the active LoRA adapters.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.
            class_dropout_mask (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Boolean, True where the label is replaced by the null class. `None` draws it with
                `class_dropout_prob` in training mode and drops nothing in evaluation mode.
            gate_noise (`torch.Tensor` of shape `(batch_size, num_layers, gate_noise_size)`, *optional*):
                Uniform numbers in (0, 1) for the gates of `router_mode="threshold"` in training mode, heads first, then
                channel groups, then, with cross-attention, heads of that, then tokens: [`gate_noise_size`] =
                2 or 3 * (`num_attention_heads` - 1) + number of tokens. `None` draws them.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, num_text_tokens, caption_channels)`, *optional*):
                States of the captions from the text encoder; of width `cross_attention_dim` where `caption_channels` is
                `None`. `None` on a model with a null caption means the null caption for all.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, num_text_tokens)`, *optional*):
                Boolean, True where a token of the text counts. `None` is all, which more attention backends take.
            caption_dropout_mask (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Boolean, True where the caption is replaced by the null caption. `None` draws it with
                `caption_dropout_prob` in training mode and drops nothing in evaluation mode.
            noise_level (`torch.Tensor` of shape `(batch_size,)` or `()`, or `float`, *optional*):
                Of the image among the condition channels, in [0, 1000], in units of `timestep`; needed by a model with
                `noise_level_conditioning`.

        Returns:
            [`DynaDiTTransformer2DModelOutput`] with `sample` of shape `(batch_size, out_channels, height, width)`, or a
            tuple of its fields that are set.

        Raises:
            `ValueError`: on a size, timestep, label or text that does not fit the model.
        """
        batch_size, _, height, width = self._check_input(hidden_states, attention_kwargs, gate_noise)
        device, dtype = hidden_states.device, hidden_states.dtype
        timestep = self._prepare_timestep(timestep, batch_size, device)
        labels = self._prepare_class_labels(class_labels, class_dropout_mask, batch_size, device, self.training)
        level = self._prepare_noise_level(noise_level, batch_size, device)
        text = _Text(encoder_hidden_states, encoder_attention_mask, caption_dropout_mask, self.config.caption_pooling)
        self._check_text(text, batch_size)
        if self.training and self.has_null_caption and text.states is not None and text.dropout_mask is None:
            text.dropout_mask = torch.rand(batch_size, device=device) < self.config.caption_dropout_prob

        # 1. Patches, time, and what is left out
        hidden_states = self.pos_embed(hidden_states)  # (B, N, D)
        temb = self._embed_time(timestep)
        call = self._prepare_call(temb, timestep, complete_model, output_masks, gate_noise)

        # 2. Class, noise level and text, as far as they were not prepared
        if call.step is not None:
            given_labels = class_labels if class_dropout_mask is None else None
            call.modulations = self._find_modulations(call.step, given_labels, labels, batch_size, noise_level)
        caption = None
        if call.form == "skipping" and self.takes_text:
            caption, call.keys_values = self._find_text(text, batch_size)
        if self.config.caption_pooling and caption is None:
            caption = self._embed_caption(text, batch_size, device)
        if self.config.cross_attention_dim is not None:
            if call.keys_values is None:
                call.text = self._project_text(text, batch_size, hidden_states)
            call.text_mask = text.key_mask(device)
        embedding = self._add_conditions(temb, labels, level, caption)
        conditioning = F.silu(embedding).to(dtype)

        # 3. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, conditioning, call)
            else:
                hidden_states = block(hidden_states, temb, conditioning, call)

        # 4. Pixels of the patches
        masks = self._collect_masks(hidden_states, text.length) if output_masks else ()
        hidden_states = self.norm_out(hidden_states, embedding)
        hidden_states = self.proj_out(hidden_states)
        patch_size = self.config.patch_size
        rows, columns = height // patch_size, width // patch_size
        sample = rearrange(
            hidden_states, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size
        )
        if not return_dict:
            return (sample, *masks)
        return DynaDiTTransformer2DModelOutput(sample, *masks)

    def forward_with_cfg(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        guidance_scale: float,
        guidance_channels: int = 3,
        **kwargs,
    ) -> DynaDiTTransformer2DModelOutput | tuple[torch.Tensor, ...]:
        r"""
        One call for both halves of classifier-free guidance, as DiT samples: the first half of the batch is conditional
        and the only one read, the second half of `class_labels` holds the null class.

        Args:
            hidden_states (`torch.Tensor` of shape `(2 * n, in_channels, height, width)`): noisy samples, twice.
            timestep (`torch.Tensor` of shape `(2 * n,)` or `()`, `float` or `int`): as in `forward`.
            class_labels (`torch.Tensor` of shape `(2 * n,)`): labels, then null labels.
            guidance_scale (`float`): uncond + guidance_scale * (cond - uncond); 1 is no guidance.
            guidance_channels (`int`, *optional*, defaults to `3`):
                Leading channels that are guided. The others keep the prediction of their own half.
            kwargs (`dict`): further arguments of `forward`.

        Returns:
            What `forward` returns, guided; both halves of `sample` hold the same guided channels.

        Raises:
            `ValueError`: on an odd batch or a number of channels that the model does not have.
        """
        if len(hidden_states) % 2:
            raise ValueError(
                f"`hidden_states` must hold both halves of the guidance, but its batch of {len(hidden_states)} is odd."
            )
        if not 0 < guidance_channels <= self.config.in_channels:
            raise ValueError(
                f"`guidance_channels`={guidance_channels} must be in [1, {self.config.in_channels}], the channels of the "
                "input."
            )
        half = hidden_states.chunk(2)[0]
        output = self(torch.cat([half, half]), timestep, class_labels, **kwargs)
        sample = output[0]
        cond, uncond = sample[:, :guidance_channels].chunk(2)
        guided = uncond + guidance_scale * (cond - uncond)
        sample = torch.cat([torch.cat([guided, guided]), sample[:, guidance_channels:]], dim=1)
        if isinstance(output, tuple):
            return (sample, *output[1:])
        output.sample = sample
        return output

    def _embed_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """The time embedding, which is all that the routers see; float32, (B, D)."""
        return self.time_embedding(self.time_proj(self.config.timestep_scale * timestep + self.config.timestep_shift))

    def _add_conditions(self, temb: torch.Tensor, labels, noise_level, caption=None) -> torch.Tensor:
        """The time embedding plus those of class, noise level and caption, float32; the last is one already."""
        if labels is not None:
            temb = temb + self.class_embedding(labels).to(temb)
        if noise_level is not None:
            temb = temb + self.noise_level_embedding(self.time_proj(noise_level))
        if caption is not None:
            temb = temb + caption
        return temb

    def _project_text(self, text: _Text, batch_size: int, like: torch.Tensor) -> torch.Tensor:
        """What keys and values are made of, (B, L, cross_attention_dim), in the dtype and on the device of `like`."""
        states = None if text.states is None else text.states.to(like.device, like.dtype)
        states = self._insert_null(states, text, batch_size, like)
        return states if self.caption_projection is None else self.caption_projection(states)

    def _embed_caption(self, text: _Text, batch_size: int, device: torch.device) -> torch.Tensor:
        """The embedding of each caption as a whole, (B, D), float32."""
        states = None
        if text.states is not None:
            states = _pool(text.states, text.attention_mask).to(device)[:, None]
            if self.caption_memory is not None:
                states = self.caption_memory(states)
        states = self._insert_null(states, text, batch_size, torch.empty(0, device=device))
        return self.caption_embedding(states[:, 0])

    def _insert_null(self, states, text: _Text, batch_size: int, like: torch.Tensor) -> torch.Tensor:
        """States (B, L, C), those of the null caption where a caption is dropped; for all, of one token, without any."""
        if states is not None and text.dropout_mask is None:
            return states
        null = self.null_caption(torch.zeros(1, 1, dtype=torch.long, device=like.device)).to(like.dtype)
        if states is None:
            return null.expand(batch_size, -1, -1)
        return torch.where(text.dropout_mask.to(like.device)[:, None, None], null, states)

    def _prepare_call(self, temb, timestep, complete_model: bool, output_masks: bool, gate_noise) -> _Call:
        """The form of a call and, where it skips, the decisions of all blocks."""
        num_groups, num_active = self.config.num_attention_heads, self._num_active_groups()
        call = _Call("complete" if complete_model else "masked", num_active, output_masks, gate_noise)
        if num_active < num_groups and not self._can_cut():
            raise ValueError(CANNOT_CUT)
        if torch.is_grad_enabled() or self.training:
            self.clear_plan()  # an optimizer may follow, and fused ones change weights without a trace
            return call
        if torch.compiler.is_compiling():
            return call
        is_compiled = any(block._compiled is not None for block in self._blocks)
        if is_compiled if complete_model else not self._can_cut():
            return call

        step = self._find_step(timestep)
        if complete_model:
            everything = [(None, None if num_active == num_groups else tuple(range(num_active)))]
            cross_heads = None if self.config.cross_attention_dim is None else everything
            call.decisions = [_BlockDecision(everything, everything, cross_heads, [1.0])] * len(self._blocks)
        else:
            call.decisions = self._decide(temb) if step is None else self._plan.decisions[step]
            for block, decision in zip(self._blocks, call.decisions, strict=True):
                # Samples with heads of their own would be computed apart, away from their references.
                if len(decision.heads) > 1 and isinstance(block.attn.processor, DynaSharedAttnProcessor):
                    return call
        call.form, call.step = "skipping", step
        return call

    def _decide(self, temb: torch.Tensor) -> list[_BlockDecision]:
        """The decisions of all blocks for a batch."""
        decisions = []
        for sets, rates in self._run_routers(temb):
            if rates is not None and len(set(rates)) == 1:
                rates = rates[:1]
            decisions.append(_BlockDecision(*(_partition(part, temb.device) for part in sets), token_rates=rates))
        return decisions

    def _run_routers(self, temb: torch.Tensor) -> Iterator[tuple[list[list[tuple[int, ...]]], list[float] | None]]:
        """
        For each block what each of its group routers leaves on, by row of `temb`, and the rates of tokens by row, in
        capacity mode. All of it is read back from the device at once.
        """
        num_groups, num_active = self.config.num_attention_heads, self._num_active_groups()
        layers = []
        for block in self._blocks:
            masks = block._group_masks(temb)
            if block.token_rate is not None:
                masks.append(block._keep_rate(temb).clamp(max=1)[:, None])
            layers.append(torch.cat(masks, dim=1))
        num_masks = len(self._blocks[0].group_routers()) * num_groups
        for rows in torch.stack(layers).tolist():  # (L, B, num_masks (+ 1))
            sets = [
                [tuple(i for i in range(num_active) if row[first + i]) for row in rows]
                for first in range(0, num_masks, num_groups)
            ]
            yield sets, [row[num_masks] for row in rows] if len(rows[0]) > num_masks else None

    def _can_cut(self) -> bool:
        return all(_can_cut(layer) for block in self._blocks for layer in block._cut_layers())

    def _num_active_groups(self) -> int:
        num_heads = self.config.num_attention_heads
        return round_to_nearest(num_heads, self._width_mult, num_heads)

    def _dynamic_layers(self) -> list[DynaLinear]:
        return [module for block in self._blocks for module in block.modules() if isinstance(module, DynaLinear)]

    # What a call costs

    def compute_macs(
        self,
        sample_size: int | tuple[int, int] | None = None,
        masks: DynaDiTTransformer2DModelOutput | None = None,
        num_text_tokens: int | None = None,
    ) -> dict[str, float]:
        """
        Multiply-accumulates of one sample in one call. `blocks` counts attention and MLPs, the denominator and numerator
        of `compute_ratio`; `total` counts every matrix product and convolution, the routers of a dynamic call included,
        and what a prepared trajectory does once (modulations; keys, values and embedding of the text) as well.

        Args:
            sample_size (`int` or `tuple[int, int]`, *optional*): height and width. `None` is the native size.
            masks ([`DynaDiTTransformer2DModelOutput`], *optional*):
                Output with masks of a dynamic call, over whose samples the mean is taken; the total is that of the
                skipping form. `None` is a call with `complete_model=True`, at the current width.
            num_text_tokens (`int`, *optional*): length of the text, which a model with cross-attention needs.

        Returns:
            `dict` with `"blocks"` and `"total"`.

        Raises:
            `ValueError`: where the patch size does not divide the size, the masks are of another size, or the length of
                the text is missing.
        """
        config, num_tokens = self.config, self._num_tokens(sample_size)
        dim = config.num_attention_heads * config.attention_head_dim
        attn_macs, mlp_macs, *cross_macs = self._block_macs(num_tokens, num_text_tokens)
        patch_values = config.patch_size**2 * num_tokens * dim
        total = patch_values * (config.in_channels + config.condition_channels + self.out_channels)
        total += 256 * dim + dim**2 + (6 * config.num_layers + 2) * dim**2  # time, modulations
        total += config.noise_level_conditioning * (256 * dim + dim**2)
        if cross_macs:
            text_dim, width = config.cross_attention_dim, config.caption_channels
            total += num_text_tokens * 2 * dim * text_dim * config.num_layers
            total += num_text_tokens * (width * text_dim + text_dim**2) if width is not None else 0
        if config.caption_pooling:
            width = config.caption_channels or config.cross_attention_dim
            total += width * dim + dim**2 + 2 * (config.caption_memory_size or 0) * width
        if masks is None:
            share = self._num_active_groups() / config.num_attention_heads
            blocks = config.num_layers * share * (attn_macs + mlp_macs + sum(cross_macs))
            return {"blocks": blocks, "total": blocks + total}

        if masks.token_masks is None or masks.token_masks.shape[2] != num_tokens:
            raise ValueError(
                f"`masks` must be an output of a call with `output_masks=True` at `sample_size`="
                f"{sample_size or config.sample_size}, which has {num_tokens} tokens."
            )
        attn_share = masks.attn_masks.detach().float().mean(dim=2)  # (B, L)
        mlp_share = masks.mlp_masks.detach().float().mean(dim=2) * masks.token_masks.detach().float().mean(dim=2)
        spent = attn_macs * attn_share + mlp_macs * mlp_share
        if cross_macs:
            spent = spent + cross_macs[0] * masks.cross_attn_masks.detach().float().mean(dim=2)
        blocks = spent.sum(dim=1).mean().item()
        routers = len(self._blocks[0].group_routers()) * dim * (config.num_attention_heads - 1)
        is_capacity = config.router_mode == "capacity"
        selection = num_tokens * sum(p.numel() for p in self._blocks[0].token_selection.parameters() if p.ndim == 2)
        # Where the rate keeps all tokens they need no scores.
        with_scores = (masks.token_masks == 0).any(dim=2).any(dim=0) | (not is_capacity)
        total += config.num_layers * (routers + is_capacity * dim) + int(with_scores.sum()) * selection
        return {"blocks": blocks, "total": blocks + total}

    def predict_compute_ratio(
        self,
        timesteps: torch.Tensor,
        sample_size: int | tuple[int, int] | None = None,
        num_text_tokens: int | None = None,
    ) -> torch.Tensor:
        """
        The compute ratio at given times, which in capacity mode is known before a call and the same for every image.

        Args:
            timesteps (`torch.Tensor` of shape `(num_timesteps,)`): times.
            sample_size (`int` or `tuple[int, int]`, *optional*): height and width. `None` is the native size.
            num_text_tokens (`int`, *optional*): length of the text, which a model with cross-attention needs.

        Returns:
            `torch.Tensor` of shape `(num_timesteps,)`: without gradients, at the current width.

        Raises:
            `ValueError`: in threshold mode, where the tokens decide, and on timesteps or sizes that do not fit.
        """
        if self.config.router_mode != "capacity":
            raise ValueError(
                "`router_mode`='threshold' has no compute ratio before a call: its tokens depend on the image. Read it "
                "off an output with `output_masks=True`."
            )
        self._check_timesteps(timesteps)
        num_tokens = self._num_tokens(sample_size)
        attn_macs, mlp_macs, *cross_macs = self._block_macs(num_tokens, num_text_tokens)
        num_active, ratio = self._num_active_groups(), 0.0
        with torch.no_grad():
            temb = self._embed_time(timesteps.float())
            for block in self._blocks:
                attn, mlp, *cross = (
                    mask[:, :num_active].sum(dim=1) / block.num_groups for mask in block._group_masks(temb)
                )
                tokens = (block._keep_rate(temb).clamp(max=1) * num_tokens).round() / num_tokens
                ratio = ratio + attn_macs * attn + mlp_macs * mlp * tokens
                for macs, share in zip(cross_macs, cross, strict=True):
                    ratio = ratio + macs * share
        return ratio / (len(self._blocks) * (attn_macs + mlp_macs + sum(cross_macs)))

    def _block_macs(self, num_tokens: int, num_text_tokens: int | None) -> tuple[int, ...]:
        """
        Multiply-accumulates of one complete block: attention (score products included), MLP and, where there is one,
        attention to the text without its keys and values, which a trajectory computes once.
        """
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        attn_macs = 4 * num_tokens * dim**2 + 2 * num_tokens**2 * dim
        mlp_macs = 2 * num_tokens * dim * round(dim * self.config.mlp_ratio)
        if self.config.cross_attention_dim is None:
            return attn_macs, mlp_macs
        if num_text_tokens is None:
            raise ValueError(
                "`num_text_tokens` must be given: what attention to the text costs hangs on the text's length."
            )
        return attn_macs, mlp_macs, 2 * num_tokens * dim**2 + 2 * num_tokens * num_text_tokens * dim

    def _num_tokens(self, sample_size: int | tuple[int, int] | None) -> int:
        sample_size = self.config.sample_size if sample_size is None else sample_size
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self._check_size(height, width, "sample_size")
        return (height // self.config.patch_size) * (width // self.config.patch_size)

    def _collect_masks(self, hidden_states: torch.Tensor, num_text_tokens: int) -> tuple[torch.Tensor, ...]:
        """
        Masks of heads, groups and tokens by layer, the compute ratio, and the masks of the heads that attend to the text
        where there is one. A block that did not run was off.
        """
        batch_size, num_tokens = hidden_states.shape[:2]
        num_groups = self.config.num_attention_heads
        attn_macs, mlp_macs, *cross_macs = self._block_macs(num_tokens, num_text_tokens)
        off = hidden_states.new_zeros(batch_size, num_groups + num_tokens, dtype=torch.float32)
        layers = []
        for block in self._blocks:
            num_routers = len(block.group_routers())
            ran = (*[off[:, :num_groups]] * num_routers, off[:, num_groups:], off[:, 0])
            if block.masks is not None:
                ran, block.masks = block.masks, None
            layers.append(ran)
        attn, mlp, *cross, tokens, token_rate = (torch.stack(masks, dim=1) for masks in zip(*layers, strict=True))
        spent = attn_macs * attn.mean(dim=2) + mlp_macs * mlp.mean(dim=2) * token_rate  # (B, L)
        for macs, masks in zip(cross_macs, cross, strict=True):
            spent = spent + macs * masks.mean(dim=2)
        return attn, mlp, tokens, spent.mean(dim=1) / (attn_macs + mlp_macs + sum(cross_macs)), *cross

    # Prepared trajectories

    @apply_forward_hook
    @torch.no_grad()
    def prepare_timesteps(
        self,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        max_plan_bytes: int = 2**30,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        caption_dropout_mask: torch.Tensor | None = None,
        noise_level: float | None = None,
    ) -> None:
        """
        Prepares the skipping form for a trajectory: the decisions of all routers at once, the modulations of all blocks
        for every pair of timestep and label (not where captions modulate), the keys and values of the text and its
        embedding as a whole, and memory for each layer's cut weights, in which a step replaces only the heads and groups
        that change. A call at another timestep, label, text or noise level is right too, only not prepared, unless
        [`set_plan_step`] says otherwise. [`plan_bytes`] tells what it holds; free it with [`clear_plan`]. It belongs to one
        thread and one stream.

        What was prepared is dropped where weights, dtype, device or width change, and by a call in training mode or with
        gradients. A write through `.data`, as `EMAModel.copy_to` does, cannot be seen: call [`clear_plan`] after one.

        Args:
            timesteps (`torch.Tensor` of shape `(num_calls,)`): the times of the calls that follow, in their order.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Labels of these calls, null labels included. `None` prepares no modulations for a conditional model.
            max_plan_bytes (`int`, defaults to `2**30`):
                Memory for modulations, the text and cut weights. What does not fit is computed in the call.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, num_text_tokens, caption_channels)`, *optional*):
                Text of these calls, which are given these very tensors, or views of a leading part of their batch.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, num_text_tokens)`, *optional*): as above.
            caption_dropout_mask (`torch.Tensor` of shape `(batch_size,)`, *optional*): as above.
            noise_level (`float`, *optional*):
                Noise level of these calls. `None` prepares no modulations for a model with `noise_level_conditioning`.

        Raises:
            `ValueError`: on timesteps of another shape, a label out of range, or a text that does not fit.
        """
        self.clear_plan()
        self._check_timesteps(timesteps)
        text = _Text(encoder_hidden_states, encoder_attention_mask, caption_dropout_mask, self.config.caption_pooling)
        if text.states is not None:
            self._check_text(text, len(text.states))
        # What can change without a trace, as the strength of an adapter or a weight made in inference mode, has its
        # decisions taken in each call.
        routers = self._sources()["decisions"]
        if not all(type(router) is DynaFloat32Linear and not router.weight.is_inference() for router in routers):
            return

        device = self.pos_embed.proj.weight.device
        if device.type == "meta":  # sequential offloading, whose hooks move what they are given
            device = timesteps.device
        times = timesteps.to(device=device, dtype=torch.float32)
        temb = self._embed_time(times)
        plan = _Plan(times.tolist(), self._decide_steps(temb), _CutWeights(max_plan_bytes))
        self._prepare_modulations(plan, temb, class_labels, noise_level)
        self._prepare_text(plan, text, device)
        plan.cut_weights.admit(self._count_slots(plan))
        plan.signature = self._plan_signature(plan)
        self._plan = plan
        for layer in self._dynamic_layers():
            layer._cut_weights = plan.cut_weights

    def set_plan_step(self, step: int | None) -> None:
        """
        Tells the model which of the prepared timesteps the calls that follow are at, so that it need not read the
        timestep back from the device.

        Args:
            step (`int`, *optional*): index into the prepared timesteps. `None` looks the timestep up by its value.

        Raises:
            `ValueError`: for an index that was not prepared.
        """
        if self._plan is None:
            return
        if step is not None and not 0 <= step < len(self._plan.timesteps):
            raise ValueError(f"`step`={step} must be in [0, {len(self._plan.timesteps)}), the prepared timesteps.")
        self._plan.step = step

    def clear_plan(self) -> None:
        """Frees what [`prepare_timesteps`] prepared."""
        if self._plan is None:
            return
        self._plan = None
        for layer in self._dynamic_layers():
            layer._cut_weights = None

    @property
    def plan_bytes(self) -> int:
        """Memory of what [`prepare_timesteps`] has prepared so far: modulations, text, and weights once they are used."""
        return 0 if self._plan is None else self._plan.cut_weights.num_bytes

    def _apply(self, *args, **kwargs):
        self.clear_plan()  # `to` and its like give parameters new storage without a trace
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {**super().__getstate__(), "_plan": None}

    def _sources(self) -> dict[str, list[nn.Module]]:
        """The layers that what is prepared is computed from: decisions, modulations, text."""
        decisions = [self.time_embedding.linear_1, self.time_embedding.linear_2]
        modulations, text = [self.class_embedding], [self.null_caption]
        if self.noise_level_embedding is not None:
            modulations += [self.noise_level_embedding.linear_1, self.noise_level_embedding.linear_2]
        if self.caption_projection is not None:
            text += [self.caption_projection.linear_1, self.caption_projection.linear_2]
        if self.caption_embedding is not None:
            text += [self.caption_embedding.linear_1, self.caption_embedding.linear_2]
        if self.caption_memory is not None:
            text.append(self.caption_memory.values)
        for block in self._blocks:
            decisions += [*block.group_routers(), block.token_rate]
            modulations.append(block.modulation)
            if block.has_text:
                text += [block.cross_attn.to_kv, block.cross_attn.norm_k]
        sources = {"decisions": decisions, "modulations": modulations, "text": text}
        return {kind: [layer for layer in layers if layer is not None] for kind, layers in sources.items()}

    def _can_prepare(self, kind: str, device: torch.device) -> bool:
        """Whether modulations or text hang on nothing but the weights of their layers, whose changes the plan sees."""
        return (
            all(map(_is_plain, self._sources()[kind]))
            and not any(map(_has_hooks, (self.caption_projection, self.caption_memory, *self._blocks)))
            and not torch.is_autocast_enabled(device.type)
        )

    def _decide_steps(self, temb: torch.Tensor) -> list[list[_BlockDecision]]:
        """The decisions of a trajectory by step and layer; `temb` has a row for each step."""
        layers = []
        for sets, rates in self._run_routers(temb):
            sets = [_keep_places(part, self.config.num_attention_heads) for part in sets]
            rates = [None] * len(temb) if rates is None else [[rate] for rate in rates]
            layers.append(
                [
                    _BlockDecision(*([(None, active)] for active in actives), token_rates=rate)
                    for *actives, rate in zip(*sets, rates, strict=True)
                ]
            )
        return [list(step) for step in zip(*layers, strict=True)]

    def _prepare_modulations(self, plan: "_Plan", temb: torch.Tensor, class_labels, noise_level) -> None:
        """Modulations at every pair of timestep and label, if they can be prepared and fit."""
        labels, level, has_level = None, None, self.config.noise_level_conditioning
        if has_level and noise_level is not None:
            level = self._prepare_noise_level(noise_level, 1, temb.device)
        is_known = (level is not None or not has_level) and (class_labels is not None or self.class_embedding is None)
        # Where captions modulate, there are as many modulations as samples.
        if not is_known or self.caption_embedding is not None or not self._can_prepare("modulations", temb.device):
            return
        if class_labels is not None:
            batch_size = class_labels.numel() if torch.is_tensor(class_labels) else len(class_labels)
            labels = self._prepare_class_labels(class_labels, None, batch_size, temb.device).unique()
        dtype = self._blocks[0].modulation.weight.dtype
        width = sum(block.modulation.out_features for block in self._blocks)
        num_bytes = len(temb) * (1 if labels is None else len(labels)) * width * dtype.itemsize
        if not plan.cut_weights.take(num_bytes):
            return
        embedding = self._add_conditions(temb[:, None], labels, level)
        conditioning = F.silu(embedding).to(dtype)  # (S, num_labels, D)
        plan.modulations = [block._modulate(conditioning) for block in self._blocks]
        plan.noise_level = noise_level if has_level else None
        if labels is not None:
            plan.class_labels, plan.label_signature = class_labels, _signature([class_labels])
            plan.label_rows = labels.new_full((self.class_embedding.num_embeddings,), -1, dtype=torch.long)
            plan.label_rows[labels] = torch.arange(len(labels), device=labels.device)

    def _prepare_text(self, plan: "_Plan", text: _Text, device: torch.device) -> None:
        """The embedding of the captions, and their keys and values for all heads, if they can be prepared and fit."""
        if not self.takes_text or (text.states is None and not self.has_null_caption):
            return
        # What was made in inference mode does not tell when it is written to.
        if any(tensor is not None and tensor.is_inference() for tensor in text.sources):
            return
        if not self._can_prepare("text", device):
            return
        batch_size = 1 if text.states is None else len(text.states)
        with_keys, with_caption = self.config.cross_attention_dim is not None, self.config.caption_pooling
        num_bytes = with_caption * batch_size * self.time_embedding.linear_2.out_features * 4
        if with_keys:
            dtype = self._blocks[0].cross_attn.to_kv.weight.dtype
            width = sum(block.cross_attn.to_kv.out_features for block in self._blocks)
            num_bytes += batch_size * text.length * width * dtype.itemsize
        if not plan.cut_weights.take(num_bytes):
            return
        if with_caption:
            plan.caption = self._embed_caption(text, batch_size, device)
        if with_keys:
            states = self._project_text(text, batch_size, torch.empty(0, dtype=dtype, device=device))
            every = tuple(range(self.config.num_attention_heads))  # whatever the width
            plan.keys_values = [block.cross_attn.keys_and_values(states, every) for block in self._blocks]
        plan.text, plan.text_signature = text, _signature(text.sources)

    def _count_slots(self, plan: "_Plan") -> dict[DynaLinear, int]:
        """The groups of the largest set that each layer has to be cut to in a trajectory."""
        num_slots = {}
        for block, *steps in zip(self._blocks, *plan.decisions, strict=True):
            if _has_hooks(block):  # its weights are elsewhere between the calls
                continue
            owners = {"heads": block.attn, "groups": block.mlp}
            if block.has_text:
                owners["cross_heads"] = block.cross_attn
            for kind, owner in owners.items():
                counts = [len(getattr(decision, kind)[0][1]) for decision in steps]
                for name, layer in owner.named_modules():
                    if not isinstance(layer, DynaLinear) or (plan.keys_values and name == "to_kv"):
                        continue
                    # In a compiled block there is one layout, for all groups too.
                    is_cut = block._compiled is not None and layer._is_rearranged()
                    num_slots[layer] = max((n for n in counts if is_cut or n < block.num_groups), default=0)
        return num_slots

    def _plan_signature(self, plan: "_Plan") -> tuple:
        """Changes with whatever the decisions and, where there are any, modulations and text were computed from."""
        sources = self._sources()
        layers = sources["decisions"]
        if plan.modulations:
            layers += sources["modulations"]
        if plan.text is not None:
            layers += sources["text"]
        tensors = [tensor for layer in layers for tensor in (layer.weight, getattr(layer, "bias", None))]
        modes = [block.router_mode for block in self._blocks]
        if self.caption_memory is not None:
            tensors.append(self.caption_memory.keys)
            modes.append(self.caption_memory.temperature)
        return (tuple(map(id, layers)), _signature(tensors), self._width_mult, *modes)

    def _find_step(self, timestep: torch.Tensor) -> int | None:
        """Which of the prepared timesteps a call is at, if its samples are at one and the model is as it was."""
        plan = self._plan
        if plan is None:
            return None
        if plan.signature != self._plan_signature(plan):
            self.clear_plan()
            return None
        if plan.step is not None and (
            timestep.device.type != "cpu" or bool((timestep == plan.timesteps[plan.step]).all())
        ):
            return plan.step
        times = set(timestep.tolist())
        if len(times) == 1 and (time := times.pop()) in plan.timesteps:
            return plan.timesteps.index(time)
        return None

    def _find_modulations(self, step: int, class_labels, labels, batch_size: int, noise_level) -> list | None:
        """What was prepared for the labels, as given and as tensor on the device, and the noise level as given."""
        plan = self._plan
        if not plan.modulations or torch.is_tensor(noise_level) or noise_level != plan.noise_level:
            return None
        if labels is None:
            return [modulation[step].expand(batch_size, -1, -1) for modulation in plan.modulations]
        rows = plan.label_rows[labels]
        # Elsewhere than on CPU a look at the labels would wait for the device.
        if labels.device.type == "cpu":
            is_prepared = not bool((rows < 0).any())
        else:
            is_prepared = class_labels is plan.class_labels and _signature([class_labels]) == plan.label_signature
        return [modulation[step][rows] for modulation in plan.modulations] if is_prepared else None

    def _find_text(self, text: _Text, batch_size: int) -> tuple[torch.Tensor | None, list | None]:
        """What was prepared for a text, which is found by its memory: its embedding, its keys and values."""
        plan = self._plan
        if plan is None or plan.text is None or not text.is_part_of(plan.text):
            return None, None
        if _signature(plan.text.sources) != plan.text_signature:
            return None, None

        def take(states):
            if text.states is None:  # the null caption for all
                return states.expand(batch_size, *states.shape[1:])
            return states[:batch_size]

        caption = None if plan.caption is None else take(plan.caption)
        return caption, [tuple(map(take, pair)) for pair in plan.keys_values] or None

    # Checks of what is given

    def _check_input(self, hidden_states: torch.Tensor, attention_kwargs: dict | None, gate_noise) -> torch.Size:
        num_channels = self.config.in_channels + self.config.condition_channels
        if hidden_states.ndim != 4 or hidden_states.shape[1] != num_channels:
            parts = "`in_channels` + `condition_channels` = " if self.config.condition_channels else ""
            raise ValueError(
                f"`hidden_states` must have shape (batch_size, {parts}{num_channels}, height, width), but it has shape "
                f"{tuple(hidden_states.shape)}."
            )
        batch_size, _, height, width = hidden_states.shape
        self._check_size(height, width, "hidden_states")
        if attention_kwargs:
            raise ValueError(
                f"`attention_kwargs` has the unknown keys {', '.join(map(repr, attention_kwargs))}. Use 'scale' only."
            )
        num_gates = self.gate_noise_size(height * width // self.config.patch_size**2)
        expected = (batch_size, self.config.num_layers, num_gates)
        if gate_noise is not None and gate_noise.shape != expected:
            raise ValueError(
                f"`gate_noise` must have shape {expected}, samples, layers and gates, but it has shape "
                f"{tuple(gate_noise.shape)}."
            )
        return hidden_states.shape

    def _check_size(self, height: int, width: int, name: str) -> None:
        patch_size = self.config.patch_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"The height and width of `{name}`, {(height, width)}, must be divisible by `patch_size`={patch_size}."
            )

    def _check_timesteps(self, timesteps: torch.Tensor) -> None:
        if not torch.is_tensor(timesteps) or timesteps.ndim != 1 or len(timesteps) == 0:
            given = f"shape {tuple(timesteps.shape)}" if torch.is_tensor(timesteps) else type(timesteps).__name__
            raise ValueError(
                f"`timesteps` must be a tensor of shape (num_calls,), but it is {given}. Give the times of all calls in "
                "one tensor."
            )

    def _prepare_timestep(self, timestep: torch.Tensor | float | int, batch_size: int, device) -> torch.Tensor:
        if not torch.is_tensor(timestep):
            if not isinstance(timestep, (int, float)):
                raise TypeError(f"`timestep` must be a number or a tensor, but it is a {type(timestep).__name__}.")
            timestep = torch.tensor(timestep, dtype=torch.float32, device=device)
        return _one_per_sample("timestep", timestep, "time", batch_size, device)

    def _prepare_noise_level(self, noise_level, batch_size: int, device) -> torch.Tensor | None:
        if not self.config.noise_level_conditioning:
            if noise_level is not None:
                raise ValueError("`noise_level` was given, but the model has no `noise_level_conditioning`.")
            return None
        if noise_level is None:
            raise ValueError("`noise_level` must be given: the model has `noise_level_conditioning`.")
        if not torch.is_tensor(noise_level):
            noise_level = torch.tensor(float(noise_level))
        # Elsewhere than on CPU this check would wait for the device.
        if noise_level.device.type == "cpu" and not torch.compiler.is_compiling():
            if not bool(((noise_level >= 0) & (noise_level <= 1000)).all()):
                raise ValueError(f"`noise_level`={noise_level.tolist()} must be in [0, 1000]; 1000 is pure noise.")
        return _one_per_sample("noise_level", noise_level, "level", batch_size, device)

    def _prepare_class_labels(
        self, class_labels, dropout_mask, batch_size: int, device, may_drop: bool = False
    ) -> torch.Tensor | None:
        null_label = self.null_class_label
        if dropout_mask is not None:
            if null_label is None:
                raise ValueError("`class_dropout_mask` was given, but the model has no null class to replace labels.")
            _check_mask("class_dropout_mask", dropout_mask, (batch_size,), "sample")
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were given, but the model is unconditional (`num_classes` is None).")
            return None
        if class_labels is None:
            if null_label is None:
                raise ValueError(
                    f"`class_labels` must be given: the model has {self.config.num_classes} classes and no null class "
                    "(`class_dropout_prob` is 0)."
                )
            return torch.full((batch_size,), null_label, device=device)
        if not torch.is_tensor(class_labels) or class_labels.is_floating_point():
            kind = class_labels.dtype if torch.is_tensor(class_labels) else type(class_labels).__name__
            raise TypeError(f"`class_labels` must be a tensor of integers, one label per sample, but it is {kind}.")
        if class_labels.shape != (batch_size,):
            raise ValueError(
                f"`class_labels` must have shape ({batch_size},), one label per sample, but it has shape "
                f"{tuple(class_labels.shape)}."
            )
        # Elsewhere than on CPU this check would wait for the device at every step.
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            num_labels = self.class_embedding.num_embeddings
            wrong = class_labels[(class_labels < 0) | (class_labels >= num_labels)]
            if wrong.numel():
                raise ValueError(f"`class_labels` must be in [0, {num_labels}), but they hold {wrong.tolist()}.")
        class_labels = class_labels.to(device)
        if dropout_mask is None and may_drop and null_label is not None:
            dropout_mask = torch.rand(batch_size, device=device) < self.config.class_dropout_prob
        if dropout_mask is not None:
            class_labels = torch.where(dropout_mask.to(device), null_label, class_labels)
        return class_labels

    def _check_text(self, text: _Text, batch_size: int, rows: str = "samples") -> None:
        states, attention_mask, dropout_mask = text.states, text.attention_mask, text.dropout_mask
        if not self.takes_text:
            names = ("encoder_hidden_states", "encoder_attention_mask", "caption_dropout_mask")
            for name, tensor in zip(names, (states, attention_mask, dropout_mask), strict=True):
                if tensor is not None:
                    raise ValueError(
                        f"`{name}` was given, but the model takes no text (it has neither `cross_attention_dim` nor "
                        "`caption_pooling`)."
                    )
            return
        if dropout_mask is not None:
            if not self.has_null_caption:
                raise ValueError(
                    "`caption_dropout_mask` was given, but the model has no null caption (`caption_dropout_prob` is 0)."
                )
            _check_mask("caption_dropout_mask", dropout_mask, (batch_size,), "sample")
        if states is None:
            if not self.has_null_caption:
                raise ValueError(
                    "`encoder_hidden_states` must be given: the model has no null caption (`caption_dropout_prob` is 0)."
                )
            if attention_mask is not None:
                raise ValueError("`encoder_attention_mask` was given without `encoder_hidden_states`.")
            return
        width = self.config.caption_channels or self.config.cross_attention_dim
        if states.ndim != 3 or len(states) != batch_size or states.shape[1] < 1 or states.shape[2] != width:
            raise ValueError(
                f"`encoder_hidden_states` must have shape ({batch_size}, num_text_tokens, {width}), but it has shape "
                f"{tuple(states.shape)}."
            )
        if attention_mask is None:
            return
        _check_mask("encoder_attention_mask", attention_mask, tuple(states.shape[:2]), "token of the text")
        # Elsewhere than on CPU this check would wait for the device at every step.
        if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling():
            is_empty = ~attention_mask.any(dim=1)
            if dropout_mask is not None:
                is_empty &= ~dropout_mask.cpu()
            if bool(is_empty.any()):
                advice = " Drop their captions by `caption_dropout_mask`." if self.has_null_caption else ""
                raise ValueError(
                    f"`encoder_attention_mask` leaves nothing of the texts of the {rows} "
                    f"{is_empty.nonzero().squeeze(1).tolist()}.{advice if rows == 'samples' else ''}"
                )


def _check_mask(name: str, mask: torch.Tensor, shape: tuple[int, ...], entry: str) -> None:
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"`{name}` must be boolean of shape {shape}, one entry per {entry}, but it is {mask.dtype} of shape "
            f"{tuple(mask.shape)}."
        )


def _one_per_sample(name: str, tensor: torch.Tensor, entry: str, batch_size: int, device) -> torch.Tensor:
    """Float32 of shape (B,), of one number or of one for each sample."""
    if tensor.shape not in ((), (1,), (batch_size,)):
        raise ValueError(
            f"`{name}` must be a number or have shape ({batch_size},), one {entry} per sample, but it has shape "
            f"{tuple(tensor.shape)}."
        )
    return tensor.to(device=device, dtype=torch.float32).expand(batch_size)


# Speed: the products. Nothing from here on changes what the model computes.


@torch.compiler.assume_constant_result
def _has_onednn(dtype: torch.dtype) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def _can_use_onednn(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN may take a product in place of `linear`: on x86 CPUs, where nothing but the value is asked for."""
    return (
        input.device.type == "cpu"
        and input.dtype == weight.dtype
        and not _is_transformed()
        and type(input) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and input.numel() > 0
        and weight.shape[0] > 1  # a product with one row of weights takes it twice the time
        and _has_onednn(weight.dtype)
    )


def _is_transformed() -> bool:
    """Whether gradients, autocast, `torch.func` or forward-mode differentiation ask for more, which oneDNN's lacks."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _onednn_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, with_gelu: bool
) -> torch.Tensor:
    gelu = ("gelu", [], "tanh") if with_gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, *gelu)


# As an operator of its own for compiled graphs: inductor takes oneDNN's only with constant weights.
if not hasattr(torch.ops.diffusers_dyna, "linear"):  # this file may be loaded twice, also as a copy from the Hub
    torch.library.custom_op("diffusers_dyna::linear", _onednn_linear, mutates_args=()).register_fake(
        lambda input, weight, bias, with_gelu: input.new_empty((*input.shape[:-1], weight.shape[0]))
    )


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, with_gelu: bool = False
) -> torch.Tensor:
    """
    `linear`, and GELU (tanh) if asked for. Without gradients on an x86 CPU by oneDNN, with GELU fused: the static model
    is twice as fast in float32 on an AMD processor with AVX-512 (`python examples/benchmark.py --only static`).
    """
    if _can_use_onednn(input, weight):
        is_compiling = torch.compiler.is_compiling()
        linear = torch.ops.diffusers_dyna.linear if is_compiling else _onednn_linear
        return linear(input, _without_gaps(weight), bias, with_gelu)
    output = F.linear(input, weight, bias)
    return F.gelu(output, approximate="tanh") if with_gelu else output


def _without_gaps(weight: torch.Tensor) -> torch.Tensor:
    """A matrix by rows or by columns. With gaps between them, oneDNN would take its reference implementation."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _fill_up(count: int, batch_size: int, device: torch.device) -> int:
    """
    Tokens of each image to compute, at least `count`, so that a CPU sees few numbers of rows: multiples of 16, from 128
    on. oneDNN compiles a kernel for each number, which takes longer than the rows that are added, and keeps 1024 of them,
    fewer than the calls of a long trajectory have.
    """
    if device.type != "cpu" or batch_size * count < 128:
        return count
    multiple = 16 // math.gcd(16, batch_size)
    return -(-count // multiple) * multiple


# Speed: prepared trajectories


@dataclass
class _Slots:
    """
    Memory for the groups of one layer, one after the other, rows or columns alike. A set of groups lies in the first of
    them; `cut`, its weight and bias, are views.
    """

    weight: torch.Tensor  # (slots, channels of all stacked matrices, width of the other side)
    bias: torch.Tensor | None
    cut: tuple[torch.Tensor, torch.Tensor | None] = (None, None)
    groups: tuple[int, ...] = ()
    state: tuple = ()
    sources: tuple = ()  # held, so that nothing else comes to lie at their addresses


class _CutWeights:
    """
    The cut weights of a prepared trajectory: for each layer the set of groups that it ran with last. To go on to another
    set, only the groups are copied that were not at their place.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.num_slots = {}  # by layer; what is not in here is cut in each call
        self.slots = {}

    def take(self, num_bytes: int) -> bool:
        """Counts memory for something else that is prepared, if there is enough left."""
        if self.num_bytes + num_bytes > self.max_bytes:
            return False
        self.num_bytes += num_bytes
        return True

    def admit(self, num_slots: dict[DynaLinear, int]) -> None:
        """Settles which layers get memory: as many as fit, from the first on, each for the largest set that it needs."""
        num_bytes = self.num_bytes
        for layer, count in num_slots.items():
            sources = (layer.weight, layer.bias) if layer.dyna_dim[1] else (layer.weight,)
            size = _num_bytes(sources) * count // layer.num_heads
            if num_bytes + size <= self.max_bytes:
                self.num_slots[layer] = count
                num_bytes += size

    def get(
        self, layer: DynaLinear, groups, low_rank, with_full: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `DynaLinear._cut`; what an earlier call got is no longer valid."""
        is_full = len(groups) == layer.num_heads and not with_full
        if is_full or len(groups) > self.num_slots.get(layer, 0) or _is_captured(layer.weight):
            return layer._cut(groups, low_rank, with_full)
        sources = (layer.weight, layer.bias, *(factor for factors in low_rank for factor in factors[:2]))
        state = (_signature(sources), layer._merged_adapters, *(scale for *_, scale in low_rank))
        slots = self.slots.get(layer)
        if slots is None or slots.state != state:
            # Storage that a hook fills in for the length of the call is not the layer's own: nothing to keep.
            # Nor does a weight made in inference mode tell when it is written to.
            if _has_hooks(layer) or any(source is not None and source.is_inference() for source in sources):
                return layer._cut(groups, low_rank, with_full)
            slots = self._allocate(layer, slots)
            slots.state = state
            slots.sources = tuple(source.detach() for source in sources if source is not None)
        if slots.groups != groups:
            self._fill(slots, layer, groups, low_rank)
        return slots.cut

    def _allocate(self, layer: DynaLinear, slots: _Slots | None) -> _Slots:
        """Memory for a layer, or what it has, emptied."""
        num_slots, is_row, like = self.num_slots[layer], layer.dyna_dim[1], layer.weight
        width, other = (layer.out_features, layer.in_features) if is_row else (layer.in_features, layer.out_features)
        if slots is not None and (slots.weight.dtype, slots.weight.device) == (like.dtype, like.device):
            slots.groups = ()
            return slots
        if slots is not None:
            self.num_bytes -= _num_bytes((slots.weight, slots.bias))
            del self.slots[layer], slots
        with torch.inference_mode(False):  # else nothing could be written there outside of it
            weight = like.new_empty(num_slots, width // layer.num_heads, other)
            bias = layer.bias.new_empty(*weight.shape[:2]) if is_row and layer.bias is not None else None
        self.slots[layer] = _Slots(weight, bias)
        self.num_bytes += _num_bytes((weight, bias))
        return self.slots[layer]

    def _fill(self, slots: _Slots, layer: DynaLinear, groups, low_rank) -> None:
        is_row, bias = layer.dyna_dim[1], layer.bias
        old, slots.groups = slots.groups, ()  # until all of it is there: an error may end the loop
        for place, group in enumerate(groups):
            if place < len(old) and old[place] == group:
                continue
            weight, group_bias = layer._cut((group,), low_rank)
            slots.weight[place].copy_(weight if is_row else weight.t())
            if slots.bias is not None:
                slots.bias[place].copy_(group_bias)
        weight = slots.weight[: len(groups)].flatten(0, 1)
        if is_row and bias is not None:
            bias = slots.bias[: len(groups)].flatten()
        slots.cut = (weight if is_row else weight.t(), bias)
        slots.groups = groups


@dataclass
class _Plan:
    """A prepared trajectory."""

    timesteps: list[float]
    decisions: list[list[_BlockDecision]]  # by step and layer
    cut_weights: _CutWeights
    signature: tuple = ()
    class_labels: torch.Tensor | None = None
    label_signature: tuple = ()
    label_rows: torch.Tensor | None = None  # (B,): each sample's place among the distinct labels
    modulations: list[torch.Tensor] = field(default_factory=list)  # by layer, (S, num_labels, 6, D)
    noise_level: float | None = None
    step: int | None = None
    text: _Text | None = None  # that caption, keys and values were made of
    text_signature: tuple = ()
    caption: torch.Tensor | None = None  # (B, D), embedded
    keys_values: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # by layer


def _keep_places(sets: list[tuple[int, ...]], num_groups: int) -> list[tuple[int, ...]]:
    """Each set in an order in which as many groups as possible are at the place where the last cut set had them."""
    num_uses = Counter(group for groups in sets for group in groups)
    last, ordered = (), []
    for groups in sets:
        if len(groups) == num_groups:  # not cut, so in the layers' own order
            ordered.append(groups)
            continue
        if set(groups) != set(last):
            places = [group if group in groups else None for group in last[: len(groups)]]
            places += [None] * (len(groups) - len(places))
            # Of the others the one that is used most comes first: where sets shrink, the last places go.
            others = iter(sorted(set(groups) - set(places), key=lambda group: (-num_uses[group], group)))
            last = tuple(next(others) if group is None else group for group in places)
        ordered.append(last)
    return ordered


def _take(tensor: torch.Tensor, groups: tuple[int, ...], dim: int) -> torch.Tensor:
    # In whole runs of neighbours: less to copy one by one, no index to send to the device, and one run is only a view.
    starts = [i for i, group in enumerate(groups) if i == 0 or groups[i - 1] + 1 != group] + [len(groups)]
    runs = [tensor.narrow(dim, groups[i], end - i) for i, end in zip(starts, starts[1:], strict=False)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def _is_captured(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which would read what other calls put into the same memory."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _signature(tensors) -> tuple:
    """Changes when a tensor is replaced, cast, moved, or written in place (not through `.data`)."""
    return tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version)
        for tensor in tensors
        if tensor is not None
    )


# Adapters, quantisers and hooks around the layers


def _run_linear(
    layer: nn.Module, hidden_states: torch.Tensor, groups: tuple[int, ...] | None, with_gelu: bool = False
) -> torch.Tensor:
    """Calls a [`DynaLinear`], or what an adapter or a quantiser has put in its place, on some of its groups."""
    if isinstance(layer, DynaLinear):
        return layer(hidden_states, groups, with_gelu=with_gelu)
    if groups == COMPILED:
        return layer.base_layer(hidden_states, groups, with_gelu=with_gelu)
    if groups is not None and len(groups) < layer.base_layer.num_heads:
        return layer.base_layer(hidden_states, groups, _low_rank_factors(layer), with_gelu)
    hidden_states = layer(hidden_states)
    return F.gelu(hidden_states, approximate="tanh") if with_gelu else hidden_states


def _base_layer(layer: nn.Module) -> nn.Module:
    """The [`DynaLinear`] itself, under whatever adapter."""
    return layer if isinstance(layer, DynaLinear) else layer.base_layer


def _low_rank_factors(layer: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor, float]] | None:
    """The active factors of PEFT's LoRA around a [`DynaLinear`], or `None` for any other kind of layer."""
    if not isinstance(getattr(layer, "base_layer", None), DynaLinear):
        return None
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):  # AdaLoRA has parameters there
        return None
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward does
    layer.base_layer._merged_adapters = tuple(layer.merged_adapters)
    if layer.merged or layer.disable_adapters:
        return []
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    # A variant (DoRA and its like) or a bias of the adapter is more than a low-rank update of the weight.
    if any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in active):
        return None
    # Dropout acts on the input of the adapter, which a weight cannot hold.
    if layer.training and any(not isinstance(layer.lora_dropout[name], nn.Identity) for name in active):
        return None
    if any(_has_hooks(factors[name]) for name in active for factors in (layer.lora_A, layer.lora_B)):
        return None
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in active]


def _can_cut(layer: nn.Module) -> bool:
    if not isinstance(layer, DynaLinear):
        if _low_rank_factors(layer) is None:
            return False
        layer = layer.base_layer
    return type(layer.weight.data) is torch.Tensor  # quantised weights are subclasses


def _has_hooks(module: nn.Module) -> bool:
    """Whether offloading or layerwise casting fills in the module's weights only while it runs."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (registry is not None and not WEIGHT_HOOKS.isdisjoint(registry.hooks))


def _is_plain(layer: nn.Module) -> bool:
    """Whether what a layer computes changes with its weights alone, and these not without a trace (`_signature`)."""
    plain = (nn.Linear, nn.Embedding, nn.LayerNorm, RMSNorm, DynaLinear, DynaDenseLinear, DynaFloat32Linear)
    return (
        type(layer) in plain
        and type(layer.weight.data) is torch.Tensor  # quantised weights are subclasses
        and not layer.weight.is_inference()
        and not _has_hooks(layer)
    )
