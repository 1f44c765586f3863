"""The full configuration of a run: frozen, validated, written to and read from plain files.

Components never see these classes; ``build`` turns them into objects.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from drgr.errors import ConfigError
from drgr.training.field_types import STRICT, Count, NotNegative, Positive, Share
from drgr.training.outer_config import OuterConfig
from drgr.training.routing_config import (
    BudgetConfig,
    ControllerConfig,
    NoControllerConfig,
    QuantileConfig,
    RoutingConfig,
    SignBiasConfig,
    TrafficConfig,
)

__all__ = [
    "BudgetConfig",
    "ControllerConfig",
    "DataConfig",
    "NoControllerConfig",
    "OuterConfig",
    "PretrainedModelConfig",
    "QuantileConfig",
    "RobustnessConfig",
    "RoutingConfig",
    "RunConfig",
    "SignBiasConfig",
    "TinyModelConfig",
    "TrafficConfig",
    "TrainingConfig",
    "known_keys",
    "override",
    "parse_config",
    "read_config",
]

# Settings that change what is written and shown, never what is computed: a run may be resumed with
# other values of them.
_PRESENTATION = ("log_every", "checkpoint_every", "keep")


JsonPath = Annotated[str, Field(pattern=r"\.json$")]


class DataConfig(BaseModel):
    """What is read and what is drawn."""

    model_config = STRICT

    corpus: str = "drgr-8"
    """A built-in corpus, or the path of a domain file."""
    vocabulary_size: Annotated[int, Field(ge=258)] = 2048
    """Size of the byte-level BPE tokenizer that is trained on the corpus."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer by name or path, instead of a trained one."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    skip_unreadable: bool = False
    """Whether files that are not text are left out (and listed) instead of stopping the run."""
    sampling: dict[str, NotNegative] | Literal["natural", "uniform"] | JsonPath = "natural"
    """Share of each domain in the training batches; ``natural`` is the weight that a domain file
    gives it, else its share of the tokens. A path ending in ``.json`` is the
    ``evaluation.json`` of a run, whose average mixture is taken."""
    unseen: tuple[str, ...] = ()
    """Domains that training has no part of: not drawn, not weighed, not in any held-out pass. The
    final evaluation reports them apart from the others. A share in ``sampling`` counts for
    nothing."""

    @model_validator(mode="after")
    def _check_unseen(self) -> "DataConfig":
        if len(set(self.unseen)) < len(self.unseen):
            raise ValueError(f"unseen must name each domain once, got {list(self.unseen)}")
        return self


class TinyModelConfig(BaseModel):
    """A small random model."""

    model_config = STRICT

    kind: Literal["tiny-olmoe", "tiny-qwen3-moe"] = "tiny-olmoe"
    hidden_size: Count = 192
    expert_size: Count = 192
    num_layers: Count = 4
    num_heads: Count = 4
    num_experts: Count = 8


class PretrainedModelConfig(BaseModel):
    """A checkpoint that transformers can load."""

    model_config = STRICT

    kind: Literal["pretrained"]
    path: str
    """A local directory, or a hub name where there is a network."""


class RobustnessConfig(BaseModel):
    """The adversary over domains."""

    model_config = STRICT

    groups: Literal["domains", "experts"] = "domains"
    """What the adversary weighs: domains, or the experts of each layer by the tokens that they
    serve. Experts have training losses in nats, and their weights go to the objective."""
    apply_to: Literal["nothing", "objective", "sampling"] = "sampling"
    """Where the adversary's weights go; with ``nothing`` they are only reported."""
    divergence: Literal["kl", "chi-square"] = "kl"
    penalty: Positive | None = 0.3
    """Strength of the penalised adversary, in the unit of the losses; smaller is stronger."""
    radius: NotNegative | None = None
    """Radius of the constrained adversary; give either this or ``penalty``."""
    losses: Literal["validation", "train"] = "validation"
    unit: Literal["bits-per-byte", "nats-per-token"] = "bits-per-byte"
    """Token means either way; bits per byte makes tokenizations of different domains comparable."""
    reference: Path | None = None
    """File of reference losses in nats per token, or a previous run's evaluation: the adversary
    then sees the excess over them."""
    clip_excess: bool = False
    """Whether a loss below its reference counts as equal to it, as in DoReMi."""
    nominal: Literal["uniform", "sampling", "previous"] = "uniform"
    """What the adversary starts from; from its ``previous`` weights, first the base sampling, the
    penalised KL adversary takes the exponentiated-gradient steps of group DRO, of size 1 /
    ``penalty``."""
    uniform_share: Share = 0.0
    """Share of the uniform distribution that is mixed into the adversary's weights."""
    smoothing: Share = 0.7
    """Share of the old estimate that an update of a domain's loss keeps."""
    begin: Annotated[int, Field(ge=0)] = 20
    """Steps before the adversary acts, at the nominal weights: the losses of an untrained model say
    nothing of its domains."""
    every: Count = 10
    """Steps between updates of the weights."""
    windows: Count = 2
    """Held-out sequences of each domain at an update."""
    alarm_below: Positive = 1.5
    """Effective number of domains below which the weights are reported as nearly one-hot."""

    @model_validator(mode="after")
    def _check_strength(self) -> "RobustnessConfig":
        if (self.penalty is None) == (self.radius is None):
            raise ValueError(
                f"exactly one of penalty and radius must be set, got penalty {self.penalty} and "
                f"radius {self.radius}; set the other to null"
            )
        return self


class TrainingConfig(BaseModel):
    """Optimisation, precision, and how often things are written."""

    model_config = STRICT

    steps: Count = 300
    batch_size: Count = 16
    """Sequences per step over all processes and micro-batches."""
    accumulation: Count = 1
    """Micro-batches per step."""
    learning_rate: Positive = 2e-3
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step, as a share of the highest."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: NotNegative = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    clip_norm: Positive = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: Count = 10
    evaluate_every: Count = 100
    evaluation_windows: Count = 8
    """Sequences of each domain in an evaluation on the validation split."""
    test_windows: Count = 64
    """Sequences of each domain in the final evaluation on the test split."""
    checkpoint_every: Count = 100
    keep: Count = 2


class RunConfig(BaseModel):
    """Everything that determines a run."""

    model_config = STRICT

    name: str = "run"
    data: DataConfig = DataConfig()
    model: TinyModelConfig | PretrainedModelConfig = Field(
        default=TinyModelConfig(), discriminator="kind"
    )
    routing: RoutingConfig = RoutingConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    outer: OuterConfig = OuterConfig()
    training: TrainingConfig = TrainingConfig()

    def to_json(self) -> str:
        """Returns the configuration as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def fingerprint(self, data: Any) -> str:
        """Returns a hash of all that the course of training depends on.

        Args:
            data: What tells the corpus and its sampling apart, as JSON can hold it. It stands for
                the corpus's name or path, which may change.
        """
        content = self.model_dump(
            mode="json",
            exclude={"name": True, "data": {"corpus"}, "training": set(_PRESENTATION)},
        )
        encoded = json.dumps([content, data], sort_keys=True).encode()
        return hashlib.sha256(encoded).hexdigest()[:16]


def parse_config(content: Mapping[str, Any]) -> RunConfig:
    """Validates a nested mapping.

    Raises:
        ConfigError: With one line for each problem: the dotted key, its value and what to do.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        problems = [_describe(dict(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


# JSON is not quite a part of YAML: an escaped pair of surrogates is two characters there.
_PARSERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}


def read_config(path: Path) -> RunConfig:
    """Reads a configuration from a ``.json``, ``.toml``, ``.yaml`` or ``.yml`` file.

    Raises:
        ConfigError: If the file is missing, cannot be parsed, or is not a valid configuration.
    """
    try:
        content = _PARSERS.get(path.suffix, yaml.safe_load)(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist; name a recipe or a file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}; repair it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"configuration {path} must hold a table of settings, got {content!r}")
    return parse_config(content)


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Returns ``config`` with ``path=value`` assignments applied, such as ``training.steps=50``.

    Values are read as YAML: ``null``, ``[1, 2]`` and ``{a: 1}`` work. Assigning a whole table
    replaces it, which is how one kind of model or controller is exchanged for another. Entries of a
    list are addressed by their number: ``routing.losses.0.coefficient=0.1``.

    Raises:
        ConfigError: If an assignment has no ``=``, or the result is not valid.
    """
    content: dict[str, Any] = config.model_dump(mode="json")
    table: dict[str, Any] | list[Any]
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"setting must have the form path=value, got {assignment!r}")
        *parents, key = path.strip().split(".")
        table = content
        for depth, parent in enumerate(parents):
            child = _entry(table, parent)
            if not isinstance(child, dict | list):
                raise ConfigError(_no_table(".".join(parents[: depth + 1]), assignment))
            table = child
        if not isinstance(table, dict):
            raise ConfigError(_no_table(path.strip(), assignment))
        table[key] = _parse_value(value, assignment)
    return parse_config(content)


def _entry(table: dict[str, Any] | list[Any], key: str) -> Any:
    """Returns what a table or list holds at a key; ``None`` where there is nothing."""
    if isinstance(table, dict):
        return table.get(key)
    return table[int(key)] if key.isdecimal() and int(key) < len(table) else None


def _parse_value(value: str, assignment: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the value of setting {assignment!r} is not YAML: {reason}; put text into quotes"
        ) from error


def _no_table(path: str, assignment: str) -> str:
    if path not in known_keys():
        return _unknown_key(path)
    return f"{path} holds one value, no settings of its own, got {assignment!r}; set it as a whole"


def _describe(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return _unknown_key(".".join(_without_tags(location)))
    path = ".".join(_without_tags(location)) or "configuration"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem["input"]
    shown = f", got {value!r}" if not isinstance(value, (dict, BaseModel)) else ""
    return f"{path}: {message}{shown}"


def _without_tags(location: Sequence[str]) -> list[str]:
    """Drops what the validation library puts into a path to tell the branches of a union apart.

    That is the ``kind`` of an alternative, or a type such as ``dict[str, float]``.
    """
    kept: list[str] = []
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        is_branch = any(part in _kinds(model) for model in models) or "[" in part
        if part.isdecimal() and models:
            kept.append(part)  # The number of an entry: the entry is still to be told.
        elif fields or not is_branch:
            kept.append(part)
            models = [child for field in fields for child in _model_types(field.annotation)]
    return kept


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    """Returns the values of ``kind`` that choose this alternative; none where it is not one."""
    kind = model.model_fields.get("kind")
    return () if kind is None else get_args(kind.annotation)


def _unknown_key(path: str) -> str:
    nearest = difflib.get_close_matches(path, known_keys(), n=1, cutoff=0.0)[0]
    return f"{path} is not a setting; the nearest is {nearest}"


def known_keys() -> list[str]:
    """Returns the dotted path of every setting, of every alternative; entries of lists are 0."""
    return sorted(set(_keys_of(RunConfig, "")))


def _keys_of(model: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        keys.append(path)
        # The first entry stands for all of a list.
        inner = f"{path}.0" if get_origin(field.annotation) is tuple else path
        for child in _model_types(field.annotation):
            keys.extend(_keys_of(child, f"{inner}."))
    return keys


def _model_types(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _model_types(part)]
