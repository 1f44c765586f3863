"""Back onto the budgets: exact where it says so, honest where it is not."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, fsolve, linprog
from scipy.special import softmax

from drgr.budgets.static import ChoiceBudgets, normal_basis, project_tangent, retract
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

INF = torch.inf
properties = settings(deadline=None, derandomize=True, max_examples=80)


@st.composite
def problems(draw, most_budgets=4):
    """Logits anywhere, limits that some strictly positive probabilities spend."""
    num_budgets = draw(st.integers(1, most_budgets))
    num_items, num_options = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = rng.normal(size=(num_items, num_options))
    logits *= draw(st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    kind = draw(st.sampled_from(["uniform", "whole", "layers"]))
    shape = (num_budgets, num_items, num_options)
    costs = rng.uniform(0, 2, shape) if kind == "uniform" else rng.integers(0, 4, shape) * 1.0
    if kind == "layers":
        owner = rng.integers(0, num_budgets, num_items)
        costs *= (owner == np.arange(num_budgets)[:, None])[:, :, None]
    costs[:, 0, 0] += 1.5  # in each budget something can be chosen
    costs *= draw(st.sampled_from([1e-6, 1.0, 1e9]))
    inside = softmax(rng.normal(size=logits.shape) * draw(st.sampled_from([0.5, 3.0])), axis=1)
    limits = (costs * inside).sum(axis=(1, 2))
    return logits, costs, limits


def retracted(logits, costs, limits, **options):
    budgets = ChoiceBudgets(torch.from_numpy(costs), torch.as_tensor(limits))
    return retract(torch.from_numpy(logits), budgets, **options)


def spent(logits, costs):
    return (costs * softmax(logits, axis=1)).sum(axis=(-2, -1))


def span(costs):
    return np.ptp(costs, axis=-1).sum(axis=-1)


class TestLanding:
    @properties
    @given(problem=problems())
    def test_is_on_every_budget(self, problem):
        logits, costs, limits = problem
        found = retracted(logits, costs, limits)
        assert found.status is Status.CONVERGED
        residual = spent(found.logits.numpy(), costs) - limits
        assert (np.abs(residual) <= 1e-10 * span(costs)).all()
        np.testing.assert_allclose(found.residual.numpy(), residual, atol=1e-11 * span(costs).max())

    @properties
    @given(problem=problems())
    def test_is_a_shift_along_the_costs(self, problem):
        logits, costs, limits = problem
        found = retracted(logits, costs, limits)
        shifted = logits + np.tensordot(found.shifts.numpy(), costs, axes=1)
        np.testing.assert_allclose(
            softmax(found.logits.numpy(), axis=1), softmax(shifted, axis=1), atol=1e-9
        )

    @properties
    @given(problem=problems())
    def test_is_where_it_started_if_that_is_on_the_budgets(self, problem):
        logits, costs, limits = problem
        once = retracted(logits, costs, limits)
        twice = retracted(once.logits.numpy(), costs, limits)
        assert twice.num_steps <= 1
        assert twice.logits.equal(once.logits)

    @properties
    @given(problem=problems(most_budgets=1))
    def test_of_one_budget_is_that_of_brent(self, problem):
        logits, costs, limits = problem
        unit = costs[0] / np.abs(costs).max()
        goal = limits[0] / np.abs(costs).max()
        shift = brentq(lambda t: spent(logits + t * unit, unit) - goal, -1e4, 1e4, xtol=1e-13)
        expected = softmax(logits + shift * unit, axis=1)
        found = retracted(logits, costs, limits).logits.numpy()
        np.testing.assert_allclose(softmax(found, axis=1), expected, atol=1e-8)

    def test_of_several_budgets_is_that_of_a_general_solver(self):
        rng = np.random.default_rng(3)
        logits, costs = rng.normal(size=(8, 4)), rng.uniform(0, 2, (3, 8, 4))
        limits = spent(rng.normal(size=(8, 4)), costs)
        shifts = fsolve(
            lambda t: spent(logits + np.tensordot(t, costs, axes=1), costs) - limits, np.zeros(3)
        )
        found = retracted(logits, costs, limits)
        np.testing.assert_allclose(found.shifts.numpy(), shifts, atol=1e-7)
        assert found.num_steps <= 10

    def test_of_many_layers_at_once(self):
        costs = torch.block_diag(*torch.ones(30, 8)).double()
        costs = torch.stack([torch.zeros_like(costs), costs], dim=-1)
        limits = torch.arange(30) % 7 + 0.5
        found = retract(8 * torch.randn(240, 2).double(), ChoiceBudgets(costs, limits))
        kept = torch.softmax(found.logits, dim=1)[:, 1].view(30, 8).sum(dim=1)
        torch.testing.assert_close(kept, limits.double(), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("share", [1e-9, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-9])
    @pytest.mark.parametrize("size", [0.0, 50.0, 600.0])
    def test_from_decided_choices_and_near_the_ends(self, share, size):
        logits = size * np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, 0.5]])
        costs = np.array([[[0.0, 1.0], [0.0, 2.0], [1.0, 3.0]]])
        limits = np.array([1.0 + 5 * share])
        found = retracted(logits, costs, limits)
        assert found.status is Status.CONVERGED
        assert abs(spent(found.logits.numpy(), costs)[0] - limits[0]) <= 1e-10

    def test_is_a_retraction(self):
        """Its first order is the identity on tangent vectors."""
        rng = np.random.default_rng(5)
        costs = torch.from_numpy(rng.uniform(0, 2, (2, 6, 3)))
        limits = torch.from_numpy(spent(rng.normal(size=(6, 3)), costs.numpy()))
        budgets = ChoiceBudgets(costs, limits)
        point = retract(torch.zeros(6, 3), budgets).logits
        tangent = project_tangent(
            torch.from_numpy(rng.normal(size=(6, 3))), normal_basis(point, budgets)
        )
        off = [
            (retract(point + h * tangent, budgets).logits - point - h * tangent).norm().item()
            for h in (1e-2, 1e-3)
        ]
        assert off[1] <= off[0] / 50
        assert off[0] <= 1e-2 * tangent.norm().item()

    def test_without_budgets_is_the_identity(self):
        logits = torch.randn(3, 2)
        found = retract(logits, ChoiceBudgets(torch.zeros(0, 3, 2), torch.zeros(0)))
        assert found.logits.equal(logits.double())
        assert found.status is Status.CONVERGED

    def test_forbidden_options_stay_forbidden(self):
        costs = torch.tensor([[0.0, 1.0, 100.0], [0.0, 1.0, 2.0]])
        found = retract(
            torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, 0.0]]), ChoiceBudgets(costs, 1.2)
        )
        assert found.logits[0, 2] == -INF
        assert spent(found.logits.numpy(), costs.numpy()) == pytest.approx(1.2, abs=1e-11)


class TestFailures:
    @pytest.mark.parametrize("limit", [-1.0, 0.0, 4.0, 5.0])
    def test_limits_at_or_beyond_the_ends(self, limit):
        message = f"strictly between least and most cost, 0 and 4, got {limit:g} for budget 0"
        with pytest.raises(InfeasibleBudgetError, match=re.escape(message)):
            retract(torch.zeros(2, 2), ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), limit))

    def test_a_budget_that_choices_do_not_move(self):
        with pytest.raises(InfeasibleBudgetError, match="least and most cost, 2 and 2, got 2"):
            retract(torch.zeros(2, 2), ChoiceBudgets(torch.ones(2, 2), 2.0))

    def test_budgets_that_contradict_each_other_are_proved_to(self):
        costs = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).double()
        both = ChoiceBudgets(torch.stack([costs, 2 * costs]), torch.tensor([1.0, 3.0]))
        found = retract(torch.zeros(2, 2), both)
        assert found.status is Status.INFEASIBLE
        assert found.residual.abs().max() > 0.1
        assert found.logits.isfinite().all()

    @settings(deadline=None, derandomize=True, max_examples=30)
    @given(seed=st.integers(0, 10**6))
    def test_infeasible_is_said_of_infeasible_budgets_alone(self, seed):
        """A linear programme decides; random limits lie on either side."""
        rng = np.random.default_rng(seed)
        costs = rng.integers(0, 3, (3, 3, 3)) * 1.0
        low, high = costs.min(axis=2).sum(axis=1), costs.max(axis=2).sum(axis=1)
        limits = low + (high - low) * rng.uniform(0.05, 0.95, 3)
        if (low == high).any():
            return
        sums = np.kron(np.eye(3), np.ones(3))
        rows = np.vstack([costs.reshape(3, 9), sums])
        solved = linprog(
            np.append(np.zeros(9), -1.0),  # the largest least probability
            A_ub=np.hstack([-np.eye(9), np.ones((9, 1))]),
            b_ub=np.zeros(9),
            A_eq=np.hstack([rows, np.zeros((6, 1))]),
            b_eq=np.append(limits, np.ones(3)),
            bounds=[(0, None)] * 9 + [(None, None)],
        )
        found = retracted(rng.normal(size=(3, 3)), costs, limits)
        if found.status is Status.INFEASIBLE:
            assert not solved.success
        elif solved.success and -solved.fun > 1e-6:
            assert found.status is Status.CONVERGED

    def test_too_few_steps_say_so(self):
        costs = np.array([[[0.0, 1.0], [0.0, 2.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0], [0.0, 0]]])
        logits = np.array([[80.0, 0.0], [-90.0, 0.0], [0.0, 1.0]])
        few = retracted(logits, costs, np.array([1.1, 0.9]), max_steps=3)
        assert few.status is Status.MAX_STEPS
        assert np.abs(few.residual.numpy()).max() > 1e-6
        one = retracted(logits, costs[:1], np.array([1.1]), max_steps=3)
        assert one.status is Status.MAX_STEPS
        assert retracted(logits, costs, np.array([1.1, 0.9])).status is Status.CONVERGED
