r"""Cosine scores, of directions alone.

.. math:: z_{te} = \frac{1}{\tau} \frac{w_e \cdot x_t}{\|w_e\| \, \|x_t\|}, \qquad
          s_t = \operatorname{softmax}(z_t)
"""

import math
from typing import final

import torch
from torch import Tensor, nn

from drgr._checks import check_positive
from drgr.routing.scores.scorer import (
    RouterScores,
    Scorer,
    chosen_scores,
    cosines,
    normalised_weights,
)


@final
class CosineScores(Scorer):
    r"""The softmax of cosines over a temperature: neither norm of token or row has a say.

    Published with tokens projected to few dimensions first, and a floor under the temperature; here
    the cosine is that of the model's own width, and the temperature is ``tau = tau_0 exp(f)``,
    above 0 for every ``f``, both derived. ``f`` starts at 0, so weight decay pulls towards
    ``tau_0``.

    Args:
        temperature: The temperature ``tau_0``, above 0.
        learned: Whether ``f`` is a parameter; it stays 0 otherwise.
        normalised: Whether weights are divided by the sum over a token's chosen experts.

    Raises:
        ValueError: If ``temperature`` is not a finite number above 0.

    Gradients:
        Orthogonal to the token and to the row; finite where one of them is zero, with cosine 0.

    Numerics:
        Norms and cosines in float32 at least.

    References:
        Chi et al., *On the Representation Collapse of Sparse Mixture of Experts*, 2022
        (arXiv 2204.09179).
    """

    def __init__(
        self, *, temperature: float = 0.07, learned: bool = True, normalised: bool = True
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self._temperature = temperature
        self._normalised = normalised
        self.log_factor = nn.Parameter(torch.zeros(())) if learned else None

    @property
    def temperature(self) -> float:
        """The temperature now."""
        factor = 0.0 if self.log_factor is None else float(self.log_factor.detach())
        return self._temperature * math.exp(factor)

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = cosines(hidden, weight) / self._temperature
        if self.log_factor is not None:
            logits = logits * torch.exp(-self.log_factor)
        scores = logits.softmax(dim=-1)
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        rule = normalised_weights if self._normalised else chosen_scores
        return rule(scores, expert_ids, keep)
