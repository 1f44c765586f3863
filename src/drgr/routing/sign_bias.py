"""Loss-free balancing by the sign of the load error."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive
from drgr.routing.load_controller import LoadController
from drgr.routing.targets import LoadError


@final
class SignBias(LoadController):
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
        super().__init__(num_experts, target=target, device=device)
        check_positive("step_size", step_size)
        self._step_size = step_size

    def _moved(self, load: LoadError) -> Tensor:
        """Takes one sign step."""
        return self._prices + self._step_size * torch.sign(load.error).to(self._prices.dtype)
