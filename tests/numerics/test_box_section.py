"""Projections onto the part of a box where a budget is spent exactly."""

import math
from fractions import Fraction
from itertools import product

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.errors import InfeasibleBudgetError
from drgr.numerics import project_box_section, project_capped_simplex, project_simplex

properties = settings(deadline=None, derandomize=True, max_examples=100)

entries = st.floats(-3, 3) | st.sampled_from([-1.0, 0.0, 0.5, 1.0])
scales = st.sampled_from([1e-9, 1.0, 1e9])
inf = torch.inf


def column(values):
    return torch.tensor(values, dtype=torch.float64)


def rows_of(strategy, size):
    return st.lists(strategy, min_size=size, max_size=size).map(column)


@st.composite
def problems(draw, max_size=4):
    """A point with the bounds, costs and a reachable total, in float64."""
    size = draw(st.integers(1, max_size))
    point, lower = draw(rows_of(entries, size)), draw(rows_of(entries, size))
    upper = lower + draw(rows_of(st.floats(0, 2) | st.just(0.0), size))
    costs = draw(rows_of(st.floats(0.1, 5) | st.just(1.0), size))
    share = draw(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]))
    total = float(costs @ (lower + share * (upper - lower)))
    return point, {"lower": lower, "upper": upper, "costs": costs, "total": total}


def brute_force(point, *, lower, upper, costs, total):
    """Tries every assignment to lower bound, inside and upper bound, in rational arithmetic."""
    point, lower, upper, costs = (
        [Fraction(entry) for entry in part.tolist()] for part in (point, lower, upper, costs)
    )
    indices = range(len(point))
    least = sum(costs[i] * lower[i] for i in indices)
    most = sum(costs[i] * upper[i] for i in indices)
    total = min(max(Fraction(total), least), most)
    best, smallest = None, None
    for place in product([-1, 0, 1], repeat=len(point)):
        candidate = [upper[i] if place[i] > 0 else lower[i] for i in indices]
        inner = [i for i in indices if place[i] == 0]
        if inner:
            spent = sum(costs[i] * (point[i] if i in inner else candidate[i]) for i in indices)
            price = (spent - total) / sum(costs[i] ** 2 for i in inner)
            for i in inner:
                candidate[i] = point[i] - costs[i] * price
        if sum(costs[i] * candidate[i] for i in indices) != total:
            continue
        if any(not lower[i] <= candidate[i] <= upper[i] for i in indices):
            continue
        distance = sum((candidate[i] - point[i]) ** 2 for i in indices)
        if smallest is None or distance < smallest:
            best, smallest = candidate, distance
    return column([float(entry) for entry in best])


def best_in_direction(direction, *, lower, upper, costs, total):
    """Maximises a linear function over the section by filling the box greedily."""
    found = lower.clone()
    left = total - float(costs @ lower)
    for index in (direction / costs).argsort(descending=True).tolist():
        step = min(float(upper[index] - lower[index]), max(left, 0.0) / float(costs[index]))
        found[index] += step
        left -= step * float(costs[index])
    return found


@properties
@given(problem=problems(), far=scales, size=scales)
def test_equals_the_best_of_all_assignments(problem, far, size):
    point, section = problem
    point = point * far
    section |= {"lower": section["lower"] * size, "upper": section["upper"] * size}
    section["total"] *= size
    found = project_box_section(point, **section)
    expected = brute_force(point, **section)
    assert (found - expected).abs().max() <= 1e-14 * max(far, size)


@pytest.mark.parametrize("num", [2, 13, 50])
def test_meets_the_quadratic_solver(nearest, num):
    point, costs = torch.randn(num).double() * 2, torch.rand(num).double() + 0.1
    lower = -torch.rand(num).double()
    upper = torch.rand(num).double()
    total = float(costs @ (0.3 * lower + 0.7 * upper))
    bounds = (lower.numpy(), upper.numpy())
    expected = nearest(
        point, lambda x: [x >= bounds[0], x <= bounds[1], costs.numpy() @ x == total]
    )
    found = project_box_section(point, lower=lower, upper=upper, costs=costs, total=total)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
    expected = nearest(point, lambda x: [x >= 0, x <= 0.8, cvxpy.sum(x) == num / 3])
    found = project_capped_simplex(point, total=num / 3, upper=0.8)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


@properties
@given(problem=problems(max_size=12), far=scales)
def test_is_feasible_optimal_and_idempotent(problem, far):
    point, section = problem
    point = point * far
    found = project_box_section(point, **section)
    size = float(section["costs"] @ (section["lower"].abs() + section["upper"].abs()))
    assert (found >= section["lower"]).all()
    assert (found <= section["upper"]).all()
    assert abs(float(section["costs"] @ found) - section["total"]) <= 1e-14 * size
    residual = point - found
    best = best_in_direction(residual, **section)
    tolerance = 1e-13 * max(far, 1) * (1 + size) * len(point)
    assert float(residual @ (best - found)) <= tolerance
    again = project_box_section(found, **section)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-13 * (1 + size))


@properties
@given(problem=problems(), data=st.data(), scale=scales)
def test_is_non_expansive_and_equivariant(problem, data, scale):
    point, section = problem
    lower, upper, costs = (section[name] for name in ("lower", "upper", "costs"))
    other = data.draw(rows_of(entries, len(point)))
    found = project_box_section(point, **section)
    moved = project_box_section(other, **section)
    assert (found - moved).norm() <= (point - other).norm() + 1e-11
    order = torch.randperm(len(point))
    shuffled = project_box_section(
        point[order],
        lower=lower[order],
        upper=upper[order],
        costs=costs[order],
        total=section["total"],
    )
    torch.testing.assert_close(shuffled, found[order], rtol=0, atol=1e-12)
    scaled = project_box_section(
        point * scale,
        lower=lower * scale,
        upper=upper * scale,
        costs=costs / scale,
        total=section["total"],
    )
    torch.testing.assert_close(scaled, found * scale, rtol=0, atol=1e-11 * scale)
    priced = project_box_section(point + 3 * costs, **section)
    torch.testing.assert_close(priced, found, rtol=0, atol=1e-12)
    shifted = project_box_section(
        point + 2, lower=lower + 2, upper=upper + 2, costs=costs,
        total=section["total"] + 2 * float(costs.sum()),
    )  # fmt: skip
    torch.testing.assert_close(shifted, found + 2, rtol=0, atol=1e-11)


@properties
@given(problem=problems(max_size=8), far=scales)
def test_float32_stays_feasible_however_far_the_point_is(problem, far):
    point, section = problem
    narrow = {name: value.float() if name != "total" else value for name, value in section.items()}
    found = project_box_section((point * far).float(), **narrow)
    size = float(section["costs"] @ (section["lower"].abs() + section["upper"].abs()))
    assert (found >= narrow["lower"]).all()
    assert (found <= narrow["upper"]).all()
    assert abs(float(section["costs"] @ found.double()) - section["total"]) <= 2e-6 * size


def test_a_far_coordinate_costs_the_small_ones_no_digit():
    found = project_capped_simplex(column([1e9, 3e-9, 5e-9]), total=5e-9, upper=2e-9)
    torch.testing.assert_close(found, column([2e-9, 1e-9, 2e-9]), rtol=1e-15, atol=0)


def test_far_gaps_between_prices_lose_no_digit():
    # The running slope of the cost would be wrong by a rounding error, times a gap of 1e9.
    point = column([1e9, 0.3, 0.7, -1e9])
    costs = column([0.7, 0.1, 0.3, 0.9])
    found = project_box_section(point, lower=0.0, upper=1.0, costs=costs, total=0.7 + 0.2)
    price = (0.03 + 0.21 - 0.2) / 0.1
    expected = column([1.0, 0.3 - 0.1 * price, 0.7 - 0.3 * price, 0.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_without_bounds_it_is_the_projection_onto_the_plane():
    point, costs = torch.randn(3, 6).double(), torch.rand(6).double() + 0.5
    free = {"lower": -inf, "upper": inf, "costs": costs}
    found = project_box_section(point, total=0.7, **free)
    expected = point - costs * ((point @ costs - 0.7) / (costs @ costs)).unsqueeze(-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("lower", "upper"), [(0.0, inf), (-inf, 0.3), (-inf, inf)])
def test_endless_bounds_equal_far_ones(lower, upper):
    point, costs = torch.randn(20, 6).double(), torch.rand(6).double() + 0.5
    section = {"costs": costs, "total": 0.4}
    found = project_box_section(point, lower=lower, upper=upper, **section)
    far = project_box_section(point, lower=max(lower, -50.0), upper=min(upper, 50.0), **section)
    torch.testing.assert_close(found, far, rtol=0, atol=1e-13)
    mixed = torch.tensor([upper, 50.0, upper, 50.0, upper, 50.0]).double().clamp_max(upper)
    found = project_box_section(point, lower=lower, upper=mixed, **section)
    torch.testing.assert_close(found, far, rtol=0, atol=1e-13)


def test_corners_without_an_inner_coordinate():
    point = column([0.3, -2.0, 5.0]).requires_grad_()
    bounds = {"lower": 0.0, "upper": column([1.0, 0.5, 2.0])}
    for total, expected in ((0.0, [0, 0, 0]), (3.5, [1.0, 0.5, 2.0]), (2.0, [0, 0, 2.0])):
        found = project_box_section(point, costs=torch.ones(3).double(), total=total, **bounds)
        assert found.tolist() == expected
        (gradient,) = torch.autograd.grad(found.square().sum(), point)
        assert gradient.isfinite().all()
    fixed = project_box_section(
        point, lower=1.0, upper=1.0, costs=column([1.0, 2.0, 3.0]), total=6.0
    )
    assert fixed.tolist() == [1, 1, 1]


def test_a_total_that_rounding_put_out_of_reach_is_met():
    caps = column([0.1] * 10)
    for total in (1.0, math.nextafter(1.0, 2.0)):
        found = project_capped_simplex(torch.randn(10).double(), total=total, upper=caps)
        torch.testing.assert_close(found, caps, rtol=0, atol=1e-15)
    floors = {"lower": caps, "upper": 9.0, "costs": torch.ones(10)}
    found = project_box_section(torch.randn(10).double(), total=0.9999999999999997, **floors)
    assert torch.equal(found, caps)


def test_an_unlimited_cap_gives_the_simplex_and_its_jacobian():
    point = torch.randn(8, 6).double()
    for upper in (1.5, 2.0, inf):

        def capped(v, upper=upper):
            return project_capped_simplex(v, total=1.5, upper=upper)

        def plain(v):
            return project_simplex(v, total=1.5)

        torch.testing.assert_close(capped(point), plain(point), rtol=0, atol=1e-14)
        found = torch.autograd.functional.jacobian(capped, point)
        torch.testing.assert_close(found, torch.autograd.functional.jacobian(plain, point))


def test_equal_costs_give_the_capped_simplex():
    point = torch.randn(5, 7).double()
    expected = project_capped_simplex(point, total=3.0, upper=0.8)
    found = project_box_section(
        point, lower=0.0, upper=0.8, costs=torch.full((7,), 3.0).double(), total=9.0
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_jacobian_is_that_of_the_inner_coordinates():
    costs = column([1.0, 2.0, 1.0, 3.0])
    point = column([0.9, 0.8, -4.0, 30.0])

    def function(v):
        return project_box_section(v, lower=0.0, upper=1.0, costs=costs, total=4.5)

    assert ((function(point) > 0) & (function(point) < 1)).tolist() == [True, True, False, False]
    inner = costs * column([1, 1, 0, 0])
    expected = column([1, 1, 0, 0]).diag() - torch.outer(inner, inner) / (inner @ inner)
    torch.testing.assert_close(torch.autograd.functional.jacobian(function, point), expected)


def test_a_box_narrower_than_a_rounding_error_of_the_point_keeps_its_gradient():
    point = torch.tensor([1e9, 0.0], requires_grad=True)
    total = torch.tensor(0.5, requires_grad=True)
    found = project_capped_simplex(point, total=total)
    assert found.tolist() == [0.5, 0.0]
    (gradient,) = torch.autograd.grad(found[0], total)
    assert gradient.item() == 1.0


def test_derivatives(check_derivatives):
    point, costs = torch.randn(4, 6).double(), torch.rand(4, 6).double() + 0.5
    lower, upper = -torch.rand(4, 6).double(), torch.rand(4, 6).double()
    total = (costs * (0.4 * lower + 0.6 * upper)).sum(-1)

    def section(v, low, high, c, s):
        return project_box_section(v, lower=low, upper=high, costs=c, total=s).sin()

    check_derivatives(section, point, lower, upper, costs, total)
    # Arguments that broadcast collect the derivatives of all rows.
    check_derivatives(
        lambda u, s: project_capped_simplex(point, total=s, upper=u).sin(),
        column(0.9),
        column(2.2),
    )
    endless = torch.full_like(upper, inf)
    check_derivatives(lambda v, c: section(v, lower, endless, c, total), point, costs)


def test_rows_of_a_batch_are_independent():
    point, costs = torch.randn(3, 2, 6).double(), torch.rand(3, 2, 6).double() + 0.1
    lower, upper = -torch.rand(3, 2, 6).double(), torch.rand(3, 2, 6).double()
    total = (costs * (0.4 * lower + 0.6 * upper)).sum(-1)
    found = project_box_section(point, lower=lower, upper=upper, costs=costs, total=total)
    for index in np.ndindex(3, 2):
        alone = project_box_section(
            point[index],
            lower=lower[index],
            upper=upper[index],
            costs=costs[index],
            total=total[index],
        )
        assert torch.equal(found[index], alone)


def test_empty_batches_stay_empty():
    point = torch.zeros(0, 3, requires_grad=True)
    found = project_capped_simplex(point, total=2.0)
    assert found.shape == (0, 3)
    found.sum().backward()


def test_every_float_type(check_dtypes):
    point, costs = torch.randn(3, 9), torch.rand(9) + 0.5
    check_dtypes(lambda v: project_capped_simplex(v, total=4.0), point)
    check_dtypes(
        lambda v: project_box_section(v, lower=-0.5, upper=0.5, costs=costs, total=0.3), point
    )


def test_compiles_without_a_graph_break():
    def function(v, c):
        return project_box_section(v, lower=0.0, upper=1.0, costs=c, total=2.0)

    point, costs = torch.randn(3, 5), torch.rand(5) + 0.5
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(point, costs), function(point, costs))
    # Values are not checked inside a graph; what cannot be met ends at the nearest bound.
    assert torch.equal(compiled(point, costs / 10), torch.ones(3, 5))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"total": 4.0}, InfeasibleBudgetError, "at most the cost of the upper bounds, 3, got 4;"),
        ({"total": -1.0}, InfeasibleBudgetError, "at least the cost of the lower bounds, 0, got"),
        ({"lower": 0.8, "upper": 0.5}, ValueError, r"lower must not exceed .* 0.80* > 0.5 at ind"),
        ({"lower": inf}, ValueError, "lower must be a number below inf, got inf; give -inf"),
        ({"upper": torch.nan}, ValueError, "upper must be a number above -inf, got nan; give inf"),
        ({"costs": -torch.ones(3)}, ValueError, "costs must be finite and above 0, got -1"),
        ({"total": inf}, ValueError, "total must be finite, got inf"),
        ({"point": torch.full((3,), inf)}, ValueError, "point must be finite, got inf at index 0"),
        ({"point": torch.ones(3).int()}, TypeError, "point must be a floating-point tensor"),
        ({"upper": torch.ones(4)}, ValueError, r"upper must .* broadcast to shape \(3,\)"),
    ],
)
def test_wrong_arguments_of_the_section(changed, error, message):
    arguments = {
        "point": torch.ones(3).double(),
        "lower": 0.0,
        "upper": 1.0,
        "costs": torch.ones(3),
        "total": 1.0,
    } | changed
    with pytest.raises(error, match=message):
        project_box_section(arguments.pop("point"), **arguments)


def test_the_infeasible_row_is_named():
    with pytest.raises(InfeasibleBudgetError, match=r"bounds, 3, got 5 at index 1; change the"):
        project_capped_simplex(torch.zeros(2, 3), total=torch.tensor([1.0, 5.0]))
    with pytest.raises(ValueError, match=r"upper must be at least 0, got -1.0;"):
        project_capped_simplex(torch.zeros(2, 3), total=0.0, upper=-1.0)
