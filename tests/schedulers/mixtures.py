# SPDX-License-Identifier: Apache-2.0
"""Distributions whose velocity on every path is known in closed form, and Gaussians whose ODE is solved."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_dyna import FlowMatchPath


REFERENCE_FILE = Path(__file__).parents[1] / "data" / "sit_paths.safetensors"


class Mixture:
    """
    The Gaussian mixture sum_k w_k N(mean_k, std_k^2 I) in D dimensions, noised along a path.

    At sigma, component k is N(a mean_k, (a std_k)^2 + b^2), so the noise in x is a mean over the components, weighted
    by their posterior probabilities; everything else follows from it and from E[data | x].
    """

    def __init__(self, log_weights: torch.Tensor, means: torch.Tensor, std: torch.Tensor, path: str = "linear"):
        self.log_weights, self.means, self.std, self.path = log_weights, means, std, FlowMatchPath(path)

    def velocity(self, sample: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[da data + db noise | x], where each component's share of db * b is finite at sigma = 0."""
        c = self.path.coefficients(float(sigma))
        a, b, da, b_db = (value.to(sample.dtype) for value in (c.a, c.b, c.da, c.b_db))
        variance = (a * self.std) ** 2 + b**2  # (K,)
        difference = sample[:, None] - a * self.means  # (B, K, D)
        dim = sample.shape[1]
        log_posterior = (
            self.log_weights - difference.square().sum(dim=2) / (2 * variance) - dim / 2 * variance.log()
        ).softmax(dim=1)
        slope = (a * da * self.std**2 + b_db) / variance
        velocities = da * self.means + slope[:, None] * difference
        return (log_posterior[..., None] * velocities).sum(dim=1)

    def sample(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """Exact samples of the data."""
        component = torch.multinomial(self.log_weights.exp(), number, replacement=True, generator=generator)
        noise = torch.randn(number, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.std[component, None] * noise


class Gaussian(Mixture):
    """The mixture with one component: x keeps its quantile along the ODE."""

    def __init__(self, mean: float = 0.7, std: float = 0.4, path: str = "linear", dtype: torch.dtype = torch.float64):
        self.mean, self.deviation = mean, std
        super().__init__(
            torch.zeros(1, dtype=dtype), torch.full((1, 1), mean, dtype=dtype), torch.tensor([std], dtype=dtype), path
        )

    def solution(self, sample: torch.Tensor, sigma: float, end: float = 0.0) -> torch.Tensor:
        """Where the ODE takes `sample` from `sigma` to `end`."""

        def location_and_scale(sigma):
            c = self.path.coefficients(sigma)
            return c.a * self.mean, ((c.a * self.deviation) ** 2 + c.b**2).sqrt()

        (mean, scale), (end_mean, end_scale) = location_and_scale(sigma), location_and_scale(end)
        return end_mean + end_scale * (sample - mean) / scale


def reference_mixture(path: str = "linear") -> tuple[Mixture, dict[str, torch.Tensor]]:
    """The mixture of 5 components in 6 dimensions of the reference file, and the file."""
    reference = load_file(REFERENCE_FILE)
    return Mixture(reference["gmm.logw"], reference["gmm.means"], reference["gmm.std"], path), reference
