r"""Back onto the budgets: logits are shifted along the costs until every budget is spent exactly.

    R(a) = a + sum_j t_j c_j          with t such that C_j(R(a)) = B_j for all j

with ``c`` less each item's least cost, which changes no probability. For one budget ``dC/dt =
sum_i Var_{p_i}(c) >= 0``: a root of an increasing function in a bracket. For several, ``C(t)`` is
the gradient of the convex ``sum_i logsumexp(a_i + sum_j t_j c_ji)``, so ``t`` minimises that less
``<B, t>``: Newton's method (``dual_newton``). Both are first-order retractions: for a tangent step
``dt = 0``.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.budgets.static.choices import ChoiceBudgets, checked_logits, expected_costs
from drgr.budgets.static.dual_newton import minimize_dual
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status, increasing_root


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retraction:
    """Result of :func:`retract`."""

    logits: Tensor
    """The shifted logits, shape ``(N, K)``, float64."""
    shifts: Tensor
    """``t``, shape ``(m,)``: logits per unit of cost."""
    residual: Tensor
    """``C_j - B_j`` at the result, shape ``(m,)``, in the unit of the costs."""
    num_steps: int
    """Evaluations of all expected costs."""
    status: Status
    """INFEASIBLE where it is proved that no probabilities spend all budgets at once."""


def retract(
    logits: Tensor, budgets: ChoiceBudgets, *, tolerance: float = 1e-12, max_steps: int = 200
) -> Retraction:
    r"""Shifts logits along the costs until the expected costs are the limits.

    .. math:: \text{find } t \ \text{with}\ C_j\big(a + \sum_l t_l c_l\big) = B_j
              \ \text{for all } j .

    Args:
        logits: Logits ``a``, finite or ``-inf``, shape ``(N, K)``.
        budgets: Costs and limits of ``m`` budgets, ``m >= 0``.
        tolerance: Largest residual, as a share of the difference between the most and the least
            that the budget's options can cost.
        max_steps: Bound on evaluations.

    Returns:
        The logits with residual and status. A status other than CONVERGED comes with the logits of
        the smallest residual met; budgets that contradict each other only together are INFEASIBLE.

    Raises:
        ValueError: If the logits do not fit the budgets.
        InfeasibleBudgetError: If a limit is not strictly between the least and the most cost of its
            options, where logits would have to be infinite.

    Gradients:
        None.

    Complexity:
        ``O(m^2 N K)`` for each step, about 6 of them.

    References:
        RCO, arXiv 2605.00649 (one budget). Several budgets and the proof of infeasibility are
        derived here.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), 1.0)
        >>> found = retract(torch.zeros(2, 2), budgets)
        >>> bool(found.residual.abs() < 1e-10), found.status.name
        (True, 'CONVERGED')
    """
    logits = checked_logits(logits, budgets)
    if not len(budgets.costs):
        none = logits.new_zeros(0)
        return Retraction(
            logits=logits, shifts=none, residual=none, num_steps=0, status=Status.CONVERGED
        )
    low, spread = _checked_reach(logits, budgets)
    scale = spread.amax(dim=-1)
    allowed = logits > -torch.inf
    above = torch.where(allowed, budgets.costs - low.unsqueeze(-1), 0.0)
    directions = above / scale.view(-1, 1, 1)
    goals = (budgets.limit_vector - low.sum(dim=-1)) / scale
    allowance = tolerance * spread.sum(dim=-1)
    solve = _shift_of_one if len(goals) == 1 else _shift_of_several
    shifts, num_steps, status = solve(logits, directions, goals, allowance / scale, max_steps)
    moved = logits + (shifts.view(-1, 1, 1) * directions).sum(dim=0)
    residual = expected_costs(moved, budgets) - budgets.limit_vector
    within = bool((residual.abs() <= 4 * allowance).all())
    return Retraction(
        logits=moved,
        shifts=shifts / scale,
        residual=residual,
        num_steps=num_steps,
        status=Status.CONVERGED if within else status,
    )


def _checked_reach(logits: Tensor, budgets: ChoiceBudgets) -> tuple[Tensor, Tensor]:
    """Returns least costs and spreads of items ``(m, N)`` after checking the limits."""
    low, high = budgets.range_of_items(logits)
    least, most = low.sum(dim=-1), high.sum(dim=-1)
    limits = budgets.limit_vector
    outside = ~((limits > least) & (limits < most))
    if bool(outside.any()):
        index = int(outside.nonzero()[0])
        raise InfeasibleBudgetError(
            f"limits must lie strictly between least and most cost, {least[index].item():g} and "
            f"{most[index].item():g}, got {limits[index].item():g} for budget {index}; at an end "
            "every choice is decided: leave that budget out and forbid the other options"
        )
    return low, high - low


_Shift = tuple[Tensor, int, Status]


def _shift_of_one(
    logits: Tensor, directions: Tensor, goals: Tensor, allowance: Tensor, max_steps: int
) -> _Shift:
    direction = directions[0]

    def excess(shift: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(logits + shift * direction, dim=-1)
        mean = (probabilities * direction).sum(dim=-1, keepdim=True)
        slope = (probabilities * (direction - mean).square()).sum()
        return mean.sum().view(1) - goals, slope.view(1)

    ends = torch.full_like(goals, torch.inf)
    root = increasing_root(
        excess,
        start=torch.zeros_like(goals),
        lower=-ends,
        upper=ends,
        tolerance=allowance,
        max_steps=max_steps,
    )
    done = bool(root.converged)
    # A bracket closed to rounding with the residual above tolerance is not a failure to iterate.
    return root.point, root.num_steps, Status.INACCURATE if done else Status.MAX_STEPS


def _shift_of_several(
    logits: Tensor, directions: Tensor, goals: Tensor, allowance: Tensor, max_steps: int
) -> _Shift:
    found = minimize_dual(logits, directions, goals, allowance=allowance, max_steps=max_steps)
    return found.shifts, found.num_steps, found.status
