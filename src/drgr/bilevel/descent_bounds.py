"""What can be proved of the steps of proximal alternating minimisation (theory.md 5).

The statements are about ``ProximalAlternating`` without damping, on a problem whose constants are
known; ``bounds`` has those about a single point.
"""

import math

from drgr._checks import check_not_negative, check_positive
from drgr.bilevel.bounds import (
    HIDDEN_SHARE,
    SUFFICIENT_DECREASE,
    Regularity,
    gradient_change,
    hypergradient_smoothness,
    least_merit_weight,
)

# theory.md 5.5 needs the inner steps to shrink the gradient by this factor at least.
MOST_CONTRACTION = 12**-0.5


def inner_contraction(
    *, curvature: float, largest_curvature: float, rate: float, num_steps: int
) -> float:
    """Returns by what gradient descent shrinks the inner gradient (theory.md 5.4).

    ``max(|1 - eta mu|, |1 - eta L_g|)^K``, for a learning rate ``eta`` and ``K`` steps.

    Args:
        curvature: ``mu > 0``, the least eigenvalue of the Hessian.
        largest_curvature: ``L_g``, the largest one.
        rate: ``eta > 0``.
        num_steps: ``K >= 1``.

    Examples:
        >>> inner_contraction(curvature=0.5, largest_curvature=1.0, rate=1.0, num_steps=2)
        0.25
    """
    for name, value in (("curvature", curvature), ("rate", rate), ("num_steps", num_steps)):
        check_positive(name, value)
    if largest_curvature < curvature:
        raise ValueError(
            f"largest_curvature must be at least curvature {curvature}, got {largest_curvature}"
        )
    slowest = max(abs(1 - rate * curvature), abs(1 - rate * largest_curvature))
    return float(slowest**num_steps)


def sufficient_step_size(
    problem: Regularity,
    *,
    weight: float,
    contraction: float,
    outer_gradient: float = 0.0,
    auxiliary_norm: float = 0.0,
) -> float:
    r"""Returns a step size below which every step is kept (theory.md 5.5).

    ``0.8625 / (L_Phi / 2 + 2 E^2 / c + 3/2 c q^2 B^2)`` with ``E^2 = (C / mu)^2 + kappa^2``. So the
    search of ``ProximalAlternating`` never goes below half of it.

    Args:
        problem: The constants.
        weight: ``c``, the ``merit_weight``: at least twice :func:`least_merit_weight`.
        contraction: ``q``, of :func:`inner_contraction`: at most ``12^-1/2``.
        outer_gradient: The largest ``|grad_y F|`` of the region; any number if the inner loss is
            quadratic, as for the next.
        auxiliary_norm: The largest ``|z|`` of the region.

    Raises:
        ValueError: If ``weight`` is too small or ``contraction`` too large.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=0.0, outer_smoothness=1.0)
        >>> round(sufficient_step_size(problem, weight=1e9, contraction=0.0), 6)
        1.725
    """
    check_positive("weight", weight)
    check_not_negative("contraction", contraction)
    least = 2 * least_merit_weight(problem, auxiliary_norm=auxiliary_norm)
    if weight < least:
        raise ValueError(
            f"weight must be at least {least:.6g} for these constants, got {weight}; "
            "raise merit_weight"
        )
    if contraction > MOST_CONTRACTION:
        raise ValueError(
            f"contraction must be at most 12^-1/2 = {MOST_CONTRACTION:.4f}, got {contraction}; "
            "take more inner steps"
        )
    smoothness = hypergradient_smoothness(problem, outer_gradient=outer_gradient)
    lost = (
        smoothness / 2
        + 2 * _error_rate(problem, outer_gradient) ** 2 / weight
        + 1.5 * weight * (contraction * problem.cross) ** 2
    )
    if lost == 0:
        return math.inf
    hidden = 1.5 * HIDDEN_SHARE * SUFFICIENT_DECREASE
    return (1 - SUFFICIENT_DECREASE - hidden) / lost


def proximal_descent(
    *, mapping: float, step_size: float, smoothness: float, relative_error: float
) -> float:
    r"""Returns by how much a proximal step lowers ``Phi + Omega`` at least (theory.md 5.7).

    ``alpha (1 - theta - alpha L_Phi / 2) |G|^2`` if the error of the hypergradient is at most
    ``theta |G|``; negative where that proves nothing.

    Args:
        mapping: ``|G| = |x - x+| / alpha``.
        step_size: ``alpha > 0``.
        smoothness: ``L_Phi``, of :func:`~drgr.bilevel.bounds.hypergradient_smoothness`.
        relative_error: ``theta``.

    Examples:
        >>> proximal_descent(mapping=2.0, step_size=0.5, smoothness=1.0, relative_error=0.25)
        1.0
    """
    check_positive("step_size", step_size)
    check_not_negative("mapping", mapping)
    check_not_negative("smoothness", smoothness)
    check_not_negative("relative_error", relative_error)
    return step_size * (1 - relative_error - step_size * smoothness / 2) * mapping**2


def least_mapping(*, merit_fall: float, step_size: float, num_steps: int) -> float:
    """Bounds the smallest ``|x - x+| / alpha`` of a run (theory.md 5.6).

    ``sqrt(merit_fall / (sigma alpha N))``.

    Args:
        merit_fall: First merit less a lower bound of ``Phi + Omega``, plus all rises of the merit
            at changes of accuracy (``BilevelSolution.merits`` shows them).
        step_size: The smallest ``alpha`` of a kept step; ``sufficient_step_size / 2``, or the first
            ``alpha`` if that is smaller, will do.
        num_steps: ``N``, kept steps.

    Examples:
        >>> round(least_mapping(merit_fall=1.0, step_size=0.1, num_steps=1000), 6)
        0.316228
    """
    check_not_negative("merit_fall", merit_fall)
    check_positive("step_size", step_size)
    check_positive("num_steps", num_steps)
    return math.sqrt(merit_fall / (SUFFICIENT_DECREASE * step_size * num_steps))


def least_stationarity(
    problem: Regularity,
    *,
    weight: float,
    merit_fall: float,
    step_sizes: tuple[float, float],
    num_steps: int,
    first_gaps: tuple[float, float],
    outer_gradient: float = 0.0,
) -> float:
    r"""Bounds the smallest ``dist(0, grad Phi + dPsi)`` of a run's points (theory.md 5.6).

    It falls as ``N^-1/2``.

    Args:
        problem: The constants.
        weight: ``c``, the ``merit_weight``.
        merit_fall: As for :func:`least_mapping`.
        step_sizes: The smallest and the largest ``alpha`` of a kept step.
        num_steps: ``N``, kept steps.
        first_gaps: ``|grad_y g|`` and the residual at the start.
        outer_gradient: The largest ``|grad_y F|``; any number if the inner loss is quadratic.

    Examples:
        >>> problem = Regularity(curvature=1.0, cross=0.0, outer_smoothness=1.0)
        >>> arguments = {"weight": 4.0, "merit_fall": 1.0, "step_sizes": (1.0, 1.0)}
        >>> bounds = [
        ...     least_stationarity(problem, num_steps=n, first_gaps=(0.0, 0.0), **arguments)
        ...     for n in (100, 400)
        ... ]
        >>> bounds[0] / bounds[1]
        2.0
    """
    check_positive("weight", weight)
    mapping = least_mapping(merit_fall=merit_fall, step_size=step_sizes[0], num_steps=num_steps)
    check_positive("step_sizes", step_sizes[1])
    smoothness = hypergradient_smoothness(problem, outer_gradient=outer_gradient)
    of_steps = 2 * ((1 + step_sizes[1] * smoothness) * mapping) ** 2
    moved = merit_fall / SUFFICIENT_DECREASE
    of_residuals = 2 * HIDDEN_SHARE * SUFFICIENT_DECREASE / weight
    gaps = (
        1.2 * first_gaps[0] ** 2
        + first_gaps[1] ** 2
        + moved * (problem.cross**2 * step_sizes[1] / 5 + of_residuals)
    )
    of_errors = 2 * _error_rate(problem, outer_gradient) ** 2 * gaps / num_steps
    return math.sqrt(of_steps + of_errors)


def _error_rate(problem: Regularity, outer_gradient: float) -> float:
    """Returns ``E``: the hypergradient's error per unit of both residuals together."""
    change = gradient_change(problem, outer_gradient=outer_gradient)
    return math.hypot(change / problem.curvature, problem.sensitivity)
