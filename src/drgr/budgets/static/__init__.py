"""Exact budgets for choices that are made once: which experts stay, how many a layer gets.

Reading order: ``choices`` (items, options, budgets and their normals), ``tangent`` and
``retraction`` (with ``dual_newton``), which together are ``optimizer``; ``gumbel`` and
``choice_knapsack`` (with ``unit_items``) for whole choices; ``relaxation``, ``search``,
``allocation`` and ``pruning`` put them together.
"""

from drgr.budgets.static.allocation import Allocation, Certificate, allocate_experts
from drgr.budgets.static.choice_knapsack import Choice, ChoiceKnapsack
from drgr.budgets.static.choices import ChoiceBudgets, budget_normals, expected_costs
from drgr.budgets.static.gumbel import GumbelChoice, gumbel_noise, straight_through
from drgr.budgets.static.optimizer import (
    DescentState,
    riemannian_adam,
    riemannian_sgd,
    start_descent,
)
from drgr.budgets.static.pruning import Pruning, prune_experts
from drgr.budgets.static.retraction import Retraction, retract
from drgr.budgets.static.search import SearchSettings
from drgr.budgets.static.tangent import normal_basis, project_tangent, transport

__all__ = [
    "Allocation",
    "Certificate",
    "Choice",
    "ChoiceBudgets",
    "ChoiceKnapsack",
    "DescentState",
    "GumbelChoice",
    "Pruning",
    "Retraction",
    "SearchSettings",
    "allocate_experts",
    "budget_normals",
    "expected_costs",
    "gumbel_noise",
    "normal_basis",
    "project_tangent",
    "prune_experts",
    "retract",
    "riemannian_adam",
    "riemannian_sgd",
    "start_descent",
    "straight_through",
    "transport",
]
