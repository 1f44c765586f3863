"""Saddle points in scaled units: the edge cases, and an error bound that needs no other solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Divergence, Problem, SaddlePoint, exact_saddle_point
from drgr.ambiguity.inputs import Level
from drgr.numerics import Status

# Largest duality gap, relative to the range of the losses, of a result that counts as converged.
_GAP_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedSaddlePoint:
    """A feasible primal and a dual point with the gap between their objectives, in scaled units."""

    weights: Tensor
    """Feasible probabilities, shape ``(batch, n)``."""
    objective: Tensor
    """Primal objective at the weights, shape ``(batch,)``."""
    multiplier: Tensor
    threshold: Tensor
    divergence: Tensor
    """``D(q||p)`` of the weights, shape ``(batch,)``."""
    gap: Tensor
    """Dual minus primal objective, shape ``(batch,)``."""
    nominal_slope: Tensor
    """Derivative of the value in the unnormalised nominal, shape ``(batch, n)``."""
    status: Status


def certified_saddle_point(
    divergence: Divergence, problem: Problem, level: Level
) -> CertifiedSaddlePoint:
    r"""Solves a batch of scaled problems and certifies the result in O(n).

    The dual objective is ``eta + lam sum_i p_i f*((l_i - eta) / lam)``, plus ``lam rho`` for a
    radius. It bounds the value from above at *any* ``lam`` and ``eta``, and the primal objective
    bounds it from below at any feasible weights; so the gap bounds the error whatever the solver
    did.
    """
    if level.kind == "radius":
        saddle = _constrained(divergence, problem, level.value)
        tilt = _shrunk_into_ball(
            divergence, problem, _normalized(problem, saddle.tilt), level.value
        )
        cost_of_size = _product_or_zero(saddle.multiplier, level.value)
    else:
        saddle = divergence.penalized(problem, level.value)
        tilt = _normalized(problem, saddle.tilt)
        cost_of_size = torch.zeros_like(level.value)
    spent = problem.mean(divergence.generator(tilt))
    objective = problem.mean((1 + tilt) * problem.losses)
    if level.kind == "penalty":
        objective = objective - level.value * spent
    slope = _scaled_conjugate(divergence, problem, saddle)
    gap = (saddle.threshold + cost_of_size + problem.mean(slope) - objective).abs()
    return CertifiedSaddlePoint(
        weights=problem.nominal * (1 + tilt),
        objective=objective,
        multiplier=saddle.multiplier,
        threshold=saddle.threshold,
        divergence=spent,
        gap=gap,
        nominal_slope=slope.masked_fill(problem.nominal == 0, 0.0),
        status=_status(gap, saddle.exhausted),
    )


def _constrained(divergence: Divergence, problem: Problem, radius: Tensor) -> SaddlePoint:
    """Answers saturated and zero radii in closed form and leaves the others to the divergence."""
    odds = problem.odds_against_top()
    saturated = radius >= divergence.saturation_radius(odds)
    interior = ~saturated & (radius > 0)
    if bool(interior.all()):
        return divergence.constrained(problem, radius)
    edge = _edge(problem, odds, saturated)
    if not bool(interior.any()):
        return edge
    rows = interior.nonzero().squeeze(-1)
    solved = divergence.constrained(problem.rows(rows), radius[rows])
    return SaddlePoint(
        tilt=edge.tilt.index_copy(0, rows, solved.tilt),
        multiplier=edge.multiplier.index_copy(0, rows, solved.multiplier),
        threshold=edge.threshold.index_copy(0, rows, solved.threshold),
        exhausted=edge.exhausted.index_copy(0, rows, solved.exhausted),
    )


def _edge(problem: Problem, odds: Tensor, saturated: Tensor) -> SaddlePoint:
    """Returns the nominal on the top (``lam = 0``) where saturated, else the nominal (``inf``)."""
    on_top = torch.where(problem.is_top(), odds.unsqueeze(-1), -1.0)
    return exact_saddle_point(
        tilt=torch.where(saturated.unsqueeze(-1), on_top, 0.0),
        multiplier=torch.full_like(odds, torch.inf).masked_fill(saturated, 0.0),
        threshold=torch.where(saturated, 0.0, problem.mean(problem.losses)),
    )


def _normalized(problem: Problem, tilt: Tensor) -> Tensor:
    """Removes the rounding error of ``sum_i q_i = 1``."""
    excess = problem.mean(tilt).unsqueeze(-1)
    return (tilt - excess) / (1 + excess)


def _shrunk_into_ball(
    divergence: Divergence, problem: Problem, tilt: Tensor, radius: Tensor
) -> Tensor:
    """Mixes with the nominal until ``D(q||p) <= radius``; by convexity the ratio suffices."""
    spent = problem.mean(divergence.generator(tilt))
    return tilt * torch.where(spent > radius, radius / spent, 1.0).unsqueeze(-1)


def _scaled_conjugate(divergence: Divergence, problem: Problem, saddle: SaddlePoint) -> Tensor:
    """Returns ``lam f*((l - eta) / lam)``; its limits are 0 at ``lam = 0``, ``l - eta`` at inf."""
    multiplier = saddle.multiplier.unsqueeze(-1)
    shifted = problem.losses - saddle.threshold.unsqueeze(-1)
    inside = (multiplier > 0) & multiplier.isfinite()
    safe = torch.where(inside, multiplier, 1.0)
    scaled = safe * divergence.conjugate(shifted / safe)
    return torch.where(inside, scaled, torch.where(multiplier > 0, shifted, 0.0))


def _product_or_zero(multiplier: Tensor, radius: Tensor) -> Tensor:
    """Returns ``lam rho``, which is 0 also at ``lam = inf``: there the radius is 0."""
    return torch.where(radius > 0, multiplier * radius, 0.0)


def _status(gap: Tensor, exhausted: Tensor) -> Status:
    if bool((gap <= _GAP_TOLERANCE).all()):
        return Status.CONVERGED
    if bool(gap.isnan().any()):
        return Status.NON_FINITE
    return Status.MAX_STEPS if bool(exhausted.any()) else Status.INACCURATE
