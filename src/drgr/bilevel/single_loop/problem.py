"""Bilevel problems whose losses are means over batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

BatchLoss = Callable[[Any, Any, Any], Tensor]
"""A scalar of the outer parameters, the inner parameters and a batch."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FiniteSumProblem:
    """Minimise ``F(x, y*(x))`` with ``y*(x) = argmin_y g(x, y)``, both means over their batches.

    Every batch weighs the same, whatever its size.

    Args:
        inner_loss: ``(outer_params, inner_params, batch) -> g`` on a batch, a scalar, the same on
            every call with the same arguments.
        outer_loss: ``F`` likewise.
        inner_batches: Batches of ``g``: anything with a length and an index, such as a list or
            ``range(n)`` where the loss looks its batch up; another iterable is read once.
        outer_batches: Batches of ``F``.

    Raises:
        ValueError: If there are no batches.

    Examples:
        >>> import torch
        >>> data = torch.arange(6.0)
        >>> problem = FiniteSumProblem(
        ...     inner_loss=lambda x, y, batch: (y - x * batch).square().mean(),
        ...     outer_loss=lambda x, y, index: (y - index).square(),
        ...     inner_batches=data.split(2),
        ...     outer_batches=range(4),
        ... )
        >>> len(problem.inner_batches), len(problem.outer_batches)
        (3, 4)
    """

    inner_loss: BatchLoss
    outer_loss: BatchLoss
    inner_batches: Sequence[Any]
    outer_batches: Sequence[Any]

    def __post_init__(self) -> None:
        for name in ("inner_batches", "outer_batches"):
            batches = _indexable(getattr(self, name))
            if len(batches) == 0:
                raise ValueError(f"{name} is empty, got {batches!r}; pass at least one batch")
            object.__setattr__(self, name, batches)


def _indexable(batches: Iterable[Any]) -> Sequence[Any]:
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        return batches  # type: ignore[return-value]
    return tuple(batches)
