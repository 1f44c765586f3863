"""Nested parameters as one vector and back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Parameters = Any
"""A tensor, or a dict, list or tuple of parameters."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a structure lies in the vector of all of them."""

    like: Parameters
    dtype: torch.dtype

    def without_values(self) -> "Layout":
        """Returns the same layout, which does not keep the tensors that it was made from."""
        shapes = (torch.empty_like(leaf, device="meta") for _, leaf in named_leaves(self.like))
        return Layout(rebuilt(self.like, shapes), self.dtype)

    def vector(self, params: Parameters) -> Tensor:
        """Returns all entries of a structure of this layout, detached, shape ``(d,)``."""
        leaves = [leaf.detach().reshape(-1).to(self.dtype) for _, leaf in named_leaves(params)]
        return torch.cat(leaves)

    def structure(self, vector: Tensor) -> Parameters:
        """Returns the structure whose entries are ``vector``; differentiable."""
        leaves = [leaf for _, leaf in named_leaves(self.like)]
        if len(leaves) == 1:
            parts: tuple[Tensor, ...] = (vector,)
        else:
            parts = vector.split([leaf.numel() for leaf in leaves])
        # A view that changes nothing would be one more node of every derivative.
        shaped = (
            (part if part.shape == leaf.shape else part.view(leaf.shape)).to(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        )
        return rebuilt(self.like, iter(shaped))


def layout_of(name: str, params: Parameters) -> Layout:
    """Returns the layout of nested parameters.

    Raises:
        TypeError: If something in it is no floating-point tensor.
        ValueError: If it is empty, spreads over devices, holds values that are not finite, or some
            of its tensors require grad and others do not.
    """
    leaves = list(named_leaves(params, name))
    if sum(leaf.numel() for _, leaf in leaves) == 0:
        raise ValueError(f"{name} has no entries, got {params!r}; pass the parameters to vary")
    for path, leaf in leaves:
        if not leaf.is_floating_point():
            raise TypeError(f"{path} must be a floating-point tensor, got {leaf.dtype}")
        if not bool(leaf.detach().isfinite().all()):
            raise ValueError(f"{path} must be finite, got nan or inf in it")
    _check_alike(leaves)
    dtype = leaves[0][1].dtype
    for _, leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return Layout(params, dtype)


def named_leaves(params: Parameters, path: str = "params") -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor with the expression that reaches it."""
    if isinstance(params, Tensor):
        yield path, params
    elif isinstance(params, Mapping):
        for key, value in params.items():
            yield from named_leaves(value, f"{path}[{key!r}]")
    elif isinstance(params, (list, tuple)):
        for index, value in enumerate(params):
            yield from named_leaves(value, f"{path}[{index}]")
    else:
        raise TypeError(
            f"{path} must be a tensor or a dict, list or tuple of tensors, "
            f"got {type(params).__name__}"
        )


def check_same_structure(name: str, params: Parameters, layout: Layout) -> None:
    """Raises ``ValueError`` unless ``params`` has the keys and shapes of a layout."""
    have = [(path, tuple(leaf.shape)) for path, leaf in named_leaves(params, "")]
    want = [(path, tuple(leaf.shape)) for path, leaf in named_leaves(layout.like, "")]
    if have != want:
        raise ValueError(f"{name} must have the structure {want}, got {have}")


def rebuilt(like: Parameters, leaves: Iterator[Tensor]) -> Parameters:
    """Returns a structure of the same kind with other tensors."""
    if isinstance(like, Tensor):
        return next(leaves)
    if isinstance(like, Mapping):
        return {key: rebuilt(value, leaves) for key, value in like.items()}
    items = [rebuilt(value, leaves) for value in like]
    if isinstance(like, list):
        return items
    return type(like)(*items) if hasattr(like, "_fields") else tuple(items)


def _check_alike(leaves: list[tuple[str, Tensor]]) -> None:
    first_path, first = leaves[0]
    trained = [path for path, leaf in leaves if leaf.requires_grad]
    frozen = [path for path, leaf in leaves if not leaf.requires_grad]
    if trained and frozen:
        raise ValueError(
            f"{frozen[0]} does not require grad and {trained[0]} does; leave frozen tensors out, "
            "or call requires_grad_() on what is to vary"
        )
    for path, leaf in leaves:
        if leaf.device != first.device:
            raise ValueError(
                f"{path} is on {leaf.device} and {first_path} on {first.device}; "
                "move them to one device"
            )
