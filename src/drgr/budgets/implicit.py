"""Derivatives of prices: Newton steps, at the prices found, on the bounds that hold with equality.

The prices solve ``r(p, theta) = 0``, one equation per price. A step ``p - J^{-1} r`` from the root
moves nothing, yet its derivative in ``theta`` is that of the prices; where ``r`` is linear in ``p``
on a fixed set of open entries the step is the closed form, so that every order is right, and each
further step makes one order more right in general.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.budgets.curvature import curvature, solve_where
from drgr.budgets.geometry import Geometry
from drgr.budgets.token_prices import Bounds

# Bounds of experts that add up to those of the tokens leave one direction of prices free.
_RANK_TOLERANCE = 1e-12


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Prices of a unit of cost, float64; what an entry pays is the sum of token's and expert's."""

    batch: Tensor
    """``nu``, shape ``()``."""
    token: Tensor
    """``mu_t``, equal to ``nu`` where the token has no price of its own, shape ``(T,)``."""
    expert: Tensor | None
    """``beta``, shape ``(E,)``; None without bounds of experts."""
    side: Tensor
    """1 where a token's cost is held at its upper bound, -1 at the lower, else 0; ``(T,)``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Residuals:
    """Excess over the bounds that hold with equality, 0 elsewhere, and how it falls in prices."""

    batch: Tensor
    token: Tensor
    expert: Tensor
    plan_slope: Tensor
    """``phi'``, shape ``(T, E)``."""
    token_slope: Tensor
    """How fast each token's cost falls in its price, shape ``(T,)``."""


def with_derivatives(
    geometry: Geometry, gates: Tensor, costs: Tensor, bounds: Bounds, prices: Prices
) -> Prices:
    """Returns the same prices as functions of gates, costs and bounds.

    A price whose equation has no open entry does not move: its derivative is 0.
    """
    for _ in range(geometry.newton_steps):
        found = _residuals(geometry, gates, costs, bounds, prices)
        prices = _newton_step(costs, prices, found)
    return prices


def plan_at(geometry: Geometry, gates: Tensor, costs: Tensor, prices: Prices) -> Tensor:
    """Returns the plan ``(T, E)`` at the prices."""
    price = prices.token.unsqueeze(1)
    return geometry.plan(gates, costs, price if prices.expert is None else price + prices.expert)


def _residuals(
    geometry: Geometry, gates: Tensor, costs: Tensor, bounds: Bounds, prices: Prices
) -> _Residuals:
    pinned = prices.side != 0
    plan = plan_at(geometry, gates, costs, prices)
    plan_slope = geometry.plan_slope(plan)
    cost = plan @ costs
    bound = torch.where(prices.side > 0, bounds.high, bounds.low)
    total = torch.where(prices.batch > 0, bounds.total, 0.0)
    excess = torch.where(pinned, bound, cost).sum() - total
    beyond = torch.zeros_like(costs)
    if prices.expert is not None and bounds.per_expert is not None:
        capacity = torch.where(prices.expert > 0, bounds.per_expert, 0.0)
        beyond = torch.where(prices.expert > 0, costs * plan.sum(dim=0) - capacity, 0.0)
    return _Residuals(
        batch=torch.where(prices.batch > 0, excess, 0.0),
        token=torch.where(pinned, cost - bound, 0.0),
        expert=beyond,
        plan_slope=plan_slope,
        token_slope=plan_slope @ costs.square(),
    )


def _newton_step(costs: Tensor, prices: Prices, found: _Residuals) -> Prices:
    """Eliminates the prices of tokens and batch, solves for the experts, and goes back."""
    pinned = prices.side != 0
    by_token = _inverse_or_zero(found.token_slope)
    by_batch = _inverse_or_zero(torch.where(pinned, 0.0, found.token_slope).sum())
    token, batch, expert = found.token * by_token, found.batch * by_batch, prices.expert
    if expert is not None:
        moved = torch.where(pinned, token, batch)
        rise, lost = _expert_step(costs, prices, found, moved, active=expert > 0)
        expert = _moved(expert, rise)
        token = token - torch.where(pinned, lost, 0.0) * by_token
        shared = torch.where(pinned, 0.0, lost).sum() * by_batch
        batch = batch - torch.where(prices.batch > 0, shared, 0.0)
    nu = _moved(prices.batch, batch)
    mu = torch.where(pinned, _moved(prices.token, token), nu)
    return Prices(batch=nu, token=mu, expert=expert, side=prices.side)


def _expert_step(
    costs: Tensor, prices: Prices, found: _Residuals, moved: Tensor, *, active: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns how the experts' prices rise, ``(E,)``, and what each token then saves, ``(T,)``.

    ``moved`` is how the tokens' prices rise at fixed prices of the experts, shape ``(T,)``.
    """
    weights = found.plan_slope * costs.square()
    rise = solve_where(
        curvature(weights, pinned=prices.side != 0, batch_binds=prices.batch > 0),
        found.expert - moved @ weights,
        active=active,
        scale=weights.sum(dim=0).detach(),
        rank_tolerance=_RANK_TOLERANCE,
    )
    return rise, weights @ rise


def _moved(value: Tensor, step: Tensor) -> Tensor:
    """Gives ``value`` the derivatives of ``step``, which is rounding, and leaves its digits."""
    return value + (step - step.detach())


def _inverse_or_zero(values: Tensor) -> Tensor:
    moves = values > 0
    return torch.where(moves, 1 / torch.where(moves, values, 1.0), 0.0)
