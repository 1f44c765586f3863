"""Trials: what to try next, and which was best. Optuna proposes; the store keeps everything.

A study is rebuilt from the stored trials at every proposal, so that a comparison that was killed
proposes what it would have proposed, and at any number of processes.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, assert_never, final

from drgr.errors import ConfigError
from drgr.experiments.experiment import (
    Categorical,
    LogUniform,
    SearchSpace,
    Tuning,
    Uniform,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Trials drawn at random before the sampler learns from them, as a share of all.
_RANDOM_SHARE = 1 / 3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial of one method.

    Attributes:
        number: Counted from 0.
        settings: Path -> value.
        objective: What it reached; None if it failed.
    """

    number: int
    settings: Mapping[str, Any]
    objective: float | None


def check_tuning_is_installed() -> None:
    """Raises ``ConfigError`` where Optuna is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("tuning needs optuna; install it with pip install 'drgr[compare]'")


def proposals(tuning: Tuning, space: SearchSpace, trials: Sequence[Trial]) -> list[Trial]:
    """Returns the next trials of a method, after all that were proposed have ended; none at last.

    They depend on the tuning's seed and on earlier trials alone.
    """
    count = min(tuning.at_once, tuning.trials - len(trials))
    numbers = range(len(trials), len(trials) + count)
    return [
        Trial(number=number, settings=_propose(tuning, space, trials, number), objective=None)
        for number in numbers
    ]


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Returns the trial with the least objective, the first of equals; None if all failed."""
    known = [trial for trial in trials if trial.objective is not None]
    return min(known, key=lambda trial: trial.objective or 0.0) if known else None


def objective_of(weights: Mapping[str, float], evaluation: Mapping[str, Any]) -> float | None:
    """Returns the weighted sum of figures that tuning minimises; None if it is not finite."""
    values = [evaluation[figure] for figure in weights]
    if any(value is None for value in values):
        return None
    total = math.fsum(
        weight * value for weight, value in zip(weights.values(), values, strict=True)
    )
    return total if math.isfinite(total) else None


def _propose(
    tuning: Tuning, space: SearchSpace, trials: Sequence[Trial], number: int
) -> dict[str, Any]:
    import optuna  # noqa: PLC0415 - an optional dependency
    from optuna.trial import TrialState, create_trial  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {path: _distribution(entry) for path, entry in space.items()}
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(
            # Trials proposed together must differ.
            seed=tuning.seed + number,
            n_startup_trials=max(1, round(_RANDOM_SHARE * tuning.trials)),
        )
    )
    for trial in trials:
        failed = trial.objective is None
        study.add_trial(
            create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                params=_indexed(space, trial.settings),
                distributions=distributions,
                value=trial.objective,
            )
        )
    return _named(space, study.ask(distributions).params)


def _distribution(entry: Uniform | LogUniform | Categorical) -> "BaseDistribution":
    from optuna.distributions import (  # noqa: PLC0415 - an optional dependency
        CategoricalDistribution,
        FloatDistribution,
    )

    match entry:
        case Uniform(low=low, high=high):
            return FloatDistribution(low, high)
        case LogUniform(low=low, high=high):
            return FloatDistribution(low, high, log=True)
        case Categorical(choices=choices):
            # By their number: a choice may be a list or a table, which Optuna would warn of.
            return CategoricalDistribution(range(len(choices)))
        case _:
            assert_never(entry)


def _indexed(space: SearchSpace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces categorical values by their number."""
    return {
        path: list(entry.choices).index(settings[path])
        if isinstance(entry, Categorical)
        else settings[path]
        for path, entry in space.items()
    }


def _named(space: SearchSpace, values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces numbers of categorical values by the values."""
    return {
        path: entry.choices[values[path]] if isinstance(entry, Categorical) else values[path]
        for path, entry in space.items()
    }
