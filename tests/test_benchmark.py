# SPDX-License-Identifier: Apache-2.0
"""`examples/benchmark.py`: what it compares and counts. Not how fast anything is."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from diffusers_dyna import DynaDiTPipeline, FlowMatchODEScheduler

from .testing_utils import tiny_dyna_dit


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def benchmark(monkeypatch):
    # By its name, since the processes that it starts import it too.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark

    return benchmark


@pytest.fixture
def args():
    return argparse.Namespace(quick=True, layers=None, device="cpu", tokens=(16, 64))


@pytest.fixture
def call(benchmark, monkeypatch, tmp_path):
    """Calls the script with `--quick`; returns the sections of its JSON."""

    def main(*words):
        command = ["benchmark.py", "--quick", "--threads", torch.get_num_threads(), "--output_dir", tmp_path, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        benchmark.main()
        return json.loads((tmp_path / "bench.json").read_text())["sections"]

    return main


def assert_finite(rows):
    assert rows
    for row in rows:
        for key, value in row.items():
            for number in value if isinstance(value, list) else [value]:
                assert isinstance(number, str) or math.isfinite(number), (key, row)


def assert_tables(text, sections):
    """One Markdown table a section, whose lines have as many cells as its head."""
    tables = [part.partition("\n\n") for part in text.split("### ")[1:]]
    assert [name for name, *_ in tables] == sections
    for _, _, body in tables:
        head, rule, *rows = [line for line in body.splitlines() if line.startswith("|")]
        assert rows and set(rule) == {"|", "-"}
        assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}


@pytest.mark.parametrize("size", ["B", "XL"])
@torch.no_grad()
def test_routers_reach_the_budget(benchmark, args, size):
    """With heads, groups and tokens that vary over timesteps, layers and images, and outputs that are finite."""
    model = benchmark.make_model(size, 64, torch.float32, args)
    routers = model.router_parameters()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if name not in routers}
    timesteps, inputs = benchmark.schedule("cpu"), benchmark.make_inputs(model, 3)
    for budget in (0.3, 0.5, 0.7):
        benchmark.set_routers(model, timesteps, budget)
        model.prepare_timesteps(timesteps, inputs[1])
        masks = benchmark.decisions(model, timesteps, inputs)
        expected = model.predict_compute_ratio(timesteps)
        assert masks["compute_ratio"] == pytest.approx(budget, abs=0.005)
        assert masks["compute_ratio"] == pytest.approx(expected.mean().item(), abs=1e-5) and expected.std() > 0.01
        for name in ("heads", "groups", "tokens"):
            mask = masks[name].view(len(timesteps), 3, *masks[name].shape[1:])  # calls, images, layers, ...
            assert 0.2 < mask.mean() < 1 and len(mask.sum(dim=-1).unique()) > 1
            assert (mask != mask[:1]).any() and (mask[:, :, 0] != mask[:, :, 1]).any(), name
            assert (mask[:, 0] != mask[:, 1]).any() == (name == "tokens")
        output = benchmark.trajectory(model, timesteps, inputs)()
        assert output.isfinite().all() and 0.1 < output.std() < 10
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)


def test_routers_that_cannot_reach_the_budget(benchmark, args):
    model = benchmark.make_model("S", 16, torch.float32, args)
    with pytest.raises(RuntimeError, match=r"The routers reach a compute ratio of 0\.0\d+ instead of 0\.01\."):
        benchmark.set_routers(model, benchmark.schedule("cpu"), 0.01)


def test_the_seed_of_routers(benchmark, args):
    models = [benchmark.make_model("S", 16, torch.float32, args) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        benchmark.set_routers(model, benchmark.schedule("cpu"), 0.5, seed)
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@torch.no_grad()
def test_macs_are_counted(benchmark, args):
    """Closed forms of what torch's counter does not know by itself, and of a whole model."""
    x, weight, bias = torch.randn(3, 5, 8), torch.randn(7, 8), torch.randn(7)
    macs = 5 * 8 * 7
    assert benchmark.counted_macs(lambda: torch.nn.functional.linear(x, weight, bias), 3) == macs
    heads = torch.randn(3, 2, 5, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert benchmark.counted_macs(lambda: attention(heads, heads, heads), 3) == 2 * 2 * 5 * 5 * 8
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 15)
        linear = torch.ops.mkldnn._linear_pointwise
        assert benchmark.counted_macs(lambda: linear(x, packed, bias, "none", [], ""), 3) == macs
    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 15)
        linear = torch.ops.mkl._mkl_linear
        assert benchmark.counted_macs(lambda: linear(x, packed, weight, bias, 15), 3) == macs

    model = benchmark.make_model("B", 16, torch.float32, args)
    benchmark.set_routers(model, benchmark.schedule("cpu"), 0.5)
    row = benchmark.macs(model, benchmark.schedule("cpu")[3], benchmark.make_inputs(model, 2))
    dim, tokens = 64, 16
    blocks = 2 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    others = tokens * 4 * dim * 12 + 256 * dim + dim**2 + (2 * 6 + 2) * dim**2
    assert row["static_macs"] == row["static_macs_counted"] == blocks + others
    assert row["dynamic_macs"] < row["static_macs"]
    assert row["dynamic_macs_counted"] == pytest.approx(row["dynamic_macs"], rel=1e-2) and row["macs_agree"] is True


def test_rounds(benchmark):
    calls = []
    row = benchmark.alternate(lambda: calls.append("ours"), lambda: calls.append("reference"), rounds=3, warmup=1)
    assert calls == ["reference", "ours", "ours", "reference"] * 2 and row["rounds"] == 3
    row = benchmark.alternate(lambda: None, lambda: calls.append(0), rounds=50, max_seconds=0.0)
    assert row["rounds"] == benchmark.MIN_ROUNDS and calls.count(0) == 2 + benchmark.MIN_ROUNDS


def test_table(benchmark, capsys):
    row = {"what": "a", "ours": 0.12345, "reference": 0.5, "ratio": 4.0, "ratio_q1": 3.5, "ratio_q3": 4.25}
    benchmark.print_table([{**row, "target": 2.2, "met": True}, {"met": False, "cap_mb": 1073.74, "widths": [2, 3]}])
    assert capsys.readouterr().out.splitlines() == [
        "| what | ours (s) | reference (s) | ratio (quartiles) | target | met | cap (MB) | widths |",
        "|---|---|---|---|---|---|---|---|",
        "| a | 0.123 | 0.5 | **4.00** (3.50 - 4.25) | 2.2 | yes |  |  |",
        "|  |  |  |  |  | **no** | 1074 | 2 / 3 |",
    ]


def test_sections(call, capsys):
    sections = call("--only", "static", "gpu", "overhead")
    printed = capsys.readouterr().out
    assert "Section gpu is left out: it needs a CUDA device." in printed or torch.cuda.is_available()
    assert_tables(printed, ["static", "overhead"])
    assert [row["dtype"] for row in sections["static"]["rows"]] == ["float32", "bfloat16"]
    for row, tolerance in zip(sections["static"]["rows"], (1e-4, 0.1)):
        assert row["deviation"] < tolerance
    for row in sections["static"]["rows"] + sections["overhead"]["rows"]:
        assert isinstance(row["met"], bool) and row["target"] in (1.05, 0.02)

    before = sections["static"]
    sections = call("--only", "dynamic")
    assert_tables(capsys.readouterr().out, ["dynamic"])
    assert sections["static"] == before and set(sections) == {"static", "overhead", "dynamic"}
    for section in sections.values():
        assert_finite(section["rows"])
        assert section["quick"] is True and section["threads"] == torch.get_num_threads()
        assert {"hardware", "versions", "commit"} <= set(section)
    rows = sections["dynamic"]["rows"]
    assert len(rows) == 3 * 2 * 3 * 2 + 4
    for row in rows:
        budget = float(row["what"].removeprefix("dynamic at ").partition(",")[0])
        assert row["compute_ratio"] == pytest.approx(budget, abs=0.05)  # of four of the twenty calls
        assert row["met"] == (row["realised"] >= 1)
        assert row["realised"] == pytest.approx(row["ratio"] * row["compute_ratio"])
        assert row["macs_agree"] and max(row["mixed_widths"]) > 1
        if "20 of 20 calls" in row["what"]:
            assert min(row["mixed_widths"]) > 1


@pytest.mark.slow
def test_slow_sections(call, capsys, tmp_path):
    """All that the fast test leaves out, but for the U-Net and the imports, which have no small size."""
    DynaDiTPipeline(tiny_dyna_dit(), FlowMatchODEScheduler()).save_pretrained(tmp_path / "pipeline")
    names = ["pipeline", "training", "memory", "caches", "compile", "curve"]
    sections = call("--only", *names, "--pipeline", tmp_path / "pipeline")
    printed = capsys.readouterr().out
    left_out = [name for name in names if f"Section {name} is left out" in printed]
    assert_tables(printed, [name for name in names if name not in left_out])
    for section in sections.values():
        assert_finite(section["rows"])
    assert all(row["deviation"] < 0.5 for row in sections["pipeline"]["rows"] if "deviation" in row)
    assert [row["compute_ratio"] for row in sections["pipeline"]["rows"]] == pytest.approx([0.5, 1] * 2, abs=0.005)
    assert all(row["from_uncached"] == 0 for row in sections["caches"]["rows"] if row["cache"] == "none")
    assert sections["memory"]["rows"][0]["plan_mb"] > 0
    if "compile" not in left_out:
        assert all(row["deviation"] < 1e-2 and row["graphs"] >= 1 for row in sections["compile"]["rows"])
    if "curve" not in left_out:
        assert (tmp_path / "curve.png").stat().st_size > 10_000
