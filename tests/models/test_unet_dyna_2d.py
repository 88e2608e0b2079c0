# SPDX-License-Identifier: Apache-2.0
"""
`DynaUNet2DModel` against its specification (every shape, the sinusoid, attention, the residual block written out by
hand), against `diffusers.UNet2DModel` with the same weights, and with every tool that diffusers offers for a model.
"""

import copy
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F

from diffusers import AutoModel, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_dyna import DynaUNet2DModel
from diffusers_dyna.models.unet_dyna_2d import DynaUNetAttention, DynaUNetAttnProcessor

from ..testing_utils import TINY_UNET, UNCONDITIONAL, logged_warnings, randn, randomize_, tiny_unet


# Two orders of summation of the same float32 products, through about twenty layers with values of order 1.
# Two calls of one model agree up to rounding: where the allocator puts a tensor decides which kernel its products take.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def inputs(batch_size: int = 2, conditional: bool = True) -> dict:
    result = {"sample": randn(batch_size, 3, 8, 8), "timestep": torch.linspace(950.5, 3.25, batch_size)}
    if conditional:
        result["class_labels"] = torch.arange(batch_size) % 3
    return result


def loss(model: torch.nn.Module, **overrides) -> torch.Tensor:
    output = model(**{**inputs(), **overrides}).sample
    return (output * randn(*output.shape, seed=5)).sum()


# The specification, line by line


@pytest.fixture(scope="module")
def reference_trace():
    """Shapes of the inputs and the output of every module of the reference configuration, at B = 4 with 10 classes."""
    model = DynaUNet2DModel(num_classes=10).eval()
    trace = {}

    def record(name):
        def hook(module, args, output):
            shapes = [tuple(arg.shape) for arg in args if torch.is_tensor(arg)]
            first = output[0] if isinstance(output, tuple) else output
            trace[name] = (*shapes, tuple(first.shape)) if torch.is_tensor(first) else None

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        output = model(randn(4, 3, 32, 32), torch.tensor([1.0, 250.5, 745.3, 1000.0]), torch.tensor([0, 3, 9, 9]))
    return model, trace, output


def test_reference_configuration():
    config = DynaUNet2DModel().config
    assert (config.sample_size, config.in_channels, config.out_channels) == (32, 3, 3)
    assert (config.base_channels, tuple(config.channel_mults), config.num_res_blocks) == (64, (1, 2, 4), 2)
    assert tuple(config.attention_resolutions) == (8,)
    assert (config.num_classes, config.class_dropout_prob, config.dropout) == (None, 0.0, 0.0)


def test_reference_embeddings(reference_trace):
    model, trace, _ = reference_trace
    assert trace["time_proj"] == ((4,), (4, 256))
    assert trace["time_embedding.linear_1"] == ((4, 256), (4, 256))
    assert trace["time_embedding.linear_2"] == ((4, 256), (4, 256))
    assert isinstance(model.time_embedding.act, torch.nn.SiLU)
    assert trace["class_embedding"] == ((4,), (4, 256))
    assert model.class_embedding.weight.shape == (10, 256)
    # one more row for the null class, and no table at all without classes
    assert DynaUNet2DModel(num_classes=10, class_dropout_prob=0.1).class_embedding.weight.shape == (11, 256)
    assert DynaUNet2DModel().class_embedding is None


def test_reference_encoder(reference_trace):
    model, trace, _ = reference_trace
    temb = (4, 256)
    assert trace["conv_in"] == ((4, 3, 32, 32), (4, 64, 32, 32))
    assert trace["down_blocks.0.resnets.0"] == ((4, 64, 32, 32), temb, (4, 64, 32, 32))
    assert trace["down_blocks.0.resnets.1"] == ((4, 64, 32, 32), temb, (4, 64, 32, 32))
    assert trace["down_blocks.0.downsamplers.0"] == ((4, 64, 32, 32), (4, 64, 16, 16))
    assert trace["down_blocks.1.resnets.0"] == ((4, 64, 16, 16), temb, (4, 128, 16, 16))
    assert trace["down_blocks.1.resnets.1"] == ((4, 128, 16, 16), temb, (4, 128, 16, 16))
    assert trace["down_blocks.1.downsamplers.0"] == ((4, 128, 16, 16), (4, 128, 8, 8))
    assert trace["down_blocks.2.resnets.0"] == ((4, 128, 8, 8), temb, (4, 256, 8, 8))
    assert trace["down_blocks.2.attentions.0"] == ((4, 256, 8, 8), (4, 256, 8, 8))
    assert trace["down_blocks.2.resnets.1"] == ((4, 256, 8, 8), temb, (4, 256, 8, 8))
    assert trace["down_blocks.2.attentions.1"] == ((4, 256, 8, 8), (4, 256, 8, 8))
    assert [len(block.downsamplers) for block in model.down_blocks] == [1, 1, 0]
    for block in model.down_blocks[:2]:
        conv = block.downsamplers[0].conv
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))
    # 1x1 convolutions exactly where the channels change
    shortcuts = [resnet.conv_shortcut is not None for block in model.down_blocks for resnet in block.resnets]
    assert shortcuts == [False, False, True, False, True, False]
    assert model.down_blocks[1].resnets[0].conv_shortcut.kernel_size == (1, 1)


def test_reference_middle(reference_trace):
    _, trace, _ = reference_trace
    for name in ("resnets.0", "resnets.1"):
        assert trace[f"mid_block.{name}"] == ((4, 256, 8, 8), (4, 256), (4, 256, 8, 8))
    assert trace["mid_block.attentions.0"] == ((4, 256, 8, 8), (4, 256, 8, 8))


def test_reference_decoder(reference_trace):
    """Three residual blocks a level; the width in is the one below plus the skip: conv_in's, a block's, a downsample's."""
    model, trace, _ = reference_trace
    expected = {
        0: [(256 + 256, 256, 8), (256 + 256, 256, 8), (256 + 128, 256, 8)],
        1: [(256 + 128, 128, 16), (128 + 128, 128, 16), (128 + 64, 128, 16)],
        2: [(128 + 64, 64, 32), (64 + 64, 64, 32), (64 + 64, 64, 32)],
    }
    for level, blocks in expected.items():
        assert len(model.up_blocks[level].resnets) == 3
        for i, (width_in, width_out, size) in enumerate(blocks):
            shapes = ((4, width_in, size, size), (4, 256), (4, width_out, size, size))
            assert trace[f"up_blocks.{level}.resnets.{i}"] == shapes
            assert model.up_blocks[level].resnets[i].conv_shortcut is not None
    for i in range(3):
        assert trace[f"up_blocks.0.attentions.{i}"] == ((4, 256, 8, 8), (4, 256, 8, 8))
    assert trace["up_blocks.0.upsamplers.0"] == ((4, 256, 8, 8), (4, 256, 16, 16))
    assert trace["up_blocks.1.upsamplers.0"] == ((4, 128, 16, 16), (4, 128, 32, 32))
    assert [len(block.upsamplers) for block in model.up_blocks] == [1, 1, 0]


def test_reference_attention_and_head(reference_trace):
    model, trace, output = reference_trace
    attentions = [name for name, module in model.named_modules() if isinstance(module, DynaUNetAttention)]
    assert len(attentions) == 2 + 1 + 3
    assert all(name.startswith(("down_blocks.2.", "mid_block.", "up_blocks.0.")) for name in attentions)
    assert trace["conv_norm_out"] == ((4, 64, 32, 32), (4, 64, 32, 32))
    assert trace["conv_out"] == ((4, 64, 32, 32), (4, 3, 32, 32))
    assert isinstance(output, UNet2DOutput) and output.sample.shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    "resolutions, levels, count",
    [((), [], 1), ((8,), [2], 6), ((16, 8), [1, 2], 11), ((32, 16, 8), [0, 1, 2], 16), ((16,), [1], 6)],
)
def test_attention_resolutions(resolutions, levels, count):
    """The middle always has attention; a level of two blocks adds two in the encoder and three in the decoder."""
    config = {**TINY_UNET, "sample_size": 32, "channel_mults": (1, 2, 4), "num_res_blocks": 2}
    model = DynaUNet2DModel(**{**config, "attention_resolutions": resolutions}).eval()
    assert [level for level, block in enumerate(model.down_blocks) if len(block.attentions)] == levels
    assert [2 - level for level, block in enumerate(model.up_blocks) if len(block.attentions)][::-1] == levels
    assert len(model.attn_processors) == count
    with torch.no_grad():
        assert model(randn(1, 3, 32, 32), 500.0).sample.shape == (1, 3, 32, 32)


def test_attention_resolution_that_no_level_has():
    with logged_warnings() as warnings:
        DynaUNet2DModel(**{**TINY_UNET, "attention_resolutions": (4, 7)})
    assert len(warnings) == 1
    assert "`attention_resolutions` asks for attention at 7" in warnings[0] and "[8, 4]" in warnings[0]


@pytest.mark.parametrize("width", [256, 32])
def test_sinusoid_is_the_closed_formula(width):
    model = tiny_unet(time_embed_dim=width)
    seen = []
    model.time_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    timesteps = torch.tensor([0.0, 1.0, 254.5, 745.3, 1000.0])
    with torch.no_grad():
        model(randn(5, 3, 8, 8), timesteps)
    angles = [[t * 10000 ** (-i / (width // 2)) for i in range(width // 2)] for t in timesteps.tolist()]
    expected = torch.tensor([[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles])
    # an angle up to 1000 in float32 is off by a few roundings of 6e-5
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=2e-4)
    assert seen[0].shape == (5, width)


def test_attention_is_the_written_formula():
    """GroupNorm, q, k, v, softmax(q k^T / sqrt(d)) v per head, projection, residual."""
    torch.manual_seed(0)
    layer = randomize_(DynaUNetAttention(channels=12, heads=3, norm_num_groups=4, norm_eps=1e-5))
    hidden_states = randn(2, 12, 3, 5)
    normed = F.group_norm(hidden_states, 4, layer.group_norm.weight, layer.group_norm.bias, 1e-5)
    tokens = normed.reshape(2, 12, 15).permute(0, 2, 1)
    heads = []
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        query, key, value = (
            tokens @ linear.weight[rows].T + linear.bias[rows] for linear in (layer.to_q, layer.to_k, layer.to_v)
        )
        heads.append(torch.softmax(query @ key.transpose(1, 2) / math.sqrt(4), dim=-1) @ value)
    out = torch.cat(heads, dim=-1) @ layer.to_out[0].weight.T + layer.to_out[0].bias
    expected = hidden_states + out.permute(0, 2, 1).reshape(2, 12, 3, 5)
    assert (expected - hidden_states).abs().max() > 0.1
    # two orders of summation over 15 tokens
    torch.testing.assert_close(layer(hidden_states), expected, rtol=1e-5, atol=1e-6)


def test_residual_block_is_the_written_formula():
    model = tiny_unet(norm_eps=1e-3)
    block = model.down_blocks[1].resnets[0]  # 8 -> 16 channels
    hidden_states, temb = randn(2, 8, 4, 4), randn(2, 32, seed=1)

    out = F.silu(F.group_norm(hidden_states, 4, block.norm1.weight, block.norm1.bias, 1e-3))
    out = F.conv2d(out, block.conv1.weight, block.conv1.bias, padding=1)
    out = out + F.linear(F.silu(temb), block.time_emb_proj.weight, block.time_emb_proj.bias)[:, :, None, None]
    out = F.silu(F.group_norm(out, 4, block.norm2.weight, block.norm2.bias, 1e-3))
    out = F.conv2d(out, block.conv2.weight, block.conv2.bias, padding=1)
    skip = F.conv2d(hidden_states, block.conv_shortcut.weight, block.conv_shortcut.bias)
    torch.testing.assert_close(block(hidden_states, temb), skip + out, rtol=1e-5, atol=1e-5)


def test_upsample_is_nearest_then_convolution():
    block = tiny_unet().up_blocks[0].upsamplers[0]
    hidden_states = randn(2, 16, 4, 4)
    expected = hidden_states.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(expected, block.conv.weight, block.conv.bias, padding=1)
    torch.testing.assert_close(block(hidden_states), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_in_every_residual_block_and_only_in_training():
    model = tiny_unet(dropout=0.5, **UNCONDITIONAL)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
    with torch.no_grad():
        first, second = (model(**inputs(conditional=False)).sample for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        dropped = model(**inputs(conditional=False)).sample
    assert (dropped - first).abs().max() > 1e-3


# diffusers.UNet2DModel as oracle


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(
    "overrides, head_dim",
    [
        ({}, 8),
        ({"num_res_blocks": 2, "sample_size": 16, "channel_mults": (1, 2, 4), "num_attention_heads": 4}, 8),
        # several widths with attention: the width of a head is the width of its level, so one head
        ({"attention_resolutions": (8, 4), "num_attention_heads": 1, "num_res_blocks": 2}, None),
        ({"in_channels": 1, "out_channels": 2, "channel_mults": (2, 1, 3), "attention_resolutions": ()}, 12),
    ],
    ids=["two levels", "three levels", "attention at two levels", "uneven widths"],
)
def test_equals_unet2d_model_from_the_embedding_on(overrides, head_dim, num_classes):
    model = tiny_unet(num_classes=num_classes, class_dropout_prob=0.0, norm_eps=1e-4, **overrides)
    config = model.config
    with_attention = [len(block.attentions) > 0 for block in model.down_blocks]
    oracle = UNet2DModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=[8 * mult for mult in config.channel_mults],
        layers_per_block=config.num_res_blocks,
        time_embedding_dim=32,
        down_block_types=["AttnDownBlock2D" if attention else "DownBlock2D" for attention in with_attention],
        up_block_types=["AttnUpBlock2D" if attention else "UpBlock2D" for attention in with_attention[::-1]],
        attention_head_dim=head_dim,
        norm_num_groups=4,
        norm_eps=1e-4,
        num_class_embeds=num_classes,
    ).eval()
    # The sinusoids differ by design, [sin, cos] at width 32 and [cos, sin] at width 8: the oracle is given ours.
    oracle.time_proj = model.time_proj
    oracle.time_embedding = copy.deepcopy(model.time_embedding)
    # strict: every parameter has the same name and shape in both
    oracle.load_state_dict(model.state_dict(), strict=True)

    arguments = inputs(batch_size=3, conditional=num_classes is not None)
    arguments["sample"] = randn(3, config.in_channels, config.sample_size, config.sample_size)
    with torch.no_grad():
        expected = oracle(**arguments).sample
        actual = model(**arguments).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, **CLOSE)


# What a model of diffusers does


@pytest.mark.parametrize(
    "overrides",
    [{}, UNCONDITIONAL, {"sample_size": (8, 16), "attention_resolutions": (8,)}],
    ids=["classes", "none", "wide"],
)
def test_save_and_load(overrides, tmp_path):
    model = tiny_unet(**overrides)
    arguments = inputs(conditional=model.config.num_classes is not None)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    with logged_warnings() as warnings:
        loaded = DynaUNet2DModel.from_pretrained(tmp_path)
        auto = AutoModel.from_pretrained(str(tmp_path))
    assert warnings == []
    assert not loaded.training and type(auto) is DynaUNet2DModel

    state, expected_state = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
    with torch.no_grad():
        assert torch.equal(loaded(**arguments).sample, model(**arguments).sample)

    # a model built from the saved values alone is the same, and saves the same file
    config = json.loads((tmp_path / "config.json").read_text())
    fresh = DynaUNet2DModel(**{name: value for name, value in config.items() if not name.startswith("_")})
    fresh.load_state_dict(expected_state, strict=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**arguments).sample, model(**arguments).sample)
    fresh.save_config(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_config_has_every_argument_and_from_config_accepts_it():
    model = tiny_unet()
    names = set(inspect.signature(DynaUNet2DModel.__init__).parameters) - {"self"}
    assert names == {name for name in model.config if not name.startswith("_")}
    assert DynaUNet2DModel.from_config(model.config).config == model.config


def test_sharded_save_and_load(tmp_path):
    model = tiny_unet()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DynaUNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).sample, model(**inputs()).sample)


def test_load_in_bfloat16(tmp_path):
    model = tiny_unet()
    model.save_pretrained(tmp_path)
    loaded = DynaUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    arguments = {**inputs(), "sample": inputs()["sample"].bfloat16()}
    with torch.no_grad():
        actual = loaded(**arguments).sample
        expected = model(**inputs()).sample
    assert actual.dtype == torch.bfloat16
    # bfloat16 rounds by 2^-9 in each of about twenty layers
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    assert expected.abs().max() > 0.5


def test_device_map(tmp_path):
    model = tiny_unet()
    model.save_pretrained(tmp_path)
    # "auto" spreads the layers over what is there; without an accelerator all of them stay on the CPU
    loaded = DynaUNet2DModel.from_pretrained(tmp_path, device_map="auto")
    arguments = {name: value.to(loaded.device) for name, value in inputs().items()}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**arguments).sample.cpu(), model(**inputs()).sample, **CLOSE)


def test_dict_equals_tuple_and_input_is_untouched():
    model, arguments = tiny_unet(), inputs()
    copies = {name: value.clone() for name, value in arguments.items()}
    with torch.no_grad():
        output = model(**arguments)
        result = model(**arguments, return_dict=False)
    assert isinstance(output, UNet2DOutput) and isinstance(result, tuple) and len(result) == 1
    assert torch.equal(output.sample, result[0])  # the same call twice: deterministic
    assert all(torch.equal(arguments[name], copies[name]) for name in copies)
    assert output.sample.is_contiguous()


def test_positional_arguments_are_those_of_unet2d_model():
    ours = list(inspect.signature(DynaUNet2DModel.forward).parameters)
    theirs = list(inspect.signature(UNet2DModel.forward).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("batch_size", [2, 5, 65])
def test_one_image_is_its_row_of_a_batch(batch_size):
    """65, since diffusers' upsampling takes another way from 64 on."""
    model, arguments = tiny_unet(), inputs(batch_size)
    with torch.no_grad():
        batch = model(**arguments).sample
        for i in (0, batch_size - 1):
            row = model(**{name: value[i : i + 1] for name, value in arguments.items()}).sample
            torch.testing.assert_close(batch[i : i + 1], row, **CLOSE)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_gradient_reaches_every_parameter():
    model = tiny_unet().train()
    loss(model, class_dropout_mask=torch.tensor([True, False])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias of the keys moves all scores of a query alike: softmax does not see it
    assert [name for name in without if not name.endswith("to_k.bias")] == []
    rows = model.class_embedding.weight.grad.abs().sum(dim=1)
    assert (rows > 0).tolist() == [False, True, False, True]  # labels 0 (dropped: the null class, 3) and 1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing(dropout):
    """The same loss and gradients, dropout included, from fewer stored activations."""
    gradients, stored = [], []
    for enabled in (False, True):
        model = tiny_unet(dropout=dropout).train()
        if enabled:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == enabled
        sizes = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            value = loss(model, class_dropout_mask=torch.tensor([True, False]))
        value.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | {"loss": value.detach()})
        stored.append(sum(sizes))
    assert stored[1] < 0.5 * stored[0]
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_gradient_checkpointing_can_be_turned_off():
    model = tiny_unet()
    model.enable_gradient_checkpointing()
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training):
    torch.compiler.reset()
    model = tiny_unet().train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    arguments = inputs()
    if training:
        arguments["class_dropout_mask"] = torch.tensor([True, False])
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arguments).sample, model(**arguments).sample, **CLOSE)


# Attention: processors, backends, fused projections


class CountingProcessor:
    """The default processor with doubled values."""

    _attention_backend = None
    _parallel_config = None
    calls = 0

    def __call__(self, attn, hidden_states):
        type(self).calls += 1
        return 2 * DynaUNetAttnProcessor()(attn, hidden_states)


def test_attention_processors():
    model = tiny_unet()
    processors = model.attn_processors
    assert len(processors) == 1 + 1 + 2
    assert "mid_block.attentions.0.processor" in processors
    assert all(isinstance(processor, DynaUNetAttnProcessor) for processor in processors.values())
    with torch.no_grad():
        expected = model(**inputs()).sample
        CountingProcessor.calls = 0
        model.set_attn_processor(CountingProcessor())
        changed = model(**inputs()).sample
        assert CountingProcessor.calls == 4
        assert (changed - expected).abs().max() > 1e-3
        model.set_attn_processor({name: DynaUNetAttnProcessor() for name in processors})
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)


def test_attention_backends(monkeypatch):
    """The processor asks diffusers' dispatch, with the backend that was set."""
    from diffusers_dyna.models import unet_dyna_2d

    asked = []

    def dispatch(query, key, value, *args, **kwargs):
        asked.append((kwargs["backend"], tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        return original(query, key, value, *args, **kwargs)

    original = unet_dyna_2d.dispatch_attention_fn
    monkeypatch.setattr(unet_dyna_2d, "dispatch_attention_fn", dispatch)
    model = tiny_unet()
    with torch.no_grad():
        expected = model(**inputs()).sample
        model.set_attention_backend("_native_math")
        actual = model(**inputs()).sample
        model.set_attention_backend("native")
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)
        model.reset_attention_backend()
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)
    torch.testing.assert_close(actual, expected, **CLOSE)
    # 16 tokens, 2 heads of 8, as (B, N, heads, d), in four layers a call
    assert {shapes for _, *rest in asked for shapes in rest} == {(2, 16, 2, 8)}
    assert [getattr(backend, "value", backend) for backend, *_ in asked[::4]] == [None, "_native_math", "native", None]
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("no such backend")


def test_fused_projections():
    model = tiny_unet()
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(**inputs()).sample
        model.fuse_qkv_projections()
        layers = [module for module in model.modules() if isinstance(module, DynaUNetAttention)]
        assert len(layers) == 4
        assert all(layer.fused_projections and layer.to_qkv.weight.shape == (48, 16) for layer in layers)
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)
        # the fused product is what runs: the three single ones no longer matter
        query = layers[0].to_q.weight.clone()
        layers[0].to_q.weight.zero_()
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)
        layers[0].to_q.weight.copy_(query)
        model.unfuse_qkv_projections()
        assert list(model.state_dict()) == names
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)


# LoRA, casting, offloading


def lora_layers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_unet()
    with torch.no_grad():
        expected = model(**inputs()).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets), adapter_name="style")
    layers = lora_layers(model)
    assert len(layers) == 2 * (4 * 4 + 2 * (2 + 2 + 4))  # A and B of 4 attention layers and 8 residual blocks
    assert {p.requires_grad for p in layers.values()} == {True}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)  # B starts at 0
        for i, (name, parameter) in enumerate(layers.items()):
            if "lora_B" in name:
                parameter.copy_(0.3 * randn(*parameter.shape, seed=i))
        changed = model(**inputs()).sample
        assert (changed - expected).abs().max() > 0.01
        model.disable_adapters()
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)
        model.enable_adapters()
        torch.testing.assert_close(model(**inputs()).sample, changed, **CLOSE)
        model.set_adapters("style", weights=0.0)
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)

        model.set_adapters("style", weights=1.0)
        model.save_lora_adapter(tmp_path, adapter_name="style")
        other = tiny_unet()
        other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
        loaded = lora_layers(other)
        assert len(loaded) == len(layers)
        torch.testing.assert_close(other(**inputs()).sample, changed, **CLOSE)

        model.delete_adapters("style")
        assert lora_layers(model) == {}
        torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)


def test_lora_gradients_reach_every_adapter():
    peft = pytest.importorskip("peft")
    model = tiny_unet().train()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.enable_gradient_checkpointing()
    loss(model, class_dropout_mask=torch.tensor([True, False])).backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_layerwise_casting():
    """Stored in 8 bits, computed in bfloat16: the same as a bfloat16 model that holds the rounded weights."""
    model = tiny_unet().bfloat16()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    state = model.state_dict()
    stored = {name for name, value in state.items() if value.dtype == torch.float8_e4m3fn}
    assert stored == {name for name in state if "norm" not in name}
    assert model.dtype == torch.bfloat16  # what the inputs have to be

    rounded = tiny_unet().bfloat16()
    rounded.load_state_dict({name: value.to(torch.bfloat16) for name, value in state.items()})
    arguments = {**inputs(), "sample": inputs()["sample"].bfloat16()}
    with torch.no_grad():
        for _ in range(2):
            actual = model(**arguments).sample
            assert actual.dtype == torch.bfloat16
            assert torch.equal(actual, rounded(**arguments).sample)
    assert {name for name, value in model.state_dict().items() if value.dtype == torch.float8_e4m3fn} == stored


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(options):
    model = tiny_unet()
    with torch.no_grad():
        expected = model(**inputs()).sample
        model.enable_group_offload(onload_device=torch.device("cpu"), **options)
        for _ in range(2):
            torch.testing.assert_close(model(**inputs()).sample, expected, **CLOSE)


# Time


def test_fractional_timesteps_count():
    """Also in bfloat16, whose numbers near 745 are 4 apart: the time is never rounded to it."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_unet().to(dtype)
        arguments = {**inputs(), "sample": inputs()["sample"].to(dtype)}
        with torch.no_grad():
            outputs = [model(**{**arguments, "timestep": timestep}).sample for timestep in (745, 745.3)]
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("time", [745.25, 254])
def test_forms_of_the_timestep(time):
    model, arguments = tiny_unet(), inputs()
    forms = [time, float(time), torch.tensor(time), torch.tensor([time]), torch.tensor([time, time])]
    forms += [torch.tensor(time, dtype=torch.float64)]
    with torch.no_grad():
        outputs = [model(**{**arguments, "timestep": form}).sample for form in forms]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


# Classes


def test_class_changes_the_output_and_none_is_the_null_class():
    model, arguments = tiny_unet(), inputs()
    assert model.null_class_label == 3
    with torch.no_grad():
        outputs = [model(**{**arguments, "class_labels": torch.full((2,), label)}).sample for label in range(4)]
        null = model(**{**arguments, "class_labels": None}).sample
        int32 = model(**{**arguments, "class_labels": torch.full((2,), 1, dtype=torch.int32)}).sample
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 0.01
    assert torch.equal(null, outputs[3])
    assert torch.equal(int32, outputs[1])


def test_class_embedding_is_added_to_the_time_embedding():
    model, arguments = tiny_unet(), inputs()
    plain = tiny_unet(**UNCONDITIONAL)
    state = model.state_dict()
    table = state.pop("class_embedding.weight")
    state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + table[1]
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = plain(arguments["sample"], arguments["timestep"]).sample
        actual = model(**{**arguments, "class_labels": torch.tensor([1, 1])}).sample
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert plain.null_class_label is None
    assert tiny_unet(class_dropout_prob=0.0).null_class_label is None


def test_label_dropout():
    arguments = inputs(batch_size=4)
    with torch.no_grad():
        always = tiny_unet(class_dropout_prob=1.0)
        null = always(**{**arguments, "class_labels": None}).sample
        kept = always(**arguments).sample
        assert (kept - null).abs().max() > 0.01  # nothing is dropped in evaluation mode
        torch.testing.assert_close(always.train()(**arguments).sample, null, **CLOSE)

        model = tiny_unet(class_dropout_prob=0.5)
        mask = torch.tensor([True, False, False, True])
        expected = torch.where(mask[:, None, None, None], null, kept)
        for training in (True, False):
            model.train(training)
            state = torch.get_rng_state()
            torch.testing.assert_close(model(**arguments, class_dropout_mask=mask).sample, expected, **CLOSE)
            assert torch.equal(torch.get_rng_state(), state)  # a given mask draws nothing
        never = torch.zeros(4, dtype=torch.bool)
        torch.testing.assert_close(model.train()(**arguments, class_dropout_mask=never).sample, kept, **CLOSE)


def test_label_dropout_has_the_asked_rate_and_draws_per_sample():
    model = tiny_unet(class_dropout_prob=0.3).train()
    seen = []
    model.class_embedding.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    labels = torch.arange(3).repeat(300)
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.zeros(900, 3, 2, 2), 500.0, labels)
    dropped = seen[0] == 3
    # 900 draws: a standard deviation of 0.015
    assert abs(dropped.float().mean().item() - 0.3) < 0.06
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def test_no_draw_without_a_null_class_or_in_evaluation():
    for model in (tiny_unet(class_dropout_prob=0.0).train(), tiny_unet()):
        state = torch.get_rng_state()
        model(**inputs())
        assert torch.equal(torch.get_rng_state(), state)


# Sizes and layouts


@pytest.mark.parametrize("size", [(8, 16), (16, 8), (2, 6), (24, 24)])
def test_other_sizes(size):
    """Not square, and not the `sample_size`; a transposed image is still another image."""
    model = tiny_unet()
    sample = randn(2, 3, *size)
    with torch.no_grad():
        assert model(sample, 500.0).sample.shape == sample.shape


def test_non_square_attention_keeps_the_positions():
    """With 1x1-symmetric weights the network commutes with transposition of the image, so H and W are not mixed up."""
    model = tiny_unet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.transpose(2, 3)) / 2)
        sample = randn(2, 3, 4, 12)
        expected = model(sample, 500.0).sample.transpose(2, 3)
        torch.testing.assert_close(model(sample.transpose(2, 3), 500.0).sample, expected, **CLOSE)


def test_channels_last_input_and_weights():
    model, arguments = tiny_unet(), inputs()
    with torch.no_grad():
        expected = model(**arguments).sample
        arguments["sample"] = arguments["sample"].contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(**arguments).sample, expected, **CLOSE)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(**arguments).sample, expected, **CLOSE)


def test_double_precision():
    model = tiny_unet().double()
    arguments = {**inputs(), "sample": inputs()["sample"].double()}
    with torch.no_grad():
        actual = model(**arguments).sample
        expected = tiny_unet()(**inputs()).sample
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected, **CLOSE)


def test_autocast():
    model = tiny_unet()
    with torch.no_grad():
        expected = model(**inputs()).sample
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(**inputs()).sample
    # bfloat16 rounds by 2^-9 in each of about twenty layers
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


# What is refused


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"channel_mults": ()}, r"`channel_mults`=\(\) and `num_res_blocks`=1 leave no layer"),
        ({"num_res_blocks": 0}, r"`num_res_blocks`=0 leave no layer"),
        ({"sample_size": 9}, r"`sample_size`=9 must be divisible by 2, since 2 levels halve it 1 times"),
        ({"sample_size": (8, 9)}, r"`sample_size`=\(8, 9\) must be divisible by 2"),
        ({"norm_num_groups": 3}, r"`norm_num_groups`=3 must divide .* level 0 is `base_channels` \* 1 = 8 wide"),
        ({"norm_num_groups": 16, "channel_mults": (2, 1)}, r"level 1 is `base_channels` \* 1 = 8 wide"),
        ({"norm_num_groups": 0}, r"`norm_num_groups`=0 must divide the width"),
        ({"base_channels": 0}, r"level 0 is `base_channels` \* 1 = 0 wide"),
        ({"num_attention_heads": 3}, r"`num_attention_heads`=3 must divide the width 16 of level 1"),
        ({"num_attention_heads": 0}, r"`num_attention_heads`=0 must divide the width 16 of level 1"),
        ({"num_attention_heads": 16, "attention_resolutions": (8,)}, r"=16 must divide the width 8 of level 0"),
        ({"num_classes": 0}, r"`num_classes`=0 must be at least 1, or None"),
        ({"class_dropout_prob": 1.5}, r"`class_dropout_prob`=1.5 must be in \[0, 1\]"),
        ({"class_dropout_prob": -0.1}, r"`class_dropout_prob`=-0.1 must be in \[0, 1\]"),
        ({"num_classes": None}, r"`class_dropout_prob`=0.1 needs `num_classes`"),
    ],
)
def test_wrong_config(overrides, message):
    with pytest.raises(ValueError, match=message):
        DynaUNet2DModel(**{**TINY_UNET, **overrides})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"sample": torch.zeros(2, 1, 8, 8)}, r"`sample` must have shape \(batch_size, 3, height, width\)"),
        ({"sample": torch.zeros(3, 8, 8)}, r"`sample` must have shape .* has shape \(3, 8, 8\)"),
        ({"sample": torch.zeros(2, 3, 7, 8)}, r"height and width of `sample`, \(7, 8\), must be divisible by 2"),
        ({"sample": torch.zeros(2, 3, 8, 7)}, r"height and width of `sample`, \(8, 7\), must be divisible by 2"),
        ({"timestep": torch.zeros(3)}, r"`timestep` must be a number or have shape \(2,\).* shape \(3,\)"),
        ({"timestep": torch.zeros(2, 1)}, r"`timestep` must be a number .* shape \(2, 1\)"),
        ({"class_labels": torch.tensor([0, 4])}, r"`class_labels` must be in \[0, 4\), but they hold \[4\]"),
        ({"class_labels": torch.tensor([-1, 0])}, r"`class_labels` must be in \[0, 4\), but they hold \[-1\]"),
        ({"class_labels": torch.tensor([0])}, r"`class_labels` must have shape \(2,\).* shape \(1,\)"),
        ({"class_labels": torch.zeros(2, 1, dtype=torch.long)}, r"`class_labels` must have shape \(2,\)"),
        ({"class_dropout_mask": torch.tensor([[True], [False]])}, r"must be boolean of shape \(2,\).* \(2, 1\)"),
        ({"class_dropout_mask": torch.tensor([1, 0])}, r"`class_dropout_mask` must be boolean .* torch.int64"),
    ],
)
def test_wrong_inputs(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet()(**{**inputs(), **overrides})


def test_wrong_class_inputs_of_models_without_them():
    mask = torch.tensor([True, False])
    with pytest.raises(ValueError, match="`class_labels` were given, but the model is unconditional"):
        tiny_unet(**UNCONDITIONAL)(**inputs())
    no_null = tiny_unet(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`class_labels` must be given: the model has 3 classes and no null class"):
        no_null(**inputs(conditional=False))
    with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 3\), but they hold \[3\]"):
        no_null(**{**inputs(), "class_labels": torch.tensor([0, 3])})
    for model, arguments in ((no_null, inputs()), (tiny_unet(**UNCONDITIONAL), inputs(conditional=False))):
        with pytest.raises(ValueError, match="`class_dropout_mask` was given, but the model has no null class"):
            model(**arguments, class_dropout_mask=mask)
