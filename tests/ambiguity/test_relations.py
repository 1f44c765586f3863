"""Divergences that are one another, contain one another, or have a second formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from drgr.ambiguity import (
    KL,
    AlphaDivergence,
    Burg,
    ChiSquare,
    CressieRead,
    CVaR,
    Hellinger,
    KLCVaR,
    Neyman,
    Spectral,
    TotalVariation,
    worst_case,
)

DOUBLE = torch.float64
RADII = torch.tensor([1e-9, 1e-3, 0.05, 0.3], dtype=DOUBLE)
PENALTIES = torch.tensor([1e-3, 0.1, 1.0, 50.0], dtype=DOUBLE)


@pytest.fixture
def problem():
    losses = torch.randn(4, 30, dtype=DOUBLE)
    nominal = torch.rand(4, 30, dtype=DOUBLE)
    return losses, nominal / nominal.sum(-1, keepdim=True)


def solve(problem, divergence, **level):
    losses, nominal = problem
    return worst_case(losses, divergence=divergence, nominal=nominal, **level)


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [
        (CressieRead(2.0), ChiSquare(), 1.0),
        (CressieRead(1.0), KL(), 1.0),
        (CressieRead(0.5), Hellinger(), 4.0),
        (CressieRead(0.0), Burg(), 1.0),
        (CressieRead(-1.0), Neyman(), 1.0),
        (AlphaDivergence(1.0), KL(), 1.0),
        (AlphaDivergence(3.0), ChiSquare(), 1.0),
        (AlphaDivergence(0.0), Hellinger(), 4.0),
        (AlphaDivergence(-1.0), Burg(), 1.0),
        (AlphaDivergence(-3.0), Neyman(), 1.0),
        (AlphaDivergence(1.8), CressieRead(1.4), 1.0),
        (KLCVaR(1e-12), KL(), 1.0),
    ],
    ids=str,
)
def test_one_divergence_is_a_multiple_of_another(problem, one, other, factor):
    for level, scaled in (
        ({"radius": RADII}, {"radius": RADII / factor}),
        ({"penalty": PENALTIES}, {"penalty": PENALTIES * factor}),
    ):
        found, expected = solve(problem, one, **level), solve(problem, other, **scaled)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-11)
        torch.testing.assert_close(
            found.divergence, factor * expected.divergence, rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize(("order", "named"), [(1.0, KL()), (0.0, Burg()), (2.0, ChiSquare())])
def test_orders_near_a_named_one_are_near_it(problem, order, named):
    for level in ({"radius": RADII}, {"penalty": PENALTIES}):
        expected = solve(problem, named, **level).value
        for step in (1e-4, 1e-8):
            for near in (order - step, order + step):
                value = solve(problem, CressieRead(near), **level).value
                torch.testing.assert_close(value, expected, rtol=0, atol=10 * step)


@pytest.mark.parametrize("order", [0.4, 1.7, 3.0])
def test_a_renyi_ball_is_a_cressie_read_ball(problem, order):
    nominal = problem[1].numpy()
    for renyi in (1e-4, 0.02, 0.3):
        radius = math.expm1((order - 1) * renyi) / (order * (order - 1))
        q = solve(problem, CressieRead(order), radius=radius).weights.numpy()
        spent = np.log((nominal * (q / nominal) ** order).sum(-1)) / (order - 1)
        np.testing.assert_allclose(spent, renyi, rtol=1e-8)


@pytest.mark.parametrize("order", [1.3, 2.0, 4.0])
def test_balls_of_orders_above_one_are_bounds_on_a_norm(problem, order):
    """``min_eta eta + (1 + k (k - 1) rho)^{1/k} ||(l - eta)_+||_{k*}`` with the dual order k*."""
    losses, nominal = problem[0][0].numpy(), problem[1][0].numpy()
    dual = order / (order - 1)

    def bound(cut: float, radius: float) -> float:
        norm = (nominal * np.maximum(losses - cut, 0) ** dual).sum() ** (1 / dual)
        return cut + (1 + order * (order - 1) * radius) ** (1 / order) * norm

    for radius in (0.02, 0.3):
        found = minimize_scalar(bound, args=(radius,), bounds=(-80, losses.max()), method="bounded")
        divergence = CressieRead(order)
        value = worst_case(
            problem[0][0], divergence=divergence, nominal=problem[1][0], radius=radius
        ).value
        assert value.item() == pytest.approx(found.fun, abs=1e-8)


# Tails and ranks


@pytest.mark.parametrize("level", [0.07, 0.3, 0.99, 1.0])
def test_superquantile_is_cvar(problem, level):
    found, expected = solve(problem, Spectral.superquantile(level)), solve(problem, CVaR(level))
    torch.testing.assert_close(found.value, expected.value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("level", [0.07, 0.3, 0.99])
def test_smoothed_superquantile_is_kl_cvar(problem, level):
    found = solve(problem, Spectral.superquantile(level, KL()), penalty=PENALTIES)
    expected = solve(problem, KLCVaR(level), penalty=PENALTIES)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "divergence",
    [CVaR(1.0), Spectral.superquantile(1.0), Spectral.extremile(1.0), Spectral.exponential(1e-9)],
    ids=["cvar", "superquantile", "extremile", "exponential"],
)
def test_measures_that_are_the_mean(problem, divergence):
    result = solve(problem, divergence)
    torch.testing.assert_close(result.weights, problem[1], rtol=1e-7, atol=0)
    torch.testing.assert_close(result.value, (problem[0] * problem[1]).sum(-1), rtol=0, atol=1e-8)


def test_equal_spectrum_weights_are_the_mean():
    losses = torch.randn(7, dtype=DOUBLE)
    result = worst_case(losses, divergence=Spectral.from_weights([1 / 3] * 3))
    torch.testing.assert_close(result.weights, torch.full((7,), 1 / 7, dtype=DOUBLE))


def test_given_weights_go_by_rank():
    losses = torch.tensor([2.0, 9.0, 4.0], dtype=DOUBLE)
    result = worst_case(losses, divergence=Spectral.from_weights([0.1, 0.2, 0.7]))
    torch.testing.assert_close(result.weights, torch.tensor([0.1, 0.7, 0.2], dtype=DOUBLE))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_extremile_is_the_expected_largest_draw(order):
    losses = np.array([0.3, -1.0, 2.0, 1.1])
    nominal = np.array([0.1, 0.4, 0.2, 0.3])
    expected = sum(
        nominal[list(draws)].prod() * losses[list(draws)].max()
        for draws in itertools.product(range(4), repeat=order)
    )
    result = worst_case(
        torch.from_numpy(losses),
        divergence=Spectral.extremile(float(order)),
        nominal=torch.from_numpy(nominal),
    )
    assert result.value.item() == pytest.approx(expected, abs=1e-14)


def test_exponential_weights_fall_by_the_rate():
    losses = torch.arange(50.0, dtype=DOUBLE)
    weights = worst_case(losses, divergence=Spectral.exponential(5.0)).weights
    torch.testing.assert_close(
        weights[:-1] / weights[1:], torch.full((49,), math.exp(-5 / 50), dtype=DOUBLE)
    )


def test_total_variation_mixes_the_maximum_and_a_tail(problem):
    losses, nominal = problem
    for radius in (1e-12, 0.05, 0.4, 0.97):
        value = solve(problem, TotalVariation(), radius=radius).value
        tail = solve(problem, CVaR(1 - radius)).value
        expected = radius * losses.amax(-1) + (1 - radius) * tail
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    for penalty in (1e-3, 0.5, 4.0, 100.0):
        value = solve(problem, TotalVariation(), penalty=penalty).value
        raised = torch.maximum(losses, losses.amax(-1, keepdim=True) - penalty)
        torch.testing.assert_close(value, (nominal * raised).sum(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("level", [0.02, 0.25, 0.8])
def test_kl_cvar_lies_within_its_penalty_below_cvar(problem, level):
    tail = solve(problem, CVaR(level)).value
    for penalty in (1e-9, 1e-3, 0.1, 3.0):
        value = solve(problem, KLCVaR(level), penalty=penalty).value
        assert (value <= tail + 1e-13).all()
        assert (tail - value <= penalty * math.log(1 / level) + 1e-13).all()
    saturated = solve(problem, KLCVaR(level), radius=50.0)
    torch.testing.assert_close(saturated.value, tail, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        saturated.weights, solve(problem, CVaR(level)).weights, rtol=1e-12, atol=1e-15
    )


def test_kl_cvar_radius_is_that_of_kl_until_the_cap_binds(problem):
    loose = solve(problem, KL(), radius=0.01)
    ratio = (loose.weights / problem[1]).amax().item()
    capped = solve(problem, KLCVaR(0.9 / ratio), radius=0.01)
    torch.testing.assert_close(capped.weights, loose.weights, rtol=1e-9, atol=1e-13)
    tight = solve(problem, KLCVaR(1.2 / ratio), radius=0.01)
    assert (tight.value <= loose.value + 1e-13).all()
    assert (tight.weights / problem[1]).amax().item() <= ratio / 1.2 * (1 + 1e-9)
