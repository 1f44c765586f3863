"""What solvers report: steps, residuals, curvature, damping and bias."""

import math

import pytest
import torch

from drgr.bilevel import (
    CG,
    Exact,
    Identity,
    LinearSystem,
    Neumann,
    RandomSubspace,
    SolveStatus,
    adam_diagonal,
    hutchinson_diagonal,
    hypergradient,
    second_derivatives,
)

DOUBLE = torch.float64
ALL = [CG(), Neumann(), Exact(), RandomSubspace(rank=3)]


def system_of(diagonal):
    diagonal = torch.as_tensor(diagonal, dtype=DOUBLE)
    return LinearSystem(apply=lambda v: diagonal * v, rhs=torch.ones_like(diagonal))


def test_a_warm_start_at_the_solution_needs_one_product(ridge):
    problem = ridge(condition=100.0)
    first = hypergradient(*problem[:4], solver=CG(rtol=1e-8))
    again = hypergradient(*problem[:4], solver=CG(rtol=1e-7), start=first.auxiliary)
    assert again.num_hvps == 2
    assert again.status is SolveStatus.CONVERGED
    assert first.num_hvps > 20


def test_the_step_limit_is_a_status(ridge):
    result = hypergradient(*ridge(condition=1e3)[:4], solver=CG(rtol=1e-8, max_steps=5))
    assert result.status is SolveStatus.MAX_STEPS
    assert result.num_hvps == 6
    assert result.residual > 1e-3


@pytest.mark.parametrize("solver", ALL, ids=lambda solver: type(solver).__name__)
def test_negative_curvature_is_a_status(solver):
    def inner_loss(x, y):
        return (y[:2] - x).square().sum() - y[2:].square().sum()

    y = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=DOUBLE)
    x = torch.ones(2, dtype=DOUBLE)
    result = hypergradient(lambda _x, y: y.sum(), inner_loss, x, y, solver=solver)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    assert result.curvature <= 0
    assert result.grads.isfinite().all()
    damped = hypergradient(lambda _x, y: y.sum(), inner_loss, x, y, solver=solver, damping=10.0)
    assert damped.status is not SolveStatus.NEGATIVE_CURVATURE
    assert damped.curvature < 2
    assert damped.damping_bias == math.inf or damped.curvature > 0


@pytest.mark.parametrize("solver", ALL, ids=lambda solver: type(solver).__name__)
def test_an_inner_loss_without_curvature(solver):
    x, y = torch.ones(3), torch.zeros(3)
    result = hypergradient(lambda _x, y: y.sum(), lambda x, y: (x * y).sum(), x, y, solver=solver)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    assert result.grads.isfinite().all()


def test_damping_solves_the_damped_system_and_says_how_far_that_is(ridge):
    problem = ridge(condition=1e3)
    hessian = torch.func.hessian(problem.inner_loss, argnums=1)(problem.outer, problem.inner)
    slope = torch.func.grad(problem.outer_loss, argnums=1)(problem.outer, problem.inner)
    damping = 1e-3
    damped = torch.linalg.solve(hessian + damping * torch.eye(60, dtype=DOUBLE), slope)
    result = hypergradient(*problem[:4], solver=CG(rtol=1e-10), damping=damping)
    torch.testing.assert_close(result.auxiliary, damped, rtol=1e-8, atol=1e-10)
    plain = torch.linalg.solve(hessian, slope)
    bias = ((damped - plain).norm() / damped.norm()).item()
    # The least curvature met is above the least eigenvalue, so this is an estimate, not a bound.
    assert bias / 2 <= result.damping_bias <= 1.0


def test_the_error_estimate_is_near_the_error(ridge):
    problem = ridge(condition=500.0)
    reference = hypergradient(*problem[:4], solver=Exact()).auxiliary
    for steps in (30, 60, 90):
        result = hypergradient(*problem[:4], solver=CG(rtol=1e-12, max_steps=steps))
        error = ((result.auxiliary - reference).norm() / result.auxiliary.norm()).item()
        assert error / 10 <= result.error_estimate <= 1e3 * error


def test_neumann_is_the_truncated_series():
    diagonal = torch.tensor([1.0, 0.5, 0.1], dtype=DOUBLE)
    found = Neumann(num_terms=4, step_size=0.8).solve(system_of(diagonal), None)
    expected = (1 - (1 - 0.8 * diagonal) ** 4) / diagonal
    torch.testing.assert_close(found.point, expected)
    assert found.num_products == 4
    assert found.status is SolveStatus.APPROXIMATE
    long = Neumann(num_terms=2000, rtol=1e-9).solve(system_of(diagonal), None)
    assert long.status is SolveStatus.CONVERGED
    torch.testing.assert_close(long.point, 1 / diagonal, rtol=1e-8, atol=0)


def test_a_series_that_grows_says_so():
    found = Neumann(num_terms=10, step_size=3.0).solve(system_of([1.0, 0.5]), None)
    assert found.status is SolveStatus.DIVERGED
    overflow = Neumann(num_terms=5000, step_size=1e3).solve(system_of([1.0, 0.5]), None)
    assert overflow.status is SolveStatus.NON_FINITE
    assert overflow.point.isfinite().all()


def test_overflow_in_products_is_a_status():
    system = LinearSystem(apply=lambda v: v * math.inf, rhs=torch.ones(3))
    for solver in (CG(), Exact(), RandomSubspace(rank=2), Neumann(step_size=1.0)):
        found = solver.solve(system, None)
        assert found.status is SolveStatus.NON_FINITE
        assert found.point.isfinite().all()


@pytest.mark.parametrize("rank", [1, 5, 60, 100])
def test_a_subspace_solves_what_it_spans(ridge, rank):
    problem = ridge(condition=10.0)
    result = hypergradient(*problem[:4], solver=RandomSubspace(rank=rank, rtol=1e-8))
    assert result.num_hvps == min(rank, 60) + 1
    assert result.status.succeeded == (rank >= 60)


def test_preconditioners_save_steps():
    scales = torch.logspace(0, 4, 40, dtype=DOUBLE)
    x, y = torch.zeros(40, dtype=DOUBLE), torch.zeros(40, dtype=DOUBLE)
    mixing = torch.linalg.qr(torch.randn(40, 40, dtype=DOUBLE))[0] * 0.05

    def inner_loss(x, y):
        return (scales * (y - x).square()).sum() / 2 + (mixing @ (y - x)).square().sum()

    def outer_loss(_x, y):
        return y.sum()

    diagonal = hutchinson_diagonal(inner_loss, x, y, num_probes=5)
    plain = hypergradient(outer_loss, inner_loss, x, y, solver=CG(rtol=1e-8))
    for preconditioner in (diagonal, lambda residual: residual / diagonal):
        solver = CG(rtol=1e-8, preconditioner=preconditioner)
        better = hypergradient(outer_loss, inner_loss, x, y, solver=solver)
        assert better.status.succeeded
        assert better.num_hvps < plain.num_hvps / 3
        torch.testing.assert_close(better.grads, torch.ones_like(x), rtol=1e-6, atol=1e-6)


def test_hutchinson_is_exact_on_a_diagonal():
    scales = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    x = torch.zeros(3, dtype=DOUBLE)
    found = hutchinson_diagonal(lambda x, y: (scales * (y - x) ** 2).sum() / 2, x, x, num_probes=1)
    torch.testing.assert_close(found, scales)
    flat = hutchinson_diagonal(lambda x, y: (x * y).sum(), x, x)
    assert torch.equal(flat, torch.ones_like(x))


def test_adam_diagonal_is_its_denominator():
    parameter = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.1, eps=1e-3)
    (parameter.square().sum() / 2).backward()
    expected = parameter.detach().abs() + 1e-3
    optimizer.step()
    torch.testing.assert_close(adam_diagonal(optimizer, [parameter]), expected)
    with pytest.raises(ValueError, match=r"inner_params has no second moment in SGD"):
        adam_diagonal(torch.optim.SGD([parameter], lr=0.1), parameter)


def test_identity_takes_a_scale(ridge):
    problem = ridge()
    diagonal = torch.rand(60, dtype=DOUBLE) + 0.5
    result = hypergradient(*problem[:4], solver=Identity(scale=diagonal))
    slope = torch.func.grad(problem.outer_loss, argnums=1)(problem.outer, problem.inner)
    torch.testing.assert_close(result.auxiliary, diagonal * slope)
    assert result.status is SolveStatus.APPROXIMATE
    assert result.num_hvps == 1


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "central-difference"])
@pytest.mark.parametrize("retain_graph", [True, False])
def test_products_are_those_of_the_dense_matrices(mode, retain_graph):
    def loss(x, y):
        return (x.sin() * y.pow(3)).sum() + (y.sum() * x[0]).exp()

    x = torch.tensor([0.3, -0.2, 0.5], dtype=DOUBLE)
    y = torch.tensor([0.1, 0.4, -0.3], dtype=DOUBLE)
    vector = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    dense = torch.func.hessian(loss, argnums=(0, 1))(x, y)
    products = second_derivatives(mode, loss, x, y, retain_graph=retain_graph)
    hessian, cross = products.hessian_and_cross(vector)
    tolerance = 1e-8 if mode == "central-difference" else 1e-13
    torch.testing.assert_close(hessian, dense[1][1] @ vector, rtol=0, atol=tolerance)
    torch.testing.assert_close(cross, dense[0][1] @ vector, rtol=0, atol=tolerance)
    torch.testing.assert_close(products.hessian(vector), hessian, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["double-backward", "central-difference"])
def test_modules_and_fused_attention(mode):
    """Fused attention has no second derivative; central differences need none."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    head = torch.nn.Linear(8, 1)
    batch = torch.randn(4, 5, 8)
    weights = torch.zeros(4)
    params = {name: value.detach() for name, value in attention.named_parameters()}

    def inner_loss(x, y):
        out, _ = torch.func.functional_call(
            attention, y, (batch, batch, batch), {"need_weights": False}
        )
        errors = head(out).square().mean(dim=(1, 2))
        return (x.softmax(0) * errors).sum() + sum(value.square().sum() for value in y.values())

    def outer_loss(_x, y):
        return sum(value.sum() for value in y.values())

    backend = (
        torch.nn.attention.SDPBackend.MATH
        if mode == "double-backward"
        else torch.nn.attention.SDPBackend.FLASH_ATTENTION
    )
    with torch.nn.attention.sdpa_kernel(backend):
        result = hypergradient(
            outer_loss, inner_loss, weights, params, solver=CG(rtol=1e-2), hvp=mode
        )
    assert result.status.succeeded
    assert result.grads.isfinite().all()
    assert all(parameter.grad is None for parameter in attention.parameters())
