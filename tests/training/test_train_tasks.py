# SPDX-License-Identifier: Apache-2.0
"""`train_dyna_dit.py --task inpaint` and `upscale` as they are run, and what they refuse."""

import filecmp
import json

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers import AutoencoderKL

from diffusers_dyna import (
    DynaDiTInpaintPipeline,
    DynaDiTPipeline,
    DynaDiTTransformer2DModel,
    DynaDiTUpscalePipeline,
    FlowMatchODEScheduler,
)
from diffusers_dyna.training.data import ImageTransform, TrainingImages, collate_examples, load_digits
from diffusers_dyna.training.degradation import enlarge
from diffusers_dyna.training.tasks import make_inpainting, make_upscaling

from ..testing_utils import randn
from .script_utils import WEIGHTS, load_script, read_log, running_here


TASKS = {"inpaint": {"task": "inpaint"}, "upscale": {"task": "upscale", "upscale_factor": 2}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    return load_script("train_dyna_dit.py")


@pytest.fixture(scope="module")
def run_here(script):
    with running_here(script) as run:
        yield run


@pytest.fixture(scope="module")
def runs(run_here, tmp_path_factory):
    """120 static steps of each task."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, options in TASKS.items():
        options = {**options, "max_train_steps": 120, "validation_steps": 60, "num_validation_images": 9}
        run_here(folder / task, static=True, learning_rate=5e-3, **options)
    return folder


def load(folder) -> DynaDiTTransformer2DModel:
    return DynaDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()


def make_prepare(task: str):
    if task == "inpaint":
        return make_inpainting(0, CPU)
    return make_upscaling(0, CPU, FlowMatchODEScheduler(), 2, 350.0)


@pytest.mark.parametrize("task", TASKS)
def test_it_learns_to_use_its_condition(runs, task):
    """Toward the noise there is little else to go by: the condition of another image is a worse one."""
    losses = [line["loss"] for line in read_log(runs / task)]
    assert losses[-1] < 0.7 * losses[0]
    images = TrainingImages(load_digits(), ImageTransform(8, 1), seed=0)
    batch = collate_examples([images[i, i] for i in range(200)])
    sample, condition, conditions = make_prepare(task)(batch)
    noise = randn(*sample.shape, seed=1)
    noisy, model = 0.1 * sample + 0.9 * noise, load(runs / task)
    with torch.no_grad():
        errors = []
        for given in (condition, condition.roll(1, dims=0)):
            prediction = model(torch.cat([noisy, given], dim=1), 900.0, batch["class_labels"], **conditions).sample
            errors.append((prediction - (noise - sample)).square().mean().item())
    assert errors[0] < 0.8 * errors[1]


def test_the_pipeline_of_inpainting(runs):
    pipe = DynaDiTInpaintPipeline.from_pretrained(runs / "inpaint")
    pipe.set_progress_bar_config(disable=True)
    image = PIL.Image.fromarray(load_digits().images[7])
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:6, 2:6] = 255
    options = {"class_labels": [7], "num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    result = np.asarray(pipe(image=image, mask_image=PIL.Image.fromarray(mask), **options).images[0])
    assert (result[mask == 0] == np.asarray(image)[mask == 0]).all()
    assert result[mask == 255].std() > 0
    assert (runs / "inpaint" / "samples" / "step-120.png").exists()


def test_the_pipeline_of_upscaling(runs):
    pipe = DynaDiTUpscalePipeline.from_pretrained(runs / "upscale")
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.upscale_factor, pipe.config.max_noise_level) == (2, 350.0)
    images = [PIL.Image.fromarray(load_digits().images[i]).reduce(2) for i in (0, 1)]
    results = pipe(image=images, class_labels=[0, 1], num_inference_steps=4).images
    assert [result.size for result in results] == [(8, 8), (8, 8)]


def test_a_pipeline_that_enlarges_by_four(run_here, tmp_path, monkeypatch):
    """Four pixels are what the model is given in training, and what the saved pipeline makes an image of."""
    given = set()

    def watch(images, size):
        given.add((tuple(images.shape[1:]), tuple(size)))
        return enlarge(images, size)

    monkeypatch.setattr("diffusers_dyna.training.tasks.enlarge", watch)
    run_here(tmp_path, static=True, task="upscale", upscale_factor=4, max_noise_level=100, max_train_steps=4)
    assert given == {((1, 2, 2), (8, 8))}
    pipe = DynaDiTUpscalePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.upscale_factor, pipe.config.max_noise_level) == (4, 100.0)
    image = PIL.Image.fromarray(load_digits().images[0]).reduce(4)
    (result,) = pipe(image=image, class_labels=[0], num_inference_steps=2).images
    assert (image.size, result.size) == ((2, 2), (8, 8))


@pytest.mark.parametrize("task", TASKS)
def test_a_model_of_classes_goes_on_with_the_task(run_here, tmp_path, task):
    """One step at a rate of next to nothing: whatever the condition, the outputs are those of the model of classes."""
    options = {"max_train_steps": 1, "num_validation_images": 0, "static": True}
    run_here(tmp_path / "classes", **{**options, "max_train_steps": 20})
    run_here(
        tmp_path / "task",
        pretrained_model_name_or_path=tmp_path / "classes",
        learning_rate=1e-12,
        **options,
        **TASKS[task],
    )
    before, after = DynaDiTPipeline.from_pretrained(tmp_path / "classes").transformer, load(tmp_path / "task")
    assert after.config.condition_channels == {"inpaint": 2, "upscale": 1}[task]
    sample, labels = randn(3, 1, 8, 8), torch.tensor([1, 4, 10])
    given = torch.cat([sample, randn(3, after.config.condition_channels, 8, 8, seed=1)], dim=1)
    level = {"noise_level": 200.0} if task == "upscale" else {}
    with torch.no_grad():
        expected = before(sample, 400, labels).sample
        torch.testing.assert_close(after(given, 400, labels, **level).sample, expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("task", TASKS)
def test_budgets_accumulation_and_resuming(run_here, runs, tmp_path, task):
    options = {**TASKS[task], "pretrained_model_name_or_path": runs / task, "complete_loss_steps": 2}
    options |= {"checkpointing_steps": 6, "validation_steps": 6, "gradient_accumulation_steps": 2}
    run_here(tmp_path / "whole", max_train_steps=12, **options)
    run_here(tmp_path / "parts", max_train_steps=6, **options)
    run_here(tmp_path / "parts", max_train_steps=12, resume_from_checkpoint="latest", **options)
    assert filecmp.cmp(tmp_path / "whole" / WEIGHTS, tmp_path / "parts" / WEIGHTS, shallow=False)
    assert read_log(tmp_path / "whole")[-1]["compute_ratio"] == pytest.approx(0.5, abs=0.1)
    assert [line["step"] for line in read_log(tmp_path / "whole", "activity_log.jsonl")] == [6, 12]


@pytest.mark.parametrize("task", TASKS)
def test_latents(run_here, tmp_path, task):
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")
    options = {**TASKS[task], "vae": tmp_path / "vae", "max_train_steps": 4, "static": True, "unconditional": True}
    run_here(tmp_path / "run", **options)
    config = load(tmp_path / "run").config
    assert (config.sample_size, config.in_channels) == (4, 2)
    assert config.condition_channels == {"inpaint": 3, "upscale": 2}[task]
    run_here(tmp_path / "parts", **{**options, "max_train_steps": 2})
    (tmp_path / "vae").rename(tmp_path / "moved")
    run_here(tmp_path / "parts", resume_from_checkpoint="latest", **{**options, "vae": tmp_path / "moved"})
    assert filecmp.cmp(tmp_path / "run" / WEIGHTS, tmp_path / "parts" / WEIGHTS, shallow=False)
    state = json.loads((tmp_path / "parts" / "checkpoint-4" / "training_state.json").read_text())
    assert len(state["identity"]["vae"]) == 16


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--task", "upscale"], "`--task upscale` needs `--upscale_factor`, 2 or 4"),
            (["--upscale_factor", "2"], "`--upscale_factor` is for `--task upscale`"),
            (["--task", "inpaint", "--max_noise_level", "5"], "`--max_noise_level` is for `--task upscale`"),
            (["--task", "upscale", "--upscale_factor", "3"], "argument --upscale_factor: invalid choice: 3"),
            (
                ["--task", "upscale", "--upscale_factor", "4", "--resolution", "30"],
                "`--upscale_factor` 4 must divide `--resolution` 30. Use 28 pixels",
            ),
            (
                ["--task", "upscale", "--upscale_factor", "2", "--max_noise_level", "1001"],
                "`--max_noise_level` 1001.0 must be in [0, 1000]",
            ),
            (
                ["--task", "upscale", "--upscale_factor", "2", "--objective", "epsilon"],
                "`--task upscale` is for `--objective flow`",
            ),
            (["--task", "inpaint", "--coupling", "ot"], "`--coupling ot` is for `--task generate`"),
            (["--task", "inpaint", "--streaming", "--dataset_name", "x"], "by index, not from `--streaming`"),
            (
                ["--task", "inpaint", "--vae", "a/b", "--latent_cache_dir", "x"],
                "`--latent_cache_dir` is for `--task generate`: with `--task inpaint` images are encoded as they come",
            ),
        ],
    )
    def test_arguments(self, script, capsys, words, message):
        with pytest.raises(SystemExit) as exit:
            script.parse_args(words)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err

    def test_a_native_size_that_the_factor_does_not_divide(self, run_here, tmp_path, monkeypatch):
        monkeypatch.setattr("diffusers_dyna.training.data.load_digits", lambda: Odd())
        with pytest.raises(ValueError, match="`--upscale_factor` 2 must divide the resolution 9. Give `--resolution`"):
            run_here(tmp_path / "run", task="upscale", upscale_factor=2)
        assert not (tmp_path / "run").exists()

    def test_a_model_of_another_task(self, run_here, runs, tmp_path):
        for task, other in (("inpaint", "upscale"), ("upscale", "inpaint")):
            with pytest.raises(ValueError, match="condition_channels`=.* It was trained for another task: start from"):
                run_here(tmp_path / "run", pretrained_model_name_or_path=runs / task, **TASKS[other])
        with pytest.raises(ValueError, match="it has `condition_channels`=2 instead of 0"):
            run_here(tmp_path / "run", pretrained_model_name_or_path=runs / "inpaint")
        assert not (tmp_path / "run").exists()


class Odd:
    native_size, channels, id2label = 9, 1, None
