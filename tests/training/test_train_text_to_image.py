# SPDX-License-Identifier: Apache-2.0
"""The text-to-image script as it is run: what it learns from captions, saves and resumes, and what it refuses."""

import filecmp
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers import AutoencoderKL
from transformers import BertConfig, BertModel

from diffusers_dyna import (
    DynaDiTInpaintPipeline,
    DynaDiTPipeline,
    DynaDiTTextToImagePipeline,
    DynaDiTTransformer2DModel,
    DynaDiTUpscalePipeline,
)
from diffusers_dyna.training.captions import EncodedCaptions
from diffusers_dyna.training.randomness import keyed_uniform

from ..testing_utils import randn, tiny_text_encoder, tiny_tokenizer
from . import script_utils
from .script_utils import WEIGHTS, assert_same_run, load_script, read_log, run_and_kill, running_here


SCRIPT = "train_text_to_image.py"
TASKS = {"inpaint": {"task": "inpaint"}, "upscale": {"task": "upscale", "upscale_factor": 2}}
COLORS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230)}


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def run_here(script):
    with running_here(script) as run:
        yield run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    words = ["a", "one", "square", *COLORS, *"0123456789"]
    tiny_text_encoder(len(words) + 4).save_pretrained(folder)
    tiny_tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """30 squares of three colours; a colour is all that a caption tells."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(30):
        color = list(COLORS)[i % 3]
        pixels = np.clip(np.array(COLORS[color]) + rng.normal(0, 10, (8, 8, 3)), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": [f"a {color} square", f"one {color} square", color]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def options(encoder, pictures):
    return {"text_encoder": encoder, "train_data_dir": pictures, "resolution": 8}


@pytest.fixture(scope="module")
def static_run(run_here, options, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("static") / "run"
    run_here(
        output_dir,
        static=True,
        max_train_steps=150,
        learning_rate=5e-3,
        validation_steps=150,
        validation_prompts=["a red square", "blue"],
        **options,
    )
    return output_dir


@pytest.fixture(scope="module")
def dynamic_run(run_here, options, static_run, tmp_path_factory):
    """40 steps to a budget of 0.5 from the static pipeline, whose text encoder it takes."""
    output_dir = tmp_path_factory.mktemp("dynamic") / "run"
    own = {name: value for name, value in options.items() if name != "text_encoder"}
    run_here(
        output_dir,
        pretrained_model_name_or_path=static_run,
        max_train_steps=40,
        validation_steps=20,
        ema_decay=0.5,
        **own,
    )
    return output_dir


class TestTraining:
    def test_it_draws_what_the_prompt_says(self, static_run):
        pipe = DynaDiTTextToImagePipeline.from_pretrained(static_run)
        pipe.set_progress_bar_config(disable=True)
        prompts = [template.format(color) for color in COLORS for template in ("a {} square", "{}")]
        generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = pipe(prompts, num_inference_steps=8, guidance_scale=2.0, generator=generator, output_type="np").images
        brightest = images.mean(axis=(1, 2)).argmax(axis=1)
        assert brightest.tolist() == [0, 0, 1, 1, 2, 2]

    def test_the_pipeline_is_whole(self, static_run, encoder):
        pipe = DynaDiTTextToImagePipeline.from_pretrained(static_run)
        assert pipe.tokenizer.model_max_length == 32
        for actual, expected in zip(pipe.text_encoder.parameters(), tiny_text_encoder(20).parameters(), strict=True):
            assert torch.equal(actual, expected)
        config = pipe.transformer.config
        assert (config.caption_channels, config.cross_attention_dim, config.num_classes) == (16, 32, None)
        summary = json.loads((static_run / "training_summary.json").read_text())
        assert summary["dataset"]["num_images"] == 30
        assert (static_run / "samples" / "step-150.png").exists()

    def test_what_is_cached_is_what_the_pipeline_encodes(self, static_run, script, pictures):
        pipe = DynaDiTTextToImagePipeline.from_pretrained(static_run)
        captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
        order = np.argsort([f"{i}.png" for i in range(30)])  # of the paths, as the source has them
        texts = EncodedCaptions(static_run / "captions", [captions[i] for i in order])
        prompts = ["one green square", "blue"]
        states, mask = texts.encode(prompts)
        with torch.no_grad():
            embeds, embeds_mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        assert torch.equal(mask, embeds_mask)
        torch.testing.assert_close(states[mask], embeds[mask], rtol=1e-4, atol=1e-5)

    def test_the_budget_counts_the_text(self, dynamic_run):
        log = read_log(dynamic_run)
        assert log[0]["compute_ratio"] == 1.0
        assert log[-1]["compute_ratio"] == pytest.approx(0.5, abs=0.06)
        activity = read_log(dynamic_run, "activity_log.jsonl")
        assert [line["step"] for line in activity] == [20, 40]
        pipe = DynaDiTTextToImagePipeline.from_pretrained(dynamic_run)
        pipe.set_progress_bar_config(disable=True)
        output = pipe("one red square", num_inference_steps=20, guidance_scale=2.0, output_compute_ratio=True)
        assert output.compute_ratio == pytest.approx(activity[-1]["compute_ratio"], abs=0.05)

    @pytest.mark.parametrize(
        "flags",
        [{"text_conditioning": "modulation"}, {"text_conditioning": "both"}, {"caption_memory": True}],
        ids=lambda flags: str(*flags.values()),
    )
    def test_the_mean_of_the_states(self, run_here, options, tmp_path, flags):
        """It tells the colours, and a further run on other captions keeps how it is read, and what the memory holds."""
        with_memory = "caption_memory" in flags
        training = {"static": True, "learning_rate": 3e-3, "prediction_type": "sample", "num_validation_images": 0}
        training |= options
        run_here(tmp_path / "first", max_train_steps=300, **training, **flags)
        pipe = DynaDiTTextToImagePipeline.from_pretrained(tmp_path / "first")
        config, memory = pipe.transformer.config, pipe.transformer.caption_memory
        assert config.caption_pooling and config.caption_memory_size == (9 if with_memory else None)
        assert config.cross_attention_dim == (32 if flags.get("text_conditioning") == "both" else None)
        pipe.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(i) for i in range(3)]
        drawing = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "np"}
        images = pipe(list(COLORS), generator=generator, **drawing).images
        assert images.mean(axis=(1, 2)).argmax(axis=1).tolist() == [0, 1, 2]
        if with_memory:  # three captions of three colours, as the pipeline encodes them
            with torch.no_grad():
                embeds, _, _, _ = pipe.encode_prompt(list(COLORS), do_classifier_free_guidance=False)
            similarities = torch.nn.functional.normalize(embeds.mean(dim=1), dim=1) @ memory.keys.T
            torch.testing.assert_close(similarities.amax(dim=1), torch.ones(3), rtol=0, atol=1e-4)
            assert len(similarities.argmax(dim=1).unique()) == 3

        pictures = tmp_path / "pictures"
        shutil.copytree(training.pop("train_data_dir"), pictures)
        lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
        renamed = [{**line, "text": [f"my {text}" for text in line["text"]]} for line in lines]
        (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in renamed))
        del training["text_encoder"]
        training |= {"pretrained_model_name_or_path": tmp_path / "first", "train_data_dir": pictures}
        run_here(tmp_path / "second", max_train_steps=2, **training)
        second = DynaDiTTransformer2DModel.from_pretrained(tmp_path / "second", subfolder="transformer")
        for name in ("caption_pooling", "caption_memory_size", "cross_attention_dim"):
            assert second.config[name] == config[name]
        if with_memory:
            assert torch.equal(second.caption_memory.keys, memory.keys)
            assert not torch.equal(second.caption_memory.values.weight, memory.values.weight)
            with pytest.raises(ValueError, match="has a memory of other captions than those of the data"):
                run_here(tmp_path / "third", max_train_steps=2, caption_memory=True, **training)
            training["train_data_dir"] = options["train_data_dir"]
            run_here(tmp_path / "fourth", max_train_steps=2, caption_memory=True, **training)

    def test_how_captions_are_read_stays(self, run_here, options, static_run, tmp_path):
        """A way is added to those that a model has; none goes, and no memory comes between."""
        training = {"static": True, "max_train_steps": 1, "num_validation_images": 0, **options}
        del training["text_encoder"]

        def refused(message, pretrained, **flags):
            with pytest.raises(ValueError, match=message):
                run_here(tmp_path / "no", pretrained_model_name_or_path=pretrained, **flags, **training)

        refused("`--text_conditioning` modulation leaves out a way", static_run, text_conditioning="modulation")
        refused("Give `--text_conditioning both` too", static_run, caption_memory=True)
        added = {"text_conditioning": "both", "caption_memory": True}
        run_here(tmp_path / "all", pretrained_model_name_or_path=static_run, **added, **training)
        transformer = self.load(tmp_path / "all")
        assert transformer.config.caption_memory_size == 9 and transformer.caption_memory.keys.any()
        run_here(tmp_path / "both", pretrained_model_name_or_path=static_run, text_conditioning="both", **training)
        refused("which read the mean of a caption's states without a memory", tmp_path / "both", caption_memory=True)
        refused("leaves out a way", tmp_path / "both", text_conditioning="cross_attention")
        with pytest.raises(ValueError, match="`--cross_attention_dim` 8 is for cross-attention, but captions only"):
            run_here(tmp_path / "no", text_conditioning="modulation", cross_attention_dim=8, **options)

    def test_a_checkpoint_keeps_its_memory(self, run_here, options, tmp_path):
        """A run that goes on is given its keys; one that asks for a memory only then is refused by name."""
        training = {"static": True, "num_validation_images": 0, "checkpointing_steps": 2, **options}
        run_here(tmp_path / "a", max_train_steps=2, caption_memory=True, **training)
        keys = self.load(tmp_path / "a").caption_memory.keys
        run_here(tmp_path / "a", max_train_steps=4, caption_memory=True, resume_from_checkpoint="latest", **training)
        assert torch.equal(self.load(tmp_path / "a").caption_memory.keys, keys)
        run_here(tmp_path / "b", max_train_steps=2, **training)
        with pytest.raises(ValueError, match="caption_memory: False in the checkpoint, True now"):
            run_here(
                tmp_path / "b", max_train_steps=4, caption_memory=True, resume_from_checkpoint="latest", **training
            )

    def test_captions_are_dropped_by_their_samples(self, run_here, options, tmp_path):
        """With all of them dropped, nothing is left but the null caption."""
        settings = {**options, "static": True, "max_train_steps": 5, "checkpointing_steps": 2}
        for share in (0.0, 1.0):
            run_here(tmp_path / str(share), caption_dropout_prob=share, **settings)
        first, last = (self.load(tmp_path / "1.0" / name) for name in ("checkpoint-2", "checkpoint-5"))
        assert "null_caption.weight" not in self.load(tmp_path / "0.0").state_dict()
        assert not torch.allclose(first.null_caption.weight, last.null_caption.weight, atol=1e-4)

    def test_which_captions_are_dropped_follows_from_seed_and_sample(self, run_here, options, tmp_path, monkeypatch):
        """So that neither accumulation nor the number of processes changes it."""
        masks, forward = [], DynaDiTTransformer2DModel.forward

        def spy(model, *args, caption_dropout_mask=None, **kwargs):
            if model.training:
                masks.append(caption_dropout_mask)
            return forward(model, *args, caption_dropout_mask=caption_dropout_mask, **kwargs)

        monkeypatch.setattr(DynaDiTTransformer2DModel, "forward", spy)
        settings = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "num_validation_images": 0, "seed": 3}
        run_here(
            tmp_path / "run",
            caption_dropout_prob=0.3,
            static=True,
            max_train_steps=2,
            **{**options, **settings},
        )
        assert torch.equal(torch.cat(masks), keyed_uniform(3, "caption_dropout", range(32)) < 0.3)
        assert 0 < torch.cat(masks).sum() < 32

    def test_the_encoder_is_needed_only_before_the_steps(self, script, run_here, options, tmp_path, monkeypatch):
        """However often samples are drawn: the prompts are encoded once, and the encoder goes back to the CPU."""
        calls, places, given = [], [], []
        encode, move, draw = BertModel.forward, BertModel.to, DynaDiTTextToImagePipeline.__call__
        monkeypatch.setattr(BertModel, "forward", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
        monkeypatch.setattr(BertModel, "to", lambda model, place: places.append(str(place)) or move(model, place))
        monkeypatch.setattr(
            DynaDiTTextToImagePipeline, "__call__", lambda pipe, **kwargs: given.append(kwargs) or draw(pipe, **kwargs)
        )
        prompts = ["a red square", "blue", "one green square"]
        settings = {**options, "static": True, "max_train_steps": 2, "validation_steps": 1, "text_batch_size": 64}
        run_here(tmp_path / "run", validation_prompts=prompts, num_validation_images=4, **settings)
        assert len(calls) == 2  # the captions of the data, the prompts
        assert places == ["cpu", "cpu"] and len(given) == 3  # to the device and back; two validations and the end
        monkeypatch.undo()
        pipe = DynaDiTTextToImagePipeline.from_pretrained(tmp_path / "run")
        with torch.no_grad():
            embeds, mask, _, _ = pipe.encode_prompt([*prompts, prompts[0]], do_classifier_free_guidance=False)
        for inputs in given:
            torch.testing.assert_close(inputs["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
            assert torch.equal(inputs["prompt_attention_mask"], mask)

    def load(self, folder):
        return DynaDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")

    def test_the_threshold_mode_and_learned_variances(self, run_here, options, tmp_path):
        run_here(
            tmp_path / "run",
            router_mode="threshold",
            objective="epsilon",
            learn_sigma=True,
            complete_loss_steps=1,
            max_train_steps=3,
            validation_steps=2,
            **options,
        )
        assert "sampled_compute_ratio" in read_log(tmp_path / "run")[0]
        model = self.load(tmp_path / "run")
        assert (model.config.router_mode, model.out_channels) == ("threshold", 6)

    @pytest.mark.parametrize("task", ["generate", *TASKS])
    def test_a_data_set_and_latents(self, script, run_here, encoder, tmp_path, task):
        datasets = pytest.importorskip("datasets")
        rng = np.random.default_rng(0)
        images = [PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(20)]
        rows = {"picture": images, "words": ["red", "blue"] * 10}
        features = {"picture": datasets.Image(), "words": datasets.Value("string")}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "data")
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=2,
            sample_size=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).save_pretrained(tmp_path / "vae")
        run_here(
            tmp_path / "run",
            dataset_name=tmp_path / "data",
            image_column="picture",
            caption_column="words",
            text_encoder=encoder,
            vae=tmp_path / "vae",
            random_flip=True,
            resolution=8,
            static=True,
            max_train_steps=3,
            **TASKS.get(task, {}),
        )
        pipe = script.PIPELINES[task].from_pretrained(tmp_path / "run")
        assert (pipe.transformer.config.sample_size, pipe.transformer.config.in_channels) == (4, 2)
        assert (tmp_path / "run" / "latents").exists() == (task == "generate")
        mask = PIL.Image.fromarray(np.arange(8)[:, None].repeat(8, 1) < 4)
        inputs = {"generate": {}, "inpaint": {"image": images[0], "mask_image": mask}}
        inputs["upscale"] = {"image": images[0].resize((4, 4))}
        assert pipe("blue", num_inference_steps=2, **inputs[task]).images[0].size == (8, 8)


@pytest.fixture(scope="module")
def task_runs(run_here, options, static_run, tmp_path_factory):
    """40 static steps of each task from the weights, the text encoder and the tokenizer of the static run."""
    folder = tmp_path_factory.mktemp("tasks")
    own = {name: value for name, value in options.items() if name != "text_encoder"}
    for task, words in TASKS.items():
        run_here(
            folder / task,
            pretrained_model_name_or_path=static_run,
            static=True,
            max_train_steps=40,
            learning_rate=5e-3,
            ema_decay=0.5,
            validation_steps=40,
            **{**own, **words},
        )
    return folder


class TestTasks:
    def picture(self, color: str, size: int) -> PIL.Image.Image:
        return PIL.Image.new("RGB", (size, size), COLORS[color])

    def draw(self, pipe, prompt: str, **inputs) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **settings, **inputs).images[0]

    def test_a_hole_is_filled_by_prompt_and_by_what_is_around_it(self, task_runs):
        pipe = DynaDiTInpaintPipeline.from_pretrained(task_runs / "inpaint")
        hole = np.zeros((8, 8), dtype=bool)
        hole[1:7, 1:7] = True
        mask, red = PIL.Image.fromarray(hole), self.picture("red", 8)
        gray = PIL.Image.new("RGB", (8, 8), (128, 128, 128))
        for i, color in enumerate(COLORS):
            drawn = self.draw(pipe, f"a {color} square", image=gray, mask_image=mask)
            assert drawn[hole].mean(axis=0).argmax() == i
        first = self.draw(pipe, "blue", image=red, mask_image=mask)
        assert np.abs(first - drawn)[hole].max() > 0.02  # the same prompt and noise, in another surrounding
        hole[:4] = False
        other = self.draw(pipe, "blue", image=red, mask_image=PIL.Image.fromarray(hole))
        assert np.abs(first - other)[hole].max() > 0.02
        assert np.abs(other - np.asarray(red) / 255)[~hole].max() < 1e-6

    def test_an_image_is_enlarged_by_prompt_and_by_what_it_shows(self, task_runs):
        pipe = DynaDiTUpscalePipeline.from_pretrained(task_runs / "upscale")
        assert (pipe.config.upscale_factor, pipe.config.max_noise_level) == (2, 350.0)
        gray = PIL.Image.new("RGB", (4, 4), (128, 128, 128))
        drawn = {color: self.draw(pipe, f"a {color} square", image=gray) for color in COLORS}
        for i, image in enumerate(drawn.values()):
            assert image.shape == (8, 8, 3)
            assert image.mean(axis=(0, 1)).argmax() == i
        other = self.draw(pipe, "a blue square", image=self.picture("red", 4))
        assert np.abs(other - drawn["blue"]).max() > 0.02  # the same prompt and noise, of another image

    @pytest.mark.parametrize("task", TASKS)
    def test_a_step_has_both_conditions(self, run_here, options, tmp_path, monkeypatch, task):
        given, forward = [], DynaDiTTransformer2DModel.forward

        def spy(model, hidden_states, *args, **kwargs):
            given.append((hidden_states, kwargs))
            return forward(model, hidden_states, *args, **kwargs)

        monkeypatch.setattr(DynaDiTTransformer2DModel, "forward", spy)
        settings = {"static": True, "max_train_steps": 1, "num_validation_images": 0, "caption_dropout_prob": 0.5}
        run_here(tmp_path / "run", **options, **TASKS[task], **settings)
        (hidden_states, conditions) = given[0]
        assert hidden_states.shape[1] == 3 + {"inpaint": 4, "upscale": 3}[task]
        states = conditions["encoder_hidden_states"]
        assert states.shape[::2] == (16, 16) and states.flatten(1).unique(dim=0).shape[0] > 3
        assert 0 < conditions["caption_dropout_mask"].sum() < 16
        assert ("noise_level" in conditions) == (task == "upscale")

    @pytest.mark.parametrize("task", TASKS)
    def test_a_validation_has_images_and_captions(self, script, run_here, options, tmp_path, monkeypatch, task):
        given = []
        pipeline = script.PIPELINES[task]
        draw = pipeline.__call__
        monkeypatch.setattr(pipeline, "__call__", lambda pipe, **kwargs: given.append(kwargs) or draw(pipe, **kwargs))
        settings = {"static": True, "max_train_steps": 1, "num_validation_images": 3, "max_noise_level": 200}
        settings = {**options, **TASKS[task], **settings}
        if task == "inpaint":
            del settings["max_noise_level"]
        run_here(tmp_path / "run", **settings)
        monkeypatch.undo()
        pipe = pipeline.from_pretrained(tmp_path / "run")
        assert task == "inpaint" or pipe.config.max_noise_level == 200
        (inputs,) = given
        order = np.argsort([f"{i}.png" for i in range(30)])  # of the paths, as the source has them
        colors = [list(COLORS)[order[i] % 3] for i in (0, 10, 20)]
        with torch.no_grad():
            prompts = [f"a {color} square" for color in colors]
            embeds, _, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        torch.testing.assert_close(inputs["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
        for image, color in zip(inputs["image"], colors, strict=True):
            assert image.size == {"inpaint": (8, 8), "upscale": (4, 4)}[task]
            assert np.asarray(image).mean(axis=(0, 1)).argmax() == list(COLORS).index(color)
        assert ("mask_image" in inputs) == (task == "inpaint")
        assert (tmp_path / "run" / "samples.png").exists()

    @pytest.mark.parametrize("task", TASKS)
    def test_a_model_of_captions_goes_on_with_the_task(self, run_here, options, static_run, tmp_path, task):
        """One step at a rate of next to nothing: whatever the condition, the outputs are those of the old model."""
        run_here(
            tmp_path / "run",
            pretrained_model_name_or_path=static_run,
            static=True,
            max_train_steps=1,
            learning_rate=1e-12,
            num_validation_images=0,
            **{**options, **TASKS[task]},
        )
        pipe = DynaDiTTextToImagePipeline.from_pretrained(static_run)
        after = DynaDiTTransformer2DModel.from_pretrained(tmp_path / "run", subfolder="transformer").eval()
        assert after.config.condition_channels == {"inpaint": 4, "upscale": 3}[task]
        sample = randn(2, 3, 8, 8)
        given = torch.cat([sample, randn(2, after.config.condition_channels, 8, 8, seed=1)], dim=1)
        level = {"noise_level": 200.0} if task == "upscale" else {}
        with torch.no_grad():
            embeds, mask, _, _ = pipe.encode_prompt(["a red square", "blue"], do_classifier_free_guidance=False)
            text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
            expected = pipe.transformer(sample, 400, **text).sample
            torch.testing.assert_close(after(given, 400, **text, **level).sample, expected, atol=1e-5, rtol=0)
            text = {"encoder_hidden_states": embeds.flip(0), "encoder_attention_mask": mask.flip(0)}
            other = pipe.transformer(sample, 400, **text).sample
        assert (expected - other).abs().max() > 0.05

    @pytest.mark.parametrize("task", TASKS)
    def test_budgets_accumulation_and_resuming(self, run_here, options, task_runs, tmp_path, task):
        settings = {**options, **TASKS[task], "pretrained_model_name_or_path": task_runs / task}
        settings |= {"checkpointing_steps": 4, "validation_steps": 8, "gradient_accumulation_steps": 2}
        settings |= {"train_batch_size": 8}
        run_here(tmp_path / "whole", max_train_steps=8, **settings)
        run_here(tmp_path / "parts", max_train_steps=4, **settings)
        run_here(tmp_path / "parts", max_train_steps=8, resume_from_checkpoint="latest", **settings)
        assert_same_run(tmp_path / "whole", tmp_path / "parts", 8)
        assert read_log(tmp_path / "whole")[-1]["compute_ratio"] < 0.7

    def test_a_checkpoint_that_is_older_than_the_tasks_goes_on(self, run_here, options, tmp_path):
        settings = {**options, "static": True, "num_validation_images": 0}
        run_here(tmp_path / "run", max_train_steps=1, **settings)
        state = tmp_path / "run" / "checkpoint-1" / "training_state.json"
        content = json.loads(state.read_text())
        for name in ("task", "upscale_factor", "max_noise_level"):
            del content["identity"][name]
        state.write_text(json.dumps(content))
        settings |= {"resume_from_checkpoint": "latest", "max_train_steps": 2}
        with pytest.raises(ValueError, match="task: 'generate' in the checkpoint, 'inpaint' now"):
            run_here(tmp_path / "run", **settings, task="inpaint")
        run_here(tmp_path / "run", **settings)
        assert read_log(tmp_path / "run")[-1]["step"] == 2

    def test_a_model_of_another_task(self, run_here, options, task_runs, tmp_path):
        for task, other in (("inpaint", TASKS["upscale"]), ("upscale", {})):
            with pytest.raises(ValueError, match="condition_channels`=.* It was trained for another task: start from"):
                run_here(
                    tmp_path / "run", pretrained_model_name_or_path=task_runs / task, static=True, **options, **other
                )
        assert not (tmp_path / "run").exists()


class TestWarmStart:
    def test_a_model_of_classes_goes_on_with_captions(self, run_here, encoder, tmp_path):
        """One step at a rate of next to nothing: the outputs are those of the null class."""
        dyna_dit = load_script("train_dyna_dit.py")
        with running_here(dyna_dit) as run_classes:
            run_classes(tmp_path / "classes", static=True, max_train_steps=20, num_validation_images=0)
        run_here(
            tmp_path / "captions",
            pretrained_model_name_or_path=tmp_path / "classes",
            text_encoder=encoder,
            dataset="digits",
            static=True,
            max_train_steps=1,
            learning_rate=1e-12,
            num_validation_images=0,
        )
        classes = DynaDiTPipeline.from_pretrained(tmp_path / "classes").transformer
        pipe = DynaDiTTextToImagePipeline.from_pretrained(tmp_path / "captions")
        sample = randn(2, 1, 8, 8)
        with torch.no_grad():
            expected = classes(sample, 400, torch.tensor([10, 10])).sample
            embeds, mask, _, _ = pipe.encode_prompt(["3", "a square"], do_classifier_free_guidance=False)
            text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
            actual = pipe.transformer(sample, 400, **text).sample
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        assert expected.abs().max() > 0.05

    def test_a_model_that_reads_the_states_as_they_are_goes_on(self, run_here, options, tmp_path):
        """Without a projection of its own, which would have to start from nothing."""
        config = {"sample_size": 8, "in_channels": 3, "num_classes": None, "learn_sigma": False, "num_layers": 2}
        config |= {"num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 16}
        DynaDiTTransformer2DModel(**config).save_pretrained(tmp_path / "model")
        settings = {**options, "static": True, "max_train_steps": 1, "num_validation_images": 0}
        run_here(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "model", **settings)
        model = DynaDiTTransformer2DModel.from_pretrained(tmp_path / "run", subfolder="transformer")
        assert (model.config.caption_channels, model.config.cross_attention_dim) == (None, 16)
        settings |= {"pretrained_model_name_or_path": tmp_path / "model", "cross_attention_dim": 64}
        with pytest.raises(
            ValueError, match="`--cross_attention_dim` 64 does not fit .* of width 16, as they are. Leave"
        ):
            run_here(tmp_path / "other", **settings)

    def test_another_encoder_does_not_fit(self, run_here, static_run, options, tmp_path):
        config = json.loads((options["text_encoder"] / "config.json").read_text())
        BertModel(BertConfig.from_dict({**config, "hidden_size": 8})).save_pretrained(tmp_path / "encoder")
        tiny_tokenizer(["a"]).save_pretrained(tmp_path / "encoder")
        with pytest.raises(ValueError, match="it has `caption_channels`=16 instead of 8"):
            run_here(
                tmp_path / "run",
                pretrained_model_name_or_path=static_run,
                **{**options, "text_encoder": tmp_path / "encoder"},
            )
        assert not (tmp_path / "run").exists()


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize("task", ["generate", *TASKS])
    def test_killed_and_resumed_is_the_same_to_the_bit(self, options, tmp_path, task):
        settings = {
            **options,
            **TASKS.get(task, {}),
            "max_train_steps": 40,
            "checkpointing_steps": 20,
            "validation_steps": 20,
        }
        script_utils.run(SCRIPT, tmp_path / "whole", **settings)
        run_and_kill(SCRIPT, tmp_path / "parts", "checkpoint-20", **settings)
        script_utils.run(SCRIPT, tmp_path / "parts", resume_from_checkpoint="latest", **settings)
        assert_same_run(tmp_path / "whole", tmp_path / "parts", 40)

    def test_the_encoder_and_the_cache_may_move(self, run_here, options, encoder, tmp_path):
        settings = {**options, "static": True, "num_validation_images": 0, "gradient_accumulation_steps": 2}
        run_here(tmp_path / "whole", max_train_steps=6, **settings)
        run_here(tmp_path / "parts", max_train_steps=4, caption_cache_dir=tmp_path / "cache", **settings)
        for path in encoder.iterdir():
            (tmp_path / "moved").mkdir(exist_ok=True)
            (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
        settings |= {"text_encoder": tmp_path / "moved", "resume_from_checkpoint": "latest"}
        run_here(tmp_path / "parts", max_train_steps=6, **settings)
        assert filecmp.cmp(tmp_path / "whole" / WEIGHTS, tmp_path / "parts" / WEIGHTS, shallow=False)

    def test_other_captions_are_another_run(self, run_here, options, pictures, tmp_path):
        settings = {**options, "static": True, "num_validation_images": 0}
        run_here(tmp_path / "run", max_train_steps=1, **settings)
        lines = (pictures / "metadata.jsonl").read_text().splitlines(keepends=True)
        other = tmp_path / "other" / pictures.name
        other.mkdir(parents=True)
        for path in pictures.glob("*.png"):
            (other / path.name).write_bytes(path.read_bytes())
        # The captions of two pictures change places: the cache is the same.
        texts = [json.loads(line)["text"] for line in lines]
        texts[0], texts[1] = texts[1], texts[0]
        (other / "metadata.jsonl").write_text(
            "".join(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n" for i, text in enumerate(texts))
        )
        settings |= {"train_data_dir": other, "caption_cache_dir": tmp_path / "cache"}
        with pytest.raises(ValueError, match="captions: '.*' in the checkpoint, '.*' now"):
            run_here(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest", **settings)

    @pytest.mark.slow
    def test_two_processes_are_one(self, options, tmp_path):
        for processes in (1, 2):
            script_utils.run(
                SCRIPT,
                tmp_path / str(processes),
                processes,
                train_batch_size=16 // processes,
                num_validation_images=0,
                max_train_steps=12,
                **options,
            )
        one, two = read_log(tmp_path / "1"), read_log(tmp_path / "2")
        for name in ("loss", "compute_ratio"):
            np.testing.assert_allclose([x[name] for x in one], [x[name] for x in two], atol=1e-4, rtol=0)


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "`--text_encoder` is missing. Give a text encoder of transformers"),
            (["--text_encoder", "./no/such"], "`--text_encoder` ./no/such is not a whole text encoder"),
            (["--text_encoder_subfolder", "x", "--pretrained_model_name_or_path", "a/b"], "is for `--text_encoder`"),
            (["--caption_dropout_prob", "2"], "`--caption_dropout_prob` 2.0 must be in [0, 1]"),
            (["--max_sequence_length", "0"], "`--max_sequence_length` 0 must be at least 1"),
            (
                ["--caption_memory", "--text_conditioning", "cross_attention"],
                "`--caption_memory` is read with the mean of a caption's states, but `--text_conditioning "
                "cross_attention` has none. Use modulation or both.",
            ),
            (
                ["--validation_prompts", "red", "--num_validation_images", "0"],
                "`--validation_prompts` are for samples, but `--num_validation_images` is 0. Leave one of them out",
            ),
            (["--coupling", "ot"], "`--coupling ot` is for models of classes or without conditions"),
            (["--static", "--budget", "0.5"], "`--budget` and `--static`, which has no budget, are both set"),
            (["--task", "upscale"], "`--task upscale` needs `--upscale_factor`, 2 or 4"),
            (["--upscale_factor", "2"], "`--upscale_factor` is for `--task upscale`"),
            (["--task", "inpaint", "--max_noise_level", "5"], "`--max_noise_level` is for `--task upscale`"),
            (
                ["--task", "upscale", "--upscale_factor", "2", "--objective", "epsilon"],
                "`--task upscale` is for `--objective flow`",
            ),
            (
                ["--task", "inpaint", "--vae", "a/b", "--latent_cache_dir", "x"],
                "`--latent_cache_dir` is for `--task generate`: with `--task inpaint` images are encoded as they come",
            ),
            (["--task", "inpaint", "--coupling", "ot"], "`--coupling ot` is for models of classes"),
            (["--unconditional"], "unrecognized arguments: --unconditional"),
        ],
    )
    def test_arguments(self, script, capsys, words, message):
        with pytest.raises(SystemExit) as exit:
            script.parse_args(words)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err

    def test_nothing_is_written_where_captions_are_missing(self, run_here, encoder, pictures, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "0.png").write_bytes((pictures / "0.png").read_bytes())
        with pytest.raises(
            ValueError, match="must have metadata.jsonl or metadata.csv with the captions of its images"
        ):
            run_here(tmp_path / "run", text_encoder=encoder, train_data_dir=tmp_path / "data")
        assert not (tmp_path / "run").exists()

    def test_the_defaults_are_those_of_the_other_script(self, script):
        """One budget, one objective, one optimizer: what both have means the same."""
        here, there = (
            vars(module.make_parser().parse_args([])) for module in (script, load_script("train_dyna_dit.py"))
        )
        different = {name for name in here.keys() & there.keys() if here[name] != there[name]}
        assert different == {"output_dir"}
