"""Which load each expert should have, and how far the load of a step is from it.

Published controllers ask for ``c_e = N / E``, the same load for all ``E`` experts. A target vector
replaces it by ``c_e = w_e N`` with shares ``w`` that sum to 1 (derived here): experts of unequal
size or on devices of unequal speed are a change of marginal and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes
from drgr.routing.plan import LayerRouting

# A share times a count is inexact: what is below this share of all assignments is no error.
_ROUNDING = 1e-12


def target_shares(
    target: Sequence[float] | None, num_experts: int, *, device: torch.device | None = None
) -> Tensor | None:
    """Returns the share of the load that each expert should have, ``(E,)``, float64.

    Args:
        target: Loads in any unit, one positive number for each expert; ``None`` for equal loads.
        num_experts: Number of experts ``E``.
        device: Where the shares live.

    Returns:
        Shares that sum to 1; ``None`` for equal loads, which integers express without rounding.

    Raises:
        ValueError: If ``target`` has another length, or an entry that is not positive and finite.
    """
    if target is None:
        return None
    loads = [float(load) for load in target]
    if len(loads) != num_experts:
        raise ValueError(
            f"target must have one load for each of the {num_experts} experts, got {len(loads)}"
        )
    if not all(math.isfinite(load) and load > 0 for load in loads):
        raise ValueError(f"target must hold finite numbers above 0, got {loads}")
    shares = torch.tensor(loads, dtype=torch.float64, device=device)
    return shares / shares.sum()


def target_counts(shares: Tensor | None, total: Tensor, num_experts: int) -> Tensor:
    """Returns the whole number of assignments that each expert is due, ``floor(w_e N)``, ``(E,)``.

    Args:
        shares: Result of :func:`target_shares`.
        total: Assignments ``N``, int64 scalar.
        num_experts: Number of experts ``E``.
    """
    if shares is None:
        return (total // num_experts).expand(num_experts)
    return (total * (shares + _ROUNDING)).floor().long()


def load_error(load: Tensor, shares: Tensor | None) -> Tensor:
    """Returns ``E (c_e / N - w_e)``: 0 on target, 1 one mean load above it; ``(E,)``, float64.

    Its sign is exact where loads are to be equal. No assignments are no error.

    Args:
        load: Assignments per expert ``c``, shape ``(E,)``, int64.
        shares: Result of :func:`target_shares`.
    """
    num_experts, total = load.shape[0], load.sum()
    if shares is None:
        return (load * num_experts - total).double() / total.clamp_min(1)
    error = load.double() / total.clamp_min(1) - shares
    on_target = (error.abs() <= _ROUNDING) | (total == 0)
    return num_experts * error.masked_fill(on_target, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadError:
    """The load of one step against its target.

    Attributes:
        error: Result of :func:`load_error`, shape ``(E,)``, float64.
        total: Assignments of all processes, int64 scalar.
    """

    error: Tensor
    total: Tensor


@final
class StepLoad:
    """Counts the load of one optimizer step and compares it with the target.

    Args:
        num_experts: Number of experts ``E``.
        target: Loads as in :func:`target_shares`.
        device: Where the counts live.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._shares = target_shares(target, num_experts, device=device)
        self._load = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def observe(self, routing: LayerRouting) -> None:
        """Adds a micro-batch's load."""
        self._load += routing.plan.expert_load

    def take(self, group: ProcessGroup | None) -> LoadError:
        """Returns the error of the step over all processes and starts the next step."""
        load = sum_over_processes(self._load, group)
        self.forget()
        return LoadError(error=load_error(load, self._shares), total=load.sum())

    def forget(self) -> None:
        """Starts the step anew."""
        self._load = torch.zeros_like(self._load)
