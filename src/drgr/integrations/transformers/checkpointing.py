"""Gradient checkpointing under both names that transformers has had for it."""

from typing import Any


def enable_checkpointing(model: Any, *, use_reentrant: bool = False) -> None:
    """Recomputes each layer of a transformers model in the backward pass instead of storing it.

    Args:
        model: A ``PreTrainedModel`` whose layers support it.
        use_reentrant: PyTorch's older form, which loses the router's gradient while routing is
            recorded; an attached model refuses it then.
    """
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # its name before was the other
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
