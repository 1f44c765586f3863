"""Which tokens of a forward pass are real, read from its attention mask."""

import inspect
from typing import Any

from torch import Tensor, nn


def padding_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Reads the padding mask of a call of a transformers model.

    Args:
        module: The model that is called.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        Which of the call's tokens are real, shape ``(B * S,)``, bool; ``None`` where the call has
        no 2-D mask, so that every token is real. With a key-value cache the mask covers the past as
        well, and only its last ``S`` columns belong to the call.

    Raises:
        ValueError: If a training call passes a mask of another rank: padding could not be told.
    """
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    mask = bound.get("attention_mask")
    tokens = bound.get("input_ids")
    tokens = bound.get("inputs_embeds") if tokens is None else tokens
    if mask is None or not isinstance(tokens, Tensor):
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -tokens.shape[1] :].reshape(-1).bool()
    if module.training:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be 2-D (batch, length) in training, got {shape}; "
            f"pass the padding mask itself and let the model expand it"
        )
    return None
