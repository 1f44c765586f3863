"""Prices of experts with bounded capacity: Newton's method on the dual.

At expert prices ``beta`` the other prices are those of the shifted coordinates ``x - c beta``. The
distance of that plan plus ``sum_e beta_e (L_e - C_e)``, where ``L_e`` is what expert ``e`` costs,
is a concave function of ``beta`` with the continuous gradient ``L - C``. It bounds the distance of
every plan within the bounds from below, and is largest at the prices wanted.

Gates far apart make the pieces of the dual narrow. Dividing the coordinates by a number widens
them, so the search starts where coordinates are at most 8 and follows the prices as the divisor
falls to 1.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.budgets.curvature import curvature, solve_where
from drgr.budgets.geometry import Geometry
from drgr.budgets.token_prices import Bounds, Rows, TokenPrices, row_roots, token_prices

_MAX_STEPS = 100
_MAX_HALVINGS = 40
_SUFFICIENT = 1e-4
_VALUE_ROUNDING = 1e-13
_LARGEST_GROWTH = 2.0**40
_WIDEST = 8.0
_STAGE = 4.0
_INFEASIBLE_BEYOND = 1 + 1e-9


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPrices:
    """Prices at which the experts are within their bounds."""

    expert: Tensor
    """``beta >= 0``, shape ``(E,)``; 0 where an expert is within its bound."""
    tokens: TokenPrices
    """Prices of the batch and the tokens beside them."""
    feasible: bool
    """False where the dual exceeds every distance: then no plan meets the bounds."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """The dual at expert prices."""

    beta: Tensor
    inner: TokenPrices
    value: Tensor
    excess: Tensor
    """Gradient ``L - C``, shape ``(E,)``; ``-inf`` without a bound."""

    @property
    def violation(self) -> Tensor:
        """What optimality misses, ``(E,)``: ``|L - C|`` at a price, else what is over."""
        return torch.where(self.beta > 0, self.excess.abs(), self.excess.clamp_min(0))

    def is_optimal(self, costs: Tensor) -> bool:
        """Whether only rounding is missed."""
        allowed = rounding_by_expert(costs, self.inner.token, self.beta)
        return bool((self.violation <= allowed).all())


@final
@dataclass(frozen=True, slots=True)
class _Dual:
    """The function of expert prices to maximise."""

    geometry: Geometry
    coordinates: Tensor
    costs: Tensor
    bounds: Bounds
    capacity: Tensor

    def at(self, beta: Tensor, start: Tensor | None = None) -> _Point:
        """Evaluates at expert prices, with a guess of the batch price."""
        rows = Rows.of(self.geometry, self.coordinates - self.costs * beta, self.costs)
        inner = token_prices(rows, self.bounds, early_exit=True, start=start)
        excess = self.costs * inner.plan.sum(dim=0) - self.capacity
        paid = torch.where(beta > 0, beta * excess, 0.0).sum()
        value = self.geometry.distance(inner.plan, self.coordinates) + paid
        return _Point(beta=beta, inner=inner, value=value, excess=excess)

    def divided(self, divisor: float) -> "_Dual":
        """Returns the dual for coordinates divided by a number."""
        coordinates = self.coordinates / divisor
        return _Dual(self.geometry, coordinates, self.costs, self.bounds, self.capacity)

    def reach(self) -> float:
        """Returns the largest coordinate of an open entry by magnitude."""
        closed = self.coordinates == -torch.inf
        return self.coordinates.masked_fill(closed, 0.0).abs().max().item()


def expert_prices(
    geometry: Geometry, coordinates: Tensor, costs: Tensor, bounds: Bounds, capacity: Tensor
) -> ExpertPrices:
    """Finds the prices of batch, tokens and experts. Every step waits for the device.

    Args:
        geometry: The distance.
        coordinates: Coordinates of the gates, shape ``(T, E)``.
        costs: Cost of each expert, shape ``(E,)``.
        bounds: Bounds of the tokens and the batch.
        capacity: Bounds of the experts, shape ``(E,)``.

    Returns:
        The prices after convergence to rounding, or after 100 steps.
    """
    dual = _Dual(geometry, coordinates, costs, bounds, capacity)
    point = dual.at(torch.zeros_like(costs))
    if point.is_optimal(costs):
        return ExpertPrices(expert=point.beta, tokens=point.inner, feasible=True)
    stages = math.ceil(math.log(max(dual.reach() / _WIDEST, 1), _STAGE))
    found: list[Tensor] = []
    for stage in range(stages, -1, -1):
        divisor = _STAGE**stage
        divided = dual if stage == 0 else dual.divided(divisor)
        point = divided.at(_extrapolated(found) / divisor if found else point.beta)
        if not found:
            point = divided.at(_prices_alone(divided, point))
        point, feasible = _ascended(divided, point)
        found.append(divisor * point.beta)
        if not feasible:
            point = dual.at(found[-1])
            break
    return ExpertPrices(expert=found[-1], tokens=point.inner, feasible=feasible)


def _extrapolated(found: list[Tensor]) -> Tensor:
    """Returns the prices to expect after those found, given that they are linear in the divisor.

    The solution of a quadratic programme is piecewise linear in the weight of its linear part; so
    the prices are piecewise linear in the divisor.
    """
    if len(found) == 1:
        return found[0]
    return (found[-1] + (found[-1] - found[-2]) / _STAGE).clamp_min(0)


def _ascended(dual: _Dual, point: _Point) -> tuple[_Point, bool]:
    """Climbs to the maximum, and tells whether the dual stays below the largest distance.

    A Newton step uses the exact curvature of the piece, damped in proportion to the gradient, and
    is halved until the dual rises. ``longest`` times ``growth`` bounds it where the dual is linear.
    Where a step had to be halved, each expert's own best price follows: that copes with experts
    whose pieces differ in width by orders of magnitude.
    """
    limit = dual.geometry.largest_distance(dual.coordinates) * _INFEASIBLE_BEYOND
    longest = (1 + dual.reach()) / dual.costs
    growth = 1.0
    for _ in range(_MAX_STEPS):
        if bool(point.value > limit):
            return point, False
        if point.is_optimal(dual.costs) or not bool(point.value.isfinite()):
            break
        direction = _direction(dual, point, growth * longest)
        for halvings in range(_MAX_HALVINGS):
            beta = (point.beta + direction * 0.5**halvings).clamp_min(0)
            trial = dual.at(beta, point.inner.batch)
            if _improves(trial, point):
                break
        else:
            break
        growth = min(growth * 2.0 ** (1 - halvings), _LARGEST_GROWTH)
        point = trial if halvings == 0 else dual.at(_prices_alone(dual, trial))
    return point, True


def rounding_by_expert(costs: Tensor, token: Tensor, expert: Tensor) -> Tensor:
    """Returns the rounding error of each expert's cost at token and expert prices, ``(E,)``."""
    unit = 16 * torch.finfo(costs.dtype).eps * costs
    return unit * (len(token) + costs * (token.abs().sum() + len(token) * expert))


def _prices_alone(dual: _Dual, point: _Point) -> Tensor:
    """Returns the price at which each expert meets its bound, the tokens' prices being fixed.

    The best expert prices at fixed prices of the tokens, and then the best prices of the tokens at
    those: neither lowers the dual.
    """
    geometry, costs = dual.geometry, dual.costs
    shifted = (dual.coordinates - costs * point.inner.token.unsqueeze(1)).T.contiguous()
    rows = Rows.of(geometry, shifted, torch.ones_like(shifted[0]))
    zero = torch.zeros_like(costs)
    unpriced, wanted = rows.cost_at(zero), dual.capacity / costs
    needed = unpriced > wanted
    found = row_roots(
        rows,
        target=torch.where(needed, wanted, unpriced),
        start=zero,
        lower=zero,
        upper=geometry.highest_price(shifted, rows.costs, rows.plan).amax(dim=1).clamp_min(0),
        early_exit=True,
    )
    return torch.where(needed, found / costs, zero)


def _direction(dual: _Dual, point: _Point, reach: Tensor) -> Tensor:
    """Returns the damped Newton step on the experts that have or need a price.

    The damping bounds a step into a flat direction by ``reach``. It vanishes with the gradient, so
    that convergence stays quadratic.
    """
    active = (point.beta > 0) | (point.excess > 0)
    gradient = torch.where(active, point.excess, 0.0)
    plan = point.inner.plan
    weights = dual.geometry.sensitivity(plan, torch.empty_like(plan)) * dual.costs.square()
    matrix = curvature(weights, pinned=point.inner.side != 0, batch_binds=point.inner.batch > 0)
    damping = gradient.abs().amax() / reach
    scale = weights.sum(dim=0) + damping
    return solve_where(
        matrix + damping.diag(),
        gradient,
        active=active,
        scale=scale,
        rank_tolerance=torch.finfo(matrix.dtype).eps,
    )


def _improves(trial: _Point, point: _Point) -> bool:
    """Whether the dual rises: by concavity it does where its slope along the step is still up.

    Where the change of the dual drowns in rounding the violation decides.
    """
    step = trial.beta - point.beta
    bounded = step != 0
    slope_before = (torch.where(bounded, point.excess, 0.0) * step).sum()
    slope_after = (torch.where(bounded, trial.excess, 0.0) * step).sum()
    rises = (slope_after >= 0) | (trial.value >= point.value + _SUFFICIENT * slope_before)
    close = (trial.value - point.value).abs() <= _VALUE_ROUNDING * point.value.abs()
    closer = trial.violation.amax() <= 0.5 * point.violation.amax()
    return bool(rises | (close & closer))
