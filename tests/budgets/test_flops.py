"""The FLOP formulas: against terms added by hand, and by their proportions."""

import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drgr.budgets.flops import FlopModel, forward_flops, training_flops

COSTS = FlopModel(
    dense_per_token=100.0, per_assignment=10.0, attention_per_pair=1.0, head_per_token=40.0
)
counts = st.integers(min_value=0, max_value=10**6)


def test_forward_adds_tokens_assignments_and_pairs():
    # Two sequences of four: 8 tokens, 2 * 4 * 4 = 32 pairs, two experts for each token.
    assert forward_flops(COSTS, tokens=8, sequence_length=4, assignments=16) == 800 + 160 + 32


def test_training_is_three_forward_passes():
    assert training_flops(COSTS, tokens=8, sequence_length=4, assignments=16) == 3 * 992


def test_checkpointing_repeats_everything_but_the_head():
    spend = training_flops(
        COSTS, tokens=8, sequence_length=4, assignments=16, gradient_checkpointing=True
    )
    assert spend == 4 * 992 - 8 * 40


@given(tokens=counts, length=counts, assignments=counts, skipped=counts)
def test_a_skipped_assignment_saves_one_expert_three_times(tokens, length, assignments, skipped):
    batch = {"tokens": tokens, "sequence_length": length}
    full = training_flops(COSTS, assignments=assignments + skipped, **batch)
    saved = full - training_flops(COSTS, assignments=assignments, **batch)
    assert saved == 3 * skipped * COSTS.per_assignment


@given(sequences=counts, length=st.integers(1, 512), assignments=counts)
def test_sequences_do_not_attend_to_each_other(sequences, length, assignments):
    def spend(n):
        return forward_flops(
            COSTS, tokens=n * length, sequence_length=length, assignments=n * assignments
        )

    assert spend(sequences) == sequences * spend(1)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "field", ["dense_per_token", "per_assignment", "attention_per_pair", "head_per_token"]
)
def test_costs_must_be_finite_and_not_negative(field, value):
    fields = {"dense_per_token": 1.0, "per_assignment": 1.0, "attention_per_pair": 1.0}
    with pytest.raises(ValueError, match=f"{field} must be a finite number of at least 0"):
        FlopModel(**{**fields, field: value})


def test_the_head_is_part_of_the_dense_cost():
    with pytest.raises(ValueError, match="head_per_token must be at most dense_per_token = 1"):
        FlopModel(dense_per_token=1.0, per_assignment=1.0, attention_per_pair=1.0, head_per_token=2)


@pytest.mark.parametrize("count", ["tokens", "sequence_length", "assignments"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_counts_must_not_be_negative(count, value):
    batch = {"tokens": 1, "sequence_length": 1, "assignments": 1, count: value}
    for formula in (forward_flops, training_flops):
        with pytest.raises(ValueError, match=f"{count} must be a finite number of at least 0"):
            formula(COSTS, **batch)


def test_costs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        COSTS.per_assignment = 0.0
