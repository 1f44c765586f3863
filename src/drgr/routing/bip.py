"""BIP balancing: coordinate minimisation of the assignment dual with prices clipped at zero."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.numerics import kth_largest
from drgr.routing.controllers import check_state
from drgr.routing.plan import LayerRouting
from drgr.routing.step_scores import ScoreBatch, StepScores, marginal_values
from drgr.routing.targets import target_counts, target_shares


@final
class BipBalancing:
    r"""Minimises the dual of the capacity-bounded assignment problem, block by block, as published.

    With ``(n)th`` the n-th largest and target load ``c = N / E``, repeats

    .. math:: p_t &\leftarrow \max\bigl(0,\ (k + 1)\text{th over experts of } s_{te} - q_e\bigr) \\
              q_e &\leftarrow \max\bigl(0,\ (c + 1)\text{th over tokens of } s_{te} - p_t\bigr)

    ``num_iterations`` times after each optimizer step, over all its micro-batches and processes,
    starting from the last ``q``. Both constraints are upper bounds, so no price is below zero: a
    hot expert is pushed down, a dead one is never lifted.
    :class:`~drgr.routing.QuantileBalancing` is the same step without the clip.

    Published is the rule above with ``q`` of the same batch. Here ``q`` serves the next step, so
    that no route depends on later tokens; tokens with their own number of experts ``k_t`` and
    targets other than equal loads are derived here, as is the common shift that makes ``prices``
    sum to zero and changes no selection.

    Args:
        num_experts: Number of experts ``E``.
        num_iterations: Repetitions of both updates, at least 1.
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        Sun, *Binary-Integer-Programming Based Algorithm for Expert Load Balancing in
        Mixture-of-Experts Models*, arXiv 2502.15451.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        num_iterations: int = 8,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
        self._num_iterations = num_iterations
        self._shares = target_shares(target, num_experts, device=device)
        self._duals = torch.zeros(num_experts, device=device)
        self._scores = StepScores(num_experts, device=device)

    @property
    def prices(self) -> Tensor:
        """Current prices ``q`` less their mean, shape ``(E,)``."""
        return self._duals - self._duals.mean()

    @property
    def duals(self) -> Tensor:
        """Current ``q``, at least zero, shape ``(E,)``."""
        return self._duals

    def observe(self, routing: LayerRouting) -> None:
        """Keeps a micro-batch's scores of valid tokens until the update."""
        self._scores.observe(routing, self.prices)

    def update(self, group: ProcessGroup | None = None) -> None:
        """Iterates on the scores of the step; nothing observed leaves the prices as they are."""
        batch = self._scores.take(group)
        if int(batch.num_tokens) > 0:
            self._duals = _iterate(self._duals, batch, self._shares, self._num_iterations, group)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices before centring."""
        return {"duals": self._duals.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the prices and forgets what was observed."""
        check_state(self, state, "duals")
        self._duals = state["duals"].to(self._duals)
        self._scores.forget()


def _iterate(
    duals: Tensor,
    batch: ScoreBatch,
    shares: Tensor | None,
    num_iterations: int,
    group: ProcessGroup | None,
) -> Tensor:
    counts = target_counts(shares, batch.num_assignments, len(duals))
    # An expert that every token may use together has a slack bound, whose price is zero.
    is_slack = counts >= batch.num_tokens
    for _ in range(num_iterations):
        token_duals = marginal_values(batch.scores - duals, batch.expert_counts).clamp_min(0)
        margins = batch.scores - token_duals.unsqueeze(1)
        duals = kth_largest(margins, counts + 1, group).clamp_min(0).masked_fill(is_slack, 0.0)
    return duals
