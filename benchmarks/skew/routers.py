"""Synthetic routers with favourites, standing and moving, and what routes their tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from drgr.budgets import TokenBudget, select_exactly
from drgr.routing import LayerRouting, PriceController, RoutingPlan, expert_load

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=1),
}

HOT = 3.0
HOT_STEPS = 40
DRIFT = 0.02
DRIFT_BOUND = 1.5


class Router:
    """Logits of fresh tokens: independent normal numbers plus what the kind of skew favours."""

    def __init__(self, kind: str, *, num_tokens: int, num_experts: int, seed: int) -> None:
        self._kind = kind
        self._shape = (num_tokens, num_experts)
        self._generator = torch.Generator().manual_seed(seed)
        self._favour = torch.zeros(num_experts)
        if kind == "adversarial drift":
            self._favour = torch.linspace(DRIFT_BOUND, -DRIFT_BOUND, num_experts)

    def draw(self, step: int, prices: Tensor) -> Tensor:
        """Returns the logits of a step, ``(T, E)``."""
        noise = torch.randn(self._shape, generator=self._generator)
        return noise + self._favourites(step, prices)

    def _favourites(self, step: int, prices: Tensor) -> Tensor:
        tokens, experts = self._shape
        match self._kind:
            case "balanced":
                return self._favour
            case "Zipf":
                return -torch.arange(1, experts + 1).float().log()
            case "one hot expert":
                return HOT * (torch.arange(experts) == 0)
            case "moving hot spot":
                return HOT * (torch.arange(experts) == step // HOT_STEPS % experts)
            case "two clusters":
                # Four tokens in five want the first half of the experts, the rest the other half.
                is_first = (torch.arange(tokens) < 0.8 * tokens).unsqueeze(1)
                return 2.0 * (is_first == (torch.arange(experts) < experts // 2))
            case "adversarial drift":
                # What is dear becomes unwanted, so that its price is wrong again.
                moved = self._favour - DRIFT * torch.sign(prices)
                self._favour = moved.clamp(-DRIFT_BOUND, DRIFT_BOUND)
                return self._favour
            case _:
                raise ValueError(f"kind must be one of {KINDS}, got {self._kind!r}")


KINDS = (
    "balanced",
    "Zipf",
    "one hot expert",
    "moving hot spot",
    "two clusters",
    "adversarial drift",
)


def route(scores: Tensor, prices: Tensor, top_k: int) -> LayerRouting:
    """Returns the record of one batch in which every token has ``top_k`` experts."""
    values = scores - prices
    budget = TokenBudget(minimum=top_k, maximum=top_k, average=top_k)
    selection = select_exactly(values, budget)
    plan = RoutingPlan(
        expert_ids=selection.expert_ids,
        combine_weights=scores.gather(1, selection.expert_ids),
        keep=selection.keep,
        expert_load=expert_load(selection.expert_ids, selection.keep, scores.shape[1]),
    )
    return LayerRouting(
        name="layer", scores=scores, values=values, plan=plan, selection=selection, valid=None
    )


def loads_on_one_batch(
    controller: PriceController, scores: Tensor, top_k: int, num_updates: int
) -> list[Tensor]:
    """Returns the loads of one batch before the first update and after each."""
    loads = []
    for _ in range(num_updates):
        record = route(scores, controller.prices, top_k)
        loads.append(record.plan.expert_load)
        controller.observe(record)
        controller.update()
    return [*loads, route(scores, controller.prices, top_k).plan.expert_load]


def favoured_logits(num_tokens: int, num_experts: int, *, skew: float, seed: int) -> Tensor:
    """Returns logits of one batch whose experts differ by a normal number of scale ``skew``."""
    generator = torch.Generator().manual_seed(seed)
    favour = torch.randn(num_experts, generator=generator) * skew
    return torch.randn(num_tokens, num_experts, generator=generator) + favour
