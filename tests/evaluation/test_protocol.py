"""The whole protocol: its record against its parts and its documentation."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drgr.data import Corpus
from drgr.errors import CheckpointError, ConfigError, DataError
from drgr.evaluation import (
    SCHEMA,
    PlainModel,
    ProtocolSettings,
    check_subject,
    measure,
    protocol_record,
    read_reference,
)
from drgr.evaluation.token_pass import TokenScores
from drgr.models import tiny_olmoe
from drgr.training import RunDirectory, build_run, evaluate_protocol

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
SETTINGS = ProtocolSettings(
    sequence_length=32, batch_size=4, max_windows=3, num_mixtures=50, warmup=1, repeats=2
)


@pytest.fixture(scope="module")
def trained(runs: ModuleType, corpus: Corpus, tmp_path_factory) -> Path:
    """A run that never draws one of its domains."""
    path = tmp_path_factory.mktemp("runs") / "trained"
    shares = {"speech": 0.5, "factbook": 0.25, "fiction": 0.25, "verse": 0.0}
    config = runs.small_config(
        training__steps=4, data__sampling=shares, robustness__apply_to="nothing"
    )
    runs.run_small(config, corpus, path)
    return path


@pytest.fixture(scope="module")
def of_run(runs: ModuleType, corpus: Corpus, trained: Path):
    from drgr.training import read_config

    run = build_run(read_config(trained / "config.json"), corpus)
    _, record = evaluate_protocol(run, RunDirectory(trained), SETTINGS, reference=trained)
    return record


def build(corpus: Corpus):
    return tiny_olmoe(
        vocabulary_size=corpus.vocabulary_size,
        hidden_size=16,
        expert_size=16,
        num_layers=2,
        num_heads=2,
        num_experts=4,
        max_positions=64,
        seed=1,
    )


@pytest.fixture(scope="module")
def of_model(corpus: Corpus):
    subject = PlainModel(build(corpus))
    scores, compute = measure(subject, corpus, SETTINGS)
    return scores, compute, describe(scores, compute)


def describe(scores, compute, **options):
    return protocol_record(
        scores,
        compute,
        SETTINGS,
        subject={"kind": "model", "name": "tiny", "step": None},
        corpus={"corpus": "fixture", "fingerprint": "x"},
        layer_names=("a.0", "a.1"),
        **options,
    )


def shape(value, names, path=""):
    """The structure of a record: names of domains and lengths of lists left out."""
    if isinstance(value, dict):
        merged = {}
        for key, inner in value.items():
            merged.setdefault("*" if key in names else key, shape(inner, names, f"{path}.{key}"))
        return merged
    if isinstance(value, list):
        return [shape(value[0], names, path)] if value else ["?"]
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    return "number" if isinstance(value, int | float) else "text"


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_documentation_shows_the_record(corpus: Corpus, of_run):
    (block,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    documented = shape(json.loads(block), {"email", "chem"})
    found = shape(of_run | {"environment": {"command": "x"}}, set(corpus.domains))
    # What may be null or empty shows a value on one side.
    assert found["data"].pop("max_windows") == "number"
    assert documented["data"].pop("max_windows") == "NoneType"
    assert found["robustness"].pop("held_out_domains") == ["text"]
    assert documented["robustness"].pop("held_out_domains") == ["?"]
    assert found == documented
    assert of_run["schema"] == SCHEMA == json.loads(block)["schema"]


def test_records_are_strict_json(of_run, of_model):
    for record in (of_run, of_model[2]):
        assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_summaries_follow_from_the_domains(of_run):
    bits = {name: entry["bits_per_byte"] for name, entry in of_run["domains"].items()}
    robust, fairness = of_run["robustness"], of_run["fairness"]
    assert robust["mean"] == pytest.approx(sum(bits.values()) / 4)
    assert robust["worst"] == max(bits.values()) == bits[robust["worst_domain"]]
    top = sorted(bits.values(), reverse=True)
    assert robust["cvar"][1]["value"] == pytest.approx((top[0] + top[1]) / 2)
    assert robust["curve"]["value"][0] == pytest.approx(robust["mean"])
    assert robust["curve"]["converged"]
    assert fairness["max_minus_min"] == pytest.approx(top[0] - top[-1])
    pairs = sum(abs(a - b) for a in top for b in top)
    assert fairness["gini"] == pytest.approx(pairs / (2 * 4 * sum(top)))
    assert of_run["compute"]["flops"]["agrees"]
    spend = sum(sum(layer["load"]) for layer in of_run["balance"])
    assert of_run["compute"]["spend"]["assignments"] == spend


def test_the_excess_over_the_evaluation_of_training_is_none(trained, of_run):
    """The reference is what ended the same run's training, on the same three windows."""
    excess = of_run["robustness"]["excess"]
    assert excess["reference"] == str(trained / "evaluation.json")
    assert set(excess["by_domain"].values()) == {0.0}


def test_domains_without_training_are_said_to_be_held_out(of_run):
    assert of_run["robustness"]["held_out_domains"] == ["verse"]
    held_out = {name: d["held_out_of_training"] for name, d in of_run["domains"].items()}
    assert held_out == {"speech": False, "factbook": False, "fiction": False, "verse": True}


def test_what_is_not_known_of_a_model_is_null(of_model):
    record = of_model[2]
    assert record["training"] is None
    assert record["robustness"]["held_out_domains"] is None
    assert record["compute"]["spend"]["budget"] is None
    assert {d["held_out_of_training"] for d in record["domains"].values()} == {None}
    assert {e["per_token"] for e in record["fairness"]["experts"].values()} == {2.0}
    assert {e["unused_candidate_share"] for e in record["fairness"]["experts"].values()} == {0.0}


def test_tails_and_congestion_by_hand(of_model):
    scores, compute, _ = of_model
    losses = torch.arange(100, dtype=torch.float32)
    load = torch.tensor([[[6, 2], [2, 6]], [[0, 8], [0, 8]]])
    sums = replace(
        scores.domains,
        domains=("a", "b"),
        loss_sums=torch.tensor([10.0, 10.0], dtype=torch.float64),
        num_tokens=torch.tensor([4, 8]),
        expert_load=load,
        bytes_per_token=torch.tensor([2.0, 2.0], dtype=torch.float64),
    )
    given = TokenScores(
        domains=sums,
        window_losses=(torch.tensor([1.0, 3.0]), torch.tensor([2.0])),
        token_losses=(losses[:50], losses[50:]),
        kept_per_window=25,
        sequence_length=50,
        decile_loss_sums=torch.ones(2, 10, dtype=torch.float64),
        decile_tokens=torch.tensor([[2] * 10, [0] * 10]),
        expert_counts=torch.tensor([[2, 0, 2], [0, 4, 0]]),
        entropy=torch.tensor([[0.2, 0.8], [math.nan, math.nan]], dtype=torch.float64),
        layers_over=0,
        has_budget=False,
    )
    record = describe(given, compute)
    tails = record["fairness"]["token_losses"]
    assert tails["pooled"]["cvar"][1] == {"level": 0.1, "value": pytest.approx(94.5)}
    assert tails["by_domain"]["a"]["cvar"][1]["value"] == pytest.approx(47.0)
    assert (tails["exact"], tails["kept"], tails["of"]) == (False, 100, 12)
    deciles = record["fairness"]["frequency_deciles"]
    assert deciles["by_domain"]["a"]["loss"] == [0.5] * 10
    assert deciles["by_domain"]["b"]["loss"] == [None] * 10
    assert deciles["pooled"]["loss"] == [1.0] * 10
    experts = record["fairness"]["experts"]
    assert (experts["a"]["per_token"], experts["b"]["per_token"]) == (1.0, 1.0)
    assert (experts["a"]["dropped_share"], experts["b"]["dropped_share"]) == (0.5, 0.0)
    assert experts["a"]["unused_candidate_share"] == 0.5
    first, second = record["balance"]
    # Per token: 1.5, 0.5, 0.25 and 0.75 on the links of the first layer.
    assert first["congestion"] == pytest.approx(1.5 / 0.75)
    assert first["routing_entropy"] == pytest.approx((4 * 0.2 + 8 * 0.8) / 12)
    assert first["specialisation"] == {"a": [0.75, 0.25], "b": [0.25, 0.75]}
    assert (second["dead_experts"], second["overload"]) == (1, 2.0)
    assert second["routing_entropy"] is None
    errors = [d["loss_standard_error"] for d in record["domains"].values()]
    assert errors == [pytest.approx(1.0), None]
    bits = record["domains"]["a"]["bits_per_byte_standard_error"]
    assert bits == pytest.approx(1 / math.log(2) / 2)


def test_what_does_not_fit_is_refused_early(corpus: Corpus):
    subject = PlainModel(build(corpus))
    with pytest.raises(DataError, match="unknown split 'tset'"):
        check_subject(subject, corpus, replace(SETTINGS, split="tset"))
    with pytest.raises(ConfigError, match="at most the model's 64 positions, got 100"):
        check_subject(subject, corpus, replace(SETTINGS, sequence_length=100))
    subject.model.config.vocab_size = 100
    with pytest.raises(ConfigError, match="knows 100 tokens, but corpus fixture has"):
        check_subject(subject, corpus, SETTINGS)


def test_a_run_without_a_checkpoint_is_refused(runs: ModuleType, corpus: Corpus, tmp_path):
    run = build_run(runs.small_config(), corpus)
    with pytest.raises(CheckpointError, match="has no whole checkpoint to evaluate"):
        evaluate_protocol(run, RunDirectory(tmp_path), SETTINGS)


class TestReference:
    def write(self, path, content):
        path.write_text(json.dumps(content))
        return path

    def record(self, **bits):
        return {
            "split": "test",
            "domains": {name: {"bits_per_byte": value} for name, value in bits.items()},
        }

    def test_the_protocol_of_a_run_is_preferred(self, tmp_path):
        self.write(tmp_path / "evaluation.json", self.record(a=1.0))
        assert read_reference(tmp_path, split="test", domains=["a"]).bits_per_byte.tolist() == [1]
        content = self.record(a=2.0, b=3.0)
        content["data"] = {"split": content.pop("split")}
        self.write(tmp_path / "protocol.json", content)
        found = read_reference(tmp_path, split="test", domains=["b", "a"])
        assert found.bits_per_byte.tolist() == [3, 2]
        assert found.path == tmp_path / "protocol.json"

    @pytest.mark.parametrize("content", [[], {}, {"split": "test", "domains": {"a": 1}}, "x"])
    def test_other_files_are_refused(self, tmp_path, content):
        path = self.write(tmp_path / "file.json", content)
        with pytest.raises(ConfigError, match=r"must be a protocol\.json or evaluation\.json"):
            read_reference(path, split="test", domains=["a"])

    def test_missing_files_splits_and_domains_are_named(self, tmp_path):
        with pytest.raises(ConfigError, match="nowhere"):
            read_reference(tmp_path / "nowhere", split="test", domains=["a"])
        path = self.write(tmp_path / "evaluation.json", self.record(a=1.0))
        with pytest.raises(ConfigError, match="of the test split, but the validation split"):
            read_reference(path, split="validation", domains=["a"])
        with pytest.raises(ConfigError, match=r"got none of \['b'\]"):
            read_reference(path, split="test", domains=["a", "b"])
