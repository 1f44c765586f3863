"""Locality, chunk sparsity and its adaptive weight against loops."""

import math

import numpy as np
import pytest
import torch

from drgr.routing import AdaptiveWeight, activation_locality_loss, chunk_sparsity_loss


def locality_by_loop(logits, sharpness, length, valid):
    losses = []
    for token in range(1, len(logits)):
        if token % length == 0 or not (valid[token] and valid[token - 1]):
            continue
        for expert in range(logits.shape[1]):
            s = 1 / (1 + math.exp(-sharpness * logits[token - 1, expert]))
            y = 1 / (1 + math.exp(-sharpness * logits[token, expert]))
            losses.append(-y * math.log(s) - (1 - y) * math.log(1 - s))
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("length", [1, 2, 4, 12])
def test_locality_is_the_definition(length):
    logits = torch.randn(12, 3, dtype=torch.float64)
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
    expected = locality_by_loop(logits.numpy(), 3.0, length, valid)
    loss = activation_locality_loss(logits, sequence_length=length, sharpness=3.0, valid=valid)
    assert float(loss) == pytest.approx(expected, 1e-10)


def test_locality_at_the_published_sharpness_is_finite_and_counts_changes():
    logits = torch.tensor([[2.0, 2.0], [2.0, -2.0]], dtype=torch.float64)
    # One of two experts changes: its cross-entropy is that of a logit of 200.
    assert float(activation_locality_loss(logits, sequence_length=2)) == pytest.approx(100)


def chunks_by_loop(scores, sequence_length, chunk_length, valid):
    values = []
    for start in range(0, len(scores), sequence_length):
        sequence = range(start, start + sequence_length)
        for first in range(0, sequence_length, chunk_length):
            chunk = [t for t in sequence[first : first + chunk_length] if valid[t]]
            if not chunk:
                continue
            for expert in range(scores.shape[1]):
                unused = 1.0
                for token in chunk:
                    unused *= 1 - scores[token, expert] / scores[token].sum()
                values.append(1 - unused)
    return np.mean(values) if values else 0.0


@pytest.mark.parametrize("chunk_length", [1, 2, 4, 6, 9])
def test_chunk_sparsity_is_the_definition(chunk_length):
    scores = torch.rand(12, 3, dtype=torch.float64)
    valid = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0]).bool()
    expected = chunks_by_loop(scores.numpy(), 6, chunk_length, valid)
    loss = chunk_sparsity_loss(scores, sequence_length=6, chunk_length=chunk_length, valid=valid)
    assert float(loss) == pytest.approx(expected, 1e-12)


def test_chunk_sparsity_of_decided_routers_counts_experts():
    scores = torch.eye(4)[[0, 0, 1, 1, 2, 3, 2, 3]].requires_grad_()
    loss = chunk_sparsity_loss(scores, sequence_length=4, chunk_length=4)
    assert float(loss.detach()) == 0.5
    loss.backward()
    assert scores.grad.isfinite().all()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="chunk_length must be at least 1, got 0"):
        chunk_sparsity_loss(torch.rand(4, 2), sequence_length=4, chunk_length=0)
    with pytest.raises(ValueError, match=r"sharpness must .* got 0"):
        activation_locality_loss(torch.rand(4, 2), sequence_length=4, sharpness=0)
    with pytest.raises(ValueError, match="got 3 for 4 tokens"):
        activation_locality_loss(torch.rand(4, 2), sequence_length=3)


def weights_by_loop(losses, initial, warmup, window):
    """The coefficient of every step, recomputed from the whole history."""
    weights = [initial] * warmup
    current = initial
    for start in range(warmup, len(losses) + 1, window):
        last = np.mean(losses[start - window : start])
        before = np.mean(losses[start - 2 * window : start - window])
        ratio = last / before
        if ratio > 1:
            ratio = max(ratio, 1.025)
        target = current * min(ratio, 4 * initial / current)
        weights += [current + (target - current) * step / window for step in range(window)]
        current = target
    return weights[: len(losses) + 1]


@pytest.mark.parametrize("warmup", [20, 40])
@pytest.mark.parametrize("trend", [-0.01, 0.0, 0.01, 0.06])
def test_adaptive_weight_follows_its_rule(trend, warmup):
    generator = np.random.default_rng(3)
    losses = [math.exp(trend * t + 0.05 * generator.normal()) for t in range(90)]
    weight = AdaptiveWeight(0.05, warmup=warmup, window=10)
    values = [weight.value]
    for loss in losses:
        weight.update(loss)
        values.append(weight.value)
    np.testing.assert_allclose(values, weights_by_loop(losses, 0.05, warmup, 10), rtol=1e-12)
    assert max(values) <= 0.2 * (1 + 1e-12)


def test_adaptive_weight_resumes_exactly():
    straight, first = (AdaptiveWeight(0.1, warmup=4, window=2) for _ in range(2))
    losses = [3.0, 2.0, 2.5, 1.0, 0.5, 4.0, 4.5, 5.0, 1.0, 0.25, 2.0]
    for loss in losses[:7]:
        straight.update(loss)
        first.update(loss)
    second = AdaptiveWeight(0.1, warmup=4, window=2)
    second.load_state_dict(first.state_dict())
    for loss in losses[7:]:
        straight.update(loss)
        second.update(loss)
        assert second.value == straight.value


def test_adaptive_weight_survives_losses_of_zero():
    weight = AdaptiveWeight(1.0, warmup=2, window=1)
    for loss in [1.0, 0.0, 0.0]:
        weight.update(loss)
    assert weight.value == 1.0
    weight.update(2.0)
    weight.update(2.0)
    assert weight.value == 4.0


def test_adaptive_weight_checks_its_arguments():
    with pytest.raises(ValueError, match="warmup must be at least two windows, 20 steps, got 19"):
        AdaptiveWeight(1.0, warmup=19, window=10)
    with pytest.raises(ValueError, match=r"largest must .* got 0.5"):
        AdaptiveWeight(1.0, largest=0.5)
    with pytest.raises(ValueError, match=r"initial must .* got 0"):
        AdaptiveWeight(0.0)
    with pytest.raises(ValueError, match=r"loss must .* got nan"):
        AdaptiveWeight(1.0).update(math.nan)
