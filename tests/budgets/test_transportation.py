"""Hard selection with bounds of experts: exact at equal costs, bounded and inside at any."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, linear_sum_assignment, milp

from drgr.budgets.budget import Budget
from drgr.budgets.optimal_plan import select
from drgr.budgets.relaxation import Problem
from drgr.budgets.whole_bounds import tightened
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

INF = np.inf
properties = settings(deadline=None, derandomize=True, max_examples=50)


@st.composite
def problems(draw, equal):
    """Scores, costs and bounds in arrays; ties, forbidden and closed experts occur."""
    num_tokens, num_experts = draw(st.integers(1, 8)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = rng.normal(size=(num_tokens, num_experts)) + draw(st.sampled_from([-1.0, 0.0, 1.0]))
    if draw(st.booleans()):
        scores = np.round(scores)
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.2] = -np.inf
    if equal:
        costs = np.full(num_experts, draw(st.sampled_from([1.0, 0.1, 2.5])))
        low = rng.integers(0, 3, num_tokens) * costs[0]
        high = low + rng.integers(0, 4, num_tokens) * costs[0]
        if draw(st.booleans()):
            low, high = np.full_like(low, low[0]), np.full_like(high, high[0])
    else:
        sizes = draw(st.booleans())
        costs = (
            rng.choice([1.0, 2.0, 4.0], num_experts)
            if sizes
            else rng.uniform(0.5, 3.0, num_experts)
        )
        costs[0] *= 1.5
        low = rng.uniform(0, 1.5, num_tokens) * draw(st.sampled_from([0.0, 1.0])) * costs.mean()
        high = low + costs.mean() * rng.uniform(0.5, 3, num_tokens)
    low = np.minimum(low, costs.sum())
    spare = draw(st.sampled_from([0.0, 1.0, 4.0, INF]))
    room = rng.integers(0, num_tokens + 1, num_experts)
    if draw(st.booleans()):
        room = np.full(num_experts, int(np.ceil(low.sum() / costs.sum())) + draw(st.integers(0, 2)))
    per_expert = np.where(rng.random(num_experts) < 0.1, INF, room * costs)
    return scores, {
        "costs": costs,
        "per_token": (low, high),
        "per_batch": float(low.sum() + spare * costs.mean()),
        "per_expert": per_expert,
    }


def solved(scores, bounds):
    """Selects, and checks all that must hold of any result; None where it raises."""
    low, high = (torch.as_tensor(bound) for bound in bounds["per_token"])
    try:
        budget = Budget(
            torch.from_numpy(bounds["costs"]),
            per_token=(low, high),
            per_batch=bounds["per_batch"],
            per_expert=torch.from_numpy(np.array(bounds["per_expert"], dtype=float)),
        )
        plan = select(torch.from_numpy(scores), budget)
    except InfeasibleBudgetError:
        return None
    mask = plan.mask.numpy()
    spend = mask @ bounds["costs"]
    assert np.isfinite(scores[mask]).all()
    assert (spend <= high.numpy() + 1e-9).all()
    assert spend.sum() <= bounds["per_batch"] + 1e-9
    assert (mask.sum(axis=0) * bounds["costs"] <= bounds["per_expert"] + 1e-9).all()
    reached = spend >= low.numpy() - 1e-9
    assert plan.meets_low.tolist() == np.broadcast_to(reached, len(scores)).tolist()
    assert plan.value.item() == pytest.approx(scores[mask].sum(), abs=1e-9)
    assert plan.spend.item() == pytest.approx(spend.sum())
    assert plan.gap.item() >= 0
    assert plan.upper_bound.item() == pytest.approx((plan.value + plan.gap).item())
    assert (plan.expert_price >= 0).all()
    assert plan.batch_price >= 0
    return plan


def crowded(seed, *, num_tokens=40, num_experts=8, slack=1.1):
    """Tokens that prefer the same experts, with room for little more than their share."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_tokens, num_experts)) + 2 * rng.normal(size=num_experts)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    room = np.ceil(slack * 2 * num_tokens / num_experts)
    return scores, {
        "costs": np.ones(num_experts),
        "per_token": (1.0, 3.0),
        "per_batch": 2.0 * num_tokens,
        "per_expert": np.full(num_experts, room),
    }


def assert_complementary(plan, scores, bounds):
    """Kept assignments gain at the prices, refused ones do not, and slack bounds cost nothing."""
    mask, costs = plan.mask.numpy(), bounds["costs"]
    low, high = (np.broadcast_to(bound, len(scores)) for bound in bounds["per_token"])
    own, batch = plan.token_price.numpy(), plan.batch_price.item()
    expert = plan.expert_price.numpy()
    reduced = scores - costs * (batch + own[:, None] + expert)
    assert (reduced[mask] >= -1e-9).all()
    assert (reduced[~mask] <= 1e-9).all()
    spend, load = mask @ costs, mask.sum(axis=0) * costs
    assert (spend[own > 1e-9] >= np.minimum(high, costs.sum())[own > 1e-9] - 1e-9).all()
    assert (spend[own < -1e-9] <= low[own < -1e-9] + 1e-9).all()
    assert batch == 0 or spend.sum() >= bounds["per_batch"] - 1e-9
    assert (load[expert > 0] >= bounds["per_expert"][expert > 0] - 1e-9).all()


class TestEqualCosts:
    @properties
    @given(problem=problems(equal=True))
    def test_value_is_that_of_an_exact_solver(self, best_value, problem):
        scores, bounds = problem
        plan = solved(scores, bounds)
        expected = best_value(scores, **bounds)
        if plan is None:
            assert expected is None
            return
        assert (plan.status is Status.INFEASIBLE) == (expected is None)
        assert plan.gap.item() == 0.0
        if expected is not None:
            assert plan.value.item() == pytest.approx(expected, abs=1e-7)
            assert_complementary(plan, scores, bounds)

    @properties
    @given(problem=problems(equal=True))
    def test_tokens_are_short_by_the_least_total_then_best(self, problem):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None:
            return
        # Variables: the plan, then what each token is short of.
        (num_tokens, num_experts), cost = scores.shape, bounds["costs"][0]
        (low, high), none = bounds["per_token"], np.zeros((num_tokens, num_tokens))
        rows = np.kron(np.eye(num_tokens), np.full(num_experts, cost))
        columns = np.pad(np.tile(np.eye(num_experts) * cost, num_tokens), ((0, 0), (0, num_tokens)))
        batch = np.append(np.full(scores.size, cost), np.zeros(num_tokens))[None]
        found = milp(
            np.append(np.where(np.isfinite(scores), -scores, 0.0), np.full(num_tokens, 1000.0)),
            constraints=[
                LinearConstraint(np.hstack([rows, np.eye(num_tokens) * cost]), low - 1e-9, INF),
                LinearConstraint(np.hstack([rows, none]), -INF, high + 1e-9),
                LinearConstraint(columns, -INF, bounds["per_expert"] + 1e-9),
                LinearConstraint(batch, -INF, bounds["per_batch"] + 1e-9),
            ],
            bounds=(0, np.append(np.isfinite(scores).ravel() * 1.0, np.full(num_tokens, INF))),
            integrality=1,
        )
        short = np.maximum(low - plan.mask.numpy() @ bounds["costs"], 0.0)
        assert 1000 * short.sum() / cost - plan.value.item() == pytest.approx(found.fun, abs=1e-5)

    @pytest.mark.parametrize("seed", range(4))
    def test_crowded_experts(self, best_value, seed):
        scores, bounds = crowded(seed)
        plan = solved(scores, bounds)
        assert plan.value.item() == pytest.approx(best_value(scores, **bounds, whole=False))
        assert plan.gap.item() == 0.0
        assert (plan.expert_price > 0).any()
        assert_complementary(plan, scores, bounds)

    def test_a_larger_batch(self, best_value):
        scores, bounds = crowded(0, num_tokens=300, num_experts=12)
        plan = solved(scores, bounds)
        assert plan.status is Status.CONVERGED
        assert plan.gap.item() == 0.0
        assert plan.value.item() == pytest.approx(best_value(scores, **bounds, whole=False))

    def test_one_token_an_expert_is_the_assignment_problem(self):
        scores = np.random.default_rng(0).normal(size=(9, 9))
        bounds = {"costs": np.ones(9), "per_token": (1.0, 1.0), "per_batch": INF}
        plan = solved(scores, {**bounds, "per_expert": np.ones(9)})
        tokens, experts = linear_sum_assignment(scores, maximize=True)
        assert plan.mask.numpy()[tokens, experts].all()
        assert plan.mask.sum() == 9
        assert plan.gap.item() == 0.0

    def test_bounds_that_do_not_bind_change_nothing(self):
        scores = torch.rand(20, 6)
        budget = Budget(torch.ones(6), per_token=(1, 3), per_batch=40.0)
        roomy = Budget(
            torch.ones(6), per_token=(1, 3), per_batch=40.0, per_expert=torch.full((6,), 20.0)
        )
        plan, free = select(scores, roomy), select(scores, budget)
        assert torch.equal(plan.mask, free.mask)
        assert plan.value.item() == pytest.approx(free.value.item())
        assert not plan.expert_price.any()

    def test_closed_experts_are_empty(self):
        scores = np.random.default_rng(1).uniform(size=(6, 4))
        bounds = {"costs": np.ones(4), "per_token": (1.0, 2.0), "per_batch": 12.0}
        plan = solved(scores, {**bounds, "per_expert": np.array([0.0, 6.0, 0.5, 6.0])})
        assert plan.mask.sum(dim=0)[[0, 2]].tolist() == [0, 0]
        assert plan.status is Status.CONVERGED

    @properties
    @given(problem=problems(equal=True), expert=st.integers(0, 5))
    def test_more_room_is_worth_no_less_and_at_most_its_price(self, problem, expert):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE:
            return
        room = bounds["per_expert"].copy()
        room[expert % len(room)] += bounds["costs"][0]
        gain = solved(scores, {**bounds, "per_expert": room}).value.item() - plan.value.item()
        price = plan.expert_price[expert % len(room)].item() * bounds["costs"][0]
        assert -1e-9 <= gain <= price + 1e-9

    @properties
    @given(problem=problems(equal=True), unit=st.sampled_from([0.25, 8.0, 2.0**60]))
    def test_units_are_irrelevant(self, problem, unit):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None:
            return
        scaled = solved(
            scores * unit,
            {
                "costs": bounds["costs"] * unit,
                "per_token": tuple(bound * unit for bound in bounds["per_token"]),
                "per_batch": bounds["per_batch"] * unit,
                "per_expert": bounds["per_expert"] * unit,
            },
        )
        assert torch.equal(scaled.mask, plan.mask)
        torch.testing.assert_close(scaled.expert_price, plan.expert_price)

    @properties
    @given(problem=problems(equal=True), seed=st.integers(0, 99))
    def test_the_order_is_irrelevant(self, problem, seed):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE:
            return
        rng = np.random.default_rng(seed)
        tokens, experts = (rng.permutation(n) for n in scores.shape)
        moved = {
            **bounds,
            "per_token": tuple(bound[tokens] for bound in bounds["per_token"]),
            "per_expert": bounds["per_expert"][experts],
        }
        other = solved(np.ascontiguousarray(scores[tokens][:, experts]), moved)
        assert other.value.item() == pytest.approx(plan.value.item(), abs=1e-9)


class TestAnyCosts:
    @properties
    @given(problem=problems(equal=False))
    def test_value_lies_below_and_its_bound_above_the_optimum(self, best_value, problem):
        scores, bounds = problem
        plan = solved(scores, bounds)
        expected = best_value(scores, **bounds)
        if plan is None:
            assert expected is None
        if plan is None or plan.status is Status.INFEASIBLE or expected is None:
            return
        assert plan.value.item() <= expected + 1e-7
        assert plan.upper_bound.item() >= expected - 1e-7
        if plan.gap.item() == 0.0:
            assert plan.value.item() == pytest.approx(expected, abs=1e-7)

    @properties
    @given(problem=problems(equal=False))
    def test_bound_is_that_of_fractional_plans(self, best_value, problem):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE or plan.gap.item() == 0:
            return
        low, high = bounds["per_token"]
        moved = tightened(
            Problem(
                scores=scores,
                costs=bounds["costs"],
                low=low,
                high=high,
                total=bounds["per_batch"],
                capacity=bounds["per_expert"],
                slack=1e-12,
            )
        )
        fractional = best_value(
            scores,
            bounds["costs"],
            per_token=(moved.low, moved.high),
            per_batch=moved.total,
            per_expert=moved.capacity,
            whole=False,
        )
        assert plan.upper_bound.item() == pytest.approx(fractional, abs=1e-7)

    @pytest.mark.parametrize("sizes", [None, (1.0, 2.0, 4.0)], ids=["any", "sizes"])
    def test_lower_bounds_are_met_and_little_is_lost_on_average(self, best_value, sizes):
        shortfalls, gaps, missed = [], [], 0
        for seed in range(15):
            rng = np.random.default_rng(seed)
            scores = rng.dirichlet(np.ones(6), 10)
            costs = rng.uniform(0.5, 4, 6) if sizes is None else rng.choice(sizes, 6)
            costs[:2] = (1.0, 2.0)
            bounds = {
                "costs": costs,
                "per_token": (0.6 * costs.mean(), 2.5 * costs.mean()),
                "per_batch": 14 * costs.mean(),
                "per_expert": np.full(6, 3.2 * costs.mean()),
            }
            best, plan = best_value(scores, **bounds), solved(scores, bounds)
            if best is None:
                continue
            missed += plan.status is Status.INFEASIBLE
            if plan.status is Status.CONVERGED:
                shortfalls.append((best - plan.value.item()) / best)
                gaps.append((plan.gap / plan.value).item())
        assert missed == 0
        assert len(shortfalls) >= 10
        assert np.mean(shortfalls) < 0.02
        assert np.mean(gaps) < 0.1

    @pytest.mark.parametrize("seed", range(6))
    def test_costs_of_any_magnitude(self, best_value, seed):
        rng = np.random.default_rng(seed)
        scores = rng.uniform(size=(30, 12))
        costs = 10 ** rng.uniform(-3, 3, 12)
        bounds = {
            "costs": costs,
            "per_token": (0.0, costs.sum() / 3),
            "per_batch": 4 * costs.sum(),
            "per_expert": costs * rng.integers(2, 12, 12),
        }
        plan = solved(scores, bounds)
        fractional = best_value(scores, **bounds, whole=False)
        assert plan.upper_bound.item() <= fractional * (1 + 1e-6)
        assert (plan.gap / plan.value).item() < 0.1

    def test_a_token_moves_through_a_narrow_expert_in_one_go(self):
        """Drawn at random: 58,000 moves, each as large as the narrowest expert, before."""
        rng = np.random.default_rng(313634)
        shape = (rng.integers(1, 60), rng.integers(1, 24))
        draws = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6) + rng.normal()
        assert rng.random() < 0.3
        scores = np.round(draws)
        assert rng.random() < 0.3
        scores[rng.random(shape) < 0.2] = -np.inf
        rng.random()
        rng.integers(4)
        rng.choice([1.0, 2.0, 4.0], shape[1])
        rng.uniform(0.1, 3, shape[1])
        costs = 10.0 ** rng.uniform(-3, 3, shape[1])
        mean = costs.mean()
        bounds = {
            "costs": costs,
            "per_token": (0.5 * mean, 2.5 * mean),
            "per_batch": mean * shape[0],
            "per_expert": 4 * costs,
        }
        plan = solved(scores, bounds)
        assert (plan.mask.sum(dim=0) <= 4).all()
        assert plan.upper_bound.item() >= plan.value.item()

    def test_bounds_that_only_one_set_meets(self):
        scores = np.random.default_rng(0).uniform(size=(5, 4)) + np.array([0, 0, 0, 99])
        bounds = {"costs": np.array([6.0, 10.0, 15.0, 29.0]), "per_token": (31.0, 31.0)}
        plan = solved(scores, {**bounds, "per_batch": INF, "per_expert": np.full(4, 300.0)})
        assert plan.mask.tolist() == [[True, True, True, False]] * 5

    def test_gap_of_a_larger_batch_is_small(self):
        scores, bounds = crowded(3, num_tokens=300, num_experts=12)
        costs = np.resize([1.0, 2.0, 4.0], 12)
        bounds.update(costs=costs, per_token=(1.0, 8.0), per_batch=900.0)
        bounds["per_expert"] = np.full(12, 100.0)
        plan = solved(scores, bounds)
        assert plan.status is Status.CONVERGED
        assert (plan.expert_price > 0).any()
        assert (plan.gap / plan.value).item() < 0.01


class TestInfeasible:
    def test_tokens_compete_for_one_expert(self):
        scores = np.array([[2.0, -INF], [1.0, -INF], [3.0, 0.5]])
        bounds = {"costs": np.ones(2), "per_token": (1.0, 1.0), "per_batch": INF}
        plan = solved(scores, {**bounds, "per_expert": np.array([1.0, 3.0])})
        assert plan.status is Status.INFEASIBLE
        assert plan.mask.tolist() == [[True, False], [False, False], [False, True]]
        assert plan.meets_low.tolist() == [True, False, True]
        assert plan.gap.item() == 0.0
        assert plan.expert_price.max() < 10  # The penalty of being short is not a price.

    @pytest.mark.parametrize("costs", [[2.0, 2.0, 2.0], [2.0, 2.0, 4.0]])
    def test_experts_cannot_give_what_tokens_need(self, costs):
        budget = Budget(
            torch.tensor(costs), per_token=(4.0, 8.0), per_expert=torch.tensor([4.0, 4.0, 3.0])
        )
        reach = 10 if costs[2] == 2.0 else 11
        message = f"per_expert together must give what all tokens need for low, 16, got {reach}"
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            select(torch.rand(4, 3), budget)

    def test_batch_cannot_pay_what_tokens_need(self):
        budget = Budget(
            torch.ones(3), per_token=(2, 3), per_batch=7.0, per_expert=torch.full((3,), 9.0)
        )
        with pytest.raises(InfeasibleBudgetError, match="per_batch must be at least 8"):
            select(torch.rand(4, 3), budget)
