"""The directory of a run: who made it, with what, and where its files are."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drgr.errors import ConfigError

_PACKAGES = ("drgr", "torch", "transformers", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of a run's files; see ``docs/run-directory.md`` for what they hold."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Command, commit, versions, hardware."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One record a line."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """The last evaluation on the test split."""
        return self.path / "evaluation.json"

    @property
    def protocol(self) -> Path:
        """The last whole evaluation by ``drgr evaluate``."""
        return self.path / "protocol.json"

    @property
    def checkpoints(self) -> Path:
        """Whole checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The final model."""
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        """Events for TensorBoard."""
        return self.path / "tensorboard"


def check_run_directory(path: Path, *, resume: bool, overwrite: bool) -> RunDirectory:
    """Checks that a run may write to ``path``; changes nothing.

    Raises:
        ConfigError: If it holds something already and neither option was given, if both were, if
            there is nothing to resume, or if what is there is not a run.
    """
    run = RunDirectory(path)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    exists = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if resume and not run.config.exists():
        raise ConfigError(f"run directory {path} holds no run to resume; leave out --resume")
    if exists and not (resume or overwrite):
        raise ConfigError(
            f"run directory {path} exists already; continue it with --resume, replace it with "
            f"--overwrite, or name another one"
        )
    if exists and overwrite and not run.config.exists():
        raise ConfigError(
            f"{path} is not a run directory (it has no config.json), so it is not overwritten; "
            f"name another one"
        )
    return run


def remove_run(run: RunDirectory) -> None:
    """Removes an old run, if there is one, once nothing can stop the new one from starting."""
    if run.path.exists():
        # Renamed first: a kill in between leaves either the whole run or none under its name.
        doomed = run.path.with_name(f".{run.path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        run.path.rename(doomed)
        shutil.rmtree(doomed)


def describe_environment(command: Sequence[str], *, processes: int) -> dict[str, Any]:
    """Returns what is needed to tell where a result came from."""
    commit, dirty = source_commit()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(command),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | package_versions(),
        "hardware": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "accelerator": accelerator,
        },
        "processes": processes,
    }


def package_versions() -> dict[str, str]:
    """Returns the installed versions of what a result depends on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def processor_name() -> str:
    """Returns the processor's model where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def source_commit() -> tuple[str | None, bool | None]:
    """Returns the commit that the package's source is at, and whether it was changed since.

    Both are ``None`` where the package was not installed from a git checkout.
    """
    source = Path(__file__).resolve().parents[1]
    try:
        commit = _git(source, "rev-parse", "HEAD")
        dirty = _git(source, "status", "--porcelain", "--", ".")
        is_tracked = _git(source, "ls-files", __file__)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return (commit, bool(dirty)) if is_tracked else (None, None)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that readers see a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
