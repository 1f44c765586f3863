"""The Euclidean projection onto a budget against independent solvers, and at its limits."""

import math
import re

import cvxpy as cp
import numpy as np
import pytest
import torch

from drgr.budgets.budget import Budget
from drgr.budgets.projection import project
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

FLOAT64 = {"dtype": torch.float64}

# Share of the cost of all experts: least and most of a token, most of the batch on average.
REGIMES = {
    "all slack": (0.0, 1.0, 2.0),
    "token high": (0.0, 0.2, 2.0),
    "token low": (0.7, 1.0, 2.0),
    "token fixed": (0.3, 0.3, 2.0),
    "batch": (0.0, 1.0, 0.3),
    "batch and low": (0.25, 1.0, 0.3),
    "batch and high": (0.0, 0.32, 0.3),
    "batch, low and high": (0.28, 0.32, 0.3),
    "batch at its least": (0.3, 1.0, 0.3),
}


def problem(regime, seed, num_tokens=7, num_experts=5):
    """Random gates, costs and bounds, of which those of the tokens differ a little."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(num_tokens, num_experts, **FLOAT64, generator=generator) * 0.5 + 0.6
    costs = torch.rand(num_experts, **FLOAT64, generator=generator) * 1.5 + 0.5
    low, high, total = (share * costs.sum() for share in REGIMES[regime])
    wobble = torch.rand(num_tokens, **FLOAT64, generator=generator)
    low = low * (1 - 0.05 * wobble)
    high = low if regime == "token fixed" else high * (1 + 0.05 * wobble)
    total = low.sum() if regime == "batch at its least" else total * num_tokens
    return gates, Budget(costs, per_token=(low, high), per_batch=total)


def by_interior_point(gates, budget):
    """Clarabel on the quadratic programme."""
    plan = cp.Variable(gates.shape)
    cost = plan @ budget.costs.numpy()
    low, high = (bound.numpy() for bound in budget.per_token)
    constraints = [plan >= 0, plan <= 1, cost >= low, cost <= high]
    constraints.append(cp.sum(cost) <= float(budget.per_batch))
    objective = cp.Minimize(cp.sum_squares(plan - gates.numpy()) / 2)
    cp.Problem(objective, constraints).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    return torch.from_numpy(plan.value)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regime", REGIMES)
def test_agrees_with_an_interior_point_method(regime, seed):
    gates, budget = problem(regime, seed)
    result = project(gates, budget)
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.gates, by_interior_point(gates, budget), rtol=0, atol=2e-6)


def assert_certified(gates, budget, result, rounding=1e-12):
    """The optimality conditions, which are sufficient: the problem is convex."""
    costs, (low, high) = budget.costs, budget.per_token
    price = result.batch_price + result.token_price.unsqueeze(1)
    near = {"rtol": rounding, "atol": rounding}
    torch.testing.assert_close(result.gates, (gates - costs * price).clamp(0, 1), **near)
    cost = result.gates @ costs
    assert (cost <= high * (1 + rounding)).all()
    assert (cost >= low * (1 - rounding)).all()
    torch.testing.assert_close(result.spend, cost.sum(), **near)
    raised, lowered = result.token_price > 0, result.token_price < 0
    torch.testing.assert_close(cost[raised], high.expand_as(cost)[raised], **near)
    torch.testing.assert_close(cost[lowered], low.expand_as(cost)[lowered], **near)
    assert result.batch_price >= 0
    assert cost.sum() <= budget.per_batch * (1 + rounding)
    if result.batch_price > 0:
        torch.testing.assert_close(cost.sum(), budget.per_batch, **near)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regime", REGIMES)
def test_prices_certify_the_plan(regime, seed):
    gates, budget = problem(regime, seed)
    result = project(gates, budget)
    assert_certified(gates, budget, result)
    assert torch.equal(result.expert_price, torch.zeros_like(budget.costs))


def test_regimes_are_what_they_say():
    found = {}
    for regime in REGIMES:
        results = [project(*problem(regime, seed)) for seed in range(3)]
        signs = torch.cat([result.token_price.sign() for result in results])
        found[regime] = (
            bool((signs > 0).any()),
            bool((signs < 0).any()),
            all(result.batch_price > 0 for result in results),
        )
    assert found == {
        "all slack": (False, False, False),
        "token high": (True, False, False),
        "token low": (False, True, False),
        "token fixed": (True, True, False),
        "batch": (False, False, True),
        "batch and low": (False, True, True),
        "batch and high": (True, False, True),
        "batch, low and high": (True, True, True),
        "batch at its least": (False, True, True),
    }


@pytest.mark.parametrize("regime", ["batch, low and high", "batch and low", "token low"])
def test_price_is_the_derivative_of_the_least_distance(regime):
    gates, budget = problem(regime, 0)
    (low, high), total = budget.per_token, budget.per_batch
    result = project(gates, budget)
    step = 1e-5

    def distance(low, high, total):
        moved = Budget(budget.costs, per_token=(low, high), per_batch=total)
        return (project(gates, moved).gates - gates).square().sum().item() / 2

    slope = (distance(low, high, total + step) - distance(low, high, total - step)) / (2 * step)
    assert slope == pytest.approx(-result.batch_price.item(), abs=1e-7)
    for token, price in enumerate(result.token_price.tolist()):
        one = torch.zeros_like(low)
        one[token] = step
        by_high = (distance(low, high + one, total) - distance(low, high - one, total)) / (2 * step)
        by_low = (distance(low + one, high, total) - distance(low - one, high, total)) / (2 * step)
        assert by_high == pytest.approx(-max(price, 0), abs=1e-7)
        assert by_low == pytest.approx(-min(price, 0), abs=1e-7)


def test_without_bounds_gates_are_clipped():
    gates = torch.randn(50, 8)
    result = project(gates, Budget(torch.ones(8)))
    assert torch.equal(result.gates, gates.clamp(0, 1))
    assert not result.token_price.any()
    assert result.batch_price.item() == 0.0


def test_equal_costs_and_a_fixed_number_is_the_capped_simplex():
    gates = torch.randn(20, 6, **FLOAT64)
    result = project(gates, Budget(torch.ones(6, **FLOAT64), per_token=(2.0, 2.0)))
    for row, found in zip(gates.numpy(), result.gates.numpy(), strict=True):
        lower, upper = row.min() - 1, row.max()
        for _ in range(100):
            middle = (lower + upper) / 2
            if np.clip(row - middle, 0, 1).sum() > 2:
                lower = middle
            else:
                upper = middle
        np.testing.assert_allclose(found, np.clip(row - upper, 0, 1), atol=1e-13)


def test_one_bound_on_the_batch_is_one_long_row():
    gates, costs = torch.randn(6, 4, **FLOAT64), torch.rand(4, **FLOAT64) + 0.5
    batch = project(gates, Budget(costs, per_batch=5.0))
    row = project(gates.reshape(1, -1), Budget(costs.repeat(6), per_token=(0.0, 5.0)))
    torch.testing.assert_close(batch.gates.reshape(1, -1), row.gates, rtol=0, atol=1e-14)
    torch.testing.assert_close(batch.batch_price, row.token_price[0])


def test_batch_of_tokens_is_each_token_alone_where_only_tokens_are_bounded():
    gates, budget = problem("token high", 4)
    together = project(gates, budget)
    low, high = budget.per_token
    for token in range(len(gates)):
        alone = Budget(budget.costs, per_token=(low[token], high[token]))
        result = project(gates[token : token + 1], alone)
        torch.testing.assert_close(result.gates[0], together.gates[token], rtol=0, atol=1e-14)


@pytest.mark.parametrize("high", [0.0, 1e-3, 3.0])
def test_ends_of_the_bounds(high):
    gates, costs = torch.randn(4, 3, **FLOAT64) * 2, torch.tensor([0.5, 1.0, 1.5], **FLOAT64)
    result = project(gates, Budget(costs, per_token=(high, high), per_batch=4 * high))
    assert result.status is Status.CONVERGED
    assert (result.gates >= 0).all()
    assert (result.gates <= 1).all()
    torch.testing.assert_close(result.gates @ costs, torch.full((4,), high, **FLOAT64))


def test_ties_share_and_saturated_rows_keep_their_ends():
    budget = Budget(torch.ones(4), per_token=(1.0, 2.0), per_batch=5.0)
    gates = torch.tensor([[0.7, 0.7, 0.7, 0.7], [9.0, 9.0, -9.0, -9.0], [-5.0, -5.0, -5.0, -5.0]])
    result = project(gates, budget)
    expected = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0], [0.25] * 4])
    torch.testing.assert_close(result.gates, expected)
    assert result.status is Status.CONVERGED


def test_minus_infinity_forbids_an_entry():
    gates = torch.tensor([[-math.inf, 0.2, 0.4], [0.9, -math.inf, -math.inf]])
    result = project(gates, Budget(torch.ones(3), per_token=(1.0, 3.0)))
    torch.testing.assert_close(result.gates, torch.tensor([[0.0, 0.4, 0.6], [1.0, 0.0, 0.0]]))
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("regime", REGIMES)
def test_gates_of_a_million_and_costs_far_apart(regime):
    gates, budget = problem(regime, 1)
    result = project(gates * 1e6, budget)
    assert result.status is Status.CONVERGED
    assert_certified(gates * 1e6, budget, result, rounding=1e-9)
    costs = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6], **FLOAT64)
    low, high, total = (share * costs.sum() for share in REGIMES[regime])
    spread = Budget(costs, per_token=(low, high), per_batch=len(gates) * total)
    result = project(gates, spread)
    assert result.status is Status.CONVERGED
    assert_certified(gates, spread, result)


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("regime", REGIMES)
def test_single_precision_is_the_rounded_double(regime, scale):
    gates, budget = problem(regime, 2)
    gates = (scale * gates).float()
    single, double = project(gates, budget), project(gates.double(), budget)
    assert single.gates.dtype == single.batch_price.dtype == single.spend.dtype == torch.float32
    assert torch.equal(single.gates, double.gates.float())
    assert torch.equal(single.token_price, double.token_price.float())
    cost, (low, high) = single.gates.double() @ budget.costs, budget.per_token
    assert (cost <= high * (1 + 1e-6)).all()
    assert (cost >= low * (1 - 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_and_returned_in_single_precision(dtype):
    gates = torch.rand(6, 4).to(dtype)
    budget = Budget(torch.ones(4, dtype=dtype), per_token=(0.5, 1.0), per_batch=4.0)
    result = project(gates, budget)
    assert result.gates.dtype == torch.float32
    reference = project(gates.double(), Budget(torch.ones(4), per_token=(0.5, 1.0), per_batch=4.0))
    torch.testing.assert_close(result.gates.double(), reference.gates, rtol=0, atol=1e-7)


def test_large_batches_start_from_a_sample():
    gates, costs = torch.rand(3000, 5, **FLOAT64), torch.rand(5, **FLOAT64) + 0.5
    # Sorted rows: every sixteenth row would mislead a search that trusted the sample.
    gates = gates * torch.linspace(0, 3, 3000, **FLOAT64).unsqueeze(1)
    result = project(gates, Budget(costs, per_token=(0.5, 2.0), per_batch=3000.0 * 1.2))
    assert result.status is Status.CONVERGED
    assert result.spend.item() == pytest.approx(3600, rel=1e-14)


def test_empty_batch():
    gates = torch.zeros(0, 3, requires_grad=True)
    result = project(gates, Budget(torch.ones(3), per_batch=2.0, per_expert=torch.ones(3)))
    assert result.gates.shape == (0, 3)
    assert result.token_price.shape == (0,)
    assert result.spend.item() == 0.0
    assert result.status is Status.CONVERGED
    result.gates.sum().backward()
    assert gates.grad.shape == (0, 3)


GATES = torch.rand(4, 3)
REFUSED = [
    (
        TypeError,
        torch.ones(4, 3).long(),
        {},
        "gates must be a floating-point tensor, got torch.int",
    ),
    (ValueError, torch.ones(3), {}, "gates must have shape ('any', 3), got (3,)"),
    (ValueError, torch.ones(4, 2), {}, "gates must have shape ('any', 3), got (4, 2)"),
    (
        ValueError,
        torch.tensor([[1.0, 1.0, math.nan]]),
        {},
        "gates must be finite or -inf, got nan at index (0, 2); repair that entry",
    ),
    (
        ValueError,
        torch.tensor([[1.0, math.inf, 1.0]]),
        {},
        "gates must be finite or -inf, got inf at index (0, 1)",
    ),
    (
        ValueError,
        GATES,
        {"per_token": (torch.zeros(3), 1.0)},
        "budget.per_token low must have shape (4,), got (3,)",
    ),
    (
        ValueError,
        GATES,
        {"per_token": (0.0, torch.ones(5))},
        "budget.per_token high must have shape (4,), got (5,)",
    ),
    (
        ValueError,
        torch.ones(4, 3, device="meta"),
        {},
        "budget.costs must be on the device of gates meta, got cpu; move the tensors",
    ),
    (
        InfeasibleBudgetError,
        GATES,
        {"per_token": (2.0, 3.0), "per_batch": 7.5},
        "per_batch must be at least the sum of per_token low, got per_batch 7.5 and low adding "
        "up to 8; raise the one or lower the other",
    ),
    (
        InfeasibleBudgetError,
        torch.tensor([[1.0, 1.0, 1.0], [1.0, -math.inf, -math.inf]]),
        {"per_token": (1.5, 3.0)},
        "per_token low must be at most what the open gates of a token cost, got low 1.5 for token "
        "1 whose open gates cost 1; lower it or open more gates",
    ),
]


@pytest.mark.parametrize(("error", "gates", "bounds", "message"), REFUSED)
def test_refuses_with_name_value_and_remedy(error, gates, bounds, message):
    budget = Budget(torch.ones(3), **bounds)
    with pytest.raises(error, match=re.escape(message)):
        project(gates, budget)


def test_arithmetic_that_overflows_is_reported():
    gates = torch.tensor([[1e300, 1e300]], **FLOAT64)
    budget = Budget(torch.tensor([1e-300, 1e-200], **FLOAT64), per_token=(0.0, 1e-300))
    assert project(gates, budget).status is not Status.CONVERGED
