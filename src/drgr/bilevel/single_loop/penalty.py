"""A method of first derivatives only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from drgr._checks import check_not_negative, check_positive
from drgr.bilevel.single_loop.estimator import Directions, Memory, Start
from drgr.bilevel.single_loop.oracle import Oracle, Point


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class F2SA:
    r"""Replaces second derivatives by the distance of two inner solutions.

    Beside ``y``, which minimises ``g``, the auxiliary variable ``u`` minimises ``F + lam g``:

    .. math::
        D_y = \nabla_y g(x, y), \quad D_u = \nabla_y g(x, u) + \nabla_y F(x, u) / \lambda, \quad
        D_x = \nabla_x F(x, u) + \lambda (\nabla_x g(x, u) - \nabla_x g(x, y)).

    ``lam (y - u)`` tends to ``z``. ``D_u`` is divided by ``lam``, so that one step size suits all
    ``lam``. Two choices differ from the reference: the difference in ``D_x`` is taken on one batch,
    where independent ones would multiply their noise by ``lam``, and ``y`` and ``u`` share theirs.
    The outer gradient is biased by O(1/lam).

    Args:
        inner_steps: Steps on ``y`` and ``u`` before each on ``x``, at least 1.
        penalty: First ``lam``, above 0; it should exceed twice the largest curvature of ``F`` over
            the least of ``g``.
        increment: ``lam`` grows by ``increment (k + 1)^(-decay)`` after step ``k``; 0 keeps it.
        decay: 6/7 makes ``lam`` grow like ``k^(1/7)``, as the theory has it.

    Raises:
        ValueError: If a number is out of range.

    Complexity:
        ``3 inner_steps + 3`` oracle calls a step, all of them gradients.

    References:
        Kwon, Kwon, Wright, Nowak, *A fully first-order method for stochastic bilevel optimization*,
        2023.

    Examples:
        >>> F2SA(penalty=10.0)  # doctest: +ELLIPSIS
        F2SA(inner_steps=1, penalty=10.0, increment=1.0, decay=0.857...)
    """

    inner_steps: int = 1
    penalty: float = 1.0
    increment: float = 1.0
    decay: float = 6 / 7

    def __post_init__(self) -> None:
        check_positive("inner_steps", self.inner_steps)
        check_positive("penalty", self.penalty)
        check_not_negative("increment", self.increment)
        check_not_negative("decay", self.decay)

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins with ``u`` at ``y``."""
        penalty = torch.tensor(self.penalty, dtype=torch.float64)
        return Start(point.inner.clone(), {"penalty": penalty})

    def directions(
        self, oracle: Oracle, point: Point, memory: Memory, step: int
    ) -> Iterator[Directions]:
        """Yields the directions of ``y`` and ``u``, then that of ``x``."""
        penalty = memory["penalty"].item()
        for _ in range(self.inner_steps):
            batch = [oracle.draw_inner()]
            inner = oracle.inner_gradients(batch, point.outer, point.inner)
            tilted = oracle.inner_gradients(batch, point.outer, point.auxiliary)
            outer = oracle.outer_gradients([oracle.draw_outer()], point.outer, point.auxiliary)
            yield Directions(
                inner=inner.by_inner, auxiliary=tilted.by_inner + outer.by_inner / penalty
            )
        batch = [oracle.draw_inner()]
        inner = oracle.inner_gradients(batch, point.outer, point.inner)
        tilted = oracle.inner_gradients(batch, point.outer, point.auxiliary)
        outer = oracle.outer_gradients([oracle.draw_outer()], point.outer, point.auxiliary)
        yield Directions(outer=outer.by_outer + penalty * (tilted.by_outer - inner.by_outer))
        memory["penalty"] = memory["penalty"] + self.increment / (step + 1) ** self.decay
