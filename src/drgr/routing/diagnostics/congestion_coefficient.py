r"""How strongly experts repel tokens once they are full: the effective congestion coefficient.

Routing is seen as a game in which an expert of quality ``q_e`` loses appeal with its share ``x_e``:

.. math:: x_e \propto \exp( q_e - \gamma x_e )
          \quad\Longleftrightarrow\quad
          q_e - \log x_e = \gamma x_e + \text{const} ,

so that the coefficient is the slope of a regression over experts,

.. math:: \hat\gamma = \frac{\operatorname{Cov}( q - \log x,\; x )}{\operatorname{Var}( x )} .

It is 0 for a router that follows quality alone and grows with whatever balances the load.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_shape

_MAX_DRAWS = 2**22
"""Numbers drawn at once: resamples are taken in parts, which bounds memory."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CongestionEstimate:
    """The coefficient with a bootstrap interval.

    Attributes:
        coefficient: The estimate of ``gamma``; NaN where it is not defined: fewer than two experts
            were used, or all that were used equally.
        lower: Lower end of the interval, NaN where no resample has an estimate.
        upper: Upper end of the interval.
        num_experts: Experts with a load, over which the regression runs.
        num_undefined: Resamples without an estimate, left out of the interval.
    """

    coefficient: float
    lower: float
    upper: float
    num_experts: int
    num_undefined: int


@torch.no_grad()
def congestion_coefficient(
    loads: Tensor,
    qualities: Tensor,
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> CongestionEstimate:
    """Estimates the coefficient from loads and qualities of independent batches.

    Args:
        loads: Assignments per expert in each batch, shape ``(B, E)``.
        qualities: Quality of each expert in each batch, shape ``(B, E)``, averaged over batches; a
            logit such as the log of the mean softmax probability before prices. Measured from the
            counts themselves it is circular: take it from other tokens than the loads.
        generator: Draws the batches of each resample.
        num_resamples: Number of resamples, at least 1.
        confidence: Probability in (0, 1) that the percentile interval is to have.

    Returns:
        The estimate. An expert without load is left out: the log of its share is not finite.

    Raises:
        ValueError: If shapes do not fit, there is no batch, a quality is not finite, or a number
            is out of range.

    Numerics:
        float64. Two experts or loads that are almost even give a finite slope of no worth: read the
        interval.

    Complexity:
        O(R B E) time for ``R`` resamples.

    References:
        The coefficient is named by *Three Phases of Expert Routing*, 2026 (arXiv:2604.04230), which
        resamples batches too. The cost, the choice of quality and this estimator are derived here.
    """
    check_shape("loads", loads, (None, None))
    check_shape("qualities", qualities, tuple(loads.shape))
    _check_numbers(loads, qualities, num_resamples, confidence)
    counts, quality = loads.double().cpu(), qualities.double().cpu()
    num_batches = counts.shape[0]
    everything = torch.ones(1, num_batches, dtype=torch.float64)
    (coefficient,) = _slopes(everything, counts, quality).tolist()
    slopes = []
    remaining = num_resamples
    while remaining:
        number = min(remaining, max(1, _MAX_DRAWS // num_batches))
        drawn = torch.randint(num_batches, (number, num_batches), generator=generator)
        times = torch.zeros(number, num_batches, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones(number, num_batches, dtype=torch.float64))
        slopes.append(_slopes(times, counts, quality))
        remaining -= number
    resampled = torch.cat(slopes)
    tail = (1 - confidence) / 2
    ends = torch.nanquantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return CongestionEstimate(
        coefficient=coefficient,
        lower=float(ends[0]),
        upper=float(ends[1]),
        num_experts=int((counts.sum(dim=0) > 0).sum()),
        num_undefined=int(resampled.isnan().sum()),
    )


def _slopes(times: Tensor, counts: Tensor, quality: Tensor) -> Tensor:
    """Returns the slope of each resample; row ``r`` of ``times`` says how often it has a batch."""
    pooled = times @ counts
    used = pooled > 0
    total = pooled.sum(dim=1, keepdim=True)
    share = pooled / torch.where(total > 0, total, 1.0)
    appeal = times @ quality / times.sum(dim=1, keepdim=True)
    appeal = torch.where(used, appeal - torch.where(used, share, 1.0).log(), 0.0)
    number = used.sum(dim=1, keepdim=True).clamp_min(1)
    excess = torch.where(used, share - share.sum(dim=1, keepdim=True) / number, 0.0)
    largest = torch.where(used, pooled, -torch.inf).amax(dim=1)
    smallest = torch.where(used, pooled, torch.inf).amin(dim=1)
    # Told by the counts: rounding would give equal shares a variance.
    defined = largest > smallest
    variance = torch.where(defined, excess.square().sum(dim=1), 1.0)
    return torch.where(defined, (excess * appeal).sum(dim=1) / variance, torch.nan)


def _check_numbers(loads: Tensor, qualities: Tensor, num_resamples: int, confidence: float) -> None:
    if loads.shape[0] == 0:
        raise ValueError("loads must hold at least one batch, got 0")
    if bool((loads < 0).any()):
        raise ValueError(f"loads must not be negative, got {float(loads.min())}")
    if not bool(qualities.isfinite().all()):
        raise ValueError(
            "qualities must be finite, got a value that is not; leave dead experts' columns out"
        )
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
