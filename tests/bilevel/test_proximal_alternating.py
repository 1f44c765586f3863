"""The merit: what it bounds, that it never rises, and that any step size converges."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.bilevel import CG, ProximalAlternating, StopReason, alternation, hypergradient
from drgr.errors import NonFiniteLossError
from drgr.numerics import project_simplex, soft_threshold

DOUBLE = torch.float64


def descent(rate):
    return lambda params: torch.optim.SGD(params, lr=rate)


def curved(seed=0, sizes=(50, 10)):
    """An inner problem of curvature 0.2 to 2 that is not quadratic, and its outer loss."""
    inner_size, outer_size = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    basis = torch.linalg.qr(normal(inner_size, inner_size))[0]
    hessian = basis * torch.linspace(0.2, 2, inner_size, dtype=DOUBLE) @ basis.T
    coupling, target = normal(inner_size, outer_size) / 3, normal(inner_size)

    def inner_loss(x, y):
        return (y @ hessian @ y) / 2 - y @ coupling @ x + 0.1 * (1 + y**2).sqrt().sum()

    def outer_loss(x, y):
        return (y - target).square().sum() / 2 + 0.05 * x.square().sum()

    return (
        outer_loss,
        inner_loss,
        torch.ones(outer_size, dtype=DOUBLE),
        torch.zeros(inner_size, dtype=DOUBLE),
    )


def true_value(outer_loss, inner_loss, x, y):
    """The outer loss at the inner solution by Newton's method."""
    y = y.clone()
    for _ in range(20):
        slope = torch.func.grad(inner_loss, argnums=1)(x, y)
        y = y - torch.linalg.solve(torch.func.hessian(inner_loss, argnums=1)(x, y), slope)
    return outer_loss(x, y).item(), y


def rises(merits):
    return max(after - before for before, after in pairwise(merits))


@pytest.mark.parametrize("step_size", [1e-3, 0.05, 0.2, 1.0, 2.0, 100.0])
def test_every_step_size_converges_to_the_same_point(step_size):
    outer_loss, inner_loss, x, y = curved()
    # The least curvature is 0.2, and that of the outer loss 1: the weight is 1 / 0.2 + 1 / 0.2^2.
    method = ProximalAlternating(
        inner_optimizer=descent(0.4), step_size=step_size, merit_weight=30.0
    )
    solution = method.minimize(outer_loss, inner_loss, x, y, tolerance=1e-6)
    assert solution.status is StopReason.CONVERGED
    assert rises(solution.merits) <= 1e-11
    value, y_exact = true_value(outer_loss, inner_loss, solution.outer_params, y)
    assert solution.merits[-1] == pytest.approx(value, rel=1e-9)
    slope = hypergradient(
        outer_loss, inner_loss, solution.outer_params, y_exact, solver=CG(rtol=1e-12)
    )
    assert slope.grads.norm() <= 2e-5


@pytest.mark.parametrize("step_size", [0.2, 1.0, 100.0])
def test_the_same_steps_without_the_merit_diverge(step_size):
    """What the merit is for: the plain single loop with these step sizes."""
    outer_loss, inner_loss, x, y = curved()
    z = torch.zeros_like(y)
    inner_slope = torch.func.grad(inner_loss, argnums=1)
    for _ in range(200):
        by_outer, by_inner = torch.func.grad(outer_loss, argnums=(0, 1))(x, y)
        hessian = torch.func.hessian(inner_loss, argnums=1)(x, y)
        cross = torch.func.grad(lambda x, y=y, z=z: inner_slope(x, y) @ z)(x)
        y, z, x = (
            y - 0.4 * inner_slope(x, y),
            z - 0.4 * (hessian @ z - by_inner),
            x - step_size * (by_outer - cross),
        )
        if not x.isfinite().all() or x.norm() > 1e6:
            return
    value, _ = true_value(outer_loss, inner_loss, x, y)
    best = ProximalAlternating(inner_optimizer=descent(0.4)).minimize(*curved())
    assert value > best.merits[-1] + 1e-3


def test_the_corrected_loss_is_of_second_order():
    outer_loss, inner_loss, x, y = curved()
    value, y_exact = true_value(outer_loss, inner_loss, x, y)
    direction = torch.linspace(-1, 1, len(y), dtype=DOUBLE)
    plain, corrected = [], []
    for size in (1e-3, 1e-4):
        found = hypergradient(
            outer_loss, inner_loss, x, y_exact + size * direction, solver=CG(rtol=1e-12)
        )
        plain.append(abs(found.outer_loss.item() - value))
        corrected.append(abs(found.corrected_loss.item() - value))
    assert plain[0] / plain[1] == pytest.approx(10, rel=0.1)
    assert corrected[0] / corrected[1] == pytest.approx(100, rel=0.1)


@st.composite
def quadratics(draw):
    seed = draw(st.integers(0, 10_000))
    inner_size, outer_size = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    least = 10.0 ** draw(st.floats(-1.5, 0))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    basis = torch.linalg.qr(normal(inner_size, inner_size))[0]
    spectrum = torch.linspace(least, 1, inner_size, dtype=DOUBLE)
    if inner_size == 1:
        spectrum = torch.full((1,), least, dtype=DOUBLE)
    hessian = basis * spectrum @ basis.T
    coupling, target = normal(inner_size, outer_size), normal(inner_size)

    def inner_loss(x, y):
        return y @ hessian @ y / 2 - y @ coupling @ x

    def outer_loss(x, y):
        return (y - target).square().sum() / 2 + 0.05 * x.square().sum()

    return outer_loss, inner_loss, normal(outer_size), normal(inner_size), least


@settings(max_examples=15, deadline=None)
@given(problem=quadratics(), size=st.floats(-3, 2), inner_steps=st.integers(1, 20))
def test_the_merit_bounds_the_value_and_never_rises(problem, size, inner_steps):
    outer_loss, inner_loss, x, y, least = problem
    weight = 1 / least + 1 / least**2
    for steps in (1, 5, 50):
        found = hypergradient(outer_loss, inner_loss, x, y, solver=CG(max_steps=steps))
        value, _ = true_value(outer_loss, inner_loss, x, y)
        assert found.merit(weight) >= value - 1e-9 * abs(value)
    method = ProximalAlternating(
        inner_optimizer=descent(1.0),
        inner_steps=inner_steps,
        step_size=10.0**size,
        merit_weight=weight,
    )
    solution = method.minimize(outer_loss, inner_loss, x, y, max_steps=10)
    assert rises([*solution.merits, solution.merits[-1]]) <= 1e-9 * abs(solution.merits[0])


def test_a_proximal_map_makes_exact_zeros():
    outer_loss, inner_loss, x, y = curved()
    method = ProximalAlternating(
        inner_optimizer=descent(0.4),
        merit_weight=30.0,
        prox=lambda x, step: soft_threshold(x, threshold=2.0 * step),
        penalty=lambda x: 2.0 * x.abs().sum(),
    )
    solution = method.minimize(outer_loss, inner_loss, x, y)
    assert solution.status is StopReason.CONVERGED
    zeros = solution.outer_params == 0
    assert 0 < zeros.sum() < len(x)
    slope = solution.last.grads
    assert (slope[zeros].abs() <= 2.0 + 1e-5).all()
    torch.testing.assert_close(
        slope[~zeros], -2.0 * solution.outer_params[~zeros].sign(), rtol=0, atol=1e-5
    )
    assert rises(solution.merits) <= 1e-10


def test_a_projection_keeps_a_mixture_on_the_simplex():
    outer_loss, inner_loss, x, y = curved()
    method = ProximalAlternating(
        inner_optimizer=descent(0.4), prox=lambda x, _step: project_simplex(x)
    )
    solution = method.minimize(outer_loss, inner_loss, x / len(x), y)
    mixture = solution.outer_params
    assert solution.status is StopReason.CONVERGED
    assert mixture.sum().item() == pytest.approx(1)
    assert (mixture >= 0).all()
    slope = solution.last.grads
    assert (slope[mixture > 0] <= slope.min() + 1e-5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.Adam(params, lr=0.05),
        lambda params: torch.optim.LBFGS(params, max_iter=20),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    ],
    ids=["adam", "lbfgs", "momentum"],
)
def test_any_optimizer_and_nested_parameters(make):
    outer_loss, inner_loss, x, y = curved(sizes=(8, 3))
    reference = ProximalAlternating(inner_optimizer=descent(0.4), merit_weight=30.0).minimize(
        outer_loss, inner_loss, x, y
    )
    start = {"a": y[:3].clone(), "b": [y[3:].clone()]}
    method = ProximalAlternating(inner_optimizer=make, inner_steps=50, merit_weight=30.0)
    solution = method.minimize(
        lambda x, y: outer_loss(x["x"], torch.cat([y["a"], y["b"][0]])),
        lambda x, y: inner_loss(x["x"], torch.cat([y["a"], y["b"][0]])),
        {"x": x},
        start,
        tolerance=1e-2,
        max_steps=40,
    )
    assert solution.merits[-1] == pytest.approx(reference.merits[-1], rel=1e-3)
    assert torch.equal(start["a"], torch.zeros(3, dtype=DOUBLE))


def test_a_trial_that_overflows_is_only_a_failed_trial():
    def inner_loss(x, y):
        return (y - x.exp()).square().sum() / 2

    def outer_loss(_x, y):
        return (y - 2).square().sum() / 2

    x, y = torch.full((1,), 3.0, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    method = ProximalAlternating(inner_optimizer=descent(0.5), step_size=1e4)
    solution = method.minimize(outer_loss, inner_loss, x, y)
    assert solution.status is StopReason.CONVERGED
    assert solution.outer_params.item() == pytest.approx(math.log(2), abs=1e-5)


def test_the_residual_is_bounded_however_much_the_outer_gradient_grows(monkeypatch):
    """Steps from near a maximum of the outer loss, where its gradient is almost 0."""
    curvatures = torch.linspace(0.3, 1.0, 12, dtype=DOUBLE)
    start = torch.linspace(1e-3, 2e-3, 12, dtype=DOUBLE)
    trials, tried = [], alternation.Alternation.tried

    def recorded(run, outer, state, accuracy):
        candidate = tried(run, outer, state, accuracy)
        trials.append((state, outer, candidate, accuracy))
        return candidate

    monkeypatch.setattr(alternation.Alternation, "tried", recorded)
    method = ProximalAlternating(
        inner_optimizer=descent(1.0), inner_steps=20, step_size=300.0, rtol=0.9, merit_weight=30.0
    )
    method.minimize(
        lambda _x, y: y.cos().sum(),
        lambda x, y: (curvatures * (y - x).square()).sum() / 2,
        start,
        start,
        max_steps=5,
    )
    grown = [trial[2].found.outer_gradient / trial[0].found.outer_gradient for trial in trials]
    assert max(grown) > 10
    state, outer, _, accuracy = trials[0]
    decrease = 0.1 * (outer - state.outer).square().sum().item() / method.step_size
    assert accuracy.residual == pytest.approx(math.sqrt(0.25 * decrease * 2 / 30.0))
    share = 0.0
    for _, _, candidate, accuracy in trials:
        assert candidate.found.residual_norm <= accuracy.residual * (1 + 1e-9)
        share = max(share, candidate.found.residual_norm / accuracy.residual)
    assert share > 0.01  # the bound is what ends the solves, not luck


def test_more_accuracy_asks_for_no_larger_residual(monkeypatch):
    asked, evaluated = [], alternation.Alternation.evaluated

    def recorded(run, outer, start, accuracy):
        state = evaluated(run, outer, start, accuracy)
        asked.append((outer, start, state, accuracy))
        return state

    monkeypatch.setattr(alternation.Alternation, "evaluated", recorded)
    method = ProximalAlternating(inner_optimizer=descent(0.4), inner_steps=1, merit_weight=30.0)
    method.minimize(*curved(sizes=(8, 3)), tolerance=1e-8)
    refined = [entry for entry in asked[1:] if torch.equal(entry[0], entry[1].outer)]
    assert refined
    for _, before, after, accuracy in refined:
        assert accuracy.residual == before.found.residual_norm
        floor = 1e-12 * after.found.outer_gradient
        assert after.found.residual_norm <= max(before.found.residual_norm, floor) * (1 + 1e-9)


def test_limits_and_stalls_say_so(monkeypatch):
    arguments = curved(sizes=(4, 2))
    method = ProximalAlternating(inner_optimizer=descent(0.4), step_size=1e-3)
    assert method.minimize(*arguments, max_steps=3).status is StopReason.MAX_STEPS
    monkeypatch.setattr(alternation, "_MOST_INNER_STEPS", 20)
    stalled = method.minimize(*arguments, tolerance=1e-300)
    assert stalled.status is StopReason.STALLED
    assert stalled.stationarity < 1e-6


def test_inner_steps_that_diverge():
    method = ProximalAlternating(inner_optimizer=descent(1e3), inner_steps=500)
    with pytest.raises(NonFiniteLossError, match="inner_params are no longer finite"):
        method.minimize(*curved())


@pytest.mark.parametrize(
    "bad",
    [{"inner_steps": 0}, {"step_size": 0.0}, {"merit_weight": -1.0}, {"rtol": math.nan}],
    ids=str,
)
def test_arguments_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ProximalAlternating(inner_optimizer=descent(0.1), **bad)
    with pytest.raises(ValueError, match="damping"):
        ProximalAlternating(inner_optimizer=descent(0.1), damping=-1.0)
    for name in ("tolerance", "max_steps"):
        with pytest.raises(ValueError, match=name):
            ProximalAlternating(inner_optimizer=descent(0.1)).minimize(*curved(), **{name: 0})
