r"""All experts for an undecided token, the top-p of its probabilities for any other.

.. math:: O_t = \begin{cases} \{1, \dots, E\} & S_q(p_t) / S_q(1/E) > h \\
              \{e : \textstyle\sum_{j \preceq e} p_{tj} \le \pi\} \cup \mathrm{top}_r(p_t)
              & \text{otherwise} \end{cases}, \qquad p_t = \operatorname{softmax}(W x_t)

with ``S_q`` the Tsallis entropy and ``j <= e`` the experts that rank up to ``e``.
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from drgr._checks import check_positive
from drgr.routing.losses.tsallis import tsallis_entropy
from drgr.routing.scores.scorer import RouterScores, Scorer, at_least_float32, chosen_scores


@final
class TsallisHybridScores(Scorer):
    r"""DynMoLE's router: an entropy test between soft routing and top-p.

    Published: all of the formula and the defaults. The published top-p leaves out the expert whose
    probability crosses ``pi``, where nucleus sampling takes it in; both are here. Weights are the
    probabilities themselves: they are not divided by their sum, soft or not. Published with 1e-5
    added to each probability in the entropy, which is left out here.
    :func:`drgr.routing.tsallis_entropy_loss` is the loss that goes with it.

    Args:
        order: The order ``q`` of the entropy, above 0; 1 is Shannon's.
        threshold: Share ``h`` of the largest entropy above which all experts are open, above 0; at
            1 or more none ever is.
        top_p: Probability ``pi`` that open experts have at most, above 0 and at most 1.
        keep_top: First ranks ``r`` that are open whatever their probability, at least 1.
        takes_crossing: Whether the expert that crosses ``pi`` is open.

    Raises:
        ValueError: If a number is out of range.

    Gradients:
        Through the probabilities; which experts are open is piecewise constant.

    Numerics:
        Float32 at least.

    References:
        *DynMoLE*, 2025 (arXiv 2504.00661).
    """

    def __init__(
        self,
        *,
        order: float = 1.1,
        threshold: float = 0.9,
        top_p: float = 0.75,
        keep_top: int = 2,
        takes_crossing: bool = False,
    ) -> None:
        super().__init__()
        check_positive("order", order)
        check_positive("threshold", threshold)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if keep_top < 1:
            raise ValueError(f"keep_top must be at least 1, got {keep_top}")
        self._order = order
        self._threshold = threshold
        self._top_p = top_p
        self._keep_top = keep_top
        self._takes_crossing = takes_crossing

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = at_least_float32(F.linear(hidden, weight))
        scores = logits.softmax(dim=-1)
        fixed = scores.detach()
        is_open = self._top(fixed)
        if self._threshold < 1:
            is_soft = tsallis_entropy(fixed, order=self._order) > self._threshold
            is_open = is_open | is_soft.unsqueeze(1)
        return RouterScores(scores=scores, logits=logits, selectable=fixed, is_open=is_open)

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """Returns the probabilities of the experts that run, see :class:`Scorer`."""
        return chosen_scores(scores, expert_ids, keep)

    def _top(self, probabilities: Tensor) -> Tensor:
        """Returns the experts of the first ranks, bool, shape ``(T, E)``."""
        ranked, experts = probabilities.sort(dim=-1, descending=True, stable=True)
        reached = ranked.cumsum(dim=-1)
        # The expert that crosses is the last one whose betters have not reached top_p together.
        takes = self._takes_crossing
        is_open = reached - ranked < self._top_p if takes else reached <= self._top_p
        is_open[:, : self._keep_top] = True
        return torch.zeros_like(is_open).scatter_(1, experts, is_open)
