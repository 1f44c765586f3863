"""What holds for every scorer, whatever its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.routing.scores import (
    CosineScores,
    GaussianScores,
    KMeansScores,
    NoisyScores,
    NormScores,
    ReluRmsScores,
    SigmoidScores,
    SoftmaxScores,
    StochasticGates,
    TsallisHybridScores,
)

EXPERTS, WIDTH = 5, 4


def k_means():
    """With centroids for two experts, and rows of the router for the others."""
    scorer = KMeansScores(EXPERTS, WIDTH, centred=True)
    scorer.centroids[:2] = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    scorer.mean += 0.3
    scorer.placed[:2] = True
    return scorer


def noisy():
    scorer = NoisyScores(EXPERTS, WIDTH)
    scorer.noise.weight.data = torch.randn(
        EXPERTS, WIDTH, generator=torch.Generator().manual_seed(2)
    )
    return scorer


def relu_rms():
    scorer = ReluRmsScores(EXPERTS)
    scorer.gain.data = torch.linspace(0.5, 2, EXPERTS)
    return scorer


SCORERS = {
    "softmax": SoftmaxScores,
    "sigmoid": SigmoidScores,
    "cosine": CosineScores,
    "k-means": k_means,
    "norm": lambda: NormScores(EXPERTS),
    "relu-rms": relu_rms,
    "tsallis-hybrid": TsallisHybridScores,
    "noisy": noisy,
    "gaussian": GaussianScores,
    "reinforce": lambda: StochasticGates(EXPERTS, estimator="reinforce"),
    "smooth": lambda: StochasticGates(EXPERTS, estimator="stochastic-times-smooth"),
    "rectifier": lambda: StochasticGates(EXPERTS, estimator="noisy-rectifier"),
    "straight": lambda: StochasticGates(EXPERTS, estimator="straight-through"),
}
# Parameters and buffers with one entry for each expert.
BY_EXPERT = {"centroids", "placed", "idle", "gain", "noise.weight"}


def inputs(seed, num_tokens=7):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_tokens, WIDTH, generator=generator),
        torch.randn(EXPERTS, WIDTH, generator=generator),
    )


def fields(found):
    parts = {"scores": found.scores, "logits": found.logits, "selectable": found.selectable}
    if found.is_open is not None:
        parts["is_open"] = found.is_open
    return {name: part.detach() for name, part in parts.items()}


seeds = st.integers(0, 10**6)


@pytest.mark.parametrize("kind", SCORERS)
@settings(max_examples=10, deadline=None)
@given(seed=seeds, order=st.permutations(range(EXPERTS)))
def test_experts_have_no_order(kind, seed, order):
    hidden, weight = inputs(seed)
    scorer = SCORERS[kind]().eval()
    found = fields(scorer(hidden, weight))
    state = scorer.state_dict()
    for name in BY_EXPERT & set(state):
        # The last entry of `placed` is that of all tokens.
        state[name] = torch.cat([state[name][list(order)], state[name][EXPERTS:]])
    scorer.load_state_dict(state)
    permuted = fields(scorer(hidden, weight[list(order)]))
    for name, part in found.items():
        torch.testing.assert_close(permuted[name], part[:, list(order)])


@pytest.mark.parametrize("kind", SCORERS)
@settings(max_examples=10, deadline=None)
@given(seed=seeds, order=st.permutations(range(7)))
def test_tokens_are_scored_each_alone(kind, seed, order):
    hidden, weight = inputs(seed)
    scorer = SCORERS[kind]().eval()
    found = fields(scorer(hidden, weight))
    permuted = fields(scorer(hidden[list(order)], weight))
    alone = [fields(scorer(token.unsqueeze(0), weight)) for token in hidden]
    for name, part in found.items():
        torch.testing.assert_close(permuted[name], part[list(order)])
        torch.testing.assert_close(torch.cat([one[name] for one in alone]), part)


@pytest.mark.parametrize("kind", ["cosine", "norm"])
@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.floats(1e-4, 1e4))
def test_the_size_of_a_token_has_no_say(kind, seed, scale):
    hidden, weight = inputs(seed)
    scorer = SCORERS[kind]()
    found, scaled = scorer(hidden, weight), scorer(hidden * scale, weight)
    torch.testing.assert_close(scaled.scores, found.scores, atol=1e-4, rtol=1e-3)
    if kind == "norm":
        found, scaled = scorer(hidden, weight), scorer(hidden, weight * scale)
    else:
        sizes = torch.linspace(1, scale, EXPERTS).unsqueeze(1)
        found, scaled = scorer(hidden, weight), scorer(hidden, weight * sizes)
    torch.testing.assert_close(scaled.scores, found.scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("training", [True, False])
def test_what_scores_promise(kind, training):
    hidden, weight = inputs(0, num_tokens=200)
    hidden[:3] = 0.0
    hidden.requires_grad_()
    weight.requires_grad_()
    scorer = SCORERS[kind]().train(training)
    found = scorer(hidden, weight)
    assert found.scores.shape == found.logits.shape == found.selectable.shape == (200, EXPERTS)
    assert (found.scores >= 0).all()
    assert not found.selectable.requires_grad
    assert found.selectable.isfinite().all()
    assert found.logits.requires_grad
    if found.is_open is not None:
        assert found.is_open.dtype == torch.bool
        # Open experts are worth more than closed ones of the token.
        lowest = found.selectable.masked_fill(~found.is_open, torch.inf).amin(dim=1)
        highest = found.selectable.masked_fill(found.is_open, -torch.inf).amax(dim=1)
        assert (lowest > highest).all()
        assert (found.scores[found.is_open] > 0).all()
    if found.scores.requires_grad:
        (found.scores * torch.arange(1, EXPERTS + 1)).sum().backward()
        assert hidden.grad.isfinite().all()
        assert weight.grad.isfinite().all()
        assert weight.grad.any()
    ids = found.selectable.topk(3, dim=1).indices
    keep = torch.rand(200, 3) < 0.7
    weights = scorer.weights(found.scores, ids, keep)
    assert (weights[~keep] == 0).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("kind", SCORERS)
def test_numbers_are_drawn_in_training_alone_and_from_the_global_generator(kind):
    hidden, weight = inputs(0)
    scorer = SCORERS[kind]()
    scorer.eval()
    before = torch.get_rng_state()
    scorer(hidden, weight)
    assert torch.equal(torch.get_rng_state(), before)
    scorer.train()
    first = fields(scorer(hidden, weight))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    again = fields(scorer(hidden, weight))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    draws = kind in {"noisy", "gaussian", "reinforce", "smooth", "rectifier", "straight"}
    assert torch.equal(after, before) is not draws
    other = fields(scorer(hidden, weight))
    assert torch.equal(other["selectable"], first["selectable"]) is not draws


@pytest.mark.parametrize("kind", SCORERS)
def test_half_precision_is_scored_in_float32(kind):
    hidden, weight = inputs(0)
    scorer = SCORERS[kind]().eval()
    found = scorer(hidden.bfloat16(), weight.bfloat16())
    assert found.scores.dtype == torch.float32
    exact = scorer(hidden.bfloat16().float(), weight.bfloat16().float())
    torch.testing.assert_close(found.scores, exact.scores, atol=0.15, rtol=0.1)
