"""Losses that are infinite or no numbers."""

import math

import pytest
import torch

from drgr.ambiguity import KL, CVaR, KLCVaR, Status, TotalVariation, worst_case

DOUBLE = torch.float64
INF = math.inf
LOSSES = torch.tensor([INF, 3.0, 2.0, 1.0, INF], dtype=DOUBLE)
NOMINAL = torch.tensor([0.1, 0.25, 0.3, 0.15, 0.2], dtype=DOUBLE)


def solve(case, losses=LOSSES, **arguments):
    return worst_case(losses, divergence=case.divergence, nominal=NOMINAL, **arguments)


def test_infinite_losses_are_refused_unless_allowed(case):
    level = {case.modes[-1]: 0.5} if case.modes else {}
    with pytest.raises(ValueError, match="losses must be finite, got inf at index 0; drop or"):
        solve(case, **level)


@pytest.mark.parametrize("bad", [-INF, math.nan])
def test_other_values_are_refused_even_if_infinite_ones_are_allowed(bad):
    losses = torch.tensor([INF, bad, 0.0])
    with pytest.raises(ValueError, match=f"losses must be finite, got {bad} at index 1; drop or"):
        worst_case(losses, divergence=KL(), penalty=1.0, allow_infinite=True)


def test_value_is_infinite_and_weights_are_a_distribution(sized):
    for size in (1e-3, 0.1, 2.0):
        level = sized.level(radius=size, penalty=size)
        result = solve(sized.case, allow_infinite=True, **level)
        assert result.value.item() == INF
        assert result.weights.sum().item() == pytest.approx(1, abs=1e-14)
        assert result.status is Status.CONVERGED
        ratio = result.weights / NOMINAL
        assert ratio[0].item() == pytest.approx(ratio[4].item(), rel=1e-13)
        assert (ratio[0] > ratio[1:4]).all()


def test_weights_are_the_limit_of_growing_losses(sized):
    """The finite losses still count where a cap, or the rank, leaves them mass to share."""
    for radius in (0.05, 0.3):
        level = sized.level(radius=radius * sized.case.curvature, penalty=1.0)
        limit = solve(sized.case, allow_infinite=True, **level)
        # Exponents of 1e12 would leave the smoothed ranks no digits.
        large = 1e5 if sized.name == "extremile_kl-penalty" else 1e12
        grown = solve(sized.case, losses=LOSSES.clamp_max(large), **level)
        # Where f is infinite at ratio 0 the other atoms die out like powers of the losses.
        slow = {"neyman-penalty": 1e-6, "cressie_read_-2-penalty": 1e-4}
        torch.testing.assert_close(
            limit.weights, grown.weights, rtol=0, atol=slow.get(sized.name, 1e-9)
        )


@pytest.mark.parametrize("level", [{"radius": 0.4}, {"penalty": 1.0}])
def test_kl_cvar_spends_what_infinite_losses_leave_on_the_finite_ones(level):
    limit, grown = (
        worst_case(losses, divergence=KLCVaR(0.6), nominal=NOMINAL, allow_infinite=True, **level)
        for losses in (LOSSES, LOSSES.clamp_max(1e8))
    )
    torch.testing.assert_close(limit.weights, grown.weights, rtol=0, atol=1e-6)


def test_cvar_takes_the_rest_of_its_tail_from_the_largest_finite_losses():
    result = worst_case(LOSSES, divergence=CVaR(0.6), nominal=NOMINAL, allow_infinite=True)
    expected = torch.tensor([0.1, 0.25, 0.05, 0.0, 0.2], dtype=DOUBLE) / 0.6
    torch.testing.assert_close(result.weights, expected)


def test_ranks_order_near_equal_finite_losses_below_infinite_ones():
    losses = torch.tensor([1.0, 1.0 + 1e-12, INF], dtype=DOUBLE)
    result = worst_case(losses, divergence=CVaR(0.5), allow_infinite=True)
    expected = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=DOUBLE)
    torch.testing.assert_close(result.weights, expected)
    result = worst_case(losses, divergence=TotalVariation(), radius=0.4, allow_infinite=True)
    expected = torch.tensor([0.0, 2 / 3 - 0.4, 1 / 3 + 0.4], dtype=DOUBLE)
    torch.testing.assert_close(result.weights, expected)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_rest_of_a_cap_does_not_depend_on_the_unit(scale):
    divergence = KLCVaR(0.6)
    for level in ({"radius": 0.4}, {"penalty": 1.0}):
        scaled = {key: size * (scale if key == "penalty" else 1) for key, size in level.items()}
        found = worst_case(LOSSES * scale, divergence=divergence, allow_infinite=True, **scaled)
        unit = worst_case(LOSSES, divergence=divergence, allow_infinite=True, **level)
        torch.testing.assert_close(found.weights, unit.weights, rtol=1e-9, atol=1e-12)


def test_only_infinite_losses_share_in_proportion_to_the_nominal(sized):
    losses = torch.full_like(LOSSES, INF)
    level = sized.level(radius=0.05, penalty=0.7)
    result = solve(sized.case, losses=losses, allow_infinite=True, **level)
    torch.testing.assert_close(result.weights, NOMINAL)
    assert result.value.item() == INF


def test_radius_zero_and_infinite_losses(ball):
    result = solve(ball, allow_infinite=True, radius=0.0)
    assert torch.equal(result.weights, NOMINAL)
    assert result.value.item() == INF


def test_infinite_losses_without_mass_do_not_count(sized):
    losses = torch.tensor([INF, 3.0, 2.0], dtype=DOUBLE)
    nominal = torch.tensor([0.0, 0.4, 0.6], dtype=DOUBLE)
    level = sized.level(radius=0.05, penalty=0.7)
    divergence = sized.case.divergence
    found = worst_case(losses, divergence=divergence, nominal=nominal, allow_infinite=True, **level)
    alone = worst_case(losses[1:], divergence=divergence, nominal=nominal[1:], **level)
    assert found.value.item() == pytest.approx(alone.value.item(), rel=1e-14)
    torch.testing.assert_close(found.weights[1:], alone.weights, rtol=1e-12, atol=0)
    assert found.weights[0].item() == 0


def test_finite_rows_of_a_batch_are_untouched(sized):
    losses = torch.stack([LOSSES, LOSSES.masked_fill(LOSSES == INF, 0.5)]).requires_grad_()
    level = sized.level(radius=0.05, penalty=0.7)
    both = solve(sized.case, losses=losses, allow_infinite=True, **level)
    alone = solve(sized.case, losses=losses[1], **level)
    assert both.value[0].item() == INF
    assert both.value[1].item() == alone.value.item()
    assert torch.equal(both.weights[1], alone.weights)
    both.value[1].backward()
    assert torch.equal(losses.grad[1], alone.weights)
    assert losses.grad[0].tolist() == [0.0] * 5
