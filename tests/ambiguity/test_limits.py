"""Ends of the path: radius 0, saturation, equal losses, one atom, atoms without mass."""

import math

import pytest
import torch

from drgr.ambiguity import ChiSquare, CVaR, KLCVaR, Spectral, Status, worst_case

DOUBLE = torch.float64
LOSSES = torch.tensor([0.3, 2.0, -1.0, 2.0, 1.5], dtype=DOUBLE)
NOMINAL = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2], dtype=DOUBLE)
TOP = 0.25  # nominal mass of the two largest losses
MEAN = (NOMINAL @ LOSSES).item()
VARIANCE = (NOMINAL @ (LOSSES - MEAN) ** 2).item()


def solve(divergence, **level):
    return worst_case(LOSSES, divergence=divergence, nominal=NOMINAL, **level)


def test_radius_zero_is_the_mean(ball):
    result = solve(ball.divergence, radius=0.0)
    assert torch.equal(result.weights, NOMINAL)
    assert result.value.item() == pytest.approx(MEAN, abs=1e-15)
    assert result.multiplier.item() == math.inf
    assert result.threshold.item() == pytest.approx(MEAN)
    assert result.gap.item() <= 1e-15
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("excess", [1 + 1e-9, 3.0, 1e9])
def test_beyond_saturation_the_largest_losses_share_by_nominal(saturating, excess):
    limit = saturating.exact.saturation(TOP)
    result = solve(saturating.divergence, radius=limit * excess)
    # KL-CVaR of level 0.25 is capped exactly where these two losses have all mass.
    expected = torch.tensor([0.0, 0.4, 0.0, 0.6, 0.0], dtype=DOUBLE)
    torch.testing.assert_close(result.weights, expected, rtol=0, atol=1e-15)
    assert (result.weights[[0, 2, 4]] == 0).all()
    assert result.value.item() == pytest.approx(2.0, abs=1e-15)
    assert result.multiplier.item() == 0.0
    assert result.divergence.item() == pytest.approx(limit, rel=1e-12)
    assert result.status is Status.CONVERGED


def test_just_below_saturation_the_radius_still_has_a_price(saturating):
    radius = saturating.exact.saturation(TOP) * (1 - 1e-9)
    result = solve(saturating.divergence, radius=radius)
    assert result.status is Status.CONVERGED
    assert result.multiplier.item() > 0
    assert result.divergence.item() == pytest.approx(radius, rel=1e-11)
    assert 2.0 - 1e-6 < result.value.item() <= 2.0
    assert (result.weights[1] / result.weights[3]).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("radius", [1.0, 5.0, 40.0])
def test_a_radius_that_no_set_reaches_is_used_up(endless, radius):
    result = solve(endless.divergence, radius=radius)
    assert result.status is Status.CONVERGED
    assert result.multiplier.item() > 0
    assert (result.weights > 0).all()
    assert result.divergence.item() == pytest.approx(radius, rel=1e-11)
    assert (result.weights[1] / result.weights[3]).item() == pytest.approx(2 / 3)


def test_ratios_beyond_any_double_end_at_the_largest_loss(endless):
    """The second atom would have to lose mass until ``log(q / p)`` is about -1e20."""
    nominal = torch.tensor([1 - 1e-20, 1e-20], dtype=DOUBLE)
    losses = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    result = worst_case(losses, divergence=endless.divergence, nominal=nominal, radius=1.0)
    assert result.value.item() == 1.0
    assert 0 < result.divergence.item() <= 1.0
    assert result.status is Status.CONVERGED


def test_saturation_with_nearly_all_mass_at_the_top(saturating):
    # 1 - P = 1e-10: the saturation radius needs the odds, not 1/P - 1.
    nominal = torch.tensor([1 - 1e-10, 1e-10], dtype=DOUBLE)
    losses = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    # What the lost mass costs; growth of the rest is of second order, but for a kink.
    kink = 0.5 if saturating.name == "total_variation" else 0.0
    limit = 1e-10 * (saturating.exact.at_zero + kink)
    at = {"divergence": saturating.divergence, "nominal": nominal}
    below = worst_case(losses, radius=limit * (1 - 1e-6), **at)
    above = worst_case(losses, radius=limit * (1 + 1e-6), **at)
    assert below.multiplier.item() > 0
    assert below.weights[1].item() > 0
    assert above.multiplier.item() == 0
    assert above.weights[1].item() == 0


def test_kl_cvar_saturates_at_its_cap_with_a_fraction_of_the_boundary():
    tail = solve(CVaR(0.4))
    limit = (tail.weights * (tail.weights / NOMINAL).clamp_min(1e-300).log()).sum().item()
    below = solve(KLCVaR(0.4), radius=limit * (1 - 1e-9))
    above = solve(KLCVaR(0.4), radius=limit * (1 + 1e-9))
    torch.testing.assert_close(above.weights, tail.weights, rtol=0, atol=1e-15)
    assert 0 < above.weights[4].item() < 0.2 / 0.4
    assert above.multiplier.item() == 0
    assert below.multiplier.item() > 0
    assert below.value.item() < above.value.item()


@pytest.mark.parametrize("value", [0.0, -3.0, 1000.0])
def test_equal_losses_keep_the_nominal(sized, value):
    losses = torch.full((5,), value, dtype=DOUBLE)
    levels = [sized.level(radius=radius, penalty=1e-6) for radius in (0.0, 0.4)]
    for level in levels:
        result = worst_case(losses, divergence=sized.case.divergence, nominal=NOMINAL, **level)
        torch.testing.assert_close(result.weights, NOMINAL, rtol=0, atol=1e-15)
        assert result.value.item() == pytest.approx(value, abs=1e-30)
        assert result.threshold.item() == pytest.approx(value, abs=1e-6)
        price = math.inf if level.get("radius") == 0 else 0.0
        assert result.multiplier.item() == level.get("penalty", 0.0 if price else price)
        assert result.gap.item() <= 1e-15
        assert result.status is Status.CONVERGED


def test_one_atom(sized):
    for radius in (0.0, 0.4, 30.0):
        level = sized.level(radius=radius, penalty=0.5)
        result = worst_case(torch.tensor([[-4.0]]), divergence=sized.case.divergence, **level)
        assert result.weights.tolist() == [[1.0]]
        assert result.value.tolist() == [-4.0]
        assert result.status is Status.CONVERGED


@pytest.mark.parametrize("radius", [0.0, 0.02, 0.3, 9.0])
def test_atoms_without_mass_are_as_if_absent(sized, radius):
    level = sized.level(radius=radius, penalty=0.1 + radius)
    losses = torch.tensor([99.0, 0.3, 2.0, -1e6, 1.0], dtype=DOUBLE)
    nominal = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3], dtype=DOUBLE)
    kept = torch.tensor([1, 2, 4])
    divergence = sized.case.divergence
    result = worst_case(losses, divergence=divergence, nominal=nominal, **level)
    alone = worst_case(losses[kept], divergence=divergence, nominal=nominal[kept], **level)
    assert result.weights[[0, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(result.weights[kept], alone.weights, rtol=1e-12, atol=0)
    for field in ("value", "multiplier", "threshold", "divergence", "gap"):
        torch.testing.assert_close(
            getattr(result, field), getattr(alone, field), rtol=1e-11, atol=1e-14
        )


def test_a_large_penalty_is_the_mean(priced):
    for penalty in (1e6, 1e12, 1e300):
        result = solve(priced.divergence, penalty=penalty)
        # TV stays at the mean from some penalty on.
        gain = 0.0 if priced.name == "total_variation" else VARIANCE / (2 * penalty)
        expected = MEAN + gain / priced.curvature
        assert result.value.item() == pytest.approx(expected, abs=5e-12)
        assert result.status is Status.CONVERGED


def test_a_small_penalty_is_the_worst_of_the_whole_set(priced):
    for penalty in (1e-3, 1e-12, 1e-300):
        result = solve(priced.divergence, penalty=penalty)
        # With f infinite at ratio 0 the value rises only like a power of the penalty.
        slack = {"neyman": 4 * penalty**0.5, "cressie_read_-2": 4 * penalty ** (1 / 3)}
        whole = largest(priced)
        assert result.value.item() <= whole + 1e-15
        assert result.value.item() >= whole - slack.get(priced.name, 30 * penalty) - 1e-15
        assert result.multiplier.item() == penalty
        assert result.status is Status.CONVERGED


def largest(priced) -> float:
    if not priced.is_spectral:
        return 2.0
    return solve(Spectral(priced.divergence.distortion)).value.item()


@pytest.mark.parametrize(("size", "penalty"), [(1e-300, 1e10), (1e300, 1e-10)])
def test_penalty_whose_ratio_to_the_range_overflows(priced, size, penalty):
    result = worst_case(size * LOSSES, divergence=priced.divergence, penalty=penalty)
    spectral = isinstance(priced.divergence, Spectral)
    whole = Spectral(priced.divergence.distortion) if spectral else CVaR(2 / 5)
    expected = LOSSES.mean() if size < 1 else worst_case(LOSSES, divergence=whole).value
    assert result.value.item() == pytest.approx(size * expected.item(), rel=1e-12)
    assert result.multiplier.item() == penalty
    assert result.status is Status.CONVERGED


def test_penalized_chi_square_reaches_the_maximum_at_its_closed_form():
    # Only the top is left from penalty P (l_max - l_second) downwards.
    limit = TOP * (2.0 - 1.5)
    assert solve(ChiSquare(), penalty=limit * (1 - 1e-9)).weights[4].item() == 0
    assert solve(ChiSquare(), penalty=limit * (1 + 1e-9)).weights[4].item() > 0


def test_small_radius_expansion(smooth_ball):
    deviation = math.sqrt(VARIANCE)
    for radius in (1e-4, 1e-6, 1e-8):
        value = solve(smooth_ball.divergence, radius=radius).value.item()
        expected = MEAN + math.sqrt(2 * radius / smooth_ball.curvature) * deviation
        tolerance = 1e-13 if isinstance(smooth_ball.divergence, ChiSquare) else 10 * radius
        assert value == pytest.approx(expected, abs=tolerance)
