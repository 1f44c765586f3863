"""The training loop: steps, adversary updates, records, checkpoints, the final evaluation."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from drgr.budgets.flops import training_flops
from drgr.collectives import rank
from drgr.errors import CheckpointError
from drgr.evaluation import evaluate_domains, validation_record
from drgr.training.checkpoint import latest_checkpoint
from drgr.training.config import OuterConfig, RobustnessConfig, TrainingConfig
from drgr.training.finish import finish
from drgr.training.held_out import held_out_sums
from drgr.training.loop_state import LoopState, by_name
from drgr.training.metrics import (
    JsonLines,
    MetricsSink,
    Record,
    TensorBoard,
    outer_record,
    training_record,
)
from drgr.training.outer_loop import OuterLoop
from drgr.training.run_directory import RunDirectory, write_json
from drgr.training.setup import RunObjects
from drgr.training.signals import deferred_signals
from drgr.training.step import train_step
from drgr.training.step_totals import StepTotals, is_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What a progress display shows of one step."""

    step: int
    loss: float
    worst_domain: str | None
    worst_loss: float
    spend: int
    limit: int
    tokens_per_second: float


class Observer(Protocol):
    """Watches a run; called by the first process only."""

    def on_step(self, view: StepView) -> None:
        """Called after each step."""
        ...

    def on_record(self, record: Record) -> None:
        """Called with each record that is written."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Steps taken.
        signal: The signal that stopped it, 0 if it ran to its end.
        evaluation: The final evaluation record; ``None`` if it was stopped.
    """

    step: int
    signal: int
    evaluation: Record | None


def train(
    run: RunObjects,
    directory: RunDirectory,
    *,
    observer: Observer,
    environment: Record,
    resume: bool = False,
) -> Outcome:
    """Trains to the configured number of steps, or until a signal asks to stop.

    A stopped or killed run that is resumed continues exactly as if it had not been: bit for bit on
    a CPU. Every process of the run calls this; the first one writes.

    Args:
        run: The objects of the run.
        directory: Where it writes.
        observer: Progress display.
        environment: Where the run came from, for the record.
        resume: Whether to continue from the last whole checkpoint, if there is one.

    Returns:
        How it ended.

    Raises:
        NonFiniteLossError: If the loss or gradient of a step is not finite; the parameters are as
            before the step.
        CheckpointError: If a checkpoint or another file cannot be written, a checkpoint is damaged
            or of another configuration, or there is one although ``resume`` was not asked for.
    """
    try:
        return _train(run, directory, observer, environment, resume=resume)
    except OSError as error:
        raise CheckpointError(
            f"run directory {directory.path} could not be written: {error}; free space there or "
            f"choose another one, then continue with --resume"
        ) from error


def _train(
    run: RunObjects,
    directory: RunDirectory,
    observer: Observer,
    environment: Record,
    *,
    resume: bool,
) -> Outcome:
    state = LoopState(run, directory)
    is_continued = resume and state.load_latest()
    if not resume and latest_checkpoint(directory.checkpoints) is not None:
        raise CheckpointError(
            f"{directory.path} holds checkpoints of an earlier run; resume it, or name another "
            f"directory"
        )
    if rank() == 0 and not is_continued:
        # The configuration comes first: it is what makes the directory a run.
        write_json(directory.config, run.config.model_dump(mode="json"))
        write_json(directory.environment, environment)
    sinks: list[MetricsSink] = []
    if rank() == 0:
        sinks = [
            JsonLines(directory.metrics, last_step=state.step),
            TensorBoard(directory.tensorboard, last_step=state.step),
        ]
    reporter = _Reporter(sinks, observer)
    try:
        stopped = _run_steps(run, state, reporter)
        if stopped:
            return Outcome(step=state.step, signal=stopped, evaluation=None)
        return Outcome(step=state.step, signal=0, evaluation=finish(run, state, directory))
    finally:
        for sink in sinks:
            sink.close()


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Returns the learning rate of step ``step``, counted from 0: linear warm-up, then a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    share = config.final_learning_rate + (1 - config.final_learning_rate) * cosine
    return config.learning_rate * share


@final
class _Reporter:
    """Sends records to every sink and to the display."""

    def __init__(self, sinks: Sequence[MetricsSink], observer: Observer) -> None:
        self._sinks = sinks
        self._observer = observer

    def write(self, record: Record) -> None:
        if rank() == 0:
            for sink in self._sinks:
                sink.write(record)
            self._observer.on_record(record)

    def show(self, view: StepView) -> None:
        if rank() == 0:
            self._observer.on_step(view)


def _run_steps(run: RunObjects, state: LoopState, reporter: _Reporter) -> int:
    """Runs the remaining steps; returns the signal that stopped them, or 0."""
    config = run.config.training
    with deferred_signals() as request:
        while state.step < config.steps:
            _one_step(run, state, reporter)
            stop = request.agreed(run.group)
            is_last = state.step == config.steps
            if state.step % config.log_every == 0 or is_last:
                _log(run, state, reporter)
            if state.step % config.evaluate_every == 0 and not is_last:
                reporter.write(_validate(run, state))
            if state.step % config.checkpoint_every == 0 or is_last or stop:
                state.save()
            if stop:
                return stop
    return 0


def _one_step(run: RunObjects, state: LoopState, reporter: _Reporter) -> None:
    """Takes one step, the adversary's update before it included in its time and FLOPs."""
    started = time.perf_counter()
    settings = run.config.robustness
    flops = 0.0
    if _is_due(settings, state.step):
        flops += _update_adversary(run, state, reporter)
    if run.outer is not None and _is_due(run.config.outer, state.step):
        flops += _outer_step(run, run.outer, state, reporter)
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = learning_rate(run.config.training, state.step)
    totals = train_step(
        run.forward_model,
        run.attachment,
        run.optimizer,
        run.corpus,
        run.settings,
        step=state.step,
        weights=run.adversary.weights,
        expert_weights=None if run.experts is None else run.experts.weights,
    )
    if not is_finite(totals):
        raise state.not_finite("training", totals.loss_sums, step=state.step + 1)
    if settings.losses == "train":
        run.adversary.observe(totals.loss_sums, totals.num_tokens)
    if run.experts is not None:
        run.experts.observe(totals.expert_losses, totals.expert_credit)
    flops += training_flops(
        run.flops,
        tokens=int(totals.num_tokens.sum()),
        sequence_length=run.settings.sequence_length,
        assignments=float(totals.spend.sum()),
        gradient_checkpointing=run.config.training.gradient_checkpointing,
    )
    state.add(totals, run.adversary.weights, flops=flops, seconds=time.perf_counter() - started)
    reporter.show(_view(run, state, totals))


def _update_adversary(run: RunObjects, state: LoopState, reporter: _Reporter) -> float:
    """Refreshes the domain weights; returns the FLOPs of the held-out passes."""
    settings = run.config.robustness
    flops = 0.0
    if settings.losses == "validation":
        loss_sums, num_tokens, flops = held_out_sums(
            run.attachment,
            run.corpus,
            run.settings,
            run.flops,
            step=state.step,
            windows=settings.windows,
        )
        if not math.isfinite(float(loss_sums.sum())):
            raise state.not_finite("held-out", loss_sums, step=state.step + 1)
        run.adversary.observe(loss_sums, num_tokens)
    was_near = run.adversary.is_near_one_hot(settings.alarm_below)
    if run.experts is not None:
        run.experts.refresh()
    weights = run.adversary.refresh()
    if run.adversary.is_near_one_hot(settings.alarm_below) and not was_near:
        name = run.corpus.domains[int(weights.adversary.argmax())]
        message = (
            f"the adversary's weights are nearly on the one domain {name} (effective number "
            f"{weights.effective_domains:.2f}); raise robustness.penalty or lower robustness.radius"
        )
        # The step that these weights are for: a run resumed at the step before alarms again.
        reporter.write({"kind": "alarm", "step": state.step + 1, "message": message})
    return flops


def _is_due(settings: RobustnessConfig | OuterConfig, step: int) -> bool:
    return step >= settings.begin and (step - settings.begin) % settings.every == 0


def _outer_step(run: RunObjects, outer: OuterLoop, state: LoopState, reporter: _Reporter) -> float:
    """Moves the outer variables; returns the FLOPs of it."""
    adversary = run.adversary
    report = outer.step(adversary.worst_case, adversary.losses, adversary.weights, step=state.step)
    if outer.settings.moves_mixture:
        adversary.set_mixture(report.mixture)
    state.outer_flops += report.flops
    reporter.write(outer_record(report, step=state.step + 1, domains=run.corpus.domains))
    return report.flops


def _log(run: RunObjects, state: LoopState, reporter: _Reporter) -> None:
    domains = run.corpus.domains
    record = training_record(
        state.window,
        step=state.step,
        domains=domains,
        layer_names=run.attachment.layer_names,
        prices=[policy.selector.price for policy in run.attachment.policies],
        losses=run.settings.losses,
        weights=run.adversary.weights,
        near_one_hot=run.adversary.is_near_one_hot(run.config.robustness.alarm_below),
        links=run.attachment.open_links,
        exchanged=run.exchanged_bytes(float(state.window.spend.sum() / state.window.steps)),
        cumulative={
            "tokens": int(state.total.num_tokens.sum()),
            "flops": state.flops,
            "outer_flops": state.outer_flops,
            "seconds": state.seconds,
            "tokens_per_second": state.tokens_per_second,
            "learning_rate": learning_rate(run.config.training, state.step - 1),
            "domain_tokens": by_name(domains, state.total.num_tokens),
        },
    )
    state.close_window()
    reporter.write(record)


def _validate(run: RunObjects, state: LoopState) -> Record:
    scores = evaluate_domains(
        run.attachment,
        run.corpus,
        split="validation",
        max_windows=run.config.training.evaluation_windows,
        sequence_length=run.settings.sequence_length,
        batch_size=run.settings.batch_size,
        group=run.group,
        autocast=run.settings.autocast,
    )
    if not math.isfinite(float(scores.loss_sums.sum())):
        raise state.not_finite("validation", scores.loss_sums, step=state.step)
    return validation_record(scores, step=state.step)


def _view(run: RunObjects, state: LoopState, totals: StepTotals) -> StepView:
    worst = run.adversary.worst
    return StepView(
        step=state.step,
        loss=float(totals.loss_sums.sum() / totals.num_tokens.sum()),
        worst_domain=None if worst is None else run.corpus.domains[worst[0]],
        worst_loss=math.nan if worst is None else worst[1],
        spend=int(totals.spend.sum()),
        limit=int(totals.limit.sum()),
        tokens_per_second=state.tokens_per_second,
    )
