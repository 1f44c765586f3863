"""Bounds that whole experts can meet: the costs of sets of experts, and bounds moved to those."""

from dataclasses import replace

import numpy as np

from drgr.budgets.relaxation import Array, Problem
from drgr.errors import InfeasibleBudgetError

# Sums of the same costs in another order differ by less than this share.
SAME_SUM = 2.0**-44
MOST_SUMS = 4096
# A common divisor below this share of the largest cost tells nothing.
_LEAST_UNIT = 1e-4
_ROUNDING_OF_UNITS = 1e-9


def reachable_costs(costs: Array, most: float, limit: int = MOST_SUMS) -> Array | None:
    """Returns the costs up to ``most`` of all sets of experts in order, None if beyond ``limit``.

    Costs that differ by rounding alone are one.
    """
    reached = np.zeros(1)
    for cost in costs:
        reached = np.sort(np.concatenate([reached, reached[reached + cost <= most] + cost]))
        is_new = np.diff(reached, prepend=-np.inf) > SAME_SUM * most
        reached = reached[is_new]
        if len(reached) > limit:
            return None
    return reached


def common_unit(costs: Array) -> float | None:
    """Returns the largest amount of which all costs are multiples, None if it is too small."""
    largest = float(costs.max())
    unit = largest
    for cost in costs.tolist():
        rest = cost
        while rest > _ROUNDING_OF_UNITS * largest:
            unit, rest = rest, abs(unit - rest * round(unit / rest))
    multiples = costs / unit
    is_unit = np.abs(multiples - multiples.round()).max() <= _ROUNDING_OF_UNITS
    return unit if is_unit and unit >= _LEAST_UNIT * largest else None


def tightened(problem: Problem) -> Problem:
    """Moves bounds to the nearest costs that whole experts can have; no plan is lost.

    Raises:
        InfeasibleBudgetError: If no set of experts has a cost within the bounds of a token, or the
            cheapest such sets together exceed the batch.
    """
    inside = 1 + problem.slack
    grid = reachable_costs(problem.costs, float(problem.most.max(initial=0.0)))
    if grid is not None:
        problem = _on_grid(problem, grid)
    tokens = np.floor(problem.capacity / problem.costs * inside)
    total, unit = problem.total, common_unit(problem.costs)
    if unit is not None and np.isfinite(total):
        total = unit * float(np.floor(total / unit * inside))
    return replace(problem, capacity=tokens * problem.costs, total=total)


def _on_grid(problem: Problem, grid: Array) -> Problem:
    """Moves the bounds of tokens; the grid ends at the highest, so each finds its own."""
    place = np.searchsorted(grid, problem.least)
    low = np.append(grid, np.inf)[place]
    wrong = np.flatnonzero(low > problem.most)
    if len(wrong):
        token = int(wrong[0])
        raise InfeasibleBudgetError(
            "per_token must leave room for the cost of some set of experts, got low "
            f"{problem.low[token]:g} and high {problem.high[token]:g} for token {token}, where the "
            f"next less costs {grid[place[token] - 1]:g}; widen the bounds"
        )
    if low.sum() > problem.total * (1 + problem.slack):
        raise InfeasibleBudgetError(
            f"per_batch must be at least what whole experts within low cost, {low.sum():g}, "
            f"got {problem.total:g}; raise it or lower low"
        )
    high = grid[np.searchsorted(grid, problem.most, side="right") - 1]
    return replace(problem, low=low, high=high)
