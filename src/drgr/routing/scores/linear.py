"""Linear scores: the softmax or the sigmoid of a linear map."""

from typing import final

import torch.nn.functional as F
from torch import Tensor

from drgr.routing.scores.scorer import (
    RouterScores,
    Scorer,
    at_least_float32,
    chosen_scores,
    normalised_weights,
)


@final
class SoftmaxScores(Scorer):
    r"""``s_t = softmax(W x_t)`` over all experts.

    Args:
        normalised: Whether weights are divided by the sum over a token's chosen experts (Mixtral,
            Qwen3-MoE) or are the probabilities themselves (Switch, OLMoE).

    References:
        Shazeer et al., *Outrageously Large Neural Networks*, arXiv 1701.06538; Fedus et al.,
        *Switch Transformers*, arXiv 2101.03961.
    """

    def __init__(self, *, normalised: bool = True) -> None:
        super().__init__()
        self._normalised = normalised

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = at_least_float32(F.linear(hidden, weight))
        scores = logits.softmax(dim=-1)
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        rule = normalised_weights if self._normalised else chosen_scores
        return rule(scores, expert_ids, keep)


@final
class SigmoidScores(Scorer):
    r"""``s_te = sigmoid(w_e \cdot x_t)``, weights divided by the sum over a token's chosen experts.

    References:
        DeepSeek-AI, *DeepSeek-V3 Technical Report*, arXiv 2412.19437.
    """

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = at_least_float32(F.linear(hidden, weight))
        scores = logits.sigmoid()
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())
