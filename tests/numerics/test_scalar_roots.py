import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from drgr.numerics import increasing_root


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def solve(function, start, lower, upper, **options):
    return increasing_root(
        function,
        start=column(*start),
        lower=column(*lower),
        upper=column(*upper),
        tolerance=options.pop("tolerance", 1e-13),
        **options,
    )


def test_rows_with_different_functions_meet_brentq():
    shift = column(0.1, 3.0, 40.0)

    def function(point):
        return point.exp() + point - shift, point.exp() + 1

    root = solve(function, (0.0, 0.0, 0.0), (-50.0,) * 3, (50.0,) * 3)
    expected = [
        brentq(lambda t, s=s: math.exp(t) + t - s, -50, 50, xtol=1e-15) for s in shift.tolist()
    ]
    assert root.converged.all()
    np.testing.assert_allclose(root.point.numpy(), expected, rtol=1e-12)


def test_newton_needs_few_steps_on_a_smooth_function():
    root = solve(lambda t: (t**3 + t - 2, 3 * t**2 + 1), (5.0,), (-100.0,), (100.0,))
    assert root.num_steps <= 12


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # Flat on both sides: Newton's step from the start is infinite.
        (lambda t: (torch.sign(t - 0.3) * (t - 0.3).abs().clamp_min(1e-3), t * 0), 0.3),
        (lambda t: ((t - 7).tanh(), 1 / (t - 7).cosh().square()), 7.0),
        (lambda t: ((t - 1e-9) ** 3, 3 * (t - 1e-9) ** 2), 1e-9),
        (lambda t: (t - 2.0, torch.full_like(t, torch.nan)), 2.0),
        (lambda t: (t.clamp_min(-1.0) + 0.5, (t > -1).double()), -0.5),
    ],
)
def test_bisection_takes_over_where_newton_fails(function, expected):
    root = solve(function, (-900.0,), (-1000.0,), (1000.0,))
    assert root.converged.all()
    assert root.num_steps < 200
    assert abs(function(root.point)[0].item()) <= 1e-3
    assert root.point.item() == pytest.approx(expected, abs=2e-4)


def test_no_point_outside_the_bracket_is_evaluated():
    points = []

    def function(point):
        points.append(point.item())
        return point.log(), 1 / point

    root = solve(function, (99.0,), (1e-3,), (20.0,))
    assert root.point.item() == pytest.approx(1.0)
    assert points[0] == 20.0
    assert min(points) >= 1e-3
    assert max(points) <= 20.0


def test_a_crawling_newton_iteration_gives_way_to_bisection():
    # From the right, Newton's step on exp(t) - 1 is nearly -1, whatever the distance.
    root = solve(lambda t: (torch.expm1(t), t.exp()), (600.0,), (-9.0,), (700.0,), tolerance=1e-12)
    assert root.converged.all()
    assert root.point.item() == pytest.approx(0.0, abs=1e-12)
    assert 100 < root.num_steps < 200


def test_a_row_that_runs_out_of_steps_says_so():
    root = solve(
        lambda t: (t**3 - 2, 3 * t**2), (90.0, 2 ** (1 / 3)), (0, 0), (99, 99), max_steps=2
    )
    assert root.num_steps == 2
    assert root.converged.tolist() == [False, True]


def test_float32_is_kept():
    root = increasing_root(
        lambda t: (t - 0.25, torch.ones_like(t)),
        start=torch.zeros(1),
        lower=-torch.ones(1),
        upper=torch.ones(1),
        tolerance=1e-7,
    )
    assert root.point.dtype == torch.float32
    assert root.point.item() == 0.25


@pytest.mark.parametrize("upper", [-1.0, math.nan])
def test_an_empty_bracket_is_refused(upper):
    with pytest.raises(ValueError, match="lower must not exceed upper"):
        solve(lambda t: (t, t), (0.0,), (0.0,), (upper,))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    power=st.sampled_from([1, 3, 5]),
    target=st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6),
    start=st.floats(-1e3, 1e3),
)
def test_every_odd_power_is_inverted(power, target, start):
    def function(point):
        return point**power - target, power * point ** (power - 1)

    root = solve(function, (start,), (-2e6,), (2e6,), tolerance=0.0)
    expected = math.copysign(abs(target) ** (1 / power), target)
    assert root.converged.all()
    assert root.point.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
