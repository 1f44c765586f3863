r"""The path of a Cressie-Read worst case, along which its size grows, by one scalar ``t``.

For ``kappa = k - 1 <= 0`` every atom keeps mass and ``t = log tau``. For ``kappa > 0`` the atoms
below the cut ``c = -1 / (kappa tau)`` have none. Which those are is found first, by bisection over
the sorted losses; then ``t = -log(floor - c)``, with ``floor`` the lowest loss above the cut. A
heavy atom just above the cut would have no digits left in ``l - c``; as
``(l - floor) + (floor - c)`` it has all of them.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from drgr.ambiguity.divergence import Problem

# No root lies beyond; keeps a search for the bracket from overflowing.
_LARGEST_LOG = 700.0


class Point(NamedTuple):
    """A point of the path; all that a solver needs there."""

    exponents: Tensor
    """``y = log(1 + kappa tau l)_+ / kappa``, shape ``(batch, n)``; ``-inf`` below the cut."""
    growth: Tensor
    """``dy / dt``, shape ``(batch, n)``; 0 below the cut."""
    base: Tensor
    """``(1 + kappa tau l)_+``, shape ``(batch, n)``."""
    tau: Tensor
    """``tau``, shape ``(batch,)``."""
    tau_growth: Tensor
    """``d log tau / dt``, shape ``(batch,)``."""


class Path(Protocol):
    """Where ``t`` may lie, and what lies there."""

    @property
    def lower(self) -> Tensor:
        """Smallest ``t``, shape ``(batch,)``."""
        ...

    @property
    def upper(self) -> Tensor:
        """Largest ``t``, shape ``(batch,)``."""
        ...

    def point(self, t: Tensor) -> Point:
        """Returns the point at ``t``, shape ``(batch,)``."""
        ...

    def at_tau(self, tau: Tensor) -> Tensor:
        """Returns the ``t`` of ``tau``, shape ``(batch,)``, or one within the bounds near it."""
        ...


class _FullSupport(NamedTuple):
    """``kappa <= 0``."""

    problem: Problem
    kappa: float

    @property
    def lower(self) -> Tensor:
        return torch.full_like(self.problem.losses[..., 0], -torch.inf)

    @property
    def upper(self) -> Tensor:
        return -self.lower

    def point(self, t: Tensor) -> Point:
        tau = t.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
        tilt = tau.unsqueeze(-1) * self.problem.losses
        if self.kappa == 0:
            return Point(tilt, tilt, torch.ones_like(tilt), tau, torch.ones_like(tau))
        scaled = self.kappa * tilt
        base = 1 + scaled
        exponents = torch.log1p(scaled) / self.kappa
        return Point(exponents, tilt / base, base, tau, torch.ones_like(tau))

    def at_tau(self, tau: Tensor) -> Tensor:
        return tau.log()


class _AboveCut(NamedTuple):
    """``kappa > 0``, for a known set of atoms above the cut."""

    problem: Problem
    kappa: float
    floor: Tensor
    """Lowest loss above the cut, shape ``(batch,)``."""
    room: Tensor
    """Distance from there to the next loss below, ``inf`` if there is none, shape ``(batch,)``."""

    @property
    def lower(self) -> Tensor:
        return -self.room.log()

    @property
    def upper(self) -> Tensor:
        return torch.full_like(self.floor, torch.inf)

    def point(self, t: Tensor) -> Point:
        depth = (-t).clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
        top = depth - self.floor
        losses = self.problem.losses
        heights = (losses - self.floor.unsqueeze(-1)).clamp_min(0.0) + depth.unsqueeze(-1)
        base = heights / top.unsqueeze(-1)
        far = torch.log1p((losses / top.unsqueeze(-1)).clamp_min(-1.0))
        exponents = torch.where(base < 0.5, base.log(), far) / self.kappa
        share = (depth / top).unsqueeze(-1)
        growth = share * losses / (self.kappa * heights)
        below = losses < self.floor.unsqueeze(-1)
        return Point(
            exponents.masked_fill(below, -torch.inf),
            growth.masked_fill(below, 0.0),
            base.masked_fill(below, 0.0),
            1 / (self.kappa * top),
            share.squeeze(-1),
        )

    def at_tau(self, tau: Tensor) -> Tensor:
        depth = 1 / (self.kappa * tau) + self.floor
        inside = (depth > 0) & (depth < self.room)
        return -torch.where(inside, depth, self.room.clamp_max(1.0) / 2).log()


def path_of(
    problem: Problem, kappa: float, residual: Callable[[Point], tuple[Tensor, Tensor]]
) -> Path:
    """Returns the path on which ``residual`` has its root.

    Args:
        problem: Problems of any kind.
        kappa: ``k - 1``.
        residual: Increasing along the path; its first result is negative before the root.

    Complexity:
        O(1) for ``kappa <= 0``; else one sort and about ``log2 n`` evaluations.
    """
    if kappa <= 0:
        return _FullSupport(problem, kappa)
    losses = problem.losses.sort(dim=-1, descending=True).values
    # An atom is above the cut where the residual with the cut at its own loss is not negative.
    last = torch.zeros_like(losses[..., :1], dtype=torch.int64)
    step = 1 << max(losses.shape[-1] - 1, 1).bit_length()
    while step > 1:
        step //= 2
        probe = (last + step).clamp_max(losses.shape[-1] - 1)
        cut = losses.gather(-1, probe)
        above = residual(_at_cut(problem, kappa, cut))[0].unsqueeze(-1) >= 0
        last = torch.where(above | (cut == 0), torch.maximum(last, probe), last)
    floor = losses.gather(-1, last)
    below = losses.masked_fill(losses >= floor, -torch.inf).amax(dim=-1)
    return _AboveCut(problem, kappa, floor.squeeze(-1), floor.squeeze(-1) - below)


def _at_cut(problem: Problem, kappa: float, cut: Tensor) -> Point:
    """Returns the point whose cut is at a loss, shape ``(batch, 1)``; anything for a cut at 0."""
    base = ((problem.losses - cut) / -cut).clamp_min(0.0)
    return Point(
        base.log() / kappa,
        torch.zeros_like(base),
        base,
        (-1 / (kappa * cut)).squeeze(-1),
        torch.zeros_like(cut.squeeze(-1)),
    )
