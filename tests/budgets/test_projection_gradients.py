"""Derivatives of both projections, to second order and in every input, and under the compiler."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from drgr.budgets.budget import Budget
from drgr.budgets.entropic import project_entropic
from drgr.budgets.projection import project

FLOAT64 = {"dtype": torch.float64}
SOLVERS = {"euclidean": project, "entropic": project_entropic}
BOTH = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())

# Share of the cost of all experts: least and most of a token, most of the batch on average; then
# the share of the tokens that an expert may have.
REGIMES = {
    "all slack": (0.01, 1.0, 2.0, None),
    "token high": (0.01, 0.25, 2.0, None),
    "token low": (0.8, 1.0, 2.0, None),
    "batch": (0.01, 1.0, 0.35, None),
    "batch, low and high": (0.32, 0.38, 0.35, None),
    "experts": (0.01, 1.0, 2.0, 0.4),
    "experts and tokens": (0.36, 0.42, 2.0, 0.4),
    "experts and batch": (0.01, 1.0, 0.3, 0.4),
    "all": (0.26, 0.33, 0.3, 0.36),
}


def inputs(regime, seed=0, num_tokens=4, num_experts=3):
    """Gates, costs and bounds at a generic point: all differ, and all require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, **FLOAT64, generator=generator)

    low, high, total, share = REGIMES[regime]
    gates = 0.1 + 0.85 * random(num_tokens, num_experts)
    gates[:, 0] += 0.25
    costs = 0.6 + random(num_experts)
    full = costs.sum().item()
    found = [gates, costs, low * full * (1 + 0.03 * random(num_tokens))]
    found.append(high * full * (1 - 0.03 * random(num_tokens)) + (high == 1))
    found.append(torch.tensor(total * full * num_tokens, **FLOAT64))
    if share is not None:
        found.append(share * num_tokens * costs * (0.9 + 0.2 * random(num_experts)))
    return [tensor.detach().requires_grad_() for tensor in found]


def projected(solve):
    def results(gates, costs, low, high, total, per_expert=None):
        budget = Budget(costs, per_token=(low, high), per_batch=total, per_expert=per_expert)
        result = solve(gates, budget)
        prices = (result.token_price, result.batch_price, result.expert_price)
        return result.gates, *prices, result.spend

    return results


@BOTH
@pytest.mark.parametrize("regime", REGIMES)
def test_first_and_second_derivatives_in_every_input(solve, regime):
    arguments = inputs(regime)
    _, token, batch, expert, _ = projected(solve)(*arguments)
    low, high, total, share = REGIMES[regime]
    assert bool((token > 0).any()) == (high < 0.5)
    assert bool((token < 0).any()) == (low > 0.1)
    assert bool(batch > 0) == (total < 1)
    assert bool((expert > 0).any()) == (share is not None)
    # Fast mode compares random projections of the derivatives instead of every entry.
    assert gradcheck(projected(solve), arguments, atol=1e-6, fast_mode=share is not None)
    assert gradgradcheck(projected(solve), arguments, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("regime", REGIMES)
def test_gates_have_the_derivative_of_the_active_set(regime):
    """On free entries: identity minus the projection on the rows that hold with equality."""
    arguments = inputs(regime)
    gates, costs = arguments[0], arguments[1].detach()
    plan, token, batch, expert, _ = projected(project)(*arguments)
    free = ((plan > 0) & (plan < 1)).flatten().double().detach()
    rows = [torch.eye(4, **FLOAT64)[t].repeat_interleave(3) for t in (token != 0).nonzero()[:, 0]]
    rows += [torch.eye(3, **FLOAT64)[e].repeat(4) for e in (expert > 0).nonzero()[:, 0]]
    rows += [torch.ones(12, **FLOAT64)] * int(batch > 0)
    expected = free.diag()
    if rows:
        bound = torch.stack(rows) * costs.repeat(4) * free
        expected = expected - bound.T @ torch.linalg.pinv(bound @ bound.T) @ bound
    found = torch.autograd.functional.jacobian(
        lambda gates: projected(project)(gates, *arguments[1:])[0], gates
    )
    torch.testing.assert_close(found.reshape(12, 12), expected, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("regime", REGIMES)
def test_slope_of_the_least_distance_is_the_price(solve, regime):
    arguments = inputs(regime)
    gates, _, low, high, total, *per_expert = arguments
    plan, token, batch, expert, _ = projected(solve)(*arguments)
    if solve is project:
        distance = (plan - gates).square().sum() / 2
    else:
        distance = (torch.special.xlogy(plan, plan / gates) - plan + gates).sum()
    slopes = torch.autograd.grad(distance, [low, high, total, *per_expert], retain_graph=True)
    expected = [-token.clamp(max=0), -token.clamp(min=0), -batch, -expert]
    for slope, price in zip(slopes, expected, strict=False):
        torch.testing.assert_close(slope, price, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("regime", REGIMES)
def test_values_do_not_depend_on_whether_gradients_are_wanted(solve, regime):
    arguments = inputs(regime)
    with torch.no_grad():
        expected = projected(solve)(*arguments)
    found = projected(solve)(*arguments)
    for value, reference in zip(found, expected, strict=True):
        assert torch.equal(value, reference)
    assert all(value.requires_grad for value in (found[0], found[-1]))
    assert not any(value.requires_grad for value in expected)


@BOTH
def test_only_bounds_may_require_gradients(solve):
    arguments = [tensor.detach() for tensor in inputs("batch, low and high")]
    arguments[4].requires_grad_()
    plan, _, batch, _, spend = projected(solve)(*arguments)
    (slope,) = torch.autograd.grad(spend, arguments[4], retain_graph=True)
    assert slope.item() == pytest.approx(1, rel=1e-13)
    assert plan.requires_grad
    assert torch.autograd.grad(batch, arguments[4])[0] < 0


@BOTH
def test_saturated_rows_have_no_derivative_and_no_nan(solve):
    gates = torch.tensor([[9.0, 8.0], [0.0, 0.0], [0.4, 0.7]], **FLOAT64, requires_grad=True)
    low = torch.tensor([2.0, 0.0, 2.0], **FLOAT64, requires_grad=True)
    high = torch.tensor([2.0, 0.0, 2.0], **FLOAT64, requires_grad=True)
    budget = Budget(
        torch.ones(2, **FLOAT64), per_token=(low, high), per_batch=torch.tensor(4.0, **FLOAT64)
    )
    result = solve(gates, budget)
    total = result.gates.sum() + result.token_price.sum() + result.batch_price
    slopes = torch.autograd.grad(total, [gates, low, high], allow_unused=True, create_graph=True)
    assert all(slope is None or slope.isfinite().all() for slope in slopes)
    (slope,) = torch.autograd.grad(result.gates[2].sum(), gates, retain_graph=True)
    assert slope.abs().max() < 1e-12


@BOTH
def test_entries_on_an_end_do_not_move(solve):
    gates = torch.tensor([[1.0, 0.5, 2.0]], **FLOAT64, requires_grad=True)
    plan = solve(gates, Budget(torch.ones(3))).gates
    (slope,) = torch.autograd.grad(plan.sum(), gates)
    assert torch.equal(slope, torch.tensor([[0.0, 1.0, 0.0]], **FLOAT64))


def test_a_closed_token_is_held_at_a_lower_bound_of_zero():
    gates = torch.tensor([[0.8, 0.9], [-1.0, -2.0]], **FLOAT64)
    costs = torch.tensor([1.0, 2.0], **FLOAT64)

    def batch_price(low):
        return project(gates, Budget(costs, per_token=(low, 3.0), per_batch=1.5)).batch_price

    low = torch.zeros(2, **FLOAT64, requires_grad=True)
    (slope,) = torch.autograd.grad(batch_price(low), low)
    step = torch.tensor([0.0, 1e-4], **FLOAT64)
    change = (batch_price(low.detach() + step) - batch_price(low.detach())) / 1e-4
    assert slope[1].item() == pytest.approx(change.item(), rel=1e-9)
    assert slope[1] > 0


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_bounds_of_experts_that_leave_no_room_still_have_derivatives(solve, seed):
    """Bounds that add up to those of the tokens leave one direction of prices free."""
    generator = torch.Generator().manual_seed(seed)
    gates, weights = torch.rand(2, 7, 4, **FLOAT64, generator=generator)
    gates = (0.2 + 0.6 * gates).requires_grad_()
    costs = 0.5 + torch.rand(4, **FLOAT64, generator=generator)
    low = 0.4 * costs.sum()
    budget = Budget(costs, per_token=(low, low), per_expert=0.4 * 7 * costs)
    (slope,) = torch.autograd.grad((solve(gates, budget).gates * weights).sum(), gates)
    step = 1e-6
    for token, expert in itertools.product(range(2), range(4)):
        moved = torch.zeros_like(weights)
        moved[token, expert] = step
        up, down = solve(gates + moved, budget).gates, solve(gates - moved, budget).gates
        expected = ((up - down) * weights).sum().item() / (2 * step)
        assert slope[token, expert].item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_input(dtype):
    gates = torch.rand(5, 4).to(dtype).requires_grad_()
    costs = torch.ones(4, dtype=dtype, requires_grad=True)
    result = project(gates, Budget(costs, per_token=(0.5, 1.0), per_batch=4.0))
    result.gates.square().sum().backward()
    assert gates.grad.dtype == dtype
    assert costs.grad.dtype == dtype
    assert gates.grad.isfinite().all()


@pytest.mark.slow
def test_compiled_in_one_graph_it_is_the_same():
    gates, costs, low, high, total, per_expert = (x.detach().float() for x in inputs("all"))
    budget = Budget(costs, per_token=(low, high), per_batch=total, per_expert=per_expert)

    def plan_of(gates):
        return project(gates, budget).gates

    weights, found = torch.rand(4, 3), []
    compiled = torch.compile(plan_of, fullgraph=True, backend="aot_eager")
    for function in (compiled, plan_of):
        leaf = gates.clone().requires_grad_()
        plan = function(leaf)
        (plan * weights).sum().backward()
        found.append((plan.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(gates), found[1][0], rtol=1e-6, atol=1e-7)
