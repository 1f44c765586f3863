r"""A budget that changes as training goes on.

Progressive sparsification of layer ``l`` at optimizer step ``i``:

.. math:: k_l(i) = k_l \text{ for } i < i_0, \qquad k_l(i) = k \text{ for } i \ge i_0,

with more experts than the target ``k`` in the lowest layers only.
"""

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection, TokenBudget, select_at_price, select_exactly
from drgr.routing.batch_price import BatchPrice
from drgr.routing.plan import LayerRouting
from drgr.routing.selection.selector import SelectionInputs
from drgr.routing.selection.tally import check_selector_state

BudgetSchedule = Callable[[int], TokenBudget]
"""From the number of optimizer steps taken to the budget of the next."""


@final
class ProgressiveSelector:
    """Selects exactly inside the budget of the step; at evaluation, as was last trained.

    The exact budgeted selection otherwise. The first step inside of another budget replaces the
    learned price whole, and evaluation uses the budget that its price was learned in: a price of
    four experts a token says nothing about one. ``expert_ids`` have as many columns as the budget
    of their step has experts.

    Published: a switch from more experts to fewer in the lowest layers, made by a restart with
    other settings, see :func:`sparsification`; its constants are not published. Derived here: the
    schedule inside of a run, and what becomes of the price.

    Args:
        schedule: The budget by steps taken; it must not change from call to call.
        maximum: Most experts that any budget of the schedule allows a token.
        smoothing: Share of the price's average that a step keeps, in [0, 1).
        device: Where the price lives.

    Raises:
        ValueError: If ``smoothing`` is out of range; in use, if the schedule exceeds ``maximum``.

    References:
        Sigma-MoE-Tiny Technical Report, 2025 (arXiv 2512.16248).
    """

    def __init__(
        self,
        schedule: BudgetSchedule,
        *,
        maximum: int,
        smoothing: float = 0.9,
        device: torch.device | None = None,
    ) -> None:
        self.maximum = maximum
        self._schedule = schedule
        self._batch_price = BatchPrice(smoothing=smoothing, device=device)
        self._step = 0

    @property
    def price(self) -> Tensor | None:
        """The learned price; ``None`` before the first step."""
        return self._batch_price.value

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken."""
        return self._step

    def budget_at(self, step: int) -> TokenBudget:
        """Returns the budget of the step after ``step`` others.

        Raises:
            ValueError: If it allows a token more experts than ``maximum``.
        """
        budget = self._schedule(step)
        if budget.maximum > self.maximum:
            raise ValueError(
                f"schedule must stay within maximum = {self.maximum} experts a token, got "
                f"{budget.maximum} at step {step}; raise the maximum"
            )
        return budget

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses exactly over the batch of all processes, or each token alone."""
        if inputs.exact:
            budget = self.budget_at(self._step)
            return select_exactly(inputs.values, budget, valid=inputs.valid, group=inputs.group)
        budget = self.budget_at(max(self._step - 1, 0))
        return select_at_price(inputs.values, budget, price=self.price, valid=inputs.valid)

    def observe(self, routing: LayerRouting) -> None:
        """Keeps the price that the micro-batch was selected at."""
        self._batch_price.observe(routing)

    def update(self, group: ProcessGroup | None = None) -> None:
        """Counts a step and moves the price's average; both are the same on every process."""
        del group
        if self._step > 0 and self.budget_at(self._step) != self.budget_at(self._step - 1):
            self._batch_price.restart()
        self._batch_price.update()
        self._step += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the price and the number of steps."""
        return self._batch_price.state_dict() | {"step": torch.tensor(self._step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the price and the number of steps."""
        check_selector_state(self, state, "price", "step")
        self._batch_price.load_state_dict({"price": state["price"]})
        self._step = int(state["step"])


def sparsification(first: TokenBudget, target: TokenBudget, *, switch_step: int) -> BudgetSchedule:
    """Returns the schedule of one layer that begins with one budget and switches to another.

    Args:
        first: Until the switch.
        target: From then on.
        switch_step: Steps taken inside of ``first``, at least 0.

    Raises:
        ValueError: If ``switch_step`` is negative.

    Examples:
        >>> many = TokenBudget(minimum=4, maximum=4, average=4)
        >>> one = TokenBudget(minimum=1, maximum=1, average=1)
        >>> schedule = sparsification(many, one, switch_step=100)
        >>> schedule(99).average, schedule(100).average
        (4, 1)
    """
    if switch_step < 0:
        raise ValueError(f"switch_step must be at least 0, got {switch_step}")
    return lambda step: first if step < switch_step else target
