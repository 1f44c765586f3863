"""Selections: which experts of a token run, given what each is worth.

``budgeted`` holds an average exactly over the batch, ``sequence`` over each sequence, ``layers``
and ``progressive`` one that depends on layer or step, ``quantile_threshold`` nearly and without
looking at other tokens. ``top_p`` and ``threshold`` hold bounds of a token only. At evaluation
every token decides alone in all of them.
"""

from drgr.routing.selection.budgeted import BudgetedSelector
from drgr.routing.selection.layers import layer_budgets
from drgr.routing.selection.open_experts import OpenExperts
from drgr.routing.selection.percentile import batch_percentile
from drgr.routing.selection.progressive import (
    BudgetSchedule,
    ProgressiveSelector,
    sparsification,
)
from drgr.routing.selection.quantile_threshold import QuantileSelector
from drgr.routing.selection.selector import SelectionInputs, Selector, SelectorFactory
from drgr.routing.selection.sequence import SequenceSelector
from drgr.routing.selection.threshold import ThresholdSelector
from drgr.routing.selection.top_p import TopPSelector

__all__ = [
    "BudgetSchedule",
    "BudgetedSelector",
    "OpenExperts",
    "ProgressiveSelector",
    "QuantileSelector",
    "SelectionInputs",
    "Selector",
    "SelectorFactory",
    "SequenceSelector",
    "ThresholdSelector",
    "TopPSelector",
    "batch_percentile",
    "layer_budgets",
    "sparsification",
]
