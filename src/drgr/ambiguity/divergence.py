"""The interface between a divergence and the solver-independent part of the worst case."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A batch of adversary problems in the units that every divergence solves in.

    Losses are shifted and scaled so that, over the atoms with nominal mass, the largest is exactly
    0 and the smallest exactly -1 (all 0 where the losses are equal). Signs, offsets and scales of
    the user's losses therefore never reach a solver.
    """

    losses: Tensor
    """Scaled losses in [-1, 0], float64, shape ``(batch, n)``; -1 at atoms without nominal mass."""
    nominal: Tensor
    """Nominal probabilities, float64, shape ``(batch, n)``; each row sums to 1."""

    def is_top(self) -> Tensor:
        """Returns which atoms with mass have the largest loss, bool, shape ``(batch, n)``."""
        return self.losses == 0

    def odds_against_top(self) -> Tensor:
        """Returns ``(1 - P) / P`` for the mass ``P`` of the largest loss, shape ``(batch,)``.

        ``1 / P = 1 + odds`` keeps its digits for ``P`` near 1 as well as near 0.
        """
        is_top = self.is_top()
        rest = self.nominal.masked_fill(is_top, 0.0).sum(dim=-1)
        return rest / self.nominal.masked_fill(~is_top, 0.0).sum(dim=-1)

    def mean(self, values: Tensor) -> Tensor:
        """Returns the nominal mean of ``values``, from shape ``(batch, n)`` to ``(batch,)``."""
        return (self.nominal * values).sum(dim=-1)

    def rows(self, chosen: Tensor) -> "Problem":
        """Returns the problems at the bool or int64 index ``chosen``."""
        return Problem(losses=self.losses[chosen], nominal=self.nominal[chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class SaddlePoint:
    """A primal and a dual point of each problem, in the units of :class:`Problem`."""

    tilt: Tensor
    """Relative change of each atom's mass, ``q / p - 1 >= -1``, shape ``(batch, n)``.

    The change and not the mass: for a small radius its digits would drown beside the 1.
    """
    multiplier: Tensor
    """``lam >= 0`` of the divergence, shape ``(batch,)``."""
    threshold: Tensor
    """``eta`` of the normalisation, shape ``(batch,)``."""
    exhausted: Tensor
    """Whether an iteration ran out of steps, bool, shape ``(batch,)``."""


def exact_saddle_point(*, tilt: Tensor, multiplier: Tensor, threshold: Tensor) -> SaddlePoint:
    """Returns the saddle point of a solver without iterations."""
    exhausted = torch.zeros_like(multiplier, dtype=torch.bool)
    return SaddlePoint(tilt=tilt, multiplier=multiplier, threshold=threshold, exhausted=exhausted)


class Divergence(Protocol):
    """What one f-divergence must provide: ``D(q||p) = sum_i p_i f(q_i / p_i)``.

    ``f`` is convex with ``f(1) = f'(1) = 0``; ``f*(s) = sup_{r >= 0} r s - f(r)`` is its conjugate.
    A new divergence is one new class with these members. It may solve as it likes: the certificate
    is computed from ``generator`` and ``conjugate`` alone, so a wrong solver cannot pass unnoticed,
    and edge cases (radius 0, saturation, equal losses) never reach ``constrained``.
    """

    has_level: ClassVar[bool]
    """Whether the set takes a radius or a penalty; False where the divergence fixes its size."""

    def generator(self, tilt: Tensor) -> Tensor:
        """Returns ``f(1 + tilt)`` elementwise, accurate also for small ``tilt``."""
        ...

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``f*(slope)`` elementwise, accurate also for small ``slope``."""
        ...

    def saturation_radius(self, odds: Tensor) -> Tensor:
        """Returns the divergence of the nominal restricted to the top atoms, ``inf`` if infinite.

        Args:
            odds: ``(1 - P) / P`` for the mass ``P`` of the top atoms, shape ``(batch,)``.
        """
        ...

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves ``max <q, losses>`` over ``D(q||p) <= radius``.

        Args:
            problem: Problems whose losses are not all equal.
            radius: Above 0 and below the saturation radius, shape ``(batch,)``.
        """
        ...

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves ``max <q, losses> - penalty * D(q||p)``.

        Args:
            problem: Any problems, equal losses included.
            penalty: Above 0, in units of the range of the losses, shape ``(batch,)``.
        """
        ...
