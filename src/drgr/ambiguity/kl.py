"""The Kullback-Leibler divergence."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Problem, SaddlePoint, exact_saddle_point
from drgr.numerics import increasing_root

# Below this |u| the generator is summed as a series: the direct form loses digits like eps / u.
_SERIES_BELOW = 1e-3


@final
@dataclass(frozen=True, slots=True)
class KL:
    r"""Kullback-Leibler divergence ``KL(q||p) = sum_i q_i log(q_i / p_i)``, in nats.

    Generator ``f(r) = r log r - r + 1``, conjugate ``f*(s) = e^s - 1``, ``f''(1) = 1``. Weights are
    ``q_i = p_i exp((l_i - eta) / lam)``. The radius saturates at ``-log P``, where ``P`` is the
    nominal mass of the largest loss.

    - Penalised: closed form, ``eta = lam log sum_i p_i exp(l_i / lam)``, which is also the value.
    - Constrained: one scalar root in ``tau = 1 / lam``; the divergence is evaluated without
      cancellation, so that tiny radii keep their digits.

    One step of the exponentiated gradient from weights ``p`` with rate ``a`` is the penalised worst
    case with nominal ``p`` and penalty ``1 / a``.

    Complexity:
        O(n) per function evaluation; 1 evaluation penalised, about 6 constrained.
    """

    has_level: ClassVar[bool] = True

    def generator(self, tilt: Tensor) -> Tensor:
        """Returns ``(1 + u) log(1 + u) - u``."""
        series = tilt.square() * _generator_series(tilt)
        direct = torch.special.xlog1py(1 + tilt, tilt) - tilt
        return torch.where(tilt.abs() < _SERIES_BELOW, series, direct)

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``e^s - 1``."""
        return torch.expm1(slope)

    def saturation_radius(self, odds: Tensor) -> Tensor:
        """Returns ``-log P``."""
        return torch.log1p(odds)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves by the log-sum-exp formula."""
        tilt, log_normalizer = _tilt(problem, 1 / penalty)
        return exact_saddle_point(tilt=tilt, multiplier=penalty, threshold=penalty * log_normalizer)

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves ``KL(q_tau||p) = radius`` for ``log tau``.

        The logarithm of the divergence against ``log tau`` is a line of slope 2 for small ``tau``,
        so Newton's method is at home however small the radius is.
        """

        def log_ratio(log_tau: Tensor) -> tuple[Tensor, Tensor]:
            tau = log_tau.exp()
            tilt, _ = _tilt(problem, tau)
            divergence = problem.mean(self.generator(tilt))
            tilted = Problem(losses=problem.losses, nominal=problem.nominal * (1 + tilt))
            slope = tau.square() * _variance(tilted) / divergence
            return (divergence / radius).log(), slope

        # Scaled losses have a variance of at most 1/4 under any tilt, so KL <= tau^2 / 8. With all
        # atoms below the top underflown the divergence is at its largest.
        second = problem.losses.masked_fill(problem.losses == 0, -torch.inf).amax(dim=-1)
        log_tau, converged, _ = increasing_root(
            log_ratio,
            start=(2 * radius / _variance(problem)).log() / 2,
            lower=(8 * radius).log() / 2,
            upper=(-750 / second).log(),
            tolerance=1e-12,
        )
        tilt, log_normalizer = _tilt(problem, log_tau.exp())
        multiplier = (-log_tau).exp()
        return SaddlePoint(
            tilt=tilt,
            multiplier=multiplier,
            threshold=multiplier * log_normalizer,
            exhausted=~converged,
        )


def _tilt(problem: Problem, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``exp(tau l - log Z) - 1`` and ``log Z`` with ``Z = sum_i p_i exp(tau l_i)``."""
    exponents = tau.unsqueeze(-1) * problem.losses
    excess = problem.mean(torch.expm1(exponents))
    # log1p keeps the digits of log Z while Z is near 1, the plain sum those of a small Z.
    log_normalizer = torch.where(
        excess > -0.5, torch.log1p(excess), problem.mean(exponents.exp()).log()
    )
    return torch.expm1(exponents - log_normalizer.unsqueeze(-1)), log_normalizer


def _variance(problem: Problem) -> Tensor:
    centred = problem.losses - problem.mean(problem.losses).unsqueeze(-1)
    return problem.mean(centred.square())


def _generator_series(tilt: Tensor) -> Tensor:
    """Returns ``1/2 - u/6 + u^2/12 - u^3/20 + u^4/30``, the start of ``f(1 + u) / u^2``."""
    total = torch.full_like(tilt, 1 / 30)
    for divisor in (-20, 12, -6, 2):
        total = total * tilt + 1 / divisor
    return total
