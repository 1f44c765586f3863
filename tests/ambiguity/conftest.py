"""Oracles for worst cases: SciPy and NumPy only, no code of the package."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import logsumexp, rel_entr


def kl_divergence(q: np.ndarray, p: np.ndarray) -> float:
    return float(rel_entr(q, p).sum() - q.sum() + p.sum())


def chi_square_divergence(q: np.ndarray, p: np.ndarray) -> float:
    return float(((q - p) ** 2 / p).sum() / 2)


def kl_penalized(losses, p, penalty) -> float:
    return float(penalty * logsumexp(losses / penalty, b=p))


def kl_constrained(losses, p, radius) -> float:
    """Weak dual in the logarithm of the multiplier, minimised without derivatives."""
    spread = losses.max() - losses.min()

    def dual(log_multiplier: float) -> float:
        multiplier = np.exp(log_multiplier)
        return multiplier * radius + kl_penalized(losses, p, multiplier)

    middle = np.log(spread)
    return _smallest(dual, middle - 25, middle + 25)


def chi_square_constrained(losses, p, radius) -> float:
    """Scalar dual in the cut of the losses."""

    def dual(cut: float) -> float:
        return cut + np.sqrt((1 + 2 * radius) * (p * np.maximum(losses - cut, 0) ** 2).sum())

    spread = losses.max() - losses.min()
    return _smallest(dual, losses.max() - spread * (2 + 2 / np.sqrt(radius)), losses.max())


def chi_square_penalized(losses, p, penalty) -> float:
    def excess(cut: float) -> float:
        return (p * np.maximum(losses - cut, 0)).sum() - penalty

    cut = brentq(excess, losses.min() - penalty - 1, losses.max(), xtol=1e-14, rtol=1e-15)
    q = p * np.maximum(losses - cut, 0)
    q /= q.sum()
    return float(q @ losses - penalty * chi_square_divergence(q, p))


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    """Minimum of a convex function: a grid to bracket it, then Brent's method, repeated."""
    best = np.inf
    for _ in range(3):
        grid = np.linspace(low, high, 400)
        values = [function(point) for point in grid]
        index = int(np.argmin(values))
        low, high = grid[max(index - 1, 0)], grid[min(index + 1, len(grid) - 1)]
        best = min(best, values[index])
    result = minimize_scalar(
        function, bounds=(low, high), method="bounded", options={"xatol": 1e-14}
    )
    return min(best, float(result.fun))


def primal_by_slsqp(divergence, losses, p, *, radius=None, penalty=None) -> float:
    """Primal problem by sequential quadratic programming, for a handful of atoms."""
    scale = losses.max() - losses.min()
    scaled = (losses - losses.mean()) / scale

    def objective(q: np.ndarray) -> float:
        cost = 0.0 if penalty is None else penalty / scale * divergence(np.maximum(q, 1e-300), p)
        return cost - q @ scaled

    constraints = [{"type": "eq", "fun": lambda q: q.sum() - 1}]
    if radius is not None:
        inside = {"type": "ineq", "fun": lambda q: radius - divergence(np.maximum(q, 1e-300), p)}
        constraints.append(inside)
    result = minimize(
        objective,
        p,
        method="SLSQP",
        bounds=[(0, 1)] * len(p),
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return float(losses.mean() - scale * result.fun)


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """``oracle.KL`` and ``oracle.ChiSquare``: divergence, constrained value, penalised value."""
    return SimpleNamespace(
        KL=SimpleNamespace(
            divergence=kl_divergence, constrained=kl_constrained, penalized=kl_penalized
        ),
        ChiSquare=SimpleNamespace(
            divergence=chi_square_divergence,
            constrained=chi_square_constrained,
            penalized=chi_square_penalized,
        ),
        slsqp=primal_by_slsqp,
    )
