"""Euclidean projections onto the simplex, plain and with costs."""

import torch
from torch import Tensor

from drgr.numerics.inputs import (
    ABOVE_ZERO,
    FINITE_OR_MINUS_INF,
    NOT_NEGATIVE,
    checked_operand,
    checked_vectors,
    values_are_readable,
    with_value,
)


def project_simplex(point: Tensor, *, total: float | Tensor = 1.0) -> Tensor:
    r"""Projects onto the simplex of a given total.

    Solves, independently for every leading index,

    .. math:: \min_x \tfrac12 \|x - v\|_2^2 \quad\text{s.t.}\quad x \ge 0,\; \sum_i x_i = s .

    Args:
        point: Point ``v``, shape ``(..., n)``. An entry of ``-inf`` gets exactly 0.
        total: Sum ``s >= 0`` of the result, a number or a tensor that broadcasts to ``(...)``, in
            the unit of ``point``.

    Returns:
        The projection, shape and dtype of ``point``; coordinates off the support are exactly 0.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` has no coordinates, an entry that is NaN or ``inf``, or a row
            without a finite entry; if ``total`` is negative, not finite or of a wrong shape.

    Gradients:
        To every order in ``point`` and ``total``. On the support, with indicator ``a`` and size
        ``|a|``, the Jacobian is ``diag(a) - a a^T / |a|`` in ``point`` and ``a / |a|`` in
        ``total``; off the support it is 0. Where the support changes it is that of one side.

    Numerics:
        Exact up to rounding: the support is found from running sums of nonnegative terms, and the
        result is a sum of nonnegative terms, so neither loses digits however far ``point`` is from
        the simplex. Half types are computed in float32.

    Complexity:
        O(n log n) time and O(n) memory a row; no host synchronisation on an accelerator.

    References:
        Held, Wolfe, Crowder, *Validation of subgradient optimization*, Mathematical Programming
        1974 (the sorting algorithm).

    Examples:
        >>> import torch
        >>> project_simplex(torch.tensor([0.5, 1.2, -0.3]))
        tensor([0.1500, 0.8500, 0.0000])
    """
    work = checked_vectors("point", point, FINITE_OR_MINUS_INF)
    _check_rows_have_finite_entries(work)
    sums = checked_operand("total", total, NOT_NEGATIVE, like=work, shape=work.shape[:-1])
    masses = work.new_ones(()).expand_as(work)
    return excess_over_threshold(work, masses, sums).to(point.dtype)


def project_weighted_simplex(point: Tensor, *, costs: Tensor, total: float | Tensor) -> Tensor:
    r"""Projects onto the nonnegative vectors of a given total cost.

    Solves, independently for every leading index,

    .. math:: \min_x \tfrac12 \|x - v\|_2^2
              \quad\text{s.t.}\quad x \ge 0,\; \langle c, x\rangle = s .

    The solution is ``x_i = (v_i - c_i mu)_+`` with one price ``mu`` a row.

    Args:
        point: Point ``v``, finite, shape ``(..., n)``.
        costs: Costs ``c > 0`` of a unit of each coordinate, shape ``(n,)`` or broadcasting to that
            of ``point``.
        total: Total cost ``s >= 0``, in the unit of ``costs`` times that of ``point``, a number or
            a tensor that broadcasts to ``(...)``.

    Returns:
        The projection, shape and dtype of ``point``; coordinates off the support are exactly 0.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` has no coordinates or is not finite, ``costs`` are not positive,
            ``total`` is negative or not finite, or a shape does not broadcast.

    Gradients:
        To every order in ``point``, ``costs`` and ``total``. With ``a`` the costs restricted to the
        support, the Jacobian is ``diag(a > 0) - a a^T / <a, a>`` in ``point`` and ``a / <a, a>`` in
        ``total``. Where the support changes it is that of one side.

    Numerics:
        As for :func:`project_simplex`, in the levels ``v_i / c_i``: the result is nonnegative and
        meets the total to rounding, and is the projection of a point a rounding error away.

    Complexity:
        O(n log n) time and O(n) memory a row; no host synchronisation on an accelerator.

    References:
        Kiwiel, *Breakpoint searching algorithms for the continuous quadratic knapsack problem*,
        Mathematical Programming 2008.

    Examples:
        >>> import torch
        >>> costs = torch.tensor([1.0, 2.0])
        >>> project_weighted_simplex(torch.tensor([1.0, 1.0]), costs=costs, total=2.0)
        tensor([0.8000, 0.6000])
    """
    work = checked_vectors("point", point)
    prices = checked_operand("costs", costs, ABOVE_ZERO, like=work)
    sums = checked_operand("total", total, NOT_NEGATIVE, like=work, shape=work.shape[:-1])
    return onto_weighted_simplex(work, prices, sums).to(point.dtype)


def onto_weighted_simplex(point: Tensor, costs: Tensor, total: Tensor) -> Tensor:
    """Projects as :func:`project_weighted_simplex`, for checked arguments of full shapes."""
    # Only the ratio of costs and total matters; near 1 the squares cannot overflow.
    scale = costs.detach().amax(dim=-1, keepdim=True)
    relative = costs / scale
    levels = point / relative
    return relative * excess_over_threshold(levels, relative.square(), total / scale.squeeze(-1))


def excess_over_threshold(levels: Tensor, masses: Tensor, total: Tensor) -> Tensor:
    r"""Cuts levels at the height above which a given mass lies.

    Returns ``(r_i - mu)_+`` for the ``mu`` with ``sum_i m_i (r_i - mu)_+ = s``.

    Args:
        levels: Levels ``r``, below ``inf``, shape ``(..., n)``.
        masses: Masses ``m > 0`` per unit of height, shape ``(..., n)``.
        total: Mass ``s >= 0`` above the threshold, shape ``(...)``.

    Returns:
        The excess of each level, shape ``(..., n)``.

    Gradients:
        To every order in all arguments, by a closed form on the support.

    Complexity:
        O(n log n) time and O(n) memory a row.
    """
    amount = total.unsqueeze(-1)
    with torch.no_grad():
        ordered, order = levels.sort(dim=-1, descending=True)
        width = masses.gather(-1, order).cumsum(dim=-1)[..., :-1]
        # Mass above each level but the first: sums of nonnegative terms. Behind a level of -inf
        # they are not numbers, which compares as false.
        above = (width * (ordered[..., :-1] - ordered[..., 1:])).cumsum(dim=-1)
        lowest = (above < amount).sum(dim=-1, keepdim=True)
        floor = ordered.gather(-1, lowest)
        member = levels >= floor
    heights = torch.where(member, levels - floor, 0.0)
    shares = torch.where(member, masses, 0.0)
    rest = amount - (shares * heights).sum(dim=-1, keepdim=True)
    # At least 0 by the choice of the floor; rounding may say otherwise.
    depth = with_value(rest, rest.clamp_min(0.0)) / shares.sum(dim=-1, keepdim=True)
    return torch.where(member, heights + depth, 0.0)


def _check_rows_have_finite_entries(point: Tensor) -> None:
    """Raises ``ValueError`` at a row of nothing but ``-inf``, where values are readable."""
    if values_are_readable(point) and bool(point.detach().isneginf().all(dim=-1).any()):
        raise ValueError(
            "point must have a finite entry in each row, got a row of -inf; drop that row"
        )
