"""Results of one experiment in one SQLite file; ``docs/comparing-methods.md`` has the schema.

Every change is one transaction, on disk before the next run starts: a kill loses nothing that was
finished.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from drgr.errors import ConfigError, DataError
from drgr.experiments.experiment import FIGURES
from drgr.experiments.sameness import check_same

Stage = Literal["tuning", "final"]
Status = Literal["planned", "running", "finished", "failed", "over"]
"""``over``: finished, but with more FLOPs than the reference, so that it does not count."""

_VERSION = 1
_SCHEMA = """
CREATE TABLE experiment (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    stage TEXT NOT NULL,
    method TEXT NOT NULL,
    trial INTEGER,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    settings TEXT NOT NULL,
    config TEXT NOT NULL,
    steps INTEGER NOT NULL,
    flops_limit REAL,
    flops_predicted REAL,
    objective REAL,
    error TEXT,
    started TEXT,
    finished TEXT,
    environment TEXT,
    evaluation TEXT
);
CREATE TABLE figures (
    run INTEGER NOT NULL REFERENCES runs (id),
    name TEXT NOT NULL,
    value REAL,
    PRIMARY KEY (run, name)
);
CREATE TABLE domain_figures (
    run INTEGER NOT NULL REFERENCES runs (id),
    domain TEXT NOT NULL,
    name TEXT NOT NULL,
    value REAL,
    PRIMARY KEY (run, domain, name)
);
CREATE TABLE failures (
    run INTEGER NOT NULL REFERENCES runs (id),
    attempt INTEGER NOT NULL,
    status TEXT NOT NULL,
    error TEXT NOT NULL,
    finished TEXT NOT NULL,
    PRIMARY KEY (run, attempt)
);
"""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A run that is to be made.

    Attributes:
        name: Its name, and that of its directory.
        stage: ``"tuning"`` or ``"final"``.
        method: The variant's name.
        trial: Number of the trial; None in the final stage.
        seed: The run's seed.
        settings: Path -> value of what tuning set.
        config: The whole configuration, as JSON holds it.
        steps: Its training steps.
        flops_limit: What it must not exceed; None where nothing is enforced.
        flops_predicted: What it is expected to take at most.
    """

    name: str
    stage: Stage
    method: str
    trial: int | None
    seed: int
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    steps: int
    flops_limit: float | None
    flops_predicted: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """A run as the store has it; see :class:`Planned`.

    Attributes:
        status: How far it is.
        attempts: How often it was begun anew.
        objective: What tuning minimises; None outside tuning, or before it is known.
        error: Why it failed.
        started: When its attempt began, ISO 8601.
        finished: When it ended.
        environment: Versions, commit and hardware.
        evaluation: As in ``evaluation.json``.
    """

    name: str
    stage: Stage
    method: str
    trial: int | None
    seed: int
    status: Status
    attempts: int
    settings: dict[str, Any]
    config: dict[str, Any]
    steps: int
    flops_limit: float | None
    flops_predicted: float
    objective: float | None
    error: str | None
    started: str | None
    finished: str | None
    environment: dict[str, Any] | None
    evaluation: dict[str, Any] | None


_JSON = ("settings", "config", "environment", "evaluation")
_COLUMNS = tuple(StoredRun.__dataclass_fields__)


@final
class Store:
    """The results of one experiment. Use :meth:`open`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path, content: Mapping[str, Any]) -> "Iterator[Store]":
        """Opens the store of an experiment, or makes it; seeds and methods new to it are added.

        Args:
            path: The file.
            content: The experiment, as JSON holds it, with all that its runs depend on.

        Raises:
            ConfigError: If the file is the store of another experiment, or of this one before
                anything but new seeds and methods was changed.
            DataError: If it is no store.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with cls._connected(path, content) as store:
            with _as_data_error(path):
                _update(store._connection, content)
            yield store

    @classmethod
    @contextmanager
    def read(cls, path: Path, content: Mapping[str, Any]) -> "Iterator[Store]":
        """Opens a store that must exist and leaves it as it is; see :meth:`open`."""
        if not path.exists():
            raise ConfigError(f"{path} does not exist; run the comparison before it is exported")
        with cls._connected(path, content) as store:
            yield store

    @classmethod
    @contextmanager
    def _connected(cls, path: Path, content: Mapping[str, Any]) -> "Iterator[Store]":
        connection = sqlite3.connect(path)
        try:
            with _as_data_error(path):
                _create(connection, content)
                _check(path, connection, content)
            yield cls(connection)
        finally:
            connection.close()

    def plan(self, runs: Sequence[Planned]) -> None:
        """Adds runs, all or none; a name that is there already is left as it is."""
        rows = [
            (
                *(run.name, run.stage, run.method, run.trial, run.seed, "planned"),
                *(json.dumps(dict(run.settings)), json.dumps(dict(run.config)), run.steps),
                *(run.flops_limit, run.flops_predicted),
            )
            for run in runs
        ]
        with self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO runs (name, stage, method, trial, seed, status, settings, "
                "config, steps, flops_limit, flops_predicted) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                rows,
            )

    def runs(self, stage: Stage | None = None) -> list[StoredRun]:
        """Returns the runs of a stage, or all, in the order in which they were planned."""
        where, values = ("", ()) if stage is None else ("WHERE stage = ?", (stage,))
        rows = self._connection.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM runs {where} ORDER BY id", values
        )
        return [_stored(row) for row in rows]

    def run(self, name: str) -> StoredRun:
        """Returns one run."""
        row = self._connection.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM runs WHERE name = ?", (name,)
        ).fetchone()
        return _stored(row)

    def begin(self, name: str, *, now: str) -> None:
        """Says that a run was started; one that was running before keeps its attempt."""
        with self._connection:
            self._connection.execute(
                "UPDATE runs SET attempts = attempts + (status != 'running'), status = 'running', "
                "started = CASE status WHEN 'running' THEN started ELSE ? END WHERE name = ?",
                (now, name),
            )

    def fail(self, name: str, error: str, *, status: Status = "failed", now: str) -> None:
        """Keeps why a run did not succeed."""
        with self._connection:
            self._end(name, status=status, error=error, now=now)

    def finish(
        self,
        name: str,
        *,
        evaluation: Mapping[str, Any],
        environment: Mapping[str, Any] | None,
        objective: float | None,
        over: str | None,
        now: str,
    ) -> None:
        """Keeps what a run found, and why it does not count if it went over its FLOPs."""
        with self._connection:
            run = self._connection.execute(
                "UPDATE runs SET evaluation = ?, environment = ?, objective = ? WHERE name = ? "
                "RETURNING id",
                (json.dumps(evaluation), json.dumps(environment), objective, name),
            ).fetchone()[0]
            self._connection.executemany(
                "INSERT OR REPLACE INTO figures VALUES (?,?,?)",
                [(run, figure, evaluation.get(figure)) for figure in FIGURES],
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO domain_figures VALUES (?,?,?,?)",
                [
                    (run, domain, figure, value)
                    for domain, entries in evaluation["domains"].items()
                    for figure, value in entries.items()
                    if value is None or isinstance(value, int | float)
                ],
            )
            status: Status = "finished" if over is None else "over"
            self._end(name, status=status, error=over, now=now)

    def retry(self, name: str, *, config: Mapping[str, Any], steps: int) -> None:
        """Plans a run that did not succeed anew, at other steps if need be; keeps its errors."""
        with self._connection:
            self._connection.execute(
                "UPDATE runs SET status = 'planned', error = NULL, evaluation = NULL, "
                "objective = NULL, config = ?, steps = ? WHERE name = ?",
                (json.dumps(dict(config)), steps, name),
            )

    def failures(self) -> list[dict[str, Any]]:
        """Returns every attempt that did not succeed, also of runs that did later."""
        rows = self._connection.execute(
            "SELECT runs.name, method, stage, trial, seed, attempt, failures.status, "
            "failures.error, failures.finished FROM failures JOIN runs ON runs.id = failures.run "
            "ORDER BY runs.id, attempt"
        )
        names = [column[0] for column in rows.description]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _end(self, name: str, *, status: Status, error: str | None, now: str) -> None:
        run, attempts = self._connection.execute(
            "UPDATE runs SET status = ?, error = ?, finished = ? WHERE name = ? "
            "RETURNING id, attempts",
            (status, error, now, name),
        ).fetchone()
        if error is not None:
            self._connection.execute(
                "INSERT OR REPLACE INTO failures VALUES (?,?,?,?,?)",
                (run, attempts, status, error, now),
            )


def _create(connection: sqlite3.Connection, content: Mapping[str, Any]) -> None:
    """Makes the tables in a new file, all or none."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version or tables:
        return
    value = json.dumps(dict(content)).replace("'", "''")
    connection.executescript(
        f"BEGIN; {_SCHEMA} INSERT INTO experiment VALUES ('content', '{value}'); "
        f"PRAGMA user_version = {_VERSION}; COMMIT;"
    )


def _check(path: Path, connection: sqlite3.Connection, content: Mapping[str, Any]) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _VERSION:
        raise DataError(
            f"{path} is not a store of results that this version reads (it has version {version}, "
            f"not {_VERSION}); name another directory with --directory"
        )
    row = connection.execute("SELECT value FROM experiment WHERE key = 'content'").fetchone()
    check_same(path, before=json.loads(row[0]), now=json.loads(json.dumps(dict(content))))


def _update(connection: sqlite3.Connection, content: Mapping[str, Any]) -> None:
    with connection:
        connection.execute(
            "UPDATE experiment SET value = ? WHERE key = 'content'", (json.dumps(dict(content)),)
        )


def _stored(row: Sequence[Any]) -> StoredRun:
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in _JSON:
        values[name] = None if values[name] is None else json.loads(values[name])
    return StoredRun(**values)


@contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise DataError(
            f"{path} is not a store of results: {error}; name another directory with --directory"
        ) from error
