"""The weighted sum of losses, and that each term passes on what a layer has."""

from functools import partial

import pytest
import torch

from drgr.routing import (
    LossInputs,
    RoutingPlan,
    activation_locality_loss,
    activation_locality_term,
    chunk_sparsity_loss,
    chunk_sparsity_term,
    expert_load,
    global_balance_term,
    load_balancing_loss,
    micro_balance_term,
    micro_balancing_loss,
    router_z_loss,
    router_z_term,
    routing_information_loss,
    routing_information_term,
    routing_loss,
    sequence_balance_term,
    sequence_balancing_loss,
    specialisation_balance_loss,
    specialisation_balance_term,
    top1_balance_term,
    top1_balancing_loss,
    tsallis_entropy_loss,
    tsallis_term,
)


def layer(**changes):
    logits = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0]).bool()
    ids = logits.detach().topk(2, dim=1).indices
    keep = (torch.rand(8, 2) < 0.8) & valid.unsqueeze(1)
    plan = RoutingPlan(
        expert_ids=ids,
        combine_weights=keep.double(),
        keep=keep,
        expert_load=expert_load(ids, keep, 4),
    )
    fields = {
        "scores": logits.softmax(dim=1),
        "plan": plan,
        "valid": valid,
        "logits": logits,
        "sequence_length": 4,
    }
    return LossInputs(**{**fields, **changes})


def test_every_term_is_its_function():
    step_load = torch.tensor([9, 2, 4, 5])
    x = layer(step_load=step_load)
    ids, keep, load = x.plan.expert_ids, x.plan.keep, x.plan.expert_load
    v = {"valid": x.valid}
    pairs = [
        (global_balance_term, load_balancing_loss(x.scores, step_load, **v)),
        (micro_balance_term, micro_balancing_loss(x.scores, load, **v)),
        (
            sequence_balance_term,
            sequence_balancing_loss(x.scores, ids, keep, sequence_length=4, **v),
        ),
        (
            partial(top1_balance_term, temperature=0.2),
            top1_balancing_loss(x.logits, temperature=0.2, **v),
        ),
        (router_z_term, router_z_loss(x.logits, **v)),
        (partial(tsallis_term, order=2.0), tsallis_entropy_loss(x.scores, order=2.0, **v)),
        (
            partial(specialisation_balance_term, entropy_coefficient=0.5),
            specialisation_balance_loss(x.scores, step_load, entropy_coefficient=0.5, **v),
        ),
        (routing_information_term, routing_information_loss(x.scores, **v)),
        (
            partial(activation_locality_term, sharpness=3.0),
            activation_locality_loss(x.logits, sequence_length=4, sharpness=3.0, **v),
        ),
        (
            partial(chunk_sparsity_term, chunk_length=2),
            chunk_sparsity_loss(x.scores, sequence_length=4, chunk_length=2, **v),
        ),
    ]
    for term, expected in pairs:
        assert term(x).item() == expected.item()


def test_without_counts_of_the_step_those_of_the_plan_are_used():
    x = layer()
    expected = load_balancing_loss(x.scores, x.plan.expert_load, valid=x.valid)
    assert global_balance_term(x).item() == expected.item()


def test_the_sum_is_weighted_and_averaged_over_layers():
    layers = [layer(), layer()]
    total, values = routing_loss(
        layers, [(0.1, global_balance_term), (2.0, router_z_term), (0.0, tsallis_term)]
    )
    means = [
        sum(term(x).item() for x in layers) / 2
        for term in (global_balance_term, router_z_term, tsallis_term)
    ]
    assert values.tolist() == pytest.approx(means)
    assert not values.requires_grad
    assert float(total.detach()) == pytest.approx(0.1 * means[0] + 2.0 * means[1])
    total.backward()
    assert all(x.logits.grad.any() for x in layers)


def test_a_loss_with_coefficient_zero_is_seen_and_not_felt():
    total, values = routing_loss([layer()], [(0.0, lambda x: x.scores.sum() * torch.inf)])
    assert total.item() == 0
    assert values.tolist() == [torch.inf]


def test_no_term_is_no_loss():
    total, values = routing_loss([layer()], [])
    assert total.item() == 0
    assert values.shape == (0,)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="layers must not be empty"):
        routing_loss([], [(1.0, router_z_term)])
    with pytest.raises(ValueError, match=r"coefficient must .* got -1"):
        routing_loss([layer()], [(-1.0, router_z_term)])
    with pytest.raises(ValueError, match=r"logits must be given.*LossInputs\(logits=...\)"):
        router_z_term(layer(logits=None))
    with pytest.raises(ValueError, match="sequence_length must be given"):
        chunk_sparsity_term(layer(sequence_length=None))
