"""How concentrated a vector of weights is."""

import torch
from torch import Tensor

from drgr._checks import check_positive


def effective_number(weights: Tensor) -> Tensor:
    """Returns ``1 / sum_i q_i^2``: ``n`` for uniform weights, 1 for all weight on one atom.

    Args:
        weights: Probabilities, shape ``(..., n)``, floating point.

    Returns:
        Shape ``(...)``, dtype of ``weights``. Differentiable.

    Raises:
        ValueError: If ``weights`` has no last dimension.

    Examples:
        >>> import torch
        >>> effective_number(torch.tensor([0.5, 0.5, 0.0]))
        tensor(2.)
    """
    if weights.dim() == 0:
        raise ValueError("weights must have shape (..., n), got a scalar; give a vector of weights")
    return 1 / weights.square().sum(dim=-1)


def is_near_one_hot(weights: Tensor, *, threshold: float = 1.5) -> Tensor:
    """Returns whether nearly all weight sits on one of several atoms.

    Such weights train on one domain and ignore the others; a larger penalty or a smaller radius
    spreads them. A single atom is never an alarm.

    Args:
        weights: Probabilities, shape ``(..., n)``, floating point.
        threshold: Effective number of atoms below which the weights count as collapsed; above 1.

    Returns:
        bool, shape ``(...)``.

    Raises:
        ValueError: If ``threshold`` is not above 1 or ``weights`` has no last dimension.

    Examples:
        >>> import torch
        >>> is_near_one_hot(torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]]))
        tensor([ True, False])
    """
    check_positive("threshold", threshold)
    if threshold <= 1:
        raise ValueError(
            f"threshold must be above 1, got {threshold}; weights never count fewer than 1"
        )
    collapsed = effective_number(weights) < threshold
    return collapsed if weights.shape[-1] > 1 else torch.zeros_like(collapsed)
