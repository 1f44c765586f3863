r"""Activation locality: neighbouring tokens should use the same experts.

.. math:: L = \frac{1}{N E} \sum_{t} \sum_e
              \operatorname{BCE}\big( \sigma(a z_{t-1,e}),\; \sigma(a z_{te}) \big) , \qquad
          \operatorname{BCE}(s, y) = - y \log s - (1 - y) \log (1 - s)

over the ``N`` pairs of neighbours in one sequence, with the current token as the soft target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive
from drgr.routing.tokens import by_sequence, real_rows, shared_mean


def activation_locality_loss(
    logits: Tensor,
    *,
    sequence_length: int,
    sharpness: float = 100.0,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Averages the cross-entropy between the soft activation patterns of neighbouring tokens.

    Args:
        logits: Router logits ``z``, an expert being active above 0, shape ``(T, E)``.
        sequence_length: Tokens of each sequence, padding included.
        sharpness: The factor ``a`` above 0 that makes the sigmoid a near-step; published as 100.
        valid: Which tokens are real, shape ``(T,)``, bool; only pairs of real tokens count.
        group: Processes that share the batch.

    Returns:
        Scalar in nats, float32 at least, the same on every process; 0 where there is no pair.

    Raises:
        ValueError: If ``sharpness`` is not above 0 or ``sequence_length`` does not divide the
            number of tokens.

    Gradients:
        To both tokens of a pair, as of :func:`drgr.routing.tokens.shared_ratio` over processes.

    References:
        Song et al., *BlockFFN*, 2025 (arXiv:2507.08771).
    """
    check_positive("sharpness", sharpness)
    rows = by_sequence(sharpness * real_rows(logits, valid), sequence_length)
    before, now = rows[:, :-1].flatten(0, 1), rows[:, 1:].flatten(0, 1)
    losses = F.binary_cross_entropy_with_logits(before, now.sigmoid(), reduction="none")
    return shared_mean(losses.mean(dim=1), neighbours(logits, valid, sequence_length), group)


def neighbours(rows: Tensor, valid: Tensor | None, sequence_length: int) -> Tensor:
    """Returns which pairs of consecutive tokens are both real, bool, ``(B (S - 1),)``."""
    is_real = rows.new_ones(rows.shape[0], dtype=torch.bool) if valid is None else valid
    is_real = by_sequence(is_real, sequence_length)
    return (is_real[:, :-1] & is_real[:, 1:]).flatten()
