"""Hard selection where all experts cost the same, and what holds of :func:`select` at any costs."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from drgr.budgets.budget import Budget
from drgr.budgets.optimal_plan import select
from drgr.budgets.whole_plan import best_whole_plan
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

INF = torch.inf
properties = settings(deadline=None, derandomize=True, max_examples=80)


@st.composite
def problems(draw, forbidden=True):
    """Scores and a budget in whole experts; ties, forbidden experts and bounds by token occur."""
    num_tokens, num_experts = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = rng.normal(size=(num_tokens, num_experts)) + draw(st.sampled_from([-1.0, 0.0, 1.0]))
    if draw(st.booleans()):
        scores = np.round(scores)
    if forbidden and draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.25] = -np.inf
    cost = draw(st.sampled_from([1.0, 0.1, 2.5]))
    low = rng.integers(0, min(3, num_experts + 1), num_tokens)
    high = low + rng.integers(0, 4, num_tokens)
    if draw(st.booleans()):
        low, high = np.full_like(low, low[0]), np.full_like(high, high[0])
    total = low.sum() + draw(st.sampled_from([0, 1, 3, 8, np.inf]))
    bounds = tuple(torch.from_numpy(bound * cost) for bound in (low, high))
    costs = torch.full((num_experts,), cost, dtype=torch.float64)
    budget = Budget(costs, per_token=bounds, per_batch=float(total * cost))
    return torch.from_numpy(scores), budget


def arrays(budget):
    """The bounds as NumPy arrays, for the reference."""
    per_expert = np.inf if budget.per_expert is None else budget.per_expert.numpy()
    return {
        "costs": budget.costs.double().numpy(),
        "per_token": tuple(np.asarray(bound, dtype=float) for bound in budget.per_token),
        "per_batch": float(budget.per_batch),
        "per_expert": per_expert,
    }


def greedy(scores, low, high, total):
    """The documented order in plain Python: each token's best, then the best of all the rest."""
    ranked = [
        sorted((-value, expert) for expert, value in enumerate(row) if value > -np.inf)
        for row in scores.tolist()
    ]
    kept = {(t, e) for t, row in enumerate(ranked) for _, e in row[: low[t]]}
    rest = [
        (value, t, e)
        for t, row in enumerate(ranked)
        for value, e in row[low[t] : high[t]]
        if value < 0
    ]
    room = len(rest) if total == np.inf else int(total) - len(kept)
    kept |= {(t, e) for _, t, e in sorted(rest)[:room]}
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for place in kept:
        mask[place] = True
    return mask


def assert_inside(plan, scores, budget):
    """Every upper bound holds, and the record says what the mask says."""
    mask, costs = plan.mask.numpy(), budget.costs.double().numpy()
    bounds = arrays(budget)
    spend = mask @ costs
    assert np.isfinite(scores.numpy()[mask]).all()
    assert (spend <= bounds["per_token"][1] * (1 + 1e-9) + 1e-12).all()
    assert spend.sum() <= bounds["per_batch"] * (1 + 1e-9) + 1e-12
    assert (mask.sum(axis=0) * costs <= bounds["per_expert"] * (1 + 1e-9)).all()
    reached = spend >= bounds["per_token"][0] * (1 - 1e-9)
    assert plan.meets_low.tolist() == reached.tolist()
    assert plan.status is (Status.CONVERGED if reached.all() else Status.INFEASIBLE)
    assert plan.spend.item() == pytest.approx(spend.sum())
    assert plan.value.item() == pytest.approx(scores.numpy()[mask].sum(), abs=1e-9)
    assert plan.gap.item() >= 0
    assert plan.upper_bound.item() == pytest.approx((plan.value + plan.gap).item())


class TestOptimum:
    @properties
    @given(problem=problems())
    def test_is_that_of_an_exact_solver(self, best_value, problem):
        scores, budget = problem
        plan = select(scores, budget)
        assert_inside(plan, scores, budget)
        expected = best_value(scores.numpy(), **arrays(budget))
        assert (plan.status is Status.INFEASIBLE) == (expected is None)
        assert plan.gap.item() == 0.0
        if expected is not None:
            assert plan.value.item() == pytest.approx(expected, abs=1e-7)

    @properties
    @given(problem=problems())
    def test_ties_go_to_the_first_token_then_expert(self, problem):
        scores, budget = problem
        cost = budget.costs[0].item()
        low, high = ([round(b / cost) for b in bound.tolist()] for bound in budget.per_token)
        total = budget.per_batch / cost
        total = total if total == INF else round(total)
        assert torch.equal(select(scores, budget).mask, greedy(scores, low, high, total))

    @pytest.mark.parametrize("seed", range(6))
    def test_is_the_best_of_all_masks(self, seed):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=(3, 3))
        budget = Budget(torch.ones(3), per_token=(1.0, 2.0), per_batch=3.0 + seed % 3)
        values = [
            scores[mask].sum()
            for bits in itertools.product([False, True], repeat=9)
            for mask in [np.array(bits).reshape(3, 3)]
            if mask.sum() <= budget.per_batch
            and (mask.sum(axis=1) >= 1).all()
            and (mask.sum(axis=1) <= 2).all()
        ]
        plan = select(torch.from_numpy(scores), budget)
        assert plan.value.item() == pytest.approx(max(values))

    def test_what_a_closed_token_cannot_use_goes_to_others(self):
        scores = torch.tensor([[1.0, -INF, -INF], [0.3, 0.2, 0.1]])
        plan = select(scores, Budget(torch.ones(3), per_token=(2, 3), per_batch=4.0))
        assert plan.mask.sum(dim=1).tolist() == [1, 3]
        assert plan.meets_low.tolist() == [False, True]
        assert plan.status is Status.INFEASIBLE
        assert plan.gap.item() == 0.0


class TestLimits:
    @pytest.mark.parametrize("per_batch", [INF, 3.0 * 11])
    def test_fixed_counts_are_plain_top_k(self, per_batch):
        scores = torch.randn(11, 7)
        top = torch.zeros_like(scores).scatter_(1, scores.topk(3).indices, 1.0).bool()
        plan = select(scores, Budget(torch.ones(7), per_token=(3, 3), per_batch=per_batch))
        assert torch.equal(plan.mask, top)
        assert plan.batch_price.item() == 0.0

    def test_without_bounds_all_above_zero_run(self):
        scores = torch.randn(5, 4)
        plan = select(scores, Budget(torch.full((4,), 2.0)))
        assert torch.equal(plan.mask, scores > 0)
        for price in (plan.token_price, plan.batch_price, plan.expert_price):
            assert not price.any()

    def test_scores_below_zero_run_only_for_the_lower_bound(self):
        scores = -torch.rand(6, 5) - 0.1
        assert not select(scores, Budget(torch.ones(5), per_batch=8.0)).mask.any()
        plan = select(scores, Budget(torch.ones(5), per_token=(2, 4), per_batch=20.0))
        assert plan.mask.sum(dim=1).tolist() == [2] * 6
        assert (plan.token_price < 0).all()

    def test_scores_of_zero_do_not_run(self):
        assert not select(torch.zeros(3, 4), Budget(torch.ones(4), per_batch=8.0)).mask.any()

    @pytest.mark.parametrize(("total", "expected"), [(7.999, 7), (8.0, 8), (8.001, 8)])
    def test_the_batch_bound_at_whole_numbers(self, total, expected):
        scores = torch.rand(6, 5) + 0.1
        plan = select(scores, Budget(torch.ones(5), per_token=(1, 3), per_batch=total))
        assert plan.spend.item() == expected

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_decimal_bounds_hold_the_counts_that_were_meant(self, dtype):
        scores = torch.rand(10, 5) + 0.1
        budget = Budget(torch.full((5,), 0.1, dtype=dtype), per_token=(0.3, 0.3), per_batch=3.0)
        assert select(scores, budget).mask.sum(dim=1).tolist() == [3] * 10
        tenths = Budget(torch.full((5,), 0.1, dtype=dtype), per_token=(0.0, 0.3), per_batch=0.7)
        assert select(scores, tenths).mask.sum() == 7

    def test_a_bound_of_zero_runs_nothing(self):
        for budget in (
            Budget(torch.ones(4), per_token=(0, 0)),
            Budget(torch.ones(4), per_batch=0.0),
            Budget(torch.ones(4), per_token=(0, 0.9)),
        ):
            assert not select(torch.rand(3, 4), budget).mask.any()

    def test_one_expert(self):
        scores = torch.tensor([[0.3], [0.9], [0.5]])
        plan = select(scores, Budget(torch.ones(1), per_batch=2.0))
        assert plan.mask.tolist() == [[False], [True], [True]]

    @pytest.mark.parametrize("per_expert", [None, [2.0, 2.0, 2.0]])
    @pytest.mark.parametrize("costs", [[1.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
    @pytest.mark.parametrize("low", [0.0, 1.0])
    def test_no_tokens(self, costs, per_expert, low):
        capacity = None if per_expert is None else torch.tensor(per_expert)
        budget = Budget(torch.tensor(costs), per_token=(low, 4), per_batch=4, per_expert=capacity)
        plan = select(torch.zeros(0, 3), budget)
        assert plan.mask.shape == (0, 3)
        assert plan.token_price.shape == plan.meets_low.shape == (0,)
        assert plan.value.item() == plan.gap.item() == plan.spend.item() == 0.0
        assert plan.status is Status.CONVERGED


class TestProperties:
    @properties
    @given(problem=problems(), more=st.integers(1, 4))
    def test_a_larger_budget_is_worth_no_less(self, problem, more):
        scores, budget = problem
        low, high = budget.per_token
        cost = budget.costs[0]
        value = select(scores, budget).value.item()
        wider = (low, high + more * cost)
        for larger in (
            Budget(budget.costs, per_token=wider, per_batch=budget.per_batch),
            Budget(budget.costs, per_token=(low, high), per_batch=budget.per_batch + more * cost),
        ):
            assert select(scores, larger).value.item() >= value - 1e-12

    @properties
    @given(problem=problems(), seed=st.integers(0, 99))
    def test_the_order_of_tokens_and_experts_is_irrelevant(self, problem, seed):
        scores, budget = problem
        generator = torch.Generator().manual_seed(seed)
        tokens, experts = (torch.randperm(n, generator=generator) for n in scores.shape)
        bounds = tuple(bound[tokens] for bound in budget.per_token)
        moved = Budget(budget.costs, per_token=bounds, per_batch=budget.per_batch)
        plain, other = select(scores, budget), select(scores[tokens][:, experts], moved)
        assert other.value.item() == pytest.approx(plain.value.item(), abs=1e-12)
        assert other.spend.item() == pytest.approx(plain.spend.item())

    @properties
    @given(problem=problems(), unit=st.sampled_from([0.25, 8.0, 2.0**60]))
    def test_units_are_irrelevant(self, problem, unit):
        scores, budget = problem
        plan = select(scores, budget)
        bounds = tuple(bound * unit for bound in budget.per_token)
        scaled = Budget(budget.costs * unit, per_token=bounds, per_batch=budget.per_batch * unit)
        by_cost, by_score = select(scores, scaled), select(scores * unit, budget)
        assert torch.equal(by_cost.mask, plan.mask)
        assert torch.equal(by_score.mask, plan.mask)
        torch.testing.assert_close(by_cost.batch_price * unit, plan.batch_price)
        torch.testing.assert_close(by_score.token_price / unit, plan.token_price)


class TestPrices:
    @properties
    @given(problem=problems())
    def test_are_complementary_to_the_plan(self, problem):
        scores, budget = problem
        plan = select(scores, budget)
        low, high = budget.per_token
        price = plan.batch_price + plan.token_price[:, None] + plan.expert_price
        reduced = scores - budget.costs * price
        assert (reduced[plan.mask] >= -1e-12).all()
        assert (reduced[~plan.mask] <= 1e-12).all()
        assert plan.batch_price >= 0
        if plan.batch_price > 0:
            assert plan.spend.item() == pytest.approx(budget.per_batch)
        spend = plan.mask.double() @ budget.costs
        is_full = spend >= torch.minimum(high, budget.costs.sum()) - 1e-9
        assert is_full[plan.token_price > 0].all()
        assert (spend <= low + 1e-9)[plan.token_price < 0].all()
        assert not plan.expert_price.any()

    def test_lie_in_the_middle_of_the_gap(self):
        scores = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        plan = select(scores, Budget(torch.full((2,), 0.5), per_batch=1.0))
        assert plan.mask.tolist() == [[True, True], [False, False]]
        assert plan.batch_price.item() == 5.0  # between 3 and 2, for a cost of 1/2
        assert not plan.token_price.any()

    def test_are_those_of_the_best_refused_where_no_extra_runs(self):
        scores = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        plan = select(scores, Budget(torch.ones(2), per_token=(1, 2), per_batch=2.0))
        assert plan.batch_price.item() == 3.0
        assert plan.token_price.tolist() == [0.0, -1.0]

    def test_of_a_token_at_its_upper_bound(self):
        scores = torch.tensor([[4.0, 3.0, 2.5], [2.0, 1.0, 0.5]])
        plan = select(scores, Budget(torch.ones(3), per_token=(0, 2), per_batch=3.0))
        assert plan.mask.sum(dim=1).tolist() == [2, 1]
        assert plan.batch_price.item() == 1.5
        assert plan.token_price.tolist() == [1.0, 0.0]

    def test_alone_reproduce_the_plan_without_ties(self):
        scores = torch.rand(40, 8, dtype=torch.float64)
        plan = select(scores, Budget(torch.ones(8), per_token=(0, 8), per_batch=100.0))
        assert torch.equal(plan.mask, scores > plan.batch_price)


class TestArguments:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes_agree_with_float64(self, dtype):
        scores = torch.randn(40, 8).to(dtype)
        budget = Budget(torch.ones(8), per_token=(1, 4), per_batch=92.0)
        plan, exact = select(scores, budget), select(scores.double(), budget)
        assert torch.equal(plan.mask, exact.mask)
        for name in ("token_price", "batch_price", "spend", "value", "upper_bound", "gap"):
            assert getattr(plan, name).dtype == torch.float64
        torch.testing.assert_close(plan.token_price, exact.token_price)

    @pytest.mark.parametrize("capacity", [None, 5.0])
    @pytest.mark.parametrize("costs", [[1.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
    def test_no_gradient_passes(self, costs, capacity):
        costs = torch.tensor(costs, requires_grad=True)
        budget = Budget(
            costs,
            per_token=(torch.ones(4, requires_grad=True), torch.full((4,), 3.0)),
            per_batch=torch.tensor(9.0, requires_grad=True),
            per_expert=None if capacity is None else torch.full((3,), capacity),
        )
        plan = select(torch.rand(4, 3, requires_grad=True), budget)
        assert not any(getattr(plan, name).requires_grad for name in plan.__slots__)

    @pytest.mark.parametrize(
        ("scores", "error", "message"),
        [
            (torch.zeros(3, 5), ValueError, "scores must have shape (T, 4) for as many costs, got"),
            (torch.zeros(4), ValueError, "scores must have shape (T, 4) for as many costs, got"),
            (torch.zeros(2, 4), ValueError, "scores must have a row for each of the 3 bounds"),
            (torch.zeros(3, 4).int(), TypeError, "scores must be a floating-point tensor, got"),
            (torch.full((3, 4), INF), ValueError, "scores must be finite or -inf, got inf at"),
            (torch.full((3, 4), torch.nan), ValueError, "scores must be finite or -inf, got nan"),
        ],
    )
    def test_wrong_scores(self, scores, error, message):
        budget = Budget(torch.ones(4), per_token=(0.0, torch.ones(3)))
        with pytest.raises(error, match=re.escape(message)):
            select(scores, budget)

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            (
                Budget(torch.full((4,), 2.0), per_token=(3, 3)),
                "per_token must leave room for a whole number of experts, got bounds of at least "
                "2 and at most 1 experts of cost 2",
            ),
            (
                Budget(torch.full((4,), 2.0), per_token=(torch.tensor([2.0, 3.0, 0.0]), 3)),
                "got bounds of at least 2 and at most 1 experts",
            ),
            (
                Budget(torch.full((4,), 2.0), per_token=(4, 8), per_batch=11.9),
                "per_batch must be at least 12, the cost of 6 experts that 3 tokens need for low, "
                "got room for 5 experts",
            ),
            (
                Budget(torch.ones(4), per_token=(torch.tensor([1.0, 2.0, 0.5]), 4), per_batch=3.0),
                "per_batch must be at least 4, the cost of 4 experts",
            ),
        ],
    )
    def test_budgets_without_a_plan(self, budget, message):
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            select(torch.rand(3, 4), budget)


class Forbidden(TorchDispatchMode):
    """Fails where an operation hands a value of a tensor to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert "_local_scalar_dense" not in name, name
        assert "nonzero" not in name, name
        return func(*args, **(kwargs or {}))


class TestDevices:
    BUDGETS = (
        Budget(torch.ones(8), per_token=(1, 4), per_batch=40.0),
        Budget(torch.ones(8)),
        Budget(torch.ones(8), per_token=(torch.arange(16) % 2.0, torch.full((16,), 3.0))),
    )

    @pytest.mark.parametrize("budget", BUDGETS, ids=["numbers", "free", "by token"])
    def test_equal_costs_never_wait_for_a_device(self, budget):
        with Forbidden():
            best_whole_plan(torch.randn(16, 8), budget.counts)

    @pytest.mark.parametrize("budget", BUDGETS, ids=["numbers", "free", "by token"])
    def test_equal_costs_compile_to_one_graph(self, budget):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda scores: select(scores, budget), backend="aot_eager", fullgraph=True
        )
        scores = torch.randn(16, 8)
        plan, expected = compiled(scores), select(scores, budget)
        for name in expected.__slots__:
            assert torch.equal(getattr(plan, name), getattr(expected, name)), name
