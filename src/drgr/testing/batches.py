"""Random batches that the checks route, and how they are compared."""

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from drgr.budgets import Selection, TokenBudget, select_exactly
from drgr.routing import LayerRouting, RoutingPlan, expert_load

FIXED = TokenBudget(minimum=2, maximum=2, average=2)


class ConformanceError(AssertionError):
    """A method does not keep what its interface promises."""


def fail(subject: object, promise: str, found: str) -> NoReturn:
    """Raises :class:`ConformanceError`, naming who broke which promise and how."""
    name = getattr(subject, "__name__", None) or type(subject).__name__
    raise ConformanceError(f"{name} must keep this promise: {promise}; {found}")


def check_close(
    subject: object,
    promise: str,
    actual: Tensor,
    expected: Tensor,
    *,
    tolerance: float = 1e-5,
) -> None:
    """Fails unless two tensors agree; equal NaN and infinities agree."""
    if actual.shape != expected.shape:
        fail(subject, promise, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ")
    same = torch.isclose(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    if not bool(same.all()):
        worst = (actual.double() - expected.double()).abs().max().item()
        fail(subject, promise, f"the largest difference is {worst:.3g}")


def skewed_logits(num_tokens: int, num_experts: int, *, seed: int) -> Tensor:
    """Logits of a router with favourites, shape ``(T, E)``, float32."""
    generator = torch.Generator().manual_seed(seed)
    favour = 1.5 * torch.randn(num_experts, generator=generator)
    return torch.randn(num_tokens, num_experts, generator=generator) + favour


def random_mask(num_tokens: int, *, seed: int) -> Tensor:
    """About one token in four is padding, bool, shape ``(T,)``; the first is real."""
    mask = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.75
    mask[0] = True
    return mask


def plan_of(scores: Tensor, selection: Selection) -> RoutingPlan:
    """The plan of a selection, weighed by plain scores."""
    chosen = scores.gather(1, selection.expert_ids)
    return RoutingPlan(
        expert_ids=selection.expert_ids,
        combine_weights=torch.where(selection.keep, chosen, 0.0),
        keep=selection.keep,
        expert_load=expert_load(selection.expert_ids, selection.keep, scores.shape[1]),
    )


def routed(
    logits: Tensor,
    *,
    prices: Tensor | None = None,
    valid: Tensor | None = None,
    budget: TokenBudget = FIXED,
) -> LayerRouting:
    """The record of one batch: sigmoid scores less prices, selected inside a budget."""
    scores = logits.sigmoid()
    values = scores.detach() - (0.0 if prices is None else prices)
    selection = select_exactly(values, budget, valid=valid)
    return LayerRouting(
        name="layer",
        scores=scores,
        values=values,
        plan=plan_of(scores, selection),
        selection=selection,
        valid=valid,
        logits=logits,
    )


def rows_of(routing: LayerRouting, rows: slice) -> LayerRouting:
    """The part of a record that belongs to some of its tokens, as a process of its own sees it."""
    plan, num_experts = routing.plan, routing.scores.shape[1]
    ids, keep = plan.expert_ids[rows], plan.keep[rows]
    part = RoutingPlan(
        expert_ids=ids,
        combine_weights=plan.combine_weights[rows],
        keep=keep,
        expert_load=expert_load(ids, keep, num_experts),
    )
    return replace(
        routing,
        scores=routing.scores[rows],
        values=routing.values[rows],
        plan=part,
        valid=None if routing.valid is None else routing.valid[rows],
        logits=None if routing.logits is None else routing.logits[rows],
    )
