"""The chi-square divergence, solved exactly on shrinking active sets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from drgr.ambiguity.divergence import (
    Problem,
    SaddlePoint,
    divergence_of_top,
    exact_saddle_point,
    restricted_to_top,
)


@final
@dataclass(frozen=True, slots=True)
class ChiSquare:
    r"""Half the Pearson chi-square divergence, ``D(q||p) = 1/2 sum_i (q_i - p_i)^2 / p_i``.

    Generator ``f(r) = (r - 1)^2 / 2``, conjugate ``f*(s) = ((1 + s)_+^2 - 1) / 2``, ``f''(1) = 1``.
    Weights are ``q_i = p_i (1 + (l_i - eta) / lam)_+``, so domains far below the worst get exactly
    zero. The radius saturates at ``(1/P - 1) / 2``, where ``P`` is the nominal mass of the largest
    loss.

    Conversions: a radius in the Pearson convention is twice this radius; a coefficient of variation
    ``c`` of ``q/p`` is radius ``c^2 / 2``; it is Cressie-Read of order 2.

    Both problems are solved by one finite algorithm: a closed form on an active set, from which
    atoms are dropped until none gets a negative weight.

    Complexity:
        O(n) time a round and O(n) memory; about 8 rounds on data, at most one for each distinct
        loss.

    References:
        Levy, Carmon, Duchi, Sidford, *Large-Scale Methods for Distributionally Robust
        Optimization*, NeurIPS 2020 (same normalisation).

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=ChiSquare(), radius=0.3).weights
        tensor([0.0573, 0.2643, 0.6784])
    """

    has_level: ClassVar[bool] = True

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Returns ``(r - 1)^2 / 2``."""
        return torch.expm1(log_ratio).square() / 2

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``s + s^2 / 2`` for ``s >= -1`` and ``-1/2`` below."""
        clipped = slope.clamp_min(-1.0)
        return clipped + clipped.square() / 2

    def ratio(self, slope: Tensor) -> Tensor:
        """Returns ``(1 + s)_+``."""
        return (1 + slope).clamp_min(0.0)

    def ratio_slope(self, slope: Tensor) -> Tensor:
        """Returns 1 for ``s > -1`` and 0 below."""
        return (slope > -1).to(slope.dtype)

    def limit(self, problem: Problem) -> Tensor:
        """Returns the nominal restricted to the largest loss."""
        return restricted_to_top(problem)

    def saturation_radius(self, problem: Problem) -> Tensor:
        """Returns the divergence of the nominal restricted to the largest loss."""
        return divergence_of_top(self.generator, problem)

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves in closed form on active sets that shrink to the right one."""

        def depth(active: _ActiveSet) -> Tensor:
            centred = (active.heights - active.mean.unsqueeze(-1)).square_()
            variance = centred.mul_(active.masses).sum(dim=-1) / active.mass
            # (1 + 2 rho) P - 1 without cancellation; the floors only guard against rounding.
            curvature = (2 * radius * active.mass - active.rest).clamp_min(1e-300)
            return (variance / curvature).sqrt().clamp_min(1e-150)

        return _on_last_active_set(problem, depth)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves in closed form on active sets: a weighted projection onto the simplex."""
        return _on_last_active_set(problem, lambda active: penalty / active.mass)


class _ActiveSet(NamedTuple):
    """Atoms with positive weight, and their losses as heights above the lowest of them.

    Differences from the lowest active loss keep their digits also where a heavy atom lies close to
    it and the range is set by atoms of hardly any mass.
    """

    member: Tensor
    masses: Tensor
    """Nominal masses of members, 0 elsewhere, shape ``(batch, n)``."""
    mass: Tensor
    rest: Tensor
    floor: Tensor
    heights: Tensor
    mean: Tensor


def _on_last_active_set(problem: Problem, depth: Callable[[_ActiveSet], Tensor]) -> SaddlePoint:
    """Shrinks the active set until the cut that is right for it lies below all its losses.

    The cut of a set is solved as if weights below it counted with their sign. So it never passes
    the true one, every set contains the true one, and the last equals it.
    """
    active = _active_set(problem, torch.ones_like(problem.losses, dtype=torch.bool))
    while True:
        below = depth(active)
        cut = (active.mean - below).unsqueeze(-1)
        dropped = active.member & (active.heights <= cut)
        if not bool(dropped.any()):
            return _on_active_set(active, below)
        active = _active_set(problem, active.member & ~dropped)


def _active_set(problem: Problem, member: Tensor) -> _ActiveSet:
    floor = problem.losses.masked_fill(~member, 0.0).amin(dim=-1, keepdim=True)
    heights = (problem.losses - floor).clamp_min_(0.0)
    masses = problem.nominal * member
    mass = masses.sum(dim=-1)
    return _ActiveSet(
        member=member,
        masses=masses,
        mass=mass,
        rest=(problem.nominal - masses).sum(dim=-1),
        floor=floor.squeeze(-1),
        heights=heights,
        mean=(masses * heights).sum(dim=-1) / mass,
    )


def _on_active_set(active: _ActiveSet, depth: Tensor) -> SaddlePoint:
    """Returns the saddle point whose cut lies ``depth`` below the active mean.

    Then ``lam = P depth`` and ``eta = mean - (1 - P) depth``; written so, both stay exact when the
    cut is far away (small radius, large penalty).
    """
    multiplier = active.mass * depth
    threshold = active.mean - active.rest * depth
    slope = (active.heights - threshold.unsqueeze(-1)) / multiplier.unsqueeze(-1)
    return exact_saddle_point(
        log_ratio=torch.log1p(slope.masked_fill(~active.member, -1.0).clamp_min(-1.0)),
        multiplier=multiplier,
        threshold=active.floor + threshold,
    )
