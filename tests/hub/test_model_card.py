# SPDX-License-Identifier: Apache-2.0
"""The model card says what is known, and leaves out the rest."""

import json
import re
import shutil

import pytest

from huggingface_hub import ModelCard

import diffusers_dyna
from diffusers_dyna import DynaDiTTextToImagePipeline, DynaUNet2DModel, DynaUNetPipeline, FlowMatchODEScheduler
from diffusers_dyna.hub import create_model_card
from diffusers_dyna.hub.model_card import without_local_paths

from ..pipelines.dyna_dit_common import TEXT, tiny_dit, tiny_text_encoder, tiny_tokenizer
from .conftest import write_training_summary


@pytest.fixture
def pipeline_dir(saved_pipeline_dir, tmp_path):
    return shutil.copytree(saved_pipeline_dir, tmp_path / "model")


def headings(card):
    return re.findall(r"^##? (.*)$", re.sub(r"```.*?```", "", card.text, flags=re.S), flags=re.M)


def test_a_card_without_facts_has_no_empty_place(pipeline_dir):
    card = create_model_card(pipeline_dir, "ada/digits")
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "diffusers-dyna", "flow-matching", "class-conditional"],
    }
    assert headings(card) == ["digits", "How to use", "Limits", "Citation"]
    assert not re.search(r"none\b|unknown|todo|more information|\bn/a\b|null|nan\b|\[\]|\{\}", str(card), flags=re.I)
    assert "\n\n\n" not in card.text


def test_a_card_tells_what_the_folder_tells(pipeline_dir):
    text = create_model_card(pipeline_dir, "ada/digits").text
    num_parameters = sum(
        p.numel() for p in DynaUNet2DModel.from_pretrained(pipeline_dir, subfolder="unet").parameters()
    )
    assert f"| `unet` | `DynaUNet2DModel` | {num_parameters:,} parameters (F32) |" in text
    assert "draws images of 8 x 8 pixels of 10 classes by flow matching" in text
    assert "Classes: 0 = digit 0, 1 = digit 1," in text


def test_a_card_tells_the_facts_of_the_run_in_the_order_of_the_house(pipeline_dir):
    write_training_summary(pipeline_dir)
    card = create_model_card(pipeline_dir, "ada/digits", license="apache-2.0")
    assert headings(card) == ["digits", "How to use", "Samples", "Training", "Results", "Limits", "Citation"]
    for fact in (
        "![Samples](./samples.png)",
        "seed 7, guidance scale 2, inference steps 4, scheduler FlowMatchODEScheduler",
        "| Data | [Optical digits](https://archive.ics.uci.edu/dataset/80), 1,797 images, 10 classes, licence CC BY 4.0 |",
        "| Optimiser steps | 2,000 |",
        "| Batch size (all processes and accumulation) | 128 |",
        "| Images seen | 256,000 |",
        "| Final loss | 0.1834 |",
        "| EMA decay | 0.999 |",
        "| Seed | 0 |",
        "| Hardware | 2 CPU cores |",
        "| Hours | 0.0216 |",
        "| Commit of the code | `0123456789abcdef0123456789abcdef01234567` |",
        "| Versions | diffusers 0.42.1, torch 2.13.0 |",
        "| Metric | Value | Samples | Protocol |",
        "| SVM accuracy | 0.98 | 1,000 | 100 images a class |",
    ):
        assert fact in card.text
    arguments = json.loads(re.search(r"```json\n(.*?)```", card.text, flags=re.S)[1])
    assert arguments == {
        "learning_rate": 1e-3,
        "output_dir": pipeline_dir.name,
        "train_data_dir": "digits",
        "channel_mults": [1, 2],
    }
    assert card.data.license == "apache-2.0"


def test_a_dynamic_run_shows_its_budget_and_what_is_computed_when(pipeline_dir):
    assert "What is computed when" not in create_model_card(pipeline_dir, "ada/digits").text
    write_training_summary(pipeline_dir)
    for name in ("activity.png", "tokens.png"):
        (pipeline_dir / name).write_bytes(b"")
    text = create_model_card(pipeline_dir, "ada/digits", facts={"budget": 0.6, "compute_ratio": 0.5871}).text
    assert "| Budget (share of the blocks' compute) | 0.6 |" in text
    assert "| Compute ratio reached, on training images | 0.5871 |" in text
    assert re.search(r"## What is computed when\n\n!\[.*\]\(./activity.png\)", text)
    assert "](./tokens.png)" in text


def test_the_card_is_what_it_writes(pipeline_dir):
    write_training_summary(pipeline_dir)
    card = create_model_card(pipeline_dir, "ada/digits", license="mit", base_model="ada/base", datasets="ada/images")
    assert str(ModelCard(str(card))) == str(card)


def test_arguments_replace_and_extend_what_the_folder_tells(pipeline_dir):
    write_training_summary(pipeline_dir)
    card = create_model_card(
        pipeline_dir,
        "ada/digits",
        license="mit",
        datasets=["ada/images"],
        base_model="ada/base",
        tags=["digits", "diffusers"],
        pipeline_tag="image-to-image",
        facts={
            "hardware": "1 GPU",
            "ema_decay": None,
            "limits": ["Blurry."],
            "citation": "@misc{digits}",
            "results": [{"metric": "accuracy", "value": 0.5, "compute_ratio": 0.61}],
        },
    )
    metadata = card.data.to_dict()
    assert metadata["datasets"] == ["ada/images"]
    assert metadata["base_model"] == "ada/base"
    assert metadata["pipeline_tag"] == "image-to-image"
    assert metadata["tags"] == ["diffusers", "diffusers-dyna", "flow-matching", "class-conditional", "digits"]
    assert "| Hardware | 1 GPU |" in card.text
    assert "EMA" not in card.text
    assert "- Blurry." in card.text
    assert "@misc{digits}" in card.text
    assert "| Metric | Value | Compute ratio |" in card.text
    assert "| accuracy | 0.5 | 0.61 |" in card.text


def test_a_dataset_of_the_hub_is_linked_in_the_metadata(pipeline_dir):
    facts = {"dataset": {"name": "Digits", "url": "https://huggingface.co/datasets/ada/digits"}}
    assert create_model_card(pipeline_dir, "ada/digits", facts=facts).data.datasets == ["ada/digits"]


def test_the_objective_decides_tags_and_citation(pipeline_dir):
    flow = create_model_card(pipeline_dir, "ada/digits", facts={"objective": "flow"})
    epsilon = create_model_card(pipeline_dir, "ada/digits", facts={"objective": "epsilon"})
    assert "flow-matching" in flow.data.tags and "lipman2023flow" in flow.text and "ho2020" not in flow.text
    assert "flow-matching" not in epsilon.data.tags and "ho2020" in epsilon.text and "lipman" not in epsilon.text
    assert "the model predicts the noise" in epsilon.text


def test_the_path_and_the_prediction_are_the_schedulers(pipeline_dir):
    text = create_model_card(pipeline_dir, "ada/digits", facts={"objective": "flow"}).text
    assert text.count("flow matching: the model predicts the velocity `noise - data`") == 2
    FlowMatchODEScheduler(path="gvp", prediction_type="sample").save_pretrained(pipeline_dir / "scheduler")
    text = create_model_card(pipeline_dir, "ada/digits", facts={"objective": "flow"}).text
    assert text.count("flow matching on the path `gvp`: the model predicts the data") == 2
    assert "noise - data" not in text


def test_an_unconditional_model(tmp_path):
    unet = DynaUNet2DModel(
        sample_size=(8, 16),
        in_channels=1,
        out_channels=1,
        base_channels=8,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        num_attention_heads=2,
        norm_num_groups=4,
    )
    DynaUNetPipeline(unet, FlowMatchODEScheduler()).save_pretrained(tmp_path)
    card = create_model_card(tmp_path, "ada/shapes")
    assert "class-conditional" not in card.data.tags
    assert "draws images of 8 x 16 pixels by flow matching" in card.text
    assert "class_labels" not in card.text
    assert "lasses" not in card.text.split("## Citation")[0].replace("classes. ", "")


def test_a_text_to_image_model(tmp_path):
    encoder = tiny_text_encoder("t5")
    pipe = DynaDiTTextToImagePipeline(tiny_dit(**TEXT), FlowMatchODEScheduler(), encoder, tiny_tokenizer())
    pipe.save_pretrained(tmp_path)
    card = create_model_card(tmp_path, "ada/moji")
    assert card.data.pipeline_tag == "text-to-image" and "class-conditional" not in card.data.tags
    assert "draws images of 8 x 8 pixels from a text by flow matching" in card.text
    num_parameters = sum(p.numel() for p in encoder.parameters())
    row = f"| `text_encoder` | `T5EncoderModel` | {num_parameters:,} parameters (F32), hidden states of 16 channels |"
    assert row in card.text
    assert "The text encoder is" not in card.text
    assert card.text.count('    prompt="a lighthouse on a cliff",') == 2
    assert "class_labels" not in card.text and "load_image" not in card.text
    assert headings(card) == ["moji", "How to use", "Limits", "Citation"]

    facts = {"args": {"text_encoder": "/home/ada/flan-t5-base", "max_sequence_length": 24}}
    text = create_model_card(tmp_path, "ada/moji", facts=facts).text
    assert "The text encoder is flan-t5-base; captions had at most 24 tokens in training." in text
    facts["text_encoder"] = {"name": "flan-t5", "url": "https://huggingface.co/google/flan-t5-base", "license": "mit"}
    text = create_model_card(tmp_path, "ada/moji", facts=facts).text
    assert (
        "The text encoder is [flan-t5](https://huggingface.co/google/flan-t5-base), licence mit; captions had" in text
    )


CLASSES = {"num_classes": 3, "class_dropout_prob": 0.1}


@pytest.mark.parametrize(
    "config, has_encoder, arguments",
    [
        ({}, True, ['prompt="a lighthouse on a cliff",']),
        ({"caption_dropout_prob": 0.0}, True, ['prompt="a lighthouse on a cliff",', "guidance_scale=1.0,"]),
        (CLASSES, True, ['prompt="a lighthouse on a cliff",']),
        (
            {**CLASSES, "class_dropout_prob": 0.0},
            True,
            ['prompt="a lighthouse on a cliff",', "class_labels=[0, 1],", "guidance_scale=1.0,"],
        ),
        ({}, False, ["guidance_scale=1.0,"]),
        (CLASSES, False, ["class_labels=[0, 1],"]),
    ],
)
def test_the_example_of_a_text_model_runs(config, has_encoder, arguments, tmp_path, monkeypatch):
    """Also where the guidance that is the default has no null condition to guide away from."""
    texts = (tiny_text_encoder(), tiny_tokenizer()) if has_encoder else (None, None)
    pipe = DynaDiTTextToImagePipeline(tiny_dit(**{**TEXT, **config}), FlowMatchODEScheduler(), *texts)
    pipe.save_pretrained(tmp_path / "model")
    card = create_model_card(tmp_path / "model", "ada/moji")
    block = re.search(r"```python\n(.*?)```", card.text, flags=re.S)[1]
    call = re.search(r"images = pipe\(\n(.*)\)\.images", block, flags=re.S)[1].split("\n")
    assert [line.strip() for line in call if line][:-1] == arguments
    monkeypatch.chdir(tmp_path)
    exec(block.replace("ada/moji", "./model"), {})
    assert (tmp_path / "sample.png").is_file()


@pytest.mark.parametrize(
    "name, config, tags, description, arguments",
    [
        (
            "DynaDiTImg2ImgPipeline",
            TEXT,
            [],
            "redraws images of 8 x 8 pixels as a text says by flow",
            ["image=image,", 'prompt="a lighthouse on a cliff",'],
        ),
        (
            "DynaDiTInpaintPipeline",
            {"condition_channels": 4},
            ["class-conditional", "inpainting"],
            "paints the masked part of images of 8 x 8 pixels of 3 classes by flow",
            ["image=image,", "mask_image=mask_image,", "class_labels=[0],"],
        ),
        (
            "DynaDiTUpscalePipeline",
            {"condition_channels": 3, "noise_level_conditioning": True},
            ["class-conditional", "super-resolution"],
            "enlarges images 2 times to 8 x 8 pixels of 3 classes by flow",
            ["image=image,", "class_labels=[0],"],
        ),
    ],
)
def test_pipelines_that_are_given_images(name, config, tags, description, arguments, tmp_path):
    texts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()} if config is TEXT else {}
    getattr(diffusers_dyna, name)(tiny_dit(**config), FlowMatchODEScheduler(), **texts).save_pretrained(tmp_path)
    card = create_model_card(tmp_path, "ada/pictures")
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.tags == ["diffusers", "diffusers-dyna", "flow-matching", "dynamic-dit", *tags]
    assert description in card.text
    for block in re.findall(r"```python\n(.*?)```", card.text, flags=re.S):
        call = re.search(r"images = pipe\(\n(.*)\)\.images", block, flags=re.S)[1].split("\n")
        assert [line.strip() for line in call if line][:-1] == arguments
        assert "from diffusers.utils import load_image\n" in block
        assert 'image = load_image("image.png")  # your picture\n' in block
        assert ('mask_image = load_image("mask.png")  # white where to paint\n' in block) == ("Inpaint" in name)


def test_names_that_are_no_unique_key_are_not_used_in_the_example(pipeline_dir):
    index = json.loads((pipeline_dir / "model_index.json").read_text())
    for names in ({"0": "crane", "1": "crane"}, {"0": "tench, Tinca tinca", "1": "goldfish"}, {"1": "one"}):
        (pipeline_dir / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
        assert "class_labels=[0, 1]," in create_model_card(pipeline_dir, "ada/digits").text


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"stepz": 3}, r"`facts` has the unknown keys \['stepz'\]\. Known keys: args, budget, citation"),
        ({"steps": "many"}, r"The fact `steps`='many' .* has type str, expected int"),
        ({"final_loss": "low"}, r"has type str, expected int or float"),
        ({"objective": "gan"}, r"The fact `objective`='gan' must be one of flow, epsilon"),
        ({"results": ["good"]}, r"The fact `results` must be a list of objects"),
    ],
)
def test_facts_that_cannot_be(pipeline_dir, facts, message):
    with pytest.raises(ValueError, match=message):
        create_model_card(pipeline_dir, "ada/digits", facts=facts)


@pytest.mark.parametrize(
    "value, shown",
    [
        ("/home/ada/runs/one", "one"),
        ("~/runs/one/", "one"),
        ("file:///home/ada/one.txt", "one.txt"),
        ("C:\\Users\\ada\\one", "one"),
        ("C:/Users/ada/one", "one"),
        ("--data=/home/ada/digits --steps=3", "--data=digits --steps=3"),
        ("/a/b/c:/d/e/f", "f"),
        (["/home/ada/x", 3, None], ["x", 3, None]),
        (
            {"token_selection": True, "hub_token": "x", "key": "hf_" + "a" * 34, "none": None},
            {"token_selection": True},
        ),
        ("https://huggingface.co/datasets/ada/digits", "https://huggingface.co/datasets/ada/digits"),
        ("ada/digits", "ada/digits"),
        ("outputs/one", "outputs/one"),
        ("1/2 of 3/4", "1/2 of 3/4"),
        (0.5, 0.5),
    ],
)
def test_paths_and_secrets_are_not_shown(value, shown):
    assert without_local_paths(value) == shown
