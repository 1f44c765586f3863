"""The set of plans: exact totals for averages that are not binary fractions, and every refusal."""

from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drgr.budgets import TokenBudget, budget_from_flops
from drgr.errors import InfeasibleBudgetError

properties = settings(deadline=None, derandomize=True, max_examples=200)
counts = st.integers(0, 10**7)


@pytest.mark.parametrize(
    ("average", "meant"),
    [
        (2.3, Fraction(23, 10)),
        (0.7, Fraction(7, 10)),
        (1.1, Fraction(11, 10)),
        (1 / 3, Fraction(1, 3)),
        (16 / 7, Fraction(16, 7)),
        (4, Fraction(4)),
        (1.999999, Fraction(1999999, 1000000)),
        (1e-6, Fraction(1, 1000000)),
    ],
)
@properties
@given(num_tokens=counts)
def test_the_total_is_the_floor_of_what_was_meant(average, meant, num_tokens):
    budget = TokenBudget(minimum=0, maximum=8, average=average)
    assert budget.rate == meant
    assert budget.total(num_tokens) == num_tokens * meant.numerator // meant.denominator


def test_one_million_tokens_at_an_average_just_under_two():
    budget = TokenBudget(minimum=0, maximum=8, average=1.9999999)
    assert budget.total(10) == 19
    assert budget.total(10**6) == 1999999


def test_an_average_just_under_a_round_number_is_not_rounded_up():
    # Times a million, this float is 6852649 after rounding.
    average = 6.8526489999999995
    assert average * 10**6 == 6852649
    assert TokenBudget(minimum=0, maximum=8, average=average).total(10**6) == 6852648


@properties
@given(average=st.floats(1e-3, 8), num_tokens=counts)
def test_any_average_is_never_exceeded_and_nearly_spent(average, num_tokens):
    budget = TokenBudget(minimum=0, maximum=8, average=average)
    exact = Fraction(average) * num_tokens
    assert budget.total(num_tokens) <= exact * (1 + Fraction(1, 2**53))
    assert budget.total(num_tokens) > exact - 1 - Fraction(num_tokens, 10**6)


@properties
@given(average=st.floats(1e-3, 8), num_tokens=st.integers(0, 2**40))
def test_the_total_on_the_device_is_the_same(average, num_tokens):
    budget = TokenBudget(minimum=0, maximum=8, average=average)
    on_device = budget.total_on_device(torch.tensor(num_tokens))
    assert on_device.dtype == torch.int64
    assert int(on_device) == budget.total(num_tokens)


def test_a_budget_cannot_be_changed():
    budget = TokenBudget(minimum=1, maximum=4, average=2.3)
    with pytest.raises(FrozenInstanceError):
        budget.average = 3.0
    assert budget == TokenBudget(minimum=1, maximum=4, average=2.3)


def test_bounds_may_meet():
    assert TokenBudget(minimum=2, maximum=2, average=2).total(5) == 10


class TestRefusals:
    def test_negative_minimum(self):
        with pytest.raises(ValueError, match=r"budget\.minimum must be at least 0, got -1"):
            TokenBudget(minimum=-1, maximum=4, average=2)

    @pytest.mark.parametrize("average", [0, -1.0, float("nan"), float("inf")])
    def test_an_average_that_is_no_positive_number(self, average):
        with pytest.raises(ValueError, match=r"budget\.average must be a finite number above 0"):
            TokenBudget(minimum=0, maximum=4, average=average)

    def test_crossed_bounds(self):
        message = r"budget\.minimum must be at most .* minimum 3 and maximum 2; lower the minimum"
        with pytest.raises(InfeasibleBudgetError, match=message):
            TokenBudget(minimum=3, maximum=2, average=2.5)

    def test_an_average_below_the_minimum(self):
        message = r"budget\.average must be at least .* average 0\.9 and minimum 1; every token"
        with pytest.raises(InfeasibleBudgetError, match=message):
            TokenBudget(minimum=1, maximum=2, average=0.9)

    def test_an_average_above_the_maximum(self):
        message = r"budget\.average must be at most .* average 2\.1 and maximum 2; a token cannot"
        with pytest.raises(InfeasibleBudgetError, match=message):
            TokenBudget(minimum=1, maximum=2, average=2.1)

    def test_an_infeasible_budget_is_also_a_bad_argument(self):
        assert issubclass(InfeasibleBudgetError, ValueError)


class TestFlops:
    def test_whole_experts(self):
        budget = budget_from_flops(
            minimum=600, maximum=2400, average=1380, flops_per_assignment=600
        )
        assert budget == TokenBudget(minimum=1, maximum=4, average=2.3)

    def test_bounds_between_experts_are_rounded_inwards(self):
        budget = budget_from_flops(
            minimum=601, maximum=2399, average=1500, flops_per_assignment=600
        )
        assert (budget.minimum, budget.maximum, budget.average) == (2, 3, 2.5)

    @properties
    @given(
        flops=st.integers(1, 10**9),
        bounds=st.tuples(*[st.floats(0, 8)] * 3),
        num_tokens=st.integers(1, 10**6),
    )
    def test_never_more_and_nearly_all_of_what_was_asked(self, flops, bounds, num_tokens):
        minimum, average, maximum = (round(bound * flops) for bound in sorted(bounds))
        try:
            budget = budget_from_flops(
                minimum=minimum, maximum=maximum, average=average, flops_per_assignment=flops
            )
        except ValueError:
            assume(False)
        assert budget.minimum * flops >= minimum
        assert budget.maximum * flops <= maximum
        spend, asked = budget.total(num_tokens) * flops, average * num_tokens
        assert spend <= asked
        assert spend > asked - flops - Fraction(num_tokens * flops, 10**6)

    @pytest.mark.parametrize("flops", [0, -5.0, float("inf"), float("nan")])
    def test_experts_without_a_cost_are_refused(self, flops):
        with pytest.raises(ValueError, match="flops_per_assignment must be a finite number above"):
            budget_from_flops(minimum=1, maximum=2, average=1, flops_per_assignment=flops)

    def test_bounds_without_a_whole_expert_between_them_are_refused(self):
        with pytest.raises(InfeasibleBudgetError, match=r"minimum 2 and maximum 1"):
            budget_from_flops(minimum=610, maximum=1190, average=900, flops_per_assignment=600)
