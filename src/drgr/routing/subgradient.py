"""Subgradient steps on the dual of the balanced assignment, with a step size that decays."""

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
class DecayingSubgradient:
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
        check_positive("step_size", step_size)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self._step_size = step_size
        self._decay = decay
        self._prices = torch.zeros(num_experts, device=device)
        self._num_updates = torch.zeros((), dtype=torch.int64, device=device)
        self._load = StepLoad(num_experts, target=target, device=device)

    @property
    def prices(self) -> Tensor:
        """Current prices, shape ``(E,)``."""
        return self._prices

    def observe(self, routing: LayerRouting) -> None:
        """Adds a micro-batch's load to the counts of the step."""
        self._load.observe(routing)

    def update(self, group: ProcessGroup | None = None) -> None:
        """Takes one step on the summed counts; a step without assignments does not count."""
        load = self._load.take(group)
        if int(load.total) == 0:
            return
        self._num_updates = self._num_updates + 1
        step = self._step_size * self._num_updates.double() ** -self._decay
        prices = self._prices + (step * load.error).to(self._prices.dtype)
        self._prices = prices - prices.mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices and the number of updates."""
        return {"prices": self._prices.clone(), "num_updates": self._num_updates.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores prices and number of updates, and forgets what was observed."""
        check_state(self, state, "prices", "num_updates")
        self._prices = state["prices"].to(self._prices)
        self._num_updates = state["num_updates"].to(self._num_updates)
        self._load.forget()
