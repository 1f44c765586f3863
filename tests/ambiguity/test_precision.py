"""Digits: tiny radii, skewed nominals, float32 and half types, and what a solve costs."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drgr.ambiguity import KL, ChiSquare, CVaR, Spectral, Status, worst_case

DOUBLE = torch.float64


def exact_divergence(case, weights, nominal) -> float:
    """Divergence of the returned digits, in 60-digit arithmetic."""
    with localcontext(prec=60):
        total = Decimal(0)
        for q, p in zip(weights.tolist(), nominal.tolist(), strict=True):
            ratio = Decimal(q) / Decimal(p)
            total += Decimal(p) * (
                case.exact.generator(ratio) if q else Decimal(case.exact.at_zero)
            )
        return float(total)


def reach_of(losses):
    reach = losses.amax(-1) - losses.amin(-1)
    return torch.where(reach > 0, reach, 1.0)


@pytest.mark.parametrize("radius", [1e-14, 1e-10, 1e-6, 1e-2])
def test_tiny_radii_are_met_to_relative_precision(ball, radius):
    losses = torch.linspace(-1, 1, 32, dtype=DOUBLE) ** 3
    nominal = torch.full((32,), 1 / 32, dtype=DOUBLE)
    result = worst_case(losses, divergence=ball.divergence, radius=radius)
    assert result.divergence.item() == pytest.approx(radius, rel=1e-11)
    # One rounding of each weight is all that separates the two.
    rounding = 4e-16 / (radius if ball.name == "total_variation" else math.sqrt(radius))
    exact = exact_divergence(ball, result.weights, nominal)
    assert exact == pytest.approx(radius, rel=1e-11 + rounding)


@pytest.mark.parametrize("radius", [1e-14, 1e-10, 1e-6])
def test_multiplier_of_tiny_radii(smooth_ball, radius):
    losses = torch.linspace(-1, 1, 32, dtype=DOUBLE) ** 3
    result = worst_case(losses, divergence=smooth_ball.divergence, radius=radius)
    slope = losses.std(correction=0).item() / math.sqrt(2 * radius * smooth_ball.curvature)
    assert result.multiplier.item() == pytest.approx(slope, rel=1e-9 + 12 * math.sqrt(radius))


def test_constrained_weights_do_not_see_the_scale_of_the_losses(ball):
    z = torch.randn(22, dtype=DOUBLE)
    plain = worst_case(3 + z, divergence=ball.divergence, radius=0.1)
    near_equal = worst_case(3 + 1e-6 * z, divergence=ball.divergence, radius=0.1)
    assert (plain.weights - near_equal.weights).abs().sum() < 1e-8


def test_penalized_weights_fade_with_the_scale_of_the_losses(priced):
    z = torch.randn(22, dtype=DOUBLE)
    faded = worst_case(3 + 1e-6 * z, divergence=priced.divergence, penalty=1.0)
    assert (faded.weights - 1 / 22).abs().sum() < 2e-6 / priced.curvature


def test_hard_instances_keep_a_tiny_gap(sized):
    """Skewed nominal down to 1e-40, ties, scales 1e-4 to 1e4, radii 1e-9 to 10."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(12):
        n, power, offset = (2, 5, 50, 300)[trial % 4], (1, 4, 20)[trial // 4], trial % 2 * 1000
        losses = torch.randn(16, n, dtype=DOUBLE, generator=generator) * 10.0 ** (trial % 9 - 4)
        if trial % 5 == 0:
            losses = losses.round(decimals=1)
        nominal = torch.rand(16, n, dtype=DOUBLE, generator=generator) ** power
        nominal /= nominal.sum(-1, keepdim=True)
        radius = 10 ** (torch.rand(16, dtype=DOUBLE, generator=generator) * 10 - 9)
        level = sized.level(radius=radius, penalty=100 * radius)
        losses = losses + offset
        result = worst_case(losses, divergence=sized.case.divergence, nominal=nominal, **level)
        assert result.status is Status.CONVERGED
        assert (result.gap / reach_of(losses)).max() < 1e-11
        torch.testing.assert_close(result.weights.sum(-1), torch.ones(16, dtype=DOUBLE))
        if sized.mode == "radius":
            assert (result.divergence <= radius * (1 + 1e-12)).all()
            # Jensen-Shannon finds tiny radii to rounding of the weights; a multiplier that
            # underflows belongs to weights that do.
            used_up = result.divergence >= radius * (1 - 1e-9) - 1e-15
            assert (used_up | (result.multiplier / reach_of(losses) < 1e-280)).all()


def test_a_range_set_by_an_atom_of_hardly_any_mass(ball):
    # The weights differ on a scale of 1e-9 of the range: an absolute error would show.
    losses = torch.tensor([140.0, 77.0, 60.0, 22.0, 716.0], dtype=DOUBLE)
    nominal = torch.tensor([0.97, 0.03, 3.7e-19, 3.7e-11, 5.5e-45], dtype=DOUBLE)
    radius = torch.tensor([0.005, 0.01, 0.02, 0.0247], dtype=DOUBLE)
    radius = radius * ball.curvature
    result = worst_case(
        losses.expand(4, 5), divergence=ball.divergence, radius=radius, nominal=nominal
    )
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.divergence, radius, rtol=1e-11, atol=0)


def test_kl_across_plateaus_of_the_divergence():
    # The divergence stalls near -log of each nested mass: Newton's step leaves the bracket there.
    losses = torch.tensor([0.0, -1e-9, -1e-4, -1.0], dtype=DOUBLE)
    nominal = torch.tensor([1e-4, 0.1, 0.3, 0.5999], dtype=DOUBLE)
    radius = torch.logspace(-6, 0.96, 60, dtype=DOUBLE)
    result = worst_case(losses.expand(60, 4), divergence=KL(), radius=radius, nominal=nominal)
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.divergence, radius, rtol=1e-10, atol=0)


@pytest.mark.parametrize("order", [-5.0, -1e-7, 1e-7, 1e-3, 1 - 1e-9, 1 + 1e-9, 2.0, 12.0, 50.0])
def test_orders_near_and_far_from_the_named_ones(oracles, order):
    losses = torch.randn(4, 30, dtype=DOUBLE)
    radius = torch.tensor([1e-12, 1e-7, 1e-3, 0.1], dtype=DOUBLE)
    divergence = oracles.CressieRead(order)
    result = worst_case(losses, divergence=divergence, radius=radius)
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.divergence, radius, rtol=1e-11, atol=0)
    assert worst_case(losses, divergence=divergence, penalty=1e3 * radius).status.succeeded


@pytest.mark.parametrize("level", [0.05, 0.25, 0.5, 0.9, 1.0])
def test_kl_cvar_with_the_cap_exactly_at_an_atom(oracles, level):
    """Uniform masses of which a whole number fills the tail, and penalties far below the range."""
    losses = torch.randn(12, 40, dtype=DOUBLE).round(decimals=1)
    penalty = 10.0 ** -torch.arange(1.0, 13.0, dtype=DOUBLE)
    result = worst_case(losses, divergence=oracles.KLCVaR(level), penalty=penalty)
    assert result.status is Status.CONVERGED
    tail = worst_case(losses, divergence=CVaR(level)).value
    assert (result.value <= tail + 1e-14).all()
    assert (tail - result.value <= penalty * math.log(1 / level) + 1e-14).all()


# Element types


def test_float32_losses_of_ten_thousand_atoms(sized):
    losses = torch.from_numpy(np.random.default_rng(0).exponential(size=10_000)).float()
    for radius in (0.003, 0.1):
        level = sized.level(radius=radius, penalty=1.0 + radius)
        single = worst_case(losses, divergence=sized.case.divergence, **level)
        double = worst_case(losses.double(), divergence=sized.case.divergence, **level)
        assert single.weights.dtype == single.value.dtype == single.gap.dtype == torch.float32
        assert single.status is Status.CONVERGED
        assert single.gap.item() <= 1e-5 * (losses.max() - losses.min()).item()
        assert (single.weights.double() - double.weights).abs().sum() < 1e-6
        assert single.value.item() == pytest.approx(double.value.item(), rel=1e-6)


@pytest.mark.parametrize(
    "divergence",
    [KL(), ChiSquare(), Spectral.extremile(3.0), Spectral.exponential(4.0), CVaR(0.1)],
    ids=["kl", "chi_square", "extremile", "exponential", "cvar"],
)
def test_float32_losses_of_a_hundred_thousand_atoms(divergence):
    """Running sums in float32 lose 1.7e-2 of chi-square weights, 3e-3 of spectral ones."""
    losses = torch.from_numpy(np.random.default_rng(0).exponential(size=100_000)).float()
    level = {"radius": 0.1} if isinstance(divergence, KL | ChiSquare) else {}
    single = worst_case(losses, divergence=divergence, **level)
    double = worst_case(losses.double(), divergence=divergence, **level)
    assert (single.weights.double() - double.weights).abs().sum() < 1e-6
    assert single.value.item() == pytest.approx(double.value.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_full_precision(sized, dtype):
    losses = torch.tensor([8.0, 8.25, 7.5], dtype=dtype)
    level = sized.level(radius=0.1, penalty=0.3)
    result = worst_case(losses, divergence=sized.case.divergence, **level)
    expected = worst_case(losses.double(), divergence=sized.case.divergence, **level)
    assert result.weights.dtype == result.value.dtype == torch.float32
    torch.testing.assert_close(result.weights, expected.weights.float())
    torch.testing.assert_close(result.value, expected.value.float())


# Cost


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_solve_takes_few_operations(sized):
    """Some 8 evaluations of some 50 operations; a search that stalls takes 200 evaluations."""
    losses = torch.from_numpy(np.random.default_rng(1).exponential(size=(3, 500)))
    radius = torch.tensor([1e-6, 0.1, 0.3], dtype=DOUBLE)
    with Operations() as operations:
        worst_case(
            losses,
            divergence=sized.case.divergence,
            **sized.level(radius=radius * sized.case.curvature, penalty=1.0),
        )
    assert operations.count < (10_000 if sized.name == "jensen_shannon-radius" else 4_000)
