"""Reference losses of the domains, read from a file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drgr.errors import ConfigError


def load_reference_losses(path: str | Path, domains: Sequence[str]) -> Tensor:
    """Reads the reference loss of each domain, for excess losses.

    Args:
        path: JSON file that maps each domain to its mean token loss in nats; or the
            ``evaluation.json`` of an earlier run, ``{"domains": {name: {"loss": x}}}``. Further
            domains in the file are ignored. Reading executes nothing.
        domains: Names of the domains, in the order of the result.

    Returns:
        Losses in nats, float64, shape ``(len(domains),)``.

    Raises:
        ConfigError: If the file cannot be read or parsed, or a domain is missing or has a loss
            that is not a finite number; the domain and its value are named.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "reference.json"
        ...     _ = path.write_text('{"web": 2.5, "code": 1.25}')
        ...     load_reference_losses(path, ["code", "web"])
        tensor([1.2500, 2.5000], dtype=torch.float64)
    """
    losses = _losses_by_domain(Path(path))
    values = [_checked_loss(losses, domain, path) for domain in domains]
    return torch.tensor(values, dtype=torch.float64)


def _losses_by_domain(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"the reference-loss file {path} cannot be read as JSON: {error}; "
            'give a file like {"domain": 2.1} or the evaluation.json of a run'
        ) from error
    if isinstance(content, dict) and isinstance(content.get("domains"), dict):
        entries = content["domains"].items()
        return {
            name: entry.get("loss") if isinstance(entry, dict) else entry for name, entry in entries
        }
    if not isinstance(content, dict):
        raise ConfigError(
            f"the reference-loss file {path} must hold an object that maps domains to losses, "
            f"got {type(content).__name__}"
        )
    return content


def _checked_loss(losses: dict[str, Any], domain: str, path: str | Path) -> float:
    if domain not in losses:
        raise ConfigError(
            f"the reference-loss file {path} has no domain {domain!r}, it has {sorted(losses)}; "
            "add its loss in nats or turn excess losses off"
        )
    loss = losses[domain]
    is_number = isinstance(loss, int | float) and not isinstance(loss, bool)
    if not (is_number and math.isfinite(loss)):
        raise ConfigError(
            f"the reference loss of domain {domain!r} in {path} must be a finite number of nats, "
            f"got {loss!r}; evaluate the reference model again or repair the file"
        )
    return float(loss)
