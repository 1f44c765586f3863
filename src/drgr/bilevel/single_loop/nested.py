"""Several steps on ``y``, several on ``z``, then one on ``x``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from drgr._checks import check_not_negative, check_positive
from drgr.bilevel.single_loop.estimator import Directions, Memory, Start
from drgr.bilevel.single_loop.oracle import Oracle, Point


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AmIGO:
    """Warm-started steps on ``y``, then on ``z``, then one step on ``x``, each on a fresh batch.

    ``z`` follows ``H z - grad_y F`` with ``grad_y F`` of one outer batch, which also gives
    ``grad_x F``.

    Args:
        inner_steps: Steps on ``y``, at least 1.
        linear_steps: Steps on ``z``, at least 1.

    Raises:
        ValueError: If a number is not positive.

    Complexity:
        ``inner_steps + linear_steps + 2`` oracle calls a step, no memory beside ``z``.

    References:
        Arbel, Mairal, *Amortized implicit differentiation for stochastic bilevel optimization*,
        2022.

    Examples:
        >>> AmIGO(inner_steps=10, linear_steps=10)
        AmIGO(inner_steps=10, linear_steps=10)
    """

    inner_steps: int = 10
    linear_steps: int = 10

    def __post_init__(self) -> None:
        check_positive("inner_steps", self.inner_steps)
        check_positive("linear_steps", self.linear_steps)

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins at ``z = 0`` and remembers nothing."""
        return Start(point.auxiliary, {})

    def directions(
        self,
        oracle: Oracle,
        point: Point,
        memory: Memory,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Iterator[Directions]:
        """Yields the directions of the phases in turn."""
        yield from _inner_phase(oracle, point, self.inner_steps)
        yield from _outer_phase(oracle, point, self.linear_steps)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StocBiO:
    """Steps on ``y``, a stochastic Neumann series from nothing for ``z``, then one step on ``x``.

    The series ``z = rho sum_q prod_(i <= q) (I - rho H_i) grad_y F`` with a fresh batch for each
    ``H_i`` is summed from its inside out: ``z <- z - rho (H_i z - grad_y F)`` from ``z = 0``, steps
    of :class:`AmIGO` without its warm start. Biased for any number of terms.

    Args:
        inner_steps: Steps on ``y``, at least 1.
        num_products: Products in the series, at least 0.

    Raises:
        ValueError: If a number is out of range.

    Complexity:
        ``inner_steps + num_products + 2`` oracle calls a step, no memory beside ``z``.

    References:
        Ji, Yang, Liang, *Bilevel optimization: convergence analysis and enhanced design*, 2021.

    Examples:
        >>> StocBiO(inner_steps=10, num_products=10)
        StocBiO(inner_steps=10, num_products=10)
    """

    inner_steps: int = 10
    num_products: int = 10

    def __post_init__(self) -> None:
        check_positive("inner_steps", self.inner_steps)
        check_not_negative("num_products", self.num_products)

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins at ``z = 0`` and remembers nothing."""
        return Start(point.auxiliary, {})

    def directions(
        self,
        oracle: Oracle,
        point: Point,
        memory: Memory,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Iterator[Directions]:
        """Yields the directions of the phases in turn."""
        yield from _inner_phase(oracle, point, self.inner_steps)
        point.auxiliary.zero_()
        yield from _outer_phase(oracle, point, self.num_products, from_zero=True)


def _inner_phase(oracle: Oracle, point: Point, num_steps: int) -> Iterator[Directions]:
    for _ in range(num_steps):
        found = oracle.inner_gradients([oracle.draw_inner()], point.outer, point.inner)
        yield Directions(inner=found.by_inner)


def _outer_phase(
    oracle: Oracle, point: Point, num_products: int, *, from_zero: bool = False
) -> Iterator[Directions]:
    target = oracle.outer_gradients([oracle.draw_outer()], point.outer, point.inner)
    if from_zero:  # the product with 0 costs nothing
        yield Directions(auxiliary=-target.by_inner)
    for _ in range(num_products):
        product = oracle.hessian([oracle.draw_inner()], point, point.auxiliary)
        yield Directions(auxiliary=product - target.by_inner)
    cross = oracle.cross([oracle.draw_inner()], point, point.auxiliary)
    yield Directions(outer=target.by_outer - cross)
