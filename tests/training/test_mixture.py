"""Steps on the mixture against closed forms and a general solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from drgr.ambiguity import KL, CVaR, worst_case
from drgr.training.mixture import entropic_step, lookahead_mixture


def random_simplex(generator, size):
    return torch.from_numpy(generator.dirichlet(np.ones(size)))


def objective(logits, mixture, gain, rate, anchor, strength):
    """What the step minimises, by its definition, at softmax(logits)."""
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return (
        -gain @ shares
        + (shares * np.log(shares / mixture)).sum() / rate
        + strength * (shares * np.log(shares / anchor)).sum()
    )


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_the_entropic_step_minimises_its_objective(strength):
    generator = np.random.default_rng(0)
    mixture, anchor = random_simplex(generator, 4), random_simplex(generator, 4)
    gain = torch.from_numpy(generator.normal(size=4))
    found = entropic_step(mixture, gain, rate=2.0, anchor=anchor, anchor_strength=strength)
    arguments = (mixture.numpy(), gain.numpy(), 2.0, anchor.numpy(), strength)
    best = minimize(objective, np.zeros(4), arguments, tol=1e-14)
    reached = objective(found.log().numpy(), *arguments)
    assert reached == pytest.approx(best.fun, abs=1e-9)
    assert found.sum().item() == pytest.approx(1)
    if strength == 0:
        by_hand = mixture * (2.0 * gain).exp()
        torch.testing.assert_close(found, by_hand / by_hand.sum())


def test_the_uniform_anchor_is_the_default():
    mixture = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    gain = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(
        entropic_step(mixture, gain, rate=1.0, anchor_strength=2.0),
        entropic_step(mixture, gain, rate=1.0, anchor=uniform, anchor_strength=2.0),
    )


def test_a_share_of_zero_stays():
    mixture = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    moved = entropic_step(mixture, torch.tensor([0.0, 9.0, 0.0]).double(), rate=1.0)
    assert moved.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "rate"),
        ({"anchor_strength": -1.0}, "anchor_strength"),
        ({"gain": torch.tensor([1.0, torch.nan])}, "gain must be finite"),
        ({"gain": torch.zeros(3)}, "gain"),
    ],
)
def test_bad_steps_are_refused(changes, message):
    options = {"gain": torch.zeros(2), "rate": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        entropic_step(torch.full((2,), 0.5), options.pop("gain"), **options)


def kl_risk(losses):
    return worst_case(losses, divergence=KL(), penalty=0.3)


def value_by_hand(logits, losses, gains, anchor, strength):
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    predicted = losses - gains @ shares
    risk = 0.3 * np.log(np.mean(np.exp((predicted - predicted.max()) / 0.3))) + predicted.max()
    return risk + strength * (shares * np.log(shares / anchor)).sum()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 6),
    strength=st.floats(0.02, 2.0),
    scale=st.floats(0.0, 3.0),
)
def test_lookahead_is_optimal_within_its_gap(seed, size, strength, scale):
    generator = np.random.default_rng(seed)
    losses = torch.from_numpy(generator.normal(size=size))
    gains = torch.from_numpy(scale * generator.normal(size=(size, size)))
    anchor = random_simplex(generator, size) * 0.9 + 0.1 / size
    found = lookahead_mixture(kl_risk, losses, gains, anchor=anchor, anchor_strength=strength)
    arguments = (losses.numpy(), gains.numpy(), anchor.numpy(), strength)
    assert found.value == pytest.approx(
        value_by_hand(found.mixture.clamp_min(1e-300).log().numpy(), *arguments), abs=1e-9
    )
    best = minimize(value_by_hand, anchor.log().numpy(), arguments, tol=1e-12)
    assert found.value - found.gap <= best.fun + 1e-9
    spread = float(losses.max() - losses.min())
    assert found.gap <= 1e-3 * max(spread, 1e-3)
    assert found.value <= best.fun + found.gap + 1e-9


def test_without_gains_the_anchor_is_best():
    anchor = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    found = lookahead_mixture(
        kl_risk,
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.zeros(3, 3, dtype=torch.float64),
        anchor=anchor,
        anchor_strength=0.1,
    )
    torch.testing.assert_close(found.mixture, anchor)
    assert found.gap == pytest.approx(0, abs=1e-12)


def test_a_risk_with_corners_reports_what_it_reached():
    """Worst-case weights of CVaR jump; the bound still holds, and says how far it is from best."""
    losses = torch.tensor([1.0, 1.1, 0.9], dtype=torch.float64)
    gains = torch.eye(3, dtype=torch.float64)
    found = lookahead_mixture(
        lambda values: worst_case(values, divergence=CVaR(1 / 3)),
        losses,
        gains,
        anchor=torch.full((3,), 1 / 3, dtype=torch.float64),
        anchor_strength=0.05,
    )
    grid = np.linspace(0.01, 0.98, 98)
    best = min(
        max(1.0 - a, 1.1 - b, 0.9 - (1 - a - b))
        + 0.05 * (a * np.log(3 * a) + b * np.log(3 * b) + (1 - a - b) * np.log(3 * (1 - a - b)))
        for a in grid
        for b in grid
        if a + b < 0.99
    )
    assert found.value - found.gap <= best
    assert found.value <= best + found.gap


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor_strength": 0.0}, "anchor_strength"),
        ({"gains": torch.zeros(2, 3)}, "gains"),
        ({"gains": torch.full((2, 2), torch.inf)}, "gains must be finite"),
        ({"anchor": torch.tensor([1.0, 0.0])}, "anchor must be above 0"),
    ],
)
def test_bad_lookaheads_are_refused(changes, message):
    options = {
        "gains": torch.zeros(2, 2),
        "anchor": torch.full((2,), 0.5),
        "anchor_strength": 1.0,
    } | changes
    with pytest.raises(ValueError, match=message):
        lookahead_mixture(kl_risk, torch.zeros(2), options.pop("gains"), **options)
