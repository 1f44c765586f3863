"""Batches: the same as their rows, of any shape, also without any."""

import pytest
import torch

from drgr.ambiguity import worst_case

DOUBLE = torch.float64
FIELDS = ("value", "weights", "multiplier", "threshold", "divergence")


def test_a_batch_equals_its_rows(sized):
    losses = torch.randn(3, 4, 6, dtype=DOUBLE)
    nominal = torch.rand(3, 1, 6, dtype=DOUBLE)
    nominal[1, 0, 2] = 0.0
    nominal /= nominal.sum(-1, keepdim=True)
    radius = torch.tensor([0.0, 1e-3, 0.3, 50.0], dtype=DOUBLE)
    level = sized.level(radius=radius, penalty=radius + 0.1)
    divergence = sized.case.divergence
    together = worst_case(losses, divergence=divergence, nominal=nominal, **level)
    assert together.value.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            row = {name: value[j].item() for name, value in level.items()}
            alone = worst_case(losses[i, j], divergence=divergence, nominal=nominal[i, 0], **row)
            for field in FIELDS:
                torch.testing.assert_close(
                    getattr(together, field)[i, j], getattr(alone, field), rtol=1e-9, atol=1e-12
                )


def test_a_uniform_nominal_may_be_left_out(sized):
    losses = torch.randn(5, 9, dtype=DOUBLE).round(decimals=1)
    level = sized.level(radius=0.1, penalty=0.4)
    given = torch.full((9,), 1 / 9, dtype=DOUBLE)
    short = worst_case(losses, divergence=sized.case.divergence, **level)
    long = worst_case(losses, divergence=sized.case.divergence, nominal=given, **level)
    for field in FIELDS:
        torch.testing.assert_close(getattr(short, field), getattr(long, field))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 1)])
def test_empty_batches(sized, shape):
    level = sized.level(radius=0.1, penalty=1.0)
    losses = torch.zeros(shape, requires_grad=True)
    result = worst_case(losses, divergence=sized.case.divergence, **level)
    assert result.value.shape == result.gap.shape == shape[:-1]
    assert result.weights.shape == shape
    result.value.sum().backward()
    assert losses.grad.shape == shape


def test_losses_that_are_not_contiguous(sized):
    losses = torch.randn(7, 5, dtype=DOUBLE)
    level = sized.level(radius=0.1, penalty=1.0)
    found = worst_case(losses.T, divergence=sized.case.divergence, **level)
    expected = worst_case(losses.T.contiguous(), divergence=sized.case.divergence, **level)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-13)
