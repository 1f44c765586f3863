"""Hypergradients against closed forms, dense references and finite differences."""

import math

import pytest
import torch

from drgr.bilevel import (
    CG,
    Exact,
    Identity,
    Neumann,
    RandomSubspace,
    SolveStatus,
    hypergradient,
)

DOUBLE = torch.float64
MODES = ["double-backward", "forward-over-reverse", "central-difference"]
SOLVERS = {
    "cg": lambda rtol: CG(rtol=rtol),
    "neumann": lambda rtol: Neumann(num_terms=400, rtol=rtol),
    "exact": lambda rtol: Exact(rtol=rtol),
    "identity": lambda rtol: Identity(rtol=rtol),
    "subspace": lambda rtol: RandomSubspace(rank=10, rtol=rtol),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [10.0, 5e2, 1e3, 1e5])
def test_ridge_is_within_tolerance_or_says_no(ridge, condition, dtype, solver):
    problem = ridge(condition=condition, dtype=dtype)
    for rtol in (1e-3, 1e-5, 1e-8, 1e-12):
        result = hypergradient(*problem[:4], solver=SOLVERS[solver](rtol))
        assert result.grads.isfinite().all()
        assert math.isfinite(result.residual)
        if str(result.status) == "converged":
            assert problem.error(result.grads) <= 10 * rtol
        else:
            assert result.residual > rtol or result.error_estimate > rtol


@pytest.mark.parametrize("condition", [10.0, 5e2, 1e3, 1e5])
def test_conjugate_gradients_converge_in_float64(ridge, condition):
    problem = ridge(condition=condition)
    result = hypergradient(*problem[:4], solver=CG(rtol=1e-8))
    assert result.status is SolveStatus.CONVERGED
    assert problem.error(result.grads) <= 1e-7
    assert result.curvature >= 1 / condition * (1 - 1e-9)
    assert result.inner_gradient < 1e-10


def test_conjugate_gradients_converge_in_float32(ridge):
    problem = ridge(condition=5e2, dtype=torch.float32)
    result = hypergradient(*problem[:4], solver=CG(rtol=1e-4))
    assert result.status is SolveStatus.CONVERGED
    assert result.grads.dtype == torch.float32
    assert problem.error(result.grads) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tolerance_far_below_rounding_ends_and_says_so(ridge, dtype):
    problem = ridge(condition=10.0, dtype=dtype)
    result = hypergradient(*problem[:4], solver=CG(rtol=1e-30, max_steps=10_000))
    assert result.status is SolveStatus.INACCURATE
    assert problem.error(result.grads) < 1e3 * torch.finfo(dtype).eps
    assert result.num_hvps < 500


def test_an_isotropic_hessian_needs_one_step():
    """Two libraries return the iterate before the last, here an implicit term of 0."""
    target = torch.linspace(1, 2, 50, dtype=DOUBLE)

    def inner_loss(x, y):
        return (y - x).square().sum() / 2

    def outer_loss(_x, y):
        return (y * target).square().sum() / 2

    x = torch.ones(50, dtype=DOUBLE)
    result = hypergradient(outer_loss, inner_loss, x, x, solver=CG(rtol=1e-8))
    torch.testing.assert_close(result.grads, target.square())
    assert result.status is SolveStatus.CONVERGED
    assert hypergradient(outer_loss, inner_loss, x, x, solver=Identity()).status.succeeded


def test_scalar_parameters_without_dimensions():
    """The root of ``a y^3 - y - 2``: one library returns 0 for it."""
    a = torch.tensor(1.0, dtype=DOUBLE)
    y = torch.tensor(1.5213797068045676, dtype=DOUBLE)
    for solver in (CG(), Exact(), Neumann(num_terms=200)):
        result = hypergradient(
            lambda _a, y: y, lambda a, y: a * y**4 / 4 - y**2 / 2 - 2 * y, a, y, solver=solver
        )
        assert result.grads.shape == ()
        assert result.grads.item() == pytest.approx(-(y**3 / (3 * y**2 - 1)).item(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_nested_parameters(mode):
    x = {"scale": torch.tensor([1.0, 2.0], dtype=DOUBLE), "rest": [torch.tensor(0.5, dtype=DOUBLE)]}

    def inner_loss(x, y):
        weight, (bias,) = y["weight"], y["biases"]
        fit = (weight - x["scale"].square().expand(3, 2)).square().sum()
        return fit + (bias - x["rest"][0].exp()).square().sum()

    def outer_loss(x, y):
        return y["weight"].sum() + 3 * y["biases"][0].sum() + x["rest"][0]

    y = {
        "weight": x["scale"].square().expand(3, 2).contiguous(),
        "biases": (x["rest"][0].exp().reshape(1),),
    }
    result = hypergradient(outer_loss, inner_loss, x, y, hvp=mode)
    tolerance = 1e-6 if mode == "central-difference" else 1e-12
    torch.testing.assert_close(result.grads["scale"], 3 * 2 * x["scale"], rtol=tolerance, atol=0.0)
    expected = 3 * x["rest"][0].exp() + 1
    torch.testing.assert_close(result.grads["rest"][0], expected, rtol=tolerance, atol=0.0)
    assert result.auxiliary["weight"].shape == (3, 2)
    assert isinstance(result.auxiliary["biases"], tuple)


def _logistic(seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(80, 6, generator=generator, dtype=DOUBLE)
    signs = torch.where(torch.rand(80, generator=generator) < 0.5, 1.0, -1.0).to(DOUBLE)
    signs = torch.where(data[:, 0] > 0.3, 1.0, signs)
    train, test = slice(0, 50), slice(50, 80)

    def inner_loss(x, y):
        margins = signs[train] * (data[train] @ y)
        return torch.nn.functional.softplus(-margins).mean() + (x.exp() * y * y).sum() / 2

    def outer_loss(_x, y):
        return torch.nn.functional.softplus(-signs[test] * (data[test] @ y)).mean()

    def solution(x):
        y = torch.zeros(6, dtype=DOUBLE)
        for _ in range(30):
            slope = torch.func.grad(inner_loss, argnums=1)(x, y)
            y = y - torch.linalg.solve(torch.func.hessian(inner_loss, argnums=1)(x, y), slope)
        return y

    return outer_loss, inner_loss, solution


@pytest.mark.parametrize("mode", MODES)
def test_logistic_regression_against_finite_differences_of_newton_solutions(mode):
    outer_loss, inner_loss, solution = _logistic()
    x = torch.full((6,), -2.0, dtype=DOUBLE)
    result = hypergradient(outer_loss, inner_loss, x, solution(x), solver=CG(rtol=1e-7), hvp=mode)
    step = 1e-5
    expected = torch.stack(
        [
            (outer_loss(x, solution(x + move)) - outer_loss(x, solution(x - move))) / (2 * step)
            for move in step * torch.eye(6, dtype=DOUBLE)
        ]
    )
    torch.testing.assert_close(result.grads, expected, rtol=1e-5, atol=1e-9)
    assert result.status is SolveStatus.CONVERGED


def test_outer_loss_that_depends_on_neither_path_twice(ridge):
    """A direct term adds up; an outer loss without inner parameters has that alone."""
    problem = ridge()
    direct = hypergradient(
        lambda x, y: problem.outer_loss(x, y) + x.sum(), problem.inner_loss, *problem[2:4]
    )
    torch.testing.assert_close(direct.grads - 1, problem.exact, rtol=1e-4, atol=1e-6)
    alone = hypergradient(lambda x, _y: x.sum(), problem.inner_loss, *problem[2:4])
    assert torch.equal(alone.grads, torch.ones_like(problem.outer))
    assert alone.status is SolveStatus.CONVERGED
    assert alone.residual == 0


@pytest.mark.parametrize(
    ("hvp", "retain_graph", "calls"),
    [
        ("double-backward", True, 1),  # one graph for the gradient and all products
        ("double-backward", False, 1 + 3),
        ("forward-over-reverse", True, 1 + 3),
        ("central-difference", True, 1 + 2 * 3),
    ],
)
def test_how_often_the_inner_loss_is_evaluated(hvp, retain_graph, calls):
    seen = []

    def inner_loss(x, y):
        seen.append(None)
        return (y - x).square().sum() / 2

    x = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
    result = hypergradient(
        lambda _x, y: y.square().sum() / 2, inner_loss, x, x, hvp=hvp, retain_graph=retain_graph
    )
    assert result.num_hvps == 3
    assert len(seen) == calls
    tolerance = 1e-8 if hvp == "central-difference" else 1e-14
    torch.testing.assert_close(result.grads, x, rtol=tolerance, atol=0)
