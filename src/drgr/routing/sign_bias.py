"""Loss-free balancing by the sign of the load error."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive
from drgr.routing.controllers import check_state
from drgr.routing.plan import LayerRouting
from drgr.routing.targets import StepLoad


@final
class SignBias:
    r"""Raises the price of experts above the mean load by a fixed step, and lowers the others.

    .. math:: \beta_e \leftarrow \beta_e + u\,\mathrm{sign}(c_e - \bar c), \qquad
              \beta \leftarrow \beta - \bar\beta

    after each optimizer step, with counts ``c`` over all its micro-batches and processes. It is the
    sign subgradient step on the dual of the balanced assignment problem; subtracting the mean
    changes no selection. Residual imbalance is of the order of ``u`` times the number of tokens
    near a tie, so ``u`` is in units of the scores: 1e-3 suits sigmoid scores; the gaps between
    softmax scores of many experts are smaller. Published for equal loads; a target replaces
    ``c_bar`` by ``w_e`` times all assignments, which is derived here.

    Args:
        num_experts: Number of experts ``E``.
        step_size: The step ``u`` in units of the scores, above 0.
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*,
        arXiv 2408.15664.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        step_size: float = 1e-3,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_positive("step_size", step_size)
        self._step_size = step_size
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
        """Takes one sign step on the summed counts."""
        error = self._load.take(group).error
        self._prices = self._prices + self._step_size * torch.sign(error).to(self._prices.dtype)
        self._prices -= self._prices.mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices."""
        return {"prices": self._prices.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the prices and forgets what was observed."""
        check_state(self, state, "prices")
        self._prices = state["prices"].to(self._prices)
        self._load.forget()
