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


def test_frontier(result_of, tmp_path):
    result = result_of(
        "benchmarks.frontier.run",
        *("--seeds", "1", "--steps", "60", "--work", tmp_path / "runs"),
        *("--methods", "uniform sampling", "lookahead", "hypergradient, Gauss-Newton by CG"),
        *("--set", "outer.begin=4", "--set", "training.batch_size=4"),
    )
    first = result["summary"]["uniform sampling"]
    for method, summary in result["summary"].items():
        assert summary["failed"] == 0, (method, result["runs"])
        assert summary["flops"]["mean"] <= first["flops"]["mean"] * 1.000001
        assert (summary["outer_flops"]["mean"] > 0) == (method != "uniform sampling")


def test_outer_overhead(result_of):
    result = result_of("benchmarks.outer_overhead.run", "--rounds", "1", "--set", "outer.every=4")
    ratios = result["ratio_to_no_outer_loop"]
    assert ratios["no outer loop"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}
    assert set(ratios) == set(result["seconds_per_round"])


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


def test_traffic(result_of):
    result = result_of(
        "benchmarks.traffic.run",
        *("--rounds", "1", "--seeds", "1", "--set", "training.batch_size=4"),
        *("--set", "training.steps=4", "--set", "training.warmup_steps=0"),
    )
    assert result["cost"]["ratio"]["not measured"]["median"] == 1
    assert [row["coefficient"] for row in result["effect"]] == [0, 0.01, 0.1, 1] * 2
    assert all(row["congestion"] > 1 for row in result["runs"])


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


def test_synthetic(run_script):
    result = run_script(
        "benchmarks.synthetic.run",
        *("--domains", "4", "--seeds", "1", "--samples", "9000", "--experts", "4"),
        *("--routing-seeds", "1", "--steps", "12", "--tokens", "64", "--rounds", "1"),
    )
    assert all(kept for claim, kept in result["claims"].items() if "ends within" not in claim)
    mixture = [row for row in result["runs"] if row["part"] == "mixture"]
    assert all(9000 - 300 < row["samples"] <= 9000 + 300 for row in mixture)
    for row in result["runs"]:
        if row["part"] == "routing":
            assert 0 < row["purity"] <= 1
            assert row["matched"] <= row["purity"] + 1e-12
            assert row["worst_loss"] >= row["mean_loss"]
    assert len(result["summary"]) == len(result["runs"])


def test_subspace(run_script):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install '.[dev]'")
    result = run_script(
        "benchmarks.subspace.run",
        *("--seeds", "1", "--train", "100", "--validation", "60", "--hidden", "8", "--steps", "8"),
        *("--timed-steps", "1", "--ranks", "4", "16", "--headline-rank", "16"),
        *("--uniform-ranks", "2"),
    )
    assert len(result["runs"]) == len(result["quality"]) == 10
    memory = {row["method"]: row for row in result["memory"]}
    size = 64 * 8 + 8 + 8 * 10 + 10
    full = memory["MA-SOBA, Adam"]
    # z, two moments, a step of Adam for each of four tensors, the average of 100 weights.
    assert full["bytes_without_inner"] == 4 * (3 * size + 4 + 100)
    assert full["bytes_with_inner"] == 4 * (4 * size + 4 + 100)
    # z, coordinates with two moments and a step, a seed of eight bytes.
    assert memory["subspace 4, Adam"]["bytes_without_inner"] == 4 * (size + 3 * 4 + 1) + 8
    assert memory["Galerkin 4, Adam"]["bytes_without_inner"] == 4 * (4 * 4 + 1) + 8
    # A factor of float64 entries more.
    uniform = memory["subspace 2 uniform, Adam"]
    assert uniform["bytes_without_inner"] == 4 * (size + 3 * 2 + 1) + 8 * (4 + 1)
    for row in memory.values():
        assert all(peak > row["bytes_with_inner"] for peak in row["peak_live_bytes"].values())


def test_live_bytes_are_those_of_storages_alive(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import torch

    from benchmarks.subspace.memory import LiveBytes

    before = torch.zeros(1000)
    with LiveBytes() as live:
        view = before[:10]
        assert live.now == 0
        made = torch.ones(100)
        part = made.view(10, 10)
        del made
        assert live.now == 400
        part.add_(1)
        grown = view + part
        assert live.now == 800
        del part
        assert live.now == 400
    assert live.peak == 800
    del grown


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


def test_single_loop(run_script):
    result = run_script(
        "benchmarks.single_loop.run",
        *("--inner", "8", "--outer", "3", "--samples", "16", "--batches", "2", "--rank", "2"),
        *("--budget", "60"),
    )
    assert len(result["simulated"]) == 12
    assert len(result["blocks"]) == 2
    for row in (*result["simulated"].values(), *result["blocks"].values()):
        assert len(row["trials"]) == 8
        assert len(row["curves"]) == 3
    assert all(isinstance(kept, bool) for kept in result["claims"].values())


def test_the_value_gradient_of_the_single_loop_problems(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import torch

    from benchmarks.single_loop import problems
    from drgr.bilevel import Exact, hypergradient

    instance = problems.simulated(inner_size=8, outer_size=3, num_samples=32, num_batches=2, seed=0)
    problem, x = instance.problem, instance.outer

    def mean(loss):
        return lambda x, y: (loss(x, y, 0) + loss(x, y, 1)) / 2

    inner_loss = mean(problem.inner_loss)
    slope = torch.func.grad(inner_loss, argnums=1)(x, instance.inner)
    hessian = torch.func.hessian(inner_loss, argnums=1)(x, instance.inner)
    y = instance.inner - torch.linalg.solve(hessian, slope)
    found = hypergradient(mean(problem.outer_loss), inner_loss, x, y, solver=Exact())
    torch.testing.assert_close(found.grads, instance.matrix @ x + instance.offset)


def test_skew(run_script):
    result = run_script(
        "benchmarks.skew.run",
        *("--tokens", "64", "--steps", "12", "--rounds", "1"),
        *("--known-tokens", "256", "--known-updates", "20"),
    )
    assert len(result["skews"]) == 6 * 2 * 13
    for row in result["skews"]:
        violation = row["max_violation"]
        assert 0 <= violation["mean"] <= violation["highest"]
        assert -1 <= row["min_violation"]["mean"] <= 0
    assert result["cost"]["ratio_to_none"]["none"] == 1
    assert {row["status"] for row in result["known"]["transport"]} <= {"CONVERGED", "MAX_STEPS"}
    assert set(result["reasons"]) == {name for name, kept in result["claims"].items() if not kept}
    assert all(isinstance(kept, bool) for kept in result["claims"].values())


def test_static_budget(run_script):
    result = run_script(
        "benchmarks.static_budget.run",
        *("--seeds", "1", "--experts", "8", "--planted", "2", "--unequal-experts", "5"),
        *("--model-experts", "3", "--model-seeds", "1", "--training-steps", "10"),
        *("--steps", "6", "--rounds", "1"),
    )
    within, *_ = result["claims"].values()
    assert within
    for part in ("planted", "unequal", "trained"):
        assert len(result[part]) == len(result["summary"][part]) == 7
    for row in (*result["unequal"], *result["trained"]):
        assert row["loss"] >= row["best"] * (1 - 1e-9)
    assert result["unequal"][-1]["lower_bound"] <= result["unequal"][-1]["best"] * (1 + 1e-9)
    assert result["cost"]["1024 experts"]["seconds_per_sample"] > 0


def test_moe_layer(run_script):
    result = run_script(
        "benchmarks.moe_layer.run",
        *("--tokens", "64", "--rounds", "1", "--threads", "1", "--shapes", "0", "2"),
    )
    agree, *_ = result["claims"].values()
    assert agree
    assert [row["experts"] for row in result["shapes"]] == [8, 64]
    for row in result["shapes"]:
        assert all(0 < share < 1.5 for share in row["share_of_bound"].values())
        assert row["throughput_ratio"]["median"] > 0


def test_routing_cost(run_script):
    result = run_script(
        "benchmarks.routing_cost.run",
        *("--tokens", "64", "--experts", "8", "--top-k", "2", "--width", "16", "--rounds", "1"),
        *("--sequence-length", "32"),
    )
    assert len(result["rows"]) == 2 * (11 + 13) + 9
    assert all(row["share"]["median"] > 0 for row in result["rows"])


def test_real_groups(run_script, monkeypatch):
    result = run_script(
        "benchmarks.real_groups.run",
        *("--data", "generated", "--seeds", "2", "--steps", "6", "--batch-size", "64"),
    )
    assert all(result["claims"].values()), result["claims"]
    assert len(result["summary"]) == 9
    assert len(result["trials"]) == 9 * 5
    assert len(result["runs"]) == 9 * 2
    for run in result["runs"]:
        assert run["worst_group_accuracy"] == min(run["group_accuracy"])
        assert run["worst_group_accuracy"] <= run["average_accuracy"]
        assert (run["steps"] < 6) == (run["method"] == "JTT")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.real_groups.page import section

    lines = section(result)
    assert lines[0] == "## Real groups"
    for row in result["summary"]:
        worst = f"{100 * row['worst_group_accuracy']['mean']:.1f} ±"
        assert any(line.startswith(f"| {row['method']} |") and worst in line for line in lines)
    compared = [line for line in lines if line.startswith("- DRGR's worst group is ")]
    assert len(compared) == 3
    assert "that of ERM (paired, 95 % interval" in compared[1]
