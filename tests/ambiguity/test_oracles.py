"""The solvers against independent solvers."""

import numpy as np
import pytest
import torch

from drgr.ambiguity import KL, ChiSquare, Status, worst_case

BOTH = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi_square"])
KINDS = ("uniform", "skewed", "ties", "negative", "offset")


def example(kind: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    losses = rng.exponential(size=n) + 0.1 * rng.normal(size=n) ** 2
    p = np.full(n, 1 / n) if kind == "uniform" else rng.dirichlet(np.ones(n))
    if kind == "ties":
        losses = np.round(losses)
        losses[0] = losses.max() + 1
    if kind == "negative":
        losses = -10 * losses - 5
    if kind == "offset":
        losses = losses + 1000
    return losses, p


def solve(losses, p, divergence, **level):
    result = worst_case(
        torch.from_numpy(losses), divergence=divergence, nominal=torch.from_numpy(p), **level
    )
    assert result.status is Status.CONVERGED
    return result


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [1e-4, 0.1, 1.0])
def test_constrained_value_meets_the_scalar_dual(oracle, divergence, kind, radius):
    losses, p = example(kind, 25, 1)
    result = solve(losses, p, divergence, radius=radius)
    expected = getattr(oracle, type(divergence).__name__).constrained(losses, p, radius)
    assert result.value.item() == pytest.approx(expected, abs=1e-7 * np.ptp(losses))
    spent = getattr(oracle, type(divergence).__name__).divergence(result.weights.numpy(), p)
    assert spent == pytest.approx(min(radius, result.divergence.item()), rel=1e-7, abs=1e-12)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [0.02, 1.5, 100.0])
def test_penalized_value_meets_the_closed_form_or_a_root(oracle, divergence, kind, penalty):
    losses, p = example(kind, 25, 2)
    result = solve(losses, p, divergence, penalty=penalty)
    expected = getattr(oracle, type(divergence).__name__).penalized(losses, p, penalty)
    assert result.value.item() == pytest.approx(expected, abs=1e-10 * (1 + np.ptp(losses)))


@BOTH
@pytest.mark.parametrize("level", [{"radius": 0.05}, {"radius": 0.4}, {"penalty": 0.7}])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_value_meets_the_primal_solved_by_slsqp(oracle, divergence, level, n):
    losses, p = example("skewed", n, n)
    p = (p + 0.05) / (p + 0.05).sum()
    function = getattr(oracle, type(divergence).__name__).divergence
    expected = oracle.slsqp(function, losses, p, **level)
    result = solve(losses, p, divergence, **level)
    assert result.value.item() == pytest.approx(expected, abs=2e-6 * np.ptp(losses))


@BOTH
@pytest.mark.parametrize("radius", [0.01, 0.2, 0.9])
def test_value_meets_a_fine_grid_of_two_and_three_atoms(oracle, divergence, radius):
    function = getattr(oracle, type(divergence).__name__).divergence
    for losses, p in (
        (np.array([-1.0, 2.0]), np.array([0.7, 0.3])),
        (np.array([0.0, 1.0, 3.0]), np.array([0.5, 0.2, 0.3])),
    ):
        feasible = [q for q in simplex_grid(len(p)) if function(q, p) <= radius]
        best = max(q @ losses for q in feasible)
        value = solve(losses, p, divergence, radius=radius).value.item()
        assert best <= value + 1e-12
        assert value <= best + 0.05


def simplex_grid(n: int) -> np.ndarray:
    steps = 3001 if n == 2 else 181
    axis = np.linspace(0, 1, steps)
    heads = np.stack(np.meshgrid(*[axis] * (n - 1), indexing="ij"), -1).reshape(-1, n - 1)
    heads = heads[heads.sum(1) <= 1]
    return np.concatenate([heads, 1 - heads.sum(1, keepdims=True)], 1).clip(0)


@BOTH
def test_multiplier_is_the_slope_of_the_oracle_value(oracle, divergence):
    losses, p = example("skewed", 12, 5)
    constrained = getattr(oracle, type(divergence).__name__).constrained
    step = 1e-3
    slope = (constrained(losses, p, 0.3 + step) - constrained(losses, p, 0.3 - step)) / (2 * step)
    assert solve(losses, p, divergence, radius=0.3).multiplier.item() == pytest.approx(
        slope, rel=1e-4
    )


@BOTH
@pytest.mark.parametrize("level", [{"radius": 0.2}, {"penalty": 0.4}])
def test_weights_follow_from_multiplier_and_threshold(divergence, level):
    losses, p = example("skewed", 12, 7)
    result = solve(losses, p, divergence, **level)
    slope = (losses - result.threshold.item()) / result.multiplier.item()
    ratio = np.exp(slope) if isinstance(divergence, KL) else np.maximum(1 + slope, 0)
    np.testing.assert_allclose(result.weights.numpy(), p * ratio, rtol=1e-9, atol=1e-14)


def test_hand_computed_values():
    two = torch.tensor([0.0, 1.0], dtype=torch.float64)
    # q = (1/2 - d, 1/2 + d) has chi-square divergence 2 d^2.
    result = worst_case(two, divergence=ChiSquare(), radius=0.02)
    torch.testing.assert_close(result.weights, torch.tensor([0.4, 0.6], dtype=torch.float64))
    # The value is the logarithm of the mean of 1 and e.
    result = worst_case(two, divergence=KL(), penalty=1.0)
    assert result.value.item() == pytest.approx(0.6201145069582775, abs=1e-15)
    assert result.threshold.item() == pytest.approx(0.6201145069582775, abs=1e-15)
    assert result.weights[1].item() == pytest.approx(0.7310585786300049, abs=1e-15)


@BOTH
def test_a_batch_equals_its_rows(divergence):
    losses = torch.randn(3, 4, 6, dtype=torch.float64)
    nominal = torch.rand(3, 1, 6, dtype=torch.float64)
    nominal /= nominal.sum(-1, keepdim=True)
    radius = torch.tensor([0.0, 1e-3, 0.3, 50.0], dtype=torch.float64)
    for name, level in (("radius", radius), ("penalty", radius + 0.1)):
        together = worst_case(losses, divergence=divergence, nominal=nominal, **{name: level})
        assert together.value.shape == (3, 4)
        for i in range(3):
            for j in range(4):
                alone = worst_case(
                    losses[i, j],
                    divergence=divergence,
                    nominal=nominal[i, 0],
                    **{name: level[j].item()},
                )
                for field in ("value", "weights", "multiplier", "threshold", "divergence"):
                    torch.testing.assert_close(
                        getattr(together, field)[i, j], getattr(alone, field), rtol=1e-9, atol=1e-12
                    )
