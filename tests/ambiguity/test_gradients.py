"""First derivatives of the value."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from drgr.ambiguity import KL, worst_case

DOUBLE = torch.float64


@pytest.fixture
def losses():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 6, dtype=DOUBLE, generator=generator, requires_grad=True)


def test_gradcheck_in_losses_level_and_nominal(losses, sized):
    losses = losses.detach()[:2, :4].requires_grad_()
    radius = torch.tensor([0.02, 0.11], dtype=DOUBLE) * sized.case.curvature
    penalty = torch.tensor([0.3, 1.9], dtype=DOUBLE)
    logits = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    sizes = [size.requires_grad_() for size in sized.level(radius=radius, penalty=penalty).values()]

    def value(losses, logits, *sizes):
        level = dict(zip([sized.mode], sizes, strict=False))  # none where the set has one size
        nominal = logits.softmax(-1)
        return worst_case(losses, divergence=sized.case.divergence, nominal=nominal, **level).value

    assert gradcheck(value, (losses, logits, *sizes), atol=1e-6)


def test_gradient_in_the_losses_is_the_weights_exactly(losses, sized):
    level = sized.level(radius=0.1, penalty=0.3)
    result = worst_case(losses, divergence=sized.case.divergence, **level)
    (gradient,) = torch.autograd.grad(result.value.sum(), losses)
    assert torch.equal(gradient, result.weights)


def test_gradient_in_the_radius_is_the_multiplier(losses, ball):
    radius = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
    result = worst_case(losses, divergence=ball.divergence, radius=radius)
    (gradient,) = torch.autograd.grad(result.value.sum(), radius)
    torch.testing.assert_close(gradient, result.multiplier.sum())


def test_gradient_in_the_penalty_is_minus_the_divergence(losses, priced):
    penalty = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    result = worst_case(losses, divergence=priced.divergence, penalty=penalty)
    (gradient,) = torch.autograd.grad(result.value.sum(), penalty)
    torch.testing.assert_close(gradient, -result.divergence.sum())


def test_gradients_at_the_ends_of_the_path(losses, saturating):
    radius = torch.tensor([0.0, 0.1, 50.0], dtype=DOUBLE, requires_grad=True)
    nominal = torch.full((6,), 1 / 6, dtype=DOUBLE, requires_grad=True)
    result = worst_case(losses, divergence=saturating.divergence, radius=radius, nominal=nominal)
    result.value.sum().backward()
    torch.testing.assert_close(losses.grad, result.weights, rtol=0, atol=0)
    assert radius.grad[0].item() == math.inf
    assert radius.grad[1].item() > 0
    assert radius.grad[2].item() == 0.0
    assert nominal.grad.isfinite().all()
    # The value does not change when the nominal is multiplied by a constant.
    assert (nominal.grad @ nominal).abs().item() < 1e-12


def test_nominal_gradient_of_a_uniform_nominal_and_of_atoms_without_mass(losses, sized):
    level = sized.level(radius=0.1, penalty=0.5)
    for mass in ([1 / 6] * 6, [0.0, 0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]):
        nominal = torch.tensor(mass, dtype=DOUBLE, requires_grad=True)
        losses.grad = None
        result = worst_case(losses, divergence=sized.case.divergence, nominal=nominal, **level)
        result.value.sum().backward()
        assert nominal.grad.isfinite().all()
        assert (nominal.grad @ nominal).abs().item() < 1e-12
        assert (losses.grad[:, nominal == 0] == 0).all()


def test_at_radius_zero_the_nominal_gradient_is_that_of_the_mean(losses, ball):
    logits = torch.randn(6, dtype=DOUBLE, requires_grad=True)
    nominal = logits.softmax(-1)
    result = worst_case(losses[0], divergence=ball.divergence, radius=0.0, nominal=nominal)
    (found,) = torch.autograd.grad(result.value, logits)
    (expected,) = torch.autograd.grad(logits.softmax(-1) @ losses[0].detach(), logits)
    torch.testing.assert_close(found, expected)


def test_at_saturation_the_nominal_has_no_gradient(losses, saturating):
    """A small change of the nominal leaves the largest loss the worst, but under a cap."""
    if saturating.name == "kl_cvar":
        return
    logits = torch.randn(6, dtype=DOUBLE, requires_grad=True)
    nominal = logits.softmax(-1)
    result = worst_case(losses[0], divergence=saturating.divergence, radius=50.0, nominal=nominal)
    (found,) = torch.autograd.grad(result.value, logits)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_at_saturation_the_nominal_gradient_under_a_cap_is_that_of_cvar(losses, oracles):
    logits = torch.randn(6, dtype=DOUBLE, requires_grad=True)
    gradients = []
    for divergence, level in ((oracles.KLCVaR(0.4), {"radius": 50.0}), (oracles.CVaR(0.4), {})):
        nominal = logits.softmax(-1)
        result = worst_case(losses, divergence=divergence, nominal=nominal, **level)
        gradients += torch.autograd.grad(result.value.sum(), logits)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_half_losses_get_gradients_of_their_dtype(sized, dtype):
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
    level = sized.level(radius=0.1, penalty=2.0)
    result = worst_case(losses, divergence=sized.case.divergence, **level)
    result.value.backward()
    assert losses.grad.dtype == dtype
    torch.testing.assert_close(losses.grad, result.weights.to(dtype))


def test_weights_are_detached_and_a_second_derivative_raises(losses, sized):
    level = sized.level(radius=0.1, penalty=1.0)
    result = worst_case(losses, divergence=sized.case.divergence, **level)
    for field in ("weights", "multiplier", "threshold", "divergence", "gap"):
        assert not getattr(result, field).requires_grad
    for function in (torch.sum, lambda value: value.square().sum()):
        result = worst_case(losses, divergence=sized.case.divergence, **level)
        (gradient,) = torch.autograd.grad(function(result.value), losses, create_graph=True)
        with pytest.raises(RuntimeError, match="weights_require_grad=True"):
            gradient.square().sum().backward()


def test_no_graph_without_gradients():
    result = worst_case(torch.tensor([1.0, 2.0]), divergence=KL(), penalty=1.0)
    assert not result.value.requires_grad
