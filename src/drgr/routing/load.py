"""How evenly the experts of one layer are used."""

import torch
from torch import Tensor


def expert_load(expert_ids: Tensor, keep: Tensor, num_experts: int) -> Tensor:
    """Counts the assignments that run on each expert.

    Args:
        expert_ids: Candidate experts, shape ``(T, K)``, int64.
        keep: Which candidates run, shape ``(T, K)``, bool.
        num_experts: Number of experts ``E``.

    Returns:
        Assignments per expert, shape ``(E,)``, int64.
    """
    load = expert_ids.new_zeros(num_experts)
    return load.scatter_add_(0, expert_ids.reshape(-1), keep.reshape(-1).to(load.dtype))


def max_violation(load: Tensor) -> Tensor:
    """Returns MaxVio, ``max_e c_e / mean(c) - 1``: 0 balanced, ``E - 1`` with one expert used.

    Args:
        load: Assignments per expert, shape ``(..., E)``.
    """
    return _relative_to_mean(load).amax(dim=-1)


def min_violation(load: Tensor) -> Tensor:
    """Returns MinVio, ``min_e c_e / mean(c) - 1``: 0 when balanced, -1 with an expert never used.

    Args:
        load: Assignments per expert, shape ``(..., E)``.
    """
    return _relative_to_mean(load).amin(dim=-1)


def mean_violation(load: Tensor) -> Tensor:
    """Returns AvgVio, ``mean_e |c_e / mean(c) - 1|``: 0 balanced, ``2 - 2 / E`` with one used.

    Args:
        load: Assignments per expert, shape ``(..., E)``.
    """
    return _relative_to_mean(load).abs().mean(dim=-1)


def _relative_to_mean(load: Tensor) -> Tensor:
    """Returns ``c_e / mean(c) - 1`` in float64; 0 where nothing was assigned, which is balanced."""
    counts = load.double()
    mean = counts.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, counts / mean, 1.0) - 1
