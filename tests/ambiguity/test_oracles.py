"""Values and weights against other solvers: interior points, nested roots, fine grids."""

import itertools

import numpy as np
import pytest
import torch

from drgr.ambiguity import KL, ChiSquare, Hellinger, Status, worst_case

KINDS = ("uniform", "dirichlet", "ties", "negative", "offset")
RADII, PENALTIES = (0.01, 0.1, 0.4), (0.05, 0.7, 20.0)
SIZES = dict(zip(KINDS, itertools.product(RADII, PENALTIES), strict=False))
DOUBLE = torch.float64


def example(kind: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    losses = rng.exponential(size=n) + 0.1 * rng.normal(size=n) ** 2
    p = np.full(n, 1 / n) if kind == "uniform" else rng.dirichlet(np.ones(n))
    if kind == "ties":
        losses = np.round(losses)
        losses[:2] = losses.max() + 1
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


@pytest.mark.parametrize("kind", KINDS)
def test_value_meets_an_interior_point_method(sized, kind):
    exact = sized.case.exact
    losses, p = example(kind, 7 if sized.case.is_spectral else 25, 3)
    radius, penalty = SIZES[kind]
    level = sized.level(radius=radius * sized.case.curvature, penalty=penalty * np.ptp(losses))
    result = solve(losses, p, sized.case.divergence, **level)
    expected = exact.best(losses, p, **level)
    assert result.value.item() == pytest.approx(expected, abs=1e-6 * np.ptp(losses))
    if "radius" in level:
        spent = exact.divergence(result.weights.numpy(), p)
        assert spent <= level["radius"] * (1 + 1e-9)
        assert spent == pytest.approx(result.divergence.item(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_value_meets_nested_roots_to_rounding(smooth_sized, kind):
    case = smooth_sized.case
    losses, p = example(kind, 25, 1)
    top = p[losses == losses.max()].sum()
    limit = case.exact.saturation(top)
    for radius, penalty in zip(RADII, PENALTIES, strict=True):
        level = smooth_sized.level(
            radius=min(radius * case.curvature, 0.9 * limit), penalty=penalty * np.ptp(losses)
        )
        result = solve(losses, p, case.divergence, **level)
        expected = case.exact.dual(losses, p, **level)
        assert result.value.item() == pytest.approx(expected, abs=1e-11 * np.ptp(losses))


def test_multiplier_is_the_slope_of_the_value_in_the_radius(smooth_sized):
    case = smooth_sized.case
    losses, p = example("dirichlet", 12, 5)
    step, radius = 1e-4, 0.1
    result = solve(losses, p, case.divergence, **smooth_sized.level(radius=radius, penalty=0.7))
    if smooth_sized.mode == "penalty":
        assert result.multiplier.item() == 0.7
        return
    ahead, behind = (
        case.exact.dual(losses, p, radius=radius + step * sign) for sign in (1.0, -1.0)
    )
    assert result.multiplier.item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


def test_weights_follow_from_multiplier_and_threshold(smooth_sized):
    case = smooth_sized.case
    losses, p = example("dirichlet", 12, 7)
    level = smooth_sized.level(radius=0.2 * case.curvature, penalty=0.4)
    result = solve(losses, p, case.divergence, **level)
    slope = (losses - result.threshold.item()) / result.multiplier.item()
    np.testing.assert_allclose(
        result.weights.numpy(), p * case.exact.ratio(slope), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("radius", [0.01, 0.15])
def test_value_meets_a_fine_grid_of_two_and_three_atoms(ball, radius):
    radius = radius * ball.curvature
    for losses, p in (
        (np.array([-1.0, 2.0]), np.array([0.7, 0.3])),
        (np.array([0.0, 1.0, 3.0]), np.array([0.5, 0.2, 0.3])),
    ):
        grid = simplex_grid(len(p))
        grid = grid[(grid <= p * ball.exact.cap).all(1)]
        best = (grid[ball.exact.divergence(grid, p) <= radius] @ losses).max()
        value = solve(losses, p, ball.divergence, radius=radius).value.item()
        assert best - 1e-12 <= value <= best + 0.06


def simplex_grid(n: int) -> np.ndarray:
    axis = np.linspace(0, 1, 2001 if n == 2 else 101)
    heads = np.stack(np.meshgrid(*[axis] * (n - 1), indexing="ij"), -1).reshape(-1, n - 1)
    heads = heads[heads.sum(1) <= 1]
    return np.concatenate([heads, 1 - heads.sum(1, keepdims=True)], 1).clip(0)


def test_hand_computed_values():
    two = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    # q = (1/2 - d, 1/2 + d) has chi-square divergence 2 d^2.
    result = worst_case(two, divergence=ChiSquare(), radius=0.02)
    torch.testing.assert_close(result.weights, torch.tensor([0.4, 0.6], dtype=DOUBLE))
    # The value is the logarithm of the mean of 1 and e.
    result = worst_case(two, divergence=KL(), penalty=1.0)
    assert result.value.item() == pytest.approx(0.6201145069582775, abs=1e-15)
    assert result.threshold.item() == pytest.approx(0.6201145069582775, abs=1e-15)
    assert result.weights[1].item() == pytest.approx(0.7310585786300049, abs=1e-15)
    # cos(pi/12): the amplitudes of q are those of p turned by 15 degrees from 45 to 60.
    radius = 1 - np.cos(np.pi / 12)
    result = worst_case(two, divergence=Hellinger(), radius=radius)
    torch.testing.assert_close(result.weights, torch.tensor([0.25, 0.75], dtype=DOUBLE))


# Sets without a smooth divergence: linear programs and enumeration


@pytest.mark.parametrize("level", [0.05, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_cvar_meets_its_linear_program(oracles, kind, level):
    losses, p = example(kind, 25, 11)
    divergence = oracles.CVaR(level)
    result = solve(losses, p, divergence)
    expected = oracles.tail_mean(losses, p, level)
    assert result.value.item() == pytest.approx(expected, abs=1e-12 * np.ptp(losses) + 1e-13 * 1000)
    assert (result.weights.numpy() <= p / level * (1 + 1e-14)).all()


def test_spectral_value_is_the_best_extreme_point(plain_spectral):
    losses, p = example("dirichlet", 6, 2)
    best = max(q @ losses for q in plain_spectral.exact.vertices(p))
    result = solve(losses, p, plain_spectral.divergence)
    assert result.value.item() == pytest.approx(best, abs=1e-14)
    np.testing.assert_allclose(
        result.weights.numpy(), plain_spectral.exact.by_rank(losses, p), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("penalty", [0.02, 0.5, 5.0])
def test_smoothed_spectral_value_of_equal_masses_meets_an_interior_point_method(
    smoothed_spectral, penalty
):
    losses, p = example("uniform", 24, 8)
    expected = smoothed_spectral.exact.best_of_equal_masses(losses, penalty=penalty)
    result = solve(losses, p, smoothed_spectral.divergence, penalty=penalty)
    assert result.value.item() == pytest.approx(expected, abs=1e-6 * np.ptp(losses))
    assert result.divergence.item() > 0


@pytest.mark.parametrize("penalty", [1e-9, 0.01, 0.3, 4.0])
def test_smoothed_spectral_weights_lie_in_the_spectral_set(smoothed_spectral, penalty):
    losses, p = example("ties", 9, 4)
    members = np.array(list(itertools.product([0.0, 1.0], repeat=9)))
    limit = smoothed_spectral.exact.distortion((members @ p).clip(max=1.0))
    weights = solve(losses, p, smoothed_spectral.divergence, penalty=penalty).weights.numpy()
    assert (members @ weights <= limit + 1e-14).all()


def test_smoothed_spectral_pools_losses_far_below_the_largest(oracles):
    """Losses 1e-5 apart and a thousand penalties below the top: their tilts underflow."""
    exact = oracles.RankWeights(
        distortion=lambda mass: 1 - (1 - mass) ** 3, smoothing=oracles.KULLBACK_LEIBLER
    )
    losses, p = np.array([0.0, -1.0, -1 + 1e-5, -0.5]), np.full(4, 0.25)
    for penalty in (1e-2, 2e-3, 1e-3, 1e-4):
        result = solve(losses, p, oracles.Spectral.extremile(3.0, KL()), penalty=penalty)
        expected = exact.best(losses, p, penalty=penalty)
        assert result.value.item() == pytest.approx(expected, abs=2e-9)


def test_smoothed_spectral_shares_among_ties_at_any_penalty(smoothed_spectral):
    losses, p = np.array([3.0, 1, 1, 1, 2]), np.array([0.3, 0.25, 0.2, 0.15, 0.1])
    for penalty in (1.0, 1e-6, 1e-15, 1e-17, 1e-60):
        weights = solve(losses, p, smoothed_spectral.divergence, penalty=penalty).weights.numpy()
        np.testing.assert_allclose(weights[1:4] / p[1:4], weights[1] / p[1], rtol=1e-12)
