"""Precision traps, and defects of existing libraries that must not be repeated here."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from drgr.ambiguity import KL, ChiSquare, Status, worst_case

BOTH = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi_square"])
DOUBLE = torch.float64


def exact_divergence(divergence, weights, nominal) -> float:
    """Divergence of the returned digits, in 60-digit arithmetic."""
    with localcontext(prec=60):
        total = Decimal(0)
        for q_float, p_float in zip(weights.tolist(), nominal.tolist(), strict=True):
            q, p = Decimal(q_float), Decimal(p_float)
            if isinstance(divergence, ChiSquare):
                total += (q - p) ** 2 / p / 2
            else:
                total += (q * (q / p).ln() if q else Decimal(0)) - q + p
        return float(total)


@BOTH
@pytest.mark.parametrize("radius", [1e-14, 1e-10, 1e-6, 1e-2])
def test_tiny_radii_are_met_to_relative_precision(divergence, radius):
    losses = torch.linspace(-1, 1, 32, dtype=DOUBLE) ** 3
    nominal = torch.full((32,), 1 / 32, dtype=DOUBLE)
    result = worst_case(losses, divergence=divergence, radius=radius)
    assert result.divergence.item() == pytest.approx(radius, rel=1e-11)
    # One rounding of each weight is all that separates the two.
    rounding = 4e-16 / np.sqrt(radius)
    exact = exact_divergence(divergence, result.weights, nominal)
    assert exact == pytest.approx(radius, rel=1e-11 + rounding)
    deviation = losses.std(correction=0).item()
    assert result.multiplier.item() == pytest.approx(
        deviation / np.sqrt(2 * radius), rel=1e-9 + 3 * np.sqrt(radius)
    )


@BOTH
def test_constrained_weights_do_not_see_the_scale_of_the_losses(divergence):
    z = torch.randn(22, dtype=DOUBLE)
    plain = worst_case(3 + z, divergence=divergence, radius=0.1)
    near_equal = worst_case(3 + 1e-6 * z, divergence=divergence, radius=0.1)
    assert (plain.weights - near_equal.weights).abs().sum() < 1e-8
    # The penalised adversary fades instead.
    faded = worst_case(3 + 1e-6 * z, divergence=divergence, penalty=1.0)
    assert (faded.weights - 1 / 22).abs().sum() < 2e-6


@BOTH
@pytest.mark.parametrize("radius", [0.003, 0.1, 1.0])
def test_float32_losses_of_a_hundred_thousand_atoms(divergence, radius):
    rng = np.random.default_rng(0)
    losses = torch.from_numpy(rng.exponential(size=100_000)).float()
    single = worst_case(losses, divergence=divergence, radius=radius)
    double = worst_case(losses.double(), divergence=divergence, radius=radius)
    assert single.weights.dtype == single.value.dtype == single.gap.dtype == torch.float32
    assert (single.weights.double() - double.weights).abs().sum() < 1e-6
    assert single.value.item() == pytest.approx(double.value.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_full_precision(dtype):
    losses = torch.tensor([8.0, 8.25, 7.5], dtype=dtype)
    result = worst_case(losses, divergence=KL(), radius=0.1)
    expected = worst_case(losses.double(), divergence=KL(), radius=0.1)
    assert result.weights.dtype == torch.float32
    torch.testing.assert_close(result.weights, expected.weights.float())


@BOTH
def test_hard_instances_keep_a_tiny_gap(divergence):
    """Skewed nominal down to 1e-40, ties, scales 1e-4 to 1e4, radii 1e-9 to 10."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(120):
        n, power, offset = (2, 5, 50, 300)[trial % 4], (1, 4, 20)[trial // 4 % 3], trial % 2 * 1000
        losses = torch.randn(16, n, dtype=DOUBLE, generator=generator) * 10.0 ** (trial % 9 - 4)
        if trial % 5 == 0:
            losses = losses.round(decimals=1)
        nominal = torch.rand(16, n, dtype=DOUBLE, generator=generator) ** power
        nominal /= nominal.sum(-1, keepdim=True)
        radius = 10 ** (torch.rand(16, dtype=DOUBLE, generator=generator) * 10 - 9)
        for level in ({"radius": radius}, {"penalty": 100 * radius}):
            result = worst_case(losses + offset, divergence=divergence, nominal=nominal, **level)
            reach = (losses.amax(-1) - losses.amin(-1)).clamp_min(1e-300)
            assert result.status is Status.CONVERGED
            assert (result.gap / reach).max() < 1e-11
            if "radius" in level:
                assert (result.divergence <= radius * (1 + 1e-12)).all()
                used_up = result.divergence >= radius * (1 - 1e-9)
                assert (used_up | (result.multiplier == 0)).all()


@BOTH
def test_a_range_set_by_an_atom_of_hardly_any_mass(divergence):
    # The weights differ on a scale of 1e-9 of the range: an absolute error would show.
    losses = torch.tensor([140.0, 77.0, 60.0, 22.0, 716.0], dtype=DOUBLE)
    nominal = torch.tensor([0.97, 0.03, 3.7e-19, 3.7e-11, 5.5e-45], dtype=DOUBLE)
    radius = torch.tensor([0.016, 0.02, 0.0247, 0.1, 2.0], dtype=DOUBLE)
    result = worst_case(losses.expand(5, 5), divergence=divergence, radius=radius, nominal=nominal)
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.divergence, radius, rtol=1e-12, atol=0)


def test_kl_across_plateaus_of_the_divergence():
    # The divergence stalls near -log of each nested mass: Newton's step leaves the bracket there.
    losses = torch.tensor([0.0, -1e-9, -1e-4, -1.0], dtype=DOUBLE)
    nominal = torch.tensor([1e-4, 0.1, 0.3, 0.5999], dtype=DOUBLE)
    radius = torch.logspace(-6, 0.96, 60, dtype=DOUBLE)
    result = worst_case(losses.expand(60, 4), divergence=KL(), radius=radius, nominal=nominal)
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.divergence, radius, rtol=1e-10, atol=0)


# Defects measured in other libraries


@BOTH
@pytest.mark.parametrize("radius", [0.005, 0.05])
def test_a_small_ball_is_not_silently_empirical_risk(divergence, radius):
    losses = torch.from_numpy(np.random.default_rng(3).exponential(size=1000))
    result = worst_case(losses, divergence=divergence, radius=radius)
    assert result.divergence.item() == pytest.approx(radius, rel=1e-9)
    gain = (result.value - losses.mean()).item()
    assert gain == pytest.approx(np.sqrt(2 * radius) * losses.std().item(), rel=0.15)


@BOTH
def test_all_negative_losses_are_not_silently_uniform(divergence):
    losses = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    positive = worst_case(losses, divergence=divergence, radius=0.2)
    negative = worst_case(losses - 100, divergence=divergence, radius=0.2)
    torch.testing.assert_close(negative.weights, positive.weights, rtol=1e-12, atol=0)
    assert negative.weights[2] > 0.5


@BOTH
@pytest.mark.parametrize("level", [{"radius": 0.1}, {"penalty": 1.0}])
def test_all_zero_losses_give_the_nominal_and_no_nan(divergence, level):
    result = worst_case(torch.zeros(4), divergence=divergence, **level)
    assert result.weights.tolist() == [0.25] * 4
    assert result.value.item() == 0


@BOTH
@pytest.mark.parametrize("level", [{"radius": 0.1}, {"penalty": 0.5}])
@pytest.mark.parametrize("offset", [1000.0, -1000.0, 1e6])
def test_an_offset_changes_no_weight(divergence, level, offset):
    losses = torch.tensor([0.5, 1.25, 3.0, 2.0], dtype=DOUBLE)
    plain = worst_case(losses, divergence=divergence, **level)
    moved = worst_case(losses + offset, divergence=divergence, **level)
    assert torch.equal(plain.weights, moved.weights)
    assert moved.value.item() == pytest.approx(plain.value.item() + offset, rel=1e-15)


@BOTH
def test_a_penalty_means_the_same_for_every_batch_size(divergence):
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE)
    values = [
        worst_case(losses.repeat(times), divergence=divergence, penalty=2.0).value.item()
        for times in (1, 4, 16, 64)
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-14)
