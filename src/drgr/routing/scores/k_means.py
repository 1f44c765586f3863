r"""Centroids of the tokens that experts receive, in place of learned rows.

.. math:: z_{te} = \cos(x_t - m,\ \mu_e - m), \qquad s_t = \operatorname{softmax}(z_t / \tau)

with, after each optimizer step, over all its micro-batches and processes,

.. math:: \mu_e \leftarrow \rho \mu_e + (1 - \rho) \frac{1}{c_e} \sum_{t : e \in I_t} x_t
          \quad\text{where } c_e > 0 .
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive, check_share
from drgr.collectives import gather_rows, sum_over_processes
from drgr.routing.plan import LayerRouting
from drgr.routing.scores.scorer import RouterScores, Scorer, at_least_float32, cosines


@final
@dataclass(slots=True)
class _StepSums:
    """What a step's tokens add up to, in this process.

    Attributes:
        sums: Sum of the tokens of each expert, then of all tokens, shape ``(E + 1, D)``, float64.
        counts: Their numbers, shape ``(E + 1,)``, float64.
        worst_fit: Smallest cosine of an expert with one of its tokens, shape ``(E,)``.
        worst: That token, shape ``(E, D)``.
    """

    sums: Tensor
    counts: Tensor
    worst_fit: Tensor
    worst: Tensor


@final
class KMeansScores(Scorer):
    r"""Online k-means: an expert is the running mean of its tokens, and cosines choose.

    Published are the running means, the choice by cosine and a price of balance that moves by the
    sign of the load error (``SignBias``; prices here are a controller's). The decay, the gate and
    all that follows was not found and is derived: gates are a softmax of the cosines; an expert
    without tokens yet is scored by its row of the router's weight, so that the first steps route
    as the model did; a centroid without tokens for ``dead_after`` steps in a row moves to the token
    that fits worst among those of the most loaded expert, a second such centroid to that of the
    second most loaded, and so on. Experts that had the same tokens in every step have the same
    centroid; only prices part them.

    Args:
        num_experts: Number of experts ``E``.
        width: Width ``D`` of a token's vector.
        decay: Share ``rho`` of a centroid that a step keeps, in [0, 1). First means count whole.
        temperature: Temperature ``tau`` of the gates, above 0; no choice depends on it.
        centred: Whether the running mean ``m`` of all tokens is subtracted first, as tokens with a
            large part in common have cosines near 1 with everything. ``m`` is 0 otherwise.
        dead_after: Steps without a token after which a centroid moves, at least 1.

    Raises:
        ValueError: If a number is out of range.

    Gradients:
        Through the tokens alone; the router's weight has zeros once every expert had a token.

    Numerics:
        Sums in float64, centroids and cosines in float32.

    Complexity:
        O(TED) time in :meth:`forward` and :meth:`observe`; one all-reduce of ``(E + 1)(D + 1)``
        numbers a step; where an expert is dead, a gather of ``E (D + 1)`` from each process.

    References:
        *Routers Learn the Geometry of Their Experts*, 2026 (arXiv 2605.12476).
    """

    observes = True
    centroids: Tensor
    mean: Tensor
    placed: Tensor
    idle: Tensor

    def __init__(
        self,
        num_experts: int,
        width: int,
        *,
        decay: float = 0.99,
        temperature: float = 0.1,
        centred: bool = False,
        dead_after: int = 100,
    ) -> None:
        super().__init__()
        check_share("decay", decay)
        check_positive("temperature", temperature)
        if dead_after < 1:
            raise ValueError(f"dead_after must be at least 1, got {dead_after}")
        self._decay = decay
        self._temperature = temperature
        self._centred = centred
        self._dead_after = dead_after
        self.register_buffer("centroids", torch.zeros(num_experts, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("placed", torch.zeros(num_experts + 1, dtype=torch.bool))
        self.register_buffer("idle", torch.zeros(num_experts, dtype=torch.int64))
        self._pending: _StepSums | None = None

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = self._cosines(hidden, weight)
        scores = (logits / self._temperature).softmax(dim=-1)
        return RouterScores(scores=scores, logits=logits, selectable=logits.detach())

    def observe(self, routing: LayerRouting) -> None:
        """Adds the tokens of a micro-batch to those of the experts that they had."""
        assert routing.hidden is not None  # records of a scorer that observes hold it
        assert routing.logits is not None
        plan, logits = routing.plan, routing.logits.detach()
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        chosen.scatter_(1, plan.expert_ids, plan.keep)
        tokens, real = at_least_float32(routing.hidden), routing.valid
        if real is not None:
            tokens, chosen, logits = tokens[real], chosen[real], logits[real]
        # The column after the experts' is that of all tokens.
        member = F.pad(chosen.double(), (0, 1), value=1.0)
        step = self._step_sums()
        step.sums += member.T @ tokens.double()
        step.counts += member.sum(dim=0)
        if len(tokens) > 0:
            fits, rows = logits.masked_fill(~chosen, torch.inf).min(dim=0)
            is_worse = fits < step.worst_fit
            step.worst_fit = torch.where(is_worse, fits, step.worst_fit)
            step.worst = torch.where(is_worse.unsqueeze(1), tokens[rows], step.worst)

    @torch.no_grad()
    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves the centroids to the tokens of the step, over all processes."""
        step, self._pending = self._step_sums(), None
        table = torch.cat([step.sums, step.counts.unsqueeze(1)], dim=1)
        table = sum_over_processes(table, group)
        counts = table[:, -1]
        has_tokens = counts > 0
        means = (table[:, :-1] / counts.clamp_min(1).unsqueeze(1)).to(self.centroids.dtype)
        before = torch.cat([self.centroids, self.mean.unsqueeze(0)])
        kept = torch.where(self.placed, self._decay, 0.0).unsqueeze(1)
        after = torch.where(has_tokens.unsqueeze(1), kept * before + (1 - kept) * means, before)
        self.centroids.copy_(after[:-1])
        self.mean.copy_(after[-1])
        self.placed.logical_or_(has_tokens)
        # A step without any token says nothing of an expert.
        idle = torch.where(has_tokens[-1], self.idle + 1, self.idle)
        self.idle.copy_(idle.masked_fill(has_tokens[:-1], 0))
        self._revive(step, counts[:-1], group)

    def _revive(self, step: _StepSums, counts: Tensor, group: ProcessGroup | None) -> None:
        """Moves dead centroids to the worst-fitting tokens of the most loaded experts."""
        is_dead = self.idle >= self._dead_after
        if not bool(is_dead.any()):  # the same on every process
            return
        found = torch.cat([step.worst_fit.unsqueeze(1), step.worst], dim=1)
        everywhere, _ = gather_rows(found.unsqueeze(0), group)
        fits, tokens = everywhere[..., 0], everywhere[..., 1:]
        experts = torch.arange(counts.shape[0], device=counts.device)
        worst = tokens[fits.argmin(dim=0), experts]
        donors = counts.argsort(descending=True, stable=True)
        donors = donors[counts[donors] > 0]
        dead = is_dead.nonzero().squeeze(1)[: len(donors)]
        self.centroids[dead] = worst[donors[: len(dead)]]
        self.placed[dead] = True
        self.idle[dead] = 0

    def _cosines(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Returns the cosines, shape ``(T, E)``."""
        tokens, centroids = at_least_float32(hidden), self.centroids
        if self._centred:
            tokens, centroids = tokens - self.mean, centroids - self.mean
        is_placed = self.placed[:-1].unsqueeze(1)
        # In a tensor of its own: buffers move between forward passes.
        return cosines(tokens, torch.where(is_placed, centroids, at_least_float32(weight)))

    def _step_sums(self) -> _StepSums:
        """Returns the sums of the step so far, zeros at its start."""
        if self._pending is None:
            num_experts, width = self.centroids.shape
            zeros = self.centroids.new_zeros(num_experts + 1, width, dtype=torch.float64)
            self._pending = _StepSums(
                sums=zeros,
                counts=zeros.new_zeros(num_experts + 1),
                worst_fit=self.centroids.new_full((num_experts,), torch.inf),
                worst=torch.zeros_like(self.centroids),
            )
        return self._pending
