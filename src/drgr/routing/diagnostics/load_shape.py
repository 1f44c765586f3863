"""The shape of a load: percentiles, the overload of its busiest place, experts that get nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_shape


def load_percentiles(
    load: Tensor, percentiles: Sequence[float] = (0, 5, 25, 50, 75, 95, 100)
) -> Tensor:
    """Returns percentiles of the experts' loads over the mean load.

    Args:
        load: Assignments per expert, shape ``(..., E)``.
        percentiles: Numbers in [0, 100]; between experts the value is interpolated linearly.

    Returns:
        Shape ``(number of percentiles, ...)``, float64; 1 is the mean load, and all are 1 where
        nothing was assigned.

    Raises:
        ValueError: If a percentile is outside [0, 100].
    """
    for value in percentiles:
        if not 0 <= value <= 100:
            raise ValueError(f"percentiles must lie in [0, 100], got {value}")
    ranks = torch.tensor(list(percentiles), dtype=torch.float64, device=load.device) / 100
    return torch.quantile(_over_mean(load.double()), ranks, dim=-1)


def overload_factor(load: Tensor, *, capacity: Tensor | None = None) -> Tensor:
    r"""Returns how many times its share the busiest expert, or device, has to do.

    .. math:: \max_e \frac{c_e / \sum_j c_j}{\kappa_e / \sum_j \kappa_j}

    Args:
        load: Assignments per expert, or summed per device, shape ``(..., E)``.
        capacity: Capacities ``kappa > 0`` in any unit, shape ``(E,)``; equal by default, which
            gives ``1 + MaxVio``.

    Returns:
        Shape ``(...)``, float64, at least 1; 1 where nothing was assigned.

    Raises:
        ValueError: If ``capacity`` does not fit or is not positive and finite.

    References:
        *Least-Loaded Expert Parallelism*, ICML 2026 (arXiv:2601.17111), the imbalance ratio there;
        unequal capacities are ours.
    """
    counts = load.double()
    if capacity is None:
        return _over_mean(counts).amax(dim=-1)
    check_shape("capacity", capacity, (load.shape[-1],))
    share = capacity.double()
    if not bool(((share > 0) & share.isfinite()).all()):
        raise ValueError(f"capacity must be positive and finite, got {capacity.tolist()}")
    total = counts.sum(dim=-1, keepdim=True)
    relative = counts / torch.where(total > 0, total, 1.0) / (share / share.sum())
    return torch.where(total.squeeze(-1) > 0, relative.amax(dim=-1), 1.0)


def dead_experts(load: Tensor, *, below: float = 0.0) -> Tensor:
    """Counts the experts that are hardly ever used.

    Args:
        load: Assignments per expert over many batches, shape ``(..., E)``.
        below: An expert is dead with at most this share of the mean load, at least 0.

    Returns:
        Shape ``(...)``, int64; 0 where nothing was assigned at all, which says nothing of experts.

    Raises:
        ValueError: If ``below`` is negative or not finite.
    """
    check_not_negative("below", below)
    return (_over_mean(load.double()) <= below).sum(dim=-1) * (load.sum(dim=-1) > 0)


def _over_mean(counts: Tensor) -> Tensor:
    """Returns ``c_e / mean(c)``; 1 where nothing was assigned."""
    mean = counts.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, counts / torch.where(mean > 0, mean, 1.0), 1.0)
