"""The k-th largest value of each column, over data that is spread across processes."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes, world_size

_DIGIT_BITS = 8
_NUM_DIGITS = 1 << _DIGIT_BITS


def kth_largest(values: Tensor, k: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Finds the ``k``-th largest element of each column over all processes.

    Args:
        values: Finite float32 values, shape ``(n, m)``; ``n`` may differ between processes.
        k: Rank from the top, 1 for the largest, int64 scalar or one for each column ``(m,)``, equal
            on all processes; clamped to the number of rows, so more gives the smallest element.
        group: Processes that share the data.

    Returns:
        Shape ``(m,)``, float32: an element of each column, the same whatever the split of the rows.

    Raises:
        TypeError: If ``values`` is not float32.
        ValueError: If no process has a row.

    Gradients:
        None.

    Complexity:
        One process: one sort, O(nm log n). Several: radix selection, four passes over the data,
        each with one all-reduce of ``256 m`` counts; no row leaves its process.

    Examples:
        >>> import torch
        >>> kth_largest(torch.tensor([[1.0, 8.0], [3.0, 2.0], [2.0, 5.0]]), torch.tensor(2))
        tensor([2., 5.])
    """
    if values.dtype != torch.float32:
        raise TypeError(f"values must be float32, got {values.dtype}; convert them first")
    num_rows = sum_over_processes(torch.tensor(values.shape[0], device=values.device), group)
    if int(num_rows) == 0:
        raise ValueError("values must have at least one row, got 0; give a batch with valid tokens")
    position = (torch.minimum(k.clamp_min(1), num_rows) - 1).expand(values.shape[1])
    if world_size(group) == 1:
        ordered = values.detach().sort(dim=0, descending=True).values
        return ordered.gather(0, position.unsqueeze(0))[0]
    return _radix_select(values.detach(), position, group)


def _radix_select(values: Tensor, position: Tensor, group: ProcessGroup | None) -> Tensor:
    """Selects digit by digit from the most significant; the prefix found narrows the data."""
    keys = _ordered_keys(values)
    num_columns = values.shape[1]
    remaining = position.clone()
    prefix = torch.zeros(num_columns, dtype=torch.int64, device=values.device)
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        matches = (keys >> (shift + _DIGIT_BITS)) == prefix
        digits = (keys >> shift) & (_NUM_DIGITS - 1)
        counts = torch.zeros(_NUM_DIGITS, num_columns, dtype=torch.int64, device=values.device)
        counts.scatter_add_(0, digits, matches.long())
        from_top = sum_over_processes(counts, group).flip(0).cumsum(0)
        steps_down = (from_top <= remaining).sum(dim=0)
        above = torch.where(
            steps_down > 0, from_top.gather(0, (steps_down - 1).clamp_min(0).unsqueeze(0))[0], 0
        )
        remaining -= above
        prefix = (prefix << _DIGIT_BITS) | (_NUM_DIGITS - 1 - steps_down)
    return _values_of_keys(prefix)


def _ordered_keys(values: Tensor) -> Tensor:
    """Maps float32 to int64 in [0, 2^32) so that the order of keys is the order of values."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


def _values_of_keys(keys: Tensor) -> Tensor:
    """Inverts :func:`_ordered_keys`."""
    bits = torch.where(keys >= 0x80000000, keys - 0x80000000, 0xFFFFFFFF - keys)
    signed = torch.where(bits >= 0x80000000, bits - 0x100000000, bits)
    return signed.to(torch.int32).view(torch.float32)
