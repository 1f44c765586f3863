"""Entropic transport against scaling of the kernel matrix, HiGHS, and its own marginals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from drgr.numerics import Status
from drgr.routing import entropic_transport

properties = settings(deadline=None, derandomize=True, max_examples=60)


def scaled_plan(worths, regularization, shares, num_iterations=3000):
    """Sinkhorn's own form: scaling rows and columns of the kernel matrix in turn, NumPy float64."""
    kernel = np.exp(worths.double().numpy() / regularization)
    columns = np.asarray(shares) * len(kernel)
    rows = np.ones(len(kernel))
    for _ in range(num_iterations):
        scale = columns / (kernel.T @ rows)
        rows = 1 / (kernel @ scale)
    return rows[:, None] * kernel * scale


@pytest.mark.parametrize("regularization", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("shares", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
def test_equals_scaling_of_the_kernel_matrix(regularization, shares):
    worths = torch.rand(30, 4) + torch.tensor([1.0, 0.3, 0.0, 0.0])
    found = entropic_transport(
        worths,
        regularization=regularization,
        shares=torch.tensor(shares, dtype=torch.float64),
        tolerance=1e-10,
        max_iterations=5000,
    )
    assert found.status is Status.CONVERGED
    expected = torch.from_numpy(scaled_plan(worths, regularization, shares))
    plan = found.plan(worths, regularization)
    torch.testing.assert_close(plan, expected, rtol=1e-7, atol=1e-9)
    assert float(found.expert_prices.mean()) == pytest.approx(0, abs=1e-12)


def test_small_regularization_comes_to_the_best_assignment():
    worths = torch.rand(24, 4, dtype=torch.float64) + torch.tensor([0.5, 0.0, 0.0, 0.0])
    by_token = np.kron(np.eye(24), np.ones(4))
    by_expert = np.kron(np.ones(24), np.eye(4))
    solution = linprog(
        -worths.numpy().ravel(),
        A_eq=np.vstack([by_token, by_expert]),
        b_eq=np.concatenate([np.ones(24), np.full(4, 6)]),
        bounds=(0, None),
        method="highs",
    )
    assert solution.status == 0
    best, gaps = -solution.fun, []
    for regularization in (0.1, 0.02):
        found = entropic_transport(
            worths, regularization=regularization, tolerance=1e-9, max_iterations=20000
        )
        assert found.status is Status.CONVERGED
        value = float((found.plan(worths, regularization) * worths).sum())
        gaps.append(best - value)
        # The entropy of a row is at most log E.
        assert -1e-6 <= gaps[-1] <= regularization * 24 * np.log(4)
    assert gaps[1] < gaps[0] / 3


@properties
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 12),
    experts=st.integers(1, 5),
    regularization=st.sampled_from([0.03, 0.3, 3.0]),
    max_iterations=st.sampled_from([1, 3, 200]),
)
def test_status_tells_the_truth_of_the_marginals(
    seed, tokens, experts, regularization, max_iterations
):
    generator = torch.Generator().manual_seed(seed)
    worths = 2 * torch.randn(tokens, experts, generator=generator)
    found = entropic_transport(
        worths, regularization=regularization, tolerance=1e-3, max_iterations=max_iterations
    )
    plan = found.plan(worths, regularization)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(tokens).double())
    target = tokens / experts
    error = float((plan.sum(dim=0) / target - 1).abs().max())
    assert error == pytest.approx(found.error, rel=1e-6, abs=1e-9)
    assert (found.status is Status.CONVERGED) == (found.error <= 1e-3)
    assert found.status in (Status.CONVERGED, Status.MAX_STEPS)
    assert found.num_iterations <= max_iterations


def test_the_limit_of_iterations_is_reported():
    worths = torch.randn(50, 8) + torch.arange(8)
    found = entropic_transport(worths, regularization=0.05, max_iterations=2)
    assert found.status is Status.MAX_STEPS
    assert found.num_iterations == 2
    assert found.error > 1e-4
    # From the solution there is nothing to do.
    solved = entropic_transport(worths, regularization=0.5, max_iterations=2000)
    again = entropic_transport(worths, regularization=0.5, start=solved.expert_prices)
    assert again.num_iterations == 0
    torch.testing.assert_close(again.expert_prices, solved.expert_prices)


def test_small_regularization_does_not_overflow():
    worths = 100 * torch.rand(40, 4)
    found = entropic_transport(worths, regularization=1e-3, max_iterations=20)
    assert torch.isfinite(found.expert_prices).all()
    assert torch.isfinite(found.token_prices).all()


def test_forbidden_entries_have_no_mass():
    worths = torch.rand(40, 4)
    worths[:20, 0] = -torch.inf
    found = entropic_transport(worths, regularization=0.2, max_iterations=2000)
    assert found.status is Status.CONVERGED
    plan = found.plan(worths, 0.2)
    assert plan[:20, 0].abs().max() == 0
    torch.testing.assert_close(plan.sum(dim=0), torch.full((4,), 10.0).double(), rtol=1e-3, atol=0)


def test_an_expert_out_of_reach_is_infeasible_and_as_cheap_as_the_cheapest():
    worths = torch.rand(40, 4)
    worths[:, 2] = -torch.inf
    found = entropic_transport(worths, regularization=0.2, max_iterations=2000)
    assert found.status is Status.INFEASIBLE
    assert found.error <= 1e-4
    assert found.expert_prices[2] == found.expert_prices.min()
    masses = found.plan(worths, 0.2).sum(dim=0)
    assert masses[2] == 0
    torch.testing.assert_close(masses[:2], torch.full((2,), 40 / 3).double(), rtol=1e-3, atol=0)


def test_tokens_without_experts_do_not_count():
    worths = torch.rand(30, 4)
    with_empty = torch.cat([worths, torch.full((5, 4), -torch.inf)])
    plain = entropic_transport(worths, regularization=0.2)
    found = entropic_transport(with_empty, regularization=0.2)
    torch.testing.assert_close(found.expert_prices, plain.expert_prices)
    assert found.token_prices[30:].tolist() == [float("inf")] * 5
    assert found.plan(with_empty, 0.2)[30:].sum() == 0


@pytest.mark.parametrize("worths", [torch.zeros(0, 3), torch.full((4, 3), -torch.inf)])
def test_nothing_to_transport(worths):
    found = entropic_transport(worths, regularization=0.2)
    assert found.expert_prices.tolist() == [0, 0, 0]
    assert found.error == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": 0}, "regularization must be a finite number above 0"),
        ({"regularization": 1, "tolerance": 0}, "tolerance must be a finite number above 0"),
        ({"regularization": 1, "max_iterations": 0}, "max_iterations must be at least 1, got 0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        entropic_transport(torch.rand(3, 2), **settings)
