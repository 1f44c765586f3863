"""One MoE layer's routing after its scores: prices, then a selection."""

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection
from drgr.routing.controllers import PriceController
from drgr.routing.plan import LayerRouting
from drgr.routing.selection import SelectionInputs, Selector

ControllerFactory = Callable[[int, torch.device], PriceController]
"""Builds a controller for a number of experts on a device."""


@final
class RoutingPolicy:
    """Holds the state of one layer: its expert prices and its selection.

    Args:
        selector: Decides which experts run.
        controller: Moves the expert prices.
        group: Processes that share a training batch.
    """

    def __init__(
        self,
        *,
        selector: Selector,
        controller: PriceController,
        group: ProcessGroup | None = None,
    ) -> None:
        self.selector = selector
        self.controller = controller
        self.group = group

    def price_scores(self, scores: Tensor) -> Tensor:
        """Returns each assignment's worth, scores less expert prices, ``(T, E)``, detached."""
        return scores.detach().float() - self.controller.prices

    def select(
        self,
        values: Tensor,
        *,
        scores: Tensor,
        valid: Tensor | None,
        exact: bool,
        is_open: Tensor | None = None,
        sequence_length: int | None = None,
    ) -> Selection:
        """Chooses the experts of each token; see :class:`SelectionInputs` for the arguments."""
        return self.selector.select(
            SelectionInputs(
                values=values,
                scores=scores.detach(),
                valid=valid,
                is_open=is_open,
                sequence_length=sequence_length,
                exact=exact,
                group=self.group,
            )
        )

    def observe(self, routing: LayerRouting) -> None:
        """Takes in one training micro-batch."""
        self.controller.observe(routing)
        self.selector.observe(routing)

    def update(self) -> None:
        """Moves all prices, once for each optimizer step."""
        self.controller.update(self.group)
        self.selector.update(self.group)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the prices of the layer."""
        return {
            "controller": self.controller.state_dict(),
            "selector": self.selector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Restores :meth:`state_dict`."""
        self.controller.load_state_dict(state["controller"])
        self.selector.load_state_dict(state["selector"])
