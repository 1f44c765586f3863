"""Unbiasedness by enumeration of all batches and by simulation, and what it costs."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch.autograd import gradcheck

from drgr.ambiguity import KL, ChiSquare, CVaR, Status, worst_case
from drgr.ambiguity.multilevel import Multilevel

POPULATION = torch.tensor([0.0, 0.7, 2.5], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SETS = pytest.mark.parametrize(
    ("divergence", "level"),
    [
        (KL(), {"penalty": 0.6}),
        (KL(), {"radius": 0.2}),
        (ChiSquare(), {"penalty": 0.6}),
        (ChiSquare(), {"radius": 0.2}),
        (CVaR(0.4), {}),
    ],
    ids=["kl-penalty", "kl-radius", "chi_square-penalty", "chi_square-radius", "cvar"],
)


def all_batches(size, population=POPULATION, shares=SHARES):
    """Every batch of independent draws, with its probability."""
    picks = torch.tensor(list(itertools.product(range(len(population)), repeat=size)))
    return population[picks], shares[picks].prod(dim=1), picks


def expected_worst_case(size, divergence, level):
    batches, probabilities, _ = all_batches(size)
    return probabilities @ worst_case(batches, divergence=divergence, **level).value


def expected_estimate(scheme, divergence, level, *, shift=None):
    """Expectation over the level and over all batches; ``shift`` moves each member's loss."""
    total = torch.zeros((), dtype=torch.float64)
    for chosen in range(1, scheme.levels + 1):
        batches, probabilities, picks = all_batches(scheme.batch_size(chosen))
        if shift is not None:
            batches = batches + shift[picks]
        for losses, probability in zip(batches, probabilities, strict=True):
            estimate = scheme.estimate(losses, chosen, divergence=divergence, **level)
            total = total + scheme.probability(chosen) * probability * estimate
    return total


@SETS
def test_the_expectation_is_exactly_that_of_the_large_batch(divergence, level):
    found = expected_estimate(Multilevel(smallest=1, levels=2), divergence, level)
    large, small = (expected_worst_case(size, divergence, level) for size in (4, 1))
    assert found.item() == pytest.approx(large.item(), rel=1e-10)
    # The small batch itself is far off: its expectation is the mean.
    assert small.item() == pytest.approx((SHARES @ POPULATION).item())
    assert large - small > 0.1


@SETS
def test_parts_of_more_than_one_sample(divergence, level):
    scheme = Multilevel(smallest=2, levels=1)
    found = expected_estimate(scheme, divergence, level)
    assert found.item() == pytest.approx(expected_worst_case(4, divergence, level).item())
    assert scheme.probability(1) == 1.0


def test_draws_without_replacement_are_exchangeable_enough():
    losses = torch.tensor([0.0, 0.4, 1.0, 3.0], dtype=torch.float64)
    scheme, total = Multilevel(smallest=1, levels=2), 0.0
    for chosen in (1, 2):
        orders = list(itertools.permutations(range(4), scheme.batch_size(chosen)))
        for order in orders:
            estimate = scheme.estimate(losses[list(order)], chosen, divergence=KL(), penalty=0.5)
            total += scheme.probability(chosen) * estimate.item() / len(orders)
    assert total == pytest.approx(worst_case(losses, divergence=KL(), penalty=0.5).value.item())


@SETS
def test_the_gradient_has_the_expectation_of_the_large_batch(divergence, level):
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = expected_estimate(Multilevel(smallest=1, levels=2), divergence, level, shift=shift)
    (gradient,) = torch.autograd.grad(found, shift)
    batches, probabilities, picks = all_batches(4)
    weights = worst_case(batches, divergence=divergence, **level).weights
    expected = torch.zeros(3, dtype=torch.float64)
    for member in range(3):
        expected[member] = probabilities @ (weights * (picks == member)).sum(dim=1)
    torch.testing.assert_close(gradient, expected)
    assert (gradient - SHARES).abs().max() > 0.02


def exponential(*shape, generator):
    return -torch.log1p(-torch.rand(shape, dtype=torch.float64, generator=generator))


def test_simulated_draws_hit_the_large_batch_where_small_ones_miss_it():
    generator = torch.Generator().manual_seed(7)
    scheme, arguments = Multilevel(smallest=4, levels=4), {"divergence": KL(), "penalty": 2.0}
    small, large = (
        worst_case(exponential(8000, size, generator=generator), **arguments).value.numpy()
        for size in (4, 64)
    )
    estimates, spent = [], 0
    for _ in range(500):
        level = scheme.sample(generator)
        losses = exponential(scheme.batch_size(level), generator=generator)
        estimates.append(scheme.estimate(losses, level, **arguments).item())
        spent += len(losses)

    def z_score(sample):
        error = math.hypot(*(s.std() / math.sqrt(len(s)) for s in (sample, large)))
        return abs(sample.mean() - large.mean()) / error

    estimates = np.array(estimates)
    assert z_score(estimates) < 3
    assert z_score(small) > 10
    assert abs(estimates.mean() - small.mean()) > 3 * estimates.std() / math.sqrt(len(estimates))
    assert spent / len(estimates) == pytest.approx(scheme.expected_batch_size, rel=0.1)


@SETS
def test_the_mean_over_parts_varies_less_than_the_first_part(divergence, level):
    scheme, moments = Multilevel(smallest=1, levels=2), torch.zeros(2, dtype=torch.float64)
    for chosen in (1, 2):
        batches, probabilities, _ = all_batches(scheme.batch_size(chosen))
        for losses, probability in zip(batches, probabilities, strict=True):
            parts, halves, whole = scheme.worst_cases(
                losses, chosen, divergence=divergence, **level
            )
            assert parts.status is halves.status is whole.status is Status.CONVERGED
            difference = (whole.value - halves.value.mean()) / scheme.probability(chosen)
            ours = scheme.estimate(losses, chosen, divergence=divergence, **level)
            published = parts.value[0] + difference
            moment = torch.stack([ours, published]).square()
            moments += scheme.probability(chosen) * probability * moment
    # The expectations are equal, so the second moments order the variances.
    assert moments[0] < moments[1]


def test_levels_are_drawn_with_their_probability():
    scheme, generator = Multilevel(smallest=3, levels=4), torch.Generator().manual_seed(1)
    drawn = [scheme.sample(generator) for _ in range(4000)]
    assert [scheme.probability(level) for level in (1, 2, 3, 4)] == [0.5, 0.25, 0.125, 0.125]
    for level in (1, 2, 3, 4):
        expected = scheme.probability(level)
        error = math.sqrt(expected * (1 - expected) / len(drawn))
        assert abs(drawn.count(level) / len(drawn) - expected) < 4 * error
    assert scheme.expected_batch_size == 15
    sizes = [scheme.probability(level) * scheme.batch_size(level) for level in (1, 2, 3, 4)]
    assert sum(sizes) == 15
    assert {Multilevel(smallest=1, levels=1).sample() for _ in range(5)} == {1}


def test_equal_seeds_draw_equal_levels():
    scheme = Multilevel(smallest=1, levels=9)
    first, second = (
        [scheme.sample(torch.Generator().manual_seed(seed)) for seed in range(30)] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 3


def corrections(scheme, share, **arguments):
    """Second moment of the scaled differences for losses that are 1 with probability ``share``."""
    total = 0.0
    for level in range(1, scheme.levels + 1):
        half = scheme.batch_size(level) // 2
        values = {}
        for size in (half, 2 * half):
            ones = torch.arange(size) < torch.arange(size + 1).unsqueeze(1)
            values[size] = worst_case(ones.double(), **arguments).value.numpy()
        count = np.arange(half + 1)
        mass = binom.pmf(count, half, share)
        pair = values[half][:, None] + values[half][None, :]
        difference = values[2 * half][np.add.outer(count, count)] - pair / 2
        total += (mass[:, None] * mass * difference**2).sum() / scheme.probability(level)
    return total


def largest_second_moment(levels, **arguments):
    scheme = Multilevel(smallest=4, levels=levels)
    return max(corrections(scheme, 2.0**-power, **arguments) for power in range(1, levels + 4))


def test_penalties_and_tails_bound_the_variance_and_a_kl_ball_does_not():
    for divergence in (KL(), ChiSquare()):
        few, many = (
            largest_second_moment(levels, divergence=divergence, penalty=0.3) for levels in (4, 6)
        )
        assert many < 1.5 * few
    few, many = (largest_second_moment(levels, divergence=CVaR(0.2)) for levels in (4, 6))
    assert many < 1.5 * few
    few, many = (largest_second_moment(levels, divergence=KL(), radius=0.5) for levels in (4, 6))
    assert many > 1.8 * few


@SETS
def test_gradcheck_and_weights_that_sum_to_one(divergence, level):
    scheme = Multilevel(smallest=2, levels=3)
    losses = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def estimate(x):
        return scheme.estimate(x, 2, divergence=divergence, **level)

    assert gradcheck(estimate, (losses,), atol=1e-6)
    (gradient,) = torch.autograd.grad(estimate(losses), losses)
    assert gradient.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    losses = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=dtype, requires_grad=True)
    scheme = Multilevel(smallest=2, levels=1)
    value = scheme.estimate(losses, 1, divergence=KL(), penalty=1.0)
    value.backward()
    assert value.dtype == torch.float32
    assert losses.grad.dtype == dtype


def test_equal_losses_and_radius_zero_are_plain_means():
    scheme, losses = Multilevel(smallest=2, levels=2), torch.randn(8, dtype=torch.float64)
    zero = scheme.estimate(losses, 2, divergence=KL(), radius=0.0)
    torch.testing.assert_close(zero, losses.mean())
    equal = scheme.estimate(torch.full((8,), 3.0), 2, divergence=ChiSquare(), penalty=1.0)
    assert equal.item() == pytest.approx(3)


def test_bad_arguments():
    for arguments in ({"smallest": 0, "levels": 2}, {"smallest": 2, "levels": 0}):
        with pytest.raises(ValueError, match=r"(smallest|levels) must be at least 1, got 0"):
            Multilevel(**arguments)
    scheme = Multilevel(smallest=2, levels=3)
    for level in (0, 4):
        for method in (scheme.probability, scheme.batch_size):
            with pytest.raises(ValueError, match=rf"level must lie in 1 .. 3, got {level}; take"):
                method(level)
    with pytest.raises(ValueError, match=r"losses must have shape \(8,\), got \(4,\)"):
        scheme.estimate(torch.zeros(4), 2, divergence=KL(), penalty=1.0)
    with pytest.raises(TypeError, match="losses must be a floating-point tensor"):
        scheme.estimate(torch.zeros(8, dtype=torch.int64), 2, divergence=KL(), penalty=1.0)
    with pytest.raises(ValueError, match="exactly one of radius and penalty"):
        scheme.estimate(torch.zeros(8), 2, divergence=KL())
