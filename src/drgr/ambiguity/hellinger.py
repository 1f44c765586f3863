"""The squared Hellinger distance."""

from dataclasses import dataclass
from typing import final

from drgr.ambiguity.power_family import PowerDivergence


@final
@dataclass(frozen=True, slots=True)
class Hellinger(PowerDivergence):
    r"""Half the squared distance of square roots, ``1/2 sum_i (sqrt(q_i) - sqrt(p_i))^2``.

    Generator ``f(r) = (sqrt(r) - 1)^2 / 2``, conjugate ``f*(s) = s / (1 - 2 s)`` for ``s < 1/2``,
    ``f''(1) = 1/4``. Weights are proportional to ``p_i (nu - l_i)^{-2}``. The radius lies in
    ``[0, 1]`` and saturates at ``1 - sqrt(P)``, where ``P`` is the nominal mass of the largest
    loss.

    Conversions: the squared distance without the half is twice this; the distance with values in
    ``[0, 1]`` is its square root; Cressie-Read of order 1/2 is 4 times it; the Bhattacharyya
    coefficient is 1 less it. To compare with divergences of ``f''(1) = 1``, multiply their radius
    by 1/4.

    Complexity:
        O(n) per function evaluation, about 8 evaluations.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=Hellinger(), radius=0.1).weights
        tensor([0.0908, 0.1485, 0.7607])
    """

    @property
    def power(self) -> float:
        """The order 1/2 of the Cressie-Read family."""
        return 0.5

    @property
    def scale(self) -> float:
        """A quarter of the family's normalisation."""
        return 0.25
