"""Prices of a batch and of its tokens at given expert prices: one scalar root, then one per token.

A token pays ``mu_t = nu + tau_t`` for a unit of cost. At the batch price ``nu`` alone its plan
costs ``g_t(nu)``, and its own price keeps that within its bounds; so the batch costs
``S(nu) = sum_t clamp(g_t(nu), low_t, high_t)``, and ``nu`` is the root of ``S(nu) = C`` or 0. No
token's price is needed to find it.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.budgets.geometry import Geometry
from drgr.budgets.price_roots import Curve, falling_root

_ROUNDINGS = 4
# The batch price of every sixteenth token of a large batch is a cheap guess of that of all.
_SAMPLE_STRIDE = 16
_LARGE_BATCH = 1024


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds in units of cost, float64."""

    low: Tensor
    """Least cost of each token, shape ``(T,)``."""
    high: Tensor
    """Most cost of each token, shape ``(T,)``."""
    total: Tensor
    """Most cost of the batch, shape ``()``."""
    per_expert: Tensor | None = None
    """Most cost of each expert, shape ``(E,)``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrices:
    """Prices that meet the bounds of the tokens and the batch."""

    batch: Tensor
    """``nu >= 0``, shape ``()``; 0 where the batch is within its bound."""
    token: Tensor
    """``mu_t``, all that a token pays, shape ``(T,)``."""
    side: Tensor
    """1 where the token is held at its upper bound, -1 at the lower, else 0; int8 ``(T,)``."""
    plan: Tensor
    """The nearest plan at these prices, shape ``(T, E)``."""


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that buy at one price each, with room for the plans that they choose.

    ``cost_at`` overwrites the plans of the last call; ``slope`` is the derivative at that call.
    """

    geometry: Geometry
    coordinates: Tensor
    costs: Tensor
    plan: Tensor
    sensitivity: Tensor

    @classmethod
    def of(cls, geometry: Geometry, coordinates: Tensor, costs: Tensor) -> "Rows":
        """Makes room for plans of ``coordinates``, shape ``(rows, n)``, at ``costs``, ``(n,)``."""
        room = (torch.empty_like(coordinates), torch.empty_like(coordinates))
        return cls(geometry, coordinates, costs, *room)

    def cost_at(self, price: Tensor) -> Tensor:
        """Returns what each row costs at its price, shape ``(rows,)``."""
        torch.addcmul(self.coordinates, self.costs, price.unsqueeze(-1), value=-1, out=self.plan)
        return self.geometry.plan_(self.plan) @ self.costs

    def slope(self) -> Tensor:
        """Returns how fast the cost of each row falls in its price, shape ``(rows,)``."""
        return self.geometry.sensitivity(self.plan, self.sensitivity) @ self.costs.square()

    def select(self, rows: Tensor) -> "Rows":
        """Returns the rows of the given indices; they share the room of these."""
        few = len(rows)
        chosen = self.coordinates[rows]
        return Rows(self.geometry, chosen, self.costs, self.plan[:few], self.sensitivity[:few])


def token_prices(
    rows: Rows, bounds: Bounds, *, early_exit: bool, start: Tensor | None = None
) -> TokenPrices:
    """Finds the prices of the batch and of each token.

    Args:
        rows: One row per token.
        bounds: Bounds of tokens and batch. Where they cannot be met the prices are as high or as
            low as has an effect.
        early_exit: As in :func:`falling_root`.
        start: A guess of the batch price, shape ``()``.

    Returns:
        The prices, and the plan at them. The plan shares memory with ``rows``.
    """
    nu = _batch_price(rows, bounds, start, early_exit=early_exit)
    cost = rows.cost_at(nu.expand_as(bounds.low))
    side = torch.where(cost >= bounds.high, 1, torch.where(cost <= bounds.low, -1, 0))
    outside = (cost > bounds.high) | (cost < bounds.low)
    target = torch.where(cost > bounds.high, bounds.high, bounds.low)
    if early_exit:
        index = outside.nonzero().squeeze(-1)
        mu = nu.repeat(len(cost))
        if len(index) > 0:
            chosen = rows.select(index)
            mu[index] = _own_prices(chosen, nu, cost[index], target[index], early_exit=True)
    else:
        mu = torch.where(outside, _own_prices(rows, nu, cost, target, early_exit=False), nu)
    rows.cost_at(mu)
    return TokenPrices(batch=nu, token=mu, side=side.to(torch.int8), plan=rows.plan)


def _batch_price(rows: Rows, bounds: Bounds, start: Tensor | None, *, early_exit: bool) -> Tensor:
    """Returns the smallest price at which the batch is within its bound, shape ``()``."""

    def held(price: Tensor) -> tuple[Tensor, Tensor]:
        cost = rows.cost_at(price)
        return cost, torch.minimum(torch.maximum(cost, bounds.low), bounds.high)

    def excess(price: Tensor) -> Tensor:
        return held(price)[1].sum(dim=0, keepdim=True) - target

    def newton(price: Tensor) -> tuple[Tensor, Tensor]:
        cost, paid = held(price)
        free = (cost > bounds.low) & (cost < bounds.high)
        slope = (rows.slope() * free).sum(dim=0, keepdim=True)
        value = paid.sum(dim=0, keepdim=True)
        return value - target, rows.geometry.newton_move(value, target, slope)

    target = torch.maximum(bounds.total, bounds.low.sum()).reshape(1)
    zero = torch.zeros_like(target)
    too_much = excess(zero) > 0
    if early_exit and not bool(too_much):
        return zero[0]
    if start is None:
        many = early_exit and len(rows.coordinates) >= _LARGE_BATCH
        start = _sampled_batch_price(rows, bounds) if many else zero
    highest = rows.coordinates.amax(dim=0)
    top = rows.geometry.highest_price(highest, rows.costs, highest).amax().clamp_min(0).reshape(1)
    curve = Curve(excess=excess, newton=newton, tolerance=_rounding(target))
    root = falling_root(
        curve,
        start=torch.minimum(start.reshape(1), top),
        lower=zero,
        upper=top,
        early_exit=early_exit,
    )
    return torch.where(too_much, root, zero)[0]


def _sampled_batch_price(rows: Rows, bounds: Bounds) -> Tensor:
    sample = slice(None, None, _SAMPLE_STRIDE)
    few = Rows.of(rows.geometry, rows.coordinates[sample].contiguous(), rows.costs)
    share = len(few.coordinates) / len(rows.coordinates)
    held = Bounds(low=bounds.low[sample], high=bounds.high[sample], total=bounds.total * share)
    return _batch_price(few, held, None, early_exit=True)


def _own_prices(
    rows: Rows, nu: Tensor, cost: Tensor, target: Tensor, *, early_exit: bool
) -> Tensor:
    """Returns the price of each row at which it costs ``target``, given its ``cost`` at ``nu``."""
    dear = cost > target
    top = rows.geometry.highest_price(rows.coordinates, rows.costs, rows.plan).amax(dim=1)
    bottom = rows.geometry.lowest_price(rows.coordinates, rows.costs, rows.plan).amin(dim=1)
    return row_roots(
        rows,
        target=target,
        start=nu.expand_as(target),
        lower=torch.where(dear, nu, torch.minimum(bottom, nu)),
        upper=torch.where(dear, torch.maximum(top, nu), nu),
        early_exit=early_exit,
    )


def row_roots(
    rows: Rows, *, target: Tensor, start: Tensor, lower: Tensor, upper: Tensor, early_exit: bool
) -> Tensor:
    """Returns the price of each row at which it costs ``target``, shape ``(rows,)``."""

    def excess(price: Tensor) -> Tensor:
        return rows.cost_at(price) - target

    def newton(price: Tensor) -> tuple[Tensor, Tensor]:
        cost = rows.cost_at(price)
        return cost - target, rows.geometry.newton_move(cost, target, rows.slope())

    curve = Curve(excess=excess, newton=newton, tolerance=_rounding(target))
    return falling_root(curve, start=start, lower=lower, upper=upper, early_exit=early_exit)


def _rounding(target: Tensor) -> Tensor:
    return _ROUNDINGS * torch.finfo(target.dtype).eps * target
