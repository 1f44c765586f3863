"""Concave distortions of probability, each by the formula that keeps its digits near 0.

A distortion maps the mass of the largest losses to the weight that they get together.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Superquantile:
    """``g(u) = min(u / level, 1)``: the mean of the worst ``level`` in (0, 1] of the mass, CVaR."""

    level: float

    def __post_init__(self) -> None:
        if not 0 < self.level <= 1:
            raise ValueError(
                f"level must lie in (0, 1], got {self.level}; give the mass of the tail"
            )

    def __call__(self, mass: Tensor) -> Tensor:
        """Returns ``g(mass)``."""
        return (mass / self.level).clamp_max(1.0)


@final
@dataclass(frozen=True, slots=True)
class Extremile:
    """``g(u) = 1 - (1 - u)^order``: the expected largest of ``order >= 1`` independent draws."""

    order: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.order) and self.order >= 1):
            raise ValueError(
                f"order must be a finite number of at least 1, got {self.order}; 1 is the mean"
            )

    def __call__(self, mass: Tensor) -> Tensor:
        """Returns ``g(mass)``."""
        return -torch.expm1(self.order * torch.log1p(-mass))


@final
@dataclass(frozen=True, slots=True)
class Exponential:
    """``g(u) = (1 - e^{-rate u}) / (1 - e^{-rate})``: weights that decay over the mass above."""

    rate: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(
                f"rate must be a finite number above 0, got {self.rate}; near 0 it is the mean"
            )

    def __call__(self, mass: Tensor) -> Tensor:
        """Returns ``g(mass)``."""
        return torch.expm1(-self.rate * mass) / math.expm1(-self.rate)


@final
@dataclass(frozen=True, slots=True)
class Steps:
    """Piecewise linear: the weights ``spectrum`` in ascending order of the losses, over equal mass.

    So ``m`` atoms of equal mass get exactly the ``m`` weights.
    """

    spectrum: tuple[float, ...]
    """Nonnegative, nondecreasing, with a sum of 1."""

    def __post_init__(self) -> None:
        steps = zip(self.spectrum, self.spectrum[1:], strict=False)
        is_right = all(lower <= upper for lower, upper in steps) and self.spectrum[:1] >= (0,)
        if not (is_right and abs(math.fsum(self.spectrum) - 1) <= 1e-4):
            raise ValueError(
                "spectrum must be nonnegative, nondecreasing and sum to 1, got "
                f"{self.spectrum[:5]} with a sum of {math.fsum(self.spectrum):.6g}; "
                "sort it and divide by its sum"
            )

    def __call__(self, mass: Tensor) -> Tensor:
        """Returns ``g(mass)``."""
        weights = mass.new_tensor(self.spectrum[::-1], dtype=torch.float64)
        sums = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
        sums = sums / sums[-1]
        position = mass * len(weights)
        left = position.detach().floor().long().clamp(0, len(weights) - 1)
        return sums[left] + (position - left) * (sums[left + 1] - sums[left])
