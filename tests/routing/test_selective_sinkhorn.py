"""Selective Sinkhorn: which steps are drawn, and what prices they have."""

import pytest
import torch

from drgr.numerics import Status
from drgr.routing import SelectiveSinkhorn, SinkhornPrices


def run(controller, route, batches):
    """Prices before each batch."""
    prices = []
    for scores in batches:
        prices.append(controller.prices.clone())
        controller.observe(route(scores, budget=2, prices=controller.prices))
        controller.update()
    return prices


def test_drawn_steps_have_the_prices_of_the_step_before(route):
    batches = torch.rand(40, 30, 4) + torch.tensor([0.5, 0, 0, 0])
    prices = run(SelectiveSinkhorn(4, probability=0.3, seed=1), route, batches)
    drawn = [step for step, found in enumerate(prices) if found.any()]
    assert 4 <= len(drawn) <= 22
    for step in drawn:
        single = SinkhornPrices(4)
        single.observe(route(batches[step - 1], budget=2))
        single.update()
        # Adding and subtracting the prices of a step leaves their rounding in the scores.
        torch.testing.assert_close(prices[step], single.prices, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 19)])
def test_never_and_always(route, probability, expected):
    batches = torch.rand(20, 30, 4)
    controller = SelectiveSinkhorn(4, probability=probability)
    assert sum(bool(found.any()) for found in run(controller, route, batches)) == expected


def test_the_share_of_drawn_steps_is_the_probability():
    controller = SelectiveSinkhorn(4, probability=0.2)
    drawn = 0
    for _ in range(2000):
        controller.update()
        drawn += controller.is_drawn
    # Five standard deviations.
    assert abs(drawn / 2000 - 0.2) < 0.045


def test_coins_depend_on_seed_and_step_alone(route):
    def coins(seed, num_experts):
        controller = SelectiveSinkhorn(num_experts, probability=0.5, seed=seed)
        found = []
        for _ in range(50):
            found.append(controller.is_drawn)
            controller.update()
        return found

    assert coins(0, 4) == coins(0, 7)
    assert coins(0, 4) != coins(1, 4)
    assert not coins(0, 4)[0]


def test_a_resumed_run_draws_the_same(route):
    batches = torch.rand(30, 20, 4)
    whole = run(SelectiveSinkhorn(4, probability=0.5), route, batches)
    first, second = SelectiveSinkhorn(4, probability=0.5), SelectiveSinkhorn(4, probability=0.5)
    run(first, route, batches[:13])
    second.load_state_dict(first.state_dict())
    for found, expected in zip(run(second, route, batches[13:]), whole[13:], strict=True):
        assert torch.equal(found, expected)


def test_scores_are_kept_only_where_needed(route):
    controller = SelectiveSinkhorn(4, probability=0.0)
    for _ in range(3):
        controller.observe(route(torch.rand(10, 4), budget=2))
    assert sum(len(part) for part in controller._sinkhorn._scores._scores) == 0


def test_status_is_that_of_the_prices(route):
    controller = SelectiveSinkhorn(4, probability=1.0, tolerance=1e-12, max_iterations=1)
    assert controller.status is None
    controller.observe(route(torch.rand(10, 4), budget=2))
    controller.update()
    assert controller.status is Status.MAX_STEPS


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_refusals(probability):
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got"):
        SelectiveSinkhorn(4, probability=probability)
