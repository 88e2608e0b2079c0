# SPDX-License-Identifier: Apache-2.0
"""The script as it is run: what it writes, that it resumes exactly, and that it says what is wrong."""

import filecmp
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_dyna import DynaUNet2DModel, DynaUNetPipeline, FlowMatchODEScheduler


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_unet.py"
TINY = {
    "base_channels": 8,
    "channel_mults": "1 2",
    "num_res_blocks": 1,
    "attention_resolutions": "4",
    "num_attention_heads": 2,
    "norm_num_groups": 4,
    "dropout": 0.1,
    "train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 5,
    "lr_scheduler": "cosine",
    "ema_decay": 0.9,
    "num_validation_images": 4,
    "validation_inference_steps": 2,
    "report_to": "none",
}


RECIPES = (
    {"time_sampling": "mode", "time_shift": 3.0, "weighting_scheme": "cosmap"},
    {"path": "gvp", "time_sampling": "cosmap", "coupling": "ot", "weighting_scheme": "min_snr"},
    {"path": "vp", "prediction_type": "sample", "coupling": "ot", "unconditional": True},
    {"path": "linear", "prediction_type": "epsilon", "time_sampling": "logit_normal", "weighting_scheme": "min_snr"},
    {"objective": "epsilon", "weighting_scheme": "min_snr", "snr_gamma": 1.0},
)


def command(output_dir, processes=1, **options):
    words = []
    for name, value in {**TINY, "output_dir": output_dir, **options}.items():
        words += [f"--{name}", *([] if value is True else str(value).split(" "))]
    if processes == 1:
        return [sys.executable, str(SCRIPT), *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, str(SCRIPT), *words]


def environment():
    # One thread a process: two processes on two cores would otherwise wait for each other.
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(output_dir, processes=1, check=True, **options):
    result = subprocess.run(
        command(output_dir, processes, **options), env=environment(), capture_output=True, text=True, timeout=300
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_unet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(script):
    """Runs the script in this process, which saves the seconds that importing takes; errors are raised."""

    def run(output_dir, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main(script.parse_args(command(output_dir, **options)[2:]))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def read_log(output_dir):
    return [json.loads(line) for line in (output_dir / "training_log.jsonl").read_text().splitlines()]


def assert_same_run(first, second, step):
    """Weights, averages, optimizer and generators of a checkpoint, and the pipeline, byte for byte."""
    names = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
    ]
    names = [f"checkpoint-{step}/{name}" for name in names]
    names += ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "samples.png"]
    for name in names:
        assert filecmp.cmp(first / name, second / name, shallow=False), name
    measured = {"images_per_second"}
    for expected, line in zip(read_log(first), read_log(second), strict=True):
        assert {k: v for k, v in line.items() if k not in measured} == {
            k: v for k, v in expected.items() if k not in measured
        }


def kill_when(process, condition, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """40 steps without interruption, with a checkpoint every 20."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    run(output_dir, max_train_steps=40, checkpointing_steps=20, validation_steps=20)
    return output_dir


class TestOutput:
    def test_what_a_run_writes(self, whole_run):
        names = {path.name for path in whole_run.iterdir()}
        assert names == {
            "args.json",
            "checkpoint-20",
            "checkpoint-40",
            "model_index.json",
            "samples",
            "samples.png",
            "scheduler",
            "training_log.jsonl",
            "training_summary.json",
            "unet",
        }
        assert {path.name for path in (whole_run / "samples").iterdir()} == {"step-20.png", "step-40.png"}
        assert json.loads((whole_run / "args.json").read_text())["max_train_steps"] == 40
        summary = json.loads((whole_run / "training_summary.json").read_text())
        assert summary["images_seen"] == 640
        assert summary["dataset"]["num_classes"] == 10
        assert str(whole_run.parent) not in (whole_run / "training_summary.json").read_text()

    def test_the_loss_falls(self, whole_run):
        losses = [line["loss"] for line in read_log(whole_run)]
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

    def test_the_pipeline_has_the_averages_and_a_checkpoint_has_both(self, whole_run):
        saved = load_file(whole_run / "unet" / "diffusion_pytorch_model.safetensors")
        averages = load_file(whole_run / "checkpoint-40" / "unet_ema" / "diffusion_pytorch_model.safetensors")
        raw = load_file(whole_run / "checkpoint-40" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[name], averages[name]) for name in saved)
        assert not all(torch.equal(saved[name], raw[name]) for name in saved)
        assert (
            DynaUNet2DModel.from_pretrained(whole_run / "checkpoint-40", subfolder="unet_ema").config.num_classes == 10
        )

    def test_the_pipeline_draws_by_name(self, whole_run):
        pipe = DynaUNetPipeline.from_pretrained(whole_run)
        assert isinstance(pipe.scheduler, FlowMatchODEScheduler)
        images = pipe(["3", 7], num_inference_steps=2, guidance_scale=2.0).images
        assert [image.size for image in images] == [(8, 8), (8, 8)]

    def test_the_learning_rate_is_the_cosine_with_warmup(self, whole_run):
        rates = [line["lr"] for line in read_log(whole_run)]
        steps = np.arange(40)
        cosine = 0.5 * (1 + np.cos(np.pi * (steps - 5) / 35))
        np.testing.assert_allclose(rates, 1e-3 * np.where(steps < 5, steps / 5, cosine), rtol=1e-9, atol=1e-15)


class TestResume:
    def kill_and_resume(self, output_dir, condition, delay=0.0):
        options = {"max_train_steps": 40, "checkpointing_steps": 20, "validation_steps": 20}
        process = subprocess.Popen(command(output_dir, **options), env=environment(), stderr=subprocess.DEVNULL)
        kill_when(process, lambda: condition(output_dir))
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        run(output_dir, resume_from_checkpoint="latest", **options)

    def test_killed_after_a_checkpoint(self, whole_run, tmp_path):
        self.kill_and_resume(tmp_path / "run", lambda folder: (folder / "checkpoint-20").exists(), delay=0.05)
        assert_same_run(whole_run, tmp_path / "run", 40)

    @pytest.mark.slow
    @pytest.mark.parametrize("attempt", range(8))
    def test_killed_at_any_moment(self, whole_run, tmp_path, attempt):
        moments = {
            0: lambda folder: (folder / "training_log.jsonl").exists(),
            1: lambda folder: (folder / ".partial-checkpoint-20").exists(),
            2: lambda folder: (folder / "samples").exists(),
            3: lambda folder: (folder / ".partial-checkpoint-40").exists(),
            4: lambda folder: (folder / "checkpoint-40").exists(),
            5: lambda folder: (folder / ".partial-pipeline").exists(),
        }
        condition = moments.get(attempt, moments[0])
        delay = random.Random(attempt).random() if attempt not in moments else 0.0
        self.kill_and_resume(tmp_path / "run", condition, delay)
        assert_same_run(whole_run, tmp_path / "run", 40)
        assert not list((tmp_path / "run").glob(".partial*"))

    def test_a_finished_run_trains_nothing_and_writes_the_same(self, whole_run, tmp_path):
        before = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
        options = {"max_train_steps": 40, "checkpointing_steps": 20, "validation_steps": 20}
        result = run(whole_run, resume_from_checkpoint="latest", **options)
        assert "steps 40 to 40" in result.stdout
        after = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
        assert before.keys() == after.keys()
        assert {path.name for path in before if before[path] != after[path]} <= {"args.json"}

    def test_a_request_to_stop_saves_first(self, whole_run, tmp_path):
        output_dir = tmp_path / "run"
        options = {"max_train_steps": 40, "checkpointing_steps": 40, "validation_steps": 20}
        process = subprocess.Popen(
            command(output_dir, **options), env=environment(), stdout=subprocess.PIPE, text=True
        )
        log = output_dir / "training_log.jsonl"
        kill_when(process, lambda: log.exists() and log.read_text().count("\n") >= 3)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert "Go on with --resume_from_checkpoint latest" in stdout
        assert len(list(output_dir.glob("checkpoint-*"))) == 1
        run(output_dir, resume_from_checkpoint="latest", **options)
        assert_same_run(whole_run, output_dir, 40)

    @pytest.mark.parametrize("splits", [(1, 4), (4, 1)])
    def test_accumulation_may_change(self, run_here, tmp_path, splits):
        options = {"num_validation_images": 0, "dropout": 0.0, "lr_scheduler": "constant"}
        run_here(tmp_path / "whole", max_train_steps=6, **options)
        for max_train_steps, accumulation in zip((3, 6), splits, strict=True):
            run_here(
                tmp_path / "parts",
                max_train_steps=max_train_steps,
                gradient_accumulation_steps=accumulation,
                train_batch_size=16 // accumulation,
                resume_from_checkpoint="latest",
                **options,
            )
        for name in ("loss", "grad_norm"):
            values = [[line[name] for line in read_log(tmp_path / run)] for run in ("whole", "parts")]
            np.testing.assert_allclose(*values, rtol=1e-4)

    def test_an_interrupt_with_workers_saves_first(self, tmp_path):
        """Ctrl-C goes to the whole process group, workers included."""
        output_dir = tmp_path / "run"
        words = command(output_dir, max_train_steps=10000, dataloader_num_workers=2, num_validation_images=0)
        process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
        log = output_dir / "training_log.jsonl"
        kill_when(process, lambda: log.exists() and log.read_text().count("\n") >= 3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
        assert len(list(output_dir.glob("checkpoint-*"))) == 1

    def test_latest_without_a_checkpoint_starts_afresh(self, run_here, tmp_path):
        run_here(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
        assert (tmp_path / "run" / "model_index.json").exists()

    def test_another_run_is_refused(self, run_here, whole_run):
        with pytest.raises(ValueError, match=r"already holds a run \(checkpoint-40\)"):
            run_here(whole_run, max_train_steps=60)
        with pytest.raises(ValueError, match="`--max_train_steps` 30 is below the 40 steps of checkpoint-40"):
            run_here(whole_run, max_train_steps=30, lr_scheduler="constant", resume_from_checkpoint="latest")
        with pytest.raises(ValueError, match="checkpoint-30 is not a checkpoint folder"):
            run_here(whole_run, max_train_steps=60, resume_from_checkpoint="checkpoint-30")
        with pytest.raises(ValueError) as error:
            run_here(whole_run, max_train_steps=60, resume_from_checkpoint="latest", seed=1, base_channels=16)
        assert "base_channels: 8 in the checkpoint, 16 now" in str(error.value)
        assert "seed: 0 in the checkpoint, 1 now" in str(error.value)
        assert (whole_run / "model_index.json").exists()
        assert len(read_log(whole_run)) == 40


class TestProcesses:
    def test_processes_and_accumulation_change_nothing(self, tmp_path):
        """16 images a step, split over processes and micro-steps: the same rates, and losses within 1e-4."""
        options = {"max_train_steps": 20, "num_validation_images": 0, "time_sampling": "stratified"}
        logs = {}
        for processes, accumulation in ((1, 1), (2, 1), (1, 4), (2, 4)):
            output_dir = tmp_path / f"{processes}-{accumulation}"
            batch_size = 16 // (processes * accumulation)
            run(
                output_dir,
                processes,
                train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                dropout=0.0,  # the one thing that is drawn for a process and not for a sample
                **options,
            )
            logs[processes, accumulation] = read_log(output_dir)
        for log in logs.values():
            assert [line["lr"] for line in log] == [line["lr"] for line in logs[1, 1]]
            losses = [[line["loss"] for line in one] for one in (log, logs[1, 1])]
            np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)

    @pytest.mark.slow
    def test_a_run_goes_on_with_another_number_of_processes(self, tmp_path):
        options = {"checkpointing_steps": 10, "num_validation_images": 0, "dropout": 0.0, "lr_scheduler": "constant"}
        run(tmp_path / "whole", max_train_steps=20, **options)
        run(tmp_path / "parts", 2, max_train_steps=10, train_batch_size=8, **options)
        run(tmp_path / "parts", max_train_steps=20, resume_from_checkpoint="latest", **options)
        losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("whole", "parts")]
        np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)


class TestForms:
    def test_epsilon_and_unconditional(self, run_here, tmp_path):
        run_here(tmp_path / "run", max_train_steps=3, objective="epsilon", ddpm_num_steps=50, unconditional=True)
        pipe = DynaUNetPipeline.from_pretrained(tmp_path / "run")
        assert isinstance(pipe.scheduler, DDPMScheduler)
        assert pipe.scheduler.config.num_train_timesteps == 50
        assert pipe.unet.config.num_classes is None
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        assert len(pipe(num_images_per_prompt=2, num_inference_steps=2).images) == 2

    def test_image_folder_with_bad_files_and_bf16(self, run_here, tmp_path, capsys):
        rng = np.random.default_rng(0)
        for name in ("ant", "cat"):
            (tmp_path / "data" / name).mkdir(parents=True)
            for i in range(6):
                image = PIL.Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / name / f"{i}.png")
        (tmp_path / "data" / "ant" / "broken.png").write_bytes(b"broken")
        options = {
            "train_data_dir": tmp_path / "data",
            "resolution": 8,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "dataloader_num_workers": 1,
            "random_flip": True,
            "max_train_steps": 2,
            "no-use_ema": True,
        }
        run_here(tmp_path / "run", **options)
        output = "".join(capsys.readouterr())
        assert output.count("Skipped an image that cannot be read") == 1
        assert "broken.png" in output
        pipe = DynaUNetPipeline.from_pretrained(tmp_path / "run")
        assert pipe.id2label == {0: "ant", 1: "cat"}
        assert pipe.unet.dtype == torch.float32
        assert pipe("cat", num_inference_steps=2).images[0].mode == "RGB"
        with pytest.raises(ValueError, match="More than `--max_bad_images` 0 images cannot be read: .*broken.png"):
            run_here(tmp_path / "other", max_bad_images=0, **options)

    def test_a_stream_goes_on_at_its_next_row(self, run_here, tmp_path):
        datasets = pytest.importorskip("datasets")
        rng = np.random.default_rng(0)
        rows = [
            {"image": PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)), "label": i % 2}
            for i in range(50)
        ]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "data")
        options = {
            "dataset_name": tmp_path / "data",
            "streaming": True,
            "resolution": 8,
            "checkpointing_steps": 5,
            "validation_steps": 100,
            "lr_scheduler": "constant",
        }
        run_here(tmp_path / "whole", max_train_steps=12, **options)
        run_here(tmp_path / "parts", max_train_steps=10, **options)
        run_here(tmp_path / "parts", max_train_steps=12, resume_from_checkpoint="latest", **options)
        assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)

    @pytest.mark.parametrize("options", RECIPES, ids=lambda options: "-".join(map(str, options.values())))
    def test_other_times_weights_and_pairs_train_and_resume(self, run_here, tmp_path, options):
        options = {**options, "lr_scheduler": "constant", "checkpointing_steps": 10}
        run_here(tmp_path / "whole", max_train_steps=40, **options)
        scheduler = DynaUNetPipeline.from_pretrained(tmp_path / "whole").scheduler  # which has drawn samples
        if "path" in options:
            assert scheduler.config.path == options["path"]
            assert scheduler.config.prediction_type == options.get("prediction_type", "velocity")
        run_here(tmp_path / "parts", max_train_steps=10, **options)
        run_here(tmp_path / "parts", max_train_steps=40, resume_from_checkpoint="latest", **options)
        name = "checkpoint-40/unet/diffusion_pytorch_model.safetensors"
        assert filecmp.cmp(tmp_path / "whole" / name, tmp_path / "parts" / name, shallow=False)
        losses = [line["loss"] for line in read_log(tmp_path / "whole")]
        assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])

    def test_weights_count(self, run_here, tmp_path):
        """A small gamma cuts every ratio, and is a factor of all weights."""
        for gamma in (1e-4, 2e-4):
            options = {"max_train_steps": 1, "num_validation_images": 0, "weighting_scheme": "min_snr"}
            run_here(tmp_path / str(gamma), snr_gamma=gamma, **options)
        one, two = (read_log(tmp_path / str(gamma))[0]["loss"] for gamma in (1e-4, 2e-4))
        assert two == pytest.approx(2 * one, rel=1e-2)

    def test_pairs_depend_on_the_micro_batch(self, run_here, tmp_path):
        options = {"num_validation_images": 0, "dropout": 0.0, "lr_scheduler": "constant", "max_train_steps": 2}
        parts = {"train_batch_size": 8, "gradient_accumulation_steps": 2}
        run_here(tmp_path / "independent", **options, **parts)
        run_here(tmp_path / "parts", coupling="ot", **options, **parts)
        run_here(tmp_path / "whole", coupling="ot", **options)
        losses = [read_log(tmp_path / name)[0]["loss"] for name in ("independent", "parts", "whole")]
        assert min(abs(losses[i] - losses[i - 1]) for i in range(3)) > 1e-3
        options |= {"coupling": "ot", "max_train_steps": 4, "resume_from_checkpoint": "latest"}
        with pytest.raises(ValueError, match="train_batch_size: 8 in the checkpoint, 16 now"):
            run_here(tmp_path / "parts", **options)

    @pytest.mark.slow
    def test_pairs_do_not_depend_on_the_processes(self, tmp_path):
        options = {"coupling": "ot", "dropout": 0.0, "num_validation_images": 0, "train_batch_size": 8}
        run(tmp_path / "one", max_train_steps=10, gradient_accumulation_steps=2, **options)
        run(tmp_path / "two", 2, max_train_steps=10, **options)
        losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two")]
        np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)

    def test_weights_to_start_from(self, script, run_here, whole_run, tmp_path, monkeypatch):
        with pytest.raises(
            ValueError, match="`--base_channels`, .* and `--pretrained_model_name_or_path` both define"
        ):
            run_here(tmp_path / "run", pretrained_model_name_or_path=whole_run)
        architecture = ("base_channels", "channel_mults", "num_res_blocks", "attention_resolutions")
        for name in (*architecture, "num_attention_heads", "norm_num_groups", "dropout"):
            monkeypatch.delitem(TINY, name)
        options = {"pretrained_model_name_or_path": whole_run, "max_train_steps": 1, "learning_rate": 1e-12}
        with pytest.raises(ValueError, match="has `num_classes`=10, but this run needs None"):
            run_here(tmp_path / "run", unconditional=True, **options)
        with pytest.raises(ValueError, match="has `sample_size`=8, but this run needs 16"):
            run_here(tmp_path / "run", resolution=16, **options)
        with pytest.raises(ValueError, match="has `class_dropout_prob`=0.1, but this run needs 0.5"):
            run_here(tmp_path / "run", class_dropout_prob=0.5, **options)
        run_here(tmp_path / "run", **options)
        name = "unet/diffusion_pytorch_model.safetensors"
        before, after = load_file(whole_run / name), load_file(tmp_path / "run" / name)
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_a_step_that_is_not_finite_is_skipped(self, script, run_here, tmp_path, monkeypatch):
        losses = []

        def mse_loss(prediction, target, weights):
            losses.append(0)
            return torch.nn.functional.mse_loss(prediction, target) * (float("nan") if len(losses) == 2 else 1.0)

        options = {"num_validation_images": 0, "lr_scheduler": "constant", "checkpointing_steps": 1}
        monkeypatch.setattr(script.objectives, "mse_loss", mse_loss)
        run_here(tmp_path / "run", max_train_steps=3, **options)
        assert [line["nonfinite_steps"] for line in read_log(tmp_path / "run")] == [0, 1, 1]
        assert read_log(tmp_path / "run")[1]["loss"] is None
        for name in ("unet", "unet_ema"):
            first, second, third = (
                load_file(tmp_path / "run" / f"checkpoint-{step}" / name / "diffusion_pytorch_model.safetensors")
                for step in (1, 2, 3)
            )
            assert all(torch.equal(first[key], second[key]) for key in first)
            assert not all(torch.equal(second[key], third[key]) for key in first)

    def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(self, run_here, tmp_path):
        with pytest.raises(FloatingPointError, match="The gradient was not finite in 3 steps in a row"):
            run_here(
                tmp_path / "run",
                learning_rate=1e30,
                lr_scheduler="constant",
                checkpointing_steps=1,
                max_nonfinite_steps=3,
                max_train_steps=50,
            )
        assert list((tmp_path / "run").glob("checkpoint-*"))
        assert not (tmp_path / "run" / "model_index.json").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--max_train_steps", "-5"], "`--max_train_steps` -5 must be at least 1"),
            (["--lr_warmup_steps", "-1"], "`--lr_warmup_steps` -1 must be at least 0"),
            (["--checkpoints_total_limit", "0"], "`--checkpoints_total_limit` 0 must be at least 1"),
            (["--learning_rate", "0"], "`--learning_rate` 0.0 must be above 0"),
            (["--ema_decay", "1"], "`--ema_decay` 1.0 must be in [0, 1)"),
            (["--dataset", "fashion-mnist"], "`--dataset fashion-mnist` needs `--data_root`"),
            (["--dataset", "digits", "--dataset_name", "x"], "`--dataset` and `--dataset_name` each name the data"),
            (["--report_to", "paper"], "`--report_to` paper is unknown. Use none or one of"),
            (["--report_to", "aim"], "`--report_to` aim is not installed: `pip install aim`"),
            (["--output_dir", __file__], "is a file. Give a folder"),
            (["--objective", "epsilon", "--ddpm_beta_schedule", "x"], "argument --ddpm_beta_schedule: invalid choice"),
            (["--streaming"], "`--streaming` is for `--dataset_name`"),
            (["--shuffle_buffer_size", "9"], "`--shuffle_buffer_size` is for `--streaming`"),
            (["--train_data_dir", "missing"], "`--train_data_dir` missing is not a folder"),
            (["--dataset", "imagenet"], "argument --dataset: invalid choice: 'imagenet'"),
            (["--objective", "score"], "argument --objective: invalid choice: 'score'"),
            (["--time_sampling", "beta"], "argument --time_sampling: invalid choice: 'beta'"),
            (["--mode_scale", "1.8"], "`--mode_scale` 1.8 must be in [-1, 2 / (pi - 2) = 1.7519]"),
            (["--time_shift", "0"], "`--time_shift` 0.0 must be above 0"),
            (["--snr_gamma", "-1"], "`--snr_gamma` -1.0 must be above 0"),
            (["--weighting_scheme", "mode"], "argument --weighting_scheme: invalid choice: 'mode'"),
            (
                ["--objective", "epsilon", "--weighting_scheme", "sigma_sqrt"],
                "`--weighting_scheme sigma_sqrt` is for the velocity of `--objective flow` on `--path linear`. Use min_snr",
            ),
            (["--path", "gvp", "--weighting_scheme", "cosmap"], "`--weighting_scheme cosmap` is for the velocity"),
            (
                ["--prediction_type", "sample", "--weighting_scheme", "cosmap"],
                "on `--path linear`. Use min_snr or none",
            ),
            (
                ["--objective", "epsilon", "--path", "vp"],
                "`--path` and `--prediction_type` are for `--objective flow`",
            ),
            (["--objective", "epsilon", "--prediction_type", "epsilon"], "are for `--objective flow`"),
            (["--path", "cosine"], "argument --path: invalid choice: 'cosine'"),
            (["--prediction_type", "score"], "argument --prediction_type: invalid choice: 'score'"),
            (["--objective", "epsilon", "--coupling", "ot"], "`--coupling ot` is for `--objective flow`: DDPM's"),
            (["--lr_scheduler", "step"], "argument --lr_scheduler: invalid choice: 'step'"),
        ],
    )
    def test_arguments(self, script, capsys, words, message):
        with pytest.raises(SystemExit) as exit:
            script.parse_args(words)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err

    def test_pairs_without_scipy(self, script, capsys, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            script.parse_args(["--coupling", "ot", "--report_to", "none"])
        assert "`--coupling ot` needs scipy: `pip install scipy`" in capsys.readouterr().err

    def test_publishing_without_a_token(self, script, capsys, monkeypatch, tmp_path):
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        with pytest.raises(SystemExit):
            script.parse_args(["--push_to_hub", "--output_dir", str(tmp_path / "run")])
        assert "token" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_nothing_is_written_when_the_data_is_wrong(self, run_here, tmp_path):
        (tmp_path / "data" / "ant").mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / "data" / "ant" / "0.png")
        (tmp_path / "data" / "dog").mkdir()
        with pytest.raises(ValueError, match="has class folders with no image: dog"):
            run_here(tmp_path / "run", train_data_dir=tmp_path / "data", resolution=8)
        with pytest.raises(ValueError, match="`sample_size`=9 must be divisible by 2"):
            run_here(tmp_path / "run", resolution=9)
        assert not (tmp_path / "run").exists()
