"""Hard compute budgets: what a batch may spend, and the best plan inside it.

Reading order: ``token_budget`` (the set of plans), ``selection`` (the best plan in it, exact in
training and causal at evaluation), ``flops`` (what a plan costs).
"""

from drgr.budgets.selection import Selection, rank_experts, select_at_price, select_exactly
from drgr.budgets.token_budget import TokenBudget, budget_from_flops

__all__ = [
    "Selection",
    "TokenBudget",
    "budget_from_flops",
    "rank_experts",
    "select_at_price",
    "select_exactly",
]
