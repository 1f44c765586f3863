"""Lower bounds that are hard to reach: a set of experts with a cost between two bounds."""

from typing import NamedTuple

import numpy as np

from drgr.budgets.moves import WorkingPlan, polish
from drgr.budgets.relaxation import Array, Ids, Mask, Problem

# Different sums that the search for one token's set of experts keeps after each expert.
_KEPT_SUMS = 4096


def repair(plan: WorkingPlan) -> None:
    """Gives tokens below their lower bounds the cheapest set of experts that reaches it, if any.

    Experts that no lower bound needs make room in the batch, least dense first; what remains of it
    is spent again.
    """
    sets = _SetSearch(plan.problem, {})
    tokens = np.flatnonzero(plan.is_short).tolist()
    for token in tokens:
        experts = sets.cheapest(plan, token)
        if experts is None:
            continue
        growth = float(plan.problem.costs[experts].sum() - plan.spend[token])
        if growth > plan.left:
            _drop_extras(plan, growth)
        if growth <= plan.left:
            plan.set_row(token, experts)
    if tokens:
        polish(plan)


class _SetSearch(NamedTuple):
    """Cheapest sets of experts, remembered by what decides them."""

    problem: Problem
    found: dict[tuple[bytes, float, float], Mask | None]

    def cheapest(self, plan: WorkingPlan, token: int) -> Mask | None:
        """Returns the cheapest set within the token's bounds of experts that it has or that fit."""
        low, high = float(self.problem.least[token]), float(self.problem.most[token])
        fits = self.problem.costs <= plan.expert_left[:-1]
        is_open = (self.problem.scores[token] > -np.inf) & (fits | plan.mask[token, :-1])
        key = (is_open.tobytes(), low, high)
        if key not in self.found:
            costs = np.where(is_open, self.problem.costs, np.inf)
            self.found[key] = cheapest_set(costs, low, high)
        return self.found[key]


def _drop_extras(plan: WorkingPlan, wanted: float) -> None:
    """Drops experts that no lower bound needs until the batch has room for a cost."""
    problem = plan.problem
    tokens, experts = np.nonzero(plan.mask[:, :-1])
    density = problem.scores[tokens, experts] / problem.costs[experts]
    for index in np.argsort(density, kind="stable").tolist():
        token, expert = int(tokens[index]), int(experts[index])
        rest = plan.spend[token] - problem.costs[expert]
        if rest >= problem.least[token] and not plan.is_short[token]:
            plan.replace(token, expert, len(problem.costs))
            if plan.left >= wanted:
                return


def cheapest_set(costs: Array, low: float, high: float, limit: int = _KEPT_SUMS) -> Mask | None:
    """Searches a set of experts whose cost is the least of at least ``low`` and at most ``high``.

    Exact while no more than ``limit`` different sums arise; beyond, of sums that lie close together
    one is kept, so that a set may be missed where the bounds are close.

    Args:
        costs: Cost of each expert, ``inf`` for one that may not be used, shape ``(E,)``.
        low: Least cost.
        high: Most cost.
        limit: Most sums to keep after each expert.

    Returns:
        The set as a mask of shape ``(E,)``, None if none was found.
    """
    sums = np.zeros(1)
    history: list[tuple[Ids, Mask]] = []
    for cost in costs:
        joined = np.concatenate([sums, sums + cost])
        order = np.argsort(joined, kind="stable")
        order = order[joined[order] <= high]
        order = order[np.diff(joined[order], prepend=-np.inf) > 0]
        if len(order) > limit:
            cell = np.floor(joined[order] / high * limit)
            order = order[np.diff(cell, prepend=-1.0) > 0]
        history.append((order % len(sums), order >= len(sums)))
        sums = joined[order]
    reached = np.flatnonzero(sums >= low)
    if not len(reached):
        return None
    place, experts = int(reached[0]), np.zeros(len(costs), dtype=np.bool_)
    for expert in reversed(range(len(costs))):
        origin, has_expert = history[expert]
        experts[expert] = has_expert[place]
        place = int(origin[place])
    return experts
