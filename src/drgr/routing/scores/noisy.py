r"""Logits with noise whose size is learned for each token and expert.

.. math:: z_{te} = w_e \cdot x_t + g_{te} \log(1 + e^{v_e \cdot x_t}), \qquad
          g_{te} \sim N(0, 1) \text{ in training, } 0 \text{ at evaluation}, \qquad
          s_t = \operatorname{softmax}(z_t)
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from drgr.routing.scores.scorer import RouterScores, Scorer, at_least_float32


@final
class NoisyScores(Scorer):
    r"""Noisy top-k gating: the size of the noise is the softplus of a second linear map.

    The second map starts at zero, as published, which is noise of standard deviation ``log 2``.
    Weights are divided by their sum over a token's chosen experts: the softmax over those alone.

    Args:
        num_experts: Number of experts ``E``.
        width: Width ``D`` of a token's vector.

    Gradients:
        To both maps, in training; the second map has none at evaluation.

    Numerics:
        Noise and softmax in float32 at least.

    References:
        Shazeer et al., *Outrageously Large Neural Networks*, 2017 (arXiv 1701.06538).
    """

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        # A linear layer, so that its products are counted. Its usual start would draw numbers.
        self.noise = skip_init(nn.Linear, width, num_experts, bias=False)
        nn.init.zeros_(self.noise.weight)

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = at_least_float32(F.linear(hidden, weight))
        if self.training:
            raw = self.noise(hidden.to(self.noise.weight.dtype))
            logits = logits + torch.randn_like(logits) * F.softplus(at_least_float32(raw))
        scores = logits.softmax(dim=-1)
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())
