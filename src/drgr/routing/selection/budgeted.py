"""The exact budgeted selection, and its frozen price at evaluation."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection, TokenBudget, select_at_price, select_exactly
from drgr.routing.batch_price import BatchPrice
from drgr.routing.plan import LayerRouting
from drgr.routing.selection.selector import SelectionInputs
from drgr.routing.selection.tally import check_selector_state


@final
class BudgetedSelector:
    """Selects the best plan inside a budget in training, at the learned price at evaluation.

    A fixed number ``k`` of experts is the budget ``minimum = maximum = average = k``. A percentile
    over all scores of a batch is :func:`~drgr.routing.selection.batch_percentile`.

    Args:
        budget: The plans that are allowed.
        smoothing: Share of the price's average that a step keeps, in [0, 1).
        device: Where the price lives.
    """

    def __init__(
        self,
        budget: TokenBudget,
        *,
        smoothing: float = 0.9,
        device: torch.device | None = None,
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

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses exactly over the batch of all processes, or each token alone."""
        if inputs.exact:
            return select_exactly(
                inputs.values, self.budget, valid=inputs.valid, group=inputs.group
            )
        return select_at_price(inputs.values, self.budget, price=self.price, valid=inputs.valid)

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
