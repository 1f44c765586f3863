r"""Three phases of a track of coefficients: a rise, a stretch that changes less, and a fall.

The track of ``gamma`` over checkpoints is fitted by a continuous line with two kinks,

.. math:: g(s) = a + b_0 (s - s_0) + c_1 (s - \kappa_1)_+ + c_2 (s - \kappa_2)_+ ,

by least squares over ``a, b_0, c_1, c_2`` and all pairs of kinks at inner checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTrack:
    """A track of coefficients cut into three stretches.

    Attributes:
        first_kink: Where the second stretch begins, in the unit of the steps.
        second_kink: Where the third begins.
        slopes: Change of the coefficient per step in each stretch.
        error: Root of the mean squared distance of track and fit.
        straight_error: The same of one straight line: where it is about as small, there are no
            phases to speak of.
        peak_step: The step with the largest coefficient.
        peak: That coefficient.
    """

    first_kink: float
    second_kink: float
    slopes: tuple[float, float, float]
    error: float
    straight_error: float
    peak_step: float
    peak: float

    @property
    def has_three_phases(self) -> bool:
        """Whether it rises first, falls last, and rises slower in between than at first."""
        surge, middle, relaxation = self.slopes
        return surge > 0 > relaxation and middle < surge


def three_phase_track(steps: Sequence[float], coefficients: Sequence[float]) -> PhaseTrack:
    """Finds the two kinks of a track.

    Args:
        steps: Steps of the checkpoints, or their logs, strictly increasing, at least six.
        coefficients: The coefficient at each, finite.

    Returns:
        The best fit.

    Raises:
        ValueError: If lengths differ, there are fewer than six checkpoints, steps do not increase
            or a coefficient is not finite.

    Complexity:
        O(n^3) time and memory for ``n`` checkpoints.

    References:
        Surge, stabilisation and relaxation are from *Three Phases of Expert Routing*, 2026
        (arXiv:2604.04230). How they are told apart there was not readable; the fit is ours.
    """
    _check_track(steps, coefficients)
    at = torch.tensor(list(steps), dtype=torch.float64)
    values = torch.tensor(list(coefficients), dtype=torch.float64)
    # In units of the track's length, so that the columns have one scale.
    time = (at - at[0]) / (at[-1] - at[0])
    inner = range(1, len(steps) - 1)
    kinks = torch.tensor([(i, j) for i in inner for j in inner if i < j])
    hinges = (time.unsqueeze(1) - time[kinks].unsqueeze(1)).clamp_min(0)
    line = torch.stack([torch.ones_like(time), time], dim=1)
    designs = torch.cat([line.expand(len(kinks), -1, -1), hinges], dim=2)
    targets = values.view(1, -1, 1).expand(len(kinks), -1, -1)
    fits = torch.linalg.lstsq(designs, targets).solution
    errors = (designs @ fits - targets).square().mean(dim=(1, 2)).sqrt()
    best = int(errors.argmin())
    straight = line @ torch.linalg.lstsq(line, values.unsqueeze(1)).solution
    _, first, second, third = (fits[best, :, 0] / (at[-1] - at[0])).tolist()
    return PhaseTrack(
        first_kink=float(at[kinks[best, 0]]),
        second_kink=float(at[kinks[best, 1]]),
        slopes=(first, first + second, first + second + third),
        error=float(errors[best]),
        straight_error=float((straight.squeeze(1) - values).square().mean().sqrt()),
        peak_step=float(at[values.argmax()]),
        peak=float(values.max()),
    )


def _check_track(steps: Sequence[float], coefficients: Sequence[float]) -> None:
    if len(steps) != len(coefficients):
        raise ValueError(
            f"steps and coefficients must have one length, got {len(steps)} and {len(coefficients)}"
        )
    if len(steps) < 6:
        raise ValueError(f"a track needs at least 6 checkpoints, got {len(steps)}")
    for before, after in pairwise(steps):
        if not before < after:
            raise ValueError(f"steps must increase, got {before} before {after}")
    for value in coefficients:
        if not math.isfinite(value):
            raise ValueError(f"coefficients must be finite, got {value}; leave that checkpoint out")
