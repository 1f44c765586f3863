"""Expected costs, their normals, tangent projection and transport."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets.static import (
    ChoiceBudgets,
    budget_normals,
    expected_costs,
    normal_basis,
    project_tangent,
    retract,
    transport,
)

INF = torch.inf
properties = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def surfaces(draw):
    """Logits and budgets with limits strictly inside reach; forbidden options at times."""
    num_budgets, num_items = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    num_options = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = rng.normal(size=(num_items, num_options)) * draw(st.sampled_from([0.1, 1.0, 8.0]))
    costs = rng.uniform(-1, 3, size=(num_budgets, num_items, num_options))
    costs *= draw(st.sampled_from([1e-6, 1.0, 1e9]))
    if draw(st.booleans()):
        forbidden = rng.random(logits.shape) < 0.2
        forbidden[:, :2] = False
        logits[forbidden] = -np.inf
    # Costs of some probabilities, so that all budgets can be met at once.
    weights = np.where(np.isfinite(logits), rng.uniform(0.2, 1, size=logits.shape), 0.0)
    inside = weights / weights.sum(axis=1, keepdims=True)
    limits = (costs * inside).sum(axis=(1, 2))
    budgets = ChoiceBudgets(torch.from_numpy(costs), torch.from_numpy(limits))
    return torch.from_numpy(logits), budgets, rng


def cost_by_loops(logits, costs):
    """Expected costs in plain Python, one budget."""
    total = 0.0
    for row, prices in zip(logits, costs, strict=True):
        weights = [np.exp(value - max(row)) for value in row]
        total += sum(w * c for w, c in zip(weights, prices, strict=True)) / sum(weights)
    return total


class TestNormals:
    @properties
    @given(surface=surfaces())
    def test_are_the_slopes_of_the_expected_costs(self, surface):
        logits, budgets, _ = surface
        normals = budget_normals(logits, budgets).numpy()
        costs, point = budgets.costs.numpy(), logits.numpy()
        scale = np.ptp(costs)
        spent = expected_costs(logits, budgets).numpy()
        for budget in range(len(costs)):
            assert spent[budget] == pytest.approx(
                cost_by_loops(point, costs[budget]), abs=1e-12 * scale * len(point)
            )
            for index in np.ndindex(*point.shape):
                step = np.zeros_like(point)
                step[index] = 1e-5
                ahead, behind = (
                    cost_by_loops(point + sign * step, costs[budget]) for sign in (1, -1)
                )
                slope = (ahead - behind) / 2e-5
                assert normals[budget][index] == pytest.approx(slope, abs=1e-8 * scale)

    def test_do_not_move_with_a_shift_of_an_item(self):
        budgets = ChoiceBudgets(torch.rand(2, 5, 3), torch.ones(2))
        logits = torch.randn(5, 3).double()
        normals = budget_normals(logits, budgets)
        torch.testing.assert_close(normals.sum(dim=-1), torch.zeros(2, 5).double())
        shifted = budget_normals(logits + torch.randn(5, 1), budgets)
        torch.testing.assert_close(normals, shifted)

    @pytest.mark.parametrize("gap", [0.0, 3.0, 40.0, 300.0, 700.0, -40.0, -700.0])
    def test_keep_their_digits_where_a_choice_is_all_but_made(self, gap):
        budgets = ChoiceBudgets(torch.tensor([[1e6, 1e6 + 3.0]], dtype=torch.float64), 1e6)
        normal = budget_normals(torch.tensor([[0.0, gap]], dtype=torch.float64), budgets)[0, 0]
        expected = 3.0 / ((1 + np.exp(gap)) * (1 + np.exp(-gap)))
        assert normal[1].item() == pytest.approx(expected, rel=1e-12)
        assert normal[0].item() == pytest.approx(-expected, rel=1e-12)

    def test_a_forbidden_option_costs_nothing(self):
        budgets = ChoiceBudgets(torch.tensor([[1.0, 2.0, 1e9]]), 1.5)
        logits = torch.tensor([[0.0, 0.0, -INF]])
        assert expected_costs(logits, budgets).item() == 1.5
        assert budget_normals(logits, budgets)[0, 0].tolist() == [-0.25, 0.25, 0.0]


class TestTangent:
    @properties
    @given(surface=surfaces())
    def test_projection_is_orthogonal_nearest_and_idempotent(self, surface):
        logits, budgets, rng = surface
        basis = normal_basis(logits, budgets)
        vector = torch.from_numpy(rng.normal(size=logits.shape))
        tangent = project_tangent(vector, basis)
        normals = budget_normals(logits, budgets)
        for normal in normals:
            assert (tangent * normal).sum().abs() <= 1e-10 * vector.norm() * normal.norm()
        assert (project_tangent(tangent, basis) - tangent).norm() <= 1e-10 * vector.norm()
        rows = (normals.flatten(1) / normals.flatten(1).norm(dim=1, keepdim=True)).numpy()
        flat = vector.numpy().ravel()
        nearest = flat - rows.T @ np.linalg.lstsq(rows.T, flat, rcond=1e-12)[0]
        np.testing.assert_allclose(tangent.numpy().ravel(), nearest, atol=1e-7)

    @properties
    @given(surface=surfaces())
    def test_transported_momentum_lies_in_the_new_tangent_space(self, surface):
        logits, budgets, rng = surface
        first, second = (torch.from_numpy(rng.normal(size=logits.shape)) for _ in range(2))
        here = project_tangent(first, normal_basis(logits, budgets))
        there = logits + second
        moved = transport(here, normal_basis(there, budgets))
        for normal in budget_normals(there, budgets):
            assert (moved * normal).sum().abs() <= 1e-10 * first.norm() * normal.norm()

    @properties
    @given(surface=surfaces())
    def test_a_tangent_step_changes_no_budget_to_first_order(self, surface):
        logits, budgets, rng = surface
        point = retract(logits, budgets).logits
        tangent = project_tangent(
            torch.from_numpy(rng.normal(size=logits.shape)), normal_basis(point, budgets)
        )
        scale = budgets.costs.abs().max()
        near, nearer = (
            (expected_costs(point + step * tangent, budgets) - budgets.limits).abs().max() / scale
            for step in (1e-3, 1e-4)
        )
        assert nearer <= near / 50 + 1e-10
        assert near <= 1e-4

    def test_budgets_that_say_the_same_count_once(self):
        costs = torch.rand(4, 3).double()
        logits = torch.randn(4, 3).double()
        once = ChoiceBudgets(costs, 2.0)
        thrice = ChoiceBudgets(
            torch.stack([costs, 5 * costs, costs + 1]), torch.tensor([2.0, 10.0, 6.0])
        )
        vector = torch.randn(4, 3).double()
        basis = normal_basis(logits, thrice)
        assert len(basis) == 1
        torch.testing.assert_close(
            project_tangent(vector, basis), project_tangent(vector, normal_basis(logits, once))
        )

    def test_decided_choices_have_no_normal_and_take_nothing(self):
        budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        logits = torch.tensor([[2000.0, 0.0], [0.0, 2000.0]])
        basis = normal_basis(logits, budgets)
        assert basis.shape == (0, 2, 2)
        vector = torch.randn(2, 2).double()
        assert project_tangent(vector, basis).equal(vector)

    def test_a_normal_near_underflow_still_counts(self):
        budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        basis = normal_basis(torch.tensor([[700.0, 0.0], [0.0, 700.0]]), budgets)
        torch.testing.assert_close(basis.norm(), torch.tensor(1.0).double())

    def test_no_budget_leaves_every_direction(self):
        none = ChoiceBudgets(torch.zeros(0, 2, 3), torch.zeros(0))
        assert normal_basis(torch.zeros(2, 3), none).shape == (0, 2, 3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("costs", "limits", "error", "message"),
        [
            ([[0.0]], 1.0, TypeError, "costs must be a floating-point tensor, got list"),
            (torch.ones(2, 2).int(), 1.0, TypeError, "got torch.int32; convert it"),
            (torch.ones(2), 1.0, ValueError, "costs must have shape (N, K) or (m, N, K)"),
            (torch.ones(0, 2), 1.0, ValueError, "N, K >= 1, got (0, 2)"),
            (torch.tensor([[0.0, INF]]), 1.0, ValueError, "costs must be finite, got inf"),
            (torch.ones(2, 2), torch.ones(2), ValueError, "for each of 1 budgets, got shape (2,)"),
            (torch.ones(1, 2), torch.nan, ValueError, "limits must be finite, got nan"),
        ],
    )
    def test_of_budgets(self, costs, limits, error, message):
        with pytest.raises(error, match=re.escape(message)):
            ChoiceBudgets(costs, limits)

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            (torch.zeros(3, 2), "logits must have the shape (N, K) of costs, (2, 2), got (3, 2)"),
            (torch.tensor([[0.0, INF], [0.0, 0.0]]), "got inf at index (0, 1)"),
            (torch.tensor([[0.0, 0.0], [torch.nan, 0.0]]), "got nan at index (1, 0)"),
            (torch.tensor([[0.0, 0.0], [-INF, -INF]]), "got -inf in all of item 1; allow one"),
        ],
    )
    @pytest.mark.parametrize("function", [expected_costs, budget_normals, normal_basis, retract])
    def test_of_logits(self, function, logits, message):
        budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        with pytest.raises(ValueError, match=re.escape(message)):
            function(logits, budgets)

    @pytest.mark.parametrize("function", [project_tangent, transport])
    def test_of_vectors(self, function):
        message = "vector must have the shape (N, K) of the basis, (2, 2), got (2, 3)"
        with pytest.raises(ValueError, match=re.escape(message)):
            function(torch.zeros(2, 3), torch.zeros(1, 2, 2))
