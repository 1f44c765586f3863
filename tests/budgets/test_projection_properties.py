"""Properties of both projections that hold for every input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets.budget import Budget
from drgr.budgets.entropic import project_entropic
from drgr.budgets.projection import project
from drgr.numerics import Status

BOTH = pytest.mark.parametrize("solve", [project, project_entropic])
MANY = settings(deadline=None, derandomize=True, max_examples=25)
FLOAT64 = {"dtype": torch.float64}

# Few distinct values give ties and gates exactly on an end; the others come from the whole range.
values = st.one_of(st.integers(0, 5).map(lambda k: k / 4), st.floats(1e-3, 3.0))
costs = st.one_of(st.just(1.0), st.sampled_from([0.25, 0.5, 2.0, 3.0]), st.floats(0.01, 10.0))
shares = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(1e-9, 1.0))


def sorted_pair(draw):
    return sorted((draw(shares), draw(shares)))


@st.composite
def budgets(draw, num_experts=None):
    """Budgets that are feasible when every gate is open; a function of the number of tokens."""
    size = num_experts or draw(st.integers(1, 5))
    cost = torch.tensor([draw(costs) for _ in range(size)], **FLOAT64)
    low, high = sorted_pair(draw)
    batch, experts = draw(shares), draw(shares)
    bound_batch, bound_experts = draw(st.booleans()), draw(st.booleans())
    num_tokens = draw(st.integers(1, 6))
    full = cost.sum().item()
    least = low * full * num_tokens
    per_batch = least + batch * (high - low) * full * num_tokens if bound_batch else torch.inf
    # Every plan that gives all tokens one share of every expert between these two fits.
    share = low + experts * (1 - low)
    per_expert = share * num_tokens * cost * (1 + 1e-12) if bound_experts else None
    return num_tokens, Budget(
        cost, per_token=(low * full, high * full), per_batch=per_batch, per_expert=per_expert
    )


@st.composite
def problems(draw, count=1):
    """``count`` sets of positive gates and a budget for them."""
    num_tokens, budget = draw(budgets())
    size = num_tokens * budget.num_experts
    sets = [
        torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), **FLOAT64).reshape(
            num_tokens, -1
        )
        for _ in range(count)
    ]
    return *sets, budget


def positive(solve, gates):
    """Gates that no lower bound can fail on: the entropic distance keeps a gate of 0 closed."""
    return gates if solve is project else gates.clamp_min(1e-3)


def price(budget, result):
    paid = result.batch_price + result.token_price.unsqueeze(1) + result.expert_price
    return budget.costs * paid


@BOTH
@MANY
@given(problem=problems())
def test_plans_are_within_the_budget_and_certified(solve, problem):
    gates, budget = problem
    gates = positive(solve, gates)
    result = solve(gates, budget)
    assert result.status is Status.CONVERGED
    plan, near = result.gates, 1e-11 * (1 + price(budget, result).abs().max().item())
    expected = gates - price(budget, result)
    if solve is project_entropic:
        expected = (gates.log() - price(budget, result)).exp()
    torch.testing.assert_close(plan, expected.clamp(0, 1), rtol=0, atol=near)
    cost, (low, high) = plan @ budget.costs, budget.per_token
    slack = near * budget.costs.sum()
    assert (cost >= low - slack).all()
    assert (cost <= high + slack).all()
    assert cost.sum() <= budget.per_batch + slack * len(gates)
    assert ((result.token_price <= 0) | (cost >= high - slack)).all()
    assert ((result.token_price >= 0) | (cost <= low + slack)).all()
    assert result.batch_price >= 0
    assert result.batch_price == 0 or cost.sum() >= budget.per_batch - slack * len(gates)
    if budget.per_expert is not None:
        load = budget.costs * plan.sum(dim=0)
        assert (load <= budget.per_expert + slack * len(gates)).all()
        idle = load < budget.per_expert - slack * len(gates)
        assert (result.expert_price[idle] == 0).all()
        assert (result.expert_price >= 0).all()


@BOTH
@MANY
@given(problem=problems())
def test_projecting_twice_changes_nothing(solve, problem):
    gates, budget = problem
    once = solve(positive(solve, gates), budget).gates
    again = solve(once, budget).gates
    torch.testing.assert_close(again, once, rtol=0, atol=1e-10)


@MANY
@given(problem=problems(count=2))
def test_euclidean_projection_does_not_expand(problem):
    first, second, budget = problem
    apart = (project(first, budget).gates - project(second, budget).gates).norm()
    assert apart <= (first - second).norm() * (1 + 1e-9) + 1e-9


@BOTH
@MANY
@given(problem=problems(count=2))
def test_variational_inequality(solve, problem):
    gates, other, budget = problem
    gates, other = positive(solve, gates), positive(solve, other)
    plan, within = solve(gates, budget).gates, solve(other, budget).gates
    slope = plan - gates if solve is project else plan.clamp_min(1e-300).log() - gates.log()
    assert (slope * (within - plan)).sum() >= -1e-8 * (1 + slope.abs().max())


@BOTH
@MANY
@given(problem=problems(), more=st.floats(1.0, 3.0))
def test_a_larger_budget_is_not_spent_less(solve, problem, more):
    gates, budget = problem
    gates = positive(solve, gates)
    low, high = budget.per_token
    tight = solve(gates, budget)
    loose = Budget(
        budget.costs,
        per_token=(low, high),
        per_batch=budget.per_batch * more,
        per_expert=budget.per_expert,
    )
    rich = solve(gates, loose)
    assert rich.spend >= tight.spend - 1e-9 * (1 + tight.spend)
    if budget.per_expert is None:
        assert rich.batch_price <= tight.batch_price + 1e-9 * (1 + tight.batch_price)


@BOTH
@MANY
@given(problem=problems(), seed=st.integers(0, 9))
def test_order_of_tokens_and_experts_does_not_matter(solve, problem, seed):
    gates, budget = problem
    gates = positive(solve, gates)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(gates.shape[0], generator=generator)
    experts = torch.randperm(gates.shape[1], generator=generator)
    bounds = None if budget.per_expert is None else budget.per_expert[experts]
    moved = Budget(
        budget.costs[experts],
        per_token=budget.per_token,
        per_batch=budget.per_batch,
        per_expert=bounds,
    )
    found = solve(gates[tokens][:, experts], moved).gates
    expected = solve(gates, budget).gates[tokens][:, experts]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@BOTH
@MANY
@given(problem=problems(), unit=st.sampled_from([1e-9, 1e3, 1e12]))
def test_the_unit_of_cost_does_not_matter(solve, problem, unit):
    gates, budget = problem
    gates = positive(solve, gates)
    low, high = budget.per_token
    scaled = Budget(
        budget.costs * unit,
        per_token=(low * unit, high * unit),
        per_batch=budget.per_batch * unit,
        per_expert=None if budget.per_expert is None else budget.per_expert * unit,
    )
    expected, found = solve(gates, budget), solve(gates, scaled)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.gates, expected.gates, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.spend, expected.spend * unit, rtol=1e-9, atol=1e-9 * unit)
