# SPDX-License-Identifier: Apache-2.0
"""The script as it is run: budgets, static control, latents, learned variances, and that it resumes exactly."""

import filecmp
import json

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL, DDPMScheduler

from diffusers_dyna import DynaDiTPipeline, DynaDiTTransformer2DModel, FlowMatchODEScheduler
from diffusers_dyna.training.dynamic import make_transformer

from . import script_utils
from .script_utils import ROOT, WEIGHTS, arguments, assert_same_run, load_script, read_log, run_and_kill, running_here


SCRIPT = "train_dyna_dit.py"
ROUTERS = ("attn_rate", "mlp_rate", "token_rate", "token_selection")


def run(output_dir, processes=1, **options):
    return script_utils.run(SCRIPT, output_dir, processes, **options)


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def run_here(script):
    with running_here(script) as run:
        yield run


@pytest.fixture(scope="module")
def static_run(run_here, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("static") / "run"
    run_here(output_dir, static=True, max_train_steps=30, learning_rate=3e-3, validation_steps=30)
    return output_dir


@pytest.fixture(scope="module")
def dynamic_run(run_here, static_run, tmp_path_factory):
    """60 steps to a budget of 0.5 from the static weights."""
    output_dir = tmp_path_factory.mktemp("dynamic") / "run"
    options = {"sort_by_importance": True, "max_train_steps": 60, "validation_steps": 20, "ema_decay": 0.5}
    run_here(output_dir, pretrained_model_name_or_path=static_run, **options)
    return output_dir


class TestStatic:
    def test_it_learns_and_leaves_the_routers_alone(self, static_run):
        losses = [line["loss"] for line in read_log(static_run)]
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
        assert "compute_ratio" not in read_log(static_run)[0]
        model = DynaDiTTransformer2DModel.from_pretrained(static_run, subfolder="transformer")
        fresh = DynaDiTTransformer2DModel.from_config(model.config)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ROUTERS) and "token_selection" not in name:
                assert torch.equal(parameter, fresh.get_parameter(name)), name

    def test_the_pipeline_runs_everything_and_draws_by_name(self, static_run):
        pipe = DynaDiTPipeline.from_pretrained(static_run)
        assert isinstance(pipe.scheduler, FlowMatchODEScheduler)
        output = pipe(["3", 7], num_inference_steps=2, guidance_scale=2.0, output_compute_ratio=True)
        assert [image.size for image in output.images] == [(8, 8), (8, 8)]
        assert output.compute_ratio == 1.0

    def test_the_control_trains_on(self, run_here, static_run, tmp_path):
        run_here(tmp_path / "run", static=True, pretrained_model_name_or_path=static_run, max_train_steps=2)
        summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
        assert summary["budget"] is None

    def test_the_control_of_a_dynamic_model_is_static(self, run_here, dynamic_run, tmp_path):
        pipe = DynaDiTPipeline.from_pretrained(dynamic_run)
        assert pipe([0], num_inference_steps=4, output_compute_ratio=True).compute_ratio < 0.8
        run_here(tmp_path / "run", static=True, pretrained_model_name_or_path=dynamic_run, max_train_steps=1)
        pipe = DynaDiTPipeline.from_pretrained(tmp_path / "run")
        assert pipe([0], num_inference_steps=4, output_compute_ratio=True).compute_ratio == 1.0


class TestBudget:
    def test_the_compute_ratio_follows_the_budget(self, dynamic_run):
        log = read_log(dynamic_run)
        assert log[0]["compute_ratio"] == 1.0
        assert log[-1]["compute_ratio"] == pytest.approx(0.5, abs=0.06)
        summary = json.loads((dynamic_run / "training_summary.json").read_text())
        assert summary["budget"] == 0.5
        assert summary["compute_ratio"] == pytest.approx(0.5, abs=0.08)

    def test_inference_costs_what_was_trained_for(self, dynamic_run):
        activity = read_log(dynamic_run, "activity_log.jsonl")
        assert [line["step"] for line in activity] == [20, 40, 60]
        pipe = DynaDiTPipeline.from_pretrained(dynamic_run)
        pipe.set_progress_bar_config(disable=True)
        output = pipe([0, 1, 2], num_inference_steps=20, guidance_scale=2.0, output_compute_ratio=True)
        assert output.compute_ratio == pytest.approx(activity[-1]["compute_ratio"], abs=0.03)
        assert len(activity[-1]["heads_by_layer"]) == 2
        assert activity[-1]["compute_ratio"] == pytest.approx(np.mean(activity[-1]["compute_ratio_by_timestep"]))

    def test_the_threshold_mode_reaches_it_too(self, run_here, static_run, tmp_path):
        """In training, where the gates are coins; what they do at inference is logged beside it."""
        run_here(
            tmp_path / "run",
            pretrained_model_name_or_path=static_run,
            router_mode="threshold",
            max_train_steps=60,
            validation_steps=60,
            router_learning_rate=0.5,
        )
        # Coins at a large rate: where exactly it ends depends on the seed (0.375 to 0.53 for three) and on rounding.
        assert read_log(tmp_path / "run")[-1]["sampled_compute_ratio"] == pytest.approx(0.5, abs=0.2)
        deterministic = read_log(tmp_path / "run", "activity_log.jsonl")[-1]["compute_ratio"]
        pipe = DynaDiTPipeline.from_pretrained(tmp_path / "run")
        output = pipe(list(range(10)), num_inference_steps=20, output_compute_ratio=True)
        assert output.compute_ratio == pytest.approx(deterministic, abs=0.1)
        model = DynaDiTTransformer2DModel.from_pretrained(tmp_path / "run", subfolder="transformer")
        assert model.config.router_mode == "threshold"
        assert model.transformer_blocks[0].token_rate is None

    def test_sorting_changes_nothing_that_the_complete_model_says(self, script, static_run, run_here, tmp_path):
        run_here(
            tmp_path / "run",
            pretrained_model_name_or_path=static_run,
            sort_by_importance=True,
            max_train_steps=1,
            learning_rate=1e-12,
            validation_steps=9,
        )
        models = [
            DynaDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
            for folder in (static_run, tmp_path / "run")
        ]
        sample, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 10])
        with torch.no_grad():
            outputs = [model(sample, 500, labels, complete_model=True).sample for model in models]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
        weights = [model.transformer_blocks[0].mlp.fc1.weight for model in models]
        assert not torch.allclose(*weights)

    def test_the_complete_model_is_trained_too_where_asked(self, run_here, static_run, tmp_path):
        options = {"pretrained_model_name_or_path": static_run, "max_train_steps": 2, "num_validation_images": 0}
        run_here(tmp_path / "with", complete_loss_steps=1, **options)
        run_here(tmp_path / "without", **options)
        both, one = read_log(tmp_path / "with"), read_log(tmp_path / "without")
        # At the start the dynamic model is the complete one, and so are their losses.
        assert both[0]["loss"] == pytest.approx(2 * one[0]["loss"], rel=1e-4)
        assert both[1]["loss"] < 1.5 * one[1]["loss"]

    def test_accumulation_changes_nothing(self, run_here, dynamic_run, tmp_path):
        """The budget's mean is over all micro-batches: the compute of these depends on their times."""
        for accumulation in (1, 4):
            run_here(
                tmp_path / str(accumulation),
                pretrained_model_name_or_path=dynamic_run,
                gradient_accumulation_steps=accumulation,
                train_batch_size=16 // accumulation,
                max_train_steps=6,
                num_validation_images=0,
                budget_warmup_steps=100,
            )
        one, four = (read_log(tmp_path / name) for name in ("1", "4"))
        for name in ("loss", "compute_ratio", "grad_norm"):
            np.testing.assert_allclose([x[name] for x in one], [x[name] for x in four], rtol=2e-4)
        assert one[0]["compute_ratio"] < 0.8

    def test_a_stream_has_a_budget_too(self, run_here, tmp_path):
        datasets = pytest.importorskip("datasets")
        rng = np.random.default_rng(0)
        rows = [
            {"image": PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)), "label": i % 2}
            for i in range(50)
        ]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "data")
        run_here(
            tmp_path / "run",
            dataset_name=tmp_path / "data",
            streaming=True,
            resolution=8,
            max_train_steps=4,
            validation_steps=2,
        )
        assert [line["step"] for line in read_log(tmp_path / "run", "activity_log.jsonl")] == [2, 4]
        summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
        assert summary["budget"] == 0.5
        assert 0 < summary["compute_ratio"] <= 1


class TestResume:
    OPTIONS = {"max_train_steps": 40, "checkpointing_steps": 20, "validation_steps": 20}

    @pytest.mark.parametrize("router_mode", ["capacity", pytest.param("threshold", marks=pytest.mark.slow)])
    def test_killed_and_resumed_is_the_same_to_the_bit(self, run_here, tmp_path, router_mode):
        options = {**self.OPTIONS, "router_mode": router_mode, "complete_loss_steps": 30}
        run(tmp_path / "whole", **options)
        output_dir = tmp_path / "parts"
        run_and_kill(SCRIPT, output_dir, "checkpoint-20", **options)
        run(output_dir, resume_from_checkpoint="latest", **options)
        assert_same_run(tmp_path / "whole", output_dir, 40)

    def test_other_times_weights_and_pairs(self, run_here, tmp_path):
        """The weights count in both of the losses, of the dynamic and of the complete model."""
        options = {"time_sampling": "mode", "time_shift": 2.0, "weighting_scheme": "min_snr", "coupling": "ot"}
        options |= {"complete_loss_steps": 20, "num_validation_images": 0, "gradient_accumulation_steps": 2}
        run_here(tmp_path / "whole", max_train_steps=30, **options)
        run_here(tmp_path / "parts", max_train_steps=10, **options)
        run_here(tmp_path / "parts", max_train_steps=30, resume_from_checkpoint="latest", **options)
        assert filecmp.cmp(tmp_path / "whole" / WEIGHTS, tmp_path / "parts" / WEIGHTS, shallow=False)
        first = read_log(tmp_path / "whole")[0]  # both are the same model still, at a budget of 1
        assert first["loss"] == pytest.approx(2 * first["diffusion_loss"], rel=1e-4)
        # A small gamma cuts every ratio, and is a factor of all weights.
        for gamma in (1e-4, 2e-4):
            run_here(tmp_path / str(gamma), max_train_steps=1, snr_gamma=gamma, **options)
        one, two = (read_log(tmp_path / str(gamma))[0] for gamma in (1e-4, 2e-4))
        for name in ("diffusion_loss", "loss"):
            assert two[name] == pytest.approx(2 * one[name], rel=1e-2)

        options |= {"static": True, "complete_loss_steps": 0, "learning_rate": 3e-3}
        run_here(tmp_path / "static", max_train_steps=40, **options)
        losses = [line["loss"] for line in read_log(tmp_path / "static")]
        assert losses[0] == pytest.approx(first["diffusion_loss"], rel=1e-4)
        assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])

    def test_sorting_happens_once(self, run_here, static_run, dynamic_run, tmp_path):
        """A run that goes on has its routers trained: sorting again would be refused, or worse."""
        options = {"pretrained_model_name_or_path": static_run, "sort_by_importance": True, "num_validation_images": 0}
        run_here(tmp_path / "whole", max_train_steps=8, **options)
        run_here(tmp_path / "parts", max_train_steps=5, **options)
        run_here(tmp_path / "parts", max_train_steps=8, resume_from_checkpoint="latest", **options)
        assert filecmp.cmp(tmp_path / "whole" / WEIGHTS, tmp_path / "parts" / WEIGHTS, shallow=False)

    def test_another_budget_is_another_run(self, run_here, dynamic_run, static_run):
        with pytest.raises(ValueError, match="budget: 0.5 in the checkpoint, 0.6 now"):
            run_here(
                dynamic_run,
                pretrained_model_name_or_path=static_run,
                sort_by_importance=True,
                ema_decay=0.5,
                budget=0.6,
                max_train_steps=70,
                resume_from_checkpoint="latest",
            )

    def test_a_checkpoint_older_than_a_flag_had_its_default(self, run_here, tmp_path):
        run_here(tmp_path / "run", max_train_steps=2, num_validation_images=0)
        state = tmp_path / "run" / "checkpoint-2" / "training_state.json"
        values = json.loads(state.read_text())
        del values["identity"]["skip_grad_norm"]
        state.write_text(json.dumps(values))
        options = {"max_train_steps": 3, "num_validation_images": 0, "resume_from_checkpoint": "latest"}
        with pytest.raises(ValueError, match="skip_grad_norm: None in the checkpoint, 5.0 now"):
            run_here(tmp_path / "run", skip_grad_norm=5, **options)
        run_here(tmp_path / "run", **options)
        assert len(read_log(tmp_path / "run")) == 3


class TestProcesses:
    @pytest.mark.parametrize("router_mode", ["capacity", pytest.param("threshold", marks=pytest.mark.slow)])
    def test_two_processes_are_one(self, tmp_path, router_mode):
        """The budget's mean is over both of them, and so is every draw of the gates."""
        options = {"max_train_steps": 12, "router_mode": router_mode, "complete_loss_steps": 6}
        options["router_learning_rate"] = 0.5
        for processes in (1, 2):
            batch_size = 16 // processes
            run(tmp_path / str(processes), processes, train_batch_size=batch_size, num_validation_images=0, **options)
        one, two = read_log(tmp_path / "1"), read_log(tmp_path / "2")
        assert [line["lr"] for line in one] == [line["lr"] for line in two]
        ratio = "compute_ratio" if router_mode == "capacity" else "sampled_compute_ratio"
        for name in ("loss", ratio):
            np.testing.assert_allclose([x[name] for x in one], [x[name] for x in two], atol=1e-4, rtol=0)
        assert one[-1][ratio] < 0.97


class TestForms:
    def test_latents(self, run_here, tmp_path):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=2,
            sample_size=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        vae.save_pretrained(tmp_path / "vae")
        options = {"vae": tmp_path / "vae", "random_flip": True, "max_train_steps": 4, "checkpointing_steps": 2}
        with pytest.raises(ValueError, match="`patch_size`=3 must divide `sample_size`=4"):
            run_here(tmp_path / "run", **{**options, "patch_size": 3})
        assert not (tmp_path / "run").exists()  # found before an hour of encoding
        run_here(tmp_path / "run", **options)
        pipe = DynaDiTPipeline.from_pretrained(tmp_path / "run")
        assert (pipe.transformer.config.sample_size, pipe.transformer.config.in_channels) == (4, 2)
        assert pipe("5", num_inference_steps=2).images[0].size == (8, 8)

        # The cache and the VAE may move, and the run goes on the same.
        (tmp_path / "vae").rename(tmp_path / "moved")
        moved = {**options, "vae": tmp_path / "moved", "latent_cache_dir": tmp_path / "cache"}
        run_here(tmp_path / "parts", **{**moved, "max_train_steps": 2})
        (tmp_path / "cache").rename(tmp_path / "other")
        moved["latent_cache_dir"] = tmp_path / "other"
        run_here(tmp_path / "parts", resume_from_checkpoint="latest", **moved)
        assert filecmp.cmp(tmp_path / "run" / WEIGHTS, tmp_path / "parts" / WEIGHTS, shallow=False)

        run_here(tmp_path / "ddpm", objective="epsilon", learn_sigma=True, **{**moved, "max_train_steps": 1})
        scheduler = DDPMScheduler.from_pretrained(tmp_path / "ddpm", subfolder="scheduler")
        assert not scheduler.config.clip_sample  # latents go beyond [-1, 1]

    def test_learned_variances(self, run_here, tmp_path):
        run_here(tmp_path / "run", objective="epsilon", learn_sigma=True, max_train_steps=3, ddpm_num_steps=50)
        pipe = DynaDiTPipeline.from_pretrained(tmp_path / "run")
        assert isinstance(pipe.scheduler, DDPMScheduler)
        assert pipe.scheduler.config.variance_type == "learned_range"
        assert pipe.scheduler.config.clip_sample
        assert pipe.transformer.out_channels == 2
        assert pipe("5", num_inference_steps=2).images[0].size == (8, 8)

    def test_preset_and_unconditional(self, script, tmp_path):
        args = script.parse_args(arguments(tmp_path / "run", preset="DiT-S/2", qk_norm="rms_norm", unconditional=True))
        expected = {"sample_size": 8, "in_channels": 1, "num_classes": None, "learn_sigma": args.learn_sigma}
        model = make_transformer(args, None, expected)
        assert (model.config.num_layers, model.config.num_attention_heads, model.config.patch_size) == (12, 6, 2)
        assert (model.config.sample_size, model.config.in_channels, model.config.num_classes) == (8, 1, None)
        assert model.config.qk_norm == "rms_norm"
        assert not model.config.learn_sigma

    def test_a_step_with_a_large_gradient_is_skipped(self, run_here, tmp_path):
        run_here(
            tmp_path / "run", max_train_steps=2, skip_grad_norm=1e-9, num_validation_images=0, checkpointing_steps=1
        )
        assert [line["skipped_steps"] for line in read_log(tmp_path / "run")] == [1, 2]
        first, second = (load_file(tmp_path / "run" / f"checkpoint-{step}" / WEIGHTS) for step in (1, 2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "distributed_type"),
    [
        ("single_device", DistributedType.NO),
        ("multi_gpu", DistributedType.MULTI_GPU),
        ("fsdp", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
    ],
)
def test_launch_configurations_are_what_accelerate_reads(name, distributed_type):
    config = load_config_from_file(str(ROOT / "examples" / "configs" / f"{name}.yaml"))
    assert config.distributed_type == distributed_type
    if name == "fsdp":
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert wrapped in DynaDiTTransformer2DModel._no_split_modules
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--budget", "0"], "`--budget` 0.0 must be in (0, 1]; 1 is the complete model"),
            (["--budget", "1.5"], "`--budget` 1.5 must be in (0, 1]"),
            (["--budget_decay_steps", "-1"], "`--budget_decay_steps` -1 must be at least 0"),
            (["--router_learning_rate", "0"], "`--router_learning_rate` 0.0 must be above 0"),
            (["--learn_sigma"], "`--learn_sigma` is for `--objective epsilon`"),
            (["--latent_cache_dir", "x"], "`--latent_cache_dir` and `--vae_subfolder` are for `--vae`"),
            (["--vae", "ada/x", "--streaming", "--dataset_name", "y"], "cannot be used with `--streaming`"),
            (["--static", "--budget", "0.5"], "`--budget` and `--static`, which has no budget, are both set"),
            (["--class_dropout_prob", "7"], "`--class_dropout_prob` 7.0 must be in [0, 1]"),
            (["--vae", "no/such/folder"], "`--vae` no/such/folder is not a folder"),
            (["--preset", "DiT-H/2"], "argument --preset: invalid choice: 'DiT-H/2'"),
            (
                ["--pretrained_model_name_or_path", "ada/x", "--num_layers", "3"],
                "`--num_layers` and `--pretrained_model_name_or_path` both define the model",
            ),
        ],
    )
    def test_arguments(self, script, capsys, words, message):
        with pytest.raises(SystemExit) as exit:
            script.parse_args(words)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err

    def test_weights_that_do_not_fit(self, run_here, static_run, tmp_path):
        with pytest.raises(ValueError, match="it has `sample_size`=8 instead of 16, `num_classes`=10 instead of None"):
            run_here(tmp_path / "run", pretrained_model_name_or_path=static_run, resolution=16, unconditional=True)
        assert not (tmp_path / "run").exists()
