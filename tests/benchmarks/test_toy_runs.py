"""Each benchmark at toy size, so that none rots."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CORPUS = ROOT / "tests" / "fixtures" / "corpus" / "domains.toml"
TINY = [
    "data.vocabulary_size=512",
    "data.sampling=natural",
    "data.sequence_length=32",
    "model={kind: tiny-olmoe, hidden_size: 32, expert_size: 32, num_layers: 2}",
    "training.test_windows=2",
    "robustness.every=2",
    "robustness.begin=0",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not part of the wheel"),
]


@pytest.fixture
def run_script(tmp_path):
    """Runs a benchmark with the given arguments and returns its result."""

    def run_and_read(module, *arguments):
        output = tmp_path / "result.json"
        command = [sys.executable, "-m", module, "--allow-dirty", *arguments, "--output", output]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(output.read_text())

    return run_and_read


@pytest.fixture
def result_of(run_script, tmp_path):
    """Runs a benchmark of training at toy size and returns its result."""
    settings = [part for setting in TINY for part in ("--set", setting)]
    place = ["--corpus", CORPUS, "--cache", tmp_path / "cache"]
    return lambda module, *arguments: run_script(module, *settings, *place, *arguments)


def test_quickstart(result_of, tmp_path):
    result = result_of(
        "benchmarks.quickstart.run",
        *("--seeds", "2", "--steps", "6", "--batch-size", "4", "--work", tmp_path / "runs"),
    )
    assert len(result["runs"]) == 8
    first = result["summary"]["erm + auxiliary loss"]
    for method, summary in result["summary"].items():
        assert summary["failed"] == 0, (method, result["runs"])
        assert summary["flops"]["mean"] <= first["flops"]["mean"] * 1.000001
        assert summary["worst_bits_per_byte"]["mean"] >= summary["mean_bits_per_byte"]["mean"]
    assert all(run["batches_over_budget"] == 0 for run in result["runs"])
    assert result["environment"]["versions"]["torch"]


def test_overhead(result_of):
    result = result_of(
        "benchmarks.overhead.run", "--rounds", "1", "--steps", "2", "--set", "training.batch_size=4"
    )
    assert set(result["ratio_to_unattached"]) == {
        "unattached",
        "unattached, sparse experts",
        "attached",
        "attached, no held-out passes",
    }
    assert result["ratio_to_unattached"]["unattached"]["median"] == 1


def test_hypergradient(run_script):
    result = run_script(
        "benchmarks.hypergradient.run",
        *("--dimension", "20", "--inner", "6", "--outer", "3", "--rounds", "1", "--max-steps", "5"),
    )
    assert len(result["exactness"]) == 2 * 4 * 4 * 2
    assert len(result["robustness"]) == 9
    exactness, *_ = result["claims"].values()
    assert exactness


def test_rivals(run_script):
    """With whichever of the other libraries are there: none in the gate."""
    result = run_script("benchmarks.hypergradient.rivals", "--dimension", "20", "--rounds", "1")
    assert len(result["problems"]) == 4
    assert result["claims"]["every answer of this package is right"]
    assert set(result["libraries"]) == {"torchopt", "betty-ml"}
    for problem in result["problems"]:
        own = [row for row in problem["rows"] if row["solver"].startswith("drgr")]
        assert len(own) == 2
        assert all(row["seconds"]["lowest"] > 0 for row in own)


def test_data_cleaning(run_script):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[dev]'")
    result = run_script(
        "benchmarks.data_cleaning.run",
        *("--seeds", "1", "--train", "150", "--validation", "100", "--steps", "3"),
    )
    assert len(result["runs"]) == 2
    for run in result["runs"]:
        methods = run["methods"]
        assert len(methods) == 7
        assert 0 < run["corrupted"] < run["corruption"] + 0.15
        cleaned = methods["proximal alternating, CG"]
        assert cleaned["last_merit"] < cleaned["first_merit"]
        assert cleaned["largest_rise_of_merit"] <= 1e-12
        assert cleaned["area_under_curve"] > 0.7
        for name in ("descent, CG", "descent, Neumann, 5 terms", "descent, identity"):
            assert methods[name]["gradients"] >= cleaned["gradients"]


def test_a_result_from_changed_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import provenance

    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "overhead" / "run.py")])
    environment = {"dirty": True}
    monkeypatch.setattr(provenance, "describe_environment", lambda *_, **__: environment)
    with pytest.raises(SystemExit, match="commit first"):
        provenance.describe_source(allow_dirty=False)
    assert provenance.describe_source(allow_dirty=True) == environment
    provenance.write_result(tmp_path / "x.json", environment, {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text())["environment"] == environment


def test_worst_case(run_script):
    result = run_script(
        "benchmarks.worst_case.run",
        *("--atoms", "60", "--problems", "20", "--looped", "3", "--rounds", "1"),
    )
    rows = result["divergences"]
    assert {"KL", "JensenShannon", "CVaR"} <= set(rows)
    for name, row in rows.items():
        assert row["status"] == "CONVERGED"
        assert row["relative_gap"] <= 1e-9
        # CVXPY states the same problems, so its values show that the same thing was timed.
        assert abs(row["cvxpy"]["value_difference"]) < 1e-4, name
        assert row.get("prototype_value_error", 0) < 1e-9, name
    assert set(result["batched"]) == set(rows)
