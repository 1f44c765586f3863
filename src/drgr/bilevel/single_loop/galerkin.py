"""An auxiliary variable of few entries, within a random subspace."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.bilevel.single_loop.basis import Basis
from drgr.bilevel.single_loop.estimator import Directions, Memory, Start
from drgr.bilevel.single_loop.oracle import Gradients, InnerTerms, Oracle, Point
from drgr.bilevel.single_loop.subspace import Subspaces, check_subspaces, next_basis


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GalerkinSOBA:
    r"""SOBA that keeps nothing of full size beside the parameters: ``z = s P c``, ``c`` of ``r``.

    With ``P`` orthonormal and random, ``(d, r)``, and ``s = d / r``: the inner optimizer trains
    coordinates of ``y``'s move on ``s P' grad_y g``, and ``c`` follows ``P' H P c - P' grad_y F``.
    Each period draws a subspace, puts ``c`` to 0, the optimizer's state away, and lets ``c`` take
    ``warmup`` steps before ``x`` moves again.

    Biased: ``c`` tends to the solution within the subspace, whose lift is not ``H^-1 grad_y F``
    for any number of subspaces, unless ``H`` is a multiple of the identity. The scale makes it
    right on average over eigenvectors: ``tr(s P (P' H P)^-1 P' H) = d`` for every ``P``.

    Args:
        rank: ``r``, at least 1; ``d_y`` if larger.
        period: Steps with one subspace, at least 1.
        warmup: Steps on ``c`` alone after each change of subspace, at least 0.
        subspaces: How to draw them: see :class:`SubspaceSOBA`.

    Raises:
        ValueError: If an argument is out of range.

    Complexity:
        4 oracle calls a step, and ``warmup + 1`` at each change; O(d r) random numbers for each of
        about five multiplications with ``P``, O(d) with signs. Memory ``r^2 + 2 r + 1``, or
        ``2 r + 1`` with signs, and the optimizer's state of ``r``.

    References:
        The idea of Zhang, Kong, Zhang, Yuan, 2026 (BROS), which it does not claim to be; projection
        onto a subspace is Galerkin's.

    Examples:
        >>> GalerkinSOBA(rank=4, period=100)
        GalerkinSOBA(rank=4, period=100, warmup=10, subspaces='uniform')
    """

    rank: int
    period: int
    warmup: int = 10
    subspaces: Subspaces = "uniform"

    def __post_init__(self) -> None:
        check_positive("rank", self.rank)
        check_positive("period", self.period)
        check_not_negative("warmup", self.warmup)
        check_subspaces(self.subspaces)

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins at ``c = 0``."""
        rank = min(self.rank, len(point.inner))
        return Start(point.inner.new_zeros(rank), {}, num_coordinates=rank)

    def directions(
        self, oracle: Oracle, point: Point, memory: Memory, step: int
    ) -> Iterator[Directions]:
        """Yields the steps of the warm-up, where one is due, and the three directions."""
        is_new = step % self.period == 0
        basis = next_basis(oracle, point, memory, self, is_new=is_new)
        scale = len(point.inner) / basis.rank
        if is_new:
            point.auxiliary.zero_()
            right = _target(oracle, point, basis).by_inner
            for _ in range(self.warmup):
                yield Directions(auxiliary=_image(oracle, point, basis) - right)
        terms = _inner_terms(oracle, point, basis)
        outer = _target(oracle, point, basis)
        yield Directions(
            inner=scale * terms.gradient,
            auxiliary=terms.hessian - outer.by_inner,
            outer=outer.by_outer - scale * terms.cross,
            basis=basis,
            renew=is_new,
        )


# Of what these return nothing has the size of ``y``: what has is gone before the next is taken.


def _target(oracle: Oracle, point: Point, basis: Basis) -> Gradients:
    """Returns ``grad_x F`` and ``P' grad_y F``."""
    outer = oracle.outer_gradients([oracle.draw_outer()], point.outer, point.inner)
    return Gradients(outer.by_outer, basis.coordinates(outer.by_inner))


def _image(oracle: Oracle, point: Point, basis: Basis) -> Tensor:
    """Returns ``P' H P c``."""
    along = basis.lifted(point.auxiliary)
    return basis.coordinates(oracle.hessian([oracle.draw_inner()], point, along))


def _inner_terms(oracle: Oracle, point: Point, basis: Basis) -> InnerTerms:
    """Returns ``P' grad_y g``, ``P' H P c`` and ``J P c``."""
    along = basis.lifted(point.auxiliary)
    terms = oracle.inner_terms([oracle.draw_inner()], point, along)
    return InnerTerms(
        basis.coordinates(terms.gradient), basis.coordinates(terms.hessian), terms.cross
    )
