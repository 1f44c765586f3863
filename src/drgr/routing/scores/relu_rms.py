r"""Rectified logits, normalised by their root mean square.

.. math:: a_t = \max(0, W x_t), \qquad
          s_{te} = \frac{a_{te}}{\sqrt{\frac1E \sum_j a_{tj}^2 + \epsilon}} \, |\gamma_e|
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drgr._checks import check_positive
from drgr.routing.scores.rectified import ordered_worths, with_fallback
from drgr.routing.scores.scorer import RouterScores, Scorer, at_least_float32, chosen_scores


@final
class ReluRmsScores(Scorer):
    r"""BlockFFN's router: an expert runs where its logit is positive; RMSNorm sizes the weights.

    How many experts a token has follows from its logits; losses on locality and on chunks make
    them few, see :mod:`drgr.routing.losses`. Published: ReLU, then RMSNorm with a learned gain
    ``gamma``, started at 1, and weights that are the scores themselves. Derived: the absolute value
    of ``gamma``, so that scores are not negative; and where no logit of a token is positive,
    ``gamma`` times the softmax of its logits, with no expert open.

    Args:
        num_experts: Number of experts ``E``.
        epsilon: Added to the mean square, above 0.

    Raises:
        ValueError: If ``epsilon`` is not a finite number above 0.

    Gradients:
        To ``gain``, which is ``gamma``, and to positive logits; to all logits of a token that has
        none. Finite everywhere.

    Numerics:
        Float32 at least.

    References:
        Song et al., *BlockFFN*, 2025 (arXiv 2507.08771).
    """

    def __init__(self, num_experts: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        check_positive("epsilon", epsilon)
        self._epsilon = epsilon
        self.gain = nn.Parameter(torch.ones(num_experts))

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = at_least_float32(F.linear(hidden, weight))
        active = logits.relu()
        mean_square = active.square().mean(dim=-1, keepdim=True)
        gain = self.gain.abs()
        scores = active * torch.rsqrt(mean_square + self._epsilon) * gain
        scores = with_fallback(scores, logits, gain)
        return RouterScores(
            scores=scores,
            logits=logits,
            selectable=ordered_worths(scores, logits),
            is_open=logits.detach() > 0,
        )

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """Returns the scores of the experts that run, see :class:`Scorer`."""
        return chosen_scores(scores, expert_ids, keep)
