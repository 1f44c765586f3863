"""Noise of the right distribution, whole gates, and the gradient that is promised."""

import re

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import softmax

from drgr.budgets.static import ChoiceKnapsack, gumbel_noise, straight_through


def rng():
    return torch.Generator().manual_seed(0)


class TestNoise:
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_has_the_gumbel_distribution(self, antithetic):
        noise = gumbel_noise((2500,), num_samples=4, generator=rng(), antithetic=antithetic)
        for half in noise.view(2, -1):  # within a half the samples are independent
            assert stats.kstest(half.numpy(), stats.gumbel_r.cdf).pvalue > 0.01

    def test_mirrored_samples_are_of_one_minus_u(self):
        noise = gumbel_noise((50,), num_samples=2, generator=rng(), antithetic=True)
        u = stats.gumbel_r.cdf(noise.numpy())
        np.testing.assert_allclose(u[0] + u[1], 1.0, atol=1e-12)

    @pytest.mark.parametrize("antithetic", [False, True])
    def test_the_largest_perturbed_logit_follows_the_softmax(self, antithetic):
        """The case that mirrors of ``-G`` fail: three options of 0.6, 0.3 and 0.1."""
        target = np.array([0.6, 0.3, 0.1])
        noise = gumbel_noise((3,), num_samples=40000, generator=rng(), antithetic=antithetic)
        winners = (torch.from_numpy(np.log(target)) + noise).argmax(dim=1)
        shares = torch.bincount(winners, minlength=3).numpy() / 40000
        np.testing.assert_allclose(shares, target, atol=4 * np.sqrt(0.25 / 40000))

    def test_repeats_with_its_generator(self):
        first, again = (gumbel_noise((3, 2), num_samples=3, generator=rng()) for _ in range(2))
        assert first.equal(again)
        assert first.shape == (3, 3, 2)
        assert first.dtype == torch.float64

    @pytest.mark.parametrize(
        ("num_samples", "message"),
        [
            (0, "num_samples must be a finite number above 0, got 0"),
            (3, "num_samples must be even where antithetic, got 3; take 4 or antithetic=False"),
        ],
    )
    def test_refuses(self, num_samples, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            gumbel_noise((2,), num_samples=num_samples, generator=rng(), antithetic=True)


class TestStraightThrough:
    @pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
    def test_gates_are_whole_and_their_gradient_is_that_of_the_surrogate(self, temperature):
        logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        (noise,) = gumbel_noise((6, 4), num_samples=1, generator=rng())
        weights = torch.randn(6, 4).double()
        drawn = straight_through(
            logits, noise, temperature=temperature, choose=lambda b: b.argmax(dim=1)
        )
        assert set(drawn.gates.detach().unique().tolist()) == {0.0, 1.0}
        assert drawn.gates.argmax(dim=1).equal(drawn.choice)
        (drawn.gates * weights).sum().backward()
        point, w = logits.detach().numpy(), weights.numpy()

        def surrogate(at):
            return (softmax((at + noise.numpy()) / temperature, axis=1) * w).sum()

        p = softmax((point + noise.numpy()) / temperature, axis=1)
        definition = p * (w - (p * w).sum(axis=1, keepdims=True)) / temperature
        np.testing.assert_allclose(logits.grad.numpy(), definition, atol=1e-12)
        for index in np.ndindex(6, 4):
            step = np.zeros((6, 4))
            step[index] = 1e-6
            slope = (surrogate(point + step) - surrogate(point - step)) / 2e-6
            assert logits.grad[index].item() == pytest.approx(slope, abs=1e-6)

    def test_the_gradient_of_the_loss_is_taken_at_the_whole_gates(self):
        logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        drawn = straight_through(
            logits, torch.tensor([[1.0, 0.0]]), temperature=1.0, choose=lambda b: b.argmax(dim=1)
        )
        (drawn.gates[0, 0] ** 3).backward()  # slope 3 at a gate of 1
        p = 1 / (1 + np.exp(-1.0))
        assert logits.grad[0].tolist() == pytest.approx([3 * p * (1 - p), -3 * p * (1 - p)])

    def test_the_choice_is_that_of_the_budget_for_perturbed_logits(self):
        costs = torch.tensor([[0, 1], [0, 1], [0, 1]])
        knapsack = ChoiceKnapsack(costs, 1, exactly=True)
        noise = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 1.0]])
        drawn = straight_through(
            torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]),
            noise,
            temperature=0.5,
            choose=lambda b: knapsack.best(b).options,
        )
        assert drawn.choice.tolist() == [1, 0, 0]

    def test_forbidden_options_get_no_gradient(self):
        logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
        drawn = straight_through(
            logits, torch.zeros(1, 3), temperature=1.0, choose=lambda b: b.argmax(dim=1)
        )
        drawn.gates[0, 1].backward()
        assert logits.grad[0, 2] == 0
        assert logits.grad.isfinite().all()

    def test_refuses(self):
        options = {"choose": lambda b: b.argmax(dim=1)}
        with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
            straight_through(torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0, **options)
        message = "noise must have the shape of logits, (1, 2), got (2, 2)"
        with pytest.raises(ValueError, match=re.escape(message)):
            straight_through(torch.zeros(1, 2), torch.zeros(2, 2), temperature=1.0, **options)
