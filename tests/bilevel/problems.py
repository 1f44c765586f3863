"""Bilevel problems whose hypergradients are known in closed form."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from drgr.bilevel import FiniteSumProblem, Oracle

DOUBLE = torch.float64


class Problem(NamedTuple):
    outer_loss: Callable[[Tensor, Tensor], Tensor]
    inner_loss: Callable[[Tensor, Tensor], Tensor]
    outer: Tensor
    inner: Tensor
    exact: Tensor
    """The hypergradient in float64, from a dense solve."""

    def error(self, grads: Tensor) -> float:
        return ((grads.to(DOUBLE) - self.exact).norm() / self.exact.norm()).item()


def ridge(*, dimension=60, condition=10.0, dtype=DOUBLE, seed=0) -> Problem:
    """Ridge regression with a penalty ``exp(x_j)`` per feature, at its exact solution."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    left = torch.linalg.qr(normal(2 * dimension, dimension))[0]
    right = torch.linalg.qr(normal(dimension, dimension))[0]
    least = 1 / condition
    spectrum = torch.logspace(0, -math.log10(condition), dimension, dtype=DOUBLE) - least / 2
    data = left * spectrum.clamp_min(0).sqrt() @ right.T
    target, test_data, test_target = normal(2 * dimension), normal(50, dimension), normal(50)
    outer = torch.full((dimension,), math.log(least / 2), dtype=DOUBLE)
    hessian = data.T @ data + outer.exp().diag()
    inner = torch.linalg.solve(hessian, data.T @ target)
    slope = test_data.T @ (test_data @ inner - test_target) / 50
    exact = -outer.exp() * inner * torch.linalg.solve(hessian, slope)
    data, target, test_data, test_target = (
        tensor.to(dtype) for tensor in (data, target, test_data, test_target)
    )

    def inner_loss(x, y):
        return (data @ y - target).square().sum() / 2 + (x.exp() * y * y).sum() / 2

    def outer_loss(_x, y):
        return (test_data @ y - test_target).square().mean() / 2

    return Problem(outer_loss, inner_loss, outer.to(dtype), inner.to(dtype), exact)


class QuadraticSum(NamedTuple):
    """Quadratic losses of batches: ``y'Hy/2 + x'Kx/2 + x'Cy + a'y + b'x`` for each index."""

    problem: FiniteSumProblem
    inner: list[Tensor]
    """``H, K, C, a, b``, the first axis over batches."""
    outer: list[Tensor]

    @staticmethod
    def loss(terms, x, y):
        hessian, by_outer, cross, a, b = terms
        return y @ hessian @ y / 2 + x @ by_outer @ x / 2 + x @ cross @ y + a @ y + b @ x

    def directions(self, x, y, z, inner=slice(None), outer=slice(None)):
        """The three directions, written out, means over the batches of two slices."""
        hessian, _, cross, a, _ = (terms[inner].mean(dim=0) for terms in self.inner)
        by_inner, by_outer = self.outer_gradients(x, y, outer)
        return hessian @ y + cross.T @ x + a, hessian @ z - by_inner, by_outer - cross @ z

    def outer_gradients(self, x, y, outer=slice(None)):
        hessian, by_outer, cross, a, b = (terms[outer].mean(dim=0) for terms in self.outer)
        return hessian @ y + cross.T @ x + a, by_outer @ x + cross @ y + b

    def value_gradient(self, x):
        """The gradient of ``F(x, y*(x))``."""
        hessian, _, cross, a, _ = (terms.mean(dim=0) for terms in self.inner)
        y = -torch.linalg.solve(hessian, cross.T @ x + a)
        by_inner, by_outer = self.outer_gradients(x, y)
        return by_outer - cross @ torch.linalg.solve(hessian, by_inner)


def quadratic_sum(*, inner_size=4, outer_size=3, num_inner=5, num_outer=3, seed=0):
    """Batches whose mean is strongly convex in both; those of one batch are merely positive."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    def terms(count):
        roots = normal(count, inner_size, inner_size) / inner_size**0.5
        eye_inner = torch.eye(inner_size, dtype=DOUBLE)
        outer_roots = normal(count, outer_size, outer_size) / outer_size**0.5
        eye_outer = torch.eye(outer_size, dtype=DOUBLE)
        return [
            roots @ roots.mT / 2 + 0.5 * eye_inner,
            outer_roots @ outer_roots.mT / 2 + eye_outer,
            normal(count, outer_size, inner_size) / 4,
            normal(count, inner_size),
            normal(count, outer_size),
        ]

    inner, outer = terms(num_inner), terms(num_outer)
    problem = FiniteSumProblem(
        inner_loss=lambda x, y, i: QuadraticSum.loss([term[i] for term in inner], x, y),
        outer_loss=lambda x, y, j: QuadraticSum.loss([term[j] for term in outer], x, y),
        inner_batches=range(num_inner),
        outer_batches=range(num_outer),
    )
    return QuadraticSum(problem, inner, outer)


def drawn(monkeypatch, inner, outer):
    """Makes every draw of a batch the given one."""
    monkeypatch.setattr(Oracle, "draw_inner", lambda _self: inner)
    monkeypatch.setattr(Oracle, "draw_outer", lambda _self: outer)
