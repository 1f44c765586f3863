"""Inequality and frequency groups, against pairs and hand counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drgr.evaluation import frequency_groups, gini


@given(st.lists(st.floats(0, 100), min_size=1, max_size=15))
def test_gini_against_pairs(values):
    total = sum(values)
    pairs = sum(abs(a - b) for a in values for b in values)
    expected = pairs / (2 * len(values) * total) if total > 0 else 0.0
    found = gini(torch.tensor(values, dtype=torch.float64))
    assert found == pytest.approx(expected, abs=1e-9)
    assert -1e-12 <= found <= 1 - 1 / len(values) + 1e-12


def test_gini_of_known_cases():
    assert gini(torch.tensor([2.0, 2.0, 2.0])) == 0
    assert gini(torch.tensor([0.0, 0.0, 0.0, 5.0])) == pytest.approx(0.75)


@pytest.mark.parametrize("values", [[], [-1.0, 2.0], [float("nan")]])
def test_gini_refuses(values):
    with pytest.raises(ValueError, match="finite and not negative"):
        gini(torch.tensor(values))


def test_groups_by_hand():
    # In order of frequency: ids 3 (0), 1 (1), 4 (1), 0 (2), 2 (6) of ten tokens; their middles lie
    # at 0, 0.05, 0.15, 0.3 and 0.7 of the text.
    counts = torch.tensor([2, 1, 6, 0, 1])
    assert frequency_groups(counts, num_groups=10).tolist() == [3, 0, 7, 0, 1]
    assert frequency_groups(counts, num_groups=2).tolist() == [0, 0, 1, 0, 0]
    assert frequency_groups(counts, num_groups=1).tolist() == [0] * 5


def test_equal_counts_make_equal_groups():
    groups = frequency_groups(torch.full((40,), 7), num_groups=10)
    assert torch.bincount(groups).tolist() == [4] * 10


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 12))
def test_more_frequent_tokens_are_in_later_groups(counts, num_groups):
    if not any(counts):
        return
    groups = frequency_groups(torch.tensor(counts), num_groups=num_groups).tolist()
    assert all(0 <= group < num_groups for group in groups)
    pairs = sorted(zip(counts, groups, strict=True))
    assert [group for _, group in pairs] == sorted(groups)
    # No group holds more than its share and one token too many at each end.
    for group in range(num_groups):
        held = [count for count, own in zip(counts, groups, strict=True) if own == group]
        assert sum(held) <= sum(counts) / num_groups + max(held, default=0)


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1]])
def test_groups_refuse(counts):
    with pytest.raises(ValueError, match="counts must not be negative and not all 0"):
        frequency_groups(torch.tensor(counts, dtype=torch.int64))
