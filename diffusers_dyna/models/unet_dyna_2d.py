# SPDX-License-Identifier: Apache-2.0
"""A class-conditional U-Net on pixels, in one file that also works when copied alone into a Hub repository."""

import torch
from torch import nn

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import logging


logger = logging.get_logger(__name__)


class DynaUNetAttnProcessor:
    """Multi-head self-attention over the pixels of a feature map, through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "DynaUNetAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        query = query.unflatten(-1, (attn.heads, -1))  # (B, N, heads, C / heads)
        key = key.unflatten(-1, (attn.heads, -1))
        value = value.unflatten(-1, (attn.heads, -1))

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)  # (B, N, C)
        return attn.to_out[0](hidden_states)


class DynaUNetAttention(nn.Module, AttentionModuleMixin):
    """
    GroupNorm, self-attention over all positions, residual. Shape in = shape out = `(batch_size, channels, H, W)`.

    Args:
        channels (`int`): width of the feature map.
        heads (`int`): attention heads; must divide `channels`.
        norm_num_groups (`int`): groups of the GroupNorm.
        norm_eps (`float`): epsilon of the GroupNorm.
    """

    _default_processor_cls = DynaUNetAttnProcessor
    _available_processors = [DynaUNetAttnProcessor]

    def __init__(self, channels: int, heads: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.use_bias = True  # read by `fuse_projections`
        self.group_norm = nn.GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        # A 1x1 convolution on the map is a Linear on the tokens.
        hidden_states = self.group_norm(hidden_states).flatten(2).transpose(1, 2)  # (B, H * W, C)
        hidden_states = self.processor(self, hidden_states)
        return residual + hidden_states.transpose(1, 2).reshape(residual.shape)


class DynaResnetBlock2D(ResnetBlock2D):
    """
    diffusers' residual block with its parameters, and with less traffic through memory: no copy to another memory
    format before the shortcut, no division by a scale of 1. `examples/benchmark.py` shows what that and channels-last
    maps gain over `UNet2DModel`.
    """

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(self.nonlinearity(self.norm1(hidden_states)))
        hidden_states = hidden_states + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden_states = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden_states))))
        return residual + hidden_states


class DynaDownBlock2D(nn.Module):
    """One level of the encoder. Returns its output and the list of feature maps that the decoder concatenates."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], downsampler: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler is not None else [])

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states, temb)
            if self.attentions:
                hidden_states = self.attentions[i](hidden_states)
            skips.append(hidden_states)
        for downsampler in self.downsamplers:
            hidden_states = downsampler(hidden_states)
            skips.append(hidden_states)
        return hidden_states, skips


class DynaMidBlock2D(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, resnets: list[nn.Module], attention: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention])

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnets[0](hidden_states, temb)
        hidden_states = self.attentions[0](hidden_states)
        return self.resnets[1](hidden_states, temb)


class DynaUpBlock2D(nn.Module):
    """One level of the decoder: every residual block first concatenates the skip that it is given."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], upsampler: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([upsampler] if upsampler is not None else [])

    def forward(self, hidden_states: torch.Tensor, skips: list[torch.Tensor], temb: torch.Tensor) -> torch.Tensor:
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            hidden_states = resnet(torch.cat([hidden_states, skip], dim=1), temb)
            if self.attentions:
                hidden_states = self.attentions[i](hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(hidden_states)
        return hidden_states


class DynaUNet2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    r"""
    A U-Net that predicts noise (DDPM, [arXiv 2006.11239](https://huggingface.co/papers/2006.11239)) or velocity (flow
    matching, [arXiv 2210.02747](https://huggingface.co/papers/2210.02747)) with the shape of its input, unconditional
    or conditioned on a class.

    With no argument it is the reference configuration for CIFAR-10, unconditional: 3 x 32 x 32, three levels of 64, 128
    and 256 channels, attention at 8 x 8. `num_classes=10` adds the classes. Parameter names are those of [`diffusers.UNet2DModel`].

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to `32`):
            Height and width in pixels. Other sizes work as long as every level divides them.
        in_channels (`int`, defaults to `3`): channels of the input.
        out_channels (`int`, defaults to `3`): channels of the output.
        base_channels (`int`, defaults to `64`): width of the first level.
        channel_mults (`tuple[int, ...]`, defaults to `(1, 2, 4)`):
            Width of each level as a multiple of `base_channels`; the resolution halves from one level to the next.
        num_res_blocks (`int`, defaults to `2`): residual blocks a level in the encoder; the decoder has one more.
        attention_resolutions (`tuple[int, ...]`, defaults to `(8,)`):
            Feature map sizes (the larger side, at `sample_size`) that are followed by self-attention. The middle
            block always has it.
        num_attention_heads (`int`, defaults to `4`): heads of every attention layer.
        dropout (`float`, defaults to `0.0`): dropout before the second convolution of each residual block.
        num_classes (`int`, *optional*): number of classes, labels `0 ... num_classes - 1`. `None` is unconditional.
        class_dropout_prob (`float`, defaults to `0.0`):
            Share of labels replaced by the null class in training mode, for classifier-free guidance
            ([arXiv 2207.12598](https://huggingface.co/papers/2207.12598)). Above 0 the class table has one more row,
            and `num_classes` is the label of the null class.
        time_embed_dim (`int`, *optional*, defaults to `4 * base_channels`):
            Width of the sinusoidal features and of the time and class embeddings.
        norm_num_groups (`int`, defaults to `32`): groups of every GroupNorm; must divide the width of every level.
        norm_eps (`float`, defaults to `1e-5`): epsilon of every GroupNorm.

    Raises:
        `ValueError`: where the sizes do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DynaResnetBlock2D", "DynaUNetAttention"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 64,
        channel_mults: tuple[int, ...] = (1, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (8,),
        num_attention_heads: int = 4,
        dropout: float = 0.0,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.0,
        time_embed_dim: int | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        channels = [base_channels * mult for mult in channel_mults]
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        resolutions = [max(height, width) // 2**level for level in range(len(channels))]
        with_attention = [resolution in attention_resolutions for resolution in resolutions]
        self._check_config(height, width, channels, with_attention)
        for resolution in sorted(set(attention_resolutions) - set(resolutions)):
            logger.warning(
                f"`attention_resolutions` asks for attention at {resolution}, but with `sample_size`={sample_size} the "
                f"feature maps are {resolutions}: no attention is added there."
            )

        time_embed_dim = 4 * base_channels if time_embed_dim is None else time_embed_dim
        self.time_proj = Timesteps(time_embed_dim, flip_sin_to_cos=False, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_embed_dim, time_embed_dim)
        self.class_embedding = None
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + (class_dropout_prob > 0), time_embed_dim)

        def resnet(in_width, out_width):
            return DynaResnetBlock2D(
                in_channels=in_width,
                out_channels=out_width,
                temb_channels=time_embed_dim,
                groups=norm_num_groups,
                eps=norm_eps,
                dropout=dropout,
            )

        def attention(width):
            return DynaUNetAttention(width, num_attention_heads, norm_num_groups, norm_eps)

        self.conv_in = nn.Conv2d(in_channels, channels[0], kernel_size=3, padding=1)

        last_level = len(channels) - 1
        skip_widths = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            self.down_blocks.append(
                DynaDownBlock2D(
                    [resnet(width if i else skip_widths[-1], width) for i in range(num_res_blocks)],
                    [attention(width) for _ in range(num_res_blocks) if with_attention[level]],
                    Downsample2D(width, use_conv=True, padding=1, name="op") if level < last_level else None,
                )
            )
            skip_widths += [width] * (num_res_blocks + (level < last_level))

        self.mid_block = DynaMidBlock2D(
            [resnet(channels[-1], channels[-1]) for _ in range(2)], attention(channels[-1])
        )

        self.up_blocks = nn.ModuleList()
        hidden_width = channels[-1]
        for level in reversed(range(len(channels))):
            resnets = []
            for _ in range(num_res_blocks + 1):
                resnets.append(resnet(hidden_width + skip_widths.pop(), channels[level]))
                hidden_width = channels[level]
            self.up_blocks.append(
                DynaUpBlock2D(
                    resnets,
                    [attention(hidden_width) for _ in resnets if with_attention[level]],
                    Upsample2D(hidden_width, use_conv=True) if level > 0 else None,
                )
            )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], out_channels, kernel_size=3, padding=1)

        self.gradient_checkpointing = False

    def _check_config(self, height: int, width: int, channels: list[int], with_attention: list[bool]) -> None:
        config = self.config
        factor = 2 ** (len(channels) - 1)
        if not channels or config.num_res_blocks < 1:
            raise ValueError(
                f"`channel_mults`={config.channel_mults} and `num_res_blocks`={config.num_res_blocks} leave no layer: "
                "both need at least one."
            )
        if height % factor or width % factor:
            raise ValueError(
                f"`sample_size`={config.sample_size} must be divisible by {factor}, since {len(channels)} levels halve "
                f"it {len(channels) - 1} times. Use fewer `channel_mults` or another size."
            )
        for level, level_width in enumerate(channels):
            if config.norm_num_groups < 1 or level_width < 1 or level_width % config.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups`={config.norm_num_groups} must divide the width of every level, but level "
                    f"{level} is `base_channels` * {config.channel_mults[level]} = {level_width} wide."
                )
            has_attention = with_attention[level] or level == len(channels) - 1
            if has_attention and (config.num_attention_heads < 1 or level_width % config.num_attention_heads):
                raise ValueError(
                    f"`num_attention_heads`={config.num_attention_heads} must divide the width {level_width} of "
                    f"level {level}, which has attention."
                )
        if config.num_classes is not None and config.num_classes < 1:
            raise ValueError(
                f"`num_classes`={config.num_classes} must be at least 1, or None for an unconditional model."
            )
        if not 0 <= config.class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob`={config.class_dropout_prob} must be in [0, 1].")
        if config.num_classes is None and config.class_dropout_prob > 0:
            raise ValueError(
                f"`class_dropout_prob`={config.class_dropout_prob} needs `num_classes`: an unconditional model has no "
                "label to drop."
            )

    @property
    def null_class_label(self) -> int | None:
        """The label of the null class, `num_classes`, or `None` for a model that has none."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        class_dropout_mask: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): noisy images.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, `float` or `int`):
                Flow time in [0, 1000], 1000 is pure noise; or the step of a discrete diffusion schedule.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Integer labels in [0, num_classes), or `num_classes` for the null class. `None` on a model with a null
                class means the null class for all.
            return_dict (`bool`, *optional*, defaults to `True`): return a `UNet2DOutput` instead of a tuple.
            class_dropout_mask (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Boolean, True where the label is replaced by the null class. `None` draws it with
                `class_dropout_prob` in training mode and drops nothing in evaluation mode.

        Returns:
            [`~diffusers.models.unets.unet_2d.UNet2DOutput`] with `sample` of shape `(batch_size, out_channels,
            height, width)`, or a tuple that holds it.

        Raises:
            `ValueError`: on a size, timestep or label that does not fit the model.
        """
        batch_size = sample.shape[0]
        self._check_sample(sample)

        # 1. Time and class
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, dtype=torch.float32, device=sample.device)
        if timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(
                f"`timestep` must be a number or have shape ({batch_size},), one time per sample, but it has shape "
                f"{tuple(timestep.shape)}."
            )
        temb = self.time_proj(timestep.to(sample.device).expand(batch_size)).to(sample.dtype)
        temb = self.time_embedding(temb)  # (B, time_embed_dim)
        class_labels = self._prepare_class_labels(class_labels, class_dropout_mask, batch_size, sample.device)
        if class_labels is not None:
            temb = temb + self.class_embedding(class_labels).to(temb.dtype)

        # 2. Encoder. Channels-last maps run faster on CPU, and the attention layers' reshapes are views of them.
        hidden_states = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states, block_skips = self._run(block, hidden_states, temb)
            skips += block_skips

        # 3. Middle
        hidden_states = self._run(self.mid_block, hidden_states, temb)

        # 4. Decoder: every residual block takes the skip that was stored last.
        for block in self.up_blocks:
            block_skips = [skips.pop() for _ in block.resnets]
            hidden_states = self._run(block, hidden_states, block_skips, temb)

        # 5. Head
        hidden_states = self.conv_act(self.conv_norm_out(hidden_states))
        hidden_states = self.conv_out(hidden_states).contiguous()

        if not return_dict:
            return (hidden_states,)
        return UNet2DOutput(sample=hidden_states)

    def _run(self, block: nn.Module, *args):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _check_sample(self, sample: torch.Tensor) -> None:
        factor = 2 ** (len(self.config.channel_mults) - 1)
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`sample` must have shape (batch_size, {self.config.in_channels}, height, width), but it has shape "
                f"{tuple(sample.shape)}."
            )
        if sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"The height and width of `sample`, {tuple(sample.shape[2:])}, must be divisible by {factor}, since "
                f"the model halves them {len(self.config.channel_mults) - 1} times."
            )

    def _prepare_class_labels(
        self, class_labels: torch.Tensor | None, dropout_mask: torch.Tensor | None, batch_size: int, device
    ) -> torch.Tensor | None:
        null_label = self.null_class_label
        if dropout_mask is not None:
            if null_label is None:
                raise ValueError("`class_dropout_mask` was given, but the model has no null class to replace labels.")
            if dropout_mask.shape != (batch_size,) or dropout_mask.dtype != torch.bool:
                raise ValueError(
                    f"`class_dropout_mask` must be boolean of shape ({batch_size},), one entry per sample, but it is "
                    f"{dropout_mask.dtype} of shape {tuple(dropout_mask.shape)}."
                )
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
        if dropout_mask is None and self.training and null_label is not None:
            dropout_mask = torch.rand(batch_size, device=device) < self.config.class_dropout_prob
        if dropout_mask is not None:
            class_labels = torch.where(dropout_mask.to(device), null_label, class_labels)
        return class_labels
