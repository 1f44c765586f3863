"""Conjugate gradients, checked."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from drgr._checks import check_positive, check_shape
from drgr.bilevel.linear_system import LinearSolution, LinearSystem, dot, dots, first_residual
from drgr.bilevel.status import SolveStatus

_STEPS_PER_DIMENSION = 10


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CG:
    """Preconditioned conjugate gradients with a verified stop.

    Stops when the residual is at most ``rtol * min(|b|, mu |z|)``, where ``mu`` is the smallest
    curvature met: the second bound estimates the error of ``z`` itself, which on an ill-conditioned
    system is far above the relative residual. The recursive residual drifts from the true one, so
    the latter is computed before a solve counts as converged; where it is above tolerance the
    method starts again from there, until that gains nothing.

    Args:
        rtol: Relative tolerance, above 0.
        max_steps: Most products with the Hessian; None is 10 times the dimension.
        preconditioner: Positive diagonal close to that of the Hessian, shape ``(d_y,)`` (see
            :func:`hutchinson_diagonal`, :func:`adam_diagonal`), or a function that applies the
            inverse of a symmetric positive matrix; None is none.

    Raises:
        ValueError: If a number is out of range or the diagonal is not positive.

    Complexity:
        One Hessian-vector product and six vector operations a step, O(sqrt(condition number)
        log(1 / rtol)) steps, memory for four vectors.

    References:
        Hestenes and Stiefel, *Methods of Conjugate Gradients for Solving Linear Systems*, 1952.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import LinearSystem
        >>> system = LinearSystem(apply=lambda v: 2 * v, rhs=torch.ones(2))
        >>> CG(rtol=1e-8).solve(system, None).point
        tensor([0.5000, 0.5000])
    """

    rtol: float = 1e-6
    max_steps: int | None = None
    preconditioner: Tensor | Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol)
        if self.max_steps is not None:
            check_positive("max_steps", self.max_steps)
        diagonal = self.preconditioner
        if isinstance(diagonal, Tensor) and not bool(((diagonal > 0) & diagonal.isfinite()).all()):
            raise ValueError(
                f"preconditioner must be finite and above 0, got {diagonal.min().item()} as its "
                "least entry; clamp it"
            )

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:
        """Solves a system of positive curvature."""
        if isinstance(self.preconditioner, Tensor):
            check_shape("preconditioner", self.preconditioner, system.rhs.shape)
        point, residual, used = first_residual(system, start)
        limit = self.max_steps or _STEPS_PER_DIMENSION * len(point)
        curvature, gained, size = math.inf, math.inf, dot(system.rhs, system.rhs)
        while True:
            left = dot(residual, residual)
            if not math.isfinite(left):
                status = SolveStatus.NON_FINITE
                break
            if self._is_small(left, size, point, curvature):
                status = SolveStatus.CONVERGED
                break
            if left > gained / 2:
                status = SolveStatus.INACCURATE
                break
            gained = left
            run = self._run(system, point, residual, curvature, limit - used)
            point, curvature, used = run.point, run.curvature, used + run.steps
            if run.status is not SolveStatus.CONVERGED:
                status = run.status
                break
            residual = system.rhs - system.apply(point)
            used += 1
        return LinearSolution(point=point, status=status, curvature=curvature, num_products=used)

    def _is_small(self, left: float, size: float, point: Tensor, curvature: float) -> bool:
        """Returns whether a residual of square ``left`` ends a system of square ``size``."""
        if left > self.rtol**2 * size:
            return False
        return math.isinf(curvature) or left <= (self.rtol * curvature) ** 2 * dot(point, point)

    def _run(
        self,
        system: LinearSystem,
        point: Tensor,
        residual: Tensor,
        curvature: float,
        limit: int,
    ) -> "_Run":
        """Iterates from a true residual until the recursive one is small."""
        scaled = self._precondition(residual)
        direction, weight = scaled, dot(residual, scaled)
        rounding = torch.finfo(point.dtype).eps
        size = dot(system.rhs, system.rhs)
        # Below rounding of where it began, the recursive residual says nothing of the true one.
        floor = rounding**2 * dot(residual, residual)
        for used in range(1, limit + 1):
            product = system.apply(direction)
            bent, length, image = dots(
                (direction, product), (direction, direction), (product, product)
            )
            if not math.isfinite(bent):
                return _Run(point, curvature, used, SolveStatus.NON_FINITE)
            curvature = min(curvature, bent / length)
            if bent <= rounding * math.sqrt(length * image):
                return _Run(point, curvature, used, SolveStatus.NEGATIVE_CURVATURE)
            step = weight / bent
            point = torch.add(point, direction, alpha=step)
            residual = torch.sub(residual, product, alpha=step)
            left = dot(residual, residual)
            if left <= floor or self._is_small(left, size, point, curvature):
                return _Run(point, curvature, used, SolveStatus.CONVERGED)
            scaled, before = self._precondition(residual), weight
            weight = left if scaled is residual else dot(residual, scaled)
            direction = torch.add(scaled, direction, alpha=weight / before)
        return _Run(point, curvature, limit, SolveStatus.MAX_STEPS)

    def _precondition(self, residual: Tensor) -> Tensor:
        if self.preconditioner is None:
            return residual
        if isinstance(self.preconditioner, Tensor):
            return residual / self.preconditioner
        return self.preconditioner(residual)


class _Run(NamedTuple):
    point: Tensor
    curvature: float
    steps: int
    status: SolveStatus
