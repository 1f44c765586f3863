import json
import os
import re

import pytest

from drgr.errors import ConfigError
from drgr.report import write_report

CHARTS = {
    "traffic-map",
    "congestion",
    "final-bars",
    "loss-curves",
    "adversary",
    "sampling",
    "effective-domains",
    "objective",
    "experts-bars",
    "experts-curves",
    "spend",
    "load-map",
    "domain-map",
    "violation",
}
COMPARISONS = {"compare-bars", "compare-scatter", "compare-curves"}
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def finished(build_run, parse, tmp_path_factory):
    """The evaluation of a finished run and the page about it."""
    folder = tmp_path_factory.mktemp("finished")
    directory = build_run(folder / "robust")
    page = parse(write_report([directory], output=folder / "report.html"))
    return evaluation_of(directory), page


def evaluation_of(directory):
    return json.loads((directory / "evaluation.json").read_text())


def cell_value(cell):
    attributes, _ = cell
    return float(attributes["data-value"])


def own_text(page):
    """The page's text and markup outside the inlined library."""
    return [(n, a, "".join(t)) for n, a, t in page.elements if n not in ("html", "body", "script")]


def test_domain_table_equals_the_evaluation(finished):
    written, page = finished
    head, *rows = page.rows("domains")
    assert [text for _, text in head] == [
        "Domain",
        "Train tokens",
        "Held-out bits per byte",
        "Adversarial weight",
        "Experts per token",
    ]
    assert {row[0][0]["title"] for row in rows} == set(written["domains"])
    for row in rows:
        expected = written["domains"][row[0][0]["title"]]
        assert cell_value(row[1]) == expected["train_tokens"]
        assert row[1][1] == f"{expected['train_tokens']:,}"
        assert cell_value(row[2]) == expected["bits_per_byte"]
        assert row[2][1] == f"{expected['bits_per_byte']:.3f}"
        assert cell_value(row[3]) == expected["adversarial_weight"]
        assert cell_value(row[4]) == expected["experts_per_token"]
    assert [row[0][0]["title"] for row in rows if "worst" in row[0][1]] == [written["worst_domain"]]
    assert rows[0][0][0]["title"] == written["worst_domain"]


def test_totals_and_layers_equal_the_evaluation(finished):
    written, page = finished
    names = [text for _, text in page.named("dt")]
    values = dict(zip(names, page.named("dd"), strict=True))
    exact = {
        "Mean bits per byte": written["mean_bits_per_byte"],
        "Worst bits per byte": written["worst_bits_per_byte"],
        "Effective number of domains": written["effective_domains"],
        "Training spend": written["budget"]["training"]["spend"],
        "Training steps over budget": 0,
        "Evaluation spend": written["budget"]["evaluation"]["spend"],
        "MaxVio, highest layer": max(layer["max_violation"] for layer in written["layers"]),
        "MinVio, lowest layer": min(layer["min_violation"] for layer in written["layers"]),
        "Congestion, highest layer": max(layer["congestion"] for layer in written["layers"]),
        "Exchange a step, forward": written["exchanged_bytes"]["forward"],
        "Exchange a step, backward": written["exchanged_bytes"]["backward"],
        "Training compute": written["flops"],
        "Throughput": written["tokens_per_second"],
    }
    for name, value in exact.items():
        assert cell_value(values[name]) == value, name
    assert values["Training spend"][1].startswith("2,457,378 of 2,457,600 assignments")
    assert values["Budget rule"][1] == "1 to 4 experts per token, 2 on average"
    assert values["Exchange a step, forward"][1] == "6.29 MB"
    _, *rows = page.rows("layers")
    assert [tuple(cell_value(cell) for cell in row[1:-1]) for row in rows] == [
        (
            layer["max_violation"],
            layer["min_violation"],
            layer["mean_violation"],
            layer["dead_experts"],
            layer["routing_entropy"],
            layer["router_similarity"],
            layer["congestion"],
            layer["congestion_coefficient"]["estimate"],
        )
        for layer in written["layers"]
    ]
    assert rows[0][-2][1] == "3.2 (2.0 to 5.5)"
    assert [row[-1][1] for row in rows] == ["100, 200"] + ["none"] * (len(rows) - 1)


def test_routing_losses_are_those_of_the_first_and_the_last_window(finished):
    _, page = finished
    _, *rows = page.rows("losses")
    assert {row[0][1]: [cell_value(cell) for cell in row[1:]] for row in rows} == {
        "global-balance": [1 + 1 / 10, 1 + 1 / 300, 0.01],
        "chunk-sparsity": [0.5 - 10 / 1e4, 0.5 - 300 / 1e4, 0.1 + 300 / 1e4],
    }


def test_header_says_how_it_was_run(finished):
    _, page = finished
    names = [text for _, text in page.named("dt")]
    values = dict(zip(names, (text for _, text in page.named("dd")), strict=True))
    assert values["Command"] == "drgr train demo --output runs/robust"
    assert values["Commit"] == "0123456789abwith uncommitted changes"
    assert "torch 2.13.0" in values["Versions"]
    assert "processor: x86_64" in values["Hardware"]
    assert values["Started"].startswith("2025-03-01")
    assert page.named("h2")[0][1] == "robust"
    config = next(text for _, text in page.named("pre"))
    assert json.loads(config)["model"]["experts"] == 8
    assert any("effective domains fell below 2" in text for _, text in page.named("li"))


def test_every_chart_is_there_once_with_words_around_it(finished):
    _, page = finished
    figures = page.figures()
    assert set(figures) == CHARTS
    assert all(len(found) == 1 for found in figures.values())
    assert len(page.named("figcaption")) == len(CHARTS)
    assert all(len(text) > 10 for _, text in page.named("figcaption"))
    for kind, (figure,) in figures.items():
        axis = figure["layout"]["xaxis"]["title"]["text"]
        assert axis, kind


def test_two_runs_stand_side_by_side(make_run, parse, tmp_path):
    runs = [make_run("plain", robust=False), make_run("robust")]
    page = parse(write_report(runs, output=tmp_path / "report.html"))
    figures = page.figures()
    assert {kind: len(found) for kind, found in figures.items()} == {
        **dict.fromkeys(CHARTS, 2),
        **dict.fromkeys(COMPARISONS, 1),
    }
    head, *rows = page.rows("comparison")
    assert [attributes.get("title") for attributes, _ in head] == [None, "plain", "robust"]
    first, second = (evaluation_of(run) for run in runs)
    by_name = {row[0][0]["title"]: row for row in rows}
    for name in first["domains"]:
        values = [run["domains"][name]["bits_per_byte"] for run in (first, second)]
        assert [cell_value(cell) for cell in by_name[name][1:]] == values
        change = values[1] - values[0]
        verdict = "better" if change < 0 else "worse"
        assert f"{abs(change):.3f} {verdict}" in by_name[name][2][1]
    worst = by_name["Worst bits per byte"]
    assert cell_value(worst[2]) == second["worst_bits_per_byte"]
    assert second["worst_domain"] in worst[2][1]
    settings = page.rows("settings")
    assert [cell[1] for cell in settings[1]] == ["robustness.divergence", '"none"', '"kl"']
    targets = {attributes["href"][1:] for attributes, _ in page.named("a")}
    assert targets == {attributes["id"] for attributes, _ in page.named("section")}


def test_a_domain_has_one_colour_everywhere(make_run, parse, tmp_path):
    runs = [make_run("a", domains=("x", "y", "z")), make_run("b", domains=("z", "w"))]
    figures = parse(write_report(runs, output=tmp_path / "report.html")).figures()
    colours: dict[str, set[str]] = {}
    kinds = ("final-bars", "loss-curves", "adversary", "sampling", "experts-bars", "experts-curves")
    for kind in kinds:
        for figure in figures[kind]:
            for trace in figure["data"]:
                if trace.get("name"):
                    colours.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    assert set(colours) == {"w", "x", "y", "z"}
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 4


def test_domains_missing_from_a_run_are_a_dash(make_run, parse, tmp_path):
    runs = [make_run("a", domains=("x", "y")), make_run("b", domains=("y", "z"))]
    page = parse(write_report(runs, output=tmp_path / "report.html"))
    rows = {row[0][0].get("title"): row for row in page.rows("comparison")}
    assert rows["x"][2][1] == "\u2013"
    assert "data-value" not in rows["x"][2][0]
    assert rows["z"][1][1] == "\u2013"


def test_equal_runs_say_so(make_run, parse, tmp_path):
    runs = [make_run("a"), make_run("b")]
    page = parse(write_report(runs, output=tmp_path / "report.html"))
    assert any(text == "The configurations are equal." for _, text in page.named("p"))
    rows = {row[0][0].get("title"): row for row in page.rows("comparison")}
    assert rows["Mean bits per byte"][2][1].endswith("same")


def test_runs_of_the_same_name_are_told_apart(make_run, parse, tmp_path):
    small = {"steps": 30, "layers": 1, "domains": ("a", "b")}
    runs = [make_run("one/run", **small), make_run("two/run", **small)]
    page = parse(write_report([*runs], output=tmp_path / "report.html"))
    titles = [text for _, text in page.named("h2")]
    assert titles == ["2 runs side by side", "one/run", "two/run"]
    page = parse(write_report([runs[0], runs[0]], output=tmp_path / "report.html"))
    assert [text for _, text in page.named("h2")][1:] == ["run (1)", "run (2)"]


def test_three_runs_with_one_interrupted(make_run, parse, tmp_path):
    runs = [make_run("a"), make_run("b", seed=2), make_run("c", interrupted=True)]
    page = parse(write_report(runs, output=tmp_path / "report.html"))
    assert len(page.figures()["final-bars"]) == 3
    warnings = [
        text for attributes, text in page.named("p") if attributes.get("class") == "warning"
    ]
    assert any(text.startswith("Without a final evaluation: c.") for text in warnings)


def test_interrupted_run_says_so_and_draws_the_rest(make_run, parse, tmp_path):
    page = parse(write_report([make_run(interrupted=True)], output=tmp_path / "report.html"))
    assert set(page.figures()) == CHARTS - {"domain-map", "traffic-map"}
    text = " ".join(text for _, text in page.named("p"))
    assert "it was interrupted, or is still running" in text
    assert "This run has no data for this chart." in text
    assert any("last line of metrics.jsonl" in text for _, text in page.named("li"))
    assert "Log windows over budget" in [text for _, text in page.named("dt")]


def test_run_with_a_configuration_only(parse, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    page = parse(write_report([run], output=tmp_path / "report.html"))
    assert page.figures() == {}
    assert len(page.named("figure")) == len(CHARTS)


def test_unseen_domains_are_named_apart(make_run, parse, tmp_path):
    directory = make_run()
    path = directory / "evaluation.json"
    content = json.loads(path.read_text())
    unseen = {"verse": {"bits_per_byte": 2.9126, "loss": 4.0}, "prose": {"bits_per_byte": None}}
    path.write_text(json.dumps(content | {"unseen": unseen}))
    page = parse(write_report([directory], output=tmp_path / "report.html"))
    (caption,) = (found for _, found in page.named("caption") if "Held-out" in found)
    assert caption.endswith("; unseen in training, in no other number: verse 2.913, prose \u2013")
    assert {row[0][0]["title"] for row in page.rows("domains")[1:]} == set(content["domains"])


def test_evaluation_of_nulls_is_drawn_as_far_as_it_goes(make_run, parse, tmp_path):
    directory = make_run()
    (directory / "evaluation.json").write_text(
        json.dumps({"split": None, "domains": {"chem": {}}, "layers": [{"load": [0, 0, None]}]})
    )
    page = parse(write_report([directory], output=tmp_path / "report.html"))
    assert [text for _, text in page.rows("domains")[1]][1:] == ["\u2013"] * 4


def test_non_finite_numbers_are_never_drawn(make_run, parse, tmp_path):
    directory = make_run(steps=60)
    path = directory / "evaluation.json"
    path.write_text(re.sub(r'"bits_per_byte": [0-9.]+', '"bits_per_byte": NaN', path.read_text()))
    output = write_report([directory], output=tmp_path / "report.html")
    page = parse(output)
    data = "".join(text for attrs, text in page.named("script") if attrs.get("class"))
    assert "NaN" not in data
    assert "Infinity" not in data
    assert any("bits_per_byte: must be a finite number, got nan" in t for _, t in page.named("li"))


def test_names_from_the_run_stay_text(make_run, parse, tmp_path):
    directory = make_run(EVIL.replace("/", "|"), domains=(EVIL, "%{x}<b>", "'\"&amp;"))
    (directory / "config.json").write_text(json.dumps({"</script>": "</script><img src=x>"}))
    environment = {"command": EVIL, "commit": EVIL, "versions": {EVIL: EVIL}, "started": EVIL}
    (directory / "environment.json").write_text(json.dumps(environment))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "alarm", "step": 300, "message": EVIL}) + "\n")
    output = write_report([directory, directory], output=tmp_path / "report.html")
    page = parse(output)
    assert "<script>alert" not in output.read_text(encoding="utf-8")
    scripts = page.named("script")
    assert len([s for s in scripts if not s[0].get("class")]) == 2
    assert not page.named("img")
    assert EVIL in [row[0][0].get("title") for row in page.rows("domains")]
    (config, _) = (text for _, text in page.named("pre"))
    assert json.loads(config) == {"</script>": "</script><img src=x>"}
    traces = page.figures()["final-bars"][0]["data"]
    assert all("<" not in trace.get("name", "") for trace in traces)
    templates = json.dumps(page.figures())
    assert "%{x}<b>" not in templates


def test_page_loads_nothing(make_run, parse, tmp_path):
    page = parse(write_report([make_run(), make_run("b")], output=tmp_path / "report.html"))
    for name, attributes, _ in page.elements:
        assert "src" not in attributes, name
        assert attributes.get("href", "#").startswith("#"), name
        assert name not in ("link", "iframe", "object", "embed", "base", "form")
    for name, _, text in own_text(page):
        assert not re.search(r"url\(|@import", text), name
    policy = next(
        attributes["content"]
        for attributes, _ in page.named("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    own_script = [text for attributes, text in page.named("script") if not attributes][-1]
    assert "Plotly.newPlot" in own_script
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", own_script)


def test_large_run_stays_small(make_run, parse, tmp_path):
    directory = make_run(steps=20, layers=2, domains=("a", "b"))
    path = directory / "metrics.jsonl"
    record = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        for step in range(30, 30_000, 10):
            over = 20_000 < step < 20_050
            file.write(json.dumps({**record, "step": step, "spend": 81920 + over}) + "\n")
    figures = parse(write_report([directory], output=tmp_path / "report.html")).figures()
    assert all(len(trace["x"]) == 800 for trace in figures["adversary"][0]["data"])
    # Four neighbours, of which thinning alone would keep one or two.
    assert {20_010, 20_020, 20_030, 20_040} <= set(figures["spend"][0]["data"][0]["x"])


def test_output_is_replaced_whole_or_not_at_all(make_run, tmp_path, monkeypatch):
    output = tmp_path / "deep" / "report.html"
    assert write_report([make_run()], output=output) == output
    before = output.read_text(encoding="utf-8")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([make_run("other")], output=output)
    assert output.read_text(encoding="utf-8") == before
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_no_runs(tmp_path):
    with pytest.raises(ConfigError, match="at least one run directory, got none; give one"):
        write_report([], output=tmp_path / "report.html")


def test_output_that_is_a_directory(make_run, tmp_path):
    with pytest.raises(ConfigError, match="output must be a file, got the directory"):
        write_report([make_run()], output=tmp_path)


def test_nothing_is_written_for_a_directory_that_is_no_run(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must hold at least one of"):
        write_report([make_run(), tmp_path / "empty"], output=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
