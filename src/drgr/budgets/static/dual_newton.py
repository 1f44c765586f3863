r"""The shifts that spend several budgets at once: Newton's method on a smooth convex function.

    psi(t) = sum_i logsumexp(a_i + sum_j t_j u_ji) - <g, t>
    grad psi = E[u] - g          hess psi = sum_i Cov_{p_i}(u)

Each component of a Newton step in the eigenvectors of the Hessian is bounded, because where choices
are all but made the Hessian is almost 0 and a step would overshoot by orders of magnitude; the
bound is twice the step before. A step is halved until ``psi`` falls enough, or, where what it falls
by is rounding, the residual.

If ``t`` grows without end, the budgets contradict each other, and ``t`` itself proves it: for every
choice ``<t, cost> <= sum_i max_k <t, u_ik>``, so nothing spends ``g`` where that is below
``<t, g>``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drgr.numerics import Status

_FIRST_REACH = 2.0
_LARGEST_REACH = 2.0**40
_FLAT = 1e-14
_ARMIJO = 1e-4
_ROUNDING = 1e-13
_HALVINGS = 60


class Shifts(NamedTuple):
    """Where the search ended."""

    shifts: Tensor
    """``t``, shape ``(m,)``."""
    num_steps: int
    """Evaluations."""
    status: Status


class _Point(NamedTuple):
    shifts: Tensor
    value: Tensor
    residual: Tensor
    hessian: Tensor


def minimize_dual(
    logits: Tensor, directions: Tensor, goals: Tensor, *, allowance: Tensor, max_steps: int
) -> Shifts:
    """Minimises ``psi`` until every residual is within its allowance.

    Args:
        logits: Logits ``a``, finite or ``-inf``, shape ``(N, K)``, float64.
        directions: ``u``, entries in ``[0, 1]``, shape ``(m, N, K)``.
        goals: ``g``, shape ``(m,)``.
        allowance: Largest ``|E[u] - g|``, shape ``(m,)``.
        max_steps: Bound on evaluations.
    """
    point = _evaluate(logits, directions, goals, torch.zeros_like(goals))
    steps, reach = 1, _FIRST_REACH
    while bool((point.residual.abs() > allowance).any()):
        if steps >= max_steps:
            break
        move = _bounded_newton_step(point, reach)
        found, halvings = _shorter_until_better(logits, directions, goals, point, move)
        steps += halvings + 1
        if found is None:
            break
        point = found
        reach = min(2 * reach / 2**halvings, _LARGEST_REACH)
    return Shifts(point.shifts, steps, _status(logits, directions, goals, point, allowance))


def _evaluate(logits: Tensor, directions: Tensor, goals: Tensor, shifts: Tensor) -> _Point:
    moved = logits + (shifts.view(-1, 1, 1) * directions).sum(dim=0)
    probabilities = torch.softmax(moved, dim=-1)
    mean = (probabilities * directions).sum(dim=-1, keepdim=True)
    # Roots of probabilities, so that rows times rows are covariances.
    spread = (probabilities.sqrt() * (directions - mean)).flatten(1)
    return _Point(
        shifts,
        torch.logsumexp(moved, dim=-1).sum() - (goals * shifts).sum(),
        mean.sum(dim=(1, 2)) - goals,
        spread @ spread.T,
    )


def _bounded_newton_step(point: _Point, reach: float) -> Tensor:
    curvature, axes = torch.linalg.eigh(point.hessian)
    slope = axes.T @ point.residual
    floor = (_FLAT * curvature[-1]).clamp(min=torch.finfo(curvature.dtype).tiny)
    along: Tensor = -slope / torch.maximum(curvature, floor)
    move: Tensor = axes @ along.clamp(min=-reach, max=reach)
    return move


def _shorter_until_better(
    logits: Tensor, directions: Tensor, goals: Tensor, point: _Point, move: Tensor
) -> tuple[_Point | None, int]:
    """Returns the first of ever shorter steps that makes progress, and the halvings before."""
    slope = (move * point.residual).sum()
    rounding = _ROUNDING * (point.value.abs() + (point.shifts * goals).abs().sum() + 1)
    length = 1.0
    for halvings in range(_HALVINGS):
        trial = _evaluate(logits, directions, goals, point.shifts + length * move)
        falls = trial.value <= point.value + _ARMIJO * length * slope
        is_level = (trial.value - point.value).abs() <= rounding
        nearer = trial.residual.norm() <= (1 - _ARMIJO * length) * point.residual.norm()
        if bool(trial.value.isfinite() & (falls | (is_level & nearer))):
            return trial, halvings
        length /= 2
    return None, _HALVINGS - 1


def _status(
    logits: Tensor, directions: Tensor, goals: Tensor, point: _Point, allowance: Tensor
) -> Status:
    if bool((point.residual.abs() <= allowance).all()):
        return Status.CONVERGED
    if not bool(point.residual.isfinite().all()):
        return Status.NON_FINITE
    slant = (point.shifts.view(-1, 1, 1) * directions).sum(dim=0)
    best = torch.where(logits > -torch.inf, slant, -torch.inf).amax(dim=-1).sum()
    rounding = 1e-12 * (slant.abs().sum() + (point.shifts * goals).abs().sum())
    if bool(best < (point.shifts * goals).sum() - rounding):
        return Status.INFEASIBLE
    return Status.MAX_STEPS
