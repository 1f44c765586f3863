"""The transformers adapter on the five families it promises to support."""

import copy

import pytest
import torch
from torch import nn

from drgr.budgets import TokenBudget
from drgr.errors import UnknownRouterError
from drgr.integrations.transformers import attach, enable_checkpointing, find_contract, find_sites
from drgr.integrations.transformers import experts as experts_module
from drgr.routing import QuantileBalancing, SignBias, load_balancing_loss

BUDGET = TokenBudget(minimum=1, maximum=4, average=1.7)
ALL_FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "deepseek_v3_grouped"]


def tokens(batch=3, length=16, vocabulary=64):
    return torch.randint(2, vocabulary, (batch, length))


def loss_of(model, ids, **kwargs):
    logits = model(input_ids=ids, use_cache=False, **kwargs).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_fixed_top_k_reproduces_the_model_itself(build_family, name):
    model = build_family(name)
    ids = tokens()
    loss = loss_of(model, ids)
    loss.backward()
    reference, reference_gradients = loss.detach(), gradients(model)
    model.zero_grad()

    attachment = attach(model, budget=TokenBudget(minimum=2, maximum=2, average=2))
    loss = loss_of(model, ids)
    loss.backward()
    torch.testing.assert_close(loss.detach(), reference, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, reference_gradients[key], rtol=1e-4, atol=1e-5)
    assert len(attachment.layer_names) == 2


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_batch_meets_its_budget_and_every_token_its_bounds(build_family, name):
    model = build_family(name)
    attachment = attach(model, budget=BUDGET)
    for batch in (1, 2, 5):
        ids = tokens(batch, 13)
        with attachment.record() as records:
            loss_of(model, ids).backward()
        assert [routing.name for routing in records] == list(attachment.layer_names)
        for routing in records:
            per_token = routing.plan.keep.sum(dim=1)
            assert int(per_token.sum()) == int(1.7 * batch * 13 + 1e-9)
            assert int(per_token.min()) >= 1
            assert int(per_token.max()) <= 4
            assert int(routing.plan.expert_load.sum()) == int(per_token.sum())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_detach_restores_the_model_bit_for_bit(build_family, family):
    model = build_family(family)
    model.eval()
    untouched = copy.deepcopy(model)
    attachment = attach(model, budget=BUDGET)
    keys = list(model.state_dict())
    ids = tokens()
    with torch.no_grad():
        changed = model(ids).logits
        attachment.detach()
        after, expected = model(ids).logits, untouched(ids).logits
    assert not torch.equal(changed, expected)
    assert torch.equal(after, expected)
    assert keys == list(untouched.state_dict())
    assert not any(m._forward_hooks for m in model.modules())
    attach(model, budget=BUDGET).detach()


def test_router_logits_and_auxiliary_loss_stay_available(build_family, family):
    model = build_family(family)
    attach(model, budget=BUDGET)
    ids = tokens()
    if family == "deepseek_v3":
        assert model(input_ids=ids).logits.shape == (3, 16, 64)
        return
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert len(output.router_logits) == 2
    assert output.router_logits[0].shape == (48, 8)
    output.loss.backward()
    assert torch.isfinite(output.aux_loss)


def test_saved_models_load_without_this_package_attached(build_family, family, tmp_path):
    model = build_family(family)
    model.eval()
    expected = model(tokens_fixed := tokens()).logits
    attach(model, budget=BUDGET)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config._experts_implementation != experts_module.IMPLEMENTATION
    torch.testing.assert_close(loaded(tokens_fixed).logits, expected, rtol=1e-5, atol=1e-5)


def test_padding_gets_no_expert_and_changes_nothing_else(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET)
    ids = tokens(2, 12)
    padded = torch.cat([ids, torch.full((2, 4), 3)], dim=1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 4)], dim=1).long()
    with attachment.record() as plain:
        expected = model(input_ids=ids, use_cache=False).logits
    with attachment.record() as records:
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[:, :12], expected, rtol=1e-4, atol=1e-4)
    for routing, reference in zip(records, plain, strict=True):
        assert not routing.plan.keep[~mask.bool().flatten()].any()
        assert torch.equal(routing.plan.expert_load, reference.plan.expert_load)
        aux = load_balancing_loss(routing.scores, routing.plan.expert_load, valid=routing.valid)
        reference_aux = load_balancing_loss(reference.scores, reference.plan.expert_load)
        torch.testing.assert_close(aux, reference_aux, rtol=1e-4, atol=1e-4)


def test_a_mask_of_another_rank_is_refused_in_training(build_family):
    model = build_family("olmoe")
    attach(model, budget=BUDGET)
    with pytest.raises(ValueError, match="attention_mask must be 2-D"):
        model(input_ids=tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def train_steps(model, attachment, num_steps=3):
    """Teaches the batch price and the controllers something."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(num_steps):
        with attachment.record() as records:
            loss_of(model, tokens()).backward()
        attachment.observe(records)
        optimizer.step()
        optimizer.zero_grad()
        attachment.update()


def test_evaluation_routes_each_token_by_itself(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET)
    train_steps(model, attachment)
    state = copy.deepcopy(attachment.state_dict())
    model.eval()
    ids = tokens(4, 16)
    with torch.no_grad(), attachment.record() as together:
        model(ids)
    for row in range(4):
        with torch.no_grad(), attachment.record() as alone:
            model(ids[row : row + 1])
        for one, all_rows in zip(alone, together, strict=True):
            part = slice(row * 16, row * 16 + 16)
            assert torch.equal(one.plan.keep, all_rows.plan.keep[part])
            kept = one.plan.keep
            assert torch.equal(one.plan.expert_ids[kept], all_rows.plan.expert_ids[part][kept])
    torch.testing.assert_close(attachment.state_dict(), state, rtol=0, atol=0)


def test_decoding_with_a_cache_routes_as_one_forward_pass(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET)
    train_steps(model, attachment)
    model.eval()
    prompt = tokens(2, 5)
    with torch.no_grad(), attachment.record() as steps:
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
    with torch.no_grad(), attachment.record() as whole:
        model(generated[:, :-1])
    for layer, name in enumerate(attachment.layer_names):
        parts = [r.plan for r in steps if r.name == name]
        dense = torch.cat([dense_plan(p, 2) for p in parts], dim=1)
        assert torch.equal(dense, dense_plan(whole[layer].plan, 2))
    counts = whole[0].plan.keep.sum(dim=1)
    assert counts.min() < counts.max()


def test_decoding_after_a_padded_prompt_gives_every_new_token_its_experts(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET)
    train_steps(model, attachment)
    model.eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        past = model(tokens(2, 6), attention_mask=mask[:, :6], use_cache=True).past_key_values
        with attachment.record() as records:
            model(tokens(2, 1), attention_mask=mask, past_key_values=past, use_cache=True)
    assert all(bool((routing.plan.keep.sum(dim=1) >= 1).all()) for routing in records)


def dense_plan(plan, batch, num_experts=8):
    """The plan as a mask (batch, length, experts)."""
    mask = torch.zeros(plan.keep.shape[0], num_experts, dtype=torch.bool)
    mask.scatter_(1, plan.expert_ids, plan.keep)
    return mask.view(batch, -1, num_experts)


def test_gradient_checkpointing_counts_once_and_changes_no_gradient(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET, controller=sign_bias)
    ids = tokens()
    with attachment.record() as plain:
        loss_of(model, ids).backward()
    reference = gradients(model)
    model.zero_grad()
    enable_checkpointing(model)
    with attachment.record() as records:
        loss_of(model, ids).backward()
        assert len(records) == len(plain) == 2
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, reference[key], rtol=1e-5, atol=1e-6)
    assert all(not layer.pending for layer in attachment._layers)


def sign_bias(num_experts, device):
    return SignBias(num_experts, step_size=0.01, device=device)


def quantile(num_experts, device):
    return QuantileBalancing(num_experts, device=device)


@pytest.mark.parametrize("controller", [sign_bias, quantile])
def test_controllers_are_moved_by_training_only(build_family, controller):
    model = build_family("olmoe")
    attachment = attach(model, budget=BUDGET, controller=controller)
    model.eval()
    with torch.no_grad():
        model(tokens())
    attachment.update()
    assert all(torch.equal(p.controller.prices, torch.zeros(8)) for p in attachment.policies)
    model.train()
    train_steps(model, attachment, 1)
    assert all(p.controller.prices.abs().max() > 0 for p in attachment.policies)


def test_state_round_trip(build_family):
    model = build_family("olmoe")
    attachment = attach(model, budget=BUDGET, controller=quantile)
    train_steps(model, attachment)
    other = attach(build_family("olmoe"), budget=BUDGET, controller=quantile)
    other.load_state_dict(attachment.state_dict())
    for mine, theirs in zip(attachment.policies, other.policies, strict=True):
        assert torch.equal(mine.controller.prices, theirs.controller.prices)
        assert torch.equal(mine.selector.price, theirs.selector.price)
    with pytest.raises(ValueError, match="belongs to another model"):
        other.load_state_dict({"x": {}})


def test_skipped_experts_cost_no_flops(build_family, family):
    from torch.utils.flop_counter import FlopCounterMode

    model = build_family(family)
    ids = tokens()
    flops = {}
    for average in (1, 2, 4):
        budget = TokenBudget(minimum=1, maximum=4, average=average)
        attachment = attach(model, budget=budget)
        with FlopCounterMode(display=False) as counter:
            loss_of(model, ids).backward()
        flops[average] = counter.get_total_flops()
        attachment.detach()
    per_expert = flops[2] - flops[1]
    assert per_expert > 0
    assert flops[4] - flops[2] == pytest.approx(2 * per_expert, rel=0.02)


class TestRefusals:
    def test_a_model_without_moe_layers(self):
        with pytest.raises(UnknownRouterError, match="no MoE layer"):
            attach(nn.Linear(2, 2), budget=BUDGET)

    def test_attached_twice(self, build_family):
        model = build_family("olmoe")
        attach(model, budget=BUDGET)
        with pytest.raises(ValueError, match="attached already"):
            attach(model, budget=BUDGET)

    def test_an_unknown_rule(self, build_family):
        model = build_family("olmoe")
        router = find_sites(model)[0].router
        forward = type(router).forward

        class Other(type(router)):
            def forward(self, hidden_states):
                logits, weights, ids = forward(self, hidden_states)
                return logits, weights.square(), ids

        router.__class__ = Other
        with pytest.raises(UnknownRouterError, match="none of the known rules"):
            attach(model, budget=BUDGET)
        assert model.config._experts_implementation != experts_module.IMPLEMENTATION

    @pytest.mark.parametrize("output", [lambda x: x, lambda x: (x, x), lambda x: (x, x, x)])
    def test_no_triple(self, output):
        class Router(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(4, 8))

            def forward(self, hidden_states):
                return output(hidden_states)

        with pytest.raises(UnknownRouterError, match="must return"):
            find_contract(Router(), "block.gate")

    def test_no_weight(self):
        with pytest.raises(UnknownRouterError, match="must have a weight"):
            find_contract(nn.Identity(), "block.gate")

    def test_a_block_with_two_routers(self, build_family):
        model = build_family("olmoe")
        block = model.model.layers[0].mlp
        block.router = nn.Linear(2, 2)
        with pytest.raises(UnknownRouterError, match="not exactly one router"):
            attach(model, budget=BUDGET)

    @pytest.mark.parametrize("mark", [{"_is_expert_parallel": True}, {"num_experts": 4}])
    def test_expert_parallelism(self, build_family, mark):
        model = build_family("olmoe")
        vars(model.model.layers[0].mlp.experts).update(mark)
        with pytest.raises(UnknownRouterError, match="expert parallelism"):
            attach(model, budget=BUDGET)

    def test_more_experts_than_a_token_may_use(self, build_family):
        with pytest.raises(ValueError, match="at most the 4 experts"):
            attach(
                build_family("deepseek_v3_grouped"),
                budget=TokenBudget(minimum=1, maximum=5, average=2),
            )

    def test_skipping_that_is_wrong(self, build_family, monkeypatch):
        def wrong(experts, hidden_states, top_k_index, top_k_weights):
            return 1.01 * experts_module.sparse_experts_forward(
                experts, hidden_states, top_k_index, top_k_weights
            )

        experts_module.register()
        monkeypatch.setitem(
            experts_module.ALL_EXPERTS_FUNCTIONS._global_mapping,
            experts_module.IMPLEMENTATION,
            wrong,
        )
        monkeypatch.setattr(experts_module, "register", lambda: None)
        with pytest.raises(UnknownRouterError, match="skipping experts must equal"):
            experts_module.check_skipping(find_sites(build_family("olmoe"))[0].experts, "block")

    def test_records_of_two_passes(self, build_family):
        model = build_family("olmoe")
        attachment = attach(model, budget=BUDGET)
        with attachment.record() as records:
            model(tokens())
            model(tokens())
        with pytest.raises(ValueError, match="one forward pass at a time"):
            attachment.observe(records)

    def test_reentrant_checkpointing(self, build_family):
        model = build_family("olmoe")
        attachment = attach(model, budget=BUDGET)
        enable_checkpointing(model, use_reentrant=True)
        with attachment.record(), pytest.raises(ValueError, match="must not be reentrant"):
            model(inputs_embeds=torch.randn(1, 4, 32, requires_grad=True))
