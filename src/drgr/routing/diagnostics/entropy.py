r"""Routing entropy: how undecided tokens are, as a share of complete indecision.

.. math:: \frac{1}{n \log E} \sum_t H(p_t), \qquad H(p) = - \sum_e p_e \log p_e
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.routing.losses.tsallis import tsallis_entropy_loss


@torch.no_grad()
def routing_entropy(
    scores: Tensor, *, valid: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Averages the normalised entropy of the real tokens.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``; each row is divided by its sum.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar in [0, 1], float64, detached, the same on every process: 0 for decided tokens, 1 for
        flat probabilities; 0 where no token is real and for one expert.
    """
    return tsallis_entropy_loss(scores.double(), order=1.0, valid=valid, group=group)
