"""Balance losses at every scope against loops in numpy that share no code with them."""

import math

import numpy as np
import pytest
import torch

from drgr.routing import (
    load_balancing_loss,
    micro_balancing_loss,
    pool_balancing_loss,
    pool_fractions,
    router_z_loss,
    routing_information_loss,
    sequence_balancing_loss,
    specialisation_balance_loss,
    top1_balancing_loss,
    tsallis_entropy,
    tsallis_entropy_loss,
)


def draw(num_tokens=12, num_experts=5, top_k=3):
    """Sigmoid scores, candidates and which of them run, some tokens being padding."""
    scores = torch.randn(num_tokens, num_experts, dtype=torch.float64).mul(1.5).sigmoid()
    ids = scores.topk(top_k, dim=1).indices
    keep = torch.rand(num_tokens, top_k) < 0.7
    valid = torch.rand(num_tokens) < 0.7
    valid[:2] = True
    return scores, ids, keep & valid.unsqueeze(1), valid


def switch_by_loop(scores, ids, keep, valid, tokens):
    """The Switch loss of some tokens."""
    num_experts = scores.shape[1]
    counts, mass, number = np.zeros(num_experts), np.zeros(num_experts), 0
    for token in tokens:
        if not valid[token]:
            continue
        number += 1
        row = scores[token].tolist()
        for expert in range(num_experts):
            mass[expert] += row[expert] / sum(row)
        for expert, runs in zip(ids[token].tolist(), keep[token].tolist(), strict=True):
            counts[expert] += runs
    if number == 0 or counts.sum() == 0:
        return 0.0
    return num_experts * sum(
        counts[e] / counts.sum() * mass[e] / number for e in range(num_experts)
    )


def load_of(ids, keep, num_experts):
    load = torch.zeros(num_experts, dtype=torch.int64)
    for row, runs in zip(ids.tolist(), keep.tolist(), strict=True):
        for expert, kept in zip(row, runs, strict=True):
            load[expert] += kept
    return load


def test_micro_is_the_definition():
    scores, ids, keep, valid = draw()
    loss = micro_balancing_loss(scores, load_of(ids, keep, 5), valid=valid)
    assert float(loss) == pytest.approx(switch_by_loop(scores, ids, keep, valid, range(12)), 1e-12)


def test_micro_equals_global_where_there_is_one_batch():
    scores, ids, keep, valid = draw()
    load = load_of(ids, keep, 5)
    torch.testing.assert_close(
        micro_balancing_loss(scores, load, valid=valid),
        load_balancing_loss(scores, load, valid=valid),
    )


@pytest.mark.parametrize("sequence_length", [1, 3, 4, 12])
def test_sequence_is_the_mean_over_sequences_with_a_token(sequence_length):
    scores, ids, keep, valid = draw()
    valid[4:8] = False
    keep[4:8] = False
    starts = range(0, 12, sequence_length)
    parts = [range(start, start + sequence_length) for start in starts]
    losses = [
        switch_by_loop(scores, ids, keep, valid, part) for part in parts if valid[list(part)].any()
    ]
    loss = sequence_balancing_loss(scores, ids, keep, sequence_length=sequence_length, valid=valid)
    assert float(loss) == pytest.approx(np.mean(losses), 1e-12)


def test_sequences_with_opposite_favourites_pass_globally_and_fail_by_sequence():
    scores = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    ids = torch.tensor([[0]] * 3 + [[1]] * 3)
    keep = torch.ones(6, 1, dtype=torch.bool)
    assert float(load_balancing_loss(scores, torch.tensor([3, 3]))) == 1
    assert float(sequence_balancing_loss(scores, ids, keep, sequence_length=3)) == 2


def test_skipped_candidates_may_carry_an_id_beyond_the_experts():
    scores = torch.rand(2, 3)
    ids, keep = torch.tensor([[0, 3], [2, 3]]), torch.tensor([[True, False]] * 2)
    loss = sequence_balancing_loss(scores, ids, keep, sequence_length=2)
    expected = sequence_balancing_loss(scores, ids[:, :1], keep[:, :1], sequence_length=2)
    torch.testing.assert_close(loss, expected)


def test_a_sequence_length_that_does_not_divide_is_refused():
    scores, ids, keep, _ = draw()
    with pytest.raises(ValueError, match=r"sequence_length must .* got 5 for 12 tokens"):
        sequence_balancing_loss(scores, ids, keep, sequence_length=5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_top1_is_the_definition(temperature):
    logits = torch.randn(9, 4, dtype=torch.float64)
    valid = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1]).bool()
    rows = [row for row, real in zip(logits.numpy(), valid.tolist(), strict=True) if real]
    exponentials = [[math.exp(z / temperature) for z in row] for row in rows]
    p = [[x / sum(row) for x in row] for row in exponentials]
    soft = [sum(row[e] for row in p) / len(p) for e in range(4)]
    expected = 4 * sum(x**2 for x in soft) / (sum(max(row) for row in p) / len(p))
    loss = top1_balancing_loss(logits, temperature=temperature, valid=valid)
    assert float(loss) == pytest.approx(expected, 1e-12)


def test_top1_is_not_satisfied_by_flat_probabilities():
    decided = 50 * torch.eye(4, dtype=torch.float64)
    assert float(top1_balancing_loss(decided)) == pytest.approx(1)
    assert float(top1_balancing_loss(torch.zeros(8, 4))) == pytest.approx(4)
    assert float(top1_balancing_loss(decided[:1].expand(8, 4))) == pytest.approx(4)
    # The Switch loss calls flat probabilities balanced.
    flat = torch.full((8, 4), 0.25)
    assert float(micro_balancing_loss(flat, torch.tensor([8, 0, 0, 0]))) == pytest.approx(1)


def test_z_loss_is_the_definition():
    logits = torch.randn(6, 3, dtype=torch.float64) * 4
    valid = torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    squares = [
        math.log(sum(math.exp(z) for z in row)) ** 2
        for row, real in zip(logits.tolist(), valid.tolist(), strict=True)
        if real
    ]
    assert float(router_z_loss(logits, valid=valid)) == pytest.approx(np.mean(squares), 1e-12)


def test_z_loss_of_half_precision_is_computed_in_float32():
    logits = torch.full((4, 8), 300.0, dtype=torch.float16)
    loss = router_z_loss(logits)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx((300 + math.log(8)) ** 2, 1e-6)


@pytest.mark.parametrize("order", [0.3, 0.999999, 1.0, 1.000001, 1.1, 2.0, 3.5])
def test_tsallis_is_the_definition(order):
    scores = torch.rand(5, 4, dtype=torch.float64)
    values = []
    for row in scores.tolist():
        p = [x / sum(row) for x in row]
        if order == 1:
            value, largest = -sum(x * math.log(x) for x in p), math.log(4)
        else:
            value = (1 - sum(x**order for x in p)) / (order - 1)
            largest = (1 - 4 ** (1 - order)) / (order - 1)
        values.append(value / largest)
    # Near 1 it is the oracle that loses digits.
    loss = tsallis_entropy_loss(scores, order=order)
    assert float(loss) == pytest.approx(np.mean(values), 1e-8)


def test_tsallis_is_continuous_at_order_one():
    p = torch.rand(7, dtype=torch.float64).softmax(0)
    at_one = tsallis_entropy(p, order=1.0)
    torch.testing.assert_close(tsallis_entropy(p, order=1 + 1e-12), at_one, rtol=1e-9, atol=0)


def test_tsallis_extremes():
    for order in (0.5, 1.0, 1.1, 2.0):
        one_hot = torch.eye(4, requires_grad=True)
        entropy = tsallis_entropy(one_hot, order=order).sum()
        entropy.backward()
        assert float(entropy.detach()) == 0
        assert one_hot.grad.isfinite().all()
        assert float(tsallis_entropy(torch.full((4,), 0.25), order=order)) == pytest.approx(1)
    assert tsallis_entropy(torch.ones(3, 1)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"order must .* got 0"):
        tsallis_entropy(torch.ones(3, 2), order=0)


def entropy_by_loop(p):
    return -sum(x * math.log(x) for x in p if x > 0)


@pytest.mark.parametrize("coefficient", [-0.4, 0.7])
def test_specialisation_balance_is_the_definition(coefficient):
    scores, ids, keep, valid = draw()
    p = [[x / sum(row) for x in row] for row in scores[valid].tolist()]
    mean_entropy = np.mean([entropy_by_loop(row) for row in p])
    expected = switch_by_loop(scores, ids, keep, valid, range(12)) + coefficient * mean_entropy
    loss = specialisation_balance_loss(
        scores, load_of(ids, keep, 5), entropy_coefficient=coefficient, valid=valid
    )
    assert float(loss) == pytest.approx(expected, 1e-12)


def test_the_sign_says_whether_tokens_are_decided_or_flattened():
    flat, sharp = torch.full((2, 2), 0.5), torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    load = torch.tensor([1, 1])
    for coefficient, better in ((0.5, sharp), (-0.5, flat)):
        losses = {
            id(p): float(specialisation_balance_loss(p, load, entropy_coefficient=coefficient))
            for p in (flat, sharp)
        }
        assert min(losses, key=losses.get) == id(better)
    with pytest.raises(ValueError, match="entropy_coefficient must be finite, got nan"):
        specialisation_balance_loss(flat, load, entropy_coefficient=math.nan)


def test_information_is_that_of_the_joint_distribution():
    scores, _, _, valid = draw()
    p = [[x / sum(row) / int(valid.sum()) for x in row] for row in scores[valid].tolist()]
    experts = [sum(column) for column in zip(*p, strict=True)]
    information = sum(
        x * math.log(x / (experts[e] / len(p))) for row in p for e, x in enumerate(row)
    )
    loss = routing_information_loss(scores, valid=valid)
    assert float(loss) == pytest.approx(-information, 1e-9)


def test_information_prefers_balanced_and_specialised():
    assert float(routing_information_loss(torch.eye(4))) == pytest.approx(-math.log(4))
    assert float(routing_information_loss(torch.full((4, 4), 0.25))) == pytest.approx(0, abs=1e-6)
    assert float(routing_information_loss(torch.eye(4)[:1].expand(4, 4))) == 0


def test_pool_is_the_definition():
    layers = [draw() for _ in range(3)]
    loads = torch.stack([load_of(ids, keep, 5) for _, ids, keep, _ in layers])
    f = np.mean([row / row.sum() for row in loads.numpy().astype(float)], axis=0)
    probability = []
    for scores, _, _, valid in layers:
        rows = [[x / sum(row) for x in row] for row in scores[valid].tolist()]
        probability.append(np.mean(rows, axis=0))
    expected = 5 * sum(f[e] * np.mean(probability, axis=0)[e] for e in range(5))
    fractions = pool_fractions(loads)
    terms = [pool_balancing_loss(scores, fractions, valid=valid) for scores, _, _, valid in layers]
    assert float(torch.stack(terms).mean()) == pytest.approx(expected, 1e-12)


def test_a_pool_is_balanced_where_layers_are_not():
    loads = torch.tensor([[4, 0], [0, 6]])
    assert pool_fractions(loads).tolist() == [0.5, 0.5]
    scores = torch.tensor([[1.0, 0.0]])
    assert float(pool_balancing_loss(scores, pool_fractions(loads))) == 1
    assert float(load_balancing_loss(scores, loads[0])) == 2


def test_a_pool_leaves_out_layers_without_assignments():
    assert pool_fractions(torch.tensor([[0, 0], [1, 3]])).tolist() == [0.25, 0.75]
    nothing = pool_fractions(torch.zeros(2, 2, dtype=torch.int64))
    assert nothing.tolist() == [0, 0]
    assert float(pool_balancing_loss(torch.rand(3, 2), nothing)) == 0
