"""The one interface of everything that moves expert prices, and the controller that never does."""

from collections.abc import Mapping
from typing import Protocol, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.routing.plan import LayerRouting


class PriceController(Protocol):
    """Moves a layer's expert prices ``beta`` so that its load approaches a target.

    A price is subtracted from an expert's score when experts are selected and never enters the
    combine weights. Prices change between optimizer steps only, from the steps before: a token's
    route never depends on the price that its own batch causes.
    """

    @property
    def prices(self) -> Tensor:
        """Prices in units of the scores, shape ``(E,)``, float32, mean zero."""
        ...

    def observe(self, routing: LayerRouting) -> None:
        """Takes in one micro-batch of this process; called once per training forward pass."""
        ...

    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves the prices from all that was observed since the last call, over all processes."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a resumed run needs; observations not yet used are not part of it."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state_dict`; raises ``ValueError`` for that of another kind."""
        ...


def check_state(controller: PriceController, state: Mapping[str, Tensor], *names: str) -> None:
    """Raises ``ValueError`` unless ``state`` has exactly the tensors called ``names``."""
    if set(state) != set(names):
        raise ValueError(
            f"state of {type(controller).__name__} must hold {sorted(names)}, got {sorted(state)}; "
            f"it belongs to another kind of controller"
        )


@final
class NoPrices:
    """Leaves every price at zero: balance, if any, comes from a loss."""

    def __init__(self, num_experts: int, *, device: torch.device | None = None) -> None:
        self._prices = torch.zeros(num_experts, device=device)

    @property
    def prices(self) -> Tensor:
        """Zeros, shape ``(E,)``."""
        return self._prices

    def observe(self, routing: LayerRouting) -> None:
        """Does nothing."""
        del routing

    def update(self, group: ProcessGroup | None = None) -> None:
        """Does nothing."""
        del group

    def state_dict(self) -> dict[str, Tensor]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Accepts the empty state only."""
        if state:
            raise ValueError(f"state must be empty for NoPrices, got keys {sorted(state)}")
