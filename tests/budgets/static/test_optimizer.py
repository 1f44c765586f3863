"""Descent along the budgets, against other optimizers and by hand."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, brentq, minimize
from scipy.special import softmax

from drgr.budgets.static import (
    ChoiceBudgets,
    budget_normals,
    expected_costs,
    riemannian_adam,
    riemannian_sgd,
    start_descent,
)

properties = settings(deadline=None, derandomize=True, max_examples=15)
ADAM = {"learning_rate": 0.1}
SGD = {"learning_rate": 0.3, "momentum": 0.5}
METHODS = pytest.mark.parametrize(
    ("method", "options"), [(riemannian_adam, ADAM), (riemannian_sgd, SGD)]
)


@pytest.fixture
def budgets():
    """Five items of three options under two budgets."""
    costs = torch.rand(2, 5, 3).double() * 3
    probabilities = torch.softmax(torch.randn(5, 3).double(), dim=1)
    return ChoiceBudgets(costs, (costs * probabilities).sum(dim=(1, 2)))


def gradient_of(worth, logits):
    """Gradient of ``-<worth, softmax(logits)>`` in closed form."""
    p = torch.softmax(logits, dim=-1)
    return -p * (worth - (p * worth).sum(dim=-1, keepdim=True))


@METHODS
@properties
@given(seed=st.integers(0, 10**6))
def test_every_step_ends_on_the_budgets_with_a_tangent_momentum(method, options, seed):
    rng = torch.Generator().manual_seed(seed)
    costs = torch.rand(2, 4, 3, generator=rng).double()
    inside = torch.softmax(torch.randn(4, 3, generator=rng).double(), dim=1)
    budgets = ChoiceBudgets(costs, (costs * inside).sum(dim=(1, 2)))
    state = start_descent(torch.randn(4, 3, generator=rng), budgets)
    for step in range(1, 8):
        gradient = torch.randn(4, 3, generator=rng).double()
        state = method(state, gradient, budgets, **options)
        assert state.num_steps == step
        assert state.retraction.status.succeeded
        assert (expected_costs(state.logits, budgets) - budgets.limits).abs().max() <= 1e-10
        for normal in budget_normals(state.logits, budgets):
            inner = (state.momentum * normal).sum().abs()
            assert inner <= 1e-10 * state.momentum.norm() * normal.norm()


@pytest.mark.parametrize(
    ("method", "options", "reference"),
    [
        (riemannian_adam, ADAM, lambda p: torch.optim.Adam(p, lr=0.1)),
        (riemannian_sgd, SGD, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5)),
    ],
)
def test_without_budgets_it_is_the_optimizer_of_torch(method, options, reference):
    free = ChoiceBudgets(torch.zeros(0, 3, 4), torch.zeros(0))
    start = torch.randn(3, 4).double()
    other = start.clone().requires_grad_()
    optimizer = reference([other])
    state = start_descent(start, free)
    for _ in range(10):
        gradient = torch.randn(3, 4).double()
        other.grad = gradient.clone()
        optimizer.step()
        state = method(state, gradient, free, **options)
    torch.testing.assert_close(state.logits, other.detach(), rtol=0, atol=1e-12)


def test_a_step_by_hand():
    """One budget, gradient descent: projection, step, and the shift by Brent's method."""
    rng = np.random.default_rng(2)
    costs, limit = rng.uniform(0, 2, (4, 3)), 3.5
    gradient, start = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))

    def shifted(logits):
        def excess(t):
            return (costs * softmax(logits + t * costs, axis=1)).sum() - limit

        return logits + brentq(excess, -100, 100, xtol=1e-14) * costs

    def tangent(vector, logits):
        p = softmax(logits, axis=1)
        normal = p * (costs - (p * costs).sum(axis=1, keepdims=True))
        return vector - (vector * normal).sum() / (normal * normal).sum() * normal

    point = shifted(start)
    velocity = tangent(gradient, point)
    after = shifted(point - 0.3 * velocity)
    budgets = ChoiceBudgets(torch.from_numpy(costs), limit)
    state = start_descent(torch.from_numpy(start), budgets)
    np.testing.assert_allclose(
        softmax(state.logits.numpy(), axis=1), softmax(point, axis=1), atol=1e-10
    )
    state = riemannian_sgd(state, torch.from_numpy(gradient), budgets, **SGD)
    np.testing.assert_allclose(
        softmax(state.logits.numpy(), axis=1), softmax(after, axis=1), atol=1e-10
    )
    np.testing.assert_allclose(state.momentum.numpy(), tangent(velocity, after), atol=1e-10)
    assert state.second_moment.count_nonzero() == 0


@METHODS
def test_a_smooth_problem_ends_at_its_constrained_minimum(method, options, budgets):
    """Entropy against worth, convex in the probabilities; scipy solves it in those."""
    worth = torch.randn(5, 3).double()

    def loss(p):
        return -(worth * p).sum() + (p * (p + 1e-300).log()).sum()

    state = start_descent(torch.zeros(5, 3), budgets)
    for step in range(300):
        leaf = state.logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(torch.softmax(leaf, dim=1)), leaf)
        rate = options["learning_rate"] * (1 if step < 200 else 0.02)
        state = method(state, gradient, budgets, **{**options, "learning_rate": rate})
    rows = np.vstack([budgets.costs.numpy().reshape(2, 15), np.kron(np.eye(5), np.ones(3))])
    totals = np.append(budgets.limits.numpy(), np.ones(5))
    found = minimize(
        lambda p: loss(torch.from_numpy(p).view(5, 3)).item(),
        torch.softmax(torch.zeros(15), dim=0).numpy() * 5,
        bounds=[(1e-9, 1)] * 15,
        constraints=[LinearConstraint(rows, totals, totals)],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    reached = loss(torch.softmax(state.logits, dim=1)).item()
    assert reached == pytest.approx(found.fun, abs=1e-6)


def test_forbidden_options_never_move(budgets):
    logits = torch.zeros(5, 3)
    logits[0, 2] = -torch.inf
    low, high = budgets.range_of_items(logits)
    reachable = ChoiceBudgets(budgets.costs[:1], (low + high)[0].sum() / 2)
    state = start_descent(logits, reachable)
    for _ in range(5):
        gradient = gradient_of(torch.randn(5, 3).double(), state.logits)
        state = riemannian_adam(state, gradient, reachable, learning_rate=0.1)
    assert state.logits[0, 2] == -torch.inf
    assert state.logits.isnan().sum() == 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (riemannian_adam, {"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        (riemannian_adam, {**ADAM, "epsilon": 0.0}, "epsilon must be a finite number above 0"),
        (riemannian_adam, {**ADAM, "betas": (1.0, 0.9)}, "betas[0] must lie in [0, 1), got 1.0"),
        (riemannian_adam, {**ADAM, "betas": (0.9, -1.0)}, "betas[1] must lie in [0, 1), got -1"),
        (riemannian_sgd, {"learning_rate": -1.0}, "learning_rate must be a finite number above 0"),
        (riemannian_sgd, {**SGD, "momentum": 1.0}, "momentum must lie in [0, 1), got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(method, options, message, budgets):
    state = start_descent(torch.zeros(5, 3), budgets)
    with pytest.raises(ValueError, match=re.escape(message)):
        method(state, torch.zeros(5, 3), budgets, **options)


@METHODS
def test_gradients_that_are_not_finite_are_refused(method, options, budgets):
    gradient = torch.zeros(5, 3)
    gradient[2, 1] = torch.nan
    state = start_descent(torch.zeros(5, 3), budgets)
    with pytest.raises(ValueError, match=re.escape("finite, got nan at index (2, 1); rescale")):
        method(state, gradient, budgets, **options)
