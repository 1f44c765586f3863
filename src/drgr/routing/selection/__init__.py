"""Selections: which experts of a token run, given what each is worth."""

from drgr.routing.selection.budgeted import BudgetedSelector
from drgr.routing.selection.open_experts import OpenExperts
from drgr.routing.selection.selector import SelectionInputs, Selector, SelectorFactory

__all__ = ["BudgetedSelector", "OpenExperts", "SelectionInputs", "Selector", "SelectorFactory"]
