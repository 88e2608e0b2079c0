# SPDX-License-Identifier: Apache-2.0
"""`DynaDiTTransformer2DModel` with the tools around it: feature caches, PEFT, torch.compile, casting, offloading."""

import copy
import functools
import pickle

import pytest
import torch

import accelerate
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading

from diffusers_dyna import DynaDiTTransformer2DModel
from diffusers_dyna.models import transformer_dyna_dit
from diffusers_dyna.models.transformer_dyna_dit import (
    DynaAttention,
    DynaAttnProcessor,
    DynaDiTBlock,
    DynaFloat32Linear,
)

from ..testing_utils import assert_mixed, dit_inputs, mixed_dyna_dit, randn, stored_bytes, tiny_dyna_dit


# Two orders of summation of the same float32 products, through three layers with outputs of order 5.
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
MODES = ("capacity", "threshold")
TARGETS = ["qkv", "to_out.0", "fc1", "fc2"]


@torch.no_grad()
def run(model, arguments, **overrides):
    """The form that a user gets: skipping in evaluation mode."""
    return model(**{**arguments, **overrides})


def run_masked(model, arguments, **overrides):
    with torch.enable_grad():
        return model(**{**arguments, **overrides})


def assert_skips_right(model, arguments, **overrides) -> torch.Tensor:
    """Skipping is masked, with masks that are mixed and less work than the complete model. Returns the sample."""
    masked = run_masked(model, arguments, output_masks=True, **overrides)
    assert_mixed(masked, timesteps_differ=len(arguments["timestep"].unique()) > 1)
    output = run(model, arguments, output_masks=True, **overrides)
    for name in ("attn_masks", "mlp_masks", "token_masks"):
        assert torch.equal(getattr(output, name), getattr(masked, name)), name
    torch.testing.assert_close(output.sample, masked.sample.detach(), **CLOSE)
    return output.sample


def forms_run(model, arguments, monkeypatch) -> set[str]:
    """The forms in which the blocks ran."""
    forms = []

    def record(name, form):
        original = getattr(DynaDiTBlock, name)
        monkeypatch.setattr(DynaDiTBlock, name, lambda *args: forms.append(form) or original(*args))

    with monkeypatch.context() as monkeypatch:
        record("_forward_skipping", "skipping")
        record("_token_mask", "masked")
        run(model, arguments)
    return set(forms)


# Feature caches

TIMES = torch.linspace(900, 500, 12)
CACHES = {
    "first block": lambda now: FirstBlockCacheConfig(threshold=0.3),
    "mag": lambda now: MagCacheConfig(threshold=0.3, mag_ratios=torch.ones(12), num_inference_steps=12),
    "taylor": lambda now: TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32),
    "taylor lite": lambda now: TaylorSeerCacheConfig(
        cache_interval=3, taylor_factors_dtype=torch.float32, use_lite_mode=True
    ),
    "broadcast": lambda now: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: now["timestep"]
    ),
}


def smooth_model(router_mode="capacity"):
    """The time that is embedded goes from 9 to 5 over the trajectory, so that neighbouring steps are alike."""
    arguments = {**dit_inputs(same_time=True), "timestep": torch.full((3,), 700.0)}
    return mixed_dyna_dit(arguments, router_mode=router_mode, timestep_scale=0.01, learn_sigma=False)


def trajectory(model, now, contexts=("cond",), prepared=False, output_masks=False):
    """Twelve Euler steps. Returns the last samples by context, and the outputs."""
    labels = {"cond": torch.tensor([1, 2, 3]), "uncond": torch.tensor([5, 5, 5])}
    samples = {context: randn(3, 4, 8, 8, seed=3) for context in contexts}
    outputs = []
    for step, time in enumerate(TIMES):
        now["timestep"] = time.item()
        for context in contexts:
            if prepared:
                model.set_plan_step(step)
            with model.cache_context(context), torch.no_grad():
                output = model(samples[context], time, labels[context], output_masks=output_masks)
            samples[context] = samples[context] - 0.02 * output.sample
            outputs.append(output)
    return samples, outputs


@pytest.fixture
def calls(monkeypatch):
    """How often blocks and attention layers compute; caches leave calls out."""
    counts = {"blocks": 0, "attention": 0}

    def counted(cls, name):
        original = cls.forward

        @functools.wraps(original)  # caches read the signature
        def forward(self, *args, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)

    counted(DynaDiTBlock, "blocks")
    counted(DynaAttention, "attention")
    return counts


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("cache", list(CACHES))
def test_feature_caches(cache, router_mode, calls):
    """Calls are really left out, the result stays close, and the masks tell what ran; with and without a plan."""
    model, now = smooth_model(router_mode), {}
    expected, outputs = trajectory(model, now, output_masks=True)
    assert len({tuple(output.attn_masks[0].flatten().tolist()) for output in outputs}) > 1
    ratios = [output.compute_ratio.mean().item() for output in outputs]
    assert 0.2 < sum(ratios) / 12 < 0.9
    results = []
    for output_masks in (False, True):
        for prepared in (False, True):
            if prepared:
                model.prepare_timesteps(TIMES, torch.tensor([1, 2, 3]))
            model.enable_cache(CACHES[cache](now))
            calls.update(blocks=0, attention=0)
            samples, cached = trajectory(model, now, output_masks=output_masks, prepared=prepared)
            if cache in ("taylor", "broadcast"):
                assert calls["blocks"] == 36 and 3 * 4 <= calls["attention"] <= 3 * 9
            else:
                assert calls["attention"] == calls["blocks"] and 12 <= calls["blocks"] <= 28
            ran = calls["blocks"]
            model.disable_cache()
            model.clear_plan()
            results.append(samples["cond"])
            if output_masks and cache not in ("taylor", "broadcast"):
                on = sum(output.attn_masks[0].any(dim=1).sum().item() for output in cached)
                assert on == ran
                cached_ratios = [output.compute_ratio.mean().item() for output in cached]
                assert sum(cached_ratios) < 0.95 * sum(ratios)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **CLOSE)
    error = (results[0] - expected["cond"]).square().mean().sqrt()
    moved = (expected["cond"] - randn(3, 4, 8, 8, seed=3)).square().mean().sqrt()
    assert 0 < error < 0.2 * moved, (error, moved)
    torch.testing.assert_close(trajectory(model, now)[0]["cond"], expected["cond"], **CLOSE)


@pytest.mark.parametrize("cache", ["first block", "mag", "taylor", "taylor lite"])
def test_feature_caches_keep_contexts_apart(cache, calls):
    model, now = smooth_model(), {}
    alone = {}
    for context in ("cond", "uncond"):
        model.enable_cache(CACHES[cache](now))
        alone |= trajectory(model, now, (context,))[0]
        model.disable_cache()
    model.enable_cache(CACHES[cache](now))
    calls.update(blocks=0, attention=0)
    together, _ = trajectory(model, now, ("cond", "uncond"))
    assert calls["attention"] < 72
    for context in ("cond", "uncond"):
        torch.testing.assert_close(together[context], alone[context], **CLOSE)
    assert (together["cond"] - together["uncond"]).abs().max() > 0.01


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def draw_adapters(model) -> None:
    """Adapters that matter: about half the size of the weights they change."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.25 * randn(*parameter.shape, seed=i))


def with_lora(peft, router_mode="capacity", names=("style",), arguments=None, **config):
    """A model with mixed masks while its adapters are on."""
    arguments = arguments or dit_inputs()
    for seed in range(60):
        model = tiny_dyna_dit(seed, router_mode=router_mode)
        for name in names:
            options = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **config}
            model.add_adapter(peft.LoraConfig(**options), adapter_name=name)
        draw_adapters(model)
        model.set_adapters(list(names))
        try:
            assert_mixed(run(model, arguments, output_masks=True), len(arguments["timestep"].unique()) > 1)
            return model, arguments
        except AssertionError:
            continue
    raise AssertionError("no mixed masks")


@pytest.mark.parametrize("router_mode", MODES)
def test_lora_in_every_form(peft, router_mode, monkeypatch, tmp_path):
    model, arguments = with_lora(peft, router_mode)
    assert forms_run(model, arguments, monkeypatch) == {"skipping"}
    changed = assert_skips_right(model, arguments)

    # the weights with the adapters added by hand
    merged = tiny_dyna_dit(router_mode=router_mode)
    state = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    for name in [name for name in state if "lora_A" in name]:
        target = name.split(".lora_A")[0] + ".weight"
        state[target] = state[target] + 1.5 * state[name.replace("lora_A", "lora_B")] @ state[name]
    merged.load_state_dict({name: value for name, value in state.items() if "lora_" not in name})
    torch.testing.assert_close(run(merged, arguments).sample, changed, rtol=1e-4, atol=5e-4)

    model.disable_adapters()
    plain = run(model, arguments).sample
    assert (plain - changed).abs().max() > 0.1
    torch.testing.assert_close(run_masked(model, arguments).sample, plain, **CLOSE)
    model.enable_adapters()
    torch.testing.assert_close(run(model, arguments).sample, changed, **CLOSE)

    # half of it, for one call and for good
    half = assert_same_as_masked(model, arguments, attention_kwargs={"scale": 0.5})
    assert (half - changed).abs().max() > 0.01 and (half - plain).abs().max() > 0.01
    torch.testing.assert_close(run(model, arguments).sample, changed, **CLOSE)
    model.set_adapters("style", weights=0.5)
    torch.testing.assert_close(run(model, arguments).sample, half, **CLOSE)
    model.set_adapters("style", weights=1.0)

    model.save_lora_adapter(tmp_path, adapter_name="style")
    other = tiny_dyna_dit(router_mode=router_mode)
    other.load_state_dict(
        {name.replace("base_layer.", ""): v for name, v in model.state_dict().items() if "lora_" not in name}
    )
    other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(run(other, arguments).sample, changed, **CLOSE)
    model.delete_adapters("style")
    torch.testing.assert_close(run(model, arguments).sample, plain, **CLOSE)


def assert_same_as_masked(model, arguments, **overrides) -> torch.Tensor:
    sample = run(model, arguments, **overrides).sample
    torch.testing.assert_close(sample, run_masked(model, arguments, **overrides).sample.detach(), **CLOSE)
    return sample


def lora_layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "merge")]


def test_lora_merged_and_disabled(peft):
    model, arguments = with_lora(peft)
    changed = run(model, arguments).sample
    model.disable_adapters()
    plain = run(model, arguments).sample
    model.enable_adapters()
    for layer in lora_layers(model):
        layer.merge()
    torch.testing.assert_close(run(model, arguments).sample, changed, rtol=1e-4, atol=5e-4)
    model.disable_adapters()  # PEFT unmerges in the next call
    torch.testing.assert_close(run(model, arguments).sample, plain, rtol=1e-4, atol=5e-4)
    model.enable_adapters()
    torch.testing.assert_close(run(model, arguments).sample, changed, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("router_mode", MODES)
def test_two_adapters(peft, router_mode):
    model, arguments = with_lora(peft, router_mode, names=("style", "subject"))
    both = assert_skips_right(model, arguments)
    samples = [both]
    for names, weights in ((["style"], None), (["subject"], None), (["style", "subject"], [0.3, 1.2])):
        model.set_adapters(names, weights)
        samples.append(assert_same_as_masked(model, arguments))
    for i in range(len(samples)):
        for j in range(i):
            assert (samples[i] - samples[j]).abs().max() > 0.01


@pytest.mark.parametrize("targets", [["qkv"], ["fc1", "fc2"], ["transformer_blocks.1.mlp.fc1"]])
def test_lora_on_some_layers(peft, targets):
    model, arguments = with_lora(peft, target_modules=targets)
    assert_skips_right(model, arguments)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "bias"])
def test_adapters_that_are_more_than_low_rank_run_masked(peft, config, monkeypatch):
    model, arguments = with_lora(peft, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or name.endswith("lora_B.style.bias"):
                parameter.add_(0.2 * randn(*parameter.shape))
    assert forms_run(model, arguments, monkeypatch) == {"masked"}
    sample = assert_same_as_masked(model, arguments)
    model.prepare_timesteps(arguments["timestep"], arguments["class_labels"])
    torch.testing.assert_close(run(model, arguments).sample, sample, **CLOSE)
    with pytest.raises(ValueError, match="`width_mult` below 1 needs weights that can be cut, but a layer"):
        model.set_width(0.5)
    model.disable_adapters()
    model.delete_adapters("style")
    assert forms_run(model, arguments, monkeypatch) == {"skipping"}
    model.set_width(0.5)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, **config), adapter_name="style")
    model.enable_adapters()
    with pytest.raises(ValueError, match="`width_mult` below 1 needs weights that can be cut"):
        run(model, arguments)


def test_lora_with_a_smaller_width(peft):
    model, arguments = with_lora(peft)
    full = run(model, arguments).sample
    model.set_width(0.5)
    half = assert_same_as_masked(model, arguments)
    assert (half - full).abs().max() > 0.01
    complete = assert_same_as_masked(model, arguments, complete_model=True)
    for layer in lora_layers(model):
        layer.merge()
    torch.testing.assert_close(run(model, arguments, complete_model=True).sample, complete, rtol=1e-4, atol=5e-4)


def test_lora_dropout_is_not_left_out(peft):
    """A cut weight holds the adapter, but not what it drops of its input."""
    model, arguments = with_lora(peft, lora_dropout=0.5)
    model.eval()  # PEFT adds its layers in training mode
    model.set_width(0.5)
    run(model, arguments)  # nothing is dropped in evaluation mode
    model.train()
    with pytest.raises(ValueError, match="or trains one with dropout. Merge the adapter, or use"):
        model(**arguments)


def test_lora_gradients(peft):
    """Adapters learn in the masked form, with checkpointing, and nothing else does."""
    model, arguments = with_lora(peft, "threshold")
    model.train().enable_gradient_checkpointing()
    arguments["class_dropout_mask"] = torch.tensor([True, False, False])
    output = model(**arguments)
    (output.sample * randn(*output.sample.shape, seed=5)).sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def scale_down(model):
    for layer in lora_layers(model):
        layer.set_scale("style", 0.2)


def draw_again(model):
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["style"].weight.mul_(-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.disable_adapters(),
        lambda model: model.set_adapters("subject"),
        lambda model: model.set_adapters(["style", "subject"], [0.3, 0.3]),
        lambda model: model.delete_adapters("style"),
        lambda model: [layer.merge() for layer in lora_layers(model)],
        scale_down,
        draw_again,
    ],
    ids=["disable", "other", "weights", "delete", "merge", "scale", "in place"],
)
def test_plan_notices_adapters(peft, change):
    model, arguments = with_lora(peft, names=("style", "subject"), arguments=dit_inputs(same_time=True))
    model.set_adapters("style")
    model.prepare_timesteps(torch.tensor([900.0, 333.25]), arguments["class_labels"])
    model.set_plan_step(1)
    before = run(model, arguments).sample
    change(model)
    after = run(model, arguments).sample
    assert model._plan is not None
    fresh = copy.deepcopy(model)
    fresh.clear_plan()
    torch.testing.assert_close(after, run(fresh, arguments).sample, rtol=1e-4, atol=5e-4)
    torch.testing.assert_close(after, run(model, arguments).sample, **CLOSE)
    slots = model._plan.cut_weights.slots.values()
    cut = [tensor for layer in slots for tensor in (layer.weight, layer.bias) if tensor is not None]
    held = sum(map(stored_bytes, (*cut, *model._plan.modulations)))
    assert model.plan_bytes == held  # what was replaced is no longer counted
    is_merged = any(layer.merged for layer in lora_layers(model))
    assert ((after - before).abs().max() > 0.01) != is_merged


@pytest.mark.parametrize("change", ["disable", "merge another"])
def test_plan_notices_that_adapters_are_unmerged(peft, change):
    """PEFT writes to `weight.data`, which leaves no trace on the weight."""
    model, arguments = with_lora(peft, names=("style", "subject"), arguments=dit_inputs(same_time=True))
    model.set_adapters("style")
    for layer in lora_layers(model):
        layer.merge(adapter_names=["style"])
    model.prepare_timesteps(torch.tensor([900.0, 333.25]), arguments["class_labels"])
    model.set_plan_step(1)
    before = run(model, arguments).sample
    if change == "disable":
        model.disable_adapters()
    else:
        for layer in lora_layers(model):
            layer.unmerge()
            layer.merge(adapter_names=["subject"])
    after = run(model, arguments).sample
    fresh = copy.deepcopy(model)
    torch.testing.assert_close(after, run(fresh, arguments).sample, rtol=1e-4, atol=5e-4)
    assert (after - before).abs().max() > 0.01


def test_plan_notices_an_adapter_in_the_place_of_another(peft):
    """Whose factors may come to lie where the first one's were."""
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"])
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)
    model.add_adapter(config, adapter_name="first")
    draw_adapters(model)
    model.prepare_timesteps(torch.tensor([900.0, 333.25]), arguments["class_labels"])
    model.set_plan_step(1)
    for i in range(5):
        run(model, arguments)
        model.delete_adapters("first" if i == 0 else "next")
        model.add_adapter(config, adapter_name="next")
        with torch.no_grad():
            for layer in lora_layers(model):
                layer.lora_A["next"].weight.copy_(0.25 * randn(*layer.lora_A["next"].weight.shape, seed=i))
                layer.lora_B["next"].weight.copy_(0.25 * randn(*layer.lora_B["next"].weight.shape, seed=10 + i))
        after = run(model, arguments).sample
        fresh = copy.deepcopy(model)
        fresh.clear_plan()
        torch.testing.assert_close(after, run(fresh, arguments).sample, rtol=1e-4, atol=5e-4)


def test_adalora_runs_masked(peft):
    """Its factors are parameters, with a third one between them."""
    arguments = dit_inputs()
    model = tiny_dyna_dit()
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["fc1"])
    model.add_adapter(config, adapter_name="style")
    draw_adapters(model)
    masked = run_masked(model, arguments).sample.detach()
    torch.testing.assert_close(run(model, arguments).sample, masked, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize(
    "targets", [["modulation"], ["attn_rate", "mlp_rate", "token_rate"], ["linear_1", "linear_2"]]
)
def test_plan_and_adapters_on_what_it_holds(peft, targets):
    """Added after it was made, before it is made, at another strength, and disabled."""
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)

    def assert_not_stale(**overrides):
        actual = run(model, arguments, **overrides).sample
        fresh = copy.deepcopy(model)
        fresh.clear_plan()
        torch.testing.assert_close(actual, run(fresh, arguments, **overrides).sample, **CLOSE)
        masked = run_masked(fresh, arguments, **overrides).sample.detach()
        torch.testing.assert_close(actual, masked, rtol=1e-4, atol=5e-3)  # of outputs with a spread of 30
        return actual

    model.prepare_timesteps(torch.tensor([900.0, 333.25]), arguments["class_labels"])
    plain = run(model, arguments).sample
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets), adapter_name="style")
    draw_adapters(model)
    changed = assert_not_stale()
    assert (changed - plain).abs().max() > 0.01
    model.prepare_timesteps(torch.tensor([900.0, 333.25]), arguments["class_labels"])
    model.set_plan_step(1)
    assert_not_stale()
    assert_not_stale(attention_kwargs={"scale": -1.0})
    model.disable_adapters()
    torch.testing.assert_close(assert_not_stale(), plain, **CLOSE)


# Processors and backends


class CountingProcessor(DynaAttnProcessor):
    calls = 0

    def __call__(self, attn, hidden_states, head_mask=None, active_heads=None):
        type(self).calls += 1
        return 2 * super().__call__(attn, hidden_states, head_mask, active_heads)


def test_attention_processors():
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)
    processors = model.attn_processors
    assert set(processors) == {f"transformer_blocks.{i}.attn.processor" for i in range(3)}
    expected = run(model, arguments).sample
    CountingProcessor.calls = 0
    model.set_attn_processor(CountingProcessor())
    changed = assert_same_as_masked(model, arguments)
    assert CountingProcessor.calls == 6 and (changed - expected).abs().max() > 0.01
    model.set_attn_processor({name: DynaAttnProcessor() for name in processors})
    assert torch.equal(run(model, arguments).sample, expected)
    model.fuse_qkv_projections()  # one product already
    assert torch.equal(run(model, arguments).sample, expected)


def test_attention_backends(monkeypatch):
    """The processor asks diffusers' dispatch, with the backend that was set, for the active heads only."""
    asked = []
    original = transformer_dyna_dit.dispatch_attention_fn

    def dispatch(query, key, value, *args, **kwargs):
        asked.append((getattr(kwargs["backend"], "value", kwargs["backend"]), tuple(query.shape)))
        return original(query, key, value, *args, **kwargs)

    monkeypatch.setattr(transformer_dyna_dit, "dispatch_attention_fn", dispatch)
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)
    asked.clear()
    output = run(model, arguments, output_masks=True)
    assert asked == [(None, (3, 16, int(heads), 8)) for heads in output.attn_masks[0].sum(dim=1)]
    for backend in ("_native_math", "native"):
        model.set_attention_backend(backend)
        asked.clear()
        torch.testing.assert_close(run(model, arguments).sample, output.sample, **CLOSE)
        assert [name for name, _ in asked] == [backend] * 3
    model.reset_attention_backend()
    assert torch.equal(run(model, arguments).sample, output.sample)


# dtypes


def test_loading_in_bfloat16_keeps_the_decisions(tmp_path, monkeypatch):
    """Routers and embedders stay in float32; `.to` casts them, and they still compute in float32."""
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments)
    expected = run(model, arguments, output_masks=True)
    model.save_pretrained(tmp_path)
    loaded = DynaDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = ("time_embedding", "class_embedding", "attn_rate", "mlp_rate", "token_rate", "token_selection")
    for name, parameter in loaded.named_parameters():
        is_kept = any(part in name for part in kept)
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name
    half = {**arguments, "hidden_states": arguments["hidden_states"].bfloat16()}
    computed = []
    original = DynaFloat32Linear.forward
    monkeypatch.setattr(
        DynaFloat32Linear,
        "forward",
        lambda self, input: computed.append(original(self, input)) or computed[-1],
    )
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for other in (loaded, cast):
        for call in (run, run_masked):
            output = call(other, half, output_masks=True)
            assert output.sample.dtype == torch.bfloat16
            if other is loaded:  # from the time in float32: exactly the same
                assert torch.equal(output.attn_masks, expected.attn_masks)
                assert torch.equal(output.mlp_masks, expected.mlp_masks)
            difference = (output.sample.float() - expected.sample).square().mean().sqrt()
            # bfloat16 rounds by 2^-9 in every layer, and a few tokens change sides
            assert difference < 0.3 * expected.sample.std()
    assert {result.dtype for result in computed} == {torch.float32}
    loaded.prepare_timesteps(arguments["timestep"], arguments["class_labels"])
    for i, time in enumerate(arguments["timestep"]):
        loaded.set_plan_step(i)
        output = run(loaded, half, timestep=time, output_masks=True)
        assert torch.equal(output.attn_masks[0], expected.attn_masks[i])


@pytest.mark.parametrize("router_mode", MODES)
def test_autocast(router_mode):
    """The decisions of all forms are taken in float32, and the outputs agree to bfloat16."""
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments, router_mode=router_mode)
    expected = run(model, arguments, output_masks=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [call(model, arguments, output_masks=True) for call in (run, run_masked)]
        model.prepare_timesteps(arguments["timestep"][:1], arguments["class_labels"])
        one = {**arguments, "timestep": arguments["timestep"][:1]}
        outputs.append(run(model, one, output_masks=True))
    for output in outputs[:2]:
        assert torch.equal(output.attn_masks, expected.attn_masks)
        assert torch.equal(output.mlp_masks, expected.mlp_masks)
        difference = (output.sample.float() - expected.sample).square().mean().sqrt()
        assert 0 < difference < 0.3 * expected.sample.std()
    assert torch.equal(outputs[2].attn_masks[0], expected.attn_masks[0])


def test_double_precision():
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments)
    expected = run(model, arguments).sample
    arguments["hidden_states"] = arguments["hidden_states"].double()
    double = model.double()
    for actual in (run(double, arguments).sample, run_masked(double, arguments).sample):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual.float(), expected, rtol=1e-4, atol=5e-4)


def test_layerwise_casting(monkeypatch):
    """Stored in 8 bits, computed in bfloat16: the same as a bfloat16 model that holds the rounded weights."""
    arguments = {**dit_inputs(), "hidden_states": dit_inputs()["hidden_states"].bfloat16()}
    model = tiny_dyna_dit().bfloat16()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    state = model.state_dict()
    stored = {name for name, value in state.items() if value.dtype == torch.float8_e4m3fn}
    layers = ("attn.qkv", "attn.to_out.0", "mlp.fc1", "mlp.fc2", "modulation")
    expected = {
        f"transformer_blocks.{i}.{layer}.{kind}" for i in range(3) for layer in layers for kind in ("weight", "bias")
    }
    assert stored == expected

    rounded = tiny_dyna_dit().bfloat16()
    rounded.load_state_dict({name: value.to(torch.bfloat16) for name, value in state.items()})
    assert forms_run(model, arguments, monkeypatch) == {"skipping"}
    for prepared in (False, True):
        if prepared:
            model.prepare_timesteps(arguments["timestep"], arguments["class_labels"])
        for _ in range(2):
            actual = run(model, arguments, output_masks=True)
            assert 0.2 < actual.compute_ratio.mean() < 0.9
            torch.testing.assert_close(actual.sample, run(rounded, arguments).sample, rtol=0.05, atol=0.1)
            masked = run_masked(rounded, arguments, output_masks=True)
            assert torch.equal(actual.attn_masks, masked.attn_masks)
            # two orders of rounding to bfloat16, and tokens whose scores these move to the other side
            assert (actual.sample - masked.sample).float().abs().median() < 0.02 * masked.sample.float().std()
    if prepared:
        assert model._plan.cut_weights.slots == {} and model._plan.modulations == []
    assert {name for name, value in model.state_dict().items() if value.dtype == torch.float8_e4m3fn} == stored


def test_layerwise_casting_with_adapters(peft):
    """Adapters that are cast too have their weights only inside their own calls."""
    model, arguments = with_lora(peft)
    model.to(torch.bfloat16)
    arguments["hidden_states"] = arguments["hidden_states"].bfloat16()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    output, masked = run(model, arguments, output_masks=True), run_masked(model, arguments, output_masks=True)
    assert torch.equal(output.attn_masks, masked.attn_masks)
    model.disable_adapters()
    without = run(model, arguments).sample
    errors = [(other - masked.sample).float().square().mean().sqrt() for other in (output.sample, without)]
    assert errors[0] < 0.25 * errors[1], errors  # tokens near the limit change sides in bfloat16


class Quantized(torch.nn.Module):
    """A quantiser's layer in the place of a Linear: 8-bit weights, one scale a row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, input):
        return torch.nn.functional.linear(input, self.weight * self.scale, self.bias)


class WrappedWeight(torch.Tensor):
    """A quantiser's weight inside the layer: a tensor subclass."""


@pytest.mark.parametrize("layer", ["mlp.fc1", "attn.qkv"])
@pytest.mark.parametrize("subclass", [False, True])
def test_quantised_layers_run_masked(layer, subclass, monkeypatch):
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments)
    unquantised = run(model, arguments, output_masks=True)
    parent, name = (f"transformer_blocks.1.{layer}").rsplit(".", 1)
    linear = model.get_submodule(f"{parent}.{name}")
    if subclass:
        linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(WrappedWeight))
    else:
        setattr(model.get_submodule(parent), name, Quantized(linear))
    assert forms_run(model, arguments, monkeypatch) == {"masked"}
    output = run(model, arguments, output_masks=True)
    assert torch.equal(output.attn_masks, unquantised.attn_masks)
    # 8 bits a weight: a relative error of 1/254 in one layer
    assert (output.sample - unquantised.sample).square().mean().sqrt() < 0.05 * unquantised.sample.std()
    model.prepare_timesteps(arguments["timestep"], arguments["class_labels"])
    assert torch.equal(run(model, arguments).sample, output.sample)
    complete = run(model, arguments, complete_model=True).sample
    assert (complete - output.sample).abs().max() > 0.01
    with pytest.raises(ValueError, match="`width_mult` below 1 needs weights that can be cut"):
        model.set_width(0.5)


def test_hooks_of_a_user():
    """On the modulation, whose output is theirs to keep and whose gradient theirs to see."""
    arguments = dit_inputs(same_time=True)
    model, seen = mixed_dyna_dit(arguments), []
    modulation = model.transformer_blocks[0].modulation
    handle = modulation.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    run(model, arguments)
    handle.remove()
    assert torch.equal(*seen[0])
    modulation.register_full_backward_hook(lambda module, before, after: seen.append(after))
    run_masked(model.train(), arguments).sample.sum().backward()
    assert len(seen) == 2 and seen[1][0].abs().sum() > 0


def test_forward_mode_derivatives():
    """oneDNN's products have none; without gradients too they are those of torch's."""
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)
    model.prepare_timesteps(arguments["timestep"][:1], arguments["class_labels"])
    run(model, arguments)  # cuts
    model.set_attention_backend("_native_math")  # the CPU's fused attention has no forward-mode derivative
    x, direction = arguments["hidden_states"], randn(*arguments["hidden_states"].shape, seed=9)
    for options in ({}, {"complete_model": True}):

        def call(x):
            return model(**{**arguments, "hidden_states": x}, **options).sample

        derivatives = []
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                derivatives.append(torch.func.jvp(call, (x,), (direction,))[1].detach())
            if not options:
                model.prepare_timesteps(arguments["timestep"][:1], arguments["class_labels"])
                run(model, arguments)
        assert derivatives[0].abs().max() > 0.1
        torch.testing.assert_close(derivatives[1], derivatives[0], rtol=1e-3, atol=1e-3)


def test_caches_leave_the_plan_alone():
    """Their hooks hold outputs, not weights."""
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    model.prepare_timesteps(arguments["timestep"][:1], arguments["class_labels"])
    with model.cache_context("cond"):
        run(model, arguments)
    assert model._plan.modulations and model._plan.cut_weights.slots


# Offloading


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(options, router_mode, monkeypatch):
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments, router_mode=router_mode)
    expected = run_masked(model, arguments).sample.detach()
    model.enable_group_offload(onload_device=torch.device("cpu"), **options)
    for prepared in (False, True):
        if prepared:
            model.prepare_timesteps(arguments["timestep"], arguments["class_labels"])
        for _ in range(2):
            torch.testing.assert_close(run(model, arguments).sample, expected, **CLOSE)
    assert model._plan.cut_weights.slots == {}  # they would stay behind when the weights go
    assert forms_run(model, arguments, monkeypatch) == {"skipping"}


@pytest.mark.parametrize("tool", ["group offload", "one layer offloaded", "LoRA", "LoRA on one layer"])
def test_plan_orders_groups_for_all_layers_alike(peft, tool):
    """A plan puts groups into an order of its own; layers that are cut in each call, or adapted, follow it."""
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit(num_attention_heads=8, attention_head_dim=4)
    times = torch.linspace(20, 980, 12)
    if tool.startswith("LoRA"):
        targets = ["qkv", "to_out.0", "fc1", "fc2"] if tool == "LoRA" else ["fc2"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets), adapter_name="style")
        draw_adapters(model)
    expected = [run_masked(model, arguments, timestep=time).sample.detach() for time in times]
    if tool == "group offload":
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    elif tool == "one layer offloaded":
        for block in model.transformer_blocks:
            apply_group_offloading(block.mlp.fc2, torch.device("cpu"), offload_type="leaf_level")
    model.prepare_timesteps(times, arguments["class_labels"])
    sets = [
        groups
        for decisions in model._plan.decisions
        for decision in decisions
        for _, groups in (*decision.heads, *decision.groups)
    ]
    assert sum(list(groups) != sorted(groups) for groups in sets) > 10
    for step, time in enumerate(times):
        model.set_plan_step(step)
        torch.testing.assert_close(run(model, arguments, timestep=time).sample, expected[step], rtol=1e-3, atol=1e-3)
    num_layers = {"group offload": 0, "one layer offloaded": 9}.get(tool, 12)
    assert len(model._plan.cut_weights.slots) == num_layers


@pytest.mark.parametrize("with_adapter", [False, True])
def test_accelerate_cpu_offload(with_adapter, monkeypatch, request):
    """Weights are on the meta device outside of each layer's own call."""
    arguments = dit_inputs()
    if with_adapter:
        model, arguments = with_lora(request.getfixturevalue("peft"))
    else:
        model = mixed_dyna_dit(arguments)
    expected = run(model, arguments, output_masks=True)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert model.transformer_blocks[0].attn_rate.weight.device.type == "meta"
    for prepared in (False, True):
        if prepared:
            model.prepare_timesteps(arguments["timestep"], arguments["class_labels"])
        output = run(model, arguments, output_masks=True)
        assert torch.equal(output.token_masks, expected.token_masks)
        torch.testing.assert_close(output.sample, expected.sample, **CLOSE)


def test_device_map(tmp_path):
    """`from_pretrained(device_map=...)` splits between blocks."""
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments)
    model.save_pretrained(tmp_path)
    loaded = DynaDiTTransformer2DModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(run(loaded, arguments).sample, run(model, arguments).sample, **CLOSE)


# torch.compile


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield torch.compiler
    torch.compiler.reset()


@pytest.mark.parametrize("router_mode", MODES)
@pytest.mark.parametrize("options", [{}, {"complete_model": True}, {"output_masks": True}], ids=str)
def test_compiles_without_a_graph_break_or_a_recompile(compiler, router_mode, options):
    """The plain model of a user: evaluation, no gradients, one timestep and one label after another."""
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments, router_mode=router_mode)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = run(model, arguments, **options)
    torch.testing.assert_close(run(compiled, arguments, **options).sample, expected.sample, **CLOSE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(4):
            changed = {
                **arguments,
                "timestep": arguments["timestep"] + 31 * i,
                "class_labels": torch.tensor([i, 5, 2]),
            }
            output, expected = run(compiled, changed, **options), run(model, changed, **options)
            torch.testing.assert_close(output.sample, expected.sample, **CLOSE)
            for name, value in expected.items():
                torch.testing.assert_close(output[name], value, **CLOSE)


@pytest.mark.parametrize("router_mode", MODES)
def test_compiled_training(compiler, router_mode):
    """The masked form with gradients, noise given."""
    arguments = {**dit_inputs(), "class_dropout_mask": torch.tensor([True, False, False]), "output_masks": True}
    arguments["gate_noise"] = torch.rand(3, 2, 22, generator=torch.Generator().manual_seed(0))
    gradients = []
    for is_compiled in (False, True):
        model = tiny_dyna_dit(router_mode=router_mode, num_layers=2).train()
        output = (torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model)(**arguments)
        (output.sample.square().mean() + output.compute_ratio.mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("router_mode", MODES)
def test_compile_repeated_blocks_in_training(compiler, router_mode):
    """One graph for all ten blocks: more than torch's limit of eight recompiles would be an error."""
    arguments = dit_inputs()
    model = tiny_dyna_dit(num_layers=10, router_mode=router_mode).train()
    arguments["class_dropout_mask"] = torch.tensor([True, False, False])
    if router_mode == "threshold":
        num_gates = 2 * (model.config.num_attention_heads - 1) + 16
        arguments["gate_noise"] = torch.rand(3, 10, num_gates, generator=torch.Generator().manual_seed(0))
    expected = run(model, arguments, output_masks=True)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        output = run(model, arguments, output_masks=True)
        # ten layers amplify another order of summation
        torch.testing.assert_close(output.sample, expected.sample, rtol=1e-3, atol=1e-3)
        assert torch.equal(output.token_masks, expected.token_masks)
    for i in range(3):
        run(model, arguments, timestep=100.0 * i, output_masks=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


TRAJECTORY = torch.linspace(980, 20, 12)


@pytest.fixture
def traced_calls(monkeypatch):
    """Calls of compiled blocks that skip."""
    calls, call_traced = [], DynaDiTBlock._call_traced
    monkeypatch.setattr(DynaDiTBlock, "_call_traced", lambda *args: (calls.append(args[0]), call_traced(*args))[1])
    return calls


@pytest.mark.parametrize(
    ("router_mode", "plan", "adapter"),
    [
        ("capacity", None, False),
        ("capacity", 2**30, False),
        ("capacity", 200_000, False),
        ("threshold", 2**30, False),
        ("threshold", None, True),
        ("capacity", 2**30, True),
    ],
)
def test_compiled_blocks_skip_with_few_graphs(compiler, peft, router_mode, plan, adapter, traced_calls):
    """
    Ten blocks at twelve timesteps, hardly two of which compute the same, with a graph where tokens are left out and one
    where none are; then another batch and another size.
    """
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit(num_layers=10, num_attention_heads=8, attention_head_dim=4, router_mode=router_mode)
    first, second, third = model.transformer_blocks[:3]
    for router in (first.attn_rate, second.mlp_rate, third.attn_rate, third.mlp_rate):
        torch.nn.init.constant_(router.bias, 200.0)  # all heads, all groups, and both
    torch.nn.init.constant_(third.token_rate.bias if router_mode == "capacity" else third.mlp_rate.bias, 200.0)
    if adapter:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "fc2"]), adapter_name="style")
        draw_adapters(model)
    expected = [run(model, arguments, timestep=t, output_masks=True) for t in TRAJECTORY]
    computed = {
        (*output.attn_masks[0, i].tolist(), *output.mlp_masks[0, i].tolist()) for output in expected for i in range(10)
    }
    assert len(computed) > 60
    full = {(all(output.attn_masks[0, i]), all(output.mlp_masks[0, i])) for output in expected for i in range(10)}
    assert len(full) == 4

    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    if plan is not None:
        model.prepare_timesteps(TRAJECTORY, arguments["class_labels"], max_plan_bytes=plan)
    for output_masks in (False, True):
        for step, t in enumerate(TRAJECTORY):
            model.set_plan_step(step)
            output = run(model, arguments, timestep=t, output_masks=output_masks)
            torch.testing.assert_close(output.sample, expected[step].sample, rtol=1e-3, atol=5e-3)
            if output_masks:
                for name in ("attn_masks", "mlp_masks", "token_masks", "compute_ratio"):
                    torch.testing.assert_close(output[name], expected[step][name])
            assert model.plan_bytes <= (plan or 0)
    assert len(traced_calls) > 0.8 * 2 * 12 * 10
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 3  # two, and one where two widths were equal at first
    for changed in (dit_inputs(batch_size=1, same_time=True), {**arguments, "hidden_states": randn(3, 4, 4, 12)}):
        for t in TRAJECTORY[:4]:
            run(model, changed, timestep=t)
    run(model, arguments, complete_model=True)
    assert counters["stats"]["unique_graphs"] <= 8  # one of them dense; torch's limit is 8 for either form
    assert not counters["graph_break"]


def test_compiled_blocks_compute_less(compiler, traced_calls):
    """The products of a compiled block have the size of what is active."""
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments, num_attention_heads=8, attention_head_dim=4)
    masks = run(model, arguments, output_masks=True)
    shapes = []

    def backend(graph, inputs):
        def call(*args):
            shapes.extend(tuple(arg.shape) for arg in args if torch.is_tensor(arg) and arg.ndim == 2)
            return graph(*args)

        return call

    model.compile(fullgraph=True, backend=backend)
    model.prepare_timesteps(arguments["timestep"][:1], arguments["class_labels"])
    run(model, arguments)
    num_compared = 0
    for i, block in enumerate(model.transformer_blocks):
        heads, groups = int(masks.attn_masks[0, i].sum()), int(masks.mlp_masks[0, i].sum())
        if block in traced_calls:
            assert (3 * heads * 4, 32) in shapes and (32, groups * 16) in shapes
            num_compared += heads < 8 and groups < 8
    assert num_compared > 0


def test_mixed_timesteps_in_compiled_blocks_run_eagerly(compiler, traced_calls):
    arguments = dit_inputs()
    model = mixed_dyna_dit(arguments)
    expected = run(model, arguments, output_masks=True)
    model.compile(fullgraph=True, backend="eager")
    output = run(model, arguments, output_masks=True)
    torch.testing.assert_close(output.sample, expected.sample, **CLOSE)
    assert not traced_calls
    pickle.loads(pickle.dumps(model))  # without what was compiled


@pytest.mark.parametrize("tool", ["layerwise casting", "group offload", "block offload"])
def test_compiled_blocks_whose_weights_come_and_go(compiler, tool, traced_calls):
    """Where the layers themselves are hooked, there is nothing for a graph to hold outside of their own calls."""
    arguments = dit_inputs(same_time=True)
    model = mixed_dyna_dit(arguments)
    if tool == "layerwise casting":
        model.to(torch.bfloat16)
        arguments["hidden_states"] = arguments["hidden_states"].bfloat16()
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    else:
        options = {"offload_type": "leaf_level"}
        if tool == "block offload":
            options = {"offload_type": "block_level", "num_blocks_per_group": 1}
        model.enable_group_offload(onload_device=torch.device("cpu"), **options)
    expected = run(model, arguments).sample
    # Two calls may round to bfloat16 differently: where a tensor lies decides which kernel takes it.
    close = {"rtol": 0.05, "atol": 0.1} if tool == "layerwise casting" else CLOSE
    model.compile(fullgraph=True, backend="eager")
    for prepared in (False, True):
        if prepared:
            model.prepare_timesteps(arguments["timestep"][:1], arguments["class_labels"])
        torch.testing.assert_close(run(model, arguments).sample, expected, **close)
    assert bool(traced_calls) == (tool == "block offload")


@pytest.mark.slow
@pytest.mark.parametrize("router_mode", MODES)
def test_inductor(compiler, router_mode):
    """What users run, down to machine code; needs a C++ compiler."""
    arguments = dit_inputs(same_time=True)
    model = tiny_dyna_dit(num_layers=3, router_mode=router_mode)
    expected = [run(model, arguments, timestep=t).sample for t in TRAJECTORY]
    complete = run(model, arguments, complete_model=True).sample
    model.compile_repeated_blocks(fullgraph=True)
    model.prepare_timesteps(TRAJECTORY, arguments["class_labels"])
    for step, t in enumerate(TRAJECTORY):
        model.set_plan_step(step)
        torch.testing.assert_close(run(model, arguments, timestep=t).sample, expected[step], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(model, arguments, complete_model=True).sample, complete, rtol=1e-3, atol=1e-3)
