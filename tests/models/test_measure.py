"""Costs read off the module tree, against the products that torch counts as they run."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from drgr.budgets import TokenBudget
from drgr.budgets.flops import forward_flops, training_flops
from drgr.errors import ConfigError
from drgr.integrations.transformers import attach, enable_checkpointing
from drgr.models import measure_flops

SEQUENCES, LENGTH, EXPERTS_PER_TOKEN, MOE_LAYERS = 2, 24, 2, 2
TOKENS = SEQUENCES * LENGTH
ASSIGNMENTS = TOKENS * EXPERTS_PER_TOKEN * MOE_LAYERS
VISIBLE = {"attn_implementation": "eager", "experts_implementation": "eager"}
BATCH = {"tokens": TOKENS, "sequence_length": LENGTH, "assignments": ASSIGNMENTS}


def expert_modules(model):
    return {name: part for name, part in model.named_modules() if name.endswith(".experts")}


def count(model, *, backward, **inputs):
    ids = torch.randint(2, 64, (SEQUENCES, LENGTH))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def test_agrees_with_the_counter(family, build_family):
    model = build_family(family, **VISIBLE)
    costs = measure_flops(model, expert_modules(model))
    assert count(model, backward=False) == pytest.approx(forward_flops(costs, **BATCH), rel=0.02)
    assert count(model, backward=True) == pytest.approx(training_flops(costs, **BATCH), rel=0.02)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
        ("olmoe", {"tie_word_embeddings": True}),
        ("deepseek_v3_grouped", {"q_lora_rank": None, "n_shared_experts": 2}),
        ("mixtral", {"num_key_value_heads": 1}),
    ],
)
def test_agrees_on_variants(build_family, name, fields):
    model = build_family(name, **VISIBLE, **fields)
    costs = measure_flops(model, expert_modules(model))
    assert len(expert_modules(model)) == MOE_LAYERS
    assert count(model, backward=True) == pytest.approx(training_flops(costs, **BATCH), rel=0.02)


def test_each_term_alone_agrees_with_the_counter(family, build_family):
    """Terms are told apart: experts by skipping them all, attention by the length."""
    model = build_family(family, **VISIBLE)
    costs = measure_flops(model, expert_modules(model))
    ids = torch.randint(2, 64, (1, 48))

    def forward(length):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids[:, :length], use_cache=False)
        by_module = counter.get_flop_counts()
        experts = sum(sum(by_module[key].values()) for key in by_module if key.endswith(".experts"))
        return counter.get_total_flops() - experts, experts

    (rest, experts), (longer_rest, longer_experts) = forward(24), forward(48)
    per_layer = 24 * EXPERTS_PER_TOKEN * MOE_LAYERS
    assert experts == costs.per_assignment * per_layer
    assert longer_experts == 2 * experts
    # A second difference in the length leaves the quadratic term: 48 * 48 - 2 * 24 * 24 pairs.
    assert longer_rest - 2 * rest == costs.attention_per_pair * 2 * 24 * 24
    assert rest - costs.attention_per_pair * 24 * 24 == pytest.approx(
        24 * costs.dense_per_token, rel=0.01
    )


def test_skipped_experts_leave_the_count(build_family):
    model = build_family("olmoe", **VISIBLE)
    costs = measure_flops(model, expert_modules(model))
    attach(model, budget=TokenBudget(minimum=1, maximum=2, average=1))
    half = {**BATCH, "assignments": ASSIGNMENTS // 2}
    assert count(model, backward=True) == pytest.approx(training_flops(costs, **half), rel=0.02)


def test_checkpointing_costs_at_most_the_formula(family, build_family):
    model = build_family(family, **VISIBLE)
    enable_checkpointing(model)
    costs = measure_flops(model, expert_modules(model))
    counted = count(model, backward=True)
    without = training_flops(costs, **BATCH)
    formula = training_flops(costs, **BATCH, gradient_checkpointing=True)
    assert 1.25 * without < counted <= 1.0001 * formula < 1.03 * counted


def test_costs_of_olmoe_1b_7b_match_its_published_size():
    """1.3 billion active parameters: two FLOPs for each but the embedding's."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(intermediate_size=1024))
    costs = measure_flops(model, expert_modules(model))
    active_flops = costs.dense_per_token + 16 * 8 * costs.per_assignment
    assert active_flops / 2 + 50304 * 2048 == pytest.approx(1.28e9, rel=0.01)
    assert costs.head_per_token == 2 * 50304 * 2048


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.o_proj = nn.Linear(8, 4)


class Experts(nn.Module):
    def __init__(self, *shape, dtype=torch.float32):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


def test_counts_by_hand():
    """A width of 4, 2 experts of inner width 3, heads of total width 8; experts are not dense."""
    experts = Experts(2, 3, 4)
    model = nn.ModuleList([nn.Embedding(10, 4), Attention(), nn.LayerNorm(4), experts])
    costs = measure_flops(model, {"3": experts})
    assert costs.dense_per_token == 2 * 8 * 4
    assert costs.per_assignment == 2 * 3 * 4
    assert costs.attention_per_pair == 4 * 8
    assert costs.head_per_token == 0


def test_refuses_a_weight_that_it_cannot_place():
    model = nn.ModuleDict({"mixer": nn.Conv1d(4, 4, 2), "attention": Attention()})
    with pytest.raises(ConfigError, match=r"weights of mixer must belong to .* got Conv1d with"):
        measure_flops(model, {"experts": Experts(2, 3, 4)})


def test_refuses_experts_left_out_of_the_mapping(build_family):
    model = build_family("olmoe")
    modules = expert_modules(model)
    del modules["model.layers.1.mlp.experts"]
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts .* pass it in expert_modules"):
        measure_flops(model, modules)


@pytest.mark.parametrize("modules", [{}, {"a": Experts(2, 3, 4), "b": Experts(2, 3, 5)}])
def test_refuses_experts_of_several_sizes_or_none(modules):
    with pytest.raises(ConfigError, match="must hold experts of one size in all layers"):
        measure_flops(Attention(), modules)


@pytest.mark.parametrize("experts", [Experts(3, 4), Experts(2, 3, 4, dtype=torch.uint8)])
def test_refuses_experts_that_are_not_stacked_matrices(experts):
    with pytest.raises(ConfigError, match="experts a must hold floating-point weights stacked"):
        measure_flops(Attention(), {"a": experts})


def test_refuses_a_model_without_known_attention():
    with pytest.raises(ConfigError, match="must have attention modules with an output projection"):
        measure_flops(nn.Linear(4, 4), {"a": Experts(2, 3, 4)})
