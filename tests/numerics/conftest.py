"""Oracles of the projections: a quadratic solver, and helpers that compare functions of tensors."""

from collections.abc import Callable

import cvxpy
import numpy as np
import pytest
import torch

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="session")
def nearest() -> Callable[..., np.ndarray]:
    """Minimiser of ``1/2 sum w (x - v)^2 + penalty(x)`` under constraints, by Clarabel.

    Called as ``nearest(v, constraints, penalty=..., weights=..., tolerance=...)``, where the two
    functions map a cvxpy variable to a list of constraints and to an expression. Clarabel reaches
    the default tolerance without norms; with norms about 1e-9.
    """
    return _nearest


def _nearest(point, constraints=None, *, penalty=None, weights=1.0, tolerance=1e-12) -> np.ndarray:
    point = np.asarray(point, dtype=np.float64)
    x = cvxpy.Variable(point.shape)
    distance = cvxpy.sum(cvxpy.multiply(weights, cvxpy.square(x - point))) / 2
    objective = distance if penalty is None else distance + penalty(x)
    limits = [] if constraints is None else constraints(x)
    problem = cvxpy.Problem(cvxpy.Minimize(objective), limits)
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
    problem.solve(solver=cvxpy.CLARABEL, **tolerances)
    assert problem.status == cvxpy.OPTIMAL
    return x.value


@pytest.fixture(scope="session")
def check_dtypes() -> Callable[..., None]:
    """Checks a map in every float type against float64: ``check_dtypes(function, point)``."""
    return _check_dtypes


def _check_dtypes(function, point) -> None:
    for dtype, tolerance in TOLERANCES.items():
        rounded = point.to(dtype)
        found = function(rounded)
        assert found.dtype == dtype
        expected = function(rounded.double())
        size = float(expected.abs().max()) + 1
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * size)


@pytest.fixture(scope="session")
def check_derivatives() -> Callable[..., None]:
    """Checks first and second derivatives numerically: ``check_derivatives(function, *inputs)``."""
    return _check_derivatives


def _check_derivatives(function, *inputs) -> None:
    leaves = [entry.detach().clone().requires_grad_() for entry in inputs]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-6)
