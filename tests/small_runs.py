"""Small training runs for the tests of training, evaluation and the command line.

The conftest files of those folders load this file by its path: tests are not importable by name.
"""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from drgr.data import Corpus, prepare_corpus
from drgr.training import Outcome, RunConfig, RunDirectory, build_run, parse_config, train
from drgr.training.setup import sampling_weights

DOMAIN_FILE = Path(__file__).parent / "fixtures" / "corpus" / "domains.toml"

# Values that depend on the clock, wherever they stand in a record.
WALL_CLOCK = ("seconds", "tokens_per_second")

SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {
        "corpus": str(DOMAIN_FILE),
        "vocabulary_size": 512,
        "sequence_length": 32,
        "sampling": {"speech": 0.5, "factbook": 0.25, "fiction": 0.125, "verse": 0.125},
    },
    "model": {
        "kind": "tiny-olmoe",
        "hidden_size": 32,
        "expert_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 8,
    },
    "routing": {"budget": {"minimum": 1, "maximum": 4, "average": 1.7}},
    "robustness": {"begin": 0, "every": 2, "windows": 1, "penalty": 0.2},
    "training": {
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "device": "cpu",
        "log_every": 3,
        "evaluate_every": 5,
        "evaluation_windows": 2,
        "test_windows": 3,
        "checkpoint_every": 3,
    },
}


class Killed(BaseException):
    """Stands for a kill: nothing of the run may catch it."""


class Watcher:
    """An observer that keeps what it sees, and can send a signal or kill after a step."""

    def __init__(self, *, signal_after: Mapping[int, int] = {}, kill_after: int | None = None):
        self.views: list[Any] = []
        self.records: list[dict[str, Any]] = []
        self._signal_after = signal_after
        self._kill_after = kill_after

    def on_step(self, view: Any) -> None:
        self.views.append(view)
        if view.step in self._signal_after:
            os.kill(os.getpid(), self._signal_after[view.step])
        if view.step == self._kill_after:
            raise Killed

    def on_record(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def prepare(cache: Path) -> Corpus:
    """The committed fixture corpus, prepared in ``cache`` or opened there."""
    return prepare_corpus(DOMAIN_FILE, cache=cache, vocabulary_size=512)


def small_content(**changes: Any) -> dict[str, Any]:
    """The settings of a run of about a second, with some of them changed.

    Changes are dotted paths with ``__`` for the dot: ``training__steps=3``.
    """
    content = copy.deepcopy(SETTINGS)
    for path, value in changes.items():
        *parents, key = path.split("__")
        table = content
        for parent in parents:
            table = table.setdefault(parent, {})
        table[key] = value
    return content


def small_config(**changes: Any) -> RunConfig:
    """See ``small_content``."""
    return parse_config(small_content(**changes))


def run_small(
    config: RunConfig,
    corpus: Corpus,
    path: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
) -> tuple[Outcome, Any]:
    """Trains and returns the outcome and the objects of the run."""
    run = build_run(config, corpus)
    outcome = train(
        run,
        RunDirectory(path),
        observer=watcher or Watcher(),
        environment={"command": "test"},
        resume=resume,
    )
    return outcome, run


def final_state(run: Any) -> dict[str, Any]:
    """All that training computed: parameters, optimizer, prices, domain estimates."""
    return {
        "model": run.attachment.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "routing": run.attachment.state_dict(),
        "adversary": run.adversary.state_dict(),
        "outer": None if run.outer is None else run.outer.state_dict(),
    }


def assert_same(actual: Any, expected: Any, path: str = "state") -> None:
    """Fails unless two nested states are equal bit for bit, naming the first place that differs."""
    assert type(actual) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, path
        assert torch.equal(
            actual.contiguous().view(-1).view(torch.uint8),
            expected.contiguous().view(-1).view(torch.uint8),
        ), path
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), path
        for key in expected:
            assert_same(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), path
        for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_same(mine, theirs, f"{path}.{index}")
    else:
        assert actual == expected, f"{path}: {actual!r} != {expected!r}"


def without_clock(content: Any) -> Any:
    """A record without the values that depend on the clock."""
    if isinstance(content, dict):
        return {
            key: without_clock(value) for key, value in content.items() if key not in WALL_CLOCK
        }
    return [without_clock(value) for value in content] if isinstance(content, list) else content


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` of a run directory, in strict JSON."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def results(path: Path) -> dict[str, Any]:
    """What a run directory says, without the clock."""
    evaluation = json.loads((path / "evaluation.json").read_text(), parse_constant=_refuse)
    return without_clock({"metrics": read_records(path), "evaluation": evaluation})


def listing(path: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its content; directories have none."""
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(path.rglob("*"))
    }


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def fingerprint(config: RunConfig, corpus: Corpus) -> str:
    """What the checkpoints of a run with this configuration are marked with."""
    return config.fingerprint([corpus.fingerprint, sampling_weights(config, corpus).tolist()])
