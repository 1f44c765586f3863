"""The best whole choice, against every choice there is."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets.static import ChoiceKnapsack
from drgr.errors import InfeasibleBudgetError

INF = np.inf
properties = settings(deadline=None, derandomize=True, max_examples=200)


def best_by_trying(values, costs, limits, exactly):
    """Value of the best of all choices, None if none is inside."""
    best = None
    for options in itertools.product(range(values.shape[1]), repeat=len(values)):
        rows = np.arange(len(values))
        spend = costs[:, rows, options].sum(axis=1)
        inside = (spend == limits).all() if exactly else (spend <= limits).all()
        value = values[rows, options].sum()
        if inside and value > -INF and (best is None or value > best):
            best = value
    return best


@st.composite
def problems(draw):
    num_budgets, num_items = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    num_options = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = rng.normal(size=(num_items, num_options))
    if draw(st.booleans()):
        values = values.round()
    if draw(st.booleans()):
        forbidden = rng.random(values.shape) < 0.3
        forbidden[np.arange(num_items), rng.integers(0, num_options, num_items)] = False
        values[forbidden] = -INF
    kind = draw(st.sampled_from(["any", "equal", "unit", "layers"]))
    shape = (num_budgets, num_items, num_options)
    costs = rng.integers(-2, 5, shape) * draw(st.sampled_from([1, 3]))
    if kind == "equal":
        costs[:] = costs[:, :1, :1]
    if kind == "unit":
        costs = rng.integers(0, 2, shape)
    if kind == "layers":
        owner = rng.integers(0, num_budgets, num_items)
        costs = costs * (owner == np.arange(num_budgets)[:, None])[:, :, None]
    rows = rng.integers(0, num_options, num_items)
    limits = costs[:, np.arange(num_items), rows].sum(axis=1)
    limits = limits + draw(st.sampled_from([-1, 0, 0, 0, 1]))
    return values, costs, limits


@properties
@given(problem=problems(), exactly=st.booleans())
def test_the_best_choice_is_the_best_of_all(problem, exactly):
    values, costs, limits = problem
    expected = best_by_trying(values, costs, limits, exactly)
    try:
        knapsack = ChoiceKnapsack(
            torch.from_numpy(costs), torch.from_numpy(limits), exactly=exactly
        )
        found = knapsack.best(torch.from_numpy(values))
    except InfeasibleBudgetError:
        assert expected is None
        return
    assert expected is not None
    assert found.value == pytest.approx(expected, abs=1e-12)
    options = found.options.numpy()
    rows = np.arange(len(values))
    assert found.value == pytest.approx(values[rows, options].sum(), abs=1e-12)
    spend = costs[:, rows, options].sum(axis=1)
    assert found.spend.tolist() == spend.tolist()
    assert (spend == limits).all() if exactly else (spend <= limits).all()


@properties
@given(
    seed=st.integers(0, 10**6),
    num_items=st.integers(1, 9),
    cap=st.integers(0, 9),
    exactly=st.booleans(),
)
def test_unit_items_are_those_of_the_largest_gains(seed, num_items, cap, exactly):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num_items, 2)).round(1)
    costs = np.zeros((num_items, 2), dtype=int)
    costs[np.arange(num_items), rng.integers(0, 2, num_items)] = 7
    cap = min(cap, num_items)
    found = ChoiceKnapsack(torch.from_numpy(costs), 7 * cap, exactly=exactly).best(
        torch.from_numpy(values)
    )
    expected = best_by_trying(values, costs[None], np.array([7 * cap]), exactly)
    assert found.value == pytest.approx(expected, abs=1e-12)


def test_thousands_of_experts_are_a_sort():
    gains = torch.randn(6000).double()
    values = torch.stack([torch.zeros_like(gains), gains], dim=1)
    costs = torch.tensor([[0, 1]]).expand(6000, 2)
    found = ChoiceKnapsack(costs, 1500, exactly=True).best(values)
    assert found.spend.item() == 1500
    assert found.value == pytest.approx(gains.sort(descending=True).values[:1500].sum().item())


def test_layers_are_problems_of_their_own():
    """Twelve budgets of eight: their product would be a table of 9^12."""
    gains = torch.randn(12, 16).double()
    kept = torch.block_diag(*torch.randint(1, 4, (12, 16)).double())
    costs = torch.stack([torch.zeros_like(kept), kept], dim=-1)
    values = torch.stack([torch.zeros(192), gains.flatten()], dim=1)
    found = ChoiceKnapsack(costs, torch.full((12,), 8.0)).best(values)
    alone = sum(
        ChoiceKnapsack(costs[layer : layer + 1, 16 * layer : 16 * layer + 16], 8)
        .best(values[16 * layer : 16 * layer + 16])
        .value
        for layer in range(12)
    )
    assert found.value == pytest.approx(alone)
    assert (found.spend <= 8).all()


def test_counts_by_layer_are_options():
    """Three layers that get 1 to 4 experts, 7 in all."""
    worth = torch.tensor([[3.0, 4.0, 4.1, 4.2], [1.0, 2.0, 3.0, 4.0], [5.0, 5.5, 5.6, 5.7]])
    found = ChoiceKnapsack(torch.arange(1, 5).expand(3, 4), 7, exactly=True).best(worth)
    assert (found.options + 1).tolist() == [2, 4, 1]


def test_limits_that_are_not_whole_are_rounded_down():
    costs = torch.tensor([[0, 2], [0, 2]])
    values = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert ChoiceKnapsack(costs, 3.9).best(values).spend.item() == 2


def test_equal_values_go_to_earlier_options_and_items():
    costs = torch.tensor([[0, 1], [0, 1], [0, 1]])
    zeros = torch.zeros(3, 2)
    assert ChoiceKnapsack(costs, 2).best(zeros).options.tolist() == [0, 0, 0]
    assert ChoiceKnapsack(costs, 2, exactly=True).best(zeros).options.tolist() == [1, 1, 0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("costs", "limits", "message"),
        [
            (
                torch.ones(3),
                1,
                "costs must have shape (N, K) or (m, N, K) with N, K >= 1, got (3,)",
            ),
            (torch.tensor([[0.0, 0.5]]), 1, "costs must be whole numbers below 2^53, got 0.5"),
            (torch.tensor([[0.0, 2.0**53]]), 1, "at index (0, 1); give them in a unit"),
            (torch.ones(1, 2), torch.ones(2), "one number for each of 1 budgets, got 2"),
            (torch.ones(1, 2), INF, "limits must be finite, got [inf]; leave such budgets out"),
            (
                torch.tensor([[1, 10**9 + 1]] * 8 + [[1, 2]]),
                10**9,
                "at most 2^29 entries, got 9e+09 for 9 items",
            ),
        ],
    )
    def test_of_arguments(self, costs, limits, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            ChoiceKnapsack(costs, limits)

    def test_of_a_limit_below_the_cheapest(self):
        message = "cost of the cheapest options, 3, got 2 for budget 0; raise it"
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            ChoiceKnapsack(torch.tensor([[1, 2], [2, 3]]), 2)

    @pytest.mark.parametrize(
        ("costs", "limit", "unit"), [([[0, 4], [0, 6]], 5, 2), ([[1, 1]], 2, 0)]
    )
    def test_of_a_limit_that_no_choice_costs_by_its_divisor(self, costs, limit, unit):
        message = f"choices differ by multiples of {unit}; take another limit"
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            ChoiceKnapsack(torch.tensor(costs), limit, exactly=True)

    def test_of_a_limit_that_no_choice_costs(self):
        message = "limits must be what some allowed choice costs, got [4.0]"
        knapsack = ChoiceKnapsack(torch.tensor([[0, 2], [0, 3]]), 4, exactly=True)
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            knapsack.best(torch.zeros(2, 2))

    @pytest.mark.parametrize("costs", [[[0, 1], [0, 1]], [[0, 2, 3], [0, 2, 3]]])
    def test_of_forbidden_options_that_leave_only_dear_ones(self, costs):
        values = torch.zeros(2, len(costs[0]))
        values[:, 0] = -INF
        message = "limits must be at least what some allowed choice costs, got [1.0]"
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            ChoiceKnapsack(torch.tensor(costs), 1).best(values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (torch.zeros(2, 3), "values must have the shape (N, K) of costs, (2, 2), got (2, 3)"),
            (torch.tensor([[0, torch.nan], [0, 0]]), "must be finite or -inf, got nan at index (0"),
            (torch.tensor([[0, 0], [-INF, -INF]]), "got -inf in all of item 1"),
        ],
    )
    def test_of_values(self, values, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            ChoiceKnapsack(torch.tensor([[0, 1], [0, 1]]), 1).best(values)
