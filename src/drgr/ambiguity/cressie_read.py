"""The Cressie-Read divergences and their reparametrisation by Amari's alpha."""

import math
from dataclasses import dataclass
from typing import final

from drgr.ambiguity.power_family import PowerDivergence

_LARGEST_POWER = 50.0


@final
@dataclass(frozen=True, slots=True)
class CressieRead(PowerDivergence):
    r"""Cressie-Read divergence of order ``k``, from KL (``k = 1``) to chi-square (``k = 2``).

    Generator ``f(r) = (r^k - k r + k - 1) / (k (k - 1))``, conjugate
    ``f*(s) = ((1 + (k - 1) s)_+^{k / (k - 1)} - 1) / k``, ``f''(1) = 1``. Weights are
    ``q_i = p_i (1 + (k - 1) (l_i - eta) / lam)_+^{1 / (k - 1)}``: for ``k > 1`` atoms far below the
    worst get exactly zero, for ``k < 1`` all keep some mass. With ``P`` the nominal mass of the
    largest loss, the radius saturates at ``(P^{1 - k} - 1) / (k (k - 1))`` for ``k > 0``, and never
    for ``k <= 0``.

    Conversions: order 2 is :class:`ChiSquare`, 1 :class:`KL`, 1/2 four times :class:`Hellinger`,
    0 :class:`Burg`, -1 :class:`Neyman`. The Tsallis divergence of order ``k`` is ``k`` times this.
    A Renyi ball of radius ``R`` is the ball of radius ``(e^{(k - 1) R} - 1) / (k (k - 1))``.

    Args:
        power: The order ``k``, finite and at most 50 in magnitude; also called lambda + 1.

    Raises:
        ValueError: If the order is out of range.

    Complexity:
        O(n) per function evaluation, about 8 evaluations.

    References:
        Cressie and Read, *Multinomial Goodness-of-Fit Tests*, JRSS B 1984; Duchi and Namkoong,
        *Learning Models with Uniform Performance via DRO*, Annals of Statistics 2021.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> losses = torch.tensor([1.0, 2.0, 4.0])
        >>> worst_case(losses, divergence=CressieRead(1.5), radius=0.3).weights
        tensor([0.0840, 0.2218, 0.6943])
    """

    power: float

    def __post_init__(self) -> None:
        _check_power("power", self.power, "choose an order between -50 and 50")

    @property
    def scale(self) -> float:
        """1: the normalisation of the family."""
        return 1.0


@final
@dataclass(frozen=True, slots=True)
class AlphaDivergence(PowerDivergence):
    r"""Amari's alpha-divergence, ``4 / (1 - alpha^2) (1 - sum_i p_i (q_i / p_i)^{(1 + alpha)/2})``.

    It is :class:`CressieRead` of order ``k = (1 + alpha) / 2`` with the same normalisation
    (``f''(1) = 1``): ``alpha = 1`` is KL, ``-1`` Burg, ``0`` four times :class:`Hellinger`, ``3``
    chi-square. Authors differ in the sign of alpha; here a larger alpha punishes large ratios more.

    Args:
        alpha: Finite, between -101 and 99.

    Raises:
        ValueError: If alpha is out of range.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> losses = torch.tensor([1.0, 2.0, 4.0])
        >>> worst_case(losses, divergence=AlphaDivergence(0.0), radius=0.4).weights
        tensor([0.0908, 0.1485, 0.7607])
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_power("(1 + alpha) / 2", self.power, "choose alpha between -101 and 99")

    @property
    def power(self) -> float:
        """The order ``(1 + alpha) / 2`` of the Cressie-Read family."""
        return (1 + self.alpha) / 2

    @property
    def scale(self) -> float:
        """1: the normalisation of the family."""
        return 1.0


def _check_power(name: str, power: float, remedy: str) -> None:
    if not (math.isfinite(power) and abs(power) <= _LARGEST_POWER):
        raise ValueError(
            f"{name} must be a finite number of at most {_LARGEST_POWER:g} in magnitude, "
            f"got {power}; {remedy}"
        )
