# SPDX-License-Identifier: Apache-2.0
"""
What `DynaDiTTransformer2DModel` is given besides time and class: a text, images in further channels, a noise level, and
the keys and values of a reference. Against the layers written out with loops, and its forms against each other.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from accelerate import cpu_offload
from diffusers import AutoModel, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from diffusers_dyna import DynaDiTTransformer2DModel
from diffusers_dyna.models.transformer_dyna_dit import DynaAttnProcessor

from ..testing_utils import counted_macs, dit_inputs, mixed_dyna_dit, randn, tiny_dyna_dit


# Two orders of summation of the same float32 products, through three layers with outputs of order 5.
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
LEVELS = {"rtol": 1e-3, "atol": 1e-3}  # sinusoids of angles of up to 350 on top
MODES = ("capacity", "threshold")
TEXT = {"cross_attention_dim": 24, "caption_channels": 16, "num_classes": None}
POOLED = {"caption_channels": 16, "num_classes": None, "caption_pooling": True}
MEMORY = {**POOLED, "caption_memory_size": 6, "caption_memory_temperature": 0.2}
BOTH = {**TEXT, **MEMORY}
FORMS_OF_TEXT = pytest.mark.parametrize(
    "config", [TEXT, POOLED, MEMORY, BOTH], ids=["tokens", "pooled", "memory", "both"]
)
UPSCALE = {"condition_channels": 4, "noise_level_conditioning": True}
LENGTHS = (7, 3, 5)


def text_inputs(same_time: bool = False, with_mask: bool = True, with_null: bool = True) -> dict:
    """Three samples with captions of different lengths, the last of them dropped."""
    arguments = dit_inputs(same_time=same_time)
    del arguments["class_labels"]
    arguments["encoder_hidden_states"] = randn(3, max(LENGTHS), 16, seed=3)
    if with_mask:
        arguments["encoder_attention_mask"] = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    if with_null:
        arguments["caption_dropout_mask"] = torch.tensor([False, False, True])
    return arguments


@torch.no_grad()
def run(model, arguments: dict, **overrides):
    """The form that a user gets: skipping in evaluation mode."""
    return model(**{**arguments, **overrides})


def run_masked(model, arguments: dict, **overrides):
    with torch.enable_grad():
        return model(**{**arguments, **overrides})


def assert_differ(actual, expected, by: float = 1e-2) -> None:
    assert (actual - expected).abs().max() > by


# Text


def written_out_cross_attention(block, hidden_states, text, mask, heads) -> torch.Tensor:
    """Head by head and sample by sample; `heads` has the active ones of each sample."""
    attn, dim = block.cross_attn, hidden_states.shape[-1]
    normed = F.layer_norm(hidden_states, (dim,), eps=1e-6)
    rows = []
    for tokens, states, is_on, active in zip(normed, text, mask, heads, strict=True):
        states, outputs = states[is_on], []
        query = F.linear(tokens, attn.to_q.weight, attn.to_q.bias)
        key, value = F.linear(states, attn.to_kv.weight, attn.to_kv.bias).chunk(2, dim=-1)
        for head in range(attn.heads):
            part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
            q, k, v = query[:, part], key[:, part], value[:, part]
            if attn.norm_q is not None:
                q, k = attn.norm_q(q), attn.norm_k(k)
            weights = torch.softmax(q @ k.T / math.sqrt(attn.head_dim), dim=-1)
            outputs.append(weights @ v * float(active[head]))
        rows.append(F.linear(torch.cat(outputs, dim=-1), attn.to_out[0].weight, attn.to_out[0].bias))
    return torch.stack(rows)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("router_mode", MODES)
@torch.no_grad()
def test_cross_attention_is_the_written_formulas(router_mode, qk_norm):
    """What comes out of each block's cross-attention, with the heads that its router leaves."""
    arguments = text_inputs()
    model = mixed_dyna_dit(arguments, router_mode=router_mode, qk_norm=qk_norm, **TEXT)
    null = model.null_caption.weight
    states = torch.where(arguments["caption_dropout_mask"][:, None, None], null, arguments["encoder_hidden_states"])
    projection = model.caption_projection
    hidden = F.gelu(F.linear(states, projection.linear_1.weight, projection.linear_1.bias), approximate="tanh")
    text = F.linear(hidden, projection.linear_2.weight, projection.linear_2.bias)
    mask = arguments["encoder_attention_mask"] | arguments["caption_dropout_mask"][:, None]

    seen = []
    for block in model.transformer_blocks:
        block.norm_cross.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        block.cross_attn.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.enable_grad():
        output = model(**arguments, output_masks=True)
    assert output.cross_attn_masks.shape == (3, 3, 4)
    is_mixed = (
        0 < output.cross_attn_masks.mean() < 1 and (output.cross_attn_masks[0] != output.cross_attn_masks[2]).any()
    )
    assert is_mixed, output.cross_attn_masks
    for i, block in enumerate(model.transformer_blocks):
        heads = output.cross_attn_masks[:, i]
        expected = written_out_cross_attention(block, seen[2 * i], text, mask, heads)
        torch.testing.assert_close(seen[2 * i + 1], expected, **CLOSE)


@FORMS_OF_TEXT
@pytest.mark.parametrize("width_mult", [1.0, 0.5])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("same_time", [True, False])
@pytest.mark.parametrize("router_mode", MODES)
def test_skipping_is_masked_is_prepared(router_mode, same_time, with_mask, width_mult, config):
    arguments = text_inputs(same_time, with_mask)
    model = mixed_dyna_dit(arguments, router_mode=router_mode, **config)
    model.set_width(width_mult)
    masked = run_masked(model, arguments, output_masks=True)
    skipping = run(model, arguments, output_masks=True)
    assert_differ(skipping.sample, run(model, arguments, complete_model=True).sample)
    text = {name: value for name, value in arguments.items() if "caption" in name or "encoder" in name}
    for max_plan_bytes in (2**30, 0):
        model.prepare_timesteps(arguments["timestep"].unique(), max_plan_bytes=max_plan_bytes, **text)
        assert bool(model._plan.keys_values) == (max_plan_bytes > 0 and "cross_attention_dim" in config)
        assert (model._plan.caption is not None) == (max_plan_bytes > 0 and "caption_pooling" in config)
        prepared = run(model, arguments, output_masks=True)
        for output in (skipping, prepared):
            torch.testing.assert_close(output.sample, masked.sample, **CLOSE)
            torch.testing.assert_close(output.compute_ratio, masked.compute_ratio)
            if "cross_attention_dim" in config:
                assert torch.equal(output.cross_attn_masks, masked.cross_attn_masks)
            else:
                assert output.cross_attn_masks is masked.cross_attn_masks is None


@pytest.mark.parametrize("config", [POOLED, MEMORY, BOTH], ids=["pooled", "memory", "both"])
@torch.no_grad()
def test_pooled_captions_are_the_written_formulas(config):
    """The normalised mean of the tokens, or what a memory has for it, modulates with the time."""
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **config)
    means = [states[:length].mean(dim=0) for states, length in zip(arguments["encoder_hidden_states"], LENGTHS)]
    states = torch.stack([mean / mean.square().mean().sqrt() for mean in means])
    if config is not POOLED:
        keys, values = model.caption_memory.keys, model.caption_memory.values.weight
        similarities = torch.stack([keys @ mean / mean.norm() for mean in means])
        shares = (similarities / 0.2).exp() / (similarities / 0.2).exp().sum(dim=1, keepdim=True)
        states = torch.stack(
            [sum(share * value for share, value in zip(row, values.T, strict=True)) for row in shares]
        )
        assert 0.2 < shares.max() < 0.99
    states[2] = model.null_caption.weight[0]  # as it is
    first, second, seen = model.caption_embedding.linear_1, model.caption_embedding.linear_2, []
    time = model._embed_time(arguments["timestep"])
    caption = F.linear(F.silu(F.linear(states, first.weight, first.bias)), second.weight, second.bias)
    assert_differ(caption[0], caption[1])
    model.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    for form in (run, run_masked):
        seen.clear()
        form(model, arguments)
        torch.testing.assert_close(seen[0], time + caption, **CLOSE)


def test_a_memory_holds_the_captions_that_were_written():
    """Those that it holds read their own entries, whatever their length; a new one those that are most like it."""
    model = tiny_dyna_dit(**{**MEMORY, "caption_memory_temperature": 1e-3})
    memory, states = model.caption_memory, randn(6, 5, 16, seed=4)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 5])[:, None]
    model.write_caption_memory(states[:4], mask[:4])
    model.write_caption_memory(states[4:], mask[4:], start=4)
    means = torch.stack([row[kept].mean(dim=0) for row, kept in zip(states, mask, strict=True)])
    torch.testing.assert_close(memory.keys, F.normalize(means, dim=1), **CLOSE)
    torch.testing.assert_close(memory(7 * means), memory.values.weight.T, **CLOSE)
    between = F.normalize(means[0], dim=0) + 0.9 * F.normalize(means[3], dim=0)
    torch.testing.assert_close(memory(between), memory.values.weight[:, 0], **CLOSE)
    memory.temperature = 1e6
    torch.testing.assert_close(memory(between), memory.values.weight.mean(dim=1), **CLOSE)


def test_a_memory_is_read_in_float32_under_autocast():
    """Cosine similarities that differ by less than the temperature are one in bfloat16."""
    model = tiny_dyna_dit(**{**MEMORY, "caption_memory_temperature": 5e-3})
    keys = torch.zeros(6, 1, 16)
    keys[:, 0, 0], keys[:, 0, 1] = 1.0, torch.linspace(0, 0.1, 6)
    model.write_caption_memory(keys)
    caption = randn(16, seed=2)
    expected = model.caption_memory(caption)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.caption_memory(caption), expected, rtol=0, atol=0)


def test_the_embedding_of_a_caption_is_computed_once():
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **MEMORY)
    expected = run(model, arguments).sample
    prepare(model, arguments)
    assert model.plan_bytes >= 3 * 32 * 4  # B, D, float32
    calls = []
    model.caption_embedding.register_forward_hook(lambda *_: calls.append(1))
    model.caption_memory.register_forward_hook(lambda *_: calls.append(1))
    assert model._plan.caption is not None
    torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)
    leading = {name: value[:2] for name, value in arguments.items()}
    torch.testing.assert_close(run(model, leading).sample, expected[:2], **CLOSE)
    assert not calls
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"].clone()
    torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["other", "in place"])
def test_another_mask_of_a_pooled_caption_is_not_prepared(change):
    """The mask is part of what its embedding is made of."""
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **POOLED)
    prepare(model, arguments)
    before = run(model, arguments).sample
    if change == "other":
        arguments["encoder_attention_mask"] = arguments["encoder_attention_mask"].clone()
    arguments["encoder_attention_mask"][0, 3:] = False
    actual = run(model, arguments).sample
    model.clear_plan()
    torch.testing.assert_close(actual, run(model, arguments).sample, **CLOSE)
    assert_differ(actual[0], before[0])


@FORMS_OF_TEXT
def test_one_image_is_its_row_of_a_batch(config):
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **config)
    batch = run(model, arguments).sample
    for i, length in enumerate(LENGTHS):
        row = {name: value[i : i + 1] for name, value in arguments.items()}
        torch.testing.assert_close(run(model, row).sample, batch[i : i + 1], **CLOSE)
        # masked tokens of the text are as good as none
        row["encoder_hidden_states"] = row["encoder_hidden_states"][:, :length]
        del row["encoder_attention_mask"]
        torch.testing.assert_close(run(model, row).sample, batch[i : i + 1], **CLOSE)


@FORMS_OF_TEXT
def test_null_caption(config):
    """It stands for whatever was dropped, with any mask, and for all where no text is given."""
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **config)
    assert model.has_null_caption and model.null_class_label is None
    without = {name: value for name, value in arguments.items() if name in ("hidden_states", "timestep")}
    expected = run(model, without).sample
    every = torch.ones(3, dtype=torch.bool)
    nothing = torch.zeros(3, 7, dtype=torch.bool)
    for overrides in ({}, {"encoder_attention_mask": None}, {"encoder_attention_mask": nothing}):
        actual = run(model, arguments, caption_dropout_mask=every, **overrides).sample
        torch.testing.assert_close(actual, expected, **CLOSE)
    some = run(model, arguments).sample
    torch.testing.assert_close(some[2], expected[2], **CLOSE)
    assert_differ(some[0], expected[0])
    # prepared for all, whatever the batch is then
    model.prepare_timesteps(without["timestep"][:1])
    if "cross_attention_dim" in config:
        assert model._plan.keys_values[0][0].shape == (1, 1, 4, 8)
    if "caption_pooling" in config:
        assert model._plan.caption.shape == (1, 32)
    torch.testing.assert_close(run(model, without).sample, expected, **CLOSE)


def count_calls(model) -> list:
    calls = []
    for block in model.transformer_blocks:
        block.cross_attn.to_kv.register_forward_hook(lambda *_: calls.append(1))
    return calls


def prepare(model, arguments) -> None:
    text = {name: value for name, value in arguments.items() if "caption" in name or "encoder" in name}
    model.prepare_timesteps(arguments["timestep"][:1], **text)


def test_keys_and_values_of_the_text_are_computed_once():
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **TEXT)
    expected = run(model, arguments).sample
    states = randn(3, 7, 16, seed=9)
    expected_of_other = run(model, arguments, encoder_hidden_states=states).sample
    assert_differ(expected, expected_of_other)
    prepare(model, arguments)
    assert model.plan_bytes >= 3 * 7 * 2 * 32 * 3 * 4  # B, L, keys and values, layers, float32

    calls = count_calls(model)
    torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)
    leading = {name: value[:2] for name, value in arguments.items()}
    torch.testing.assert_close(run(model, leading).sample, expected[:2], **CLOSE)
    assert not calls
    for overrides in (
        {"encoder_hidden_states": states},
        {"encoder_hidden_states": arguments["encoder_hidden_states"].clone()},
        {"caption_dropout_mask": arguments["caption_dropout_mask"].clone()},
    ):
        other = overrides.get("encoder_hidden_states") is states
        actual = run(model, arguments, **overrides).sample
        torch.testing.assert_close(actual, expected_of_other if other else expected, **CLOSE)
        assert len(calls) == 3
        del calls[:]
    mask = arguments["encoder_attention_mask"].clone()  # keys and values do not hang on it
    torch.testing.assert_close(run(model, arguments, encoder_attention_mask=mask).sample, expected, **CLOSE)
    assert not calls
    trailing = {name: value[1:] for name, value in arguments.items()}
    torch.testing.assert_close(run(model, trailing).sample, expected[1:], **CLOSE)
    arguments["encoder_hidden_states"].copy_(states)  # the same memory, another text
    torch.testing.assert_close(run(model, arguments).sample, expected_of_other, **CLOSE)
    assert len(calls) == 6
    model.clear_plan()
    assert model.plan_bytes == 0


def test_text_made_in_inference_mode_is_not_prepared():
    """It does not tell when it is written to, as a callback may do."""
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **TEXT)
    with torch.inference_mode():
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"].clone()
        prepare(model, arguments)
        before = model(**arguments).sample
        arguments["encoder_hidden_states"].mul_(-2)
        after = model(**arguments).sample
        model.clear_plan()
        torch.testing.assert_close(after, model(**arguments).sample, **CLOSE)
    assert_differ(after, before)


def test_captions_are_not_dropped_in_preparation():
    """Training mode drops captions in calls; what is prepared then is used in evaluation mode."""
    arguments = text_inputs(same_time=True, with_null=False)
    model = mixed_dyna_dit(arguments, caption_dropout_prob=1.0, **TEXT)
    expected = run(model, arguments).sample
    prepare(model.train(), arguments)
    assert model._plan.keys_values
    torch.testing.assert_close(run(model.eval(), arguments).sample, expected, **CLOSE)


def test_plan_orders_heads_of_the_text_too():
    """A plan puts heads into an order of its own, which prepared keys and values follow."""
    arguments = text_inputs(same_time=True)
    model = tiny_dyna_dit(num_attention_heads=8, attention_head_dim=4, **TEXT)
    times = torch.linspace(20, 980, 12)
    expected = [run_masked(model, arguments, timestep=time).sample for time in times]
    text = {name: value for name, value in arguments.items() if "caption" in name or "encoder" in name}
    model.prepare_timesteps(times, **text)
    sets = [decision.cross_heads[0][1] for decisions in model._plan.decisions for decision in decisions]
    assert sum(list(heads) != sorted(heads) for heads in sets) > 5
    for step, time in enumerate(times):
        model.set_plan_step(step)
        torch.testing.assert_close(run(model, arguments, timestep=time).sample, expected[step], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.transformer_blocks[1].cross_attn.to_kv.weight.mul_(0.5),
        lambda model: model.transformer_blocks[1].cross_attn.to_kv.bias.add_(1.0),
        lambda model: model.caption_projection.linear_2.weight.mul_(0.5),
        lambda model: model.null_caption.weight.add_(1.0),
        lambda model: model.transformer_blocks[0].cross_attn_rate.bias.neg_(),
        lambda model: model.transformer_blocks[0].cross_attn.norm_k.weight.mul_(2.0),
    ],
)
def test_plan_notices_changes(change):
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, qk_norm="rms_norm", **TEXT)
    prepare(model, arguments)
    before = run(model, arguments).sample
    with torch.no_grad():
        change(model)
    after = run(model, arguments).sample
    model.clear_plan()
    assert_differ(after, before, 1e-3)
    torch.testing.assert_close(after, run(model, arguments).sample, **CLOSE)


def test_plan_and_lora_of_the_text_layers():
    """Adapters on keys and values of the text count, at their scale of the call; nothing is prepared that hides them."""
    peft = pytest.importorskip("peft")
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **TEXT)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_kv", "to_q", "cross_attn.to_out.0"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    for scale in (1.0, 0.25):
        kwargs = {"attention_kwargs": {"scale": scale}}
        masked = run_masked(model, arguments, **kwargs).sample
        torch.testing.assert_close(run(model, arguments, **kwargs).sample, masked, **CLOSE)
        prepare(model, arguments)
        torch.testing.assert_close(run(model, arguments, **kwargs).sample, masked, **CLOSE)
    assert_differ(run(model, arguments, attention_kwargs={"scale": 1.0}).sample, masked)


@FORMS_OF_TEXT
@pytest.mark.parametrize("router_mode", MODES)
def test_gradient_reaches_every_parameter(router_mode, config):
    arguments = {**text_inputs(), "hidden_states": randn(3, 6, 8, 8), "noise_level": torch.tensor([0.0, 100.0, 300.0])}
    config = {**config, **UPSCALE, "in_channels": 2, "qk_norm": "rms_norm"}
    model = mixed_dyna_dit(arguments, router_mode=router_mode, **config).train()
    output = model(**arguments, output_masks=True)
    (output.sample.square().mean() + output.compute_ratio.mean()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7}
    if (
        router_mode == "capacity"
    ):  # biases shift all scores alike: without a gradient, but for `linear_1` in some block
        without = {name for name in without if not name.endswith("token_selection.linear_2.bias")}
        first = {name for name in without if name.endswith("token_selection.linear_1.bias")}
        assert len(first) < 3
        without -= first
    assert not without


@FORMS_OF_TEXT
def test_gradient_checkpointing(config):
    arguments = text_inputs()
    model = mixed_dyna_dit(arguments, **config)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        run_masked(model.train(), arguments).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert "null_caption.weight" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.caption_embedding.linear_2.weight.mul_(0.5),
        lambda model: model.caption_memory.values.weight.mul_(-0.5),
        lambda model: model.caption_memory.keys.copy_(model.caption_memory.keys.roll(1, 0)),
        lambda model: model.write_caption_memory(randn(6, 2, 16, seed=8)),
        lambda model: setattr(model.caption_memory, "temperature", 2.0),
        lambda model: model.null_caption.weight.add_(1.0),
    ],
)
def test_plan_notices_changes_of_what_embeds_captions(change):
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **MEMORY)
    prepare(model, arguments)
    before = run(model, arguments).sample
    with torch.no_grad():
        change(model)
    after = run(model, arguments).sample
    model.clear_plan()
    assert_differ(after, before, 1e-3)
    torch.testing.assert_close(after, run(model, arguments).sample, **CLOSE)


def test_lora_of_a_memory():
    """An adapter on every linear layer has one on the values, which counts at its scale of the call; the keys stay."""
    peft = pytest.importorskip("peft")
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **MEMORY)
    before = run(model, arguments).sample
    keys = model.caption_memory.keys.clone()
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    assert any("caption_memory.values.lora" in name for name, _ in model.named_parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    for scale in (1.0, 0.25):
        kwargs = {"attention_kwargs": {"scale": scale}}
        masked = run_masked(model, arguments, **kwargs).sample
        assert_differ(masked, before)
        prepare(model, arguments)
        torch.testing.assert_close(run(model, arguments, **kwargs).sample, masked, **CLOSE)
    assert_differ(run(model, arguments, attention_kwargs={"scale": 1.0}).sample, masked)
    assert torch.equal(model.caption_memory.keys, keys)


def test_training_drops_captions_at_the_asked_rate():
    model = tiny_dyna_dit(caption_dropout_prob=0.3, **TEXT).train()
    dropped = []
    model.caption_projection.register_forward_pre_hook(lambda module, args: dropped.append(args[0]))
    states = randn(1, 2, 16).expand(400, -1, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(torch.zeros(400, 4, 2, 2), 500.0, encoder_hidden_states=states)
    is_null = (dropped[0] == model.null_caption.weight).all(dim=2).all(dim=1)
    assert torch.equal(~is_null, (dropped[0] == states).all(dim=2).all(dim=1))
    assert 0.22 < is_null.float().mean() < 0.38  # five deviations around 0.3 are 0.115


@FORMS_OF_TEXT
@pytest.mark.parametrize("router_mode", MODES)
def test_macs(router_mode, config):
    """Of the complete model by torch's counter; of the dynamic one by the closed form, and as predicted."""
    arguments = text_inputs(same_time=True, with_mask=False)
    model = mixed_dyna_dit(arguments, router_mode=router_mode, **config)
    with_cross = "cross_attention_dim" in config
    one = {name: value[:1] for name, value in arguments.items()}
    macs = model.compute_macs(num_text_tokens=7)
    assert counted_macs(model, one, complete_model=True) == macs["total"]
    block = 4 * 16 * 32**2 + 2 * 16**2 * 32 + 2 * 16 * 32 * 128
    assert macs["blocks"] == 3 * (block + with_cross * (2 * 16 * 32**2 + 2 * 16 * 7 * 32))
    if not with_cross:
        assert model.compute_macs() == macs
    output = run(model, arguments, output_masks=True)
    dynamic = model.compute_macs(masks=output, num_text_tokens=7)
    assert dynamic["blocks"] / macs["blocks"] == pytest.approx(output.compute_ratio.mean().item(), rel=1e-5)
    torch.testing.assert_close(
        run(model, arguments, complete_model=True, output_masks=True).compute_ratio, torch.ones(3)
    )
    if router_mode == "capacity":
        predicted = model.predict_compute_ratio(arguments["timestep"], num_text_tokens=7)
        torch.testing.assert_close(predicted, output.compute_ratio)
        longer = model.predict_compute_ratio(arguments["timestep"], num_text_tokens=70)
        assert (longer != predicted).all() == with_cross


def test_gate_noise_of_the_text_heads():
    """Threshold mode: 1 - noise switches the heads that the logits leave in the middle."""
    arguments = text_inputs()
    model = tiny_dyna_dit(router_mode="threshold", **TEXT).train()
    assert model.gate_noise_size(16) == 3 * 3 + 16 and tiny_dyna_dit().gate_noise_size(16) == 2 * 3 + 16
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.cross_attn_rate.weight)
        torch.nn.init.zeros_(block.cross_attn_rate.bias)
    noise = torch.full((3, 3, 25), 0.5)
    noise[..., 6:9] = torch.tensor([0.9, 0.1, 0.9])
    output = model(**arguments, gate_noise=noise, output_masks=True)
    assert output.cross_attn_masks.detach().unique(dim=0).tolist() == [[[1.0, 1.0, 0.0, 1.0]] * 3]


def test_cross_attention_of_a_fresh_model_ignores_the_text():
    """It starts with an output of zero and all heads on, so that it can be added to a trained model."""
    model = DynaDiTTransformer2DModel(num_layers=2, num_attention_heads=4, attention_head_dim=8, **TEXT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "proj_out" in name:
                parameter.normal_(std=0.1)
    arguments = text_inputs()
    output = run(model.eval(), arguments, output_masks=True)
    assert output.cross_attn_masks.min() == 1 and output.sample.std() > 0.01
    torch.testing.assert_close(
        output.sample, run(model, arguments, caption_dropout_mask=torch.ones(3, dtype=torch.bool)).sample, **CLOSE
    )


def test_class_and_text():
    arguments = {**text_inputs(), "class_labels": torch.tensor([0, 1, 2])}
    model = mixed_dyna_dit(arguments, **{**TEXT, "num_classes": 5})
    expected = run(model, arguments).sample
    assert_differ(run(model, arguments, class_labels=torch.tensor([1, 1, 2])).sample[0], expected[0])
    torch.testing.assert_close(run_masked(model, arguments).sample, expected, **CLOSE)
    model.prepare_timesteps(
        arguments["timestep"], **{k: v for k, v in arguments.items() if k not in ("hidden_states", "timestep")}
    )
    torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)


@pytest.mark.parametrize(
    "config",
    [TEXT, POOLED, MEMORY, BOTH, UPSCALE, {**TEXT, "caption_channels": None, "caption_dropout_prob": 0.0}],
    ids=str,
)
def test_save_and_load(config, tmp_path):
    model = tiny_dyna_dit(**config)
    arguments = dit_inputs(same_time=True) if config is UPSCALE else text_inputs(with_null=False)
    if config is UPSCALE:
        arguments |= {"hidden_states": randn(3, 8, 8, 8), "noise_level": 20.0}
    elif config["caption_channels"] is None:
        arguments["encoder_hidden_states"] = randn(3, 7, 24)
    expected = run(model, arguments).sample
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert {key: value for key, value in loaded.config.items() if key[0] != "_"} == {
        key: value for key, value in model.config.items() if key[0] != "_"
    }
    torch.testing.assert_close(run(loaded, arguments).sample, expected, rtol=1e-5, atol=1e-5)
    half = DynaDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    if half.caption_memory is not None:
        assert torch.equal(half.caption_memory.keys, model.caption_memory.keys)
    floats = {torch.float32: torch.bfloat16}
    arguments = {
        name: value.to(floats.get(value.dtype, value.dtype))
        if torch.is_tensor(value) and name != "timestep"
        else value
        for name, value in arguments.items()
    }
    actual = run(half, arguments).sample
    assert actual.dtype == torch.bfloat16 and (actual.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("config", [TEXT, BOTH], ids=["tokens", "both"])
@pytest.mark.parametrize("router_mode", MODES)
def test_compiled_blocks_skip(router_mode, config):
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, router_mode=router_mode, **config)
    expected = run(model, arguments, output_masks=True)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend)
    for prepared in (False, True):
        if prepared:
            prepare(model, arguments)
        output = run(model, arguments, output_masks=True)
        torch.testing.assert_close(output.sample, expected.sample, **CLOSE)
        assert torch.equal(output.cross_attn_masks, expected.cross_attn_masks)
    assert 0 < len(graphs) <= 3  # one for all blocks; another where a layer keeps all tokens
    torch._dynamo.reset()


def test_pyramid_attention_broadcast_of_the_text_layers():
    """diffusers' cache knows them as cross-attention, and skips them at the steps between."""
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **TEXT)
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    calls = []
    processor = DynaAttnProcessor()
    attend = processor.attend
    processor.attend = lambda *args: calls.append(args[1].shape[1]) or attend(*args)
    model.set_attn_processor(processor)
    with model.cache_context("cond"):
        first = run(model, arguments).sample
        again = run(model, arguments).sample
    assert calls == [16, 7] * 3 + [16] * 3
    torch.testing.assert_close(again, first, **CLOSE)


@pytest.mark.parametrize("config", [TEXT, MEMORY, BOTH, UPSCALE], ids=["text", "memory", "both", "noise level"])
def test_accelerate_cpu_offload(config):
    """Weights are on the meta device between the calls of their layers, and so is the null caption."""
    arguments = text_inputs(same_time=True)
    if config is UPSCALE:
        arguments = dit_inputs(same_time=True) | {"hidden_states": randn(3, 8, 8, 8), "noise_level": 20.0}
    model = mixed_dyna_dit(arguments, **config)
    expected = run(model, arguments).sample
    prepared = {name: value for name, value in arguments.items() if name not in ("hidden_states", "timestep")}
    cpu_offload(model, "cpu", offload_buffers=True)
    model.prepare_timesteps(arguments["timestep"][:1], **prepared)
    for _ in range(2):
        torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)


def test_first_block_cache():
    """A similar step runs the first block alone, its attention to the text included."""
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **TEXT)
    expected = run(model, arguments).sample
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with model.cache_context("cond"):
        torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)
        again = run(model, arguments, output_masks=True)
    torch.testing.assert_close(again.sample, expected, **CLOSE)
    assert again.cross_attn_masks[:, 0].any() and not again.cross_attn_masks[:, 1:].any()


# Images in further channels, and their noise level


def test_condition_channels():
    model = tiny_dyna_dit(condition_channels=3)
    assert model.out_channels == 8 and model.config.in_channels == 4
    arguments = dit_inputs(same_time=True)
    sample, condition = arguments["hidden_states"], randn(3, 3, 8, 8, seed=1)
    output = run(model, arguments, hidden_states=torch.cat([sample, condition], dim=1)).sample
    assert output.shape == (3, 8, 8, 8)
    weight = model.pos_embed.proj.weight.detach()
    without = tiny_dyna_dit()
    without.load_state_dict({**model.state_dict(), "pos_embed.proj.weight": weight[:, :4].clone()})
    # what the condition adds to the patches, added to their bias by hand
    added = F.conv2d(condition[:1], weight[:, 4:], stride=2)
    handle = without.pos_embed.proj.register_forward_hook(lambda module, args, result: result + added)
    expected = run(without, {name: value[:1] for name, value in arguments.items()}).sample
    torch.testing.assert_close(output[:1], expected, **CLOSE)
    handle.remove()
    assert_differ(run(without, arguments).sample[:1], expected)


@torch.no_grad()
def test_noise_level_is_part_of_the_embedding():
    model = tiny_dyna_dit(**UPSCALE)
    arguments = dit_inputs(same_time=True) | {"hidden_states": randn(3, 8, 8, 8)}
    seen = []
    model.transformer_blocks[0].modulation.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    levels = torch.tensor([0.0, 20.0, 350.0])
    output = model(**arguments, noise_level=levels).sample
    embedding = model.noise_level_embedding
    frequencies = 10000 ** (-torch.arange(128) / 128)
    angles = levels[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.silu(F.linear(features, embedding.linear_1.weight, embedding.linear_1.bias))
    added = F.linear(hidden, embedding.linear_2.weight, embedding.linear_2.bias)
    plain = model._add_conditions(model._embed_time(arguments["timestep"]), arguments["class_labels"], None)
    torch.testing.assert_close(seen[0], F.silu(plain + added), rtol=1e-3, atol=1e-3)  # angles of up to 350
    for i, level in enumerate(levels.tolist()):
        row = {name: value[i : i + 1] for name, value in arguments.items()}
        for given in (level, torch.tensor(level), torch.tensor([level])):
            torch.testing.assert_close(model(**row, noise_level=given).sample, output[i : i + 1], **LEVELS)
    assert_differ(output[1], model(**arguments, noise_level=0.0).sample[1])


def test_prepared_noise_level():
    arguments = dit_inputs(same_time=True) | {"hidden_states": randn(3, 8, 8, 8)}
    model = tiny_dyna_dit(**UPSCALE)
    expected = {level: run(model, arguments, noise_level=level).sample for level in (20.0, 300.0)}
    assert_differ(expected[20.0], expected[300.0])
    labels = arguments["class_labels"]
    model.prepare_timesteps(arguments["timestep"][:1], labels)
    assert not model._plan.modulations  # a level was not named
    for level in (20, 300.0):
        model.prepare_timesteps(arguments["timestep"][:1], labels, noise_level=level)
        assert len(model._plan.modulations) == 3
        for other in (20.0, 300.0, torch.tensor(20.0)):
            torch.testing.assert_close(
                run(model, arguments, noise_level=other).sample, expected[float(other)], **LEVELS
            )
    with torch.no_grad():
        model.noise_level_embedding.linear_2.bias.add_(1.0)
    changed = run(model, arguments, noise_level=300.0).sample
    assert_differ(changed, expected[300.0])
    model.clear_plan()
    torch.testing.assert_close(changed, run(model, arguments, noise_level=300.0).sample, **CLOSE)


# Shared attention


def written_out_style(attn, hidden_states, reference, strength, heads) -> torch.Tensor:
    """StyleAligned for one sample, (N, D), and its reference, head by head."""
    outputs = []
    qkv = [F.linear(tokens, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1) for tokens in (hidden_states, reference)]
    for head in heads:
        part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
        (q, k, v), (q_r, k_r, v_r) = ([tensor[:, part] for tensor in each] for each in qkv)

        def adain(x, y):
            std_x, std_y = x.var(dim=0, unbiased=False).sqrt(), y.var(dim=0, unbiased=False).sqrt()
            return (1 - strength) * x + strength * ((x - x.mean(dim=0)) / std_x * std_y + y.mean(dim=0))

        q, k = adain(q, q_r), adain(k, k_r)
        weights = torch.exp(q @ torch.cat([k, k_r]).T / math.sqrt(attn.head_dim))
        weights[:, len(k) :] *= strength
        outputs.append(weights / weights.sum(dim=1, keepdim=True) @ torch.cat([v, v_r]))
    rows = torch.cat([torch.arange(head * attn.head_dim, (head + 1) * attn.head_dim) for head in heads])
    return F.linear(torch.cat(outputs, dim=-1), attn.to_out[0].weight[:, rows], attn.to_out[0].bias)


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("active_heads", [None, (0, 1, 2, 3), (0, 2)])
@torch.no_grad()
def test_shared_attention_is_the_written_formulas(active_heads, strength):
    model = tiny_dyna_dit()
    attn = model.transformer_blocks[1].attn
    hidden_states = randn(3, 16, 32)
    plain = attn(hidden_states, active_heads=active_heads)
    with model.share_attention([0, 0, 2], strength):
        actual = attn(hidden_states, active_heads=active_heads)
        # a smaller batch takes the leading part
        torch.testing.assert_close(attn(hidden_states[:2], active_heads=active_heads), actual[:2], **CLOSE)
    torch.testing.assert_close(actual[[0, 2]], plain[[0, 2]], **CLOSE)
    heads = range(4) if active_heads is None else active_heads
    expected = written_out_style(attn, hidden_states[1], hidden_states[0], strength, heads)
    torch.testing.assert_close(actual[1], expected, rtol=1e-4, atol=1e-4)  # 1e-5 is added to the deviation
    assert_differ(actual[1], plain[1])


@pytest.mark.parametrize("router_mode", MODES)
def test_shared_attention_in_every_form(router_mode):
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, router_mode=router_mode)
    plain = run(model, arguments).sample
    processors = {name: id(processor) for name, processor in model.attn_processors.items()}
    with model.share_attention([1, 1, 1], 0.7):
        masked = run_masked(model, arguments).sample
        torch.testing.assert_close(run(model, arguments).sample, masked, **CLOSE)
        model.prepare_timesteps(arguments["timestep"][:1], arguments["class_labels"])
        torch.testing.assert_close(run(model, arguments).sample, masked, **CLOSE)
        complete = run(model, arguments, complete_model=True).sample
    assert_differ(masked[[0, 2]], plain[[0, 2]])
    assert_differ(masked, complete)
    torch.testing.assert_close(masked[1], plain[1], **CLOSE)
    assert {name: id(processor) for name, processor in model.attn_processors.items()} == processors
    with model.share_attention([1, 1, 1], 0.0):
        torch.testing.assert_close(run(model, arguments).sample, plain, **CLOSE)


@pytest.mark.parametrize("references", [[0, 0, 0], [2, 1, 1], [0, 1, 0]])
def test_shared_attention_of_mixed_timesteps(references):
    """Samples whose timesteps leave them other heads."""
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments)
    with model.share_attention(references, 0.7):
        masked = run_masked(model, arguments).sample
        torch.testing.assert_close(run(model, arguments).sample, masked, **CLOSE)
    assert_differ(masked, run(model, arguments).sample)


def test_shared_attention_in_one_graph():
    """In compiled blocks it breaks no graph."""
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)
    with model.share_attention([1, 1, 1], 0.7):
        expected = run(model, arguments).sample
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)
    torch._dynamo.reset()


def test_shared_attention_ends_with_an_error():
    model = tiny_dyna_dit()
    processors = model.attn_processors
    with pytest.raises(ZeroDivisionError), model.share_attention([0, 0]):
        assert model.attn_processors != processors
        raise ZeroDivisionError
    assert model.attn_processors == processors


def test_shared_attention_leaves_the_text_alone():
    arguments = text_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, **TEXT)
    with model.share_attention([0, 0, 0]):
        masked = run_masked(model, arguments).sample
        torch.testing.assert_close(run(model, arguments).sample, masked, **CLOSE)
    assert_differ(masked[1], run(model, arguments).sample[1])


# Bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"caption_channels": 16}, "`caption_channels`=16 needs `cross_attention_dim`, .* or `caption_pooling`=True"),
        ({"cross_attention_dim": 0}, "`cross_attention_dim`=0 must be at least 1, or None"),
        ({"condition_channels": -1}, "`condition_channels`=-1 must be at least 0"),
        ({**TEXT, "caption_dropout_prob": 1.5}, "`caption_dropout_prob`=1.5 must be in"),
        ({"caption_pooling": True}, "`caption_pooling`=True needs `caption_channels`"),
        ({**TEXT, "caption_memory_size": 4}, "`caption_memory_size`=4 must be at least 1, or None, and needs"),
        ({**POOLED, "caption_memory_size": 0}, "`caption_memory_size`=0 must be at least 1"),
        ({**MEMORY, "caption_memory_temperature": 0}, "`caption_memory_temperature`=0 must be above 0"),
    ],
)
def test_wrong_config(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_dyna_dit(**config)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"encoder_hidden_states": randn(3, 7, 24)},
            r"shape \(3, num_text_tokens, 16\), but it has shape \(3, 7, 24\)",
        ),
        ({"encoder_hidden_states": randn(2, 7, 16)}, r"shape \(3, num_text_tokens, 16\)"),
        ({"encoder_attention_mask": torch.ones(3, 7)}, "boolean of shape .3, 7., one entry per token"),
        ({"encoder_attention_mask": torch.ones(3, 5, dtype=torch.bool)}, "boolean of shape .3, 7."),
        ({"encoder_attention_mask": torch.zeros(3, 7, dtype=torch.bool)}, r"samples \[0, 1\]. Drop their captions"),
        ({"caption_dropout_mask": torch.zeros(3)}, "`caption_dropout_mask` must be boolean of shape"),
        ({"encoder_hidden_states": None}, "`encoder_attention_mask` was given without"),
        ({"noise_level": 20.0}, "`noise_level` was given, but the model has no `noise_level_conditioning`"),
        ({"hidden_states": randn(3, 5, 8, 8)}, r"shape \(batch_size, 4, height, width\)"),
    ],
)
def test_wrong_text(overrides, message):
    model = tiny_dyna_dit(**TEXT)
    with pytest.raises(ValueError, match=message):
        run(model, text_inputs(), **overrides)


def test_wrong_memory():
    states = randn(2, 5, 16)
    with pytest.raises(ValueError, match="has no memory of captions"):
        tiny_dyna_dit(**POOLED).write_caption_memory(states)
    model = tiny_dyna_dit(**MEMORY)
    for start in (5, -1):
        with pytest.raises(
            ValueError, match=f"`start`={start} must be .* leave room for 2 captions among the 6 entries"
        ):
            model.write_caption_memory(states, start=start)
    with pytest.raises(ValueError, match=r"shape \(2, num_text_tokens, 16\)"):
        model.write_caption_memory(randn(2, 5, 12))
    with pytest.raises(ValueError, match=r"leaves nothing of the texts of the captions \[0, 1\]\.$"):
        model.write_caption_memory(states, torch.zeros(2, 5, dtype=torch.bool))
    for wrong in (torch.full((2, 5, 16), float("nan")), torch.zeros(2, 5, 16)):
        with pytest.raises(ValueError, match="must be finite, and their mean must not be 0"):
            model.write_caption_memory(wrong)
    cpu_offload(model, "cpu", offload_buffers=True)
    with pytest.raises(ValueError, match="on the meta device, as under offloading. Write to it before that"):
        model.write_caption_memory(states)


def test_wrong_conditions_of_other_models():
    arguments = text_inputs(with_mask=False, with_null=False)
    without_null = tiny_dyna_dit(**TEXT, caption_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`encoder_hidden_states` must be given: the model has no null caption"):
        run(without_null, arguments, encoder_hidden_states=None)
    with pytest.raises(ValueError, match="`caption_dropout_mask` was given, but the model has no null caption"):
        run(without_null, arguments, caption_dropout_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`encoder_hidden_states` was given, but the model takes no text"):
        run(tiny_dyna_dit(), arguments)
    with pytest.raises(ValueError, match="`num_text_tokens` must be given"):
        without_null.compute_macs()
    upscale, arguments = tiny_dyna_dit(**UPSCALE), dit_inputs()
    with pytest.raises(ValueError, match=r"\(batch_size, `in_channels` \+ `condition_channels` = 8, height, width\)"):
        run(upscale, arguments)
    arguments["hidden_states"] = randn(3, 8, 8, 8)
    with pytest.raises(ValueError, match="`noise_level` must be given"):
        run(upscale, arguments)
    with pytest.raises(ValueError, match=r"`noise_level`=1001.0 must be in \[0, 1000\]"):
        run(upscale, arguments, noise_level=1001.0)
    with pytest.raises(ValueError, match=r"`noise_level` must be a number or have shape \(3,\)"):
        run(upscale, arguments, noise_level=torch.zeros(2))


def test_shared_attention_of_a_larger_batch():
    with pytest.raises(
        ValueError, match=r"`references`=\[0, 0\] of `share_attention` do not fit a batch of 3 samples"
    ):
        with (model := tiny_dyna_dit()).share_attention([0, 0]):
            run(model, dit_inputs(same_time=True))


@pytest.mark.parametrize(
    "references, strength, message",
    [([0, 2], 1.0, r"`references`=\[0, 2\] must be indices of the 2"), ([0, 0], 1.5, "`strength`=1.5 must be in")],
)
def test_wrong_shared_attention(references, strength, message):
    with pytest.raises(ValueError, match=message), tiny_dyna_dit().share_attention(references, strength):
        pass
