import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drgr.cli import commands


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
