r"""Directions along the budget surface: projection of vectors, and transport of momentum.

With the normals ``n_j`` of the budgets at a point, stacked as rows of ``A``,

    P(g) = g - A^T (A A^T)^+ A g          m <- P_new(m)

The pseudo-inverse is that of an orthonormal basis of the rows: budgets that say the same twice, or
that no choice moves any more, take nothing away.
"""

import torch
from torch import Tensor

from drgr.budgets.static.choices import ChoiceBudgets, budget_normals

# Normals whose share outside the span of the others is smaller count as dependent.
_DEPENDENT = 1e-12


def normal_basis(logits: Tensor, budgets: ChoiceBudgets) -> Tensor:
    """Returns an orthonormal basis of the normals of all budgets at a point.

    Args:
        logits: Logits, finite or ``-inf``, shape ``(N, K)``.
        budgets: Costs of ``m`` budgets.

    Returns:
        Shape ``(r, N, K)``, float64; ``r <= m`` is the number of independent normals. A budget
        whose choices are all made, to rounding below ``1e-308``, has none.

    Raises:
        ValueError: If the logits do not fit the budgets.

    Complexity:
        ``O(m^2 N K)``.

    Examples:
        >>> import torch
        >>> costs = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
        >>> twice = ChoiceBudgets(torch.stack([costs, 2 * costs]), torch.tensor([2.0, 4.0]))
        >>> normal_basis(torch.zeros(2, 2), twice).shape
        torch.Size([1, 2, 2])
    """
    normals = budget_normals(logits, budgets).flatten(1)
    largest = normals.abs().amax(dim=1, keepdim=True)
    moving = (largest > 0).squeeze(1)
    rows = normals[moving] / largest[moving]
    rows = rows / rows.norm(dim=1, keepdim=True)
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = right[singular > _DEPENDENT * singular[:1]]
    return basis.view(-1, *logits.shape)


def project_tangent(vector: Tensor, basis: Tensor) -> Tensor:
    r"""Returns the nearest vector along which no budget changes to first order.

    .. math:: \min_v \tfrac12 \|v - g\|^2 \ \text{s.t.}\ \langle v, n_j \rangle = 0
              \ \text{for all } j .

    Args:
        vector: Vector ``g``, for instance a gradient in the logits, shape ``(N, K)``.
        basis: The :func:`normal_basis` at the point, shape ``(r, N, K)``.

    Returns:
        Shape ``(N, K)``, float64. Subtracted twice, so that it is orthogonal to rounding.

    Raises:
        ValueError: If the shapes differ.

    Complexity:
        ``O(r N K)``.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        >>> basis = normal_basis(torch.zeros(2, 2), budgets)
        >>> bool(project_tangent(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), basis)[0, 1] == 0.5)
        True
    """
    if vector.shape != basis.shape[1:]:
        raise ValueError(
            f"vector must have the shape (N, K) of the basis, {tuple(basis.shape[1:])}, "
            f"got {tuple(vector.shape)}"
        )
    rows, flat = basis.flatten(1), vector.double().flatten()
    for _ in range(2):
        flat = flat - rows.T @ (rows @ flat)
    return flat.view(vector.shape)


def transport(momentum: Tensor, new_basis: Tensor) -> Tensor:
    r"""Returns a momentum carried to another point: projected onto the directions there.

    Only the first moment of an optimizer is a direction; a second moment is a scale and stays.

    Args:
        momentum: Momentum from the point before, shape ``(N, K)``.
        new_basis: The :func:`normal_basis` at the new point, shape ``(r, N, K)``.

    Returns:
        Shape ``(N, K)``, float64.

    Raises:
        ValueError: If the shapes differ.

    Complexity:
        ``O(r N K)``.

    References:
        RCO, arXiv 2605.00649. Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix
        Manifolds*, 2008, section 8.1 (transport by projection).

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        >>> basis = normal_basis(torch.zeros(2, 2), budgets)
        >>> moved = transport(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), basis)
        >>> bool((moved * basis[0]).sum().abs() < 1e-15)
        True
    """
    return project_tangent(momentum, new_basis)
