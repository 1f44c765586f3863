"""Hard selection where experts differ in cost: feasible, near the optimum, bounded from above."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets import row_tables
from drgr.budgets.budget import Budget
from drgr.budgets.knapsack import best_knapsack_plan
from drgr.budgets.moves import polish, working_plan
from drgr.budgets.optimal_plan import select
from drgr.budgets.relaxation import Problem, dual_bound
from drgr.budgets.set_search import cheapest_set, repair
from drgr.budgets.whole_bounds import common_unit, reachable_costs, tightened
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

INF = np.inf
properties = settings(deadline=None, derandomize=True, max_examples=50)
KINDS = pytest.mark.parametrize("tables", ["exact", "cells"])


@pytest.fixture
def use_tables(monkeypatch):
    """Chooses how tokens' plans are tabulated, whatever the number of different sums."""

    def use(kind):
        if kind == "cells":
            monkeypatch.setattr(row_tables, "MOST_SUMS", 1)

    return use


@st.composite
def problems(draw, commensurable=None):
    """Scores, costs and bounds in arrays; ties, forbidden experts and bounds by token occur."""
    num_tokens, num_experts = draw(st.integers(1, 7)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = rng.normal(size=(num_tokens, num_experts)) + draw(st.sampled_from([-1.0, 0.0, 1.0]))
    if draw(st.booleans()):
        scores = np.round(scores)
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.2] = -np.inf
    if draw(st.booleans()) if commensurable is None else commensurable:
        costs = rng.choice([1.0, 2.0, 4.0], num_experts)
    else:
        costs = rng.uniform(0.5, 3.0, num_experts)
    costs[0] *= 1.5
    low = rng.uniform(0, 2, num_tokens) * draw(st.sampled_from([0.0, 1.0])) * costs.mean()
    low = np.minimum(low, costs.sum())
    high = low + costs.mean() * rng.uniform(0.3, 3, num_tokens)
    total = low.sum() + costs.mean() * draw(st.sampled_from([0.0, 1.0, 2.5, 7.0, INF]))
    return scores, {"costs": costs, "per_token": (low, high), "per_batch": float(total)}


def solved(scores, bounds):
    """Selects, and checks all that must hold of any result; None where it raises."""
    low, high = (torch.as_tensor(bound) for bound in bounds["per_token"])
    costs = torch.from_numpy(bounds["costs"])
    try:
        budget = Budget(costs, per_token=(low, high), per_batch=bounds["per_batch"])
        plan = select(torch.from_numpy(scores), budget)
    except InfeasibleBudgetError:
        return None
    mask = plan.mask.numpy()
    spend = mask @ bounds["costs"]
    assert np.isfinite(scores[mask]).all()
    assert (spend <= high.numpy() + 1e-9).all()
    assert spend.sum() <= bounds["per_batch"] + 1e-9
    reached = spend >= low.numpy() - 1e-9
    assert plan.meets_low.tolist() == np.broadcast_to(reached, len(scores)).tolist()
    assert plan.status is (Status.CONVERGED if reached.all() else Status.INFEASIBLE)
    assert plan.value.item() == pytest.approx(scores[mask].sum(), abs=1e-9)
    assert plan.spend.item() == pytest.approx(spend.sum())
    assert plan.gap.item() >= 0
    assert plan.upper_bound.item() == pytest.approx((plan.value + plan.gap).item())
    return plan


def example(seed, *, sizes=None, num_tokens=10, num_experts=6):
    """A batch whose budget is well below what its tokens want."""
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(num_experts), num_tokens)
    costs = rng.uniform(0.5, 4.0, num_experts) if sizes is None else rng.choice(sizes, num_experts)
    costs[:2] = (1.0, 2.0)
    mean = costs.mean()
    bounds = (0.6 * mean, 2.5 * mean)
    return scores, {"costs": costs, "per_token": bounds, "per_batch": 1.4 * mean * num_tokens}


def as_problem(scores, bounds):
    low, high = (np.broadcast_to(bound, len(scores)) for bound in bounds["per_token"])
    return Problem(
        scores=scores,
        costs=bounds["costs"],
        low=low,
        high=high,
        total=bounds["per_batch"],
        capacity=np.full(scores.shape[1], INF),
        slack=1e-12,
    )


def whole_bounds(scores, bounds):
    """The bounds after they were moved to costs of sets of experts."""
    moved = tightened(as_problem(scores, bounds))
    return {**bounds, "per_token": (moved.low, moved.high), "per_batch": moved.total}


class TestValue:
    @KINDS
    @properties
    @given(problem=problems())
    def test_lies_below_and_its_bound_above_the_optimum(self, best_value, tables, problem):
        scores, bounds = problem
        expected = best_value(scores, **bounds)
        with pytest.MonkeyPatch.context() as patch:
            if tables == "cells":
                patch.setattr(row_tables, "MOST_SUMS", 1)
            plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE:
            assert expected is None
            return
        assert plan.value.item() <= expected + 1e-7
        assert plan.upper_bound.item() >= expected - 1e-7
        if plan.gap.item() == 0.0:
            assert plan.value.item() == pytest.approx(expected, abs=1e-7)

    @pytest.mark.parametrize("seed", range(6))
    def test_is_near_the_best_of_all_masks(self, seed):
        scores, bounds = example(seed, num_tokens=3, num_experts=3)
        masks = np.array(list(itertools.product([False, True], repeat=9))).reshape(-1, 3, 3)
        spend = masks @ bounds["costs"]
        low, high = bounds["per_token"]
        inside = ((spend >= low) & (spend <= high)).all(axis=1)
        inside &= spend.sum(axis=1) <= bounds["per_batch"]
        best = (masks * scores).sum(axis=(1, 2))[inside].max()
        plan = solved(scores, bounds)
        assert best * 0.93 <= plan.value.item() <= best + 1e-12
        assert plan.upper_bound.item() >= best - 1e-12

    @KINDS
    @pytest.mark.parametrize("sizes", [None, (1.0, 2.0, 4.0)], ids=["any", "sizes"])
    def test_falls_short_by_little_on_average(self, best_value, use_tables, tables, sizes):
        use_tables(tables)
        shortfalls, gaps = [], []
        for seed in range(20):
            scores, bounds = example(seed, sizes=sizes)
            plan, best = solved(scores, bounds), best_value(scores, **bounds)
            shortfalls.append((best - plan.value.item()) / best)
            gaps.append((plan.gap / plan.value).item())
        assert np.mean(shortfalls) < 0.01
        assert np.mean(gaps) < (0.03 if tables == "exact" else 0.06)

    @pytest.mark.parametrize(("tables", "gap"), [("exact", 2e-4), ("cells", 1e-2)])
    def test_gap_of_a_large_batch_is_small(self, use_tables, tables, gap):
        use_tables(tables)
        scores, bounds = example(0, sizes=(1.0, 2.0, 4.0), num_tokens=500, num_experts=16)
        plan = solved(scores, bounds)
        assert plan.status is Status.CONVERGED
        assert (plan.gap / plan.value).item() < gap

    def test_is_that_of_the_greedy_pass_at_equal_costs(self):
        rng = np.random.default_rng(0)
        scores = rng.normal(size=(9, 5))
        bounds = {"costs": np.full(5, 2.0), "per_token": (2.0, 7.0), "per_batch": 33.0}
        solution = best_knapsack_plan(as_problem(scores, bounds))
        expected = solved(scores, bounds)
        assert scores[solution.mask].sum() == pytest.approx(expected.value.item())
        assert solution.upper_bound >= expected.value.item() - 1e-12

    def test_gap_is_zero_where_the_relaxation_is_whole(self):
        scores = np.array([[3.0, 1.0], [2.0, 2.5]])
        bounds = {"costs": np.array([1.0, 2.0]), "per_token": (0.0, 3.0), "per_batch": 4.0}
        plan = solved(scores, bounds)
        assert plan.mask.tolist() == [[True, False], [True, True]]
        assert plan.gap.item() == 0.0

    def test_scores_below_zero_run_only_for_the_lower_bound(self):
        scores = np.array([[-3.0, -1.0], [-0.5, -2.0]])
        costs = np.array([1.0, 2.0])
        free = {"costs": costs, "per_token": (0.0, 3.0), "per_batch": 9.0}
        assert not solved(scores, free).mask.any()
        plan = solved(scores, {**free, "per_token": (1.0, 3.0)})
        assert plan.mask.tolist() == [[False, True], [True, False]]
        assert plan.gap.item() == 0.0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_decimal_bounds_hold_the_sums_that_were_meant(self, dtype):
        costs = torch.tensor([0.1, 0.2, 0.4], dtype=dtype)
        budget = Budget(costs, per_token=(0.3, 0.3), per_batch=0.9)
        plan = select(torch.rand(3, 3), budget)
        assert plan.mask.tolist() == [[True, True, False]] * 3
        assert plan.gap.item() == 0.0


class TestBound:
    @KINDS
    @properties
    @given(problem=problems())
    def test_never_exceeds_that_of_fractional_plans(self, best_value, tables, problem):
        scores, bounds = problem
        with pytest.MonkeyPatch.context() as patch:
            if tables == "cells":
                patch.setattr(row_tables, "MOST_SUMS", 1)
            plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE:
            return
        fractional = best_value(scores, **bounds, whole=False)
        assert plan.upper_bound.item() <= fractional + 1e-7
        if tables == "cells" and plan.gap.item() > 0:
            whole = whole_bounds(scores, bounds)
            fractional = best_value(scores, **whole, whole=False)
            assert plan.upper_bound.item() == pytest.approx(fractional, abs=1e-7)

    @properties
    @given(problem=problems(), price=st.floats(0, 3), seed=st.integers(0, 99))
    def test_of_any_prices_holds(self, best_value, problem, price, seed):
        scores, bounds = problem
        value = best_value(scores, **bounds)
        if value is None:
            return
        rng = np.random.default_rng(seed)
        capacity = np.full(scores.shape[1], 100.0)
        reach = np.isfinite(scores) @ bounds["costs"]
        low, high = (np.minimum(bound, reach) for bound in bounds["per_token"])
        total = min(bounds["per_batch"], 100.0)
        relaxed = Problem(
            scores=scores, costs=bounds["costs"], low=low, high=high, total=total,
            capacity=capacity, slack=0.0,
        )  # fmt: skip
        bound = dual_bound(relaxed, price, rng.uniform(0, 1, len(capacity)))
        assert bound >= value - 1e-7

    @properties
    @given(problem=problems(commensurable=True), seed=st.integers(0, 99))
    def test_does_not_depend_on_the_order(self, problem, seed):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE:
            return
        rng = np.random.default_rng(seed)
        tokens, experts = (rng.permutation(n) for n in scores.shape)
        moved = {
            "costs": bounds["costs"][experts],
            "per_token": tuple(bound[tokens] for bound in bounds["per_token"]),
            "per_batch": bounds["per_batch"],
        }
        other = solved(np.ascontiguousarray(scores[tokens][:, experts]), moved)
        if plan.gap.item() > 0 and other.gap.item() > 0:
            assert other.upper_bound.item() == pytest.approx(plan.upper_bound.item(), abs=1e-9)
        assert other.value.item() <= plan.upper_bound.item() + 1e-9

    @properties
    @given(problem=problems(), more=st.floats(0.1, 5))
    def test_does_not_fall_with_a_larger_batch(self, problem, more):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE:
            return
        larger = solved(scores, {**bounds, "per_batch": bounds["per_batch"] + more})
        assert larger.upper_bound.item() >= plan.value.item() - 1e-9
        if larger.gap.item() > 0:
            assert larger.upper_bound.item() >= plan.upper_bound.item() - 1e-9

    @properties
    @given(problem=problems(), unit=st.sampled_from([0.25, 8.0, 2.0**60]))
    def test_units_are_irrelevant(self, problem, unit):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None:
            return
        per_token = tuple(torch.from_numpy(bound * unit) for bound in bounds["per_token"])
        costs = torch.from_numpy(bounds["costs"] * unit)
        budget = Budget(costs, per_token=per_token, per_batch=bounds["per_batch"] * unit)
        scaled = select(torch.from_numpy(scores * unit), budget)
        assert torch.equal(scaled.mask, plan.mask)
        assert scaled.upper_bound.item() == pytest.approx(plan.upper_bound.item() * unit)
        torch.testing.assert_close(scaled.token_price, plan.token_price)

    @properties
    @given(problem=problems())
    def test_is_met_by_the_prices_of_fractional_plans(self, problem):
        scores, bounds = problem
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_tables, "MOST_SUMS", 1)
            plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE or plan.gap.item() == 0:
            return
        # The dual in its textbook form: every price times its bound, and what assignments gain.
        whole = whole_bounds(scores, bounds)
        low, high = whole["per_token"]
        own, batch = plan.token_price.numpy(), plan.batch_price.item()
        costs, allowed = bounds["costs"], np.isfinite(scores)
        high = np.minimum(high, allowed @ costs)
        gains = np.where(allowed, scores - costs * (batch + own[:, None]), 0.0)
        dual = np.maximum(gains, 0.0).sum() + np.where(own > 0, own * high, own * low).sum()
        dual += batch * whole["per_batch"] if batch > 0 else 0.0
        assert dual == pytest.approx(plan.upper_bound.item(), abs=1e-7)


class TestInfeasible:
    def test_no_set_has_a_cost_within_the_bounds_of_a_token(self):
        budget = Budget(torch.tensor([2.0, 4.0]), per_token=(torch.tensor([2.0, 5.0]), 5.0))
        message = (
            "per_token must leave room for the cost of some set of experts, got low 5 and high 5 "
            "for token 1, where the next less costs 4"
        )
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            select(torch.rand(2, 2), budget)

    def test_whole_experts_exceed_the_batch(self):
        budget = Budget(torch.tensor([2.0, 4.0]), per_token=(1.0, 5.0), per_batch=5.0)
        message = "per_batch must be at least what whole experts within low cost, 6, got 5"
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            select(torch.rand(3, 2), budget)

    def test_lower_bounds_exceed_the_batch(self):
        budget = Budget(torch.tensor([2.0, 4.0]), per_token=(2.0, 5.0), per_batch=5.0)
        message = "per_batch must give what all tokens need for low, 6, got 5"
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            select(torch.rand(3, 2), budget)

    @KINDS
    def test_a_closed_token_gets_what_it_can(self, use_tables, tables):
        use_tables(tables)
        scores = np.array([[1.0, -INF, -INF], [0.3, 0.2, 0.5]])
        bounds = {"costs": np.array([1.0, 2.0, 4.0]), "per_token": (2.0, 7.0), "per_batch": 7.0}
        plan = solved(scores, bounds)
        assert plan.meets_low.tolist() == [False, True]
        assert plan.mask.tolist() == [[True, False, False], [True, False, True]]
        assert plan.gap.item() >= 0

    @KINDS
    def test_the_last_tokens_lose_what_the_batch_cannot_pay(self, use_tables, tables):
        use_tables(tables)
        scores = np.array([[-INF, 1.0], [-INF, 1.0], [0.5, 1.0]])
        bounds = {"costs": np.array([1.0, 3.0]), "per_token": (1.0, 4.0), "per_batch": 5.0}
        plan = solved(scores, bounds)
        assert plan.meets_low.tolist() == [True, False, True]

    @KINDS
    def test_an_expert_cheaper_than_any_cell_is_not_forced(self, use_tables, tables):
        use_tables(tables)
        scores = np.array([[1.0, 5.0, 4.0], [2.0, 5.0, 4.0], [1.0, 5.0, 4.0]])
        bounds = {"costs": np.array([0.01, 3.0, 2.7]), "per_token": (0.0, 5.8)}
        plan = solved(scores, {**bounds, "per_batch": 0.015})
        assert plan.status is Status.CONVERGED
        assert plan.mask.nonzero().tolist() == [[1, 0]]

    @KINDS
    def test_bounds_that_only_one_set_meets(self, use_tables, tables):
        use_tables(tables)
        scores = np.random.default_rng(0).normal(size=(5, 4))
        costs = np.array([6.0, 10.0, 15.0, 29.0])
        plan = solved(scores, {"costs": costs, "per_token": (31.0, 31.0), "per_batch": INF})
        assert plan.mask.tolist() == [[True, True, True, False]] * 5
        assert plan.gap.item() >= 0


class TestSets:
    @properties
    @given(seed=st.integers(0, 10**6), count=st.integers(1, 7), share=st.floats(0, 1))
    def test_sums_are_those_of_all_sets(self, seed, count, share):
        rng = np.random.default_rng(seed)
        costs = rng.choice([1.0, 2.0, 4.0, 0.1, 0.7], count)
        most = share * costs.sum()
        sums = {
            round(sum(subset), 9)
            for size in range(count + 1)
            for subset in itertools.combinations(costs.tolist(), size)
            if sum(subset) <= most
        }
        assert reachable_costs(costs, most).tolist() == pytest.approx(sorted(sums), abs=1e-9)

    @properties
    @given(problem=problems())
    def test_moved_bounds_lose_no_plan(self, best_value, problem):
        scores, bounds = problem
        value = best_value(scores, **bounds)
        if value is None:
            return
        moved = whole_bounds(scores, bounds)
        for before, after, sign in zip(
            bounds["per_token"], moved["per_token"], (1, -1), strict=True
        ):
            assert (sign * (after - before) >= -1e-9).all()
        assert moved["per_batch"] <= bounds["per_batch"] + 1e-9
        assert best_value(scores, **moved) == pytest.approx(value, abs=1e-7)

    @pytest.mark.parametrize(
        ("costs", "unit"),
        [
            ([1.0, 2.0, 4.0], 1.0),
            ([6.0, 10.0, 15.0], 1.0),
            ([0.6, 1.5, 0.9], 0.3),
            ([4.0], 4.0),
            ([3e18, 2e18], 1e18),
            ([1.0, 2.0**0.5], None),
            ([1.0, 1.00001], None),
        ],
    )
    def test_common_unit(self, costs, unit):
        assert common_unit(np.array(costs)) == (unit and pytest.approx(unit))

    def test_too_many_sums(self):
        costs = 2.0 ** np.arange(8)
        assert len(reachable_costs(costs, 300.0, limit=256)) == 256
        assert reachable_costs(costs, 300.0, limit=255) is None

    @properties
    @given(seed=st.integers(0, 10**6), count=st.integers(1, 7), width=st.floats(0, 2))
    def test_cheapest_set_is_that_of_all_sets(self, seed, count, width):
        rng = np.random.default_rng(seed)
        costs = rng.uniform(0.5, 3, count)
        costs[rng.random(count) < 0.2] = INF
        low = rng.uniform(0, 6)
        sums = [
            sum(subset)
            for size in range(count + 1)
            for subset in itertools.combinations(costs.tolist(), size)
        ]
        within = [total for total in sums if low <= total <= low + width]
        found = cheapest_set(costs, low, low + width)
        assert (found is None) == (not within)
        if within:
            assert costs[found].sum() == pytest.approx(min(within))

    def test_search_stays_within_bounds_where_sums_are_too_many(self):
        costs = np.random.default_rng(1).uniform(1, 2, 40)
        for low in (7.0, 20.0, 33.0):
            found = cheapest_set(costs, low, low + 0.5, limit=256)
            assert low <= costs[found].sum() <= low + 0.5

    def test_repair_makes_room_by_dropping_extras(self):
        costs = np.array([6.0, 10.0, 15.0, 29.0, 1.0])
        bounds = {
            "costs": costs,
            "per_token": (np.array([31.0, 0.0, 0.0]), 31.0),
            "per_batch": 31.0,
        }
        scores = np.array([[0.1, 0.1, 0.1, 9.0, -INF]] + [[-INF] * 4 + [1.0]] * 2)
        start = np.array([[False, False, False, True, False]] + [[False] * 4 + [True]] * 2)
        plan = working_plan(as_problem(scores, bounds), start)
        polish(plan)
        assert plan.is_short.tolist() == [True, False, False]
        repair(plan)
        assert plan.mask[0, :-1].tolist() == [True, True, True, False, False]
        assert not plan.mask[1:].any()


class TestPolish:
    @properties
    @given(problem=problems())
    def test_leaves_no_better_replacement(self, problem):
        scores, bounds = problem
        plan = solved(scores, bounds)
        if plan is None or plan.status is Status.INFEASIBLE:
            return
        costs, (low, high) = bounds["costs"], bounds["per_token"]
        mask = plan.mask.numpy()
        for token in range(len(scores)):
            others = (mask @ costs).sum() - mask[token] @ costs
            for bits in itertools.product([False, True], repeat=len(costs)):
                row = np.array(bits)
                leaves, joins = mask[token] & ~row, row & ~mask[token]
                if leaves.sum() > 1 or joins.sum() > 1 or not np.isfinite(scores[token][row]).all():
                    continue
                spend = row @ costs
                inside = low[token] <= spend <= high[token]
                if inside and others + spend <= bounds["per_batch"]:
                    gain = scores[token][row].sum() - scores[token][mask[token]].sum()
                    assert gain <= 1e-9

    def test_tokens_trade_cost(self):
        scores = np.array([[5.0, 8.0, -INF, -INF], [-INF, -INF, 2.0, 4.0]])
        costs = np.array([1.0, 3.0, 2.0, 4.0])
        bounds = {"costs": costs, "per_token": (0.0, np.array([3.0, 4.0])), "per_batch": 5.0}
        start = np.array([[True, False, False, False], [False, False, False, True]])
        plan = working_plan(as_problem(scores, bounds), start)
        polish(plan)
        # The first token pays 2 more for 3, the second saves 2 for 2.
        assert plan.mask[:, :-1].tolist() == [
            [False, True, False, False],
            [False, False, True, False],
        ]

    def test_tokens_hand_on_an_expert(self):
        scores = np.array([[5.0, 4.0, -INF], [-INF, 3.0, 2.5]])
        problem = Problem(
            scores=scores,
            costs=np.ones(3),
            low=np.ones(2),
            high=np.ones(2),
            total=2.0,
            capacity=np.array([0.0, 1.0, 1.0]),
            slack=0.0,
        )
        plan = working_plan(problem, np.array([[False, False, False], [False, True, False]]))
        polish(plan)
        assert plan.mask[:, :-1].tolist() == [[False, True, False], [False, False, True]]

    def test_lower_bounds_come_before_scores(self):
        bounds = {"costs": np.array([1.0, 2.0]), "per_token": (1.0, 3.0), "per_batch": 4.0}
        scores = np.array([[9.0, 8.0], [-7.0, -9.0]])
        plan = working_plan(as_problem(scores, bounds), np.array([[True, True], [False, False]]))
        polish(plan)
        assert plan.mask[:, :-1].tolist() == [[True, True], [True, False]]
