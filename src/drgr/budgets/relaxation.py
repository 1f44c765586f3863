r"""The linear relaxation of hard selection: its prices, and the bound that any prices give.

With a batch price ``nu`` and expert prices ``beta`` every token chooses alone, and

.. math:: h(\nu, \beta) = \nu C + \sum_e \beta_e C_e
          + \sum_t \max_{m_t} \sum_e (s_{te} - c_e (\nu + \beta_e)) m_{te}

bounds the value of every plan from above, whatever the prices, if ``m_t`` runs over a set that
contains the token's plans. Here it is the fractional plans: ``0 <= m <= 1`` with a cost between
``low`` and ``high``. The best of those takes experts in the order of density ``s / c``.

Everything here runs on the host, in NumPy and float64.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Ids = NDArray[np.int64]

# Differences below this share of the amounts compared are rounding.
ROUNDING = 1e-12


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Scores and bounds in one unit of cost; ``total`` and ``capacity`` may be infinite."""

    scores: Array
    """Shape ``(T, E)``; ``-inf`` forbids."""
    costs: Array
    low: Array
    """Shape ``(T,)``, at most ``high``."""
    high: Array
    """Shape ``(T,)``, at most the cost of all allowed experts."""
    total: float
    capacity: Array
    """Shape ``(E,)``."""
    slack: float
    """Share of a bound by which a cost may exceed it and still count as inside."""

    @property
    def allowed(self) -> Mask:
        """Which assignments may run, shape ``(T, E)``."""
        return self.scores > -np.inf

    @property
    def least(self) -> Array:
        """``low`` less the slack."""
        return self.low * (1 - self.slack)

    @property
    def most(self) -> Array:
        """``high`` plus the slack."""
        return self.high * (1 + self.slack)


class Choice(NamedTuple):
    """What each token takes at some price; entries of shape ``(T,)``."""

    pick: NDArray[np.int64] | Array
    """How the choice is told from others of the token: an index, or the cost itself."""
    value: Array
    cost: Array

    def worth(self, price: float) -> float:
        """Returns the value of all tokens after paying ``price`` for each unit of cost."""
        return float(self.value.sum() - price * self.cost.sum())


class Options(Protocol):
    """The plans that each token can choose from."""

    def at_price(self, price: float) -> Choice:
        """Returns each token's best plan when a unit of cost has a price."""

    def cheapest(self) -> Choice:
        """Returns each token's plan of least cost."""


class Split(NamedTuple):
    """The price at which the batch bound is met, between two choices that are both best there."""

    price: float
    cheap: Choice
    """Costs at most the bound."""
    dear: Choice
    """Costs more than the bound, or is ``cheap`` where the bound is slack."""
    bound: float
    """``h`` at the price, which is its minimum."""


def batch_split(options: Options, total: float, slack: float) -> Split:
    """Minimises the dual in the batch price.

    The dual is convex and piecewise linear in the price. Each step goes to where the lines of the
    best choices on both sides of the minimum meet, and ends where no choice is better there.

    Args:
        options: The tokens' plans; the cheapest cost at most ``total`` together.
        total: Most cost of the batch.
        slack: Share by which the cost may exceed it.
    """
    dear = options.at_price(0.0)
    if dear.cost.sum() <= total * (1 + slack):
        return Split(0.0, dear, dear, dear.worth(0.0))
    cheap = options.cheapest()
    while True:
        gain = dear.worth(0.0) - cheap.worth(0.0)
        price = max(0.0, gain / float(dear.cost.sum() - cheap.cost.sum()))
        between = options.at_price(price)
        scale = float(np.abs(between.value).sum()) + price * float(between.cost.sum())
        if between.worth(price) <= cheap.worth(price) + ROUNDING * scale:
            return Split(price, cheap, dear, price * total + between.worth(price))
        if between.cost.sum() <= total * (1 + slack):
            cheap = between
        else:
            dear = between


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FractionalRows:
    """The fractional plans of each token, experts in the order of density; ``(T, E)`` arrays."""

    order: Ids
    """Experts, densest first; equal ones by position."""
    density: Array
    """Score per unit of cost less the expert's price, ``-inf`` for forbidden experts."""
    width: Array
    """Cost of the expert in that place, 0 for forbidden ones."""
    low: Array
    high: Array

    def at_price(self, price: float) -> Choice:
        """Returns the best cost of each token: all above the price, within its bounds."""
        wanted = np.where(self.density > price, self.width, 0.0).sum(axis=1)
        return self._with_cost(np.clip(wanted, self.low, self.high))

    def cheapest(self) -> Choice:
        """Returns the best plans that cost ``low``."""
        return self._with_cost(self.low)

    def amounts(self, spend: Array) -> Array:
        """Returns the cost of each expert in the best plan of a given cost, ``(T, E)``."""
        before = self.width.cumsum(axis=1) - self.width
        amounts = np.zeros_like(self.width)
        taken = np.clip(spend[:, None] - before, 0.0, self.width)
        np.put_along_axis(amounts, self.order, taken, axis=1)
        return amounts

    def own_price(self, price: float) -> Array:
        """Returns what each token's own bound adds to the price, ``(T,)``.

        Above 0 where ``high`` refuses an expert that is denser than the price, below where ``low``
        keeps one that is not.
        """
        spend = self.at_price(price).cost[:, None]
        end = self.width.cumsum(axis=1)
        rounding = ROUNDING * self.width.sum(axis=1, keepdims=True)
        is_kept = (self.width > 0) & (end - self.width < spend - rounding)
        is_refused = (self.width > 0) & (end > spend + rounding)
        worst = np.where(is_kept, self.density, np.inf).min(axis=1) - price
        refused = np.where(is_refused, self.density, -np.inf).max(axis=1) - price
        own: Array = np.minimum(np.maximum(refused, 0.0), worst)
        return own

    def _with_cost(self, spend: Array) -> Choice:
        before = self.width.cumsum(axis=1) - self.width
        taken = np.clip(spend[:, None] - before, 0.0, self.width)
        density = np.where(self.width > 0, self.density, 0.0)
        return Choice(spend, (taken * density).sum(axis=1), spend)


def fractional_rows(problem: Problem, expert_price: Array) -> FractionalRows:
    """Returns the fractional plans of each token at given prices of the experts."""
    density = problem.scores / problem.costs - expert_price
    order = np.argsort(-density, axis=1, kind="stable")
    ranked = np.take_along_axis(density, order, axis=1)
    return FractionalRows(
        order=order,
        density=ranked,
        width=np.where(ranked > -np.inf, problem.costs[order], 0.0),
        low=problem.low,
        high=problem.high,
    )


def dual_bound(problem: Problem, batch_price: float, expert_price: Array) -> float:
    """Returns ``h`` at any prices of at least 0: no plan inside the budget is worth more."""
    priced = fractional_rows(problem, expert_price)
    bound = priced.at_price(batch_price).worth(batch_price)
    if batch_price > 0:
        bound += batch_price * problem.total
    is_priced = expert_price > 0
    return bound + math.fsum(expert_price[is_priced] * problem.capacity[is_priced])
