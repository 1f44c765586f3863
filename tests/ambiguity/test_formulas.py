"""Generators, conjugates and their derivatives against the closed formulas, and each other."""

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from drgr.ambiguity import CressieRead, Problem

DOUBLE = torch.float64
LOG_RATIOS = (-50.0, -12.0, -2.5, -1.0, -0.3, -0.02, -3e-3, -1e-3, -1e-5, -1e-9)
LOG_RATIOS += tuple(-y for y in LOG_RATIOS if y > -20)
ORDERS = (-50.0, -3.5, -1e-3, -1e-7, 1e-7, 0.5, 1 - 1e-7, 1 + 1e-7, 2.0, 4.5, 50.0)


def assert_generator_is(divergence, formula, log_ratios) -> None:
    """Compares with the formula in 80-digit arithmetic, relative to the small result."""
    values = divergence.generator(torch.tensor(log_ratios, dtype=DOUBLE))
    with localcontext(prec=80):
        expected = [float(formula(Decimal(y).exp())) for y in log_ratios]
    # Rounding of the logarithm by half a unit in its last place changes powers of the ratio so.
    rounding = 2e-12 + 4e-16 * 50 * np.abs(log_ratios)
    np.testing.assert_array_less(
        np.abs(values.numpy() - expected), rounding * np.abs(expected) + 1e-300
    )


def inside_cap(case, log_ratios):
    return [y for y in log_ratios if y <= math.log(case.exact.cap)]


def slopes_of(case) -> np.ndarray:
    end = case.exact.slope_end
    return np.concatenate(
        [
            [-40.0, -3.0, -1.3, -0.7, -0.2, -1e-3, 0.0],
            min(end, 4.0) * np.array([1e-3, 0.2, 0.6, 0.9]),
        ]
    )


def test_generator_meets_its_formula(f_case):
    assert_generator_is(f_case.divergence, f_case.exact.generator, inside_cap(f_case, LOG_RATIOS))


@pytest.mark.parametrize("order", ORDERS)
def test_generator_of_any_order_meets_its_formula(oracles, order):
    formula = oracles.cressie_read(order).generator
    log_ratios = [y for y in LOG_RATIOS if abs(order * y) < 300]
    assert_generator_is(CressieRead(order), formula, log_ratios)


def test_generator_at_ratios_zero_and_one(f_case):
    at_zero, at_one = f_case.divergence.generator(torch.tensor([-math.inf, 0.0], dtype=DOUBLE))
    assert at_zero.item() == pytest.approx(f_case.exact.at_zero, rel=1e-15)
    assert at_one.item() == 0


def test_generator_is_infinite_above_the_cap(capped):
    cap = capped.exact.cap
    log_ratios = torch.tensor([math.log(cap), math.log(cap) + 1e-6], dtype=DOUBLE)
    at, above = capped.divergence.generator(log_ratios)
    assert at.isfinite()
    assert above.item() == math.inf


def test_second_derivative_at_one(smooth):
    for step in (1e-2, 1e-4):
        value = smooth.divergence.generator(torch.tensor(math.log1p(step), dtype=DOUBLE)).item()
        assert value == pytest.approx(smooth.exact.curvature * step**2 / 2, rel=3 * step)


def test_conjugate_meets_its_formula(f_case):
    slopes = slopes_of(f_case)
    values = f_case.divergence.conjugate(torch.from_numpy(slopes)).numpy()
    np.testing.assert_allclose(values, f_case.exact.conjugate(slopes), rtol=2e-13, atol=1e-14)


def test_conjugate_is_the_supremum_over_ratios(f_case):
    slopes = slopes_of(f_case)
    values = f_case.divergence.conjugate(torch.from_numpy(slopes)).numpy()
    # The best ratio lies below 1e4 at 90 % of any domain.
    grid = np.linspace(-60, 12, 20_001)
    for width in (8e-3, 4e-5, 2e-7):
        best, nearest = highest(f_case, slopes, grid)
        np.testing.assert_array_less(best, values + 1e-12 * (1 + np.abs(values)))
        grid = np.unique((nearest[:, None] + np.linspace(-width, width, 401)).ravel())
    reached = np.maximum(best, -f_case.exact.at_zero)
    np.testing.assert_allclose(values, reached, rtol=1e-9, atol=1e-9)


def highest(f_case, slopes, grid):
    """Returns the largest ``r s - f(r)`` of each slope, and the logarithm of its ratio."""
    cap = math.log(f_case.exact.cap)
    grid = np.concatenate([grid[grid < cap], [cap] if cap < math.inf else [0.0]])
    terms = slopes[:, None] * np.exp(grid) - f_case.exact.generator(np.exp(grid))
    return terms.max(1), grid[terms.argmax(1)]


def test_conjugate_is_infinite_beyond_its_domain(bounded):
    end = bounded.exact.slope_end
    beyond = torch.tensor([end * (1 + 1e-6), end + 1.0, 1e9], dtype=DOUBLE)
    assert bounded.divergence.conjugate(beyond).tolist() == [math.inf] * 3


def test_ratio_and_its_slope_are_derivatives_of_the_conjugate(smooth):
    slopes, step = torch.from_numpy(slopes_of(smooth)), 1e-6
    divergence = smooth.divergence
    for function, derivative in (
        (divergence.conjugate, divergence.ratio),
        (divergence.ratio, divergence.ratio_slope),
    ):
        finite = (function(slopes + step) - function(slopes - step)) / (2 * step)
        torch.testing.assert_close(derivative(slopes), finite, rtol=1e-6, atol=1e-8)


def test_ratio_and_its_slope_are_what_autograd_finds(smooth):
    slopes = torch.from_numpy(slopes_of(smooth)).requires_grad_()
    divergence = smooth.divergence
    for function, derivative in (
        (divergence.conjugate, divergence.ratio),
        (divergence.ratio, divergence.ratio_slope),
    ):
        (found,) = torch.autograd.grad(function(slopes).sum(), slopes)
        torch.testing.assert_close(found, derivative(slopes.detach()), rtol=1e-11, atol=1e-13)


def test_ratio_meets_its_formula(smooth):
    slopes = slopes_of(smooth)
    values = smooth.divergence.ratio(torch.from_numpy(slopes)).numpy()
    np.testing.assert_allclose(values, smooth.exact.ratio(slopes), rtol=1e-12, atol=1e-300)


def test_fenchel_young_inequality_with_equality_at_the_ratio(smooth):
    slopes = torch.from_numpy(slopes_of(smooth))
    ratios = smooth.divergence.ratio(slopes)
    conjugate = smooth.divergence.conjugate(slopes)
    for slope, value, ratio in zip(slopes, conjugate, ratios, strict=True):
        others = torch.cat([ratios, ratio.unsqueeze(0)])
        excess = smooth.divergence.generator(others.log()) + value - slope * others
        assert (excess >= -1e-12 * (1 + value.abs())).all()
        assert excess[-1].item() == pytest.approx(0, abs=1e-11 * (1 + abs(value.item())))


def test_saturation_radius_is_the_closed_form(ball):
    losses = torch.tensor([[0.0, -1.0, 0.0]], dtype=DOUBLE)
    for mass, share in itertools.product((1e-9, 0.01, 0.25, 0.9), (0.0, 0.5)):
        nominal = torch.tensor([[mass * share, 1 - mass, mass * (1 - share)]], dtype=DOUBLE)
        problem = Problem(losses=losses, nominal=nominal, has_empty_atoms=share == 0)
        found = ball.divergence.saturation_radius(problem).item()
        assert found == pytest.approx(ball.exact.saturation(mass), rel=1e-10)
