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


def configuration(steps, *, width=96):
    model = {"num_layers": 2, "hidden_size": width, "expert_size": 64, "num_experts": 8}
    training = {"batch_size": 8, "steps": steps}
    routing = {"traffic": {"coefficient": 0.5}}
    data = {"sequence_length": 128}
    return json.dumps({"model": model, "training": training, "data": data, "routing": routing})


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "results.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE runs (name TEXT, stage TEXT, evaluation TEXT, config TEXT)"
        )
        rows = [
            ("a", "final", json.dumps(evaluation([2.0, 4.0], 0)), configuration(240)),
            ("b", "final", None, configuration(250)),
            ("c", "tuning", json.dumps(evaluation([9.0], 5)), configuration(9, width=32)),
        ]
        connection.executemany("INSERT INTO runs VALUES (?, ?, ?, ?)", rows)
    return path


def collecting(name):
    return runpy.run_path(str(FOLDER / "collect.py"))[name]


def test_congestion_and_batches_over_are_read_from_the_store(store):
    found = {"congestion": 3.0, "batches_over_budget": 0, "traffic_price": 0.5}
    assert collecting("evaluated")(store) == {"a": found}


def test_the_setting_is_that_of_all_final_runs_and_the_longest_one(store):
    expected = {
        "num_layers": 2,
        "hidden_size": 96,
        "expert_size": 64,
        "num_experts": 8,
        "batch_size": 8,
        "sequence_length": 128,
        "steps": 250,
    }
    assert collecting("setting")(store) == expected
    with sqlite3.connect(store) as connection:
        values = ("d", "final", None, configuration(240, width=192))
        connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", values)
    assert collecting("setting")(store) is None


def test_an_evaluation_is_described_by_what_it_holds():
    layers = [
        {"congestion": 2.0, "max_violation": 0.5, "routing_entropy": 0.25, "dead_experts": 1},
        {"congestion": None, "max_violation": 1.5, "routing_entropy": 0.75, "dead_experts": 2},
    ]
    training = {"batches_over": 3}
    bounds = {"minimum": 1, "maximum": 4, "average": 2.0}
    found = collecting("described")(
        {
            "layers": layers,
            "budget": {**bounds, "unit": "experts", "training": training},
            "seconds": 7.0,
            "unseen": {"chem": {"loss": 4.0, "bits_per_byte": 3.5}},
        }
    )
    assert found == {
        "batches_over_budget": 3,
        "max_violation": 1.0,
        "routing_entropy": 0.5,
        "dead_experts": 3,
        "budget": bounds,
        "seconds": 7.0,
        "unseen": {"chem": 3.5},
    }


def test_committed_results_hold_no_run_over_its_limit():
    for name in ("headline", "large"):
        result = json.loads((FOLDER / f"{name}.json").read_text())
        reference = [r["flops"] for r in result["runs"] if r["method"] == result["reference"]]
        finished = [r for r in result["runs"] if r["status"] == "finished"]
        assert finished
        assert all(run["flops"] <= max(reference) * (1 + 1e-6) for run in finished)
