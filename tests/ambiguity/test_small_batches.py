"""The bias of a mini-batch: its worst case is lower in the mean than that of all samples."""

import itertools

import pytest
import torch

from drgr.ambiguity import KL, worst_case

DOUBLE = torch.float64


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_the_mean_over_all_batches_is_at_most_the_value_of_all_samples(sized, size):
    losses = torch.randn(8, dtype=DOUBLE).exp()
    level = sized.level(radius=0.2 * sized.case.curvature, penalty=0.5)
    batches = losses[torch.tensor(list(itertools.combinations(range(8), size)))]
    inside = worst_case(batches, divergence=sized.case.divergence, **level).value.mean()
    whole = worst_case(losses, divergence=sized.case.divergence, **level).value
    mean = losses.mean()
    assert mean - 1e-12 <= inside <= whole + 1e-12
    if size == 1:
        torch.testing.assert_close(inside, mean)


def test_bias_of_penalized_kl_is_the_variance_of_its_weights():
    """``lam / (2 n) chi^2(q* || p)`` to first order, with Pearson's chi-square."""
    generator = torch.Generator().manual_seed(0)
    population = torch.rand(400, dtype=DOUBLE, generator=generator)
    size, penalty, draws = 32, 0.3, 40_000
    whole = worst_case(population, divergence=KL(), penalty=penalty)
    batches = population[torch.randint(400, (draws, size), generator=generator)]
    values = worst_case(batches, divergence=KL(), penalty=penalty).value
    bias = whole.value - values.mean()
    predicted = penalty / (2 * size) * (400 * whole.weights.square().sum() - 1)
    error = values.std() / draws**0.5
    assert abs(bias - predicted) < 4 * error + 0.1 * predicted
    assert predicted > 10 * error
