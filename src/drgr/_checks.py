"""Argument checks shared by every layer; each failure names the argument and its value."""

import math
from collections.abc import Sequence

from torch import Tensor


def check_positive(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number of at least zero."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


def check_share(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``0 <= value < 1``."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """Raises ``ValueError`` unless ``tensor`` has the ``expected`` shape; ``None`` is any size."""
    matches = tensor.dim() == len(expected) and all(
        want is None or want == have for want, have in zip(expected, tensor.shape, strict=False)
    )
    if not matches:
        wanted = tuple("any" if size is None else size for size in expected)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
