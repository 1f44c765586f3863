"""Roots of falling functions of a price, many at once: Newton's method, then bits by bisection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_NEWTON_STEPS = 20
_BITS = 64
_LARGEST_KEY = 2**63 - 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Functions ``g`` of prices, one per row, that never rise; all float64 of shape ``(rows,)``."""

    excess: Callable[[Tensor], Tensor]
    """Maps prices to ``g - b``, where ``b`` is the value wanted."""
    newton: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Maps prices to ``g - b`` and to how far a Newton step raises the price."""
    tolerance: Tensor
    """Rounding error of ``g`` near ``b``."""


def falling_root(
    curve: Curve, *, start: Tensor, lower: Tensor, upper: Tensor, early_exit: bool
) -> Tensor:
    r"""Finds ``p`` with ``g(p) = b`` for nonincreasing functions ``g``.

    With ``early_exit`` Newton steps inside the bracket come first. On a piecewise linear ``g`` a
    step between two points of one piece is exact, so it ends after finitely many. Rows that 20
    steps do not finish, and all rows without ``early_exit``, are bisected on the order of the
    float64 numbers: 64 steps always end at two neighbouring numbers, and none of them asks the
    host.

    Args:
        curve: The functions, their Newton steps, and the rounding error that ends the search.
        start: First prices inside the brackets, shape ``(rows,)``.
        lower: Prices with ``g >= b``, finite.
        upper: Prices with ``g <= b``, finite.
        early_exit: Whether to stop as soon as every row has its root. Each step then waits for the
            device.

    Returns:
        The roots, shape ``(rows,)``; the larger of the last two neighbours where bisected.
    """
    if not early_exit:
        return _bisected(curve, lower, upper, early_exit=False)
    point = start
    for _ in range(_NEWTON_STEPS):
        excess, move = curve.newton(point)
        lower = torch.where(excess >= 0, point, lower)
        upper = torch.where(excess <= 0, point, upper)
        precision = 2 * torch.finfo(point.dtype).eps * point.abs()
        found = excess.abs() <= curve.tolerance
        found |= (move.abs() <= precision) | (upper - lower <= precision)
        if bool(found.all()):
            return point
        newton = point + move
        inside = (newton > lower) & (newton < upper)
        step = torch.where(inside, newton, lower + 0.5 * (upper - lower))
        point = torch.where(found, point, step)
    return torch.where(found, point, _bisected(curve, lower, upper, early_exit=True))


def _bisected(curve: Curve, lower: Tensor, upper: Tensor, *, early_exit: bool) -> Tensor:
    low, high = _keys(lower), _keys(upper)
    for _ in range(_BITS):
        middle = (low & high) + ((low ^ high) >> 1)
        if early_exit and bool((middle == low).all()):
            break
        above = curve.excess(_keys(middle, inverse=True)) > 0
        low = torch.where(above, middle, low)
        high = torch.where(above, high, middle)
    return _keys(high, inverse=True)


def _keys(values: Tensor, *, inverse: bool = False) -> Tensor:
    """Maps float64 to int64 of the same order, and back: the mapping is its own inverse on bits."""
    bits = values if inverse else values.view(torch.int64)
    keys = bits ^ ((bits >> 63) & _LARGEST_KEY)
    return keys.view(torch.float64) if inverse else keys
