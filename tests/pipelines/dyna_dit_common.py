# SPDX-License-Identifier: Apache-2.0
"""
Tiny components, and the checks that every pipeline of the dynamic transformer has to pass.

A test file makes a class of the mixin that tells how to make the pipeline and how to call it:

    class TestStandard(DynaDiTPipelineTests):
        pipeline_class = DynaDiTImg2ImgPipeline

        def make(self, **overrides):
            return make_pipeline(**overrides)

        def arguments(self, *entries):
            images = [randn(1, 3, 8, 8, seed=entry).clamp(-1, 1) for entry in entries]
            return {"image": torch.cat(images), "class_labels": [entry % 3 for entry in entries], "guidance_scale": 2.0}

`make` takes `scheduler` and `vae` and passes everything else on to the transformer's config; the pipeline comes from
[`quiet`], its transformer from [`tiny_dit`]. `arguments` has one image per entry, and an entry is the same image
whatever the others are. Steps, generator and output type are added by the checks.
"""

import copy
import inspect
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from accelerate import cpu_offload
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from diffusers_dyna import DynaDiTTransformer2DModel, FlowMatchODEScheduler
from diffusers_dyna.pipelines import DynaDiTImg2ImgPipeline, DynaDiTPipelineOutput

from ..testing_utils import logged_warnings


# What is asked of a transformer with classes, of one with text, and of one of both.
TINY_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_classes": 3,
    "class_dropout_prob": 0.1,
    "learn_sigma": True,
    "router_mode": "capacity",
}
TEXT = {"cross_attention_dim": 24, "caption_channels": 16, "num_classes": None, "class_dropout_prob": 0.0}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "big", "small", "red", "blue", "bright", "dark", "square"]


def tiny_dit(seed: int = 0, **overrides) -> DynaDiTTransformer2DModel:
    """
    A transformer in evaluation mode whose zero-initialised layers are drawn, and whose routers switch heads, channel
    groups and tokens on and off over the timesteps; the same weights for the same seed and configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DynaDiTTransformer2DModel(**{**TINY_DIT, **overrides})
        drawn = ("modulation", "norm_out", "proj_out", "class_embedding", "cross_attn.to_out", "noise_level_embedding")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in drawn):
                    parameter.copy_(0.3 * torch.randn_like(parameter))
                elif "token_selection" in name or "null_caption" in name:
                    parameter.copy_(torch.randn_like(parameter))
                elif "_rate" in name:
                    parameter.copy_((20.0 if name.endswith("weight") else 2.0) * torch.randn_like(parameter))
    return model.eval()


def leave_a_part_out(transformer: DynaDiTTransformer2DModel) -> DynaDiTTransformer2DModel:
    """Fresh routers of a transformer without the last head and channel group and a quarter of the tokens, as they stay."""
    for block in transformer.transformer_blocks:
        with torch.no_grad():
            for router in block.group_routers():
                router.bias[-1] = -50.0
            block.token_rate.bias.fill_(1.06)  # 1.01 * sigmoid(1.06) = 0.75
        for module in (*block.group_routers(), block.token_rate, block.token_selection):
            module.requires_grad_(False)
    return transformer


def tiny_vae(**overrides) -> AutoencoderKL:
    """A VAE that halves the size, with latents of four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            **{
                "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
                "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
                "block_out_channels": (4, 8),
                "latent_channels": 4,
                "norm_num_groups": 2,
                "sample_size": 16,
                "scaling_factor": 0.5,
                **overrides,
            }
        )
    return vae.eval()


def tiny_tokenizer(**overrides) -> PreTrainedTokenizerFast:
    """One token for each of `WORDS`, between those of begin and end."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=16, **overrides)


def tiny_text_encoder(kind: str = "bert", width: int = 16):
    """An encoder of `width` channels and the vocabulary of [`tiny_tokenizer`], in evaluation mode."""
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if kind == "bert":
            encoder = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **shape))
        elif kind == "clip":
            ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
            config = CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=16, **ids, **shape)
            encoder = CLIPTextModel(config)
        else:
            config = T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            encoder = T5EncoderModel(config)
        for name, parameter in encoder.named_parameters():
            if "embed" in name or "shared" in name:  # of 0.02 at initialisation, where words are alike
                parameter.data.normal_()
    return encoder.eval()


def train_tiny(draw, steps: int = 100, **overrides) -> DynaDiTTransformer2DModel:
    """
    A static transformer of one channel, trained for a few seconds by flow matching to predict noise - data.

    `draw(count, generator)` makes clean images, their condition channels or None, and further arguments.
    """
    settings = {
        "in_channels": 1,
        "num_classes": None,
        "class_dropout_prob": 0.0,
        "learn_sigma": False,
        "num_layers": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DynaDiTTransformer2DModel(**{**TINY_DIT, **settings, **overrides})
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        data, condition, kwargs = draw(64, generator)
        noise = torch.randn(data.shape, generator=generator)
        sigma = torch.rand(64, 1, 1, 1, generator=generator)
        state = (1 - sigma) * data + sigma * noise
        model_input = state if condition is None else torch.cat([state, condition], dim=1)
        output = model(model_input, 1000 * sigma.flatten(), complete_model=True, **kwargs).sample
        loss = (output - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_close(actual, expected, rtol=1e-3, atol=1e-4):
    """Two orders of summation of the same float32 products, through the layers of the transformer and a few steps."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * max(1.0, expected.abs().max().item()))


class DynaDiTPipelineTests:
    """The checks; see the head of this file."""

    pipeline_class: type
    latent = {"in_channels": 4}  # the transformer's config for [`tiny_vae`]

    def make(self, **overrides) -> DiffusionPipeline:
        raise NotImplementedError

    def arguments(self, *entries: int) -> dict:
        raise NotImplementedError

    def run(self, pipe, *entries: int, **overrides):
        """What a call returns for these entries, each with its own seed."""
        arguments = {**self.arguments(*entries), "num_inference_steps": 3, "output_type": "latent"}
        return pipe(**{**arguments, "generator": generators(*entries), **overrides})

    def draw(self, pipe, *entries: int, **overrides) -> torch.Tensor:
        return self.run(pipe, *entries, **overrides).images

    def test_tuple_is_the_output_class(self):
        pipe = self.make()
        expected = self.run(pipe, 0, 1)
        assert isinstance(expected, DynaDiTPipelineOutput) and expected.compute_ratio is None
        result = self.run(pipe, 0, 1, return_dict=False)
        assert isinstance(result, tuple) and len(result) == 1
        assert_close(result[0], expected.images)

    @pytest.mark.parametrize("make_scheduler", [FlowMatchODEScheduler, FlowMatchEulerDiscreteScheduler, DDPMScheduler])
    def test_image_of_a_seed_does_not_depend_on_its_batch(self, make_scheduler):
        pipe = self.make(scheduler=make_scheduler())
        batch = self.draw(pipe, 2, 0, 1)
        for i, entry in enumerate((2, 0, 1)):
            assert_close(batch[i : i + 1], self.draw(pipe, entry))
        assert (batch[0] - batch[1]).abs().max() > 0.1

    def test_decoded_image_of_a_seed_does_not_depend_on_its_batch(self):
        pipe = self.make(vae=tiny_vae(shift_factor=0.3), **self.latent)
        batch = self.draw(pipe, 2, 0, 1, output_type="pt")
        for i, entry in enumerate((2, 0, 1)):
            assert_close(batch[i : i + 1], self.draw(pipe, entry, output_type="pt"))
        assert (batch[0] - batch[1]).abs().max() > 0.1

    def test_same_seed_same_image_and_nothing_from_the_global_generator(self):
        pipe = self.make()
        state = torch.get_rng_state()
        first = self.draw(pipe, 0, 1)
        assert torch.equal(torch.get_rng_state(), state)
        assert_close(self.draw(pipe, 0, 1), first)
        assert (self.draw(pipe, 0, 1, generator=generators(5, 6)) - first).abs().max() > 0.01

    def test_images_per_entry(self):
        pipe = self.make()
        twice = self.draw(pipe, 2, 0, num_images_per_prompt=2, generator=generators(0, 1, 2, 3))
        expected = self.draw(pipe, 2, 2, 0, 0, generator=generators(0, 1, 2, 3))
        assert len(twice) == 4
        assert_close(twice, expected)

    def test_output_types(self):
        pipe = self.make()
        latent, pt, numpy, pil = (self.draw(pipe, 0, 1, output_type=kind) for kind in ("latent", "pt", "np", "pil"))
        assert latent.dtype == torch.float32 and latent.shape[:2] == (2, 3)
        assert_close(pt, (latent * 0.5 + 0.5).clamp(0, 1))
        np.testing.assert_allclose(numpy, pt.permute(0, 2, 3, 1).numpy(), atol=1e-4)
        assert all(isinstance(image, PIL.Image.Image) and image.mode == "RGB" for image in pil)
        assert [image.size for image in pil] == [(latent.shape[3], latent.shape[2])] * 2
        levels = np.stack([np.asarray(image, dtype=float) for image in pil])
        np.testing.assert_allclose(levels, 255 * numpy, atol=0.6)  # half a grey level, for rounding

    def test_vae(self):
        pipe = self.make(vae=tiny_vae(shift_factor=0.3), **self.latent)
        latents = self.draw(pipe, 0, 1)
        images = self.draw(pipe, 0, 1, output_type="pt")
        assert latents.shape[1] == 4
        assert images.shape[1:] == (3, 2 * latents.shape[2], 2 * latents.shape[3])
        with torch.no_grad():
            decoded = pipe.vae.decode(latents / 0.5 + 0.3).sample
        assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))

    def test_callback_sees_changes_and_stops(self):
        pipe = self.make()
        seen = []

        def callback(pipeline, step, timestep, tensors):
            assert pipeline is pipe and list(tensors) == ["latents"]
            assert pipeline.current_timestep == timestep and pipeline.do_classifier_free_guidance
            seen.append(tensors["latents"].clone())

        images = self.draw(pipe, 0, callback_on_step_end=callback, num_inference_steps=4)
        assert len(seen) == pipe.num_timesteps > 1
        assert pipe.current_timestep is None
        if "mask_image" not in self.arguments(0):  # whose known region is put back at the end
            assert_close(seen[-1], images)

        def zero(pipeline, step, timestep, tensors):
            return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

        changed = self.draw(pipe, 0, callback_on_step_end=zero, num_inference_steps=4)
        assert (changed - images).abs().max() > 0.01

        def stop(pipeline, step, timestep, tensors):
            seen.append(len(calls))
            pipeline._interrupt = True

        del seen[:]
        calls = []
        handle = pipe.transformer.register_forward_hook(lambda *args: calls.append(1))
        self.draw(pipe, 0, callback_on_step_end=stop, num_inference_steps=4)
        handle.remove()
        assert seen == [len(calls)]  # one step, and no call after it
        assert_close(self.draw(pipe, 0, num_inference_steps=4), images)

    @pytest.mark.parametrize("router_mode", ["capacity", "threshold"])
    def test_compute_ratio(self, router_mode):
        pipe = self.make(router_mode=router_mode)
        seen = []
        handle = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output.compute_ratio))
        output = self.run(pipe, 0, 1, output_compute_ratio=True)
        handle.remove()
        assert type(output.compute_ratio) is float and 0.1 < output.compute_ratio < 0.95
        assert output.compute_ratio == pytest.approx(torch.cat(seen).mean().item())
        complete = self.run(pipe, 0, 1, output_compute_ratio=True, complete_model=True)
        assert complete.compute_ratio == 1.0
        assert (complete.images - output.images).abs().max() > 0.01
        _, ratio = self.run(pipe, 0, 1, output_compute_ratio=True, return_dict=False)
        assert ratio == pytest.approx(output.compute_ratio)

    def test_run_leaves_nothing_behind(self):
        pipe = self.make()
        state = copy.deepcopy(pipe.transformer.state_dict())
        processors = [block.attn.processor for block in pipe.transformer.transformer_blocks]
        expected = self.draw(pipe, 0, 1)
        narrow = self.draw(pipe, 0, 1, width_mult=0.5)
        assert (narrow - expected).abs().max() > 0.01

        def fail(pipeline, step, timestep, tensors):
            assert pipe.transformer.plan_bytes > 0  # what was prepared, and is freed after the call
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.draw(pipe, 0, 1, width_mult=0.5, callback_on_step_end=fail)
        assert pipe.transformer.plan_bytes == 0 and pipe.transformer.width_mult == 1.0
        assert [block.attn.processor for block in pipe.transformer.transformer_blocks] == processors
        assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())
        assert not expected.requires_grad
        assert_close(self.draw(pipe, 0, 1), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_keeps_the_state_in_float32(self, dtype):
        pipe = self.make(vae=tiny_vae(), **self.latent)
        expected = self.draw(pipe, 0, 1)
        pipe.to(dtype)
        seen = []
        handle = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
        images = self.draw(pipe, 0, 1)
        handle.remove()
        assert set(seen) == {dtype}
        assert images.dtype == torch.float32 and not torch.equal(images.to(dtype).float(), images)
        # rounding, of two predictions whose difference is multiplied; now and then another token is chosen
        assert (images - expected).abs().mean() < 0.1 * expected.std()
        pixels = self.draw(pipe, 0, 1, output_type="np")
        assert pixels.dtype == np.float32 and np.isfinite(pixels).all()

    def test_offload_hooks_on_cpu(self):
        """The hooks of the ways to offload, with the CPU as the device that they move the models to."""
        pipe = self.make(vae=tiny_vae(), **self.latent)
        expected = self.draw(pipe, 0, output_type="pt")
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            hook = pipe._all_hooks[0]
            assert len(pipe._all_hooks) == len(modules)
            assert_close(self.draw(pipe, 0, output_type="pt"), expected)
            assert pipe._all_hooks[0] is not hook  # the end of a call freed the models and put new hooks on them
        pipe.remove_all_hooks()

        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        assert_close(self.draw(pipe, 0, output_type="pt"), expected)

    def test_sequential_offload_on_cpu(self):
        """Models whose weights are on the meta device but while a layer runs."""
        pipe = self.make(vae=tiny_vae(), **self.latent)
        expected = self.draw(pipe, 0, output_type="pt")
        for part in list(pipe.components.values()):
            if isinstance(part, torch.nn.Module):
                cpu_offload(part, "cpu", offload_buffers=True)
        assert pipe.transformer.pos_embed.proj.weight.device.type == "meta"
        assert_close(self.draw(pipe, 0, output_type="pt"), expected)

    def test_lora(self, tmp_path):
        peft = pytest.importorskip("peft")
        pipe = self.make()
        plain = self.draw(pipe, 0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe.transformer.add_adapter(
                peft.LoraConfig(r=2, lora_alpha=8, target_modules=["qkv", "fc1"], init_lora_weights=False)
            )
        adapted = self.draw(pipe, 0, 1)
        assert (adapted - plain).abs().max() > 0.01
        layers = peft.get_peft_model_state_dict(pipe.transformer)
        metadata = pipe.transformer.peft_config["default"].to_dict()
        self.pipeline_class.save_lora_weights(
            tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )

        loaded = self.make()
        loaded.load_lora_weights(tmp_path, adapter_name="style")
        assert_close(self.draw(loaded, 0, 1), adapted)
        assert_close(self.draw(loaded, 0, 1, attention_kwargs={"scale": 0.0}), plain)
        loaded.set_adapters("style", 0.0)
        assert_close(self.draw(loaded, 0, 1), plain)
        loaded.set_adapters("style", 1.0)
        loaded.fuse_lora()
        assert_close(self.draw(loaded, 0, 1), adapted)
        loaded.unfuse_lora()
        loaded.unload_lora_weights()
        assert_close(self.draw(loaded, 0, 1), plain)

    def test_save_and_load(self, tmp_path):
        pipe = self.make(scheduler=FlowMatchODEScheduler(shift=2.0))
        expected = self.draw(pipe, 0, 1)
        pipe.save_pretrained(tmp_path / "first")
        index = json.loads((tmp_path / "first" / "model_index.json").read_text())
        assert index["_class_name"] == self.pipeline_class.__name__
        assert index["transformer"] == ["diffusers_dyna", "DynaDiTTransformer2DModel"]
        for cls in (self.pipeline_class, DiffusionPipeline):
            with logged_warnings() as warnings:
                loaded = cls.from_pretrained(tmp_path / "first")
            assert warnings == []
            assert type(loaded) is self.pipeline_class
            assert_close(self.draw(quiet(loaded), 0, 1), expected)
        loaded.save_pretrained(tmp_path / "second")
        for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
            first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in ("first", "second"))
            second.pop("_name_or_path", None)
            assert second == first
        in_bfloat16 = self.pipeline_class.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
        assert in_bfloat16.transformer.dtype == torch.bfloat16

    def test_save_and_load_with_a_vae(self, tmp_path):
        pipe = self.make(vae=tiny_vae(shift_factor=0.3), **self.latent)
        expected = self.draw(pipe, 0, 1, output_type="pt")
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
        with logged_warnings() as warnings:
            loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert warnings == []
        assert type(loaded) is self.pipeline_class
        assert_close(self.draw(quiet(loaded), 0, 1, output_type="pt"), expected)
        in_bfloat16 = self.pipeline_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert in_bfloat16.vae.dtype == torch.bfloat16

    def test_from_pipe_shares_its_components(self):
        pipe = self.make(vae=tiny_vae(), **self.latent)
        other = self.pipeline_class.from_pipe(pipe)
        assert other.components.keys() == pipe.components.keys()
        for name, component in pipe.components.items():
            assert getattr(other, name) is component, name
        assert_close(self.draw(quiet(other), 0), self.draw(pipe, 0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_from_pipe_leaves_the_dtypes(self, dtype, tmp_path):
        self.make().save_pretrained(tmp_path)
        pipe = self.pipeline_class.from_pretrained(tmp_path, dtype=dtype)
        parameters = dict(pipe.transformer.named_parameters())
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        assert set(dtypes.values()) == {torch.float32, dtype}  # the routers stay in float32
        cls = DynaDiTImg2ImgPipeline if pipe.transformer.config.condition_channels == 0 else self.pipeline_class
        with logged_warnings() as warnings:
            other = cls.from_pipe(pipe)
            back = self.pipeline_class.from_pipe(other)
        assert warnings == []
        assert type(other) is cls and type(back) is self.pipeline_class
        for name, parameter in back.transformer.named_parameters():
            assert parameter is parameters[name] and parameter.dtype == dtypes[name], name
        assert cls.from_pipe(pipe, dtype=torch.float16).transformer.dtype == torch.float16
        assert other.to(dtype=torch.float64).transformer.dtype == torch.float64

    def test_every_argument_is_documented(self):
        for method in (self.pipeline_class.__call__, self.pipeline_class.__init__):
            doc = method.__doc__ or self.pipeline_class.__doc__
            for name in inspect.signature(method).parameters:
                assert name == "self" or f"            {name} (" in doc or f"        {name} (" in doc, name

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num_inference_steps": 0}, r"`num_inference_steps`=0 must be a whole number, at least 1"),
            ({"num_inference_steps": 2.5}, r"`num_inference_steps`=2.5 must be a whole number"),
            ({"eta": 1.5}, r"`eta`=1.5 must be in \[0, 1\]"),
            ({"num_images_per_prompt": 0}, r"`num_images_per_prompt`=0 must be a whole number, at least 1"),
            ({"num_images_per_prompt": 1.5}, r"`num_images_per_prompt`=1.5 must be a whole number, at least 1"),
            ({"height": 8.0}, "`height`=8.0 must be a whole number, at least 1"),
            ({"width": "8"}, "`width`='8' must be a whole number, at least 1"),
            ({"num_inference_steps": "3"}, "`num_inference_steps`='3' must be a number"),
            ({"eta": "0"}, "`eta`='0' must be a number"),
            ({"guidance_scale": None}, "`guidance_scale`=None must be a number"),
            (
                {"guidance_scale": math.nan},
                "`guidance_scale`=nan must be finite. Use `guidance_scale=1` for no guidance",
            ),
            ({"guidance_scale": math.inf}, "`guidance_scale`=inf must be finite"),
            ({"strength": "1"}, "`strength`='1' must be a number"),
            ({"strength": None}, "`strength`=None must be a number"),
            ({"latents": [0.0]}, "`latents` must be a tensor, but is list. Use `torch.as_tensor`"),
            ({"output_type": "jpg"}, r"`output_type`='jpg' must be 'pil', 'np', 'pt' or 'latent'"),
            ({"guidance_interval": (0.8, 0.2)}, r"`guidance_interval`=\(0.8, 0.2\) must be two noise levels in"),
            ({"guidance_interval": 0.5}, r"`guidance_interval`=0.5 must be two noise levels in \[0, 1\], the lower"),
            ({"guidance_interval": "01"}, "`guidance_interval`='01' must be two noise levels in"),
            (
                {"guidance_interval": ("0.2", "0.8")},
                r"`guidance_interval`=\('0.2', '0.8'\) must be two noise levels in",
            ),
            ({"guidance_channels": 4}, r"`guidance_channels`=4 must be a number of channels from 1 to 3"),
            ({"guidance_rescale": 1.5}, r"`guidance_rescale`=1.5 must be in \[0, 1\]"),
            ({"width_mult": 1.5}, r"`width_mult`=1.5 must be in \(0, 1\]"),
            ({"generator": generators(0, 1)}, r"`generator` is a list of 2, but 1 images are to be drawn"),
            (
                {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
                r"`callback_on_step_end_tensor_inputs` has \['noise'\], but only \['latents'",
            ),
            (
                {"callback_on_step_end_tensor_inputs": "prompt_embeds"},
                r"`callback_on_step_end_tensor_inputs`='prompt_embeds' must be a list of names, such as \['prompt_embeds'",
            ),
            (
                {"callback_on_step_end_tensor_inputs": [3]},
                r"`callback_on_step_end_tensor_inputs`=\[3\] must be a list of names, such as \['latents'\]",
            ),
        ],
    )
    def test_wrong_numbers(self, arguments, message):
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        if set(arguments) <= set(parameters):
            with pytest.raises((TypeError, ValueError), match=message):
                self.run(self.make(), 0, **arguments)

    def test_latents_of_another_shape(self):
        if "latents" in inspect.signature(self.pipeline_class.__call__).parameters:
            with pytest.raises(
                ValueError, match=r"`latents` must have shape \(1, 3, 8, 8\), but has shape \(2, 3, 8, 10\)"
            ):
                self.run(self.make(), 0, latents=torch.zeros(2, 3, 8, 10))

    def test_a_transformer_in_training_mode(self):
        pipe = self.make()
        pipe.transformer.train()
        with pytest.raises(ValueError, match="`transformer` is in training mode, .* Call `pipe.transformer.eval"):
            self.run(pipe, 0)
