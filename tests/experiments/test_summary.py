"""The summary of made-up results against numbers worked out here, and its other forms."""

import csv
import io
import json
import statistics

import pytest

from drgr.experiments import Store, export, summarize
from drgr.report import write_experiment_report

METHODS = {"a & b": {"robustness.losses": "train"}, "<b>": {"robustness.apply_to": "nothing"}}


@pytest.fixture
def summary(compare):
    ran = compare(methods=METHODS, reference="a & b", seeds=3, runs={"<b>": {"flops": 2.0}})
    with Store.open(ran.comparison.store, ran.comparison.content) as store:
        return summarize(ran.comparison, store)


@pytest.fixture
def failed(compare):
    ran = compare(methods=METHODS, reference="a & b", runs={"<b>": {"fail": "<i> 100 %"}})
    with Store.open(ran.comparison.store, ran.comparison.content) as store:
        return summarize(ran.comparison, store)


def test_figures(summary):
    assert summary["complete"]
    first, second = summary["methods"]
    # The fake's worst domain is at 3 + 0.01 * seed with the learning rate that the file gives.
    worst = [3 + 0.01 * seed for seed in range(3)]
    assert first["figures"]["worst_bits_per_byte"]["mean"] == pytest.approx(statistics.fmean(worst))
    assert first["figures"]["worst_bits_per_byte"]["sd"] == pytest.approx(0.01)
    assert first["domains"]["speech"]["mean"] == pytest.approx(2.01)
    assert first["figures"]["flops"]["mean"] == first["steps"][0]
    assert second["figures"]["flops"]["mean"] == 2 * second["steps"][0]
    assert [one["on_worst_flops_frontier"] for one in (first, second)] == [True, False]
    assert [one["on_worst_mean_frontier"] for one in (first, second)] == [True, True]
    assert summary["environment"]["commits"] == ["abc"]
    json.dumps(summary, allow_nan=False)


def test_equal_methods_do_not_differ(summary):
    for pair in summary["pairs"]:
        assert pair["difference"]["mean"] == 0
        assert pair["difference"]["method"] == "constant"
        assert pair["p_sign_flip"] == pair["p_sign_flip_holm"] == 1
        assert pair["p_student"] == 1
    assert summary["ranks"]["worst_bits_per_byte"] == {"a & b": 1.5, "<b>": 1.5}
    assert summary["ranks"]["seeds"] == [0, 1, 2]


def test_csv_has_every_run(failed):
    rows = list(csv.DictReader(io.StringIO(export(failed, "csv"))))
    assert [(row["method"], row["seed"], row["status"]) for row in rows] == [
        ("a & b", "0", "finished"),
        ("<b>", "0", "failed"),
        ("a & b", "1", "finished"),
        ("<b>", "1", "failed"),
    ]
    assert float(rows[2]["worst_bits_per_byte"]) == pytest.approx(3.01)
    assert float(rows[2]["bits_per_byte.speech"]) == pytest.approx(2.01)
    assert rows[1]["worst_bits_per_byte"] == ""
    assert rows[1]["error"] == "exit code 1: drgr: <i> 100 %"


def test_tables(failed):
    latex, markdown = export(failed, "latex"), export(failed, "markdown")
    assert r"a \& b & 3.0050 [3.0000, 3.0100] & 2.5050 [2.5000, 2.5100] & 1.00" in latex
    assert latex.count(r"\\") == 3
    assert "| a & b | 3.0050 [3.0000, 3.0100] | 2.5050 [2.5000, 2.5100] | 1.00 |" in markdown
    assert "| <b> | - | - | - | 6 | - | 0 of 2 |" in markdown


def test_report_of_what_failed(failed, tmp_path):
    body = body_of(failed, tmp_path)
    assert "<i>" not in body
    assert "&lt;i&gt; 100 %" in body
    assert "&lt;b&gt;" in body
    assert "Not every run finished within its FLOPs" in body
    assert "2 finished" in body
    assert "2 failed" in body
    assert 'data-kind="experiment-worst-mean"' in body


def test_report_of_results(summary, tmp_path):
    body = body_of(summary, tmp_path)
    assert "Not every run" not in body
    assert "no p-value below 0.25" in body
    assert body.count("[0.0000, 0.0000]") == 4
    mean = summary["methods"][0]["figures"]["worst_bits_per_byte"]["mean"]
    assert body.count(f'data-value="{mean!r}"') == 4  # of both methods, over all and by domain


def test_report_of_tuning_and_of_nothing(compare, tmp_path):
    space = {"training.learning_rate": {"kind": "uniform", "low": 1e-3, "high": 1e-1}}
    ran = compare(seeds=1, tuning={"trials": 2, "space": space}, runs={"kl": {"fail": "no"}})
    with Store.open(ran.comparison.store, ran.comparison.content) as store:
        found = summarize(ran.comparison, store)
    body = body_of(found, tmp_path)
    assert body.count("training.learning_rate=") >= 4
    assert body.count("exit code 1: drgr: no") == 4  # of two trials, in failures and in tuning
    with Store.open(tmp_path / "empty.sqlite", ran.comparison.content) as store:
        empty = summarize(ran.comparison, store)
    assert not empty["complete"]
    assert "This run has no data for this chart." in body_of(empty, tmp_path)


def body_of(summary, folder):
    page = write_experiment_report(summary, output=folder / "report.html").read_text()
    return page[page.index("<main>") : page.index("</main>")]
