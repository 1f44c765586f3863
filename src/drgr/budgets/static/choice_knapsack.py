r"""The best whole choices inside budgets: the multiple-choice knapsack, solved exactly.

    max sum_i v_{i k(i)}   subject to   sum_i c_{j i k(i)} <= B_j  (or = B_j) for all j

Costs are whole numbers. Each item's least cost is spent in any case and a common divisor is taken
out; budgets that share no item are problems of their own. One such problem is a dynamic programme
over what is spent,

    T_0 = 0 at nothing spent, -inf elsewhere       T_i[s] = max_k T_{i-1}[s - c_ik] + v_ik

or, where every item is taken for one unit or left, a choice of the largest gains (``unit_items``).
"""

from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drgr.budgets.static.unit_items import Exhausted, best_unit_items
from drgr.errors import InfeasibleBudgetError

_LARGEST_TABLE = 2**29
_LARGEST_WHOLE = 2.0**53

_Costs = NDArray[np.int64]
_Values = NDArray[np.float64]


class Choice(NamedTuple):
    """The best choice of all items."""

    options: Tensor
    """Option of each item, int64, shape ``(N,)``."""
    value: float
    """Sum of the values of the options, the largest of all choices inside the budgets."""
    spend: Tensor
    """Cost of the choice, int64, shape ``(m,)``."""


class _Part(NamedTuple):
    """Items and budgets that belong together, with least costs and common divisors taken out."""

    items: NDArray[np.intp]
    costs: _Costs
    """Shape ``(m', N', K)``."""
    caps: _Costs
    """Shape ``(m',)``."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ChoiceKnapsack:
    r"""Finds the choice of highest value inside budgets in whole units; built once, used often.

    Args:
        costs: Whole numbers, shape ``(N, K)`` for one budget or ``(m, N, K)``.
        limits: Most that may be spent: a number, or a tensor of shape ``(m,)``. Rounded down.
        exactly: Whether each limit must be spent to the last unit.

    Raises:
        ValueError: If shapes do not fit, a cost is not a whole number below ``2^53``, or the table
            of the dynamic programme would exceed ``2^29`` entries.
        InfeasibleBudgetError: If the cheapest options exceed a limit, or ``exactly`` asks for what
            no choice costs by its divisor alone.

    Examples:
        >>> import torch
        >>> costs = torch.tensor([[0, 2], [0, 3], [0, 4]])
        >>> best = ChoiceKnapsack(costs, 6).best(torch.tensor([[0.0, 3.0], [0.0, 5.0], [0.0, 4.0]]))
        >>> best.options, best.value, best.spend
        (tensor([1, 1, 0]), 8.0, tensor([5]))
    """

    costs: Tensor
    limits: Tensor | float
    exactly: bool = False
    _parts: tuple[_Part, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        costs = _whole(self.costs)
        limits = torch.as_tensor(self.limits, dtype=torch.float64).reshape(-1)
        if len(limits) != len(costs):
            raise ValueError(
                f"limits must hold one number for each of {len(costs)} budgets, got {len(limits)}"
            )
        if not bool(limits.isfinite().all()):
            raise ValueError(
                f"limits must be finite, got {limits.tolist()}; leave such budgets out"
            )
        object.__setattr__(self, "costs", torch.from_numpy(costs))
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "_parts", _parts_of(costs, limits.numpy(), exactly=self.exactly))

    def best(self, values: Tensor) -> Choice:
        r"""Returns the choice of highest total value; equal ones in favour of earlier options.

        Args:
            values: Value of each option, finite or ``-inf`` for a forbidden one, shape ``(N, K)``.

        Raises:
            ValueError: If the shape differs, an entry is NaN or ``inf``, or an item has no option.
            InfeasibleBudgetError: If no choice is inside the budgets.

        Complexity:
            ``O(N K prod_j (B_j + 1))`` time and ``N prod_j (B_j + 1)`` bytes, after divisors are
            taken out, for budgets that share items; ``O(N log N)`` for items of one unit.
        """
        table = self._checked(values)
        options = table.argmax(axis=1)
        try:
            for part in self._parts:
                inside = table[part.items]
                if _is_unit(part):
                    found = best_unit_items(
                        inside, part.costs[0], int(part.caps[0]), exactly=self.exactly
                    )
                else:
                    found = _best_by_table(inside, part, exactly=self.exactly)
                options[part.items] = found
        except Exhausted:
            raise InfeasibleBudgetError(_none_inside(self.limits, exactly=self.exactly)) from None
        picked = torch.from_numpy(options)
        value = float(table[np.arange(len(table)), options].sum())
        return Choice(picked, value, self.spend(picked))

    def spend(self, options: Tensor) -> Tensor:
        """Returns what a choice costs each budget, int64, shape ``(m,)``."""
        chosen = options.expand(self.costs.shape[:2]).unsqueeze(-1)
        return self.costs.gather(-1, chosen).squeeze(-1).sum(dim=-1)

    def _checked(self, values: Tensor) -> _Values:
        if values.shape != self.costs.shape[1:]:
            raise ValueError(
                f"values must have the shape (N, K) of costs, {tuple(self.costs.shape[1:])}, "
                f"got {tuple(values.shape)}"
            )
        table = values.detach().double().cpu().numpy()
        if not (table < np.inf).all():
            index = tuple(int(place) for place in np.argwhere(~(table < np.inf))[0])
            raise ValueError(
                f"values must be finite or -inf, got {table[index]} at index {index}; repair it"
            )
        stuck = np.flatnonzero((table == -np.inf).all(axis=1))
        if len(stuck):
            raise ValueError(
                f"values must leave an option to every item, got -inf in all of item {stuck[0]}"
            )
        return table


def _whole(costs: Tensor) -> _Costs:
    if costs.dim() not in (2, 3) or 0 in costs.shape[-2:]:
        raise ValueError(
            f"costs must have shape (N, K) or (m, N, K) with N, K >= 1, got {tuple(costs.shape)}"
        )
    numbers = costs.detach().double().cpu()
    right = (numbers == numbers.round()) & (numbers.abs() < _LARGEST_WHOLE)
    if not bool(right.all()):
        index = tuple((~right).nonzero()[0].tolist())
        raise ValueError(
            f"costs must be whole numbers below 2^53, got {numbers[index].item()} at index "
            f"{index}; give them in a unit of which all are multiples"
        )
    whole = numbers.long().numpy()
    return whole[None] if whole.ndim == 2 else whole


def _parts_of(costs: _Costs, limits: _Values, *, exactly: bool) -> tuple[_Part, ...]:
    """Takes least costs and divisors out and separates budgets that share no item."""
    base = costs.min(axis=2)
    above = costs - base[:, :, None]
    room = limits - base.sum(axis=1)
    _check_room(limits, room, base.sum(axis=1))
    divisors = np.gcd.reduce(above.reshape(len(above), -1), axis=1)
    if exactly:
        _check_divisible(limits, room, divisors)
    units = np.maximum(divisors, 1)
    reduced = above // units[:, None, None]
    most = reduced.max(axis=2).sum(axis=1)
    caps = np.minimum(np.floor(room), np.where(exactly, room, most * units)).astype(np.int64)
    caps //= units
    parts = []
    for budgets, items in _groups(reduced.max(axis=2) > 0):
        part = _Part(items, reduced[np.ix_(budgets, items)], caps[budgets])
        cells = len(items) * np.prod((part.caps + 1).astype(float))
        if cells > _LARGEST_TABLE and not _is_unit(part):
            raise ValueError(
                f"limits must leave a table of at most 2^29 entries, got {cells:.3g} for "
                f"{len(items)} items under {len(budgets)} budgets that share them; "
                "give costs in larger units or separate the budgets"
            )
        parts.append(part)
    return tuple(parts)


def _is_unit(part: _Part) -> bool:
    return bool(part.costs.shape[0] == 1 and part.costs.shape[2] == 2 and part.costs.max() == 1)


def _check_room(limits: _Values, room: _Values, least: _Costs) -> None:
    short = np.flatnonzero(room < 0)
    if len(short):
        index = short[0]
        raise InfeasibleBudgetError(
            f"limits must be at least the cost of the cheapest options, {least[index]}, "
            f"got {limits[index]:g} for budget {index}; raise it"
        )


def _check_divisible(limits: _Values, room: _Values, divisors: _Costs) -> None:
    """A divisor of 0 stands for a budget that every choice spends alike."""
    rest = np.where(divisors > 0, room % np.maximum(divisors, 1), room)
    wrong = np.flatnonzero(rest != 0)
    if len(wrong):
        index = wrong[0]
        raise InfeasibleBudgetError(
            f"limits must be what some choice costs, got {limits[index]:g} for budget {index}, "
            f"where choices differ by multiples of {divisors[index]}; "
            "take another limit or spend at most that"
        )


def _groups(touches: NDArray[np.bool_]) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Returns the connected groups of budgets and items, ``touches`` being ``(m, N)``."""
    groups, left = [], set(np.flatnonzero(touches.any(axis=1)).tolist())
    while left:
        budgets = {left.pop()}
        items = touches[list(budgets)].any(axis=0)
        while joined := {j for j in left if (touches[j] & items).any()}:
            left -= joined
            budgets |= joined
            items = touches[list(budgets)].any(axis=0)
        groups.append((np.array(sorted(budgets)), np.flatnonzero(items)))
    return groups


def _best_by_table(values: _Values, part: _Part, *, exactly: bool) -> NDArray[np.intp]:
    shape = tuple(int(cap) + 1 for cap in part.caps)
    best = np.full(shape, -np.inf)
    best[(0,) * len(shape)] = 0.0
    num_items, num_options = values.shape
    taken = np.zeros((num_items, *shape), dtype=np.min_scalar_type(num_options))
    for item in range(num_items):
        nearer = np.full(shape, -np.inf)
        for option in range(num_options):
            cost = part.costs[:, item, option]
            if values[item, option] == -np.inf or (cost > part.caps).any():
                continue
            target = nearer[tuple(slice(c, None) for c in cost)]
            source = best[tuple(slice(0, size - c) for c, size in zip(cost, shape, strict=True))]
            trial = source + values[item, option]
            better = trial > target
            target[better] = trial[better]
            taken[item][tuple(slice(c, None) for c in cost)][better] = option
        best = nearer
    cell = np.array(shape) - 1
    if not exactly:
        cell = np.array(np.unravel_index(best.argmax(), shape))
    if best[tuple(cell)] == -np.inf:
        raise Exhausted
    options = np.zeros(num_items, dtype=np.intp)
    for item in reversed(range(num_items)):
        options[item] = taken[(item, *cell)]
        cell = cell - part.costs[:, item, options[item]]
    return options


def _none_inside(limits: Tensor | float, *, exactly: bool) -> str:
    shown = torch.as_tensor(limits).tolist()
    if exactly:
        return (
            f"limits must be what some allowed choice costs, got {shown}, which none spends to the "
            "last unit; take another limit or spend at most that"
        )
    return (
        f"limits must be at least what some allowed choice costs, got {shown}; raise them or allow "
        "cheaper options"
    )
