"""The bounds of docs/theory.md, section 6: each holds, and each is reached or nearly so."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from drgr.ambiguity import (
    KL,
    Burg,
    ChiSquare,
    CressieRead,
    Hellinger,
    TotalVariation,
    worst_case,
)
from drgr.ambiguity.bounds import (
    bernstein_widths,
    chi_square_excess,
    held_out_bound,
    hoeffding_widths,
    kl_excess,
    regret_bound,
    risk_at_distance,
    smooth_excess,
    total_variation_excess,
)

DOUBLE = torch.float64
BOUNDS = {KL(): kl_excess, ChiSquare(): chi_square_excess, TotalVariation(): total_variation_excess}


@st.composite
def problems(draw):
    """Losses and nominal probabilities, some of them 0, of two to eight domains."""
    size = draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    losses = torch.randn(size, generator=generator, dtype=DOUBLE) * 10.0 ** draw(st.floats(-2, 2))
    if draw(st.booleans()):
        losses = (losses / losses.abs().max()).round(decimals=0)  # ties
    mass = torch.rand(size, generator=generator, dtype=DOUBLE) ** draw(st.floats(0, 4)) + 1e-3
    if size > 2 and draw(st.booleans()):
        mass[0] = 0.0
    return losses, mass / mass.sum()


def excess_of(losses, nominal, divergence, radius):
    worst = worst_case(losses, divergence=divergence, radius=radius, nominal=nominal)
    return (worst.value - (nominal * losses).sum()).item()


def inside(distance, generator, nominal, radius):
    """A random mixture in the ball, by bisection along a ray."""
    target = torch.rand(len(nominal), generator=generator, dtype=DOUBLE) ** 3 * (nominal > 0)
    target /= target.sum()
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mixture = nominal + middle * (target - nominal)
        low, high = (middle, high) if distance(mixture, nominal) <= radius else (low, middle)
    return nominal + low * (target - nominal)


def kl(mixture, nominal):
    return torch.special.xlogy(mixture, mixture / nominal.clamp_min(1e-300)).sum().item()


def half_pearson(mixture, nominal):
    return ((mixture - nominal).square() / nominal.clamp_min(1e-300)).sum().item() / 2


@settings(max_examples=60, deadline=None)
@given(problem=problems(), exponent=st.floats(-6, 2))
@pytest.mark.parametrize("divergence", BOUNDS, ids=str)
def test_6_1_to_6_3_hold(divergence, problem, exponent):
    losses, nominal = problem
    radius = 10.0**exponent
    excess = excess_of(losses, nominal, divergence, radius)
    bounds = BOUNDS[divergence](losses, radius=radius, nominal=nominal)
    rounding = 1e-9 * (1 + losses.abs().max().item())
    assert bounds.lower.item() - rounding <= excess <= bounds.upper.item() + rounding


@pytest.mark.parametrize(
    ("divergence", "radius", "slack"),
    [(ChiSquare(), 0.02, 1e-9), (TotalVariation(), 0.1, 1e-9), (KL(), 1e-6, 1e-2)],
    ids=str,
)
def test_6_1_to_6_3_are_reached(divergence, radius, slack):
    losses = torch.tensor([1.0, 1.2, 1.9, 2.5, 4.0], dtype=DOUBLE)
    nominal = torch.full((5,), 0.2, dtype=DOUBLE)
    excess = excess_of(losses, nominal, divergence, radius)
    assert excess > 0
    for bound in BOUNDS[divergence](losses, radius=radius):
        assert bound.item() == pytest.approx(excess, rel=slack)


def test_6_2_each_part_of_the_kl_bounds_is_the_best_somewhere():
    two = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    even = kl_excess(two, radius=0.1)  # Pinsker is nearly reached by two equal domains
    assert even.upper.item() == pytest.approx(math.sqrt(0.05))
    assert excess_of(two, torch.full((2,), 0.5, dtype=DOUBLE), KL(), 0.1) > 0.98 * even.upper.item()
    rare = torch.tensor([0.999, 0.001], dtype=DOUBLE)
    bernstein = kl_excess(two, radius=0.01, nominal=rare).upper.item()
    assert bernstein < 0.15 * math.sqrt(0.005)
    # Beyond saturation the lower bound is reached, and so is max l - m.
    far = kl_excess(two, radius=5.0)
    assert far.lower.item() == pytest.approx(0.5)
    assert far.upper.item() == pytest.approx(0.5)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), exponent=st.floats(-5, 0), reach=st.floats(0.05, 0.9))
@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0])
def test_6_4_holds(power, problem, exponent, reach):
    losses, nominal = problem
    divergence = {2.0: ChiSquare(), 1.0: KL(), 0.0: Burg()}.get(power) or CressieRead(power)
    least_mass = nominal[nominal > 0].min().item()
    # f'' = r^(power - 2) falls in r.
    bounds = smooth_excess(
        losses,
        radius=10.0**exponent,
        least_curvature=least_mass ** (2 - power),
        most_curvature=(1 - reach) ** (power - 2),
        reach=reach,
        nominal=nominal,
    )
    excess = excess_of(losses, nominal, divergence, 10.0**exponent)
    rounding = 1e-9 * (1 + losses.abs().max().item())
    assert bounds.lower.item() - rounding <= excess <= bounds.upper.item() + rounding


@pytest.mark.parametrize("divergence", [Hellinger(), Burg(), CressieRead(1.5), KL()], ids=str)
def test_6_4_lower_end_is_reached_by_small_radii(divergence):
    losses, radius, reach = torch.tensor([1.0, 1.5, 3.0], dtype=DOUBLE), 1e-8, 1e-3
    ratio = torch.tensor(0.01, dtype=DOUBLE).log1p()
    curvature = 2 * divergence.generator(ratio).item() / 1e-4
    bounds = smooth_excess(
        losses, radius=radius, least_curvature=1.0, most_curvature=1.01 * curvature, reach=reach
    )
    excess = excess_of(losses, torch.full((3,), 1 / 3, dtype=DOUBLE), divergence, radius)
    assert bounds.lower.item() == pytest.approx(excess, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), exponent=st.floats(-4, 1), seed=st.integers(0, 1000))
def test_6_5_every_mixture_is_certified(problem, exponent, seed):
    losses, nominal = problem
    generator = torch.Generator().manual_seed(seed)
    rounding = 1e-9 * (1 + losses.abs().max().item())
    for divergence, distance in ((KL(), kl), (ChiSquare(), half_pearson)):
        level = 10.0**exponent
        for worst, radius in (
            (worst_case(losses, divergence=divergence, radius=level, nominal=nominal), level),
            (worst_case(losses, divergence=divergence, penalty=level, nominal=nominal), None),
        ):
            for reach in (0.5 * level, 5 * level):
                mixture = inside(distance, generator, nominal, reach)
                bound = risk_at_distance(
                    worst, distance=distance(mixture, nominal), radius=radius
                ).item()
                assert (mixture * losses).sum().item() <= bound + rounding * (1 + 1 / level)
        held = worst_case(losses, divergence=divergence, radius=level, nominal=nominal)
        mixture = inside(distance, generator, nominal, level)
        assert (mixture * losses).sum().item() <= (held.value + held.gap).item() + rounding


@pytest.mark.parametrize("level", [{"radius": 0.1}, {"penalty": 0.7}], ids=str)
def test_6_5_is_reached(level):
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE)
    worst = worst_case(losses, divergence=KL(), **level)
    risk = (worst.weights * losses).sum().item()
    bound = risk_at_distance(
        worst, distance=worst.divergence.item(), radius=level.get("radius")
    ).item()
    assert bound == pytest.approx(risk, rel=1e-9)
    # A little further out the slope is right to first order.
    further = worst.divergence.item() + 1e-4
    truth = worst_case(losses, divergence=KL(), radius=further).value.item()
    bound = risk_at_distance(worst, distance=further, radius=level.get("radius")).item()
    assert truth <= bound <= truth + 1e-6


@settings(max_examples=40, deadline=None)
@given(problem=problems(), exponent=st.floats(-4, 0), seed=st.integers(0, 1000))
def test_6_6_the_regret_of_a_robust_choice(problem, exponent, seed):
    losses, nominal = problem
    generator = torch.Generator().manual_seed(seed)
    size, radius = losses.abs().max() + 1e-3, 10.0**exponent
    choices = losses + size * torch.randn(5, len(losses), generator=generator, dtype=DOUBLE) / 3
    values = worst_case(choices, divergence=KL(), radius=radius, nominal=nominal).value
    robust = choices[values.argmin()]
    bounds = regret_bound(choices, divergence=KL(), radius=radius, nominal=nominal)
    for _ in range(10):
        mixture = inside(kl, generator, nominal, radius)
        regrets = (mixture * robust).sum() - (choices * mixture).sum(dim=-1)
        assert (regrets <= bounds + 1e-8 * size).all()


@settings(max_examples=40, deadline=None)
@given(problem=problems(), exponent=st.floats(-4, 1))
def test_6_6_the_regret_in_a_chi_square_ball(problem, exponent):
    losses, nominal = problem
    radius = 10.0**exponent
    bound = regret_bound(losses, divergence=ChiSquare(), radius=radius, nominal=nominal).item()
    mean = (nominal * losses).sum()
    deviation = (nominal * (losses - mean).square()).sum().sqrt().item()
    assert bound <= 2 * math.sqrt(2 * radius) * deviation + 1e-9 * (1 + losses.abs().max().item())


def test_6_6_is_reached():
    losses, radius = torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE), 0.1
    # Robustly as good as constant losses; these are bad where the others are good.
    constant = worst_case(losses, divergence=KL(), radius=radius).value
    mixture = worst_case(-losses, divergence=KL(), radius=radius).weights
    regret = constant - (mixture * losses).sum()
    bound = regret_bound(losses, divergence=KL(), radius=radius)
    assert regret.item() == pytest.approx(bound.item(), rel=1e-8)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), exponent=st.floats(-4, 1), seed=st.integers(0, 1000))
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), TotalVariation()], ids=str)
def test_6_7_estimation_errors_of_losses(divergence, problem, exponent, seed):
    losses, nominal = problem
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(len(losses), generator=generator, dtype=DOUBLE)
    radius, estimate = 10.0**exponent, losses + error
    true, seen = (
        worst_case(values, divergence=divergence, radius=radius, nominal=nominal).value.item()
        for values in (losses, estimate)
    )
    rounding = 1e-9 * (1 + losses.abs().max().item())
    assert abs(true - seen) <= error.abs().max().item() + rounding
    bound = held_out_bound(
        estimate, error.abs(), divergence=divergence, radius=radius, nominal=nominal
    ).item()
    assert true <= bound + rounding
    assert bound <= seen + error.abs().max().item() + rounding


def test_6_7_is_reached():
    losses, widths = torch.tensor([1.0, 2.0, 4.0]), torch.full((3,), 0.25)
    bound = held_out_bound(losses, widths, divergence=KL(), radius=0.1)
    value = worst_case(losses + 0.25, divergence=KL(), radius=0.1).value
    assert bound.item() == pytest.approx(value.item(), rel=1e-6)
    # Widths of domains that the worst case does not heed count less than the largest one.
    uneven = held_out_bound(losses, torch.tensor([0.25, 0.0, 0.0]), divergence=KL(), radius=0.1)
    assert uneven.item() < bound.item() - 0.2


def miss_probability(chance, count, width):
    """Exact probability that a Bernoulli mean lies more than a width below its expectation."""
    seen = torch.arange(count + 1)
    missed = torch.tensor([seen_ / count + width(seen_, count) < chance for seen_ in seen.tolist()])
    return float(stats.binom.pmf(seen.numpy(), count, chance)[missed.numpy()].sum())


@pytest.mark.parametrize("count", [5, 40, 300])
@pytest.mark.parametrize("chance", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("failure", [0.3, 0.05])
def test_6_8_widths_fail_no_more_often_than_they_say(count, chance, failure):
    one = torch.tensor([count])

    def hoeffding(_seen, _count):
        return hoeffding_widths(one, loss_range=1.0, failure=failure).item()

    def bernstein(seen, count):
        variance = torch.tensor([seen * (count - seen) / (count * (count - 1))])
        return bernstein_widths(variance, one, loss_range=1.0, failure=failure).item()

    assert miss_probability(chance, count, hoeffding) <= failure
    assert miss_probability(chance, count, bernstein) <= failure


def test_6_8_widths_are_not_vacuous():
    count, failure = 2000, 0.05
    widths = hoeffding_widths(torch.tensor([count]), loss_range=1.0, failure=failure)
    true = 0.5 - stats.binom.ppf(failure, count, 0.5) / count
    assert widths.item() <= 1.6 * true
    # All domains together: G wrong means at a G-th of the probability each.
    four = hoeffding_widths(torch.full((4,), count), loss_range=1.0, failure=failure)
    single = hoeffding_widths(torch.tensor([count]), loss_range=1.0, failure=failure / 4)
    assert four[2].item() == pytest.approx(single.item())
    little = bernstein_widths(
        torch.tensor([1e-4]), torch.tensor([count]), loss_range=1.0, failure=failure
    )
    assert little.item() < 0.2 * widths.item()
    much = 500_000
    normal = stats.norm.isf(failure) * 0.1 / math.sqrt(much)
    wide = bernstein_widths(
        torch.tensor([0.01]), torch.tensor([much]), loss_range=1.0, failure=failure
    )
    assert wide.item() <= 2 * normal


def test_batches_and_dtypes():
    losses = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]])
    for bounds in BOUNDS.values():
        found = bounds(losses, radius=0.1)
        assert found.lower.shape == (2,)
        assert found.upper.dtype == torch.float32
        assert found.lower[1] == found.upper[1] == 0
        nothing = bounds(losses, radius=0.0)
        assert (nothing.lower == 0).all()
        assert (nothing.upper == 0).all()
    worst = worst_case(losses, divergence=KL(), radius=0.0)
    assert risk_at_distance(worst, distance=0.1, radius=0.0).tolist() == [math.inf, 3.0]
    assert torch.equal(risk_at_distance(worst, distance=0.0, radius=0.0), worst.value + worst.gap)


def test_arguments_out_of_range():
    losses = torch.tensor([1.0, 2.0])
    for bounds in BOUNDS.values():
        with pytest.raises(ValueError, match="radius"):
            bounds(losses, radius=-1.0)
    with pytest.raises(ValueError, match="reach"):
        smooth_excess(losses, radius=0.1, least_curvature=1.0, most_curvature=1.0, reach=2.0)
    with pytest.raises(ValueError, match="failure"):
        hoeffding_widths(torch.tensor([5]), loss_range=1.0, failure=1.0)
    with pytest.raises(ValueError, match="num_samples"):
        bernstein_widths(torch.ones(1), torch.tensor([1]), loss_range=1.0, failure=0.1)
    with pytest.raises(ValueError, match="widths"):
        held_out_bound(losses, -losses, divergence=KL(), radius=0.1)
    with pytest.raises(ValueError, match="distance"):
        risk_at_distance(worst_case(losses, divergence=KL(), penalty=1.0), distance=-1.0)
