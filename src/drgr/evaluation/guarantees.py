"""What a radius and a sparsity penalty guarantee together: risk against communication.

The functions evaluate section 8 of ``docs/theory.md``.
"""

import math

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive, check_shape


def robust_slope(gradients: Tensor, *, radius: float, nominal: Tensor | None = None) -> Tensor:
    r"""Bounds the gradient of a chi-square worst case by its radius (theory.md 8.1).

    ``|sum_d p_d g_d| + sqrt(2 rho lam)`` with ``lam`` the largest eigenvalue of the covariance of
    the domains' gradients ``g_d``; never more than ``max_d |g_d|``.

    Args:
        gradients: ``g_d``, gradients of the domain losses in the gates, shape ``(G, n)``.
        radius: ``rho >= 0`` of a ``ChiSquare`` ball.
        nominal: Probabilities ``p``, shape ``(G,)``; uniform if None.

    Returns:
        Shape ``()``, float64.

    Raises:
        ValueError: If a shape or the radius is wrong.

    Examples:
        >>> import torch
        >>> robust_slope(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), radius=0.125)
        tensor(2.5000, dtype=torch.float64)
    """
    check_shape("gradients", gradients, (None, None))
    check_not_negative("radius", radius)
    values = gradients.detach().double()
    num_domains = len(values)
    weights = torch.full((num_domains,), 1 / num_domains, dtype=torch.float64)
    if nominal is not None:
        check_shape("nominal", nominal, (num_domains,))
        weights = nominal.double() / nominal.double().sum()
    mean = weights @ values
    spread = torch.linalg.matrix_norm(weights.sqrt().unsqueeze(1) * (values - mean), ord=2)
    largest = values[weights > 0].norm(dim=1).max()
    return torch.minimum(mean.norm() + math.sqrt(2 * radius) * spread, largest)


def sparse_risk_bound(
    *, competitor_value: float, competitor_norm: float, penalty: float, suboptimality: float = 0.0
) -> float:
    r"""Bounds the worst-case risk of a sparse policy by that of any other (theory.md 8.2).

    ``V(l(x')) + omega sum_g |x'_g| + eps``, for every mixture in the ball.

    Args:
        competitor_value: ``V(l(x'))``, the worst case of the other policy ``x'``.
        competitor_norm: ``sum_g |x'_g|``.
        penalty: ``omega >= 0``.
        suboptimality: ``eps``: by how much ``V + omega sum_g |x_g|`` of the policy may exceed its
            *global* minimum.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> sparse_risk_bound(competitor_value=2.0, competitor_norm=3.0, penalty=0.5)
        3.5
    """
    check_not_negative("competitor_norm", competitor_norm)
    check_not_negative("penalty", penalty)
    check_not_negative("suboptimality", suboptimality)
    return competitor_value + penalty * competitor_norm + suboptimality


def penalty_for_links(*, slope: float, num_links: int) -> float:
    r"""Returns a penalty with which no more links stay open at stationarity (theory.md 8.1).

    ``slope / sqrt(s)``: the smallest for which ``(slope / omega)^2 <= s``.

    Args:
        slope: A bound on the norm of the gradient in the gates, as of :func:`robust_slope`.
        num_links: ``s``, at least 1.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> penalty_for_links(slope=2.0, num_links=16)
        0.5
    """
    check_not_negative("slope", slope)
    check_positive("num_links", num_links)
    return slope / math.sqrt(num_links)
