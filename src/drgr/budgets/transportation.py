r"""The best plan where experts have bounds of their own: a transportation problem.

In units of cost, token ``t`` sends ``high_t`` to the columns: at most ``c_e`` to expert ``e``, at
most ``high_t - low_t`` to a column that stands for nothing. Expert columns take ``C_e``, and as the
batch may cost ``C``, the column for nothing takes at least the rest. Where costs are equal, whole
units make the linear programme integral.

The best plan without bounds for the experts is a flow that overfills some columns. Each step moves
what is too much along the cheapest chain of exchanges, token by token, to a column with room. The
chain is a shortest path over the columns, and a flow that had no improving cycle has none after it,
so the last flow is optimal.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, final

import numpy as np

from drgr.budgets.knapsack import Solution, finished, fractional_plan, within_reach
from drgr.budgets.moves import working_plan
from drgr.budgets.relaxation import (
    ROUNDING,
    Array,
    Ids,
    Mask,
    Problem,
    dual_bound,
)


def best_whole_assignment(problem: Problem, start: Mask, price: float) -> Solution:
    """Returns the optimal plan where every cost is 1 and all bounds are whole numbers.

    Args:
        problem: Scores and bounds in experts.
        start: The optimal plan without bounds for the experts, shape ``(T, E)``.
        price: Its batch price.
    """
    problem = within_reach(problem)
    routing = _routed(problem, start.astype(np.float64), price)
    mask = routing.amounts > 0.5
    low = np.minimum(problem.low, mask.sum(axis=1))
    bound = dual_bound(replace(problem, low=low), routing.batch_price, routing.expert_price)
    return Solution(mask, routing.batch_price, routing.expert_price, bound, low)


def best_assignment(problem: Problem) -> Solution:
    """Returns a plan for any costs that no single move improves, bounded by the relaxation."""
    problem = within_reach(problem)
    routing = _routed(problem, *fractional_plan(problem))
    # Fractions are dropped; polishing spends what they leave.
    is_whole = routing.amounts >= problem.costs * (1 - problem.slack)
    plan = working_plan(problem, is_whole)
    return finished(plan, routing.batch_price, routing.expert_price)


class _Routing(NamedTuple):
    """An optimal fractional plan and its prices."""

    amounts: Array
    """Cost of each expert, shape ``(T, E)``."""
    batch_price: float
    expert_price: Array


def _routed(problem: Problem, amounts: Array, price: float) -> _Routing:
    """Moves a plan that is optimal but for the bounds of experts inside those.

    Where tokens cannot reach their lower bounds they are short of them by the least total.
    """
    network = _network(problem, amounts, price)
    while network.too_full().any():
        network.push(_cheapest_chain(network))
    # What tokens are short of is no longer their bound; without the penalty prices are of scores.
    spare = np.maximum(network.spare, network.flow[-1])
    settled = replace(network, spare=spare, penalty=np.inf)
    settled.compare_all()
    prices = _column_prices(settled.loss, settled.has_room())
    batch_price = -float(prices[-1])
    return _Routing(
        amounts=settled.flow[:-1].T,
        batch_price=batch_price if batch_price > settled.rounding else 0.0,
        expert_price=np.maximum(prices[:-1], 0.0),
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """A flow from tokens to experts and, in the last row, to nothing; changed in place.

    ``N = E + 1`` columns of the plan are the rows here. A token's first ``spare`` units of nothing
    are free, more leave it short of its lower bound and cost ``penalty`` each.
    """

    profit: Array
    """Score per unit of cost, 0 where forbidden, shape ``(N, T)``."""
    width: Array
    """Most flow, shape ``(N, T)``."""
    spare: Array
    """Shape ``(T,)``."""
    flow: Array
    """Shape ``(N, T)``."""
    bound: Array
    """Most flow of each column, shape ``(N,)``."""
    load: Array
    """Flow of each column, shape ``(N,)``."""
    leaving: Array
    """Loss of the next unit to leave, ``inf`` where nothing is, shape ``(N, T)``."""
    joining: Array
    """Gain of the next unit to join, ``-inf`` where nothing can, shape ``(N, T)``."""
    loss: Array
    """Least loss of moving a unit of some token from one column to another, shape ``(N, N)``."""
    mover: Ids
    """The token that does so, shape ``(N, N)``."""
    price: Array
    """Price of each column, below 0 for nothing, at which no move gains, shape ``(N,)``."""
    penalty: float
    tiny: float
    """Flows below are rounding."""
    rounding: float
    """Differences of losses below are rounding."""

    def too_full(self) -> Mask:
        """Returns which columns hold more than their bound."""
        return self.load > self.bound

    def has_room(self) -> Mask:
        """Returns which columns may hold more."""
        return self.load < self.bound

    def compare_all(self) -> None:
        """Finds the least loss of every move between columns."""
        self._price_tokens(np.arange(self.flow.shape[1]))
        columns = np.arange(len(self.bound))
        for column in columns.tolist():
            self._compare(column, columns)
        self._count(columns.tolist())

    def push(self, chain: list[int]) -> None:
        """Moves as much as possible from the first column of a chain to its last."""
        steps: list[tuple[int, int, int]] = []
        for leaves, joins in pairwise(chain):
            token = int(self.mover[leaves, joins])
            # A token that passes through a column would move no more than fits in there.
            passes = bool(steps) and steps[-1][0] == token
            steps.append((token, steps.pop()[1] if passes else leaves, joins))
        amount = min(
            self.load[chain[0]] - self.bound[chain[0]],
            self.bound[chain[-1]] - self.load[chain[-1]],
            *(self._movable(*step) for step in steps),
        )
        for token, leaves, joins in steps:
            self.flow[leaves, token] -= amount
            self.flow[joins, token] += amount
        self._update(np.array(list({token for token, _, _ in steps})))
        self._count(chain)

    def _count(self, columns: list[int]) -> None:
        """Adds up some columns; what differs from the bound by rounding is at the bound."""
        load, bound = self.flow[columns].sum(axis=1), self.bound[columns]
        is_full = np.abs(load - bound) <= self.tiny * self.flow.shape[1]
        self.load[columns] = np.where(is_full, bound, load)

    def _movable(self, token: int, leaves: int, joins: int) -> float:
        """Returns how much of a token can move at the loss of its next unit."""
        flow, spare = self.flow[:, token], self.spare[token]
        nothing = len(self.bound) - 1
        present, room = flow[leaves], self.width[joins, token] - flow[joins]
        if leaves == nothing and present > spare:
            present -= spare
        if joins == nothing and flow[joins] < spare:
            room = spare - flow[joins]
        return float(min(present, room))

    def _update(self, tokens: Ids) -> None:
        """Brings the least losses up to date after the flow of some tokens changed."""
        self._price_tokens(tokens)
        has_changed = np.zeros(self.flow.shape[1], dtype=np.bool_)
        has_changed[tokens] = True
        stale = has_changed[self.mover] & (self.loss < np.inf)
        for column in np.flatnonzero(stale.any(axis=1)).tolist():
            self._compare(column, np.flatnonzero(stale[column]))
        losses = self.leaving[:, None, tokens] - self.joining[None, :, tokens]
        losses[np.arange(len(losses)), np.arange(len(losses))] = np.inf
        best = losses.min(axis=2)
        is_less = best < self.loss
        self.mover[is_less] = tokens[losses[is_less].argmin(axis=1)]
        self.loss[is_less] = best[is_less]

    def _compare(self, leaves: int, joins: Ids) -> None:
        """Finds the least loss of leaving one column for each of some others."""
        tokens = np.flatnonzero(self.leaving[leaves] < np.inf)
        if not len(tokens):
            self.loss[leaves, joins] = np.inf
            return
        losses = self.leaving[leaves, tokens] - self.joining[joins[:, None], tokens]
        losses[joins == leaves] = np.inf
        first = losses.argmin(axis=1)
        self.mover[leaves, joins] = tokens[first]
        self.loss[leaves, joins] = losses[np.arange(len(joins)), first]

    def _price_tokens(self, tokens: Ids) -> None:
        """Removes rounding errors of flows that should be at a bound, and prices the next units."""
        flow, width, spare = self.flow[:, tokens], self.width[:, tokens], self.spare[tokens]
        flow[flow < self.tiny] = 0.0
        flow = np.where(flow > width - self.tiny, width, flow)
        flow[-1] = np.where(np.abs(flow[-1] - spare) < self.tiny, spare, flow[-1])
        leaving = np.where(flow > 0, self.profit[:, tokens], np.inf)
        leaving[-1, flow[-1] > spare] = -self.penalty
        joining = np.where(flow < width, self.profit[:, tokens], -np.inf)
        joining[-1, (flow[-1] >= spare) & (flow[-1] < width[-1])] = -self.penalty
        self.flow[:, tokens] = flow
        self.leaving[:, tokens], self.joining[:, tokens] = leaving, joining


def _network(problem: Problem, amounts: Array, price: float) -> _Network:
    """Returns the flow of a plan, given by the cost of each expert, and its batch price."""
    num_columns = len(problem.costs) + 1
    density = np.where(problem.allowed, problem.scores, 0.0) / problem.costs
    nothing = problem.high - amounts.sum(axis=1)
    scale = float(np.abs(density).max(initial=0.0))
    flow = np.vstack([amounts.T, nothing])
    network = _Network(
        profit=np.pad(density.T, ((0, 1), (0, 0))),
        width=np.vstack([(problem.allowed * problem.costs).T, problem.high]),
        spare=problem.high - problem.low,
        flow=flow,
        bound=np.append(problem.capacity, np.inf),
        load=np.empty(num_columns),
        leaving=np.empty_like(flow),
        joining=np.empty_like(flow),
        loss=np.empty((num_columns, num_columns)),
        mover=np.zeros((num_columns, num_columns), dtype=np.int64),
        price=np.append(np.zeros(len(problem.costs)), -price),
        # More than any chain of exchanges can lose.
        penalty=4.0 * (num_columns + 1) * (scale or 1.0),
        tiny=ROUNDING * float(problem.high.max(initial=0.0)),
        rounding=ROUNDING * scale,
    )
    network.compare_all()
    return network


def _cheapest_chain(network: _Network) -> list[int]:
    """Returns the columns of a cheapest chain from one that is too full to one with room.

    Less the prices of the columns no move gains, so the distances are sums of numbers of at least
    0 and, whatever the rounding, the chain has no cycle. The prices then grow to keep that true.
    """
    price, starts = network.price, network.too_full()
    lengths = np.maximum(network.loss - price[:, None] + price, 0.0)
    distance = np.where(starts, price - price[starts].min(), np.inf)
    origin = np.full(len(price), -1)
    for _ in price:
        through = distance[:, None] + lengths
        best = through.min(axis=0)
        is_shorter = best < distance
        if not is_shorter.any():
            break
        origin[is_shorter] = through.argmin(axis=0)[is_shorter]
        distance[is_shorter] = best[is_shorter]
    left = np.where(network.has_room(), distance - price, np.inf)
    chain = [int(left.argmin())]
    while origin[chain[-1]] >= 0:
        chain.append(int(origin[chain[-1]]))
    price += np.maximum(left.min() - distance, 0.0)
    return chain[::-1]


def _column_prices(loss: Array, has_room: Mask) -> Array:
    """Returns prices at which no exchange gains: the distance of each column to one with room.

    Columns from which nothing can move get the least price at which nothing moves there.
    """
    price = np.where(has_room, 0.0, np.inf)
    for _ in range(len(loss)):
        price = np.minimum(price, (loss + price).min(axis=1))
    is_closed = np.isinf(price)
    price[is_closed] = 0.0
    for _ in range(len(loss)):
        wanted = (price[:, None] - loss).max(axis=0)
        price[is_closed] = np.maximum(price, wanted)[is_closed]
    return price
