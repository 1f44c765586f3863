"""A budget of its own for each layer, ``k_l`` experts a token on average in layer ``l``.

Schedules over depth (DynaMoE's six names among them) are compared at the same total, the sum of
``k_l``.
"""

from collections.abc import Sequence

from drgr.budgets import TokenBudget
from drgr.routing.place import LayerPlace
from drgr.routing.selection.budgeted import BudgetedSelector
from drgr.routing.selection.selector import SelectorFactory


def layer_budgets(budgets: Sequence[TokenBudget], *, smoothing: float = 0.9) -> SelectorFactory:
    """Returns what builds the exact budgeted selection of each layer, with that layer's budget.

    Args:
        budgets: One for each MoE layer, lowest first.
        smoothing: Share of the price's average that a step keeps, in [0, 1).

    Returns:
        A factory that raises ``ValueError`` where the model has another number of MoE layers.
    """
    kept = tuple(budgets)

    def build(place: LayerPlace) -> BudgetedSelector:
        if len(kept) != place.num_layers:
            raise ValueError(
                f"budgets must have one entry for each of the {place.num_layers} MoE layers, got "
                f"{len(kept)}"
            )
        return BudgetedSelector(kept[place.number], smoothing=smoothing, device=place.device)

    return build
