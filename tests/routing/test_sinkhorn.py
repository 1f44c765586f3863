"""Sinkhorn prices: what they are in each cost, and the balance that their truncated plan has."""

import numpy as np
import pytest
import torch

from drgr.numerics import Status
from drgr.routing import SinkhornPrices, max_violation, min_violation


def updated(record, num_experts, **settings):
    controller = SinkhornPrices(num_experts, **settings)
    assert controller.status is None
    controller.observe(record)
    controller.update()
    return controller


def column_prices(worths, regularization, num_iterations=3000):
    """Minus the log of the column scaling of the kernel matrix, NumPy float64."""
    kernel = np.exp(worths.double().numpy() / regularization)
    rows = np.ones(len(kernel))
    for _ in range(num_iterations):
        columns = len(kernel) / kernel.shape[1] / (kernel.T @ rows)
        rows = 1 / (kernel @ columns)
    prices = -regularization * np.log(columns)
    return prices - prices.mean()


@pytest.mark.parametrize("regularization", [0.05, 0.5])
def test_prices_of_scores(route, regularization):
    scores = (torch.randn(60, 5) + torch.tensor([2.0, 0, 0, 0, 0])).softmax(dim=1)
    controller = updated(
        route(scores, budget=2),
        5,
        regularization=regularization,
        tolerance=1e-9,
        max_iterations=5000,
    )
    assert controller.status is Status.CONVERGED
    expected = torch.from_numpy(column_prices(scores, regularization)).float()
    torch.testing.assert_close(controller.prices, expected, rtol=1e-5, atol=1e-6)


def test_prices_of_log_scores_are_the_fit_of_entry_scores(route):
    logits = torch.randn(60, 5) + torch.tensor([2.0, 0, 0, 0, 0])
    scores = logits.softmax(dim=1)
    controller = updated(
        route(scores, budget=2),
        5,
        cost="log-scores",
        regularization=0.5,
        tolerance=1e-9,
        max_iterations=5000,
    )
    # The logits differ from log scores by a number for each token, which the transport ignores.
    duals = column_prices(logits, 0.5)
    torch.testing.assert_close(controller.transport.expert_prices, torch.from_numpy(duals))
    worths = scores.double().log().numpy() - duals
    thresholds = np.sort(worths, axis=1)[:, -3]
    entry = np.exp(thresholds[:, None] + duals)
    # Weighted least squares of token and expert effects, as a regression on indicator columns.
    design = np.hstack([np.kron(np.eye(60), np.ones((5, 1))), np.kron(np.ones((60, 1)), np.eye(5))])
    distance = np.log(scores.double().numpy() / entry).ravel()
    root = np.sqrt(1 / (1 + (distance / 0.1) ** 2))
    effects = np.linalg.lstsq(design * root[:, None], entry.ravel() * root, rcond=None)[0][60:]
    expected = torch.from_numpy(effects - effects.mean()).float()
    torch.testing.assert_close(controller.prices, expected, rtol=1e-4, atol=1e-6)


def test_prices_of_log_scores_keep_the_balance_of_their_plan(route):
    """One hot expert of sixteen: fitted to tokens far from it as well, its price left it dead."""
    logits = torch.randn(2048, 16) + 3.0 * (torch.arange(16) == 0)
    scores = logits.softmax(dim=1)
    controller = updated(
        route(scores, budget=2), 16, cost="log-scores", regularization=0.5, max_iterations=500
    )
    duals = controller.transport.expert_prices.float()
    plan = route(logits, budget=2, prices=duals).plan.expert_load
    priced = route(scores, budget=2, prices=controller.prices).plan.expert_load
    assert min_violation(plan) > -0.2
    assert min_violation(priced) > -0.2
    assert max_violation(priced) < 0.3


def violation_after_one_update(route, scores, top_k, **settings):
    controller = updated(route(scores, budget=top_k), scores.shape[1], **settings)
    record = route(scores, budget=top_k, prices=controller.prices)
    return float(max_violation(record.plan.expert_load)), controller


def test_balanced_mass_is_not_balanced_counts(route, skewed_scores):
    scores = skewed_scores(2048, 16).logit().softmax(dim=1)
    smooth, controller = violation_after_one_update(route, scores, 2, regularization=1.0)
    assert controller.status is Status.CONVERGED
    sharp, _ = violation_after_one_update(route, scores, 2, regularization=0.05)
    assert smooth > 1
    assert sharp < 0.7 * smooth


def test_too_few_iterations_are_told(route, skewed_scores):
    scores = skewed_scores(256, 8)
    _, controller = violation_after_one_update(
        route, scores, 2, regularization=0.002, max_iterations=2
    )
    assert controller.status is Status.MAX_STEPS
    assert controller.transport.error > 1e-3
    assert torch.isfinite(controller.prices).all()


def test_log_scores_of_zero_and_of_forbidden_experts(route):
    scores = torch.rand(40, 4)
    scores[:10, 0] = 0.0
    scores[10:20, 1] = -torch.inf
    controller = updated(route(scores, budget=2), 4, cost="log-scores", regularization=1.0)
    assert torch.isfinite(controller.prices).all()


def test_a_token_that_takes_all_has_no_say(route):
    scores = torch.rand(40, 4)
    controller = updated(route(scores, budget=4), 4, cost="log-scores", regularization=1.0)
    assert controller.prices.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": -1}, "regularization must be a finite number above 0"),
        ({"tolerance": 0}, "tolerance must be a finite number above 0"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"cost": "logits"}, r"cost must be one of \['scores', 'log-scores'\], got 'logits'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        SinkhornPrices(4, **settings)
