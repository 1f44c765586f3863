"""The weighted sum of losses, and that each term passes on what a layer has."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from drgr.routing import (
    CoupledWeights,
    LossInputs,
    RoutingPlan,
    activation_locality_loss,
    activation_locality_term,
    chunk_sparsity_loss,
    chunk_sparsity_term,
    expert_load,
    expert_router_coupling_loss,
    expert_router_coupling_term,
    expert_specialisation_loss,
    expert_specialisation_term,
    global_balance_term,
    layer_coupling_loss,
    layer_coupling_term,
    load_balancing_loss,
    micro_balance_term,
    micro_balancing_loss,
    pool_balance_term,
    pool_balancing_loss,
    pool_fractions,
    router_z_loss,
    router_z_term,
    routing_information_loss,
    routing_information_term,
    routing_loss,
    selected_mass,
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
    with pytest.raises(ValueError, match=r"weights must be given.*LossInputs\(weights=...\)"):
        expert_router_coupling_term(layer())
    with pytest.raises(ValueError, match="activations must be given"):
        expert_specialisation_term(layer())


def test_terms_of_weights_and_activations():
    x = layer()
    generator = torch.Generator().manual_seed(1)
    num_experts = x.scores.shape[1]
    router = torch.randn(num_experts, 5, generator=generator)
    gates = torch.randn(num_experts, 2, 5, generator=generator)
    noise = torch.rand(num_experts, 5, generator=generator)
    weights = CoupledWeights(router=router, gates=gates, noise=noise)
    expected = expert_router_coupling_loss(router, gates, noise=noise, tolerance=0.5)
    term = partial(expert_router_coupling_term, tolerance=0.5)
    assert term(replace(x, weights=weights)).item() == expected.item()
    activations = torch.randn(*x.plan.keep.shape, 3, generator=generator)
    expected = expert_specialisation_loss(activations, x.plan.keep, valid=x.valid)
    assert expert_specialisation_term(replace(x, activations=activations)).item() == expected.item()


def test_joint_losses_come_last_and_are_not_averaged():
    x = layer()
    layers = [x, replace(x, scores=x.scores.square(), step_load=None)]
    total, values = routing_loss(
        layers,
        [(1.0, router_z_term)],
        joint_terms=[(2.0, layer_coupling_term), (0.5, pool_balance_term)],
    )
    masses = [
        selected_mass(y.scores, y.plan.expert_ids, y.plan.keep, valid=y.valid) for y in layers
    ]
    coupling = layer_coupling_loss(torch.stack(masses), valid=x.valid).item()
    loads = [x.plan.expert_load if y.step_load is None else y.step_load for y in layers]
    fractions = pool_fractions(torch.stack(loads))
    pool = sum(pool_balancing_loss(y.scores, fractions, valid=y.valid).item() for y in layers) / 2
    z = router_z_term(x).item()
    assert values.tolist() == pytest.approx([z, coupling, pool])
    assert total.item() == pytest.approx(z + 2 * coupling + 0.5 * pool)
    with pytest.raises(ValueError, match=r"coefficient must .* got -1"):
        routing_loss(layers, [], joint_terms=[(-1.0, pool_balance_term)])
