"""Soft thresholds of entries, blocks of dimensions and index groups."""

from functools import partial

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.numerics import (
    block_soft_threshold,
    group_soft_threshold,
    project_l2_ball,
    soft_threshold,
)

properties = settings(deadline=None, derandomize=True, max_examples=60)

# Group 3 has no coordinate.
GROUP = torch.tensor([0, 1, 0, 2, 4, 1])
MAPS = {
    "entries": soft_threshold,
    "blocks": partial(block_soft_threshold, dim=-1),
    "groups": partial(group_soft_threshold, group=GROUP, num_groups=5),
}
# Shapes of the thresholds of points of shape (3, 6).
NUM_THRESHOLDS = {"entries": 6, "blocks": 1, "groups": 5}
all_maps = pytest.mark.parametrize("name", MAPS)

entries = st.floats(-3, 3) | st.sampled_from([-1.0, 0.0, 0.5, 1.0])
points = st.lists(entries, min_size=6, max_size=6).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def blocks_of(name):
    """Coordinates of each block of a row of six."""
    if name == "entries":
        return [[index] for index in range(6)]
    if name == "blocks":
        return [list(range(6))]
    return [np.flatnonzero(g == GROUP).tolist() for g in range(5)]


def penalty_of(name, thresholds):
    def penalty(x):
        pairs = zip(blocks_of(name), thresholds, strict=True)
        return sum(float(t) * cvxpy.norm(x[block], 2) for block, t in pairs if block)

    return penalty


@all_maps
@pytest.mark.parametrize("size", [0.2, 1.0, 4.0])
def test_meets_the_quadratic_solver(nearest, name, size):
    point = torch.randn(6).double() * 2
    threshold = torch.rand(NUM_THRESHOLDS[name]).double() * size
    expected = nearest(point, penalty=penalty_of(name, threshold), tolerance=1e-9)
    found = MAPS[name](point, threshold=threshold)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@all_maps
@properties
@given(point=points, other=points, threshold=st.floats(0, 4) | st.just(1.0))
def test_satisfies_the_optimality_condition_and_is_non_expansive(name, point, other, threshold):
    found = MAPS[name](point, threshold=threshold)
    residual = point - found
    for block in blocks_of(name):
        length, norm = residual[block].norm(), found[block].norm()
        if norm == 0:
            assert length <= threshold * (1 + 1e-15)
        else:
            torch.testing.assert_close(residual[block], threshold * found[block] / norm)
    moved = MAPS[name](other, threshold=threshold)
    assert (found - moved).norm() <= (point - other).norm() + 1e-12


@all_maps
@properties
@given(point=points, threshold=st.floats(0, 4), scale=st.sampled_from([1e-9, 1.0, 1e9]))
def test_is_equivariant_to_scale_and_sign(name, point, threshold, scale):
    found = MAPS[name](point, threshold=threshold)
    scaled = MAPS[name](point * scale, threshold=threshold * scale)
    torch.testing.assert_close(scaled, found * scale, rtol=1e-12, atol=1e-15 * scale)
    assert torch.equal(MAPS[name](-point, threshold=threshold), -found)


@properties
@given(point=points, threshold=st.floats(1e-3, 4))
def test_what_a_block_loses_is_its_projection_onto_the_dual_ball(point, threshold):
    lost = point - block_soft_threshold(point, threshold=threshold, dim=0)
    torch.testing.assert_close(lost, project_l2_ball(point, radius=threshold), rtol=0, atol=1e-13)


@all_maps
def test_threshold_zero_is_the_identity_with_its_jacobian(name):
    point = torch.tensor([0.0, 0.0, 1.0, -2.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(MAPS[name](point, threshold=0.0), point)
    for where in (point, torch.zeros_like(point)):
        found = torch.autograd.functional.jacobian(lambda v: MAPS[name](v, threshold=0.0), where)
        torch.testing.assert_close(found, torch.eye(6).double())


@all_maps
def test_zeros_are_exact_and_without_sign(name):
    point = -torch.rand(3, 6)
    found = MAPS[name](point, threshold=10.0)
    assert torch.equal(found, torch.zeros(3, 6))
    assert not found.signbit().any()


@pytest.mark.parametrize("dim", [0, 1, -1, (0, 2), (-1, 0, 1)])
def test_blocks_of_any_dimensions_equal_the_loop_over_blocks(dim):
    point = torch.randn(2, 3, 4).double()
    dims = {entry % 3 for entry in ((dim,) if isinstance(dim, int) else dim)}
    shape = [1 if axis in dims else size for axis, size in enumerate(point.shape)]
    threshold = torch.rand(shape).double() * 4
    found = block_soft_threshold(point, threshold=threshold, dim=dim)
    for index in np.ndindex(*shape):
        block = tuple(slice(None) if axis in dims else place for axis, place in enumerate(index))
        shrunk = (1 - threshold[index] / point[block].norm()).clamp_min(0) * point[block]
        torch.testing.assert_close(found[block], shrunk)


def test_groups_may_differ_in_threshold_by_row():
    point, threshold = torch.randn(3, 6).double(), torch.rand(3, 5).double()
    found = group_soft_threshold(point, group=GROUP, num_groups=5, threshold=threshold)
    for row in range(3):
        alone = group_soft_threshold(
            point[row], group=GROUP, num_groups=5, threshold=threshold[row]
        )
        assert torch.equal(found[row], alone)
    rows = torch.arange(3).repeat_interleave(2)
    flat = group_soft_threshold(point[0], group=rows, num_groups=3, threshold=0.5)
    blocks = block_soft_threshold(point[0].view(3, 2), threshold=0.5, dim=1)
    torch.testing.assert_close(flat, blocks.flatten(), rtol=0, atol=1e-15)


@all_maps
def test_magnitudes_whose_squares_leave_the_range(name):
    point = torch.randn(6)
    expected = MAPS[name](point, threshold=0.4)
    for scale in (1e-30, 1e30):
        found = MAPS[name](point * scale, threshold=0.4 * scale)
        torch.testing.assert_close(found / scale, expected)


@all_maps
def test_derivatives(check_derivatives, name):
    point = torch.randn(3, 6).double() * 2
    threshold = torch.rand(3, NUM_THRESHOLDS[name]).double() + 0.2
    found = MAPS[name](point, threshold=threshold)
    assert (found != 0).any()
    check_derivatives(lambda v, t: MAPS[name](v, threshold=t).sin(), point, threshold)
    check_derivatives(lambda t: MAPS[name](point, threshold=t).sin(), torch.tensor(0.3).double())


@all_maps
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_gradients_at_zero_are_numbers(name, size):
    point = torch.zeros(2, 6, dtype=torch.float64)
    point[1, 0] = 5.0
    point.requires_grad_()
    threshold = torch.tensor(size, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(
        MAPS[name](point, threshold=threshold).square().sum(),
        (point, threshold),
        create_graph=True,
    )
    second = torch.autograd.grad(first[0].square().sum() + first[1].square(), (point, threshold))
    for gradient in (*first, *second):
        assert gradient.isfinite().all()


@all_maps
def test_every_float_type(check_dtypes, name):
    check_dtypes(lambda v: MAPS[name](v, threshold=0.6), torch.randn(3, 6))


def test_empty_batches_and_single_numbers():
    assert soft_threshold(torch.tensor(-3.0), threshold=1.0).item() == -2.0
    assert block_soft_threshold(torch.zeros(0, 4), threshold=1.0, dim=1).shape == (0, 4)
    found = group_soft_threshold(torch.zeros(0, 6), group=GROUP, num_groups=5, threshold=1.0)
    assert found.shape == (0, 6)


@all_maps
def test_compiles_without_a_graph_break(name):
    compiled = torch.compile(
        lambda v, t: MAPS[name](v, threshold=t), backend="eager", fullgraph=True
    )
    point, threshold = torch.randn(3, 6), torch.tensor(0.5)
    assert torch.equal(compiled(point, threshold), MAPS[name](point, threshold=threshold))


@all_maps
def test_wrong_points_and_thresholds(name):
    shrink = MAPS[name]
    with pytest.raises(ValueError, match=r"threshold must be finite and at least 0, got -1\.0;"):
        shrink(torch.ones(6), threshold=-1.0)
    with pytest.raises(ValueError, match=r"threshold must .* broadcast to shape \(2, \d\), got"):
        shrink(torch.ones(2, 6), threshold=torch.ones(3, 1))
    with pytest.raises(ValueError, match="point must be finite, got inf at index 0"):
        shrink(torch.full((6,), torch.inf), threshold=1.0)
    with pytest.raises(TypeError, match=r"point must be a floating-point tensor, got torch\.int64"):
        shrink(torch.ones(6).long(), threshold=1.0)


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3), 2), ((2, 3), (0, -2)), ((2, 0), 1), ((2,), ()), ((), 0)]
)
def test_wrong_dimensions(shape, dim):
    with pytest.raises(
        ValueError, match="dim must name distinct dimensions of point with at least"
    ):
        block_soft_threshold(torch.ones(shape), threshold=1.0, dim=dim)


def test_wrong_groups():
    with pytest.raises(ValueError, match=r"group must lie in \[0, 3\), got 4 at index 4"):
        group_soft_threshold(torch.ones(6), group=GROUP, num_groups=3, threshold=1.0)
