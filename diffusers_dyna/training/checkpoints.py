# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints that are either complete or not there.

A checkpoint is written into a folder whose name starts with `.partial-`, flushed to disk and renamed to
`checkpoint-<step>`. A kill at any moment leaves complete checkpoints and at most one `.partial-` folder, which the
next start removes.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator


PARTIAL_PREFIX = ".partial-"
REPLACED_PREFIX = f"{PARTIAL_PREFIX}replaced-"
STATE_NAME = "training_state.json"  # every complete checkpoint has it
CHECKPOINT_PATTERN = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """
    Args:
        output_dir (`str` or `Path`): folder of a run; need not exist.

    Returns:
        `list[Path]`: the complete checkpoints, in the order of their steps.
    """
    folders = [
        path
        for path in Path(output_dir).glob("checkpoint-*")
        if CHECKPOINT_PATTERN.fullmatch(path.name) and (path / STATE_NAME).is_file()
    ]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: str | Path) -> int:
    """
    Args:
        checkpoint (`str` or `Path`): a folder named `checkpoint-<step>`.

    Returns:
        `int`: its step.
    """
    return int(CHECKPOINT_PATTERN.fullmatch(Path(checkpoint).name).group(1))


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint that a run starts from.

    Args:
        output_dir (`str` or `Path`): folder of the run.
        resume_from_checkpoint (`str`, *optional*):
            `"latest"` for the newest one in `output_dir`, or the name or path of one. `None` starts a new run.

    Returns:
        `Path`, or `None` for a new run.

    Raises:
        `ValueError`: if the named one does not exist, is not complete or is older than others beside it, and if a new
            run would write into a folder that holds one.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None or (resume_from_checkpoint == "latest" and not checkpoints):
        if checkpoints or (Path(output_dir) / "model_index.json").exists():
            raise ValueError(
                f"`--output_dir` {output_dir} already holds a run"
                + (f" ({checkpoints[-1].name})" if checkpoints else " (a saved pipeline without checkpoints)")
                + ". Continue from a checkpoint with `--resume_from_checkpoint latest`, or give another `--output_dir`."
            )
        return None
    if resume_from_checkpoint == "latest":
        return checkpoints[-1]
    for candidate in (Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if CHECKPOINT_PATTERN.fullmatch(candidate.name) and (candidate / STATE_NAME).is_file():
            if candidate.parent.resolve() == Path(output_dir).resolve() and candidate.name != checkpoints[-1].name:
                raise ValueError(
                    f"`--resume_from_checkpoint` {resume_from_checkpoint} would write over {checkpoints[-1].name}, which "
                    "is newer. Move the newer ones away, or give another `--output_dir` and the path of this one."
                )
            return candidate
    found = ", ".join(path.name for path in checkpoints) or "no checkpoint"
    raise ValueError(
        f"`--resume_from_checkpoint` {resume_from_checkpoint} is not a checkpoint folder; {output_dir} has {found}. "
        "Use 'latest' or the name of one."
    )


def sweep_partial_folders(output_dir: str | Path) -> list[str]:
    """
    Removes what an interrupted run left half-written. To be called by one process.

    Args:
        output_dir (`str` or `Path`): folder of the run; need not exist.

    Returns:
        `list[str]`: names of the folders that were removed.
    """
    partial = sorted(Path(output_dir).glob(f"{PARTIAL_PREFIX}*"))
    for path in partial:
        replaced = path.with_name(path.name.removeprefix(REPLACED_PREFIX))
        if path.name.startswith(REPLACED_PREFIX) and not replaced.exists():
            path.rename(replaced)  # killed between the two renames of `commit_folder`: the older one is still good
        else:
            _remove(path)
    return [path.name for path in partial]


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    write: Callable[[Path], None],
    total_limit: int | None = None,
) -> Path:
    """
    Writes `checkpoint-<step>` in one go, then deletes the oldest ones beyond the limit. To be called by all
    processes, since sharded models are written by all.

    Args:
        accelerator ([`~accelerate.Accelerator`]): the run's.
        output_dir (`str` or `Path`): folder of the run.
        step (`int`): optimizer steps done.
        write (`Callable[[Path], None]`): fills the folder that it is given; called on every process.
        total_limit (`int`, *optional*): number of checkpoints to keep, at least 1; `None` keeps all.

    Returns:
        `Path` of the checkpoint.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"{PARTIAL_PREFIX}{final.name}"
    if accelerator.is_main_process:
        _remove(partial)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        commit_folder(partial, final)
        if total_limit is not None:
            others = [path for path in list_checkpoints(output_dir) if path != final]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                discarded = output_dir / f"{PARTIAL_PREFIX}discarded-{old.name}"
                _remove(discarded)
                old.rename(discarded)  # a kill during the deletion leaves no folder that looks complete
                _remove(discarded)
    accelerator.wait_for_everyone()
    return final


def commit_folder(partial: Path, final: Path) -> None:
    """
    Flushes a finished folder to disk and gives it its name, replacing an older folder of that name.

    Args:
        partial (`Path`): the finished folder, beside `final`.
        final (`Path`): its name.
    """
    _flush(partial)
    if final.exists():
        replaced = final.with_name(f"{REPLACED_PREFIX}{final.name}")
        _remove(replaced)
        final.rename(replaced)
        partial.rename(final)
        _remove(replaced)
    else:
        partial.rename(final)
    _sync(final.parent)


def commit_pipeline(partial: Path, output_dir: Path) -> None:
    """
    Moves a finished pipeline into `output_dir`, beside its checkpoints. `model_index.json` leaves first and arrives
    last: whenever it is there, everything that it names is.

    Args:
        partial (`Path`): folder with the finished pipeline, inside `output_dir`.
        output_dir (`Path`): folder of the run.
    """
    _flush(partial)
    index = output_dir / "model_index.json"
    index.unlink(missing_ok=True)
    for path in sorted(partial.iterdir()):
        if path.name != index.name:
            _remove(output_dir / path.name)
            path.rename(output_dir / path.name)
    (partial / index.name).rename(index)
    partial.rmdir()
    _sync(output_dir)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    # Windows flushes only files opened for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
