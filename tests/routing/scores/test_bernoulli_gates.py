"""The four estimators, each against all outcomes of the gates of a tiny problem."""

import itertools
import math

import numpy as np
import pytest
import torch

from drgr.budgets import TokenBudget, select_exactly
from drgr.collectives import rank
from drgr.routing import LayerRouting, RoutingPlan, expert_load
from drgr.routing.scores import StochasticGates

LOGITS = torch.tensor([[0.4, -1.1, 0.9]], dtype=torch.float64)
LINEAR = [0.7, -1.3, 2.1]
FAR = 1e6  # noise that decides a gate whatever its margin


def linear(gates):
    return sum(c * h for c, h in zip(LINEAR, gates, strict=True))


def curved(gates):
    """A loss with curvature and interaction."""
    a, b, c = gates
    return linear(gates) + 1.5 * a * b - 0.8 * b * c * c + (a + c - 0.3) ** 2


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def outcomes(probabilities):
    """All outcomes of independent gates with their probabilities."""
    for outcome in itertools.product([0, 1], repeat=len(probabilities)):
        yield (
            outcome,
            math.prod(p if h else 1 - p for p, h in zip(probabilities, outcome, strict=True)),
        )


def gradient_of_mean(loss, expected, logits=LOGITS, step=1e-5):
    """The gradient of an expected loss by central differences of ``expected(loss, logits)``."""
    found = []
    for e in range(logits.shape[1]):
        moved = []
        for sign in (1, -1):
            shifted = logits[0].tolist()
            shifted[e] += sign * step
            moved.append(expected(loss, shifted))
        found.append((moved[0] - moved[1]) / (2 * step))
    return np.array(found)


def mean_of_bernoulli(loss, logits):
    probabilities = [sigmoid(a) for a in logits]
    return sum(p * loss(outcome) for outcome, p in outcomes(probabilities))


def mean_gradient(scorer, loss, probabilities, *, closed_are_known=True):
    """The estimator's expected gradient: every outcome forced, weighed by its probability."""
    total = np.zeros(len(probabilities))
    for outcome, probability in outcomes(probabilities):
        logits = LOGITS.clone().requires_grad_()
        noise = torch.tensor([[FAR if h else -FAR for h in outcome]], dtype=torch.float64)
        gates = scorer.gates(logits, noise)
        assert [float(gate) > 0 for gate in gates[0].detach()] == [h == 1 for h in outcome]
        if not closed_are_known:
            gates = torch.where(noise > 0, gates, 0.0)
        loss(gates[0]).backward()
        total += probability * logits.grad[0].numpy()
    return total


class TestStraightThrough:
    probabilities = tuple(sigmoid(a) for a in LOGITS[0].tolist())

    def test_without_slope_it_is_the_slope_of_a_linear_loss(self):
        scorer = StochasticGates(3, estimator="straight-through")
        found = mean_gradient(scorer, linear, self.probabilities)
        np.testing.assert_allclose(found, LINEAR, rtol=1e-12)

    def test_with_slope_it_is_unbiased_for_a_linear_loss_only(self):
        scorer = StochasticGates(3, estimator="straight-through", sigmoid_slope=True)
        found = mean_gradient(scorer, linear, self.probabilities)
        np.testing.assert_allclose(found, gradient_of_mean(linear, mean_of_bernoulli), rtol=1e-8)
        curved_found = mean_gradient(scorer, curved, self.probabilities)
        bias = np.abs(curved_found - gradient_of_mean(curved, mean_of_bernoulli))
        assert bias.max() > 1e-2

    def test_what_closed_gates_leave_out(self):
        scorer = StochasticGates(3, estimator="straight-through", sigmoid_slope=True)
        found = mean_gradient(scorer, linear, self.probabilities, closed_are_known=False)
        full = gradient_of_mean(linear, mean_of_bernoulli)
        np.testing.assert_allclose(found, full * self.probabilities, rtol=1e-8)


class TestStochasticTimesSmooth:
    def expected(self, loss, logits):
        smooth = [math.sqrt(sigmoid(a)) for a in logits]
        return sum(
            p * loss([h * q for h, q in zip(outcome, smooth, strict=True)])
            for outcome, p in outcomes(smooth)
        )

    def test_the_mean_gate_is_the_sigmoid_and_a_linear_loss_has_half_its_gradient(self):
        scorer = StochasticGates(3, estimator="stochastic-times-smooth")
        probabilities = [math.sqrt(sigmoid(a)) for a in LOGITS[0].tolist()]
        means = np.zeros(3)
        for outcome, probability in outcomes(probabilities):
            noise = torch.tensor([[FAR if h else -FAR for h in outcome]], dtype=torch.float64)
            means += probability * scorer.gates(LOGITS, noise)[0].numpy()
        np.testing.assert_allclose(means, [sigmoid(a) for a in LOGITS[0].tolist()], rtol=1e-12)
        found = mean_gradient(scorer, linear, probabilities)
        half = gradient_of_mean(linear, self.expected) / 2
        np.testing.assert_allclose(found, half, rtol=1e-8)
        # Closed gates are exact zeros without a gradient: nothing is left out.
        sparse = mean_gradient(scorer, linear, probabilities, closed_are_known=False)
        np.testing.assert_allclose(sparse, found, rtol=1e-12)

    def test_each_gradient_is_half_the_gate_times_one_less_sigmoid(self):
        scorer = StochasticGates(3, estimator="stochastic-times-smooth")
        logits = LOGITS.clone().requires_grad_()
        gates = scorer.gates(logits, torch.tensor([[FAR, -FAR, FAR]]).double())
        gates.sum().backward()
        expected = [
            h * (1 - sigmoid(a)) / 2
            for h, a in zip(gates[0].tolist(), LOGITS[0].tolist(), strict=True)
        ]
        np.testing.assert_allclose(logits.grad[0], expected, rtol=1e-12)
        assert expected[1] == 0

    def test_a_curved_loss_is_biased(self):
        scorer = StochasticGates(3, estimator="stochastic-times-smooth")
        probabilities = [math.sqrt(sigmoid(a)) for a in LOGITS[0].tolist()]
        bias = mean_gradient(scorer, curved, probabilities)
        bias -= gradient_of_mean(curved, self.expected) / 2
        assert np.abs(bias).max() > 1e-2


class TestNoisyRectifier:
    def test_unbiased_by_quadrature(self):
        deviation, number = 0.7, 500
        points = (np.arange(number) + 0.5) / number * 12 - 6
        density = np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi) * (12 / number)
        logits = LOGITS[:, :2].clone()

        def loss(gates):
            return gates[0] * (1 + gates[1]) - 0.4 * gates[1] ** 2

        def moments(a):
            """Mean and mean square of a gate."""
            below = 0.5 * math.erfc(-a / deviation / math.sqrt(2))
            slope = math.exp(-((a / deviation) ** 2) / 2) / math.sqrt(2 * math.pi) * deviation
            return a * below + slope, (a**2 + deviation**2) * below + a * slope

        def expected(_, shifted):
            (one, _), (two, square) = (moments(a) for a in shifted)
            return one * (1 + two) - 0.4 * square

        noise = torch.cartesian_prod(*[torch.tensor(points)] * 2) * deviation
        weights = torch.tensor(np.outer(density, density).reshape(-1))
        logits.requires_grad_()
        scorer = StochasticGates(2, estimator="noisy-rectifier", deviation=deviation)
        gates = scorer.gates(logits.expand(len(noise), 2), noise)
        total = (loss(gates.T) * weights).sum()
        assert float(total.detach()) == pytest.approx(expected(loss, logits[0].tolist()), abs=1e-4)
        total.backward()
        by_differences = gradient_of_mean(loss, expected, logits.detach())
        np.testing.assert_allclose(logits.grad[0], by_differences, atol=6e-3)

    def test_the_gradient_flows_through_open_gates_alone(self):
        scorer = StochasticGates(3, estimator="noisy-rectifier")
        logits = LOGITS.clone().requires_grad_()
        gates = scorer.gates(logits, torch.tensor([[0.5, 0.5, -2.0]]).double())
        np.testing.assert_allclose(gates[0].detach(), [0.9, 0.0, 0.0])
        gates.sum().backward()
        assert logits.grad[0].tolist() == [1, 0, 0]


def record(logits, gates, valid=None):
    """A record of a training pass with given gates."""
    budget = TokenBudget(minimum=1, maximum=1, average=1)
    selection = select_exactly(gates.float(), budget)
    ids, keep = selection.expert_ids, selection.keep
    plan = RoutingPlan(
        expert_ids=ids,
        combine_weights=gates.gather(1, ids),
        keep=keep,
        expert_load=expert_load(ids, keep, gates.shape[1]),
    )
    return LayerRouting(
        name="layer",
        scores=gates,
        values=gates,
        plan=plan,
        selection=selection,
        valid=valid,
        logits=logits,
    )


class TestReinforce:
    probabilities = tuple(sigmoid(a) for a in LOGITS[0].tolist())

    def gradient(self, scorer, outcome, loss):
        logits = LOGITS.clone().requires_grad_()
        gates = torch.tensor([outcome], dtype=torch.float64)
        value = torch.tensor([float(loss(outcome))], dtype=torch.float64)
        scorer.surrogate(record(logits, gates), value).backward()
        return logits.grad[0].numpy()

    def scorer(self, baseline):
        scorer = StochasticGates(3, estimator="reinforce").double()
        scorer.moment += 1.0
        scorer.loss_moment += torch.as_tensor(baseline, dtype=torch.float64)
        return scorer

    @pytest.mark.parametrize("baseline", [0.0, [3.0, -2.0, 0.5]])
    @pytest.mark.parametrize("loss", [linear, curved])
    def test_unbiased_for_any_loss_and_baseline(self, baseline, loss):
        scorer = self.scorer(baseline)
        found = sum(
            p * self.gradient(scorer, outcome, loss) for outcome, p in outcomes(self.probabilities)
        )
        np.testing.assert_allclose(found, gradient_of_mean(loss, mean_of_bernoulli), rtol=1e-7)

    def optimal(self, loss):
        found = []
        for e, s in enumerate(self.probabilities):
            moments = np.zeros(2)
            for outcome, p in outcomes(self.probabilities):
                square = (outcome[e] - s) ** 2
                moments += p * square * np.array([loss(outcome), 1.0])
            found.append(moments[0] / moments[1])
        return np.array(found)

    def variance(self, baseline, loss):
        scorer = self.scorer(baseline)
        rows = [
            (p, self.gradient(scorer, outcome, loss)) for outcome, p in outcomes(self.probabilities)
        ]
        mean = sum(p * g for p, g in rows)
        return sum(p * (g - mean) ** 2 for p, g in rows)

    def test_the_optimal_baseline_has_the_least_variance(self):
        best = self.optimal(curved)
        least = self.variance(best, curved)
        for shift in (-0.5, 0.1, 2.0):
            assert (self.variance(best + shift, curved) > least).all()

    def test_a_single_gate_has_no_variance_at_its_optimal_baseline(self):
        def only_first(gates):
            return 2.0 + 3.0 * gates[0]

        best = self.optimal(only_first)
        s = self.probabilities[0]
        assert best[0] == pytest.approx((1 - s) * 5.0 + s * 2.0)
        assert self.variance(best, only_first)[0] == pytest.approx(0, abs=1e-12)

    def test_observed_losses_move_the_baseline_to_the_optimal_one(self):
        scorer = StochasticGates(3, estimator="reinforce", decay=0.9).double()
        assert scorer.baseline.tolist() == [0, 0, 0]
        torch.manual_seed(0)
        logits = LOGITS.expand(40_000, 3)
        gates = (torch.rand(40_000, 3) < logits.sigmoid()).double()
        losses = curved(gates.T)
        for _ in range(3):
            scorer.surrogate(record(logits, gates), losses)
            scorer.update()
        np.testing.assert_allclose(scorer.baseline, self.optimal(curved), atol=0.05)

    def test_the_baseline_is_a_ratio_of_running_averages(self):
        scorer = StochasticGates(3, estimator="reinforce", decay=0.5)
        averages = np.zeros((2, 3))
        for _ in range(3):
            sums = np.zeros((2, 3))
            for _ in range(2):
                logits, gates = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
                losses = torch.randn(4)
                scorer.surrogate(record(logits, gates), losses)
                squares = (gates.double() - logits.double().sigmoid()).square().numpy()
                sums += [(squares * losses.double().numpy()[:, None]).sum(axis=0), squares.sum(0)]
            scorer.update()
            averages = 0.5 * averages + 0.5 * sums
            np.testing.assert_allclose(scorer.baseline, averages[0] / averages[1], rtol=1e-5)
        before = scorer.baseline
        scorer.update()
        assert torch.equal(scorer.baseline, before)

    def test_a_scalar_loss_is_that_of_every_token(self):
        gradients = []
        for losses in (torch.tensor(2.5), torch.full((4,), 2.5)):
            scorer = StochasticGates(3, estimator="reinforce")
            logits = torch.ones(4, 3, requires_grad=True)
            gates = torch.eye(4, 3)
            scorer.surrogate(record(logits, gates), losses).backward()
            scorer.update()
            gradients.append((logits.grad, scorer.baseline))
        torch.testing.assert_close(*gradients)

    def test_padding_reaches_nothing(self):
        valid = torch.tensor([True, False, True, True])
        logits = torch.randn(4, 3)
        logits[1] = torch.nan
        gates, losses = torch.randint(0, 2, (4, 3)).float(), torch.randn(4)
        losses[1] = torch.nan
        found = []
        for mask, rows in ((valid, slice(None)), (None, valid)):
            scorer = StochasticGates(3, estimator="reinforce")
            given = logits[rows].clone().requires_grad_()
            value = scorer.surrogate(record(given, gates[rows], mask), losses[rows])
            value.backward()
            scorer.update()
            gradient = given.grad if mask is None else given.grad[valid]
            assert mask is None or not given.grad[1].any()
            found.append((value.detach(), gradient, scorer.baseline))
        torch.testing.assert_close(*found)

    def test_refusals(self):
        scorer = StochasticGates(3, estimator="reinforce")
        routing = record(torch.zeros(4, 3), torch.zeros(4, 3))
        with pytest.raises(ValueError, match=r"losses must have shape \(4,\), got \(3,\)"):
            scorer.surrogate(routing, torch.zeros(3))
        with pytest.raises(ValueError, match="got a scorer in evaluation mode"):
            scorer.eval().surrogate(routing, torch.zeros(4))
        with pytest.raises(ValueError, match="only the estimator reinforce has a baseline and a s"):
            StochasticGates(3).surrogate(routing, torch.zeros(4))
        with pytest.raises(ValueError, match="got straight-through"):
            _ = StochasticGates(3).baseline


def baseline_of_share():
    scorer = StochasticGates(3, estimator="reinforce", decay=0.5)
    observe_share(scorer, slice(0, 5) if rank() == 0 else slice(5, 8))
    scorer.update()
    scorer.update()
    return scorer.baseline.tolist()


def observe_share(scorer, rows):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator)
    gates = (torch.rand(8, 3, generator=generator) < 0.5).float()
    losses = torch.randn(8, generator=generator)
    # Selecting is not what is tested: no collective of it may be waited for.
    routing = record_without_selection(logits[rows], gates[rows])
    scorer.surrogate(routing, losses[rows])


def record_without_selection(logits, gates):
    return LayerRouting(
        name="layer",
        scores=gates,
        values=gates,
        plan=None,
        selection=None,
        valid=None,
        logits=logits,
    )


def test_several_processes_have_the_baseline_of_one(run_processes):
    scorer = StochasticGates(3, estimator="reinforce", decay=0.5)
    observe_share(scorer, slice(0, 8))
    scorer.update()
    first, second = run_processes(baseline_of_share, 2)
    assert first == second
    np.testing.assert_allclose(first, scorer.baseline, rtol=1e-5)


ESTIMATORS = ["reinforce", "stochastic-times-smooth", "noisy-rectifier", "straight-through"]


def open_probability(estimator, a, deviation):
    if estimator == "stochastic-times-smooth":
        return math.sqrt(sigmoid(a))
    if estimator == "noisy-rectifier":
        return 0.5 * math.erfc(-a / deviation / math.sqrt(2))
    return sigmoid(a)


def mean_gate(estimator, a, deviation):
    if estimator != "noisy-rectifier":
        return sigmoid(a)
    points = np.linspace(-8, 8, 20_001)
    density = np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(np.maximum(0, a + deviation * points) * density, points))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gates_are_drawn_in_training_and_means_at_evaluation(estimator):
    number = 40_000
    values = LOGITS[0].tolist()
    scorer = StochasticGates(3, estimator=estimator, deviation=0.6)
    hidden = torch.ones(number, 1)
    weight = LOGITS.T.float()
    torch.manual_seed(1)
    found = scorer(hidden, weight)
    gates = found.scores.detach()
    assert torch.equal(found.is_open, gates > 0)
    assert torch.equal(found.is_open, found.selectable > 0.5)
    for e, a in enumerate(values):
        probability = open_probability(estimator, a, 0.6)
        error = 4 * math.sqrt(probability * (1 - probability) / number)
        assert float(found.is_open[:, e].double().mean()) == pytest.approx(probability, abs=error)
        spread = 4 * float(gates[:, e].std()) / math.sqrt(number)
        assert float(gates[:, e].mean()) == pytest.approx(mean_gate(estimator, a, 0.6), abs=spread)
    # Gates are drawn apart: no two of them go together.
    correlations = np.corrcoef(found.is_open.double().T.numpy()) - np.eye(3)
    assert np.abs(correlations).max() < 0.03
    still = scorer.eval()(hidden[:2], weight)
    for e, a in enumerate(values):
        assert float(still.scores[0, e].detach()) == pytest.approx(
            mean_gate(estimator, a, 0.6), abs=1e-6
        )
        assert bool(still.is_open[0, e]) == (open_probability(estimator, a, 0.6) > 0.5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_logits_are_finite(estimator):
    weight = torch.tensor([[-200.0], [0.0], [200.0]], requires_grad=True)
    for training in (True, False):
        scorer = StochasticGates(3, estimator=estimator).train(training)
        found = scorer(torch.ones(50, 1), weight)
        assert found.scores.isfinite().all()
        assert found.selectable.isfinite().all()
        assert not found.is_open[:, 0].any()
        assert found.is_open[:, 2].all()
        if found.scores.requires_grad:
            (gradient,) = torch.autograd.grad(found.scores.sum(), weight)
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deviation": 0.0}, "deviation must be a finite number above 0, got 0.0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        StochasticGates(3, **options)
