r"""The Cressie-Read family, solved by one scalar root: KL, Burg, Hellinger, Neyman and between.

With the power ``k`` and ``kappa = k - 1`` the generator is ``(r^k - k r + k - 1) / (k (k - 1))``,
and every worst case is a deformed exponential of the losses,

.. math:: q_i / p_i = (1 + \kappa \tau l_i)_+^{1 / \kappa} / Z , \qquad
          \lambda = Z^\kappa / \tau , \qquad
          \eta = \lambda (1 - Z^{-\kappa}) / \kappa ,

with losses scaled so that the largest is 0 and ``Z = sum_i p_i (1 + kappa tau l_i)_+^{1/kappa}``;
``kappa = 0`` is the exponential. The divergence grows with ``tau``, the multiplier falls with it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from drgr.ambiguity.divergence import (
    Problem,
    SaddlePoint,
    divergence_of_top,
    restricted_to_top,
)
from drgr.ambiguity.power_path import Path, Point, path_of
from drgr.numerics import Root, increasing_root

# Below this |log r| (over the power) the generator is summed as a series: the direct form loses
# digits like eps / |log r|.
_SERIES_BELOW = 2e-3
_SERIES_TERMS = 5
# Below this radius (over the power) the cheap form of the divergence has too few digits left, like
# eps / (k rho).
_SMALL_RADIUS = 1e-4
_ROOT_TOLERANCE = 5e-13
_NOISE = 1e-300
_LOG_OF_ZERO = -745.0  # its exponential is the smallest number above 0
_DOMAIN_SLACK = 1e-9
_EDGE = 4e-16


class PowerDivergence(ABC):
    """A divergence ``scale`` times the Cressie-Read divergence of order ``power``."""

    has_level: ClassVar[bool] = True

    @property
    @abstractmethod
    def power(self) -> float:
        """The order ``k``."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor on the Cressie-Read divergence, above 0; also ``f''(1)``."""

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Returns ``f(exp(log_ratio))``: a series near 0, the formula elsewhere."""
        values = _direct(log_ratio, self.power)
        is_small = log_ratio.abs() < _SERIES_BELOW / max(1.0, abs(self.power))
        values[is_small] = _series(log_ratio[is_small], self.power)
        return values if self.scale == 1 else self.scale * values

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``((1 + kappa s)_+^{k / kappa} - 1) / k``; ``inf`` beyond its domain.

        An atom of hardly any mass may sit at the edge of the domain to rounding.
        """
        power, kappa, slope = self.power, self.power - 1, slope / self.scale
        if kappa == 0:
            return self.scale * torch.expm1(slope)
        base = 1 + kappa * slope
        is_active = base > (0 if kappa > 0 else _EDGE)
        inside = torch.where(is_active, slope, 0.0 if kappa > 0 else (_EDGE - 1) / kappa)
        log_ratio = torch.log1p(kappa * inside) / kappa
        values = log_ratio if power == 0 else torch.expm1(power * log_ratio) / power
        if kappa > 0:
            return self.scale * torch.where(is_active, values, -1 / power)
        return self.scale * values.masked_fill(base < -_DOMAIN_SLACK, torch.inf)

    def ratio(self, slope: Tensor) -> Tensor:
        """Returns ``(1 + kappa s)_+^{1 / kappa}``."""
        return _deformed_exponential(slope / self.scale, self.power - 1, 1.0)

    def ratio_slope(self, slope: Tensor) -> Tensor:
        """Returns ``(1 + kappa s)_+^{1 / kappa - 1}``."""
        kappa = self.power - 1
        return _deformed_exponential(slope / self.scale, kappa, 1 - kappa) / self.scale

    def limit(self, problem: Problem) -> Tensor:
        """Returns the nominal restricted to the largest loss."""
        return restricted_to_top(problem)

    def saturation_radius(self, problem: Problem) -> Tensor:
        """Returns the divergence of the nominal restricted to the largest loss."""
        return divergence_of_top(self.generator, problem)

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves ``log D(t) = log radius``: a line of slope 2 for small radii."""
        radius = radius / self.scale * (1 - _ROOT_TOLERANCE)  # found from inside the ball
        kappa = self.power - 1

        def cheap(point: Point) -> tuple[Tensor, Tensor]:
            moments = _moments(problem, kappa, point)
            divergence = _divergence(moments, self.power, point.tau)
            # What rounding left negative is too small: no slope there, so the search steps right.
            is_noise = ~(divergence > 0)
            divergence = divergence.masked_fill(is_noise, _NOISE)
            slope = (moments.slope / divergence).masked_fill(is_noise, torch.nan)
            return (divergence / radius).log(), slope

        def accurate(point: Point) -> tuple[Tensor, Tensor]:
            log_ratio, _ = _normalized(problem, point.exponents)
            divergence = problem.mean(self.generator(log_ratio)) / self.scale
            slope = _moments(problem, kappa, point).slope / divergence
            return (divergence / radius).log(), slope

        path = path_of(problem, kappa, cheap)
        start = path.at_tau((2 * radius / _variance(problem)).sqrt())
        # The cheap form divides by the power, if that is not 0.
        resolution = radius * (min(1.0, abs(self.power)) or 1.0)
        is_coarse = resolution < _SMALL_RADIUS
        tolerance = torch.where(is_coarse, 1e-15 / resolution, _ROOT_TOLERANCE)
        root = _root_along(path, cheap, start, tolerance)
        if bool(is_coarse.any()):
            root = _root_along(path, accurate, root.point, _ROOT_TOLERANCE)
        return self._saddle_point(problem, path.point(root.point), ~root.converged)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves ``log lam(t) = log penalty``; closed form where ``kappa = 0``."""
        kappa = self.power - 1
        log_penalty = (penalty * self.scale).log()

        def residual(point: Point) -> tuple[Tensor, Tensor]:
            moments = _moments(problem, kappa, point)
            log_multiplier = kappa * moments.log_normalizer - point.tau.log()
            return log_penalty - log_multiplier, point.tau_growth - kappa * moments.growth

        path = path_of(problem, kappa, residual)
        # Exact for kappa = 0; the normalizer changes it by a bounded factor.
        root = _root_along(path, residual, path.at_tau((-log_penalty).exp()), _ROOT_TOLERANCE)
        return self._saddle_point(problem, path.point(root.point), ~root.converged)

    def _saddle_point(self, problem: Problem, point: Point, exhausted: Tensor) -> SaddlePoint:
        kappa = self.power - 1
        log_ratio, log_normalizer = _normalized(problem, point.exponents)
        multiplier = (kappa * log_normalizer).exp() / point.tau
        depth = log_normalizer if kappa == 0 else -torch.expm1(-kappa * log_normalizer) / kappa
        return SaddlePoint(
            log_ratio=log_ratio,
            multiplier=multiplier / self.scale,
            threshold=multiplier * depth,
            exhausted=exhausted,
        )


class _Moments(NamedTuple):
    """Means under the worst case at one point of its path, each of shape ``(batch,)``."""

    log_normalizer: Tensor
    log_base: Tensor
    """Logarithm of the mean of ``1 + kappa tau l``."""
    loss: Tensor
    growth: Tensor
    """Mean of ``d log(q Z / p) / dt``."""
    slope: Tensor
    """Derivative of the Cressie-Read divergence in ``t``."""
    nominal_exponent: Tensor
    """Nominal mean of ``log(q Z / p)``."""


def _moments(problem: Problem, kappa: float, point: Point) -> _Moments:
    mass = problem.nominal * point.exponents.exp()
    total = mass.sum(dim=-1)
    mass_loss = mass * problem.losses
    loss = mass_loss.sum(dim=-1) / total
    log_normalizer = total.log()
    if kappa == 0:
        square = (mass_loss * problem.losses).sum(dim=-1) / total
        growth, covariance = point.tau * loss, point.tau * (square - loss.square())
    else:
        growth = (mass * point.growth).sum(dim=-1) / total
        covariance = (mass_loss * point.growth).sum(dim=-1) / total - growth * loss
    log_base = torch.log1p(kappa * point.tau * loss)
    if kappa > 0:
        # Near the cut the mean of the heights keeps the digits.
        base = (mass * point.base).sum(dim=-1) / total
        log_base = torch.where(base < 0.5, base.log(), log_base)
    return _Moments(
        log_normalizer=log_normalizer,
        log_base=log_base,
        loss=loss,
        growth=growth,
        slope=(-kappa * log_normalizer).exp() * point.tau * covariance,
        nominal_exponent=problem.mean(point.exponents) if kappa == -1 else log_normalizer,
    )


def _divergence(moments: _Moments, power: float, tau: Tensor) -> Tensor:
    """Returns the Cressie-Read divergence from means alone, to about ``eps / k``."""
    if power == 1:
        return tau * moments.loss - moments.log_normalizer
    if power == 0:
        return moments.log_normalizer - moments.nominal_exponent
    kappa = power - 1
    return torch.expm1(moments.log_base - kappa * moments.log_normalizer) / (power * kappa)


def _root_along(
    path: Path,
    residual: Callable[[Point], tuple[Tensor, Tensor]],
    start: Tensor,
    tolerance: float | Tensor,
) -> Root:
    return increasing_root(
        lambda t: residual(path.point(t)),
        start=start,
        lower=path.lower,
        upper=path.upper,
        tolerance=tolerance,
    )


def _normalized(problem: Problem, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``log(q / p)`` and ``log Z``, both with all their digits near 0."""
    total = problem.mean(exponents.exp())
    log_normalizer = total.log()
    if bool((total > 0.5).any()):
        near_one = torch.log1p(problem.mean(torch.expm1(exponents)))
        log_normalizer = torch.where(total > 0.5, near_one, log_normalizer)
    return exponents - log_normalizer.unsqueeze(-1), log_normalizer


def _deformed_exponential(slope: Tensor, kappa: float, order: float) -> Tensor:
    """Returns ``(1 + kappa s)_+^{order / kappa}``, differentiable also where it is cut off."""
    if kappa == 0:
        return (order * slope).exp()
    is_active = 1 + kappa * slope > 0
    logarithm = torch.log1p(kappa * torch.where(is_active, slope, 0.0)) / kappa
    return torch.where(is_active, (order * logarithm).exp(), 0.0)


def _series(log_ratio: Tensor, power: float) -> Tensor:
    """Returns ``sum_j (1 + k + ... + k^(j-2)) y^j / j!``, the generator near ``y = 0``."""
    total = torch.zeros_like(log_ratio)
    for order in range(_SERIES_TERMS + 1, 1, -1):
        coefficient = sum(power**exponent for exponent in range(order - 1))
        total = total * log_ratio + coefficient / math.factorial(order)
    return total * log_ratio.square()


def _direct(log_ratio: Tensor, power: float) -> Tensor:
    """Returns the generator from whichever of its two forms stays away from its pole."""
    tilt = torch.expm1(log_ratio)
    if power == 1:
        return log_ratio.clamp_min(_LOG_OF_ZERO) * log_ratio.exp() - tilt
    if power == 0:
        return tilt - log_ratio
    kappa = power - 1
    if power < 0.5:
        return (torch.expm1(power * log_ratio) / power - tilt) / kappa
    # (r^k - r) / kappa, with the factor outside that is finite at r = 0.
    if kappa < 0:
        difference = -(power * log_ratio).exp() * torch.expm1(-kappa * log_ratio) / kappa
    else:
        difference = log_ratio.exp() * torch.expm1(kappa * log_ratio) / kappa
    return (difference - tilt) / power


def _variance(problem: Problem) -> Tensor:
    centred = problem.losses - problem.mean(problem.losses).unsqueeze(-1)
    return problem.mean(centred.square())
