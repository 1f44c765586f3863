"""Derivatives of the value."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from drgr.ambiguity import KL, ChiSquare, worst_case

BOTH = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi_square"])
LEVELS = pytest.mark.parametrize("name", ["radius", "penalty"])


@pytest.fixture
def losses():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 6, dtype=torch.float64, generator=generator, requires_grad=True)


@BOTH
@LEVELS
def test_gradcheck_in_losses_level_and_nominal(losses, divergence, name):
    level = torch.tensor([0.05, 0.2, 0.45], dtype=torch.float64, requires_grad=True)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def value(losses, level, logits):
        nominal = logits.softmax(-1)
        return worst_case(losses, divergence=divergence, nominal=nominal, **{name: level}).value

    assert gradcheck(value, (losses, level, logits), atol=1e-6)


@BOTH
@LEVELS
def test_gradient_in_the_losses_is_the_weights_exactly(losses, divergence, name):
    result = worst_case(losses, divergence=divergence, **{name: 0.3})
    (gradient,) = torch.autograd.grad(result.value.sum(), losses)
    assert torch.equal(gradient, result.weights)


@BOTH
def test_gradient_in_the_level_is_multiplier_and_minus_divergence(losses, divergence):
    radius = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    result = worst_case(losses, divergence=divergence, radius=radius)
    (gradient,) = torch.autograd.grad(result.value.sum(), radius)
    torch.testing.assert_close(gradient, result.multiplier.sum())
    penalty = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    result = worst_case(losses, divergence=divergence, penalty=penalty)
    (gradient,) = torch.autograd.grad(result.value.sum(), penalty)
    torch.testing.assert_close(gradient, -result.divergence.sum())


@BOTH
def test_gradients_at_the_ends_of_the_path(losses, divergence):
    radius = torch.tensor([0.0, 0.2, 50.0], dtype=torch.float64, requires_grad=True)
    nominal = torch.full((6,), 1 / 6, dtype=torch.float64, requires_grad=True)
    result = worst_case(losses, divergence=divergence, radius=radius, nominal=nominal)
    result.value.sum().backward()
    torch.testing.assert_close(losses.grad, result.weights, rtol=0, atol=0)
    assert radius.grad[0].item() == math.inf
    assert radius.grad[2].item() == 0.0
    assert nominal.grad.isfinite().all()
    # The value does not change when the nominal is multiplied by a constant.
    assert (nominal.grad @ nominal).abs().item() < 1e-12


@BOTH
def test_at_radius_zero_the_nominal_gradient_is_that_of_the_mean(losses, divergence):
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    result = worst_case(losses[0], divergence=divergence, radius=0.0, nominal=logits.softmax(-1))
    (found,) = torch.autograd.grad(result.value, logits)
    (expected,) = torch.autograd.grad(logits.softmax(-1) @ losses[0].detach(), logits)
    torch.testing.assert_close(found, expected)


def test_atoms_without_mass_get_no_gradient(losses):
    nominal = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    worst_case(losses, divergence=KL(), penalty=1.0, nominal=nominal).value.sum().backward()
    assert (losses.grad[:, 0] == 0).all()


@BOTH
def test_float32_and_half_losses_get_gradients_of_their_dtype(divergence):
    for dtype in (torch.float32, torch.bfloat16):
        losses = torch.tensor([1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
        result = worst_case(losses, divergence=divergence, penalty=2.0)
        result.value.backward()
        assert losses.grad.dtype == dtype
        torch.testing.assert_close(losses.grad, result.weights.to(dtype))


def test_weights_are_detached_and_a_second_derivative_raises(losses):
    result = worst_case(losses, divergence=KL(), penalty=1.0)
    assert not result.weights.requires_grad
    assert not result.gap.requires_grad
    for function in (torch.sum, lambda value: value.square().sum()):
        result = worst_case(losses, divergence=KL(), penalty=1.0)
        (gradient,) = torch.autograd.grad(function(result.value), losses, create_graph=True)
        with pytest.raises(RuntimeError, match="weights_require_grad=True"):
            gradient.square().sum().backward()


def test_no_graph_without_gradients():
    result = worst_case(torch.tensor([1.0, 2.0]), divergence=KL(), penalty=1.0)
    assert not result.value.requires_grad
