"""Two processes with half the batch each train as one process with all of it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from drgr.data import Corpus
from drgr.errors import ConfigError
from drgr.training import build_run

BUDGET = {"minimum": 1, "maximum": 4, "average": 1.7}
SHARED: dict[str, Any] = {
    "training__batch_size": 8,
    "training__steps": 6,
    "training__log_every": 1,
    "training__evaluate_every": 4,
    "training__warmup_steps": 0,
    "robustness__every": 2,
    "robustness__windows": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "quantile": {"routing__budget": BUDGET},
    "sign-bias-objective": {
        "routing__budget": BUDGET,
        "routing__controller": {"kind": "sign-bias", "step_size": 0.01},
        "robustness__apply_to": "objective",
    },
    "sinkhorn": {"routing__budget": BUDGET, "routing__controller": {"kind": "sinkhorn"}},
    "k-means": {
        "routing__budget": BUDGET,
        "routing__scores": {"kind": "k-means", "dead_after": 2, "centred": True},
    },
    "unseen": {
        "routing__budget": BUDGET,
        "data__unseen": ["fiction"],
        "data__sampling": "uniform",
    },
    "outer-lookahead": {
        "routing__budget": BUDGET,
        "robustness__apply_to": "nothing",
        "outer": {"variables": ["mixture"], "begin": 1, "every": 2, "windows": 1},
    },
    "outer-router-cg": {
        "routing__budget": BUDGET,
        "robustness__apply_to": "nothing",
        "outer": {
            "variables": ["mixture", "router"],
            "begin": 1,
            "every": 2,
            "windows": 1,
            "update": "gradient",
            "solver": {"kind": "cg", "max_steps": 1},
        },
    },
    "auxiliary-train-losses": {
        "routing__budget": BUDGET,
        "routing__controller": {"kind": "none"},
        "routing__auxiliary_coefficient": 0.05,
        "robustness__losses": "train",
    },
    "accumulation": {
        "routing__budget": {"minimum": 2, "maximum": 2, "average": 2},
        "training__accumulation": 2,
    },
}


def load_small_runs() -> ModuleType:
    path = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_processes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train_variants(cache: str, folder: str) -> dict[str, Any]:
    """Trains every variant in the processes of the default group; returns each final state."""
    small_runs = load_small_runs()
    corpus = small_runs.prepare(Path(cache))
    states = {}
    for name, changes in VARIANTS.items():
        config = small_runs.small_config(**(SHARED | changes))
        _, run = small_runs.run_small(config, corpus, Path(folder) / name)
        states[name] = small_runs.final_state(run)
    return states | {"refusal": refusal(small_runs, corpus)}


def refusal(small_runs: ModuleType, corpus: Corpus) -> str:
    """What is said to a batch of 6 in micro-batches of two."""
    config = small_runs.small_config(training__batch_size=6, training__accumulation=2)
    try:
        build_run(config, corpus)
    except ConfigError as error:
        return str(error)
    return "none"


@pytest.fixture(scope="module")
def trained(runs: ModuleType, run_processes, corpus: Corpus, cache: Path, tmp_path_factory):
    """Final states and folders of one process and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    states = run_processes(train_variants, 2, str(cache), str(two), timeout=240)
    return {"one": (train_variants(str(cache), str(one)), one), "two": (states, two)}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_trajectory(runs: ModuleType, corpus: Corpus, trained, variant):
    single, one = trained["one"]
    (first, second), two = trained["two"]
    # Both processes end in one state, to the bit.
    runs.assert_same(second[variant], first[variant])

    alone, together = runs.read_records(one / variant), runs.read_records(two / variant)
    assert [(r["kind"], r["step"]) for r in together] == [(r["kind"], r["step"]) for r in alone]
    for mine, theirs in zip(together, alone, strict=True):
        for key in ("domain_tokens", "tokens", "budget", "learning_rate"):
            assert mine.get(key) == theirs.get(key)
        if mine["kind"] == "train":
            compare_steps(mine, theirs)
        elif mine["kind"] == "outer":
            for key in ("mixture", "gain"):
                assert present(mine[key]) == pytest.approx(present(theirs[key]), rel=0.05, abs=1e-3)
            assert mine["solver"]["hvps"] == theirs["solver"]["hvps"]
            assert mine["flops"] == pytest.approx(theirs["flops"], rel=1e-3)
        else:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    compare_states(first[variant], single[variant])


def compare_steps(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Sums of float32 in another order differ by 1e-7, which training makes larger."""
    assert mine["spend"] == theirs["spend"] == mine["budget"]
    for key, tolerance in {
        "loss": 1e-4,
        "objective": 1e-4,
        "auxiliary_loss": 1e-4,
        "gradient_norm": 1e-3,
        "domain_loss": 1e-3,
        "sampling": 1e-3,
        "adversary": 1e-3,
        "traffic": 1e-3,
        "exchanged_bytes": 1e-12,
    }.items():
        assert present(mine[key]) == pytest.approx(present(theirs[key]), rel=tolerance, abs=1e-7), (
            key
        )
    for layer, expected in zip(mine["layers"], theirs["layers"], strict=True):
        moved = sum(abs(a - b) for a, b in zip(layer["load"], expected["load"], strict=True))
        assert moved <= 0.01 * mine["spend"]
        assert layer["congestion"] == pytest.approx(expected["congestion"], rel=0.01)
        if expected["price"] is None:
            assert layer["price"] is None
        else:
            assert layer["price"] == pytest.approx(expected["price"], abs=1e-4)


def present(value: Any) -> Any:
    """The numbers that exist, where there is one for each domain."""
    if not isinstance(value, dict):
        return value
    return {name: number for name, number in value.items() if number is not None}


def compare_states(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Adam's steps are about the learning rate wide where a gradient is all rounding."""
    for name, parameter in theirs["model"].items():
        difference = (mine["model"][name].double() - parameter.double()).abs()
        moved = parameter.double().abs().mean()
        assert difference.mean() <= 1e-3 * moved, name
    for layer, state in theirs["routing"].items():
        for part, tensors in state.items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(
                    mine["routing"][layer][part][key],
                    tensor,
                    rtol=1e-3,
                    atol=2e-4,
                    equal_nan=True,  # the price of a budget that leaves no choice
                )
    torch.testing.assert_close(
        mine["adversary"]["losses"]["loss_sums"],
        theirs["adversary"]["losses"]["loss_sums"],
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.slow
def test_the_comparison_can_fail(trained, runs: ModuleType):
    """Trajectories of different variants are not taken for one."""
    single, one = trained["one"]
    with pytest.raises(AssertionError):
        compare_states(single["quantile"], single["accumulation"])
    quantile, auxiliary = (
        runs.read_records(one / name)[-1] for name in ("quantile", "auxiliary-train-losses")
    )
    with pytest.raises(AssertionError):
        compare_steps(quantile, auxiliary)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(trained):
    for state in trained["two"][0]:
        assert "training.batch_size must be a multiple of processes" in state["refusal"]
        assert "got 6 for 2 x 2" in state["refusal"]
    assert trained["one"][0]["refusal"] == "none"


@pytest.mark.slow
def test_two_processes_report_an_unseen_domain_as_one_does(trained):
    records = [
        json.loads((trained[number][1] / "unseen" / "evaluation.json").read_text())
        for number in ("one", "two")
    ]
    alone, together = (record["unseen"]["fiction"] for record in records)
    assert together["test_tokens"] == alone["test_tokens"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3)
