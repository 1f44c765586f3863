"""Bad arguments: each is refused with its name, its value and a remedy."""

import math

import pytest
import torch

from drgr.bilevel import CG, Exact, Identity, Neumann, RandomSubspace, hypergradient
from drgr.errors import NonFiniteLossError

X = torch.ones(3)


def inner_loss(x, y):
    return (y - x).square().sum()


def outer_loss(_x, y):
    return y.sum()


def solve(outer=outer_loss, inner=inner_loss, x=X, y=X, **arguments):
    return hypergradient(outer, inner, x, y, **arguments)


def test_an_inner_loss_without_its_parameters():
    with pytest.raises(ValueError, match="inner_loss does not depend on inner_params; use the"):
        solve(inner=lambda x, _y: x.sum())
    with pytest.raises(ValueError, match="inner_loss does not depend on inner_params"):
        solve(inner=lambda _x, _y: torch.tensor(1.0))


def test_losses_without_outer_parameters():
    with pytest.raises(ValueError, match="neither loss depends on outer_params"):
        solve(inner=lambda _x, y: y.square().sum())


@pytest.mark.parametrize("name", ["outer", "inner"])
def test_losses_that_are_no_scalars(name):
    with pytest.raises(ValueError, match=rf"{name}_loss must return a scalar, got shape \(3,\)"):
        solve(**{name: lambda x, y: x + y})
    with pytest.raises(TypeError, match=f"{name}_loss must return a floating-point .*, got float"):
        solve(**{name: lambda _x, _y: 1.0})
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        solve(**{name: lambda _x, _y: torch.tensor(1)})


@pytest.mark.parametrize("name", ["outer", "inner"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite(name, bad):
    with pytest.raises(NonFiniteLossError, match=f"{name}_loss must be finite, got {bad}"):
        solve(**{name: lambda x, y: (x + y).sum() * bad})


def test_gradients_that_are_not_finite():
    with pytest.raises(NonFiniteLossError, match="gradient of inner_loss in outer_params is not"):
        solve(inner=lambda x, y: (y - x).square().sum().sqrt())


def test_frozen_among_trained_parameters():
    y = {"a": torch.ones(3, requires_grad=True), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"inner_params\['b'\] does not require grad and inner_pa"):
        solve(y=y)


@pytest.mark.parametrize("bad", [torch.tensor([1, 2]), [torch.tensor(True)]])
def test_parameters_that_have_no_gradient(bad):
    with pytest.raises(TypeError, match="must be a floating-point tensor, got"):
        solve(x=bad)


@pytest.mark.parametrize("bad", [{}, [], torch.empty(0)])
def test_no_parameters(bad):
    with pytest.raises(ValueError, match="outer_params has no entries"):
        solve(x=bad)


def test_something_else_among_parameters():
    with pytest.raises(TypeError, match=r"inner_params\['a'\]\[0\] must be a tensor .* got str"):
        solve(y={"a": ["text"]})


def test_parameters_that_are_not_finite():
    with pytest.raises(ValueError, match="inner_params must be finite"):
        solve(y=torch.tensor([1.0, math.nan, 1.0]))


def test_a_start_of_another_structure():
    with pytest.raises(ValueError, match="start must have the structure"):
        solve(start={"a": torch.ones(3)})
    with pytest.raises(ValueError, match="start must have the structure"):
        solve(start=torch.ones(4))


def test_a_mode_that_does_not_exist():
    with pytest.raises(ValueError, match=r"hvp must be 'double-backward', .* got 'reverse'"):
        solve(hvp="reverse")


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_damping_out_of_range(bad):
    with pytest.raises(ValueError, match="damping must be a finite number of at least 0"):
        solve(damping=bad)


@pytest.mark.parametrize("bad", [0, -1, math.nan])
def test_solver_arguments_out_of_range(bad):
    for make in (
        lambda: CG(rtol=bad),
        lambda: CG(max_steps=bad),
        lambda: CG(preconditioner=torch.tensor([1.0, bad])),
        lambda: Neumann(num_terms=bad),
        lambda: Neumann(step_size=bad),
        lambda: Neumann(rtol=bad),
        lambda: Exact(rtol=bad),
        lambda: Exact(max_dimension=bad),
        lambda: RandomSubspace(rank=bad),
        lambda: RandomSubspace(rank=1, rtol=bad),
        lambda: Identity(scale=bad),
        lambda: Identity(scale=torch.tensor([1.0, bad])),
        lambda: Identity(rtol=bad),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()


def test_a_preconditioner_of_another_shape():
    with pytest.raises(ValueError, match=r"preconditioner must have shape \(3,\), got \(1,\)"):
        solve(outer=lambda _x, y: y.sum(), solver=CG(preconditioner=torch.ones(1)))


def test_a_system_too_large_to_build():
    with pytest.raises(ValueError, match="more than max_dimension=2; take CG"):
        solve(solver=Exact(max_dimension=2))


def test_arguments_are_left_alone():
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    result = solve(x=x, y=y)
    assert x.grad is None
    assert y.grad is None
    assert not result.grads.requires_grad
    with torch.no_grad():
        assert torch.equal(solve(x=x, y=y).grads, result.grads)
