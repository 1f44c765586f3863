"""Target loads: shares, whole counts, and the error that the step rules act on."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.routing.targets import load_error, target_counts, target_shares

properties = settings(deadline=None, derandomize=True, max_examples=100)


def test_shares_are_normalised():
    assert target_shares([1, 1, 2], 3).tolist() == [0.25, 0.25, 0.5]
    assert target_shares(None, 3) is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([1, 2], "one load for each of the 3 experts, got 2"),
        ([1, 2, 0], "finite numbers above 0"),
        ([1, 2, -1], "finite numbers above 0"),
        ([1, 2, math.inf], "finite numbers above 0"),
        ([1, 2, math.nan], "finite numbers above 0"),
    ],
)
def test_refusals(target, message):
    with pytest.raises(ValueError, match=message):
        target_shares(target, 3)


@properties
@given(
    load=st.lists(st.integers(0, 10**6), min_size=1, max_size=8), weights=st.randoms(), equal=...
)
def test_error_and_counts_equal_fractions(load, weights, equal: bool):
    target = [1 if equal else weights.randint(1, 9) for _ in load]
    given_target = None if equal and weights.random() < 0.5 else target
    shares = target_shares(given_target, len(load))
    total, parts = sum(load), sum(target)
    expected = [
        len(load) * (Fraction(c, total) - Fraction(w, parts)) if total else 0
        for c, w in zip(load, target, strict=True)
    ]
    error = load_error(torch.tensor(load), shares).tolist()
    assert error == pytest.approx([float(e) for e in expected], abs=1e-9)
    # A sign decides a step: what is on target must be exactly zero.
    assert [(e > 0) - (e < 0) for e in error] == [(e > 0) - (e < 0) for e in expected]
    counts = target_counts(shares, torch.tensor(total), len(load)).tolist()
    assert counts == [total * w // parts for w in target]


def test_a_share_that_rounds_down_does_not_lose_an_assignment():
    # 0.7 * 90 is below 63 in binary.
    assert target_counts(target_shares([7, 3], 2), torch.tensor(90), 2).tolist() == [63, 27]
