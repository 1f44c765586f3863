"""Closed link gates: two processes with half the batch each train as one with all of it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from drgr.data import Corpus
from drgr.training import RunDirectory, build_run, train

SETTINGS: dict[str, Any] = {
    "training__batch_size": 8,
    "training__steps": 3,
    "training__log_every": 1,
    "training__evaluate_every": 2,
    "training__evaluation_windows": 1,
    "training__test_windows": 1,
    "training__warmup_steps": 0,
    "robustness__apply_to": "nothing",
    "routing__link_gates": True,
    # One price for the batch of both processes: what closed links cannot use goes to other domains.
    "routing__budget": {"minimum": 1, "maximum": 4, "average": 1.7},
    # Outer steps move the gates that are open.
    "outer": {
        "variables": ["link-gates"],
        "begin": 1,
        "every": 1,
        "windows": 1,
        "update": "gradient",
        "gates": {"rate": 5.0, "penalty": 0.003},
    },
}


def load_small_runs() -> ModuleType:
    path = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_link_processes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trained(cache: str, folder: str) -> dict[str, Any]:
    """Trains in the processes of the default group; returns the links and the final state."""
    small_runs = load_small_runs()
    run = build_run(small_runs.small_config(**SETTINGS), small_runs.prepare(Path(cache)))
    links = torch.zeros_like(run.attachment.open_links)
    links[:, 1, 1:] = True  # the second domain keeps one link a layer
    links[0, 0, :4] = True
    links[1, 2, 5] = True
    run.attachment.link_gates.close(links)
    train(
        run,
        RunDirectory(Path(folder)),
        observer=small_runs.Watcher(),
        environment={"command": "test"},
    )
    return {
        "open": run.attachment.open_links,
        "gates": run.attachment.link_gates.values.detach().clone(),
        "state": small_runs.final_state(run),
    }


@pytest.fixture(scope="module")
def both(run_processes, corpus: Corpus, cache: Path, tmp_path_factory):
    """What one process and two of them end with, and where they wrote."""
    del corpus  # prepared before processes open it
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    together = run_processes(trained, 2, str(cache), str(two), timeout=120)
    return (trained(str(cache), str(one)), one), (together, two)


def test_both_processes_end_in_one_state(runs: ModuleType, both):
    _, ((first, second), _) = both
    runs.assert_same(second, first)


def test_two_processes_end_where_one_does(both):
    (alone, _), ((first, _), _) = both
    assert torch.equal(first["open"], alone["open"])
    assert int((~first["open"]).sum()) == 2 * 7 + 4 + 1
    assert not first["gates"][~first["open"]].any()
    torch.testing.assert_close(first["gates"], alone["gates"], rtol=1e-3, atol=1e-4)
    assert (first["gates"][first["open"]] - 1).abs().max() > 0.01
    for name, parameter in alone["state"]["model"].items():
        difference = (first["state"]["model"][name].double() - parameter.double()).abs()
        assert difference.mean() <= 1e-3 * parameter.double().abs().mean(), name


def test_records_are_those_of_one_process(runs: ModuleType, both):
    (_, one), (_, two) = both
    alone, together = runs.read_records(one), runs.read_records(two)
    assert [(r["kind"], r["step"]) for r in together] == [(r["kind"], r["step"]) for r in alone]
    for mine, theirs in zip(together, alone, strict=True):
        for key in ("spend", "budget", "links_closed", "exchanged_bytes"):
            assert mine.get(key) == theirs.get(key), key
        if mine["kind"] == "train":
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            for layer, expected in zip(mine["layers"], theirs["layers"], strict=True):
                assert layer["open_links"] == expected["open_links"]
                assert layer["congestion"] == pytest.approx(expected["congestion"], rel=0.03)
            traffic = {name: value for name, value in theirs["traffic"].items() if value}
            assert {k: mine["traffic"][k] for k in traffic} == pytest.approx(traffic, rel=1e-3)


def test_closed_links_carry_nothing_on_either_process(both):
    _, ((first, _), two) = both
    evaluation = json.loads((two / "evaluation.json").read_text())
    for number, layer in enumerate(evaluation["layers"]):
        for source, load in enumerate(layer["domain_load"].values()):
            amounts = torch.tensor(load)
            assert not amounts[~first["open"][number, source]].any()
            assert amounts.any()
