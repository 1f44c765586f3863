"""Losses that are infinite: the limit of the weights as they grow together."""

import torch
from torch import Tensor

from drgr.ambiguity.scaling import Level

_NO_PENALTY = 1e-200


def marked_infinite(losses: Tensor, nominal: Tensor, level: Level) -> tuple[Tensor, Level, Tensor]:
    """Replaces problems with infinite losses by the two levels 1 (infinite) and 0 (finite).

    As infinite losses grow, differences among the finite ones stop to count, and so does any
    penalty; inside each level the weights stay in proportion to the nominal.

    Args:
        losses: Finite or ``inf``, shape ``(batch, n)``.
        nominal: Probabilities, shape ``(batch, n)``; infinite losses without mass do not count.
        level: Radius or penalty of each problem.

    Returns:
        Finite losses, the level, and which problems are infinite, bool, shape ``(batch,)``.
    """
    marks = losses.isposinf()
    is_infinite = (marks & (nominal > 0)).any(dim=-1)
    finite = losses.masked_fill(marks, 0.0)
    limits = torch.where(is_infinite.unsqueeze(-1), marks.to(losses.dtype), finite)
    if level.kind == "penalty":
        value = torch.where(is_infinite, _NO_PENALTY, level.value)
        level = Level(kind=level.kind, value=value)
    return limits, level, is_infinite
