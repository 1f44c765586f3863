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

from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.bilevel.alternation import (
    BLIND_STEPS,
    GROW,
    SHRINK,
    SIGMA,
    Accuracy,
    Alternation,
    ProximalMap,
    State,
)
from drgr.bilevel.hypergradient import Hypergradient, ParameterLoss
from drgr.bilevel.inner_level import InnerOptimizer
from drgr.bilevel.products import HvpMode
from drgr.bilevel.structures import Parameters, layout_of

_BACKTRACKS = 60


class StopReason(Enum):
    """Why the outer loop stopped; ``str`` gives a sentence."""

    CONVERGED = "converged"
    MAX_STEPS = "stopped at the step limit: raise max_steps"
    STALLED = (
        "stopped where no step lowers the merit by more than rounding: "
        "raise merit_weight or damping, or take float64"
    )
    NOISE = (
        "stopped where the noise of the batches hides what steps gain: "
        "take larger batches, a lower inner learning rate or a larger allowance"
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

    Deterministic losses; for mini-batches see :func:`minimize_on_batches`.

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
        layout = layout_of("outer_params", outer_params)
        run = Alternation(
            method=self,
            outer_loss=outer_loss,
            inner_loss=inner_loss,
            steps_loss=inner_loss,
            outer=layout,
            tolerance=tolerance,
        )
        accuracy, step_size = Accuracy(self.inner_steps, self.rtol), self.step_size
        state = run.evaluated(layout.vector(outer_params), inner_params, accuracy)
        merits, num_steps, blind, stationarity = [state.merit], 0, 0, math.inf
        status = StopReason.MAX_STEPS
        while num_steps < max_steps:
            search = _searched(run, state, step_size, accuracy)
            stationarity, step_size = search.stationarity, search.step_size
            if search.kept is not None:
                state, num_steps = search.kept, num_steps + 1
                blind = blind + 1 if merits[-1] - state.merit <= state.rounding else 0
                merits.append(state.merit)
                if blind < BLIND_STEPS:
                    continue
                status = StopReason.STALLED
                break
            if stationarity <= tolerance and state.is_accurate(tolerance):
                status = StopReason.CONVERGED
                break
            if accuracy.is_last:
                status = StopReason.STALLED
                break
            accuracy = accuracy.tightened()
            # No residual may grow here, or the merit could.
            sharp = replace(accuracy, residual=state.found.residual_norm)
            state = run.evaluated(state.outer, state, sharp)
            merits.append(state.merit)
        return BilevelSolution(
            outer_params=layout.structure(state.outer),
            inner_params=state.inner,
            merits=merits,
            stationarity=stationarity,
            step_size=step_size,
            last=state.found,
            num_steps=num_steps,
            num_inner_steps=run.num_inner_steps,
            num_hvps=run.num_hvps,
            status=status,
        )


class _Search(NamedTuple):
    kept: State | None
    stationarity: float
    step_size: float


def _searched(run: Alternation, state: State, start: float, accuracy: Accuracy) -> _Search:
    """Shrinks the step until the merit falls enough."""
    slope = run.outer.vector(state.found.grads)
    step_size, stationarity = start, math.inf
    for trial in range(_BACKTRACKS):
        moved = run.moved(state.outer, slope, step_size)
        distance = (moved - state.outer).norm().item()
        if trial == 0:
            stationarity = distance / step_size
        if stationarity <= run.tolerance:
            break
        decrease = SIGMA * distance**2 / step_size
        sharp = replace(accuracy, residual=run.largest_residual(decrease))
        candidate = run.tried(moved, state, sharp)
        if candidate is not None:
            enough = state.merit + state.rounding - decrease
            if candidate.merit <= enough:
                grown = step_size * GROW if trial == 0 else step_size
                return _Search(candidate, stationarity, grown)
            if run.hides(candidate, enough, decrease):
                return _Search(None, stationarity, step_size)
        step_size *= SHRINK
    return _Search(None, stationarity, start)
