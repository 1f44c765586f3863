"""What can be proved of an inexact hypergradient, its merit and the steps taken with them.

Every function evaluates one statement of ``docs/theory.md``, whose number its docstring names, from
the constants of a problem and from what :class:`~drgr.bilevel.Hypergradient` reports. All of them
assume a strongly convex inner problem. A trained network has none: there the numbers hold near a
minimum of positive curvature only, with the constants of that neighbourhood.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple, final

from drgr._checks import check_not_negative, check_positive

# Of ProximalAlternating: the share of d^2 / alpha by which a kept step lowers the merit, and the
# share of that which the linear residual may hide.
SUFFICIENT_DECREASE = 0.1
HIDDEN_SHARE = 0.25


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Regularity:
    r"""Constants of a bilevel problem (assumptions of theory.md 1) on the region in question.

    They must hold on a convex set that contains the points at hand, the inner solutions of their
    outer parts, and what lies between.

    Args:
        curvature: ``mu > 0``: the inner loss ``g`` is ``mu``-strongly convex in ``y``.
        cross: ``B``, the largest spectral norm of ``J = d2g/dxdy``.
        outer_smoothness: ``L``, the Lipschitz constant of the gradient of ``F`` in ``(x, y)``.
        hessian_change: Lipschitz constant of ``H = d2g/dy2``; 0 for a quadratic ``g``.
        cross_change: Lipschitz constant of ``J``; 0 for a quadratic ``g``.

    Raises:
        ValueError: If a constant is out of range.

    Examples:
        >>> Regularity(curvature=0.5, cross=1.0, outer_smoothness=1.0).sensitivity
        2.0
    """

    curvature: float
    cross: float
    outer_smoothness: float
    hessian_change: float = 0.0
    cross_change: float = 0.0

    def __post_init__(self) -> None:
        check_positive("curvature", self.curvature)
        for field in fields(self):
            check_not_negative(field.name, getattr(self, field.name))

    @property
    def sensitivity(self) -> float:
        """``kappa = B / mu``, the Lipschitz constant of the inner solution ``y*(x)``."""
        return self.cross / self.curvature


def gradient_change(problem: Regularity, *, outer_gradient: float) -> float:
    r"""Returns how fast ``grad_x F - J H^-1 grad_y F`` changes with the point (theory.md 2.3).

    ``C = sqrt(1 + kappa^2) L + (|grad_y F| / mu) (rho_J + kappa rho_H)``, per unit of distance from
    the point at which ``grad_y F`` was taken.

    Args:
        problem: The constants.
        outer_gradient: ``|grad_y F|`` at that point.

    Examples:
        >>> linear = Regularity(curvature=2.0, cross=0.0, outer_smoothness=3.0)
        >>> gradient_change(linear, outer_gradient=1.0)
        3.0
    """
    check_not_negative("outer_gradient", outer_gradient)
    bend = problem.cross_change + problem.sensitivity * problem.hessian_change
    straight = math.hypot(1, problem.sensitivity) * problem.outer_smoothness
    return straight + outer_gradient / problem.curvature * bend


def hypergradient_smoothness(problem: Regularity, *, outer_gradient: float) -> float:
    """Returns a Lipschitz constant of the hypergradient, ``sqrt(1 + kappa^2) C`` (theory.md 2.4).

    Args:
        problem: The constants.
        outer_gradient: The largest ``|grad_y F(x, y*(x))|`` of the region; any number if the inner
            loss is quadratic.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=2.0, outer_smoothness=1.0)
        >>> round(hypergradient_smoothness(problem, outer_gradient=0.0), 12)
        5.0
    """
    change = gradient_change(problem, outer_gradient=outer_gradient)
    return math.hypot(1, problem.sensitivity) * change


def hypergradient_error(
    problem: Regularity,
    *,
    inner_gradient: float,
    residual_norm: float,
    outer_gradient: float,
    damping: float = 0.0,
) -> float:
    r"""Bounds the distance of a computed hypergradient from the true one (theory.md 3.2, 3.3).

    ``C |grad_y g| / mu + B (residual / (mu + delta) + delta |grad_y F| / (mu (mu + delta)))`` with
    ``C`` of :func:`gradient_change`: what the inner solution, the linear system and damping add.

    Args:
        problem: The constants.
        inner_gradient: ``Hypergradient.inner_gradient``.
        residual_norm: ``Hypergradient.residual_norm``.
        outer_gradient: ``Hypergradient.outer_gradient``.
        damping: ``delta >= 0`` of the solve.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=2.0, outer_smoothness=0.0)
        >>> hypergradient_error(
        ...     problem, inner_gradient=0.0, residual_norm=0.1, outer_gradient=1.0, damping=1.0
        ... )
        1.1
    """
    check_not_negative("inner_gradient", inner_gradient)
    check_not_negative("residual_norm", residual_norm)
    check_not_negative("damping", damping)
    damped = problem.curvature + damping
    of_inner = gradient_change(problem, outer_gradient=outer_gradient) * inner_gradient
    of_system = residual_norm / damped
    of_damping = damping * outer_gradient / (problem.curvature * damped)
    return of_inner / problem.curvature + problem.cross * (of_system + of_damping)


def stationarity_bound(
    *, mapping: float, step_size: float, smoothness: float, error: float
) -> float:
    r"""Bounds the distance from stationarity after a proximal step (theory.md 3.1).

    ``dist(0, grad Phi(x+) + dPsi(x+)) <= (1 + alpha L_Phi) |G| + error`` with ``x+ = prox(x - alpha
    h)`` and ``G = (x - x+) / alpha``.

    Args:
        mapping: ``|G|``, as in ``BilevelSolution.stationarity``.
        step_size: ``alpha > 0``.
        smoothness: ``L_Phi``, of :func:`hypergradient_smoothness`.
        error: ``|h - grad Phi(x)|``, of :func:`hypergradient_error`.

    Examples:
        >>> stationarity_bound(mapping=0.1, step_size=1.0, smoothness=2.0, error=0.0)
        0.30000000000000004
    """
    check_positive("step_size", step_size)
    for name, value in (("mapping", mapping), ("smoothness", smoothness), ("error", error)):
        check_not_negative(name, value)
    return (1 + step_size * smoothness) * mapping + error


def outer_loss_error(problem: Regularity, *, inner_gradient: float, outer_gradient: float) -> float:
    r"""Bounds ``|F(x, y) - F(x, y*(x))|``: of first order in ``|grad_y g|`` (theory.md 4.1).

    ``|grad_y F| e + L e^2 / 2`` with ``e = |grad_y g| / mu``.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=0.0, outer_smoothness=2.0)
        >>> round(outer_loss_error(problem, inner_gradient=0.1, outer_gradient=1.0), 12)
        0.11
    """
    check_not_negative("inner_gradient", inner_gradient)
    check_not_negative("outer_gradient", outer_gradient)
    distance = inner_gradient / problem.curvature
    return outer_gradient * distance + problem.outer_smoothness * distance**2 / 2


def corrected_loss_error(
    problem: Regularity,
    *,
    inner_gradient: float,
    residual_norm: float,
    auxiliary_norm: float,
    damping: float = 0.0,
) -> float:
    r"""Bounds ``|corrected_loss - F(x, y*(x))|``: of second order (theory.md 4.2).

    ``(residual + delta |z|) e + (L + rho_H |z|) e^2 / 2`` with ``e = |grad_y g| / mu``. Damping
    makes it first order again, with the factor ``delta |z|``.

    Args:
        problem: The constants.
        inner_gradient: ``Hypergradient.inner_gradient``.
        residual_norm: ``Hypergradient.residual_norm``.
        auxiliary_norm: ``|z|``, of ``Hypergradient.auxiliary``.
        damping: ``delta >= 0`` of the solve.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=0.0, outer_smoothness=2.0)
        >>> round(
        ...     corrected_loss_error(
        ...         problem, inner_gradient=0.1, residual_norm=0.01, auxiliary_norm=1.0
        ...     ),
        ...     12,
        ... )
        0.011
    """
    for name, value in (
        ("inner_gradient", inner_gradient),
        ("residual_norm", residual_norm),
        ("auxiliary_norm", auxiliary_norm),
        ("damping", damping),
    ):
        check_not_negative(name, value)
    distance = inner_gradient / problem.curvature
    bend = problem.outer_smoothness + problem.hessian_change * auxiliary_norm
    return (residual_norm + damping * auxiliary_norm) * distance + bend * distance**2 / 2


def least_merit_weight(problem: Regularity, *, auxiliary_norm: float = 0.0) -> float:
    r"""Returns the least ``merit_weight`` with which the merit bounds the value (theory.md 5.1).

    ``c_0 = (A + sqrt(A^2 + 4 mu^2)) / (2 mu^2)`` with ``A = L + rho_H |z|``; at most
    ``1 / mu + A / mu^2``. No smaller weight will do for all problems with these constants.

    Args:
        problem: The constants.
        auxiliary_norm: The largest ``|z|``; any number if the inner loss is quadratic.

    Examples:
        >>> least_merit_weight(Regularity(curvature=1.0, cross=1.0, outer_smoothness=0.0))
        1.0
    """
    check_not_negative("auxiliary_norm", auxiliary_norm)
    bend = problem.outer_smoothness + problem.hessian_change * auxiliary_norm
    return (bend + math.hypot(bend, 2 * problem.curvature)) / (2 * problem.curvature**2)


class Interval(NamedTuple):
    """Numbers between which another one lies.

    Examples:
        >>> Interval(0.0, 1.0).high
        1.0
    """

    low: float
    high: float


def merit_excess(
    problem: Regularity,
    *,
    weight: float,
    inner_gradient: float,
    residual_norm: float,
    auxiliary_norm: float,
    damping: float = 0.0,
) -> Interval:
    """Bounds the merit less the value ``F(x, y*(x)) + Omega(x)`` (theory.md 5.1).

    ``c (|grad_y g|^2 + residual^2) / 2``, less and plus :func:`corrected_loss_error`. The lower end
    is at least 0 for ``weight`` of at least :func:`least_merit_weight` and no damping.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=1.0, outer_smoothness=0.0)
        >>> merit_excess(
        ...     problem, weight=2.0, inner_gradient=0.5, residual_norm=0.5, auxiliary_norm=1.0
        ... )
        Interval(low=0.25, high=0.75)
    """
    check_positive("weight", weight)
    error = corrected_loss_error(
        problem,
        inner_gradient=inner_gradient,
        residual_norm=residual_norm,
        auxiliary_norm=auxiliary_norm,
        damping=damping,
    )
    gaps = weight / 2 * (inner_gradient**2 + residual_norm**2)
    return Interval(gaps - error, gaps + error)


def damped_merit_floor(
    problem: Regularity, *, weight: float, auxiliary_norm: float, damping: float
) -> float:
    r"""Returns by how much the merit of a damped solve may fall below the value (theory.md 5.2).

    ``delta^2 |z|^2 / (2 (c mu^2 - A - 1 / c))`` with ``A`` of :func:`least_merit_weight`.

    Raises:
        ValueError: If ``weight`` is not above ``c_0`` of :func:`least_merit_weight`.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=1.0, outer_smoothness=0.0)
        >>> found = damped_merit_floor(problem, weight=2.0, auxiliary_norm=3.0, damping=0.1)
        >>> round(found, 12)
        0.03
    """
    check_not_negative("damping", damping)
    least = _least_weight(problem, weight, auxiliary_norm)
    bend = problem.outer_smoothness + problem.hessian_change * auxiliary_norm
    spare = weight * problem.curvature**2 - bend - 1 / weight
    if weight == least or spare <= 0:
        raise ValueError(f"weight must be above {least:.6g}, got {weight}; raise merit_weight")
    return (damping * auxiliary_norm) ** 2 / (2 * spare)


def accuracy_factor(problem: Regularity, *, weight: float, auxiliary_norm: float = 0.0) -> float:
    r"""Returns a factor on both residuals below which the merit does not rise (theory.md 5.3).

    ``sqrt((c - c_0) / (c + c_0))``: if ``|grad_y g|`` and the residual both shrink at least by it
    at fixed ``x``, the merit falls or stays.

    Raises:
        ValueError: If ``weight`` is below ``c_0`` of :func:`least_merit_weight`.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=1.0, outer_smoothness=0.0)
        >>> round(accuracy_factor(problem, weight=2.0), 4)
        0.5774
    """
    least = _least_weight(problem, weight, auxiliary_norm)
    return math.sqrt((weight - least) / (weight + least))


def _least_weight(problem: Regularity, weight: float, auxiliary_norm: float) -> float:
    """Returns ``c_0`` after checking that a weight is at least as large."""
    check_positive("weight", weight)
    least = least_merit_weight(problem, auxiliary_norm=auxiliary_norm)
    if weight < least:
        raise ValueError(
            f"weight must be at least {least:.6g} for these constants, got {weight}; "
            "raise merit_weight"
        )
    return least
