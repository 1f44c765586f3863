"""What proximal alternating minimisation evaluates, whole or on mini-batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from drgr.bilevel.conjugate_gradients import CG
from drgr.bilevel.hypergradient import Hypergradient, ParameterLoss, hypergradient
from drgr.bilevel.inner_level import InnerOptimizer, inner_solution
from drgr.bilevel.linear_system import LinearSolution, LinearSystem
from drgr.bilevel.products import HvpMode
from drgr.bilevel.structures import Layout, Parameters
from drgr.errors import NonFiniteLossError

ProximalMap = Callable[[Parameters, float], Parameters]
"""``(x, step) -> argmin_u Omega(u) + |u - x|^2 / (2 step)``; a projection ignores ``step``."""

# Share of the first-order decrease that a step must achieve, and of that what the linear
# residual may hide.
SIGMA = 0.1
_HIDDEN = 0.25
SHRINK, GROW = 0.5, 1.5
_TIGHTER = 0.1
LEAST_RTOL = 1e-12
# An inner gradient of this share of the tolerance needs no more steps.
_ENOUGH = 0.01
_MOST_INNER_STEPS = 10_000
# So many steps in a row may lower the merit by less than its rounding.
BLIND_STEPS = 100
# Merits that differ by this many roundings are equal.
_ROUNDINGS = 16.0


class Method(Protocol):
    """The settings of a method that matter to an evaluation."""

    @property
    def inner_optimizer(self) -> InnerOptimizer: ...  # noqa: D102
    @property
    def merit_weight(self) -> float: ...  # noqa: D102
    @property
    def prox(self) -> ProximalMap | None: ...  # noqa: D102
    @property
    def penalty(self) -> Callable[[Parameters], Tensor] | None: ...  # noqa: D102
    @property
    def damping(self) -> float: ...  # noqa: D102
    @property
    def hvp(self) -> HvpMode: ...  # noqa: D102


@final
@dataclass(frozen=True, slots=True)
class Accuracy:
    """How accurately the inner problem and the linear system are solved."""

    inner_steps: int
    rtol: float
    residual: float = math.inf
    """Largest ``|(H + damping) z - grad_y F|`` to accept, beside the relative one."""

    @property
    def is_last(self) -> bool:
        """Whether it cannot be tightened."""
        return self.inner_steps >= _MOST_INNER_STEPS and self.rtol <= LEAST_RTOL

    def tightened(self) -> "Accuracy":
        """Returns twice the inner steps and a tenth of the tolerance, within limits."""
        return Accuracy(
            inner_steps=max(self.inner_steps, min(2 * self.inner_steps, _MOST_INNER_STEPS)),
            rtol=min(self.rtol, max(_TIGHTER * self.rtol, LEAST_RTOL)),
        )


class State(NamedTuple):
    """A point, and all that is known there."""

    outer: Tensor
    inner: Parameters
    found: Hypergradient
    merit: float
    penalty: float
    rounding: float

    def is_accurate(self, tolerance: float) -> bool:
        """Whether the inner problem and the linear system are solved."""
        return max(self.found.inner_gradient, self.found.residual_norm) <= tolerance


@final
@dataclass(frozen=True, slots=True)
class _BoundedCG:
    """Conjugate gradients to a relative residual and to one in itself.

    The proof of descent is about the latter, and ``|grad_y F|`` at a trial point is not known
    before the solve there.
    """

    rtol: float
    residual: float

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:
        relative = self.residual / system.rhs.norm().item()
        return CG(rtol=max(min(self.rtol, relative), LEAST_RTOL)).solve(system, start)


@final
@dataclass(slots=True, kw_only=True)
class Alternation:
    """Evaluates points of one problem, and counts what that takes."""

    method: Method
    outer_loss: ParameterLoss
    inner_loss: ParameterLoss
    steps_loss: ParameterLoss
    """What the inner steps descend: the inner loss, or one on a new batch at each call."""
    outer: Layout
    tolerance: float
    num_inner_steps: int = 0
    num_hvps: int = 0

    def evaluated(self, outer: Tensor, start: State | Parameters, accuracy: Accuracy) -> State:
        """Solves the inner problem and the linear system as accurately as asked, from a start."""
        method, params = self.method, self.outer.structure(outer)
        warm = start if isinstance(start, State) else None
        trained = inner_solution(
            self.steps_loss,
            params,
            warm.inner if warm else start,
            method.inner_optimizer,
            max_steps=accuracy.inner_steps,
            tolerance=_ENOUGH * self.tolerance,
        )
        self.num_inner_steps += trained.num_steps
        found = hypergradient(
            self.outer_loss,
            self.inner_loss,
            params,
            trained.params,
            solver=_BoundedCG(accuracy.rtol, accuracy.residual),
            damping=method.damping,
            hvp=method.hvp,
            start=warm.found.auxiliary if warm else None,
        )
        self.num_hvps += found.num_hvps
        omega = method.penalty(params).item() if method.penalty is not None else 0.0
        merit = found.merit(method.merit_weight) + omega
        rounding = _ROUNDINGS * torch.finfo(outer.dtype).eps * (abs(merit) + abs(omega))
        return State(outer, trained.params, found, merit, omega, rounding)

    def tried(self, outer: Tensor, start: State, accuracy: Accuracy) -> State | None:
        """Returns the state at a trial point, None where a loss overflows there."""
        try:
            return self.evaluated(outer, start, accuracy)
        except NonFiniteLossError:
            return None

    def moved(self, outer: Tensor, slope: Tensor, step_size: float) -> Tensor:
        """Takes a proximal step."""
        moved = outer - step_size * slope
        if self.method.prox is None:
            return moved
        return self.outer.vector(self.method.prox(self.outer.structure(moved), step_size))

    def largest_residual(self, decrease: float) -> float:
        """Returns the residual of the linear system that hides little of a decrease."""
        return math.sqrt(_HIDDEN * decrease * 2 / self.method.merit_weight)

    def hides(self, candidate: State, enough: float, decrease: float) -> bool:
        """Whether the inner error alone hides a decrease: a shorter step would not help."""
        error = self.method.merit_weight / 2 * candidate.found.inner_gradient**2
        return candidate.merit - error <= enough and error > decrease
