"""The Kullback-Leibler divergence."""

from dataclasses import dataclass
from typing import final

from drgr.ambiguity.power_family import PowerDivergence


@final
@dataclass(frozen=True, slots=True)
class KL(PowerDivergence):
    r"""Kullback-Leibler divergence ``KL(q||p) = sum_i q_i log(q_i / p_i)``, in nats.

    Generator ``f(r) = r log r - r + 1``, conjugate ``f*(s) = e^s - 1``, ``f''(1) = 1``. Weights are
    ``q_i = p_i exp((l_i - eta) / lam)``. The radius saturates at ``-log P``, where ``P`` is the
    nominal mass of the largest loss.

    - Penalised: closed form, ``eta = lam log sum_i p_i exp(l_i / lam)``, which is also the value.
    - Constrained: one scalar root in ``tau = 1 / lam``; the divergence is evaluated without
      cancellation, so that tiny radii keep their digits.

    One step of the exponentiated gradient from weights ``p`` with rate ``a`` is the penalised worst
    case with nominal ``p`` and penalty ``1 / a``.

    Conversions: a radius in bits is this radius over ``log 2``.

    Complexity:
        O(n) per function evaluation; 1 evaluation penalised, about 6 constrained.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=KL(), penalty=1.0).weights
        tensor([0.0420, 0.1142, 0.8438])
    """

    @property
    def power(self) -> float:
        """The order 1 of the Cressie-Read family."""
        return 1.0

    @property
    def scale(self) -> float:
        """1: the normalisation of the family."""
        return 1.0
