"""The total variation distance, solved exactly by sorting."""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from drgr.ambiguity.divergence import (
    Problem,
    SaddlePoint,
    divergence_of_top,
    exact_saddle_point,
    restricted_to_top,
)
from drgr.ambiguity.quantiles import upper_tail

_DOMAIN_SLACK = 1e-12


@final
@dataclass(frozen=True, slots=True)
class TotalVariation:
    r"""Total variation ``1/2 sum_i |q_i - p_i|``, the largest difference of an event's probability.

    Generator ``f(r) = |r - 1| / 2``, conjugate ``f*(s) = max(s, -1/2)`` for ``s <= 1/2``. The worst
    case moves mass ``rho`` from the smallest losses to the largest, so that
    ``V = rho l_max + (1 - rho) CVaR_{1 - rho}(l)``; penalised, it moves the mass of every loss more
    than ``lam`` below the largest: ``R = sum_i p_i max(l_i, l_max - lam)``. The radius lies in
    ``[0, 1]`` and saturates at ``1 - P``, where ``P`` is the nominal mass of the largest loss.
    Among atoms of equal loss mass moves in proportion to the nominal.

    Conversions: the l1 distance is twice this. The value follows the largest loss of a sample: use
    it over domains or other fixed atoms, not over samples. Weights are piecewise constant in the
    losses, so they have no useful derivative.

    Complexity:
        O(n log n) time, O(n) memory.

    References:
        Jiang and Guan, *Risk-Averse Two-Stage Stochastic Program with Distributional Ambiguity*,
        Operations Research 2018.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> losses = torch.arange(1.0, 11.0)
        >>> worst_case(losses, divergence=TotalVariation(), radius=0.25).value
        tensor(7.5500)
    """

    has_level: ClassVar[bool] = True

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Returns ``|r - 1| / 2``."""
        return torch.expm1(log_ratio).abs() / 2

    def conjugate(self, slope: Tensor) -> Tensor:
        """Returns ``max(s, -1/2)``; ``inf`` for ``s > 1/2``."""
        values = slope.clamp_min(-0.5)
        return values.masked_fill(slope > 0.5 + _DOMAIN_SLACK, torch.inf)

    def limit(self, problem: Problem) -> Tensor:
        """Returns the nominal restricted to the largest loss."""
        return restricted_to_top(problem)

    def saturation_radius(self, problem: Problem) -> Tensor:
        """Returns the divergence of the nominal restricted to the largest loss."""
        return divergence_of_top(self.generator, problem)

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        """Solves by sorting: the mass that moves is the lower tail of mass ``radius``."""
        tail = upper_tail(replace(problem, losses=-problem.losses), radius)
        return _moved(problem, tail.above, tail.at, tail.share, -tail.quantile)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        """Solves in closed form."""
        below = problem.losses < -penalty.unsqueeze(-1)
        nothing = torch.zeros_like(penalty)
        return _moved(problem, below, torch.zeros_like(below), nothing, -penalty)


def _moved(
    problem: Problem, below: Tensor, at: Tensor, share: Tensor, lowest: Tensor
) -> SaddlePoint:
    """Returns the saddle point that takes all mass ``below``, a ``share`` of that ``at``."""
    top = problem.is_top()
    moved = (problem.nominal * below).sum(dim=-1) + share * (problem.nominal * at).sum(dim=-1)
    gain = moved / (problem.nominal * top).sum(dim=-1)
    log_ratio = torch.where(top, torch.log1p(gain).unsqueeze(-1), 0.0)
    left = torch.log1p(-share).unsqueeze(-1)
    log_ratio = torch.where(at & ~top, left, log_ratio).masked_fill(below & ~top, -torch.inf)
    # Beyond the range of the losses nothing moves; a threshold amid them keeps the dual's digits.
    threshold = lowest.clamp_min(-1.0) / 2
    return exact_saddle_point(log_ratio=log_ratio, multiplier=-lowest, threshold=threshold)
