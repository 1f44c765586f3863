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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self, final

import torch
from torch import Tensor

from drgr.ambiguity.certificate import CertifiedSaddlePoint, certified_status
from drgr.ambiguity.chi_square import ChiSquare
from drgr.ambiguity.divergence import Problem
from drgr.ambiguity.kl import KL
from drgr.numerics import isotonic_blocks

_GRID = 257
_SHAPE_TOLERANCE = 1e-9


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
        O(n log n) time, O(n) memory; penalised, a few rounds of pooling more.

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
        if not 0 < level <= 1:
            raise ValueError(f"level must lie in (0, 1], got {level}; give the mass of the tail")
        return cls(lambda mass: (mass / level).clamp_max(1.0), smoothing)

    @classmethod
    def extremile(cls, order: float, smoothing: KL | ChiSquare | None = None) -> Self:
        """Returns the expected largest of ``order >= 1`` independent draws; 1 is the mean."""
        if not (math.isfinite(order) and order >= 1):
            raise ValueError(f"order must be a finite number of at least 1, got {order}")
        return cls(lambda mass: -torch.expm1(order * torch.log1p(-mass)), smoothing)

    @classmethod
    def exponential(cls, rate: float, smoothing: KL | ChiSquare | None = None) -> Self:
        """Returns weights that fall by ``exp(-rate u)`` with the mass ``u`` of larger losses."""
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate must be a finite number above 0, got {rate}")
        return cls(lambda mass: torch.expm1(-rate * mass) / math.expm1(-rate), smoothing)

    @classmethod
    def from_weights(cls, spectrum: Tensor, smoothing: KL | ChiSquare | None = None) -> Self:
        """Returns the measure of given weights in ascending order of the losses.

        Args:
            spectrum: Nonnegative, nondecreasing weights that sum to 1, shape ``(m,)``; spread
                evenly over mass, so that ``m`` atoms of equal mass get exactly these weights.
            smoothing: Divergence of the penalty, or None.
        """
        _check_spectrum(spectrum)
        descending = spectrum.detach().double().flip(0)
        sums = torch.cat([descending.new_zeros(1), descending.cumsum(0)])
        return cls(lambda mass: _interpolated(sums / sums[-1], mass), smoothing)

    def certified(self, problem: Problem, penalty: Tensor) -> CertifiedSaddlePoint:
        """Solves a batch of scaled problems; ``penalty`` has no effect without ``smoothing``."""
        with torch.enable_grad():
            nominal = problem.nominal.detach().requires_grad_()
            ranked = _ranked(problem.losses, nominal, self.distortion)
            if self.smoothing is None:
                levels = ranked.losses
                weights = _shared_by_ties(ranked).detach()
                conjugates = torch.zeros_like(levels)
                spent = torch.zeros_like(penalty)
            else:
                blocks = _blocks(self.smoothing, ranked, penalty)
                weights = _penalized_weights(self.smoothing, ranked, penalty, blocks)
                levels = _levels(self.smoothing, ranked, penalty, blocks)
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
    above = mass.flip(-1).cumsum(dim=-1).flip(-1).clamp_max(1.0)
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
        tilted = ranked.mass * (ranked.losses / penalty.unsqueeze(-1)).exp()
        return isotonic_blocks(tilted, ranked.sigma.clamp_min(0.0))


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


def _interpolated(sums: Tensor, mass: Tensor) -> Tensor:
    """Returns the piecewise linear function through ``sums`` at equal steps of mass."""
    sums = sums.to(mass.device)
    position = mass * (len(sums) - 1)
    left = position.detach().floor().long().clamp(0, len(sums) - 2)
    return sums[left] + (position - left) * (sums[left + 1] - sums[left])


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


def _check_spectrum(spectrum: Tensor) -> None:
    if spectrum.dim() != 1 or spectrum.numel() == 0 or not spectrum.is_floating_point():
        raise ValueError(
            "spectrum must be a floating-point tensor of shape (m,), "
            f"got {spectrum.dtype} of shape {tuple(spectrum.shape)}"
        )
    total = spectrum.double().sum().item()
    sorted_up = bool((spectrum.diff() >= 0).all()) and bool((spectrum >= 0).all())
    if not (sorted_up and abs(total - 1) <= 1e-4):
        raise ValueError(
            "spectrum must be nonnegative, nondecreasing and sum to 1, got "
            f"{spectrum.tolist()[:5]} with a sum of {total:.6g}; sort it and divide by its sum"
        )
