"""Isotonic regression, and the pooling of neighbours by ratios."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression as scipy_isotonic

from drgr.numerics import isotonic_blocks, isotonic_regression

properties = settings(deadline=None, derandomize=True, max_examples=100)

entries = st.floats(-3, 3) | st.sampled_from([-1.0, 0.0, 0.5, 1.0])
sequences = st.lists(st.tuples(entries, st.floats(0.01, 10) | st.just(1.0)), min_size=1).map(
    lambda pairs: tuple(column(part) for part in zip(*pairs, strict=True))
)
# Exact in floats; denominators are often 0.
ratios = st.lists(
    st.tuples(st.integers(-4, 4), st.sampled_from([0, 0, 1, 2, 3])).map(
        lambda pair: (abs(pair[0]) if pair[1] == 0 else pair[0], pair[1])
    ),
    min_size=1,
    max_size=12,
)


def column(values):
    return torch.tensor(values, dtype=torch.float64)


def expected_fit(values, weights=None):
    return torch.from_numpy(scipy_isotonic(np.asarray(values), weights=weights).x)


def hard_sequences():
    """Long sequences; in the last three one block grows by a neighbour a round."""
    steps = torch.arange(3000, dtype=torch.float64)
    noise = torch.randn(3000, dtype=torch.float64)
    return {
        "noise": noise,
        "trend": steps / 100 + noise,
        "walk": noise.cumsum(0),
        "heavy tails": noise / torch.rand(3000).double(),
        "few values": (2 * noise).round(),
        "decreasing": -steps,
        "concave decreasing": -steps.square(),
        "convex decreasing": -steps.sqrt(),
        "increasing": steps.square(),
        "a low end": torch.where(steps == 2999, -1e9, steps),
        "a high start": torch.where(steps == 0, 1e9, steps),
        "a hump": -(steps - 1500).square(),
    }


@properties
@given(sequence=sequences, scale=st.sampled_from([1e-9, 1.0, 1e9]))
def test_meets_scipy(sequence, scale):
    values, weights = sequence
    found = isotonic_regression(values * scale, weights=weights / scale)
    expected = expected_fit(values, weights) * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)
    plain = isotonic_regression(values)
    torch.testing.assert_close(plain, expected_fit(values), rtol=0, atol=1e-13)


@pytest.mark.parametrize("num", [2, 13, 50])
def test_meets_the_quadratic_solver(nearest, num):
    values, weights = torch.randn(num).double(), torch.rand(num).double() + 0.1
    expected = nearest(values, lambda x: [x[1:] >= x[:-1]], weights=weights.numpy())
    found = isotonic_regression(values, weights=weights)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("name", hard_sequences())
def test_long_sequences_meet_scipy(name):
    values = hard_sequences()[name]
    size = float(values.abs().max())
    found = isotonic_regression(values)
    torch.testing.assert_close(found, expected_fit(values), rtol=0, atol=1e-13 * size)


def test_a_batch_of_hard_sequences_equals_the_loop():
    together = torch.stack(list(hard_sequences().values())).reshape(2, 6, -1)
    weights = torch.rand(together.shape).double() + 0.5
    plain = isotonic_regression(together)
    weighted = isotonic_regression(together, weights=weights)
    for index in np.ndindex(2, 6):
        assert torch.equal(plain[index], isotonic_regression(together[index]))
        alone = isotonic_regression(together[index], weights=weights[index])
        assert torch.equal(weighted[index], alone)


def test_equal_means_do_not_decrease_by_rounding():
    values = torch.randint(0, 4, (300, 400)).double() / 3
    found = isotonic_regression(values)
    assert (found.diff(dim=-1) >= 0).all()


def test_a_hundred_thousand_values_meet_scipy():
    values = torch.randn(100_000).double() + torch.linspace(0, 9, 100_000).double()
    torch.testing.assert_close(
        isotonic_regression(values), expected_fit(values), rtol=0, atol=1e-12
    )


@properties
@given(sequence=sequences, data=st.data())
def test_is_monotone_optimal_idempotent_and_non_expansive(sequence, data):
    values, weights = sequence
    found = isotonic_regression(values, weights=weights)
    assert (found[1:] >= found[:-1]).all()
    # Moreau: the residual is in the polar of the cone, and orthogonal to the fit.
    residual = weights * (values - found)
    tails = residual.flip(0).cumsum(0).flip(0)
    assert abs(float(tails[0])) <= 1e-11
    assert (tails[1:] <= 1e-11).all()
    assert abs(float(residual @ found)) <= 1e-10
    again = isotonic_regression(found, weights=weights)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-14)
    size = len(values)
    other = column(data.draw(st.lists(entries, min_size=size, max_size=size)))
    moved = isotonic_regression(other, weights=weights)
    distance = (weights * (found - moved).square()).sum()
    assert distance <= (weights * (values - other).square()).sum() * (1 + 1e-12) + 1e-13


@properties
@given(sequence=sequences, scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_is_equivariant_to_scale_shift_and_reversal(sequence, scale, shift):
    values, weights = sequence
    found = isotonic_regression(values, weights=weights)
    changed = isotonic_regression(values * scale + shift, weights=weights * 7)
    torch.testing.assert_close(changed, found * scale + shift, rtol=0, atol=1e-12)
    mirrored = isotonic_regression(-values.flip(0), weights=weights.flip(0))
    torch.testing.assert_close(mirrored, -found.flip(0), rtol=0, atol=1e-13)


@properties
@given(pairs=ratios)
def test_blocks_of_ratios_increase_and_cannot_be_split(pairs):
    tops, bottoms = (column([float(pair[part]) for pair in pairs]) for part in (0, 1))
    blocks = isotonic_blocks(tops, bottoms)
    assert blocks.dtype == torch.int64
    steps = blocks.diff().tolist()
    assert blocks[0] == 0
    assert set(steps) <= {0, 1}

    def total(members):
        exact = [(Fraction(pairs[i][0]), Fraction(pairs[i][1])) for i in members]
        return tuple(sum((entry[part] for entry in exact), Fraction(0)) for part in (0, 1))

    def exceeds(left, right):
        return left[0] * right[1] > right[0] * left[1]

    parts = [
        [i for i, block in enumerate(blocks.tolist()) if block == label]
        for label in range(int(blocks[-1]) + 1)
    ]
    for left, right in pairwise(parts):
        assert not exceeds(total(left), total(right))
        assert (0, 0) not in (total(left), total(right))
    for part in parts:
        for size in range(1, len(part)):
            assert not exceeds(total(part[size:]), total(part[:size]))


def test_infinite_and_undefined_ratios():
    def blocks(tops, bottoms):
        return isotonic_blocks(column(tops), column(bottoms)).tolist()

    # inf last stays apart; inf before a number is pooled with it; 0/0 does not hide a violation.
    assert blocks([1.0, 2, 3], [1.0, 1, 0]) == [0, 1, 2]
    assert blocks([3.0, 1, 9], [0.0, 1, 1]) == [0, 0, 1]
    assert blocks([5.0, 0, 3], [1.0, 0, 1]) == [0, 0, 0]
    assert blocks([1.0, 0, 3], [1.0, 0, 1]) == [0, 0, 1]
    assert blocks([0.0, 0, 3, 4], [0.0, 0, 1, 1]) == [0, 0, 0, 1]
    assert blocks([0.0, 0], [0.0, 0]) == [0, 0]
    assert blocks([1.0, 1], [0.0, 0]) == [0, 1]


def test_sums_over_the_blocks_of_a_batch():
    tops, bottoms = torch.rand(5, 40), torch.rand(5, 40) + 0.1
    together = isotonic_blocks(tops, bottoms)
    for row in range(5):
        assert torch.equal(together[row], isotonic_blocks(tops[row], bottoms[row]))
    for scale in (1e-30, 1e30):
        assert torch.equal(isotonic_blocks(tops * scale, bottoms * scale), together)
    assert not isotonic_blocks(tops.requires_grad_(), bottoms).requires_grad


def test_jacobian_is_that_of_the_block_means():
    values, weights = column([3.0, 1.0, 1.5, 9.0, 8.0, 8.0]), column([1, 2, 1, 1, 1, 2])

    def fit(v):
        return isotonic_regression(v, weights=weights)

    blocks = isotonic_blocks(values * weights, weights)
    assert blocks.tolist() == [0, 0, 0, 1, 1, 1]
    same = (blocks.unsqueeze(0) == blocks.unsqueeze(1)).double()
    expected = same * weights / (same @ weights).unsqueeze(-1)
    torch.testing.assert_close(torch.autograd.functional.jacobian(fit, values), expected)


def test_derivatives(check_derivatives):
    values, weights = torch.randn(3, 7).double(), torch.rand(3, 7).double() + 0.5
    check_derivatives(lambda v, w: isotonic_regression(v, weights=w).sin(), values, weights)
    # Weights that broadcast collect the derivatives of all rows.
    check_derivatives(lambda w: isotonic_regression(values, weights=w).sin(), weights[0])


def test_float32_keeps_its_digits_over_long_blocks():
    values = 1000 - torch.linspace(0, 1, 200_000)
    found = isotonic_regression(values)
    torch.testing.assert_close(found, torch.full_like(values, 999.5), rtol=0, atol=2e-4)


def test_weights_and_values_of_any_magnitude():
    values, weights = torch.randn(3, 9), torch.rand(3, 9) + 0.5
    expected = isotonic_regression(values, weights=weights)
    for scale in (1e-30, 1e30):
        found = isotonic_regression(values * scale, weights=weights * scale)
        torch.testing.assert_close(found / scale, expected)


def test_every_float_type(check_dtypes):
    check_dtypes(isotonic_regression, torch.randn(3, 12))


def test_empty_batches_and_single_values():
    assert isotonic_regression(torch.tensor([4.0])).tolist() == [4.0]
    values = torch.zeros(0, 3, requires_grad=True)
    found = isotonic_regression(values)
    assert found.shape == (0, 3)
    found.sum().backward()
    assert isotonic_blocks(torch.zeros(0, 3), torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("values", "weights", "error", "message"),
    [
        (torch.ones(3).long(), None, TypeError, "values must be a floating-point tensor, got"),
        (torch.ones(0), None, ValueError, r"values must have shape \(\.\.\., n\) with n >= 1, got"),
        (column([1, torch.nan]), None, ValueError, "values must be finite, got nan at index 1"),
        (torch.ones(2), column([1, 0]), ValueError, "weights must be finite and above 0, got 0.0"),
        (torch.ones(2), torch.ones(3), ValueError, r"weights must .* broadcast to shape \(2,\)"),
    ],
)
def test_wrong_arguments_of_the_regression(values, weights, error, message):
    with pytest.raises(error, match=message):
        isotonic_regression(values, weights=weights)


@pytest.mark.parametrize(
    ("tops", "bottoms", "error", "message"),
    [
        ([1.0, torch.inf], [1.0, 1], ValueError, "numerators must be finite, got inf at index 1"),
        ([1.0, 1], [1.0, -1], ValueError, "denominators must be finite and at least 0, got -1.0"),
        ([1.0, 1], [1.0], ValueError, r"denominators must have the shape .* \(2,\), got \(1,\)"),
        ([1.0, -1], [1.0, 0], ValueError, "numerators must be at least 0 where denominators are 0"),
        ([1], [1.0], TypeError, r"numerators must be a floating-point tensor, got torch\.int64"),
    ],
)
def test_wrong_arguments_of_the_blocks(tops, bottoms, error, message):
    with pytest.raises(error, match=message):
        isotonic_blocks(torch.tensor(tops), torch.tensor(bottoms))
