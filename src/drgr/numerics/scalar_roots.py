"""Roots of increasing scalar functions, many at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_REACH = 2.0
_LARGEST_REACH = 2.0**40


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
    tolerance: float | Tensor,
    max_steps: int = 200,
) -> Root:
    r"""Finds ``t`` with ``f(t) = 0`` for a nondecreasing ``f``, by Newton's method in a bracket.

    .. math:: \text{find } t \in [a, b] \ \text{with}\ f(t) = 0 .

    A Newton step is taken where it stays strictly inside the current bracket; elsewhere, and in the
    second half of the allowed steps, the bracket is bisected. So the search converges for every
    nondecreasing ``f``, also where its slope vanishes, overflows or is not a number. An end of the
    bracket may be infinite: until the root is enclosed a step then goes at most 2, 4, 8, ... far,
    because a Newton step from a flat stretch would otherwise be lost for good.

    Args:
        function: Maps points ``(batch,)`` to ``(f, f')``, each ``(batch,)``. Rows are independent.
        start: First iterate, finite, shape ``(batch,)``; moved into the bracket if outside.
        lower: Points with ``f <= 0``, shape ``(batch,)``; may be ``-inf``.
        upper: Points with ``f >= 0``, shape ``(batch,)``; may be ``inf``.
        tolerance: A row is done once ``|f| <= tolerance`` or its bracket is a few units in the last
            place of the point wide. A number, or a tensor of shape ``(batch,)``.
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

    Examples:
        >>> import torch
        >>> goal = torch.tensor([2.0, 9.0], dtype=torch.float64)
        >>> zero, inf = torch.zeros_like(goal), torch.full_like(goal, torch.inf)
        >>> increasing_root(
        ...     lambda t: (t**2 - goal, 2 * t), start=goal, lower=zero, upper=inf, tolerance=1e-12
        ... ).point
        tensor([1.4142, 3.0000], dtype=torch.float64)
    """
    if not bool((lower <= upper).all()):
        raise ValueError("lower must not exceed upper in any row; give a bracket of the root")
    point = torch.minimum(torch.maximum(start, lower), upper)
    converged = torch.zeros_like(point, dtype=torch.bool)
    precision = 4 * torch.finfo(point.dtype).eps
    steps = 0
    reach = _FIRST_REACH
    while steps < max_steps:
        residual, slope = function(point)
        steps += 1
        lower = torch.where(residual <= 0, point, lower)
        upper = torch.where(residual >= 0, point, upper)
        converged = (residual.abs() <= tolerance) | (upper - lower <= precision * point.abs())
        if bool(converged.all()):
            break
        near = torch.where(lower.isinf(), point - reach, lower)
        far = torch.where(upper.isinf(), point + reach, upper)
        newton = point - residual / slope
        trusted = (newton > near) & (newton < far) & (2 * steps < max_steps)
        step = torch.where(trusted, newton, _fallback(residual, lower, upper, near, far))
        point = torch.where(converged, point, step)
        reach = min(2 * reach, _LARGEST_REACH)
    return Root(point, converged, steps)


def _fallback(residual: Tensor, lower: Tensor, upper: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Returns the middle of a finite bracket, else the furthest point allowed towards the root."""
    middle = near + 0.5 * (far - near)
    outwards = torch.where(residual < 0, far, near)
    return torch.where(lower.isinf() | upper.isinf(), outwards, middle)
