"""BIP balancing against a loop in Python and against the dual's optimum by HiGHS."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from drgr.budgets import TokenBudget
from drgr.routing import BipBalancing, min_violation


def duals_by_loop(record, num_iterations, start, counts):
    """The published iteration with Python's sort; each token has its own number of experts."""
    scores, duals = record.scores.tolist(), list(start)
    kept = record.plan.keep.sum(dim=1).tolist()
    for _ in range(num_iterations):
        tokens = []
        for row, k in zip(scores, kept, strict=True):
            worth = sorted((s - q for s, q in zip(row, duals, strict=True)), reverse=True)
            tokens.append(max(0.0, worth[k]) if k < len(worth) else 0.0)
        duals = []
        for column, count in zip(zip(*scores, strict=True), counts, strict=True):
            margins = sorted((s - p for s, p in zip(column, tokens, strict=True)), reverse=True)
            duals.append(max(0.0, margins[count]) if count < len(margins) else 0.0)
    return torch.tensor(duals)


@pytest.mark.parametrize("num_iterations", [1, 4])
@pytest.mark.parametrize("budget", [(2, 2, 2), (1, 4, 2.3), (5, 5, 5)])
@pytest.mark.parametrize("target", [None, [1, 2, 3, 1, 1]])
def test_equals_the_published_loop(route, num_iterations, budget, target):
    minimum, maximum, average = budget
    scores = torch.rand(20, 5)
    record = route(scores, budget=TokenBudget(minimum=minimum, maximum=maximum, average=average))
    controller = BipBalancing(5, num_iterations=num_iterations, target=target)
    weights = target or [1] * 5
    total = int(record.plan.keep.sum())
    counts = [total * weight // sum(weights) for weight in weights]
    expected = duals_by_loop(record, num_iterations, [0.0] * 5, counts)
    controller.observe(record)
    controller.update()
    torch.testing.assert_close(controller.duals, expected)
    torch.testing.assert_close(controller.prices, expected - expected.mean())
    # The next update starts from these prices, whatever the routing they caused.
    again = route(scores, budget=2, prices=controller.prices)
    total = int(again.plan.keep.sum())
    counts = [total * weight // sum(weights) for weight in weights]
    expected = duals_by_loop(again, num_iterations, controller.duals.tolist(), counts)
    controller.observe(again)
    controller.update()
    torch.testing.assert_close(controller.duals, expected)


def test_descends_to_the_optimum_of_the_bounded_assignment(route):
    scores = torch.rand(24, 4)
    scores[:, 0] += 0.5
    by_token = np.kron(np.eye(24), np.ones(4))
    by_expert = np.kron(np.ones(24), np.eye(4))
    bounds = np.concatenate([np.ones(24), np.full(4, 6)])
    rows = np.vstack([by_token, by_expert])
    solution = linprog(
        -scores.double().numpy().ravel(), A_ub=rows, b_ub=bounds, bounds=(0, 1), method="highs"
    )
    assert solution.status == 0
    values = []
    for num_iterations in (1, 2, 4, 30):
        controller = BipBalancing(4, num_iterations=num_iterations)
        controller.observe(route(scores, budget=1))
        controller.update()
        worths = (scores - controller.duals).double()
        values.append(float(worths.amax(dim=1).clamp_min(0).sum() + 6 * controller.duals.sum()))
    best = -solution.fun
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(values))
    assert best - 1e-4 <= values[-1] <= best + 0.1


def test_never_lifts_a_dead_expert(route, skewed_scores):
    scores = skewed_scores(2048, 16)
    controller = BipBalancing(16)
    for _ in range(5):
        record = route(scores, budget=2, prices=controller.prices)
        controller.observe(record)
        controller.update()
        assert float(controller.duals.min()) == 0
    assert float(min_violation(record.plan.expert_load)) < -0.15


def test_forbidden_experts_have_price_zero(route):
    scores = torch.rand(30, 4)
    scores[:, 3] = -torch.inf
    controller = BipBalancing(4)
    controller.observe(route(scores, budget=1))
    controller.update()
    assert torch.isfinite(controller.duals).all()
    assert float(controller.duals[3]) == 0


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="num_iterations must be at least 1, got 0"):
        BipBalancing(4, num_iterations=0)
