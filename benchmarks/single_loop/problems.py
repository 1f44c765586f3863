"""Quadratic bilevel problems over batches whose value function is known in closed form."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drgr.bilevel import FiniteSumProblem

DOUBLE = torch.float64


class Quadratic(NamedTuple):
    """``y'Hy/2 + x'Kx/2 + x'Cy + a'y + b'x`` for each batch, the first axis of every tensor."""

    hessian: Tensor
    by_outer: Tensor
    cross: Tensor
    inner_slope: Tensor
    outer_slope: Tensor

    def loss(self, x: Tensor, y: Tensor, batch: int) -> Tensor:
        """Returns the value on a batch."""
        linear = self.inner_slope[batch] + self.cross[batch].T @ x + self.hessian[batch] @ y / 2
        value: Tensor = linear @ y + x @ (self.by_outer[batch] @ x / 2 + self.outer_slope[batch])
        return value

    def mean(self) -> "Quadratic":
        """Returns the quadratic of all batches, without the first axis."""
        return Quadratic(*(terms.mean(dim=0) for terms in self))


class Instance(NamedTuple):
    """A problem, where to start, and the gradient ``M x + m`` of its value function."""

    problem: FiniteSumProblem
    outer: Tensor
    inner: Tensor
    matrix: Tensor
    offset: Tensor

    def squared_gradient(self, x: Tensor) -> float:
        """Returns the squared norm of the gradient of ``F(x, y*(x))``."""
        return (self.matrix @ x + self.offset).square().sum().item()


def simulated(
    *,
    inner_size: int,
    outer_size: int,
    num_samples: int,
    num_batches: int,
    seed: int,
    largest: float = 1.0,
    largest_cross: float = 0.1,
    least: float = 0.1,
) -> Instance:
    """Returns the simulated quadratics of benchmark_bilevel, from their definition.

    Samples are empirical correlations of rank one: the inner Hessians of ``N(0, H)``, ``H`` with
    logarithmic spectrum from ``least`` to ``largest`` in a random basis; the outer ones likewise
    with one eigenvalue 0; the cross terms ``U D x x' V'`` of standard normal ``x``; standard normal
    slopes. Problems whose value function is not strongly convex are drawn again; that function's
    Hessian is taken with the cross term twice, where the reference's test takes it once. Random
    numbers differ from the reference's, so instances do.
    """
    generator = torch.Generator().manual_seed(seed)

    def side() -> Quadratic:
        return _drawn(
            generator,
            (inner_size, outer_size, num_samples, num_batches),
            (least, largest, largest_cross),
        )

    for _ in range(100):
        inner, outer = side(), side()
        matrix, offset = value_gradient(inner.mean(), outer.mean())
        if torch.linalg.eigvalsh(matrix).min() > 1e-3:
            break
    else:
        raise ValueError(f"no strongly convex value function in 100 draws of seed {seed}")
    problem = FiniteSumProblem(
        inner_loss=inner.loss,
        outer_loss=outer.loss,
        inner_batches=range(num_batches),
        outer_batches=range(num_batches),
    )
    start = torch.randn(outer_size, generator=generator, dtype=DOUBLE)
    return Instance(problem, start, torch.zeros(inner_size, dtype=DOUBLE), matrix, offset)


def value_gradient(inner: Quadratic, outer: Quadratic) -> tuple[Tensor, Tensor]:
    """Returns ``M`` and ``m`` with ``M x + m`` the gradient of ``F(x, y*(x))``."""
    slope = -torch.linalg.solve(inner.hessian, inner.cross.T)
    intercept = -torch.linalg.solve(inner.hessian, inner.inner_slope)
    coupling = outer.cross @ slope
    matrix = outer.by_outer + coupling + coupling.T + slope.T @ outer.hessian @ slope
    offset = outer.outer_slope + outer.cross @ intercept
    offset = offset + slope.T @ (outer.hessian @ intercept + outer.inner_slope)
    return matrix, offset


def blocks(
    *, block_size: int, num_blocks: int, outer_size: int, num_touched: int, seed: int
) -> tuple[Instance, list[list[int]]]:
    """Returns a quadratic of independent inner blocks, and the blocks of each inner batch.

    Batch ``i`` holds the losses of blocks ``i`` to ``i + num_touched - 1``, counted around.
    """
    generator = torch.Generator().manual_seed(seed)
    dimension = block_size * num_blocks

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    touches = [[(i + k) % num_blocks for k in range(num_touched)] for i in range(num_blocks)]
    hessian = torch.zeros(num_blocks, dimension, dimension, dtype=DOUBLE)
    cross = torch.zeros(num_blocks, outer_size, dimension, dtype=DOUBLE)
    slope = torch.zeros(num_blocks, dimension, dtype=DOUBLE)
    for batch, keys in enumerate(touches):
        for key in keys:
            part = slice(key * block_size, (key + 1) * block_size)
            root = normal(block_size, 2 * block_size) / math.sqrt(2 * block_size)
            eye = torch.eye(block_size, dtype=DOUBLE)
            hessian[batch, part, part] = (0.8 * root @ root.T + 0.2 * eye) / num_touched
            cross[batch, :, part] = 0.2 * normal(outer_size, block_size) / num_touched
            slope[batch, part] = normal(block_size) / num_touched
    zeros = torch.zeros(num_blocks, outer_size, outer_size, dtype=DOUBLE)
    # The mean over batches is the sum over blocks.
    inner = Quadratic(
        num_blocks * hessian, zeros, num_blocks * cross, num_blocks * slope, zeros[:, 0]
    )
    eyes = torch.eye(dimension, dtype=DOUBLE).expand(num_blocks, -1, -1) / num_blocks
    convex = torch.eye(outer_size, dtype=DOUBLE).expand(num_blocks, -1, -1) / 5
    outer = Quadratic(
        eyes,
        convex,
        torch.zeros_like(cross),
        normal(num_blocks, dimension) / num_blocks,
        normal(num_blocks, outer_size) / 5,
    )
    problem = FiniteSumProblem(
        inner_loss=lambda x, y, batch: inner.loss(x, torch.cat(y), batch),
        outer_loss=lambda x, y, batch: outer.loss(x, torch.cat(y), batch),
        inner_batches=range(num_blocks),
        outer_batches=range(num_blocks),
    )
    start = torch.zeros(dimension, dtype=DOUBLE)
    found = value_gradient(inner.mean(), outer.mean())
    return Instance(problem, normal(outer_size), start, *found), touches


def _drawn(
    generator: torch.Generator,
    sizes: tuple[int, int, int, int],
    curvatures: tuple[float, float, float],
) -> Quadratic:
    """Draws samples and returns their means over batches of consecutive ones."""
    inner_size, outer_size, num_samples, num_batches = sizes
    least, largest, largest_cross = curvatures

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    def basis(size: int) -> Tensor:
        vectors: Tensor = torch.linalg.qr(normal(size, size))[0]
        return vectors

    def correlations(spectrum: Tensor) -> Tensor:
        vectors = basis(len(spectrum))
        samples = normal(num_samples, len(spectrum)) @ (vectors * spectrum.sqrt() @ vectors.T)
        parts = samples.view(num_batches, -1, len(spectrum))
        return parts.mT @ parts / parts.shape[1]

    def spread(size: int) -> Tensor:
        return torch.logspace(math.log10(least), math.log10(largest), size, dtype=DOUBLE)

    zero = torch.zeros(1, dtype=DOUBLE)
    rank = min(inner_size, outer_size)
    values = torch.logspace(math.log10(least), math.log10(largest_cross), rank, dtype=DOUBLE)
    hessian = correlations(spread(inner_size))
    by_outer = correlations(torch.cat([zero, spread(outer_size - 1)]))
    left, right = basis(outer_size)[:, :rank] * values, basis(inner_size)
    samples = normal(num_batches, num_samples // num_batches, inner_size)
    cross = left @ (samples.mT @ samples / samples.shape[1])[:, :rank] @ right.T
    return Quadratic(
        hessian,
        by_outer,
        cross,
        normal(num_batches, samples.shape[1], inner_size).mean(dim=1),
        normal(num_batches, samples.shape[1], outer_size).mean(dim=1),
    )
