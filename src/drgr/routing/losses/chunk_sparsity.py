r"""Chunk sparsity: consecutive tokens together should need few experts.

.. math:: L = \frac{1}{N E} \sum_{c} \sum_e \Big( 1 - \prod_{t \in c} (1 - p_{te}) \Big)

over the ``N`` chunks of consecutive tokens. The bracket is the probability that a chunk needs
expert ``e``, if each token drew one expert from its ``p``.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.routing.tokens import by_sequence, expert_probabilities, real_rows, shared_mean


def chunk_sparsity_loss(
    scores: Tensor,
    *,
    sequence_length: int,
    chunk_length: int = 64,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Averages, over chunks and experts, the probability that a chunk needs an expert.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``; each row is divided by its sum.
        sequence_length: Tokens of each sequence, padding included.
        chunk_length: Tokens of a chunk; the last of a sequence may have fewer.
        valid: Which tokens are real, shape ``(T,)``, bool; padding needs no expert, and chunks of
            padding alone do not count.
        group: Processes that share the batch; each chunk weighs the same.

    Returns:
        Scalar in [0, 1], float32 at least, the same on every process; 0 where no token is real. It
        is at least ``1 / E`` where one is: a chunk needs one expert.

    Raises:
        ValueError: If ``chunk_length`` is below 1 or ``sequence_length`` does not divide the number
            of tokens.

    Gradients:
        As of :func:`drgr.routing.tokens.shared_ratio` over processes; exact where a probability
        is 1.

    References:
        Song et al., *BlockFFN*, 2025 (arXiv:2507.08771), published as the exponential of a sum of
        logs with 1e-5 added; the product needs no constant.
    """
    probabilities = real_rows(expert_probabilities(scores, valid), valid)
    chunks = in_chunks(by_sequence(probabilities, sequence_length), chunk_length)
    is_real = scores.new_ones(scores.shape[0]) if valid is None else valid.to(scores.dtype)
    counted = in_chunks(by_sequence(is_real.unsqueeze(1), sequence_length), chunk_length)
    needed = 1 - (1 - chunks).prod(dim=1)
    return shared_mean(needed.mean(dim=1), counted.sum(dim=(1, 2)) > 0, group)


def in_chunks(rows: Tensor, chunk_length: int) -> Tensor:
    """Cuts sequences into chunks, filling up the last of each with zeros.

    Args:
        rows: Sequences, shape ``(B, S, E)``.
        chunk_length: Tokens of a chunk ``C``.

    Returns:
        Shape ``(B ceil(S / C), C, E)``.

    Raises:
        ValueError: If ``chunk_length`` is below 1.
    """
    if chunk_length < 1:
        raise ValueError(f"chunk_length must be at least 1, got {chunk_length}")
    length, width = rows.shape[1:]
    number = -(-length // chunk_length)
    filled = F.pad(rows, (0, 0, 0, number * chunk_length - length))
    return filled.reshape(rows.shape[0] * number, chunk_length, width)
