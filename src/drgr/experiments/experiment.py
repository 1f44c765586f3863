"""What an experiment file holds: methods, seeds, and what is equal for all of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from drgr.errors import ConfigError
from drgr.training.field_types import STRICT, Count, Positive

FIGURES = (
    "worst_bits_per_byte",
    "mean_bits_per_byte",
    "flops",
    "outer_flops",
    "seconds",
    "tokens_per_second",
    "effective_domains",
)
"""The numbers of an evaluation that stand for a whole run."""


def as_settings(value: Any) -> Any:
    """Turns ``{path: value}`` or ``["path=value"]`` into assignments as ``--set`` takes them."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        # A text is YAML already: 1e-3, which YAML takes for text, and names alike.
        return tuple(
            f"{path}={entry if isinstance(entry, str) else json.dumps(entry)}"
            for path, entry in value.items()
        )
    if isinstance(value, str):
        raise ValueError("settings must be a list of path=value, or a table of paths and values")
    return value


Settings = Annotated[tuple[str, ...], BeforeValidator(as_settings)]


class Method(BaseModel):
    """One method: a recipe of its own where it needs one, and settings."""

    model_config = STRICT

    recipe: str | None = None
    prior: tuple[str, ...] = ()
    """Evaluations of earlier runs that the method needs, whose FLOPs count as its own."""
    settings: Settings = ()


def as_method(value: Any) -> Any:
    """Takes settings alone, or with the entries ``recipe`` and ``prior`` among them."""
    if isinstance(value, Mapping):
        own = {key: value[key] for key in ("recipe", "prior") if key in value}
        return {**own, "settings": {key: value[key] for key in value if key not in own}}
    return {"settings": value}


def as_seeds(value: Any) -> Any:
    """Turns a number of seeds into 0, 1, and so on."""
    return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_seeds)]


class Uniform(BaseModel):
    """Numbers between two bounds."""

    model_config = STRICT

    kind: Literal["uniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _check_order(self) -> "Uniform":
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        return self


class LogUniform(BaseModel):
    """Positive numbers between two bounds, whose logarithm is uniform."""

    model_config = STRICT

    kind: Literal["log-uniform"]
    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _check_order(self) -> "LogUniform":
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        return self


class Categorical(BaseModel):
    """One of several values."""

    model_config = STRICT

    kind: Literal["categorical"]
    choices: Annotated[tuple[Any, ...], Field(min_length=1)]


SearchSpace = dict[str, Annotated[Uniform | LogUniform | Categorical, Field(discriminator="kind")]]
"""Dotted path of a setting -> where its values are drawn from."""


def as_objective(value: Any) -> Any:
    """Turns the name of a figure into a sum with one term."""
    return {value: 1.0} if isinstance(value, str) else value


class Tuning(BaseModel):
    """Trials before the final runs: the same number for every method, on the validation split."""

    model_config = STRICT

    trials: Count
    """Of each method."""
    space: SearchSpace = {}
    """Searched for every method."""
    methods: dict[str, SearchSpace] = {}
    """Searched for one method more, by its name."""
    objective: Annotated[dict[str, float], BeforeValidator(as_objective)] = {
        "worst_bits_per_byte": 1.0
    }
    """Figure of the validation split to minimise, or weights of a sum of them."""
    seed: Annotated[int, Field(ge=0)] = 1000
    """Of every trial's run and of the sampler; none of the final seeds."""
    at_once: Count = 1
    """Trials of a method that are proposed together, before any of them is known."""
    steps: Count | None = None
    """Steps of the reference in a trial; by default those of a final run."""
    windows: Count | None = None
    """Sequences of each domain in a trial's evaluation; by default ``training.test_windows``."""


class Experiment(BaseModel):
    """Methods times seeds, from one file."""

    model_config = STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    base: str | dict[str, Any]
    """A recipe, a configuration file or ``package.module:function``; or the configuration."""
    common: Settings = ()
    """Settings of every method, which a method's own come after."""
    methods: dict[str, Annotated[Method, BeforeValidator(as_method)]]
    seeds: Seeds
    """How many, counted from 0, or which."""
    reference: str
    """The method whose total FLOPs no other may exceed."""
    flops: Literal["cut", "fill", "free"] = "cut"
    """``cut`` takes steps from a method that costs more than the reference, ``fill`` also gives
    steps to one that costs less, ``free`` compares at the steps that the settings say."""
    sweep: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Settings with several values: every method runs with each combination."""
    tuning: Tuning | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the intervals."""

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        for problem in _problems(self):
            raise ValueError(problem)
        return self


def _problems(experiment: Experiment) -> Sequence[str]:
    """Names what does not fit together."""
    names, seeds = list(experiment.methods), experiment.seeds
    checks = [
        (not names, "methods must name at least one method, got none"),
        (not seeds, "seeds must be a number above 0 or a list of seeds, got none"),
        (len(set(seeds)) < len(seeds), f"seeds must differ from each other, got {list(seeds)}"),
        (
            experiment.reference not in names,
            f"reference must be one of the methods {names}, got {experiment.reference!r}",
        ),
    ]
    if experiment.tuning is not None:
        checks += _tuning_checks(experiment, experiment.tuning)
    return [message for is_wrong, message in checks if is_wrong]


def _tuning_checks(experiment: Experiment, tuning: Tuning) -> list[tuple[bool, str]]:
    names = list(experiment.methods)
    unknown = [name for name in tuning.methods if name not in names]
    bare = [name for name in names if not (tuning.space or tuning.methods.get(name))]
    figures = [name for name in tuning.objective if name not in FIGURES]
    return [
        (bool(unknown), f"tuning.methods must be among the methods {names}, got {unknown}"),
        (
            bool(bare),
            f"tuning has nothing to search for the methods {bare}; give tuning.space, or "
            f"tuning.methods an entry for each, or leave tuning out",
        ),
        (bool(figures), f"tuning.objective must be of the figures {FIGURES}, got {figures}"),
        (not tuning.objective, "tuning.objective must name at least one figure, got none"),
        (
            tuning.seed in experiment.seeds,
            f"tuning.seed must be none of the final seeds {list(experiment.seeds)}, got "
            f"{tuning.seed}; the final runs are to be fresh",
        ),
    ]


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


def read_experiment(path: Path) -> Experiment:
    """Reads an experiment from a ``.yaml``, ``.yml`` or ``.json`` file.

    Raises:
        ConfigError: If the file is missing, cannot be parsed, or is not a valid experiment.
    """
    if path.suffix not in _PARSERS:
        raise ConfigError(f"experiment {path} must be a file with the suffix {', '.join(_PARSERS)}")
    try:
        content = _PARSERS[path.suffix](path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"experiment {path} does not exist; name a YAML or JSON file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"experiment {path} cannot be read: {error}; repair it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"experiment {path} must hold a table, got {content!r}")
    return parse_experiment(content, where=f"experiment {path}")


def parse_experiment(content: Mapping[str, Any], *, where: str = "experiment") -> Experiment:
    """Validates what an experiment file holds.

    Raises:
        ConfigError: With one line for each problem.
    """
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        lines = [f"{where}: {_describe(dict(problem))}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _describe(problem: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = ", ".join(Experiment.model_fields)
        return f"{path} is not an entry of an experiment; the entries are {known}"
    value = problem["input"]
    shown = "" if isinstance(value, (dict, BaseModel)) else f", got {value!r}"
    return f"{path}: {message}{shown}" if path else message
