"""The exact budgeted selection, and its frozen price at evaluation."""

from typing import final

from drgr.budgets import Selection, select_at_price, select_exactly
from drgr.routing.selection.priced import PricedSelector
from drgr.routing.selection.selector import SelectionInputs


@final
class BudgetedSelector(PricedSelector):
    """Selects the best plan inside a budget in training, at the learned price at evaluation.

    A fixed number ``k`` of experts is the budget ``minimum = maximum = average = k``. A percentile
    over all scores of a batch is :func:`~drgr.routing.selection.batch_percentile`.

    Args:
        budget: The plans that are allowed.
        smoothing: Share of the price's average that a step keeps, in [0, 1).
        device: Where the price lives.
    """

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses exactly over the batch of all processes, or each token alone."""
        if inputs.exact:
            return select_exactly(
                inputs.values, self.budget, valid=inputs.valid, group=inputs.group
            )
        return select_at_price(inputs.values, self.budget, price=self.price, valid=inputs.valid)
