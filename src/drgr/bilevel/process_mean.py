"""Means of tensors over processes, and errors that all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import rank, sum_over_processes, world_size
from drgr.errors import NonFiniteLossError

Result = TypeVar("Result")

# How a process fared.
_SUCCEEDED, _NON_FINITE, _FAILED = 0.0, 1.0, 2.0


@final
@dataclass(frozen=True, slots=True)
class ProcessMean:
    """Takes means over the processes of a group, or leaves tensors as they are if it is off."""

    group: ProcessGroup | None
    is_on: bool

    def __call__(self, tensor: Tensor) -> Tensor:
        """Returns the mean over processes, detached."""
        if not self.is_on:
            return tensor.detach()
        return sum_over_processes(tensor, self.group) / world_size(self.group)

    def agreed(self, evaluate: Callable[[], Result], device: torch.device) -> Result:
        """Returns what one process computes, or raises on all if it fails on one.

        A process that raised alone would leave the others waiting for it in their next sum.
        """
        if not self.is_on or world_size(self.group) == 1:
            return evaluate()
        try:
            found = evaluate()
        except Exception as error:
            code = _NON_FINITE if isinstance(error, NonFiniteLossError) else _FAILED
            self._outcomes(code, device)
            raise
        outcomes = self._outcomes(_SUCCEEDED, device)
        if _FAILED in outcomes:
            raise RuntimeError(
                f"a loss failed on process {outcomes.index(_FAILED)} of the group, whose own error "
                "says why"
            )
        if _NON_FINITE in outcomes:
            raise NonFiniteLossError(
                f"a loss or a gradient is not finite on process {outcomes.index(_NON_FINITE)} of "
                "the group, whose own error says which; those of this process are finite"
            )
        return found

    def _outcomes(self, outcome: float, device: torch.device) -> list[float]:
        """Tells all processes how this one fared, and returns how each did, by rank."""
        own = torch.zeros(world_size(self.group), device=device)
        own[rank(self.group)] = outcome
        outcomes: list[float] = sum_over_processes(own, self.group).tolist()
        return outcomes
