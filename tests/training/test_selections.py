"""From the settings of a selection to its selectors, and whole runs with each kind."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drgr.data import Corpus
from drgr.errors import ConfigError
from drgr.routing.selection import (
    BudgetedSelector,
    OpenExperts,
    ProgressiveSelector,
    QuantileSelector,
    SequenceSelector,
    ThresholdSelector,
    TopPSelector,
)
from drgr.training import build_run

# Settings, the selector, and the budget of evaluation.json; of routing.budget 1 to 4, 1.7 on
# average.
KINDS: dict[str, tuple[dict[str, Any], type, tuple[int, int, float | None]]] = {
    "budget": ({"kind": "budget"}, BudgetedSelector, (1, 4, 1.7)),
    "top-p": ({"kind": "top-p", "p": 0.25}, TopPSelector, (1, 4, None)),
    "threshold": ({"kind": "threshold", "level": 0.14}, ThresholdSelector, (1, 4, None)),
    "learned": ({"kind": "threshold"}, QuantileSelector, (1, 4, 1.7)),
    "of-experts": ({"kind": "threshold", "per_expert": True}, QuantileSelector, (1, 4, 1.7)),
    "sequence": ({"kind": "sequence"}, SequenceSelector, (1, 4, 1.7)),
    "layers": ({"kind": "layers", "averages": [2.5, 1.5]}, BudgetedSelector, (1, 4, 2.0)),
    "shape": (
        {"kind": "layers", "shape": "descending", "total": 5},
        BudgetedSelector,
        (1, 4, 2.5),
    ),
    "progressive": (
        {"kind": "progressive", "first": [5], "switch_step": 2},
        ProgressiveSelector,
        (1, 4, 1.7),
    ),
    "growing": (
        {"kind": "progressive", "first": 1, "switch_step": 2},
        ProgressiveSelector,
        (1, 4, 1.7),
    ),
}
STEPS, TOKENS = 4, 4 * 32
# Assignments of the run that each of the two layers is allowed.
ALLOWED = {
    "top-p": [4 * TOKENS * STEPS] * 2,
    "threshold": [4 * TOKENS * STEPS] * 2,
    "sequence": [4 * int(1.7 * 32) * STEPS] * 2,
    "layers": [int(2.5 * TOKENS) * STEPS, int(1.5 * TOKENS) * STEPS],
    "shape": [4 * TOKENS * STEPS, 1 * TOKENS * STEPS],
    "progressive": [
        2 * 5 * TOKENS + 2 * int(1.7 * TOKENS),
        int(1.7 * TOKENS) * STEPS,
    ],
    "growing": [2 * TOKENS + 2 * int(1.7 * TOKENS)] * 2,
}


def config_with(runs: ModuleType, selection: dict[str, Any], **changes: Any) -> Any:
    return runs.small_config(
        routing__selection=selection,
        training__steps=STEPS,
        training__log_every=1,
        training__evaluate_every=2,
        training__checkpoint_every=3,
        **changes,
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_run(runs: ModuleType, corpus: Corpus, tmp_path: Path, name: str):
    selection, kind, (minimum, maximum, average) = KINDS[name]
    outcome, run = runs.run_small(config_with(runs, selection), corpus, tmp_path)
    assert outcome.step == STEPS
    assert [type(policy.selector) for policy in run.attachment.policies] == [kind, kind]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    budget = evaluation["budget"]
    assert (budget["minimum"], budget["maximum"]) == (minimum, maximum)
    assert budget["average"] == (average if average is None else pytest.approx(average))
    allowed = ALLOWED.get(name, [int(1.7 * TOKENS) * STEPS] * 2)
    assert [layer["training_budget"] for layer in evaluation["layers"]] == allowed
    spent = [layer["training_spend"] for layer in evaluation["layers"]]
    assert budget["training"]["budget"] == sum(allowed)
    assert budget["training"]["spend"] == sum(spent)
    if name in ("learned", "of-experts"):
        assert sum(spent) == pytest.approx(sum(allowed), rel=0.25)
    else:
        assert budget["training"]["batches_over"] == 0
        exceeds_no_token = name in ("top-p", "threshold")
        assert (spent < allowed) if exceeds_no_token else (spent == allowed)
    # Reported as it is, whatever was allowed.
    assert budget["evaluation"]["spend"] == sum(sum(r["load"]) for r in evaluation["layers"])
    records = [record for record in runs.read_records(tmp_path) if record["kind"] == "train"]
    assert sum(record["spend"] for record in records) == sum(spent)
    assert all(layer["price"] is None for layer in records[-1]["layers"]) == (
        name in ("top-p", "of-experts")
    )


@pytest.mark.parametrize("name", ["learned", "progressive"])
def test_a_stopped_run_goes_on_to_the_bit(
    runs: ModuleType, corpus: Corpus, tmp_path: Path, name: str
):
    config = config_with(runs, KINDS[name][0])
    _, straight = runs.run_small(config, corpus, tmp_path / "straight")
    with pytest.raises(runs.Killed):
        runs.run_small(config, corpus, tmp_path / "cut", watcher=runs.Watcher(kill_after=4))
    _, resumed = runs.run_small(config, corpus, tmp_path / "cut", resume=True)
    runs.assert_same(runs.final_state(resumed), runs.final_state(straight))
    assert runs.results(tmp_path / "cut") == runs.results(tmp_path / "straight")


@pytest.mark.parametrize(
    ("selection", "changes", "message"),
    [
        (
            {"kind": "layers", "averages": [2, 2, 2]},
            {},
            r"routing\.selection\.averages must have one entry for each of the 2 MoE layers, got 3",
        ),
        (
            {"kind": "layers", "averages": [2, 5]},
            {},
            r"routing\.selection\.averages must lie within .* got \[2\.0, 5\.0\]: budget\.average",
        ),
        (
            {"kind": "layers", "averages": [9000, 1]},
            {
                "routing__budget": {
                    "unit": "flops",
                    "minimum": 6144,
                    "maximum": 30000,
                    "average": 9000,
                }
            },
            r"routing\.selection\.averages must lie within .* routing\.budget in FLOPs",
        ),
        (
            {"kind": "layers", "shape": "wave", "total": 9},
            {},
            r"routing\.selection: total must be within num_layers times .* 2 and 8, got 9",
        ),
        (
            {"kind": "progressive", "first": [4, 4, 4], "switch_step": 2},
            {},
            r"routing\.selection\.first must have at most one entry for each of the 2 MoE layers",
        ),
        (
            {"kind": "progressive", "first": [9], "switch_step": 2},
            {},
            r"routing\.selection\.first must be at most the 8 experts of a layer, got 9",
        ),
        (
            {"kind": "top-p"},
            {"routing__budget": {"minimum": 1, "maximum": 9, "average": 2}},
            r"routing\.budget: budget\.maximum must be at most the 8 experts .* got 9",
        ),
    ],
)
def test_refusals(runs: ModuleType, corpus: Corpus, selection, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_run(config_with(runs, selection, **changes), corpus)


def test_bounds_are_those_of_the_last_step(runs: ModuleType, corpus: Corpus):
    for switch_step, expected in ((3, (1, 4, 1.7)), (4, (1, 5, (5 + 1.7) / 2))):
        selection = {"kind": "progressive", "first": [5], "switch_step": switch_step}
        bounds = build_run(config_with(runs, selection), corpus).bounds
        assert (bounds.minimum, bounds.maximum) == expected[:2]
        assert bounds.average == pytest.approx(expected[2])


def test_a_run_may_follow_the_experts_that_its_scorer_opens(
    runs: ModuleType, corpus: Corpus, tmp_path: Path
):
    config = config_with(runs, {"kind": "open"}, routing__scores={"kind": "relu-rms"})
    _, run = runs.run_small(config, corpus, tmp_path)
    assert [type(policy.selector) for policy in run.attachment.policies] == [OpenExperts] * 2
    budget = json.loads((tmp_path / "evaluation.json").read_text())["budget"]
    assert (budget["minimum"], budget["maximum"], budget["average"]) == (1, 4, None)
    assert TOKENS * STEPS * 2 <= budget["training"]["spend"] <= 4 * TOKENS * STEPS * 2
    assert budget["training"]["batches_over"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs routing.scores that open experts, one of norm, .* got model"),
        (
            {
                "routing__scores": {"kind": "norm"},
                "routing__budget": {"minimum": 2, "maximum": 4, "average": 2},
            },
            "routing.budget.minimum must be 0 or 1 with routing.selection open, got 2",
        ),
    ],
)
def test_open_experts_need_a_scorer_that_opens_them(
    runs: ModuleType, corpus: Corpus, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        build_run(config_with(runs, {"kind": "open"}, **changes), corpus)
