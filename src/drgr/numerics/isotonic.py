"""Isotonic regression: the nondecreasing sequence nearest to a given one."""

import torch
from torch import Tensor

from drgr.numerics.inputs import (
    ABOVE_ZERO,
    NOT_NEGATIVE,
    checked_operand,
    checked_vectors,
    plain,
    values_are_readable,
    with_value,
)

# Data need about log2(n) rounds; what takes longer is a chain that grows by a block a round.
_PARALLEL_ROUNDS = 48


def isotonic_regression(values: Tensor, *, weights: Tensor | None = None) -> Tensor:
    r"""Finds the nondecreasing sequence nearest to a given one.

    Solves, independently for every leading index,

    .. math:: \min_x \tfrac12 \sum_i w_i (x_i - y_i)^2
              \quad\text{s.t.}\quad x_1 \le x_2 \le \dots \le x_n .

    The solution is constant on blocks of neighbours and there the weighted mean of ``y``.

    Args:
        values: Values ``y``, finite, shape ``(..., n)``.
        weights: Weights ``w > 0``, shape ``(n,)`` or broadcasting to that of ``values``; ones if
            None.

    Returns:
        The fit ``x``, shape and dtype of ``values``, nondecreasing to the last bit.

    Raises:
        TypeError: If ``values`` is not a floating-point tensor.
        ValueError: If ``values`` has no entries or is not finite, ``weights`` are not positive, or
            their shape does not broadcast.

    Gradients:
        To every order in ``values`` and ``weights``, those of the block means: ``w_j / W`` within
        a block of weight ``W`` and 0 across blocks. Where two blocks are about to merge they are
        those of one side.

    Numerics:
        Blocks are found as in :func:`isotonic_blocks`. Means are corrected by the mean of what they
        leave over, so long blocks lose no digits to the order of summation. Half types are computed
        in float32; float64 tells closer means apart.

    Complexity:
        That of :func:`isotonic_blocks`.

    References:
        Barlow, Bartholomew, Bremner, Brunk, *Statistical Inference under Order Restrictions*, 1972
        (pooling adjacent violators).

    Examples:
        >>> import torch
        >>> isotonic_regression(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])
    """
    work = checked_vectors("values", values)
    given = checked_operand("weights", 1.0 if weights is None else weights, ABOVE_ZERO, like=work)
    # Only ratios of weights matter; near 1 the sums cannot overflow.
    masses = given / given.detach().amax(dim=-1, keepdim=True)
    with torch.no_grad():
        blocks = isotonic_blocks(masses * work, masses)
        rough = _block_means(work, masses, blocks)
    fit = rough + _block_means(work - rough, masses, blocks)
    return with_value(fit, fit.detach().cummax(dim=-1).values).to(values.dtype)


def isotonic_blocks(numerators: Tensor, denominators: Tensor) -> Tensor:
    r"""Pools neighbours until the ratios of the pooled sums do not decrease.

    Starts, independently for every leading index, from one block for each entry and merges
    neighbouring blocks with decreasing ratios, which gives the same blocks in any order, until

    .. math:: \frac{\sum_{i \in B_1} N_i}{\sum_{i \in B_1} D_i}
              \le \frac{\sum_{i \in B_2} N_i}{\sum_{i \in B_2} D_i} \le \dots

    With ``N = w y`` and ``D = w`` these are the blocks of the isotonic regression; other ratios
    solve other separable problems under the same order.

    Args:
        numerators: ``N``, finite, shape ``(..., n)``; at least 0 where the denominator is 0.
        denominators: ``D >= 0``, finite, the same shape. A ratio ``N / 0`` with ``N > 0`` counts as
            ``inf``. An entry ``0 / 0`` changes no ratio and joins its left neighbour, at the start
            of a row its right one.

    Returns:
        The block of each entry, counted from 0 in each row, int64, the same shape.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ or are empty, or an entry is out of its range.

    Gradients:
        None: blocks are piecewise constant. Sums over the blocks returned are differentiable.

    Numerics:
        Ratios are compared by cross-multiplication, each row scaled by its largest entries, without
        a division. Equal ratios are not pooled.

    Complexity:
        Every round merges all runs of blocks with decreasing ratios at once, in all rows, at a cost
        linear in the blocks left. Noise takes some ``log n`` rounds. A chain that pulls in one
        block a round would take ``n`` rounds, so rows unfinished after 48 are pooled from left to
        right on the host: O(n) in the worst case too, at the speed of Python. Two host
        synchronisations a round.

    References:
        Best, Chakravarti, *Active set algorithms for isotonic regression*, Mathematical Programming
        1990 (the order of merges does not matter).

    Examples:
        >>> import torch
        >>> isotonic_blocks(torch.tensor([1.0, 6.0, 1.0, 9.0]), torch.tensor([1.0, 2.0, 1.0, 0.0]))
        tensor([0, 1, 1, 2])
    """
    tops = checked_vectors("numerators", numerators).detach()
    bottoms = checked_vectors("denominators", denominators, NOT_NEGATIVE).detach()
    if tops.shape != bottoms.shape:
        raise ValueError(
            f"denominators must have the shape of numerators {tuple(tops.shape)}, "
            f"got {tuple(bottoms.shape)}; expand it"
        )
    _check_infinite_ratios(tops, bottoms)
    num_entries = tops.shape[-1]
    if tops.numel() == 0:
        return torch.zeros(tops.shape, dtype=torch.int64, device=tops.device)
    tops, bottoms = (_near_one(part.reshape(-1, num_entries)) for part in (tops, bottoms))
    counts = ((tops != 0) | (bottoms != 0)).cumsum(dim=-1)
    return _pooled(tops, bottoms, (counts - 1).clamp_min(0)).reshape(numerators.shape)


def _pooled(tops: Tensor, bottoms: Tensor, blocks: Tensor) -> Tensor:
    """Merges runs of violating blocks in rounds; shapes ``(rows, n)``."""
    num_blocks = int(blocks[:, -1].amax()) + 1
    tops, bottoms = (_block_sums(part, blocks, num_blocks) for part in (tops, bottoms))
    for _ in range(_PARALLEL_ROUNDS):
        decreases = _decreases(tops, bottoms)
        if not bool(decreases.any()):
            return blocks
        merged = torch.zeros_like(tops, dtype=torch.int64)
        merged[:, 1:] = (~decreases).cumsum(dim=-1)
        blocks = merged.gather(-1, blocks)
        num_blocks = int(blocks[:, -1].amax()) + 1
        tops, bottoms = (_block_sums(part, merged, num_blocks) for part in (tops, bottoms))
    return _pooled_in_sequence(tops, bottoms).gather(-1, blocks)


def _decreases(tops: Tensor, bottoms: Tensor) -> Tensor:
    """Returns where the ratio of a block exceeds that of the next one."""
    return tops[:, :-1] * bottoms[:, 1:] > tops[:, 1:] * bottoms[:, :-1]


def _block_sums(parts: Tensor, blocks: Tensor, num_blocks: int) -> Tensor:
    """Returns the sum of each block, shape ``(rows, num_blocks)``.

    Rows with fewer blocks end in ``0 / 0``, which violates nothing; of these the ones beyond
    ``num_blocks`` are dropped.
    """
    sums = parts.new_zeros(parts.shape[0], num_blocks)
    return sums.scatter_add(-1, blocks.clamp_max(num_blocks - 1), parts)


def _pooled_in_sequence(tops: Tensor, bottoms: Tensor) -> Tensor:
    """Returns the block of each block after pooling the unfinished rows from left to right."""
    pooled = torch.arange(tops.shape[1], device=tops.device).repeat(tops.shape[0], 1)
    unfinished = _decreases(tops, bottoms).any(dim=-1).nonzero().squeeze(-1)
    for index in unfinished.tolist():
        row = _pooled_row(tops[index].tolist(), bottoms[index].tolist())
        pooled[index] = torch.tensor(row, device=tops.device)
    return pooled


def _pooled_row(tops: list[float], bottoms: list[float]) -> list[int]:
    pooled: list[tuple[float, float, int]] = []
    for top, bottom in zip(tops, bottoms, strict=True):
        block = (top, bottom, 1)
        while pooled and pooled[-1][0] * block[1] > block[0] * pooled[-1][1]:
            before = pooled.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
        pooled.append(block)
    return [index for index, (_, _, size) in enumerate(pooled) for _ in range(size)]


def _block_means(values: Tensor, masses: Tensor, blocks: Tensor) -> Tensor:
    """Returns for each entry the weighted mean of its block, shape ``(..., n)``."""
    empty = torch.zeros_like(values)
    sums = empty.scatter_add(-1, blocks, masses * values).gather(-1, blocks)
    return sums / empty.scatter_add(-1, blocks, masses).gather(-1, blocks)


def _near_one(parts: Tensor) -> Tensor:
    """Divides each row by its largest magnitude."""
    largest = parts.abs().amax(dim=-1, keepdim=True)
    return parts / torch.where(largest > 0, largest, 1.0)


def _check_infinite_ratios(numerators: Tensor, denominators: Tensor) -> None:
    """Raises ``ValueError`` at a ratio of ``-inf``, where values are readable."""
    if not values_are_readable(numerators):
        return
    wrong = (denominators == 0) & (numerators < 0)
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            "numerators must be at least 0 where denominators are 0, "
            f"got {numerators[index].item()} at index {plain(index)}; drop that entry"
        )
