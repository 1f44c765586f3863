"""Loads a causal language model from a directory or by hub name, executing nothing from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from drgr.errors import ConfigError

_LoadWithInfo = Callable[..., tuple[PreTrainedModel, dict[str, Any]]]


def load_pretrained(name_or_path: str) -> PreTrainedModel:
    """Loads weights for training, in float32.

    Only safetensors files are read and no code that comes with a checkpoint is run. A checkpoint
    that lacks some of the model's weights, or has them in another shape, is refused: they would be
    random.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or ``owner/name`` on the hub
            (taken from the local cache, else over the network). An existing directory wins.

    Returns:
        The model on the CPU, in training mode. Whether it has experts is not checked here.

    Raises:
        ConfigError: If the directory does not exist, the hub cannot be reached, or the checkpoint
            is damaged, incomplete or not a causal language model.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_dir() and _names_a_path(name_or_path):
        raise ConfigError(
            f"model must be an existing directory or a hub name such as owner/name, got "
            f"{name_or_path!r}, which is no directory; check the path"
        )
    model, unread = _load(str(path) if path.is_dir() else name_or_path, name_or_path)
    if unread:
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        raise ConfigError(
            f"model {name_or_path!r} must hold every weight in its configuration's shape, got a "
            f"checkpoint in which {len(unread)} are missing or of another shape ({shown}); use the "
            "checkpoint of the whole language model with the config.json it was saved with"
        )
    model.train()
    return use_cache_for_generation_only(model)


def use_cache_for_generation_only(model: PreTrainedModel) -> PreTrainedModel:
    """Switches the key-value cache off in plain forward passes and leaves it on in ``generate``.

    Args:
        model: The model to change, in place.

    Returns:
        The same model.
    """
    model.config.use_cache = False
    if model.generation_config is not None:
        model.generation_config.use_cache = True
    return model


def _names_a_path(name_or_path: str) -> bool:
    """Hub names are ``name`` or ``owner/name``: no more slashes, no leading dot, slash or tilde."""
    return name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1


def _load(source: str, shown_name: str) -> tuple[PreTrainedModel, list[str]]:
    """Returns the model and the names of the weights that the checkpoint could not fill."""
    # The declared type of from_pretrained leaves out the pair that output_loading_info asks for.
    load = cast("_LoadWithInfo", AutoModelForCausalLM.from_pretrained)
    try:
        model, info = load(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name instead of refused without one
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")  # the rest lists all known classes
        raise ConfigError(
            f"model {shown_name!r} must be a causal language model in safetensors format, "
            f"known to transformers, got {type(error).__name__}: {reason}; name a directory "
            "written by save_pretrained, or a public hub name on a machine with a network"
        ) from error
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    return model, sorted(mismatched.union(info["missing_keys"]))
