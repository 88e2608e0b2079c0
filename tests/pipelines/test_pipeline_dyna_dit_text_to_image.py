# SPDX-License-Identifier: Apache-2.0
"""
`DynaDiTTextToImagePipeline` against the sampling loop written out by hand: each text encoded alone, without padding or
a mask, the halves of guidance in calls of their own, and nothing prepared. With text encoders of transformers, tiny
ones made from their configs.
"""

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers import (
    AutoencoderDC,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PixArtAlphaPipeline,
    SanaPipeline,
)
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from transformers import T5Config, T5Model

import diffusers_dyna
from diffusers_dyna import DynaDiTPipeline, DynaDiTTextToImagePipeline, FlowMatchODEScheduler

from ..testing_utils import logged_warnings, randn
from .dyna_dit_common import (
    TEXT,
    DynaDiTPipelineTests,
    assert_close,
    generators,
    leave_a_part_out,
    quiet,
    tiny_dit,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)


# Of a transformer that has classes too.
CLASSES = {"num_classes": 3, "class_dropout_prob": 0.1}
PROMPTS = ["a big red square", "blue", "small dark square"]
ENCODERS = ("bert", "clip", "t5")
# Other readings of captions than by cross-attention.
MODULATION = {"cross_attention_dim": None, "caption_pooling": True}
MEMORY = {**MODULATION, "caption_memory_size": 3, "caption_memory_temperature": 0.02}
BOTH = {**MEMORY, "cross_attention_dim": 24}
READINGS = pytest.mark.parametrize("reading", [MODULATION, MEMORY, BOTH], ids=["modulation", "memory", "both"])


def make_pipeline(scheduler=None, vae=None, encoder="bert", id2label=None, **overrides) -> DynaDiTTextToImagePipeline:
    transformer = tiny_dit(**{**TEXT, **overrides})
    text = (tiny_text_encoder(encoder), tiny_tokenizer())
    pipe = quiet(
        DynaDiTTextToImagePipeline(transformer, scheduler or FlowMatchODEScheduler(), *text, vae, id2label=id2label)
    )
    if transformer.caption_memory is not None:
        with torch.no_grad():
            transformer.write_caption_memory(*pipe.encode_prompt(["red", "dark blue", "a square"])[:2])
    return pipe


def draw(pipe, *args, guidance_scale=1.0, **kwargs) -> torch.Tensor:
    """The latents of three steps, not guided unless told so."""
    arguments = {"num_inference_steps": 3, "output_type": "latent", **kwargs}
    return pipe(*args, guidance_scale=guidance_scale, **arguments).images


@torch.no_grad()
def encode(pipe, text: str, **settings) -> torch.Tensor:
    """Text states of one text alone: nothing to pad."""
    ids = pipe.tokenizer(text, return_tensors="pt", **settings).input_ids
    return pipe.text_encoder(ids).last_hidden_state


@torch.no_grad()
def written_out_loop(
    pipe,
    prompts: list[str],
    steps: int,
    scale: float = 1.0,
    negative: list[str] | None = None,
    interval=(0.0, 1.0),
    rescale: float = 0.0,
    guided_channels: int = 3,
    labels: list[int] | None = None,
) -> torch.Tensor:
    """Row by row, seeded by the place of the prompt."""
    transformer, rows = pipe.transformer, []
    for row, prompt in enumerate(prompts):
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        sample = randn(1, transformer.config.in_channels, 8, 8, seed=row) * getattr(scheduler, "init_noise_sigma", 1.0)
        label = None if labels is None else torch.tensor(labels[row : row + 1])
        for t in scheduler.timesteps:
            text = encode(pipe, prompt)
            output = transformer(sample, t.float(), label, encoder_hidden_states=text).sample[:, :3]
            if scale > 1 and interval[0] <= t / 1000 <= interval[1]:
                null = None if negative is None else encode(pipe, negative[row])  # None is the null caption
                null_output = transformer(sample, t.float(), encoder_hidden_states=null).sample[:, :3]
                k = guided_channels
                guided = null_output[:, :k] + scale * (output[:, :k] - null_output[:, :k])
                rescaled = guided * output[:, :k].std() / guided.std()
                output[:, :k] = rescale * rescaled + (1 - rescale) * guided
            sample = scheduler.step(output, t, sample).prev_sample
        rows.append(sample)
    return torch.cat(rows)


class TestStandard(DynaDiTPipelineTests):
    pipeline_class = DynaDiTTextToImagePipeline

    def make(self, **overrides):
        return make_pipeline(**overrides)

    def arguments(self, *entries):
        return {"prompt": [PROMPTS[entry % 3] for entry in entries], "guidance_scale": 2.0}


class TestStandardOfAMemory(TestStandard):
    def make(self, **overrides):
        return make_pipeline(**{**MEMORY, **overrides})


# The loop and guidance


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_loop(encoder, scale):
    pipe = make_pipeline(encoder=encoder)
    expected = written_out_loop(pipe, PROMPTS, 4, scale)
    actual = draw(pipe, PROMPTS, num_inference_steps=4, guidance_scale=scale, generator=generators(0, 1, 2))
    assert expected.std() > 0.05
    assert_close(actual, expected)


@READINGS
def test_loop_of_captions_that_modulate(reading):
    """Of prompts of several lengths, each with a negative one, as one alone."""
    pipe = make_pipeline(**reading)
    negative = ["bright", "a small blue square", "dark"]
    expected = written_out_loop(pipe, PROMPTS, 4, 2.5, negative)
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5, "generator": generators(0, 1, 2)}
    assert_close(draw(pipe, PROMPTS, negative, **arguments), expected)
    arguments["generator"] = generators(0, 1, 2)
    others = draw(pipe, PROMPTS[::-1], negative, **arguments)
    assert (others - expected).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 0.01


def test_guidance_is_that_of_pixart_and_sana_by_default():
    pipe = make_pipeline()
    for other in (PixArtAlphaPipeline, SanaPipeline):
        assert inspect.signature(other.__call__).parameters["guidance_scale"].default == 4.5
    images = pipe(PROMPTS, num_inference_steps=3, output_type="latent", generator=generators(0, 1, 2)).images
    assert_close(images, written_out_loop(pipe, PROMPTS, 3, 4.5))


@pytest.mark.parametrize("make_scheduler", [DDIMScheduler, FlowMatchHeunDiscreteScheduler])
def test_loop_of_other_schedulers(make_scheduler):
    pipe = make_pipeline(make_scheduler())
    expected = written_out_loop(pipe, PROMPTS, 4, 2.5)
    actual = draw(pipe, PROMPTS, num_inference_steps=4, guidance_scale=2.5, generator=generators(0, 1, 2))
    assert_close(actual, expected)


@pytest.mark.parametrize("negative", ["bright", ["bright", "a small blue square", "dark"]], ids=["one", "each"])
@pytest.mark.parametrize("interval", [None, (0.4, 0.8)])
def test_negative_prompt(negative, interval):
    """Longer and shorter than the prompt, so that both halves are padded; without it the null caption stands."""
    pipe = make_pipeline()
    each = [negative] * 3 if isinstance(negative, str) else negative
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5, "guidance_interval": interval}
    actual = draw(pipe, PROMPTS, negative, generator=generators(0, 1, 2), **arguments)
    between = (0.3999, 0.8001) if interval else (0.0, 1.0)
    assert_close(actual, written_out_loop(pipe, PROMPTS, 4, 2.5, each, between))
    assert (actual - draw(pipe, PROMPTS, generator=generators(0, 1, 2), **arguments)).abs().max() > 0.01


def test_negative_prompt_without_guidance_has_no_effect():
    """As in diffusers' pipelines, but said."""
    pipe = make_pipeline()
    expected = draw(pipe, "red", generator=generators(0))
    with logged_warnings() as warnings:
        actual = draw(pipe, "red", negative_prompt="blue", generator=generators(0))
    assert_close(actual, expected)
    assert warnings == ["`negative_prompt` has no effect without guidance: `guidance_scale`=1.0 must be above 1."]


@pytest.mark.parametrize("settings", [{"rescale": 0.7}, {"rescale": 1.0, "guided_channels": 2}], ids=str)
def test_guidance_rescale(settings):
    pipe = make_pipeline()
    arguments = {"guidance_rescale": settings["rescale"], "guidance_channels": settings.get("guided_channels")}
    actual = draw(pipe, PROMPTS, guidance_scale=4.0, generator=generators(0, 1, 2), **arguments)
    assert pipe.guidance_rescale == settings["rescale"]
    assert_close(actual, written_out_loop(pipe, PROMPTS, 3, 4.0, **settings))
    plain = draw(pipe, PROMPTS, guidance_scale=4.0, generator=generators(0, 1, 2))
    assert (actual - plain).abs().max() > 0.01


def test_guidance_rescaled_in_full_has_the_deviation_of_the_text():
    """One Euler step from noise gives the prediction."""
    pipe = make_pipeline()
    latents = randn(1, 3, 8, 8)
    arguments = {"num_inference_steps": 1, "latents": latents}
    text, rescaled, guided = (
        latents - draw(pipe, "red", guidance_scale=scale, guidance_rescale=rescale, **arguments)
        for scale, rescale in ((1.0, 0.0), (5.0, 1.0), (5.0, 0.0))
    )
    assert rescaled.std().item() == pytest.approx(text.std().item(), rel=1e-4)
    assert guided.std() > 1.1 * text.std()
    assert_close(F.cosine_similarity(rescaled.flatten(), guided.flatten(), dim=0), torch.tensor(1.0))


def test_guidance_interval():
    pipe = make_pipeline()
    batches = []
    pipe.transformer.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    arguments = {"num_inference_steps": 5, "guidance_scale": 2.5, "guidance_interval": (0.4, 0.8)}
    actual = draw(pipe, PROMPTS[:1], generator=generators(0), **arguments)
    assert batches == [1, 2, 2, 2, 1]  # at 1, 0.8, 0.6, 0.4 and 0.2
    assert_close(actual, written_out_loop(pipe, PROMPTS[:1], 5, 2.5, interval=(0.3999, 0.8001)))


@pytest.mark.parametrize("interval", [None, (0.4, 0.8)])
@pytest.mark.parametrize("negative", [None, "bright"])
def test_text_is_computed_once(interval, negative):
    """Keys and values of all steps, guided and not, are those that the plan holds."""
    pipe = make_pipeline()
    calls = []
    for block in pipe.transformer.transformer_blocks:
        to_kv = block.cross_attn.to_kv
        forward = to_kv.forward
        to_kv.forward = lambda *args, forward=forward, **kwargs: calls.append(1) or forward(*args, **kwargs)
    arguments = {"guidance_scale": 2.0, "guidance_interval": interval, "num_inference_steps": 6}
    draw(pipe, PROMPTS, negative, **arguments)
    assert len(calls) == len(pipe.transformer.transformer_blocks)
    draw(pipe, PROMPTS, negative, max_plan_bytes=0, **arguments)
    assert len(calls) == 7 * len(pipe.transformer.transformer_blocks)


@READINGS
def test_captions_that_modulate_are_embedded_once(reading):
    pipe, calls = make_pipeline(**reading), []
    embed = pipe.transformer._embed_caption
    pipe.transformer._embed_caption = lambda *args: calls.append(1) or embed(*args)
    arguments = {"guidance_scale": 2.0, "guidance_interval": (0.4, 0.8), "num_inference_steps": 6}
    images = draw(pipe, PROMPTS, "bright", generator=generators(0, 1, 2), **arguments)
    assert len(calls) == 1
    expected = draw(pipe, PROMPTS, "bright", generator=generators(0, 1, 2), max_plan_bytes=0, **arguments)
    assert len(calls) == 7
    assert_close(images, expected)


def test_a_model_of_text_and_classes_draws_with_the_null_class():
    pipe = make_pipeline(**CLASSES)
    actual = draw(pipe, PROMPTS, guidance_scale=2.0, generator=generators(0, 1, 2))
    assert_close(actual, written_out_loop(pipe, PROMPTS, 3, 2.0))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_texts_and_classes(scale):
    """Labels, names, arrays; as many as prompts, or one for all of them, or one prompt for all labels."""
    pipe = make_pipeline(id2label={0: "cat", 1: "dog", 2: "bird"}, **CLASSES)
    expected = written_out_loop(pipe, PROMPTS, 3, scale, labels=[2, 0, 1])
    for labels in ([2, 0, 1], ["bird", 0, "dog"], torch.tensor([2, 0, 1]), np.array([2, 0, 1])):
        arguments = {"guidance_scale": scale, "latents": torch.cat([randn(1, 3, 8, 8, seed=row) for row in range(3)])}
        assert_close(draw(pipe, PROMPTS, class_labels=labels, **arguments), expected)
    one_prompt = draw(pipe, PROMPTS[0], class_labels=[2, 0, 1], **arguments)
    assert_close(one_prompt, written_out_loop(pipe, [PROMPTS[0]] * 3, 3, scale, labels=[2, 0, 1]))
    one_label = draw(pipe, PROMPTS, class_labels="dog", **arguments)
    assert_close(one_label, written_out_loop(pipe, PROMPTS, 3, scale, labels=[1] * 3))
    assert (one_label[:2] - expected[:2]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_classes_without_a_prompt_are_guided():
    """From the null class and the null caption."""
    pipe = make_pipeline(**CLASSES)
    latents = randn(2, 3, 8, 8)
    actual = draw(pipe, class_labels=[0, 2], guidance_scale=2.0, latents=latents, num_inference_steps=1)
    with torch.no_grad():
        velocity, null = (
            pipe.transformer(latents, 1000.0, torch.tensor(labels)).sample[:, :3] for labels in ([0, 2], [3, 3])
        )
    assert_close(actual, latents - (2 * velocity - null))


def test_a_model_without_a_null_class_is_told_one():
    pipe = make_pipeline(num_classes=3)
    message = "`class_labels` must be given: the transformer has 3 classes and no null class"
    with pytest.raises(ValueError, match=message):
        draw(pipe, "red")
    assert_close(
        draw(pipe, "red", class_labels=2, generator=generators(0)), written_out_loop(pipe, ["red"], 3, labels=[2])
    )


def test_no_prompt_draws_from_the_null_caption():
    pipe = make_pipeline()
    latents = randn(2, 3, 8, 8)
    actual = draw(pipe, num_images_per_prompt=2, latents=latents, num_inference_steps=1)
    with torch.no_grad():
        expected = latents - pipe.transformer(latents, 1000.0).sample[:, :3]
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "reading", [{}, MODULATION, MEMORY, BOTH], ids=["cross-attention", "modulation", "memory", "both"]
)
def test_text_decides_what_is_drawn(reading):
    """
    Trained on plain squares of the colour that the caption names, a tiny model draws the colour that the prompt names,
    more of it with guidance, and less of the one that a negative prompt names.
    """
    pipe = make_pipeline(learn_sigma=False, num_layers=2, **reading)
    transformer = pipe.transformer.train()
    colours = {"a red square": (1.0, -1.0, -1.0), "a blue square": (-1.0, -1.0, 1.0), "dark": (-1.0, -1.0, -1.0)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in transformer.modules():  # from the start of a fresh model
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        transformer._initialize_weights()
        leave_a_part_out(transformer)
        with torch.no_grad():
            text, mask, _, _ = pipe.encode_prompt(list(colours), device="cpu")
            if transformer.caption_memory is not None:
                transformer.write_caption_memory(text, mask)
        images = torch.tensor(list(colours.values()))[:, :, None, None].expand(-1, -1, 8, 8)
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
        for _ in range(150):
            which = torch.randint(3, (24,))
            data, noise, time = images[which], torch.randn(24, 3, 8, 8), torch.rand(24)
            sigma = time[:, None, None, None]
            prediction = transformer(
                (1 - sigma) * data + sigma * noise,
                1000 * time,
                encoder_hidden_states=text[which],
                encoder_attention_mask=mask[which],
            ).sample
            optimizer.zero_grad()
            F.mse_loss(prediction, noise - data).backward()
            optimizer.step()
    transformer.eval()

    def redness(prompt, **arguments):
        arguments = {"guidance_scale": 1.0, "num_inference_steps": 8, "output_type": "latent", **arguments}
        output = pipe(prompt, latents=randn(8, 3, 8, 8), output_compute_ratio=True, **arguments)
        assert output.compute_ratio < 0.7  # in the skipping form
        images = output.images
        return (images[:, 0] - images[:, 2]).mean().item()

    red, blue = redness(["a red square"] * 8), redness(["a blue square"] * 8)
    assert red > 1.0 and blue < -1.0
    assert abs(redness(["dark"] * 8)) < 0.7
    nothing = redness(None, num_images_per_prompt=8)
    assert blue < nothing < red
    halfway = redness(["dark"] * 8, negative_prompt="a blue square", guidance_scale=1.3)
    assert halfway > redness(["dark"] * 8)


# Prompts


def test_encode_prompt():
    pipe = make_pipeline()
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS, negative_prompt="red", num_images_per_prompt=2)
    assert embeds.shape == (6, 6, 16) and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [6, 6, 3, 3, 5, 5]
    for row, prompt in enumerate(PROMPTS):
        alone = encode(pipe, prompt)[0]
        assert_close(embeds[2 * row, : len(alone)], alone)
        assert torch.equal(embeds[2 * row], embeds[2 * row + 1])
    assert negative.shape == (6, 3, 16) and negative_mask is None  # nothing is masked
    assert_close(negative, encode(pipe, "red").expand(6, -1, -1))
    assert pipe.encode_prompt("red")[1:] == (None, None, None)
    assert pipe.encode_prompt("red", False, "blue")[2:] == (None, None)


def test_given_embeds_are_the_prompt():
    pipe = make_pipeline()
    arguments = {"guidance_scale": 2.0, "num_images_per_prompt": 2}
    expected = draw(pipe, PROMPTS, "red", generator=generators(*range(6)), **arguments)
    embeds, mask, negative, _ = pipe.encode_prompt(PROMPTS, negative_prompt="red")
    texts = {"prompt_embeds": embeds, "prompt_attention_mask": mask.long(), "negative_prompt_embeds": negative[:1]}
    pipe = DynaDiTTextToImagePipeline.from_pipe(pipe, text_encoder=None, tokenizer=None)
    quiet(pipe)
    assert_close(draw(pipe, generator=generators(*range(6)), **texts, **arguments), expected)
    every = {**texts, "negative_prompt_embeds": negative}
    assert_close(draw(pipe, generator=generators(*range(6)), **every, **arguments), expected)
    # a text, and embeddings for the other half
    other = make_pipeline()
    mixed = draw(other, PROMPTS, generator=generators(*range(6)), negative_prompt_embeds=negative[:1], **arguments)
    assert_close(mixed, expected)
    # without its mask, the padding counts
    del texts["prompt_attention_mask"]
    assert (draw(pipe, generator=generators(*range(6)), **texts, **arguments) - expected).abs().max() > 1e-3


def test_a_long_prompt_is_cut_with_a_warning():
    pipe = make_pipeline()
    long = "a big red square bright"
    with logged_warnings() as warnings:
        embeds = pipe.encode_prompt(long, max_sequence_length=5)[0]
    assert warnings == ["`prompt` has 7 tokens, but the first 5 count. This part was cut off: 'square bright'."]
    assert_close(embeds, encode(pipe, "a big red"))
    with logged_warnings() as warnings:
        assert pipe.encode_prompt(long)[0].shape[1] == 7
        assert pipe.encode_prompt("red " * 40)[0].shape[1] == 16  # the tokenizer's model_max_length
    assert len(warnings) == 1


def test_longest_text_where_no_number_is_known():
    pipe = make_pipeline(encoder="t5")
    pipe.tokenizer.model_max_length = int(1e30)
    with logged_warnings():
        assert pipe.encode_prompt("red " * 200)[0].shape[1] == 128
    pipe = make_pipeline()
    pipe.tokenizer.model_max_length = int(1e30)  # what the encoder's positions allow
    with logged_warnings():
        assert pipe.encode_prompt("red " * 200)[0].shape[1] == 16


def test_from_pipe_to_the_other_pipelines():
    names = {0: "cat", 1: "dog", 2: "bird"}
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4, id2label=names, **CLASSES)
    for name in ("DynaDiTTextToImagePipeline", "DynaDiTImg2ImgPipeline", "DynaDiTInpaintPipeline"):
        cls = getattr(diffusers_dyna, name, None)
        if cls is not None:
            other = cls.from_pipe(pipe)
            for component in ("transformer", "scheduler", "vae", "text_encoder", "tokenizer"):
                assert getattr(other, component) is getattr(pipe, component)
            back = DynaDiTTextToImagePipeline.from_pipe(other)
            assert back.text_encoder is pipe.text_encoder and back.transformer is pipe.transformer
            assert other.id2label == back.id2label == names


def test_from_pipe_of_a_model_without_text():
    pipe = DynaDiTPipeline(tiny_dit(), FlowMatchODEScheduler())
    message = r"`transformer` was made for another task \(generate\) than DynaDiTTextToImagePipeline"
    with pytest.raises(ValueError, match=message):
        DynaDiTTextToImagePipeline.from_pipe(pipe)


def test_caption_width_without_projection():
    pipe = make_pipeline(caption_channels=None, cross_attention_dim=16)
    assert_close(draw(pipe, PROMPTS, generator=generators(0, 1, 2)), written_out_loop(pipe, PROMPTS, 3))


# Sizes, callbacks, precision


def test_sizes():
    pipe = make_pipeline()
    assert draw(pipe, "red", height=6, width=12).shape == (1, 3, 6, 12)
    latents = randn(1, 3, 4, 12)
    with torch.no_grad():
        text = encode(pipe, "red")
        expected = latents - pipe.transformer(latents, 1000.0, encoder_hidden_states=text).sample[:, :3]
    actual = draw(pipe, "red", height=4, width=12, latents=latents, num_inference_steps=1)
    assert_close(actual, expected)
    pipe = make_pipeline(vae=tiny_vae(), in_channels=4)
    (image,) = pipe("red", height=12, width=32, num_inference_steps=1).images
    assert image.size == (32, 12)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("negative", [None, "dark"])
def test_callback_gets_and_changes_the_texts(negative, scale):
    pipe = make_pipeline()
    negative = negative if scale > 1 else None
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    red, dark = pipe.encode_prompt("red")[0], pipe.encode_prompt("dark")[0]
    seen = []

    def swap(pipeline, step, timestep, tensors):
        seen.append(tensors)
        return {"prompt_embeds": pipe.encode_prompt("blue")[0]} if step == 1 else {}

    arguments = {"guidance_scale": scale, "negative_prompt": negative, "num_inference_steps": 4}
    texts = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": names}
    actual = draw(pipe, "red", generator=generators(0), **arguments, **texts)
    assert list(seen[0]) == names
    assert_close(seen[0]["prompt_embeds"], red)
    if negative is None:
        assert seen[0]["negative_prompt_embeds"] is None
    else:
        assert_close(seen[0]["negative_prompt_embeds"], dark)

    # the last two steps with the other text
    middle = seen[1]["latents"]
    scheduler, state = FlowMatchODEScheduler(), middle
    scheduler.set_timesteps(4)
    blue, null = encode(pipe, "blue"), None if negative is None else dark
    with torch.no_grad():
        for t in scheduler.timesteps[2:]:
            velocity = pipe.transformer(state, t, encoder_hidden_states=blue).sample[:, :3]
            if scale > 1:
                other = pipe.transformer(state, t, encoder_hidden_states=null).sample[:, :3]
                velocity = other + scale * (velocity - other)
            state = state - 0.25 * velocity
    assert_close(actual, state)


def test_callback_replaces_the_null_caption():
    pipe = make_pipeline()
    dark = pipe.encode_prompt("dark")[0]
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 4}

    def replace(pipeline, step, timestep, tensors):
        return {"negative_prompt_embeds": dark} if step == 0 else {}

    names = ["prompt_embeds", "negative_prompt_embeds"]
    actual = draw(
        pipe,
        "red",
        generator=generators(0),
        callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=names,
        **arguments,
    )
    null = draw(pipe, "red", generator=generators(0), **arguments)
    negative = draw(pipe, "red", "dark", generator=generators(0), **arguments)
    assert (actual - null).abs().max() > 0.01 and (actual - negative).abs().max() > 0.01


def test_the_callback_of_diffusers_that_ends_guidance():
    pipe = make_pipeline()
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5}
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    actual = draw(pipe, "red", generator=generators(0), callback_on_step_end=callback, **arguments)
    expected = draw(pipe, "red", generator=generators(0), guidance_interval=(0.45, 1.0), **arguments)
    assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"`prompt_embeds` from `callback_on_step_end` must have shape \(2, "):
        draw(pipe, ["red", "blue"], callback_on_step_end=callback, **arguments)  # it leaves one of two texts


def test_callback_classes_name_their_tensors():
    class Swap(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"prompt_embeds": torch.zeros_like(callback_kwargs["prompt_embeds"])}

    pipe = make_pipeline()
    plain = draw(pipe, "red", generator=generators(0))
    changed = draw(pipe, "red", generator=generators(0), callback_on_step_end=Swap(cutoff_step_ratio=1.0))
    assert (changed - plain).abs().max() > 1e-3


def test_bfloat16_text_reaches_the_transformer_in_its_dtype():
    pipe = make_pipeline()
    pipe.transformer.to(torch.bfloat16)
    seen = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["encoder_hidden_states"].dtype), with_kwargs=True
    )
    draw(pipe, PROMPTS, guidance_scale=2.0)
    assert set(seen) == {torch.bfloat16}


def test_offload_order():
    assert DynaDiTTextToImagePipeline.model_cpu_offload_seq == "text_encoder->transformer->vae"


# What is refused

EMBEDS = torch.zeros(2, 4, 16)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"prompt": "red", "prompt_embeds": EMBEDS},
            ValueError,
            "`prompt` and `prompt_embeds` were both given. Give one of them",
        ),
        (
            {"prompt": "red", "negative_prompt": "blue", "negative_prompt_embeds": EMBEDS, "guidance_scale": 2.0},
            ValueError,
            "`negative_prompt` and `negative_prompt_embeds` were both given",
        ),
        ({"prompt": 3}, TypeError, "`prompt` must be a text or a list of texts, but is int"),
        ({"prompt": ["red", 3]}, TypeError, "`prompt` must be a text or a list of texts, but has int"),
        ({"prompt_embeds": EMBEDS.numpy()}, TypeError, "`prompt_embeds` must be a tensor, but is ndarray"),
        ({"prompt_embeds": EMBEDS.tolist()}, TypeError, "`prompt_embeds` must be a tensor, but is list"),
        (
            {"prompt": "red", "negative_prompt_embeds": [EMBEDS], "guidance_scale": 2.0},
            TypeError,
            "`negative_prompt_embeds` must be a tensor, but is list",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": [[1]]},
            TypeError,
            "`prompt_attention_mask` must be a tensor, but is list",
        ),
        (
            {"prompt": "red", "max_sequence_length": 1.5},
            ValueError,
            "`max_sequence_length`=1.5 must be a whole number",
        ),
        ({"prompt": []}, ValueError, "`prompt` is empty. Give at least one prompt"),
        (
            {"prompt": "red", "prompt_attention_mask": torch.ones(1, 4)},
            ValueError,
            "`prompt_attention_mask` was given without `prompt_embeds`",
        ),
        (
            {"prompt_embeds": EMBEDS[..., :8]},
            ValueError,
            r"`prompt_embeds` must have shape \(batch_size, num_tokens, 16\), but has shape \(2, 4, 8\)",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": torch.ones(2, 5)},
            ValueError,
            r"`prompt_attention_mask` must have shape \(2, 4\), as `prompt_embeds`, but has shape \(2, 5\)",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])},
            ValueError,
            "`prompt_attention_mask` masks all tokens of a text. Leave one to attend to",
        ),
        (
            {"negative_prompt": "blue"},
            ValueError,
            "`negative_prompt` was given without a `prompt`: there is nothing to guide",
        ),
        (
            {"prompt": ["red", "blue"], "negative_prompt": ["a", "a", "a"], "guidance_scale": 2.0},
            ValueError,
            "`negative_prompt` has 3 entries, but there are 2 prompts. Give 1 or 2",
        ),
        (
            {"prompt": ["red"] * 3, "negative_prompt_embeds": EMBEDS, "guidance_scale": 2.0},
            ValueError,
            "`negative_prompt_embeds` has 2 entries, but there are 3 prompts",
        ),
        ({"guidance_scale": 2.0}, ValueError, "`guidance_scale`=2.0 needs a `prompt`, and a `negative_prompt` or a"),
        (
            {"prompt": "red", "max_sequence_length": 0},
            ValueError,
            "`max_sequence_length`=0 must be a whole number, at least 1",
        ),
        (
            {"prompt": "red", "max_sequence_length": 17},
            ValueError,
            "`max_sequence_length`=17 is more than the 16 tokens that `text_encoder` takes",
        ),
        (
            {"prompt": "red", "height": 9},
            ValueError,
            r"`height` and `width` must be divisible by 2 .*, but are 9 and 8. The nearest valid size is "
            "10 and 8",
        ),
    ],
)
def test_wrong_inputs(arguments, error, message):
    with pytest.raises(error, match=message):
        make_pipeline()(**{"num_inference_steps": 1, **arguments})


def test_wrong_inputs_for_the_pipeline_at_hand():
    no_null = make_pipeline(caption_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`prompt` or `prompt_embeds` must be given: the transformer has no null cap"):
        no_null()
    with pytest.raises(
        ValueError, match="`guidance_scale`=4.5 needs .* or a transformer .* null caption .* Use `guid"
    ):
        no_null("red")
    draw(no_null, "red", "blue", guidance_scale=2.0)
    without_encoder = DynaDiTTextToImagePipeline(tiny_dit(**TEXT), FlowMatchODEScheduler(), None, None)
    with pytest.raises(ValueError, match="`prompt` needs `text_encoder` and `tokenizer`, which the pipeline was load"):
        without_encoder("red")
    no_words = make_pipeline()
    no_words.tokenizer._tokenizer.post_processor = None
    with pytest.raises(ValueError, match="`prompt` '' has no tokens. Write a text that the tokenizer knows"):
        no_words("")


def test_components_that_do_not_fit():
    scheduler, tokenizer = FlowMatchEulerDiscreteScheduler(), tiny_tokenizer()
    for kind in ENCODERS:
        message = "`text_encoder` has hidden states of width 8, but `transformer` reads text of width 16"
        with pytest.raises(ValueError, match=message):
            DynaDiTTextToImagePipeline(tiny_dit(**TEXT), scheduler, tiny_text_encoder(kind, width=8), tokenizer)
    encoder = tiny_text_encoder()
    for overrides, task, name in (
        ({}, "generate", "DynaDiTPipeline"),
        ({**TEXT, "condition_channels": 4}, "inpaint", "DynaDiTInpaintPipeline"),
        (
            {**TEXT, "condition_channels": 3, "noise_level_conditioning": True},
            "upscale",
            "DynaDiTUpscalePipeline",
        ),
    ):
        message = rf"another task \({task}\) than DynaDiTTextToImagePipeline \(text-to-image\). Use {name}"
        with pytest.raises(ValueError, match=message):
            DynaDiTTextToImagePipeline(tiny_dit(**overrides), scheduler, encoder, tokenizer)
    with pytest.raises(ValueError, match=r"another task \(text-to-image\) than .* Use DynaDiTTextToImagePipeline"):
        DynaDiTPipeline(tiny_dit(**TEXT), scheduler)
    with pytest.raises(ValueError, match="`text_encoder` .Linear. has neither `hidden_size` nor `d_model`"):
        linear = torch.nn.Linear(1, 1)
        linear.config = object()
        DynaDiTTextToImagePipeline(tiny_dit(**TEXT), scheduler, linear, tokenizer)
    with pytest.raises(ValueError, match="`vae` has latents of 4 channels, but `transformer` takes 3"):
        DynaDiTTextToImagePipeline(tiny_dit(**TEXT), scheduler, encoder, tokenizer, tiny_vae())

    config = T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    message = (
        "`text_encoder` is T5Model, which has a decoder too. Use a class of the encoder alone, for T5 T5EncoderModel"
    )
    with pytest.raises(TypeError, match=message):
        DynaDiTTextToImagePipeline(tiny_dit(**TEXT), scheduler, T5Model(config), tokenizer)
    transformer = tiny_dit(**TEXT, in_channels=4)
    blocks = {"encoder_block_out_channels": (4, 8), "decoder_block_out_channels": (4, 8)}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "latent_channels": 4}
    kinds = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    vae = AutoencoderDC(attention_head_dim=4, **blocks, **layers, **kinds)
    with pytest.raises(
        TypeError, match="`vae` is AutoencoderDC, whose config has no `block_out_channels`. Use a VAE suc"
    ):
        DynaDiTTextToImagePipeline(transformer, scheduler, encoder, tokenizer, vae)
    tiny = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), **blocks}
    vae = AutoencoderTiny(**tiny)
    assert DynaDiTTextToImagePipeline(transformer, scheduler, encoder, tokenizer, vae).vae_scale_factor == 2
