"""Loss-free balancing by the load error over its root mean square."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive
from drgr.routing.load_controller import LoadController
from drgr.routing.targets import LoadError


@final
class RmsBias(LoadController):
    r"""Moves prices along the load error, scaled to a fixed root mean square.

    .. math:: \beta \leftarrow \beta + u\,\frac{c - \bar c}{\mathrm{rms}(c - \bar c)}, \qquad
              \mathrm{rms}(e) = \sqrt{\tfrac1E \textstyle\sum_e e_e^2}

    after each optimizer step, with counts ``c`` over all its micro-batches and processes. It is the
    normalised subgradient step where :class:`~drgr.routing.SignBias` is the sign step: the length
    of both is ``u`` per expert, but here an expert far off moves more than one that is nearly
    right. No error, no step. The rule is used as a variant of
    the sign rule; a target other than equal loads replaces ``c_bar`` and is derived here.

    Args:
        num_experts: Number of experts ``E``.
        step_size: The step ``u`` in units of the scores, above 0.
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*,
        arXiv 2408.15664, for the sign rule that this varies.
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
        """Takes one normalised step."""
        scale = load.error.square().mean().sqrt()
        direction = torch.where(scale > 0, load.error / scale, 0.0).to(self._prices.dtype)
        return self._prices + self._step_size * direction
