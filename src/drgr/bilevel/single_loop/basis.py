"""Orthonormal bases of random subspaces that are never stored."""

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

# Entries of the basis that exist at one time.
_CHUNK = 1 << 20


@final
class RandomBasis:
    """``P``, ``(d, rank)`` with orthonormal columns, uniform over all such bases.

    ``P = G L^-T`` with ``G`` normal and ``L L' = G'G``: the rows of ``G`` are drawn again from the
    seed at each product, so that only ``L`` takes memory.

    Args:
        seed: Draws ``G``.
        like: A vector with the dimension, dtype and device of those to multiply, shape ``(d,)``.
        rank: Number of columns, at most ``d``.
        factor: ``L`` if known, shape ``(rank, rank)``, float64.

    Complexity:
        O(d rank) time for each product, O(rank^2) memory.
    """

    def __init__(self, seed: int, like: Tensor, rank: int, *, factor: Tensor | None = None) -> None:
        self.rank = rank
        self._seed, self._like = seed, like
        self.factor = self._factored() if factor is None else factor

    def coordinates(self, vector: Tensor) -> Tensor:
        """Returns ``P'v``, shape ``(rank,)``."""
        total = vector.new_zeros(self.rank, dtype=torch.float64)
        for rows, chunk in self._chunks():
            total += chunk.T @ vector[rows].double()
        found: Tensor = torch.linalg.solve_triangular(self.factor, total.unsqueeze(1), upper=False)
        return found.squeeze(1).to(vector.dtype)

    def lifted(self, coordinates: Tensor) -> Tensor:
        """Returns ``P c``, shape ``(d,)``."""
        solved = torch.linalg.solve_triangular(
            self.factor.T, coordinates.double().unsqueeze(1), upper=True
        ).squeeze(1)
        found = torch.empty_like(self._like)
        for rows, chunk in self._chunks():
            found[rows] = (chunk @ solved).to(found.dtype)
        return found

    def projected(self, vector: Tensor) -> Tensor:
        """Returns ``P P'v``, shape ``(d,)``."""
        return self.lifted(self.coordinates(vector))

    def _factored(self) -> Tensor:
        gram = self._like.new_zeros((self.rank, self.rank), dtype=torch.float64)
        for _, chunk in self._chunks():
            gram += chunk.T @ chunk
        factor: Tensor = torch.linalg.cholesky(gram)
        return factor

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        device, dimension = self._like.device, len(self._like)
        generator = torch.Generator(device).manual_seed(self._seed)
        size = max(_CHUNK // self.rank, 1)
        for begin in range(0, dimension, size):
            end = min(begin + size, dimension)
            shape = (end - begin, self.rank)
            yield (
                slice(begin, end),
                torch.randn(shape, generator=generator, dtype=torch.float64, device=device),
            )
