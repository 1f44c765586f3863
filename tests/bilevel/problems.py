"""Bilevel problems whose hypergradients are known in closed form."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
