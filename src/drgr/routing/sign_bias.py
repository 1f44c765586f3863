"""Loss-free balancing by the sign of the load error."""

from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive
from drgr.collectives import sum_over_processes
from drgr.routing.plan import LayerRouting


@final
class SignBias:
    r"""Raises the price of experts above the mean load by a fixed step, and lowers the others.

    .. math:: \beta_e \leftarrow \beta_e + u\,\mathrm{sign}(c_e - \bar c), \qquad
              \beta \leftarrow \beta - \bar\beta

    after each optimizer step, with counts ``c`` over all its micro-batches and processes. It is the
    sign subgradient step on the dual of the balanced assignment problem; subtracting the mean
    changes no selection. Residual imbalance is of the order of ``u`` times the number of tokens
    near a tie, so ``u`` is in units of the scores: 1e-3 suits sigmoid scores; the gaps between
    softmax scores of many experts are smaller.

    Args:
        num_experts: Number of experts ``E``.
        step_size: The step ``u`` in units of the scores, above 0.
        device: Where the prices live.

    References:
        Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*,
        arXiv 2408.15664.
    """

    def __init__(
        self, num_experts: int, *, step_size: float = 1e-3, device: torch.device | None = None
    ) -> None:
        check_positive("step_size", step_size)
        self._step_size = step_size
        self._prices = torch.zeros(num_experts, device=device)
        self._load = torch.zeros(num_experts, dtype=torch.int64, device=device)

    @property
    def prices(self) -> Tensor:
        """Current prices, shape ``(E,)``."""
        return self._prices

    def observe(self, routing: LayerRouting) -> None:
        """Adds a micro-batch's load to the counts of the step."""
        self._load += routing.plan.expert_load

    def update(self, group: ProcessGroup | None = None) -> None:
        """Takes one sign step on the summed counts."""
        load = sum_over_processes(self._load, group)
        error = load * load.shape[0] - load.sum()
        self._prices = self._prices + self._step_size * torch.sign(error).to(self._prices.dtype)
        self._prices -= self._prices.mean()
        self._load.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices."""
        return {"prices": self._prices.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the prices and forgets what was observed."""
        self._prices = state["prices"].to(self._prices)
        self._load.zero_()
