"""Sums and gathers over the processes of a run; each is the identity where there is one process.

Everything here is small (counts, losses, prices): parameters and gradients are moved by PyTorch's
own engines. A ``group`` of ``None`` means the default group when one is initialised, else one
process.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None = None) -> int:
    """Returns the number of processes of ``group``; 1 where none was initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """Returns this process's rank within ``group``; 0 where none was initialised."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def sum_over_processes(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Returns the elementwise sum of ``tensor`` over all processes, detached, same dtype."""
    if world_size(group) == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def gather_rows(rows: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Gathers tensors ``(n_r, ...)`` of different length ``n_r`` from all processes.

    Returns:
        The concatenation in rank order, shape ``(sum_r n_r, ...)``, and the row at which this
        process's own part starts. Not differentiable.
    """
    size = world_size(group)
    if size == 1:
        return rows.detach(), 0
    lengths = torch.zeros(size, dtype=torch.int64, device=rows.device)
    lengths[rank(group)] = rows.shape[0]
    dist.all_reduce(lengths, group=group)
    counts: list[int] = lengths.tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered, sum(counts[: rank(group)])
