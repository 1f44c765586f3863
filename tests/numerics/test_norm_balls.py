"""Projections onto balls of the l1, the l2 and the group norm."""

from functools import partial

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.numerics import project_group_ball, project_l1_ball, project_l2_ball

properties = settings(deadline=None, derandomize=True, max_examples=60)

# Group 3 has no coordinate.
GROUP = torch.tensor([0, 1, 0, 2, 4, 1])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
BALLS = {
    "l1": project_l1_ball,
    "l2": project_l2_ball,
    "group": partial(project_group_ball, group=GROUP, num_groups=5),
    "weighted": partial(project_group_ball, group=GROUP, num_groups=5, weights=WEIGHTS),
}
all_balls = pytest.mark.parametrize("name", BALLS)

entries = st.floats(-3, 3) | st.sampled_from([-1.0, 0.0, 0.5, 1.0])
points = st.lists(entries, min_size=6, max_size=6).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def euclidean(point):
    """The norm over the last dimension, of numbers whose squares underflow too."""
    if point.shape[-1] == 0:
        return point.sum(-1)
    largest = point.abs().amax(-1, keepdim=True)
    safe = torch.where(largest > 0, largest, 1)
    return (point / safe).square().sum(-1).sqrt() * largest.squeeze(-1)


def norm_of(name, point):
    point = point.double()
    if name == "l1":
        return point.abs().sum(-1)
    if name == "l2":
        return euclidean(point)
    weights = WEIGHTS if name == "weighted" else torch.ones(5).double()
    parts = [euclidean(point[..., g == GROUP]) for g in range(5)]
    return torch.stack(parts, dim=-1) @ weights


def dual_norm_of(name, point):
    """Largest inner product with the unit ball."""
    if name == "l1":
        return point.abs().amax(-1)
    if name == "l2":
        return euclidean(point)
    weights = WEIGHTS if name == "weighted" else torch.ones(5).double()
    parts = [euclidean(point[..., g == GROUP]) for g in range(5)]
    return (torch.stack(parts, dim=-1) / weights).amax(-1)


def in_cvxpy(name, x):
    if name in ("l1", "l2"):
        return cvxpy.norm(x, int(name[1]))
    weights = WEIGHTS if name == "weighted" else torch.ones(5)
    return sum(
        float(weights[g]) * cvxpy.norm(x[np.flatnonzero(g == GROUP)], 2) for g in (0, 1, 2, 4)
    )


@all_balls
@pytest.mark.parametrize("radius", [0.3, 1.5, 4.0])
def test_meets_the_quadratic_solver(nearest, name, radius):
    point = torch.randn(6).double() * 2
    expected = nearest(point, lambda x: [in_cvxpy(name, x) <= radius], tolerance=1e-9)
    found = BALLS[name](point, radius=radius)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@all_balls
@properties
@given(point=points, other=points, radius=st.floats(0, 20) | st.just(1.0), data=st.data())
def test_is_feasible_optimal_idempotent_and_non_expansive(name, point, other, radius, data):
    scale = data.draw(st.sampled_from([1e-9, 1.0, 1e9]))
    point, other, radius = point * scale, other * scale, radius * scale
    found = BALLS[name](point, radius=radius)
    assert norm_of(name, found) <= radius * (1 + 1e-14)
    # The variational inequality over the whole ball, by the dual norm.
    residual = point - found
    best = radius * dual_norm_of(name, residual)
    assert best - residual @ found <= 1e-12 * scale * (radius + scale)
    again = BALLS[name](found, radius=radius)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-14 * max(scale, radius))
    moved = BALLS[name](other, radius=radius)
    assert (found - moved).norm() <= (point - other).norm() * (1 + 1e-12) + 1e-14 * scale
    scaled = BALLS[name](point * 3, radius=radius * 3)
    torch.testing.assert_close(scaled, found * 3, rtol=0, atol=1e-13 * max(scale, radius))


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_permutations_and_signs_carry_over(name):
    point = torch.randn(6).double()
    order, signs = torch.randperm(6), torch.randn(6).sign()
    found = BALLS[name](point, radius=0.8)
    turned = BALLS[name]((point * signs)[order], radius=0.8)
    torch.testing.assert_close(turned, (found * signs)[order], rtol=0, atol=1e-14)


@all_balls
def test_a_large_radius_is_the_identity_and_zero_gives_zeros(name):
    point = torch.randn(4, 6).double()
    assert torch.equal(BALLS[name](point, radius=1e3), point)
    assert (BALLS[name](point, radius=0.0) == 0).all()
    on_it = float(norm_of(name, torch.ones(6))) * (1 + 1e-15)
    assert torch.equal(BALLS[name](torch.ones(6).double(), radius=on_it), torch.ones(6).double())


def test_groups_of_one_give_the_l1_ball_and_one_group_the_l2_ball():
    point = torch.randn(5, 6).double()
    singles = project_group_ball(point, group=torch.arange(6), num_groups=6, radius=1.3)
    torch.testing.assert_close(singles, project_l1_ball(point, radius=1.3), rtol=0, atol=1e-14)
    together = torch.zeros(6, dtype=torch.int64)
    whole = project_group_ball(point, group=together, num_groups=1, radius=1.3)
    torch.testing.assert_close(whole, project_l2_ball(point, radius=1.3), rtol=0, atol=1e-14)


@all_balls
def test_magnitudes_whose_squares_leave_the_range(name):
    point = torch.randn(6)
    expected = BALLS[name](point, radius=0.7)
    assert not torch.equal(expected, point)
    for scale in (1e-30, 1e30):
        found = BALLS[name](point * scale, radius=0.7 * scale)
        torch.testing.assert_close(found / scale, expected)


@all_balls
def test_derivatives(check_derivatives, name):
    point = torch.randn(3, 6).double()
    # One row inside, two outside; an odd function keeps both derivatives of second order alive.
    radius = norm_of(name, point) * torch.tensor([1.5, 0.6, 0.3]).double()
    check_derivatives(lambda v, r: BALLS[name](v, radius=r).sin(), point, radius)
    if name == "weighted":
        check_derivatives(
            lambda v, w: project_group_ball(
                v, group=GROUP, num_groups=5, weights=w, radius=radius
            ).sin(),
            point,
            WEIGHTS,
        )


@all_balls
@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_gradients_at_zero_are_numbers(name, radius):
    point = torch.zeros(3, 6, dtype=torch.float64)
    point[1, 0], point[2] = 5.0, torch.tensor([0, 9.0, 0, 0, 0, 0])
    point.requires_grad_()
    bound = torch.tensor(radius, dtype=torch.float64, requires_grad=True)
    found = BALLS[name](point, radius=bound)
    first = torch.autograd.grad(found.sum(), (point, bound), create_graph=True)
    assert all(gradient.isfinite().all() for gradient in first)
    if radius > 0:
        assert torch.equal(first[0][0], torch.ones(6).double())
    mixed = first[0].square().sum() + first[1].square()
    if mixed.requires_grad:
        second = torch.autograd.grad(mixed, (point, bound), allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in second)


@all_balls
def test_rows_of_a_batch_are_independent(name):
    point, radius = torch.randn(3, 2, 6).double(), torch.rand(3, 2).double() * 3
    found = BALLS[name](point, radius=radius)
    for index in np.ndindex(3, 2):
        assert torch.equal(found[index], BALLS[name](point[index], radius=radius[index]))
    assert BALLS[name](torch.zeros(0, 6), radius=1.0).shape == (0, 6)


def test_weights_of_each_row():
    point, weights = torch.randn(3, 6).double(), torch.rand(3, 5).double() + 0.5
    found = project_group_ball(point, group=GROUP, num_groups=5, weights=weights, radius=0.9)
    for row in range(3):
        alone = project_group_ball(
            point[row], group=GROUP, num_groups=5, weights=weights[row], radius=0.9
        )
        assert torch.equal(found[row], alone)


@all_balls
def test_every_float_type(check_dtypes, name):
    check_dtypes(lambda v: BALLS[name](v, radius=1.2), torch.randn(3, 6))


@all_balls
def test_compiles_without_a_graph_break(name):
    compiled = torch.compile(lambda v, r: BALLS[name](v, radius=r), backend="eager", fullgraph=True)
    point, radius = torch.randn(3, 6), torch.tensor(0.8)
    assert torch.equal(compiled(point, radius), BALLS[name](point, radius=radius))


@all_balls
def test_wrong_points_and_radii(name):
    ball = BALLS[name]
    with pytest.raises(ValueError, match=r"radius must be finite and at least 0, got -0\.5; give"):
        ball(torch.ones(6), radius=-0.5)
    with pytest.raises(ValueError, match=r"radius must .* broadcast to shape \(2,\), got shape"):
        ball(torch.ones(2, 6), radius=torch.ones(2, 1))
    with pytest.raises(ValueError, match="point must be finite, got nan at index 0"):
        ball(torch.full((6,), torch.nan), radius=1.0)
    with pytest.raises(TypeError, match=r"point must be a floating-point tensor, got torch\.int64"):
        ball(torch.ones(6).long(), radius=1.0)
    with pytest.raises(ValueError, match=r"point must have shape \(\.\.\., n\) with n >= 1"):
        ball(torch.ones(2, 0), radius=1.0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"group": GROUP.int()}, TypeError, r"group must be int64, got torch\.int32; convert it"),
        ({"group": GROUP[:5]}, ValueError, r"group must have shape \(6,\), one entry .* got \(5,"),
        ({"num_groups": 4}, ValueError, r"group must lie in \[0, 4\), got 4 at index 4; raise num"),
        ({"group": -GROUP}, ValueError, r"group must lie in \[0, 5\), got -1 at index 1"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"weights": -WEIGHTS}, ValueError, "weights must be finite and above 0, got -1.0 at"),
        ({"weights": torch.ones(6)}, ValueError, r"weights must .* broadcast to shape \(5,\)"),
    ],
)
def test_wrong_groups(changed, error, message):
    arguments = {"group": GROUP, "num_groups": 5, "radius": 1.0} | changed
    with pytest.raises(error, match=message):
        project_group_ball(torch.ones(6), **arguments)
