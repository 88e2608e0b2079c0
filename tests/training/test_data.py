# SPDX-License-Identifier: Apache-2.0
import argparse
import gzip
import json

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_dyna.training.data import (
    GlobalBatchSampler,
    HubDatasetSource,
    ImageFolderSource,
    ImageTransform,
    StreamingLoader,
    TrainingImages,
    collate_examples,
    load_digits,
    load_fashion_mnist,
    make_dataloader,
    open_image_source,
    to_rgb,
)
from diffusers_dyna.training.randomness import keyed_generator

from ..testing_utils import logged_warnings


def sample_order(sampler, num_batches):
    batches = iter(sampler)
    return [next(batches) for _ in range(num_batches)]


def save_image(path, color, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, color in (("cat", "red"), ("ant", "blue")):
        for i in range(3):
            save_image(tmp_path / name / "deeper" / f"{i}.png", color)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


class TestOrder:
    def test_every_image_once_an_epoch_in_another_order(self):
        order = sample_order(GlobalBatchSampler(10, 4, seed=0), 5)
        flat = [pair for batch in order for pair in batch]
        assert [n for n, _ in flat] == list(range(20))
        first, second = [i for _, i in flat[:10]], [i for _, i in flat[10:]]
        assert sorted(first) == sorted(second) == list(range(10))
        assert first != second
        assert first != list(range(10))

    @pytest.mark.parametrize(("num_processes", "batch_size", "accumulation"), [(2, 6, 1), (1, 3, 4), (2, 2, 3)])
    def test_any_split_of_a_batch_sees_the_same_images(self, num_processes, batch_size, accumulation):
        whole = sample_order(GlobalBatchSampler(30, 12, seed=1), 7)
        parts = [
            sample_order(GlobalBatchSampler(30, batch_size, 1, num_processes, process), 7 * accumulation)
            for process in range(num_processes)
        ]
        for step in range(7):
            micro_steps = range(step * accumulation, (step + 1) * accumulation)
            assert sorted(whole[step]) == sorted(pair for m in micro_steps for part in parts for pair in part[m])

    def test_resuming_needs_only_the_step(self):
        assert sample_order(GlobalBatchSampler(10, 4, seed=0), 9)[6:] == sample_order(
            GlobalBatchSampler(10, 4, seed=0, first_micro_step=6), 3
        )

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_workers_change_nothing(self, folder, num_workers):
        source = ImageFolderSource(folder)
        transform = ImageTransform(8, 3, random_flip=True)
        loader = make_dataloader(source, transform, GlobalBatchSampler(6, 4, seed=0), 0, num_workers)
        batches = iter(loader)
        dataset = TrainingImages(source, transform, seed=0)
        for pairs in sample_order(GlobalBatchSampler(6, 4, seed=0), 3):
            batch, expected = next(batches), collate_examples([dataset[pair] for pair in pairs])
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
            assert torch.equal(batch["class_labels"], expected["class_labels"])
            assert batch["sample_indices"] == [n for n, _ in pairs]


class TestTransform:
    def test_pixels_are_scaled_to_one_and_keep_their_place(self):
        pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
        out = ImageTransform(4, 3)(PIL.Image.fromarray(pixels), keyed_generator(0, "augmentation", 0))
        torch.testing.assert_close(out, torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float())

    @pytest.mark.parametrize("size", [(40, 20), (20, 40), (31, 20)])
    def test_the_shorter_side_is_resized_and_the_middle_cropped(self, size):
        image = PIL.Image.new("RGB", size, "black")
        image.paste("white", (size[0] // 2 - 5, size[1] // 2 - 5, size[0] // 2 + 5, size[1] // 2 + 5))
        out = ImageTransform(10, 1)(image, keyed_generator(0, "augmentation", 0))
        assert out.shape == (1, 10, 10)
        center, corners = out[0, 4:6, 4:6], out[0, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert center.min() > 0.8  # Lanczos rings beside an edge
        assert corners.max() < -0.8

    def test_flip_and_crop_follow_the_sample_and_nothing_else(self):
        image = PIL.Image.fromarray(np.arange(12 * 24, dtype=np.uint16).reshape(12, 24).astype(np.uint8))
        transform = ImageTransform(12, 1, center_crop=False, random_flip=True)
        views = [transform(image, keyed_generator(0, "augmentation", n)) for n in range(64)]
        again = [transform(image, keyed_generator(0, "augmentation", n)) for n in range(64)]
        assert all(torch.equal(view, repeated) for view, repeated in zip(views, again, strict=True))
        flipped = sum(bool(view[0, 0, 0] > view[0, 0, 1]) for view in views)
        assert 16 < flipped < 48  # 64 fair draws: mean 32, standard deviation 4
        assert len({view[0].amin().item() for view in views}) > 4  # crops at many places


class TestDigits:
    def test_they_are_scikit_learns(self):
        from sklearn.datasets import load_digits as reference

        source = load_digits()
        assert len(source) == 1797
        assert source.id2label == {i: str(i) for i in range(10)}
        np.testing.assert_array_equal(source.labels, reference().target)
        pixels = np.stack([np.asarray(source.read(i)) for i in range(len(source))])
        np.testing.assert_array_equal(np.rint(pixels * (16 / 255)), reference().images)


class TestFashionMNIST:
    @pytest.fixture
    def data_root(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
        labels = np.array([9, 0, 3, 3, 1], dtype=np.uint8)
        header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = bytes([0, 0, 8, 1]) + np.array(labels.shape, ">u4").tobytes()
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        return tmp_path, images, labels

    def test_idx_files(self, data_root):
        folder, images, labels = data_root
        source = load_fashion_mnist(folder)
        np.testing.assert_array_equal(source.labels, labels)
        np.testing.assert_array_equal(np.stack([np.asarray(source.read(i)) for i in range(5)]), images)
        assert source.id2label[9] == "Ankle boot"
        assert (source.native_size, source.channels) == (28, 1)

    def test_bad_files(self, data_root):
        folder, _, _ = data_root
        with pytest.raises(ValueError, match="must hold t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"):
            load_fashion_mnist(folder, "test")
        labels = folder / "train-labels-idx1-ubyte"
        whole = labels.read_bytes()
        labels.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=r"is cut off: 4 bytes for shape \(5,\)"):
            load_fashion_mnist(folder)
        labels.write_bytes(b"\x89PNG" + whole[4:])
        with pytest.raises(ValueError, match="is not an IDX file of uint8 with 1 dimensions"):
            load_fashion_mnist(folder)


class TestImageFolder:
    def test_classes_are_the_first_folders_in_order(self, folder):
        source = ImageFolderSource(folder)
        assert source.id2label == {0: "ant", 1: "cat"}
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert [source.read(i).getpixel((0, 0)) for i in (0, 5)] == [(0, 0, 255), (255, 0, 0)]

    def test_hidden_folders_and_other_files(self, folder):
        save_image(folder / ".thumbs" / "0.png", "green")
        save_image(folder / "cat" / ".old" / "0.png", "green")
        with logged_warnings() as messages:
            source = ImageFolderSource(folder)
        assert len(source) == 6
        assert messages == [f"{folder} has 1 files that are no images by their name, such as notes.txt."]

    def test_sixteen_bits_are_scaled_and_floats_refused(self, folder):
        ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
        PIL.Image.fromarray(ramp).save(folder / "ant" / "deeper" / "0.png")
        pixels = np.asarray(ImageFolderSource(folder).read(0))
        np.testing.assert_array_equal(pixels[..., 0], np.rint(ramp / 257))
        with pytest.raises(ValueError, match="images of floats have no known range"):
            to_rgb(PIL.Image.new("F", (8, 8)))

    def test_without_classes(self, folder):
        save_image(folder / "loose.jpg", "green")
        source = ImageFolderSource(folder, with_classes=False)
        assert (len(source), source.labels, source.id2label) == (7, None, None)

    def test_the_fingerprint_follows_the_files(self, folder):
        before = ImageFolderSource(folder).fingerprint()
        assert before == ImageFolderSource(folder).fingerprint()
        save_image(folder / "cat" / "new.png", "red")
        assert ImageFolderSource(folder).fingerprint() != before

    def test_folders_that_cannot_be_used(self, folder):
        with pytest.raises(ValueError, match="`--train_data_dir` .*missing is not a folder"):
            ImageFolderSource(folder / "missing")
        (folder / "dog").mkdir()
        with pytest.raises(ValueError, match="has class folders with no image: dog"):
            ImageFolderSource(folder)
        with pytest.raises(ValueError, match=r"dog has no image \(.avif, .*\) in it or below it"):
            ImageFolderSource(folder / "dog")
        save_image(folder / "loose.jpg", "green")
        with pytest.raises(ValueError, match="in no class folder, such as loose.jpg.*--unconditional"):
            ImageFolderSource(folder)

    def test_a_bad_image_is_named_and_the_next_one_takes_its_place(self, folder):
        (folder / "ant" / "deeper" / "1.png").write_bytes(b"not a png")
        cut_off = folder / "ant" / "deeper" / "2.png"
        cut_off.write_bytes(cut_off.read_bytes()[:45])
        dataset = TrainingImages(ImageFolderSource(folder), ImageTransform(8, 3), seed=0)
        example = dataset[(17, 1)]
        assert example["class_label"] == 1
        assert example["sample_index"] == 17
        assert "1.png (UnidentifiedImageError" in example["bad_images"][0]
        assert "2.png (" in example["bad_images"][1]
        assert dataset[(18, 0)]["bad_images"] == []

    def test_all_images_bad(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x.png").write_bytes(b"")
        with pytest.raises(ValueError, match="No image of .* can be read"):
            TrainingImages(ImageFolderSource(tmp_path), ImageTransform(8, 3), seed=0)[(0, 0)]


class TestDatasetsLibrary:
    @pytest.fixture
    def dataset(self):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {
                "img": datasets.Image(),
                "label": datasets.ClassLabel(names=["red", "blue"]),
                "name": datasets.Value("string"),
            }
        )
        rows = [
            {"img": PIL.Image.new("RGB", (8, 8), (10 * i, 0, 0)), "label": i % 2, "name": "ab"[i % 2]}
            for i in range(10)
        ]
        return datasets.Dataset.from_list(rows, features=features)

    def test_columns(self, dataset):
        source = HubDatasetSource(dataset, "colours", image_column="img")
        assert source.id2label == {0: "red", 1: "blue"}
        assert source.labels.tolist() == [i % 2 for i in range(10)]
        assert [source.read(i).getpixel((0, 0)) for i in (0, 7)] == [(0, 0, 0), (70, 0, 0)]
        by_name = HubDatasetSource(dataset, "colours", image_column="img", label_column="name")
        assert by_name.id2label == {0: "a", 1: "b"}
        np.testing.assert_array_equal(by_name.labels, source.labels)
        assert HubDatasetSource(dataset, "colours", "img", None).id2label is None

    def test_wrong_columns(self, dataset):
        with pytest.raises(ValueError, match="`--image_column` 'image' is not a column of colours: it has"):
            HubDatasetSource(dataset, "colours")
        with pytest.raises(ValueError, match="`--label_column` 'class' is not a column of .*--unconditional"):
            HubDatasetSource(dataset, "colours", "img", "class")

    def test_labels_that_are_not_given(self, dataset):
        hidden = dataset.map(lambda row: {"label": -1})
        with pytest.raises(ValueError, match=r"labels outside \[0, 2\): it goes from -1 to -1"):
            HubDatasetSource(hidden, "colours", "img")

    def test_a_stream_of_names_has_no_classes(self, dataset):
        with pytest.raises(ValueError, match="does not say its classes, and a stream cannot be searched"):
            HubDatasetSource(dataset.to_iterable_dataset(), "colours", "img", "name")

    def make_loader(self, dataset, **options):
        source = HubDatasetSource(dataset.to_iterable_dataset(num_shards=2), "colours", "img")
        options = {"batch_size": 4, "seed": 0, **options}
        return StreamingLoader(source, ImageTransform(8, 3, random_flip=True), **options)

    def take(self, loader, num_batches):
        batches = iter(loader)
        return [next(batches) for _ in range(num_batches)]

    def test_a_stream_repeats_and_knows_its_rows(self, dataset):
        batches = self.take(self.make_loader(dataset), 5)
        reds = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in batches])
        torch.testing.assert_close(reds, (torch.arange(20) % 10) * 10 / 127.5 - 1)
        assert [n for batch in batches for n in batch["sample_indices"]] == list(range(20))
        assert torch.cat([batch["class_labels"] for batch in batches]).tolist() == [i % 2 for i in range(10)] * 2

    @pytest.mark.parametrize("done", [0, 1, 2, 3, 5])
    def test_a_stream_resumes_at_the_next_row(self, dataset, done):
        whole = self.take(self.make_loader(dataset), done + 4)
        first = self.make_loader(dataset)
        self.take(first, done)
        state = json.loads(json.dumps(first.state_dict()))
        second = self.make_loader(dataset)
        second.load_state_dict(state)
        for batch, expected in zip(self.take(second, 4), whole[done:], strict=True):
            assert batch["sample_indices"] == expected["sample_indices"]
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
            assert torch.equal(batch["class_labels"], expected["class_labels"])

    def test_processes_share_a_stream(self, dataset):
        whole = self.take(self.make_loader(dataset), 4)
        parts = [
            self.take(self.make_loader(dataset, batch_size=2, num_processes=2, process_index=p), 4) for p in (0, 1)
        ]
        for step, batch in enumerate(whole):
            assert torch.equal(batch["pixel_values"], torch.cat([part[step]["pixel_values"] for part in parts]))

    def test_a_bad_row_of_a_stream_is_named(self, dataset):
        datasets = pytest.importorskip("datasets")
        rows = dataset.cast_column("img", datasets.Image(decode=False)).to_list()
        rows[5]["img"] = {"bytes": b"broken", "path": None}
        broken = datasets.Dataset.from_list(rows).cast(dataset.features)
        batches = self.take(self.make_loader(broken), 2)
        assert batches[0]["bad_images"] == []
        assert len(batches[1]["bad_images"]) == 1
        assert batches[1]["bad_images"][0].startswith("row 5 of colours (UnidentifiedImageError")
        assert torch.equal(batches[1]["pixel_values"][1], batches[1]["pixel_values"][2]) or torch.equal(
            batches[1]["pixel_values"][1, 0], batches[1]["pixel_values"][2, 0].flip(-1)
        )

    def test_a_shuffle_buffer_mixes_rows(self, dataset):
        batches = self.take(self.make_loader(dataset, shuffle_buffer_size=10), 5)
        reds = [round((red.item() + 1) * 12.75) for batch in batches for red in batch["pixel_values"][:, 0, 0, 0]]
        assert sorted(reds[:10]) == list(range(10))
        assert reds[:10] != list(range(10))
        assert reds[10:] != reds[:10]

    def test_opened_by_arguments(self, dataset, tmp_path):
        defaults = {
            "train_data_dir": None,
            "dataset_config_name": None,
            "dataset_split": "train",
            "cache_dir": str(tmp_path / "cache"),
            "image_column": "img",
            "label_column": "label",
            "unconditional": False,
        }
        dataset.save_to_disk(tmp_path / "saved")
        (tmp_path / "parquet").mkdir()
        dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
        for name in ("saved", "parquet"):
            for streaming in (False, True):
                args = argparse.Namespace(dataset_name=str(tmp_path / name), streaming=streaming, **defaults)
                source = open_image_source(args)
                assert source.is_stream == streaming
                assert source.name == name
                assert source.id2label == {0: "red", 1: "blue"}
