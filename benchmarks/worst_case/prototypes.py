"""Straightforward NumPy solvers: weights of one vector of losses under any nominal, uncertified."""

from collections.abc import Callable

import numpy as np

RADIUS = 0.1
LEVEL = 0.1

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
Solver = Callable[[Vector, Vector], Vector]


def kl(losses: Vector, nominal: Vector) -> Vector:
    """Newton's method on ``tau E_q l - log Z = rho``."""
    shifted = losses - losses.max()
    spread = nominal @ shifted**2 - (nominal @ shifted) ** 2
    tau = np.sqrt(2 * RADIUS / spread)
    for _ in range(100):
        mass = nominal * np.exp(tau * shifted)
        total = mass.sum()
        mean = mass @ shifted / total
        variance = mass @ shifted**2 / total - mean**2
        residual = tau * mean - np.log(total) - RADIUS
        if abs(residual) < 1e-13:
            break
        tau -= residual / (tau * variance)
    weights: Vector = mass / total
    return weights


def chi_square(losses: Vector, nominal: Vector) -> Vector:
    """The finite algorithm on sorted losses and running sums."""
    order = np.argsort(-losses)
    ordered, mass = losses[order], nominal[order]
    share = np.cumsum(mass)
    mean = np.cumsum(mass * ordered) / share
    variance = np.maximum(np.cumsum(mass * ordered**2) / share - mean**2, 0)
    curvature = (1 + 2 * RADIUS) * share - 1
    cut = np.where(curvature > 0, mean - np.sqrt(variance / np.maximum(curvature, 1e-300)), -np.inf)
    below = np.append(ordered[1:], -np.inf)
    index = int(np.argmax((ordered > cut) & (cut >= below)))
    heights: Vector = nominal * np.maximum(losses - cut[index], 0)
    heights /= heights.sum()
    return heights


def cvar(losses: Vector, nominal: Vector) -> Vector:
    """The largest losses at the cap, with a fraction at the boundary."""
    return _greedy(-losses, nominal, LEVEL) / LEVEL


def total_variation(losses: Vector, nominal: Vector) -> Vector:
    """Mass moved from the smallest losses to the largest."""
    weights: Vector = nominal - _greedy(losses, nominal, RADIUS)
    weights[np.argmax(losses)] += RADIUS
    return weights


def _greedy(keys: Vector, nominal: Vector, amount: float) -> Vector:
    """Returns an amount of mass taken from the atoms of the smallest keys."""
    order = np.argsort(keys)
    mass = nominal[order]
    taken: Vector = np.empty_like(mass)
    taken[order] = np.clip(amount - (np.cumsum(mass) - mass), 0, mass)
    return taken


PROTOTYPES: dict[str, Solver] = {
    "KL": kl,
    "ChiSquare": chi_square,
    "CVaR": cvar,
    "TotalVariation": total_variation,
}
