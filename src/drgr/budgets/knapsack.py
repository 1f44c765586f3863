r"""The best plan where experts differ in cost: a knapsack for each token inside one for the batch.

Hard in general, and in practice close to its relaxation: the batch price leaves at most one token
between two plans, which of thousands is little. There are two relaxations.

- Where the sums of costs are few (costs of a few sizes, or multiples of one unit), every token's
  whole plans are tabulated. Only the batch bound is relaxed.
- Elsewhere a token may take fractions of an expert at its own bounds too, which bounds less well.

A local search then spends what rounding left.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from drgr.budgets.moves import WorkingPlan, polish, working_plan
from drgr.budgets.relaxation import (
    Array,
    Ids,
    Mask,
    Problem,
    Split,
    batch_split,
    dual_bound,
    fractional_rows,
)
from drgr.budgets.row_tables import RowTables, row_tables
from drgr.budgets.set_search import repair


class Solution(NamedTuple):
    """A plan in whole experts with its prices and a bound on the value of any plan."""

    mask: Mask
    batch_price: float
    expert_price: Array
    upper_bound: float
    low: Array
    """Lower bounds that the plan meets, shape ``(T,)``: those given, or the cost of the token."""


def best_knapsack_plan(problem: Problem) -> Solution:
    """Returns a plan that no move of :func:`polish` improves, without bounds for the experts."""
    tables = row_tables(problem)
    _limit_to_bounds(problem, tables)
    split = batch_split(tables, problem.total, problem.slack)
    plan = working_plan(problem, tables.mask(_filled(split, problem)))
    no_price = np.zeros(len(problem.costs))
    if tables.is_exact:
        polish(plan)
        if not plan.is_short.any():
            return Solution(plan.mask[:, :-1], split.price, no_price, split.bound, problem.low)
    return finished(plan, fractional_plan(within_reach(problem))[1], no_price)


def within_reach(problem: Problem) -> Problem:
    """Lowers the bounds of tokens whose allowed experts cost less."""
    reach = problem.allowed @ problem.costs
    low, high = (np.minimum(bound, reach) for bound in (problem.low, problem.high))
    return replace(problem, low=low, high=high)


def finished(plan: WorkingPlan, batch_price: float, expert_price: Array) -> Solution:
    """Polishes a plan and bounds its value by the fractional relaxation at given prices.

    Args:
        plan: A plan inside every upper bound.
        batch_price: At least 0.
        expert_price: At least 0, shape ``(E,)``.
    """
    polish(plan)
    repair(plan)
    problem = plan.problem
    low = np.where(plan.is_short, plan.spend, problem.low)
    bound = dual_bound(replace(problem, low=low), batch_price, expert_price)
    return Solution(plan.mask[:, :-1], batch_price, expert_price, bound, low)


def fractional_plan(problem: Problem) -> tuple[Array, float]:
    """Returns the cost of each expert in the best fractional plan, and the batch price.

    There are no bounds for the experts; the last fraction is that of one token.
    """
    rows = fractional_rows(problem, np.zeros(len(problem.costs)))
    split = batch_split(rows, problem.total, problem.slack)
    growth = split.dear.cost - split.cheap.cost
    before = growth.cumsum() - growth
    left = problem.total - split.cheap.cost.sum() if growth.any() else 0.0
    return rows.amounts(split.cheap.cost + np.clip(left - before, 0.0, growth)), split.price


def _limit_to_bounds(problem: Problem, tables: RowTables) -> None:
    """Removes entries below the lower bounds, in place.

    A token that cannot meet its own spends all that it can. Where the cheapest entries exceed the
    batch, the last tokens lose their bounds.
    """
    reachable = tables.values.copy()
    costs = np.broadcast_to(tables.costs, reachable.shape)
    last = len(reachable) - 1 - (reachable[::-1] > -np.inf).argmax(axis=0)
    reach = costs[last, np.arange(len(last))]
    tables.values[costs < np.minimum(problem.least, reach)] = -np.inf
    is_over = tables.cheapest().cost.cumsum() > problem.total * (1 + problem.slack)
    tables.values[:, is_over] = reachable[:, is_over]


def _filled(split: Split, problem: Problem) -> Ids:
    """Moves tokens in their order from the cheaper to the dearer choice while the batch can pay."""
    pick = np.array(split.cheap.pick, dtype=np.int64)
    growth = split.dear.cost - split.cheap.cost
    left = problem.total * (1 + problem.slack) - float(split.cheap.cost.sum())
    for token in np.flatnonzero(split.dear.value > split.cheap.value):
        if growth[token] <= left:
            pick[token] = split.dear.pick[token]
            left -= growth[token]
    return pick
