r"""Proximal alternating minimisation: a bilevel method that proves its own progress.

With ``F`` the outer loss, ``g`` the inner one, ``Omega`` a penalty with a proximal map, one step is

    y+ = inner steps on g(x+, .)        x+ = prox_{alpha Omega}(x - alpha h)
    z+ = solve (H + damping I) z = grad_y F        h = grad_x F - J z

where ``x+`` is tried first and kept only if the merit (:meth:`Hypergradient.merit` plus ``Omega``)
falls by ``sigma / alpha |x+ - x|^2``. Otherwise ``alpha`` shrinks, and when that does not help the
inner solutions are made more accurate instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, final

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.bilevel.conjugate_gradients import CG
from drgr.bilevel.hypergradient import Hypergradient, ParameterLoss, hypergradient
from drgr.bilevel.inner_level import InnerOptimizer, inner_solution
from drgr.bilevel.products import HvpMode
from drgr.bilevel.structures import Layout, Parameters, layout_of
from drgr.errors import NonFiniteLossError

ProximalMap = Callable[[Parameters, float], Parameters]
"""``(x, step) -> argmin_u Omega(u) + |u - x|^2 / (2 step)``; a projection ignores ``step``."""

# Share of the first-order decrease that a step must achieve, and of that what the linear
# residual may hide.
_SIGMA = 0.1
_HIDDEN = 0.25
_SHRINK, _GROW = 0.5, 1.5
_BACKTRACKS = 60
_TIGHTER = 0.1
_LEAST_RTOL = 1e-12
# An inner gradient of this share of the tolerance needs no more steps.
_ENOUGH = 0.01
_MOST_INNER_STEPS = 10_000
# So many steps in a row may lower the merit by less than its rounding.
_BLIND_STEPS = 100
# Merits that differ by this many roundings are equal.
_ROUNDINGS = 16.0


class StopReason(Enum):
    """Why the outer loop stopped; ``str`` gives a sentence."""

    CONVERGED = "converged"
    MAX_STEPS = "stopped at the step limit: raise max_steps"
    STALLED = (
        "stopped where no step lowers the merit by more than rounding: "
        "raise merit_weight or damping, or take float64"
    )

    def __str__(self) -> str:
        """Returns the sentence."""
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class BilevelSolution:
    """Result of :meth:`ProximalAlternating.minimize`."""

    outer_params: Parameters
    inner_params: Parameters
    merits: list[float]
    """Merit at the start, after every kept step, and after every change of accuracy.

    A kept step never raises it by more than rounding; a change of accuracy might where
    ``merit_weight`` is small.
    """
    stationarity: float
    """``|x - prox(x - alpha h)| / alpha`` when last computed: 0 at a stationary point.

    That is at the result unless the steps ran out; then it is one step before.
    """
    step_size: float
    """``alpha`` at the end."""
    last: Hypergradient
    """Everything known at the result."""
    num_steps: int
    num_inner_steps: int
    num_hvps: int
    status: StopReason


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ProximalAlternating:
    r"""Minimises ``F(x, y*(x)) + Omega(x)`` with ``y*(x) = argmin_y g(x, y)``.

    Deterministic losses; for mini-batches fix a probe batch in both.

    Args:
        inner_optimizer: Makes a ``torch.optim`` optimizer of a list of tensors, for instance
            ``lambda params: torch.optim.SGD(params, lr=0.1)``; made anew for each run of steps.
        inner_steps: Its steps after each change of ``x``; doubled where accuracy is lacking.
        step_size: First ``alpha``; it is shrunk or grown to what the merit allows.
        merit_weight: Weight of the two residuals in the merit (:meth:`Hypergradient.merit`).
        prox: Proximal map of ``Omega``, or a projection; None is none.
        penalty: ``Omega`` itself, 0 where ``prox`` is a projection.
        rtol: First tolerance of the conjugate gradients; divided by 10 where accuracy is lacking.
        damping: Added to the Hessian.
        hvp: How to take Hessian-vector products.

    Raises:
        ValueError: If a number is out of range.

    References:
        Armijo, *Minimization of functions having Lipschitz continuous first partial derivatives*,
        1966. Salehi, Mukherjee, Roberts, Ehrhardt, *An adaptively inexact first-order method for
        bilevel optimization*, 2023 (accuracy on demand).

    Examples:
        >>> import torch
        >>> method = ProximalAlternating(
        ...     inner_optimizer=lambda params: torch.optim.SGD(params, lr=0.4), step_size=100.0
        ... )
        >>> solution = method.minimize(
        ...     lambda x, y: (y - 3).square().sum(),
        ...     lambda x, y: (y - 2 * x).square().sum(),
        ...     torch.zeros(1, dtype=torch.float64),
        ...     torch.zeros(1, dtype=torch.float64),
        ... )
        >>> round(solution.outer_params.item(), 4), str(solution.status)
        (1.5, 'converged')
    """

    inner_optimizer: InnerOptimizer
    inner_steps: int = 10
    step_size: float = 1.0
    merit_weight: float = 10.0
    prox: ProximalMap | None = None
    penalty: Callable[[Parameters], Tensor] | None = None
    rtol: float = 1e-3
    damping: float = 0.0
    hvp: HvpMode = "double-backward"

    def __post_init__(self) -> None:
        for name in ("inner_steps", "step_size", "merit_weight", "rtol"):
            check_positive(name, getattr(self, name))
        check_not_negative("damping", self.damping)

    def minimize(
        self,
        outer_loss: ParameterLoss,
        inner_loss: ParameterLoss,
        outer_params: Parameters,
        inner_params: Parameters,
        *,
        tolerance: float = 1e-6,
        max_steps: int = 1000,
    ) -> BilevelSolution:
        """Runs from given parameters, which are left alone.

        Args:
            outer_loss: ``F(outer_params, inner_params)``, a scalar.
            inner_loss: ``g(outer_params, inner_params)``, a scalar.
            outer_params: First ``x``, nested tensors.
            inner_params: First ``y``, nested tensors.
            tolerance: Stationarity, gradient of the inner loss, and residual of the linear system
                at which to stop, above 0.
            max_steps: Most outer steps.

        Returns:
            The result with its merits and a status; see :func:`hypergradient` for what it raises.
        """
        check_positive("tolerance", tolerance)
        check_positive("max_steps", max_steps)
        problem = _Losses(outer_loss, inner_loss, layout_of("outer_params", outer_params))
        goal = _Goal(tolerance=tolerance)
        accuracy, step_size = _Accuracy(self.inner_steps, self.rtol), self.step_size
        state = self._evaluated(
            problem, problem.outer.vector(outer_params), inner_params, accuracy, goal
        )
        merits, num_steps, blind, stationarity = [state.merit], 0, 0, math.inf
        status = StopReason.MAX_STEPS
        while num_steps < max_steps:
            search = self._searched(problem, state, step_size, accuracy, goal)
            stationarity, step_size = search.stationarity, search.step_size
            if search.kept is not None:
                state, num_steps = search.kept, num_steps + 1
                blind = blind + 1 if merits[-1] - state.merit <= state.rounding else 0
                merits.append(state.merit)
                if blind < _BLIND_STEPS:
                    continue
                status = StopReason.STALLED
                break
            if stationarity <= tolerance and _is_accurate(state.found, tolerance):
                status = StopReason.CONVERGED
                break
            if accuracy.is_last:
                status = StopReason.STALLED
                break
            accuracy = accuracy.tightened()
            # No residual may grow here, or the merit could.
            rtol = max(min(accuracy.rtol, state.found.residual), _LEAST_RTOL)
            sharp = replace(accuracy, rtol=rtol)
            state = self._evaluated(problem, state.outer, state, sharp, goal)
            merits.append(state.merit)
        return BilevelSolution(
            outer_params=problem.outer.structure(state.outer),
            inner_params=state.inner,
            merits=merits,
            stationarity=stationarity,
            step_size=step_size,
            last=state.found,
            num_steps=num_steps,
            num_inner_steps=goal.num_inner_steps,
            num_hvps=goal.num_hvps,
            status=status,
        )

    def _searched(
        self,
        problem: "_Losses",
        state: "_State",
        start: float,
        accuracy: "_Accuracy",
        goal: "_Goal",
    ) -> "_Search":
        """Shrinks the step until the merit falls enough."""
        slope = problem.outer.vector(state.found.grads)
        step_size, stationarity = start, math.inf
        for trial in range(_BACKTRACKS):
            moved = self._moved(problem, state.outer, slope, step_size)
            distance = (moved - state.outer).norm().item()
            if trial == 0:
                stationarity = distance / step_size
            if stationarity <= goal.tolerance:
                break
            decrease = _SIGMA * distance**2 / step_size
            sharp = replace(accuracy, rtol=self._rtol(state.found, decrease, accuracy))
            candidate = self._tried(problem, moved, state, sharp, goal)
            if candidate is not None:
                enough = state.merit + state.rounding - decrease
                if candidate.merit <= enough:
                    grown = step_size * _GROW if trial == 0 else step_size
                    return _Search(candidate, stationarity, grown)
                # A shorter step would not help where the inner error alone hides the decrease.
                error = self.merit_weight / 2 * candidate.found.inner_gradient**2
                if candidate.merit - error <= enough and error > decrease:
                    return _Search(None, stationarity, step_size)
            step_size *= _SHRINK
        return _Search(None, stationarity, start)

    def _rtol(self, found: Hypergradient, decrease: float, accuracy: "_Accuracy") -> float:
        """Returns the tolerance at which the linear residual hides little of a decrease."""
        if found.outer_gradient == 0:
            return accuracy.rtol
        allowed = math.sqrt(_HIDDEN * decrease * 2 / self.merit_weight) / found.outer_gradient
        return max(min(allowed, accuracy.rtol), _LEAST_RTOL)

    def _moved(self, problem: "_Losses", outer: Tensor, slope: Tensor, step_size: float) -> Tensor:
        moved = outer - step_size * slope
        if self.prox is None:
            return moved
        return problem.outer.vector(self.prox(problem.outer.structure(moved), step_size))

    def _tried(
        self,
        problem: "_Losses",
        moved: Tensor,
        state: "_State",
        accuracy: "_Accuracy",
        goal: "_Goal",
    ) -> "_State | None":
        """Returns the state at a trial point, None where a loss overflows there."""
        try:
            return self._evaluated(problem, moved, state, accuracy, goal)
        except NonFiniteLossError:
            return None

    def _evaluated(
        self,
        problem: "_Losses",
        outer: Tensor,
        start: "_State | Parameters",
        accuracy: "_Accuracy",
        goal: "_Goal",
    ) -> "_State":
        """Solves the inner problem and the linear system as accurately as asked, from a start."""
        params = problem.outer.structure(outer)
        warm = start if isinstance(start, _State) else None
        trained = inner_solution(
            problem.inner_loss,
            params,
            warm.inner if warm else start,
            self.inner_optimizer,
            max_steps=accuracy.inner_steps,
            tolerance=_ENOUGH * goal.tolerance,
        )
        inner = trained.params
        goal.num_inner_steps += trained.num_steps
        found = hypergradient(
            problem.outer_loss,
            problem.inner_loss,
            params,
            inner,
            solver=CG(rtol=accuracy.rtol),
            damping=self.damping,
            hvp=self.hvp,
            start=warm.found.auxiliary if warm else None,
        )
        goal.num_hvps += found.num_hvps
        omega = self.penalty(params).item() if self.penalty is not None else 0.0
        merit = found.merit(self.merit_weight) + omega
        rounding = _ROUNDINGS * torch.finfo(outer.dtype).eps * (abs(merit) + abs(omega))
        return _State(outer, inner, found, merit, rounding)


def _is_accurate(found: Hypergradient, tolerance: float) -> bool:
    return max(found.inner_gradient, found.residual_norm) <= tolerance


@dataclass(frozen=True, slots=True)
class _Losses:
    outer_loss: ParameterLoss
    inner_loss: ParameterLoss
    outer: Layout


@dataclass(slots=True, kw_only=True)
class _Goal:
    """What to reach, and what was spent on it."""

    tolerance: float
    num_inner_steps: int = 0
    num_hvps: int = 0


@dataclass(frozen=True, slots=True)
class _Accuracy:
    """How accurately the inner problem and the linear system are solved."""

    inner_steps: int
    rtol: float

    @property
    def is_last(self) -> bool:
        return self.inner_steps >= _MOST_INNER_STEPS and self.rtol <= _LEAST_RTOL

    def tightened(self) -> "_Accuracy":
        return _Accuracy(
            inner_steps=max(self.inner_steps, min(2 * self.inner_steps, _MOST_INNER_STEPS)),
            rtol=min(self.rtol, max(_TIGHTER * self.rtol, _LEAST_RTOL)),
        )


class _State(NamedTuple):
    outer: Tensor
    inner: Parameters
    found: Hypergradient
    merit: float
    rounding: float


class _Search(NamedTuple):
    kept: _State | None
    stationarity: float
    step_size: float
