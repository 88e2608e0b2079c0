# SPDX-License-Identifier: Apache-2.0
import pytest

from accelerate import Accelerator

from diffusers_dyna.training.checkpoints import (
    commit_folder,
    commit_pipeline,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
    sweep_partial_folders,
)


def write(text):
    def write_folder(folder):
        (folder / "weights.bin").write_text(text)
        (folder / "training_state.json").write_text("{}")

    return write_folder


def make_checkpoint(folder):
    folder.mkdir()
    write(folder.name)(folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for name in ("checkpoint-1000", "checkpoint-200", "checkpoint-30", "checkpoint-x", ".partial-checkpoint-2000"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "checkpoint-4000").mkdir()  # not complete
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-30", "checkpoint-200", "checkpoint-1000"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1000"
    assert find_checkpoint(tmp_path, "checkpoint-1000") == tmp_path / "checkpoint-1000"
    assert find_checkpoint(tmp_path / "other", str(tmp_path / "checkpoint-200")) == tmp_path / "checkpoint-200"
    for name in ("checkpoint-30", str(tmp_path / "checkpoint-200")):
        with pytest.raises(ValueError, match="would write over checkpoint-1000, which is newer"):
            find_checkpoint(tmp_path, name)


def test_where_a_run_starts(tmp_path):
    assert find_checkpoint(tmp_path / "missing", None) is None
    assert find_checkpoint(tmp_path / "missing", "latest") is None
    with pytest.raises(ValueError, match="checkpoint-7 is not a checkpoint folder; .* has no checkpoint"):
        find_checkpoint(tmp_path, "checkpoint-7")
    make_checkpoint(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="checkpoint-7 is not a checkpoint folder; .* has checkpoint-5"):
        find_checkpoint(tmp_path, "checkpoint-7")
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoint-5\).*--resume_from_checkpoint latest"):
        find_checkpoint(tmp_path, None)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for resume in (None, "latest"):
        with pytest.raises(ValueError, match=r"already holds a run \(a saved pipeline without checkpoints\)"):
            find_checkpoint(tmp_path / "pipeline", resume)


def test_the_limit_keeps_the_newest(tmp_path):
    for step in (90, 100, 1000):
        save_checkpoint(Accelerator(), tmp_path, step, write(str(step)), total_limit=2)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-1000"]
    assert (tmp_path / "checkpoint-1000" / "weights.bin").read_text() == "1000"
    save_checkpoint(Accelerator(), tmp_path, 95, write("95"), total_limit=1)
    assert names(tmp_path) == ["checkpoint-95"]  # never the one that was just written


def test_a_failed_save_deletes_nothing_and_is_never_found(tmp_path):
    accelerator = Accelerator()
    save_checkpoint(accelerator, tmp_path, 10, write("10"), total_limit=1)

    def fail(folder):
        (folder / "weights.bin").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(accelerator, tmp_path, 20, fail, total_limit=1)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert sweep_partial_folders(tmp_path) == [".partial-checkpoint-20"]
    assert names(tmp_path) == ["checkpoint-10"]


def test_saving_a_step_again_replaces_it(tmp_path):
    for text in ("first", "second"):
        save_checkpoint(Accelerator(), tmp_path, 10, write(text))
    assert names(tmp_path) == ["checkpoint-10"]
    assert (tmp_path / "checkpoint-10" / "weights.bin").read_text() == "second"


def test_a_kill_while_a_folder_is_replaced_loses_nothing(tmp_path, monkeypatch):
    old, new = tmp_path / "checkpoint-10", tmp_path / ".partial-checkpoint-10"
    for folder in (old, new):
        folder.mkdir()
    (old / "weights.bin").write_text("old")

    class Killed(BaseException):
        pass

    rename = type(new).rename

    def rename_until_killed(path, target):
        if path == new:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(type(new), "rename", rename_until_killed)
    with pytest.raises(Killed):
        commit_folder(new, old)
    assert not old.exists()
    monkeypatch.undo()
    sweep_partial_folders(tmp_path)
    assert names(tmp_path) == ["checkpoint-10"]
    assert (old / "weights.bin").read_text() == "old"


def test_the_index_of_a_pipeline_leaves_first_and_arrives_last(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("old")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.bin").write_text("old")
    partial = tmp_path / ".partial-pipeline"
    (partial / "unet").mkdir(parents=True)
    (partial / "unet" / "weights.bin").write_text("new")
    (partial / "model_index.json").write_text("new")

    seen = []
    rename = type(partial).rename

    def record(path, target):
        seen.append((path.name, (tmp_path / "model_index.json").exists()))
        return rename(path, target)

    monkeypatch.setattr(type(partial), "rename", record)
    commit_pipeline(partial, tmp_path)
    assert seen == [("unet", False), ("model_index.json", False)]
    assert names(tmp_path) == ["model_index.json", "unet"]
    assert (tmp_path / "model_index.json").read_text() == "new"
    assert (tmp_path / "unet" / "weights.bin").read_text() == "new"
