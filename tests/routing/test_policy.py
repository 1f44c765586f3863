"""What one layer's policy joins, and that the learned price keeps to the budget on new tokens."""

from dataclasses import replace

import pytest
import torch

from drgr.budgets import TokenBudget, select_at_price, select_exactly
from drgr.collectives import rank
from drgr.routing import (
    NoPrices,
    QuantileBalancing,
    RoutingPolicy,
    SignBias,
    expert_load,
)
from drgr.routing.selection import BudgetedSelector

BUDGET = TokenBudget(minimum=1, maximum=4, average=2.3)


def policy_with(controller, **options):
    return RoutingPolicy(controller=controller, selector=BudgetedSelector(BUDGET, **options))


def train(policy, route, batches):
    for scores in batches:
        policy.observe(route(scores, budget=BUDGET, prices=policy.controller.prices))
        policy.update()


def assert_same_selection(one, other):
    for name in ("expert_ids", "keep", "spend", "limit", "price"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True)


def test_prices_are_subtracted_from_scores_without_gradient():
    policy = policy_with(SignBias(3))
    policy.controller.load_state_dict({"prices": torch.tensor([0.5, -0.25, -0.25])})
    scores = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    values = policy.price_scores(scores)
    assert values.dtype == torch.float32
    assert not values.requires_grad
    expected = scores.detach().float() - torch.tensor([0.5, -0.25, -0.25])
    torch.testing.assert_close(values, expected)


def test_training_selects_exactly_and_evaluation_at_the_learned_price(route):
    policy = policy_with(NoPrices(6))
    values, valid = torch.rand(20, 6), torch.rand(20) < 0.8
    for mask in (None, valid):
        exact = policy.select(values, scores=values, valid=mask, exact=True)
        assert_same_selection(exact, select_exactly(values, BUDGET, valid=mask))
        unlearned = policy.select(values, scores=values, valid=mask, exact=False)
        assert_same_selection(unlearned, select_at_price(values, BUDGET, price=None, valid=mask))
    train(policy, route, [torch.rand(20, 6)])
    price = policy.selector.price
    frozen = policy.select(values, scores=values, valid=valid, exact=False)
    assert_same_selection(frozen, select_at_price(values, BUDGET, price=price, valid=valid))


def test_selecting_moves_no_price():
    policy = policy_with(QuantileBalancing(6))
    for exact in (True, False):
        policy.select(torch.rand(20, 6), scores=torch.rand(20, 6), valid=None, exact=exact)
    policy.update()
    assert policy.controller.prices.tolist() == [0.0] * 6
    assert policy.selector.price is None


@pytest.mark.parametrize("controller", [NoPrices, SignBias, QuantileBalancing])
def test_the_learned_price_keeps_to_the_average_on_new_tokens(route, controller):
    generator = torch.Generator().manual_seed(1)
    policy = policy_with(controller(8))
    train(policy, route, torch.rand(30, 512, 8, generator=generator))
    values = policy.price_scores(torch.rand(16384, 8, generator=generator))
    selection = policy.select(values, scores=values, valid=None, exact=False)
    assert float(selection.spend) / 16384 == pytest.approx(BUDGET.average, rel=0.03)
    # A price for the whole is what lets tokens differ.
    assert len(selection.keep.sum(dim=1).unique()) == 4


@pytest.mark.parametrize("controller", [NoPrices, SignBias, QuantileBalancing])
def test_state_round_trip(route, controller):
    policy, other = policy_with(controller(6)), policy_with(controller(6))
    train(policy, route, torch.rand(3, 20, 6))
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.controller.prices, policy.controller.prices)
    assert torch.equal(other.selector.price, policy.selector.price)
    assert policy.controller.prices.any() == (controller is not NoPrices)


def test_no_prices_stay_zero_and_accept_no_state(route):
    controller = NoPrices(3)
    controller.observe(route(torch.rand(4, 3), budget=1))
    controller.update()
    assert controller.prices.tolist() == [0, 0, 0]
    controller.load_state_dict(controller.state_dict())
    with pytest.raises(
        ValueError, match=r"state must be empty for NoPrices, got keys \['prices'\]"
    ):
        controller.load_state_dict({"prices": torch.zeros(3)})


def learn_from_shares(shares):
    """Trains both controllers on the share of this process: shares[controller][step][rank]."""
    results = []
    for controller, steps in zip((SignBias(6), QuantileBalancing(6)), shares, strict=True):
        policy = policy_with(controller)
        for micro_batches in steps:
            for record in micro_batches[rank()]:
                policy.observe(record)
            policy.update()
        results.append((policy.controller.prices, policy.selector.price))
    return results


def test_processes_that_share_a_batch_learn_the_prices_of_one(route, run_processes):
    """Records of the whole batch are cut into uneven shares, one of them empty."""
    shares, expected = [], []
    for controller in (SignBias(6), QuantileBalancing(6)):
        policy, steps = policy_with(controller), []
        for cut in (7, 30, 0):
            scores, valid = torch.rand(30, 6), torch.rand(30) < 0.8
            prices = policy.controller.prices
            whole = route(scores, budget=BUDGET, prices=prices, valid=valid)
            policy.observe(whole)
            policy.update()
            steps.append([[rows(whole, 0, cut)], [rows(whole, cut, 30)]])
        shares.append(steps)
        expected.append((policy.controller.prices, policy.selector.price))
    for results in run_processes(learn_from_shares, 2, shares):
        for (prices, price), (own_prices, own_price) in zip(expected, results, strict=True):
            assert torch.equal(own_prices, prices)
            assert torch.equal(own_price, price)
            assert prices.any()


def rows(record, start, stop):
    """The tokens from start to stop of a record, with their own load."""
    part = slice(start, stop)
    ids, keep = record.plan.expert_ids[part], record.plan.keep[part]
    plan = replace(
        record.plan,
        expert_ids=ids,
        keep=keep,
        combine_weights=record.plan.combine_weights[part],
        expert_load=expert_load(ids, keep, 6),
    )
    return replace(
        record,
        scores=record.scores[part],
        values=record.values[part],
        valid=record.valid[part],
        plan=plan,
    )
