"""One run as files and commands: what is left to do for it, and what it left."""

import datetime
import json
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from drgr.experiments.processes import Command, Job
from drgr.experiments.store import StoredRun
from drgr.training import RunDirectory, remove_run, write_json

_ERROR_LENGTH = 2000


def now() -> str:
    """Returns the time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def slug(name: str) -> str:
    """Returns what a file may be called for a method's name; not unique."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:40].lower()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Where the runs of a comparison are.

    Attributes:
        directory: The comparison's directory.
        cache: Where corpora are; None for the default.
        windows: Method -> sequences of each domain in the evaluation of a trial.
        program: The command line of drgr.
    """

    directory: Path
    cache: Path | None
    windows: Mapping[str, int]
    program: tuple[str, ...]

    def run(self, name: str) -> RunDirectory:
        """The directory of a run."""
        return RunDirectory(self.directory / "runs" / name)

    def job(self, run: StoredRun) -> Job:
        """Returns the commands that make a run, or what is left of it."""
        return Job(
            name=run.name,
            lock=self.directory / "locks" / run.name,
            log=self.directory / "logs" / f"{run.name}.log",
            commands=lambda: self._commands(run),
        )

    def read(self, run: StoredRun) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the evaluation that counts and the environment of a run that has ended.

        Raises:
            OSError: If a file is not there.
            ValueError: If it does not hold JSON.
        """
        found = self.run(run.name)
        path = self._validation(run.name) if run.stage == "tuning" else found.evaluation
        evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return evaluation, json.loads(found.environment.read_text(encoding="utf-8"))

    def error(self, run: StoredRun, code: int) -> str:
        """Returns why the last command of a run failed: its message, or the end of its output."""
        path = self.directory / "logs" / f"{run.name}.log"
        output = path.read_text(encoding="utf-8", errors="replace").strip()
        start = output.rfind("drgr: ")
        said = output[start:] if start >= 0 else output[-_ERROR_LENGTH:]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}: {said}" if said else how

    def remove(self, name: str) -> None:
        """Removes what a run left, so that it begins anew."""
        remove_run(self.run(name))

    def slim(self, run: StoredRun) -> None:
        """Removes what nobody reads again: the checkpoints and the model of a trial."""
        if run.stage == "tuning":
            found = self.run(run.name)
            shutil.rmtree(found.checkpoints, ignore_errors=True)
            shutil.rmtree(found.model, ignore_errors=True)

    def _validation(self, name: str) -> Path:
        return self.run(name).path / "validation.json"

    def _commands(self, run: StoredRun) -> list[Command]:
        found = self.run(run.name)
        left: list[Command] = []
        if not found.evaluation.exists():
            left.append(self._train(run, found))
        if run.stage == "tuning" and not self._validation(run.name).exists():
            left.append(self._validate(run, found))
        return left

    def _train(self, run: StoredRun, found: RunDirectory) -> Command:
        is_begun = found.config.exists()
        if not is_begun:
            # A kill before the first file leaves a directory that no run could be resumed from.
            shutil.rmtree(found.path, ignore_errors=True)
        config = self.directory / "configs" / f"{run.name}.json"
        write_json(config, run.config)
        return [
            *self.program,
            *("train", str(config), "--run-dir", str(found.path), "--no-report"),
            *(["--resume"] if is_begun else []),
            *self._cache(),
        ]

    def _validate(self, run: StoredRun, found: RunDirectory) -> Command:
        return [
            *self.program,
            *("evaluate", str(found.path)),
            *("--split", "validation", "--output", str(self._validation(run.name))),
            *("--windows", str(self.windows[run.method])),
            *self._cache(),
        ]

    def _cache(self) -> list[str]:
        return [] if self.cache is None else ["--cache", str(self.cache)]
