"""Saddle points in scaled units: the edge cases, and an error bound that needs no other solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Divergence, Problem, SaddlePoint, exact_saddle_point
from drgr.ambiguity.scaling import Level
from drgr.numerics import Status

# Largest duality gap, relative to the range of the losses, of a result that counts as converged.
_GAP_TOLERANCE = 1e-9
# Weights outside the ball by rounding alone stay as they are.
_FEASIBLE = 1e-12
_ROUNDING_OF_SUM = 1e-14
_VANISHING = 1e-300
_BOUNDLESS = 1e250


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
        cost_of_size = _product_or_zero(saddle.multiplier, level.value)
    else:
        saddle = divergence.penalized(problem, level.value)
        cost_of_size = torch.zeros_like(level.value)
    weights, log_ratio = _normalized(problem, saddle.log_ratio)
    spent = problem.mean(divergence.generator(log_ratio))
    if level.kind == "radius" and bool((spent > level.value * (1 + _FEASIBLE)).any()):
        log_ratio = _shrunk_into_ball(log_ratio, spent, level.value)
        spent = problem.mean(divergence.generator(log_ratio))
        weights = problem.nominal * log_ratio.exp()
    objective = (weights * problem.losses).sum(dim=-1)
    if level.kind == "penalty":
        objective = objective - level.value * spent
    slope = _scaled_conjugate(divergence, problem, saddle)
    if problem.has_empty_atoms:
        slope = slope.masked_fill(problem.nominal == 0, 0.0)
    gap = (saddle.threshold + cost_of_size + problem.mean(slope) - objective).abs()
    return CertifiedSaddlePoint(
        weights=weights,
        objective=objective,
        multiplier=saddle.multiplier,
        threshold=saddle.threshold,
        divergence=spent,
        gap=gap,
        nominal_slope=slope,
        status=certified_status(gap, saddle.exhausted),
    )


def _constrained(divergence: Divergence, problem: Problem, radius: Tensor) -> SaddlePoint:
    """Answers saturated and zero radii in closed form and leaves the others to the divergence."""
    saturated = radius >= divergence.saturation_radius(problem)
    interior = ~saturated & (radius > 0)
    if bool(interior.all()):
        return divergence.constrained(problem, radius)
    edge = _edge(problem, divergence.limit(problem), saturated)
    if not bool(interior.any()):
        return edge
    rows = interior.nonzero().squeeze(-1)
    solved = divergence.constrained(problem.rows(rows), radius[rows])
    return SaddlePoint(
        log_ratio=edge.log_ratio.index_copy(0, rows, solved.log_ratio),
        multiplier=edge.multiplier.index_copy(0, rows, solved.multiplier),
        threshold=edge.threshold.index_copy(0, rows, solved.threshold),
        exhausted=edge.exhausted.index_copy(0, rows, solved.exhausted),
    )


def _edge(problem: Problem, largest: Tensor, saturated: Tensor) -> SaddlePoint:
    """Returns the limit weights (``lam = 0``) where saturated, else the nominal (``inf``)."""
    lowest = problem.losses.masked_fill(largest.isneginf(), 0.0).amin(dim=-1)
    return exact_saddle_point(
        log_ratio=torch.where(saturated.unsqueeze(-1), largest, 0.0),
        multiplier=torch.full_like(lowest, torch.inf).masked_fill(saturated, 0.0),
        threshold=torch.where(saturated, lowest, problem.mean(problem.losses)),
    )


def _normalized(problem: Problem, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Removes the rounding error of ``sum_i q_i = 1``; returns ``q`` and ``log(q / p)``."""
    weights = problem.nominal * log_ratio.exp()
    total = weights.sum(dim=-1, keepdim=True)
    total = torch.where((total - 1).abs() < _ROUNDING_OF_SUM, 1.0, total)
    return weights / total, log_ratio - total.log()


def _shrunk_into_ball(log_ratio: Tensor, spent: Tensor, radius: Tensor) -> Tensor:
    """Mixes with the nominal until ``D(q||p) <= radius``; by convexity the ratio suffices."""
    share = torch.where(spent > radius, radius / spent, 1.0).unsqueeze(-1)
    return torch.where(share < 1, torch.log1p(share * torch.expm1(log_ratio)), log_ratio)


def _scaled_conjugate(divergence: Divergence, problem: Problem, saddle: SaddlePoint) -> Tensor:
    """Returns ``lam f*((l - eta) / lam)`` and its limits: ``l - eta`` at infinity, and at 0."""
    multiplier = saddle.multiplier.unsqueeze(-1)
    shifted = problem.losses - saddle.threshold.unsqueeze(-1)
    # Where lam is 0 a lam far below rounding gives the limit, the recession function.
    inside = torch.where(multiplier > 0, multiplier, _VANISHING).clamp_max(_BOUNDLESS)
    scaled = inside * divergence.conjugate(shifted / inside)
    if bool((multiplier < _BOUNDLESS).all()):
        return scaled
    return torch.where(multiplier < _BOUNDLESS, scaled, shifted)


def _product_or_zero(multiplier: Tensor, radius: Tensor) -> Tensor:
    """Returns ``lam rho``, which is 0 also at ``lam = inf``: there the radius is 0."""
    return torch.where(radius > 0, multiplier * radius, 0.0)


def certified_status(gap: Tensor, exhausted: Tensor) -> Status:
    """Returns what the gaps of a batch say, and whether an iteration ran out of steps."""
    if bool((gap <= _GAP_TOLERANCE).all()):
        return Status.CONVERGED
    if bool(gap.isnan().any()):
        return Status.NON_FINITE
    return Status.MAX_STEPS if bool(exhausted.any()) else Status.INACCURATE
