import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drgr.cli import commands
from drgr.data import Corpus


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The helpers of ``tests/small_runs.py``."""
    return _load()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the whole session: the corpus is prepared once."""
    return tmp_path_factory.getbasetemp() / "drgr-cache"


@pytest.fixture(scope="session")
def corpus(runs: ModuleType, cache: Path) -> Corpus:
    """The committed fixture corpus of four domains."""
    return runs.prepare(cache)


@dataclass(frozen=True)
class Answer:
    """What a command left: exit code and output."""

    code: int
    out: str
    err: str


@pytest.fixture
def drgr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Answer]:
    """Runs a command in this process, as ``python -m drgr`` would."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr("sys.argv", ["drgr", *map(str, arguments)])
        capsys.readouterr()
        code = commands.run()
        captured = capsys.readouterr()
        return Answer(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def config_file(runs: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small configuration with some settings changed."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "settings" / "small.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(runs.small_content(**changes)), encoding="utf-8")
        return path

    return write
