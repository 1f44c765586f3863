"""Orthonormal bases of random subspaces that are never stored."""

import math
from collections.abc import Iterator
from typing import Protocol, final

import torch
from torch import Tensor

# Entries of the basis that exist at one time: as many as a vector has, between these two.
_CHUNK = 1 << 20
_SMALL_CHUNK = 1 << 14


class Basis(Protocol):
    """``P``, ``(d, rank)`` with orthonormal columns and ``E[P P'] = rank / d I`` over seeds."""

    rank: int

    def coordinates(self, vector: Tensor) -> Tensor:
        """Returns ``P'v``, shape ``(rank,)``."""
        ...

    def lifted(self, coordinates: Tensor) -> Tensor:
        """Returns ``P c``, shape ``(d,)``."""
        ...

    def projected(self, vector: Tensor) -> Tensor:
        """Returns ``P P'v``, shape ``(d,)``."""
        ...


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
        O(d rank) time for each product; memory ``rank^2`` entries of float64, and while it
        multiplies about ``d`` more.
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
        size = max(min(_CHUNK, max(dimension, _SMALL_CHUNK)) // self.rank, 1)
        for begin in range(0, dimension, size):
            end = min(begin + size, dimension)
            shape = (end - begin, self.rank)
            yield (
                slice(begin, end),
                torch.randn(shape, generator=generator, dtype=torch.float64, device=device),
            )


@final
class SignBasis:
    """``P``, ``(d, rank)``, of random signs: scaled, in columns of disjoint supports.

    Column ``j`` holds entries ``j``, ``j + rank``, ... counted from a random offset around the
    vector: disjoint supports make the columns orthonormal without a factor, and the offset makes
    ``E[P P'] = rank / d I`` exact where ``rank`` does not divide ``d``. The subspaces are not
    uniform over all of their dimension: :func:`two_sided_moments` does not hold for them.

    Args:
        seed: Draws the signs and the offset.
        like: A vector with the dimension, dtype and device of those to multiply, shape ``(d,)``.
        rank: Number of columns, at most ``d``.

    Complexity:
        O(d) time for each product, no memory but the seed, and a few vectors while it multiplies.

    References:
        A count sketch (Charikar, Chen, Farach-Colton, 2002) with buckets in turn.
    """

    def __init__(self, seed: int, like: Tensor, rank: int) -> None:
        self.rank = rank
        self._seed, self._like = seed, like

    def coordinates(self, vector: Tensor) -> Tensor:
        """Returns ``P'v``, shape ``(rank,)``."""
        signs, offset = self._drawn()
        signed = (signs * vector).roll(offset)
        whole = len(signed) - len(signed) % self.rank
        total = signed[:whole].view(-1, self.rank).sum(dim=0, dtype=torch.float64)
        total[: len(signed) - whole] += signed[whole:]
        return (total / self._lengths()).to(vector.dtype)

    def lifted(self, coordinates: Tensor) -> Tensor:
        """Returns ``P c``, shape ``(d,)``."""
        signs, offset = self._drawn()
        dimension = len(self._like)
        scaled = (coordinates / self._lengths()).to(self._like.dtype)
        repeated = scaled.repeat(math.ceil(dimension / self.rank))[:dimension]
        return repeated.roll(-offset).mul_(signs)

    def projected(self, vector: Tensor) -> Tensor:
        """Returns ``P P'v``, shape ``(d,)``."""
        return self.lifted(self.coordinates(vector))

    def _lengths(self) -> Tensor:
        """Returns the norms of the columns of signs, shape ``(rank,)``."""
        shortest, longer = divmod(len(self._like), self.rank)
        counts = self._like.new_full((self.rank,), shortest, dtype=torch.float64)
        counts[:longer] += 1
        return counts.sqrt_()

    def _drawn(self) -> tuple[Tensor, int]:
        device, dimension = self._like.device, len(self._like)
        generator = torch.Generator(device).manual_seed(self._seed)
        offset = int(torch.randint(dimension, (), generator=generator, device=device))
        # One byte each: these are all that a product draws.
        bits = torch.randint(2, (dimension,), generator=generator, dtype=torch.int8, device=device)
        return bits.mul_(2).sub_(1), offset
