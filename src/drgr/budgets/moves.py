"""A plan under construction, and the moves that raise its value inside the budget."""

from dataclasses import dataclass
from typing import final

import numpy as np

from drgr.budgets.relaxation import ROUNDING, Array, Ids, Mask, Problem


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingPlan:
    """A plan that is changed in place; an extra column E of cost and score 0 stands for nothing."""

    problem: Problem
    scores: Array
    """Shape ``(T, E + 1)``; ``-inf`` forbids."""
    costs: Array
    """Shape ``(E + 1,)``."""
    mask: Mask
    """Shape ``(T, E + 1)``; the last column is always False."""
    spend: Array
    """Cost of each token, shape ``(T,)``."""
    counts: Ids
    """Tokens of each expert, shape ``(E + 1,)``."""
    scale: float
    """Largest score in absolute value; 1 if all are 0."""

    @property
    def left(self) -> float:
        """What the batch may still cost."""
        total = self.problem.total * (1 + self.problem.slack)
        return float(total - (self.counts * self.costs).sum())

    @property
    def expert_left(self) -> Array:
        """What each expert may still cost, shape ``(E + 1,)``."""
        most = self.problem.capacity * (1 + self.problem.slack)
        return np.append(most, np.inf) - self.counts * self.costs

    @property
    def is_short(self) -> Mask:
        """Which tokens are below their lower bound, shape ``(T,)``."""
        return self.spend < self.problem.least

    def shortage(self, tokens: Ids, spend: Array) -> Array:
        """Returns 0 for tokens that reach their lower bound with a cost, else 1 to 2.

        Takes and returns shape ``(num_tokens, ...)``.
        """
        least = self.problem.least[tokens].reshape(-1, *[1] * (spend.ndim - 1))
        share = spend / np.where(least > 0, least, 1.0)
        return np.where(spend < least, 2.0 - share, 0.0)

    def fits(self, leaves: int, joins: int) -> bool:
        """Returns whether batch and experts have room to replace an expert by another."""
        grows = self.costs[joins] - self.costs[leaves]
        return bool(
            grows <= max(self.left, 0.0)
            and (joins == leaves or self.costs[joins] <= self.expert_left[joins])
        )

    def fits_both(self, first: tuple[int, int], second: tuple[int, int]) -> bool:
        """Returns whether there is room for two replacements in different tokens."""
        grows = sum(self.costs[joins] - self.costs[leaves] for leaves, joins in (first, second))
        joined = np.zeros_like(self.costs)
        for _, joins in (first, second):
            joined[joins] += self.costs[joins]
        return bool(grows <= max(self.left, 0.0) and (joined <= self.expert_left).all())

    def replace(self, token: int, leaves: int, joins: int) -> None:
        """Replaces an expert of a token by another; the last column stands for nothing."""
        self.mask[token, leaves] = False
        self.mask[token, joins] = True
        self.mask[token, -1] = False
        self.counts[leaves] -= 1
        self.counts[joins] += 1
        self.spend[token] = self.costs[self.mask[token]].sum()

    def set_row(self, token: int, experts: Mask) -> None:
        """Gives a token the experts of a mask of shape ``(E,)``."""
        self.counts[:-1] += experts.astype(np.int64) - self.mask[token, :-1]
        self.mask[token, :-1] = experts
        self.spend[token] = self.costs[self.mask[token]].sum()


def working_plan(problem: Problem, mask: Mask) -> WorkingPlan:
    """Returns a plan that starts at a mask of shape ``(T, E)``."""
    values = np.where(problem.allowed, problem.scores, 0.0)
    return WorkingPlan(
        problem=problem,
        scores=np.pad(problem.scores, ((0, 0), (0, 1))),
        costs=np.append(problem.costs, 0.0),
        mask=np.pad(mask, ((0, 0), (0, 1))),
        spend=mask @ problem.costs,
        counts=np.append(mask.sum(axis=0), 0),
        scale=float(np.abs(values).max(initial=0.0)) or 1.0,
    )


def polish(plan: WorkingPlan) -> None:
    """Makes improving moves until there is none, so the result is a local optimum.

    A move lets one or two tokens each take an expert, drop one or replace one by another. It
    brings tokens to their lower bounds, whatever the scores, or raises the value; every bound that
    holds still holds after it.
    """
    least_gain = ROUNDING * plan.scale
    while len(plan.mask) and (
        _single_moves(plan, least_gain) or _chains(plan, least_gain) or _trades(plan, least_gain)
    ):
        pass


def _single_moves(plan: WorkingPlan, least_gain: float) -> bool:
    """Makes the best move of every token, largest gains first; returns whether there was one."""
    best = np.full(len(plan.mask), least_gain)
    moves = np.zeros((len(plan.mask), 2), dtype=np.int64)
    for leaves in range(len(plan.costs)):
        tokens, gains = _replacements(plan, leaves)
        fits = plan.costs - plan.costs[leaves] <= max(plan.left, 0.0)
        gains[:, ~(fits & (plan.costs <= plan.expert_left))] = -np.inf
        joins = gains.argmax(axis=1)
        gain = gains[np.arange(len(tokens)), joins]
        is_better = gain > best[tokens]
        better = tokens[is_better]
        best[better] = gain[is_better]
        moves[better, 0], moves[better, 1] = leaves, joins[is_better]
    moved = False
    for token in np.argsort(-best, kind="stable")[: int((best > least_gain).sum())]:
        leaves, joins = moves[token]
        if plan.fits(leaves, joins):
            plan.replace(token, leaves, joins)
            moved = True
    return moved


def _chains(plan: WorkingPlan, least_gain: float) -> bool:
    """Lets one token take an expert that another leaves for a third; returns whether it could."""
    gains, tokens = _best_replacements(plan)
    gain, middle = np.empty_like(gains), np.empty_like(tokens)
    for leaves in range(len(gains)):
        through = gains[leaves][:, None] + gains
        middle[leaves] = through.argmax(axis=0)
        gain[leaves] = through.max(axis=0)
    moved, touched = False, set[int]()
    for leaves, joins in _in_order(gain, least_gain):
        between = middle[leaves, joins]
        pair = {int(tokens[leaves, between]), int(tokens[between, joins])}
        if len(pair) == 2 and touched.isdisjoint(pair) and plan.fits(leaves, joins):
            plan.replace(int(tokens[between, joins]), between, joins)
            plan.replace(int(tokens[leaves, between]), leaves, between)
            touched |= pair
            moved = True
    return moved


def _trades(plan: WorkingPlan, least_gain: float) -> bool:
    """Lets one token spend what another saves; returns whether it could."""
    gains, tokens = _best_replacements(plan)
    gains[:, plan.costs > plan.expert_left] = -np.inf
    growth = plan.costs - plan.costs[:, None]
    order = np.argsort(growth, axis=None, kind="stable")
    ranked, growths = gains.ravel()[order], growth.ravel()[order]
    best = np.maximum.accumulate(ranked)
    # The best among moves that save enough, for each move.
    partner = np.maximum.accumulate(np.where(ranked == best, np.arange(len(order)), 0))
    num_open = np.searchsorted(growths, max(plan.left, 0.0) - growth, side="right")
    gain = np.where(num_open > 0, gains + best[num_open - 1], -np.inf)
    moved, touched = False, set[int]()
    for leaves, joins in _in_order(gain, least_gain):
        other = order[partner[num_open[leaves, joins] - 1]]
        left, joined = divmod(int(other), len(plan.costs))
        pair = {int(tokens[leaves, joins]), int(tokens[left, joined])}
        if (
            len(pair) == 2
            and touched.isdisjoint(pair)
            and plan.fits_both((leaves, joins), (left, joined))
        ):
            plan.replace(int(tokens[leaves, joins]), leaves, joins)
            plan.replace(int(tokens[left, joined]), left, joined)
            touched |= pair
            moved = True
    return moved


def _in_order(gain: Array, least_gain: float) -> list[tuple[int, int]]:
    """Returns the pairs of columns whose gain exceeds the least, largest first."""
    order = np.argsort(-gain, axis=None, kind="stable")[: int((gain > least_gain).sum())]
    return [divmod(index, gain.shape[1]) for index in order.tolist()]


def _best_replacements(plan: WorkingPlan) -> tuple[Array, Ids]:
    """Returns for each pair of columns the best gain of a token from it, and the token."""
    num_columns = len(plan.costs)
    gains = np.full((num_columns, num_columns), -np.inf)
    movers = np.zeros((num_columns, num_columns), dtype=np.int64)
    for leaves in range(num_columns):
        tokens, gain = _replacements(plan, leaves)
        if len(tokens):
            first = gain.argmax(axis=0)
            movers[leaves] = tokens[first]
            gains[leaves] = gain[first, np.arange(num_columns)]
    return gains, movers


def _replacements(plan: WorkingPlan, leaves: int) -> tuple[Ids, Array]:
    """Returns the tokens with an expert, and what each gains from any other in its place.

    ``-inf`` where the token's own bounds forbid it.
    """
    is_nothing = leaves == len(plan.costs) - 1
    tokens = np.arange(len(plan.mask)) if is_nothing else np.flatnonzero(plan.mask[:, leaves])
    spend = plan.spend[tokens, None] + (plan.costs - plan.costs[leaves])
    is_open = ~plan.mask[tokens] & (spend <= plan.problem.most[tokens, None])
    is_open[:, -1] &= not is_nothing
    gains = plan.scores[tokens] - plan.scores[tokens, leaves, None]
    relief = plan.shortage(tokens, plan.spend[tokens])[:, None] - plan.shortage(tokens, spend)
    # More than any two tokens can lose.
    return tokens, np.where(is_open, gains + 8.0 * plan.scale * relief, -np.inf)
