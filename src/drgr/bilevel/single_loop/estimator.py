"""What a single-loop method is: directions from batches, and what it remembers between them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from drgr.bilevel.single_loop.basis import Basis
from drgr.bilevel.single_loop.oracle import Gradients, InnerTerms, Oracle, Point

Memory = dict[str, Tensor]
"""Tensors that an estimator keeps between steps, by name; saved and restored with the run."""


class Directions(NamedTuple):
    """Where to move; None leaves a variable alone. All are followed at once, downhill."""

    inner: Tensor | None = None
    """Goes to the inner optimizer as the gradient of ``y``, shape ``(d_y,)``."""
    auxiliary: Tensor | None = None
    """Shape of ``z``."""
    outer: Tensor | None = None
    """Shape ``(d_x,)``."""
    touched: list[bool] | None = None
    """Which tensors of the inner parameters the optimizer moves; None is all."""
    basis: Basis | None = None
    """If given, ``inner`` is in its coordinates, shape ``(rank,)``."""
    renew: bool = False
    """Whether the inner optimizer is to forget what it knows before the move."""


class Start(NamedTuple):
    """What an estimator begins with."""

    auxiliary: Tensor
    """First ``z``, or what takes its place."""
    memory: Memory
    num_coordinates: int | None = None
    """Entries that the inner optimizer trains, where these are not those of ``y``."""


class Estimator(Protocol):
    """Estimates directions from batches."""

    def start(self, oracle: Oracle, point: Point) -> Start:
        """Returns what to begin with at a point with ``z = 0``."""
        ...

    def directions(
        self, oracle: Oracle, point: Point, memory: Memory, step: int
    ) -> Iterator[Directions]:
        """Yields the directions of one step; the point has moved when the next are asked for.

        Args:
            oracle: Draws batches and differentiates on them.
            point: Where the method is now.
            memory: Its own tensors, to be read and replaced.
            step: Number of the step, from 0.
        """
        ...


class Triple(NamedTuple):
    """The three directions of a method that differentiates twice."""

    inner: Tensor
    auxiliary: Tensor
    outer: Tensor


def implicit_directions(inner: InnerTerms, outer: Gradients) -> Triple:
    """Returns ``grad_y g``, ``H z - grad_y F`` and ``grad_x F - J z``."""
    return Triple(
        inner=inner.gradient,
        auxiliary=inner.hessian - outer.by_inner,
        outer=outer.by_outer - inner.cross,
    )


def directions_on(
    oracle: Oracle, point: Point, inner: Sequence[int], outer: Sequence[int]
) -> Triple:
    """Returns the three directions, means over the given batches."""
    return implicit_directions(
        oracle.inner_terms(inner, point),
        oracle.outer_gradients(outer, point.outer, point.inner),
    )


def drawn_directions(oracle: Oracle, point: Point) -> Triple:
    """Returns the three directions on one inner and one outer batch: 4 oracle calls."""
    return directions_on(oracle, point, [oracle.draw_inner()], [oracle.draw_outer()])
