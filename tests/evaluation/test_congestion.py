"""Congestion coefficients in the records of a run, against loops over windows and tokens."""

import json
import math
from types import ModuleType

import numpy as np
import pytest
import torch

from drgr.data import Corpus
from drgr.evaluation import (
    AttachedModel,
    evaluate_domains,
    evaluate_tokens,
    track_record,
    validation_record,
)
from drgr.evaluation.congestion import NUM_BATCHES, RoutingSamples, congestion_record
from drgr.training import RunDirectory, build_run
from drgr.training.finish import evaluate_run

LENGTH, WINDOWS = 32, 5


@pytest.fixture(scope="module")
def path(runs: ModuleType, corpus: Corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    config = runs.small_config(training__steps=8, training__evaluate_every=1)
    runs.run_small(config, corpus, path)
    return path


@pytest.fixture(scope="module")
def run(runs: ModuleType, corpus: Corpus):
    return build_run(runs.small_config(), corpus)


def evaluated(run, corpus, batch_size):
    return evaluate_domains(
        run.attachment,
        corpus,
        split="test",
        max_windows=WINDOWS,
        sequence_length=LENGTH,
        batch_size=batch_size,
    )


def slope(loads, qualities):
    """The coefficient of pooled loads, in plain numpy."""
    share = loads / loads.sum()
    used = loads > 0
    appeal = qualities[used] - np.log(share[used])
    excess = share[used] - share[used].mean()
    return float((excess * appeal).sum() / (excess**2).sum())


def test_estimates_against_a_loop_over_windows(run, corpus: Corpus):
    scores = evaluated(run, corpus, batch_size=3)
    model = run.attachment.model.eval()
    loads = np.zeros((2, 8))
    logs: list[list[np.ndarray]] = [[], []]
    for domain in corpus.domains:
        tokens = corpus.tokens("test", domain)
        count = (len(tokens) - 1) // LENGTH
        for start in [number * count // WINDOWS * LENGTH for number in range(WINDOWS)]:
            ids = torch.tensor([int(token) for token in tokens[start : start + LENGTH]])
            with run.attachment.record() as records, torch.no_grad():
                model(input_ids=ids.unsqueeze(0), use_cache=False)
            for layer, routing in enumerate(records):
                for position in range(1, LENGTH, 2):
                    kept = routing.plan.expert_ids[position][routing.plan.keep[position]]
                    loads[layer, kept.numpy()] += 1
                chances = routing.logits.double().softmax(dim=1)[0::2].mean(dim=0)
                # Each of the 20 windows is a batch of its own.
                logs[layer].append(chances.log().numpy())
    layers = validation_record(scores, step=1)["layers"]
    for layer, record in enumerate(layers):
        found = record["congestion_coefficient"]
        expected = slope(loads[layer], np.mean(logs[layer], axis=0))
        assert found["estimate"] == pytest.approx(expected, rel=1e-4)
        assert found["lower"] < found["estimate"] < found["upper"]


def test_neither_batches_of_a_pass_nor_the_protocol_change_them(run, corpus: Corpus):
    first, other = (evaluated(run, corpus, batch_size=size).samples for size in (2, 5))
    protocol = evaluate_tokens(
        AttachedModel(run.attachment, knows_sources=True),
        corpus,
        split="test",
        max_windows=WINDOWS,
        sequence_length=LENGTH,
        batch_size=4,
    ).domains.samples
    for samples in (other, protocol):
        assert torch.equal(samples.loads, first.loads)
        assert torch.equal(samples.tokens, first.tokens)
        torch.testing.assert_close(samples.probabilities, first.probabilities)


def filled(scores, *, window_count=2):
    samples = RoutingSamples.zeros(num_layers=1, num_experts=3, device=torch.device("cpu"))
    expert_ids = torch.tensor([[0], [1], [0], [1], [0], [2], [1], [1]])
    samples.add(
        0,
        (NUM_BATCHES - 1, window_count),
        expert_ids=expert_ids,
        keep=torch.ones(8, 1, dtype=torch.bool),
        scores=scores,
    )
    return samples


def test_windows_are_dealt_in_turn():
    samples = filled(torch.full((8, 3), 1 / 3))
    assert samples.loads[NUM_BATCHES - 1, 0].tolist() == [0, 2, 0]
    assert samples.loads[0, 0].tolist() == [0, 1, 1]
    assert samples.tokens[:, 0].nonzero().flatten().tolist() == [0, NUM_BATCHES - 1]


def test_what_is_not_defined_is_none():
    nothing = {"estimate": None, "lower": None, "upper": None}
    assert congestion_record(filled(None), 0) == nothing
    empty = RoutingSamples.zeros(num_layers=1, num_experts=3, device=torch.device("cpu"))
    assert congestion_record(empty, 0) == nothing
    even = torch.full((8, 3), 1 / 3)
    known = congestion_record(filled(even), 0)
    # Loads of 3 and 1 in the two experts in use, of equal quality.
    assert known["estimate"] == pytest.approx((math.log(1 / 4) - math.log(3 / 4)) / (2 / 4))
    alone = congestion_record(filled(even, window_count=1), 0)
    assert alone["estimate"] is not None
    assert alone["lower"] is alone["upper"] is None
    # An expert that no token could want has no quality.
    unwanted = torch.tensor([[0.5, 0.5, 0.0]]).expand(8, 3)
    assert congestion_record(filled(unwanted), 0)["estimate"] is None


def test_a_track_needs_six_evaluations():
    assert track_record(range(6), [1.0, 2.0, None, 2.0, 1.0, 0.0]) is None
    found = track_record([10 * step for step in range(8)], [0.0, 4, 8, 8, 8, 8, 6, 4])
    assert (found["first_kink"], found["second_kink"]) == (20, 50)
    assert found["slopes"] == pytest.approx([0.4, 0.0, -0.2], abs=1e-9)
    assert found["three_phases"] is True
    assert found["peak"] == 8


def test_the_track_is_that_of_the_validations(runs: ModuleType, corpus: Corpus, path):
    evaluation = json.loads((path / "evaluation.json").read_text())
    validations = [one for one in runs.read_records(path) if one["kind"] == "validation"]
    assert [one["step"] for one in validations] == list(range(1, 8))
    for layer, record in enumerate(evaluation["layers"]):
        estimates = [
            one["layers"][layer]["congestion_coefficient"]["estimate"] for one in validations
        ]
        track = record["congestion_track"]
        assert track["peak"] == max(estimates)
        assert track["peak_step"] == validations[estimates.index(max(estimates))]["step"]
    # Records of an earlier version do without.
    old = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for one in old:
        for layer in one.get("layers", []):
            layer.pop("congestion_coefficient", None)
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in old))
    config = runs.small_config(training__steps=8, training__evaluate_every=1)
    again = evaluate_run(build_run(config, corpus), RunDirectory(path), split="test", max_windows=3)
    assert [layer["congestion_track"] for layer in again["layers"]] == [None, None]
