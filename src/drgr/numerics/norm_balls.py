"""Euclidean projections onto balls of the l1, the l2 and the group norm."""

import torch
from torch import Tensor

from drgr.numerics.inputs import (
    ABOVE_ZERO,
    NOT_NEGATIVE,
    checked_operand,
    checked_vectors,
)
from drgr.numerics.norms import block_norms, check_group, group_norms
from drgr.numerics.simplex import excess_over_threshold, onto_weighted_simplex


def project_l1_ball(point: Tensor, *, radius: float | Tensor) -> Tensor:
    r"""Projects onto the ball of the l1 norm.

    Solves, independently for every leading index,

    .. math:: \min_x \tfrac12 \|x - v\|_2^2 \quad\text{s.t.}\quad \sum_i |x_i| \le r .

    Outside the ball it is a soft threshold with exact zeros; a point inside is returned as it is.

    Args:
        point: Point ``v``, finite, shape ``(..., n)``.
        radius: Radius ``r >= 0``, a number or a tensor that broadcasts to ``(...)``, in the unit of
            ``point``.

    Returns:
        The projection, shape and dtype of ``point``.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` has no coordinates or is not finite, ``radius`` is negative or not
            finite, or its shape does not broadcast.

    Gradients:
        To every order in ``point`` and ``radius``. Outside, with ``a`` the signs on the support,
        the Jacobian is ``diag(|a|) - a a^T / <a, a>`` in ``point`` and ``a / <a, a>`` in
        ``radius``; inside the identity and 0. Where the support changes it is that of one side.

    Numerics:
        Exact up to rounding, as :func:`project_simplex`. Half types are computed in float32.

    Complexity:
        O(n log n) time and O(n) memory a row; no host synchronisation on an accelerator.

    References:
        Duchi, Shalev-Shwartz, Singer, Chandra, *Efficient Projections onto the l1-Ball for Learning
        in High Dimensions*, ICML 2008.

    Examples:
        >>> import torch
        >>> project_l1_ball(torch.tensor([1.0, -0.5, 0.1]), radius=1.0)
        tensor([ 0.7500, -0.2500,  0.0000])
    """
    work = checked_vectors("point", point)
    bound = checked_operand("radius", radius, NOT_NEGATIVE, like=work, shape=work.shape[:-1])
    sizes = work.abs()
    inside = sizes.sum(dim=-1) <= bound
    shrunk = excess_over_threshold(sizes, work.new_ones(()).expand_as(work), bound)
    return torch.where(inside.unsqueeze(-1), work, work.sign() * shrunk).to(point.dtype)


def project_l2_ball(point: Tensor, *, radius: float | Tensor) -> Tensor:
    r"""Projects onto the ball of the Euclidean norm.

    Solves, independently for every leading index,

    .. math:: \min_x \tfrac12 \|x - v\|_2^2 \quad\text{s.t.}\quad \|x\|_2 \le r .

    Outside the ball it is ``r v / ||v||``; a point inside is returned as it is.

    Args:
        point: Point ``v``, finite, shape ``(..., n)``.
        radius: Radius ``r >= 0``, a number or a tensor that broadcasts to ``(...)``, in the unit of
            ``point``.

    Returns:
        The projection, shape and dtype of ``point``.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` has no coordinates or is not finite, ``radius`` is negative or not
            finite, or its shape does not broadcast.

    Gradients:
        To every order in ``point`` and ``radius``: outside ``(r/||v||) (I - v v^T / ||v||^2)`` and
        ``v / ||v||``, inside the identity and 0, on the sphere those of the inside.

    Numerics:
        Squares are taken relative to the largest entry, so they neither overflow nor vanish. Half
        types are computed in float32.

    Complexity:
        O(n) time and memory a row; no host synchronisation on an accelerator.

    Examples:
        >>> import torch
        >>> project_l2_ball(torch.tensor([3.0, 4.0]), radius=1.0)
        tensor([0.6000, 0.8000])
    """
    work = checked_vectors("point", point)
    bound = checked_operand("radius", radius, NOT_NEGATIVE, like=work, shape=work.shape[:-1])
    norm = block_norms(work, -1)
    outside = norm > bound.unsqueeze(-1)
    shrunk = work * (bound.unsqueeze(-1) / torch.where(outside, norm, 1.0))
    return torch.where(outside, shrunk, work).to(point.dtype)


def project_group_ball(
    point: Tensor,
    *,
    group: Tensor,
    num_groups: int,
    weights: Tensor | None = None,
    radius: float | Tensor,
) -> Tensor:
    r"""Projects onto the ball of a weighted group norm.

    Solves, independently for every leading index, with ``x_g`` the coordinates of group ``g``,

    .. math:: \min_x \tfrac12 \|x - v\|_2^2 \quad\text{s.t.}\quad \sum_g w_g \|x_g\|_2 \le r .

    The norms of the groups are projected onto the weighted simplex and each group is rescaled to
    its new norm: some groups become exactly 0. A point inside is returned as it is.

    Args:
        point: Point ``v``, finite, shape ``(..., n)``.
        group: Group of each coordinate in ``[0, num_groups)``, int64, shape ``(n,)``.
        num_groups: Number of groups ``G``; groups may be empty.
        weights: Weights ``w > 0``, shape ``(G,)`` or broadcasting to ``(..., G)``; ones if None.
        radius: Radius ``r >= 0``, a number or a tensor that broadcasts to ``(...)``, in the unit of
            ``weights`` times that of ``point``.

    Returns:
        The projection, shape and dtype of ``point``.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor or ``group`` is not int64.
        ValueError: If ``point`` has no coordinates or is not finite, a group is out of range,
            ``weights`` are not positive, ``radius`` is negative or not finite, or a shape is wrong.

    Gradients:
        To every order in ``point``, ``weights`` and ``radius``. Inside the ball it is the identity.
        Groups that become 0 have gradient 0, also where the point is 0 already.

    Numerics:
        As for :func:`project_weighted_simplex`; norms neither overflow nor vanish. Half types are
        computed in float32.

    Complexity:
        O(n + G log G) time and memory a row; no host synchronisation on an accelerator.

    Examples:
        >>> import torch
        >>> group = torch.tensor([0, 0, 1])
        >>> point = torch.tensor([3.0, 4.0, 1.0])
        >>> project_group_ball(point, group=group, num_groups=2, radius=2.5)
        tensor([1.5000, 2.0000, 0.0000])
    """
    work = checked_vectors("point", point)
    check_group(group, num_groups, work.shape[-1])
    norms = group_norms(work, group, num_groups)
    given = 1.0 if weights is None else weights
    prices = checked_operand("weights", given, ABOVE_ZERO, like=norms)
    bound = checked_operand("radius", radius, NOT_NEGATIVE, like=work, shape=work.shape[:-1])
    inside = (prices * norms).sum(dim=-1) <= bound
    shrunk = onto_weighted_simplex(norms, prices, bound)
    factor = shrunk / torch.where(norms > 0, norms, 1.0)
    rescaled = work * factor.index_select(-1, group)
    return torch.where(inside.unsqueeze(-1), work, rescaled).to(point.dtype)
