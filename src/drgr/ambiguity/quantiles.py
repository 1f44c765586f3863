"""Quantiles of the losses and the tail above them."""

from typing import NamedTuple

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Problem

# Rounding of a running sum must not push the boundary one atom down.
_ROUNDING = 4e-15


class Tail(NamedTuple):
    """The part of the nominal that holds the largest losses, of a given mass."""

    quantile: Tensor
    """Lowest loss of the tail, shape ``(batch,)``."""
    above: Tensor
    """Atoms that are in the tail whole, bool, shape ``(batch, n)``."""
    at: Tensor
    """Atoms at the quantile, bool, shape ``(batch, n)``."""
    share: Tensor
    """Share of the mass at the quantile that is in the tail, in [0, 1], shape ``(batch,)``."""


def upper_quantile(problem: Problem, level: Tensor) -> Tensor:
    """Returns the largest ``t`` with nominal mass at least ``level`` on losses of at least ``t``.

    Args:
        problem: Problems of any kind.
        level: Mass of the upper tail, in (0, 1], shape ``(batch,)``.

    Returns:
        A loss of each problem, shape ``(batch,)``.

    Complexity:
        One sort, O(n log n); for uniform nominals and one level a selection, O(n).
    """
    num_atoms = problem.losses.shape[-1]
    if problem.is_uniform and level.numel() > 0 and bool((level == level[0]).all()):
        count = int((level[0] * num_atoms * (1 - _ROUNDING)).ceil())
        smallest = num_atoms + 1 - min(max(count, 1), num_atoms)
        return problem.losses.kthvalue(smallest, dim=-1).values
    losses, order = problem.losses.sort(dim=-1, descending=True)
    above = problem.nominal.gather(-1, order).cumsum(dim=-1)
    reached = above >= level.unsqueeze(-1) * (1 - _ROUNDING)
    reached[..., -1] = True
    first = reached.to(torch.uint8).argmax(dim=-1, keepdim=True)
    return losses.gather(-1, first).squeeze(-1)


def upper_tail(problem: Problem, level: Tensor) -> Tail:
    """Returns the tail of mass ``level``; atoms at its boundary share in proportion to mass.

    Args:
        problem: Problems of any kind.
        level: Mass of the tail, in (0, 1], shape ``(batch,)``.

    Gradients:
        Of the share through the nominal, on a fixed order of the losses.
    """
    quantile = upper_quantile(problem, level)
    above = problem.losses > quantile.unsqueeze(-1)
    at = problem.losses == quantile.unsqueeze(-1)
    rest = level - (problem.nominal * above).sum(dim=-1)
    share = (rest / (problem.nominal * at).sum(dim=-1)).clamp(0.0, 1.0)
    return Tail(quantile, above, at, share)
