# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_dyna.training.randomness import keyed_generator, keyed_randn, keyed_seed, keyed_uniform


def test_seeds_differ_with_every_part_of_the_key():
    seeds = [
        keyed_seed(seed, stream, *key)
        for seed in (0, 1, 12)
        for stream in ("noise", "time")
        for key in ((), (0,), (1,), (0, 0), (1, 0), (0, 1), (10, 1), (1, 1), (101,))
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_sample_gets_the_same_whatever_is_drawn_beside_it_or_before_it():
    together = keyed_randn(3, "noise", [4, 5, 6], (2, 3))
    torch.randn(100)
    for row, index in enumerate((4, 5, 6)):
        alone = keyed_randn(3, "noise", [index], (2, 3))[0]
        assert torch.equal(together[row], alone)
        assert torch.equal(alone, torch.randn(2, 3, generator=keyed_generator(3, "noise", index)))
    assert torch.equal(keyed_uniform(3, "time", [4, 5])[1:], keyed_uniform(3, "time", [5]))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    keyed_randn(0, "noise", range(4), (3, 8, 8))
    keyed_uniform(0, "time", range(4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stream", ["noise", "validation"])
def test_noise_is_standard_normal_over_samples(stream):
    noise = keyed_randn(0, stream, range(20000), (2,))
    # 20,000 independent pairs: standard errors 0.007 (mean), 0.005 (std), 0.007 (correlation); 4 of them
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), atol=0.028, rtol=0)
    torch.testing.assert_close(noise.std(0), torch.ones(2), atol=0.02, rtol=0)
    assert torch.corrcoef(noise.T)[0, 1].abs() < 0.028
    neighbours = torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))
    assert neighbours[0, 1].abs() < 0.028


def test_uniform_numbers_are_uniform_over_samples():
    numbers = keyed_uniform(0, "time", range(20000)).sort().values
    expected = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) = 0.0115 at the 1 % level
    assert (numbers - expected).abs().max() < 0.0115


def test_uniform_numbers_of_a_shape_are_each_samples_own():
    numbers = keyed_uniform(0, "gates", [5, 9], (3, 4))
    assert numbers.shape == (2, 3, 4)
    assert numbers.unique().numel() == 24
    assert torch.equal(numbers[1:], keyed_uniform(0, "gates", [9], (3, 4)))
    assert not torch.equal(numbers, keyed_uniform(1, "gates", [5, 9], (3, 4)))
