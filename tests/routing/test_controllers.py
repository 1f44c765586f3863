"""What every price controller promises, whatever its formula."""

from collections.abc import Callable

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.collectives import rank
from drgr.routing import (
    BipBalancing,
    CongestionPrice,
    DecayingSubgradient,
    PriceController,
    QuantileBalancing,
    RmsBias,
    SelectiveSinkhorn,
    SignBias,
    SinkhornPrices,
)

MAKERS: dict[str, Callable[..., PriceController]] = {
    "sign": lambda experts, **target: SignBias(experts, step_size=0.01, **target),
    "rms": lambda experts, **target: RmsBias(experts, step_size=0.01, **target),
    "subgradient": DecayingSubgradient,
    "congestion": CongestionPrice,
    "quantile": QuantileBalancing,
    "bip": lambda experts, **target: BipBalancing(experts, num_iterations=2, **target),
    "sinkhorn": SinkhornPrices,
    "log-sinkhorn": lambda experts, **target: SinkhornPrices(
        experts, cost="log-scores", regularization=0.5, **target
    ),
    "selective": lambda experts, **target: SelectiveSinkhorn(experts, probability=0.5, **target),
}

controllers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def follow(controller, route, batches, budget=2, **options):
    for scores in batches:
        controller.observe(route(scores, budget=budget, prices=controller.prices, **options))
        controller.update()
    return controller.prices


@controllers
def test_prices_are_float32_of_mean_zero(route, make):
    controller = make(6)
    for _ in range(10):
        assert controller.prices.dtype == torch.float32
        assert controller.prices.shape == (6,)
        assert float(controller.prices.mean()) == pytest.approx(0, abs=1e-6)
        before = controller.prices
        copy = before.clone()
        follow(controller, route, [torch.rand(40, 6) + torch.arange(6) / 6])
        assert torch.equal(before, copy), "prices that were handed out must not change"


@controllers
def test_micro_batches_equal_one_batch(route, make):
    warm, scores = torch.rand(6, 30, 6), torch.rand(30, 6)
    at_once, in_parts = make(6), make(6)
    for controller in (at_once, in_parts):
        follow(controller, route, warm)
    prices = at_once.prices.clone()
    at_once.observe(route(scores, budget=2, prices=prices))
    for part in (scores[:7], scores[7:8], scores[8:8], scores[8:]):
        in_parts.observe(route(part, budget=2, prices=prices))
    at_once.update()
    in_parts.update()
    assert torch.equal(in_parts.prices, at_once.prices)


@controllers
def test_padding_counts_nowhere(route, make):
    masked, plain = make(4), make(4)
    moved = False
    for _ in range(6):
        scores, valid = torch.rand(60, 4), torch.rand(60) < 0.5
        masked.observe(route(scores, budget=1, prices=masked.prices, valid=valid))
        plain.observe(route(scores[valid], budget=1, prices=plain.prices))
        masked.update()
        plain.update()
        assert torch.equal(masked.prices, plain.prices)
        moved = moved or bool(plain.prices.any())
    assert moved


@controllers
def test_a_step_without_tokens_leaves_finite_prices(route, make):
    controller = make(4)
    prices = follow(controller, route, torch.rand(4, 30, 4))
    for _ in range(2):
        before = controller.prices.clone()
        controller.observe(route(torch.rand(3, 4), budget=1, valid=torch.zeros(3).bool()))
        controller.update()
        assert torch.isfinite(controller.prices).all()
        if not isinstance(controller, SelectiveSinkhorn):
            torch.testing.assert_close(controller.prices, before, rtol=0, atol=1e-7)
    assert torch.isfinite(prices).all()


@controllers
def test_state_round_trip(route, make):
    batches = torch.rand(9, 30, 5) + torch.arange(5) / 5
    controller, other = make(5), make(5)
    follow(controller, route, batches[:4])
    state = controller.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    # What was observed before loading is forgotten.
    other.observe(route(torch.rand(8, 5), budget=1))
    other.load_state_dict(state)
    for scores in batches[4:]:
        assert torch.equal(other.prices, controller.prices)
        for one in (controller, other):
            follow(one, route, [scores])
    assert torch.equal(other.prices, controller.prices)
    for name, tensor in kept.items():
        assert torch.equal(state[name], tensor), "a state must be a copy"


@controllers
def test_the_state_of_another_kind_is_refused(make):
    controller = make(4)
    name = type(controller).__name__
    message = f"state of {name} must hold .*; it belongs to another kind of controller"
    for state in ({}, controller.state_dict() | {"velocity": torch.zeros(4)}):
        with pytest.raises(ValueError, match=message):
            controller.load_state_dict(state)


@controllers
def test_the_order_of_experts_does_not_matter(route, make):
    order = torch.randperm(6)
    batches = torch.rand(8, 40, 6) + torch.arange(6) / 6
    target = [1.0, 2.0, 3.0, 1.5, 2.5, 1.0]
    plain, permuted = make(6, target=target), make(6, target=[target[i] for i in order])
    for scores in batches:
        follow(plain, route, [scores])
        follow(permuted, route, [scores[:, order]])
        torch.testing.assert_close(permuted.prices, plain.prices[order], rtol=1e-4, atol=1e-5)
    assert plain.prices.any() or isinstance(plain, SelectiveSinkhorn)


@controllers
def test_equal_targets_are_no_targets(route, make):
    batches = torch.rand(6, 40, 5) + torch.arange(5) / 5
    plain, given = make(5), make(5, target=[3.0] * 5)
    torch.testing.assert_close(
        follow(plain, route, batches), follow(given, route, batches), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["sign", "rms", "subgradient", "quantile", "bip"])
def test_loads_follow_the_target(route, skewed_scores, name):
    scores = skewed_scores(1200, 8, skew=0.3)
    target = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0])
    controller = MAKERS[name](8, target=target.tolist())
    loads = []
    for _ in range(120):
        record = route(scores, budget=2, prices=controller.prices)
        loads.append(record.plan.expert_load)
        controller.observe(record)
        controller.update()
    due = 2400 * target / target.sum()
    assert float((loads[0] / due - 1).abs().max()) > 1
    assert float((torch.stack(loads[-20:]).float().mean(dim=0) / due - 1).abs().max()) < 0.1


@controllers
def test_a_wrong_target_is_refused(make):
    with pytest.raises(ValueError, match="target must have one load for each of the 4 experts"):
        make(4, target=[1.0])


def update_on_shares(steps):
    """Prices of each controller after steps whose records are spread over two processes."""
    prices = {}
    for name, records in steps.items():
        controller = MAKERS[name](5, target=[1.0, 2.0, 1.0, 1.0, 3.0])
        for shares in records:
            controller.observe(shares[rank()])
            controller.update()
        prices[name] = controller.prices
    return prices


def test_several_processes_equal_one(route, run_processes):
    budget = TokenBudget(minimum=2, maximum=2, average=2)
    steps, expected = {}, {}
    for name, make in MAKERS.items():
        controller, steps[name] = make(5, target=[1.0, 2.0, 1.0, 1.0, 3.0]), []
        for _ in range(4):
            scores, prices = torch.rand(30, 5) + torch.arange(5) / 5, controller.prices
            # One process has all tokens in the last step.
            cut = 30 if len(steps[name]) == 3 else 11
            parts = (scores[:cut], scores[cut:])
            steps[name].append([route(part, budget=budget, prices=prices) for part in parts])
            controller.observe(route(scores, budget=budget, prices=prices))
            controller.update()
        expected[name] = controller.prices
    first, second = run_processes(update_on_shares, 2, steps)
    for name, prices in expected.items():
        assert torch.equal(first[name], second[name]), name
        # Sums of exponentials depend on how rows are split; counts and order statistics do not.
        atol = 1e-5 if "sinkhorn" in name or name == "selective" else 1e-7
        torch.testing.assert_close(first[name], prices, rtol=0, atol=atol)
