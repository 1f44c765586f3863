r"""Derivatives of the weights, by the implicit function theorem at the saddle point.

The multiplier and the threshold solve

.. math:: \sum_i p_i (r(s_i) - 1) = 0, \qquad \sum_i p_i (s_i r(s_i) - f^*(s_i)) = \rho, \qquad
          s_i = (l_i - \eta) / \lambda ,

the second for a radius only. From the solution, Newton steps are taken whose residual is zero in
value but not in derivative: they move nothing and carry the derivatives. Two steps carry those of
order three exactly, since the error of a Newton step is that of the point before, squared.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drgr.ambiguity.certificate import CertifiedSaddlePoint
from drgr.ambiguity.divergence import Problem, SmoothDivergence
from drgr.ambiguity.scaling import Level

_NEWTON_STEPS = 2


class Attached(NamedTuple):
    """The solved objective and weights, with derivatives in losses, nominal and level."""

    objective: Tensor
    """In scaled units, shape ``(batch,)``."""
    weights: Tensor
    """Probabilities, shape ``(batch, n)``."""


def attached(
    divergence: SmoothDivergence, problem: Problem, level: Level, found: CertifiedSaddlePoint
) -> Attached:
    """Gives a certified saddle point its derivatives, to third order.

    Args:
        divergence: The divergence that was solved.
        problem: The scaled problem, with the graph of losses and nominal.
        level: The scaled level, with its graph.
        found: The solution, detached.

    Returns:
        Values equal to those of ``found``, as functions of losses, nominal and level.
    """
    weights = _at_the_edge(divergence, problem, found)
    objective = (weights * problem.losses).sum(dim=-1)
    if level.kind == "radius":
        # The value rises like a square root from radius 0: its slope there is infinite.
        objective = objective + torch.where(level.value == 0, level.value.clamp_min(0).sqrt(), 0.0)
    inside = (found.multiplier > 0) & found.multiplier.isfinite()
    rows = inside.nonzero().squeeze(-1)
    if rows.numel() > 0:
        solved = _inside(
            divergence,
            problem.rows(rows),
            Level(kind=level.kind, value=level.value[rows]),
            found.multiplier[rows],
            found.threshold[rows],
        )
        objective = objective.index_copy(0, rows, solved.objective)
        weights = weights.index_copy(0, rows, solved.weights)
    return Attached(
        objective=_with_value(objective, found.objective),
        weights=_with_value(weights, found.weights),
    )


def _at_the_edge(
    divergence: SmoothDivergence, problem: Problem, found: CertifiedSaddlePoint
) -> Tensor:
    """Returns the weights at saturation (multiplier 0), and the nominal elsewhere."""
    saturated = (found.multiplier == 0).unsqueeze(-1)
    log_ratio = torch.where(saturated, divergence.limit(problem), 0.0)
    # Constant in the losses, but never without a graph.
    return problem.nominal * log_ratio.exp() + 0 * problem.losses


def _inside(
    divergence: SmoothDivergence,
    problem: Problem,
    level: Level,
    multiplier: Tensor,
    threshold: Tensor,
) -> Attached:
    if level.kind == "penalty":
        multiplier = level.value
    for _ in range(_NEWTON_STEPS):
        slope = _slope(problem, multiplier, threshold)
        ratio, bend = divergence.ratio(slope), divergence.ratio_slope(slope)
        mass = _unvalued(problem.mean(ratio - 1))
        curvature = problem.mean(bend)
        if level.kind == "penalty":
            threshold = threshold + multiplier * mass / curvature
            continue
        size = _unvalued(problem.mean(slope * ratio - divergence.conjugate(slope)) - level.value)
        centre = problem.mean(bend * slope) / curvature
        spread = problem.mean(bend * (slope - centre.unsqueeze(-1)).square())
        log_step = torch.where(spread > 0, (size - centre * mass) / spread, 0.0)
        threshold = threshold + multiplier * (mass / curvature - centre * log_step)
        multiplier = multiplier + multiplier * log_step
    slope = _slope(problem, multiplier, threshold)
    objective = threshold + multiplier * problem.mean(divergence.conjugate(slope))
    if level.kind == "radius":
        objective = objective + multiplier * level.value
    return Attached(objective, problem.nominal * divergence.ratio(slope))


def _slope(problem: Problem, multiplier: Tensor, threshold: Tensor) -> Tensor:
    return (problem.losses - threshold.unsqueeze(-1)) / multiplier.unsqueeze(-1)


def _unvalued(residual: Tensor) -> Tensor:
    """Returns 0 with the derivatives of ``residual``."""
    return residual - residual.detach()


def _with_value(function: Tensor, value: Tensor) -> Tensor:
    """Returns ``value`` with the derivatives of ``function``."""
    return function + (value - function).detach()
