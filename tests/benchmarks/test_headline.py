"""Experiment files of the benchmarks are valid; results of the headline are collected as is."""

import json
import runpy
import sqlite3
from pathlib import Path

import pytest

from drgr.cli.running import load_recipe
from drgr.experiments.experiment import read_experiment
from drgr.experiments.methods import build_variants

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "headline"

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="the benchmarks are not part of the wheel"
)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("*/*.yaml")), ids=lambda path: path.stem
)
def test_the_experiments_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # settings name files beside the experiment
    experiment = read_experiment(path)
    variants = build_variants(experiment, load=load_recipe)
    assert [variant.name for variant in variants] == list(experiment.methods)
    if experiment.tuning is not None:
        assert set(experiment.tuning.methods) == set(experiment.methods)


def evaluation(congestion, over):
    layers = [{"congestion": value} for value in congestion]
    return {"layers": layers, "budget": {"training": {"batches_over": over}}}


def test_congestion_and_batches_over_are_read_from_the_store(tmp_path):
    store = tmp_path / "results.sqlite"
    with sqlite3.connect(store) as connection:
        connection.execute("CREATE TABLE runs (name TEXT, stage TEXT, evaluation TEXT)")
        rows = [
            ("a", "final", json.dumps(evaluation([2.0, 4.0], 0))),
            ("b", "final", None),
            ("c", "tuning", json.dumps(evaluation([9.0], 5))),
        ]
        connection.executemany("INSERT INTO runs VALUES (?, ?, ?)", rows)
    evaluated = runpy.run_path(str(FOLDER / "collect.py"))["evaluated"]
    assert evaluated(store) == {"a": {"congestion": 3.0, "batches_over_budget": 0}}


def test_committed_results_hold_no_run_over_its_limit():
    for name in ("headline", "large"):
        result = json.loads((FOLDER / f"{name}.json").read_text())
        reference = [r["flops"] for r in result["runs"] if r["method"] == result["reference"]]
        finished = [r for r in result["runs"] if r["status"] == "finished"]
        assert finished
        assert all(run["flops"] <= max(reference) * (1 + 1e-6) for run in finished)
