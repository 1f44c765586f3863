"""Counts of assignments and the two balance metrics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.routing import expert_load, max_violation, min_violation

properties = settings(deadline=None, derandomize=True, max_examples=100)


@properties
@given(num_tokens=st.integers(0, 9), num_experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_load_counts_kept_candidates_one_by_one(num_tokens, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (num_tokens, 3), generator=generator)
    keep = torch.rand(num_tokens, 3, generator=generator) < 0.6
    expected = [0] * num_experts
    for row_ids, row_keep in zip(ids.tolist(), keep.tolist(), strict=True):
        for expert, kept in zip(row_ids, row_keep, strict=True):
            expected[expert] += kept
    load = expert_load(ids, keep, num_experts)
    assert load.tolist() == expected
    assert load.dtype == torch.int64


def test_violations_by_hand():
    load = torch.tensor([6, 3, 2, 1])
    assert float(max_violation(load)) == 1.0
    assert float(min_violation(load)) == pytest.approx(-2 / 3)


def test_extremes():
    assert float(max_violation(torch.tensor([5, 5, 5]))) == 0.0
    assert float(min_violation(torch.tensor([5, 5, 5]))) == 0.0
    collapsed = torch.tensor([0, 0, 7, 0, 0])
    assert float(max_violation(collapsed)) == 4.0
    assert float(min_violation(collapsed)) == -1.0


def test_one_value_for_each_layer():
    load = torch.tensor([[2, 2], [4, 0], [3, 1]])
    assert max_violation(load).tolist() == [0.0, 1.0, 0.5]
    assert min_violation(load).tolist() == [0.0, -1.0, -0.5]


def test_large_counts_lose_no_digit():
    load = torch.tensor([2**40 + 1, 2**40 - 1])
    assert float(max_violation(load)) == 2.0**-40


def test_a_layer_without_assignments_is_balanced():
    assert float(max_violation(torch.zeros(4))) == float(min_violation(torch.zeros(4))) == 0
