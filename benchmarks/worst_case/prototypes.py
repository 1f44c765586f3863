"""Straightforward NumPy solvers for a uniform nominal: what a user would write at best."""

from collections.abc import Callable

import numpy as np

RADIUS = 0.1
LEVEL = 0.1


def kl(losses: np.ndarray) -> float:
    """Newton's method on ``tau E_q l - log Z = rho``."""
    shifted = losses - losses.max()
    tau = np.sqrt(2 * RADIUS / shifted.var())
    for _ in range(100):
        mass = np.exp(tau * shifted)
        total = mass.sum()
        mean = mass @ shifted / total
        variance = mass @ shifted**2 / total - mean**2
        residual = tau * mean - np.log(total / len(losses)) - RADIUS
        tau -= residual / (tau * variance)
        if abs(residual) < 1e-13:
            break
    return float(losses.max() + mean)


def chi_square(losses: np.ndarray) -> float:
    """The finite algorithm on sorted losses and running sums."""
    ordered = np.sort(losses)[::-1]
    count = np.arange(1, len(losses) + 1)
    share = count / len(losses)
    mean = np.cumsum(ordered) / count
    variance = np.maximum(np.cumsum(ordered**2) / count - mean**2, 0)
    curvature = (1 + 2 * RADIUS) * share - 1
    cut = np.where(curvature > 0, mean - np.sqrt(variance / np.maximum(curvature, 1e-300)), -np.inf)
    below = np.append(ordered[1:], -np.inf)
    index = int(np.argmax((ordered > cut) & (cut >= below)))
    tail = ordered[: index + 1]
    weights = tail - cut[index]
    return float(weights @ tail / weights.sum())


def cvar(losses: np.ndarray) -> float:
    """The mean of the largest losses, with a fraction of the one at the boundary."""
    ordered = np.sort(losses)[::-1]
    whole = int(LEVEL * len(losses))
    rest = LEVEL * len(losses) - whole
    weights = np.zeros(len(losses))
    weights[:whole] = 1
    weights[whole] = rest
    return float(weights @ ordered / (LEVEL * len(losses)))


def total_variation(losses: np.ndarray) -> float:
    """Mass moved from the smallest losses to the largest."""
    ordered = np.sort(losses)
    mass = np.full(len(losses), 1 / len(losses))
    taken = np.minimum(np.maximum(RADIUS - (np.cumsum(mass) - mass), 0), mass)
    mass -= taken
    mass[-1] += RADIUS
    return float(mass @ ordered)


PROTOTYPES: dict[str, Callable[[np.ndarray], float]] = {
    "KL": kl,
    "ChiSquare": chi_square,
    "CVaR": cvar,
    "TotalVariation": total_variation,
}
