"""The sign rule: hand-written steps, accumulation, padding, and what it does to a skewed router."""

import pytest
import torch

from drgr.routing import SignBias, max_violation, min_violation


def record_with_load(route, load):
    """One record whose plan has the given load: a token for each assignment."""
    experts = [expert for expert, count in enumerate(load) for _ in range(count)]
    scores = torch.nn.functional.one_hot(torch.tensor(experts), len(load)).float()
    return route(scores, budget=1)


def test_steps_by_hand(route):
    controller = SignBias(3, step_size=0.3)
    assert controller.prices.tolist() == [0, 0, 0]
    controller.observe(record_with_load(route, [3, 1, 2]))
    controller.update()
    torch.testing.assert_close(controller.prices, torch.tensor([0.3, -0.3, 0.0]))
    # One expert above the mean of 2 and two below: the raw step (0.3, -0.3, -0.3) has mean -0.1.
    controller.observe(record_with_load(route, [4, 1, 1]))
    controller.update()
    torch.testing.assert_close(controller.prices, torch.tensor([0.7, -0.5, -0.2]))


def test_the_mean_load_is_not_rounded(route):
    # Mean 4/3: one assignment is below it and two are above.
    controller = SignBias(3, step_size=0.3)
    controller.observe(record_with_load(route, [1, 1, 2]))
    controller.update()
    torch.testing.assert_close(controller.prices, torch.tensor([-0.2, -0.2, 0.4]))


def test_micro_batches_are_summed_before_the_sign(route):
    controller, at_once = SignBias(3, step_size=0.1), SignBias(3, step_size=0.1)
    for load in ([5, 1, 0], [0, 4, 2]):
        controller.observe(record_with_load(route, load))
    at_once.observe(record_with_load(route, [5, 5, 2]))
    controller.update()
    at_once.update()
    assert torch.equal(controller.prices, at_once.prices)
    torch.testing.assert_close(at_once.prices, torch.tensor([1, 1, -2]) * 0.2 / 3)


def test_an_update_without_observations_changes_nothing(route):
    controller = SignBias(4, step_size=0.1)
    controller.update()
    assert controller.prices.tolist() == [0, 0, 0, 0]
    controller.observe(record_with_load(route, [4, 2, 1, 1]))
    controller.update()
    prices = controller.prices
    controller.update()
    torch.testing.assert_close(controller.prices, prices, rtol=0, atol=1e-8)


def test_padding_counts_nowhere(route):
    scores = torch.rand(6, 3)
    valid = torch.tensor([True, False, True, True, False, True])
    masked, plain = SignBias(3), SignBias(3)
    masked.observe(route(scores, budget=1, valid=valid))
    plain.observe(route(scores[valid], budget=1))
    masked.update()
    plain.update()
    assert torch.equal(masked.prices, plain.prices)
    assert masked.prices.any()


def test_earlier_prices_stay_as_they_were(route):
    controller = SignBias(2, step_size=0.5)
    before = controller.prices
    controller.observe(record_with_load(route, [2, 0]))
    controller.update()
    assert before.tolist() == [0, 0]
    assert controller.prices.tolist() == [0.5, -0.5]


def test_balances_a_skewed_sigmoid_router(route, skewed_scores):
    scores = skewed_scores(1024, 16)
    controller = SignBias(16, step_size=1e-3)
    violations = []
    for _ in range(700):
        record = route(scores, budget=2, prices=controller.prices)
        violations.append(float(max_violation(record.plan.expert_load)))
        controller.observe(record)
        controller.update()
        assert abs(float(controller.prices.mean())) < 1e-6
    assert violations[0] > 3
    assert violations[100] > 0.3
    assert max(violations[-5:]) < 0.1
    assert float(min_violation(record.plan.expert_load)) > -0.1


def test_state_round_trip(route):
    controller, other = SignBias(3), SignBias(3)
    controller.observe(record_with_load(route, [3, 1, 2]))
    controller.update()
    state = controller.state_dict()
    other.observe(record_with_load(route, [0, 9, 0]))
    other.load_state_dict(state)
    assert torch.equal(other.prices, controller.prices)
    # What was observed before loading is forgotten, and the state is a copy.
    for one in (controller, other):
        one.observe(record_with_load(route, [1, 1, 2]))
        one.update()
    assert torch.equal(other.prices, controller.prices)
    assert not torch.equal(state["prices"], controller.prices)


@pytest.mark.parametrize("step_size", [0, -1e-3, float("nan")])
def test_a_step_that_is_not_positive_is_refused(step_size):
    with pytest.raises(ValueError, match="step_size must be a finite number above 0"):
        SignBias(4, step_size=step_size)
