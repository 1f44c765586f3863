"""Losses that are infinite: the limit of the weights as they grow together."""

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.scaling import Level, scaled_problem
from drgr.ambiguity.spectral import Spectral
from drgr.ambiguity.total_variation import TotalVariation

_NO_PENALTY = 1e-200
# Exponents of more than this many penalties below the top leave no weight in float64.
_PENALTIES = 1e3
# The price of a radius is this many ranges of the losses only where it hardly matters any more.
_RANGES = 1e6


def marked_infinite(
    losses: Tensor, nominal: Tensor, level: Level, divergence: Divergence | Spectral
) -> tuple[Tensor, Level, Tensor]:
    """Replaces problems with infinite losses by finite ones that have the same weights.

    As infinite losses grow, differences among the finite ones stop to count, and so does any
    penalty: the two levels 1 (infinite) and 0 (finite) are left, and inside each level the weights
    are in proportion to the nominal. Not so where a cap or the rank bounds what the infinite ones
    take: the rest is then shared among the finite ones by their losses. There the infinite ones
    are lifted above the finite ones as far as it takes to fill them up.

    Args:
        losses: Finite or ``inf``, shape ``(batch, n)``.
        nominal: Probabilities, shape ``(batch, n)``; infinite losses without mass do not count.
        level: Radius or penalty of each problem.
        divergence: The ambiguity set.

    Returns:
        Finite losses, the level, and which problems are infinite, bool, shape ``(batch,)``.
    """
    marks = losses.isposinf()
    is_infinite = (marks & (nominal > 0)).any(dim=-1)
    if not bool(marks.any()):
        return losses, level, is_infinite
    finite = losses.masked_fill(marks, 0.0)
    has_rest = _finite_losses_count(marks.to(losses.dtype), nominal, level, divergence)
    lifted = torch.where(marks, _lift(losses, nominal, level, divergence), finite)
    limits = torch.where(has_rest.unsqueeze(-1), lifted, marks.to(losses.dtype))
    if level.kind == "penalty":
        value = torch.where(is_infinite & ~has_rest, _NO_PENALTY, level.value)
        level = Level(kind=level.kind, value=value)
    return torch.where(is_infinite.unsqueeze(-1), limits, finite), level, is_infinite


@torch.no_grad()
def _finite_losses_count(
    marks: Tensor, nominal: Tensor, level: Level, divergence: Divergence | Spectral
) -> Tensor:
    """Returns whether a cap or the rank leaves mass to the finite losses, shape ``(batch,)``."""
    if isinstance(divergence, (Spectral, TotalVariation)):
        return torch.ones_like(marks[..., 0], dtype=torch.bool)
    problem, _ = scaled_problem(marks, nominal)
    is_left = (divergence.limit(problem) > -torch.inf) & (marks == 0) & (nominal > 0)
    has_rest = is_left.any(dim=-1)
    if level.kind == "radius":
        has_rest &= level.value >= divergence.saturation_radius(problem)
    return has_rest


@torch.no_grad()
def _lift(
    losses: Tensor, nominal: Tensor, level: Level, divergence: Divergence | Spectral
) -> Tensor:
    """Returns the finite stand-in of infinite losses, shape ``(batch, 1)``."""
    counts = losses.isfinite() & (nominal > 0)
    top = losses.masked_fill(~counts, -torch.inf).amax(dim=-1)
    bottom = losses.masked_fill(~counts, torch.inf).amin(dim=-1)
    span = torch.where(top > bottom, top - bottom, 1.0)
    height = span
    if divergence.has_level and level.kind == "penalty":
        height = span + _PENALTIES * level.value
    elif not isinstance(divergence, TotalVariation) and divergence.has_level:
        height = _RANGES * span
    return torch.where(counts.any(dim=-1), top + height, 1.0).unsqueeze(-1)
