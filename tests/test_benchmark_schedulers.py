# SPDX-License-Identifier: Apache-2.0
"""`examples/benchmark_schedulers.py`: its exact solutions, what it counts and what it compares."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark_schedulers

    return benchmark_schedulers


def test_velocity_follows_from_the_density(benchmark):
    """score = grad log p by autograd on torch's own mixture; noise = -sigma score, data = (x - sigma noise) / a."""
    flow = benchmark.reference_mixture()
    sample = benchmark.draw_noise(flow, 32, seed=3).double().requires_grad_()
    for sigma in (0.02, 0.3, 0.8):
        alpha = 1 - sigma
        stds = (alpha**2 * flow.stds**2 + sigma**2).sqrt()
        components = torch.distributions.Independent(
            torch.distributions.Normal(alpha * flow.means, stds[:, None].expand_as(flow.means)), 1
        )
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=flow.log_weights), components
        )
        (score,) = torch.autograd.grad(mixture.log_prob(sample).sum(), sample)
        noise = -sigma * score
        expected = noise - (sample - sigma * noise) / alpha
        torch.testing.assert_close(flow.velocity(sample.detach(), sigma), expected.detach(), rtol=1e-9, atol=1e-9)


def test_exact_solution_of_a_gaussian(benchmark):
    """The flow maps noise to mean + std * noise."""
    flow = benchmark.gaussian()
    noise = benchmark.draw_noise(flow, 64, seed=0)
    expected = flow.means + flow.stds * noise.double()
    torch.testing.assert_close(flow.solve(noise, 400), expected, rtol=0, atol=1e-8)
    path = flow.solve(noise, 20, output_path=True)
    assert path.shape == (21, *noise.shape)
    torch.testing.assert_close(path[0], noise.double())


def test_exact_solution_has_converged(benchmark):
    """Its error is far below the smallest of the tables."""
    flow = benchmark.reference_mixture()
    noise = benchmark.draw_noise(flow, 512, seed=0)
    assert benchmark.errors(flow.solve(noise, 400), flow.solve(noise, 800))[0] < 1e-6


def test_calls_are_counted_and_ours_are_never_more(benchmark):
    flow = benchmark.gaussian()
    noise = benchmark.draw_noise(flow, 8, seed=0)
    solution = flow.solve(noise, 50)
    ours = {name: (benchmark.ours, options, False) for name, options in benchmark.OURS.items()}
    for name, solver in {**ours, **benchmark.DIFFUSERS}.items():
        factory, options, _ = solver
        row = benchmark.measure(flow, noise, solution, *solver)
        assert row["calls"] == [len(factory(nfe, **options).timesteps) for nfe in benchmark.NFES]
        for nfe, calls in zip(benchmark.NFES, row["calls"], strict=True):
            if name == "FlowMatchHeun":
                assert calls == nfe + 1
            elif name in benchmark.OURS:
                assert nfe - 3 <= calls <= nfe
            else:
                assert calls == nfe


def test_errors_fall_with_the_calls_and_eulers_agree(benchmark):
    rows = benchmark.measure_all(benchmark.gaussian(), 64, 200)
    by_name = {row["solver"]: row for row in rows}
    assert len(by_name) == len(rows) == len(benchmark.OURS) + len(benchmark.DIFFUSERS)
    assert by_name["euler"]["rmse"] == pytest.approx(by_name["FlowMatchEuler"]["rmse"], rel=1e-4)
    for row in rows:
        assert all(math.isfinite(error) for error in row["rmse"]), row
        assert row["rmse"][-1] < row["rmse"][0] / 5, row
    # On a Gaussian, methods of higher order are far closer.
    assert by_name["abm3"]["rmse"][-1] < by_name["ab2"]["rmse"][-1] < by_name["euler"]["rmse"][-1] / 10


def test_ratios_and_targets(benchmark, monkeypatch):
    def row(solver, library, *rmse):
        return {
            "solver": solver,
            "library": library,
            "rmse": list(rmse),
            "median": [error / 2 if library == "ours" else error for error in rmse],
            "calls": [6, 10, 20, 48],
        }

    nan = math.nan
    rows = [
        row("ab2", "ours", 0.5, 0.3, 0.4, nan),
        row("ab3", "ours", 0.9, 0.2, 0.5, 0.1),
        row("FlowMatchEuler", "diffusers", 2.0, 0.5, 2.0, nan),
        row("FlowMatchHeun", "diffusers", 1.0, 0.5, 3.0, 1.0),
        row("DPM++2M", "diffusers", nan, 0.4, 2.5, 1.0),
        row("UniPC", "diffusers", 4.0, 0.25, 4.0, 0.25),
        row("UniPC, order 3", "diffusers", 0.5, 0.5, 0.4, 0.4),
    ]
    monkeypatch.setattr(benchmark, "measure_all", lambda *args: rows)

    class Arguments:
        samples = reference_steps = 1

    *same, first_four, all_rows = benchmark.bench_mixture(Arguments)
    assert same == rows
    assert first_four["ratio"] == pytest.approx([0.5, 0.8, 0.2, 0.4])
    assert first_four["median_ratio"] == pytest.approx([0.25, 0.4, 0.1, 0.2])
    assert first_four["target"] == [0.6, 0.6, 0.2, 0.2]
    assert first_four["met"] == [True, False, True, False]
    assert all_rows["ratio"] == pytest.approx([1.0, 0.8, 1.0, 0.4])
    cells = [benchmark.format_cell(first_four, i) for i in range(4)]
    assert cells[:2] == ["**0.50** (0.25), target 0.6: met", "**0.80** (0.40), target 0.6: **missed**"]


def test_cells_state_calls_and_options(benchmark):
    row = {"rmse": [0.1234], "median": [0.05], "calls": [5], "options": [{"shift": 1.6}]}
    assert benchmark.format_cell(row, 0) == "1.23e-01 (5.0e-02), 5 calls, shift 1.6"
    assert benchmark.format_cell({**row, "calls": [6], "options": [{}]}, 0) == "1.23e-01 (5.0e-02), as it comes"


def test_the_readme_shows_what_the_script_prints(benchmark, capsys):
    sections = json.loads((EXAMPLES / "results" / "benchmark_schedulers.json").read_text())["sections"]
    benchmark.print_readme_tables(sections)
    mixture, other_data = capsys.readouterr().out.strip().split("\n\n")
    assert len(mixture.splitlines()) == 2 + len(benchmark.OURS) + len(benchmark.DIFFUSERS) + 4
    assert len(other_data.splitlines()) == 2 + 3 * 3
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert mixture in readme and other_data in readme
    assert sections["mixture"]["commit"] in readme


def test_readme_tables(benchmark, monkeypatch, capsys):
    """The cells of both grids in one, and the best of diffusers' rows on other data."""
    monkeypatch.setattr(benchmark, "NFES", (6, 10))

    def row(solver, library, rmse, calls=(6, 10)):
        return {"solver": solver, "library": library, "rmse": rmse, "calls": calls}

    ratio = {"solver": "ours / theirs", "ratio": [0.123, 0.7]}
    rows = [
        row("ab3", "ours", [0.5, 0.00012345], (5, 10)),
        row("abm3", "ours", [0.3, 0.2]),
        row("UniPC", "diffusers", [0.4, 5e-5]),
        row("DPM++2M", "diffusers", [0.25, 1.2e-5]),
    ]
    best = [row("ab3", "ours", [0.04, 1e-5], (5, 10)), row("DPM++", "diffusers", [0.1, 0.01]), ratio]
    sections = {
        "mixture": {"rows": [*rows, {**ratio, "target": [0.6, 0.6], "met": [True, False]}]},
        "best": {"rows": best},
        "digits": {"rows": [*rows, ratio]},
    }
    benchmark.print_readme_tables(sections)
    expected = """\
| solver | NFE 6 | NFE 10 |
|---|---|---|
| `ab3` | 0.5 / 0.04 (5 calls) | 0.00012 / 1e-5 |
| `abm3` | 0.3 | 0.2 |
| diffusers' UniPC | 0.4 | 5e-5 |
| diffusers' DPM++2M | 0.25 / 0.1 | 1.2e-5 / 0.01 |
| ours / theirs, uniform grid | **0.12** | **0.70** |
| target | 0.6: met | 0.6: **missed** |
| ours / theirs, best grids | **0.12** | **0.70** |

| data | solver | NFE 6 | NFE 10 |
|---|---|---|---|
| digits, 64 dimensions | `ab3` | 0.5 (5 calls) | 0.00012 |
| digits, 64 dimensions | `abm3` | 0.3 | 0.2 |
| digits, 64 dimensions | diffusers' best | 0.25 | 1.2e-5 |
"""
    assert capsys.readouterr().out.strip() == expected.strip()


def test_script_writes_tables_and_the_picture(benchmark, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(benchmark, "NFES", (6,))
    monkeypatch.setattr(benchmark, "SHIFTS", (1.0, 1.6))
    words = ["--quick", "--threads", torch.get_num_threads(), "--output_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["benchmark_schedulers.py", *map(str, words)])
    benchmark.main()

    sections = json.loads((tmp_path / "benchmark_schedulers.json").read_text())["sections"]
    assert set(sections) == set(benchmark.SECTIONS)
    text = capsys.readouterr().out
    for name, section in sections.items():
        assert {"seed", "samples", "hardware", "versions", "commit"} <= set(section)
        assert f"### {name}\n" in text and "| NFE 6 |" in text
        for row in section["rows"]:
            assert len(row.get("rmse", row.get("ratio"))) == 1
    best = {row["solver"]: row for row in sections["best"]["rows"] if "rmse" in row}
    assert set(best["abm3"]["options"][0]) <= {"shift", "use_sigmas"}
    assert (tmp_path / "trajectories.png").stat().st_size > 10_000

    # A second call replaces only what it ran.
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "gaussian"])
    benchmark.main()
    again = json.loads((tmp_path / "benchmark_schedulers.json").read_text())["sections"]
    assert again["mixture"] == sections["mixture"] and set(again) == set(sections)
