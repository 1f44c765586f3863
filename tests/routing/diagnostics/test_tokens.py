"""Diagnostics over tokens against loops; padding, order, empty batches and processes."""

import math

import numpy as np
import pytest
import torch

from drgr.collectives import rank
from drgr.routing import (
    active_experts,
    chunk_level_sparsity,
    expert_reuse,
    routing_entropy,
    source_loads,
)
from drgr.routing.tokens import real_rows, shared_mean


def draw(num_tokens=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, 5, generator=generator, dtype=torch.float64)
    ids = scores.topk(3, dim=1).indices
    keep = torch.rand(num_tokens, 3, generator=generator) < 0.6
    valid = torch.rand(num_tokens, generator=generator) < 0.8
    return scores, ids, keep, valid


def sets_of(ids, keep, valid):
    return [
        {e for e, runs in zip(row, kept, strict=True) if runs and real}
        for row, kept, real in zip(ids.tolist(), keep.tolist(), valid.tolist(), strict=True)
    ]


def test_active_experts_are_the_sets_of_the_plan():
    _, ids, keep, valid = draw()
    active = active_experts(ids, keep, 5, valid=valid)
    found = [{e for e in range(5) if row[e]} for row in active.tolist()]
    assert found == sets_of(ids, keep, valid)
    skipped = torch.tensor([[1, 5]])
    row = active_experts(skipped, torch.tensor([[True, False]]), 5)
    assert row.tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("chunk_length", [1, 2, 4, 5])
def test_chunk_level_sparsity_is_the_definition(chunk_length):
    _, ids, keep, valid = draw()
    valid[:5] = True
    sets = sets_of(ids, keep, valid)
    shares = []
    for start in (0, 6):
        for first in range(start, start + 6 - chunk_length + 1, chunk_length):
            chunk = range(first, first + chunk_length)
            if all(valid[t] for t in chunk):
                shares.append(len(set().union(*(sets[t] for t in chunk))) / 5)
    active = active_experts(ids, keep, 5, valid=valid)
    found = chunk_level_sparsity(active, sequence_length=6, chunk_length=chunk_length, valid=valid)
    assert float(found) == pytest.approx(1 - np.mean(shares), 1e-12)


def test_expert_reuse_is_the_definition():
    _, ids, keep, valid = draw()
    sets = sets_of(ids, keep, valid)
    ratios = [
        len(sets[t] & sets[t + 1]) / len(sets[t])
        for t in range(11)
        if t != 5 and valid[t] and valid[t + 1] and sets[t]
    ]
    active = active_experts(ids, keep, 5, valid=valid)
    found = expert_reuse(active, sequence_length=6, valid=valid)
    assert float(found) == pytest.approx(np.mean(ratios), 1e-12)


def test_what_is_undefined_is_nan():
    active = torch.ones(4, 3, dtype=torch.bool)
    nobody = torch.zeros(4, dtype=torch.bool)
    assert chunk_level_sparsity(active, sequence_length=4, chunk_length=5).isnan()
    assert chunk_level_sparsity(active, sequence_length=4, chunk_length=2, valid=nobody).isnan()
    assert expert_reuse(active, sequence_length=1).isnan()
    assert expert_reuse(~active, sequence_length=4).isnan()
    assert expert_reuse(active[:0], sequence_length=4).isnan()
    with pytest.raises(ValueError, match="chunk_length must be at least 1, got 0"):
        chunk_level_sparsity(active, sequence_length=4, chunk_length=0)
    with pytest.raises(ValueError, match="got 3 for 4 tokens"):
        expert_reuse(active, sequence_length=3)


def test_padding_at_the_end_of_sequences_changes_nothing():
    _, ids, keep, _ = draw()
    active = active_experts(ids, keep, 5)
    padded = torch.cat([active.view(2, 6, 5), torch.ones(2, 2, 5, dtype=torch.bool)], dim=1)
    valid = torch.tensor([True] * 6 + [False] * 2).repeat(2)
    for measure in (
        lambda rows, length, valid: expert_reuse(rows, sequence_length=length, valid=valid),
        lambda rows, length, valid: chunk_level_sparsity(
            rows, sequence_length=length, chunk_length=4, valid=valid
        ),
    ):
        assert measure(padded.flatten(0, 1), 8, valid) == measure(active, 6, None)


def test_routing_entropy_is_the_definition():
    scores, _, _, valid = draw()
    values = []
    for row in scores[valid].tolist():
        p = [x / sum(row) for x in row]
        values.append(-sum(x * math.log(x) for x in p) / math.log(5))
    scores[~valid] = torch.nan
    found = routing_entropy(scores.requires_grad_(), valid=valid)
    assert float(found) == pytest.approx(np.mean(values), 1e-12)
    assert not found.requires_grad
    assert float(routing_entropy(torch.full((3, 4), 0.2))) == pytest.approx(1)
    assert float(routing_entropy(torch.eye(4))) == 0
    assert float(routing_entropy(torch.rand(3, 1))) == 0


def test_rows_of_padding_must_be_marked_one_by_one():
    with pytest.raises(ValueError, match=r"valid must have shape \(4,\), got \(3,\)"):
        real_rows(torch.rand(4, 2), torch.ones(3, dtype=torch.bool))


def measures(part):
    scores, ids, keep, valid = (rows[part] for rows in draw(18, seed=4))
    active = active_experts(ids, keep, 5, valid=valid)
    options = {"sequence_length": 6, "valid": valid}
    source = torch.arange(18)[part] % 2
    return torch.cat(
        [
            routing_entropy(scores, valid=valid).view(1),
            chunk_level_sparsity(active, chunk_length=2, **options).view(1),
            expert_reuse(active, **options).view(1),
            source_loads(ids, keep, source, num_sources=2, num_experts=5, valid=valid)
            .flatten()
            .double(),
        ]
    )


def measures_of_own_share():
    return measures(slice(0, 12) if rank() == 0 else slice(12, None))


def quadratic_of_own_share(rows, valid):
    part = slice(0, 7) if rank() == 0 else slice(7, None)
    own = rows[part].clone().requires_grad_()
    value = shared_mean(own.square(), valid[part]).square().sum()
    value.backward()
    return value.detach(), own.grad


def test_two_processes_are_one(run_processes):
    expected = measures(slice(None))
    for found in run_processes(measures_of_own_share, 2):
        torch.testing.assert_close(found, expected)


def test_a_function_of_a_shared_mean_has_the_gradient_of_the_whole_batch(run_processes):
    rows, valid = torch.randn(9, 2, dtype=torch.float64), torch.rand(9) < 0.6
    valid[:2] = True
    first, second = run_processes(quadratic_of_own_share, 2, rows, valid)
    whole = rows.clone().requires_grad_()
    value = whole[valid].square().mean(dim=0).square().sum()
    value.backward()
    torch.testing.assert_close(first[0], value.detach())
    torch.testing.assert_close(second[0], value.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, whole.grad)
