"""How the costs of experts respond to their prices, and systems of equations with that response."""

import torch
from torch import Tensor


def curvature(weights: Tensor, *, pinned: Tensor, batch_binds: Tensor) -> Tensor:
    """Returns how fast the experts' costs fall in their prices while the bounds stay met.

    Args:
        weights: ``c_e^2 phi'`` of each entry, shape ``(T, E)``: the same at fixed other prices.
        pinned: Whether a token's own price keeps its cost, bool ``(T,)``.
        batch_binds: Whether the batch price keeps the cost of the other tokens, bool ``()``.

    Returns:
        Symmetric positive semidefinite matrix ``(E, E)``.
    """
    rows = weights.sum(dim=1, keepdim=True)
    shares = torch.where(pinned.unsqueeze(1), weights / _or_one(rows), 0.0)
    free = torch.where(pinned.unsqueeze(1), 0.0, weights).sum(dim=0)
    batch = torch.where(batch_binds, free / _or_one(free.sum()), 0.0)
    return weights.sum(dim=0).diag() - shares.T @ weights - torch.outer(batch, free)


def solve_where(
    matrix: Tensor, right: Tensor, *, active: Tensor, scale: Tensor, rank_tolerance: float
) -> Tensor:
    """Solves the symmetric system of the active unknowns; the others are 0.

    Args:
        matrix: Positive semidefinite, shape ``(E, E)``; may be singular.
        right: Right side, shape ``(E,)``.
        active: Which unknowns to solve for, bool ``(E,)``.
        scale: Size of each diagonal entry before cancellation, shape ``(E,)``.
        rank_tolerance: Eigenvalues below this share of the largest count as 0.

    Returns:
        The solution that is smallest in the scaled unknowns, shape ``(E,)``; differentiable.
    """
    kept = active & (scale > 0)
    unit = torch.where(kept, scale, 1.0).rsqrt() * kept
    scaled = unit.unsqueeze(1) * matrix * unit
    inverse: Tensor = torch.linalg.pinv(scaled, rtol=rank_tolerance, hermitian=True)
    solution: Tensor = unit * (inverse @ (unit * torch.where(kept, right, 0.0)))
    return solution


def _or_one(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 1.0)
