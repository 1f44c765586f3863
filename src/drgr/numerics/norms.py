"""Euclidean norms of blocks, without overflow and with derivatives at zero."""

import torch
from torch import Tensor

from drgr.numerics.inputs import plain, values_are_readable


def block_norms(point: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Returns the Euclidean norm over ``dim``, kept with size 1; its derivatives at 0 are 0."""
    size = point.detach().abs().amax(dim=dim, keepdim=True)
    scale = torch.where(size > 0, size, 1.0)
    return scale * _root((point / scale).square().sum(dim=dim, keepdim=True))


def group_norms(point: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Returns the Euclidean norm of each group of coordinates, shape ``(..., num_groups)``."""
    shape = (*point.shape[:-1], num_groups)
    member = group.expand(point.shape)
    size = point.new_zeros(shape).scatter_reduce(-1, member, point.detach().abs(), "amax")
    scale = torch.where(size > 0, size, 1.0)
    squares = (point / scale.index_select(-1, group)).square()
    return scale * _root(point.new_zeros(shape).index_add(-1, group, squares))


def check_group(group: Tensor, num_groups: int, num_coordinates: int) -> None:
    """Raises unless ``group`` gives each coordinate a group in ``[0, num_groups)``."""
    if group.dtype != torch.int64:
        raise TypeError(f"group must be int64, got {group.dtype}; convert it")
    if group.shape != (num_coordinates,):
        raise ValueError(
            f"group must have shape ({num_coordinates},), one entry per coordinate of point, "
            f"got {tuple(group.shape)}"
        )
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}; count the groups")
    if not values_are_readable(group):
        return
    wrong = (group < 0) | (group >= num_groups)
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"group must lie in [0, {num_groups}), got {group[index].item()} "
            f"at index {plain(index)}; raise num_groups or relabel"
        )


def _root(squares: Tensor) -> Tensor:
    """Returns the square root, with derivatives 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
