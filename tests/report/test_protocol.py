"""The section on ``protocol.json``: every number it shows is the file's."""

import json
from pathlib import Path

import pytest

from drgr.report import load_run, write_report
from drgr.report._protocol_figures import decile_curves, robust_curve
from drgr.report._style import domain_styles
from drgr.report._summary import domain_names

DOMAINS = ("email", "chem")
EVIL = "<script>alert(1)</script>"


def record(domains=DOMAINS):
    """A record of two domains and one layer, in the documented form."""
    levels = [0.01, 0.1]
    bits = dict(zip(domains, (1.5, 2.5), strict=True))
    tails = {
        name: {"cvar": [{"level": level, "value": 9 + value - level} for level in levels]}
        for name, value in bits.items()
    }
    return {
        "schema": "drgr.protocol/1",
        "subject": {"kind": "run", "name": "runs/x", "step": 1200},
        "data": {"corpus": "drgr-8", "split": "test", "max_windows": None},
        "domains": {
            name: {
                "windows": 8,
                "loss": 2 * value,
                "loss_standard_error": 0.25,
                "bits_per_byte": value,
                "bits_per_byte_standard_error": 0.125 if name == domains[0] else None,
                "held_out_of_training": name == domains[1],
            }
            for name, value in bits.items()
        },
        "robustness": {
            "mean": 2.0,
            "worst_domain": domains[1],
            "worst": 2.5,
            "cvar": [{"level": 0.5, "value": 2.5}],
            "curve": {
                "divergence": "KL",
                "radius": [0.0, 0.1, 1.0],
                "value": [2.0, 2.2, 2.5],
                "converged": True,
            },
            "mixtures": {"count": 1000, "quantiles": [{"share": 0.05, "value": 1.6}]},
            "excess": {"reference": "runs/base/protocol.json", "by_domain": dict(bits)},
        },
        "fairness": {
            "gini": 0.125,
            "max_minus_min": 1.0,
            "token_losses": {
                "kept": 100,
                "of": 4000,
                "pooled": {"cvar": [{"level": level, "value": 9.0} for level in levels]},
                "by_domain": tails,
            },
            "frequency_deciles": {
                "pooled": {"loss": [7.0, 5.0, 3.0]},
                "by_domain": {domains[0]: {"loss": [7.5, None, 3.5]}, domains[1]: {"loss": []}},
            },
            "experts": {name: {"per_token": 1.75, "dropped_share": 0.25} for name in domains},
        },
        "compute": {
            "device": "cpu",
            "flops": {"formula_per_token": 2e6, "relative_difference": 0.005, "agrees": True},
            "latency": {"p50_seconds": 0.25, "p95_seconds": 0.5, "tokens_per_second": 4096.0},
            "peak_memory": {"bytes": 5e8, "kind": "maximum resident set size"},
            "spend": {"assignments": 900, "budget": 1000, "layers_over": 3},
            "exchanged_bytes": {"per_token": 2048.0},
        },
        "balance": [
            {
                "name": "model.layers.0.mlp",
                "routing_entropy": 0.75,
                "dead_experts": 1,
                "overload": 1.5,
                "congestion": 3.5,
            }
        ],
    }


def write(directory: Path, content) -> Path:
    (directory / "protocol.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture
def page(make_run, parse, tmp_path):
    run = write(make_run(domains=DOMAINS, steps=40), record())
    return parse(write_report([run], output=tmp_path / "report.html"))


def values(row):
    return [float(attributes["data-value"]) for attributes, _ in row if "data-value" in attributes]


def test_domains_worst_first_with_errors_and_tails(page):
    head, first, second = page.rows("protocol-domains")
    assert [text for _, text in head][-1] == "Excess"
    assert [row[0][0]["title"] for row in (first, second)] == ["chem", "email"]
    assert values(first) == [2.5, 5.0, 9 + 2.5 - 0.01, 9 + 2.5 - 0.1, 1.75, 0.25, 2.5]
    assert values(second)[:2] == [1.5, 3.0]
    assert "not trained on" in first[0][1]
    assert "not trained on" not in second[0][1]
    shown = second[1][1].replace("\N{NO-BREAK SPACE}", " ")
    assert (shown, first[1][1]) == ("1.500 \N{PLUS-MINUS SIGN} 0.125", "2.500")


def test_totals_and_layers(page):
    names = [text.replace("\N{NO-BREAK SPACE}", " ") for _, text in page.named("dt")]
    cells = dict(zip(names, page.named("dd"), strict=True))
    exact = {
        "Mean over domains": 2.0,
        "Worst 50 % of domains": 2.5,
        "Random mixtures, 5 % below": 1.6,
        "Gini of the domains": 0.125,
        "Worst 1 % of all tokens": 9.0,
        "Forward compute a token": 2e6,
        "Forward pass, median": 0.25,
        "Peak memory": 5e8,
        "Spend": 900,
    }
    for name, value in exact.items():
        assert float(cells[name][0]["data-value"]) == value, name
    assert "from 100 of 4,000" in cells["Worst 1 % of all tokens"][1]
    assert "they agree" in cells["Formula less counter"][1]
    assert cells["Spend"][1] == "900 assignments of 1,000, 3 layers over"
    assert cells["Excess over"][1] == "runs/base/protocol.json"
    _, row = page.rows("protocol-layers")
    assert values(row) == [0.75, 1.0, 1.5, 3.5]
    assert any(
        text == "test split of drgr-8 after 1,200 steps, all windows" for _, text in page.named("p")
    )


def test_charts_follow_the_record(make_run):
    run = load_run(write(make_run(domains=DOMAINS), record()))
    styles = domain_styles(domain_names(run))
    figure = json.loads(robust_curve(run.protocol).figure.to_json())
    (curve,) = figure["data"]
    assert (curve["x"], curve["y"]) == ([0.0, 0.1, 1.0], [2.0, 2.2, 2.5])
    assert [shape["y0"] for shape in figure["layout"]["shapes"]] == [2.0, 2.5]
    drawn = json.loads(decile_curves(run.protocol, styles).figure.to_json())["data"]
    assert [trace["y"] for trace in drawn] == [[7.5, None, 3.5], [7.0, 5.0, 3.0]]
    assert drawn[0]["x"] == [1, 2, 3]


def test_pages_of_runs_without_it_say_nothing_of_it(make_run, parse, tmp_path):
    page = parse(write_report([make_run(steps=40)], output=tmp_path / "report.html"))
    assert not any("Evaluation protocol" in text for _, text in page.named("h3"))
    assert load_run(make_run("other", steps=40)).notes == ()


@pytest.mark.parametrize("content", [{}, {"schema": "drgr.protocol/2"}, {"schema": 3}])
def test_other_versions_are_left_out_and_said_so(make_run, content):
    run = load_run(write(make_run(steps=40), content))
    assert run.protocol is None
    assert any("protocol.json" in note for note in run.notes)


def test_a_partial_record_of_other_domains_is_shown_as_far_as_it_goes(make_run, parse, tmp_path):
    content = record(domains=(EVIL, "b"))
    for part in ("robustness", "compute", "balance"):
        del content[part]
    page = parse(
        write_report([write(make_run(steps=40), content)], output=tmp_path / "report.html")
    )
    titles = {row[0][0]["title"] for row in page.rows("protocol-domains")[1:]}
    assert titles == {EVIL, "b"}
    assert not any("alert(1)" in "".join(t) for n, _, t in page.elements if n == "script")
