"""Derivatives of the losses on batches, and what they cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from drgr.bilevel.checked_loss import checked
from drgr.bilevel.products import HvpMode, Loss, gradients, leaf, second_derivatives
from drgr.bilevel.single_loop.problem import FiniteSumProblem
from drgr.bilevel.structures import Layout


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OracleCalls:
    """Evaluations of derivatives on one batch; a full pass counts as many as there are batches.

    A Hessian-vector and a cross product from one double backward count one each.
    """

    inner_gradients: int = 0
    hessian_products: int = 0
    cross_products: int = 0
    outer_gradients: int = 0

    @property
    def total(self) -> int:
        """The sum of the four."""
        products = self.hessian_products + self.cross_products
        return self.inner_gradients + products + self.outer_gradients

    def __add__(self, other: "OracleCalls") -> "OracleCalls":
        return OracleCalls(
            inner_gradients=self.inner_gradients + other.inner_gradients,
            hessian_products=self.hessian_products + other.hessian_products,
            cross_products=self.cross_products + other.cross_products,
            outer_gradients=self.outer_gradients + other.outer_gradients,
        )


@dataclass(slots=True)
class Point:
    """Where a method is: flat vectors."""

    outer: Tensor
    """``x``, shape ``(d_x,)``."""
    inner: Tensor
    """``y``, shape ``(d_y,)``; changes in place."""
    auxiliary: Tensor
    """``z``, or what the estimator keeps in its place; changes in place."""


class InnerTerms(NamedTuple):
    """What one double backward gives."""

    gradient: Tensor
    """``grad_y g``, shape ``(d_y,)``."""
    hessian: Tensor
    """``(H + damping) z``, shape ``(d_y,)``."""
    cross: Tensor
    """``J z``, shape ``(d_x,)``."""


class Gradients(NamedTuple):
    """First derivatives of a loss."""

    by_outer: Tensor
    by_inner: Tensor


@dataclass(slots=True)
class Curvature:
    """Curvature ``z'Hz / z'z`` of the batches along the vectors that were multiplied."""

    lowest: float = math.inf
    num_negative: int = 0

    def watch(self, vector: Tensor, product: Tensor) -> None:
        """Takes note of a product without damping."""
        square = torch.dot(vector, vector).item()
        if square > 0:
            found = torch.dot(vector, product).item() / square
            self.lowest = min(self.lowest, found)
            self.num_negative += found < 0


@final
class Oracle:
    """Differentiates the losses of a problem on batches, and counts.

    Args:
        problem: The problem.
        layouts: Of the outer and the inner parameters.
        hvp: How to take products: see :func:`second_derivatives`.
        damping: Added to the Hessian.
        generator: Draws batches.
    """

    def __init__(
        self,
        problem: FiniteSumProblem,
        layouts: tuple[Layout, Layout],
        *,
        hvp: HvpMode,
        damping: float,
        generator: torch.Generator,
    ) -> None:
        self.problem = problem
        self.outer_layout, self.inner_layout = layouts
        self.generator = generator
        self.calls = OracleCalls()
        self.curvature = Curvature()
        self.damping = damping
        self._hvp = hvp

    @property
    def all_inner(self) -> range:
        """Indices of all inner batches."""
        return range(len(self.problem.inner_batches))

    @property
    def all_outer(self) -> range:
        """Indices of all outer batches."""
        return range(len(self.problem.outer_batches))

    def draw_inner(self) -> int:
        """Returns the index of an inner batch, uniform."""
        return self._drawn(len(self.all_inner))

    def draw_outer(self) -> int:
        """Returns the index of an outer batch, uniform."""
        return self._drawn(len(self.all_outer))

    def inner_terms(
        self, indices: Sequence[int], point: Point, along: Tensor | None = None
    ) -> InnerTerms:
        """Returns gradient and both products, means over batches, along ``z`` by default."""
        vector = point.auxiliary if along is None else along
        self.calls += OracleCalls(
            inner_gradients=len(indices),
            hessian_products=len(indices),
            cross_products=len(indices),
        )
        gradient, hessian, cross = _mean(
            indices, lambda index: self._inner_terms(index, point, vector)
        )
        return InnerTerms(gradient, self._damped(vector, hessian), cross)

    def hessian(self, indices: Sequence[int], point: Point, along: Tensor) -> Tensor:
        """Returns ``(H + damping) v``, shape ``(d_y,)``."""
        self.calls += OracleCalls(hessian_products=len(indices))
        (product,) = _mean(indices, lambda index: (self._products(index, point, along)[0],))
        return self._damped(along, product)

    def cross(self, indices: Sequence[int], point: Point, along: Tensor) -> Tensor:
        """Returns ``J v``, shape ``(d_x,)``."""
        self.calls += OracleCalls(cross_products=len(indices))
        (product,) = _mean(indices, lambda index: (self._products(index, point, along)[1],))
        return product

    def inner_gradients(self, indices: Sequence[int], outer: Tensor, inner: Tensor) -> Gradients:
        """Returns both gradients of the inner loss."""
        self.calls += OracleCalls(inner_gradients=len(indices))
        return Gradients(
            *_mean(indices, lambda index: _gradients("inner", self._inner(index), outer, inner))
        )

    def outer_gradients(self, indices: Sequence[int], outer: Tensor, inner: Tensor) -> Gradients:
        """Returns both gradients of the outer loss."""
        self.calls += OracleCalls(outer_gradients=len(indices))
        return Gradients(
            *_mean(indices, lambda index: _gradients("outer", self._outer(index), outer, inner))
        )

    def _drawn(self, count: int) -> int:
        device = self.generator.device
        return int(torch.randint(count, (), generator=self.generator, device=device))

    def _damped(self, vector: Tensor, product: Tensor) -> Tensor:
        self.curvature.watch(vector, product)
        return product + self.damping * vector if self.damping else product

    def _inner(self, index: int) -> Loss:
        batch, loss = self.problem.inner_batches[index], self.problem.inner_loss
        return lambda outer, inner: loss(
            self.outer_layout.structure(outer), self.inner_layout.structure(inner), batch
        )

    def _outer(self, index: int) -> Loss:
        batch, loss = self.problem.outer_batches[index], self.problem.outer_loss
        return lambda outer, inner: loss(
            self.outer_layout.structure(outer), self.inner_layout.structure(inner), batch
        )

    def _inner_terms(self, index: int, point: Point, along: Tensor) -> tuple[Tensor, ...]:
        loss = self._inner(index)
        if self._hvp == "double-backward":
            return _by_double_backward(loss, point, along)
        gradient = _gradients("inner", loss, point.outer, point.inner).by_inner
        return (gradient, *self._products(index, point, along))

    def _products(self, index: int, point: Point, along: Tensor) -> tuple[Tensor, Tensor]:
        products = second_derivatives(self._hvp, self._inner(index), point.outer, point.inner)
        return products.hessian_and_cross(along)


def _by_double_backward(loss: Loss, point: Point, along: Tensor) -> tuple[Tensor, ...]:
    outer, inner = leaf(point.outer), leaf(point.inner)
    with torch.enable_grad():
        value = checked("inner", loss)(outer, inner)
        _check_depends(value, inner)
        (gradient,) = torch.autograd.grad(
            value, inner, create_graph=True, allow_unused=True, materialize_grads=True
        )
    if not gradient.requires_grad:  # linear in the inner parameters
        return gradient.detach(), torch.zeros_like(inner), torch.zeros_like(outer)
    hessian, cross = torch.autograd.grad(
        gradient, (inner, outer), along, allow_unused=True, materialize_grads=True
    )
    return gradient.detach(), hessian, cross


def _gradients(name: str, loss: Loss, outer: Tensor, inner: Tensor) -> Gradients:
    outer, inner = leaf(outer), leaf(inner)
    value, by_outer, by_inner = gradients(checked(name, loss), outer, inner)
    if name == "inner":
        _check_depends(value, inner)
    return Gradients(
        torch.zeros_like(outer) if by_outer is None else by_outer,
        torch.zeros_like(inner) if by_inner is None else by_inner,
    )


def _check_depends(value: Tensor, inner: Tensor) -> None:
    """Raises ``ValueError`` if a loss depends on none of the tensors passed to it."""
    if not value.requires_grad:
        raise ValueError(
            f"inner_loss does not depend on inner_params ({inner.numel()} entries); use the "
            "tensors passed to it, not others"
        )


def _mean(indices: Sequence[int], terms_of: Callable[[int], Sequence[Tensor]]) -> list[Tensor]:
    totals = list(terms_of(indices[0]))
    for index in indices[1:]:
        totals = [total + term for total, term in zip(totals, terms_of(index), strict=True)]
    return [total / len(indices) for total in totals]
