"""Properties that hold for every input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.ambiguity import KL, ChiSquare, Status, effective_number, worst_case

BOTH = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi_square"])
MANY = settings(deadline=None, derandomize=True, max_examples=40)

# Few distinct values give ties; the wide range gives skew.
values = st.one_of(st.floats(-1e3, 1e3), st.integers(-2, 2).map(float))


@st.composite
def problems(draw):
    n = draw(st.integers(1, 9))
    losses = np.array(draw(st.lists(values, min_size=n, max_size=n)))
    mass = 10.0 ** np.array(draw(st.lists(st.floats(-6, 0), min_size=n, max_size=n)))
    return torch.from_numpy(losses), torch.from_numpy(mass / mass.sum())


log_levels = st.floats(-6, 1.5)


def solve(problem, divergence, **level):
    losses, nominal = problem
    return worst_case(losses, divergence=divergence, nominal=nominal, **level)


def span(losses):
    return (losses.max() - losses.min()).item()


@BOTH
@MANY
@given(problem=problems(), log_level=log_levels, penalized=st.booleans())
def test_certificate_and_simplex(divergence, problem, log_level, penalized):
    level = {"penalty" if penalized else "radius": 10.0**log_level}
    result = solve(problem, divergence, **level)
    assert result.status is Status.CONVERGED
    assert 0 <= result.gap.item() <= 1e-9 * span(problem[0])
    assert (result.weights >= 0).all()
    assert result.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert problem[0].min() - 1e-9 <= result.value <= problem[0].max() + 1e-9
    assert 1 - 1e-9 <= effective_number(result.weights).item() <= len(problem[0]) + 1e-9


@BOTH
@MANY
@given(problem=problems(), log_level=log_levels)
def test_weights_stay_in_the_ball(oracle, divergence, problem, log_level):
    radius = 10.0**log_level
    result = solve(problem, divergence, radius=radius)
    spent = getattr(oracle, type(divergence).__name__).divergence(
        result.weights.numpy(), problem[1].numpy()
    )
    assert spent <= radius * (1 + 1e-9) + 1e-14
    assert result.divergence.item() <= radius * (1 + 1e-12)
    assert spent == pytest.approx(result.divergence.item(), rel=1e-6, abs=1e-13)
    # Complementary slackness: the radius is used up wherever it has a price.
    if result.multiplier.item() > 1e-6 * span(problem[0]):
        assert result.divergence.item() == pytest.approx(radius, rel=1e-9)


@BOTH
@MANY
@given(problem=problems(), log_level=log_levels, factor=st.floats(1.0, 30.0))
def test_value_rises_with_the_radius_and_falls_with_the_penalty(
    divergence, problem, log_level, factor
):
    level = 10.0**log_level
    slack = 1e-9 * (1 + span(problem[0]))
    small = solve(problem, divergence, radius=level)
    large = solve(problem, divergence, radius=level * factor)
    assert large.value >= small.value - slack
    assert large.multiplier <= small.multiplier * (1 + 1e-6) + slack
    cheap = solve(problem, divergence, penalty=level)
    dear = solve(problem, divergence, penalty=level * factor)
    assert dear.value <= cheap.value + slack
    assert dear.divergence <= cheap.divergence * (1 + 1e-6) + 1e-12


@BOTH
@MANY
@given(
    problem=problems(),
    log_level=log_levels,
    move=st.tuples(st.integers(-1000, 1000), st.integers(-9, 9), st.integers(0, 9)),
)
def test_shift_scale_and_permutation(divergence, problem, log_level, move):
    shift, exponent, seed = move
    # Losses of few digits: shifting and scaling them is exact, so only the solver can err.
    losses, nominal = (problem[0] * 64).round() / 64, problem[1]
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    scale, level = 2.0**exponent, 10.0**log_level
    moved = ((losses[order] + shift) * scale, nominal[order])
    tolerance = 1e-11 * (1 + span(losses)) * scale
    for name, factor in (("radius", 1.0), ("penalty", scale)):
        base = solve((losses, nominal), divergence, **{name: level})
        found = solve(moved, divergence, **{name: level * factor})
        torch.testing.assert_close(found.weights, base.weights[order], rtol=1e-6, atol=1e-11)
        assert abs(found.value - (base.value + shift) * scale) <= tolerance
        assert found.multiplier.item() == pytest.approx(base.multiplier.item() * scale, rel=1e-6)


@BOTH
@MANY
@given(problem=problems(), log_level=log_levels, seed=st.integers(0, 9))
def test_value_is_convex_and_its_gradient_supports_it(divergence, problem, log_level, seed):
    losses, nominal = problem
    other = torch.from_numpy(np.random.default_rng(seed).normal(size=len(losses))) * 10
    here = solve(problem, divergence, radius=10.0**log_level)
    there = solve((losses + other, nominal), divergence, radius=10.0**log_level)
    assert there.value >= here.value + here.weights @ other - 1e-8 * (1 + span(losses))


@BOTH
@MANY
@given(problem=problems(), log_level=log_levels)
def test_constrained_is_the_best_penalty_plus_its_price(divergence, problem, log_level):
    radius = 10.0**log_level
    constrained = solve(problem, divergence, radius=radius)
    slack = 1e-8 * (1 + span(problem[0]))
    for penalty in (1e-3, 0.1, 3.0, 100.0):
        bound = solve(problem, divergence, penalty=penalty).value + penalty * radius
        assert constrained.value <= bound + slack
    if constrained.multiplier.item() > 1e-9 * (1 + span(problem[0])):
        penalty = constrained.multiplier.item()
        tight = solve(problem, divergence, penalty=penalty).value + penalty * radius
        assert constrained.value.item() == pytest.approx(tight.item(), abs=slack)


@MANY
@given(problem=problems(), log_level=log_levels)
def test_exponentiated_gradient_step_is_the_penalized_kl_worst_case(problem, log_level):
    losses, previous = problem
    rate = 10.0**-log_level
    step = previous * torch.exp(rate * (losses - losses.max()))
    result = solve((losses, previous), KL(), penalty=1 / rate)
    torch.testing.assert_close(result.weights, step / step.sum(), rtol=1e-9, atol=1e-15)
