"""The units that every divergence solves in, and how they map back."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How scaled losses map back: ``loss = top + scale * scaled``; each of shape ``(batch,)``."""

    top: Tensor
    scale: Tensor

    def levels(self, scaled: Tensor) -> Tensor:
        """Returns loss levels, shape ``(batch,)``, in the unit and offset of the losses."""
        return self.top + self.scale * scaled

    def differences(self, scaled: Tensor) -> Tensor:
        """Returns differences of losses, shape ``(batch,)`` or ``(batch, n)``, in their unit."""
        return scaled * self.scale.reshape(-1, *[1] * (scaled.dim() - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Size of the ambiguity set: a radius, or a penalty, per problem."""

    kind: Literal["radius", "penalty"]
    value: Tensor
    """float64, shape ``(batch,)``."""

    def scaled(self, scaling: Scaling) -> "Level":
        """Returns the level for scaled losses; far beyond any effect, penalties are clamped."""
        if self.kind == "radius":
            return self
        return Level(kind=self.kind, value=(self.value / scaling.scale).clamp(1e-200, 1e200))

    def detached(self) -> "Level":
        """Returns the level without its graph."""
        return Level(kind=self.kind, value=self.value.detach())


def scaled_problem(
    losses: Tensor, nominal: Tensor, *, is_uniform: bool = False
) -> tuple[Problem, Scaling]:
    """Returns the problem in scaled units; both arguments float64 of shape ``(batch, n)``."""
    is_empty = nominal == 0
    has_empty_atoms = not is_uniform and bool(is_empty.any())
    top, bottom = losses.amax(dim=-1), losses.amin(dim=-1)
    if has_empty_atoms:
        top = losses.masked_fill(is_empty, -torch.inf).amax(dim=-1)
        bottom = losses.masked_fill(is_empty, torch.inf).amin(dim=-1)
    span = top - bottom
    if not bool(span.isfinite().all()):
        raise ValueError(
            f"losses must span a range that float64 can hold, got {span.max().item()}; rescale them"
        )
    scale = torch.where(span > 0, span, 1.0)
    scaled = (losses - top.unsqueeze(-1)) / scale.unsqueeze(-1)
    # Mass cannot reach atoms without nominal mass, so their losses are hidden from the solvers.
    if has_empty_atoms:
        scaled = scaled.masked_fill(is_empty, -1.0)
    problem = Problem(
        losses=scaled,
        nominal=nominal,
        has_empty_atoms=has_empty_atoms,
        is_uniform=is_uniform,
    )
    return problem, Scaling(top=top, scale=scale)
