"""Link gates of whole models: what a closed link saves, and the gradient of those that are open."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from drgr.budgets import TokenBudget
from drgr.integrations.transformers import RouterContract, attach, enable_checkpointing
from drgr.routing import LinkGates, QuantileBalancing

BUDGET = TokenBudget(minimum=1, maximum=4, average=1.7)
FIXED = TokenBudget(minimum=2, maximum=2, average=2)
LAYERS, SOURCES, EXPERTS = 2, 3, 8
SHAPE = (LAYERS, SOURCES, EXPERTS)


def tokens(batch=4, length=10):
    return torch.randint(2, 64, (batch, length))


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gated(model, *, budget=BUDGET, **options):
    gates = LinkGates(num_layers=LAYERS, num_sources=SOURCES, num_experts=EXPERTS)
    return attach(model, budget=budget, link_gates=gates, **options), gates


def close_at_random(gates, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    links = torch.rand(SHAPE, generator=generator) < share
    links.scatter_(2, torch.randint(EXPERTS, (LAYERS, SOURCES, 1), generator=generator), False)
    gates.close(links)


def used(records, source, length=10):
    """Which links carried an assignment, (L, G, E)."""
    place = source.repeat_interleave(length)
    links = torch.zeros(SHAPE, dtype=torch.bool)
    for layer, routing in enumerate(records):
        plan = routing.plan
        for token, slots in enumerate(plan.keep):
            links[layer, place[token], plan.expert_ids[token][slots]] = True
    return links


def train_steps(model, attachment, num_steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(num_steps):
        with attachment.from_source(torch.tensor([0, 1, 2, 1])), attachment.record() as records:
            loss_of(model, tokens()).backward()
        attachment.observe(records)
        optimizer.step()
        optimizer.zero_grad()
        attachment.update()


def test_open_gates_of_one_change_no_bit(build_family, family):
    model, other = build_family(family), build_family(family)
    attachment, _ = gated(model)
    attach(other, budget=BUDGET)
    ids = tokens()
    with attachment.from_source(torch.tensor([0, 1, 2, 1])):
        loss = loss_of(model, ids)
    loss.backward()
    expected = loss_of(other, ids)
    expected.backward()
    assert torch.equal(loss, expected)
    reference = gradients(other)
    assert all(torch.equal(gradient, reference[key]) for key, gradient in gradients(model).items())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "deepseek_v3_grouped"])
def test_a_closed_link_carries_nothing(build_family, family):
    model = build_family(family)
    attachment, gates = gated(model)
    close_at_random(gates)
    source = torch.tensor([0, 1, 2, 1])
    with (
        attachment.from_source(source),
        attachment.record() as records,
        attachment.record_traffic(num_sources=SOURCES, coefficient=0.1) as traffic,
    ):
        loss = loss_of(model, tokens())
    loss.backward()
    carried = used(records, source)
    assert not (carried & ~gates.is_open).any()
    assert carried.any(dim=2).all()
    assert not traffic[~gates.is_open].any()
    # The last token of a sequence predicts nothing: a link may carry it and no gradient.
    assert not ((traffic > 0) & ~carried).any()
    assert (traffic > 0).any(dim=2).all()
    assert not gates.values.grad[~gates.is_open].any()
    assert gates.values.grad[traffic > 0].abs().min() > 0
    for routing in records:
        # Groups of experts leave some tokens fewer links than the budget would give them.
        assert int(routing.selection.spend) <= int(1.7 * 40)
        if family != "deepseek_v3_grouped":
            assert int(routing.selection.spend) == int(1.7 * 40)
        assert int(routing.plan.keep.sum(dim=1).min()) >= 1


def test_a_group_without_open_links_is_chosen_last():
    """Scores of the open group are below 0, where the correction bias puts them."""
    router = nn.Module()
    router.register_buffer("e_score_correction_bias", torch.tensor([0.0, 0.0, -2.0, -2.0]))
    contract = RouterContract(
        activation="sigmoid",
        normalised=True,
        has_correction_bias=True,
        num_groups=2,
        num_top_groups=1,
    )
    scores = torch.tensor([[0.9, 0.8, 0.2, 0.1], [0.9, 0.8, 0.2, 0.1]])
    usable = torch.tensor([[False, False, True, False], [True, False, True, True]])
    values = contract.selectable(scores, router, usable)
    assert torch.isfinite(values).tolist() == [
        [False, False, True, False],
        [True, False, False, False],
    ]


def test_fewer_links_than_the_budget_cost_fewer_assignments_and_flops(build_family):
    model = build_family("olmoe")
    attachment, gates = gated(model, budget=FIXED)
    source, ids = torch.tensor([0, 0, 1, 2]), tokens()

    def cost():
        with (
            attachment.from_source(source),
            attachment.record() as records,
            FlopCounterMode(display=False) as counter,
        ):
            loss_of(model, ids).backward()
        return [int(r.selection.spend) for r in records], counter.get_total_flops()

    spend, flops = cost()
    assert spend == [80, 80]
    # Source 0 keeps one link in the first layer: its 20 tokens lose one expert each.
    links = torch.zeros(SHAPE, dtype=torch.bool)
    links[0, 0, 1:] = True
    gates.close(links)
    fewer, less = cost()
    assert fewer == [60, 80]
    # Three matrices of 32 x 16, two FLOPs a multiply-add, three times in a step.
    assert flops - less == 20 * 3 * 2 * 3 * 32 * 16


def test_a_source_that_is_not_known_may_use_what_is_open_to_any(build_family):
    model = build_family("olmoe")
    attachment, gates = gated(model)
    links = torch.zeros(SHAPE, dtype=torch.bool)
    links[:, :, 0] = True
    links[:, 1, 3] = True
    gates.close(links)
    with torch.no_grad():
        gates.values.mul_(0.5)
    other = build_family("olmoe")
    ids = tokens()
    with attachment.record() as records:
        logits = model(ids).logits
    loads = torch.stack([routing.plan.expert_load for routing in records])
    assert not loads[:, 0].any()
    assert (loads[:, 3] > 0).any()
    # Every gate is 1: as if only the first expert had been taken out.
    without, other_gates = gated(other)
    links[:, 1, 3] = False
    other_gates.close(links)
    torch.testing.assert_close(logits, other(ids).logits)
    with without.from_source(0):
        torch.testing.assert_close(logits, other(ids).logits)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_the_gates_is_that_of_finite_differences(build_family, family, training):
    model = build_family(family).double()
    attachment, gates = gated(model)
    close_at_random(gates, share=0.3)
    if not training:
        train_steps(model, attachment)
        model.eval()
    ids, source = tokens(), torch.tensor([0, 1, 2, 1])

    def loss_at(values):
        with gates.replaced(values), attachment.from_source(source):
            return loss_of(model, ids)

    values = gates.values.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(values), values)
    direction = torch.randn(SHAPE, dtype=torch.float64) * gates.is_open
    with torch.no_grad():
        ends = [float(loss_at(values + step * direction)) for step in (1e-3, -1e-3)]
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(
        float((gradient * direction).sum()), rel=0.01
    )
    assert not gradient[~gates.is_open].any()


def test_gates_scale_the_weights_that_a_router_normalised(build_family):
    model = build_family("qwen3_moe")
    attachment, gates = gated(model, budget=FIXED)
    with torch.no_grad():
        gates.values[:, 1] = 0.25
    with attachment.from_source(torch.tensor([0, 1, 2, 1])), attachment.record() as records:
        model(tokens())
    totals = records[0].plan.combine_weights.sum(dim=1).view(4, 10)
    torch.testing.assert_close(totals[[0, 2]], torch.ones(2, 10))
    torch.testing.assert_close(totals[[1, 3]], torch.full((2, 10), 0.25))


def test_gradient_checkpointing_changes_no_gradient(build_family, family):
    model = build_family(family)
    attachment, gates = gated(model)
    close_at_random(gates)
    with torch.no_grad():
        gates.values.mul_(torch.rand(SHAPE) + 0.5)
    ids, found = tokens(), []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model)
        model.zero_grad()
        gates.values.grad = None
        with attachment.from_source(torch.tensor([0, 1, 2, 1])):
            loss = loss_of(model, ids)
        # The source and the gates of the pass are those of its recomputation.
        with gates.replaced(torch.full(SHAPE, 9.0)):
            loss.backward()
        found.append(gradients(model) | {"gates": gates.values.grad.clone()})
    assert set(found[0]) == set(found[1])
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][key], rtol=1e-4, atol=1e-6, msg=key)


def test_decoding_with_a_cache_routes_as_one_forward_pass(build_family, family):
    model = build_family(family)
    attachment, gates = gated(model)
    close_at_random(gates)
    train_steps(model, attachment)
    model.eval()
    prompt, source = tokens(2, 5), torch.tensor([2, 0])
    with torch.no_grad(), attachment.from_source(source), attachment.record() as steps:
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    with torch.no_grad(), attachment.from_source(source), attachment.record() as whole:
        model(generated[:, :-1])
    for layer, name in enumerate(attachment.layer_names):
        parts = [dense_plan(r.plan, 2) for r in steps if r.name == name]
        expected = dense_plan(whole[layer].plan, 2)
        assert torch.equal(torch.cat(parts, dim=1), expected)
        assert not (expected & ~gates.is_open[layer, source].unsqueeze(1)).any()


def dense_plan(plan, batch):
    links = torch.zeros(plan.keep.shape[0], EXPERTS, dtype=torch.bool)
    links.scatter_(1, plan.expert_ids, plan.keep)
    return links.view(batch, -1, EXPERTS)


def test_controllers_bear_closed_links(build_family):
    model = build_family("olmoe")
    attachment, gates = gated(
        model, controller=lambda experts, device: QuantileBalancing(experts, device=device)
    )
    links = torch.zeros(SHAPE, dtype=torch.bool)
    links[:, :, 5] = True
    links[:, 0, :7] = True
    gates.close(links)
    train_steps(model, attachment, 4)
    for policy in attachment.policies:
        assert torch.isfinite(policy.controller.prices).all()
        assert policy.selector.price is not None


def test_state_is_saved_beside_the_prices(build_family, tmp_path):
    model = build_family("olmoe")
    attachment, gates = gated(model)
    close_at_random(gates)
    gates.take(gates.propose(torch.rand(SHAPE) + 1, threshold=0.1))
    train_steps(model, attachment)
    attachment.save(tmp_path)
    other, restored = gated(build_family("olmoe"))
    other.load(tmp_path)
    assert torch.equal(restored.values, gates.values)
    assert torch.equal(restored.is_open, gates.is_open)
    assert torch.equal(other.policies[1].selector.price, attachment.policies[1].selector.price)
    plain = attach(build_family("olmoe"), budget=BUDGET)
    with pytest.raises(ValueError, match="has link gates, but the model was attached without"):
        plain.load(tmp_path)
    plain.save(tmp_path)
    with pytest.raises(ValueError, match="has no link gates, but the model was attached with them"):
        other.load(tmp_path)


def test_gates_of_another_model_or_corpus_are_refused(build_family):
    gates = LinkGates(num_layers=3, num_sources=SOURCES, num_experts=EXPERTS)
    with pytest.raises(ValueError, match=r"link_gates must have shape \(2, 'any', 8\)"):
        attach(build_family("olmoe"), budget=BUDGET, link_gates=gates)
    attachment, _ = gated(build_family("olmoe"))
    with (
        pytest.raises(ValueError, match=r"link gates must have shape \(2, 4, 8\)"),
        attachment.record_traffic(num_sources=4),
    ):
        pass
    with (
        attachment.from_source(3),
        pytest.raises(ValueError, match=r"source must lie in \[0, 3\), got values from 3 to 3"),
    ):
        attachment.model(tokens())
