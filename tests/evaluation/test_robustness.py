"""Shifts between domains, against brute force."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.ambiguity import KL, ChiSquare
from drgr.evaluation import (
    leave_one_out,
    mixture_losses,
    robust_curve,
    standard_error,
    tail_mean,
)

DOUBLE = torch.float64
losses_of = st.lists(st.floats(0.1, 9), min_size=1, max_size=12)


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


@given(losses=st.lists(st.floats(-5, 5), min_size=1, max_size=40), level=st.floats(0.02, 1))
@settings(deadline=None)
def test_tail_mean_against_sorting(losses, level):
    left, total = level * len(losses), 0.0
    for loss in sorted(losses, reverse=True):
        part = min(1.0, left)
        total += part * loss
        left -= part
    expected = total / (level * len(losses))
    assert float(tail_mean(tensor(losses), level=level)) == pytest.approx(expected, abs=1e-8)


def test_tail_mean_refuses_levels_out_of_range():
    with pytest.raises(ValueError, match="level"):
        tail_mean(tensor([1.0, 2.0]), level=0.0)


def kl_worst_case(losses, radius):
    """By bisection in the temperature of the exponential tilt."""

    def tilt(tau):
        top = max(losses)
        powers = [math.exp(tau * (loss - top)) for loss in losses]
        weights = [power / sum(powers) for power in powers]
        divergence = sum(w * math.log(w * len(losses)) for w in weights if w > 0)
        return divergence, sum(w * loss for w, loss in zip(weights, losses, strict=True))

    low, high = 0.0, 1e5
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if tilt(middle)[0] < radius else (low, middle)
    return tilt(low)[1]


def test_curve_against_bisection():
    losses, radii = [1.0, 1.5, 2.2, 4.0], [0.0, 0.05, 0.3, 1.0]
    curve = robust_curve(tensor(losses), radii=radii, divergence=KL())
    assert curve.converged
    for radius, value in zip(radii, curve.values.tolist(), strict=True):
        assert value == pytest.approx(kl_worst_case(losses, radius), rel=1e-7)
    assert float(curve.effective_domains[0]) == pytest.approx(4)


@given(losses=losses_of, divergence=st.sampled_from([KL(), ChiSquare()]))
@settings(max_examples=40, deadline=None)
def test_the_curve_rises_from_the_mean_to_the_worst(losses, divergence):
    curve = robust_curve(tensor(losses), radii=[0, 0.01, 0.1, 1, 100], divergence=divergence)
    values = curve.values.tolist()
    mean = sum(losses) / len(losses)
    assert values[0] == pytest.approx(mean, rel=1e-9)
    assert values[-1] == pytest.approx(max(losses), rel=1e-9)
    assert all(after >= before - 1e-9 for before, after in pairwise(values))


def test_a_curve_needs_radii():
    with pytest.raises(ValueError, match="radii must hold at least one"):
        robust_curve(tensor([1.0]), radii=[], divergence=KL())


def test_mixtures_are_seeded_and_uniform_on_the_simplex():
    losses = tensor([0.0, 0.0, 1.0])
    drawn = mixture_losses(losses, num_mixtures=20000, seed=3)
    assert torch.equal(drawn, mixture_losses(losses, num_mixtures=20000, seed=3))
    assert not torch.equal(drawn, mixture_losses(losses, num_mixtures=20000, seed=4))
    # The weight of one of three domains has the distribution 1 - (1 - w)^2.
    for share in (0.1, 0.5, 0.9):
        expected = 1 - math.sqrt(1 - share)
        assert float(torch.quantile(drawn, share)) == pytest.approx(expected, abs=0.02)


@given(losses=losses_of, concentration=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_mixtures_lie_between_the_best_and_the_worst(losses, concentration):
    drawn = mixture_losses(tensor(losses), num_mixtures=50, concentration=concentration)
    assert drawn.shape == (50,)
    assert float(drawn.min()) >= min(losses) - 1e-9
    assert float(drawn.max()) <= max(losses) + 1e-9


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_mixtures": 0}, "num_mixtures"),
        ({"num_mixtures": 1, "concentration": -1.0}, "concentration"),
    ],
)
def test_mixtures_out_of_range(arguments, name):
    with pytest.raises(ValueError, match=name):
        mixture_losses(tensor([1.0]), **arguments)


@given(losses=st.lists(st.floats(0.1, 9), min_size=2, max_size=8, unique=True))
def test_leaving_one_out_against_lists(losses):
    left = leave_one_out(tensor(losses))
    for index in range(len(losses)):
        others = losses[:index] + losses[index + 1 :]
        assert float(left.mean[index]) == pytest.approx(sum(others) / len(others))
        assert float(left.worst[index]) == max(others)
        assert losses[int(left.worst_domain[index])] == max(others)


def test_nothing_is_left_of_one_domain():
    left = leave_one_out(tensor([2.0]))
    assert math.isnan(float(left.mean)) and math.isnan(float(left.worst))  # noqa: PT018
    assert left.worst_domain.tolist() == [-1]


def test_standard_error_is_that_of_repeated_draws():
    samples = torch.randn(400, 25, dtype=DOUBLE) * 3
    spread = float(samples.mean(dim=1).std())
    mean_error = sum(standard_error(row) for row in samples) / 400
    assert mean_error == pytest.approx(spread, rel=0.1)
    assert standard_error(tensor([1.0, 3.0])) == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert math.isnan(standard_error(tensor([1.0])))
