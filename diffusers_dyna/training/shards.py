# SPDX-License-Identifier: Apache-2.0
"""
A cache on disk of what a frozen network makes of the data: latents of images, embeddings of captions.

Its rows are in shards of a fixed number of rows: the files do not depend on the number of processes that wrote them.
Each appears under its name only when it is whole, and `index.json` comes last, with their checksums. Every shard and the
index hold the identity of the cache, all that decides on its content.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from accelerate import Accelerator

from .checkpoints import PARTIAL_PREFIX
from .loop import write_json


INDEX_NAME = "index.json"


def build_shards(
    cache_dir: str | Path,
    identity: dict,
    num_rows: int,
    encode: Callable[[list[int]], Iterator[tuple[int, dict[str, torch.Tensor], dict[str, dict]]]],
    accelerator: Accelerator,
    kind: str,
    contents: str,
) -> None:
    """
    Makes the shards that a cache lacks. To be called by all processes, on a folder that all of them see. A complete
    cache is checked against its checksums; one that was interrupted goes on with its missing shards, with any number of
    processes.

    Args:
        cache_dir (`str` or `Path`): folder of the cache; need not exist.
        identity (`dict`): what decides on the content, as plain JSON values; `shard_size` among them.
        num_rows (`int`): rows of all shards together.
        encode (`Callable`):
            Given the shards that are this process's to make, yields each one, its tensors, and facts about its rows: a
            name to a `dict` of JSON values. The index has those of all shards.
        accelerator ([`~accelerate.Accelerator`]): the run's.
        kind (`str`): what the cache is one of, such as `"latent"`.
        contents (`str`): what the rows were made of, in the plural, for messages.

    Raises:
        `ValueError`: if the folder holds a damaged cache or one of another identity.
    """
    cache_dir = Path(cache_dir)
    shard_size = identity["shard_size"]
    index_path = cache_dir / INDEX_NAME
    paths = {shard: shard_path(cache_dir, shard) for shard in range(-(-num_rows // shard_size))}
    present = [shard for shard, path in paths.items() if path.exists()]
    missing = [shard for shard, path in paths.items() if not path.exists()]
    own = missing[accelerator.process_index :: accelerator.num_processes]
    # One key for everything: safetensors writes several in an order that changes from call to call.
    key = f"{kind}_cache"

    def check_identity(saved: dict) -> None:
        different = [name for name in sorted(saved.keys() | identity.keys()) if saved.get(name) != identity.get(name)]
        if different:
            lines = [f"  {name}: {saved.get(name)!r} in the cache, {identity.get(name)!r} now" for name in different]
            raise ValueError(
                f"The {kind} cache {cache_dir} was made of other {contents}, settings or weights:\n"
                + "\n".join(lines)
                + "\nUse the same values, give another folder, or delete this one."
            )

    if index_path.exists():
        index = json.loads(index_path.read_text())
        check_identity(index["identity"])
        for shard in present[accelerator.process_index :: accelerator.num_processes]:
            if _sha256(paths[shard]) != index["sha256"][paths[shard].name]:
                raise ValueError(
                    f"{paths[shard]} is damaged: its SHA-256 is not the one in {INDEX_NAME}. Delete this file and "
                    "start again: it alone is encoded anew."
                )
    else:
        for shard in present:
            check_identity(_read_metadata(paths[shard], key)["identity"])
    accelerator.wait_for_everyone()  # before anything is written, all have seen the same

    cache_dir.mkdir(parents=True, exist_ok=True)
    if missing and accelerator.is_main_process:
        index_path.unlink(missing_ok=True)  # where it is, the cache is complete
    for shard, tensors, facts in tqdm(
        encode(own),
        f"Encoding {contents}",
        len(own),
        unit="shard",
        disable=not own or not accelerator.is_main_process,
    ):
        partial = cache_dir / f"{PARTIAL_PREFIX}{paths[shard].name}"
        metadata = json.dumps({"identity": identity, **facts}, sort_keys=True)
        save_file(tensors, partial, metadata={key: metadata})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, paths[shard])
    accelerator.wait_for_everyone()

    if accelerator.is_main_process and not index_path.exists():
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
            digests = list(pool.map(_sha256, paths.values()))
        index = {"identity": identity, "sha256": {}}
        for path, digest in zip(paths.values(), digests, strict=True):
            index["sha256"][path.name] = digest
            for name, facts in _read_metadata(path, key).items():
                if name != "identity":
                    index.setdefault(name, {}).update(facts)
        write_json(index_path, index)
    accelerator.wait_for_everyone()


def shard_path(cache_dir: str | Path, shard: int) -> Path:
    """
    Args:
        cache_dir (`str` or `Path`): folder of a cache.
        shard (`int`): which one, from 0.

    Returns:
        `Path` of its file.
    """
    return Path(cache_dir) / f"shard-{shard:05d}.safetensors"


class ShardReader:
    """
    The tensors of a complete cache, memory-mapped.

    Args:
        cache_dir (`str` or `Path`): folder that [`build_shards`] has finished.
    """

    def __init__(self, cache_dir: str | Path):
        self.cache_dir = Path(cache_dir)
        self._slices = {}

    def get_slice(self, shard: int, name: str):
        """
        Args:
            shard (`int`): which one, from 0.
            name (`str`): of the tensor.

        Returns:
            A slice of `safetensors`, which reads what it is indexed with.
        """
        if (shard, name) not in self._slices:
            with safe_open(shard_path(self.cache_dir, shard), framework="pt") as file:
                self._slices[shard, name] = file.get_slice(name)
        return self._slices[shard, name]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_slices": {}}  # a worker that is spawned maps the files itself


def hash_identity(identity: dict) -> str:
    """
    Args:
        identity (`dict`): of a cache.

    Returns:
        `str`: 16 hexadecimal digits that change with it.
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def hash_weights(model: nn.Module) -> str:
    """
    Args:
        model (`torch.nn.Module`): on any device.

    Returns:
        `str`: 16 hexadecimal digits that change with names, shapes, dtypes and values of its weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_metadata(path: Path, key: str) -> dict:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()[key])
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). If it is damaged, delete it and start again: it alone is encoded anew. "
            "If another process wrote it, the folder must be one that all processes see."
        ) from error
