r"""Who bears the loss: inequality between domains, and between rare and frequent tokens."""

import torch
from torch import Tensor

from drgr._checks import check_positive, check_shape


def gini(values: Tensor) -> float:
    r"""Measures inequality between non-negative numbers.

    .. math:: \frac{\sum_{ij} |x_i - x_j|}{2 n^2 \bar x}

    Args:
        values: Shape ``(n,)``, at least one; losses of domains, for instance.

    Returns:
        0 where all are equal (also where all are 0), up to ``1 - 1 / n`` where one has everything.

    Raises:
        ValueError: If the shape is wrong, or a value is negative or not finite.

    Complexity:
        O(n log n): sorted, ``sum_ij |x_i - x_j| = 2 sum_i (2 i - n - 1) x_(i)``.

    References:
        Gini, *Variabilità e mutabilità*, 1912.
    """
    check_shape("values", values, (None,))
    numbers = values.detach().double().sort().values
    count = len(numbers)
    if count == 0 or not bool(((numbers >= 0) & numbers.isfinite()).all()):
        raise ValueError(
            f"values must be at least one number, finite and not negative, got {values.tolist()}"
        )
    total = float(numbers.sum())
    if total == 0:
        return 0.0
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=numbers.device)
    return float(((2 * ranks - count - 1) * numbers).sum()) / (count * total)


def frequency_groups(counts: Tensor, *, num_groups: int = 10) -> Tensor:
    """Sorts token ids by how often they occur in a text, into groups of equal shares of the text.

    Ids from the rarest to the most frequent (equal counts by id) are laid end to end, each as long
    as its count; an id belongs to the group that its middle falls into. Group 0 then holds the
    rarest tokens, those that never occur among them, and about a tenth of the text; an id more
    frequent than a group is wide leaves others empty.

    Args:
        counts: Occurrences of each id, shape ``(V,)``, int64, not all 0.
        num_groups: Number of groups, 10 for deciles.

    Returns:
        The group of each id, shape ``(V,)``, int64 in ``[0, num_groups)``.

    Raises:
        ValueError: If the shape is wrong, a count is negative, or all are 0.

    Complexity:
        O(V log V).
    """
    check_shape("counts", counts, (None,))
    check_positive("num_groups", num_groups)
    total = int(counts.sum()) if len(counts) else 0
    if total == 0 or int(counts.min()) < 0:
        raise ValueError(
            f"counts must not be negative and not all 0, got a sum of {total}; count the tokens of "
            "a split with text"
        )
    order = counts.argsort(stable=True)
    ordered = counts[order]
    # In whole halves of tokens: exact for as many as int64 holds.
    middle = 2 * ordered.cumsum(0) - ordered
    groups = torch.empty_like(order)
    groups[order] = (middle * num_groups // (2 * total)).clamp_max(num_groups - 1)
    return groups
