"""A comparison from its file to its results: tuning, then methods times seeds at equal FLOPs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

from drgr.errors import ConfigError, DrgrError
from drgr.experiments.experiment import Tuning
from drgr.experiments.methods import Variant
from drgr.experiments.planning import Comparison, Planner
from drgr.experiments.processes import Job, only_one, run_jobs
from drgr.experiments.runs import RunFiles, now
from drgr.experiments.store import Store, StoredRun
from drgr.experiments.tuning import (
    Trial,
    best_trial,
    check_tuning_is_installed,
    objective_of,
    proposals,
)
from drgr.training import override, parse_config
from drgr.training.run_directory import source_commit

Report = Callable[[str], None]


def check_source(*, allow_dirty: bool) -> None:
    """Raises ``ConfigError`` if the package's source was changed since its commit."""
    commit, dirty = source_commit()
    if dirty and not allow_dirty:
        raise ConfigError(
            f"the source differs from its commit {commit}, so that results could not be made "
            f"again; commit first, or pass --allow-dirty"
        )


def run_comparison(
    comparison: Comparison, *, parallel: int, retry_failed: bool, report: Report
) -> int:
    """Makes every run of a comparison that is not finished yet.

    What was finished before stays; what was interrupted goes on from its last checkpoint; seeds
    that the experiment gained are run with the settings that were found before, methods that it
    gained are tuned as the others were. A run that fails is kept with its error and stops no other.

    Args:
        comparison: What to compare.
        parallel: Processes at a time.
        retry_failed: Whether runs that failed before are made anew.
        report: Told of each run that ends.

    Returns:
        The signal that stopped it, or 0.

    Raises:
        ConfigError: If the store is of another experiment, another process works there, or a method
            cannot be built.
        DrgrError: If every trial of the reference failed.
    """
    if comparison.experiment.tuning is not None:
        check_tuning_is_installed()
    with (
        only_one(comparison.directory / ".lock"),
        Store.open(comparison.store, comparison.content) as store,
    ):
        runner = _Runner(comparison, store, parallel=parallel, report=report)
        if retry_failed:
            runner.retry()
        return runner.tune() or runner.compare()


@final
class _Runner:
    """Makes runs and keeps what they find."""

    def __init__(
        self, comparison: Comparison, store: Store, *, parallel: int, report: Report
    ) -> None:
        self._comparison, self._store = comparison, store
        self._parallel, self._report = parallel, report
        tuning = comparison.experiment.tuning
        self._files = RunFiles(
            directory=comparison.directory,
            cache=comparison.cache,
            windows={one.name: _windows(tuning, one) for one in comparison.variants},
            program=comparison.program,
        )
        self._planner = Planner(comparison)
        self._prior = {one.name: one.prior_flops for one in comparison.variants}

    def retry(self) -> None:
        """Plans failed runs anew; trials of a method only until its final runs are planned."""
        settled = self._settled()
        for run in self._store.runs():
            is_open = run.stage == "final" or run.method not in settled
            if run.status not in ("failed", "over") or not is_open:
                continue
            steps = _fewer_steps(run) if run.status == "over" else run.steps
            config = override(parse_config(run.config), [f"training.steps={steps}"])
            self._files.remove(run.name)
            self._store.retry(run.name, config=config.model_dump(mode="json"), steps=steps)

    def tune(self) -> int:
        """Makes the trials of every method; returns the signal that stopped it, or 0."""
        tuning, settled = self._comparison.experiment.tuning, self._settled()
        variants = {one.name: one for one in self._comparison.variants if one.name not in settled}
        if tuning is None or not variants:
            return 0
        limit = self._planner.limit({}, steps=tuning.steps)

        def following(run: StoredRun) -> Sequence[StoredRun]:
            return self._trials_to_make(tuning, variants[run.method], limit)

        first = [
            run
            for variant in variants.values()
            for run in self._trials_to_make(tuning, variant, limit)
        ]
        return self._make(first, following)

    def compare(self) -> int:
        """Makes the final runs; returns the signal that stopped it, or 0."""
        settled = self._settled()
        missing = [one for one in self._comparison.variants if one.name not in settled]
        if missing:
            self._plan_final(missing)
        self._plan_new_seeds()
        return self._make(_to_make(self._store.runs("final")), _nothing)

    def _settled(self) -> set[str]:
        """Returns the methods whose final runs are planned."""
        return {run.method for run in self._store.runs("final")}

    def _plan_final(self, variants: Sequence[Variant]) -> None:
        reference = self._best(self._comparison.reference)
        if reference is None:
            raise DrgrError(
                f"every trial of the reference {self._comparison.reference.name!r} failed, so that "
                f"there are no FLOPs to compare at; see {self._comparison.store}, then use "
                f"--retry-failed"
            )
        limit = self._planner.limit(reference, steps=None)
        best = [(variant, self._best(variant)) for variant in variants]
        self._store.plan(
            [
                self._planner.final(variant, settings, seed=seed, limit=limit)
                for seed in self._comparison.experiment.seeds
                for variant, settings in best
                if settings is not None
            ]
        )

    def _plan_new_seeds(self) -> None:
        """Plans, for seeds that the experiment gained, what every method ran with the others."""
        planned = self._store.runs("final")
        names = {(run.method, run.seed) for run in planned}
        variants = {one.name: one for one in self._comparison.variants}
        firsts = {run.method: run for run in reversed(planned)}
        self._store.plan(
            [
                self._planner.repeated(variants[method], first, seed=seed)
                for seed in self._comparison.experiment.seeds
                for method, first in reversed(firsts.items())
                if (method, seed) not in names
            ]
        )

    def _best(self, variant: Variant) -> Mapping[str, Any] | None:
        """Returns the settings that tuning found; None if every trial failed."""
        if self._comparison.experiment.tuning is None:
            return {}
        found = best_trial([_as_trial(run) for run in self._trials(variant)])
        return None if found is None else found.settings

    def _trials(self, variant: Variant) -> list[StoredRun]:
        return [run for run in self._store.runs("tuning") if run.method == variant.name]

    def _trials_to_make(
        self, tuning: Tuning, variant: Variant, limit: float
    ) -> Sequence[StoredRun]:
        """Returns what is planned of a method's trials, or plans the next ones."""
        known = self._trials(variant)
        if any(run.status in ("planned", "running") for run in known):
            return _to_make(known)
        proposed = proposals(tuning, variant.space, [_as_trial(run) for run in known])
        self._store.plan([self._planner.trial(variant, one, limit=limit) for one in proposed])
        return _to_make(self._trials(variant))

    def _make(
        self,
        runs: Iterable[StoredRun],
        following: Callable[[StoredRun], Sequence[StoredRun]],
    ) -> int:
        """Makes runs and those that follow from them."""
        begun = {run.name for run in runs}

        def ended(job: Job, code: int) -> list[Job]:
            self._keep(self._store.run(job.name), code)
            new = [run for run in following(self._store.run(job.name)) if run.name not in begun]
            begun.update(run.name for run in new)
            return [self._files.job(run) for run in new]

        return run_jobs(
            [self._files.job(run) for run in runs],
            parallel=self._parallel,
            begun=lambda job: self._store.begin(job.name, now=now()),
            ended=ended,
        )

    def _keep(self, run: StoredRun, code: int) -> None:
        """Stores how a run ended, and reports it."""
        error = self._files.error(run, code) if code else self._collect(run)
        if error is not None:
            self._store.fail(run.name, error, now=now())
        self._report(self._line(self._store.run(run.name)))

    def _collect(self, run: StoredRun) -> str | None:
        """Stores what a run found; returns why that is not possible."""
        try:
            evaluation, environment = self._files.read(run)
        except (OSError, ValueError) as error:
            return f"the run left no results that can be read: {error}"
        prior = self._prior[run.method]
        evaluation |= {"flops": evaluation["flops"] + prior, "prior_flops": prior}
        tuning, objective = self._comparison.experiment.tuning, None
        if run.stage == "tuning" and tuning is not None:
            objective = objective_of(tuning.objective, evaluation)
            if objective is None:
                return f"the objective {dict(tuning.objective)} of the trial is not finite"
        self._store.finish(
            run.name,
            evaluation=evaluation,
            environment=environment,
            objective=objective,
            over=_excess(run, evaluation["flops"]),
            now=now(),
        )
        self._files.slim(run)
        return None

    def _line(self, run: StoredRun) -> str:
        runs = self._store.runs(run.stage)
        done = sum(one.status not in ("planned", "running") for one in runs)
        which = f"seed {run.seed}" if run.trial is None else f"trial {run.trial}"
        total = len(runs)
        if self._comparison.experiment.tuning is not None and run.stage == "tuning":
            total = self._comparison.experiment.tuning.trials * len(self._comparison.variants)
        start = f"[{run.stage} {done}/{total}] {run.method}, {which}: "
        found = run.evaluation
        if found is None or run.error is not None:
            return f"{start}{run.status}: {run.error}"
        return (
            f"{start}worst {found['worst_bits_per_byte']:.4f} ({found['worst_domain']}), mean "
            f"{found['mean_bits_per_byte']:.4f} bits per byte, {found['flops']:.3e} FLOPs, "
            f"{found['seconds']:.0f} s"
        )


def _nothing(run: StoredRun) -> Sequence[StoredRun]:
    """Final runs are followed by none."""
    del run
    return ()


def _windows(tuning: Tuning | None, variant: Variant) -> int:
    given = None if tuning is None else tuning.windows
    return given or variant.config.training.test_windows


def _to_make(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """Returns the runs that have not ended; those that were running come first."""
    left = [run for run in runs if run.status in ("planned", "running")]
    return sorted(left, key=lambda run: run.status != "running")


def _as_trial(run: StoredRun) -> Trial:
    assert run.trial is not None
    # One over its FLOPs is no candidate.
    objective = run.objective if run.status == "finished" else None
    return Trial(number=run.trial, settings=run.settings, objective=objective)


def _excess(run: StoredRun, flops: float) -> str | None:
    """Says by how much a run exceeded the FLOPs of the reference; None if it did not."""
    if run.flops_limit is None or flops <= run.flops_limit:
        return None
    return (
        f"took {flops:.6e} FLOPs, {flops / run.flops_limit - 1:.2%} more than the reference's "
        f"{run.flops_limit:.6e}; --retry-failed makes it again with fewer steps"
    )


def _fewer_steps(run: StoredRun) -> int:
    """Returns steps that bring a run below its limit, from what it took."""
    assert run.evaluation is not None
    assert run.flops_limit is not None
    prior: float = run.evaluation["prior_flops"]
    share: float = (run.flops_limit - prior) / (run.evaluation["flops"] - prior)
    return max(1, min(run.steps - 1, int(run.steps * share)))
