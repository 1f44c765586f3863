"""Bad arguments: each is refused with its name, its value and a remedy."""

import math

import pytest
import torch

from drgr.ambiguity import KL, ChiSquare, worst_case

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
