"""The Neyman chi-square divergence."""

from dataclasses import dataclass
from typing import final

from drgr.ambiguity.power_family import PowerDivergence


@final
@dataclass(frozen=True, slots=True)
class Neyman(PowerDivergence):
    r"""Half the Neyman chi-square divergence, ``1/2 sum_i (q_i - p_i)^2 / q_i``.

    Generator ``f(r) = (r - 1)^2 / (2 r)``, conjugate ``f*(s) = 1 - sqrt(1 - 2 s)`` for
    ``s <= 1/2``, ``f''(1) = 1``. Weights are proportional to ``p_i (nu - l_i)^{-1/2}`` with ``nu``
    above the largest loss: every atom keeps some mass and no radius saturates.

    Conversions: Neyman's statistic without the half is twice this; it is Cressie-Read of order -1,
    and :class:`ChiSquare` with the two distributions exchanged. The slope of ``f`` at infinity is
    finite: use it over domains or other fixed atoms, not over samples.

    Complexity:
        O(n) per function evaluation, about 8 evaluations.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=Neyman(), radius=0.1).weights
        tensor([0.2052, 0.2431, 0.5517])
    """

    @property
    def power(self) -> float:
        """The order -1 of the Cressie-Read family."""
        return -1.0

    @property
    def scale(self) -> float:
        """1: the normalisation of the family."""
        return 1.0
