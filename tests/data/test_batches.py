import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drgr.data import (
    check_sequence_length,
    draw_batch,
    evaluation_batches,
    evaluation_windows,
)
from drgr.data.splits import SPLITS
from drgr.errors import DataError

WEIGHTS = np.array([0.5, 0.0, 0.3, 0.2])


@pytest.fixture(scope="session")
def draw(corpus):
    def draw(step=0, seed=0, weights=WEIGHTS, batch_size=8, sequence_length=16, **options):
        return draw_batch(
            corpus,
            step=step,
            seed=seed,
            weights=np.asarray(weights),
            batch_size=batch_size,
            sequence_length=sequence_length,
            **options,
        )

    return draw


def same(a, b):
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.domain, b.domain)
    )


def test_shapes_types_and_shifted_labels(draw):
    batch = draw()
    assert batch.input_ids.shape == batch.labels.shape == (8, 16)
    assert batch.domain.shape == (8,)
    assert {x.dtype for x in (batch.input_ids, batch.labels, batch.domain)} == {torch.int64}
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])


def test_every_row_is_a_window_of_its_domain(draw, corpus):
    batch = draw(batch_size=16, sequence_length=40)
    for ids, label, domain in zip(batch.input_ids, batch.labels, batch.domain, strict=True):
        window = torch.cat([ids, label[-1:]]).numpy().astype(np.uint16).tobytes()
        stream = corpus.tokens("train", corpus.domains[domain]).tobytes()
        assert window in stream


def test_a_batch_depends_on_seed_and_step_alone(draw):
    first = draw(step=7, seed=3)
    draw(step=8, seed=3)
    assert same(first, draw(step=7, seed=3))
    assert not same(first, draw(step=8, seed=3))
    assert not same(first, draw(step=7, seed=4))
    assert not same(first, draw(step=7, seed=3, split="validation"))


@given(st.integers(0, 10**6), st.integers(1, 8), st.data())
def test_parts_of_the_rows_join_to_the_whole_batch(draw, step, parts, data):
    whole = draw(step=step)
    rows = range(0, 8, parts)
    assert torch.equal(draw(step=step, rows=rows).input_ids, whole.input_ids[list(rows)])
    cut = data.draw(st.integers(1, 7))
    pieces = [draw(step=step, rows=range(cut)), draw(step=step, rows=range(cut, 8))]
    for name in ("input_ids", "labels", "domain"):
        assert torch.equal(torch.cat([getattr(x, name) for x in pieces]), getattr(whole, name))


weight_vectors = st.lists(
    st.floats(0, 1e6) | st.just(0.0), min_size=4, max_size=4
).filter(lambda weights: sum(weights) > 0)  # fmt: skip


@given(weight_vectors, st.integers(1, 40), st.integers(0, 10**6))
def test_domain_counts_are_within_one_of_their_expectation(draw, weights, batch_size, step):
    batch = draw(step=step, weights=weights, batch_size=batch_size, sequence_length=2)
    counts = np.bincount(batch.domain, minlength=4)
    expected = batch_size * np.array(weights) / math.fsum(weights)
    assert (np.abs(counts - expected) < 1 + 1e-9).all()
    assert (counts[np.array(weights) == 0] == 0).all()


def test_each_row_and_each_start_are_distributed_as_promised(draw, corpus):
    steps, batch_size = 1500, 3
    drawn = [draw(step=s, batch_size=batch_size, sequence_length=4) for s in range(steps)]
    domains = torch.stack([batch.domain for batch in drawn]).numpy()
    for row in range(batch_size):
        share = np.bincount(domains[:, row], minlength=4) / steps
        # Five standard deviations of a share over that many independent steps.
        tolerance = 5 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / steps)
        assert (np.abs(share - WEIGHTS) <= tolerance).all()
    pair = np.mean(domains[:, 0] == domains[:, 1])
    assert pair < (WEIGHTS**2).sum()  # systematic sampling spreads a batch over the domains


def test_starts_are_uniform_and_reach_both_ends(draw, corpus, monkeypatch):
    stream = np.arange(13, dtype=np.uint16)
    monkeypatch.setattr(type(corpus), "tokens", lambda *_: stream)
    starts = np.concatenate(
        [draw(step=s, sequence_length=8).input_ids[:, 0].numpy() for s in range(250)]
    )
    counts = np.bincount(starts)
    assert len(counts) == 5  # starts 0 to 4: a window is nine tokens
    assert np.abs(counts / 2000 - 0.2).max() < 5 * math.sqrt(0.2 * 0.8 / 2000)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0], r"weights must have shape \(4,\), one a domain, got \(2,\)"),
        ([1.0, -1.0, 1.0, 1.0], "finite, not negative and not all 0, got"),
        ([1.0, math.nan, 1.0, 1.0], "finite, not negative"),
        ([1.0, math.inf, 1.0, 1.0], "finite, not negative"),
        ([0.0] * 4, "not all 0"),
    ],
)
def test_bad_weights_are_refused(draw, weights, message):
    with pytest.raises(ValueError, match=message):
        draw(weights=weights)


@pytest.mark.parametrize("weights", [[1e-320] * 4, [1e308] * 4])
def test_extreme_weights_keep_their_proportions(draw, weights):
    assert np.bincount(draw(weights=weights).domain).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": -1}, "step must be a finite number of at least 0, got -1"),
        ({"seed": -1}, "seed must be a finite number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"rows": range(0)}, r"rows must be a non-empty part of range\(8\)"),
        ({"rows": range(4, 9)}, r"rows must be a non-empty part of range\(8\)"),
        ({"rows": range(-1, 3)}, r"rows must be a non-empty part of range\(8\)"),
    ],
)
def test_bad_sizes_are_refused(draw, options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


def test_an_unknown_split_is_refused(draw):
    with pytest.raises(DataError, match=r"unknown split 'tests'; did you mean 'test'\?"):
        draw(split="tests")


def test_a_domain_shorter_than_a_window_is_named(draw, corpus):
    with pytest.raises(DataError, match=r"has \d+ train tokens; sequence_length 99999999 needs"):
        draw(sequence_length=99999999)


def collect(corpus, **options):
    options = {"split": "test", "domain": "verse", "batch_size": 7, "sequence_length": 50} | options
    return list(evaluation_batches(corpus, **options))


def test_all_evaluation_windows_cover_the_stream_once(corpus):
    batches = collect(corpus, max_windows=None)
    labels = torch.cat([batch.labels for batch in batches]).flatten().numpy()
    stream = corpus.tokens("test", "verse")
    assert np.array_equal(labels, stream[1 : len(labels) + 1])
    assert len(stream) - 1 - len(labels) < 50
    assert {int(x) for batch in batches for x in batch.domain} == {corpus.domains.index("verse")}
    count = evaluation_windows(corpus, split="test", domain="verse", sequence_length=50)
    assert count == sum(len(batch.domain) for batch in batches)
    assert [len(batch.domain) for batch in batches[:-1]] == [7] * (len(batches) - 1)
    assert len(batches[-1].domain) == (count % 7 or 7)


@pytest.mark.parametrize("most", [1, 5, 10, 10**6])
def test_fewer_windows_are_spread_evenly(corpus, most):
    every = torch.cat([batch.input_ids for batch in collect(corpus, max_windows=None)])
    some = torch.cat([batch.input_ids for batch in collect(corpus, max_windows=most)])
    places = [int(torch.nonzero((every == row).all(1))[0]) for row in some]
    assert len(places) == min(most, len(every))
    gaps = np.diff([*places, len(every)])
    assert places[0] == 0
    assert gaps.max() - gaps.min() <= 1


def test_evaluation_is_fixed(corpus):
    for a, b in zip(collect(corpus, max_windows=9), collect(corpus, max_windows=9), strict=True):
        assert same(a, b)


@pytest.mark.parametrize("name", ["batch_size", "sequence_length", "max_windows"])
def test_bad_evaluation_sizes_are_refused_at_once(corpus, name):
    options = {"batch_size": 1, "sequence_length": 1, "max_windows": None, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        evaluation_batches(corpus, split="test", domain="verse", **options)


def test_check_sequence_length_names_the_short_domain(corpus):
    shortest = min(len(corpus.tokens(s, d)) for s in SPLITS for d in corpus.domains)
    check_sequence_length(corpus, shortest - 1)
    message = rf"domain '\w+' has {shortest} \w+ tokens; .* needs at least {shortest + 1}"
    with pytest.raises(DataError, match=message):
        check_sequence_length(corpus, shortest)
    with pytest.raises(ValueError, match="sequence_length must be at least 1"):
        check_sequence_length(corpus, 0)
