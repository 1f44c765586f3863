"""Losses of another evaluation, to be compared with."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from drgr.errors import ConfigError

# Of a run: its protocol, where there is one, else the evaluation that ended its training.
_FILES = ("protocol.json", "evaluation.json")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """Bits per byte of another evaluation, by domain.

    Attributes:
        path: The file they are from.
        bits_per_byte: Shape ``(G,)``, float64.
    """

    path: Path
    bits_per_byte: Tensor


def read_reference(path: Path, *, split: str, domains: Sequence[str]) -> Reference:
    """Reads the bits per byte of another evaluation.

    Args:
        path: A ``protocol.json`` or ``evaluation.json``, or a run directory with one of them (the
            first is preferred).
        split: The split that is evaluated now.
        domains: The domains that are evaluated now, ``G`` of them.

    Raises:
        ConfigError: If there is no such file, it is of another split, or lacks a domain.
    """
    file = next((path / name for name in _FILES if (path / name).is_file()), path)
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        found = content["data"]["split"] if "data" in content else content["split"]
        entries = {
            name: float(entry["bits_per_byte"]) for name, entry in content["domains"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"reference {path} must be a protocol.json or evaluation.json, or a run that has one, "
            f"got {type(error).__name__}: {error}"
        ) from error
    if found != split:
        raise ConfigError(
            f"reference {file} is of the {found} split, but the {split} split is evaluated; "
            f"evaluate it with --split {split} first"
        )
    missing = [name for name in domains if not math.isfinite(entries.get(name, math.nan))]
    if missing:
        raise ConfigError(
            f"reference {file} must have the bits per byte of every domain, got none of {missing}; "
            "evaluate it on the same corpus"
        )
    bits = torch.tensor([entries[name] for name in domains], dtype=torch.float64)
    return Reference(path=file, bits_per_byte=bits)
