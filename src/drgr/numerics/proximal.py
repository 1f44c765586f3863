"""Proximal maps of norms: soft thresholds of entries, blocks of dimensions, and index groups."""

import torch
from torch import Tensor

from drgr.numerics.inputs import (
    NOT_NEGATIVE,
    checked_operand,
    checked_point,
    checked_vectors,
)
from drgr.numerics.norms import block_norms, check_group, group_norms


def soft_threshold(point: Tensor, *, threshold: float | Tensor) -> Tensor:
    r"""Shrinks every entry towards 0: the proximal map of the weighted l1 norm.

    .. math:: \operatorname*{argmin}_x\ \tfrac12 \|x - v\|_2^2 + \sum_i t_i |x_i| .

    Args:
        point: Point ``v``, finite, any shape.
        threshold: Thresholds ``t >= 0`` (step size times weight), a number or a tensor that
            broadcasts to the shape of ``point``, in its unit.

    Returns:
        ``sign(v) (|v| - t)_+``, shape and dtype of ``point``; entries up to the threshold are
        exactly 0. A threshold of 0 returns the point.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` is not finite, ``threshold`` is negative or not finite, or its
            shape does not broadcast.

    Gradients:
        To every order in ``point`` (1 where an entry survives, else 0) and ``threshold``
        (``-sign(v)``, else 0); at threshold 0 the identity everywhere.

    Numerics:
        One rounding. Half types are computed in float32.

    Complexity:
        O(n) time and memory; no host synchronisation on an accelerator.

    Examples:
        >>> import torch
        >>> soft_threshold(torch.tensor([1.0, -0.2, -2.0]), threshold=0.5)
        tensor([ 0.5000,  0.0000, -1.5000])
    """
    work = checked_point("point", point)
    bound = checked_operand("threshold", threshold, NOT_NEGATIVE, like=work)
    survives = (work.abs() > bound) | (bound == 0)
    return torch.where(survives, work - work.sign() * bound, 0.0).to(point.dtype)


def block_soft_threshold(
    point: Tensor, *, threshold: float | Tensor, dim: int | tuple[int, ...]
) -> Tensor:
    r"""Shrinks every block towards 0: the proximal map of a sum of Euclidean norms.

    A block spans the dimensions ``dim``, with one block for every index of the others:

    .. math:: \operatorname*{argmin}_x\ \tfrac12 \|x - v\|_2^2 + \sum_b t_b \|x_b\|_2 .

    Args:
        point: Point ``v``, finite, any shape.
        threshold: Thresholds ``t >= 0`` (step size times weight), a number or a tensor that
            broadcasts to the shape of ``point`` with sizes 1 at ``dim``, in the unit of ``point``.
        dim: Dimension or dimensions that a block spans, for instance ``1`` for the rows of a
            router's weight.

    Returns:
        ``v_b (1 - t_b / ||v_b||)_+``, shape and dtype of ``point``; blocks with a norm up to the
        threshold are exactly 0. A threshold of 0 returns the point.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor.
        ValueError: If ``point`` is not finite, ``dim`` does not name distinct dimensions with at
            least one entry, ``threshold`` is negative or not finite, or its shape does not
            broadcast.

    Gradients:
        To every order in ``point`` and ``threshold``. A block that survives has the Jacobian
        ``(1 - t/||v||) I + t v v^T / ||v||^3``, others 0, also at the point 0; at threshold 0 the
        identity everywhere.

    Numerics:
        Squares are taken relative to the largest entry of the block, so they neither overflow nor
        vanish. Half types are computed in float32.

    Complexity:
        O(n) time and memory; no host synchronisation on an accelerator.

    References:
        Yuan, Lin, *Model Selection and Estimation in Regression with Grouped Variables*, Journal of
        the Royal Statistical Society B 2006.

    Examples:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 4.0], [0.3, -0.4]])
        >>> block_soft_threshold(weight, threshold=1.0, dim=1)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """
    dims = _checked_dims(point, dim)
    work = checked_point("point", point)
    norms = block_norms(work, dims)
    bound = checked_operand("threshold", threshold, NOT_NEGATIVE, like=norms)
    return _scaled(work, _shrinkage(norms, bound)).to(point.dtype)


def group_soft_threshold(
    point: Tensor, *, group: Tensor, num_groups: int, threshold: float | Tensor
) -> Tensor:
    r"""Shrinks groups of coordinates towards 0: the proximal map of a group norm.

    Solves, independently for every leading index, with ``x_g`` the coordinates of group ``g``,

    .. math:: \operatorname*{argmin}_x\ \tfrac12 \|x - v\|_2^2 + \sum_g t_g \|x_g\|_2 .

    With ``t_g = alpha w_g`` it is the proximal step of size ``alpha`` for the group-sparse penalty
    with weights ``w``: a group that does not pay for itself becomes exactly 0.

    Args:
        point: Point ``v``, finite, shape ``(..., n)``.
        group: Group of each coordinate in ``[0, num_groups)``, int64, shape ``(n,)``.
        num_groups: Number of groups ``G``; groups may be empty.
        threshold: Thresholds ``t >= 0``, a number or a tensor that broadcasts to ``(..., G)``, in
            the unit of ``point``.

    Returns:
        ``v_g (1 - t_g / ||v_g||)_+``, shape and dtype of ``point``; groups with a norm up to the
        threshold are exactly 0. A threshold of 0 returns the point.

    Raises:
        TypeError: If ``point`` is not a floating-point tensor or ``group`` is not int64.
        ValueError: If ``point`` has no coordinates or is not finite, a group is out of range,
            ``threshold`` is negative or not finite, or a shape is wrong.

    Gradients:
        As for :func:`block_soft_threshold`.

    Numerics:
        As for :func:`block_soft_threshold`.

    Complexity:
        O(n + G) time and memory a row; no host synchronisation on an accelerator.

    References:
        Yuan, Lin, *Model Selection and Estimation in Regression with Grouped Variables*, Journal of
        the Royal Statistical Society B 2006.

    Examples:
        >>> import torch
        >>> group = torch.tensor([0, 1, 0])
        >>> point = torch.tensor([3.0, 0.5, 4.0])
        >>> group_soft_threshold(point, group=group, num_groups=2, threshold=1.0)
        tensor([2.4000, 0.0000, 3.2000])
    """
    work = checked_vectors("point", point)
    check_group(group, num_groups, work.shape[-1])
    norms = group_norms(work, group, num_groups)
    bound = checked_operand("threshold", threshold, NOT_NEGATIVE, like=norms)
    return _scaled(work, _shrinkage(norms, bound).index_select(-1, group)).to(point.dtype)


def _shrinkage(norms: Tensor, threshold: Tensor) -> Tensor:
    """Returns ``(1 - t / N)_+``, and 1 at ``t = 0`` also for a norm of 0."""
    survives = norms > threshold
    kept = (norms - threshold) / torch.where(survives, norms, 1.0)
    return torch.where(survives, kept, (threshold == 0).to(norms.dtype))


def _scaled(point: Tensor, factor: Tensor) -> Tensor:
    """Returns the product, without the sign of zeros."""
    return torch.where(factor > 0, point * factor, 0.0)


def _checked_dims(point: Tensor, dim: int | tuple[int, ...]) -> tuple[int, ...]:
    """Returns the dimensions of a block, counted from the front."""
    given = (dim,) if isinstance(dim, int) else dim
    dims = tuple(entry + point.dim() if entry < 0 else entry for entry in given)
    usable = all(0 <= entry < point.dim() and point.shape[entry] > 0 for entry in dims)
    if not usable or not dims or len(set(dims)) < len(dims):
        raise ValueError(
            f"dim must name distinct dimensions of point with at least one entry, got {dim} "
            f"for shape {tuple(point.shape)}"
        )
    return dims
