"""How many steps a method can afford: total FLOPs, outer loop and held-out passes included.

    total(n) = training(n) + updates(n) * held-out pass + outer(n) * outer step

Training spends its budget of assignments exactly. Passes in evaluation mode route at a frozen price
and may spend another number of assignments, so that they are known up to a factor only: a method is
planned at the most that they are expected to spend, the reference's limit at the least. What a run
really took is recorded in its evaluation, and checked against the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never, final

from drgr.budgets import TokenBudget
from drgr.budgets.flops import FORWARD_PASSES_PER_STEP, forward_flops, training_flops
from drgr.data import Corpus
from drgr.errors import ConfigError
from drgr.evaluation import ExpertBounds
from drgr.training import RunConfig, RunObjects, build_run, override
from drgr.training.outer_config import CGConfig, NeumannConfig, NoSolverConfig, OuterConfig

# Assignments of a pass at the frozen price, as a share of the budget: the range that runs on eight
# domains showed, with room on both sides.
_LEAST_SPEND, _MOST_SPEND = 0.95, 1.25
# Products of a solve beside its steps: with the warm start, its verification, and the residual.
_CHECKS = 2
_POWER_STEPS = 20  # of the estimate of a Neumann series' step size, at most


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Training steps that cost the same.

    Attributes:
        begin: Steps before the first of them.
        step: FLOPs of each.
    """

    begin: int
    step: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recurring:
    """Something that a run does every few steps.

    Attributes:
        begin: Steps before the first time.
        every: Steps from time to time.
        least: FLOPs of one time if it spends little.
        most: FLOPs of one time if it spends much.
    """

    begin: int
    every: int
    least: float
    most: float

    def times(self, steps: int) -> int:
        """Returns how often it is due in a run of ``steps`` steps."""
        return len(range(self.begin, steps, self.every))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunCosts:
    """What a run costs by its number of steps.

    Attributes:
        stages: Training steps; the first stage begins at step 0, each ends where the next begins.
        recurring: What comes on top of them every few steps.
    """

    stages: tuple[Stage, ...]
    recurring: tuple[Recurring, ...]

    def training(self, steps: int) -> float:
        """Returns the FLOPs of ``steps`` training steps."""
        ends = [*(min(stage.begin, steps) for stage in self.stages[1:]), steps]
        taken = (max(end - stage.begin, 0) for stage, end in zip(self.stages, ends, strict=True))
        return sum(n * stage.step for n, stage in zip(taken, self.stages, strict=True))

    def least(self, steps: int) -> float:
        """Returns the FLOPs of a run of ``steps`` steps if passes at the frozen price are cheap."""
        return self.training(steps) + sum(part.times(steps) * part.least for part in self.recurring)

    def most(self, steps: int) -> float:
        """Returns the FLOPs of a run of ``steps`` steps if passes at the frozen price are dear."""
        return self.training(steps) + sum(part.times(steps) * part.most for part in self.recurring)


def steps_within(costs: RunCosts, limit: float) -> int:
    """Returns the most steps whose FLOPs are at most ``limit`` even if passes are dear; or 0.

    Time is logarithmic in the result: a run never costs less with more steps.
    """
    low, high = 0, int(limit // min(stage.step for stage in costs.stages)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs.most(middle) <= limit else (low, middle)
    return low


def measure_costs(config: RunConfig, corpus: Corpus) -> RunCosts:
    """Builds a run on the CPU, without training it, and returns what it will cost.

    Raises:
        ConfigError: If its settings clash with each other or with the corpus.
        DataError: If a domain is shorter than a sequence.
        UnknownRouterError: If its model cannot be attached to.
    """
    built = override(config, ["training.device=cpu", "training.compile=false"])
    run = build_run(built, corpus)
    stages = tuple(
        Stage(begin=stage.begin, step=_step_flops(run, config, stage.budgets))
        for stage in run.stages
    )
    recurring = []
    robustness, outer = config.robustness, config.outer
    if robustness.losses == "validation":
        recurring.append(
            _passes(
                run,
                windows=robustness.windows,
                passes=1,
                begin=robustness.begin,
                every=robustness.every,
            )
        )
    if outer.variables:
        recurring.append(
            _passes(
                run,
                windows=outer.windows,
                passes=outer_passes(outer),
                begin=outer.begin,
                every=outer.every,
            )
        )
    return RunCosts(stages=stages, recurring=tuple(recurring))


def _step_flops(run: RunObjects, config: RunConfig, budgets: Sequence[TokenBudget]) -> float:
    settings, length = config.training, config.data.sequence_length
    tokens = settings.batch_size * length
    # A micro-batch has a budget of its own, in whole assignments.
    micro = tokens // settings.accumulation
    spend = settings.accumulation * sum(budget.total(micro) for budget in budgets)
    return training_flops(
        run.flops,
        tokens=tokens,
        sequence_length=length,
        assignments=spend,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def outer_passes(outer: OuterConfig) -> int:
    """Returns the most forward passes that an outer step takes over its sequences."""
    gradient = FORWARD_PASSES_PER_STEP
    if outer.update == "lookahead":
        return 2 * gradient
    # The gradient of the worst case, the routes, and a central difference along the response:
    # of losses, or of gradients where tensors of the model are outer variables.
    difference = 2 if set(outer.variables) == {"mixture"} else 2 * gradient
    product = gradient + 2 if outer.curvature == "gauss-newton" else 2 * gradient
    return gradient + 1 + difference + _products(outer) * product


def _products(outer: OuterConfig) -> int:
    match outer.solver:
        case NoSolverConfig():
            return 0
        case CGConfig(max_steps=max_steps):
            return max_steps + _CHECKS
        case NeumannConfig(num_terms=num_terms, step_size=step_size):
            return num_terms + _CHECKS + (_POWER_STEPS if step_size is None else 0)
        case _:
            assert_never(outer.solver)


def _budget(bounds: ExpertBounds) -> TokenBudget:
    """Returns what a run may spend: the most that a token may have where nothing holds a mean."""
    average = float(bounds.maximum) if bounds.average is None else bounds.average
    return TokenBudget(minimum=bounds.minimum, maximum=bounds.maximum, average=average)


def _passes(run: RunObjects, *, windows: int, passes: int, begin: int, every: int) -> Recurring:
    length = run.settings.sequence_length
    tokens = len(run.corpus.domains) * windows * length
    budget = _budget(run.bounds)
    average = budget.average
    shares = (
        max(budget.minimum, _LEAST_SPEND * average),
        min(budget.maximum, _MOST_SPEND * average),
    )
    least, most = (
        passes
        * forward_flops(
            run.flops,
            tokens=tokens,
            sequence_length=length,
            assignments=len(run.attachment.layer_names) * share * tokens,
        )
        for share in shares
    )
    return Recurring(begin=begin, every=every, least=least, most=most)


def affordable_steps(
    name: str, costs: RunCosts, *, wanted: int, limit: float, may_grow: bool
) -> int:
    """Returns the steps of a method inside a limit.

    Args:
        name: The method's name.
        costs: What it costs.
        wanted: The steps that its settings say.
        limit: FLOPs that it must not exceed.
        may_grow: Whether it may take more than the wanted steps.

    Raises:
        ConfigError: If not even one step fits.
    """
    steps = steps_within(costs, limit)
    if steps < 1:
        raise ConfigError(
            f"method {name!r}: one step takes {costs.most(1):.3g} FLOPs, more than the "
            f"{limit:.3g} that the reference leaves it in total; give the reference more steps, or "
            f"the method smaller ones"
        )
    return steps if may_grow else min(steps, wanted)
