"""The RMS-normalised step by hand; what all controllers share is in ``test_controllers.py``."""

import pytest
import torch

from drgr.routing import RmsBias, max_violation


def record_with_load(route, load):
    experts = [expert for expert, count in enumerate(load) for _ in range(count)]
    scores = torch.nn.functional.one_hot(torch.tensor(experts), len(load)).float()
    return route(scores, budget=1)


def test_steps_by_hand(route):
    controller = RmsBias(3, step_size=0.2)
    controller.observe(record_with_load(route, [3, 1, 2]))
    controller.update()
    # The error (1, -1, 0) has root mean square sqrt(2/3).
    first = torch.tensor([0.2, -0.2, 0.0]) * 1.5**0.5
    torch.testing.assert_close(controller.prices, first)
    controller.observe(record_with_load(route, [4, 1, 1]))
    controller.update()
    second = torch.tensor([0.4, -0.2, -0.2]) / 2**0.5
    torch.testing.assert_close(controller.prices, first + second)


def test_balance_is_no_step(route):
    controller = RmsBias(3, step_size=0.2)
    controller.observe(record_with_load(route, [2, 2, 2]))
    controller.update()
    assert controller.prices.tolist() == [0, 0, 0]


def test_a_target_by_hand(route):
    controller = RmsBias(3, step_size=0.1, target=[1, 1, 2])
    controller.observe(record_with_load(route, [2, 2, 4]))
    controller.update()
    assert controller.prices.tolist() == [0, 0, 0]
    controller.observe(record_with_load(route, [4, 0, 4]))
    controller.update()
    torch.testing.assert_close(controller.prices, torch.tensor([0.1, -0.1, 0.0]) * 1.5**0.5)


def test_balances_a_skewed_sigmoid_router(route, skewed_scores):
    scores = skewed_scores(1024, 16)
    controller = RmsBias(16, step_size=2e-3)
    violations = []
    for _ in range(300):
        record = route(scores, budget=2, prices=controller.prices)
        violations.append(float(max_violation(record.plan.expert_load)))
        controller.observe(record)
        controller.update()
    assert violations[0] > 3
    assert max(violations[-5:]) < 0.15


@pytest.mark.parametrize("step_size", [0, -1e-3, float("inf")])
def test_refusals(step_size):
    with pytest.raises(ValueError, match="step_size must be a finite number above 0"):
        RmsBias(4, step_size=step_size)
