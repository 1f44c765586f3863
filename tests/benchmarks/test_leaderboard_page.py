"""docs/choosing-a-router.md says what the leaderboard's numbers say."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").exists(), reason="the benchmarks are not part of the wheel"
)
REFERENCE = "softmax, quantile prices, batch budget"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def cost():
    return json.loads((ROOT / "benchmarks" / "routing_cost" / "result.json").read_text())


def record(made_up, *, sigmoid=3.0, failed=()):
    def seeds(worst):
        return {seed: {"a": worst + 0.01 * seed, "b": 2.0} for seed in (1, 2, 3)}

    figures = {"routing_entropy": 0.5, "dead_experts": 0, "seconds": 24.0}
    return made_up(
        {
            REFERENCE: seeds(3.2),
            "sigmoid": seeds(sigmoid),
            "no prices": seeds(3.4),
            "noisy": {1: {"a": 3.3, "b": 2}, 2: {"a": 3.1, "b": 2}, 3: {"a": 3.3, "b": 2}},
        },
        reference=REFERENCE,
        of_interest=REFERENCE,
        extra={
            REFERENCE: figures | {"max_violation": 0.1},
            "sigmoid": figures | {"max_violation": 0.3, "seconds": 48.0, "congestion": 4.0},
            "no prices": figures | {"max_violation": 2.0, "dead_experts": 3},
        },
        failed=failed,
    )


def test_rows_are_sorted_and_compared_with_the_reference(made_up, cost):
    from benchmarks.leaderboard.choice import rows

    table = rows(record(made_up), cost)
    assert [row.name for row in table] == ["sigmoid", REFERENCE, "noisy", "no prices"]
    first, reference, noisy, last = table
    assert reference.worst_difference is None
    assert first.worst_difference.mean == pytest.approx(-0.2)
    assert first.time_ratio == pytest.approx(2.0)
    assert (noisy.max_violation, noisy.time_ratio) == (None, None)
    shares = {
        (row["kind"], row["label"], row["budget"]): row["share"]["median"] for row in cost["rows"]
    }
    assert last.cost_share == shares["price", "none", "4 to 16, 8 on average"]
    assert reference.cost_share == shares["price", "quantile", "4 to 16, 8 on average"]


def test_every_timed_method_is_in_the_experiment_and_was_timed(cost):
    from benchmarks.leaderboard.choice import TIMED

    content = yaml.safe_load((ROOT / "benchmarks/leaderboard/experiment.yaml").read_text())
    assert set(TIMED) <= set(content["methods"])
    assert {(kind, label) for kind, label, _ in TIMED.values()} <= {
        (row["kind"], row["label"]) for row in cost["rows"]
    }


def test_the_page(made_up, cost):
    from benchmarks.leaderboard.page import page

    found = page(record(made_up, failed=("BIP",)), cost)
    assert "4 routers learn the eight domains" in found
    share = next(
        row["share"]["median"]
        for row in cost["rows"]
        if (row["label"], row["budget"]) == ("sigmoid", "4 to 16, 8 on average")
    )
    assert (
        "| 1 | sigmoid | 3.020 ± 0.010 | -0.200 | [-0.200, -0.200] | 2.510 ± 0.005 | -0.100 | "
        f"[-0.100, -0.100] | 0.30 | 0.50 | 0.0 | 4.0 | {share:.1%} | 2.00 | 0 | 3 |" in found
    )
    assert f"| 2 | {REFERENCE} | 3.220 ± 0.010 | reference |  | " in found
    assert "Without a finished run: BIP." in found


def test_what_to_pick_turns_with_the_numbers(made_up, cost):
    from benchmarks.leaderboard.page import page

    found = page(record(made_up), cost)
    assert "most*: sigmoid, which is below softmax, quantile prices" in found
    assert "- *Fewest bits per byte on the mean*: sigmoid, 2.510." in found
    assert f"- *Best balance (MaxVio)*: {REFERENCE}, 0.10." in found
    assert "- *Least congestion of traffic*: sigmoid, 4.0." in found
    assert "interval*: on the worst domain: sigmoid. On the mean: sigmoid." in found
    assert "- *Not told apart from it by the worst domain*: noisy." in found
    assert "on the worst domain: no prices. On the mean: no prices. On both: no prices." in found
    assert "- *Leaves experts without a token*: no prices." in found
    # No prices are cheaper than most, but worse.
    assert "not worse on the worst domain*: no prices" not in found

    found = page(record(made_up, sigmoid=3.5), cost)
    assert f"most*: {REFERENCE}; no other is below it at all." in found
    assert "on the worst domain: no prices; sigmoid." in found or (
        "on the worst domain: sigmoid; no prices." in found
    )
    assert "interval*: on the worst domain: none. On the mean: none." in found


def test_the_lowest_within_its_interval_is_no_reason_to_change(made_up, cost):
    from benchmarks.leaderboard.choice import choices, rows

    result = record(made_up)
    runs = [run for run in result["runs"] if run["method"] == "sigmoid"]
    for run, worst in zip(runs, (3.0, 3.4, 3.1), strict=True):
        run["worst_bits_per_byte"] = worst
    first = choices(rows(result, cost), reference=REFERENCE)[0]
    assert "sigmoid has the lowest, 3.167 bits per byte, but none is below" in first


def test_the_check_needs_the_page_only_where_there_is_a_result(made_up, cost, tmp_path):
    from benchmarks.leaderboard.page import check, page

    source, written = tmp_path / "leaderboard.json", tmp_path / "page.md"
    assert check(source, written) is None
    written.write_text("old")
    assert "has no leaderboard.json to be written from" in check(source, written)
    source.write_text(json.dumps(record(made_up)))
    assert "differs from the results; run python -m" in check(source, written)
    written.unlink()
    assert "differs from the results" in check(source, written)
    written.write_text(page(record(made_up), cost))
    assert check(source, written) is None


def test_the_figure_is_drawn(made_up, cost, monkeypatch, tmp_path):
    from benchmarks.leaderboard import page

    monkeypatch.setattr(page, "FIGURE", tmp_path / "leaderboard.svg")
    page.draw(page.rows(record(made_up), cost))
    assert "the reference is orange" in (tmp_path / "leaderboard.svg").read_text()
