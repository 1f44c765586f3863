"""The batch's price of compute, learned in training and frozen at evaluation."""

from typing import final

import torch
from torch import Tensor

from drgr._checks import check_share
from drgr.routing.plan import LayerRouting


@final
class BatchPrice:
    """Averages, over steps, the price that the exact selection found for an extra expert.

    Selecting at a batch's own price makes one token's route depend on the others of its batch. That
    is right in training, where the budget must hold exactly, and wrong at evaluation, where tokens
    are not known together. There this average replaces it.

    Args:
        smoothing: Share of the old average that a step keeps, in [0, 1). The first step is taken
            whole, so the average is never pulled towards its start.
        device: Where the price lives.
    """

    def __init__(self, *, smoothing: float = 0.9, device: torch.device | None = None) -> None:
        check_share("smoothing", smoothing)
        self._smoothing = smoothing
        self._value = torch.full((), torch.nan, device=device)
        self._observed: list[Tensor] = []

    @property
    def value(self) -> Tensor | None:
        """The price in units of the scores, scalar; ``None`` before the first step."""
        return None if bool(torch.isnan(self._value)) else self._value

    def observe(self, routing: LayerRouting) -> None:
        """Keeps the price of one micro-batch; it is the same on every process of the batch."""
        self._observed.append(routing.selection.price.float())

    def update(self) -> None:
        """Moves the average by the mean price of the micro-batches that had one (not NaN)."""
        if not self._observed:
            return
        price = torch.stack(self._observed).nanmean()
        average = self._smoothing * self._value + (1 - self._smoothing) * price
        average = torch.where(torch.isnan(self._value), price, average)
        self._value = torch.where(torch.isnan(price), self._value, average)
        self._observed = []

    def restart(self) -> None:
        """Forgets the average, so that the next update takes what was observed whole."""
        self._value = torch.full_like(self._value, torch.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the average; NaN stands for one that was never learned."""
        return {"price": self._value.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the average and forgets what was observed."""
        self._value = state["price"].to(self._value)
        self._observed = []
