"""Euclidean projections onto the part of a box where a budget is spent exactly."""

from typing import NamedTuple

import torch
from torch import Tensor

from drgr.errors import InfeasibleBudgetError
from drgr.numerics.inputs import (
    ABOVE_MINUS_INF,
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_INF,
    FINITE,
    checked_operand,
    checked_vectors,
    plain,
    values_are_readable,
    with_value,
)

# Rounding errors that a total may lie outside the reachable range, in units of the precision.
_ROUNDINGS = 16


def project_capped_simplex(
    point: Tensor, *, total: float | Tensor, upper: float | Tensor = 1.0
) -> Tensor:
    r"""Projects onto the vectors between 0 and a cap that have a given sum.

    Solves, independently for every leading index,

    .. math:: \min_x \tfrac12 \|x - v\|_2^2
              \quad\text{s.t.}\quad 0 \le x \le u,\; \sum_i x_i = s .

    With ``u = 1`` and an integer ``s`` it is a soft choice of ``s`` out of ``n``.

    Args:
        point: Point ``v``, finite, shape ``(..., n)``.
        total: Sum ``s`` of the result, a number or a tensor that broadcasts to ``(...)``, in the
            unit of ``point``.
        upper: Caps ``u >= 0``, a number or a tensor that broadcasts to the shape of ``point``;
            ``inf`` for none.

    Returns:
        The projection, shape and dtype of ``point``.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` has no coordinates or is not finite, a cap is negative, ``total``
            is not finite, or a shape does not broadcast.
        InfeasibleBudgetError: If ``total`` is negative or exceeds the sum of the caps.

    Gradients:
        As for :func:`project_box_section`, in ``point``, ``total`` and ``upper``.

    Numerics:
        As for :func:`project_box_section`.

    Complexity:
        O(n log n) time and O(n) memory a row; no host synchronisation on an accelerator.

    References:
        Wang, Lu, *Projection onto the capped simplex*, arXiv:1503.01002, 2015.

    Examples:
        >>> import torch
        >>> project_capped_simplex(torch.tensor([2.0, 0.6, 0.2, -1.0]), total=2.0)
        tensor([1.0000, 0.7000, 0.3000, 0.0000])
    """
    work = checked_vectors("point", point)
    section = _Section(
        point=work,
        lower=work.new_zeros(()).expand_as(work),
        upper=checked_operand("upper", upper, AT_LEAST_ZERO, like=work),
        costs=work.new_ones(()).expand_as(work),
        total=checked_operand("total", total, FINITE, like=work, shape=work.shape[:-1]),
    )
    return _projected(section).to(point.dtype)


def project_box_section(
    point: Tensor,
    *,
    lower: float | Tensor,
    upper: float | Tensor,
    costs: Tensor,
    total: float | Tensor,
) -> Tensor:
    r"""Projects onto the part of a box where a budget is spent exactly.

    Solves, independently for every leading index,

    .. math:: \min_x \tfrac12 \|x - v\|_2^2
              \quad\text{s.t.}\quad l \le x \le u,\; \langle c, x\rangle = s .

    The solution is ``x_i = clip(v_i - c_i mu, l_i, u_i)`` with one price ``mu`` a row.

    Args:
        point: Point ``v``, finite, shape ``(..., n)``.
        lower: Bounds ``l``, a number or a tensor that broadcasts to the shape of ``point``;
            ``-inf`` for none.
        upper: Bounds ``u >= l``, likewise; ``inf`` for none.
        costs: Costs ``c > 0`` of a unit of each coordinate, shape ``(n,)`` or broadcasting to that
            of ``point``.
        total: Total cost ``s``, in the unit of ``costs`` times that of ``point``, a number or a
            tensor that broadcasts to ``(...)``.

    Returns:
        The projection, shape and dtype of ``point``. On an accelerator, where values are not
        checked, a row that has no feasible point gets the bound with the cost nearest to the total.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` has no coordinates or is not finite, ``lower`` exceeds ``upper``,
            ``costs`` are not positive, ``total`` is not finite, or a shape does not broadcast.
        InfeasibleBudgetError: If ``total`` is below ``<c, l>`` or above ``<c, u>`` by more than
            rounding.

    Gradients:
        To every order in all tensor arguments. With ``a`` the costs restricted to the coordinates
        strictly inside the box, the Jacobian is ``diag(a > 0) - a a^T / <a, a>`` in ``point`` and
        ``a / <a, a>`` in ``total``; a coordinate at a bound follows that bound. Where the set of
        inner coordinates changes it is that of one side; without inner coordinates the gradients in
        ``point``, ``costs`` and ``total`` are 0.

    Numerics:
        No approximation: a bisection of the sorted prices at which a coordinate meets a bound, each
        compared by the cost of the projection itself, finds the linear piece that holds the
        solution. Bounds hold exactly and the total to rounding, however far ``point`` is from the
        box; the result is the projection of a point a rounding error away. Half types are computed
        in float32.

    Complexity:
        O(n log n) time and O(n) memory a row; no host synchronisation on an accelerator.

    References:
        Kiwiel, *Breakpoint searching algorithms for the continuous quadratic knapsack problem*,
        Mathematical Programming 2008.

    Examples:
        >>> import torch
        >>> costs = torch.tensor([1.0, 2.0, 1.0])
        >>> point = torch.tensor([0.9, 0.8, 0.1])
        >>> project_box_section(point, lower=0.0, upper=1.0, costs=costs, total=1.0)
        tensor([0.6000, 0.2000, 0.0000])
    """
    work = checked_vectors("point", point)
    section = _Section(
        point=work,
        lower=checked_operand("lower", lower, BELOW_INF, like=work),
        upper=checked_operand("upper", upper, ABOVE_MINUS_INF, like=work),
        costs=checked_operand("costs", costs, ABOVE_ZERO, like=work),
        total=checked_operand("total", total, FINITE, like=work, shape=work.shape[:-1]),
    )
    return _projected(section).to(point.dtype)


class _Section(NamedTuple):
    """A problem in working precision; ``total`` has shape ``(...)``, the others ``(..., n)``."""

    point: Tensor
    lower: Tensor
    upper: Tensor
    costs: Tensor
    total: Tensor

    def cost_of(self, vector: Tensor) -> Tensor:
        """Returns ``<c, x>``, shape ``(..., 1)``."""
        return (self.costs * vector).sum(dim=-1, keepdim=True)


class _Prices(NamedTuple):
    """Where each coordinate leaves its bounds: upper below ``stop``, lower above ``start``."""

    start: Tensor
    stop: Tensor


class _Piece(NamedTuple):
    """The linear piece with the solution: vectors and masks ``(..., n)``, prices ``(..., 1)``."""

    inner: Tensor
    at_upper: Tensor
    near: Tensor
    """The projection at the higher end of the prices, which costs at most the total."""
    far: Tensor
    """The projection at the lower end, which costs at least the total."""
    reference: Tensor
    """A finite price within or at an end of the piece."""


def _projected(section: _Section) -> Tensor:
    _check_feasible(section)
    # Only the ratio of costs and total matters; near 1 the squares cannot overflow.
    scale = section.costs.detach().amax(dim=-1, keepdim=True)
    scaled = section._replace(costs=section.costs / scale, total=section.total / scale.squeeze(-1))
    with torch.no_grad():
        piece = _piece(scaled)
    formula = _on_piece(scaled, piece)
    with torch.no_grad():
        value = _interpolated(scaled, piece, formula)
    return with_value(formula, value)


def _piece(section: _Section) -> _Piece:
    """Bisects the sorted prices for the last one at which the cost is within the total."""
    prices = _Prices(
        start=(section.point - section.lower) / section.costs,
        stop=(section.point - section.upper) / section.costs,
    )
    ordered = torch.cat(prices, dim=-1).sort(dim=-1, descending=True).values
    total = section.total.unsqueeze(-1)
    num_prices = ordered.shape[-1]
    last = torch.zeros_like(total, dtype=torch.int64)
    beyond = torch.full_like(last, num_prices)
    for _ in range((num_prices - 1).bit_length()):
        middle = (last + beyond) // 2
        reached = section.cost_of(_at_price(section, prices, ordered.gather(-1, middle)))
        within = (reached <= total) | (middle == last)
        last = torch.where(within, middle, last)
        beyond = torch.where(within, beyond, middle)
    high = ordered.gather(-1, last)
    low = ordered.gather(-1, beyond.clamp_max(num_prices - 1))
    # Far from the box its two prices may round to one: the coordinate then jumps there, and counts
    # as inner; one whose bounds are equal does not.
    left_lower = (prices.start > high) | (section.lower == section.upper)
    at_upper = (prices.stop >= high) & left_lower
    is_end = beyond == num_prices
    return _Piece(
        inner=(prices.start >= high) & ~at_upper,
        at_upper=at_upper,
        near=_at_price(section, prices, high),
        far=torch.where(is_end, section.upper, _at_price(section, prices, low)),
        reference=torch.where(high.isfinite(), high, torch.where(low.isfinite(), low, 0.0)),
    )


def _at_price(section: _Section, prices: _Prices, price: Tensor) -> Tensor:
    """Returns ``clip(v - c mu, l, u)``, at a bound exactly from that bound's price on.

    So between two neighbouring prices without an inner coordinate it is constant to the last bit,
    and such a stretch is never taken for the piece with the solution. Where both prices of a
    coordinate round to the same one the lower bound holds there.
    """
    inside = (section.point - section.costs * price).clamp(section.lower, section.upper)
    inside = torch.where(prices.stop >= price, section.upper, inside)
    return torch.where(prices.start <= price, section.lower, inside)


def _on_piece(section: _Section, piece: _Piece) -> Tensor:
    """Evaluates the closed form on the piece, from its reference price."""
    bound = torch.where(piece.at_upper, section.upper, section.lower)
    begin = torch.where(piece.inner, section.point - section.costs * piece.reference, bound)
    free = torch.where(piece.inner, section.costs, 0.0)
    curvature = free.square().sum(dim=-1, keepdim=True)
    rest = section.total.unsqueeze(-1) - section.cost_of(begin)
    return begin + free * (rest / torch.where(curvature > 0, curvature, 1.0))


def _interpolated(section: _Section, piece: _Piece, formula: Tensor) -> Tensor:
    """Divides the piece where the cost meets the total; on an endless piece takes the formula."""
    spent = section.cost_of(piece.near)
    span = section.cost_of(piece.far) - spent
    share = (section.total.unsqueeze(-1) - spent) / torch.where(span > 0, span, 1.0)
    between = piece.near + share.clamp(0.0, 1.0) * (piece.far - piece.near)
    value = torch.where(span.isfinite(), between, formula)
    return value.clamp(section.lower, section.upper)


def _check_feasible(section: _Section) -> None:
    """Raises unless ``l <= u`` and the total can be reached, where values are readable."""
    if not values_are_readable(section.point):
        return
    point, lower, upper, costs, total = (tensor.detach() for tensor in section)
    crossed = lower > upper
    if bool(crossed.any()):
        index = tuple(crossed.nonzero()[0].tolist())
        raise ValueError(
            f"lower must not exceed upper, got {lower[index].item()} > {upper[index].item()} "
            f"at index {plain(index)}; swap or widen the bounds"
        )
    exact = costs.double()
    precision = _ROUNDINGS * torch.finfo(point.dtype).eps
    for bound, direction, remedy in (
        (lower.double(), 1, "at least the cost of the lower bounds"),
        (upper.double(), -1, "at most the cost of the upper bounds"),
    ):
        limit = (exact * bound).sum(dim=-1)
        slack = precision * ((exact * bound.abs()).sum(dim=-1) + total.abs())
        wrong = direction * (limit - total) > slack
        if bool(wrong.any()):
            index = tuple(wrong.nonzero()[0].tolist())
            place = f" at index {plain(index)}" if index else ""
            raise InfeasibleBudgetError(
                f"total must be {remedy}, {limit[index].item():.6g}, got "
                f"{total[index].item():.6g}{place}; change the total or that bound"
            )
