# SPDX-License-Identifier: Apache-2.0
"""The script as it is run: what it writes, and that it says what is wrong."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from diffusers_dyna import DynaDiTPipeline, DynaDiTTransformer2DModel, FlowMatchODEScheduler
from diffusers_dyna.conversion import convert_diffusers_dit, convert_dit_checkpoint, sort_by_importance


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "convert_checkpoint.py"
GOLDEN = ROOT / "tests" / "data" / "dydit_tiny.safetensors"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dydit_state():
    return {key[6:]: value for key, value in load_file(GOLDEN).items() if key.startswith("state.")}


@pytest.fixture(scope="module")
def checkpoints(dydit_state, tmp_path_factory):
    """`dydit.pt`, `static.pt`, `vae`, and the pipeline of diffusers `pipeline`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    routers = ("attn_rate", "mlp_rate", "token_selection")
    static_state = {key: value for key, value in dydit_state.items() if not any(name in key for name in routers)}
    torch.save({"ema": dydit_state}, folder / "dydit.pt")
    torch.save(static_state, folder / "static.pt")
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.25)
    vae.save_pretrained(folder / "vae")
    transformer = DiTTransformer2DModel(2, 8, in_channels=4, out_channels=8, num_layers=2, sample_size=8)
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    pipeline = DiTPipeline(transformer, vae, DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False))
    pipeline.save_pretrained(folder / "pipeline")
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    index["id2label"] = {"0": "tench", "1": "goldfish, carp"}
    (folder / "pipeline" / "model_index.json").write_text(json.dumps(index))
    return folder


def run(script, *words) -> None:
    script.main(script.parse_args([str(word) for word in words]))


def assert_same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_dydit_is_recognised(script, checkpoints, tmp_path, capsys):
    run(script, "--checkpoint_path", checkpoints / "dydit.pt", "--output_dir", tmp_path)
    assert (
        "Saved a DynaDiTPipeline to" in (printed := capsys.readouterr().out) and "3 layers, 4 heads of 16" in printed
    )
    pipeline = DynaDiTPipeline.from_pretrained(tmp_path)
    assert_same_weights(pipeline.transformer, convert_dit_checkpoint(checkpoints / "dydit.pt"))
    assert pipeline.transformer.config.router_mode == "threshold" and pipeline.vae is None
    scheduler = pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler) and not scheduler.config.clip_sample
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))

    latents = pipeline([1, 2], num_inference_steps=2, guidance_scale=2.0, output_type="latent").images
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()


def test_a_fault_in_the_checkpoint_is_one_message(checkpoints, tmp_path, monkeypatch):
    words = ["--checkpoint_path", str(checkpoints / "static.pt"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit.value.code.startswith("convert_checkpoint.py: error: `source` must be given for a checkpoint without")
    assert not (tmp_path / "out").exists()


def test_sit_with_vae_and_names(script, checkpoints, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({str(i): f"class {i}" for i in range(10)}))
    words = ["--checkpoint_path", checkpoints / "static.pt", "--source", "sit", "--num_attention_heads", 4]
    words += ["--vae", checkpoints / "vae", "--id2label", tmp_path / "names.json", "--output_dir", tmp_path / "out"]
    run(script, *words)
    pipeline = DynaDiTPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.scheduler, FlowMatchODEScheduler)
    assert (pipeline.transformer.config.timestep_scale, pipeline.transformer.out_channels) == (-0.001, 4)
    assert pipeline.id2label[3] == "class 3" and pipeline.vae.config.scaling_factor == 0.25
    assert pipeline("class 3", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_ddpm(script, checkpoints, tmp_path):
    words = ["--checkpoint_path", checkpoints / "static.pt", "--source", "dit", "--num_attention_heads", 4]
    run(script, *words, "--scheduler", "ddpm", "--output_dir", tmp_path)
    pipeline = DynaDiTPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, DDPMScheduler) and not pipeline.scheduler.config.clip_sample
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline(3, num_inference_steps=2, output_type="latent").images.isfinite().all()


def test_ddpm_without_learned_variance(script):
    assert script.make_scheduler("ddpm", learn_sigma=False).config.variance_type == "fixed_large"


def test_sorted_model_alone(script, checkpoints, tmp_path):
    words = [
        "--checkpoint_path",
        checkpoints / "static.pt",
        "--source",
        "dit",
        "--num_attention_heads",
        4,
        "--seed",
        7,
    ]
    words += ["--router_mode", "threshold", "--sort_by_importance", "--no-as_pipeline"]
    run(script, *words, "--output_dir", tmp_path)
    assert not (tmp_path / "model_index.json").exists()
    model = DynaDiTTransformer2DModel.from_pretrained(tmp_path)
    torch.manual_seed(7)
    expected = convert_dit_checkpoint(
        checkpoints / "static.pt", source="dit", num_attention_heads=4, router_mode="threshold"
    )
    assert not model.transformer_blocks[0].mlp.fc1.weight.equal(expected.transformer_blocks[0].mlp.fc1.weight)
    assert_same_weights(model, sort_by_importance(expected))
    assert model.config.router_mode == "threshold"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(script, checkpoints, tmp_path, dtype):
    """Decisions hang on the routers: their weights are not rounded."""
    words = ["--checkpoint_path", checkpoints / "dydit.pt", "--no-as_pipeline", "--dtype", dtype]
    run(script, *words, "--output_dir", tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert weights["transformer_blocks.0.attn.qkv.weight"].dtype == getattr(torch, dtype)
    assert weights["pos_embed.proj.weight"].dtype == getattr(torch, dtype)
    full = convert_dit_checkpoint(checkpoints / "dydit.pt").state_dict()
    exact = [key for key, weight in weights.items() if weight.dtype == torch.float32]
    assert any("attn_rate" in key for key in exact) and any("time_embedding" in key for key in exact)
    torch.testing.assert_close({key: weights[key] for key in exact}, {key: full[key] for key in exact}, rtol=0, atol=0)
    loaded = DynaDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype))
    assert loaded.transformer_blocks[0].attn_rate.weight.equal(full["transformer_blocks.0.attn_rate.weight"])


def test_pipeline_of_diffusers(script, checkpoints, tmp_path):
    run(script, "--checkpoint_path", checkpoints / "pipeline", "--source", "diffusers", "--output_dir", tmp_path)
    pipeline = DynaDiTPipeline.from_pretrained(tmp_path)
    torch.manual_seed(0)
    assert_same_weights(pipeline.transformer, convert_diffusers_dit(checkpoints / "pipeline"))
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert pipeline.id2label == {0: "tench", 1: "goldfish, carp"} and pipeline.get_label_ids("carp") == [1]
    assert_same_weights(pipeline.vae, AutoencoderKL.from_pretrained(checkpoints / "vae"))


def test_transformer_of_diffusers_alone(script, checkpoints, tmp_path):
    words = ["--checkpoint_path", checkpoints / "pipeline" / "transformer", "--source", "diffusers"]
    run(script, *words, "--vae", checkpoints / "pipeline", "--output_dir", tmp_path)
    pipeline = DynaDiTPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.id2label is None
    assert pipeline.vae.config.latent_channels == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--checkpoint_path", "nowhere.pt"], "`--checkpoint_path` nowhere.pt does not exist. Nothing is downloaded"),
        (["--output_dir", str(GOLDEN)], "is a file. Give a folder, which need not exist"),
        (["--source", "dydit", "--sort_by_importance"], "`--sort_by_importance` is for static sources"),
        (["--source", "diffusers", "--num_attention_heads", "2"], "`--num_attention_heads` is in the config"),
        (["--no-as_pipeline", "--vae", str(ROOT)], "`--vae` is part of the pipeline, which `--no-as_pipeline` leaves"),
        (["--source", "dit", "--scheduler", "flow"], "`--scheduler flow` does not fit `--source dit`: sit predicts a"),
        (["--scheduler", "flow"], "`--scheduler flow` does not fit `--source dydit`"),
        (["--source", "sit", "--scheduler", "ddim"], "`--scheduler ddim` does not fit `--source sit`"),
        (["--vae", "nowhere"], "`--vae` nowhere is not a folder. Nothing is downloaded"),
        (["--id2label", "nowhere.json"], "`--id2label` nowhere.json must be a JSON file like"),
        (["--id2label", str(ROOT / "setup.cfg")], "setup.cfg must be a JSON file like"),
        (["--source", "DiT"], "argument --source: invalid choice: 'DiT'"),
    ],
)
def test_arguments(script, capsys, tmp_path, words, message):
    with pytest.raises(SystemExit) as exit:
        script.parse_args(["--checkpoint_path", str(GOLDEN), "--output_dir", str(tmp_path / "out"), *words])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "invalid choice" in error or error.count("\n") == 1
