"""What every controller that moves prices by the load of a step has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.routing.controllers import check_state
from drgr.routing.plan import LayerRouting
from drgr.routing.targets import LoadError, StepLoad


class LoadController(ABC):
    """A :class:`PriceController` of which a subclass says how the load error moves prices.

    Args:
        num_experts: Number of experts ``E``.
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.
    """

    def __init__(
        self, num_experts: int, *, target: Sequence[float] | None, device: torch.device | None
    ) -> None:
        self._prices = torch.zeros(num_experts, device=device)
        self._load = StepLoad(num_experts, target=target, device=device)

    @property
    def prices(self) -> Tensor:
        """Current prices, shape ``(E,)``."""
        return self._prices

    def observe(self, routing: LayerRouting) -> None:
        """Adds a micro-batch's load to the counts of the step."""
        self._load.observe(routing)

    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves the prices by the summed counts, and their mean to 0, which changes no route."""
        prices = self._moved(self._load.take(group))
        self._prices = prices - prices.mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices."""
        return {"prices": self._prices.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the prices and forgets what was observed."""
        check_state(self, state, *self.state_dict())
        self._prices = state["prices"].to(self._prices)
        self._load.forget()

    @abstractmethod
    def _moved(self, load: LoadError) -> Tensor:
        """Returns the prices after a step of such a load, shape ``(E,)``, float32."""
