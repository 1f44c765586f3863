"""From the entries of an experiment file to the whole configuration of each method."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from drgr.errors import ConfigError
from drgr.experiments.experiment import Experiment, Method, SearchSpace
from drgr.training import RunConfig, override, parse_config

_Built = TypeVar("_Built")
# What the machine sets for each run itself.
_SET_BY_MACHINE = {"training.seed": "seeds", "name": "name and the names of methods"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method with one combination of swept values; without a sweep, the method.

    Attributes:
        name: Its name in results.
        method: The method's name in the file.
        settings: What the file sets for it, common settings left out.
        config: Its configuration, but for the seed and the steps that it can afford.
        space: What tuning searches.
        prior_flops: FLOPs of earlier runs that count as its own.
    """

    name: str
    method: str
    settings: tuple[str, ...]
    config: RunConfig
    space: SearchSpace
    prior_flops: float

    def tuned(self, settings: Mapping[str, Any]) -> RunConfig:
        """Returns the configuration with values that a trial proposes, by path.

        Raises:
            ConfigError: If they are not valid.
        """
        changes = [assignment(path, value) for path, value in settings.items()]
        return named_error(self.name, lambda: override(self.config, changes))


def build_variants(
    experiment: Experiment, *, load: Callable[[str], RunConfig]
) -> tuple[Variant, ...]:
    """Returns every method of an experiment with every swept value, in the order of the file.

    Args:
        experiment: What the file says.
        load: Finds a configuration by recipe name, file or ``package.module:function``.

    Raises:
        ConfigError: If a recipe is unknown, or settings of a method are not valid.
    """
    return tuple(
        _variant(experiment, name, method, swept, load)
        for name, method in experiment.methods.items()
        for swept in _combinations(experiment.sweep)
    )


def assignment(path: str, value: Any) -> str:
    """Returns ``path=value`` as ``override`` takes it."""
    return f"{path}={value if isinstance(value, str) else json.dumps(value)}"


def _variant(
    experiment: Experiment,
    name: str,
    method: Method,
    swept: Mapping[str, Any],
    load: Callable[[str], RunConfig],
) -> Variant:
    own = (*method.settings, *(assignment(path, value) for path, value in swept.items()))
    for setting in (*experiment.common, *own):
        path = setting.partition("=")[0].strip()
        if path in _SET_BY_MACHINE:
            raise ConfigError(
                f"method {name!r}: {path} cannot be set in an experiment, got {setting!r}; it "
                f"comes from {_SET_BY_MACHINE[path]}"
            )
    base = experiment.base if method.recipe is None else method.recipe
    tuning = experiment.tuning
    space: SearchSpace = {}
    if tuning is not None:
        space = {**tuning.space, **tuning.methods.get(name, {})}
    return Variant(
        name=name + _label(swept),
        method=name,
        settings=own,
        config=named_error(name, lambda: override(_base(base, load), [*experiment.common, *own])),
        space=space,
        prior_flops=sum(_flops_of(name, Path(path)) for path in method.prior),
    )


def _flops_of(name: str, path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["flops"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"method {name!r}: prior must name evaluation.json files of runs, got {path}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _base(base: str | dict[str, Any], load: Callable[[str], RunConfig]) -> RunConfig:
    return load(base) if isinstance(base, str) else parse_config(base)


def named_error(name: str, build: Callable[[], _Built]) -> _Built:
    """Returns what ``build`` does; names the method in its ``ConfigError``."""
    try:
        return build()
    except ConfigError as error:
        raise ConfigError(f"method {name!r}: {error}") from error


def _combinations(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns every way to choose one value of each swept setting."""
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _label(swept: Mapping[str, Any]) -> str:
    if not swept:
        return ""
    shown = [assignment(path.rpartition(".")[2], value) for path, value in swept.items()]
    return f" [{', '.join(shown)}]"
