"""What selections share that hold a budget in training and its learned price at evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection, TokenBudget
from drgr.routing.batch_price import BatchPrice
from drgr.routing.plan import LayerRouting
from drgr.routing.selection.selector import SelectionInputs
from drgr.routing.selection.tally import check_selector_state


class PricedSelector(ABC):
    """A :class:`~drgr.routing.selection.Selector` of which a subclass says how it chooses.

    Args:
        budget: Bounds of a token, and the average of whatever the subclass holds it over.
        smoothing: Share of the price's average that a step keeps, in [0, 1).
        device: Where the price lives.

    Raises:
        ValueError: If ``smoothing`` is out of range.
    """

    def __init__(
        self, budget: TokenBudget, *, smoothing: float = 0.9, device: torch.device | None = None
    ) -> None:
        self.budget = budget
        self._batch_price = BatchPrice(smoothing=smoothing, device=device)

    @property
    def maximum(self) -> int:
        """Most experts of a token."""
        return self.budget.maximum

    @property
    def price(self) -> Tensor | None:
        """The learned price; ``None`` before the first step."""
        return self._batch_price.value

    @abstractmethod
    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses; see :class:`~drgr.routing.selection.Selector`."""

    def observe(self, routing: LayerRouting) -> None:
        """Keeps the price that the micro-batch was selected at."""
        self._batch_price.observe(routing)

    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves the price's average; it is the same on every process already."""
        del group
        self._batch_price.update()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the price."""
        return self._batch_price.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the price."""
        check_selector_state(self, state, "price")
        self._batch_price.load_state_dict(dict(state))
