"""Unseen domains: no part of training reads them, and the final evaluation reports them apart."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from drgr.cli.display import evaluation_summary
from drgr.data import Corpus, draw_batch
from drgr.errors import ConfigError, DataError
from drgr.evaluation import ProtocolSettings, evaluate_domains
from drgr.training import RunDirectory, build_run, evaluate_protocol, parse_config, train
from drgr.training.finish import evaluate_run, finish
from drgr.training.loop_state import LoopState

UNSEEN = "fiction"
GIVEN = {"speech": 0.5, "factbook": 0.25, "verse": 0.25}
COMMON: dict[str, Any] = {
    "data__unseen": [UNSEEN],
    "data__sampling": GIVEN,
    "training__steps": 6,
    "training__evaluate_every": 2,
    "training__checkpoint_every": 3,
}
OUTER = {"variables": ["mixture"], "begin": 1, "every": 2, "windows": 1}
NO_ADVERSARY = {"robustness__apply_to": "nothing"}
STEERED: dict[str, dict[str, Any]] = {
    "uniform": {"data__sampling": "uniform", **NO_ADVERSARY},
    "natural": {"data__sampling": "natural", **NO_ADVERSARY},
    "given": NO_ADVERSARY,
    "validation losses": {},
    "training losses": {"robustness__losses": "train"},
    "objective": {"robustness__apply_to": "objective"},
    "chi-square": {"robustness__divergence": "chi-square"},
    "group DRO": {
        "robustness__apply_to": "objective",
        "robustness__losses": "train",
        "robustness__nominal": "previous",
        "robustness__uniform_share": 0.1,
    },
    "outer look-ahead": {**NO_ADVERSARY, "outer": OUTER},
    "outer gradient": {
        **NO_ADVERSARY,
        "outer": {**OUTER, "update": "gradient", "solver": {"kind": "cg", "max_steps": 1}},
    },
    "link gates": {"routing__link_gates": True},
}


def recorded_reads(monkeypatch) -> list[tuple[str, str]]:
    """Every read of a token stream from now on, as split and domain."""
    reads: list[tuple[str, str]] = []
    read = Corpus.tokens

    def record(self: Corpus, split: str, domain: str) -> Any:
        reads.append((split, domain))
        return read(self, split, domain)

    monkeypatch.setattr(Corpus, "tokens", record)
    return reads


class ReadsByStep:
    """An observer that notes how many reads there were at the end of each step."""

    def __init__(self, reads: list[tuple[str, str]]) -> None:
        self._reads = reads
        self.counts: list[int] = []

    def on_step(self, _: Any) -> None:
        self.counts.append(len(self._reads))

    def on_record(self, record: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("changes", STEERED.values(), ids=STEERED)
def test_nothing_in_training_reads_an_unseen_domain(
    runs: ModuleType, corpus: Corpus, tmp_path: Path, monkeypatch, changes
):
    run = build_run(runs.small_config(**{**COMMON, **changes}), corpus)
    reads = recorded_reads(monkeypatch)
    observer = ReadsByStep(reads)
    outcome = train(run, RunDirectory(tmp_path), observer=observer, environment={})
    assert len(observer.counts) == 6
    trained = reads[: observer.counts[-1]]
    # Everything else is read, in training and in validation.
    assert {domain for split, domain in trained if split == "validation"} == set(GIVEN)
    assert {domain for split, domain in trained if split == "train"} <= set(GIVEN)
    assert {split for split, domain in reads if domain == UNSEEN} == {"test"}
    # Whatever holds a number of each domain has none for it.
    for record in runs.read_records(tmp_path):
        tables = [value for value in record.values() if isinstance(value, dict)]
        assert all(UNSEEN not in table for table in tables)
    record = outcome.evaluation
    assert list(record["domains"]) == [name for name in corpus.domains if name != UNSEEN]
    assert sum(entry["adversarial_weight"] for entry in record["domains"].values()) == (
        pytest.approx(1)
    )
    assert list(record["unseen"]) == [UNSEEN]


def test_experts_as_groups_leave_it_out_too(
    runs: ModuleType, corpus: Corpus, tmp_path: Path, monkeypatch
):
    experts = {"groups": "experts", "apply_to": "objective", "losses": "train"}
    changes = {"robustness": {**experts, "unit": "nats-per-token", "begin": 0, "every": 1}}
    run = build_run(runs.small_config(**{**COMMON, **changes}), corpus)
    reads = recorded_reads(monkeypatch)
    train(run, RunDirectory(tmp_path), observer=ReadsByStep(reads), environment={})
    assert {split for split, domain in reads if domain == UNSEEN} == {"test"}


def other_text(corpus: Corpus, folder: Path) -> Corpus:
    """The same corpus with the tokens of the unseen domain in another order."""
    copy = folder / "corpus"
    shutil.copytree(corpus.directory, copy)
    for path in (copy / "tokens" / UNSEEN).iterdir():
        tokens = np.fromfile(path, dtype="<u2")
        np.random.default_rng(0).permutation(tokens).tofile(path)
    return dataclasses.replace(corpus, directory=copy)


def test_other_text_of_it_changes_its_own_number_only(
    runs: ModuleType, corpus: Corpus, tmp_path: Path
):
    config = runs.small_config(**COMMON)
    first, run = runs.run_small(config, corpus, tmp_path / "a")
    second, other = runs.run_small(config, other_text(corpus, tmp_path), tmp_path / "b")
    runs.assert_same(runs.final_state(other), runs.final_state(run))
    left, right = (runs.without_clock(outcome.evaluation) for outcome in (first, second))
    before, after = left.pop("unseen"), right.pop("unseen")
    assert left == right
    assert after[UNSEEN]["bits_per_byte"] > before[UNSEEN]["bits_per_byte"]


@pytest.fixture(scope="module")
def finished(runs: ModuleType, corpus: Corpus, tmp_path_factory) -> Iterator[tuple[Any, Any, Path]]:
    """A finished run with closed link gates, its record and its directory."""
    path = tmp_path_factory.mktemp("finished")
    config = runs.small_config(**COMMON, routing__link_gates=True)
    outcome, run = runs.run_small(config, corpus, path)
    return outcome.evaluation, run, path


def test_its_number_is_that_of_an_evaluation_apart(finished, corpus: Corpus):
    record, run, path = finished
    assert json.loads((path / "evaluation.json").read_text()) == record
    scores = evaluate_domains(
        run.attachment,
        corpus,
        split="test",
        max_windows=3,
        sequence_length=32,
        batch_size=4,
        knows_sources=False,
    )
    index = corpus.domains.index(UNSEEN)
    expected = float(scores.losses[index])
    ratio = corpus.bytes_per_token("test", UNSEEN)
    assert record["unseen"] == {
        UNSEEN: {
            "test_tokens": 3 * 32,
            "loss": pytest.approx(expected, rel=1e-6),
            "bits_per_byte": pytest.approx(expected / math.log(2) / ratio, rel=1e-6),
            "experts_per_token": pytest.approx(float(scores.experts_per_token[index])),
        }
    }
    bits = {name: entry["bits_per_byte"] for name, entry in record["domains"].items()}
    assert record["mean_bits_per_byte"] == pytest.approx(sum(bits.values()) / 3)
    assert record["worst_domain"] == max(bits, key=bits.__getitem__)
    assert f"{UNSEEN} at {record['unseen'][UNSEEN]['bits_per_byte']:.3f}" in (
        evaluation_summary(record)
    )


def test_link_gates_treat_it_as_of_no_known_source(finished, corpus: Corpus, tmp_path: Path):
    """With the gates of the first domain, index 0 in its own corpus, the number would differ."""
    record, run, path = finished
    state = LoopState(run, RunDirectory(path))
    assert state.load_latest()
    gates = run.attachment.link_gates.values
    gates.data[:, 0, ::2] = 0.0
    again = finish(run, state, RunDirectory(tmp_path))
    gates.data.fill_(1.0)
    unseen = record["unseen"][UNSEEN]["loss"]
    assert again["unseen"][UNSEEN]["loss"] == pytest.approx(unseen, abs=1e-6)
    first = corpus.domains[0]
    assert abs(again["domains"][first]["loss"] - record["domains"][first]["loss"]) > 1e-4


def test_evaluating_the_run_again_reports_it_again(finished, runs: ModuleType, corpus: Corpus):
    record, run, path = finished
    fresh = build_run(run.config, corpus)
    again = evaluate_run(fresh, RunDirectory(path), split="test", max_windows=3)
    assert runs.without_clock(again) == runs.without_clock(record)
    settings = ProtocolSettings(
        split="test",
        max_windows=3,
        sequence_length=32,
        batch_size=4,
        autocast=None,
        warmup=0,
        repeats=1,
    )
    evaluation, protocol = evaluate_protocol(fresh, RunDirectory(path), settings)
    assert evaluation["unseen"] == record["unseen"]
    assert list(protocol["domains"]) == list(record["domains"])


def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    runs: ModuleType, corpus: Corpus, tmp_path: Path
):
    config = runs.small_config(**COMMON)
    _, whole = runs.run_small(config, corpus, tmp_path / "whole")
    with pytest.raises(runs.Killed):
        runs.run_small(config, corpus, tmp_path / "cut", watcher=runs.Watcher(kill_after=5))
    _, resumed = runs.run_small(config, corpus, tmp_path / "cut", resume=True)
    runs.assert_same(runs.final_state(resumed), runs.final_state(whole))
    assert runs.results(tmp_path / "cut") == runs.results(tmp_path / "whole")


def test_a_run_is_not_resumed_with_others_unseen(runs: ModuleType, corpus: Corpus):
    marks = {
        runs.small_config(**COMMON | {"data__unseen": unseen}).fingerprint("c")
        for unseen in ([], ["verse"], [UNSEEN])
    }
    assert len(marks) == 3


def test_without_unseen_domains_the_record_has_none(
    runs: ModuleType, corpus: Corpus, tmp_path: Path
):
    outcome, run = runs.run_small(runs.small_config(training__steps=1), corpus, tmp_path)
    assert run.unseen is None
    assert outcome.evaluation["unseen"] == {}
    assert "unseen" not in evaluation_summary(outcome.evaluation)


def test_a_reference_with_more_domains_serves(runs: ModuleType, corpus: Corpus, tmp_path: Path):
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(dict.fromkeys(corpus.domains, 3.0)))
    run = build_run(runs.small_config(**COMMON, robustness__reference=str(path)), corpus)
    assert len(run.adversary.losses) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__unseen": ["prose"]},
            r"data.unseen must name domains .*'verse'\], got \['prose'\]",
        ),
        (
            {"data__unseen": ["speech", "factbook", "fiction", "verse"]},
            "data.unseen must leave training at least one domain of corpus fixture, got all of",
        ),
        (
            {"data__unseen": ["verse"], "data__sampling": {"speech": 0.5, "verse": 0.5}},
            r"data.sampling must name the domains of corpus fixture, "
            r"\['speech', 'factbook', 'fiction'\], got \['speech', 'verse'\]",
        ),
        (
            {
                "data__unseen": ["verse"],
                "data__sampling": {"speech": 0, "factbook": 0, "fiction": 0, "verse": 1},
            },
            "data.sampling must give at least one domain a share above 0",
        ),
    ],
)
def test_refusals(runs: ModuleType, corpus: Corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_run(runs.small_config(**changes), corpus)


def test_its_share_in_a_given_mixture_counts_for_nothing(runs: ModuleType, corpus: Corpus):
    sampling = {"speech": 1, "factbook": 2, "fiction": 5, "verse": 1}
    config = runs.small_config(data__unseen=[UNSEEN], data__sampling=sampling)
    assert build_run(config, corpus).adversary.base_sampling.tolist() == [0.25, 0.5, 0.25]


def test_each_domain_is_named_once():
    with pytest.raises(ConfigError, match=r"data: unseen must name each domain once, got \['a'"):
        parse_config({"data": {"unseen": ["a", "b", "a"]}})


def test_a_restricted_corpus_knows_nothing_else(corpus: Corpus):
    part = corpus.restricted(["verse", "speech"])
    assert part.domains == ("speech", "verse")
    assert part.natural_weights().sum() == pytest.approx(1)
    batch = draw_batch(
        part, step=0, seed=0, weights=np.array([0.0, 1.0]), batch_size=2, sequence_length=8
    )
    assert batch.domain.tolist() == [1, 1]
    with pytest.raises(DataError, match="no domain 'fiction'"):
        part.tokens("test", "fiction")
    with pytest.raises(DataError, match="no domain 'prose'"):
        corpus.restricted(["prose"])


def test_declared_weights_of_a_part_without_weight_are_refused(corpus: Corpus):
    entries = corpus.manifest["domains"]
    weights = dict(zip(corpus.domains, (1.0, 3.0, 0.0, 0.0), strict=True))
    declared = {name: entries[name] | {"weight": weights[name]} for name in entries}
    weighted = dataclasses.replace(corpus, manifest=corpus.manifest | {"domains": declared})
    kept = weighted.restricted(["factbook", "verse"])
    assert kept.declared_weights().tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match=r"gives the domains \['fiction', 'verse'\] no weight"):
        weighted.restricted(["fiction", "verse"]).declared_weights()
