"""Which source each token of a forward pass comes from, spread from what the caller knows."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

Source = int | Tensor
"""One source for all tokens, or int64 tensors of one a sequence ``(B,)`` or token ``(B, S)``."""


def check_source(source: Source) -> None:
    """Raises unless ``source`` is an int or an int64 tensor of one or two dimensions.

    Raises:
        TypeError: If it is neither.
        ValueError: If it has another number of dimensions.
    """
    if isinstance(source, int):
        return
    if not isinstance(source, Tensor) or source.dtype != torch.int64:
        given = source.dtype if isinstance(source, Tensor) else type(source).__name__
        raise TypeError(f"source must be an int or an int64 tensor, got {given}; convert it")
    if source.dim() not in (1, 2):
        raise ValueError(
            f"source must have shape (batch,) or (batch, length), got {tuple(source.shape)}"
        )


def token_sources(
    source: Source, num_sources: int | None, module: nn.Module, call: tuple[Any, Any]
) -> Tensor:
    """Returns the source of each token of a call of a transformers model, shape ``(B * S,)``.

    Args:
        source: See :data:`Source`.
        num_sources: Number of sources ``G``, where one is known.
        module: The model that is called.
        call: Positional and keyword arguments of the call.

    Raises:
        ValueError: If a source is out of range, or the shape is not that of the batch.
    """
    tokens = _tokens(module, call)
    batch, length = tokens.shape[:2]
    spread = torch.as_tensor(source, dtype=torch.int64, device=tokens.device)
    if num_sources is not None and spread.numel() > 0:
        low, high = int(spread.min()), int(spread.max())
        if low < 0 or high >= num_sources:
            raise ValueError(
                f"source must lie in [0, {num_sources}), got values from {low} to {high}"
            )
    if spread.dim() == 1:
        spread = spread.unsqueeze(1)
    if spread.dim() == 2 and spread.shape not in ((batch, 1), (batch, length)):
        shape = tuple(source.shape) if isinstance(source, Tensor) else ()
        raise ValueError(
            f"source must have one entry for each of the {batch} sequences, or shape "
            f"({batch}, {length}), got shape {shape}"
        )
    return spread.expand(batch, length).reshape(-1)


def sequence_length(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Returns the tokens of a sequence in a call of a transformers model; ``None`` if not given."""
    tokens = _call_tokens(module, args, kwargs)
    return tokens.shape[1] if isinstance(tokens, Tensor) else None


def _tokens(module: nn.Module, call: tuple[Any, Any]) -> Tensor:
    tokens = _call_tokens(module, *call)
    if not isinstance(tokens, Tensor):
        raise ValueError(
            "a source was given, but the call has neither input_ids nor inputs_embeds; pass one, "
            "so that the batch's shape is known"
        )
    return tokens


def _call_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    tokens = bound.get("input_ids")
    return bound.get("inputs_embeds") if tokens is None else tokens
