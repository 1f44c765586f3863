r"""Spectral risk measures: weights by the rank of the loss, plain and penalised.

A concave distortion ``g`` of probability, ``g(0) = 0`` and ``g(1) = 1``, says how much weight the
atoms of the largest losses may have together: ``q(A) <= g(p(A))`` for every set ``A``. In
descending order of the losses with masses ``U_i`` down to atom ``i``,

.. math:: \sigma_i = g(U_i) - g(U_{i - 1}), \qquad
          V = \max_q \langle q, l \rangle = \sum_i \sigma_i l_{(i)} ,

and penalised by KL or chi-square, with ``w`` constant on the blocks of an isotonic regression,

.. math:: R = \min_{w \ \text{ordered like}\ l}\ \sum_i \sigma_i w_i
              + \lambda \sum_i p_i f^*((l_i - w_i) / \lambda) .
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, final

import numpy as np
import torch
from torch import Tensor

from drgr.ambiguity.certificate import CertifiedSaddlePoint, certified_status
from drgr.ambiguity.chi_square import ChiSquare
from drgr.ambiguity.distortions import Exponential, Extremile, Steps, Superquantile
from drgr.ambiguity.divergence import Problem
from drgr.ambiguity.kl import KL
from drgr.numerics import isotonic_blocks

_GRID = 257
_SHAPE_TOLERANCE = 1e-9
_LARGEST_PENALTY = 1e15  # the weights are the nominal to rounding
_FULL_MASS = 1 - 2.0**-53  # at 1 itself the formula of a distortion may have no slope
# Exponents below minus this have no digits left once they meet a small mass.
_WIDEST_TILT = 300.0


@final
@dataclass(frozen=True, slots=True)
class Spectral:
    r"""Spectral risk of a concave distortion of probability, in the order of the losses.

    The weights of atom ``i`` are ``g(U_i) - g(U_{i-1})``, where ``U`` sums the nominal over atoms
    of larger loss; atoms of equal loss share in proportion to their nominal mass. With uniform
    nominal and ``n`` atoms the largest loss has weight ``g(1/n)``. Without ``smoothing`` it takes
    neither radius nor penalty. With ``smoothing=KL()`` or ``ChiSquare()`` it takes a penalty on
    that divergence from the *nominal*, which makes the value smooth in the losses; it means the
    same for every number of atoms.

    Weights are piecewise constant (plain) or piecewise smooth in the losses; derivatives of the
    weights are not offered.

    Args:
        distortion: Concave, nondecreasing ``g`` with ``g(0) = 0``, ``g(1) = 1``, elementwise on
            float64 tensors in [0, 1] by differentiable operations. In terms of the spectrum ``S``
            of ascending losses it is ``g(u) = 1 - S(1 - u)``.
        smoothing: Divergence of the penalty, or None.

    Raises:
        ValueError: If the distortion is not such a function.

    Complexity:
        O(n log n) time, O(n) memory; penalised, a few rounds of pooling more. With KL and a penalty
        below 1/300 of the range of the losses, pooling runs on the host at the speed of Python.

    References:
        Acerbi, *Spectral Measures of Risk*, 2002; Mehta, Roulet, Pillutla, Liu, Harchaoui,
        *Stochastic Optimization for Spectral Risk Measures*, AISTATS 2023.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import worst_case
        >>> losses = torch.tensor([1.0, 2.0, 4.0])
        >>> worst_case(losses, divergence=Spectral.extremile(2.0)).weights
        tensor([0.1111, 0.3333, 0.5556])
    """

    distortion: Callable[[Tensor], Tensor]
    smoothing: KL | ChiSquare | None = None

    def __post_init__(self) -> None:
        grid = torch.linspace(0, 1, _GRID, dtype=torch.float64)
        _check_distortion(self.distortion(grid))

    @property
    def has_level(self) -> bool:
        """Whether it takes a penalty."""
        return self.smoothing is not None

    @classmethod
    def superquantile(cls, level: float, smoothing: KL | ChiSquare | None = None) -> Self:
        """Returns the mean of the worst ``level`` in (0, 1] of the mass: CVaR."""
        return cls(Superquantile(level), smoothing)

    @classmethod
    def extremile(cls, order: float, smoothing: KL | ChiSquare | None = None) -> Self:
        """Returns the expected largest of ``order >= 1`` independent draws; 1 is the mean."""
        return cls(Extremile(order), smoothing)

    @classmethod
    def exponential(cls, rate: float, smoothing: KL | ChiSquare | None = None) -> Self:
        """Returns weights that fall by ``exp(-rate u)`` with the mass ``u`` of larger losses."""
        return cls(Exponential(rate), smoothing)

    @classmethod
    def from_weights(
        cls, spectrum: Sequence[float] | Tensor, smoothing: KL | ChiSquare | None = None
    ) -> Self:
        """Returns the measure of given weights in ascending order of the losses.

        Args:
            spectrum: Nonnegative, nondecreasing weights that sum to 1, ``m`` of them; spread
                evenly over mass, so that ``m`` atoms of equal mass get exactly these weights.
            smoothing: Divergence of the penalty, or None.
        """
        return cls(Steps(tuple(float(weight) for weight in spectrum)), smoothing)

    def certified(self, problem: Problem, penalty: Tensor) -> CertifiedSaddlePoint:
        """Solves a batch of scaled problems; ``penalty`` has no effect without ``smoothing``."""
        penalty = penalty.clamp_max(_LARGEST_PENALTY)
        with torch.enable_grad():
            nominal = problem.nominal.detach().requires_grad_()
            ranked = _ranked(problem.losses, nominal, self.distortion)
            if self.smoothing is None:
                levels = ranked.losses
                weights = _shared_by_ties(ranked).detach()
                conjugates = torch.zeros_like(levels)
                spent = torch.zeros_like(penalty)
            else:
                # Ties share beforehand: a tiny penalty leaves no digits to pool them by.
                tied = ranked._replace(sigma=_shared_by_ties(ranked).detach())
                blocks = _blocks(self.smoothing, tied, penalty)
                weights = _penalized_weights(self.smoothing, tied, penalty, blocks)
                # The dual bounds the value only at levels in the order of the losses.
                levels = _levels(self.smoothing, tied, penalty, blocks).cummax(dim=-1).values
                slope = (ranked.losses - levels) / penalty.unsqueeze(-1)
                conjugates = penalty.unsqueeze(-1) * self.smoothing.conjugate(slope)
                mass = ranked.mass.detach()
                log_ratio = torch.where(mass > 0, (weights / mass).log(), 0.0)
                spent = (mass * self.smoothing.generator(log_ratio)).sum(dim=-1)
            dual = (ranked.sigma * levels + ranked.mass * conjugates).sum(dim=-1)
            (nominal_slope,) = torch.autograd.grad(dual.sum(), nominal)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        objective = (weights * ranked.losses).sum(dim=-1) - penalty * spent
        gap = (dual.detach() - objective).abs()
        return CertifiedSaddlePoint(
            weights=torch.zeros_like(weights).scatter(-1, ranked.order, weights),
            objective=objective,
            multiplier=penalty,
            threshold=(ranked.sigma.detach() * levels).sum(dim=-1),
            divergence=spent,
            gap=gap,
            nominal_slope=nominal_slope.masked_fill(problem.nominal == 0, 0.0),
            status=certified_status(gap, torch.zeros_like(gap, dtype=torch.bool)),
        )


class _Ranked(NamedTuple):
    """Atoms in ascending order of their losses; each of shape ``(batch, n)``."""

    losses: Tensor
    order: Tensor
    mass: Tensor
    sigma: Tensor
    """Weight of each atom by rank."""


def _ranked(losses: Tensor, nominal: Tensor, distortion: Callable[[Tensor], Tensor]) -> _Ranked:
    ordered, order = losses.sort(dim=-1)
    mass = nominal.gather(-1, order)
    # Masses are summed from the top, where few atoms of little mass carry the weight.
    above = mass.flip(-1).cumsum(dim=-1).flip(-1).clamp_max(_FULL_MASS)
    share = distortion(above)
    rest = torch.cat([share[..., 1:], torch.zeros_like(share[..., :1])], dim=-1)
    return _Ranked(ordered, order, mass, share - rest)


def _shared_by_ties(ranked: _Ranked) -> Tensor:
    """Returns the weights, pooled over atoms of equal loss in proportion to their mass."""
    starts = ranked.losses[..., 1:] != ranked.losses[..., :-1]
    ties = torch.cat([torch.zeros_like(ranked.losses[..., :1]) > 0, starts], dim=-1).cumsum(dim=-1)
    mass = _block_sums(ranked.mass, ties)
    return torch.where(mass > 0, ranked.mass / mass * _block_sums(ranked.sigma, ties), 0.0)


def _blocks(smoothing: KL | ChiSquare, ranked: _Ranked, penalty: Tensor) -> Tensor:
    """Returns the blocks on which the penalised solution has one level ``w``."""
    with torch.no_grad():
        if isinstance(smoothing, ChiSquare):
            level = ranked.mass * (ranked.losses + penalty.unsqueeze(-1))
            return isotonic_blocks(level - penalty.unsqueeze(-1) * ranked.sigma, ranked.mass)
        tilt, sigma = ranked.losses / penalty.unsqueeze(-1), ranked.sigma.clamp_min(0.0)
        blocks = isotonic_blocks(ranked.mass * tilt.exp(), sigma)
        # The smallest loss is -1: where its tilt underflows, logarithms are pooled instead.
        for row in (penalty < 1 / _WIDEST_TILT).nonzero().squeeze(-1).tolist():
            blocks[row] = _pooled_logarithms(tilt[row] + ranked.mass[row].log(), sigma[row].log())
        return blocks


def _pooled_logarithms(tops: Tensor, bottoms: Tensor) -> Tensor:
    """Returns what ``isotonic_blocks`` does of one row, from logarithms, from left to right."""
    pooled: list[tuple[float, float, int]] = []
    for top, bottom in zip(tops.tolist(), bottoms.tolist(), strict=True):
        block = (top, bottom, 1)
        while pooled and _belong_together(pooled[-1], block):
            before = pooled.pop()
            top_sum, bottom_sum = np.logaddexp(before[:2], block[:2]).tolist()
            block = (top_sum, bottom_sum, before[2] + block[2])
        pooled.append(block)
    sizes = torch.tensor([size for _, _, size in pooled], device=tops.device)
    return torch.arange(len(pooled), device=tops.device).repeat_interleave(sizes)


def _belong_together(left: tuple[float, float, int], right: tuple[float, float, int]) -> bool:
    """Returns whether the ratio decreases, or one of the two is ``0 / 0``."""
    if float("-inf") in (max(left[:2]), max(right[:2])):
        return True
    return left[0] + right[1] > right[0] + left[1]


def _penalized_weights(
    smoothing: KL | ChiSquare, ranked: _Ranked, penalty: Tensor, blocks: Tensor
) -> Tensor:
    losses, mass, sigma = ranked.losses, ranked.mass.detach(), ranked.sigma.detach()
    total = _block_sums(sigma, blocks)
    if isinstance(smoothing, ChiSquare):
        block_mass = _block_sums(mass, blocks)
        depths = losses - _block_tops(losses, blocks)
        mean = _block_sums(mass * depths, blocks) / block_mass
        ratio = total / block_mass + (depths - mean) / penalty.unsqueeze(-1)
        return torch.where(mass > 0, mass * ratio, 0.0).clamp_min(0.0)
    tilted = mass * ((losses - _block_tops(losses, blocks)) / penalty.unsqueeze(-1)).exp()
    return torch.where(tilted > 0, total * tilted / _block_sums(tilted, blocks), 0.0)


def _levels(smoothing: KL | ChiSquare, ranked: _Ranked, penalty: Tensor, blocks: Tensor) -> Tensor:
    """Returns the dual levels ``w``, detached, shape ``(batch, n)``."""
    losses, mass, sigma = ranked.losses, ranked.mass.detach(), ranked.sigma.detach()
    scale, tops = penalty.unsqueeze(-1), _block_tops(losses, blocks)
    total = _block_sums(sigma, blocks)
    if isinstance(smoothing, ChiSquare):
        block_mass = _block_sums(mass, blocks)
        mean = tops + _block_sums(mass * (losses - tops), blocks) / block_mass
        return torch.where(block_mass > 0, mean + scale * (1 - total / block_mass), losses)
    tilted = _block_sums(mass * ((losses - tops) / scale).exp(), blocks)
    levels = tops + scale * (tilted.log() - total.log())
    return torch.where((tilted > 0) & (total > 0), levels, losses)


def _block_tops(losses: Tensor, blocks: Tensor) -> Tensor:
    """Returns the largest loss of each atom's block; differences from it keep their digits."""
    tops = torch.full_like(losses, -torch.inf).scatter_reduce(-1, blocks, losses, "amax")
    return tops.gather(-1, blocks)


def _block_sums(values: Tensor, blocks: Tensor) -> Tensor:
    """Returns the sum over each atom's block, at each atom."""
    return torch.zeros_like(values).scatter_add(-1, blocks, values).gather(-1, blocks)


def _check_distortion(values: Tensor) -> None:
    steps = values.diff()
    fits = (
        abs(values[0].item()) <= _SHAPE_TOLERANCE
        and abs(values[-1].item() - 1) <= _SHAPE_TOLERANCE
        and bool((steps >= -_SHAPE_TOLERANCE).all())
        and bool((steps.diff() <= _SHAPE_TOLERANCE).all())
    )
    if not fits:
        raise ValueError(
            "distortion must be concave and nondecreasing from 0 at 0 to 1 at 1, got "
            f"{[round(value, 4) for value in values[:: _GRID // 4].tolist()]} on a grid of 5 "
            "points; give g(u) = 1 - S(1 - u) for a spectrum S of ascending losses"
        )
