import json
import math

import pytest

from drgr.report import load_run
from drgr.report._budget_figures import spend_curves
from drgr.report._expert_figures import domain_maps, load_map, violation_curves
from drgr.report._loss_figures import final_bars, loss_curves
from drgr.report._style import domain_styles
from drgr.report._summary import domain_names, summarize
from drgr.report._traffic_figures import congestion_curves, traffic_maps
from drgr.report._weight_figures import adversary_curves, effective_domains


@pytest.fixture
def run(make_run):
    return load_run(make_run(layers=3))


@pytest.fixture
def styles(run):
    return domain_styles(domain_names(run))


def traces(chart):
    return {t["name"]: t for t in json.loads(chart.figure.to_json())["data"] if "name" in t}


def test_loss_curves_follow_the_validations(run, styles):
    drawn = traces(loss_curves(run, summarize(run), styles))
    for name in styles:
        expected = [record.bits_per_byte[name] for record in run.validation]
        assert drawn[name]["y"] == pytest.approx(expected, rel=1e-5)
        assert drawn[name]["x"] == [record.step for record in run.validation]
    widths = {name: trace["line"]["width"] for name, trace in drawn.items()}
    assert max(widths, key=widths.get) == summarize(run).worst_domain
    assert list(widths.values()).count(max(widths.values())) == 1


def test_final_bars_mark_exactly_the_worst(run, styles):
    summary = summarize(run)
    chart = final_bars(summary, styles)
    figure = json.loads(chart.figure.to_json())
    bars = [trace for trace in figure["data"] if trace["type"] == "bar"]
    assert [bar["name"] for bar in bars] == [domain.name for domain in summary.domains]
    assert [bar["marker"]["opacity"] for bar in bars] == [1.0] + [0.5] * 7
    numbers = figure["layout"]["yaxis2"]["ticktext"]
    assert [("worst" in shown) for shown in numbers] == [True] + [False] * 7
    assert figure["layout"]["shapes"][0]["x0"] == summary.mean_bits_per_byte
    assert summary.worst_domain in chart.title


def test_gaps_in_a_domain_are_left_out(make_run):
    directory = make_run(steps=20, domains=("a", "b"))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 30, "adversary": {"a": 0.25, "b": null}}\n')
    run = load_run(directory)
    drawn = traces(adversary_curves(run, domain_styles(("a", "b"))))
    assert drawn["a"]["x"] == [10, 20, 30]
    assert drawn["b"]["x"] == [10, 20]


def test_alarms_are_marked_on_the_effective_domains(run):
    drawn = traces(effective_domains(run, num_domains=8))
    assert drawn["alarm"]["x"] == [40]
    assert drawn["alarm"]["text"] == ["effective domains fell below 2"]


def test_spend_is_a_share_of_the_budget(run):
    chart = spend_curves(run, summarize(run))
    drawn = traces(chart)
    expected = [100 * record.spend / record.budget for record in run.train]
    assert drawn["training"]["y"] == pytest.approx(expected, rel=1e-5)
    assert chart.title.endswith("no training step over it")
    top = json.loads(chart.figure.to_json())["layout"]["yaxis"]["range"][1]
    assert top > 100


def test_spend_over_the_budget_is_said_and_inside_the_picture(make_run):
    directory = make_run(interrupted=True)
    with (directory / "metrics.jsonl").open("r+b") as file:
        lines = file.read().splitlines()[:-1]
        file.seek(0)
        file.truncate()
        record = {**json.loads(lines[0]), "spend": 90000}
        file.write(b"\n".join([json.dumps(record).encode(), *lines[1:]]) + b"\n")
    run = load_run(directory)
    chart = spend_curves(run, summarize(run))
    assert chart.title == "Spend against budget: 1 training log window(s) over it"
    top = json.loads(chart.figure.to_json())["layout"]["yaxis"]["range"][1]
    assert top > 100 * 90000 / 81920


def test_load_map_shows_doublings_of_the_layer_mean(run):
    chart = load_map(run)
    (trace,) = json.loads(chart.figure.to_json())["data"]
    assert trace["y"] == ["layer 0", "layer 1", "layer 2"]
    for row, layer in zip(trace["z"], run.evaluation.layers, strict=True):
        mean = sum(layer.load) / len(layer.load)
        assert row == pytest.approx([math.log2(v / mean) for v in layer.load], abs=1e-3)
    assert trace["zmax"] == -trace["zmin"] == 1


def test_unused_expert_ends_the_scale_and_is_named(make_run):
    directory = make_run(layers=1)
    path = directory / "evaluation.json"
    written = json.loads(path.read_text())
    written["layers"][0]["load"][3] = 0
    path.write_text(json.dumps(written))
    chart = load_map(load_run(directory))
    (trace,) = json.loads(chart.figure.to_json())["data"]
    assert trace["z"][0][3] == trace["zmin"] == -2
    assert chart.title.endswith("1 unused")


def test_load_map_of_an_interrupted_run_is_of_training(make_run):
    chart = load_map(load_run(make_run(interrupted=True)))
    assert "training, up to step 150" in chart.caption


def test_domain_maps_are_shares_in_the_order_of_losses(run, styles):
    summary = summarize(run)
    chart = domain_maps(run, summary, styles)
    data = json.loads(chart.figure.to_json())["data"]
    assert chart.choices == ("layer 0", "layer 1", "layer 2")
    assert [trace["visible"] for trace in data] == [True, False, False]
    assert [trace["meta"]["choice"] for trace in data] == [0, 1, 2]
    for trace, layer in zip(data, run.evaluation.layers, strict=True):
        assert trace["y"] == [domain.name for domain in summary.domains]
        for name, row in zip(trace["y"], trace["z"], strict=True):
            counts = layer.domain_load[name]
            assert row == pytest.approx([c / sum(counts) for c in counts], rel=1e-5)


def test_violation_has_a_line_per_layer(run):
    drawn = traces(violation_curves(run))
    for index in range(3):
        expected = [record.layers[index].max_violation for record in run.train]
        assert drawn[f"layer {index}"]["y"] == pytest.approx(expected, rel=1e-5)


def test_traffic_maps_are_doublings_of_the_mean_link(run, styles):
    summary = summarize(run)
    chart = traffic_maps(run, summary, styles)
    data = json.loads(chart.figure.to_json())["data"]
    assert chart.choices == ("layer 0", "layer 1", "layer 2")
    assert [trace["visible"] for trace in data] == [True, False, False]
    for trace, layer in zip(data, run.evaluation.layers, strict=True):
        assert trace["y"] == [domain.name for domain in summary.domains]
        amounts = [value for row in layer.domain_traffic.values() for value in row]
        mean = sum(amounts) / len(amounts)
        for name, row in zip(trace["y"], trace["z"], strict=True):
            expected = [math.log2(value / mean) for value in layer.domain_traffic[name]]
            assert row == pytest.approx([max(-2, min(2, value)) for value in expected], abs=1e-3)


def test_traffic_leaves_out_what_was_not_drawn_and_shows_links_without_any(make_run, styles):
    directory = make_run("other", layers=1)
    path = directory / "evaluation.json"
    written = json.loads(path.read_text())
    written["layers"][0]["domain_traffic"]["chem"] = [0.0] * 8
    written["layers"][0]["domain_traffic"]["law"][3] = 0.0
    path.write_text(json.dumps(written))
    run = load_run(directory)
    (trace,) = json.loads(traffic_maps(run, summarize(run), styles).figure.to_json())["data"]
    assert "chem" not in trace["y"]
    assert len(trace["y"]) == 7
    assert trace["z"][trace["y"].index("law")][3] == trace["zmin"] == -2


def test_without_traffic_there_is_no_map(make_run, styles):
    run = load_run(make_run("other", interrupted=True))
    assert traffic_maps(run, summarize(run), styles).figure is None


def test_congestion_has_a_line_per_layer(run):
    drawn = traces(congestion_curves(run))
    for index in range(3):
        expected = [record.layers[index].congestion for record in run.train]
        assert drawn[f"layer {index}"]["y"] == pytest.approx(expected, rel=1e-5)
