"""Roots of increasing scalar functions, many at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Root(NamedTuple):
    """Result of a root search, one entry per problem."""

    point: Tensor
    """Last iterate, shape ``(batch,)``."""
    converged: Tensor
    """Whether the residual or the bracket met the tolerance, bool, shape ``(batch,)``."""
    num_steps: int
    """Function evaluations spent (shared by the whole batch)."""


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    start: Tensor,
    lower: Tensor,
    upper: Tensor,
    tolerance: float,
    max_steps: int = 200,
) -> Root:
    """Finds ``t`` with ``f(t) = 0`` for a nondecreasing ``f``, by Newton's method inside a bracket.

    A Newton step is taken where it stays strictly inside the current bracket; elsewhere, and in the
    second half of the allowed steps, the bracket is bisected. So the search converges for every
    nondecreasing ``f``, also where its slope vanishes, overflows or is not a number.

    Args:
        function: Maps points ``(batch,)`` to ``(f, f')``, each ``(batch,)``. Rows are independent.
        start: First iterate, shape ``(batch,)``; moved into the bracket if outside.
        lower: Points with ``f <= 0``, shape ``(batch,)``.
        upper: Points with ``f >= 0``, shape ``(batch,)``.
        tolerance: A row is done once ``|f| <= tolerance`` or its bracket is a few units in the last
            place of the point wide.
        max_steps: Bound on function evaluations. The default narrows any bracket by ``2^100``.

    Returns:
        The root of each row, which rows converged, and the evaluations spent.

    Raises:
        ValueError: If a bracket is empty (``lower > upper``) or not a number.

    Gradients:
        None: differentiate through the implicit function theorem at the root.

    Complexity:
        About 6 evaluations for smooth ``f``, at most ``max_steps``. The dtype is that of ``start``.
        One host synchronisation per evaluation.
    """
    if not bool((lower <= upper).all()):
        raise ValueError("lower must not exceed upper in any row; give a bracket of the root")
    point = torch.minimum(torch.maximum(start, lower), upper)
    converged = torch.zeros_like(point, dtype=torch.bool)
    precision = 4 * torch.finfo(point.dtype).eps
    steps = 0
    while steps < max_steps:
        residual, slope = function(point)
        steps += 1
        lower = torch.where(residual <= 0, point, lower)
        upper = torch.where(residual >= 0, point, upper)
        width = upper - lower
        converged = (residual.abs() <= tolerance) | (width <= precision * point.abs())
        if bool(converged.all()):
            break
        newton = point - residual / slope
        trusted = (newton > lower) & (newton < upper) & (2 * steps < max_steps)
        step = torch.where(trusted, newton, lower + 0.5 * width)
        point = torch.where(converged, point, step)
    return Root(point, converged, steps)
