"""Congestion prices by hand, their fixed point and their limit of stability."""

import pytest
import torch

from drgr.routing import CongestionPrice


def record_with_load(route, load):
    experts = [expert for expert, count in enumerate(load) for _ in range(count)]
    scores = torch.nn.functional.one_hot(torch.tensor(experts), len(load)).float()
    return route(scores, budget=1)


def test_steps_by_hand(route):
    controller = CongestionPrice(3, strength=0.5, smoothing=0.75)
    for expected in (0.0625, 0.0625 * 1.75):
        controller.observe(record_with_load(route, [3, 1, 2]))
        controller.update()
        torch.testing.assert_close(controller.prices, torch.tensor([expected, -expected, 0.0]))
    # A step without assignments is no news of balance.
    prices = controller.prices
    controller.update()
    assert torch.equal(controller.prices, prices)


def test_a_target_by_hand(route):
    controller = CongestionPrice(3, strength=1.0, smoothing=0.0, target=[1, 1, 2])
    controller.observe(record_with_load(route, [4, 0, 4]))
    controller.update()
    torch.testing.assert_close(controller.prices, torch.tensor([0.75, -0.75, 0.0]))


def spread(strength, smoothing, num_steps, route):
    """Excess load of expert 0 of two whose score gaps are evenly spread over [-1/2, 3/2]."""
    gaps = torch.linspace(-0.5, 1.5, 2001)
    scores = torch.stack([gaps, torch.zeros_like(gaps)], dim=1)
    controller = CongestionPrice(2, strength=strength, smoothing=smoothing)
    excess = []
    for _ in range(num_steps):
        record = route(scores, budget=1, prices=controller.prices)
        load = record.plan.expert_load
        excess.append(float(load[0] / load.double().mean()) - 1)
        controller.observe(record)
        controller.update()
    return excess


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_settles_at_the_fixed_point_of_the_game(route, strength):
    # At prices (b, -b) expert 0 has the share (3/2 - 2b) / 2: an excess x = 1/2 - 2b, and b = g x.
    excess = spread(strength, 0.8, 60, route)
    assert excess[0] == pytest.approx(0.5, abs=0.01)
    assert excess[-1] == pytest.approx(0.5 / (1 + 2 * strength), abs=0.005)


@pytest.mark.parametrize(("smoothing", "is_stable"), [(0.7, True), (0.5, False)])
def test_the_limit_of_stability(route, smoothing, is_stable):
    # rho is 2 here: stable while (1 - smoothing) (1 + 2 * 2) < 2, that is smoothing > 0.6.
    excess = spread(2.0, smoothing, 60, route)
    swing = max(excess[-10:]) - min(excess[-10:])
    assert (swing < 0.01) == is_stable


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0}, "strength must be a finite number above 0"),
        ({"smoothing": 1}, r"smoothing must lie in \[0, 1\)"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        CongestionPrice(4, **settings)
