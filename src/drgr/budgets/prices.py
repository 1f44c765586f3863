"""All prices of a budget, also as one operator that is opaque to the compiler.

Their loops depend on the data, so a compiled graph calls the operator. Without a compiler the plain
function is called: the first call of an operator of this kind loads the compiler, for two seconds.
"""

import torch
from torch import Tensor

from drgr.budgets.capacity import expert_prices, rounding_by_expert
from drgr.budgets.geometry import Entropic, Euclidean, Geometry
from drgr.budgets.token_prices import Bounds, Rows, TokenPrices, token_prices
from drgr.numerics import Status

OUTCOMES = (
    Status.CONVERGED,
    Status.INACCURATE,
    Status.MAX_STEPS,
    Status.INFEASIBLE,
    Status.NON_FINITE,
)
_ROUNDINGS = 16


def budget_prices(
    gates: Tensor,
    costs: Tensor,
    per_token: Tensor,
    per_batch: Tensor,
    per_expert: Tensor | None,
    *,
    entropic: bool,
    early_exit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Finds the prices at which the nearest plan to the gates is within a budget.

    Args:
        gates: Gates ``v``, shape ``(T, E)``; this and all other tensors are float64.
        costs: Costs ``c``, shape ``(E,)``.
        per_token: Least and most cost of each token, shape ``(2, T)``.
        per_batch: Most cost of the batch, shape ``()``.
        per_expert: Most cost of each expert, shape ``(E,)``, or None.
        entropic: Whether the distance is the Kullback-Leibler one, else the Euclidean.
        early_exit: Whether loops end when their rows have converged, at one wait for the device
            per step; else they run their bounds. With ``per_expert`` they always end early.

    Returns:
        Price of the batch ``()``; all that each token pays for a unit of cost ``(T,)``; price of
        each expert ``(E,)``; side at which a token's cost is held, 1 high, -1 low, else 0, int8
        ``(T,)``; index into ``OUTCOMES``, int64 ``()``.
    """
    geometry: Geometry = Entropic() if entropic else Euclidean()
    low, high = per_token
    bounds = Bounds(low=low, high=high, total=per_batch, per_expert=per_expert)
    beta = torch.zeros_like(costs)
    feasible = True
    if gates.shape[0] == 0:
        return costs.new_zeros(()), low.clone(), beta, low.to(torch.int8), _index(costs, 0)
    coordinates = geometry.coordinates(gates)
    if per_expert is None:
        rows = Rows.of(geometry, coordinates, costs)
        prices = token_prices(rows, bounds, early_exit=early_exit)
    else:
        solved = expert_prices(geometry, coordinates, costs, bounds, per_expert)
        prices, beta, feasible = solved.tokens, solved.expert, solved.feasible
    outcome = _outcome(prices, costs, bounds, beta)
    if not feasible:
        outcome = _index(costs, OUTCOMES.index(Status.INFEASIBLE))
    return prices.batch.clone(), prices.token, beta, prices.side, outcome


opaque_budget_prices = torch.library.custom_op(
    "drgr::budget_prices", budget_prices, mutates_args=()
)


@opaque_budget_prices.register_fake
def _(
    gates: Tensor, costs: Tensor, *_bounds: Tensor | None, **_options: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of the results, which do not depend on the data."""
    tokens = gates.shape[0]
    return (
        gates.new_empty(()),
        gates.new_empty((tokens,)),
        torch.empty_like(costs),
        gates.new_empty((tokens,), dtype=torch.int8),
        gates.new_empty((), dtype=torch.int64),
    )


def _outcome(prices: TokenPrices, costs: Tensor, bounds: Bounds, beta: Tensor) -> Tensor:
    """Returns the index of the outcome: every bound, and every bound with a price, to rounding."""
    nu, mu = prices.batch, prices.token
    cost = prices.plan @ costs
    squares = costs.square()
    unit = _ROUNDINGS * torch.finfo(costs.dtype).eps
    rounding = unit * (costs.sum() + mu.abs() * squares.sum() + squares @ beta)
    short, over = bounds.low - cost, cost - bounds.high
    unmet = torch.where(mu > nu, over.abs(), torch.where(mu < nu, short.abs(), over))
    excess = cost.sum() - bounds.total
    missed = torch.where(nu > 0, excess.abs(), excess) > rounding.sum()
    missed |= (torch.maximum(unmet, short) > rounding).any()
    impossible = (short > rounding).any()
    impossible |= bounds.low.sum() - bounds.total > rounding.sum()
    exhausted = torch.zeros_like(missed)
    if bounds.per_expert is not None:
        beyond = costs * prices.plan.sum(dim=0) - bounds.per_expert
        beyond = torch.where(beta > 0, beyond.abs(), beyond)
        exhausted = (beyond > rounding_by_expert(costs, mu, beta)).any()
    finite = (prices.plan.sum() + nu + mu.sum() + beta.sum()).isfinite()
    index = _index(cost, 0)
    for outcome, holds in (
        (Status.INACCURATE, missed),
        (Status.MAX_STEPS, exhausted),
        (Status.INFEASIBLE, impossible),
        (Status.NON_FINITE, ~finite),
    ):
        index = torch.where(holds, OUTCOMES.index(outcome), index)
    return index


def _index(like: Tensor, value: int) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=like.device)
