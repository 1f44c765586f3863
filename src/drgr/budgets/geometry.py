"""The two distances of a projection: what a plan is at given prices, and how fast it moves.

At a price ``p`` for a unit of cost, an expert of cost ``c`` with coordinate ``x`` has the plan
``phi(x - c p)``. The Euclidean distance has ``x = v``, ``phi(z) = min(max(z, 0), 1)``; the
Kullback-Leibler distance has ``x = log v``, ``phi(z) = min(exp(z), 1)``. Both are nondecreasing
with derivative ``phi'``, so what a plan costs falls with the price. All tensors are float64.
"""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

# exp is 0 in float64 below the first, and finite below the second exponent.
_VANISHING_EXPONENT = -750.0
_FINITE_EXPONENT = 700.0
_SMALLEST = 1e-300


class Geometry(Protocol):
    """A separable distance to the gates, with the plans that are nearest at given prices."""

    @property
    def newton_steps(self) -> int:
        """Newton steps on the prices that carry their first two derivatives."""

    def coordinates(self, gates: Tensor) -> Tensor:
        """Returns ``x``, shape ``(T, E)``; ``-inf`` where no price opens the gate."""

    def lowest_price(self, coordinates: Tensor, costs: Tensor, out: Tensor) -> Tensor:
        """Writes prices at and below which ``phi`` is 1; ``inf`` where there is none."""

    def highest_price(self, coordinates: Tensor, costs: Tensor, out: Tensor) -> Tensor:
        """Writes prices at and above which ``phi`` is 0."""

    def plan_(self, shifted: Tensor) -> Tensor:
        """Overwrites ``z = x - c p`` by ``phi(z)``."""

    def sensitivity(self, plan: Tensor, out: Tensor) -> Tensor:
        """Writes ``phi'`` of plans ``phi`` to ``out``."""

    def newton_move(self, value: Tensor, target: Tensor, slope: Tensor) -> Tensor:
        """Returns how far the price rises in a Newton step on a cost that falls at ``slope``."""

    def plan(self, gates: Tensor, costs: Tensor, price: Tensor) -> Tensor:
        """Returns ``phi`` at prices ``(T, 1)`` or ``(T, E)``, differentiable."""

    def plan_slope(self, plan: Tensor) -> Tensor:
        """Returns ``phi'`` of plans ``phi``, differentiable."""

    def distance(self, plan: Tensor, coordinates: Tensor) -> Tensor:
        """Returns the distance to the gates over all entries that can be open, shape ``()``."""

    def largest_distance(self, coordinates: Tensor) -> Tensor:
        """Returns the largest distance to any plan with entries in ``[0, 1]``, shape ``()``."""


@final
@dataclass(frozen=True, slots=True)
class Euclidean:
    """Half the squared Euclidean distance: ``phi(z) = min(max(z, 0), 1)``."""

    @property
    def newton_steps(self) -> int:
        """1: costs are linear in the price on a fixed set of open entries."""
        return 1

    def coordinates(self, gates: Tensor) -> Tensor:
        """The gates themselves."""
        return gates

    def lowest_price(self, coordinates: Tensor, costs: Tensor, out: Tensor) -> Tensor:
        """``(v - 1) / c``."""
        prices = torch.sub(coordinates, 1, out=out).div_(costs)
        return prices.masked_fill_(prices.isneginf(), torch.inf)

    def highest_price(self, coordinates: Tensor, costs: Tensor, out: Tensor) -> Tensor:
        """``v / c``."""
        return torch.div(coordinates, costs, out=out)

    def plan_(self, shifted: Tensor) -> Tensor:
        """Clips to ``[0, 1]``."""
        return shifted.clamp_(0, 1)

    def sensitivity(self, plan: Tensor, out: Tensor) -> Tensor:
        """1 strictly between the ends, where ``0 < phi - phi^2 < 1``, else 0."""
        return torch.addcmul(plan, plan, plan, value=-1, out=out).ceil_()

    def newton_move(self, value: Tensor, target: Tensor, slope: Tensor) -> Tensor:
        """``(g - b) / |g'|``: lands on the root when no entry opens or closes on the way."""
        return (value - target) / slope

    def plan(self, gates: Tensor, costs: Tensor, price: Tensor) -> Tensor:
        """``min(max(v - c p, 0), 1)``, with derivative 0 at both ends."""
        clipped: Tensor = hardtanh(torch.addcmul(gates, costs, price, value=-1), 0.0, 1.0)
        return clipped

    def plan_slope(self, plan: Tensor) -> Tensor:
        """1 strictly between the ends, else 0: constant."""
        fixed = plan.detach()
        return self.sensitivity(fixed, torch.empty_like(fixed))

    def distance(self, plan: Tensor, coordinates: Tensor) -> Tensor:
        """``sum (pi - v)^2 / 2``."""
        away = (plan - coordinates).masked_fill(coordinates.isneginf(), 0.0)
        return 0.5 * away.square().sum()

    def largest_distance(self, coordinates: Tensor) -> Tensor:
        """Attained with every entry at the further end of ``[0, 1]``."""
        return self.distance((coordinates < 0.5).to(coordinates.dtype), coordinates)


@final
@dataclass(frozen=True, slots=True)
class Entropic:
    """The Kullback-Leibler distance: ``phi(z) = min(exp(z), 1)`` in logarithms of the gates."""

    @property
    def newton_steps(self) -> int:
        """2: each Newton step from the root makes one further derivative exact."""
        return 2

    def coordinates(self, gates: Tensor) -> Tensor:
        """``log v``."""
        return gates.log()

    def lowest_price(self, coordinates: Tensor, costs: Tensor, out: Tensor) -> Tensor:
        """``log v / c``."""
        prices = torch.div(coordinates, costs, out=out)
        return prices.masked_fill_(prices.isneginf(), torch.inf)

    def highest_price(self, coordinates: Tensor, costs: Tensor, out: Tensor) -> Tensor:
        """Where the exponential underflows: no price closes a gate altogether."""
        return torch.sub(coordinates, _VANISHING_EXPONENT, out=out).div_(costs)

    def plan_(self, shifted: Tensor) -> Tensor:
        """``exp(min(z, 0))``."""
        return shifted.clamp_(max=0).exp_()

    def sensitivity(self, plan: Tensor, out: Tensor) -> Tensor:
        """``phi`` where ``0 < 1 - phi <= 1``, else 0."""
        below = torch.sub(plan, 1, out=out).neg_().ceil_()
        return below.mul_(plan)

    def newton_move(self, value: Tensor, target: Tensor, slope: Tensor) -> Tensor:
        """``g log(g / b) / |g'|``: a step on the logarithm, which is nearly linear in the price."""
        ratio = value.clamp_min(_SMALLEST) / target.clamp_min(_SMALLEST)
        return value * ratio.log() / slope

    def plan(self, gates: Tensor, costs: Tensor, price: Tensor) -> Tensor:
        """``min(v exp(-c p), 1)``; as a product it has a derivative in ``v`` also at 0."""
        grown = gates * (-costs * price).clamp(max=_FINITE_EXPONENT).exp()
        return torch.where(grown < 1, grown, 1.0)

    def plan_slope(self, plan: Tensor) -> Tensor:
        """``phi`` below 1, else 0."""
        return torch.where(plan < 1, plan, 0.0)

    def distance(self, plan: Tensor, coordinates: Tensor) -> Tensor:
        """``sum pi log(pi / v) - pi + v``."""
        cross = torch.where(plan > 0, plan * coordinates, 0.0)
        entropy: Tensor = torch.special.xlogy(plan, plan)
        return (entropy - cross - plan + coordinates.exp()).sum()

    def largest_distance(self, coordinates: Tensor) -> Tensor:
        """Attained at an end of ``[0, 1]`` in every entry: ``v`` or ``v - 1 - log v``."""
        gates = coordinates.exp()
        ends = torch.maximum(gates, gates - 1 - coordinates)
        return ends.masked_fill(coordinates.isneginf(), 0.0).sum()
