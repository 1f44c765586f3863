"""Bad arguments: each is refused with its name, its value and a remedy."""

import math

import pytest
import torch

from drgr.ambiguity import (
    KL,
    AlphaDivergence,
    ChiSquare,
    CressieRead,
    CVaR,
    KLCVaR,
    Spectral,
    worst_case,
)

LOSSES = torch.tensor([1.0, 2.0, 3.0])


def solve(losses=LOSSES, **arguments):
    return worst_case(losses, divergence=KL(), **({"penalty": 1.0} | arguments))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_losses_name_the_index(bad):
    losses = torch.zeros(4)
    losses[2] = bad
    with pytest.raises(ValueError, match=rf"losses must be finite, got {bad} at index 2; drop"):
        solve(losses)
    batch = torch.zeros(3, 4)
    batch[1, 3] = bad
    with pytest.raises(ValueError, match=rf"got {bad} at index \(1, 3\)"):
        solve(batch)


def test_integer_losses():
    with pytest.raises(TypeError, match=r"losses must be a floating-point tensor, got torch.int64"):
        solve(torch.tensor([1, 2]))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_losses_without_atoms(shape):
    with pytest.raises(ValueError, match=r"losses must have shape \(..., n\) with n >= 1"):
        solve(torch.zeros(shape))


def test_losses_whose_range_overflows():
    with pytest.raises(ValueError, match="losses must span a range that float64 can hold"):
        solve(torch.tensor([-1.5e308, 1.5e308], dtype=torch.float64))


@pytest.mark.parametrize("level", [{}, {"radius": 0.1, "penalty": 1.0}])
def test_exactly_one_level(level):
    with pytest.raises(ValueError, match="exactly one of radius and penalty must be given"):
        worst_case(LOSSES, divergence=ChiSquare(), **level)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, torch.tensor([0.1, -0.2])])
def test_radius_out_of_range(bad):
    with pytest.raises(ValueError, match="radius must be a finite number of at least 0, got"):
        worst_case(torch.zeros(2, 3), divergence=KL(), radius=bad)


@pytest.mark.parametrize(
    "bad",
    [0.0, -1.0, math.nan, math.inf, *(torch.tensor([1.0, x]) for x in (0.0, math.nan, math.inf))],
)
def test_penalty_out_of_range(bad):
    with pytest.raises(ValueError, match="penalty must be a finite number above 0, got"):
        worst_case(torch.zeros(2, 3), divergence=KL(), penalty=bad)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (1, 1, 2)])
def test_level_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="radius must be a number or broadcast"):
        worst_case(torch.zeros(2, 3)[0:1].expand(3, 3), divergence=KL(), radius=torch.ones(shape))


def test_level_of_an_empty_batch_may_be_empty():
    for name in ("radius", "penalty"):
        result = worst_case(torch.zeros(0, 3), divergence=KL(), **{name: torch.zeros(0)})
        assert result.value.shape == (0,)


def test_nominal_of_a_wrong_dtype():
    with pytest.raises(
        TypeError, match=r"nominal must be a floating-point tensor, got torch.int64"
    ):
        solve(nominal=torch.tensor([1, 0, 0]))


@pytest.mark.parametrize("nominal", [torch.ones(2) / 2, torch.tensor(1.0), torch.ones(2, 3) / 3])
def test_nominal_of_a_wrong_shape(nominal):
    with pytest.raises(
        ValueError, match=r"nominal must have shape \(n,\) or that of losses \(3,\)"
    ):
        solve(nominal=nominal)


@pytest.mark.parametrize("bad", [-0.2, math.nan, math.inf])
def test_nominal_with_a_bad_entry(bad):
    with pytest.raises(ValueError, match=rf"finite and not negative, got {bad}.* at index 1; give"):
        solve(nominal=torch.tensor([0.6, bad, 0.6], dtype=torch.float64))


def test_nominal_that_does_not_sum_to_one():
    with pytest.raises(ValueError, match=r"nominal must sum to 1, got a sum of 1.5; divide"):
        solve(nominal=torch.tensor([0.5, 0.5, 0.5]))


def test_nominal_in_float32_is_renormalized():
    nominal = torch.full((3,), 1 / 3) * (1 + 3e-5)
    result = solve(LOSSES.double(), nominal=nominal)
    assert result.weights.sum().item() == pytest.approx(1, abs=1e-15)


# Divergences


@pytest.mark.parametrize("kind", [CVaR, KLCVaR, Spectral.superquantile])
@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_level_of_a_tail_out_of_range(kind, bad):
    with pytest.raises(ValueError, match=rf"level must lie in \(0, 1\], got {bad}; give the mass"):
        kind(bad)


@pytest.mark.parametrize("bad", [50.5, -51.0, math.nan, math.inf])
def test_order_of_cressie_read_out_of_range(bad):
    with pytest.raises(
        ValueError, match=rf"power must be a finite number of at most 50 in magnitude, got {bad}; "
    ):
        CressieRead(bad)


@pytest.mark.parametrize("bad", [100.0, -102.0, math.nan, -math.inf])
def test_alpha_out_of_range(bad):
    with pytest.raises(
        ValueError, match=r"\(1 \+ alpha\) / 2 must be .* at most 50 .*; choose alpha between"
    ):
        AlphaDivergence(bad)


@pytest.mark.parametrize("level", [{"radius": 0.1}, {"penalty": 1.0}])
@pytest.mark.parametrize("divergence", [CVaR(0.5), Spectral.extremile(2.0)], ids=["cvar", "rank"])
def test_sets_of_one_size_refuse_another(divergence, level):
    with pytest.raises(ValueError, match="fixes its own size; give neither radius nor penalty"):
        worst_case(LOSSES, divergence=divergence, **level)


def test_smoothed_spectral_risk_takes_a_penalty_only():
    divergence = Spectral.extremile(2.0, KL())
    with pytest.raises(ValueError, match="takes a penalty and no radius; give one in loss units"):
        worst_case(LOSSES, divergence=divergence, radius=0.1)
    with pytest.raises(ValueError, match="exactly one of radius and penalty must be given"):
        worst_case(LOSSES, divergence=divergence)


@pytest.mark.parametrize("bad", [0.9, math.nan, math.inf])
def test_order_of_an_extremile_out_of_range(bad):
    with pytest.raises(ValueError, match=f"order must be a finite number of at least 1, got {bad}"):
        Spectral.extremile(bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_rate_out_of_range(bad):
    with pytest.raises(ValueError, match=f"rate must be a finite number above 0, got {bad}"):
        Spectral.exponential(bad)


@pytest.mark.parametrize(
    "bad",
    [(), (0.6, 0.4), (-0.1, 1.1), (0.3, 0.5), (math.nan, 0.5), (0.2, 0.3, math.inf)],
    ids=str,
)
def test_spectrum_that_is_none(bad):
    with pytest.raises(
        ValueError, match="spectrum must be nonnegative, nondecreasing and sum to 1, got"
    ):
        Spectral.from_weights(bad)


@pytest.mark.parametrize(
    "bad",
    [
        lambda mass: mass**2,
        lambda mass: 0.1 + 0.9 * mass,
        lambda mass: 0.9 * mass,
        lambda mass: 4 * mass * (1 - mass) + mass,
    ],
    ids=["convex", "not_0_at_0", "not_1_at_1", "decreasing"],
)
def test_distortion_that_is_none(bad):
    with pytest.raises(
        ValueError, match=r"distortion must be concave and nondecreasing from 0 .* got \[.*; give g"
    ):
        Spectral(bad)
