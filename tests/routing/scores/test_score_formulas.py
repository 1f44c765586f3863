"""Each score formula against plain Python or numpy, token by token."""

import math

import numpy as np
import pytest
import torch

from drgr.routing.scores import (
    CosineScores,
    GaussianScores,
    NoisyScores,
    NormScores,
    ReluRmsScores,
    TsallisHybridScores,
    norm_constant,
)


def inputs(num_tokens=5, num_experts=6, width=4):
    hidden = torch.randn(num_tokens, width, dtype=torch.float64)
    weight = torch.randn(num_experts, width, dtype=torch.float64)
    return hidden, weight


def numpy_softmax(values):
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize(("learned", "factor"), [(True, 0.4), (False, 0.0)])
def test_cosine(learned, factor):
    hidden, weight = inputs()
    scorer = CosineScores(temperature=0.2, learned=learned)
    if learned:
        torch.nn.init.constant_(scorer.log_factor, factor)
    temperature = 0.2 * math.exp(factor)
    assert scorer.temperature == pytest.approx(temperature)
    found = scorer(hidden, weight)
    for t, token in enumerate(hidden.numpy()):
        cosines = np.array(
            [token @ row / np.linalg.norm(token) / np.linalg.norm(row) for row in weight.numpy()]
        )
        np.testing.assert_allclose(found.logits[t].detach(), cosines / temperature, rtol=1e-6)
        expected = numpy_softmax(cosines / temperature)
        np.testing.assert_allclose(found.scores[t].detach(), expected, rtol=1e-6)
    assert torch.equal(found.selectable, found.scores.detach())
    assert found.is_open is None


def test_cosine_weights_with_and_without_normalising():
    scores = torch.tensor([[0.5, 0.3, 0.2]])
    ids, keep = torch.tensor([[0, 2]]), torch.tensor([[True, True]])
    normalised = CosineScores().weights(scores, ids, keep)
    torch.testing.assert_close(normalised, torch.tensor([[5 / 7, 2 / 7]]))
    plain = CosineScores(normalised=False).weights(scores, ids, keep)
    torch.testing.assert_close(plain, torch.tensor([[0.5, 0.2]]))


def test_cosine_gradients():
    hidden, weight = inputs(3, 4, 3)
    scorer = CosineScores(temperature=0.5).double()
    hidden.requires_grad_()
    weight.requires_grad_()

    def scores(hidden, weight, factor):
        scorer_inputs = {"log_factor": factor}
        return torch.func.functional_call(scorer, scorer_inputs, (hidden, weight)).scores

    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scores, (hidden, weight, factor))


def test_norm_and_its_fallback():
    hidden, weight = inputs(8, 3)
    weight[:, 0] = -1.0
    hidden[3] = torch.tensor([50.0, 0, 0, 0])  # every logit is negative
    scorer = NormScores(3, experts_per_token=1).double()
    torch.nn.init.constant_(scorer.scale, -1.7)
    constant = norm_constant(3, 1)
    found = scorer(hidden, weight)
    num_fallen = 0
    for t, token in enumerate(hidden.numpy()):
        logits = weight.numpy() @ token
        direction = logits / (np.linalg.norm(logits) + 1e-8)
        if direction.max() > 0:
            expected = 1.7 * constant * np.maximum(direction, 0)
        else:
            expected = 1.7 * numpy_softmax(direction)
            num_fallen += 1
        np.testing.assert_allclose(found.scores[t].detach(), expected, rtol=1e-9)
        order = np.argsort(-logits)
        np.testing.assert_array_equal(found.selectable[t].argsort(descending=True), order)
    assert num_fallen >= 1


# Found by other code, as rounded here, for (experts, experts per token).
@pytest.mark.parametrize(
    ("num_experts", "experts_per_token", "constant"),
    [(96, 2, 3.03), (64, 8, 1.71)],
)
def test_norm_constants_of_many_experts(num_experts, experts_per_token, constant):
    assert norm_constant(num_experts, experts_per_token) == pytest.approx(constant, rel=0.005)


@pytest.mark.parametrize("num_experts", [32, 64])
def test_norm_constant_of_one_expert_by_integration(num_experts):
    # A normal vector's direction and norm are independent: E[1 / max u] is the ratio of
    # E[1 / max g], an integral over the density of the largest, and E[1 / |g|].
    largest = np.linspace(1e-3, 9, 200_001)
    below = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in largest])
    density = num_experts * np.exp(-(largest**2) / 2) / math.sqrt(2 * math.pi)
    density *= below ** (num_experts - 1)
    inverse_largest = np.trapezoid(density / largest, largest)
    logs = math.lgamma((num_experts - 1) / 2) - math.lgamma(num_experts / 2)
    inverse_norm = math.exp(logs) / math.sqrt(2)
    expected = inverse_largest / inverse_norm
    assert norm_constant(num_experts, 1) == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("num_experts", [3, 5, 8, 16])
def test_norm_constant_of_all_experts_in_closed_form(num_experts):
    # With j positive entries their squares sum to a Beta(j / 2, (E - j) / 2).
    total = share = 0.0
    for j in range(2, num_experts + 1):
        probability = math.comb(num_experts, j) / 2**num_experts
        logs = [(j - 1) / 2, num_experts / 2], [j / 2, (num_experts - 1) / 2]
        value = math.exp(sum(map(math.lgamma, logs[0])) - sum(map(math.lgamma, logs[1])))
        total += probability * (value if j < num_experts else 1.0)
        share += probability
    assert norm_constant(num_experts, num_experts) == pytest.approx(total / share, rel=0.01)


def test_norm_constant_of_few_experts():
    assert norm_constant(1, 1) == pytest.approx(1.0)
    assert norm_constant(2, 2) == pytest.approx(1.0)
    # Two positive entries are cosine and sine of an even angle.
    assert norm_constant(2, 1) == pytest.approx(4 / math.pi * math.log(1 + math.sqrt(2)), rel=0.01)


def test_norm_constant_leaves_the_random_state_and_is_kept():
    before = torch.get_rng_state()
    first = norm_constant(11, 3)
    assert torch.equal(torch.get_rng_state(), before)
    hits = norm_constant.cache_info().hits
    assert norm_constant(11, 3) == first
    assert norm_constant.cache_info().hits == hits + 1


@pytest.mark.parametrize("experts_per_token", [0, 5])
def test_norm_refuses_more_experts_than_there_are(experts_per_token):
    with pytest.raises(ValueError, match="experts_per_token must be from 1 to the 4 experts, got"):
        NormScores(4, experts_per_token=experts_per_token)


def test_relu_rms_and_its_fallback():
    hidden, weight = inputs(8, 3)
    weight[:, 0] = -1.0
    hidden[3] = torch.tensor([5.0, 0, 0, 0])
    scorer = ReluRmsScores(3, epsilon=1e-3).double()
    gain = np.array([1.5, -0.5, 2.0])
    scorer.gain.data = torch.tensor(gain)
    found = scorer(hidden, weight)
    for t, token in enumerate(hidden.numpy()):
        logits = weight.numpy() @ token
        active = np.maximum(logits, 0)
        expected = np.abs(gain) * active / np.sqrt(np.mean(active**2) + 1e-3)
        if not active.any():
            expected = np.abs(gain) * numpy_softmax(logits)
        np.testing.assert_allclose(found.scores[t].detach(), expected, rtol=1e-9)
        np.testing.assert_array_equal(found.is_open[t], logits > 0)
        is_closed = logits <= 0
        np.testing.assert_allclose(found.selectable[t][is_closed], logits[is_closed])
    assert not found.is_open[3].any()


@pytest.mark.parametrize("scorer", [NormScores(3, experts_per_token=1), ReluRmsScores(3)])
def test_gradients_are_finite_without_a_positive_logit(scorer):
    weight = torch.tensor([[-1.0, 0.0], [-2.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    found = scorer(hidden, weight)
    assert (found.scores[:2].sum(dim=1) > 0.9).all()
    (found.scores * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weight.grad.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert weight.grad[:2].any()


def open_by_hand(probabilities, *, order, threshold, top_p, keep_top, takes_crossing):
    """The experts of one token, rank by rank."""
    entropy = (1 - sum(p**order for p in probabilities)) / (order - 1)
    largest = (1 - len(probabilities) ** (1 - order)) / (order - 1)
    if threshold < 1 and entropy / largest > threshold:
        return set(range(len(probabilities)))
    chosen, reached = set(), 0.0
    ranked = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])
    for rank, expert in enumerate(ranked):
        before, reached = reached, reached + probabilities[expert]
        within = before < top_p if takes_crossing else reached <= top_p
        if within or rank < keep_top:
            chosen.add(expert)
    return chosen


@pytest.mark.parametrize("order", [0.5, 1.1, 2.0])
@pytest.mark.parametrize("takes_crossing", [False, True])
@pytest.mark.parametrize(("threshold", "top_p", "keep_top"), [(0.9, 0.75, 2), (1.0, 0.6, 1)])
def test_tsallis_hybrid(order, takes_crossing, threshold, top_p, keep_top):
    rule = {
        "order": order,
        "threshold": threshold,
        "top_p": top_p,
        "keep_top": keep_top,
        "takes_crossing": takes_crossing,
    }
    hidden, weight = inputs(60)
    hidden *= torch.linspace(0, 2, 60).unsqueeze(1)
    found = TsallisHybridScores(**rule)(hidden, weight)
    sizes = set()
    for t, token in enumerate(hidden.numpy()):
        probabilities = numpy_softmax(weight.numpy() @ token)
        np.testing.assert_allclose(found.scores[t], probabilities, rtol=1e-9)
        expected = open_by_hand(probabilities.tolist(), **rule)
        assert set(found.is_open[t].nonzero().squeeze(1).tolist()) == expected
        sizes.add(len(expected))
    assert (6 in sizes) == (threshold < 1)
    assert len(sizes) >= 2


def test_tsallis_crossing_on_one_row():
    hidden = torch.tensor([[0.5, 0.3, 0.2]]).log()
    weight = torch.eye(3)
    outside = TsallisHybridScores(threshold=1, top_p=0.6, keep_top=1)(hidden, weight)
    inside = TsallisHybridScores(threshold=1, top_p=0.6, keep_top=1, takes_crossing=True)
    assert outside.is_open.tolist() == [[True, False, False]]
    assert inside(hidden, weight).is_open.tolist() == [[True, True, False]]


def test_tsallis_weights_are_the_probabilities():
    scores = torch.tensor([[0.5, 0.3, 0.2]])
    ids, keep = torch.tensor([[0, 1, 2]]), torch.tensor([[True, True, False]])
    found = TsallisHybridScores().weights(scores, ids, keep)
    assert torch.equal(found, torch.tensor([[0.5, 0.3, 0.0]]))


def test_learned_noise():
    hidden, weight = inputs(4, 3)
    scorer = NoisyScores(3, 4).double()
    scorer.noise.weight.data = torch.randn(3, 4, dtype=torch.float64)
    clean = scorer.eval()(hidden, weight)
    torch.manual_seed(5)
    found = scorer.train()(hidden, weight)
    torch.manual_seed(5)
    draws = torch.randn(4, 3, dtype=torch.float64).numpy()
    for t, token in enumerate(hidden.numpy()):
        logits = weight.numpy() @ token
        np.testing.assert_allclose(clean.scores[t].detach(), numpy_softmax(logits), rtol=1e-9)
        sizes = np.log1p(np.exp(scorer.noise.weight.detach().numpy() @ token))
        noisy = logits + draws[t] * sizes
        np.testing.assert_allclose(found.logits[t].detach(), noisy, rtol=1e-9)
        np.testing.assert_allclose(found.scores[t].detach(), numpy_softmax(noisy), rtol=1e-9)


def test_learned_noise_starts_at_log_two_without_drawing():
    before = torch.get_rng_state()
    scorer = NoisyScores(3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    found = scorer(torch.randn(20_000, 4), torch.zeros(3, 4))
    assert float(found.logits.detach().std()) == pytest.approx(math.log(2), rel=0.02)


def test_noise_of_one_size():
    hidden, weight = inputs(4, 3)
    scorer = GaussianScores(temperature=0.5, deviation=0.2)
    torch.manual_seed(5)
    found = scorer(hidden, weight)
    torch.manual_seed(5)
    draws = torch.randn(4, 3, dtype=torch.float64).numpy()
    for t, token in enumerate(hidden.numpy()):
        noisy = numpy_softmax(weight.numpy() @ token / 0.5) + 0.2 * draws[t]
        np.testing.assert_allclose(found.logits[t], noisy, rtol=1e-9)
        np.testing.assert_allclose(found.scores[t], numpy_softmax(noisy), rtol=1e-9)
        # The weights of chosen experts are the softmax over those alone.
        ids, keep = torch.tensor([[2, 0]]), torch.ones(1, 2, dtype=torch.bool)
        weights = scorer.weights(found.scores[t : t + 1], ids, keep)
        np.testing.assert_allclose(weights[0], numpy_softmax(noisy[[2, 0]]), rtol=1e-9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CosineScores(temperature=0), "temperature must be a finite number above 0, got 0"),
        (lambda: NormScores(4, epsilon=-1), "epsilon must be a finite number above 0, got -1"),
        (lambda: ReluRmsScores(4, epsilon=0), "epsilon must be a finite number above 0, got 0"),
        (lambda: GaussianScores(temperature=-1), "temperature must be a finite number above 0"),
        (lambda: GaussianScores(deviation=-1), "deviation must be a finite number of at least 0"),
        (lambda: TsallisHybridScores(order=0), "order must be a finite number above 0, got 0"),
        (lambda: TsallisHybridScores(threshold=0), "threshold must be a finite number above 0"),
        (lambda: TsallisHybridScores(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
        (lambda: TsallisHybridScores(keep_top=0), "keep_top must be at least 1, got 0"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
