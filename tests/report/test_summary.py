import json

from drgr.report import load_run
from drgr.report._summary import domain_names, summarize


def test_finished_run_repeats_its_evaluation(make_run):
    directory = make_run()
    written = json.loads((directory / "evaluation.json").read_text())
    summary = summarize(load_run(directory))
    assert summary.source == "test split, step 300"
    for domain in summary.domains:
        expected = written["domains"][domain.name]
        assert domain.bits_per_byte == expected["bits_per_byte"]
        assert domain.train_tokens == expected["train_tokens"]
        assert domain.adversarial_weight == expected["adversarial_weight"]
        assert domain.experts_per_token == expected["experts_per_token"]
        assert domain.is_worst == (domain.name == written["worst_domain"])
    bits = [domain.bits_per_byte for domain in summary.domains]
    assert bits == sorted(bits, reverse=True)
    assert summary.mean_bits_per_byte == written["mean_bits_per_byte"]
    assert summary.budget.training_spend == written["budget"]["training"]["spend"]
    assert summary.budget.over == 0
    assert not summary.budget.over_is_windows
    assert [layer.min_violation for layer in summary.layers] == [
        layer["min_violation"] for layer in written["layers"]
    ]


def test_interrupted_run_uses_its_last_records(make_run):
    directory = make_run(interrupted=True)
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()[:-1]]
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"][-1]
    summary = summarize(load_run(directory))
    assert summary.source == "validation split, step 150"
    worst = max(validation["bits_per_byte"], key=validation["bits_per_byte"].__getitem__)
    assert [d.name for d in summary.domains if d.is_worst] == [worst] == [summary.domains[0].name]
    assert summary.domains[0].adversarial_weight == train[-1]["adversary"][worst]
    assert summary.domains[0].train_tokens == train[-1]["domain_tokens"][worst]
    assert summary.budget.training_budget == sum(line["budget"] for line in train)
    assert summary.budget.training_spend == sum(line["spend"] for line in train)
    assert summary.budget.over_is_windows
    assert summary.budget.evaluation_spend == validation["spend"]
    assert summary.worst_bits_per_byte == validation["bits_per_byte"][worst]


def test_windows_over_the_budget_are_counted(make_run):
    directory = make_run(interrupted=True)
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1]
    record = json.loads(lines[0])
    record["spend"] = record["budget"] + 1
    path.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    assert summarize(load_run(directory)).budget.over == 1


def test_run_without_any_record_has_an_empty_summary(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    summary = summarize(load_run(tmp_path))
    assert summary.source == "no evaluation"
    assert summary.domains == ()
    assert summary.budget.training_spend is None
    assert summary.budget.over is None


def test_worst_domain_is_found_if_not_named(make_run):
    directory = make_run()
    path = directory / "evaluation.json"
    written = json.loads(path.read_text())
    expected = written.pop("worst_domain")
    path.write_text(json.dumps(written))
    assert summarize(load_run(directory)).worst_domain == expected


def test_domain_without_a_loss_comes_last(make_run):
    directory = make_run()
    path = directory / "evaluation.json"
    written = json.loads(path.read_text())
    written["domains"]["law"]["bits_per_byte"] = None
    path.write_text(json.dumps(written))
    assert summarize(load_run(directory)).domains[-1].name == "law"


def test_domain_names_join_all_files(make_run):
    directory = make_run(steps=20, domains=("a", "b"))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 30, "adversary": {"c": 1.0}}\n')
    assert domain_names(load_run(directory)) == ("a", "b", "c")
