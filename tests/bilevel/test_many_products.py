"""Products with several vectors at once, and the solvers that take them."""

import pytest
import torch

from drgr.bilevel import (
    Exact,
    LinearSystem,
    RandomSubspace,
    SolveStatus,
    hypergradient,
    products,
    second_derivatives,
)

DOUBLE = torch.float64
MODES = ["double-backward", "forward-over-reverse", "central-difference"]
X = torch.tensor([0.3, -0.2, 0.5], dtype=DOUBLE)
Y = torch.tensor([0.1, 0.4, -0.3], dtype=DOUBLE)
# More rows than a chunk of two holds, and one chunk that is not full.
ROWS = torch.tensor(
    [[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 0.2, 0.1]],
    dtype=DOUBLE,
)


def loss(x, y):
    return (x.sin() * y.pow(3)).sum() + (y.sum() * x[0]).exp()


class Doubled(torch.autograd.Function):
    """``2 v`` by Python numbers, which vmap cannot see."""

    @staticmethod
    def forward(_ctx, vector):
        return torch.tensor([2 * entry for entry in vector.tolist()], dtype=vector.dtype)

    @staticmethod
    def backward(_ctx, gradient):
        return Doubled.apply(gradient)


def loss_without_vmap(x, y):
    return loss(x, Doubled.apply(y) / 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("at_once", [2, 64])
def test_many_products_are_those_of_the_dense_matrix(monkeypatch, mode, retain_graph, at_once):
    monkeypatch.setattr(products, "_MOST_AT_ONCE", at_once)
    dense = torch.func.hessian(loss, argnums=1)(X, Y)
    found = second_derivatives(mode, loss, X, Y, retain_graph=retain_graph)
    tolerance = 1e-8 if mode == "central-difference" else 1e-13
    for _ in range(2):
        images = found.hessian_many(ROWS)
        torch.testing.assert_close(images, ROWS @ dense, rtol=0, atol=tolerance)
    assert not images.requires_grad


@pytest.mark.parametrize("retain_graph", [True, False])
def test_what_vmap_cannot_do_is_done_one_by_one(monkeypatch, retain_graph):
    monkeypatch.setattr(products, "_MOST_AT_ONCE", 2)
    dense = torch.func.hessian(loss, argnums=1)(X, Y)
    found = second_derivatives(
        "double-backward", loss_without_vmap, X, Y, retain_graph=retain_graph
    )
    torch.testing.assert_close(found.hessian_many(ROWS), ROWS @ dense, rtol=0, atol=1e-13)


def test_random_numbers_in_the_loss_are_drawn_one_by_one():
    def noisy(x, y):
        torch.manual_seed(0)
        return (torch.rand(3, dtype=DOUBLE) * x * y.pow(3)).sum()

    found = second_derivatives("forward-over-reverse", noisy, X, Y)
    alone = torch.stack([found.hessian(row) for row in ROWS])
    torch.testing.assert_close(found.hessian_many(ROWS), alone, rtol=0, atol=1e-14)


def test_an_operation_that_vmap_repeats_does_not_warn():
    def windowed(_x, y):
        return y.unfold(0, 2, 1).pow(3).sum()

    found = second_derivatives("double-backward", windowed, X, Y)
    scales = 6 * Y * torch.tensor([1.0, 2.0, 1.0], dtype=DOUBLE)  # the middle is in two windows
    torch.testing.assert_close(found.hessian_many(ROWS), ROWS * scales, rtol=0, atol=1e-13)


def test_errors_of_the_loss_are_not_lost():
    def broken(_x, _y):
        raise RuntimeError("this loss is broken")

    found = second_derivatives("forward-over-reverse", broken, X, Y)
    with pytest.raises(RuntimeError, match="this loss is broken"):
        found.hessian_many(ROWS)


def test_solvers_take_products_together_where_they_can():
    diagonal = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)

    def alone(_vector):
        raise AssertionError("one product alone")

    system = LinearSystem(
        apply=alone, rhs=torch.ones(3, dtype=DOUBLE), apply_many=lambda rows: rows * diagonal
    )
    for solver in (Exact(), RandomSubspace(rank=3)):
        found = solver.solve(system, None)
        torch.testing.assert_close(found.point, 1 / diagonal, rtol=1e-12, atol=0)
        assert found.num_products == 3
    without = LinearSystem(apply=lambda v: v * diagonal, rhs=system.rhs)
    torch.testing.assert_close(without.images(ROWS), system.images(ROWS), rtol=0, atol=0)


@pytest.mark.parametrize("solver", [Exact(), RandomSubspace(rank=60)], ids=["exact", "subspace"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_hypergradients_are_those_of_single_products(ridge, monkeypatch, solver, mode, damping):
    problem = ridge(condition=50.0)

    def solve():
        return hypergradient(*problem[:4], solver=solver, hvp=mode, damping=damping)

    together = solve()
    monkeypatch.setattr(
        LinearSystem, "images", lambda self, rows: torch.stack([self.apply(row) for row in rows])
    )
    alone = solve()
    tolerance = 1e-7 if mode == "central-difference" else 1e-12
    torch.testing.assert_close(together.grads, alone.grads, rtol=tolerance, atol=tolerance)
    assert together.num_hvps == alone.num_hvps == 61
    assert together.status is alone.status
    assert together.status is not SolveStatus.NEGATIVE_CURVATURE


@pytest.mark.parametrize(
    ("mode", "most"), [("forward-over-reverse", 4), ("double-backward", 4)], ids=str
)
def test_a_dense_solve_runs_the_loss_a_few_times(ridge, mode, most):
    problem, calls = ridge(), []

    def counted(x, y):
        calls.append(None)
        return problem.inner_loss(x, y)

    hypergradient(
        problem.outer_loss,
        counted,
        problem.outer,
        problem.inner,
        solver=Exact(),
        hvp=mode,
        retain_graph=False,
    )
    assert len(calls) <= most
