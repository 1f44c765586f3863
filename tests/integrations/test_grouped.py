"""Experts of transformers models run by the package's own grouped computation."""

import pytest
import torch
from torch import nn

from drgr.budgets import TokenBudget
from drgr.errors import UnknownRouterError
from drgr.integrations.transformers import attach, enable_checkpointing

BUDGET = TokenBudget(minimum=1, maximum=4, average=1.7)
GATED = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "deepseek_v3_grouped"]
IDS = torch.randint(2, 64, (3, 16), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model):
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", GATED)
def test_it_computes_the_same(build_family, name, checkpointed):
    model = build_family(name)
    if checkpointed:
        enable_checkpointing(model)
    found = []
    for grouped in (False, True):
        attachment = attach(model, budget=BUDGET, grouped=grouped)
        found.append(loss_and_gradients(model))
        with pytest.raises(ValueError, match="is attached already"):
            attach(model, budget=BUDGET)
        attachment.detach()
    (loss, gradients), (expected_loss, expected) = reversed(found)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


def test_it_is_the_grouped_computation_that_runs(build_family, monkeypatch):
    from drgr.integrations.transformers import grouped_experts as module

    model = build_family("olmoe")
    attachment = attach(model, budget=BUDGET, grouped=True)
    calls = []
    own = module.grouped_experts
    monkeypatch.setattr(
        module, "grouped_experts", lambda *arguments: calls.append(1) or own(*arguments)
    )
    loss_and_gradients(model)
    assert len(calls) == len(attachment.layer_names)
    with attachment.record_activations() as seen:  # which only the other computation shows
        loss_and_gradients(model)
    assert len(seen) == len(attachment.layer_names)
    assert len(calls) == len(attachment.layer_names)


def test_other_experts_are_refused(build_family):
    message = r"GptOssExperts\) has biases, transposed weights, .*; attach with grouped=False"
    with pytest.raises(UnknownRouterError, match=message):
        attach(build_family("gpt_oss"), budget=BUDGET, grouped=True)


def test_other_activations_are_found_out(build_family):
    model = build_family("olmoe")
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.GELU()
    with pytest.raises(UnknownRouterError, match="skipping experts must equal"):
        attach(model, budget=BUDGET, grouped=True)
    attach(model, budget=BUDGET)
