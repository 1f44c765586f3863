"""Projections onto the simplex, plain and with costs."""

from fractions import Fraction
from itertools import product

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.numerics import project_simplex, project_weighted_simplex

properties = settings(deadline=None, derandomize=True, max_examples=100)

entries = st.floats(-3, 3) | st.sampled_from([-1.0, 0.0, 0.5, 1.0])
points = st.lists(entries, min_size=1, max_size=6)
scales = st.sampled_from([1e-9, 1.0, 1e9])


def column(values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw):
    """A point with costs and a total, in float64."""
    point = column(draw(points))
    size = st.lists(st.floats(0.1, 5) | st.just(1.0), min_size=len(point), max_size=len(point))
    return point, column(draw(size)), draw(st.floats(0, 10) | st.just(1.0))


def brute_force(point, costs, total):
    """Tries every support: the nearest feasible candidate is the projection."""
    point, costs = np.asarray(point), np.asarray(costs)
    best, smallest = None, np.inf
    for support in product([False, True], repeat=len(point)):
        on = np.array(support)
        if not on.any():
            continue
        price = (costs[on] @ point[on] - total) / (costs[on] @ costs[on])
        candidate = np.where(on, point - costs * price, 0.0)
        distance = ((candidate - point) ** 2).sum()
        if candidate.min() >= -1e-12 and distance < smallest:
            best, smallest = candidate, distance
    return torch.from_numpy(best)


def exact(point, total):
    """Projection of floats onto the simplex in rational arithmetic."""
    values = [Fraction(value) for value in point]
    ordered = sorted(values, reverse=True)
    total = Fraction(total)
    threshold = max(
        (sum(ordered[:size], Fraction(0)) - total) / size for size in range(1, len(ordered) + 1)
    )
    return column([float(max(value - threshold, Fraction(0))) for value in values])


@properties
@given(problem=problems())
def test_equals_the_best_of_all_supports(problem):
    point, costs, total = problem
    found = project_weighted_simplex(point, costs=costs, total=total)
    torch.testing.assert_close(found, brute_force(point, costs, total), rtol=0, atol=1e-11)
    plain = project_simplex(point, total=total)
    expected = brute_force(point, torch.ones_like(point), total)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("num", [2, 13, 50])
def test_meets_the_quadratic_solver(nearest, num):
    point, costs = torch.randn(num).double(), torch.rand(num).double() + 0.1
    expected = nearest(point, lambda x: [x >= 0, costs.numpy() @ x == 2.5])
    found = project_weighted_simplex(point, costs=costs, total=2.5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
    expected = nearest(point, lambda x: [x >= 0, cvxpy.sum(x) == 2.5])
    np.testing.assert_allclose(project_simplex(point, total=2.5).numpy(), expected, atol=1e-7)


@properties
@given(problem=problems(), scale=scales)
def test_is_feasible_optimal_and_idempotent(problem, scale):
    point, costs, total = problem
    point, total = point * scale, total * 0.3
    found = project_weighted_simplex(point, costs=costs, total=total)
    assert (found >= 0).all()
    assert abs(float(costs @ found) - total) <= 1e-14 * total
    # The variational inequality at the vertices, which span the feasible set.
    residual = point - found
    best = float((residual * total / costs).max())
    assert best - float(residual @ found) <= 1e-13 * max(scale, total) * total
    again = project_weighted_simplex(found, costs=costs, total=total)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-14 * total)


@properties
@given(problem=problems(), other=points, scale=scales)
def test_is_non_expansive_and_equivariant(problem, other, scale):
    point, costs, total = problem
    other = column((other * 6)[: len(point)])
    found = project_weighted_simplex(point, costs=costs, total=total)
    moved = project_weighted_simplex(other, costs=costs, total=total)
    assert (found - moved).norm() <= (point - other).norm() + 1e-12
    order = torch.randperm(len(point))
    shuffled = project_weighted_simplex(point[order], costs=costs[order], total=total)
    torch.testing.assert_close(shuffled, found[order], rtol=0, atol=1e-13)
    scaled = project_weighted_simplex(point * scale, costs=costs / scale, total=total)
    torch.testing.assert_close(scaled, found * scale, rtol=1e-12, atol=1e-13 * scale)
    shifted = project_weighted_simplex(point + 3 * costs, costs=costs, total=total)
    torch.testing.assert_close(shifted, found, rtol=0, atol=1e-13)


@properties
@given(point=points, scale=scales, shift=scales, total=st.floats(1e-3, 1) | st.just(1.0))
def test_no_digit_is_lost_to_the_distance_of_the_point(point, scale, shift, total):
    far = column(point) * scale + shift
    found = project_simplex(far, total=total)
    torch.testing.assert_close(found, exact(far.tolist(), total), rtol=0, atol=4e-16 * total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_coordinate_is_negative_where_the_support_is_about_to_change(dtype):
    # The total is one rounding above the mass over the middle entry, which is about to enter.
    ordered = torch.randn(200, 200, dtype=dtype).sort(dim=-1, descending=True).values
    width = torch.arange(1, 200, dtype=dtype)
    above = (width * -ordered.diff(dim=-1)).cumsum(dim=-1)[:, 100]
    total = torch.nextafter(above, above * 2)
    assert (project_simplex(ordered, total=total) >= 0).all()


def test_long_rows_in_float32_meet_the_total():
    point = torch.randn(2, 100_000) * 1e-4 + 1e3
    found = project_simplex(point, total=7.0)
    torch.testing.assert_close(found.double().sum(-1), column([7.0, 7.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        found.double(), project_simplex(point.double(), total=7.0), rtol=1e-5, atol=1e-9
    )


def test_costs_of_any_magnitude():
    point, costs = torch.rand(3, 8), torch.rand(8) + 0.5
    expected = project_weighted_simplex(point, costs=costs, total=2.0)
    for scale in (1e-25, 1e25):
        found = project_weighted_simplex(point, costs=costs * scale, total=2.0 * scale)
        torch.testing.assert_close(found, expected)


def test_jacobian_is_that_of_the_support():
    point = column([0.9, 0.6, -0.4, 0.5])
    jacobian = torch.autograd.functional.jacobian(project_simplex, point)
    member = (project_simplex(point) > 0).double()
    assert member.tolist() == [1, 1, 0, 1]
    expected = member.diag() - torch.outer(member, member) / member.sum()
    torch.testing.assert_close(jacobian, expected)


def test_derivatives(check_derivatives):
    point, total = torch.randn(3, 5).double(), torch.rand(3).double() + 0.5
    costs = torch.rand(3, 5).double() + 0.5
    check_derivatives(lambda v, s: project_simplex(v, total=s), point, total)
    check_derivatives(
        lambda v, c, s: project_weighted_simplex(v, costs=c, total=s).sin(), point, costs, total
    )
    # Arguments that broadcast collect the derivatives of all rows.
    check_derivatives(
        lambda c, s: project_weighted_simplex(point, costs=c, total=s).sin(), costs[0], total[0]
    )


def test_minus_infinity_gets_nothing_and_finite_gradients():
    point = column([[0.3, -torch.inf, 0.9], [-torch.inf, -torch.inf, 5.0]]).requires_grad_()
    total = column([1.0, 2.0]).requires_grad_()
    found = project_simplex(point, total=total)
    torch.testing.assert_close(found.detach(), column([[0.2, 0, 0.8], [0, 0, 2.0]]))
    gradients = torch.autograd.grad(found.square().sum(), (point, total), create_graph=True)
    assert gradients[0].isfinite().all()
    assert gradients[0][0, 1] == 0
    seconds = torch.autograd.grad(gradients[0].square().sum() + gradients[1].sum(), (point, total))
    assert all(gradient.isfinite().all() for gradient in seconds)


def test_total_zero_gives_zeros():
    assert project_simplex(column([1.0, 1.0, 0.5]), total=0.0).tolist() == [0, 0, 0]
    costs = column([1.0, 2.0, 3.0])
    point = column([[1.0, 1.0, 0.5], [-1.0, -2.0, -3.0]])
    assert (project_weighted_simplex(point, costs=costs, total=0.0) == 0).all()


def test_ties_share_and_one_coordinate_takes_all():
    assert project_simplex(column([2.0, 2.0, 2.0, 2.0])).tolist() == [0.25] * 4
    assert project_simplex(column([[-7.0], [1e9]]), total=3.0).tolist() == [[3.0], [3.0]]


def test_rows_of_a_batch_are_independent():
    point, total = torch.randn(4, 2, 6).double(), torch.rand(4, 2).double() + 0.1
    costs = torch.rand(4, 2, 6).double() + 0.1
    plain = project_simplex(point, total=total)
    weighted = project_weighted_simplex(point, costs=costs, total=total)
    for index in np.ndindex(4, 2):
        assert torch.equal(plain[index], project_simplex(point[index], total=total[index]))
        alone = project_weighted_simplex(point[index], costs=costs[index], total=total[index])
        assert torch.equal(weighted[index], alone)


def test_empty_batches_stay_empty():
    point = torch.zeros(0, 3, requires_grad=True)
    found = project_simplex(point)
    assert found.shape == (0, 3)
    found.sum().backward()
    assert project_weighted_simplex(point, costs=torch.ones(3), total=1.0).shape == (0, 3)


def test_every_float_type(check_dtypes):
    point, costs = torch.randn(3, 9), torch.rand(9) + 0.5
    check_dtypes(project_simplex, point)
    check_dtypes(lambda v: project_weighted_simplex(v, costs=costs, total=2.0), point)


def test_compiles_without_a_graph_break():
    compiled = torch.compile(
        lambda v, c, s: project_weighted_simplex(project_simplex(v), costs=c, total=s),
        backend="eager",
        fullgraph=True,
    )
    point, costs, total = torch.randn(3, 5), torch.rand(5) + 0.5, torch.rand(3)
    expected = project_weighted_simplex(project_simplex(point), costs=costs, total=total)
    assert torch.equal(compiled(point, costs, total), expected)


@pytest.mark.parametrize(
    ("point", "options", "error", "message"),
    [
        (
            torch.ones(3).long(),
            {},
            TypeError,
            r"point must be a floating-point tensor, got torch\.",
        ),
        (torch.ones(2, 0), {}, ValueError, r"point must have shape \(\.\.\., n\) with n >= 1, got"),
        (torch.tensor(1.0), {}, ValueError, r"point must have shape .* got \(\)"),
        (column([0, torch.nan]), {}, ValueError, "must be finite or -inf, got nan at index 1"),
        (column([[0, torch.inf]]), {}, ValueError, r"or -inf, got inf at index \(0, 1\)"),
        (column([-torch.inf]), {}, ValueError, "point must have a finite entry in each row"),
        (torch.ones(3), {"total": -1.0}, ValueError, "total must be finite and at least 0, got -1"),
        (torch.ones(3), {"total": torch.nan}, ValueError, "total must be finite .* got nan"),
        (
            torch.ones(2, 3),
            {"total": torch.ones(3)},
            ValueError,
            "total must .* broadcast to shape",
        ),
    ],
)
def test_wrong_arguments_of_the_simplex(point, options, error, message):
    with pytest.raises(error, match=message):
        project_simplex(point, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point": column([0, -torch.inf, 1])}, "point must be finite, got -inf at index 1"),
        ({"costs": column([1, 0, 1])}, "costs must be finite and above 0, got 0.0 at index 1"),
        ({"costs": torch.ones(2)}, r"costs must .* broadcast to shape \(3,\), got shape \(2,\)"),
        ({"total": torch.tensor(-2.0)}, "total must be finite and at least 0, got -2.0;"),
    ],
)
def test_wrong_arguments_of_the_weighted_simplex(options, message):
    arguments = {"point": torch.ones(3), "costs": torch.ones(3), "total": 1.0} | options
    with pytest.raises(ValueError, match=message):
        project_weighted_simplex(arguments.pop("point"), **arguments)
