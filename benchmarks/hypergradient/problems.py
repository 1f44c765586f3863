"""Bilevel problems whose solutions are known by other means."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DOUBLE = torch.float64
Loss = Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """Losses and the point at which to differentiate, or to start."""

    outer_loss: Loss
    inner_loss: Loss
    outer: Tensor
    inner: Tensor


def ridge(
    dimension: int, condition: float, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Problem, Tensor]:
    """Returns a ridge regression with a penalty ``exp(x_j)`` per feature, solved exactly.

    Twice as many samples as features, a Hessian of the given condition number, and the mean square
    error on 50 other samples as the outer loss.

    Returns:
        The problem, and its hypergradient from a dense solve in float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
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

    def inner_loss(x: Tensor, y: Tensor) -> Tensor:
        return (data @ y - target).square().sum() / 2 + (x.exp() * y * y).sum() / 2

    def outer_loss(_x: Tensor, y: Tensor) -> Tensor:
        return (test_data @ y - test_target).square().mean() / 2

    return Problem(outer_loss, inner_loss, outer.to(dtype), inner.to(dtype)), exact


def curved(inner_size: int, outer_size: int, *, seed: int = 0) -> Problem:
    """Returns a problem of inner curvature 0.2 to 2.1 that is not quadratic, far from its solution.

    The merit bounds its value from above for weights of at least ``1 / 0.2 + 1 / 0.2^2 = 30``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    basis = torch.linalg.qr(normal(inner_size, inner_size))[0]
    hessian = basis * torch.linspace(0.2, 2, inner_size, dtype=DOUBLE) @ basis.T
    coupling, target = normal(inner_size, outer_size) / 3, normal(inner_size)

    def inner_loss(x: Tensor, y: Tensor) -> Tensor:
        bends = 0.1 * (1 + y.square()).sqrt().sum()
        value: Tensor = y @ hessian @ y / 2 - y @ coupling @ x + bends
        return value

    def outer_loss(x: Tensor, y: Tensor) -> Tensor:
        return (y - target).square().sum() / 2 + 0.05 * x.square().sum()

    start = torch.ones(outer_size, dtype=DOUBLE), torch.zeros(inner_size, dtype=DOUBLE)
    return Problem(outer_loss, inner_loss, *start)


def exact_value(problem: Problem, outer: Tensor) -> float:
    """Returns the outer loss at the inner solution, by Newton's method with dense Hessians."""
    inner = problem.inner.clone()
    for _ in range(20):
        slope = torch.func.grad(problem.inner_loss, argnums=1)(outer, inner)
        hessian = torch.func.hessian(problem.inner_loss, argnums=1)(outer, inner)
        inner = inner - torch.linalg.solve(hessian, slope)
    value: float = problem.outer_loss(outer, inner).item()
    return value
