# SPDX-License-Identifier: Apache-2.0
"""
Images for training, in an order that is a function of (seed, epoch) alone.

Every sample that a run ever sees has a global index n = 0, 1, 2, ...: optimizer step s takes n in [s B, (s + 1) B) for
a total batch of B, and n is sample n mod N of epoch n // N of a data set of N. So a run resumes at step s without
reading what came before, and any split of B over processes and accumulation sees the same samples.
"""

import csv
import gzip
import hashlib
import io
import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import DataLoader, Dataset

from diffusers.utils import logging

from .randomness import keyed_generator


logger = logging.get_logger(__name__)

IMAGE_EXTENSIONS = {
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
BUILT_IN_DATASETS = ("digits", "fashion-mnist")
FASHION_MNIST_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class ImageSource(ABC):
    """
    Images with labels, by index. Subclasses set the attributes and implement `read`.

    Attributes:
        name (`str`): what the images are, as a model card would say it.
        labels (`np.ndarray` of shape `(num_images,)`, *optional*): integer label of each image; `None` without classes.
        captions (`list[list[str]]`, *optional*): one or more for each image; `None` without captions.
        id2label (`dict[int, str]`, *optional*): name of each class.
        native_size (`int`, *optional*): side of the images where all have the same.
        channels (`int`): 1 (gray) or 3 (RGB).
        facts (`dict`): licence and address, for the model card.
    """

    name: str
    labels: np.ndarray | None = None
    captions: list[list[str]] | None = None
    id2label: dict[int, str] | None = None
    native_size: int | None = None
    channels: int = 3
    facts: dict = {}
    num_images: int

    def __len__(self) -> int:
        return self.num_images

    @abstractmethod
    def read(self, index: int) -> PIL.Image.Image:
        """The image at `index`, decoded. Raises any `Exception` of its decoder for a bad file."""

    def describe(self, index: int) -> str:
        """What to call the image at `index` in a message."""
        return f"image {index} of {self.name}"

    def fingerprint(self) -> str:
        """Changes when the images' number, order, names or labels change; does not read the images."""
        digest = hashlib.sha256(f"{self.name}/{len(self)}".encode())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]


class ArraySource(ImageSource):
    """
    Gray images in memory.

    Args:
        name (`str`): what the images are.
        images (`np.ndarray` of shape `(num_images, size, size)`): uint8, 0 is black.
        labels (`np.ndarray` of shape `(num_images,)`): integer labels.
        names (`tuple[str, ...]`): name of each class.
        facts (`dict`): licence and address, for the model card.
    """

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...], facts: dict):
        self.name, self.images, self.labels, self.facts = name, images, labels, facts
        self.id2label = dict(enumerate(names))
        self.num_images, self.native_size, self.channels = len(images), images.shape[-1], 1

    def read(self, index: int) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.images[index])


def load_digits() -> ArraySource:
    """
    The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; their 17 gray levels are spread over
    [0, 255].

    Raises:
        `ImportError`: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("`--dataset digits` comes with scikit-learn: `pip install scikit-learn`.") from error
    digits = load()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    facts = {"license": "CC BY 4.0", "url": "https://doi.org/10.24432/C50P49"}
    return ArraySource("digits", images, digits.target, tuple("0123456789"), facts)


def load_fashion_mnist(data_root: str | Path, split: str = "train") -> ArraySource:
    """
    Fashion-MNIST ([arXiv 1708.07747](https://huggingface.co/papers/1708.07747)) from its four IDX files, 28 x 28.

    Args:
        data_root (`str` or `Path`): folder with `train-images-idx3-ubyte` and its siblings, plain or as `.gz`.
        split (`str`, defaults to `"train"`): `"train"` (60,000 images) or `"test"` (10,000).

    Raises:
        `ValueError`: where a file is missing or is not what it should be.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(Path(data_root), f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(Path(data_root), f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"`--data_root` {data_root} has {len(images)} images but {len(labels)} labels.")
    facts = {"license": "MIT", "url": "https://github.com/zalandoresearch/fashion-mnist"}
    return ArraySource("fashion-mnist", images, labels.astype(np.int64), FASHION_MNIST_NAMES, facts)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    candidates = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not candidates:
        raise ValueError(
            f"`--data_root` {folder} must hold {name} or {name}.gz, one of the IDX files of the data set."
        )
    raw = candidates[0].read_bytes()
    raw = gzip.decompress(raw) if candidates[0].suffix == ".gz" else raw
    header = 4 * (1 + dimensions)
    # IDX: two zero bytes, 8 for uint8, the number of dimensions, then each of them as a big-endian uint32.
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{candidates[0]} is not an IDX file of uint8 with {dimensions} dimensions.")
    shape = tuple(np.frombuffer(raw, ">u4", dimensions, offset=4).tolist())
    if len(raw) - header != np.prod(shape):
        raise ValueError(f"{candidates[0]} is cut off: {len(raw) - header} bytes for shape {shape}.")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


class ImageFolderSource(ImageSource):
    """
    The images under a folder; the class of an image is the name of the first folder below it.

    Args:
        folder (`str` or `Path`): has one folder a class, or images anywhere where `with_classes` is False.
        with_classes (`bool`, defaults to `True`): read the classes.

    Raises:
        `ValueError`: where the folder is missing or empty, a class has no image, or images have no class.
    """

    def __init__(self, folder: str | Path, with_classes: bool = True):
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"`--train_data_dir` {folder} is not a folder.")
        self.name, self.folder = folder.resolve().name, folder
        visible = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
        self.paths = [path for path in visible if path.suffix.lower() in IMAGE_EXTENSIONS]
        others = [
            path.name
            for path in visible
            if path.suffix.lower() not in IMAGE_EXTENSIONS and path.name not in METADATA_NAMES
        ]
        if not self.paths:
            raise ValueError(
                f"`--train_data_dir` {folder} has no image ({', '.join(sorted(IMAGE_EXTENSIONS))}) in it or below it."
            )
        if others:
            logger.warning(f"{folder} has {len(others)} files that are no images by their name, such as {others[0]}.")
        self.num_images = len(self.paths)
        if not with_classes:
            return
        classless = [path for path in self.paths if path.parent == folder]
        if classless:
            raise ValueError(
                f"`--train_data_dir` {folder} has images that are in no class folder, such as {classless[0].name}. "
                "Give each class a folder, or train without classes by `--unconditional`."
            )
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        label_of = {name: label for label, name in enumerate(names)}
        classes = [path.relative_to(folder).parts[0] for path in self.paths]
        empty = sorted(set(names) - set(classes))
        if empty:
            raise ValueError(f"`--train_data_dir` {folder} has class folders with no image: {', '.join(empty)}.")
        self.labels = np.array([label_of[name] for name in classes])
        self.id2label = dict(enumerate(names))

    def read(self, index: int) -> PIL.Image.Image:
        with PIL.Image.open(self.paths[index]) as image:
            return to_rgb(image)

    def describe(self, index: int) -> str:
        return str(self.paths[index])

    def fingerprint(self) -> str:
        names = "\n".join(path.relative_to(self.folder).as_posix() for path in self.paths)
        return hashlib.sha256(names.encode()).hexdigest()[:16]


class CaptionFolderSource(ImageFolderSource):
    """
    The images under a folder, with captions from its `metadata.jsonl` or `metadata.csv`, as the `datasets` library has
    them: a row for each image, its path from the folder in the column `file_name`. Unlike there, metadata of the folders
    below is not read. A caption of `metadata.jsonl` may be a list of captions; several rows of one image are several
    captions.

    Args:
        folder (`str` or `Path`): has the images, anywhere below, and the metadata file.
        caption_column (`str`, defaults to `"text"`): column with the captions.

    Raises:
        `ValueError`: where a file, a column or a caption is missing, or images and rows do not belong together.
    """

    def __init__(self, folder: str | Path, caption_column: str = "text"):
        super().__init__(folder, with_classes=False)
        present = [self.folder / name for name in METADATA_NAMES if (self.folder / name).is_file()]
        if len(present) != 1:
            found = " and ".join(path.name for path in present) or "neither"
            raise ValueError(
                f"`--train_data_dir` {folder} must have {' or '.join(METADATA_NAMES)} with the captions of its images, "
                f"one of them, but has {found}."
            )
        captions_of: dict[Path, list[str]] = {path: [] for path in self.paths}
        for where, row in _read_metadata(present[0]):
            for column, flag in (("file_name", ""), (caption_column, ", as `--caption_column` says")):
                if column not in row:
                    raise ValueError(f"{where} has no {column!r}{flag}: it has {sorted(row)}.")
            path = self.folder / str(row["file_name"])
            if path not in captions_of:
                raise ValueError(
                    f"{where} names {row['file_name']}, which is not an image of the folder. Repair `file_name`, the "
                    f"path from {folder}, or remove the row."
                )
            captions_of[path] += _check_captions(row[caption_column], where, caption_column)
        without = [path for path, captions in captions_of.items() if not captions]
        if without:
            raise ValueError(
                f"{present[0]} has no caption of {len(without)} of the {len(self.paths)} images, such as "
                f"{without[0].relative_to(self.folder).as_posix()}. Add rows, or move the images away."
            )
        self.captions = list(captions_of.values())


def _read_metadata(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields what to call a row in a message, and the row."""
    content = path.read_bytes()
    try:
        file = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number} is not UTF-8: {error}. Save the file as UTF-8.") from error
    if path.suffix == ".csv":
        number = 0
        try:
            for row in (reader := csv.DictReader(file, strict=True)):
                number = reader.line_num
                # Where a row has more cells than there are columns, the rest has no name.
                yield f"{path}, line {number}", {name: value for name, value in row.items() if name}
        except csv.Error as error:
            raise ValueError(
                f"{path}, the row after line {number} is not CSV: {error}. Close its quotes, and write a quote within "
                "quotes twice."
            ) from error
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be an object such as {{...}}, but is {line.strip()[:50]}.")
        yield f"{path}, line {number}", row


def _check_captions(value, where: str, column: str) -> list[str]:
    """One caption or several, as several."""
    captions = list(value) if isinstance(value, (list, tuple)) else [value]
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError(f"{where} has no caption in {column!r}: it is {value!r}. Give a text, or a list of texts.")
    return captions


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Args:
        image (`PIL.Image.Image`): any mode; one of 16 bits is scaled to 8, where Pillow would cut it off at 255.

    Returns:
        `PIL.Image.Image` in mode RGB, turned as its EXIF data says.

    Raises:
        `ValueError`: on an image of floats, whose range nothing tells.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("images of floats have no known range")
    if image.mode.startswith("I"):  # I;16, or I for the same in older versions of Pillow
        image = PIL.Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


class HubDatasetSource(ImageSource):
    """
    A data set of the `datasets` library with an image column and, for classes, a label column.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): one split.
        name (`str`): what the images are.
        image_column (`str`, defaults to `"image"`): column with the images.
        label_column (`str`, *optional*, defaults to `"label"`):
            Column with the classes: `ClassLabel`, integers, or names. `None` reads no classes.
        caption_column (`str`, *optional*):
            Column with the captions, texts or lists of texts. `None` reads none. Not for a stream.

    Raises:
        `ValueError`: where a column or a caption is missing, or a stream does not say its classes.
    """

    def __init__(
        self,
        dataset,
        name: str,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
    ):
        import datasets

        self.name, self.image_column, self.label_column = name, image_column, label_column
        self.is_stream = isinstance(dataset, datasets.IterableDataset)
        features = dataset.features or (dataset._resolve_features().features if self.is_stream else {})
        columns = {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
        for flag, column in columns.items():
            if column is not None and column not in features:
                hint = " Use `--unconditional` to train without classes." if flag == "label_column" else ""
                raise ValueError(f"`--{flag}` {column!r} is not a column of {name}: it has {sorted(features)}.{hint}")
        # Undecoded, a row is bytes or a path: a bad image then fails at its own row, and skipping a row costs little.
        if isinstance(features[image_column], datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.dataset = dataset
        self.num_images = None if self.is_stream else len(dataset)
        if label_column is not None:
            self._read_classes(features[label_column])
        if caption_column is not None:
            self.captions = [
                _check_captions(value, f"Row {i} of {name}", caption_column)
                for i, value in enumerate(dataset[caption_column])
            ]

    def _read_classes(self, feature) -> None:
        self._label_of: dict[str | int, int] | None = None
        if getattr(feature, "names", None):
            names = feature.names
        elif self.is_stream:
            raise ValueError(
                f"`--label_column` {self.label_column!r} of {self.name} does not say its classes, and a stream cannot "
                "be searched for them. Give it the feature `ClassLabel`, or drop `--streaming`."
            )
        else:
            values = sorted(set(self.dataset[self.label_column]))
            self._label_of = {value: label for label, value in enumerate(values)}
            names = [str(value) for value in values]
        self.id2label = dict(enumerate(names))
        if not self.is_stream:
            self.labels = np.array([self.label_of(value) for value in self.dataset[self.label_column]])
            without = [name for label, name in self.id2label.items() if label not in self.labels]
            if self.labels.min() < 0 or self.labels.max() >= len(names):
                raise ValueError(
                    f"`--label_column` {self.label_column!r} of {self.name} has labels outside [0, {len(names)}): it "
                    f"goes from {self.labels.min()} to {self.labels.max()}. Choose a split that is labelled."
                )
            if without:
                logger.warning(f"{self.name} has no image of the classes {', '.join(without)}.")

    def label_of(self, value: str | int) -> int:
        """The label of an entry of the label column."""
        return int(value) if self._label_of is None else self._label_of[value]

    def decode(self, value) -> PIL.Image.Image:
        """The image of an entry of the image column."""
        if isinstance(value, Mapping):
            value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
        elif not isinstance(value, (str, Path, PIL.Image.Image)):
            value = PIL.Image.fromarray(np.asarray(value, dtype=np.uint8))
        image = value if isinstance(value, PIL.Image.Image) else PIL.Image.open(value)
        return to_rgb(image)

    def read(self, index: int) -> PIL.Image.Image:
        return self.decode(self.dataset[int(index)][self.image_column])

    def fingerprint(self) -> str:
        if self.is_stream:
            return hashlib.sha256(self.name.encode()).hexdigest()[:16]
        return super().fingerprint()


class ImageTransform:
    """
    Resizes the shorter side, crops a square, flips, and scales to [-1, 1].

    Args:
        resolution (`int`): side of the square in pixels.
        channels (`int`): 1 (gray) or 3 (RGB).
        center_crop (`bool`, defaults to `True`): crop the middle instead of a random place.
        random_flip (`bool`, defaults to `False`): mirror every other image.
    """

    def __init__(self, resolution: int, channels: int, center_crop: bool = True, random_flip: bool = False):
        self.resolution, self.channels = resolution, channels
        self.center_crop, self.random_flip = center_crop, random_flip

    def __call__(self, image: PIL.Image.Image, generator: torch.Generator) -> torch.Tensor:
        """
        Args:
            image (`PIL.Image.Image`): any size and mode.
            generator (`torch.Generator`): for the place of the crop and the flip.

        Returns:
            `torch.Tensor` of shape `(channels, resolution, resolution)`, float32 in [-1, 1].
        """
        vertical, horizontal, flip = torch.rand(3, generator=generator).tolist()
        image = image.convert("L" if self.channels == 1 else "RGB")
        scale = self.resolution / min(image.size)
        size = (max(self.resolution, round(image.width * scale)), max(self.resolution, round(image.height * scale)))
        if size != image.size:
            image = image.resize(size, PIL.Image.Resampling.LANCZOS)
        if self.center_crop:
            vertical = horizontal = 0.5
        left = int((image.width - self.resolution) * horizontal + 0.5)
        top = int((image.height - self.resolution) * vertical + 0.5)
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if self.random_flip and flip < 0.5:
            image = PIL.ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(self.resolution, self.resolution, -1)
        return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()  # (C, H, W)


class TrainingImages(Dataset):
    """
    An [`ImageSource`] as (global index, image index) -> example. An image that cannot be read is replaced by the next
    one that can, and its name is passed on in the example.

    Args:
        source ([`ImageSource`]): the images.
        transform ([`ImageTransform`]): from image to tensor.
        seed (`int`): seed of the run.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        sample_index, image_index = key
        bad_images = []
        for offset in range(len(self.source)):
            i = (image_index + offset) % len(self.source)
            try:
                image = self.source.read(i)
            except Exception as error:
                bad_images.append(f"{self.source.describe(i)} ({type(error).__name__}: {error})")
                continue
            label = -1 if self.source.labels is None else int(self.source.labels[i])
            return make_example(image, i, label, sample_index, bad_images, self.transform, self.seed)
        raise ValueError(f"No image of {self.source.name} can be read.")


def make_example(
    image, image_index: int | None, label: int, sample_index: int, bad_images: list[str], transform, seed: int
) -> dict:
    """One row of a batch, see [`collate_examples`]."""
    pixel_values = transform(image, keyed_generator(seed, "augmentation", sample_index))
    return {
        "pixel_values": pixel_values,
        "class_label": label,
        "image_index": image_index,
        "sample_index": sample_index,
        "bad_images": bad_images,
    }


def collate_examples(examples: list[dict]) -> dict:
    """
    Args:
        examples (`list[dict]`): rows of [`TrainingImages`].

    Returns:
        `dict` with `pixel_values` of shape `(batch_size, channels, resolution, resolution)`, `class_labels` of shape
        `(batch_size,)` (-1 without classes), `image_indices`, the list of which images of the source they are (`None`
        each for a stream), `sample_indices`, the list of global indices, and `bad_images`, the list of what could not
        be read.
    """
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "class_labels": torch.tensor([example["class_label"] for example in examples]),
        "image_indices": [example["image_index"] for example in examples],
        "sample_indices": [example["sample_index"] for example in examples],
        "bad_images": [name for example in examples for name in example["bad_images"]],
    }


class GlobalBatchSampler:
    """
    The (global index, image index) pairs of one process's micro-batches, without end.

    Args:
        num_images (`int`): images in the data set.
        batch_size (`int`): samples of one micro-batch of one process.
        seed (`int`): seed of the run.
        num_processes (`int`, defaults to `1`): processes that share each micro-step.
        process_index (`int`, defaults to `0`): which of them this is.
        first_micro_step (`int`, defaults to `0`): optimizer steps done times gradient accumulation.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
        first_micro_step: int = 0,
    ):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.first_micro_step = first_micro_step
        self._epoch, self._order = None, None

    def image_index(self, sample_index: int) -> int:
        """The image that global sample `sample_index` is: every image once an epoch, in an order drawn for it."""
        epoch, position = divmod(sample_index, self.num_images)
        if epoch != self._epoch:
            generator = keyed_generator(self.seed, "order", epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_images, generator=generator).tolist()
        return self._order[position]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro_step = self.first_micro_step
        while True:
            first = (micro_step * self.num_processes + self.process_index) * self.batch_size
            yield [(n, self.image_index(n)) for n in range(first, first + self.batch_size)]
            micro_step += 1


def make_dataloader(
    source: ImageSource, transform: ImageTransform, sampler: GlobalBatchSampler, seed: int, num_workers: int = 0
) -> DataLoader:
    """
    Batches of [`collate_examples`], without end. Not to be given to `accelerator.prepare`: the sampler already knows
    its process.

    Args:
        source ([`ImageSource`]): the images.
        transform ([`ImageTransform`]): from image to tensor.
        sampler ([`GlobalBatchSampler`]): which images, in which order.
        seed (`int`): seed of the run.
        num_workers (`int`, defaults to `0`): processes that read images ahead; 0 reads them in this one.

    Returns:
        [`~torch.utils.data.DataLoader`].
    """
    return DataLoader(
        TrainingImages(source, transform, seed),
        batch_sampler=sampler,
        collate_fn=collate_examples,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_main_process,
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_main_process(worker_id: int) -> None:
    # Ctrl-C reaches the whole process group. A worker that died of it would take the run with it before it can save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StreamingLoader:
    """
    Batches of [`collate_examples`] from a stream, without end. Every process reads the whole stream and decodes its
    own share, so the samples do not depend on the number of processes. In place of an image that cannot be read, another
    of its batch stands twice.

    Without a shuffle buffer the position is exact: `state_dict` after a batch, given to `load_state_dict` of a new
    loader, continues with the next sample. With one, the buffer's content is lost.

    Args:
        source ([`HubDatasetSource`]): over an `IterableDataset`.
        transform ([`ImageTransform`]): from image to tensor.
        batch_size (`int`): samples of one micro-batch of one process.
        seed (`int`): seed of the run.
        num_processes (`int`, defaults to `1`): processes that share each micro-step.
        process_index (`int`, defaults to `0`): which of them this is.
        shuffle_buffer_size (`int`, defaults to `0`): rows to draw from; 0 keeps the order of the stream.
        num_threads (`int`, defaults to `1`): threads that decode a batch.
    """

    def __init__(
        self,
        source: HubDatasetSource,
        transform: ImageTransform,
        batch_size: int,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
        shuffle_buffer_size: int = 0,
        num_threads: int = 1,
    ):
        self.source, self.transform, self.batch_size, self.seed = source, transform, batch_size, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.dataset = source.dataset
        if shuffle_buffer_size:
            self.dataset = self.dataset.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
        self.pool = ThreadPoolExecutor(max_workers=max(1, num_threads))
        self.epoch = 0
        self.next_sample_index = 0

    def state_dict(self) -> dict:
        """Where the stream is, as plain JSON types."""
        return {
            "epoch": self.epoch,
            "next_sample_index": self.next_sample_index,
            "stream": self.dataset.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken."""
        self.epoch, self.next_sample_index = state["epoch"], state["next_sample_index"]
        self.dataset.set_epoch(self.epoch)
        self.dataset.load_state_dict(state["stream"])

    def _rows(self) -> Iterator[dict]:
        empty_epochs = 0  # a stream resumed at its very end is empty once
        while empty_epochs < 2:
            empty_epochs += 1
            for row in self.dataset:
                empty_epochs = 0
                yield row
            self.epoch += 1
            self.dataset.set_epoch(self.epoch)
        raise ValueError(f"The stream {self.source.name} has no rows.")

    def _decode(self, row: dict) -> tuple[PIL.Image.Image, int] | Exception:
        try:
            label = -1 if self.source.label_column is None else self.source.label_of(row[self.source.label_column])
            if label >= 0 and label not in self.source.id2label:
                raise ValueError(f"label {label} is not one of its {len(self.source.id2label)} classes")
            return self.source.decode(row[self.source.image_column]), label
        except Exception as error:
            return error

    def __iter__(self) -> Iterator[dict]:
        rows = self._rows()
        while True:
            first = self.next_sample_index + self.process_index * self.batch_size
            shared = [next(rows) for _ in range(self.num_processes * self.batch_size)]
            self.next_sample_index += len(shared)
            own = shared[self.process_index * self.batch_size :][: self.batch_size]
            decoded = list(self.pool.map(self._decode, own))
            good = [entry for entry in decoded if not isinstance(entry, Exception)]
            if not good:
                raise ValueError(f"No image of a whole batch of {self.source.name} can be read: {decoded[0]}")
            examples = []
            for i, entry in enumerate(decoded):
                bad_images = []
                if isinstance(entry, Exception):
                    bad_images.append(f"row {first + i} of {self.source.name} ({type(entry).__name__}: {entry})")
                    entry = good[i % len(good)]
                image, label = entry
                examples.append(make_example(image, None, label, first + i, bad_images, self.transform, self.seed))
            yield collate_examples(examples)


def open_image_source(args, with_captions: bool = False) -> ImageSource:
    """
    The data that the arguments of a training script name.

    Args:
        args (`argparse.Namespace`): with the arguments of `add_data_arguments`.
        with_captions (`bool`, defaults to `False`):
            Read captions instead of classes. Those of the data sets that are built in are the names of the classes.

    Returns:
        [`ImageSource`].

    Raises:
        `ValueError`: where the data is missing or not as the arguments say.
    """
    if args.train_data_dir is not None and with_captions:
        return CaptionFolderSource(args.train_data_dir, args.caption_column)
    if args.train_data_dir is not None:
        return ImageFolderSource(args.train_data_dir, with_classes=not args.unconditional)
    if args.dataset_name is not None:
        is_local = Path(args.dataset_name).exists()
        source = HubDatasetSource(
            _load_dataset(args),
            name=Path(args.dataset_name).name if is_local else args.dataset_name,
            image_column=args.image_column,
            label_column=None if with_captions or args.unconditional else args.label_column,
            caption_column=args.caption_column if with_captions else None,
        )
        if not is_local:
            source.facts = {"url": f"https://huggingface.co/datasets/{args.dataset_name}"}
        return source
    source = load_fashion_mnist(args.data_root) if args.dataset == "fashion-mnist" else load_digits()
    if with_captions:
        source.captions = [[source.id2label[int(label)]] for label in source.labels]
    if with_captions or args.unconditional:
        source.labels = source.id2label = None
    return source


def _load_dataset(args):
    import datasets

    path = Path(args.dataset_name)
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():  # from `Dataset.save_to_disk`
        dataset = datasets.load_from_disk(str(path))
        return dataset.to_iterable_dataset() if args.streaming else dataset
    if (path / "dataset_dict.json").exists():
        raise ValueError(
            f"`--dataset_name` {path} holds several splits. Give the folder of one, such as {path / 'train'}."
        )
    return datasets.load_dataset(
        args.dataset_name,
        args.dataset_config_name,
        split=args.dataset_split,
        cache_dir=args.cache_dir,
        streaming=args.streaming,
    )
