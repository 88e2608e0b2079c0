# SPDX-License-Identifier: Apache-2.0
"""A model of another task gives the outputs of the model that it starts from, complete and dynamic, whatever it is told."""

import pytest
import torch

from diffusers_dyna.training.warm_start import adapt_transformer, load_transformer

from ..testing_utils import dit_inputs, mixed_dyna_dit, randn, tiny_dyna_dit


# The sums of a layer have further terms, all zero, or one term in another place; outputs are of order 5.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXT = {"num_classes": None, "cross_attention_dim": 24, "caption_channels": 16}
MODES = ("capacity", "threshold")


def captions() -> dict:
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    return {"encoder_hidden_states": randn(3, 6, 16, seed=5), "encoder_attention_mask": mask}


@torch.no_grad()
def assert_same(model, adapted, inputs: dict, other_inputs: dict) -> None:
    for complete_model in (True, False):
        options = {"complete_model": complete_model, "output_masks": True}
        expected, output = model(**inputs, **options), adapted(**other_inputs, **options)
        torch.testing.assert_close(output.sample, expected.sample, **CLOSE)
        for name in ("attn_masks", "mlp_masks", "token_masks"):
            assert torch.equal(getattr(output, name), getattr(expected, name)), name
    assert not torch.allclose(model(**inputs, complete_model=True).sample, expected.sample, **CLOSE)  # some are off


@pytest.mark.parametrize("router_mode", MODES)
def test_from_classes_to_inpainting_and_upscaling(router_mode):
    inputs = dit_inputs()
    model = mixed_dyna_dit(inputs, router_mode=router_mode)
    for channels, with_level in ((5, False), (4, True)):
        config = {"condition_channels": channels, "noise_level_conditioning": with_level}
        adapted = adapt_transformer(model, {**config, "num_classes": 5}).eval()
        assert (adapted.config.condition_channels, adapted.config.in_channels) == (channels, 4)
        hidden_states = torch.cat([inputs["hidden_states"], randn(3, channels, 8, 8, seed=9)], dim=1)
        level = {"noise_level": torch.tensor([0.0, 120.0, 350.0])} if with_level else {}
        assert_same(model, adapted, inputs, {**inputs, **level, "hidden_states": hidden_states})


POOLING = {"caption_pooling": True}
MODULATION = {**TEXT, **POOLING, "cross_attention_dim": None}


@pytest.mark.parametrize(
    "config",
    [TEXT, MODULATION, {**MODULATION, "caption_memory_size": 4}, {**TEXT, **POOLING}],
    ids=["cross-attention", "modulation", "memory", "both"],
)
@pytest.mark.parametrize("router_mode", MODES)
def test_from_classes_to_captions(router_mode, config):
    """The outputs are those of the null class, and the routers, which have not heard of it, decide as before."""
    inputs = {**dit_inputs(), "class_labels": torch.full((3,), 5)}
    model = mixed_dyna_dit(inputs, router_mode=router_mode)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = adapt_transformer(model, config).eval()
    assert adapted.class_embedding is None
    assert (adapted.caption_projection is not None) == (config["cross_attention_dim"] is not None)
    assert (adapted.caption_embedding is not None) == ("caption_pooling" in config)
    assert (adapted.caption_memory is not None) == ("caption_memory_size" in config)
    assert adapted.has_null_caption
    del inputs["class_labels"]
    assert_same(model, adapted, {**inputs, "class_labels": torch.full((3,), 5)}, {**inputs, **captions()})
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    "config, added",
    [(TEXT, {**POOLING, "caption_memory_size": 4}), (MODULATION, {"cross_attention_dim": 24})],
    ids=["modulation", "cross-attention"],
)
def test_another_reading_of_captions_is_added(config, added):
    inputs = {**dit_inputs(), **captions()}
    del inputs["class_labels"]
    model = mixed_dyna_dit(inputs, **config)
    adapted = adapt_transformer(model, {**config, **added}).eval()
    assert adapted.caption_embedding is not None and adapted.config.cross_attention_dim == 24
    assert_same(model, adapted, inputs, inputs)


@pytest.mark.parametrize("router_mode", MODES)
def test_from_captions_to_inpainting_and_upscaling(router_mode):
    inputs = {**dit_inputs(), **captions()}
    del inputs["class_labels"]
    model = mixed_dyna_dit(inputs, router_mode=router_mode, **TEXT)
    for channels, with_level in ((5, False), (4, True)):
        config = {**TEXT, "condition_channels": channels, "noise_level_conditioning": with_level}
        adapted = adapt_transformer(model, config).eval()
        hidden_states = torch.cat([inputs["hidden_states"], randn(3, channels, 8, 8, seed=9)], dim=1)
        level = {"noise_level": torch.tensor([0.0, 120.0, 350.0])} if with_level else {}
        assert_same(model, adapted, inputs, {**inputs, **level, "hidden_states": hidden_states})


def test_without_a_null_class_the_mean_stands_in():
    inputs = {**dit_inputs(), "class_labels": torch.tensor([1, 2, 4])}
    model = mixed_dyna_dit(inputs, class_dropout_prob=0.0)
    adapted = adapt_transformer(model, TEXT).eval()
    with torch.no_grad():
        model.class_embedding.weight[:] = model.class_embedding.weight.mean(dim=0)
    expected = {**inputs, "class_labels": torch.zeros(3, dtype=torch.long)}
    del inputs["class_labels"]
    assert_same(model, adapted, expected, {**inputs, **captions()})


def test_classes_may_stay():
    inputs = dit_inputs()
    model = mixed_dyna_dit(inputs)
    adapted = adapt_transformer(model, {"cross_attention_dim": 16}).eval()
    assert_same(model, adapted, inputs, {**inputs, **captions()})


def test_what_is_new_can_learn():
    """What starts at zero has a gradient, and moves the outputs once it is no longer zero."""
    torch.manual_seed(0)
    inputs = {**dit_inputs(), **captions()}
    del inputs["class_labels"]
    model = adapt_transformer(mixed_dyna_dit(dit_inputs()), {**TEXT, "condition_channels": 5})
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], randn(3, 5, 8, 8)], dim=1)
    model(**inputs).sample.square().mean().backward()
    for parameter in (model.transformer_blocks[0].cross_attn.to_out[0].weight, model.pos_embed.proj.weight[:, 4:]):
        assert not parameter.any()
    assert model.transformer_blocks[0].cross_attn.to_out[0].weight.grad.abs().min() > 0
    assert model.pos_embed.proj.weight.grad[:, 4:].abs().min() > 0


def test_another_router_mode_starts_the_routers_anew():
    model = tiny_dyna_dit(router_mode="threshold")
    adapted = adapt_transformer(model, {"router_mode": "capacity"})
    assert adapted.config.router_mode == "capacity"
    inputs = dit_inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs, complete_model=True).sample, model(**inputs, complete_model=True).sample, **CLOSE
        )
        assert adapted(**inputs, output_masks=True).compute_ratio.min() == 1


def test_what_fits_is_taken_as_it_is(tmp_path):
    model = tiny_dyna_dit(**TEXT)
    assert adapt_transformer(model, {**TEXT, "in_channels": 4}) is model
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        loaded = load_transformer(path)
        assert torch.equal(loaded.proj_out.weight, model.proj_out.weight)


@pytest.mark.parametrize("asked", [{"condition_channels": 4}, {"noise_level_conditioning": True}, TEXT])
def test_weights_under_other_names_are_not_dropped(asked):
    model = tiny_dyna_dit()
    block = model.transformer_blocks[1]
    block.wrapped = block.attn.to_out  # as an adapter renames them
    del block.attn.to_out
    with pytest.raises(ValueError, match="`transformer` has other weights than its config says") as error:
        adapt_transformer(model, asked)
    names = [f"'transformer_blocks.1.{{}}.0.{name}'" for name in ("weight", "bias")]
    for part, where in (("attn.to_out", "are not in it"), ("wrapped", "are beyond it")):
        assert f"[{', '.join(name.format(part) for name in names)}] {where}" in str(error.value)


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (
            {},
            {"sample_size": 16, "num_classes": None},
            "`sample_size`=8 instead of 16, `num_classes`=5 instead of None",
        ),
        (
            {},
            {"in_channels": 3, "condition_channels": 4},
            "`in_channels`=4 instead of 3. Use the `--resolution`, the data",
        ),
        (
            {"condition_channels": 5},
            {"in_channels": 3, "condition_channels": 4},
            "`condition_channels`=5 instead of 4. Use the `--resolution`, the data",
        ),
        (
            {"condition_channels": 5},
            {"condition_channels": 4},
            "`condition_channels`=5 instead of 4. It was trained for another task: start from a model that draws (`--task "
            "generate`), or from one of the same task.",
        ),
        (
            {"condition_channels": 5},
            {"condition_channels": 0},
            "`condition_channels`=5 instead of 0. It was trained for another task",
        ),
        (
            {"condition_channels": 4, "noise_level_conditioning": True},
            {"condition_channels": 4, "noise_level_conditioning": False},
            "`noise_level_conditioning`=True instead of False. It was trained for another task",
        ),
        (TEXT, {"caption_channels": 32, "cross_attention_dim": 24}, "`caption_channels`=16 instead of 32"),
        (TEXT, {"cross_attention_dim": None}, "`cross_attention_dim`=24 instead of None"),
        ({**TEXT, "caption_channels": None}, TEXT, "`caption_channels`=None instead of 16"),
        (MODULATION, {"caption_memory_size": 4}, "`caption_memory_size`=None instead of 4"),
        ({"learn_sigma": True}, {"learn_sigma": False, **TEXT}, "`learn_sigma`=True instead of False"),
    ],
)
def test_what_does_not_fit_is_named(config, asked, message):
    with pytest.raises(ValueError, match="`weights` does not fit this run: it has") as error:
        adapt_transformer(tiny_dyna_dit(**config), asked, "`weights`")
    assert message in str(error.value)
    assert "`router_mode`" not in str(error.value)
