r"""Steps on the training mixture: the shares ``w`` of the domains in the batches, on the simplex.

``gain[e]`` is by how much the outer objective is predicted to fall if all of the next steps trained
on domain ``e``: minus its hypergradient in ``w_e``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive, check_shape
from drgr.ambiguity import WorstCase

_SHRINK, _GROW = 0.5, 2.0
_LEAST_STEP = 1e-12


def entropic_step(
    mixture: Tensor,
    gain: Tensor,
    *,
    rate: float,
    anchor: Tensor | None = None,
    anchor_strength: float = 0.0,
) -> Tensor:
    """Returns ``argmin_w -<gain, w> + KL(w || mixture) / rate + anchor_strength KL(w || anchor)``.

    A mirror step; without an anchor it is ``w_e = mixture_e exp(rate gain_e)``, normalised. A
    domain of share 0 stays at 0.

    Args:
        mixture: Shares now, not negative, summing to 1, shape ``(G,)``.
        gain: Predicted gains, shape ``(G,)``.
        rate: Step size in 1 / unit of the gain, above 0.
        anchor: Shares to stay close to, positive wherever ``mixture`` is; uniform if None.
        anchor_strength: Price of leaving the anchor, in the unit of the gain.

    Raises:
        ValueError: If a shape or a number is out of range, or the gain is not finite.
    """
    check_positive("rate", rate)
    check_not_negative("anchor_strength", anchor_strength)
    check_shape("gain", gain, tuple(mixture.shape))
    if not bool(gain.isfinite().all()):
        raise ValueError(f"gain must be finite, got {gain.tolist()}")
    logits = mixture.log() / rate + gain
    if anchor is not None and anchor_strength > 0:
        logits = logits + anchor_strength * anchor.log()
    return torch.softmax(logits / (1 / rate + anchor_strength), dim=0)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadMixture:
    """Result of :func:`lookahead_mixture`.

    Attributes:
        mixture: The shares, shape ``(G,)``, float64.
        value: ``R(losses - gains w) + anchor_strength KL(w || anchor)``.
        gap: Its distance from the minimum at most, by the dual problem.
        num_steps: Iterations.
    """

    mixture: Tensor
    value: float
    gap: float
    num_steps: int


def lookahead_mixture(
    risk: Callable[[Tensor], WorstCase],
    losses: Tensor,
    gains: Tensor,
    *,
    anchor: Tensor,
    anchor_strength: float,
    rtol: float = 1e-6,
    max_steps: int = 1000,
) -> LookaheadMixture:
    r"""Finds the shares whose predicted losses have the least worst case.

    ``min_w R(losses - gains w) + anchor_strength KL(w || anchor)`` over the simplex: convex, and
    with ``q`` the worst-case weights at ``w`` bounded from below by the dual value
    ``R*(q) - anchor_strength log sum_e anchor_e exp((gains' q)_e / anchor_strength)``, where
    ``R*(q)`` is what the adversary gets from ``q`` at ``losses``. The distance is returned.

    Args:
        risk: The worst case as a function of losses, shape ``(G,)``.
        losses: Losses now, shape ``(G,)``.
        gains: ``gains[d, e]``: predicted fall of the loss of ``d`` if all of the next steps
            trained on ``e``, shape ``(G, G)``.
        anchor: Shares to stay close to, above 0, shape ``(G,)``.
        anchor_strength: Price of leaving it in the unit of the losses, above 0.
        rtol: Gap at which to stop, as a share of the range of the losses.
        max_steps: Most iterations; the gap says what they reached.

    Raises:
        ValueError: If a shape or a number is out of range, or an input is not finite.

    Complexity:
        Two worst cases and four products with ``gains`` for each iteration.
    """
    check_positive("anchor_strength", anchor_strength)
    check_shape("gains", gains, (len(losses), len(anchor)))
    if not bool(gains.isfinite().all()):
        raise ValueError(f"gains must be finite, got {gains.tolist()}")
    if not bool((anchor > 0).all()):
        raise ValueError(f"anchor must be above 0, got {anchor.tolist()}; mix in the uniform one")
    problem = _Lookahead(risk, losses, gains, anchor, anchor_strength)
    target = rtol * max((losses.max() - losses.min()).item(), torch.finfo(losses.dtype).tiny)
    point = problem.at(anchor)
    best, bound, step, num_steps = point, point.bound, 1.0, 0
    while best.value - bound > target and num_steps < max_steps and step > _LEAST_STEP:
        num_steps += 1
        candidates = [problem.at(shares) for shares in _between(point, step)]
        moved = min(candidates, key=lambda candidate: candidate.value)
        bound = max(bound, *(candidate.bound for candidate in candidates))
        if moved.value < point.value:
            point, step = moved, min(1.0, _GROW * step)
            best = point
        else:
            step *= _SHRINK
    return LookaheadMixture(
        mixture=best.mixture,
        value=best.value,
        gap=max(best.value - bound, 0.0),
        num_steps=num_steps,
    )


@dataclass(frozen=True, slots=True)
class _Point:
    mixture: Tensor
    value: float
    bound: float
    """Least value that any mixture can have."""
    answer: Tensor
    """Best mixture against the worst-case weights of this one."""


def _between(point: _Point, step: float) -> tuple[Tensor, Tensor]:
    """Returns mixtures on two paths to the best answer: straight, and straight in logarithms.

    The first leaves the boundary of the simplex at once and falls for every short step, the second
    is the faster one within.
    """
    straight = (1 - step) * point.mixture + step * point.answer
    tiny = torch.finfo(point.mixture.dtype).tiny  # a share may have vanished by rounding
    logs = point.mixture.clamp_min(tiny).log(), point.answer.clamp_min(tiny).log()
    logits = (1 - step) * logs[0] + step * logs[1]
    return straight, torch.softmax(logits, dim=0)


@dataclass(frozen=True, slots=True)
class _Lookahead:
    risk: Callable[[Tensor], WorstCase]
    losses: Tensor
    gains: Tensor
    anchor: Tensor
    strength: float

    def at(self, mixture: Tensor) -> _Point:
        predicted = self.losses - self.gains @ mixture
        worst = self.risk(predicted)
        value = float(worst.value) + self.strength * _kl(mixture, self.anchor)
        # What the adversary pays for its weights does not depend on the losses.
        paid = float(worst.weights @ predicted) - float(worst.value)
        logits = self.anchor.log() + self.gains.T @ worst.weights / self.strength
        best_response = self.strength * float(torch.logsumexp(logits, dim=0))
        bound = float(worst.weights @ self.losses) - paid - best_response
        return _Point(mixture, value, bound, torch.softmax(logits, dim=0))


def _kl(left: Tensor, right: Tensor) -> float:
    inside = left > 0
    total = float((left[inside] * (left[inside] / right[inside]).log()).sum())
    return max(total, 0.0) if math.isfinite(total) else math.inf
