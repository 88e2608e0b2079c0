# SPDX-License-Identifier: Apache-2.0
"""Captions of image folders and data sets, and the cache of their embeddings, against the encoder itself."""

import argparse
import csv
import json
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open

from accelerate import Accelerator
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextModel, T5Config, T5EncoderModel, T5Model

from diffusers_dyna.training import shards
from diffusers_dyna.training.captions import (
    EncodedCaptions,
    build_caption_cache,
    check_sequence_length,
    find_text_encoder,
    load_text_encoder,
)
from diffusers_dyna.training.data import (
    CaptionFolderSource,
    HubDatasetSource,
    ImageTransform,
    TrainingImages,
    collate_examples,
    load_digits,
    open_image_source,
)

from ..testing_utils import logged_warnings, tiny_text_encoder, tiny_tokenizer


WORDS = ["a", "red", "green", "blue", "square", "circle", "on", "grass"]
CAPTIONS = [["a red square"], ["a blue circle", "blue"], ["a red square"], ["a green circle on blue grass"], ["grass"]]


def make_folder(folder, rows, suffix="jsonl", images=("0.png", "deep/1.png", "2.png")):
    for i, name in enumerate(images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(folder / name)
    path = folder / f"metadata.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as Excel saves it
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return folder


class TestFolder:
    ROWS = [
        {"file_name": "deep/1.png", "text": 'a "blue", round circle'},
        {"file_name": "0.png", "text": "a red square"},
        {"file_name": "2.png", "text": "two\nlines"},
        {"file_name": "0.png", "text": "red"},
    ]

    @pytest.mark.parametrize("suffix", ["jsonl", "csv"])
    def test_captions_go_with_their_files(self, tmp_path, suffix):
        with logged_warnings() as messages:
            source = CaptionFolderSource(make_folder(tmp_path, self.ROWS, suffix))
        assert not messages
        names = [path.relative_to(tmp_path).as_posix() for path in source.paths]
        assert dict(zip(names, source.captions, strict=True)) == {
            "0.png": ["a red square", "red"],
            "deep/1.png": ['a "blue", round circle'],
            "2.png": ["two\nlines"],
        }
        assert source.read(names.index("2.png")).getpixel((0, 0)) == (80, 80, 80)
        assert (source.labels, source.id2label) == (None, None)

    def test_a_list_of_captions_and_another_column(self, tmp_path):
        rows = [{"file_name": name, "alt": ["x", f"of {name}"]} for name in ("0.png", "deep/1.png", "2.png")]
        source = CaptionFolderSource(make_folder(tmp_path, rows), caption_column="alt")
        assert source.captions[0] == ["x", "of 0.png"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (ROWS[:2], "metadata.jsonl has no caption of 1 of the 3 images, such as 2.png. Add rows, or move"),
            ([*ROWS, {"file_name": "9.png", "text": "x"}], "line 9 names 9.png, which is not an image of the folder"),
            (
                [*ROWS, {"file_name": "0.png", "text": "  "}],
                "line 9 has no caption in 'text': it is '  '. Give a text",
            ),
            ([*ROWS, {"file_name": "0.png", "text": []}], "line 9 has no caption in 'text': it is []"),
            (
                [*ROWS, {"file_name": "0.png", "text": ["a", None]}],
                "line 9 has no caption in 'text': it is ['a', None]",
            ),
            (
                [*ROWS, {"file_name": "0.png"}],
                "line 9 has no 'text', as `--caption_column` says: it has ['file_name']",
            ),
            ([{"text": "a"}], "line 1 has no 'file_name': it has ['text']"),
            (["a.png"], 'line 1 must be an object such as {...}, but is "a.png"'),
        ],
    )
    def test_what_is_missing_is_named(self, tmp_path, rows, message):
        with pytest.raises(ValueError) as error:
            CaptionFolderSource(make_folder(tmp_path, rows))
        assert message in str(error.value)

    def test_metadata_files(self, tmp_path):
        make_folder(tmp_path, self.ROWS)
        with (tmp_path / "metadata.jsonl").open("a") as file:
            file.write('{"file_name": "0.png", ')
        with pytest.raises(ValueError, match="metadata.jsonl, line 9 is not JSON"):
            CaptionFolderSource(tmp_path)
        make_folder(tmp_path, self.ROWS, "csv")
        with pytest.raises(ValueError, match="one of them, but has metadata.jsonl and metadata.csv"):
            CaptionFolderSource(tmp_path)
        for suffix in ("csv", "jsonl"):
            (tmp_path / f"metadata.{suffix}").unlink()
        with pytest.raises(ValueError, match="must have metadata.jsonl or metadata.csv .*, but has neither"):
            CaptionFolderSource(tmp_path)


def test_an_image_that_takes_another_s_place_brings_its_captions(tmp_path):
    source = CaptionFolderSource(make_folder(tmp_path, TestFolder.ROWS))
    (tmp_path / "0.png").write_bytes(b"not a png")
    batch = collate_examples([TrainingImages(source, ImageTransform(8, 3), seed=0)[5, i] for i in (0, 1, 2)])
    assert [source.paths[i].name for i in batch["image_indices"]] == ["2.png", "2.png", "1.png"]
    assert len(batch["bad_images"]) == 1


def test_captions_of_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = PIL.Image.new("RGB", (8, 8))
    rows = {
        "image": [image] * 3,
        "text": ["a", "b", "c"],
        "several": [["a", "b"], ["c"], ["d"]],
        "bad": ["a", "", "c"],
    }
    dataset = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                **{name: datasets.Value("string") for name in ("text", "bad")},
                "several": datasets.List(datasets.Value("string")),
                "image": datasets.Image(),
            }
        ),
    )

    def open_source(column):
        return HubDatasetSource(dataset, "toys", label_column=None, caption_column=column)

    assert open_source("text").captions == [["a"], ["b"], ["c"]]
    assert open_source("several").captions == [["a", "b"], ["c"], ["d"]]
    with pytest.raises(ValueError, match="Row 1 of toys has no caption in 'bad': it is ''"):
        open_source("bad")
    with pytest.raises(ValueError, match="`--caption_column` 'alt' is not a column of toys"):
        open_source("alt")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(WORDS)


@pytest.fixture(scope="module")
def text_encoder():
    return tiny_text_encoder(len(WORDS) + 4)


def build(folder, text_encoder, tokenizer, captions=CAPTIONS, **options):
    options = {"batch_size": 2, "shard_size": 3, **options}
    return build_caption_cache(folder, captions, text_encoder, tokenizer, Accelerator(), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestCache:
    def test_states_are_those_of_the_encoder(self, tmp_path, text_encoder, tokenizer):
        texts = build(tmp_path, text_encoder, tokenizer)
        assert (texts.width, texts.num_tokens) == (16, 8)
        distinct = ["a red square", "a blue circle", "blue", "a green circle on blue grass", "grass"]
        states, mask = texts.encode(distinct[::-1])
        assert states.shape == (5, 8, 16) and mask.dtype == torch.bool
        for caption, row, is_token in zip(distinct[::-1], states, mask, strict=True):
            with torch.no_grad():
                expected = text_encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
            assert is_token.tolist() == [i < len(expected) for i in range(8)]
            # Padding beside other captions changes the order of sums.
            torch.testing.assert_close(row[is_token], expected, rtol=1e-4, atol=1e-5)
            assert not row[~is_token].any()
        assert len(list(tmp_path.glob("shard-*.safetensors"))) == 2  # 5 distinct ones, 3 a shard

    def test_a_sample_draws_one_of_its_image_s_captions(self, tmp_path, text_encoder, tokenizer):
        texts = build(tmp_path, text_encoder, tokenizer)
        images = [1] * 1000 + [0, 3]
        drawn = texts.draw(0, range(5, 1007), images)
        assert drawn[1000:] == ["a red square", "a green circle on blue grass"]
        assert set(drawn[:1000]) == {"a blue circle", "blue"}
        assert 400 < drawn.count("blue") < 600
        assert texts.draw(0, [105], [1]) == drawn[100:101]
        assert texts.draw(1, range(5, 1007), images) != drawn

    def test_longer_captions_are_cut(self, tmp_path, text_encoder, tokenizer):
        with logged_warnings() as messages:
            texts = build(tmp_path, text_encoder, tokenizer, max_sequence_length=5)
        assert messages == ["1 of 5 captions have more than 5 tokens and are cut there, at `--max_sequence_length`."]
        with torch.no_grad():
            inputs = tokenizer(CAPTIONS[3], truncation=True, max_length=5, return_tensors="pt")
            expected = text_encoder(**inputs).last_hidden_state
        torch.testing.assert_close(texts.encode(CAPTIONS[3])[0], expected, rtol=1e-4, atol=1e-5)

    def test_only_what_is_missing_is_encoded(self, tmp_path, text_encoder, tokenizer, monkeypatch):
        build(tmp_path / "whole", text_encoder, tokenizer)
        save_file = shards.save_file

        class Killed(BaseException):
            pass

        def save_until_killed(tensors, path, metadata):
            if "00001" in path.name:
                path.write_bytes(b"half a shard")
                raise Killed
            save_file(tensors, path, metadata)

        monkeypatch.setattr(shards, "save_file", save_until_killed)
        with pytest.raises(Killed):
            build(tmp_path / "cache", text_encoder, tokenizer)
        monkeypatch.undo()
        sizes, forward = [], text_encoder.forward
        monkeypatch.setattr(
            text_encoder, "forward", lambda ids, **rest: sizes.append(len(ids)) or forward(ids, **rest)
        )
        build(tmp_path / "cache", text_encoder, tokenizer)
        assert sizes == [2]
        build(tmp_path / "cache", text_encoder, tokenizer)
        assert sizes == [2]
        assert contents(tmp_path / "cache") == contents(tmp_path / "whole")

    def test_damage_and_another_identity(self, tmp_path, text_encoder, tokenizer):
        build(tmp_path, text_encoder, tokenizer)
        other = tiny_text_encoder(len(WORDS) + 4, seed=1)
        with pytest.raises(
            ValueError, match="caption cache .* was made of other captions, settings or weights"
        ) as error:
            build(tmp_path, other, tokenizer, [*CAPTIONS, ["red"]], max_sequence_length=20)
        names = [line.strip().split(":")[0] for line in str(error.value).split("\n")[1:-1]]
        assert names == ["captions", "max_sequence_length", "num_captions", "text_encoder.weights", "tokens"]
        shard = tmp_path / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
        with pytest.raises(ValueError, match="shard-00001.safetensors is damaged.*Delete this file and start again"):
            build(tmp_path, text_encoder, tokenizer)

    def test_the_fingerprint_knows_which_caption_is_whose(self, tmp_path, text_encoder, tokenizer):
        texts = build(tmp_path, text_encoder, tokenizer)
        moved = EncodedCaptions(tmp_path, [CAPTIONS[1], CAPTIONS[0], *CAPTIONS[2:]])
        assert EncodedCaptions(tmp_path, CAPTIONS).fingerprint() == texts.fingerprint()
        assert moved.fingerprint() != texts.fingerprint()

    def test_a_spawned_worker_can_have_it(self, tmp_path, text_encoder, tokenizer):
        texts = build(tmp_path, text_encoder, tokenizer)
        expected, _ = texts.encode(["grass"])
        assert torch.equal(pickle.loads(pickle.dumps(texts)).encode(["grass"])[0], expected)

    def test_half_precision(self, tmp_path, text_encoder, tokenizer):
        expected, _ = build(tmp_path / "32", text_encoder, tokenizer).encode(["grass"])
        half = build(tmp_path / "16", text_encoder, tokenizer, dtype=torch.float16)
        torch.testing.assert_close(half.encode(["grass"])[0], expected, rtol=2**-11, atol=2**-24)
        with safe_open(tmp_path / "16" / "shard-00000.safetensors", framework="pt") as file:
            assert file.get_tensor("states").dtype == torch.float16

    def test_states_that_are_not_finite(self, tmp_path, tokenizer):
        broken = tiny_text_encoder(len(WORDS) + 4)
        with torch.no_grad():
            broken.embeddings.word_embeddings.weight[tokenizer("grass").input_ids[1]] = torch.nan
        with pytest.raises(ValueError, match="gives states of 'a green circle on blue grass' that are not finite"):
            build(tmp_path, broken, tokenizer)


class TestEncoder:
    @pytest.fixture
    def saved(self, tmp_path, tokenizer):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        t5 = T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        clip = CLIPConfig(
            text_config={**sizes, "vocab_size": 12, "eos_token_id": 3},
            vision_config={**sizes, "image_size": 8, "patch_size": 4},
        )
        models = {"bert": BertModel(BertConfig(vocab_size=12, **sizes)), "t5": T5Model(t5), "clip": CLIPModel(clip)}
        models["clip_text"] = CLIPTextModel(clip.text_config)
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("bert", BertModel), ("t5", T5EncoderModel), ("clip", CLIPTextModel), ("clip_text", CLIPTextModel)],
    )
    def test_kinds(self, saved, tmp_path, name, expected):
        text_encoder, tokenizer = load_text_encoder(str(saved / name))
        assert type(text_encoder) is expected
        assert not text_encoder.training
        assert not any(parameter.requires_grad for parameter in text_encoder.parameters())
        texts = build(tmp_path / "cache", text_encoder, tokenizer)
        assert texts.width == text_encoder.config.hidden_size == 16

    def test_folders_of_a_pipeline(self, saved, tokenizer):
        BertModel.from_pretrained(saved / "bert").save_pretrained(saved / "pipe" / "text_encoder_2")
        with pytest.raises(
            ValueError, match="pipe is not a whole text encoder: .*text_encoder_2 has no tokenizer, tok"
        ):
            find_text_encoder(str(saved / "pipe"), "text_encoder_2")
        tokenizer.save_pretrained(saved / "pipe" / "tokenizer_2")
        assert find_text_encoder(str(saved / "pipe"), "text_encoder_2") == ("text_encoder_2", "tokenizer_2")
        assert isinstance(load_text_encoder(str(saved / "pipe"), "text_encoder_2")[0], BertModel)
        assert find_text_encoder("owner/name", "text_encoder") == ("text_encoder", "tokenizer")

    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ("config.json", "has no config.json. Give the folder of a transformers model with its tokenizer"),
            ("model.safetensors", "has no weights, model"),
            ("tokenizer*", "has no tokenizer, tokenizer_config.json or tokenizer.json"),
        ],
    )
    def test_files_that_are_missing(self, saved, removed, message):
        for path in (saved / "bert").glob(removed):
            path.unlink()
        with pytest.raises(ValueError, match="`--text_encoder` .*bert is not a whole text encoder") as error:
            find_text_encoder(str(saved / "bert"))
        assert message in str(error.value)
        with pytest.raises(ValueError, match="nowhere is not a whole text encoder"):
            find_text_encoder("./nowhere")

    def test_a_model_that_encodes_no_text(self, saved):
        config = json.loads((saved / "bert" / "config.json").read_text())
        (saved / "bert" / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
        with pytest.raises(
            ValueError, match="is a 'vit', which transformers has no text encoder for. Give a CLIP text"
        ):
            load_text_encoder(str(saved / "bert"))

    def test_sequence_lengths(self, text_encoder, tokenizer):
        assert text_encoder.config.max_position_embeddings == 32
        assert check_sequence_length(None, text_encoder, tokenizer) == 32
        assert check_sequence_length(9, text_encoder, tokenizer) == 9
        for length in (0, 33):
            with pytest.raises(ValueError, match=rf"`--max_sequence_length` {length} must be in \[1, 32\]"):
                check_sequence_length(length, text_encoder, tokenizer)
        t5 = T5EncoderModel(T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
        assert check_sequence_length(None, t5, tokenizer) == 128


def test_the_names_of_the_classes_are_captions_of_what_is_built_in():
    args = argparse.Namespace(dataset="digits", train_data_dir=None, dataset_name=None)
    source = open_image_source(args, with_captions=True)
    assert source.captions == [[str(label)] for label in load_digits().labels]
    assert (source.labels, source.id2label) == (None, None)
