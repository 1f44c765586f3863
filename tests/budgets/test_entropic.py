"""The Kullback-Leibler projection onto a budget against an independent solver, and its limits."""

import math
import re

import cvxpy as cp
import pytest
import torch

from drgr.budgets.budget import Budget
from drgr.budgets.entropic import project_entropic
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

FLOAT64 = {"dtype": torch.float64}

# Share of the cost of all experts: least and most of a token, most of the batch on average.
REGIMES = {
    "all slack": (0.0, 1.0, 2.0),
    "token high": (0.0, 0.2, 2.0),
    "token low": (0.75, 1.0, 2.0),
    "token fixed": (0.3, 0.3, 2.0),
    "batch": (0.0, 1.0, 0.3),
    "batch, low and high": (0.28, 0.32, 0.3),
    "batch at its least": (0.3, 1.0, 0.3),
}


def problem(regime, seed, num_tokens=5, num_experts=4):
    """Random gates around 0.6, of which one is 0, and bounds that differ a little."""
    generator = torch.Generator().manual_seed(seed)
    gates = 1.2 * torch.rand(num_tokens, num_experts, **FLOAT64, generator=generator)
    gates[0, 0] = 0.0
    costs = torch.rand(num_experts, **FLOAT64, generator=generator) + 0.5
    costs[0] = 0.3
    low, high, total = (share * costs.sum() for share in REGIMES[regime])
    low = low * (1 - 0.05 * torch.rand(num_tokens, **FLOAT64, generator=generator))
    high = low if regime == "token fixed" else high.expand(num_tokens)
    total = low.sum() if regime == "batch at its least" else total * num_tokens
    return gates, Budget(costs, per_token=(low, high), per_batch=total)


def distance(plan, gates):
    terms = torch.special.xlogy(plan, plan) - torch.special.xlogy(plan, gates) - plan + gates
    return terms.sum().item()


def by_interior_point(gates, budget):
    """Clarabel on exponential cones; entries with a gate of 0 stay 0."""
    plan = cp.Variable(gates.shape)
    cost = plan @ budget.costs.numpy()
    low, high = (bound.numpy() for bound in budget.per_token)
    closed = gates.numpy() == 0
    constraints = [plan >= 0, plan <= 1, cost >= low, cost <= high, plan[closed] == 0]
    constraints.append(cp.sum(cost) <= float(budget.per_batch))
    objective = cp.Minimize(cp.sum(cp.kl_div(plan[~closed], gates.numpy()[~closed])))
    cp.Problem(objective, constraints).solve(solver=cp.CLARABEL)
    return torch.from_numpy(plan.value)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regime", REGIMES)
def test_agrees_with_an_interior_point_method(regime, seed):
    gates, budget = problem(regime, seed)
    result = project_entropic(gates, budget)
    assert result.status is Status.CONVERGED
    expected = by_interior_point(gates, budget)
    torch.testing.assert_close(result.gates, expected, rtol=0, atol=1e-4)
    assert distance(result.gates, gates) <= distance(expected.clamp(0, 1), gates) + 1e-7


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regime", REGIMES)
def test_prices_certify_the_plan(regime, seed, scale):
    gates, budget = problem(regime, seed)
    gates = gates * scale
    result = project_entropic(gates, budget)
    assert result.status is Status.CONVERGED
    costs, (low, high), near = budget.costs, budget.per_token, {"rtol": 1e-12, "atol": 1e-12}
    price = result.batch_price + result.token_price.unsqueeze(1)
    torch.testing.assert_close(result.gates, (gates * (-costs * price).exp()).clamp(max=1), **near)
    cost = result.gates @ costs
    assert (cost <= high * (1 + 1e-12)).all()
    assert (cost >= low * (1 - 1e-12)).all()
    raised, lowered = result.token_price > 0, result.token_price < 0
    torch.testing.assert_close(cost[raised], high[raised], **near)
    torch.testing.assert_close(cost[lowered], low[lowered], **near)
    assert result.batch_price >= 0
    assert cost.sum() <= budget.per_batch * (1 + 1e-12)
    if result.batch_price > 0:
        torch.testing.assert_close(cost.sum(), budget.per_batch, **near)


def test_regimes_bind_what_they_say():
    for regime in REGIMES:
        result = project_entropic(*problem(regime, 0))
        assert (result.batch_price > 0) == regime.startswith("batch")
        assert bool((result.token_price < 0).any()) == ("low" in regime or "least" in regime)
        assert bool((result.token_price > 0).any()) == ("high" in regime or "fixed" in regime)


@pytest.mark.parametrize("regime", ["batch, low and high", "token low"])
def test_price_is_the_derivative_of_the_least_distance(regime):
    gates, budget = problem(regime, 0)
    (low, high), total = budget.per_token, budget.per_batch
    result = project_entropic(gates, budget)
    step = 1e-5

    def least(low, high, total):
        moved = Budget(budget.costs, per_token=(low, high), per_batch=total)
        return distance(project_entropic(gates, moved).gates, gates)

    slope = (least(low, high, total + step) - least(low, high, total - step)) / (2 * step)
    assert slope == pytest.approx(-result.batch_price.item(), abs=1e-7)
    for token, price in enumerate(result.token_price.tolist()):
        one = torch.zeros_like(low)
        one[token] = step
        by_high = (least(low, high + one, total) - least(low, high - one, total)) / (2 * step)
        by_low = (least(low + one, high, total) - least(low - one, high, total)) / (2 * step)
        assert by_high == pytest.approx(-max(price, 0), abs=1e-7)
        assert by_low == pytest.approx(-min(price, 0), abs=1e-7)


def test_without_bounds_gates_above_one_are_cut():
    gates = 2 * torch.rand(20, 5)
    result = project_entropic(gates, Budget(torch.ones(5)))
    torch.testing.assert_close(result.gates, gates.clamp(max=1), rtol=0, atol=0)
    assert result.status is Status.CONVERGED


def test_equal_costs_scale_each_row():
    gates = torch.rand(6, 4, **FLOAT64) + 0.1
    result = project_entropic(gates, Budget(torch.ones(4), per_token=(0.4, 0.4)))
    expected = 0.4 * gates / gates.sum(dim=1, keepdim=True)
    torch.testing.assert_close(result.gates, expected, rtol=1e-14, atol=0)


def test_upper_bound_of_zero_closes_everything_at_a_finite_price():
    gates = torch.rand(3, 2, **FLOAT64)
    result = project_entropic(gates, Budget(torch.ones(2), per_token=(0.0, 0.0), per_batch=0.0))
    assert result.gates.max() < 1e-299
    assert result.batch_price.isfinite()
    assert result.status is Status.CONVERGED


def test_lower_bound_may_open_everything():
    gates = torch.tensor([[1e-30, 0.5], [0.2, 3.0]], **FLOAT64)
    result = project_entropic(gates, Budget(torch.ones(2), per_token=(2.0, 2.0)))
    torch.testing.assert_close(result.gates, torch.ones(2, 2, **FLOAT64))
    assert (result.token_price <= 0).all()
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("smallest", [1e-300, 1e-30])
def test_gates_across_the_whole_range_of_numbers(smallest):
    gates = torch.tensor([[smallest, 1e-10, 1.0], [0.5, smallest, 1e6]], **FLOAT64)
    costs = torch.tensor([0.5, 1.0, 2.0], **FLOAT64)
    result = project_entropic(gates, Budget(costs, per_token=(2.5, 3.0), per_batch=5.5))
    assert result.status is Status.CONVERGED
    cost = result.gates @ costs
    assert (cost >= 2.5 * (1 - 1e-12)).all()
    assert (cost <= 3.0 * (1 + 1e-12)).all()
    assert result.gates.isfinite().all()


def test_single_precision_is_the_rounded_double():
    for regime in REGIMES:
        gates, budget = problem(regime, 2)
        single = project_entropic(gates.float(), budget)
        double = project_entropic(gates.float().double(), budget)
        assert single.gates.dtype == torch.float32
        assert torch.equal(single.gates, double.gates.float())
    half = project_entropic(torch.rand(2, 3).bfloat16(), Budget(torch.ones(3), per_batch=1.0))
    assert half.gates.dtype == torch.float32
    assert half.spend.item() == pytest.approx(1.0, abs=1e-6)


def test_derivative_at_a_gate_of_zero_is_one_sided_but_right():
    gates = torch.tensor([[0.0, 0.8, 0.9]], **FLOAT64, requires_grad=True)
    result = project_entropic(gates, Budget(torch.ones(3), per_token=(0.0, 1.0)))
    (slope,) = torch.autograd.grad(result.gates[0, 0], gates)
    torch.testing.assert_close(slope, torch.tensor([[1 / 1.7, 0.0, 0.0]], **FLOAT64))


REFUSED = [
    (
        ValueError,
        torch.tensor([[0.5, -0.1]]),
        {},
        "gates must be finite and at least 0, got -0.10000000149011612 at index (0, 1); repair",
    ),
    (
        ValueError,
        torch.tensor([[0.5, 0.1], [math.inf, 0.0]]),
        {},
        "gates must be finite and at least 0, got inf at index (1, 0)",
    ),
    (ValueError, torch.tensor([[math.nan, 0.1]]), {}, "got nan at index (0, 0)"),
    (
        InfeasibleBudgetError,
        torch.tensor([[0.5, 0.0]]),
        {"per_token": (1.5, 2.0)},
        "got low 1.5 for token 0 whose open gates cost 1; lower it or open more gates",
    ),
    (
        InfeasibleBudgetError,
        torch.tensor([[0.5, 0.2]]),
        {"per_token": (1.5, 2.0), "per_batch": 1.0},
        "got per_batch 1 and low adding up to 1.5",
    ),
]


@pytest.mark.parametrize(("error", "gates", "bounds", "message"), REFUSED)
def test_refuses_with_name_value_and_remedy(error, gates, bounds, message):
    budget = Budget(torch.ones(2), **bounds)
    with pytest.raises(error, match=re.escape(message)):
        project_entropic(gates, budget)
