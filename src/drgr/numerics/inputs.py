"""Arguments of projections and proximal maps: their checks, precision and shapes.

Values are read only where that is free: on the CPU and outside ``torch.compile``. Elsewhere a check
would wait for the device or break the graph; shapes and dtypes are checked everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What every entry of an argument must satisfy."""

    words: str
    """Completes "<name> must ..."."""
    holds: Callable[[Tensor], Tensor]
    """Maps a tensor to a mask of the entries that satisfy it; NaN must not."""
    remedy: str


FINITE = Condition(words="be finite", holds=torch.isfinite, remedy="drop or repair that entry")
FINITE_OR_MINUS_INF = Condition(
    words="be finite or -inf", holds=lambda t: t < torch.inf, remedy="drop or repair that entry"
)
ABOVE_ZERO = Condition(
    words="be finite and above 0",
    holds=lambda t: (t > 0) & (t < torch.inf),
    remedy="drop that entry or give a positive number",
)
NOT_NEGATIVE = Condition(
    words="be finite and at least 0",
    holds=lambda t: (t >= 0) & (t < torch.inf),
    remedy="give 0 or a positive number",
)
AT_LEAST_ZERO = Condition(
    words="be at least 0", holds=lambda t: t >= 0, remedy="give 0, a positive number or inf"
)
BELOW_INF = Condition(
    words="be a number below inf", holds=lambda t: t < torch.inf, remedy="give -inf for no bound"
)
ABOVE_MINUS_INF = Condition(
    words="be a number above -inf", holds=lambda t: t > -torch.inf, remedy="give inf for no bound"
)


def values_are_readable(tensor: Tensor) -> bool:
    """Returns whether reading the values neither waits for a device nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_values(name: str, tensor: Tensor, condition: Condition) -> None:
    """Raises ``ValueError`` at the first entry that fails, where values are readable."""
    if not values_are_readable(tensor):
        return
    holds = condition.holds(tensor.detach())
    if not bool(holds.all()):
        index = tuple((~holds).nonzero()[0].tolist())
        place = f" at index {plain(index)}" if index else ""
        raise ValueError(
            f"{name} must {condition.words}, got {tensor[index].item()}{place}; {condition.remedy}"
        )


def checked_point(name: str, point: Tensor, condition: Condition = FINITE) -> Tensor:
    """Returns a floating-point tensor in float32 or float64, after checking its values."""
    if not point.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {point.dtype}; convert it")
    check_values(name, point, condition)
    return point if point.dtype in (torch.float32, torch.float64) else point.float()


def checked_vectors(name: str, point: Tensor, condition: Condition = FINITE) -> Tensor:
    """Returns :func:`checked_point` after checking that the last dimension has coordinates."""
    if point.dim() == 0 or point.shape[-1] == 0:
        raise ValueError(
            f"{name} must have shape (..., n) with n >= 1, got {tuple(point.shape)}; "
            "put the coordinates along the last dimension"
        )
    return checked_point(name, point, condition)


def checked_operand(
    name: str,
    value: float | Tensor,
    condition: Condition,
    *,
    like: Tensor,
    shape: torch.Size | None = None,
) -> Tensor:
    """Returns an argument in the dtype and on the device of ``like``, expanded to ``shape``.

    Args:
        name: Name of the argument for messages.
        value: A number, or a tensor that broadcasts to ``shape``.
        condition: What its entries must satisfy.
        like: Gives dtype, device and, unless ``shape`` is given, the shape.
        shape: Shape of the result.

    Returns:
        A tensor of that shape; gradients reach ``value``.

    Raises:
        ValueError: If an entry fails the condition, or the shape does not broadcast.
    """
    target = like.shape if shape is None else shape
    if not isinstance(value, Tensor):
        if not torch.compiler.is_compiling():
            check_values(name, torch.tensor(value, dtype=torch.float64), condition)
        return torch.full((), value, dtype=like.dtype, device=like.device).expand(target)
    check_values(name, value, condition)
    if not _expands(value.shape, target):
        raise ValueError(
            f"{name} must be a number or broadcast to shape {tuple(target)}, "
            f"got shape {tuple(value.shape)}; reshape it"
        )
    return value.to(like).expand(target)


def with_value(formula: Tensor, value: Tensor) -> Tensor:
    """Returns ``value`` with the derivatives of ``formula``, which equals it up to rounding."""
    return value.detach() + (formula - formula.detach())


def plain(index: tuple[int, ...]) -> str:
    """Returns ``3`` for the index ``(3,)`` and ``(3, 1)`` for longer ones."""
    return str(index[0]) if len(index) == 1 else str(index)


def _expands(shape: torch.Size, target: torch.Size) -> bool:
    """Returns whether a tensor of ``shape`` can be expanded to ``target``."""
    return len(shape) <= len(target) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False)
    )
