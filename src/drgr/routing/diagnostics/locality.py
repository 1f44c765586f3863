r"""How many experts consecutive tokens need together, and how many they share.

.. math:: \text{CLS}_C = 1 - \frac1N \sum_c \frac{1}{E} \Big| \bigcup_{t \in c} I_t \Big| , \qquad
          \text{reuse} = \frac{1}{N'} \sum_t \frac{| I_t \cap I_{t+1} |}{| I_t |}

with ``I_t`` the experts of token ``t``, over chunks of ``C`` consecutive tokens and over pairs of
neighbours.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.routing.tokens import by_sequence, kept_and_real, shared_mean


def active_experts(
    expert_ids: Tensor, keep: Tensor, num_experts: int, *, valid: Tensor | None = None
) -> Tensor:
    """Returns which experts run for each token, bool, shape ``(T, E)``; none for padding.

    Args:
        expert_ids: Candidate experts, shape ``(T, K)``, int64.
        keep: Which candidates run, shape ``(T, K)``, bool.
        num_experts: Number of experts ``E``.
        valid: Which tokens are real, shape ``(T,)``, bool.
    """
    runs = kept_and_real(keep, valid)
    counts = expert_ids.new_zeros(expert_ids.shape[0], num_experts)
    return counts.scatter_add_(1, expert_ids.masked_fill(~runs, 0), runs.to(counts.dtype)) > 0


def chunk_level_sparsity(
    active: Tensor,
    *,
    sequence_length: int,
    chunk_length: int,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Returns the share of experts that a chunk of tokens leaves alone.

    Args:
        active: :func:`active_experts`, shape ``(T, E)``.
        sequence_length: Tokens of each sequence, padding included.
        chunk_length: Tokens of a chunk; 1 gives the sparsity of tokens.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar in [0, 1], float64, the same on every process, over the whole chunks: those cut short
        by padding or by the end of a sequence need fewer experts and are left out. NaN where there
        is none.

    Raises:
        ValueError: If ``chunk_length`` is below 1 or ``sequence_length`` does not divide the number
            of tokens.

    References:
        Song et al., *BlockFFN*, 2025 (arXiv:2507.08771), TLS and CLS; chunks do not overlap here.
    """
    if chunk_length < 1:
        raise ValueError(f"chunk_length must be at least 1, got {chunk_length}")
    is_real = active.new_ones(active.shape[0]) if valid is None else valid
    whole = sequence_length // chunk_length * chunk_length
    rows = by_sequence(active, sequence_length)[:, :whole].reshape(-1, active.shape[1])
    real = by_sequence(is_real, sequence_length)[:, :whole].reshape(-1)
    used = rows.reshape(-1, chunk_length, active.shape[1]).any(dim=1)
    is_whole = real.reshape(-1, chunk_length).all(dim=1)
    return _mean_or_nan(1 - used.double().mean(dim=1), is_whole, group)


def expert_reuse(
    active: Tensor,
    *,
    sequence_length: int,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Returns the share of a token's experts that the next token uses too.

    Args:
        active: :func:`active_experts`, shape ``(T, E)``.
        sequence_length: Tokens of each sequence, padding included.
        valid: Which tokens are real, shape ``(T,)``, bool; pairs of real tokens count.
        group: Processes that share the batch.

    Returns:
        Scalar in [0, 1], float64, the same on every process, over pairs whose first token has an
        expert; NaN where there is none.

    Raises:
        ValueError: If ``sequence_length`` does not divide the number of tokens.

    References:
        Song et al., *BlockFFN*, 2025 (arXiv:2507.08771), the reuse ratio.
    """
    is_real = active.new_ones(active.shape[0]) if valid is None else valid
    rows, real = by_sequence(active, sequence_length), by_sequence(is_real, sequence_length)
    size = rows[:, :-1].sum(dim=2)
    shared = (rows[:, :-1] & rows[:, 1:]).sum(dim=2)
    counted = real[:, :-1] & real[:, 1:] & (size > 0)
    return _mean_or_nan((shared.double() / size.clamp_min(1)).flatten(), counted.flatten(), group)


def _mean_or_nan(values: Tensor, counted: Tensor, group: ProcessGroup | None) -> Tensor:
    """Averages over all processes; NaN, not 0, where nothing counts."""
    columns = torch.stack([values, torch.ones_like(values)], dim=1)
    mean, present = shared_mean(columns, counted, group)
    return torch.where(present > 0, mean, torch.nan)
