r"""Proximal alternating minimisation on mini-batches, guarded by a fixed probe.

The losses are means over data. Every inner step takes a new batch, and so does the direction

    h = grad_x F_B - J_B z        x+ = prox_{alpha Omega}(x - alpha h)        d = x - x+

with the ``z`` that solves the system of the probe: a mean over batches, unlike the solution of the
system of one batch. The merit ``M`` of the probe, a few batches that never change, judges ``x+``
with its inner solution. By convexity of ``Omega`` the first-order decrease on the probe is at least

    |d|^2 / alpha + (h_probe - h)' d

and a step is kept if ``M`` falls by ``sigma`` times the lesser of that and ``|d|^2 / alpha``, less
an allowance for noise. Otherwise ``alpha`` shrinks and another batch is drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive
from drgr.bilevel.alternation import (
    BLIND_STEPS,
    GROW,
    SHRINK,
    SIGMA,
    Accuracy,
    Alternation,
    State,
)
from drgr.bilevel.hypergradient import Hypergradient, hypergradient
from drgr.bilevel.linear_system import LinearSolution, LinearSystem
from drgr.bilevel.probe import Batch, BatchLoss, Probe
from drgr.bilevel.proximal_alternating import ProximalAlternating, StopReason
from drgr.bilevel.status import SolveStatus
from drgr.bilevel.structures import Parameters, layout_of

# So many trials in a row may fail.
_MOST_FAILURES = 30
_SEED = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchSolution:
    """Result of :func:`minimize_on_batches`; all merits are those of the probe."""

    outer_params: Parameters
    inner_params: Parameters
    merits: list[float]
    """Merit at the start, after every kept step, and after every kept change of accuracy."""
    allowances: list[float]
    """What each merit may exceed the one before by, beyond rounding: one fewer than merits."""
    stationarity: float
    """``|x - prox(x - alpha h)| / alpha`` with ``h`` of the probe, when last computed."""
    step_size: float
    """``alpha`` at the end."""
    last: Hypergradient
    """Everything known of the probe at the result."""
    num_accepted: int
    num_rejected: int
    """Steps that were tried and not kept."""
    num_batches: int
    """Batches drawn."""
    num_inner_steps: int
    num_hvps: int
    status: StopReason


def minimize_on_batches(
    method: ProximalAlternating,
    outer_loss: BatchLoss,
    inner_loss: BatchLoss,
    outer_params: Parameters,
    inner_params: Parameters,
    *,
    draw: Callable[[torch.Generator], Batch],
    probe: Sequence[Batch],
    allowance: float | None = 0.0,
    tolerance: float = 1e-6,
    max_trials: int = 1000,
    generator: torch.Generator | None = None,
) -> MiniBatchSolution:
    """Minimises ``F(x, y*(x)) + Omega(x)`` for means over data, a few samples at a time.

    With a batch and a probe that are the whole data these are the steps of
    :meth:`ProximalAlternating.minimize`. Otherwise what is certain is said of the probe only: no
    kept step raises its merit by more than the allowance. Small probes are fitted instead of the
    data, and their inner gradient is not 0 at the inner solution of the data; compare sizes.

    Args:
        method: Inner optimizer, first step size, merit, proximal map and accuracies. One call of
            the closure of the inner optimizer takes one batch.
        outer_loss: ``F(outer_params, inner_params, batch)``.
        inner_loss: ``g(outer_params, inner_params, batch)``.
        outer_params: First ``x``, nested tensors; left alone.
        inner_params: First ``y``, nested tensors; left alone.
        draw: Draws a batch for both losses with the given generator.
        probe: At least one batch; its losses are the means over them.
        allowance: What a kept step may raise the merit by, at least 0. None is one standard error
            of its change over the batches of the probe, at least two, of equal sizes: steps whose
            gain the probe cannot tell from chance pass, and as steps shrink so does the allowance.
        tolerance: Stationarity, gradient of the inner loss, and residual of the linear system of
            the probe at which to stop, above 0.
        max_trials: Most steps and changes of accuracy, kept or not.
        generator: Draws the batches; None takes a fixed seed.

    Returns:
        The last point, with the merits, the numbers of kept and rejected steps, and a status.

    Raises:
        ValueError: If a number is out of range or the probe is too small; see
            :func:`hypergradient` for the rest.

    Complexity:
        A trial takes the inner steps, a product on a batch, and a hypergradient of the probe.

    References:
        As :class:`ProximalAlternating`. The standard error is by the delta method.

    Examples:
        >>> import torch
        >>> scales = torch.linspace(0.5, 1.5, 100, dtype=torch.float64)
        >>> solution = minimize_on_batches(
        ...     ProximalAlternating(inner_optimizer=lambda params: torch.optim.SGD(params, lr=0.4)),
        ...     lambda x, y, batch: (y - 3).square().sum(),
        ...     lambda x, y, batch: scales[batch].mean() * (y - 2 * x).square().sum(),
        ...     torch.zeros(1, dtype=torch.float64),
        ...     torch.zeros(1, dtype=torch.float64),
        ...     draw=lambda generator: torch.randint(100, (10,), generator=generator),
        ...     probe=[torch.arange(0, 100, 5)],
        ... )
        >>> round(solution.outer_params.item(), 4), str(solution.status)
        (1.5, 'converged')
    """
    check_positive("tolerance", tolerance)
    check_positive("max_trials", max_trials)
    judge = Probe(
        outer_loss=outer_loss,
        inner_loss=inner_loss,
        batches=probe,
        merit_weight=method.merit_weight,
        allowance=allowance,
    )
    batches = _Batches(draw, generator or torch.Generator().manual_seed(_SEED))
    layout = layout_of("outer_params", outer_params)
    run = Alternation(
        method=method,
        outer_loss=judge.mean(outer_loss),
        inner_loss=judge.mean(inner_loss),
        steps_loss=lambda x, y: inner_loss(x, y, batches()),
        outer=layout,
        tolerance=tolerance,
    )
    accuracy = Accuracy(method.inner_steps, method.rtol)
    state = run.evaluated(layout.vector(outer_params), inner_params, accuracy)
    walk = _Walk(
        run=run,
        probe=judge,
        batches=batches,
        accuracy=accuracy,
        step_size=method.step_size,
        first_step_size=method.step_size,
        state=state,
        merits=[state.merit],
    )
    for _ in range(max_trials):
        status = walk.trial()
        if status is not None:
            return walk.solution(status)
    return walk.solution(StopReason.MAX_STEPS)


@dataclass(slots=True)
class _Batches:
    """Draws batches and counts them."""

    draw: Callable[[torch.Generator], Batch]
    generator: torch.Generator
    drawn: int = 0

    def __call__(self) -> Batch:
        self.drawn += 1
        return self.draw(self.generator)


@dataclass(frozen=True, slots=True)
class _Given:
    """Takes the start for the solution."""

    rtol: float = 1.0

    def solve(self, system: LinearSystem, start: Tensor | None) -> LinearSolution:
        return LinearSolution(
            point=torch.zeros_like(system.rhs) if start is None else start,
            status=SolveStatus.APPROXIMATE,
            curvature=math.inf,
            num_products=0,
        )


@dataclass(slots=True, kw_only=True)
class _Walk:
    """Where the method is, and how it came there."""

    run: Alternation
    probe: Probe
    batches: _Batches
    accuracy: Accuracy
    step_size: float
    first_step_size: float
    """The one before the trials in a row that failed."""
    state: State
    merits: list[float]
    allowances: list[float] = field(default_factory=list)
    stationarity: float = math.inf
    num_accepted: int = 0
    num_rejected: int = 0
    failures: int = 0
    blind: int = 0
    is_at_floor: bool = False
    """Whether more inner steps no longer lower the merit."""

    def trial(self) -> StopReason | None:
        """Tries a step, or more accuracy; returns why to stop, if so."""
        run, state = self.run, self.state
        known = run.outer.vector(state.found.grads)
        if self.failures == 0:
            self.first_step_size = self.step_size
            moved = run.moved(state.outer, known, self.step_size)
            self.stationarity = (moved - state.outer).norm().item() / self.step_size
        if self.stationarity <= run.tolerance:
            if state.is_accurate(run.tolerance):
                return StopReason.CONVERGED
            return self._refined()
        if self.failures == _MOST_FAILURES:
            self.step_size = self.first_step_size
            return self._refined()
        slope = self._slope()
        moved = run.moved(state.outer, slope, self.step_size)
        step = state.outer - moved
        length = step.norm().item() ** 2 / self.step_size
        decrease = SIGMA * min(length, length + torch.dot(known - slope, step).item())
        if decrease <= 0:  # uphill on the probe, for which the step size is not to blame
            self._reject()
            return None
        return self._judged(moved, decrease)

    def solution(self, status: StopReason) -> MiniBatchSolution:
        """Returns where the method is, and all it counted."""
        return MiniBatchSolution(
            outer_params=self.run.outer.structure(self.state.outer),
            inner_params=self.state.inner,
            merits=self.merits,
            allowances=self.allowances,
            stationarity=self.stationarity,
            step_size=self.step_size,
            last=self.state.found,
            num_accepted=self.num_accepted,
            num_rejected=self.num_rejected,
            num_batches=self.batches.drawn,
            num_inner_steps=self.run.num_inner_steps,
            num_hvps=self.run.num_hvps,
            status=status,
        )

    def _judged(self, moved: Tensor, decrease: float) -> StopReason | None:
        """Keeps a step if the merit falls enough."""
        run, state = self.run, self.state
        accuracy = replace(self.accuracy, residual=run.largest_residual(decrease))
        candidate = run.tried(moved, state, accuracy)
        if candidate is not None:
            both = run.outer.structure(state.outer), run.outer.structure(moved)
            allowed = self.probe.allowed(both, state, candidate)
            enough = state.merit + state.rounding - decrease + allowed
            if candidate.merit <= enough:
                return self._keep(candidate, allowed)
            if not self.is_at_floor and run.hides(candidate, enough, decrease + allowed):
                self._reject()
                return self._refined()
        self._reject()
        self.step_size *= SHRINK
        return None

    def _slope(self) -> Tensor:
        """Returns the direction of a new batch."""
        run, state, batch = self.run, self.state, self.batches()
        found = hypergradient(
            lambda x, y: self.probe.outer_loss(x, y, batch),
            lambda x, y: self.probe.inner_loss(x, y, batch),
            run.outer.structure(state.outer),
            state.inner,
            solver=_Given(),
            damping=run.method.damping,
            hvp=run.method.hvp,
            start=state.found.auxiliary,
        )
        run.num_hvps += found.num_hvps
        return run.outer.vector(found.grads)

    def _keep(self, candidate: State, allowed: float) -> StopReason | None:
        if self.failures == 0:
            self.step_size *= GROW
        fall = self.state.merit - candidate.merit
        self.blind = self.blind + 1 if fall <= candidate.rounding else 0
        self.num_accepted, self.failures = self.num_accepted + 1, 0
        self._record(candidate, allowed)
        return StopReason.STALLED if self.blind >= BLIND_STEPS else None

    def _reject(self) -> None:
        self.num_rejected, self.failures = self.num_rejected + 1, self.failures + 1

    def _record(self, state: State, allowed: float) -> None:
        self.state = state
        self.merits.append(state.merit)
        self.allowances.append(allowed)

    def _refined(self) -> StopReason | None:
        """Solves the inner problem more accurately, where that is possible."""
        self.failures = 0
        if self.is_at_floor:
            return StopReason.NOISE
        if self.accuracy.is_last:
            return StopReason.STALLED
        tight = self.accuracy.tightened()
        sharp = replace(tight, residual=self.state.found.residual_norm)
        candidate = self.run.tried(self.state.outer, self.state, sharp)
        self.is_at_floor = (
            candidate is None or candidate.merit > self.state.merit + self.state.rounding
        )
        if candidate is None or self.is_at_floor:
            self.accuracy = replace(self.accuracy, rtol=tight.rtol)
            return None
        self.accuracy = tight
        self._record(candidate, 0.0)
        return None
