"""A router's records without a model: scores less prices, selected inside a budget."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drgr.budgets import TokenBudget, select_exactly
from drgr.routing import LayerRouting, RoutingPlan, expert_load


@pytest.fixture(scope="session")
def route() -> Callable[..., LayerRouting]:
    """Builder of the record of one batch: ``route(scores, budget=..., prices=..., valid=...)``.

    A whole number as the budget gives every token that many experts.
    """
    return _route


def _route(
    scores: Tensor,
    *,
    budget: TokenBudget | int,
    prices: Tensor | None = None,
    valid: Tensor | None = None,
) -> LayerRouting:
    if isinstance(budget, int):
        budget = TokenBudget(minimum=budget, maximum=budget, average=budget)
    values = scores.detach() - (0.0 if prices is None else prices)
    selection = select_exactly(values, budget, valid=valid)
    plan = RoutingPlan(
        expert_ids=selection.expert_ids,
        combine_weights=scores.gather(1, selection.expert_ids) * selection.keep,
        keep=selection.keep,
        expert_load=expert_load(selection.expert_ids, selection.keep, scores.shape[1]),
    )
    return LayerRouting(
        name="layer", scores=scores, values=values, plan=plan, selection=selection, valid=valid
    )


@pytest.fixture(scope="session")
def skewed_scores() -> Callable[..., Tensor]:
    """Sigmoid scores of a router with favourites: ``skewed_scores(num_tokens, num_experts)``."""
    return _skewed_scores


def _skewed_scores(
    num_tokens: int, num_experts: int, *, skew: float = 1.5, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    favour = torch.randn(num_experts, generator=generator) * skew
    return (torch.randn(num_tokens, num_experts, generator=generator) + favour).sigmoid()
