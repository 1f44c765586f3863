"""The one interface of everything that scores experts for tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drgr.routing.place import LayerPlace
from drgr.routing.plan import LayerRouting


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterScores:
    """What a scorer says about each token and expert.

    Attributes:
        scores: Scores that combine weights follow from, non-negative, ``(T, E)``, with gradient,
            float32 at least.
        logits: What the scores are a function of, ``(T, E)``, with gradient.
        selectable: Worth to select by before prices, ``(T, E)``, detached; ``-inf`` forbids an
            expert. The scores where a scorer has no other.
        is_open: Which experts the scorer would run by itself, bool, ``(T, E)``; ``None`` where it
            leaves their number to the selection. See
            :class:`drgr.routing.selection.OpenExperts`.
    """

    scores: Tensor
    logits: Tensor
    selectable: Tensor
    is_open: Tensor | None = None


class Scorer(nn.Module, ABC):
    """Turns tokens and a router's weight into scores of all experts, and scores into weights.

    The weight is that of the model's router, so that every scorer trains what the model already
    has; what a scorer needs beside it are parameters or buffers of its own. Randomness comes from
    PyTorch's generator of the device, in training mode only, so that recomputation under gradient
    checkpointing draws the same numbers. Processes that were seeded alike draw alike, each for its
    own tokens.

    Attributes:
        observes: Whether :meth:`observe` needs the tokens' vectors; records hold them then.
        needs_losses: Whether its gradient comes from the value of the loss: :meth:`surrogate` is to
            be added to the loss of each training pass.
    """

    observes = False
    needs_losses = False

    @abstractmethod
    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """Scores all experts.

        Args:
            hidden: The tokens' vectors, shape ``(T, D)``.
            weight: The router's weight, one row for each expert, shape ``(E, D)``.
        """

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """Returns the combine weights of chosen experts, 0 where not kept, shape ``(T, K)``.

        Here: their scores, divided by the sum over the experts of the token that run.

        Args:
            scores: All scores, shape ``(T, E)``.
            expert_ids: Candidates, shape ``(T, K)``.
            keep: Which of them run, bool, shape ``(T, K)``.
        """
        return normalised_weights(scores, expert_ids, keep)

    def surrogate(self, routing: LayerRouting, losses: Tensor) -> Tensor:
        """Returns a loss whose gradient estimates that of the loss in expectation over draws.

        Here: an error, as the gradient flows through the combine weights.

        Args:
            routing: The record of a training pass of this layer.
            losses: What each token's draws answer for, in units of the loss that is minimised,
                shape ``(T,)``, or a scalar for all; taken as constants.

        Raises:
            ValueError: If :attr:`needs_losses` says that there is none.
        """
        del routing, losses
        raise ValueError(
            f"surrogate needs a scorer that learns from the value of the loss, got "
            f"{type(self).__name__}; its gradient flows through the combine weights"
        )

    def observe(self, routing: LayerRouting) -> None:
        """Takes in one training micro-batch of this process. Here: nothing."""
        del routing

    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves what is learned without gradients, once an optimizer step. Here: nothing."""
        del group


ScorerFactory = Callable[[LayerPlace], Scorer]
"""Builds the scorer of a layer, on the CPU; it is moved to the layer's device."""


def chosen_scores(scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
    """Returns the scores of the experts that run, 0 elsewhere, shape ``(T, K)``."""
    return torch.where(keep, scores.gather(1, expert_ids), 0.0)


def normalised_weights(scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
    """Returns :func:`chosen_scores` divided by their sum; zeros where that is 0."""
    chosen = chosen_scores(scores, expert_ids, keep)
    return chosen / chosen.sum(dim=1, keepdim=True).clamp_min(1e-20)


def at_least_float32(values: Tensor) -> Tensor:
    """Converts half precision to float32 and leaves the rest."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit_rows(rows: Tensor) -> Tensor:
    """Divides each row by its Euclidean norm, float32 at least; a row of zeros stays as it is.

    Nothing is added to the norm: the result does not depend on the scale of a row, and a row of
    zeros has a finite gradient.
    """
    rows = at_least_float32(rows)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def cosines(hidden: Tensor, rows: Tensor) -> Tensor:
    """Returns the cosine of each token with each row, shape ``(T, E)``, float32 at least.

    Args:
        hidden: Vectors, shape ``(T, D)``.
        rows: One vector for each expert, shape ``(E, D)``.
    """
    # Automatic mixed precision would round the cosines, which differ by little, to 8 bits.
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(unit_rows(hidden), unit_rows(rows))
