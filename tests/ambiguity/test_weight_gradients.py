"""Derivatives of the weights, and second derivatives of the value."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from drgr.ambiguity import KL, worst_case

DOUBLE = torch.float64


def problem():
    torch.manual_seed(0)
    losses = torch.randn(2, 5, dtype=DOUBLE, requires_grad=True)
    logits = torch.randn(5, dtype=DOUBLE, requires_grad=True)
    return losses, logits


def sizes_of(smooth_sized):
    radius = torch.tensor([0.03, 0.08], dtype=DOUBLE)
    penalty = torch.tensor([0.6, 2.0], dtype=DOUBLE)
    (size,) = smooth_sized.level(radius=radius, penalty=penalty).values()
    return size.requires_grad_()


def solver(smooth_sized):
    def value_and_weights(losses, size, logits):
        result = worst_case(
            losses,
            divergence=smooth_sized.case.divergence,
            nominal=logits.softmax(-1),
            weights_require_grad=True,
            **{smooth_sized.mode: size},
        )
        return result.value, result.weights

    return value_and_weights


def test_gradcheck_of_value_and_weights(smooth_sized):
    losses, logits = problem()
    inputs = (losses, sizes_of(smooth_sized), logits)
    assert gradcheck(solver(smooth_sized), inputs, atol=1e-6, fast_mode=True)


def test_gradgradcheck_of_value_and_weights(smooth_sized):
    losses, logits = problem()
    inputs = (losses, sizes_of(smooth_sized), logits)
    assert gradgradcheck(solver(smooth_sized), inputs, atol=1e-5, fast_mode=True)


def test_values_and_first_derivatives_are_those_without(smooth_sized):
    losses, logits = problem()
    size = sizes_of(smooth_sized)
    value, weights = solver(smooth_sized)(losses, size, logits)
    plain = worst_case(
        losses,
        divergence=smooth_sized.case.divergence,
        nominal=logits.softmax(-1),
        **{smooth_sized.mode: size},
    )
    assert torch.equal(weights, plain.weights)
    torch.testing.assert_close(value, plain.value, rtol=1e-15, atol=0)
    inputs = (losses, size, logits)
    found = torch.autograd.grad(value.sum(), inputs)
    expected = torch.autograd.grad(plain.value.sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_curvature_in_the_losses_is_the_derivative_of_the_weights(smooth_sized):
    losses, logits = problem()
    value, weights = solver(smooth_sized)(losses, sizes_of(smooth_sized), logits)
    direction = torch.randn_like(losses)
    (gradient,) = torch.autograd.grad(value.sum(), losses, create_graph=True)
    (of_value,) = torch.autograd.grad((gradient * direction).sum(), losses, retain_graph=True)
    (of_weights,) = torch.autograd.grad((weights * direction).sum(), losses)
    torch.testing.assert_close(of_value, of_weights, rtol=1e-8, atol=1e-10)
    # A worst case is convex in the losses.
    assert (of_value * direction).sum() > 0


def test_derivatives_of_rows_at_the_ends_of_the_path(smooth_ball):
    losses, _ = problem()
    losses = losses[:1].detach().expand(3, 5).clone().requires_grad_()
    radius = torch.tensor([0.0, 0.05, 200.0], dtype=DOUBLE, requires_grad=True)
    result = worst_case(
        losses, divergence=smooth_ball.divergence, radius=radius, weights_require_grad=True
    )
    slopes = torch.autograd.grad(result.value.sum(), (losses, radius), create_graph=True)
    torch.testing.assert_close(slopes[0], result.weights, rtol=1e-9, atol=1e-12)
    assert slopes[1][0].item() == math.inf
    (bend,) = torch.autograd.grad(result.weights[:, 1].sum(), losses, retain_graph=True)
    assert (bend[0] == 0).all()
    assert bend[1].abs().max() > 1e-3
    assert bend.isfinite().all()
    if smooth_ball.exact.at_zero < math.inf:
        assert slopes[1][2].item() == 0
        assert (bend[2] == 0).all()


def test_weights_at_the_ends_move_with_the_nominal(smooth_ball):
    losses, logits = problem()
    for radius in (0.0, 300.0):
        if radius and smooth_ball.exact.at_zero == math.inf:
            continue

        def weights(logits, radius=radius):
            return worst_case(
                losses.detach(),
                divergence=smooth_ball.divergence,
                radius=radius,
                nominal=logits.softmax(-1),
                weights_require_grad=True,
            ).weights

        assert gradcheck(weights, (logits,), atol=1e-6)


def test_atoms_without_mass_have_no_derivative(smooth_sized):
    losses, _ = problem()
    nominal = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1], dtype=DOUBLE, requires_grad=True)
    result = worst_case(
        losses,
        divergence=smooth_sized.case.divergence,
        nominal=nominal,
        weights_require_grad=True,
        **{smooth_sized.mode: sizes_of(smooth_sized)},
    )
    loss = result.weights.square().sum() + result.value.sum()
    slopes = torch.autograd.grad(loss, (losses, nominal), create_graph=True)
    assert (slopes[0][:, 1] == 0).all()
    assert slopes[0].isfinite().all()
    assert slopes[1].isfinite().all()
    (bend,) = torch.autograd.grad(slopes[0].square().sum(), losses)
    assert (bend[:, 1] == 0).all()
    assert bend.isfinite().all()


def test_ties_and_equal_losses_have_finite_derivatives(smooth_sized):
    rows = [[1.0, 2.0, 2.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]]
    losses = torch.tensor(rows, dtype=DOUBLE, requires_grad=True)
    result = worst_case(
        losses,
        divergence=smooth_sized.case.divergence,
        weights_require_grad=True,
        **{smooth_sized.mode: sizes_of(smooth_sized)},
    )
    loss = result.weights[:, 0].sum() + result.value.sum()
    (slope,) = torch.autograd.grad(loss, losses, create_graph=True)
    assert slope.isfinite().all()
    (bend,) = torch.autograd.grad(slope.square().sum(), losses)
    assert bend.isfinite().all()


def test_float32_losses_and_single_rows(smooth_sized):
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    level = smooth_sized.level(radius=0.05, penalty=1.0)
    result = worst_case(
        losses, divergence=smooth_sized.case.divergence, weights_require_grad=True, **level
    )
    (slope,) = torch.autograd.grad(result.weights[2], losses)
    assert slope.dtype == torch.float32
    # Adding a constant to all losses changes nothing.
    assert slope.sum().abs().item() < 1e-6
    assert slope[2].item() > 0


def test_empty_batches(smooth_sized):
    losses = torch.zeros(0, 4, requires_grad=True)
    level = smooth_sized.level(radius=0.05, penalty=1.0)
    result = worst_case(
        losses, divergence=smooth_sized.case.divergence, weights_require_grad=True, **level
    )
    result.weights.sum().backward()
    assert losses.grad.shape == (0, 4)


def test_constant_weights_still_have_a_graph(smooth_ball):
    losses = torch.full((2, 4), 3.0, requires_grad=True)
    for radius in (0.0, 0.1):
        result = worst_case(
            losses, divergence=smooth_ball.divergence, radius=radius, weights_require_grad=True
        )
        (slope,) = torch.autograd.grad(result.weights[:, 0].sum(), losses)
        assert (slope == 0).all()


def test_a_third_derivative_of_penalized_kl():
    """The value is ``lam log E exp(l / lam)``: its derivatives are those of this formula."""
    losses, logits = problem()
    nominal = logits.softmax(-1).detach()
    penalty = torch.tensor(0.7, dtype=DOUBLE)
    direction = torch.randn_like(losses)

    def third(value):
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, losses, create_graph=True)
            value = (slope * direction).sum()
        return value

    result = worst_case(
        losses, divergence=KL(), penalty=penalty, nominal=nominal, weights_require_grad=True
    )
    formula = penalty * (losses / penalty + nominal.log()).logsumexp(-1)
    torch.testing.assert_close(third(result.value.sum()), third(formula.sum()))


def test_rough_divergences_refuse(rough):
    level = {rough.modes[-1]: 0.5} if rough.modes else {}
    with pytest.raises(ValueError, match="weights_require_grad needs weights that are smooth in"):
        worst_case(torch.zeros(3), divergence=rough.divergence, weights_require_grad=True, **level)
