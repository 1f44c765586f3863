"""Quantile balancing: the price at which an expert would have had exactly its share."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_share
from drgr.collectives import sum_over_processes
from drgr.numerics import kth_largest
from drgr.routing.controllers import check_state
from drgr.routing.plan import LayerRouting
from drgr.routing.targets import target_counts, target_shares


@final
class QuantileBalancing:
    r"""Minimises the dual of the balanced assignment problem exactly in one coordinate block.

    With token prices ``alpha_t``, the best value that token ``t`` did not take, and target load
    ``c = (all assignments) / E``,

    .. math:: \beta_e \leftarrow \text{the } (c + 1)\text{-th largest of } s_{te} - \alpha_t
              \text{ over tokens } t ,

    after each optimizer step, over all its micro-batches and processes, then centred. There is no
    step size to tune, and dead experts are lifted as well as hot ones lowered. Where every token
    has ``k`` experts, ``alpha_t`` is its ``k+1``-th largest value, as published; with a batch
    budget it is the token's own marginal value (derived here). With a target, ``c_e`` is the
    whole part of ``w_e`` times all assignments (derived here).

    Args:
        num_experts: Number of experts ``E``.
        smoothing: Share of the old price that is kept, in [0, 1); 0 is the exact minimiser.
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        Sun, *Binary-Integer-Programming Based Algorithm for Expert Load Balancing in
        Mixture-of-Experts Models*, arXiv 2502.15451, whose clip at zero is absent here because both
        constraints are equalities.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        smoothing: float = 0.0,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_share("smoothing", smoothing)
        self._shares = target_shares(target, num_experts, device=device)
        self._smoothing = smoothing
        self._prices = torch.zeros(num_experts, device=device)
        self._margins: list[Tensor] = []
        self._num_assignments = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def prices(self) -> Tensor:
        """Current prices, shape ``(E,)``."""
        return self._prices

    def observe(self, routing: LayerRouting) -> None:
        """Keeps a micro-batch's margins ``s - alpha`` of valid tokens until the update."""
        plan = routing.plan
        taken = torch.zeros_like(routing.values, dtype=torch.bool)
        taken.scatter_(1, plan.expert_ids, plan.keep)
        # A token that took every permitted expert has no marginal value; its worst one bounds it.
        permitted = torch.isfinite(routing.values)
        floor = routing.values.masked_fill(~permitted, torch.inf).amin(dim=1)
        best_left = routing.values.masked_fill(taken, -torch.inf).amax(dim=1)
        alpha = torch.maximum(best_left, floor)
        margins = routing.values + self._prices - alpha.unsqueeze(1)
        self._margins.append(margins if routing.valid is None else margins[routing.valid])
        self._num_assignments += plan.expert_load.sum()

    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves to the dual minimiser; nothing observed leaves the prices as they are."""
        margins = (
            torch.cat(self._margins)
            if self._margins
            else self._prices.new_zeros(0, len(self._prices))
        )
        num_rows = sum_over_processes(torch.tensor(len(margins), device=margins.device), group)
        if int(num_rows) > 0:
            total = sum_over_processes(self._num_assignments, group)
            counts = target_counts(self._shares, total, margins.shape[1])
            prices = kth_largest(margins, counts + 1, group)
            prices = _replace_unbounded(prices)
            prices = prices - prices.mean()
            self._prices = self._smoothing * self._prices + (1 - self._smoothing) * prices
        self._forget()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices."""
        return {"prices": self._prices.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the prices and forgets what was observed."""
        check_state(self, state, "prices")
        self._prices = state["prices"].to(self._prices)
        self._forget()

    def _forget(self) -> None:
        self._margins = []
        self._num_assignments.zero_()


def _replace_unbounded(prices: Tensor) -> Tensor:
    """Gives an expert that too few tokens may use (price ``-inf``) the lowest price."""
    is_bounded = torch.isfinite(prices)
    lowest = prices.masked_fill(~is_bounded, torch.inf).amin()
    lowest = torch.where(is_bounded.any(), lowest, torch.zeros_like(lowest))
    return torch.where(is_bounded, prices, lowest)
