"""Means over the real tokens of a batch, wherever its processes hold them.

Losses and diagnostics of routing are means over tokens. Here is what they share: padding that
reaches neither a value nor a gradient, and means over processes.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.collectives import sum_over_processes, world_size


def real_rows(rows: Tensor, valid: Tensor | None, *, fill: float = 0.0) -> Tensor:
    """Replaces the rows of padding by a constant.

    Args:
        rows: One row for each token, shape ``(T, ...)``.
        valid: Which tokens are real, shape ``(T,)``, bool; ``None`` where all are.
        fill: The constant.

    Returns:
        Same shape, float32 at least. What padding held, NaN included, reaches neither the value
        nor a gradient.

    Raises:
        ValueError: If ``valid`` does not have one entry for each row.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if valid is None:
        return rows
    check_shape("valid", valid, (rows.shape[0],))
    return torch.where(valid.view(-1, *[1] * (rows.dim() - 1)), rows, fill)


def expert_probabilities(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Divides each token's scores by their sum: softmax scores stay, sigmoid scores sum to 1.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``.
        valid: Which tokens are real, shape ``(T,)``; padding gets uniform probabilities.

    Returns:
        Shape ``(T, E)``, float32 at least; zeros for a token whose scores are all 0.
    """
    rows = real_rows(scores, valid, fill=1.0)
    return rows / rows.sum(dim=1, keepdim=True).clamp_min(1e-20)


def shared_mean(
    values: Tensor, valid: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Averages over the real tokens of all processes.

    Args:
        values: One row for each token of this process, shape ``(T, ...)``.
        valid: Which tokens are real, shape ``(T,)``.
        group: Processes that share the batch.

    Returns:
        Shape ``(...)``, the same on every process; 0 where no token is real.

    Gradients:
        As of :func:`shared_ratio`.
    """
    total = real_rows(values, valid).sum(dim=0)
    count = total.new_tensor(values.shape[0], dtype=torch.int64) if valid is None else valid.sum()
    return shared_ratio(total, count, group)


def shared_ratio(total: Tensor, count: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Divides a sum by a count, both over all processes.

    Args:
        total: This process's part of the sum, any shape.
        count: This process's part of the count, scalar integer.
        group: Processes that share the batch.

    Returns:
        The ratio, the same on every process; 0 where the count is 0.

    Gradients:
        That of this process's part, times the number of processes: averaged over processes, as
        data-parallel training does, it is the gradient for the whole batch. So it is for any
        function of the ratio.
    """
    size = world_size(group)
    if size > 1:
        own = total * size
        total = own + (sum_over_processes(total, group) - own.detach())
    return total / sum_over_processes(count, group).clamp_min(1)


def by_sequence(rows: Tensor, sequence_length: int) -> Tensor:
    """Views the rows of a batch as sequences.

    Args:
        rows: One row for each token, shape ``(T, ...)``, sequence after sequence.
        sequence_length: Tokens of each sequence, padding included; a divisor of ``T``.

    Returns:
        Shape ``(T / sequence_length, sequence_length, ...)``.

    Raises:
        ValueError: If ``sequence_length`` is below 1 or does not divide ``T``.
    """
    if sequence_length < 1 or rows.shape[0] % sequence_length != 0:
        raise ValueError(
            f"sequence_length must be at least 1 and divide the number of tokens, got "
            f"{sequence_length} for {rows.shape[0]} tokens; pass the padded length of a row"
        )
    return rows.reshape(rows.shape[0] // sequence_length, sequence_length, *rows.shape[1:])


def kept_and_real(keep: Tensor, valid: Tensor | None) -> Tensor:
    """Returns the candidates that run and whose token is real, bool, shape ``(T, K)``."""
    return keep if valid is None else keep & valid.unsqueeze(1)
