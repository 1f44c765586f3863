"""Directions whose noise is reduced by differences of two points."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from drgr._checks import check_positive
from drgr.bilevel.single_loop.estimator import (
    Directions,
    Memory,
    Start,
    Triple,
    directions_on,
)
from drgr.bilevel.single_loop.oracle import Oracle, Point


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SRBA:
    """Reduces the noise of the three directions like SARAH: constant steps, memory of two points.

    Every ``period`` steps all batches are used; in between
    ``D += D_B(x, y, z) - D_B(x_before, y_before, z_before)`` with one pair of batches ``B``, so
    that ``D`` is unbiased over a period but not at a given point.

    Args:
        period: Steps from one full pass to the next, at least 1; of the order of the number of
            batches.

    Raises:
        ValueError: If the period is not positive.

    Complexity:
        8 oracle calls a step, and a full pass every period; memory for ``4 d_y + 2 d_x``.

    References:
        Dagreou, Moreau, Vaiter, Ablin, *A lower bound and a near-optimal algorithm for bilevel
        empirical risk minimization*, 2023. Nguyen, Liu, Scheinberg, Takac, *SARAH*, 2017.

    Examples:
        >>> SRBA(period=16)
        SRBA(period=16)
    """

    period: int

    def __post_init__(self) -> None:
        check_positive("period", self.period)

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins at ``z = 0``; the first step fills the memory."""
        return Start(point.auxiliary, {})

    def directions(
        self, oracle: Oracle, point: Point, memory: Memory, step: int
    ) -> Iterator[Directions]:
        """Yields the three directions."""
        if step % self.period == 0:
            found = directions_on(oracle, point, oracle.all_inner, oracle.all_outer)
        else:
            found = _updated(oracle, point, memory)
        memory.update(zip(Triple._fields, found, strict=True))
        memory["x"], memory["y"] = point.outer.clone(), point.inner.clone()
        memory["z"] = point.auxiliary.clone()
        yield Directions(*found)


def _updated(oracle: Oracle, point: Point, memory: Memory) -> Triple:
    inner, outer = [oracle.draw_inner()], [oracle.draw_outer()]
    before = Point(memory["x"], memory["y"], memory["z"])
    new = directions_on(oracle, point, inner, outer)
    old = directions_on(oracle, before, inner, outer)
    return Triple(
        *(memory[name] + getattr(new, name) - getattr(old, name) for name in Triple._fields)
    )
