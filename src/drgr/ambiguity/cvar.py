"""Conditional value at risk, plain and smoothed by entropy."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Problem, SaddlePoint, exact_saddle_point
from drgr.ambiguity.kl import KL
from drgr.ambiguity.quantiles import upper_tail
from drgr.numerics import increasing_root

_CAP_SLACK = 1e-9
_LARGEST_LOG = 700.0
_TOLERANCE = 5e-13
# Rounding of sums of mass must not cap one atom too many.
_ROUNDING = 4e-15
_NO_MASS = 1e-300


@final
@dataclass(frozen=True, slots=True)
class CVaR:
    r"""Conditional value at risk: the mean of the largest losses, of nominal mass ``level``.

    The set is ``0 <= q_i <= p_i / level``; it has no radius and no penalty. Generator the indicator
    of ``0 <= r <= 1 / level``, conjugate ``f*(s) = s_+ / level``. The value is
    ``min_eta eta + sum_i p_i (l_i - eta)_+ / level``, ``threshold`` a value at risk. Weights are
    ``p_i / level`` above it and a fraction of that on it, shared in proportion to ``p`` among equal
    losses; the mass of the tail is exactly ``level``.

    Conversions: ``level`` is the mass of the tail (0.1: the worst tenth); finance writes
    ``1 - level``. Level 1 is the mean. Weights are piecewise constant in the losses, so they have
    no useful derivative.

    Args:
        level: Mass of the tail, in (0, 1].

    Raises:
        ValueError: If the level is out of range.

    Complexity:
        O(n log n) time, O(n) memory.

    References:
        Rockafellar and Uryasev, *Optimization of Conditional Value-at-Risk*, 2000.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> worst_case(torch.arange(1.0, 11.0), divergence=CVaR(0.25)).value
        tensor(9.2000)
    """

    level: float
    has_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_level(self.level)

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Returns 0 for ``r <= 1 / level`` and ``inf`` above."""
        outside = log_ratio > _CAP_SLACK - math.log(self.level)
        return torch.zeros_like(log_ratio).masked_fill(outside, torch.inf)

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``s_+ / level``."""
        return slope.clamp_min(0.0) / self.level

    def limit(self, problem: Problem) -> Tensor:
        """Returns the worst case itself."""
        return _capped_greedy(problem, self.level)[0]

    def saturation_radius(self, problem: Problem) -> Tensor:
        """Returns 0: the set has one size."""
        return torch.zeros_like(problem.losses[..., 0])

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves as ``penalized``: every radius allows the whole set."""
        return self.penalized(problem, radius)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves by sorting; every penalty costs nothing inside the set."""
        log_ratio, quantile = _capped_greedy(problem, self.level)
        return exact_saddle_point(log_ratio=log_ratio, multiplier=penalty, threshold=quantile)


@final
@dataclass(frozen=True, slots=True)
class KLCVaR:
    r"""Kullback-Leibler divergence on weights of at most ``p_i / level``: CVaR made smooth.

    Generator ``f(r) = r log r - r + 1`` for ``r <= 1 / level`` and infinite above, conjugate
    ``f*(s) = e^s - 1`` up to ``s = log(1 / level)`` and linear beyond, ``f''(1) = 1``. Weights are
    ``q_i = p_i min(exp((l_i - eta) / lam), 1 / level)``. Penalised, the value lies within
    ``lam log(1 / level)`` below :class:`CVaR` of the same level and is smooth; level near 0 is
    :class:`KL`. The radius saturates at the divergence of the CVaR weights, which depends on all
    nominal masses near the boundary.

    Args:
        level: Mass of the tail on which CVaR concentrates, in (0, 1].

    Raises:
        ValueError: If the level is out of range.

    Complexity:
        O(n log n): penalised, one sort and about ``log2 n`` passes; constrained, as many passes for
        each of about 8 evaluations.

    References:
        Levy, Carmon, Duchi, Sidford, *Large-Scale Methods for Distributionally Robust
        Optimization*, NeurIPS 2020, section 3.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> losses = torch.tensor([1.0, 2.0, 4.0])
        >>> worst_case(losses, divergence=KLCVaR(0.5), penalty=1.0).weights
        tensor([0.0896, 0.2437, 0.6667])
    """

    level: float
    has_level: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_level(self.level)

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Returns that of KL for ``r <= 1 / level`` and ``inf`` above."""
        outside = log_ratio > _CAP_SLACK - math.log(self.level)
        return KL().generator(log_ratio).masked_fill(outside, torch.inf)

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``e^s - 1`` below ``log(1 / level)`` and its tangent there above."""
        corner = -math.log(self.level)
        beyond = (slope - corner).clamp_min(0.0) / self.level
        return torch.expm1(slope.clamp_max(corner)) + beyond

    def ratio(self, slope: Tensor) -> Tensor:
        """Returns ``min(e^s, 1 / level)``."""
        return slope.clamp_max(-math.log(self.level)).exp()

    def ratio_slope(self, slope: Tensor) -> Tensor:
        """Returns ``e^s`` below the cap and 0 on it."""
        free = slope < -math.log(self.level)
        return torch.where(free, torch.where(free, slope, 0.0).exp(), 0.0)

    def limit(self, problem: Problem) -> Tensor:
        """Returns the weights of CVaR."""
        return _capped_greedy(problem, self.level)[0]

    def saturation_radius(self, problem: Problem) -> Tensor:
        """Returns the divergence of the weights of CVaR."""
        return problem.mean(self.generator(self.limit(problem)))

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves ``log D = log radius`` over ``log(1 / lam)``."""
        radius = radius * (1 - _TOLERANCE)  # found from inside the ball

        def residual(log_tau: Tensor) -> tuple[Tensor, Tensor]:
            tau = log_tau.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
            log_ratio, _ = _capped_tilt(problem, tau, self.level)
            divergence = problem.mean(KL().generator(log_ratio))
            free = log_ratio < -math.log(self.level)
            mass = (problem.nominal * log_ratio.exp()).masked_fill(~free, 0.0)
            total = mass.sum(dim=-1)
            mean = (mass * problem.losses).sum(dim=-1) / total
            spread = (mass * (problem.losses - mean.unsqueeze(-1)).square()).sum(dim=-1)
            return (divergence / radius).log(), tau.square() * spread / divergence

        centred = problem.losses - problem.mean(problem.losses).unsqueeze(-1)
        unbounded = torch.full_like(radius, torch.inf)
        root = increasing_root(
            residual,
            start=(2 * radius / problem.mean(centred.square())).log() / 2,
            lower=-unbounded,
            upper=unbounded,
            tolerance=_TOLERANCE,
        )
        return self._at(problem, root.point.exp(), ~root.converged)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves on capped sets that grow to the right one."""
        return self._at(problem, 1 / penalty, torch.zeros_like(penalty, dtype=torch.bool))

    def _at(self, problem: Problem, tau: Tensor, exhausted: Tensor) -> SaddlePoint:
        log_ratio, log_normalizer = _capped_tilt(problem, tau, self.level)
        return SaddlePoint(
            log_ratio=log_ratio,
            multiplier=1 / tau,
            threshold=log_normalizer / tau,
            exhausted=exhausted,
        )


def _capped_greedy(problem: Problem, level: float) -> tuple[Tensor, Tensor]:
    """Returns ``log(q / p)`` of the largest losses at the cap, and their quantile."""
    tail = upper_tail(problem, torch.full_like(problem.losses[..., 0], level))
    at = torch.where(tail.at, tail.share.log().unsqueeze(-1), -torch.inf)
    return torch.where(tail.above, 0.0, at) - math.log(level), tail.quantile


def _capped_tilt(problem: Problem, tau: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Returns ``min(tau l - log Z, log(1 / level))`` and ``log Z`` that normalise the weights.

    With the mass ``P`` of capped atoms, ``Z = sum_free p_i exp(tau l_i) / (1 - P / level)``.
    Capping what exceeds the cap only raises the others, so the capped set grows until it is right.
    """
    cap = -math.log(level)
    capped = torch.zeros_like(problem.losses, dtype=torch.bool)
    while True:
        # Relative to the largest loss below the cap the exponents keep their digits for any tau.
        reference = problem.losses.masked_fill(capped, -1.0).amax(dim=-1, keepdim=True)
        relative = tau.unsqueeze(-1) * (problem.losses - reference)
        tilted = (problem.nominal * relative.exp()).masked_fill(capped, 0.0)
        rest = _mass_left(problem, capped, level)
        log_normalizer = tilted.sum(dim=-1, keepdim=True).log() - (rest / level).log()
        log_ratio = relative - log_normalizer
        over = (log_ratio > cap + _ROUNDING) & ~capped
        if not bool(over.any()):
            break
        capped |= over
    threshold = (log_normalizer + tau.unsqueeze(-1) * reference).squeeze(-1)
    return log_ratio.clamp_max(cap).masked_fill(capped, cap), threshold


def _mass_left(problem: Problem, capped: Tensor, level: float) -> Tensor:
    """Returns ``level - P`` for the capped mass ``P``, from P or 1 - P: what has the digits."""
    if level > 0.5:
        left = problem.nominal.masked_fill(capped, 0.0).sum(dim=-1, keepdim=True)
        return (left - (1 - level)).clamp_min(_NO_MASS)
    taken = problem.nominal.masked_fill(~capped, 0.0).sum(dim=-1, keepdim=True)
    return (level - taken).clamp_min(_NO_MASS)


def _check_level(level: float) -> None:
    if not 0 < level <= 1:
        raise ValueError(f"level must lie in (0, 1], got {level}; give the mass of the tail")
