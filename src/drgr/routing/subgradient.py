"""Subgradient steps on the dual of the balanced assignment, with a step size that decays."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive
from drgr.routing.load_controller import LoadController
from drgr.routing.targets import LoadError


@final
class DecayingSubgradient(LoadController):
    r"""Moves prices along the load error by steps that shrink with the number of updates.

    .. math:: \beta_e \leftarrow \beta_e + \eta_n \left(\frac{c_e}{\bar c} - 1\right), \qquad
              \eta_n = \frac{\eta_1}{n^{p}} , \quad n = 1, 2, \dots

    after the ``n``-th optimizer step that observed anything, with counts ``c`` over all its
    micro-batches and processes. The bracket is, up to scale, a subgradient of the dual of the
    balanced assignment problem. Where scores have a continuous density at the ties, the expected
    dual is strongly convex apart from a common shift: ``p = 1`` then has regret ``O(log N)`` over
    ``N`` steps if ``eta_1`` is at least one over the curvature in these units, and converges slowly
    if it is less; ``p = 1/2`` needs no such knowledge and has ``O(sqrt N)``; ``p = 0`` is the plain
    subgradient. A step that decays cannot follow a router that keeps moving.

    The logarithmic regret is published; normalising by the mean load, so that ``eta`` is in units
    of the scores, and targets other than equal loads (``c_e / c_bar - E w_e``) are derived here.

    Args:
        num_experts: Number of experts ``E``.
        step_size: First step ``eta_1``: score units for a load that is off by one mean load.
        decay: The power ``p``, in [0, 1].
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        Han and Zhong, *A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse
        Mixture-of-Experts*, arXiv 2512.03915.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        step_size: float = 0.1,
        decay: float = 0.5,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(num_experts, target=target, device=device)
        check_positive("step_size", step_size)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self._step_size = step_size
        self._decay = decay
        self._num_updates = torch.zeros((), dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices and the number of updates."""
        return super().state_dict() | {"num_updates": self._num_updates.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores prices and number of updates, and forgets what was observed."""
        super().load_state_dict(state)
        self._num_updates = state["num_updates"].to(self._num_updates)

    def _moved(self, load: LoadError) -> Tensor:
        """Takes one step; a step without assignments does not count."""
        if int(load.total) == 0:
            return self._prices
        self._num_updates = self._num_updates + 1
        step = self._step_size * self._num_updates.double() ** -self._decay
        return self._prices + (step * load.error).to(self._prices.dtype)
