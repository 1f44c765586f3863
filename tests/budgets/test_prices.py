"""The search for prices: its two loops, its bound, and that one of them never asks the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drgr.budgets.geometry import Entropic, Euclidean
from drgr.budgets.price_roots import Curve, falling_root
from drgr.budgets.prices import OUTCOMES, budget_prices, opaque_budget_prices
from drgr.budgets.token_prices import Bounds, Rows, token_prices
from drgr.numerics import Status

FLOAT64 = {"dtype": torch.float64}
BOTH = pytest.mark.parametrize("entropic", [False, True])

# Share of the cost of all experts: least and most of a token, most of the batch on average.
REGIMES = [(0.0, 1.0, 2.0), (0.0, 0.2, 2.0), (0.8, 1.0, 2.0), (0.28, 0.32, 0.3), (0.29, 1.0, 0.3)]


class NothingRead(TorchDispatchMode):
    """Fails on every operation whose result's shape or value the host would have to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique"}
        assert not any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if name == "index" else ())
        )
        return function(*args, **(kwargs or {}))


def problem(low, high, total, num_tokens=9, num_experts=5):
    gates = torch.rand(num_tokens, num_experts, **FLOAT64) * 1.2
    costs = torch.rand(num_experts, **FLOAT64) + 0.5
    bounds = torch.tensor([low, high], **FLOAT64) * costs.sum()
    per_token = bounds.unsqueeze(1).expand(2, num_tokens)
    return gates, costs, per_token, total * costs.sum() * num_tokens


@BOTH
@pytest.mark.parametrize("shares", REGIMES)
def test_both_loops_find_the_same_prices(shares, entropic):
    arguments = problem(*shares)
    early = budget_prices(*arguments, None, entropic=entropic, early_exit=True)
    bound = budget_prices(*arguments, None, entropic=entropic, early_exit=False)
    for found, expected in zip(bound, early, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert OUTCOMES[int(bound[-1])] is Status.CONVERGED


@pytest.mark.parametrize("geometry", [Euclidean(), Entropic()])
@pytest.mark.parametrize("shares", REGIMES)
def test_without_early_exit_the_host_never_waits(shares, geometry):
    gates, costs, (low, high), total = problem(*shares)
    bounds = Bounds(low=low, high=high, total=total)
    rows = Rows.of(geometry, geometry.coordinates(gates), costs)
    with NothingRead():
        token_prices(rows, bounds, early_exit=False)
    with pytest.raises(AssertionError), NothingRead():
        token_prices(rows, bounds, early_exit=True)


@BOTH
def test_operator_obeys_its_schema(entropic):
    gates, costs, per_token, total = problem(0.28, 0.32, 0.3)
    options = {"entropic": entropic, "early_exit": True}
    torch.library.opcheck(opaque_budget_prices, (gates, costs, per_token, total, None), options)
    capacity = 0.3 * len(gates) * costs
    torch.library.opcheck(opaque_budget_prices, (gates, costs, per_token, total, capacity), options)


@pytest.mark.parametrize("early_exit", [True, False])
def test_roots_of_steps_and_cliffs_are_found_to_the_last_bit(early_exit):
    """Newton's method is of no use on a step; the bits of a float64 are 64 in any case."""
    places = torch.tensor([-1e300, -2.5, -5e-324, 0.0, 1e-310, 1.0, 3e7], **FLOAT64)

    def excess(price):
        return torch.where(price < places, 1.0, -1.0).double()

    def newton(price):
        return excess(price), torch.full_like(price, torch.nan)

    found = falling_root(
        Curve(excess=excess, newton=newton, tolerance=torch.zeros_like(places)),
        start=torch.ones_like(places),
        lower=torch.full_like(places, -1.7e308),
        upper=torch.full_like(places, 1.7e308),
        early_exit=early_exit,
    )
    assert torch.equal(found, places)


def test_early_exit_stops_after_few_steps():
    evaluations = []

    def excess(price):
        evaluations.append(price)
        return 2 - price**3

    def newton(price):
        return excess(price), excess(price) / (3 * price**2)

    one = torch.ones(1, **FLOAT64)
    curve = Curve(excess=excess, newton=newton, tolerance=1e-15 * one)
    found = falling_root(curve, start=one, lower=0 * one, upper=4 * one, early_exit=True)
    assert found.item() == pytest.approx(2 ** (1 / 3), rel=1e-15)
    assert len(evaluations) < 20


@pytest.mark.parametrize("early_exit", [True, False])
def test_contradictions_and_overflow_are_outcomes(early_exit):
    def outcome(gates, costs, low, high, total):
        per_token = torch.tensor([low, high], **FLOAT64).unsqueeze(1).expand(2, len(gates))
        found = budget_prices(
            torch.tensor(gates, **FLOAT64),
            torch.tensor(costs, **FLOAT64),
            per_token,
            torch.tensor(total, **FLOAT64),
            None,
            entropic=False,
            early_exit=early_exit,
        )
        return OUTCOMES[int(found[-1])]

    closed = float("-inf")
    assert outcome([[0.5, 0.5]], [1.0, 1.0], 1.5, 2.0, 1.0) is Status.INFEASIBLE
    assert outcome([[0.5, closed]], [1.0, 1.0], 1.5, 2.0, 9.0) is Status.INFEASIBLE
    assert outcome([[float("nan"), 0.5]], [1.0, 1.0], 0.0, 2.0, 9.0) is Status.NON_FINITE
    assert outcome([[0.5, 0.5]], [1.0, 1.0], 0.5, 0.8, 9.0) is Status.CONVERGED
