"""Ends of the path: radius 0, saturation, equal losses, one atom, atoms without mass."""

import math

import pytest
import torch

from drgr.ambiguity import KL, ChiSquare, Status, worst_case

BOTH = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi_square"])
DOUBLE = torch.float64
LOSSES = torch.tensor([0.3, 2.0, -1.0, 2.0, 1.5], dtype=DOUBLE)
NOMINAL = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2], dtype=DOUBLE)
TOP = 0.25  # nominal mass of the two largest losses


def saturation(divergence) -> float:
    return -math.log(TOP) if isinstance(divergence, KL) else (1 / TOP - 1) / 2


@BOTH
def test_radius_zero_is_the_mean(divergence):
    result = worst_case(LOSSES, divergence=divergence, radius=0.0, nominal=NOMINAL)
    assert torch.equal(result.weights, NOMINAL)
    assert result.value.item() == pytest.approx((NOMINAL @ LOSSES).item(), abs=1e-15)
    assert result.multiplier.item() == math.inf
    assert result.threshold.item() == pytest.approx(result.value.item())
    assert result.gap.item() <= 1e-15
    assert result.status is Status.CONVERGED


@BOTH
@pytest.mark.parametrize("excess", [1 + 1e-9, 3.0, 1e9])
def test_beyond_saturation_the_largest_losses_share_by_nominal(divergence, excess):
    radius = saturation(divergence) * excess
    result = worst_case(LOSSES, divergence=divergence, radius=radius, nominal=NOMINAL)
    expected = torch.tensor([0.0, 0.4, 0.0, 0.6, 0.0], dtype=DOUBLE)
    torch.testing.assert_close(result.weights, expected, rtol=0, atol=1e-15)
    assert (result.weights[[0, 2, 4]] == 0).all()
    assert result.value.item() == 2.0
    assert result.multiplier.item() == 0.0
    assert result.divergence.item() == pytest.approx(saturation(divergence), rel=1e-12)
    assert result.status is Status.CONVERGED


@BOTH
def test_just_below_saturation_the_radius_still_has_a_price(divergence):
    radius = saturation(divergence) * (1 - 1e-9)
    result = worst_case(LOSSES, divergence=divergence, radius=radius, nominal=NOMINAL)
    assert result.status is Status.CONVERGED
    assert result.multiplier.item() > 0
    assert result.divergence.item() == pytest.approx(radius, rel=1e-11)
    assert 2.0 - 1e-6 < result.value.item() < 2.0
    torch.testing.assert_close(
        result.weights[1] / result.weights[3], torch.tensor(2 / 3, dtype=DOUBLE)
    )


@BOTH
def test_saturation_with_nearly_all_mass_at_the_top(divergence):
    # 1 - P = 1e-10: the saturation radius needs the odds, not 1/P - 1.
    nominal = torch.tensor([1 - 1e-10, 1e-10], dtype=DOUBLE)
    losses = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    limit = math.log1p(1e-10) if isinstance(divergence, KL) else 0.5e-10
    below = worst_case(losses, divergence=divergence, radius=limit * (1 - 1e-6), nominal=nominal)
    above = worst_case(losses, divergence=divergence, radius=limit * (1 + 1e-6), nominal=nominal)
    assert below.multiplier.item() > 0
    assert above.multiplier.item() == 0
    assert above.weights[1].item() == 0


@BOTH
@pytest.mark.parametrize("value", [0.0, -3.0, 1000.0])
@pytest.mark.parametrize("level", [{"radius": 0.0}, {"radius": 0.4}, {"penalty": 1e-6}])
def test_equal_losses_keep_the_nominal(divergence, value, level):
    losses = torch.full((5,), value, dtype=DOUBLE)
    result = worst_case(losses, divergence=divergence, nominal=NOMINAL, **level)
    torch.testing.assert_close(result.weights, NOMINAL, rtol=0, atol=1e-15)
    assert result.value.item() == value
    assert result.threshold.item() == pytest.approx(value, abs=1e-12)
    assert result.multiplier.item() == level.get("penalty", 0.0)
    assert result.gap.item() <= 1e-15


@BOTH
@pytest.mark.parametrize("level", [{"radius": 0.0}, {"radius": 0.4}, {"penalty": 2.0}])
def test_one_atom(divergence, level):
    result = worst_case(torch.tensor([[-4.0]]), divergence=divergence, **level)
    assert result.weights.tolist() == [[1.0]]
    assert result.value.tolist() == [-4.0]


@BOTH
@pytest.mark.parametrize(
    "level", [{"radius": 0.0}, {"radius": 0.3}, {"radius": 9.0}, {"penalty": 0.5}]
)
def test_atoms_without_mass_are_as_if_absent(divergence, level):
    losses = torch.tensor([99.0, 0.3, 2.0, -1e6, 1.0], dtype=DOUBLE)
    nominal = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3], dtype=DOUBLE)
    kept = torch.tensor([1, 2, 4])
    result = worst_case(losses, divergence=divergence, nominal=nominal, **level)
    alone = worst_case(losses[kept], divergence=divergence, nominal=nominal[kept], **level)
    assert result.weights[[0, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(result.weights[kept], alone.weights, rtol=1e-12, atol=0)
    for field in ("value", "multiplier", "threshold", "divergence", "gap"):
        torch.testing.assert_close(
            getattr(result, field), getattr(alone, field), rtol=1e-11, atol=1e-14
        )


@BOTH
def test_penalty_to_infinity_is_the_mean_and_to_zero_the_maximum(divergence):
    def solve(penalty):
        return worst_case(LOSSES, divergence=divergence, penalty=penalty, nominal=NOMINAL)

    mean = (NOMINAL @ LOSSES).item()
    variance = (NOMINAL @ (LOSSES - mean) ** 2).item()
    for penalty in (1e6, 1e12, 1e300):
        result = solve(penalty)
        assert result.value.item() == pytest.approx(mean + variance / (2 * penalty), abs=1e-12)
        assert result.status is Status.CONVERGED
    for penalty in (1e-3, 1e-12, 1e-300):
        result = solve(penalty)
        assert result.value.item() == pytest.approx(2.0, abs=3 * penalty + 1e-15)
        assert result.status is Status.CONVERGED


@BOTH
@pytest.mark.parametrize(("size", "penalty"), [(1e-300, 1e10), (1e300, 1e-10)])
def test_penalty_whose_ratio_to_the_range_overflows(divergence, size, penalty):
    result = worst_case(size * LOSSES, divergence=divergence, penalty=penalty)
    expected = LOSSES.mean() if size < 1 else LOSSES.max()
    assert result.value.item() == pytest.approx(size * expected.item(), rel=1e-12)
    assert result.multiplier.item() == penalty
    assert result.status is Status.CONVERGED


def test_penalized_chi_square_reaches_the_maximum_at_its_closed_form():
    # Only the top is left from penalty P (l_max - l_second) downwards.
    limit = TOP * (2.0 - 1.5)
    at = {"divergence": ChiSquare(), "nominal": NOMINAL}
    assert worst_case(LOSSES, penalty=limit * (1 - 1e-9), **at).weights[4].item() == 0
    assert worst_case(LOSSES, penalty=limit * (1 + 1e-9), **at).weights[4].item() > 0


@BOTH
def test_small_radius_expansion(divergence):
    losses, mean = LOSSES, (NOMINAL @ LOSSES).item()
    deviation = math.sqrt((NOMINAL @ (losses - mean) ** 2).item())
    for radius in (1e-4, 1e-6, 1e-8):
        value = worst_case(losses, divergence=divergence, radius=radius, nominal=NOMINAL).value
        expected = mean + math.sqrt(2 * radius) * deviation
        tolerance = 1e-13 if isinstance(divergence, ChiSquare) else 2 * radius
        assert value.item() == pytest.approx(expected, abs=tolerance)


@BOTH
def test_empty_batches(divergence):
    for level in ({"radius": 0.1}, {"penalty": 1.0}):
        result = worst_case(torch.zeros(2, 0, 4), divergence=divergence, **level)
        assert result.value.shape == (2, 0)
        assert result.weights.shape == (2, 0, 4)
