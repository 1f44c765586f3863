"""Which runs a comparison consists of: their configurations, and the steps that each can afford."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from drgr.data import Corpus, prepare_corpus
from drgr.experiments.compute import RunCosts, affordable_steps, measure_costs
from drgr.experiments.experiment import Experiment
from drgr.experiments.methods import Variant, assignment, named_error
from drgr.experiments.runs import slug
from drgr.experiments.store import Planned, StoredRun
from drgr.experiments.tuning import Trial
from drgr.training import RunConfig, override, parse_config, resolve_cache


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An experiment with its methods and its directory.

    Attributes:
        experiment: What the file says.
        variants: Its methods.
        directory: Where it writes.
        cache: Where corpora are; None for the default.
        program: The command line of drgr, whose ``train`` and ``evaluate`` make the runs.
    """

    experiment: Experiment
    variants: tuple[Variant, ...]
    directory: Path
    cache: Path | None
    program: tuple[str, ...] = (sys.executable, "-m", "drgr")

    @property
    def store(self) -> Path:
        """The file of results."""
        return self.directory / "results.sqlite"

    @property
    def content(self) -> dict[str, Any]:
        """What the results depend on, as JSON holds it."""
        # A recipe may change while the file that names it does not.
        configs = {one.name: one.config.model_dump(mode="json") for one in self.variants}
        return {**self.experiment.model_dump(mode="json"), "configurations": configs}

    @property
    def reference(self) -> Variant:
        """The variant that sets the FLOPs; with a sweep, that of the first values."""
        name = self.experiment.reference
        return next(variant for variant in self.variants if variant.method == name)


@final
class Planner:
    """Turns methods, seeds and trials into runs; each corpus and model is opened once."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._corpora: dict[str, Corpus] = {}
        self._costs: dict[str, RunCosts] = {}

    def limit(self, settings: Mapping[str, Any], *, steps: int | None) -> float:
        """Returns the FLOPs of the reference, at the least.

        Args:
            settings: What tuning found for it.
            steps: Its steps; by default those that it is configured with.
        """
        reference = self._comparison.reference
        config = reference.tuned(settings)
        costs = self._cost(reference.name, config)
        return reference.prior_flops + costs.least(steps or config.training.steps)

    def final(
        self, variant: Variant, settings: Mapping[str, Any], *, seed: int, limit: float
    ) -> Planned:
        """Returns a run of the final stage.

        Raises:
            ConfigError: If settings are not valid, or not one step fits into the limit.
        """
        config = variant.tuned(settings)
        steps = self._steps(variant, config, wanted=config.training.steps, limit=limit)
        return Planned(
            name=f"{self._stem(variant)}-seed-{seed}",
            stage="final",
            method=variant.name,
            trial=None,
            seed=seed,
            settings=settings,
            config=_as_json(variant, config, seed=seed, steps=steps),
            steps=steps,
            flops_limit=self._bound(variant, limit),
            flops_predicted=variant.prior_flops + self._cost(variant.name, config).most(steps),
        )

    def repeated(self, variant: Variant, run: StoredRun, *, seed: int) -> Planned:
        """Returns a run of the final stage again with another seed, at the same steps and limit."""
        return Planned(
            name=f"{self._stem(variant)}-seed-{seed}",
            stage="final",
            method=variant.name,
            trial=None,
            seed=seed,
            settings=run.settings,
            config=_as_json(variant, parse_config(run.config), seed=seed, steps=run.steps),
            steps=run.steps,
            flops_limit=run.flops_limit,
            flops_predicted=run.flops_predicted,
        )

    def trial(self, variant: Variant, trial: Trial, *, limit: float) -> Planned:
        """Returns a run of the tuning stage.

        Raises:
            ConfigError: See :meth:`final`.
        """
        tuning = self._comparison.experiment.tuning
        assert tuning is not None
        # The test split is for final runs.
        config = override(variant.tuned(trial.settings), ["training.test_windows=1"])
        wanted = tuning.steps or config.training.steps
        steps = self._steps(variant, config, wanted=wanted, limit=limit)
        return Planned(
            name=f"{self._stem(variant)}-trial-{trial.number}",
            stage="tuning",
            method=variant.name,
            trial=trial.number,
            seed=tuning.seed,
            settings=trial.settings,
            config=_as_json(variant, config, seed=tuning.seed, steps=steps),
            steps=steps,
            flops_limit=self._bound(variant, limit),
            flops_predicted=variant.prior_flops + self._cost(variant.name, config).most(steps),
        )

    def _stem(self, variant: Variant) -> str:
        return f"{self._comparison.variants.index(variant)}-{slug(variant.name)}"

    def _bound(self, variant: Variant, limit: float) -> float | None:
        is_free = self._comparison.experiment.flops == "free"
        return None if is_free or variant == self._comparison.reference else limit

    def _steps(self, variant: Variant, config: RunConfig, *, wanted: int, limit: float) -> int:
        bound = self._bound(variant, limit)
        costs = self._cost(variant.name, config)  # also where it is free: it checks the settings
        if bound is None:
            return wanted
        may_grow = self._comparison.experiment.flops == "fill"
        left = bound - variant.prior_flops
        return affordable_steps(variant.name, costs, wanted=wanted, limit=left, may_grow=may_grow)

    def _cost(self, name: str, config: RunConfig) -> RunCosts:
        key = _cost_key(config)
        if key not in self._costs:
            self._costs[key] = named_error(
                name, lambda: measure_costs(config, self._corpus(config))
            )
        return self._costs[key]

    def _corpus(self, config: RunConfig) -> Corpus:
        data = config.data
        key = json.dumps([data.corpus, data.vocabulary_size, data.tokenizer, data.skip_unreadable])
        if key not in self._corpora:
            self._corpora[key] = prepare_corpus(
                data.corpus,
                cache=resolve_cache(self._comparison.cache),
                vocabulary_size=data.vocabulary_size,
                tokenizer=data.tokenizer,
                skip_unreadable=data.skip_unreadable,
            )
        return self._corpora[key]


def _cost_key(config: RunConfig) -> str:
    """Returns what the cost of a step depends on: not the rates and schedules of training."""
    training = {"batch_size", "accumulation", "gradient_checkpointing"}
    return config.model_dump_json(exclude={"name": True, "training": True}) + json.dumps(
        config.training.model_dump(include=training)
    )


def _as_json(variant: Variant, config: RunConfig, *, seed: int, steps: int) -> dict[str, Any]:
    changed = override(
        config,
        [
            assignment("name", json.dumps(variant.name)),
            f"training.seed={seed}",
            f"training.steps={steps}",
        ],
    )
    return changed.model_dump(mode="json")
