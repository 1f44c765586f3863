"""Records follow docs/run-directory.md, in strict JSON and in TensorBoard's event files."""

import contextlib
import json
import math
import warnings
from types import ModuleType
from typing import Any

import pytest

from drgr.data import Corpus
from drgr.training.metrics import JsonLines, TensorBoard

NUMBER, COUNT, TEXT, FLAG = "number", "count", "text", "flag"
LAYER = {
    "name": TEXT,
    "load": [COUNT],
    "max_violation": NUMBER,
    "min_violation": NUMBER,
    "mean_violation": NUMBER,
    "dead_experts": COUNT,
}
EVALUATED = LAYER | {
    "overload_factor": NUMBER,
    "load_percentiles": dict.fromkeys(("5", "25", "50", "75", "95"), NUMBER),
    "routing_entropy": NUMBER,
    "router_similarity": NUMBER,
    "congestion_coefficient": dict.fromkeys(("estimate", "lower", "upper"), "number or null"),
}
OPEN = {"open_links": "number or null"}
BY_DOMAIN, COUNTS_BY_DOMAIN = {"*": NUMBER}, {"*": COUNT}
TRAIN = {
    "kind": TEXT,
    "step": COUNT,
    "tokens": COUNT,
    "flops": NUMBER,
    "outer_flops": NUMBER,
    "seconds": NUMBER,
    "tokens_per_second": NUMBER,
    "learning_rate": NUMBER,
    "gradient_norm": NUMBER,
    "loss": NUMBER,
    "objective": NUMBER,
    "auxiliary_loss": NUMBER,
    "routing_losses": {"router-z": {"value": NUMBER, "coefficient": NUMBER}},
    "domain_loss": {"*": "number or null"},
    "domain_tokens": COUNTS_BY_DOMAIN,
    "sampling": BY_DOMAIN,
    "adversary": BY_DOMAIN,
    "effective_domains": NUMBER,
    "adversary_gap": NUMBER,
    "near_one_hot": FLAG,
    "experts_per_token": {"*": "number or null"},
    "budget": COUNT,
    "spend": COUNT,
    "batches_over": COUNT,
    "traffic": BY_DOMAIN,
    "exchanged_bytes": {"forward": NUMBER, "backward": NUMBER},
    "layers": [LAYER | {"price": "number or null", "congestion": "number or null"} | OPEN],
}
VALIDATION = {
    "kind": TEXT,
    "step": COUNT,
    "loss": BY_DOMAIN,
    "bits_per_byte": BY_DOMAIN,
    "experts_per_token": BY_DOMAIN,
    "mean_bits_per_byte": NUMBER,
    "worst_domain": TEXT,
    "worst_bits_per_byte": NUMBER,
    "budget": COUNT,
    "spend": COUNT,
    "layers": [EVALUATED],
}
OUTER = {
    "kind": TEXT,
    "step": COUNT,
    "mixture": BY_DOMAIN,
    "gain": BY_DOMAIN,
    "scale": "number or null",
    "gap": NUMBER,
    "solver": {
        "status": TEXT,
        "residual": "number or null",
        "curvature": "number or null",
        "hvps": COUNT,
    },
    "gradient_norm": "number or null",
    "links_closed": COUNT,
    "flops": NUMBER,
}
ALARM = {"kind": TEXT, "step": COUNT, "message": TEXT}
EVALUATION = {
    "split": TEXT,
    "step": COUNT,
    "flops": NUMBER,
    "outer_flops": NUMBER,
    "tokens_per_second": NUMBER,
    "seconds": NUMBER,
    "domains": {
        "*": {
            "train_tokens": COUNT,
            "test_tokens": COUNT,
            "loss": NUMBER,
            "bits_per_byte": NUMBER,
            "adversarial_weight": NUMBER,
            "average_share": NUMBER,
            "experts_per_token": NUMBER,
        }
    },
    "unseen": {},
    "mean_bits_per_byte": NUMBER,
    "worst_domain": TEXT,
    "worst_bits_per_byte": NUMBER,
    "effective_domains": NUMBER,
    "budget": {
        "unit": TEXT,
        "minimum": COUNT,
        "maximum": COUNT,
        "average": NUMBER,
        "training": {"budget": COUNT, "spend": COUNT, "batches_over": COUNT},
        "evaluation": {"budget": COUNT, "spend": COUNT},
    },
    "exchanged_bytes": {"forward": NUMBER, "backward": NUMBER},
    "layers": [
        EVALUATED
        | {
            "domain_load": {"*": [COUNT]},
            "training_budget": COUNT,
            "training_spend": COUNT,
            "congestion": NUMBER,
            "congestion_track": "track or null",
            "domain_traffic": {"*": [NUMBER]},
        }
    ],
}


def check(value: Any, schema: Any, domains: set[str], path: str = "record") -> None:
    """Fails where a record departs from the schema; ``*`` stands for every domain."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        if "*" in schema:
            schema = dict.fromkeys(domains, schema["*"])
        assert set(value) == set(schema), path
        for key in schema:
            check(value[key], schema[key], domains, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        assert value, path
        for index, entry in enumerate(value):
            check(entry, schema[0], domains, f"{path}.{index}")
    else:
        assert FITS[schema](value), f"{path}: {value!r} is no {schema}"


def is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and math.isfinite(value)


TRACK = {
    **dict.fromkeys(("first_kink", "second_kink", "error", "straight_error"), NUMBER),
    **dict.fromkeys(("peak_step", "peak"), NUMBER),
    "slopes": [NUMBER],
    "three_phases": FLAG,
}


def is_track_or_null(value: Any) -> bool:
    if value is not None:
        check(value, TRACK, set())
    return True


FITS = {
    "track or null": is_track_or_null,
    TEXT: lambda value: isinstance(value, str) and value,
    FLAG: lambda value: isinstance(value, bool),
    COUNT: lambda value: is_number(value) and isinstance(value, int) and value >= 0,
    NUMBER: is_number,
    "number or null": lambda value: value is None or is_number(value),
}


@pytest.fixture(scope="module")
def run_path(runs: ModuleType, corpus: Corpus, tmp_path_factory):
    """A run whose rarest domain is absent from most windows, and which alarms."""
    path = tmp_path_factory.mktemp("run")
    config = runs.small_config(
        data__sampling={"speech": 0.5, "factbook": 0.5, "fiction": 0.0, "verse": 0.0},
        robustness__apply_to="nothing",
        robustness__penalty=0.01,
        robustness__alarm_below=3.9,
        routing__losses=[{"kind": "router-z", "coefficient": 1e-3}],
        training__log_every=5,
        training__steps=11,
    )
    runs.run_small(config, corpus, path)
    return path


def test_records_follow_the_documentation(runs: ModuleType, corpus: Corpus, run_path):
    domains = set(corpus.domains)
    records = runs.read_records(run_path)
    schemas = {"train": TRAIN, "validation": VALIDATION, "alarm": ALARM}
    for record in records:
        check(record, schemas[record["kind"]], domains)
    steps = [(record["kind"], record["step"]) for record in records]
    assert steps == [
        ("alarm", 1),
        ("train", 5),
        ("validation", 5),
        ("train", 10),
        ("validation", 10),
        ("train", 11),
    ]
    evaluation = json.loads((run_path / "evaluation.json").read_text())
    check(evaluation, EVALUATION, domains)


@pytest.mark.parametrize("solver", ["none", "cg", "neumann"])
def test_outer_records_follow_the_documentation(runs, corpus: Corpus, tmp_path, solver):
    config = runs.small_config(
        robustness__apply_to="nothing",
        routing__link_gates=True,
        outer={
            "variables": ["mixture", "router", "link-gates"],
            "update": "gradient",
            "begin": 2,
            "every": 4,
            "solver": {"kind": solver},
        },
        training__steps=8,
    )
    runs.run_small(config, corpus, tmp_path)
    records = [r for r in runs.read_records(tmp_path) if r["kind"] == "outer"]
    assert [record["step"] for record in records] == [3, 7]
    assert records[0]["scale"] is None
    for record in records:
        check(record, OUTER, set(corpus.domains))
        assert sum(record["mixture"].values()) == pytest.approx(1)
        assert (record["solver"]["status"] == "none") == (solver == "none")


def test_the_schema_check_can_fail(runs: ModuleType, corpus: Corpus, run_path):
    record = next(r for r in runs.read_records(run_path) if r["kind"] == "train")
    for change in ({"loss": None}, {"step": 1.5}, {"extra": 1}, {"sampling": {"speech": 1}}):
        with pytest.raises(AssertionError):
            check(record | change, TRAIN, set(corpus.domains))


def test_what_records_say_adds_up(runs: ModuleType, corpus: Corpus, run_path):
    records = [r for r in runs.read_records(run_path) if r["kind"] == "train"]
    tokens_per_step = 4 * 32
    for record, window in zip(records, (5, 5, 1), strict=True):
        assert record["tokens"] == record["step"] * tokens_per_step
        assert sum(record["domain_tokens"].values()) == record["tokens"]
        # 1.7 experts a token, two layers, rounded down in each step and layer.
        assert record["budget"] == window * 2 * math.floor(1.7 * tokens_per_step)
        assert record["spend"] == record["budget"]
        assert record["batches_over"] == 0
        assert all(layer["price"] > 0 for layer in record["layers"])
        assert all(1 < layer["congestion"] <= 16 for layer in record["layers"])
        assert record["traffic"]["speech"] > 0
        assert record["traffic"]["verse"] == 0
        # A vector of 32 float32 values to an expert and one back, for each assignment.
        per_step = 2 * 32 * 4 * record["spend"] / window
        assert record["exchanged_bytes"] == {"forward": per_step, "backward": per_step}
        assert sum(sum(layer["load"]) for layer in record["layers"]) == record["spend"]
        assert sum(record["adversary"].values()) == pytest.approx(1)
        assert sum(record["sampling"].values()) == pytest.approx(1)
        squares = sum(weight**2 for weight in record["adversary"].values())
        assert record["effective_domains"] == pytest.approx(1 / squares)
        assert record["near_one_hot"] == (record["effective_domains"] < 3.9)
        for name in ("domain_loss", "experts_per_token"):
            assert record[name]["verse"] is None
            assert record[name]["speech"] > 0
        for layer in record["layers"]:
            mean = sum(layer["load"]) / len(layer["load"])
            assert layer["max_violation"] == pytest.approx(max(layer["load"]) / mean - 1)
            assert layer["min_violation"] == pytest.approx(min(layer["load"]) / mean - 1)
    assert records[0]["learning_rate"] != records[1]["learning_rate"]
    evaluation = json.loads((run_path / "evaluation.json").read_text())
    assert evaluation["budget"]["training"] == {
        "budget": sum(record["budget"] for record in records),
        "spend": sum(record["spend"] for record in records),
        "batches_over": 0,
    }
    assert evaluation["flops"] == records[-1]["flops"]
    for name in corpus.domains:
        flows = sum(sum(layer["domain_traffic"][name]) for layer in evaluation["layers"])
        steps = zip(records, (5, 5, 1), strict=True)
        expected = sum(record["traffic"][name] * window for record, window in steps) / 11
        assert flows == pytest.approx(expected, rel=1e-12)
    for name, domain in evaluation["domains"].items():
        assert domain["train_tokens"] == records[-1]["domain_tokens"][name]
        assert domain["test_tokens"] == 3 * 32


def test_the_loss_of_a_window_is_that_of_its_steps(runs: ModuleType, corpus: Corpus, tmp_path):
    """Against a run that logs every step: token means, and step means of what has no tokens."""
    changes = {"training__steps": 6, "training__evaluate_every": 50}
    runs.run_small(runs.small_config(training__log_every=1, **changes), corpus, tmp_path / "one")
    runs.run_small(runs.small_config(training__log_every=6, **changes), corpus, tmp_path / "six")
    singles, (whole,) = runs.read_records(tmp_path / "one"), runs.read_records(tmp_path / "six")
    for key in ("loss", "objective", "gradient_norm", "auxiliary_loss"):
        expected = sum(record[key] for record in singles) / 6
        assert whole[key] == pytest.approx(expected, rel=1e-12), key
    for key in ("budget", "spend"):
        assert whole[key] == sum(record[key] for record in singles)
    counts = dict.fromkeys(corpus.domains, 0)
    totals = {name: [0.0, 0] for name in corpus.domains}
    for record in singles:
        for name in corpus.domains:
            tokens = record["domain_tokens"][name] - counts[name]
            counts[name] = record["domain_tokens"][name]
            totals[name][0] += tokens * (record["domain_loss"][name] or 0)
            totals[name][1] += tokens
    for name, (loss_sum, tokens) in totals.items():
        assert whole["domain_loss"][name] == pytest.approx(loss_sum / tokens, rel=1e-12)


def test_tensorboard_holds_the_scalars(runs: ModuleType, run_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )

        events = EventAccumulator(str(run_path / "tensorboard")).Reload()
    records = [r for r in runs.read_records(run_path) if r["kind"] == "train"]
    for tag, pick in {
        "train/loss": lambda r: r["loss"],
        "train/domain_loss/speech": lambda r: r["domain_loss"]["speech"],
        "train/layers/model.layers.1.mlp/max_violation": lambda r: r["layers"][1]["max_violation"],
    }.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [record["step"] for record in records]
        assert [scalar.value for scalar in scalars] == pytest.approx(
            [pick(record) for record in records]
        )
    tags = events.Tags()["scalars"]
    assert "validation/worst_bits_per_byte" in tags
    assert "train/domain_loss/verse" not in tags
    assert not any("near_one_hot" in tag or tag.endswith("/step") for tag in tags)


def test_tensorboard_shows_a_step_once_after_a_resume(tmp_path):
    for last_step, steps in ((0, (1, 2, 3)), (2, (3, 4)), (0, (1,))):
        sink = TensorBoard(tmp_path, last_step=last_step)
        for step in steps:
            sink.write({"kind": "train", "step": step, "loss": 10.0 * last_step + step})
        sink.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )

        events = EventAccumulator(str(tmp_path)).Reload()
    shown = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    assert shown == [(1, 1.0)]


class TestJsonLines:
    def write(self, path, records, *, last_step=0):
        with contextlib.closing(JsonLines(path, last_step=last_step)) as sink:
            for record in records:
                sink.write(record)

    def test_later_steps_are_written_again(self, tmp_path):
        path = tmp_path / "below" / "metrics.jsonl"
        self.write(path, [{"step": step, "run": 1} for step in range(1, 6)])
        self.write(path, [{"step": 4, "run": 2}], last_step=3)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert records == [{"step": step, "run": 1} for step in (1, 2, 3)] + [{"step": 4, "run": 2}]
        assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]

    @pytest.mark.parametrize("tail", ['{"step": 2', '{"step": 2, "loss": 1.0}', "", "{"])
    def test_an_unfinished_line_is_dropped(self, tmp_path, tail):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n' + tail)
        self.write(path, [{"step": 2, "again": True}], last_step=2)
        assert path.read_text() == '{"step": 1}\n{"step": 2, "again": true}\n'

    def test_numbers_that_json_does_not_know_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="not JSON compliant"):
            self.write(tmp_path / "a", [{"step": 1, "loss": math.nan}])

    def test_a_record_is_on_disk_when_write_returns(self, tmp_path):
        sink = JsonLines(tmp_path / "a", last_step=0)
        sink.write({"step": 1})
        assert (tmp_path / "a").read_text() == '{"step": 1}\n'
        sink.close()
