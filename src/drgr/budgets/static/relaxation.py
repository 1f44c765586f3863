r"""Probabilities instead of whole choices: budgets turned into equations that logits can meet.

- A budget that no allowed choice can miss is left out.
- A limit at an end of what choices can cost decides them: the other options are forbidden, because
  logits would have to be infinite.
- A limit that need not be spent gets one more item, whose second option costs all that can be left
  over: ``spent + unspent = limit`` in expectation. The loss does not see it.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.budgets.static.choices import ChoiceBudgets, checked_logits

# Logit of leaving everything unspent when the search begins: 2 % of it is.
_UNSPENT = -4.0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relaxation:
    """Logits and the equations that they must meet."""

    logits: Tensor
    """Those of ``N`` items, then of the unspent parts of budgets, shape ``(N + s, K)``."""
    budgets: ChoiceBudgets | None
    """None where every choice is inside the budgets."""
    kept: tuple[int, ...]
    """Which of the given budgets are left."""
    num_items: int
    """``N``."""


def relax(logits: Tensor, budgets: ChoiceBudgets, *, exactly: bool) -> Relaxation:
    """Turns budgets for whole choices into equations for their expected costs.

    Args:
        logits: First logits, finite or ``-inf``, shape ``(N, K)``.
        budgets: Costs and limits, which some whole choice meets.
        exactly: Whether limits must be spent.

    Raises:
        ValueError: If the logits do not fit the budgets.
    """
    logits = checked_logits(logits, budgets)
    open_budgets = list(range(len(budgets.costs)))
    settled = True
    while settled:
        settled = False
        for index in list(open_budgets):
            decided = _decided(logits, budgets, index, exactly=exactly)
            if decided is not None:
                logits, settled = decided, True
                open_budgets.remove(index)
    num_items = len(logits)
    if not open_budgets:
        return Relaxation(logits=logits, budgets=None, kept=(), num_items=num_items)
    left = ChoiceBudgets(budgets.costs[open_budgets], budgets.limit_vector[open_budgets])
    if not exactly:
        logits, left = _with_unspent(logits, left)
    return Relaxation(logits=logits, budgets=left, kept=tuple(open_budgets), num_items=num_items)


def _decided(logits: Tensor, budgets: ChoiceBudgets, index: int, *, exactly: bool) -> Tensor | None:
    """Returns the logits without the options that a budget rules out; None where it is open."""
    low, high = (ends[index] for ends in budgets.range_of_items(logits))
    limit = budgets.limit_vector[index]
    costs = budgets.costs[index]
    if bool((low == high).all()) or (not exactly and bool(limit >= high.sum())):
        return logits
    if bool(limit <= low.sum()):
        return torch.where(costs > low.unsqueeze(-1), -torch.inf, logits)
    if bool(limit >= high.sum()):
        return torch.where(costs < high.unsqueeze(-1), -torch.inf, logits)
    return None


def _with_unspent(logits: Tensor, budgets: ChoiceBudgets) -> tuple[Tensor, ChoiceBudgets]:
    low, _ = budgets.range_of_items(logits)
    room = budgets.limit_vector - low.sum(dim=-1)
    rest = logits.new_full((len(room), logits.shape[1]), -torch.inf)
    rest[:, 0], rest[:, 1] = 0.0, _UNSPENT
    costs = budgets.costs.new_zeros(len(room), len(room), logits.shape[1])
    costs[:, :, 1] = room.diag()
    wider = ChoiceBudgets(torch.cat([budgets.costs, costs], dim=1), budgets.limit_vector)
    return torch.cat([logits, rest]), wider
