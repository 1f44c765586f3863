r"""The Jensen-Shannon divergence, solved by two nested scalar roots.

With ``t = 2 / lam``, ``a_i = 1 - exp(t l_i)`` for losses whose largest is 0, and ``R >= 1`` the
ratio of the largest loss, ``q_i / p_i = R (1 - a_i) / (1 + R a_i)``. The inner root normalises
``q`` over ``R``, the outer one meets the radius over ``log(1 / lam)``.
"""

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
from drgr.numerics import increasing_root

_MAX_STEPS = 100
_TOLERANCE = 5e-13
# Newton's step squared is the error after it.
_STEP_TOLERANCE = 1e-8
_SMALL_RADIUS = 1e-4
_LARGEST_LOG = 700.0
_LOG_OF_ZERO = -745.0  # its exponential is the smallest number above 0


@final
@dataclass(frozen=True, slots=True)
class JensenShannon:
    r"""Jensen-Shannon divergence ``KL(q||m) / 2 + KL(p||m) / 2`` with ``m = (p + q) / 2``, in nats.

    Generator ``f(r) = (r log r - (1 + r) log((1 + r) / 2)) / 2``, conjugate
    ``f*(s) = -log(2 - e^{2 s}) / 2`` for ``s < log(2) / 2``, ``f''(1) = 1/4``. Weights are
    ``q_i = p_i g_i / (2 - g_i)`` with ``g_i = exp(2 (l_i - eta) / lam)``. The radius lies in
    ``[0, log 2]`` and saturates at ``log 2 + (P log P - (1 + P) log(1 + P)) / 2``, where ``P`` is
    the nominal mass of the largest loss.

    Conversions: in bits it is this over ``log 2``; the distance is its square root; the Jeffreys or
    "symmetrised" divergence is another one. To compare with divergences of ``f''(1) = 1``, multiply
    their radius by 1/4. The slope of ``f`` at infinity is finite: use it over domains or other
    fixed atoms, not over samples.

    Complexity:
        O(n) per function evaluation, about 6 outer ones and 3 cheap inner ones in each.

    References:
        Lin, *Divergence Measures Based on the Shannon Entropy*, IEEE Trans. Inf. Theory 1991.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> losses = torch.tensor([1.0, 2.0, 4.0])
        >>> worst_case(losses, divergence=JensenShannon(), radius=0.05).weights
        tensor([0.1450, 0.2152, 0.6398])
    """

    has_level: ClassVar[bool] = True

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Returns ``e^{y/2} (y/2 sinh(y/2) - cosh(y/2) log cosh(y/2))``; direct far from 0."""
        half = log_ratio.clamp(-1.0, 1.0) / 2
        log_cosh = torch.log1p(2 * (half / 2).sinh().square())
        near = half.exp() * (half * half.sinh() - half.cosh() * log_cosh)
        ratio = log_ratio.exp()
        entropy = ratio * log_ratio.clamp_min(_LOG_OF_ZERO)
        far = (entropy - (1 + ratio) * ((1 + ratio) / 2).log()) / 2
        return torch.where(log_ratio.abs() <= 1, near, far)

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``-log(2 - e^{2 s}) / 2``; ``inf`` beyond its domain.

        An atom of hardly any mass may sit at the edge of the domain to rounding.
        """
        tilt = torch.expm1(2 * slope)
        inside = -torch.log1p(-tilt.clamp_max(1 - 1e-16)) / 2
        return inside.masked_fill(tilt > 1 + 1e-9, torch.inf)

    def ratio(self, slope: Tensor) -> Tensor:
        """Returns ``e^{2 s} / (2 - e^{2 s})``."""
        return (2 * slope).exp() / (1 - torch.expm1(2 * slope))

    def ratio_slope(self, slope: Tensor) -> Tensor:
        """Returns ``2 r (1 + r)``."""
        ratio = self.ratio(slope)
        return 2 * ratio * (1 + ratio)

    def limit(self, problem: Problem) -> Tensor:
        """Returns the nominal restricted to the largest loss."""
        return restricted_to_top(problem)

    def saturation_radius(self, problem: Problem) -> Tensor:
        """Returns the divergence of the nominal restricted to the largest loss."""
        return divergence_of_top(self.generator, problem)

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves ``log D = log radius`` over ``log(1 / lam)``."""
        radius = radius * (1 - _TOLERANCE)  # found from inside the ball
        excess = torch.zeros_like(radius)
        is_small = bool((radius < _SMALL_RADIUS).any())

        def residual(log_tau: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal excess  # each normalisation starts from the one before
            tau = log_tau.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
            tilt = _normalized_tilt(problem, tau, excess)
            excess = tilt.excess
            divergence, slope = _divergence(problem, tilt)
            if is_small:
                divergence = problem.mean(self.generator(tilt.log_ratio()))
            return (divergence / radius).log(), slope / divergence

        variance = problem.mean(problem.losses.square()) - problem.mean(problem.losses).square()
        unbounded = torch.full_like(radius, torch.inf)
        root = increasing_root(
            residual,
            start=(radius / (2 * variance.clamp_min(1e-300))).log() / 2,
            lower=-unbounded,
            upper=unbounded,
            tolerance=_TOLERANCE,
        )
        tilt = _normalized_tilt(problem, root.point.exp(), excess)
        return _saddle_point(tilt, ~root.converged | tilt.exhausted)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves by the inner root alone."""
        tilt = _normalized_tilt(problem, 1 / penalty, torch.zeros_like(penalty))
        return _saddle_point(tilt, tilt.exhausted)


class _Tilt(NamedTuple):
    """Normalised weights at one multiplier."""

    tau: Tensor
    exponents: Tensor
    """``2 tau l``, shape ``(batch, n)``."""
    decay: Tensor
    """``a = 1 - exp(2 tau l)``, shape ``(batch, n)``."""
    inverse: Tensor
    """``v = 1 / (1 + R a)``, shape ``(batch, n)``; then ``1 + r = (1 + R) v``."""
    excess: Tensor
    """``R - 1 >= 0``, shape ``(batch,)``."""
    exhausted: Tensor

    def log_ratio(self) -> Tensor:
        """Returns ``log(q / p) = log R + t l - log(1 + R a)``."""
        excess = self.excess.unsqueeze(-1)
        return torch.log1p(excess) + self.exponents - torch.log1p((1 + excess) * self.decay)


def _normalized_tilt(problem: Problem, tau: Tensor, excess: Tensor) -> _Tilt:
    """Finds ``R`` with ``S(R) = sum_i p_i r_i = 1`` by Newton's method.

    ``S`` is concave, so from the left a step never passes the root. From the right it may fall far
    behind; there the step is taken in logarithms of both, which ends up left at worst.
    """
    exponents = (2 * tau).unsqueeze(-1) * problem.losses
    decay = torch.expm1(exponents).neg_()
    kept = 1 - decay
    for _ in range(_MAX_STEPS):
        # In place: memory for temporaries costs more than the arithmetic.
        ratio = 1 + excess
        spread = ratio.unsqueeze(-1) * decay
        inverse = (1 + spread).reciprocal_()
        mass = problem.nominal * inverse
        surplus = spread.mul_(-2).add_(excess.unsqueeze(-1)).mul_(mass).sum(dim=-1)
        slope = inverse.mul_(mass).mul_(kept).sum(dim=-1)
        shrunk = torch.expm1(-torch.log1p(surplus) * (1 + surplus) / (slope * ratio))
        step = torch.where(surplus > 0, ratio * shrunk, -surplus / slope)
        excess = (excess + step).clamp_min(0.0)
        converged = step.abs() <= _STEP_TOLERANCE * excess
        if bool((converged | (step.abs() <= 4e-16)).all()):
            break
    inverse = (1 + (1 + excess).unsqueeze(-1) * decay).reciprocal_()
    return _Tilt(tau, exponents, decay, inverse, excess, ~converged & (step.abs() > 1e-12))


def _divergence(problem: Problem, tilt: _Tilt) -> tuple[Tensor, Tensor]:
    """Returns ``D = (log R + t E_q l - E_p log v) / 2 - log((1 + R) / 2)`` and ``dD / d log tau``.

    The latter is ``tau^2 W Var_w(l)`` with ``w = 2 p r (1 + r)``.
    """
    mass = problem.nominal * tilt.inverse
    mass.mul_((2 + tilt.excess).unsqueeze(-1))  # p (1 + r)
    total = mass.sum(dim=-1)
    mass_loss = mass * problem.losses
    loss = mass_loss.sum(dim=-1)
    # Moments of p (1 + r)^2; less those of p (1 + r) they are those of p r (1 + r).
    mass.mul_(tilt.inverse).mul_((2 + tilt.excess).unsqueeze(-1))
    total = mass.sum(dim=-1) - total
    square = -(mass_loss * problem.losses).sum(dim=-1)
    mass.mul_(problem.losses)
    first = mass.sum(dim=-1) - loss
    square = square + mass.mul_(problem.losses).sum(dim=-1)
    log_spread = -problem.mean(tilt.inverse.log())
    mean_exponent = 2 * tilt.tau * (loss - problem.mean(problem.losses))
    centre = torch.log1p(tilt.excess / 2)
    divergence = (torch.log1p(tilt.excess) + mean_exponent + log_spread) / 2 - centre
    return divergence, 2 * tilt.tau.square() * (square - first.square() / total)


def _saddle_point(tilt: _Tilt, exhausted: Tensor) -> SaddlePoint:
    point = exact_saddle_point(
        log_ratio=tilt.log_ratio(),
        multiplier=1 / tilt.tau,
        threshold=-torch.log1p(tilt.excess / (2 + tilt.excess)) / (2 * tilt.tau),
    )
    return SaddlePoint(
        log_ratio=point.log_ratio,
        multiplier=point.multiplier,
        threshold=point.threshold,
        exhausted=exhausted,
    )
