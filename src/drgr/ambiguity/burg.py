"""The Burg entropy, or reverse Kullback-Leibler divergence."""

from dataclasses import dataclass
from typing import final

from drgr.ambiguity.power_family import PowerDivergence


@final
@dataclass(frozen=True, slots=True)
class Burg(PowerDivergence):
    r"""Reverse Kullback-Leibler divergence ``KL(p||q) = -sum_i p_i log(q_i / p_i)``, in nats.

    Generator ``f(r) = -log r + r - 1``, conjugate ``f*(s) = -log(1 - s)`` for ``s < 1``,
    ``f''(1) = 1``. Weights are ``q_i = p_i lam / (nu - l_i)`` with ``nu = lam + eta`` above the
    largest loss: every atom keeps some mass and no radius saturates.

    The slope of ``f`` at infinity is finite, so the value follows the largest loss of a sample: use
    it over domains or other fixed atoms, not over samples.

    Complexity:
        O(n) per function evaluation, about 8 evaluations.

    References:
        Ben-Tal, den Hertog, De Waegenaere, Melenberg, Rennen, *Robust Solutions of Optimization
        Problems Affected by Uncertain Probabilities*, Management Science 2013, table 2.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=Burg(), penalty=1.0).weights
        tensor([0.0970, 0.1369, 0.7661])
    """

    @property
    def power(self) -> float:
        """The order 0 of the Cressie-Read family, as a limit."""
        return 0.0

    @property
    def scale(self) -> float:
        """1: the normalisation of the family."""
        return 1.0
