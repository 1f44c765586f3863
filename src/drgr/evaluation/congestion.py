"""The effective congestion coefficient of each layer, and its track over a run.

Windows of an evaluation are dealt in turn to at most 50 batches, from which the bootstrap draws.
Loads are counted at the odd positions of a window and qualities (the log of the mean probability
before prices) taken at the even ones: in the same tokens, chance would make them agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes
from drgr.routing import congestion_coefficient, three_phase_track
from drgr.routing.tokens import expert_probabilities

NUM_BATCHES = 50
MIN_TRACK = 6
"""Evaluations that a track needs."""

_SEED = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingSamples:
    """Loads and probabilities by batch, layer and expert.

    Attributes:
        loads: Assignments of tokens at odd positions, shape ``(B, L, E)``, int64.
        probabilities: Summed probabilities of tokens at even positions, shape ``(B, L, E)``,
            float64; NaN where scores are not known.
        tokens: Tokens behind each sum of probabilities, shape ``(B, L)``, int64.
    """

    loads: Tensor
    probabilities: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, *, num_layers: int, num_experts: int, device: torch.device) -> "RoutingSamples":
        """Returns the samples of no token."""
        shape = (NUM_BATCHES, num_layers, num_experts)
        return cls(
            loads=torch.zeros(shape, dtype=torch.int64, device=device),
            probabilities=torch.zeros(shape, dtype=torch.float64, device=device),
            tokens=torch.zeros(shape[:2], dtype=torch.int64, device=device),
        )

    def add(
        self,
        layer: int,
        windows: tuple[int, int],
        *,
        expert_ids: Tensor,
        keep: Tensor,
        scores: Tensor | None,
    ) -> None:
        """Adds what a layer did with a forward pass.

        Args:
            layer: Number of the layer.
            windows: Number of the first window of the pass in the evaluation, and how many it has.
            expert_ids: Candidates, shape ``(T, K)``.
            keep: Which of them ran, bool, shape ``(T, K)``.
            scores: Scores of all experts before prices, shape ``(T, E)``, if known.
        """
        first, count = windows
        length = len(keep) // count
        token = torch.arange(len(keep), device=keep.device)
        batch = (first + token // length) % NUM_BATCHES
        is_odd = token % length % 2 == 1
        num_experts = self.loads.shape[2]
        cell = (batch.unsqueeze(1) * num_experts + expert_ids)[keep & is_odd.unsqueeze(1)]
        found = torch.bincount(cell, minlength=NUM_BATCHES * num_experts)
        self.loads[:, layer] += found.view(NUM_BATCHES, num_experts)
        even = batch[~is_odd]
        self.tokens[:, layer] += torch.bincount(even, minlength=NUM_BATCHES)
        if scores is None:
            self.probabilities[:, layer] = torch.nan
        else:
            shares = expert_probabilities(scores.double())[~is_odd]
            self.probabilities[:, layer].index_add_(0, even, shares)

    def summed(self, group: ProcessGroup | None) -> "RoutingSamples":
        """Returns the sums over all processes, on the CPU."""
        return RoutingSamples(
            loads=sum_over_processes(self.loads, group).cpu(),
            probabilities=sum_over_processes(self.probabilities, group).cpu(),
            tokens=sum_over_processes(self.tokens, group).cpu(),
        )


def congestion_record(samples: RoutingSamples, layer: int) -> dict[str, float | None]:
    """Estimates a layer's coefficient with its bootstrap interval of 95 %.

    Returns:
        ``estimate``, ``lower`` and ``upper``. Experts that no token of some batch could want are
        left out. ``None`` where a number is not defined: without scores, with fewer than two
        experts in use or even loads, and for the interval also with fewer than two batches.
    """
    is_filled = samples.tokens[:, layer] > 0
    loads, sums = samples.loads[is_filled, layer], samples.probabilities[is_filled, layer]
    qualities = (sums / samples.tokens[is_filled, layer].unsqueeze(1)).log()
    is_known = qualities.isfinite().all(dim=0)
    numbers = [math.nan] * 3
    if len(loads) > 0 and int(is_known.sum()) > 1:
        found = congestion_coefficient(
            loads[:, is_known],
            qualities[:, is_known],
            generator=torch.Generator().manual_seed(_SEED),
        )
        interval = [found.lower, found.upper] if len(loads) > 1 else [math.nan] * 2
        numbers = [found.coefficient, *interval]
    pairs = zip(("estimate", "lower", "upper"), numbers, strict=True)
    return {name: value if math.isfinite(value) else None for name, value in pairs}


def track_record(
    steps: Sequence[int], coefficients: Sequence[float | None]
) -> dict[str, Any] | None:
    """Fits three stretches to a layer's coefficients at the evaluations of a run.

    Args:
        steps: Steps of the evaluations, increasing.
        coefficients: The coefficient at each; ``None`` where there is none, which is left out.

    Returns:
        See :class:`drgr.routing.PhaseTrack` for what it holds; ``None`` with fewer than six
        coefficients.
    """
    known = [
        (step, value) for step, value in zip(steps, coefficients, strict=True) if value is not None
    ]
    if len(known) < MIN_TRACK:
        return None
    track = three_phase_track(*zip(*known, strict=True))
    return {
        "first_kink": track.first_kink,
        "second_kink": track.second_kink,
        "slopes": list(track.slopes),
        "error": track.error,
        "straight_error": track.straight_error,
        "peak_step": track.peak_step,
        "peak": track.peak,
        "three_phases": track.has_three_phases,
    }
