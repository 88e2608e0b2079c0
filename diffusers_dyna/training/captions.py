# SPDX-License-Identifier: Apache-2.0
"""
The captions of a run as a text-to-image model is given them: last hidden states of a frozen text encoder, from a cache.

The cache holds the states of the attended tokens of each distinct caption, without padding, in the files of
[`build_shards`].
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from accelerate import Accelerator
from diffusers.utils import logging
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
)

from ..models import DynaDiTTransformer2DModel
from .randomness import keyed_uniform
from .shards import INDEX_NAME, ShardReader, build_shards, hash_identity, hash_weights


logger = logging.get_logger(__name__)

# What a config says of files and versions, not of what the model computes; the dtype is that of the weights.
OF_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")


def find_text_encoder(path: str, subfolder: str | None = None) -> tuple[str | None, str | None]:
    """
    Where a text encoder and its tokenizer are. Beside `subfolder` `text_encoder` the tokenizer is in `tokenizer`, as
    diffusers saves them, and so on with `text_encoder_2`; else both are in one folder.

    Args:
        path (`str`): a folder, or a name on the Hub, which is not looked into.
        subfolder (`str`, *optional*): of the encoder in there.

    Returns:
        `tuple`: the folders of the encoder and of the tokenizer in `path`, `None` for `path` itself.

    Raises:
        `ValueError`: where a folder, or one of the files that make it an encoder and a tokenizer, is missing.
    """
    beside = None if subfolder is None else subfolder.replace("text_encoder", "tokenizer")
    if is_local(path):
        root = Path(path).expanduser()
        if beside is not None and not (root / beside).is_dir():
            beside = subfolder
        needed = {
            "config.json": (subfolder, ["config.json"]),
            "weights, model*.safetensors or pytorch_model*.bin": (
                subfolder,
                ["model*.safetensors", "pytorch_model*.bin"],
            ),
            "tokenizer, tokenizer_config.json or tokenizer.json": (
                beside,
                ["tokenizer_config.json", "tokenizer.json", "vocab.*", "spiece.model"],
            ),
        }
        for what, (folder, patterns) in needed.items():
            folder = root / folder if folder else root
            if not any(found for pattern in patterns for found in folder.glob(pattern)):
                raise ValueError(
                    f"`--text_encoder` {path} is not a whole text encoder: {folder} has no {what}. Give the folder of a "
                    "transformers model with its tokenizer, or its name on the Hub; `--text_encoder_subfolder` where "
                    "they are in folders of a pipeline."
                )
    return subfolder, beside


def is_local(path: str) -> bool:
    """
    Args:
        path (`str`): a folder or a name on the Hub.

    Returns:
        `bool`: whether it can only be a folder: names on the Hub are `owner/name`, or one word.
    """
    return Path(path).is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1


def load_text_encoder(path: str, subfolder: str | None = None) -> tuple:
    """
    Args:
        path (`str`): a transformers model of text, a folder or a name on the Hub: CLIP's text model, also in a whole
            CLIP; T5, of which only the encoder is read; models of text alone, such as BERT and MPNet.
        subfolder (`str`, *optional*): of the model in there; see [`find_text_encoder`].

    Returns:
        `tuple`: the model, frozen and in evaluation mode, and its tokenizer.

    Raises:
        `ValueError`: where files are missing, or the model is not one that encodes text.
    """
    subfolder, beside = find_text_encoder(path, subfolder)
    folder = {"subfolder": subfolder} if subfolder else {}
    config = AutoConfig.from_pretrained(path, **folder)
    if config.model_type in ("clip", "clip_text_model"):
        model_class = CLIPTextModel
    elif type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        model_class = AutoModelForTextEncoding
    elif (
        type(config) in MODEL_MAPPING
        and not config.is_encoder_decoder
        and not config.sub_configs  # of text and something else, which have no one last state
        and getattr(MODEL_MAPPING[type(config)], "main_input_name", None) == "input_ids"
    ):
        model_class = AutoModel
    else:
        raise ValueError(
            f"`--text_encoder` {path} is a {config.model_type!r}, which transformers has no text encoder for. Give a "
            "CLIP text model, a T5 encoder or a model like BERT."
        )
    text_encoder = model_class.from_pretrained(path, **folder)
    tokenizer = AutoTokenizer.from_pretrained(path, **({"subfolder": beside} if beside else {}))
    return text_encoder.requires_grad_(False).eval(), tokenizer


class EncodedCaptions:
    """
    The captions of all images, from a complete cache.

    Args:
        cache_dir (`str` or `Path`): folder that [`build_caption_cache`] has finished.
        captions (`list[list[str]]`): one or more for each image; those that the cache was made of.

    Attributes:
        width (`int`): of a token's state.
        num_tokens (`int`): of the longest caption; all batches are padded to it.
    """

    def __init__(self, cache_dir: str | Path, captions: list[list[str]]):
        index = json.loads((Path(cache_dir) / INDEX_NAME).read_text())
        self.identity, self.captions = index["identity"], captions
        self.shard_size = self.identity["shard_size"]
        self.row_of = {caption: row for row, caption in enumerate(distinct(captions))}
        self.shards = ShardReader(cache_dir)
        num_shards = len(index["sha256"])
        self.offsets = [self.shards.get_slice(shard, "offsets")[:].tolist() for shard in range(num_shards)]
        self.width = self.shards.get_slice(0, "states").get_shape()[1]
        self.num_tokens = max(
            stop - start for offsets in self.offsets for start, stop in zip(offsets, offsets[1:], strict=False)
        )

    def draw(self, seed: int, indices: Sequence[int], image_indices: Sequence[int]) -> list[str]:
        """
        A caption for each sample: of those of its image, each as likely as the others.

        Args:
            seed (`int`): seed of the run.
            indices (`Sequence[int]`): global index of each sample.
            image_indices (`Sequence[int]`): which image it is.

        Returns:
            `list[str]`.
        """
        shares = keyed_uniform(seed, "caption", indices).tolist()
        choices = [self.captions[i] for i in image_indices]
        return [captions[int(share * len(captions))] for captions, share in zip(choices, shares, strict=True)]

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            captions (`list[str]`): captions of the data.

        Returns:
            `tuple` of the states, `torch.Tensor` of shape `(len(captions), num_tokens, width)`, float32, 0 where there
            is no token, and which of them are tokens, a bool tensor of shape `(len(captions), num_tokens)`.
        """
        states = torch.zeros(len(captions), self.num_tokens, self.width)
        mask = torch.zeros(len(captions), self.num_tokens, dtype=torch.bool)
        for i, caption in enumerate(captions):
            shard, row = divmod(self.row_of[caption], self.shard_size)
            start, stop = self.offsets[shard][row : row + 2]
            states[i, : stop - start] = self.shards.get_slice(shard, "states")[start:stop]
            mask[i, : stop - start] = True
        return states, mask

    def write_to_memory(self, transformer: DynaDiTTransformer2DModel) -> None:
        """
        Args:
            transformer ([`DynaDiTTransformer2DModel`]):
                With a memory of as many captions as there are distinct ones; has all of them then.

        Raises:
            `ValueError`: if it has other captions already, which its values were learned for.
        """
        every, keys = list(self.row_of), transformer.caption_memory.keys
        before = keys.clone()
        for start in range(0, len(every), 256):
            transformer.write_caption_memory(*self.encode(every[start : start + 256]), start=start)
        # Cosines, which rounding to bfloat16 leaves.
        if before.any() and (torch.cosine_similarity(before.float(), keys.float()) < 0.999).any():
            keys.copy_(before)
            raise ValueError(
                "`transformer` has a memory of other captions than those of the data, or in another order. Leave "
                "`--caption_memory` out to train on with the captions that it has."
            )

    def fingerprint(self) -> str:
        """Changes with the captions of every image, the encoder, the tokenizer and their settings."""
        captions = hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()
        return hash_identity({**self.identity, "captions_of_images": captions})


def distinct(captions: list[list[str]]) -> list[str]:
    """
    Args:
        captions (`list[list[str]]`): one or more for each image.

    Returns:
        `list[str]`: each caption once, in the order in which they come.
    """
    return list(dict.fromkeys(caption for of_image in captions for caption in of_image))


def check_sequence_length(max_sequence_length: int | None, text_encoder: PreTrainedModel, tokenizer) -> int:
    """
    Args:
        max_sequence_length (`int`, *optional*): tokens of a caption.
        text_encoder ([`~transformers.PreTrainedModel`]): its config may have `max_position_embeddings`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its `model_max_length` may be huge, for unknown.

    Returns:
        `int`: `max_sequence_length`; in the place of `None` the most that both take, 128 where none of them tells.

    Raises:
        `ValueError`: if it is below 1, or more than they take.
    """
    most = min(tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", 2**16))
    if max_sequence_length is None:
        return most if most < 2**16 else 128
    if not 1 <= max_sequence_length <= most:
        raise ValueError(
            f"`--max_sequence_length` {max_sequence_length} must be in [1, {most}]: the text encoder or its tokenizer "
            "takes no more tokens."
        )
    return max_sequence_length


@torch.no_grad()
def build_caption_cache(
    cache_dir: str | Path,
    captions: list[list[str]],
    text_encoder: PreTrainedModel,
    tokenizer,
    accelerator: Accelerator,
    max_sequence_length: int | None = None,
    batch_size: int = 32,
    shard_size: int = 8192,
    dtype: torch.dtype = torch.float32,
) -> EncodedCaptions:
    """
    Opens a cache of text embeddings, after encoding what it lacks. To be called by all processes, on a folder that all of
    them see; see [`build_shards`].

    Encoding repeats bit for bit on one machine at the same `batch_size`. A caption of 10 tokens at a width of 768 takes
    30 kB in float32.

    Args:
        cache_dir (`str` or `Path`): folder of the cache; need not exist.
        captions (`list[list[str]]`): one or more for each image. Equal ones are encoded once.
        text_encoder ([`~transformers.PreTrainedModel`]): on the device and in the dtype to encode with; its
            `last_hidden_state` is kept.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        accelerator ([`~accelerate.Accelerator`]): the run's.
        max_sequence_length (`int`, *optional*):
            Tokens of a caption, with those of begin and end; longer ones are cut, with a warning. `None` is the
            `model_max_length` of the tokenizer, 128 where it tells none.
        batch_size (`int`, defaults to `32`): captions to encode at a time; another one may round differently.
        shard_size (`int`, defaults to `8192`): captions of a shard, which is in memory while it is made.
        dtype (`torch.dtype`, defaults to `torch.float32`): what to store; `torch.float16` takes half the disk.

    Returns:
        [`EncodedCaptions`].

    Raises:
        `ValueError`: if `max_sequence_length` is more than the encoder takes, the states are not finite, or the folder
            holds a damaged cache or that of other captions, settings or weights.
    """
    max_sequence_length = check_sequence_length(max_sequence_length, text_encoder, tokenizer)
    texts = distinct(captions)
    token_ids = tokenizer(texts, verbose=False)["input_ids"]
    too_long = sum(len(ids) > max_sequence_length for ids in token_ids)
    if too_long and accelerator.is_main_process:
        logger.warning(
            f"{too_long} of {len(texts)} captions have more than {max_sequence_length} tokens and are cut there, at "
            "`--max_sequence_length`."
        )
    identity = {
        "captions": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        "num_captions": len(texts),
        "tokens": hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()[:16],
        "max_sequence_length": max_sequence_length,
        "dtype": str(dtype),
        "shard_size": shard_size,
        "text_encoder.class": type(text_encoder).__name__,
        "text_encoder.config": hash_identity(
            {name: value for name, value in text_encoder.config.to_diff_dict().items() if name not in OF_FILES}
        ),
        "text_encoder.dtype": str(text_encoder.dtype),
        "text_encoder.weights": hash_weights(text_encoder),
    }

    def encode(shards: list[int]) -> Iterator[tuple[int, dict[str, torch.Tensor], dict]]:
        for shard in shards:
            rows = texts[shard * shard_size :][:shard_size]
            states = []
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                inputs = tokenizer(
                    batch, padding=True, truncation=True, max_length=max_sequence_length, return_tensors="pt"
                )
                mask = inputs["attention_mask"].bool()
                output = text_encoder(
                    inputs["input_ids"].to(text_encoder.device), attention_mask=mask.to(text_encoder.device)
                )
                for caption, row, is_token in zip(batch, output.last_hidden_state.to("cpu", dtype), mask, strict=True):
                    states.append(row[is_token])
                    if not states[-1].isfinite().all():
                        raise ValueError(
                            f"`text_encoder` in {text_encoder.dtype} gives states of {caption!r} that are not finite in "
                            f"{dtype}. Encode and store in float32; if they are not finite there, the weights are bad."
                        )
            offsets = torch.tensor([0, *(len(row) for row in states)]).cumsum(0)
            yield shard, {"states": torch.cat(states), "offsets": offsets}, {}

    build_shards(cache_dir, identity, len(texts), encode, accelerator, "caption", "captions")
    return EncodedCaptions(cache_dir, captions)
