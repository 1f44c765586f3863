r"""Whether a router's score says how strongly its expert answers.

.. math:: r = \frac{\operatorname{Cov}(s, a)}{\sqrt{\operatorname{Var}(s) \operatorname{Var}(a)}}

over assignments with score ``s`` and activation norm ``a``; and the same of their ranks.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_shape


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Correlation:
    """Two correlations of the same pairs, NaN where either side is constant.

    Attributes:
        pearson: Linear correlation in [-1, 1], scalar, float64.
        spearman: Correlation of ranks, ties sharing the mean of theirs, scalar, float64.
        num_pairs: Number of pairs.
    """

    pearson: Tensor
    spearman: Tensor
    num_pairs: int


@torch.no_grad()
def score_activation_correlation(
    scores: Tensor, activations: Tensor, *, counted: Tensor | None = None
) -> Correlation:
    """Correlates scores with activation norms over assignments.

    Args:
        scores: Score of each assignment, any shape.
        activations: Norm of the expert's activation for it, same shape.
        counted: Which assignments count, bool, same shape; all by default. Leave out padding and
            candidates that do not run.

    Returns:
        The correlations. They are undefined, and NaN, for fewer than two pairs or a constant side.

    Raises:
        ValueError: If shapes do not fit.

    Complexity:
        O(n log n) time for ``n`` pairs.

    References:
        *Routers Learn the Geometry of Their Experts*, 2026 (arXiv:2605.12476), which correlates
        scores and gate activations; which norm is taken there was not readable.
    """
    check_shape("activations", activations, tuple(scores.shape))
    first, second = scores.double().flatten(), activations.double().flatten()
    if counted is not None:
        check_shape("counted", counted, tuple(scores.shape))
        first, second = first[counted.flatten()], second[counted.flatten()]
    return Correlation(
        pearson=_pearson(first, second),
        spearman=_pearson(_ranks(first), _ranks(second)),
        num_pairs=first.numel(),
    )


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    """Returns the correlation; NaN where a side is constant."""
    if first.numel() < 2 or bool((first == first[0]).all() | (second == second[0]).all()):
        return first.new_tensor(torch.nan)
    first, second = first - first.mean(), second - second.mean()
    scale = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    correlation: Tensor = (first @ second / scale).clamp(-1, 1)
    return correlation


def _ranks(values: Tensor) -> Tensor:
    """Returns ranks from 0, equal values sharing the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    start = count.cumsum(0) - count
    ranks: Tensor = (start + (count - 1) / 2)[place].double()
    return ranks
