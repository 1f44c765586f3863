"""One MoE layer's routing: scores less prices, selected inside a budget."""

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection, TokenBudget, select_at_price, select_exactly
from drgr.routing.batch_price import BatchPrice
from drgr.routing.controllers import PriceController
from drgr.routing.plan import LayerRouting

ControllerFactory = Callable[[int, torch.device], PriceController]
"""Builds a controller for a number of experts on a device."""


@final
class RoutingPolicy:
    """Holds the state of one layer: its budget, its expert prices and its batch price.

    Args:
        budget: The plans that are allowed.
        controller: Moves the expert prices.
        batch_price: Learns the price that evaluation uses.
        group: Processes that share a training batch.
    """

    def __init__(
        self,
        *,
        budget: TokenBudget,
        controller: PriceController,
        batch_price: BatchPrice,
        group: ProcessGroup | None = None,
    ) -> None:
        self.budget = budget
        self.controller = controller
        self.batch_price = batch_price
        self._group = group

    def price_scores(self, scores: Tensor) -> Tensor:
        """Returns each assignment's worth, scores less expert prices, ``(T, E)``, detached."""
        return scores.detach().float() - self.controller.prices

    def select(self, values: Tensor, *, valid: Tensor | None, exact: bool) -> Selection:
        """Chooses the experts of each token.

        Args:
            values: Worth of each assignment, shape ``(T, E)``.
            valid: Which tokens are real, shape ``(T,)``; ``None`` where all are.
            exact: Whether the batch meets its budget exactly (training), or every token decides
                alone at the frozen price (evaluation).
        """
        if exact:
            return select_exactly(values, self.budget, valid=valid, group=self._group)
        return select_at_price(values, self.budget, price=self.batch_price.value, valid=valid)

    def observe(self, routing: LayerRouting) -> None:
        """Takes in one training micro-batch."""
        self.controller.observe(routing)
        self.batch_price.observe(routing)

    def update(self) -> None:
        """Moves all prices, once for each optimizer step."""
        self.controller.update(self._group)
        self.batch_price.update()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the prices of the layer."""
        return {
            "controller": self.controller.state_dict(),
            "batch_price": self.batch_price.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Restores :meth:`state_dict`."""
        self.controller.load_state_dict(state["controller"])
        self.batch_price.load_state_dict(state["batch_price"])
