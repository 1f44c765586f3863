import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drgr.data import Corpus
from drgr.experiments import (
    Comparison,
    Store,
    build_variants,
    parse_experiment,
    run_comparison,
)
from drgr.training import RunConfig, parse_config

__all__ = ["Store", "comparison_of", "run_comparison"]  # what test_kill's program takes from here

FAKE = Path(__file__).with_name("fake_drgr.py")


@pytest.fixture
def content(runs: ModuleType) -> Callable[..., dict[str, Any]]:
    """The content of a small experiment file, some entries changed; None leaves one out."""

    def build(**changes: Any) -> dict[str, Any]:
        entries = {
            "name": "toy",
            "base": runs.small_content(training__steps=8),
            "common": {"training.weight_decay": 0.0},
            "methods": {
                "uniform": [
                    "data.sampling=uniform",
                    "robustness.apply_to=nothing",
                    "robustness.losses=train",
                ],
                "kl": {"robustness.apply_to": "sampling"},
            },
            "seeds": 2,
            "reference": "uniform",
            **changes,
        }
        return {key: value for key, value in entries.items() if value is not None}

    return build


@pytest.fixture
def compare(
    content, corpus: Corpus, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., "Ran"]:
    """Runs a small experiment whose runs are made up at once."""
    acts = tmp_path / "acts.json"
    monkeypatch.setenv("FAKE_RUNS", str(acts))

    def run(
        *,
        runs: dict[str, Any] | None = None,
        parallel: int = 2,
        retry_failed: bool = False,
        **changes: Any,
    ) -> "Ran":
        acts.write_text(json.dumps(runs or {}))
        comparison = comparison_of(content(**changes), tmp_path / "toy", cache)
        lines: list[str] = []
        stopped = run_comparison(
            comparison, parallel=parallel, retry_failed=retry_failed, report=lines.append
        )
        return Ran(comparison, lines, stopped)

    return run


class Ran:
    """A comparison that ended."""

    def __init__(self, comparison: Comparison, lines: list[str], stopped: int) -> None:
        self.comparison, self.lines, self.stopped = comparison, lines, stopped

    @property
    def began(self) -> list[list[str]]:
        """Name, whether resumed, and threads of each run that was started, in order."""
        text = (self.comparison.directory / "began.txt").read_text()
        return [line.split() for line in text.splitlines()]


def comparison_of(entries: dict[str, Any], directory: Path, cache: Path) -> Comparison:
    experiment = parse_experiment(entries)
    return Comparison(
        experiment=experiment,
        variants=build_variants(experiment, load=load),
        directory=directory,
        cache=cache,
        program=(sys.executable, "-S", str(FAKE)),
    )


def load(name: str) -> RunConfig:
    assert name == "other"
    return parse_config({"training": {"learning_rate": 0.5}})
