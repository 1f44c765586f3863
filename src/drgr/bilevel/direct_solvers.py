"""Solvers without steps: dense, in a random subspace, and by a diagonal."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive
from drgr.bilevel.linear_system import LinearSolution, LinearSystem, first_residual
from drgr.bilevel.status import SolveStatus

_SUBSPACE_SEED = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Takes a diagonal for the Hessian: no products at all, and no claim to the right answer.

    ``z = b * scale``: with the scale of a training step this is the metric of SAMA and DoGE. Its
    residual is computed all the same, from the product that the hypergradient needs anyway.

    Args:
        scale: A positive number, or the inverse of a diagonal (Adam's second moment: see
            :func:`adam_diagonal`), shape ``(d_y,)``.
        rtol: Relative residual below which the result counts as converged.

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import LinearSystem
        >>> system = LinearSystem(apply=lambda v: 2 * v, rhs=torch.ones(2))
        >>> Identity(scale=0.1).solve(system, None).point
        tensor([0.1000, 0.1000])
    """

    scale: float | Tensor = 1.0
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol)
        if isinstance(self.scale, Tensor):
            check_positive("least entry of scale", self.scale.min().item())
        else:
            check_positive("scale", self.scale)

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:  # noqa: ARG002
        """Scales the right-hand side."""
        return LinearSolution(
            point=self.scale * system.rhs,
            status=SolveStatus.APPROXIMATE,
            curvature=math.inf,
            num_products=0,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSubspace:
    """Solves the system within a random subspace: ``z = Q (Q'AQ)^-1 Q'b``.

    Exact where ``rank`` is the dimension. Memory for ``rank`` vectors, ``rank`` products, which a
    system that can takes many at once.

    Args:
        rank: Dimension of the subspace, at least 1; the dimension of the system if larger.
        rtol: Relative residual below which the result counts as converged.
        generator: Draws the subspace; None draws the same one each time.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import LinearSystem
        >>> system = LinearSystem(apply=lambda v: 2 * v, rhs=torch.ones(2))
        >>> RandomSubspace(rank=2).solve(system, None).point
        tensor([0.5000, 0.5000])
    """

    rank: int
    rtol: float = 1e-6
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_positive("rank", self.rank)
        check_positive("rtol", self.rtol)

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:
        """Corrects a starting point within the subspace."""
        point, residual, used = first_residual(system, start)
        generator = self.generator or torch.Generator(point.device).manual_seed(_SUBSPACE_SEED)
        shape = (len(point), min(self.rank, len(point)))
        normal = torch.randn(
            shape, generator=generator, dtype=torch.float64, device=generator.device
        )
        basis = torch.linalg.qr(normal)[0].to(point)
        return _solved_within(system, basis, point, residual, used)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Builds the whole Hessian and decomposes it: the reference for small problems.

    Args:
        rtol: Relative residual below which the result counts as converged.
        max_dimension: Largest dimension that is accepted.

    Raises:
        ValueError: If a number is out of range, or when solving a larger system.

    Complexity:
        ``d`` products, which a system that can takes many at once; O(d^2) memory, O(d^3) time.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import LinearSystem
        >>> system = LinearSystem(apply=lambda v: 2 * v, rhs=torch.ones(2))
        >>> Exact().solve(system, None).point
        tensor([0.5000, 0.5000])
    """

    rtol: float = 1e-6
    max_dimension: int = 4096

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol)
        check_positive("max_dimension", self.max_dimension)

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:  # noqa: ARG002
        """Solves directly; a start is not needed."""
        point, residual, used = first_residual(system, None)
        if len(point) > self.max_dimension:
            raise ValueError(
                f"Exact needs the whole Hessian of {len(point)} inner parameters, more than "
                f"max_dimension={self.max_dimension}; take CG"
            )
        basis = torch.eye(len(point), dtype=point.dtype, device=point.device)
        return _solved_within(system, basis, point, residual, used)


def _solved_within(
    system: LinearSystem, basis: Tensor, point: Tensor, residual: Tensor, used: int
) -> LinearSolution:
    """Solves for the part of the error that lies in the span of orthonormal columns."""
    images = system.images(basis.T.contiguous()).T
    used += basis.shape[1]
    reduced = (basis.T @ images).double()
    reduced = (reduced + reduced.T) / 2
    if not bool(reduced.isfinite().all()):
        status = SolveStatus.NON_FINITE
        return LinearSolution(point=point, status=status, curvature=math.inf, num_products=used)
    values, vectors = torch.linalg.eigh(reduced)
    curvature = values[0].item()
    rounding = torch.finfo(point.dtype).eps * values.abs().max().item() * len(values)
    usable = values.abs() > rounding
    inverse = torch.where(usable, 1 / values.masked_fill(~usable, 1.0), 0.0)
    coordinates = vectors @ (inverse * (vectors.T @ (basis.T @ residual).double()))
    flat = curvature <= rounding
    return LinearSolution(
        point=point + basis @ coordinates.to(point.dtype),
        status=SolveStatus.NEGATIVE_CURVATURE if flat else SolveStatus.APPROXIMATE,
        curvature=curvature,
        num_products=used,
    )
