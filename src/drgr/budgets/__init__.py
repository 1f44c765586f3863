"""Hard compute budgets: what a batch may spend, and the best plan inside it.

Reading order: ``budget`` (a set of plans with any costs), ``projection`` and ``entropic`` (soft
gates onto it), ``optimal_plan`` (the best hard plan in it), ``token_budget`` (the set that training
uses: equal costs, an average over the batch), ``selection`` (the best plan in that, exact in
training and causal at evaluation), ``flops`` (what a plan costs), ``schedules`` (budgets by layer
and step). ``static`` has choices that are made once, such as which experts stay.
"""

from drgr.budgets.budget import Budget
from drgr.budgets.budget_selection import BudgetSelection
from drgr.budgets.entropic import project_entropic
from drgr.budgets.optimal_plan import select
from drgr.budgets.projection import BudgetProjection, project
from drgr.budgets.schedules import layer_counts, layer_profile, progressive_budgets
from drgr.budgets.selection import Selection, rank_experts, select_at_price, select_exactly
from drgr.budgets.token_budget import TokenBudget, budget_from_flops

__all__ = [
    "Budget",
    "BudgetProjection",
    "BudgetSelection",
    "Selection",
    "TokenBudget",
    "budget_from_flops",
    "layer_counts",
    "layer_profile",
    "progressive_budgets",
    "project",
    "project_entropic",
    "rank_experts",
    "select",
    "select_at_price",
    "select_exactly",
]
