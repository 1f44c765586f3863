"""Properties that hold for every input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.ambiguity import KL, Status, effective_number, worst_case

FEW = settings(deadline=None, derandomize=True, max_examples=7)
MANY = settings(FEW, max_examples=40)

# Few distinct values give ties; the wide range gives skew.
values = st.one_of(st.floats(-1e3, 1e3), st.integers(-2, 2).map(float))


@st.composite
def problems(draw):
    n = draw(st.integers(1, 9))
    losses = np.array(draw(st.lists(values, min_size=n, max_size=n)))
    mass = 10.0 ** np.array(draw(st.lists(st.floats(-6, 0), min_size=n, max_size=n)))
    return torch.from_numpy(losses), torch.from_numpy(mass / mass.sum())


log_levels = st.floats(-6, 1.5)
shifts = st.tuples(st.integers(-1000, 1000), st.integers(-9, 9), st.integers(0, 9))


def solve(problem, divergence, **level):
    losses, nominal = problem
    return worst_case(losses, divergence=divergence, nominal=nominal, **level)


def repeated(problem, times):
    losses, nominal = problem
    return losses.expand(times, -1), nominal


def span(losses):
    return (losses.max() - losses.min()).item()


@FEW
@given(problem=problems(), log_level=log_levels)
def test_certificate_and_simplex(sized, problem, log_level):
    level = sized.level(radius=10.0**log_level, penalty=10.0**log_level)
    result = solve(problem, sized.case.divergence, **level)
    assert result.status is Status.CONVERGED
    assert 0 <= result.gap.item() <= 1e-9 * max(span(problem[0]), 1e-6)
    assert (result.weights >= 0).all()
    assert result.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert problem[0].min() - 1e-9 <= result.value <= problem[0].max() + 1e-9
    assert 1 - 1e-9 <= effective_number(result.weights).item() <= len(problem[0]) + 1e-9


@FEW
@given(problem=problems(), log_level=log_levels)
def test_weights_stay_in_the_ball(ball, problem, log_level):
    radius = 10.0**log_level
    result = solve(problem, ball.divergence, radius=radius)
    weights, nominal = result.weights.numpy(), problem[1].numpy()
    assert (weights <= nominal * ball.exact.cap * (1 + 1e-8)).all()
    spent = ball.exact.divergence(weights, nominal)
    assert spent <= radius * (1 + 1e-9) + 1e-14
    assert result.divergence.item() <= radius * (1 + 1e-12)
    assert spent == pytest.approx(result.divergence.item(), rel=1e-6, abs=1e-13)
    # Complementary slackness: the radius is used up wherever it has a price.
    if result.multiplier.item() > 1e-6 * span(problem[0]):
        assert result.divergence.item() == pytest.approx(radius, rel=1e-9)


@FEW
@given(problem=problems(), log_level=log_levels)
def test_value_rises_with_the_radius(ball, problem, log_level):
    radius = 10.0**log_level * torch.tensor([1.0, 1.001, 3.0, 100.0], dtype=torch.float64)
    result = solve(repeated(problem, 4), ball.divergence, radius=radius)
    slack = 1e-9 * (1 + span(problem[0]))
    assert (result.value.diff() >= -slack).all()
    assert (result.divergence.diff() >= -1e-12 * radius[1:]).all()
    multiplier = result.multiplier
    assert (multiplier[1:] <= multiplier[:-1] * (1 + 1e-6) + slack).all()


@FEW
@given(problem=problems(), log_level=log_levels)
def test_value_falls_with_the_penalty(priced, problem, log_level):
    penalty = 10.0**log_level * torch.tensor([1.0, 1.001, 3.0, 100.0], dtype=torch.float64)
    result = solve(repeated(problem, 4), priced.divergence, penalty=penalty)
    assert (result.value.diff() <= 1e-9 * (1 + span(problem[0]))).all()
    spent = result.divergence
    assert (spent[1:] <= spent[:-1] * (1 + 1e-6) + 1e-12).all()


@FEW
@given(problem=problems(), log_level=log_levels, move=shifts)
def test_shift_scale_and_permutation(sized, problem, log_level, move):
    shift, exponent, seed = move
    # Losses of few digits: shifting and scaling them is exact, so only the solver can err.
    losses, nominal = (problem[0] * 64).round() / 64, problem[1]
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    scale, size = 2.0**exponent, 10.0**log_level
    moved = ((losses[order] + shift) * scale, nominal[order])
    divergence = sized.case.divergence
    base = solve((losses, nominal), divergence, **sized.level(radius=size, penalty=size))
    found = solve(moved, divergence, **sized.level(radius=size, penalty=size * scale))
    torch.testing.assert_close(found.weights, base.weights[order], rtol=1e-6, atol=1e-11)
    tolerance = 1e-11 * (1 + span(losses)) * scale
    assert abs(found.value - (base.value + shift) * scale) <= tolerance
    assert found.multiplier.item() == pytest.approx(base.multiplier.item() * scale, rel=1e-6)


@FEW
@given(problem=problems(), log_level=log_levels, seed=st.integers(0, 9))
def test_value_is_convex_and_its_gradient_supports_it(sized, problem, log_level, seed):
    losses, nominal = problem
    others = np.random.default_rng(seed).normal(size=(4, len(losses))) * [[10], [1], [0.1], [1e-4]]
    others = torch.from_numpy(others)
    divergence = sized.case.divergence
    level = sized.level(radius=10.0**log_level, penalty=10.0**log_level)
    moves = torch.cat([torch.zeros_like(others[:1]), others, others / 2])
    result = solve((losses + moves, nominal), divergence, **level)
    here, there, middle = result.value.split([1, 4, 4])
    slack = 1e-8 * (1 + span(losses))
    assert (there >= here + others @ result.weights[0] - slack).all()
    assert (middle <= (here + there) / 2 + slack).all()


@FEW
@given(problem=problems(), log_level=log_levels)
def test_constrained_is_the_best_penalty_plus_its_price(ball, problem, log_level):
    radius = 10.0**log_level
    constrained = solve(problem, ball.divergence, radius=radius)
    slack = 1e-8 * (1 + span(problem[0]))
    penalty = torch.tensor([1e-3, 0.1, 3.0, 100.0], dtype=torch.float64)
    priced = solve(repeated(problem, 4), ball.divergence, penalty=penalty)
    assert (constrained.value <= priced.value + penalty * radius + slack).all()
    if constrained.multiplier.item() > 1e-9 * (1 + span(problem[0])):
        penalty = constrained.multiplier.item()
        tight = solve(problem, ball.divergence, penalty=penalty).value + penalty * radius
        assert constrained.value.item() == pytest.approx(tight.item(), abs=slack)


@FEW
@given(problem=problems(), log_level=log_levels, copies=st.integers(2, 4))
def test_atoms_split_into_equal_parts_change_nothing(sized, problem, log_level, copies):
    """Ties share in proportion to the nominal, so a split atom keeps its weight in sum."""
    level = sized.level(radius=10.0**log_level, penalty=10.0**log_level)
    losses, nominal = problem
    parts = (losses.repeat_interleave(copies), nominal.repeat_interleave(copies) / copies)
    whole = solve(problem, sized.case.divergence, **level)
    split = solve(parts, sized.case.divergence, **level)
    sums = split.weights.reshape(-1, copies)
    torch.testing.assert_close(sums.sum(-1), whole.weights, rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(sums, sums[:, :1].expand_as(sums), rtol=1e-12, atol=0)
    assert split.value.item() == pytest.approx(whole.value.item(), abs=1e-9 * (1 + span(losses)))


@MANY
@given(problem=problems(), log_level=log_levels)
def test_exponentiated_gradient_step_is_the_penalized_kl_worst_case(problem, log_level):
    losses, previous = problem
    rate = 10.0**-log_level
    step = previous * torch.exp(rate * (losses - losses.max()))
    result = solve((losses, previous), KL(), penalty=1 / rate)
    torch.testing.assert_close(result.weights, step / step.sum(), rtol=1e-9, atol=1e-15)
