"""The damped Neumann series."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive
from drgr.bilevel.linear_system import LinearSolution, LinearSystem, dot, first_residual
from drgr.bilevel.status import SolveStatus

_POWER_STEPS = 20
_POWER_TOLERANCE = 0.01
# The power method comes from below; a step a little shorter stays inside the stable range.
_SAFETY = 1.1
_SEED = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Neumann:
    """Damped Neumann series ``z = step_size * sum_k (I - step_size A)^k b``.

    The residual shrinks by ``1 - step_size * curvature`` a term, so the series is slow where the
    condition number is large: see ``benchmarks/hypergradient`` for what 100 terms leave.
    What is left is returned as the residual, which is exact, and as an estimate of the error.

    Args:
        num_terms: Terms of the series, at least 1; each costs one product.
        step_size: Below 2 / largest curvature; None estimates ``1 / largest curvature`` by the
            power method, with at most 20 products that count.
        rtol: Relative residual below which the result counts as converged, and the series stops.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import LinearSystem
        >>> system = LinearSystem(apply=lambda v: 2 * v, rhs=torch.ones(2))
        >>> Neumann(num_terms=3, step_size=0.25).solve(system, None).point
        tensor([0.4375, 0.4375])
    """

    num_terms: int = 20
    step_size: float | None = None
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_positive("num_terms", self.num_terms)
        check_positive("rtol", self.rtol)
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:
        """Sums the series from a starting point."""
        point, residual, used = first_residual(system, start)
        step, curvature = self.step_size, math.inf
        if step is None:
            largest, products = _largest_curvature(system)
            used += products
            if not largest > 0:
                status = SolveStatus.NEGATIVE_CURVATURE
                return LinearSolution(
                    point=point, status=status, curvature=largest, num_products=used
                )
            step = 1 / (_SAFETY * largest)
        target = self.rtol * math.sqrt(dot(system.rhs, system.rhs))
        first = left = math.sqrt(dot(residual, residual))
        for _ in range(self.num_terms):
            if left <= target:
                break
            product = system.apply(residual)
            used += 1
            curvature = min(curvature, dot(residual, product) / left**2)
            following = residual - step * product
            size = math.sqrt(dot(following, following))
            if not math.isfinite(size):
                left = size
                break
            point, residual, left = point + step * residual, following, size
        status = _status(left, target=target, first=first, curvature=curvature)
        return LinearSolution(point=point, status=status, curvature=curvature, num_products=used)


def _status(left: float, *, target: float, first: float, curvature: float) -> SolveStatus:
    if not math.isfinite(left):
        return SolveStatus.NON_FINITE
    if left <= target:
        return SolveStatus.CONVERGED
    if curvature <= 0:
        return SolveStatus.NEGATIVE_CURVATURE
    return SolveStatus.DIVERGED if left > first else SolveStatus.APPROXIMATE


def _largest_curvature(system: LinearSystem) -> tuple[float, int]:
    """Returns the largest curvature by the power method, and the products that took."""
    generator = torch.Generator(system.rhs.device).manual_seed(_SEED)
    vector = torch.randn(
        len(system.rhs), generator=generator, dtype=system.rhs.dtype, device=system.rhs.device
    )
    largest = 0.0
    for step in range(1, _POWER_STEPS + 1):
        vector = vector / vector.norm()
        product = system.apply(vector)
        before, largest = largest, product.norm().item()
        if not math.isfinite(largest) or largest == 0:
            return 0.0, step
        if abs(largest - before) <= _POWER_TOLERANCE * largest:
            return largest, step
        vector = product
    return largest, _POWER_STEPS
