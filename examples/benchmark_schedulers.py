# SPDX-License-Identifier: Apache-2.0
"""
How close the solvers of this package and those of diffusers come to the exact solution of a flow, call for call.

    make bench          (or: python examples/benchmark_schedulers.py)
    python examples/benchmark_schedulers.py --only mixture
    python examples/benchmark_schedulers.py --only trajectories

The data are Gaussian mixtures, whose velocity has a closed form, so that every error is the solver's. Each solver starts
from the same noise; its error is the root mean square, over samples and dimensions, of the distance to the exact solution
of the ODE from the same noise, and, in parentheses, the median over the samples of the same of one sample: a few samples
that a solver sends to the wrong component make up most of the former. NFE counts the calls of the velocity. A solver
that cannot make that many makes fewer, which its row states, but for diffusers' Heun, which gets one more.

The velocity is evaluated in float64 and given in float32, at the times that a pipeline would give to the model: the
entries of `timesteps`, which UniPC and DPM-Solver++ round to whole numbers. The rows "exact times" give them the velocity
at their own sigma instead.

- uniform grid: 1, 1 - 1/N, ..., 1/N, then 0. diffusers' Heun is told of its last entry by its `sigma_min`; DPM-Solver++
  takes no grid, and its own starts at 0.999 instead of 1. Solvers are as they come, except where a row says more.
- best grid: every solver at the shift, the kind of grid and the options of `search_space` that are best: the two that
  are best on other noise and what it is as it comes are measured, and the lowest error stands in the table.

All of it is on the linear path, with velocities that are exact: no evidence for other paths, nor for trained networks.

Prints Markdown tables, the last two being the README's, and writes `benchmark_schedulers.json`, in which a call replaces
only the sections that it ran, and `trajectories.png`. A little over a minute on a CPU.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_dyna import FlowMatchODEScheduler, FlowMatchSDEScheduler
from diffusers_dyna.training.loop import describe_environment, write_json


NFES = (6, 10, 20, 48)
# The largest error of our best solver on the uniform grid, as a share of the error of the best of diffusers' four.
TARGETS = {6: 0.6, 10: 0.6, 20: 0.2, 48: 0.2}
SHIFTS = (1.0, 0.4, 0.6, 0.8, 1.25, 1.6, 2.5, 4.0)
SEED, SEARCH_SEED = 0, 1  # of the noise
# Of the mixture on which the targets were set: 5 components in 6 dimensions.
MEANS = (
    (-3.47, -0.56, -1.59, 1.50, -1.33, -1.91),
    (-0.93, -1.30, -1.94, 2.29, 0.49, 3.03),
    (1.70, -1.84, 0.78, -1.43, -0.14, 0.83),
    (-0.01, -1.83, -1.90, -1.68, -2.62, 1.56),
    (0.98, 0.22, -1.72, 2.81, -0.46, 0.36),
)
LOG_WEIGHTS = (-2.28, -2.69, -0.42, -2.51, -2.41)
STDS = (0.39, 0.79, 0.69, 0.48, 0.58)


class MixtureFlow:
    """
    The flow from standard normal noise to a mixture of round Gaussians along x = (1 - sigma) * sample + sigma * noise.

    Args:
        means (`torch.Tensor` of shape `(num_components, dim)`): the components' means.
        log_weights (`torch.Tensor` of shape `(num_components,)`): logarithms of their weights, up to a constant.
        stds (`torch.Tensor` of shape `(num_components,)`): their standard deviations.
    """

    def __init__(self, means: torch.Tensor, log_weights: torch.Tensor, stds: torch.Tensor):
        self.means, self.log_weights, self.stds = means.double(), log_weights.double(), stds.double()
        self.calls = 0

    def velocity(self, sample: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[noise - data | sample], in float64. With a component given, noise and data are jointly Gaussian."""
        self.calls += 1
        sample, alpha = sample.double(), 1 - sigma
        variances = alpha**2 * self.stds**2 + sigma**2
        distances = sample.square().sum(dim=1, keepdim=True) - 2 * alpha * sample @ self.means.T
        distances = distances + alpha**2 * self.means.square().sum(dim=1)  # squared, to the means at this time
        logits = self.log_weights - distances / (2 * variances) - sample.shape[1] / 2 * variances.log()
        weights = logits.softmax(dim=1)  # (batch_size, num_components)
        gains = (sigma - alpha * self.stds**2) / variances
        return (weights @ gains)[:, None] * sample - (weights * (1 + alpha * gains)) @ self.means

    def solve(self, noise: torch.Tensor, num_steps: int, output_path: bool = False) -> torch.Tensor:
        """The exact solution at sigma = 0: classical Runge-Kutta in float64; with `output_path` at all steps."""
        sample, path = noise.double(), [noise.double()]
        for i in range(num_steps):
            sigma, h = 1 - i / num_steps, -1 / num_steps
            k1 = self.velocity(sample, sigma)
            k2 = self.velocity(sample + h / 2 * k1, sigma + h / 2)
            k3 = self.velocity(sample + h / 2 * k2, sigma + h / 2)
            k4 = self.velocity(sample + h * k3, 1 - (i + 1) / num_steps)
            sample = sample + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            path.append(sample)
        return torch.stack(path) if output_path else sample


# Data


def reference_mixture() -> MixtureFlow:
    return MixtureFlow(*map(torch.tensor, (MEANS, LOG_WEIGHTS, STDS)))


def random_mixture(seed: int) -> MixtureFlow:
    """Of the same size, with parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    means, log_weights = 2 * torch.randn(5, 6, generator=generator), torch.randn(5, generator=generator)
    return MixtureFlow(means, log_weights, 0.3 + 0.5 * torch.rand(5, generator=generator))


def gaussian() -> MixtureFlow:
    return MixtureFlow(torch.tensor(MEANS[:1]), torch.zeros(1), torch.tensor([0.5]))


def digits() -> MixtureFlow:
    """scikit-learn's 1,797 images of 8 x 8 pixels in [-1, 1], blurred by a standard deviation of 0.1."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data).float() / 8 - 1
    return MixtureFlow(images, torch.zeros(len(images)), torch.full((len(images),), 0.1))


def plane_mixture() -> MixtureFlow:
    """In two dimensions, to look at: two interleaved half circles."""
    angles = torch.linspace(0, math.pi, 12)
    upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25], dim=1)
    return MixtureFlow(1.3 * torch.cat([upper, -upper]), torch.zeros(24), torch.full((24,), 0.1))


# Solvers: callables that return a scheduler with its grid set. What they are called with is what the tables name.


def ours(nfe: int, scheduler_class=FlowMatchODEScheduler, use_sigmas: str | None = None, **config):
    """As many steps as `nfe` model calls allow."""
    if use_sigmas is not None:
        config[f"use_{use_sigmas}_sigmas"] = True
    scheduler = scheduler_class(**config)
    for num_steps in range(nfe, 0, -1):
        scheduler.set_timesteps(num_steps)
        if len(scheduler.timesteps) <= nfe:
            return scheduler
    raise ValueError(f"No grid of {config} has {nfe} model calls or fewer.")


def flow_euler(nfe: int, shift: float = 1.0, use_sigmas: str | None = None, default_grid: bool = False):
    config = {} if use_sigmas is None else {f"use_{use_sigmas}_sigmas": True}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **config)
    if default_grid:
        scheduler.set_timesteps(nfe)
    else:
        scheduler.set_timesteps(sigmas=uniform_grid(nfe))
    return scheduler


def flow_heun(nfe: int, shift: float = 1.0, default_grid: bool = False):
    """2N - 1 calls: one more than an even `nfe`."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    num_steps = nfe // 2 + 1
    if not default_grid:
        scheduler.sigma_min = 1 / num_steps
    scheduler.set_timesteps(num_steps)
    return scheduler


def dpm_solver(nfe: int, shift: float = 1.0, **config):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, **config
    )
    scheduler.set_timesteps(nfe)
    return scheduler


def unipc(nfe: int, shift: float = 1.0, use_sigmas: str | None = None, default_grid: bool = False, **config):
    if use_sigmas is not None:
        config[f"use_{use_sigmas}_sigmas"] = True
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, **config
    )
    if default_grid or use_sigmas is not None:
        scheduler.set_timesteps(nfe)
    else:
        scheduler.set_timesteps(sigmas=np.array(uniform_grid(nfe)))
    return scheduler


def uniform_grid(num_steps: int) -> list[float]:
    return np.linspace(1, 1 / num_steps, num_steps).tolist()


OURS = {
    "euler": {"solver": "euler"},
    "heun": {"solver": "heun"},
    "midpoint": {"solver": "midpoint"},
    "rk4": {"solver": "rk4"},
    "ab2": {"solver": "ab2"},
    "ab3": {"solver": "ab3"},
    "abm3": {"solver": "abm3"},
    "multistep, order 2": {"solver": "multistep", "solver_order": 2},
    "multistep, order 3": {"solver": "multistep", "solver_order": 3},
}
PANELS = {
    **{name: (FlowMatchODEScheduler, config, 8) for name, config in OURS.items() if name != "multistep, order 2"},
    "SDE, Euler-Maruyama": (FlowMatchSDEScheduler, {"solver": "euler"}, 50),
    "SDE, stochastic Heun": (FlowMatchSDEScheduler, {"solver": "heun"}, 50),
}
# name: factory, options, whether the velocity is at the scheduler's own sigma instead of its timestep.
DIFFUSERS = {
    "FlowMatchEuler": (flow_euler, {}, False),
    "FlowMatchHeun": (flow_heun, {}, False),
    "DPM++2M": (dpm_solver, {}, False),
    "UniPC": (unipc, {}, False),
    "DPM++3M": (dpm_solver, {"solver_order": 3}, False),
    "UniPC, order 3": (unipc, {"solver_order": 3}, False),
    "UniPC, exact times": (unipc, {}, True),
    "UniPC, order 3, exact times": (unipc, {"solver_order": 3}, True),
}
NAMED_BY_TARGETS = ("FlowMatchEuler", "FlowMatchHeun", "DPM++2M", "UniPC")
OTHER_DATA = {"mixtures": "8 random mixtures", "gaussian": "one Gaussian", "digits": "digits, 64 dimensions"}


def search_space(name: str) -> Iterator[tuple[Callable, dict]]:
    """The factory and options of each form of a solver among which its best is searched; as it comes is the first."""

    def product(**options):
        for values in itertools.product(*options.values()):
            yield dict(zip(options, values, strict=True))

    shifted = list(product(shift=SHIFTS))
    kinds = list(product(use_sigmas=("karras", "exponential", "beta")))
    if name in OURS:
        yield from ((ours, {**OURS[name], **options}) for options in shifted + kinds)
    elif name == "FlowMatchEuler":
        options = [*product(shift=SHIFTS, default_grid=(False, True)), *kinds]
        yield from ((flow_euler, each) for each in options)
    elif name == "FlowMatchHeun":
        yield from ((flow_heun, each) for each in product(shift=SHIFTS, default_grid=(False, True)))
    elif name == "DPM++":
        options = product(
            shift=SHIFTS, solver_order=(2, 3), solver_type=("midpoint", "heun"), lower_order_final=(True, False)
        )
        yield from ((dpm_solver, each) for each in options)
    elif name == "UniPC":
        # solver_type "bh1" and lower_order_final=False give no finite numbers where sigma ends at 0; predict_x0=False
        # does not take a velocity.
        options = [
            *product(shift=SHIFTS, default_grid=(False, True), solver_order=(2, 3, 1)),
            *product(use_sigmas=("karras",), solver_order=(2, 3)),
        ]
        yield from ((unipc, each) for each in options)


# Measuring


def integrate(
    flow: MixtureFlow, scheduler, noise: torch.Tensor, exact_times: bool = False, output_path: bool = False
) -> torch.Tensor:
    """What a pipeline does, with the velocity of `flow` as the model; with `output_path`, the samples of all calls."""
    sample, path = noise.float(), [noise.float()]
    generator = torch.Generator().manual_seed(SEED)
    stochastic = {"generator": generator} if isinstance(scheduler, FlowMatchSDEScheduler) else {}
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i] if exact_times else timestep / scheduler.config.num_train_timesteps)
        velocity = flow.velocity(sample, sigma).float()
        sample = scheduler.step(velocity, timestep, sample, return_dict=False, **stochastic)[0]
        path.append(sample)
    return torch.stack(path) if output_path else sample


def errors(sample: torch.Tensor, solution: torch.Tensor) -> tuple[float, float]:
    """The root mean square of the difference, and the median over the samples of that of one sample."""
    each = (sample.double() - solution).square().mean(dim=1)
    return each.mean().sqrt().item(), each.sqrt().median().item()


def draw_noise(flow: MixtureFlow, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, flow.means.shape[1], generator=generator)


def measure(flow: MixtureFlow, noise: torch.Tensor, solution: torch.Tensor, factory, options, exact_times) -> dict:
    """Errors and calls of one solver, a list each, in the order of `NFES`."""
    row = {"rmse": [], "median": [], "calls": []}
    for nfe in NFES:
        flow.calls = 0
        rmse, median = errors(integrate(flow, factory(nfe, **options), noise, exact_times), solution)
        row["rmse"].append(rmse)
        row["median"].append(median)
        row["calls"].append(flow.calls)
    return row


def measure_all(flow: MixtureFlow, count: int, num_steps: int) -> list[dict]:
    """Every solver on the uniform grid, on the same noise."""
    noise = draw_noise(flow, count, SEED)
    solution = flow.solve(noise, num_steps)
    rows = [
        {"solver": name, "library": "ours", **measure(flow, noise, solution, ours, options, False)}
        for name, options in OURS.items()
    ]
    rows += [
        {"solver": name, "library": "diffusers", **measure(flow, noise, solution, *solver)}
        for name, solver in DIFFUSERS.items()
    ]
    return rows


def smallest(rows: list[dict], key: str, library: str, names: tuple[str, ...] | None = None) -> list[float]:
    """The smallest errors of a library, of the solvers that are named or of all, in the order of `NFES`."""
    chosen = [row for row in rows if row.get("library") == library and (names is None or row["solver"] in names)]
    return [min(filter(math.isfinite, errors)) for errors in zip(*(row[key] for row in chosen), strict=True)]


def add_ratios(rows: list[dict]) -> list[dict]:
    """Appends our smallest errors over diffusers' smallest: of the four that the targets name, and of all rows."""

    def ratios(name: str, names: tuple[str, ...] | None = None) -> dict:
        row = {"solver": f"our best / the best of diffusers' {name}"}
        for key, ratio in (("rmse", "ratio"), ("median", "median_ratio")):
            pairs = zip(smallest(rows, key, "ours"), smallest(rows, key, "diffusers", names), strict=True)
            row[ratio] = [mine / theirs for mine, theirs in pairs]
        return row

    has_all_named = set(NAMED_BY_TARGETS) <= {row["solver"] for row in rows}
    return [*rows, *([ratios("first four", NAMED_BY_TARGETS)] if has_all_named else []), ratios("rows")]


# Sections: each returns its rows, and the first line of its docstring is printed above its table


def bench_mixture(args) -> list[dict]:
    """Uniform grid, 5 Gaussians in 6 dimensions: root mean square error (median error of a sample)."""
    rows = add_ratios(measure_all(reference_mixture(), args.samples, args.reference_steps))
    row = rows[-2]
    row["target"] = [TARGETS[nfe] for nfe in NFES]
    row["met"] = [ratio <= target for ratio, target in zip(row["ratio"], row["target"], strict=True)]
    return rows


def bench_mixtures(args) -> list[dict]:
    """Uniform grid, geometric means over eight random mixtures of the same size."""
    tables = [measure_all(random_mixture(seed), args.samples // 4, args.reference_steps) for seed in range(8)]
    rows = []
    for same in zip(*tables, strict=True):
        row = dict(same[0])
        for key in ("rmse", "median"):
            row[key] = np.exp(np.log([other[key] for other in same]).mean(axis=0)).tolist()
        rows.append(row)
    return add_ratios(rows)


def bench_gaussian(args) -> list[dict]:
    """Uniform grid, one Gaussian in 6 dimensions."""
    return add_ratios(measure_all(gaussian(), args.samples // 4, args.reference_steps))


def bench_digits(args) -> list[dict]:
    """Uniform grid, 1,797 digits of 8 x 8 pixels, blurred a little: 64 dimensions."""
    return add_ratios(measure_all(digits(), args.samples // 64, args.reference_steps // 2))


def bench_best(args) -> list[dict]:
    """Best grid and options of every solver; the mixture and the noise of the first table."""
    flow = reference_mixture()
    noise, other_noise = (
        draw_noise(flow, count, seed) for count, seed in ((args.samples, SEED), (args.samples // 8, SEARCH_SEED))
    )
    solution, other_solution = (flow.solve(each, args.reference_steps) for each in (noise, other_noise))
    rows = []
    for name in (*OURS, "FlowMatchEuler", "FlowMatchHeun", "DPM++", "UniPC"):
        row = {"solver": name, "library": "ours" if name in OURS else "diffusers"}
        row |= {"rmse": [], "median": [], "calls": [], "options": []}
        for nfe in NFES:
            found = []
            for factory, options in search_space(name):
                rmse, _ = errors(integrate(flow, factory(nfe, **options), other_noise), other_solution)
                if math.isfinite(rmse):
                    found.append((rmse, factory, options))
            finalists = []
            for _, factory, options in [found[0], *sorted(found, key=lambda entry: entry[0])[:2]]:
                flow.calls = 0
                sample = integrate(flow, factory(nfe, **options), noise)
                finalists.append((*errors(sample, solution), options))
            rmse, median, options = min(finalists, key=lambda entry: entry[0])
            row["rmse"].append(rmse)
            row["median"].append(median)
            row["calls"].append(flow.calls)
            row["options"].append({key: value for key, value in options.items() if key not in OURS.get(name, {})})
        rows.append(row)
    return add_ratios(rows)


SECTIONS = {
    "mixture": bench_mixture,
    "best": bench_best,
    "mixtures": bench_mixtures,
    "gaussian": bench_gaussian,
    "digits": bench_digits,
}


# Results


def print_table(columns: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join([*columns, *(f"NFE {nfe}" for nfe in NFES)]) + " |")
    print("|---" * (len(columns) + len(NFES)) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def format_target(target: float, met: bool) -> str:
    return f"{target}: " + ("met" if met else "**missed**")


def format_cell(row: dict, i: int) -> str:
    """An error to three figures; where the calls are not those that the column names, their number beside it."""
    if "ratio" in row:
        cell = f"**{row['ratio'][i]:.2f}** ({row['median_ratio'][i]:.2f})"
        if "target" in row:
            cell += ", target " + format_target(row["target"][i], row["met"][i])
        return cell
    cell = f"{row['rmse'][i]:.2e} ({row['median'][i]:.1e})"
    if row["calls"][i] != NFES[i]:
        cell += f", {row['calls'][i]} calls"
    if row.get("options"):
        cell += ", " + (", ".join(f"{key} {value}" for key, value in row["options"][i].items()) or "as it comes")
    return cell


def print_readme_tables(sections: dict) -> None:
    """What the README shows of `sections`: errors on the uniform and on the best grids, and those on other data."""

    def cells(*rows: dict) -> list[str]:
        texts = []
        for i, nfe in enumerate(NFES):
            text = " / ".join(f"{row['rmse'][i]:.2g}".replace("e-0", "e-") for row in rows)
            calls = rows[0]["calls"][i]
            texts.append(text if calls == nfe else f"{text} ({calls} calls)")
        return texts

    if {"mixture", "best"} <= sections.keys():
        best = {row["solver"]: row for row in sections["best"]["rows"]}
        best["DPM++2M"] = best["DPM++"]  # whose options have the order
        lines = []
        for row in sections["mixture"]["rows"]:
            name = row["solver"]
            if "ratio" in row:
                lines.append([f"{name}, uniform grid", *(f"**{ratio:.2f}**" for ratio in row["ratio"])])
            else:
                rows = [row, best[name]] if name in best else [row]
                lines.append([f"`{name}`" if row["library"] == "ours" else f"diffusers' {name}", *cells(*rows)])
            if "target" in row:
                lines.append(["target", *map(format_target, row["target"], row["met"])])
        row = sections["best"]["rows"][-1]
        lines.append([f"{row['solver']}, best grids", *(f"**{ratio:.2f}**" for ratio in row["ratio"])])
        print_table(["solver"], lines)
        print()

    lines = []
    for section, data in OTHER_DATA.items():
        if section in sections:
            rows = sections[section]["rows"]
            chosen = {f"`{row['solver']}`": row for row in rows if row["solver"] in ("ab3", "abm3")}
            chosen["diffusers' best"] = {"rmse": smallest(rows, "rmse", "diffusers"), "calls": NFES}
            lines += [[data, name, *cells(row)] for name, row in chosen.items()]
    if lines:
        print_table(["data", "solver"], lines)
        print()


def draw_trajectories(path: Path) -> None:
    """
    A panel for each solver: its steps from the same noise (blue) and where they end (red), over the exact paths of the
    ODE (black), and the ends of 1,000 others (grey).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flow, limit = plane_mixture(), 2.3
    noise = draw_noise(flow, 4096, SEED)
    exact = flow.solve(noise, 200, output_path=True)
    figure, axes = plt.subplots(2, len(PANELS) // 2, figsize=(13, 5.7), layout="constrained")
    for panel, (name, (scheduler_class, config, nfe)) in zip(axes.flat, PANELS.items(), strict=True):
        scheduler = ours(nfe, scheduler_class, **config)
        flow.calls = 0
        states = integrate(flow, scheduler, noise, output_path=True)
        # Where steps begin, without the points at which their later stages ask for the velocity, and the end.
        states = torch.cat([states[: -1 : scheduler.order], states[-1:]])
        is_ode = scheduler_class is FlowMatchODEScheduler
        some = slice(16) if is_ode else slice(5)
        panel.plot(*states[-1, :1000].T, ".", color="0.7", markersize=2.5, markeredgewidth=0)
        if is_ode:
            panel.plot(*exact[:, some].permute(2, 0, 1), color="k", linewidth=0.5)
        style = {"linewidth": 0.9, "marker": ".", "markersize": 3} if is_ode else {"linewidth": 0.6}
        panel.plot(*states[:, some].permute(2, 0, 1), color="C0", **style)
        panel.plot(*states[-1, some].T, "o", color="C3", markersize=3.5)
        error = f", RMSE {errors(states[-1], exact[-1])[0]:.3f}" if is_ode else ""
        panel.set_title(f"{name}: {flow.calls} calls{error}", fontsize=9)
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = [*SECTIONS, "trajectories"]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="Default: all that can run.")
    parser.add_argument(
        "--samples", type=int, default=16384, help="Of the first table; the others have fewer. Default: 16384."
    )
    parser.add_argument("--reference_steps", type=int, default=400, help="Of the exact solution. Default: 400.")
    parser.add_argument("--quick", action="store_true", help="Few samples: whether everything runs.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads. Default: all cores.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"), help="Default: outputs/bench.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.samples, args.reference_steps = 256, 50

    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "benchmark_schedulers.json"
    results = json.loads(path.read_text()).get("sections", {}) if path.exists() else {}
    for name in args.only:
        needed = {"digits": "sklearn", "trajectories": "matplotlib"}.get(name)
        if needed is not None and importlib.util.find_spec(needed) is None:
            print(f"Section {name} is left out: it needs {needed}.\n")
            continue
        if name == "trajectories":
            draw_trajectories(args.output_dir / "trajectories.png")
            continue
        rows = SECTIONS[name](args)
        environment = describe_environment(Path(__file__).parent)
        facts = {"nfe": NFES, "seed": SEED, "samples": args.samples, "reference_steps": args.reference_steps}
        results[name] = {"rows": rows, **facts, "quick": args.quick, **environment}
        write_json(path, {"sections": results})
        print(f"### {name}\n\n{SECTIONS[name].__doc__.strip().splitlines()[0]}\n")
        print_table(["solver"], [[row["solver"], *(format_cell(row, i) for i in range(len(NFES)))] for row in rows])
        versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
        print(f"\n{environment['hardware']}, {versions}, seed {SEED}, commit {environment['commit']}.\n")
    print_readme_tables(results)
    print(f"Written to {args.output_dir}")


if __name__ == "__main__":
    main()
