"""Directions on fresh batches, the outer one averaged over steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from drgr.bilevel.single_loop.estimator import Directions, Memory, Start, drawn_directions
from drgr.bilevel.single_loop.oracle import Oracle, Point


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MASOBA:
    """SOBA that moves ``x`` along a moving average: ``x -= alpha h``, then ``h += w (D_x - h)``.

    The average begins at 0. It needs less smoothness of both losses than :class:`SOBA`.

    Args:
        weight: ``w`` in (0, 1].

    Raises:
        ValueError: If the weight is out of range.

    Complexity:
        4 oracle calls a step, memory for ``d_x`` entries.

    References:
        Chen, Xiao, Balasubramanian, *Optimal algorithms for stochastic bilevel optimization under
        relaxed smoothness conditions*, 2023.

    Examples:
        >>> MASOBA(weight=0.2)
        MASOBA(weight=0.2)
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must lie in (0, 1], got {self.weight}")

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins at ``z = 0`` and an average of 0."""
        return Start(point.auxiliary, {"average": torch.zeros_like(point.outer)})

    def directions(
        self,
        oracle: Oracle,
        point: Point,
        memory: Memory,
        step: int,  # noqa: ARG002
    ) -> Iterator[Directions]:
        """Yields the directions of ``y`` and ``z``, and the average so far."""
        drawn = drawn_directions(oracle, point)
        average = memory["average"]
        memory["average"] = torch.lerp(average, drawn.outer, self.weight)
        yield Directions(drawn.inner, drawn.auxiliary, average)
