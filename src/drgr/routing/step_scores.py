"""The scores of one optimizer step, for controllers that solve for their prices."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes
from drgr.routing.plan import LayerRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """This process's valid tokens of one step, and the counts of all processes.

    Attributes:
        scores: Scores less no price, ``(T, E)``, float32; ``-inf`` where an expert is forbidden.
        expert_counts: Experts that each token had, ``(T,)``, int64.
        num_tokens: Tokens of all processes, int64 scalar.
        num_assignments: Assignments of all processes, int64 scalar.
    """

    scores: Tensor
    expert_counts: Tensor
    num_tokens: Tensor
    num_assignments: Tensor


@final
class StepScores:
    """Keeps the scores of a step's micro-batches: ``4 T E`` bytes until they are taken.

    Args:
        num_experts: Number of experts ``E``.
        device: Where the scores live.
    """

    def __init__(self, num_experts: int, *, device: torch.device | None = None) -> None:
        self._empty = torch.zeros(0, num_experts, device=device)
        self._no_counts = torch.zeros(0, dtype=torch.int64, device=device)
        self.forget()

    def observe(self, routing: LayerRouting, prices: Tensor) -> None:
        """Keeps the valid tokens of a micro-batch that was routed at ``prices``."""
        scores = routing.values + prices
        counts = routing.plan.keep.sum(dim=1)
        if routing.valid is not None:
            scores, counts = scores[routing.valid], counts[routing.valid]
        self._scores.append(scores)
        self._counts.append(counts)

    def take(self, group: ProcessGroup | None) -> ScoreBatch:
        """Returns what was kept and starts the next step."""
        counts = torch.cat(self._counts)
        batch = ScoreBatch(
            scores=torch.cat(self._scores),
            expert_counts=counts,
            num_tokens=sum_over_processes(torch.tensor(len(counts), device=counts.device), group),
            num_assignments=sum_over_processes(counts.sum(), group),
        )
        self.forget()
        return batch

    def forget(self) -> None:
        """Starts the step anew."""
        self._scores = [self._empty]
        self._counts = [self._no_counts]


def marginal_values(values: Tensor, expert_counts: Tensor) -> Tensor:
    """Returns the best value that each token would not take, shape ``(T,)``.

    Args:
        values: Worth of each assignment, shape ``(T, E)``.
        expert_counts: Experts ``k_t`` of each token, shape ``(T,)``, int64.

    Returns:
        The ``k_t + 1``-th largest of each row; ``-inf`` where a token takes all that it may.
    """
    ordered = values.sort(dim=1, descending=True).values
    ordered = torch.nn.functional.pad(ordered, (0, 1), value=-torch.inf)
    return ordered.gather(1, expert_counts.unsqueeze(1)).squeeze(1)
