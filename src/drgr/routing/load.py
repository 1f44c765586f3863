"""How evenly the experts of one layer are used."""

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
    counts = load.double()
    mean = counts.mean(dim=-1)
    return counts.amax(dim=-1) / mean.clamp_min(1 / load.shape[-1]) - 1


def min_violation(load: Tensor) -> Tensor:
    """Returns MinVio, ``min_e c_e / mean(c) - 1``: 0 when balanced, -1 with an expert never used.

    Args:
        load: Assignments per expert, shape ``(..., E)``.
    """
    counts = load.double()
    mean = counts.mean(dim=-1)
    return counts.amin(dim=-1) / mean.clamp_min(1 / load.shape[-1]) - 1
