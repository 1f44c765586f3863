"""The exact solver that hard selection is tested against."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp


@pytest.fixture(scope="session")
def best_value() -> Callable[..., float | None]:
    """Value of the best plan by HiGHS, None if there is none: ``best_value(scores, costs, ...)``.

    ``per_token`` is a pair of numbers or arrays; ``per_batch`` and ``per_expert`` as in a budget;
    ``whole=False`` allows fractions. Bounds count up to 1e-9.
    """
    return _best_value


def _best_value(
    scores: np.ndarray,
    costs: np.ndarray,
    *,
    per_token: tuple[np.ndarray | float, np.ndarray | float],
    per_batch: float = np.inf,
    per_expert: np.ndarray | float = np.inf,
    whole: bool = True,
) -> float | None:
    num_tokens, num_experts = scores.shape
    allowed = np.isfinite(scores)
    low, high = (np.broadcast_to(bound, num_tokens) for bound in per_token)
    bounds = [
        (np.kron(np.eye(num_tokens), costs), low, high),
        (np.tile(costs, num_tokens)[None], 0.0, per_batch),
        (np.tile(np.diag(costs), num_tokens), 0.0, np.broadcast_to(per_expert, num_experts)),
    ]
    found = milp(
        -np.where(allowed, scores, 0.0).ravel(),
        constraints=[LinearConstraint(a, lo - 1e-9, up + 1e-9) for a, lo, up in bounds],
        bounds=(0.0, allowed.ravel().astype(float)),
        integrality=np.full(scores.size, int(whole)),
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else -found.fun
