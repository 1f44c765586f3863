"""Quantile balancing: the exact minimiser of the dual, and what that does to a skewed router."""

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.routing import QuantileBalancing, max_violation, min_violation


def updated(records, num_experts, **options):
    """Prices after one update from records made with zero prices."""
    controller = QuantileBalancing(num_experts, **options)
    for record in records:
        controller.observe(record)
    controller.update()
    return controller.prices


def token_prices(scores, prices, top_k):
    """The k+1-th largest value of each token, by Python's sort."""
    rows = (scores - prices).tolist()
    return [sorted(row, reverse=True)[top_k] for row in rows]


def dual_of_expert(column, alpha, beta, target):
    """The part of the dual objective that depends on one expert's price."""
    pairs = zip(column, alpha, strict=True)
    return sum(max(0.0, score - a - beta) for score, a in pairs) + target * beta


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(8, 4, 2), (9, 4, 2), (7, 5, 1)])
@pytest.mark.parametrize("start", ["zero", "warm"])
def test_the_prices_minimise_the_dual(route, num_tokens, num_experts, top_k, start):
    scores = torch.rand(num_tokens, num_experts)
    old = torch.zeros(num_experts) if start == "zero" else torch.randn(num_experts) / 4
    controller = QuantileBalancing(num_experts)
    controller.load_state_dict({"prices": old})
    controller.observe(route(scores, budget=top_k, prices=old))
    controller.update()

    alpha = token_prices(scores, old, top_k)
    target = top_k * num_tokens / num_experts
    least, arguments = [], []
    for column in scores.t().tolist():
        breaks = sorted(score - a for score, a in zip(column, alpha, strict=True))
        fine = torch.linspace(-2, 2, 2001).tolist()
        values = [dual_of_expert(column, alpha, beta, target) for beta in breaks + fine]
        least.append(min(values))
        # The lowest minimiser; where the target is whole, a whole interval minimises.
        arguments.append(
            next(b for b, v in zip(breaks, values, strict=False) if v < min(values) + 1e-9)
        )
    # Subtracting the mean moves all prices together, and every token's price against them.
    shift = arguments[0] - float(controller.prices[0])
    for expert, column in enumerate(scores.t().tolist()):
        beta = float(controller.prices[expert]) + shift
        assert dual_of_expert(column, alpha, beta, target) == pytest.approx(least[expert], abs=1e-5)
    assert float(controller.prices.mean()) == pytest.approx(0, abs=1e-7)


def margins_by_loop(record):
    """Score less the best value that the token did not take, or its worst where it took all."""
    rows = []
    scores, values = record.scores.tolist(), record.values.tolist()
    for token, (score, value) in enumerate(zip(scores, values, strict=True)):
        taken = record.plan.expert_ids[token][record.plan.keep[token]].tolist()
        left = [v for expert, v in enumerate(value) if expert not in taken and v > -float("inf")]
        alpha = max(left) if left else min(v for v in value if v > -float("inf"))
        rows.append([s - alpha for s in score])
    return rows


@pytest.mark.parametrize("budget", [(1, 4, 2.3), (0, 5, 1.7), (5, 5, 5), (2, 5, 4.9)])
def test_with_a_batch_budget_a_token_has_its_own_marginal_value(route, budget):
    minimum, maximum, average = budget
    scores = torch.rand(20, 5)
    record = route(scores, budget=TokenBudget(minimum=minimum, maximum=maximum, average=average))
    share = int(average * 20 + 1e-9) // 5
    columns = zip(*margins_by_loop(record), strict=True)
    expected = [sorted(column, reverse=True)[min(share, 19)] for column in columns]
    expected = torch.tensor(expected) - sum(expected) / 5
    torch.testing.assert_close(updated([record], 5), expected, rtol=1e-5, atol=1e-6)


def iterate(route, scores, top_k, num_updates):
    """Loads of the same batch before each update and after the last."""
    controller = QuantileBalancing(scores.shape[1])
    loads = []
    for _ in range(num_updates):
        record = route(scores, budget=top_k, prices=controller.prices)
        loads.append(record.plan.expert_load)
        controller.observe(record)
        controller.update()
    return [*loads, route(scores, budget=top_k, prices=controller.prices).plan.expert_load]


def clipped_prices(scores, top_k, num_updates):
    """The published form with prices that cannot fall below zero."""
    prices = torch.zeros(scores.shape[1])
    share = top_k * scores.shape[0] // scores.shape[1]
    for _ in range(num_updates):
        alpha = (scores - prices).sort(dim=1, descending=True).values[:, top_k].clamp_min(0)
        margins = scores - alpha.unsqueeze(1)
        prices = margins.sort(dim=0, descending=True).values[share].clamp_min(0)
    return prices


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_balances_a_skewed_router_and_revives_dead_experts(route, skewed_scores, activation):
    scores = skewed_scores(4096, 32)
    if activation == "softmax":
        scores = scores.logit().softmax(dim=1)
    loads = iterate(route, scores, 4, 8)
    assert float(max_violation(loads[0])) > 3
    assert float(min_violation(loads[0])) < -0.95
    if activation == "sigmoid":
        assert float(max_violation(loads[1])) < 0.3
        assert float(min_violation(loads[1])) > -0.3
    assert float(max_violation(loads[8])) < 0.05
    assert float(min_violation(loads[8])) > -0.1
    # Prices that cannot be negative leave an expert without tokens; softmax's small scores less so.
    clipped = route(scores, budget=4, prices=clipped_prices(scores, 4, 8)).plan.expert_load
    assert float(min_violation(clipped)) < (-0.95 if activation == "sigmoid" else -0.7)


def test_accumulated_micro_batches_equal_one_batch_exactly(route):
    scores, prices = torch.rand(30, 6), torch.randn(6) / 8
    at_once, in_parts = QuantileBalancing(6), QuantileBalancing(6)
    for controller in (at_once, in_parts):
        controller.load_state_dict({"prices": prices})
    at_once.observe(route(scores, budget=2, prices=prices))
    for part in (scores[:7], scores[7:8], scores[8:8], scores[8:]):
        in_parts.observe(route(part, budget=2, prices=prices))
    at_once.update()
    in_parts.update()
    assert torch.equal(in_parts.prices, at_once.prices)
    assert not torch.equal(at_once.prices, prices)
    # The next step starts empty.
    in_parts.observe(route(scores[:12], budget=2, prices=in_parts.prices))
    at_once.observe(route(scores[:12], budget=2, prices=in_parts.prices))
    in_parts.update()
    at_once.update()
    assert torch.equal(in_parts.prices, at_once.prices)


def test_padding_counts_nowhere(route, skewed_scores):
    scores, valid = skewed_scores(400, 4), torch.rand(400) < 0.5
    for top_k in (1, 2, 3):
        masked = updated([route(scores, budget=top_k, valid=valid)], 4)
        plain = updated([route(scores[valid], budget=top_k)], 4)
        assert torch.equal(masked, plain)


def test_nothing_observed_changes_nothing(route):
    controller = QuantileBalancing(4)
    controller.observe(route(torch.rand(9, 4), budget=1))
    controller.update()
    prices = controller.prices.clone()
    controller.update()
    assert torch.equal(controller.prices, prices)
    controller.observe(route(torch.rand(3, 4), budget=1, valid=torch.zeros(3).bool()))
    controller.update()
    assert torch.equal(controller.prices, prices)


def test_smoothing_mixes_old_and_new(route):
    record = route(torch.rand(9, 4), budget=1)
    exact = updated([record], 4)
    torch.testing.assert_close(updated([record], 4, smoothing=0.75), 0.25 * exact)


def test_forbidden_experts_are_no_marginal_value(route):
    scores = torch.rand(40, 6)
    scores[:20, :3] = -torch.inf
    scores[20:, 3:] = -torch.inf
    record = route(scores, budget=TokenBudget(minimum=1, maximum=3, average=2.3))
    # Some tokens take all that they may.
    assert record.plan.keep.all(dim=1).any()
    columns = zip(*margins_by_loop(record), strict=True)
    share = 92 // 6
    expected = torch.tensor([sorted(column, reverse=True)[share] for column in columns])
    prices = updated([record], 6)
    torch.testing.assert_close(prices, expected - expected.mean(), rtol=1e-5, atol=1e-6)


def test_an_expert_permitted_to_too_few_tokens_is_as_cheap_as_the_cheapest(route):
    scores = torch.rand(40, 4)
    scores[2:, 3] = -torch.inf
    prices = updated([route(scores, budget=1)], 4)
    assert torch.isfinite(prices).all()
    assert float(prices[3]) == float(prices[:3].min())
    assert float(prices.mean()) == pytest.approx(0, abs=1e-6)


def test_no_expert_permitted_at_all_leaves_finite_prices(route):
    prices = updated([route(torch.full((4, 3), -torch.inf), budget=1)], 3)
    assert prices.tolist() == [0, 0, 0]


def test_state_round_trip(route):
    controller, other = QuantileBalancing(4), QuantileBalancing(4)
    controller.observe(route(torch.rand(9, 4), budget=1))
    controller.update()
    other.observe(route(torch.rand(5, 4), budget=2))
    other.load_state_dict(controller.state_dict())
    assert torch.equal(other.prices, controller.prices)
    record = route(torch.rand(9, 4), budget=1, prices=other.prices)
    for one in (controller, other):
        one.observe(record)
        one.update()
    assert torch.equal(other.prices, controller.prices)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\), got"):
        QuantileBalancing(4, smoothing=smoothing)
