"""Reading a run directory, whole or interrupted."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from drgr.errors import ConfigError, DataError
from drgr.report._fields import Fields
from drgr.report._parsing import (
    parse_alarm,
    parse_environment,
    parse_evaluation,
    parse_train,
    parse_validation,
)
from drgr.report._protocol_parsing import parse_protocol
from drgr.report._protocol_records import ProtocolRecord
from drgr.report._records import (
    AlarmRecord,
    EvaluationRecord,
    RunRecord,
    TrainRecord,
    ValidationRecord,
)


@dataclass(slots=True)
class _Metrics:
    """The three kinds of lines of ``metrics.jsonl``, while it is being read."""

    train: list[TrainRecord] = field(default_factory=list)
    validation: list[ValidationRecord] = field(default_factory=list)
    alarms: list[AlarmRecord] = field(default_factory=list)
    rewritten: int = 0


def load_run(directory: Path) -> RunRecord:
    """Reads a run directory; executes nothing in it.

    An interrupted run is read as far as it goes: missing files, an incomplete last line of
    ``metrics.jsonl``, unreadable lines and values that are not finite are left out and written down
    in ``notes``. Lines of an unknown kind are ignored. After a resume, lines from before the resume
    that the resumed run wrote again are replaced by the later ones.

    Args:
        directory: a directory as described in ``docs/run-directory.md``.

    Returns:
        The run's configuration, environment, metrics and evaluation.

    Raises:
        ConfigError: if ``directory`` is not a directory, or holds none of a run's files.
        DataError: if one of the run's files exists but cannot be read as JSON.
    """
    _check_is_run(directory)
    notes: list[str] = []
    environment = Fields(
        _read_object(directory, "environment.json", notes), place="environment.json", notes=notes
    )
    config = _read_object(directory, "config.json", notes)
    metrics = _read_metrics(directory, notes)
    return RunRecord(
        name=directory.resolve().name,
        directory=directory,
        config=config or {},
        environment=parse_environment(environment),
        train=tuple(metrics.train),
        validation=tuple(metrics.validation),
        alarms=tuple(metrics.alarms),
        evaluation=_read_evaluation(directory, notes),
        protocol=_read_protocol(directory, notes),
        notes=tuple(notes),
    )


def _check_is_run(directory: Path) -> None:
    if not directory.is_dir():
        raise ConfigError(
            f"run directory must be an existing directory, got '{directory}'; "
            "give the directory that `drgr train` wrote"
        )
    expected = ("config.json", "metrics.jsonl", "evaluation.json")
    if not any((directory / name).is_file() for name in expected):
        raise ConfigError(
            f"run directory must hold at least one of {', '.join(expected)}, '{directory}' holds "
            "none; give the directory that `drgr train` wrote"
        )


def _read_evaluation(directory: Path, notes: list[str]) -> EvaluationRecord | None:
    if not (directory / "evaluation.json").is_file():
        return None
    content = _read_object(directory, "evaluation.json", notes)
    return parse_evaluation(Fields(content, place="evaluation.json", notes=notes))


def _read_protocol(directory: Path, notes: list[str]) -> ProtocolRecord | None:
    if not (directory / "protocol.json").is_file():
        return None
    content = _read_object(directory, "protocol.json", notes)
    return parse_protocol(Fields(content, place="protocol.json", notes=notes), notes)


def _read_object(directory: Path, name: str, notes: list[str]) -> Mapping[str, object] | None:
    path = directory / name
    if not path.is_file():
        notes.append(f"{name} is missing.")
        return None
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"'{path}' must be a JSON file, got {error}; "
            "restore it, or remove it to report on the rest of the run"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"'{path}' must hold a JSON object, got {type(content).__name__}; "
            "restore it, or remove it to report on the rest of the run"
        )
    return content


def _read_metrics(directory: Path, notes: list[str]) -> _Metrics:
    metrics = _Metrics()
    path = directory / "metrics.jsonl"
    if not path.is_file():
        notes.append("metrics.jsonl is missing: there are no curves.")
        return metrics
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _read_line(line, number=number, is_last=number == len(lines), into=metrics, notes=notes)
    if metrics.rewritten:
        notes.append(
            f"{metrics.rewritten} record(s) were written again after a resume; "
            "the later ones count."
        )
    metrics.alarms.sort(key=lambda alarm: alarm.step)
    return metrics


def _read_line(
    line: bytes, *, number: int, is_last: bool, into: _Metrics, notes: list[str]
) -> None:
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        if is_last:
            notes.append(
                f"The last line of metrics.jsonl (line {number}) is incomplete, as a killed run "
                "leaves it; left out."
            )
        else:
            notes.append(f"Line {number} of metrics.jsonl is not valid JSON; left out.")
        return
    fields = Fields(content, place=f"metrics.jsonl line {number}", notes=notes)
    kind = fields.text("kind")
    if kind not in ("train", "validation", "alarm"):
        return
    step = fields.number("step")
    if step is None:
        notes.append(f"Line {number} of metrics.jsonl has no step; left out.")
        return
    _add_record(fields, kind=kind, step=int(step), into=into)


def _add_record(fields: Fields, *, kind: str, step: int, into: _Metrics) -> None:
    if kind == "train":
        _forget_train_from(step, into)
        into.train.append(parse_train(fields, step=step))
    elif kind == "validation":
        _forget_validation_from(step, into)
        into.validation.append(parse_validation(fields, step=step))
    else:
        into.alarms.append(parse_alarm(fields, step=step))


def _forget_train_from(step: int, metrics: _Metrics) -> None:
    """A training step back restarts history: what an earlier attempt wrote beyond it is void."""
    if not metrics.train or metrics.train[-1].step < step:
        return
    before = len(metrics.train) + len(metrics.validation) + len(metrics.alarms)
    metrics.train = [record for record in metrics.train if record.step < step]
    # A validation or an alarm of this very step may already be the resumed run's.
    metrics.validation = [record for record in metrics.validation if record.step <= step]
    metrics.alarms = [record for record in metrics.alarms if record.step <= step]
    metrics.rewritten += before - (
        len(metrics.train) + len(metrics.validation) + len(metrics.alarms)
    )


def _forget_validation_from(step: int, metrics: _Metrics) -> None:
    if not metrics.validation or metrics.validation[-1].step < step:
        return
    kept = [record for record in metrics.validation if record.step < step]
    metrics.rewritten += len(metrics.validation) - len(kept)
    metrics.validation = kept
