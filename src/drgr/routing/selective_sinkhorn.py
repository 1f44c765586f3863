"""Selective Sinkhorn: transport prices in a few random steps, none in all others."""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.numerics import Status
from drgr.routing.controllers import check_state
from drgr.routing.plan import LayerRouting
from drgr.routing.sinkhorn import SinkhornCost, SinkhornPrices


@final
class SelectiveSinkhorn:
    r"""Routes a step at Sinkhorn prices with a small probability, and without prices otherwise.

    .. math:: b_n \sim \mathrm{Bernoulli}(p), \qquad
              \beta^{(n)} = \begin{cases} \beta(\text{transport of step } n - 1) & b_n = 1 \\
                                          0 & b_n = 0 \end{cases}

    with the transport of :class:`~drgr.routing.SinkhornPrices`, started from zero. The coin of step
    ``n`` depends on ``seed`` and ``n`` alone, so layers and processes agree and a resumed run draws
    the same; scores are kept only in the step before one that is drawn.

    Published: coin, transport and both costs, for ``p`` of 0.001 to 0.01. Derived here: prices come
    from the step before, not from the same batch, and one coin serves all layers. Left out, as a
    price cannot express them: combine weights from the plan, and noise on the logits. The method
    never prices at evaluation; an evaluation right before a drawn step sees its prices, so read
    :attr:`is_drawn` where that matters. It does not keep an unbalanced router balanced: it only
    shows experts tokens that they would not have seen.

    Args:
        num_experts: Number of experts ``E``.
        probability: ``p``, in [0, 1].
        seed: Seed of the coins.
        regularization: As in :class:`~drgr.routing.SinkhornPrices`, and so are all that follow.
        cost: What is transported.
        tolerance: Largest relative error of an expert's mass that counts as converged.
        max_iterations: Most iterations of one transport.
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        *Selective Sinkhorn Routing*, arXiv 2511.08972.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        probability: float = 0.01,
        seed: int = 0,
        regularization: float = 0.05,
        cost: SinkhornCost = "scores",
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {probability}")
        self._probability = probability
        self._seed = seed
        self._num_updates = 0
        self._sinkhorn = SinkhornPrices(
            num_experts,
            regularization=regularization,
            cost=cost,
            tolerance=tolerance,
            max_iterations=max_iterations,
            target=target,
            device=device,
        )
        self._unpriced = self._sinkhorn.state_dict()

    @property
    def prices(self) -> Tensor:
        """Prices of the step to come, shape ``(E,)``; zeros unless it was drawn."""
        return self._sinkhorn.prices

    @property
    def is_drawn(self) -> bool:
        """Whether the step to come is routed at prices; never the first one."""
        return self._num_updates > 0 and self._coin(self._num_updates)

    @property
    def status(self) -> Status | None:
        """Whether the transport behind the current prices converged; ``None`` without one."""
        return self._sinkhorn.status

    def observe(self, routing: LayerRouting) -> None:
        """Keeps a micro-batch's scores where the next step is drawn."""
        if self._coin(self._num_updates + 1):
            self._sinkhorn.observe(routing)

    def update(self, group: ProcessGroup | None = None) -> None:
        """Solves the transport where the next step is drawn, and removes the prices if not."""
        self._num_updates += 1
        if self._coin(self._num_updates):
            self._sinkhorn.update(group)
        else:
            self._sinkhorn.load_state_dict(self._unpriced)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices and the number of updates."""
        count = torch.tensor(self._num_updates, device=self.prices.device)
        return {**self._sinkhorn.state_dict(), "num_updates": count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores prices and number of updates, and forgets what was observed."""
        check_state(self, state, "prices", "duals", "num_updates")
        self._num_updates = int(state["num_updates"])
        self._sinkhorn.load_state_dict({name: state[name] for name in self._unpriced})

    def _coin(self, step: int) -> bool:
        # A generator for each step: NumPy's seed sequence mixes neighbouring integers well.
        draw = np.random.default_rng((self._seed, step)).random()
        return bool(draw < self._probability)
