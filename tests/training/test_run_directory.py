"""Where a run may write, and what it says about its origin."""

import datetime
import json
import subprocess
from pathlib import Path

import pytest
import torch

from drgr.errors import ConfigError
from drgr.training import (
    RunDirectory,
    check_run_directory,
    describe_environment,
    remove_run,
    write_json,
)
from drgr.training import run_directory as module


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    path = tmp_path / "old"
    write_json(path / "config.json", {})
    (path / "checkpoints").mkdir()
    return path


def test_new_and_empty_directories_are_free(tmp_path: Path):
    assert check_run_directory(tmp_path / "a", resume=False, overwrite=False).path == tmp_path / "a"
    check_run_directory(tmp_path, resume=False, overwrite=False)
    check_run_directory(tmp_path / "a", resume=False, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_old_runs_are_resumed_or_overwritten(old_run: Path):
    for resume, overwrite in ((True, False), (False, True)):
        run = check_run_directory(old_run, resume=resume, overwrite=overwrite)
        assert run.config.exists()
    remove_run(run)
    assert not old_run.exists()
    remove_run(run)


@pytest.mark.parametrize(
    ("resume", "overwrite", "name", "message"),
    [
        (True, True, "old", "--resume and --overwrite exclude each other"),
        (True, False, "new", "holds no run to resume; leave out --resume"),
        (False, False, "old", "exists already; continue it with --resume, replace it with --over"),
        (False, True, "other", "is not a run directory .* so it is not overwritten"),
        (True, False, "other", "holds no run to resume"),
        (False, False, "file", "exists already"),
        (False, True, "file", "is not a run directory"),
    ],
)
def test_refusals_change_nothing(old_run: Path, resume, overwrite, name, message):
    folder = old_run.parent
    (folder / "other").mkdir()
    (folder / "other" / "precious.txt").write_text("x")
    (folder / "file").write_text("x")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=message) as caught:
        check_run_directory(folder / name, resume=resume, overwrite=overwrite)
    assert str(folder / name) in str(caught.value) or (resume and overwrite)
    assert sorted(folder.rglob("*")) == before


def test_environment():
    record = describe_environment(["drgr", "train", "demo"], processes=2)
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == "drgr train demo"
    assert record["processes"] == 2
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "drgr", "transformers", "numpy"} <= set(record["versions"])
    started = datetime.datetime.fromisoformat(record["started"])
    assert abs((datetime.datetime.now(datetime.UTC) - started).total_seconds()) < 60
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["processor"]


def test_commit_is_that_of_the_source(monkeypatch, tmp_path: Path):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    source = tmp_path / "package" / "room" / "module.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    source.write_text("first")
    assert module.source_commit() == (None, None)
    git("init", "-q")
    git("add", str(source))
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert module.source_commit() == (commit, False)
    (tmp_path / "notes.txt").write_text("not a part of the package")
    assert module.source_commit() == (commit, False)
    source.write_text("second")
    assert module.source_commit() == (commit, True)
    # A package installed below somebody else's repository is not at that repository's commit.
    git("rm", "-q", "--cached", str(source))
    assert module.source_commit() == (None, None)


def test_json_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "below" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_paths_are_those_of_the_documentation():
    run = RunDirectory(Path("r"))
    documented = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text()
    paths = (
        run.config,
        run.environment,
        run.metrics,
        run.evaluation,
        run.checkpoints,
        run.model,
        run.tensorboard,
    )
    for path in paths:
        assert f"`{path.name}" in documented
