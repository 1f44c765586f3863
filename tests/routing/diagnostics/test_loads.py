"""Diagnostics of loads, router rows and correlations against loops, numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from drgr.routing import (
    dead_experts,
    load_percentiles,
    load_violations,
    mean_violation,
    overload_factor,
    router_similarity,
    score_activation_correlation,
    source_loads,
    specialisation_histogram,
)


def violations_by_loop(counts):
    mean = sum(counts) / len(counts)
    if mean == 0:
        return 0.0, 0.0, 0.0
    relative = [c / mean - 1 for c in counts]
    return max(relative), min(relative), sum(abs(r) for r in relative) / len(relative)


def test_violations_of_batches_and_of_their_sum():
    loads = torch.randint(0, 9, (6, 5))
    loads[3] = 0
    found = load_violations(loads)
    rows = [violations_by_loop(row) for row in loads.tolist()]
    batch = np.mean(rows, axis=0)
    pooled = violations_by_loop(loads.sum(dim=0).tolist())
    got = (found.batch_max, found.batch_min, found.batch_mean)
    assert [float(x) for x in got] == pytest.approx(list(batch))
    got = (found.global_max, found.global_min, found.global_mean)
    assert [float(x) for x in got] == pytest.approx(list(pooled))
    assert float(found.worst_batch) == pytest.approx(max(row[0] for row in rows))


def test_batches_that_favour_different_experts_are_even_globally():
    found = load_violations(torch.tensor([[4, 0], [0, 4]]))
    assert float(found.batch_max) == 1
    assert float(found.global_max) == float(found.global_mean) == 0


def test_violations_of_several_layers_at_once():
    loads = torch.randint(0, 9, (4, 3, 5))
    found = load_violations(loads)
    for layer in range(3):
        one = load_violations(loads[:, layer])
        assert float(found.batch_max[layer]) == float(one.batch_max)
        assert float(found.global_min[layer]) == float(one.global_min)
    with pytest.raises(ValueError, match="loads must hold at least one batch, got 0"):
        load_violations(torch.zeros(0, 3))


def test_mean_violation_extremes():
    assert float(mean_violation(torch.tensor([0, 0, 9]))) == pytest.approx(2 - 2 / 3)
    assert float(mean_violation(torch.zeros(3))) == 0


def test_percentiles_are_those_of_numpy():
    load = torch.randint(0, 50, (2, 9))
    found = load_percentiles(load, [0, 10, 50, 97.5, 100])
    for layer in range(2):
        counts = load[layer].numpy()
        expected = np.percentile(counts / counts.mean(), [0, 10, 50, 97.5, 100])
        np.testing.assert_allclose(found[:, layer].numpy(), expected, rtol=1e-12)
    assert load_percentiles(torch.zeros(4), [0, 100]).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"percentiles must lie in .* got 101"):
        load_percentiles(load, [101])


def test_overload_by_hand():
    load = torch.tensor([6, 2, 0, 4])
    assert float(overload_factor(load)) == 2
    # Shares 6/12, 2/12, 0, 4/12 of the work against 1/2, 1/4, 1/8, 1/8 of the capacity.
    capacity = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert float(overload_factor(load, capacity=capacity)) == pytest.approx(8 / 3)
    assert float(overload_factor(load, capacity=torch.ones(4))) == pytest.approx(2)
    assert float(overload_factor(torch.zeros(4))) == 1
    assert float(overload_factor(torch.zeros(4), capacity=capacity)) == 1
    with pytest.raises(ValueError, match="capacity must be positive"):
        overload_factor(load, capacity=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="capacity must have shape"):
        overload_factor(load, capacity=torch.ones(3))


def test_dead_experts_by_hand():
    loads = torch.tensor([[0, 1, 11], [4, 4, 4], [0, 0, 0]])
    assert dead_experts(loads).tolist() == [1, 0, 0]
    assert dead_experts(loads, below=0.25).tolist() == [2, 0, 0]
    assert dead_experts(loads, below=1.0).tolist() == [2, 3, 0]
    with pytest.raises(ValueError, match=r"below must .* got -1"):
        dead_experts(loads, below=-1)


def test_source_loads_and_histogram_count_one_by_one():
    ids = torch.randint(0, 4, (20, 3))
    keep, valid = torch.rand(20, 3) < 0.6, torch.rand(20) < 0.8
    source = torch.randint(0, 2, (20,))
    source[~valid] = 99
    expected = np.zeros((3, 4), dtype=int)
    for token in range(20):
        for slot in range(3):
            if valid[token] and keep[token, slot]:
                expected[source[token], ids[token, slot]] += 1
    loads = source_loads(ids, keep, source, num_sources=3, num_experts=4, valid=valid)
    assert loads.tolist() == expected.tolist()
    histogram = specialisation_histogram(loads)
    for row, counts in zip(histogram.tolist(), expected.tolist(), strict=True):
        total = sum(counts)
        assert row == pytest.approx([c / total if total else 0.0 for c in counts])
    with pytest.raises(ValueError, match="source must have shape"):
        source_loads(ids, keep, source[1:], num_sources=3, num_experts=4)


def test_source_loads_without_tokens():
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    loads = source_loads(nothing, nothing.bool(), nothing[:, 0], num_sources=2, num_experts=3)
    assert loads.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_router_similarity_is_the_mean_cosine():
    router = torch.randn(5, 3)
    router[2] = 0
    cosines = []
    for i in range(5):
        for j in range(5):
            if i != j:
                a, b = router[i].double().numpy(), router[j].double().numpy()
                scale = np.linalg.norm(a) * np.linalg.norm(b)
                cosines.append(a @ b / scale if scale else 0.0)
    assert float(router_similarity(router)) == pytest.approx(np.mean(cosines), 1e-12)
    assert float(router_similarity(torch.ones(3, 2))) == pytest.approx(1)
    assert float(router_similarity(torch.eye(3) - 1 / 3)) == pytest.approx(-0.5)
    assert float(router_similarity(torch.ones(1, 2))) == 0


def test_correlations_are_those_of_scipy():
    scores = torch.rand(40, 2, dtype=torch.float64)
    activations = (scores * 3 + torch.rand(40, 2)).mul(4).round()  # with ties
    counted = torch.rand(40, 2) < 0.7
    found = score_activation_correlation(scores, activations, counted=counted)
    first, second = scores[counted].numpy(), activations[counted].numpy()
    assert float(found.pearson) == pytest.approx(stats.pearsonr(first, second)[0], 1e-10)
    assert float(found.spearman) == pytest.approx(stats.spearmanr(first, second)[0], 1e-10)
    assert found.num_pairs == len(first)


def test_undefined_correlations_are_nan():
    for scores, activations in [
        (torch.ones(3) * 0.1, torch.rand(3)),
        (torch.rand(1), torch.rand(1)),
        (torch.rand(0), torch.rand(0)),
    ]:
        found = score_activation_correlation(scores, activations)
        assert found.pearson.isnan()
        assert found.spearman.isnan()
    with pytest.raises(ValueError, match="activations must have shape"):
        score_activation_correlation(torch.rand(2), torch.rand(3))
