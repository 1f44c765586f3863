r"""How a model's loss answers to shifts between domains: functions of one number a domain.

With losses ``l_g`` of ``G`` domains: the mean of the worst, the worst case
:math:`R_\rho = \max_{D(q \| u) \le \rho} \langle q, l \rangle` around the uniform mixture ``u``,
the loss of random target mixtures, and what is left when one domain is taken out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from drgr._checks import check_positive, check_shape
from drgr.ambiguity import CVaR, Divergence, effective_number, worst_case


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RobustCurve:
    """Worst cases of growing balls around the uniform mixture; all float64.

    Attributes:
        radii: Radii ``rho``, shape ``(R,)``.
        values: ``R_rho``, in the unit of the losses, shape ``(R,)``.
        effective_domains: Effective number of domains of the worst mixture, shape ``(R,)``.
        gaps: Bounds on the error of the values, shape ``(R,)``.
        status: How the solver ended, a sentence.
        converged: Whether every gap is within tolerance.
    """

    radii: Tensor
    values: Tensor
    effective_domains: Tensor
    gaps: Tensor
    status: str
    converged: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeftOut:
    """What the other domains say when one is left out, by the one left out.

    Attributes:
        mean: Mean loss of the others, shape ``(G,)``, float64; NaN for a single domain.
        worst: Largest loss of the others, shape ``(G,)``, float64; NaN for a single domain.
        worst_domain: Which domain that is, shape ``(G,)``, int64; -1 for a single domain.
    """

    mean: Tensor
    worst: Tensor
    worst_domain: Tensor


def tail_mean(losses: Tensor, *, level: float) -> Tensor:
    """Averages the largest losses, of share ``level`` (conditional value at risk).

    Args:
        losses: Finite losses, shape ``(..., n)``, floating point.
        level: Share of the losses in the tail, in (0, 1]; a loss on its edge counts in part.

    Returns:
        Shape ``(...)``, dtype of the losses.

    Raises:
        ValueError: If the level is out of range or a loss is not finite.

    Complexity:
        O(n log n).
    """
    return worst_case(losses.detach(), divergence=CVaR(level)).value


def robust_curve(losses: Tensor, *, radii: Sequence[float], divergence: Divergence) -> RobustCurve:
    """Computes the worst case over target mixtures against the radius of their set.

    Args:
        losses: Finite losses by domain, shape ``(G,)``.
        radii: Radii ``rho >= 0``, at least one.
        divergence: What the radius bounds, between a mixture and the uniform one.

    Returns:
        The curve: never falling, from the mean at radius 0 up to the largest loss.

    Raises:
        ValueError: If a shape or a radius is wrong or a loss is not finite.
    """
    check_shape("losses", losses, (None,))
    if not radii:
        raise ValueError("radii must hold at least one radius, got none")
    wanted = torch.tensor(list(radii), dtype=torch.float64)
    found = worst_case(
        losses.detach().double().expand(len(wanted), -1), divergence=divergence, radius=wanted
    )
    return RobustCurve(
        radii=wanted,
        values=found.value,
        effective_domains=effective_number(found.weights),
        gaps=found.gap,
        status=found.status.value,
        converged=found.status.succeeded,
    )


def mixture_losses(
    losses: Tensor, *, num_mixtures: int, concentration: float = 1.0, seed: int = 0
) -> Tensor:
    """Draws target mixtures and returns the loss under each.

    Args:
        losses: Finite losses by domain, shape ``(G,)``.
        num_mixtures: Mixtures to draw, at least 1.
        concentration: Parameter of the symmetric Dirichlet distribution; 1 draws uniformly from
            the simplex, more stays nearer to the uniform mixture.
        seed: Seed of the draw; equal seeds and numbers of domains give equal mixtures.

    Returns:
        Expected losses, shape ``(num_mixtures,)``, float64, in the order of the draw.

    Raises:
        ValueError: If a shape or a parameter is wrong.
    """
    check_shape("losses", losses, (None,))
    check_positive("num_mixtures", num_mixtures)
    check_positive("concentration", concentration)
    generator = np.random.default_rng(seed)
    mixtures = generator.dirichlet([concentration] * len(losses), size=num_mixtures)
    return torch.from_numpy(mixtures) @ losses.detach().double().cpu()


def leave_one_out(losses: Tensor) -> LeftOut:
    """Summarises the other domains, for each domain in turn.

    A domain that decides the worst case alone shows by ``worst`` without it.

    Args:
        losses: Losses by domain, shape ``(G,)``.

    Raises:
        ValueError: If the shape is wrong.
    """
    check_shape("losses", losses, (None,))
    values = losses.detach().double()
    count = len(values)
    if count < 2:
        nothing = torch.full((count,), torch.nan, dtype=torch.float64)
        return LeftOut(
            mean=nothing, worst=nothing, worst_domain=torch.full((count,), -1, dtype=torch.int64)
        )
    rows = values.expand(count, -1).masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    worst, worst_domain = rows.max(dim=1)
    others = values.expand(count, -1).masked_fill(torch.eye(count, dtype=torch.bool), 0.0)
    return LeftOut(mean=others.sum(dim=1) / (count - 1), worst=worst, worst_domain=worst_domain)


def standard_error(samples: Tensor) -> float:
    """Estimates the standard deviation of a mean of independent samples.

    Args:
        samples: Shape ``(n,)``. Windows of text are a better choice than tokens, whose losses
            depend on each other within a window.

    Returns:
        ``s / sqrt(n)`` with the unbiased variance ``s^2``; NaN for fewer than two samples, which
        say nothing of their spread.

    Raises:
        ValueError: If the shape is wrong.
    """
    check_shape("samples", samples, (None,))
    if len(samples) < 2:
        return float("nan")
    return float(samples.double().std(correction=1) / len(samples) ** 0.5)
