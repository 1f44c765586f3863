"""The chi-square divergence, solved exactly by sorting."""

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

    Both problems are solved by one finite algorithm: sort, find the active set from running sums of
    nonnegative terms (no cancellation), then evaluate a closed form on that set.

    Complexity:
        O(n log n) time, O(n) memory.

    References:
        Levy, Carmon, Duchi, Sidford, *Large-Scale Methods for Distributionally Robust
        Optimization*, NeurIPS 2020 (same normalisation).

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=ChiSquare(), radius=0.3).weights
        tensor([0.0463, 0.2073, 0.7464])
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
        """Solves by sorting.

        With the cut ``c = eta - lam`` the weights are ``q_i = p_i (l_i - c)_+ / lam``, and the
        divergence grows with ``c``: an atom is active where the divergence with the cut at its own
        loss is at least the radius.
        """
        moments = _moments_above(problem)
        bound = (1 + 2 * radius).unsqueeze(-1) * moments.first.square()
        active = _active_set(problem, moments, moments.second >= bound)
        centred = active.heights - active.mean.unsqueeze(-1)
        variance = problem.mean(active.member * centred.square()) / active.mass
        # (1 + 2 rho) P - 1 without cancellation; the floors only guard against rounding.
        curvature = (2 * radius * active.mass - active.rest).clamp_min(1e-300)
        return _on_active_set(active, (variance / curvature).sqrt().clamp_min(1e-150))

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves by sorting: a weighted projection onto the simplex."""
        moments = _moments_above(problem)
        active = _active_set(problem, moments, moments.first < penalty.unsqueeze(-1))
        return _on_active_set(active, penalty / active.mass)


class _Moments(NamedTuple):
    """Moments ``sum_i p_i (l_i - c)_+^k``, ``k = 1, 2``, at each loss ``c`` in descending order."""

    losses: Tensor
    first: Tensor
    second: Tensor


class _ActiveSet(NamedTuple):
    """Atoms with positive weight, and their losses as heights above the lowest of them.

    Differences from the lowest active loss keep their digits also where a heavy atom lies close to
    it and the range is set by atoms of hardly any mass.
    """

    member: Tensor
    mass: Tensor
    rest: Tensor
    floor: Tensor
    heights: Tensor
    mean: Tensor


def _moments_above(problem: Problem) -> _Moments:
    losses, order = problem.losses.sort(dim=-1, descending=True)
    mass = problem.nominal.gather(-1, order).cumsum(dim=-1)[..., :-1]
    drop = losses[..., :-1] - losses[..., 1:]
    start = torch.zeros_like(losses[..., :1])
    first = torch.cat([start, (mass * drop).cumsum(dim=-1)], dim=-1)
    growth = drop * (2 * first[..., :-1] + mass * drop)
    return _Moments(losses, first, torch.cat([start, growth.cumsum(dim=-1)], dim=-1))


def _active_set(problem: Problem, moments: _Moments, is_active: Tensor) -> _ActiveSet:
    """Returns the atoms down to the lowest active loss, given activity in descending order."""
    last = is_active.sum(dim=-1, keepdim=True) - 1
    floor = moments.losses.gather(-1, last)
    heights = problem.losses - floor
    member = heights >= 0
    mass = problem.mean(member.to(heights.dtype))
    return _ActiveSet(
        member=member,
        mass=mass,
        rest=problem.mean((~member).to(heights.dtype)),
        floor=floor.squeeze(-1),
        heights=heights,
        mean=problem.mean(heights.clamp_min(0.0)) / mass,
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
