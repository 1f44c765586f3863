"""Defects measured in other libraries, each with the case that shows it."""

import numpy as np
import pytest
import torch

from drgr.ambiguity import KL, ChiSquare, CVaR, Spectral, Status, TotalVariation, worst_case

DOUBLE = torch.float64
TEN = torch.arange(1.0, 11.0, dtype=DOUBLE)


@pytest.mark.parametrize("radius", [0.005, 0.05])
def test_a_small_ball_is_not_silently_empirical_risk(smooth_ball, radius):
    """An absolute tolerance of 1e-2 on the divergence returns uniform weights."""
    losses = torch.from_numpy(np.random.default_rng(3).exponential(size=1000))
    radius = radius * smooth_ball.curvature
    result = worst_case(losses, divergence=smooth_ball.divergence, radius=radius)
    assert result.divergence.item() == pytest.approx(radius, rel=1e-9)
    gain = (result.value - losses.mean()).item()
    expansion = np.sqrt(2 * radius / smooth_ball.curvature) * losses.std().item()
    assert 0.6 * expansion < gain < 3 * expansion


def test_weights_sum_to_one(sized):
    """Regularised bisections were off by up to 9.4e-3."""
    losses = torch.from_numpy(np.random.default_rng(4).exponential(size=(3, 1000)))
    for scale in (1e-6, 1.0):
        level = sized.level(radius=0.05 * scale, penalty=0.3 * scale)
        weights = worst_case(losses, divergence=sized.case.divergence, **level).weights
        np.testing.assert_allclose(weights.sum(-1).numpy(), 1, rtol=0, atol=1e-13)


def test_the_ball_is_never_left(ball):
    """A bisection that stops outside exceeded it by 3 %."""
    losses = torch.from_numpy(np.random.default_rng(5).exponential(size=(4, 200)))
    radius = torch.tensor([1e-8, 1e-3, 0.05, 0.3], dtype=DOUBLE)
    weights = worst_case(losses, divergence=ball.divergence, radius=radius).weights.numpy()
    nominal = np.full(200, 1 / 200)
    for row, limit in zip(weights, radius.tolist(), strict=True):
        assert ball.exact.divergence(row, nominal) <= limit * (1 + 1e-9) + 1e-15


def test_all_negative_losses_are_not_silently_uniform(sized):
    """A stopping rule relative to the largest loss is met at once where that is negative."""
    losses = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    level = sized.level(radius=0.2 * sized.case.curvature, penalty=0.8)
    positive = worst_case(losses, divergence=sized.case.divergence, **level)
    negative = worst_case(losses - 100, divergence=sized.case.divergence, **level)
    torch.testing.assert_close(negative.weights, positive.weights, rtol=1e-12, atol=0)
    assert negative.weights[2] > 0.45


def test_all_zero_losses_give_the_nominal_and_no_nan(sized):
    level = sized.level(radius=0.1, penalty=1.0)
    result = worst_case(torch.zeros(4), divergence=sized.case.divergence, **level)
    torch.testing.assert_close(result.weights, torch.full((4,), 0.25))
    assert result.value.item() == pytest.approx(0, abs=1e-30)
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize(("level", "value"), [(0.25, 9.2), (0.15, 29 / 3), (0.2, 9.5)])
def test_cvar_has_the_fractional_atom(level, value):
    """Uniform weights over the threshold set give 9.0, 9.5 and 9.5."""
    result = worst_case(TEN, divergence=CVaR(level))
    assert result.value.item() == pytest.approx(value, abs=1e-14)
    torch.testing.assert_close(result.weights @ TEN, result.value, rtol=1e-14, atol=0)
    taken = int(level * 10)
    assert result.weights[9 - taken].item() == pytest.approx(1 - taken / 10 / level, abs=1e-14)


@pytest.mark.parametrize(("radius", "value"), [(0.25, 7.55), (0.2, 7.2), (0.9, 10.0), (0.95, 10.0)])
def test_total_variation_has_the_fractional_atom(radius, value):
    """Whole atoms alone give 7.375 at radius 0.25."""
    result = worst_case(TEN, divergence=TotalVariation(), radius=radius)
    assert result.value.item() == pytest.approx(value, abs=1e-14)
    assert result.weights.shape == (10,)


def test_chi_square_is_half_of_pearsons():
    """One library calls both Pearson's statistic and half of it epsilon."""
    weights = worst_case(TEN, divergence=ChiSquare(), radius=0.1).weights
    assert (10 * (weights - 0.1).square()).sum().item() == pytest.approx(2 * 0.1, rel=1e-12)


@pytest.mark.parametrize("offset", [1000.0, -1000.0, 1e6])
def test_an_offset_changes_no_weight(sized, offset):
    """Logarithms of unscaled exponentials turn an offset of 1000 into weights of 0."""
    losses = torch.tensor([0.5, 1.25, 3.0, 2.0], dtype=DOUBLE)
    level = sized.level(radius=0.1, penalty=0.5)
    plain = worst_case(losses, divergence=sized.case.divergence, **level)
    moved = worst_case(losses + offset, divergence=sized.case.divergence, **level)
    assert torch.equal(plain.weights, moved.weights)
    assert moved.value.item() == pytest.approx(plain.value.item() + offset, rel=1e-15)


def test_a_size_means_the_same_for_every_batch_size(sized):
    """A penalty on ``||q - 1/n||^2``, which is no divergence, gave 1.75 to 2.5 here."""
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE)
    level = sized.level(radius=0.1, penalty=2.0)
    values = [
        worst_case(losses.repeat(times), divergence=sized.case.divergence, **level).value.item()
        for times in (1, 4, 16, 64)
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-13)


def test_ties_share_in_proportion_to_the_nominal(sized):
    """Ranks by a double sort give four equal losses the weights 0, 0, 1/2, 1/2."""
    losses = torch.tensor([7.0, 7.0, 3.0, 7.0, 3.0], dtype=DOUBLE)
    nominal = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.35], dtype=DOUBLE)
    for scale in (0.01, 1.0):
        level = sized.level(radius=0.1 * scale, penalty=3 * scale)
        weights = worst_case(
            losses, divergence=sized.case.divergence, nominal=nominal, **level
        ).weights
        ratio = (weights / nominal).tolist()
        assert ratio[1] == pytest.approx(ratio[0], rel=1e-13)
        assert ratio[3] == pytest.approx(ratio[0], rel=1e-13)
        assert ratio[4] == pytest.approx(ratio[2], rel=1e-13)


@pytest.mark.parametrize("smoothing", [None, KL(), ChiSquare()], ids=["plain", "kl", "chi_square"])
def test_groups_without_an_entry_in_the_batch_have_no_weight(smoothing):
    """One library asserts that every group is present; here an absent one has no mass."""
    losses = torch.tensor([1.0, 4.0, 0.0, 2.0], dtype=DOUBLE)
    counts = torch.tensor([3.0, 2.0, 0.0, 5.0], dtype=DOUBLE)
    divergence = Spectral.extremile(2.0, smoothing)
    level = {} if smoothing is None else {"penalty": 0.5}
    groups = worst_case(losses, divergence=divergence, nominal=counts / 10, **level)
    assert groups.weights[2].item() == 0
    each = worst_case(losses.repeat_interleave(counts.long()), divergence=divergence, **level)
    assert groups.value.item() == pytest.approx(each.value.item(), rel=1e-13)
    sums = torch.stack([part.sum() for part in each.weights.split(counts.long().tolist())])
    torch.testing.assert_close(groups.weights, sums, rtol=1e-12, atol=1e-15)
