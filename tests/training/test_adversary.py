"""The adversary of a run: estimates in the unit of comparison, weights where they are applied."""

import math

import pytest
import torch

from drgr.ambiguity import KL
from drgr.training.adversary import DomainAdversary

BASE = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


def make(**changes):
    options = {
        "divergence": KL(),
        "penalty": 0.5,
        "radius": None,
        "sampling": BASE,
        "nominal": UNIFORM,
        "apply_to": "sampling",
        "unit": torch.ones(3, dtype=torch.float64),
        "smoothing": 0.0,
        "reference": None,
    }
    return DomainAdversary(**(options | changes))


def observe(adversary, means, count=10):
    means = torch.tensor(means, dtype=torch.float64)
    adversary.observe(means * count, torch.full((3,), count))
    return adversary.refresh()


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def test_kl_weights_by_hand():
    weights = observe(make(), [1.0, 2.0, 1.5])
    assert weights.adversary.tolist() == pytest.approx(softmax([2.0, 4.0, 3.0]))
    assert weights.effective_domains == pytest.approx(
        1 / sum(weight**2 for weight in softmax([2.0, 4.0, 3.0]))
    )


def test_losses_are_compared_in_their_unit():
    adversary = make(unit=torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64))
    assert observe(adversary, [2.0, 4.0, 1.0]).adversary.tolist() == pytest.approx([1 / 3] * 3)
    assert observe(adversary, [2.0, 4.0, 1.5]).adversary.tolist() == pytest.approx(
        softmax([4.0, 4.0, 6.0])
    )
    assert adversary.worst == (2, pytest.approx(3.0))


def test_references_are_subtracted_in_the_same_unit():
    unit = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    reference = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    weights = observe(make(unit=unit, reference=reference), [2.0, 6.0, 2.0])
    assert weights.adversary.tolist() == pytest.approx(softmax([2.0, 4.0, 4.0]))


@pytest.mark.parametrize("apply_to", ["nothing", "objective", "sampling"])
def test_where_weights_are_applied(apply_to):
    weights = observe(make(apply_to=apply_to), [1.0, 2.0, 1.5])
    expected = weights.adversary if apply_to == "sampling" else BASE
    torch.testing.assert_close(weights.sampling, expected)
    if apply_to == "objective":
        # Drawn with the base and weighted by the objective, a domain counts with its weight.
        torch.testing.assert_close(weights.sampling * weights.objective, weights.adversary)
    else:
        assert weights.objective.tolist() == [1, 1, 1]


def test_before_any_loss_the_nominal_holds():
    adversary = make()
    assert adversary.worst is None
    assert adversary.refresh().adversary.tolist() == pytest.approx([1 / 3] * 3)
    assert not adversary.is_near_one_hot(2.9)
    assert adversary.is_near_one_hot(3.1)


def test_state_round_trip_is_exact():
    adversary = make(smoothing=0.7)
    observe(adversary, [1.0, 2.0, 1.5])
    observe(adversary, [1.1, 1.9, 1.2])
    other = make(smoothing=0.7)
    other.load_state_dict(adversary.state_dict())
    assert torch.equal(other.weights.adversary, adversary.weights.adversary)
    assert other.weights.gap == adversary.weights.gap
    following = [observe(a, [0.9, 1.0, 3.0]) for a in (adversary, other)]
    assert torch.equal(following[0].adversary, following[1].adversary)
