r"""Probabilities at a temperature, with noise of one size.

.. math:: z_t = \operatorname{softmax}(W x_t / \tau) + \sigma g_t, \qquad
          g_{te} \sim N(0, 1) \text{ in training, } 0 \text{ at evaluation}, \qquad
          s_t = \operatorname{softmax}(z_t)
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.routing.scores.scorer import RouterScores, Scorer, at_least_float32


@final
class GaussianScores(Scorer):
    r"""DynaMoE's scores: noise on the probabilities, and a second softmax over what is chosen.

    Published are noise, temperature and second softmax; that the temperature divides the logits is
    derived, since where it enters could not be read. Experts are chosen by ``z``, and weights
    divided by their sum over a token's chosen experts are the softmax of their ``z``. The published
    choice, a percentile of a token's own scores, gives every token the same number of experts; a
    selection over the batch is what was meant.

    Args:
        temperature: The temperature ``tau``, above 0.
        deviation: Standard deviation ``sigma`` of the noise, at least 0.

    Raises:
        ValueError: If a number is out of range.

    Gradients:
        Through both softmaxes.

    Numerics:
        Float32 at least.

    References:
        *DynaMoE*, 2026 (arXiv 2603.01697), by the account of a third party.
    """

    def __init__(self, *, temperature: float = 0.5, deviation: float = 0.1) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_not_negative("deviation", deviation)
        self._temperature = temperature
        self._deviation = deviation

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        raw = at_least_float32(F.linear(hidden, weight))
        logits = (raw / self._temperature).softmax(dim=-1)
        if self.training:
            logits = logits + self._deviation * torch.randn_like(logits)
        return RouterScores(
            scores=logits.softmax(dim=-1), logits=logits, selectable=logits.detach()
        )
