"""The interface between a divergence and the solver-independent part of the worst case."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

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
    has_empty_atoms: bool = False
    """Whether some atom has no nominal mass; such atoms never count, whatever their values."""
    is_uniform: bool = False
    """Whether all nominal masses are known to be ``1 / n``, which saves some sorting."""

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
        weighted = self.nominal * values
        if self.has_empty_atoms:
            weighted = torch.where(self.nominal > 0, weighted, 0.0)
        return weighted.sum(dim=-1)

    def rows(self, chosen: Tensor) -> "Problem":
        """Returns the problems at the bool or int64 index ``chosen``."""
        return replace(self, losses=self.losses[chosen], nominal=self.nominal[chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class SaddlePoint:
    """A primal and a dual point of each problem, in the units of :class:`Problem`."""

    log_ratio: Tensor
    """Logarithm ``log(q / p)`` of each atom's change of mass, shape ``(batch, n)``.

    The logarithm keeps the digits of changes near 1 (small radius) and of masses near 0 alike;
    ``-inf`` is an atom without weight.
    """
    multiplier: Tensor
    """``lam >= 0`` of the divergence, shape ``(batch,)``."""
    threshold: Tensor
    """``eta`` of the normalisation, shape ``(batch,)``."""
    exhausted: Tensor
    """Whether an iteration ran out of steps, bool, shape ``(batch,)``."""


def exact_saddle_point(*, log_ratio: Tensor, multiplier: Tensor, threshold: Tensor) -> SaddlePoint:
    """Returns the saddle point of a solver without iterations.

    Examples:
        >>> import torch
        >>> one = torch.ones(1)
        >>> point = exact_saddle_point(log_ratio=torch.zeros(1, 2), multiplier=one, threshold=one)
        >>> point.exhausted
        tensor([False])
    """
    exhausted = torch.zeros_like(multiplier, dtype=torch.bool)
    return SaddlePoint(
        log_ratio=log_ratio, multiplier=multiplier, threshold=threshold, exhausted=exhausted
    )


def restricted_to_top(problem: Problem) -> Tensor:
    """Returns ``log(q / p)`` of the nominal restricted to the largest loss, shape ``(batch, n)``.

    Differentiable in the nominal.

    Examples:
        >>> import torch
        >>> losses = torch.tensor([[-1.0, 0.0, 0.0]])
        >>> problem = Problem(losses=losses, nominal=torch.full_like(losses, 1 / 3))
        >>> restricted_to_top(problem).exp()
        tensor([[0.0000, 1.5000, 1.5000]])
    """
    log_ratio = torch.log1p(problem.odds_against_top()).unsqueeze(-1)
    return log_ratio.expand_as(problem.losses).masked_fill(~problem.is_top(), -torch.inf)


def divergence_of_top(generator: Callable[[Tensor], Tensor], problem: Problem) -> Tensor:
    """Returns ``P f(1 / P) + (1 - P) f(0)``, the divergence of :func:`restricted_to_top`.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import TotalVariation
        >>> losses = torch.tensor([[-1.0, 0.0, 0.0]])
        >>> problem = Problem(losses=losses, nominal=torch.full_like(losses, 1 / 3))
        >>> divergence_of_top(TotalVariation().generator, problem)
        tensor([0.3333])
    """
    odds = problem.odds_against_top()
    at_zero = generator(torch.full_like(odds, -torch.inf))
    rest = odds / (1 + odds)
    lost = torch.where(rest > 0, rest * at_zero, 0.0)
    return generator(torch.log1p(odds)) / (1 + odds) + lost


class Divergence(Protocol):
    """What one f-divergence must provide: ``D(q||p) = sum_i p_i f(q_i / p_i)``.

    ``f`` is convex with ``f(1) = f'(1) = 0``; ``f*(s) = sup_{r >= 0} r s - f(r)`` is its conjugate.
    A new divergence is one new class with these members. It may solve as it likes: the certificate
    is computed from ``generator`` and ``conjugate`` alone, so a wrong solver cannot pass unnoticed,
    and edge cases (radius 0, saturation, equal losses) never reach ``constrained``.
    """

    has_level: ClassVar[bool]
    """Whether the set takes a radius or a penalty; False where the divergence fixes its size."""

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Returns ``f(exp(log_ratio))`` elementwise, accurate also near 0 and at ``-inf``."""
        ...

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``f*(slope)`` elementwise, accurate also for small ``slope``."""
        ...

    def limit(self, problem: Problem) -> Tensor:
        """Returns ``log(q / p)`` of the worst case of the largest set, shape ``(batch, n)``.

        It is what a penalty of 0 or a radius without end gives: mostly
        :func:`restricted_to_top`.
        """
        ...

    def saturation_radius(self, problem: Problem) -> Tensor:
        """Returns the divergence of ``limit``, ``inf`` if infinite, shape ``(batch,)``.

        Mostly :func:`divergence_of_top`.
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


@runtime_checkable
class SmoothDivergence(Divergence, Protocol):
    """A divergence whose weights have derivatives: ``q = p r(s)`` with ``s = (l - eta) / lam``."""

    def ratio(self, slope: Tensor) -> Tensor:
        """Returns ``r(s) = (f*)'(s)`` elementwise, by differentiable operations."""
        ...

    def ratio_slope(self, slope: Tensor) -> Tensor:
        """Returns ``r'(s) = (f*)''(s)`` elementwise, by differentiable operations."""
        ...
