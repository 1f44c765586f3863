"""Bounds of experts: both projections against independent solvers, prices, and infeasibility."""

import re

import cvxpy as cp
import pytest
import torch

from drgr.budgets.budget import Budget
from drgr.budgets.entropic import project_entropic
from drgr.budgets.projection import project
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

FLOAT64 = {"dtype": torch.float64}
BOTH = pytest.mark.parametrize("solve", [project, project_entropic])

# Share of the cost of all experts: least and most of a token, most of the batch on average; then
# the share of the tokens that an expert may have.
REGIMES = {
    "experts alone": (0.0, 1.0, 2.0, 0.4),
    "one expert": (0.0, 1.0, 2.0, 0.6),
    "with the batch": (0.0, 1.0, 0.28, 0.35),
    "with the tokens": (0.2, 0.35, 2.0, 0.35),
    "with all": (0.22, 0.31, 0.28, 0.35),
    "nothing left over": (0.3, 0.3, 0.3, None),
    "one expert closed": (0.0, 1.0, 2.0, 0.4),
}


def problem(regime, seed, num_tokens=6, num_experts=4):
    """Random gates of popular and unpopular experts; popularity makes capacities bind."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.linspace(-0.4, 0.4, num_experts, **FLOAT64)
    gates = torch.rand(num_tokens, num_experts, **FLOAT64, generator=generator)
    gates = (gates + popularity).clamp_min(0.02)
    costs = torch.rand(num_experts, **FLOAT64, generator=generator) + 0.5
    low, high, total, share = REGIMES[regime]
    capacity = (low if share is None else share) * num_tokens * costs
    if regime == "one expert closed":
        capacity[3] = 0.0
    full = costs.sum().item()
    return gates, Budget(
        costs,
        per_token=(low * full, high * full),
        per_batch=total * full * num_tokens,
        per_expert=capacity,
    )


def by_interior_point(solve, gates, budget):
    plan = cp.Variable(gates.shape)
    costs = budget.costs.numpy()
    low, high = budget.per_token
    constraints = [plan >= 0, plan <= 1, plan @ costs >= low, plan @ costs <= high]
    constraints += [cp.sum(plan @ costs) <= budget.per_batch]
    constraints += [cp.multiply(costs, cp.sum(plan, axis=0)) <= budget.per_expert.numpy()]
    if solve is project:
        objective = cp.sum_squares(plan - gates.numpy()) / 2
    else:
        objective = cp.sum(cp.kl_div(plan, gates.numpy()))
    cp.Problem(cp.Minimize(objective), constraints).solve(solver=cp.CLARABEL)
    return torch.from_numpy(plan.value)


def assert_certified(solve, gates, budget, result, rounding=1e-12):
    """The optimality conditions, which are sufficient: the problem is convex."""
    costs, (low, high) = budget.costs, budget.per_token
    near = {"rtol": rounding, "atol": rounding}
    price = costs * (result.batch_price + result.token_price.unsqueeze(1) + result.expert_price)
    if solve is project:
        expected = (gates - price).clamp(0, 1)
    else:
        expected = (gates * (-price).exp()).clamp(max=1)
    torch.testing.assert_close(result.gates, expected, **near)
    cost, load = result.gates @ costs, costs * result.gates.sum(dim=0)
    assert (cost <= high * (1 + rounding)).all()
    assert (cost >= low * (1 - rounding)).all()
    assert (load <= budget.per_expert * (1 + rounding) + rounding).all()
    assert cost.sum() <= budget.per_batch * (1 + rounding)
    torch.testing.assert_close(result.spend, cost.sum(), **near)
    for bound, held in ((high, result.token_price > 0), (low, result.token_price < 0)):
        torch.testing.assert_close(cost[held], torch.full_like(cost[held], bound), **near)
    assert result.batch_price >= 0
    if result.batch_price > 0:
        assert cost.sum().item() == pytest.approx(budget.per_batch, rel=rounding)
    assert (result.expert_price >= 0).all()
    priced = result.expert_price > 0
    torch.testing.assert_close(load[priced], budget.per_expert[priced], **near)


@BOTH
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("regime", REGIMES)
def test_agrees_with_an_interior_point_method(solve, regime, seed):
    gates, budget = problem(regime, seed)
    result = solve(gates, budget)
    assert result.status is Status.CONVERGED
    expected = by_interior_point(solve, gates, budget)
    torch.testing.assert_close(result.gates, expected, rtol=0, atol=1e-4)


@BOTH
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("regime", REGIMES)
def test_prices_certify_the_plan(solve, regime, seed):
    gates, budget = problem(regime, seed)
    result = solve(gates, budget)
    assert result.status is Status.CONVERGED
    assert_certified(solve, gates, budget, result)
    assert (result.expert_price > 0).any()


@BOTH
def test_capacities_that_do_not_bind_change_nothing(solve):
    gates, budget = problem("with all", 0)
    loose = Budget(budget.costs, per_token=budget.per_token, per_batch=budget.per_batch)
    large = torch.tensor([torch.inf, 1e6, 1e3, 1e2], **FLOAT64)
    bounded = Budget(
        budget.costs, per_token=budget.per_token, per_batch=budget.per_batch, per_expert=large
    )
    result = solve(gates, bounded)
    assert torch.equal(result.gates, solve(gates, loose).gates)
    assert not result.expert_price.any()


@BOTH
def test_capacity_alone_is_one_bound_for_each_column(solve):
    gates, budget = problem("experts alone", 1)
    result = solve(gates, Budget(budget.costs, per_expert=budget.per_expert))
    for expert, (cost, bound) in enumerate(zip(budget.costs, budget.per_expert, strict=True)):
        column = Budget(cost.expand(len(gates)), per_token=(0.0, bound))
        alone = solve(gates[:, expert].unsqueeze(0), column)
        torch.testing.assert_close(result.gates[:, expert], alone.gates[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result.expert_price[expert], alone.token_price[0])


@BOTH
def test_price_is_the_derivative_of_the_least_distance(solve):
    gates, budget = problem("with all", 0)
    result, step = solve(gates, budget), 1e-5

    def least(per_expert):
        moved = Budget(
            budget.costs,
            per_token=budget.per_token,
            per_batch=budget.per_batch,
            per_expert=per_expert,
        )
        plan = solve(gates, moved).gates
        if solve is project:
            return (plan - gates).square().sum().item() / 2
        return (torch.special.xlogy(plan, plan / gates) - plan + gates).sum().item()

    for expert, price in enumerate(result.expert_price.tolist()):
        one = torch.zeros_like(budget.per_expert)
        one[expert] = step
        slope = (least(budget.per_expert + one) - least(budget.per_expert - one)) / (2 * step)
        assert slope == pytest.approx(-price, abs=1e-7)


@BOTH
def test_balanced_assignment_of_a_large_batch(solve):
    gates = torch.rand(600, 16, **FLOAT64) + torch.linspace(0, 1, 16, **FLOAT64)
    share = torch.full((16,), 600 * 4 / 16, **FLOAT64)
    budget = Budget(torch.ones(16, **FLOAT64), per_token=(4.0, 4.0), per_expert=share)
    result = solve(gates, budget)
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.gates.sum(dim=0), share, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.gates.sum(dim=1), torch.full((600,), 4.0, **FLOAT64))


@pytest.mark.parametrize("regime", REGIMES)
def test_gates_of_a_million_and_costs_far_apart(regime):
    gates, budget = problem(regime, 1)
    result = project(1e6 * gates, budget)
    assert result.status is Status.CONVERGED
    assert_certified(project, 1e6 * gates, budget, result, rounding=1e-8)
    ratio = torch.tensor([1e-2, 1.0, 10.0, 1e2], **FLOAT64)
    for solve in (project, project_entropic):
        costs, bounds = ratio * budget.costs, ratio * budget.per_expert
        result = solve(gates, Budget(costs, per_batch=costs.sum() * 2, per_expert=bounds))
        assert result.status is Status.CONVERGED


@pytest.mark.parametrize("seed", range(8))
def test_gates_of_a_million_with_capacities_that_another_plan_uses_up(seed):
    """Nearly a linear programme, and degenerate: its dual has narrow pieces and wide flats."""
    generator = torch.Generator().manual_seed(seed)
    gates, other = torch.rand(2, 8, 6, **FLOAT64, generator=generator)
    costs = torch.rand(6, **FLOAT64, generator=generator) + 0.2
    per_token = (0.4 * costs.sum().item(), 0.4 * costs.sum().item())
    used_up = costs * project(other, Budget(costs, per_token=per_token)).gates.sum(dim=0)
    budget = Budget(costs, per_token=per_token, per_expert=used_up)
    result = project(1e6 * gates, budget)
    assert result.status is Status.CONVERGED
    assert_certified(project, 1e6 * gates, budget, result, rounding=1e-8)


@pytest.mark.parametrize("seed", [7, 70, 77, 154])
def test_capacities_of_a_billionth_of_the_gates(seed):
    """Each expert has one narrow piece of the dual, at a price of its own."""
    generator = torch.Generator().manual_seed(seed)
    gates = 2 * torch.rand(6, 5, **FLOAT64, generator=generator)
    if seed % 2:
        gates = (gates * 4).round() / 4
    costs = torch.rand(5, **FLOAT64, generator=generator) + 0.2
    full, capacity = costs.sum().item(), 6e-9 * costs
    budget = Budget(costs, per_token=(0.0, 0.3 * full), per_batch=0.9 * full, per_expert=capacity)
    result = project(gates, budget)
    assert result.status is Status.CONVERGED
    assert_certified(project, gates, budget, result)


@BOTH
def test_single_precision_is_the_rounded_double(solve):
    gates, budget = problem("with all", 3)
    single, double = solve(gates.float(), budget), solve(gates.float().double(), budget)
    assert single.gates.dtype == single.expert_price.dtype == torch.float32
    assert torch.equal(single.gates, double.gates.float())


@BOTH
def test_lower_bounds_above_what_experts_offer_are_refused(solve):
    budget = Budget(
        torch.ones(3), per_token=(1.5, 3.0), per_expert=torch.tensor([1.0, 2.5, torch.inf])
    )
    message = (
        "per_expert must offer at least the sum of per_token low, got 7.5 in all and low adding "
        "up to 9; raise the one or lower the other"
    )
    gates = torch.rand(6, 3)
    gates[:2, 2] = -torch.inf if solve is project else 0.0
    with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
        solve(gates, budget)


@BOTH
def test_contradictions_that_no_sum_shows_are_a_status(solve):
    # The first token needs both experts in full, and the first expert may give it half.
    low = torch.tensor([2.0, 0.0])
    budget = Budget(torch.ones(2), per_token=(low, 2.0), per_expert=torch.tensor([0.5, 2.0]))
    assert solve(torch.rand(2, 2), budget).status is Status.INFEASIBLE
    assert solve(100 * torch.rand(2, 2), budget).status is Status.INFEASIBLE
