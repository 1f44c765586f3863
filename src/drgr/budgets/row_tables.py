r"""The best plan of each token for each cost that a set of experts can have.

The costs of sets of experts form a short list where costs are of few sizes or multiples of one
unit, as FLOPs of experts are. Then a table ``V_t(g)`` of the best score at each cost ``g`` says all
about a token, whole experts included, and the batch chooses one entry a token. Where the list is
too long, costs are put into cells and of the sets in one cell only the best is followed: plans are
still plans, with their true costs, but better ones may be missed.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from drgr.budgets.relaxation import Array, Choice, Ids, Mask, Problem
from drgr.budgets.whole_bounds import MOST_SUMS, SAME_SUM, reachable_costs

_MOST_ENTRIES = 2**26
_NUM_CELLS = 128


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RowTables:
    """Plans of each token in whole experts: the best known for each of ``S`` costs or cells."""

    costs: Array
    """Costs of the entries, increasing in the first dimension, shape ``(S, T)`` or ``(S, 1)``."""
    values: Array
    """Scores of the entries, ``-inf`` for none, shape ``(S, T)``."""
    origin: NDArray[np.int16]
    """Entry to which each expert was added among the first experts, -1 for not, ``(E, S, T)``."""
    is_exact: bool
    """Whether there is one entry for each cost, so that no plan is missed."""

    def at_price(self, price: float) -> Choice:
        """Returns the best entry of each token; of equal ones the cheapest."""
        return self._at((self.values - price * self.costs).argmax(axis=0))

    def cheapest(self) -> Choice:
        """Returns the entry of least cost of each token."""
        return self._at((self.values > -np.inf).argmax(axis=0))

    def mask(self, pick: Ids) -> Mask:
        """Returns the experts of the entries picked, shape ``(T, E)``."""
        num_experts, _, num_tokens = self.origin.shape
        mask = np.zeros((num_tokens, num_experts), dtype=np.bool_)
        for expert in reversed(range(num_experts)):
            origin = self.origin[expert, pick, np.arange(num_tokens)]
            mask[:, expert] = origin >= 0
            pick = np.where(origin >= 0, origin, pick)
        return mask

    def _at(self, pick: Ids) -> Choice:
        tokens = np.arange(len(pick))
        costs = np.broadcast_to(self.costs, self.values.shape)
        return Choice(pick, self.values[pick, tokens], costs[pick, tokens])


def row_tables(problem: Problem) -> RowTables:
    """Tabulates the plans of each token that cost at most its upper bound."""
    most = float(problem.most.max(initial=0.0))
    limit = max(1, _MOST_ENTRIES // max(1, problem.scores.size))
    grid = reachable_costs(problem.costs, most, min(limit, MOST_SUMS))
    if grid is None:
        tables = _cell_tables(problem, min(limit, _NUM_CELLS), most)
    else:
        tables = _exact_tables(problem, grid)
    tables.values[tables.costs > problem.most] = -np.inf
    return tables


def _exact_tables(problem: Problem, grid: Array) -> RowTables:
    num_tokens, num_experts = problem.scores.shape
    rounding = SAME_SUM * float(grid[-1])
    scores = np.ascontiguousarray(problem.scores.T)
    values = np.full((len(grid), num_tokens), -np.inf)
    values[0] = 0.0
    origin = np.full((num_experts, *values.shape), -1, dtype=np.int16)
    for expert in range(num_experts):
        wanted = grid - problem.costs[expert]
        below = np.searchsorted(grid, wanted - rounding).clip(max=len(grid) - 1)
        places = np.flatnonzero(np.abs(grid[below] - wanted) <= rounding)
        joined = values[below[places]] + scores[expert]
        is_better = joined > values[places]
        origin[expert, places] = np.where(is_better, below[places, None], -1)
        values[places] = np.where(is_better, joined, values[places])
    return RowTables(costs=grid[:, None], values=values, origin=origin, is_exact=True)


def _cell_tables(problem: Problem, num_cells: int, most: float) -> RowTables:
    num_tokens, num_experts = problem.scores.shape
    size = most / num_cells
    scores = np.ascontiguousarray(problem.scores.T)
    # The empty set has an entry of its own, so that no token must spend.
    values = np.full((num_cells + 2, num_tokens), -np.inf)
    values[0] = 0.0
    costs = np.zeros_like(values)
    origin = np.full((num_experts, *values.shape), -1, dtype=np.int16)
    for expert, cost in enumerate(problem.costs):
        joined, grown = values + scores[expert], costs + cost
        # Within a cell the sum of two costs reaches one of two cells.
        step = int(cost / size)
        for shift in (step, step + 1):
            source = np.arange(max(0, len(values) - shift))
            target = source + shift
            lands = (grown[source] / size).astype(np.int64) + 1 == target[:, None]
            is_better = lands & (joined[source] > values[target])
            origin[expert, target] = np.where(is_better, source[:, None], origin[expert, target])
            values[target] = np.where(is_better, joined[source], values[target])
            costs[target] = np.where(is_better, grown[source], costs[target])
    return RowTables(costs=costs, values=values, origin=origin, is_exact=False)
