"""The linear system behind a hypergradient, and what a solver of it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drgr.bilevel.status import SolveStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSystem:
    """``A z = b`` with ``A = H + damping I`` known by its products."""

    apply: Callable[[Tensor], Tensor]
    """``v -> A v``, shape ``(d,)``."""
    rhs: Tensor
    """``b``, shape ``(d,)``."""
    apply_many: Callable[[Tensor], Tensor] | None = None
    """``A`` times each row of a matrix, shape ``(n, d)``; None takes the products one by one."""

    def images(self, vectors: Tensor) -> Tensor:
        """Returns ``A`` times each row of ``vectors``, shape ``(n, d)``."""
        if self.apply_many is not None:
            return self.apply_many(vectors)
        return torch.stack([self.apply(vector) for vector in vectors.unbind()])


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSolution:
    """A solution, or how far a solver came."""

    point: Tensor
    """``z``, shape ``(d,)``; always finite."""
    status: SolveStatus
    curvature: float
    """Smallest ``p'Ap / p'p`` met, ``inf`` if no product was taken."""
    num_products: int


class LinearSolver(Protocol):
    """Solves ``A z = b`` for a symmetric ``A``, or approximates it and says so."""

    @property
    def rtol(self) -> float:
        """Relative residual at which an approximation counts as converged."""
        ...

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:
        """Solves a system whose right-hand side is not zero.

        Args:
            system: The system.
            start: Where to start, shape ``(d,)``; None is 0.
        """
        ...


def first_residual(system: LinearSystem, start: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Returns the starting point, its residual, and how many products that took."""
    if start is None:
        return torch.zeros_like(system.rhs), system.rhs.clone(), 0
    return start.clone(), system.rhs - system.apply(start), 1


def dot(left: Tensor, right: Tensor) -> float:
    """Returns the inner product of two vectors."""
    return torch.dot(left, right).item()


def dots(*pairs: tuple[Tensor, Tensor]) -> list[float]:
    """Returns inner products of vectors, which an accelerator is waited for once, not each."""
    values: list[float] = torch.stack([torch.dot(left, right) for left, right in pairs]).tolist()
    return values
