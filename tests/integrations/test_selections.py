"""Every selection in an attached model: recomputed, decoded token by token, kept and restored."""

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.integrations.transformers import attach, enable_checkpointing
from drgr.models import tiny_olmoe
from drgr.routing import QuantileBalancing
from drgr.routing.selection import (
    BudgetedSelector,
    ProgressiveSelector,
    QuantileSelector,
    SequenceSelector,
    ThresholdSelector,
    TopPSelector,
    batch_percentile,
    layer_budgets,
    sparsification,
)

BUDGET = TokenBudget(minimum=1, maximum=4, average=2.3)
WIDE = TokenBudget(minimum=2, maximum=5, average=3.5)
FACTORIES = {
    "budgeted": lambda _: BudgetedSelector(BUDGET),
    "percentile": lambda place: batch_percentile(70, num_experts=place.num_experts),
    "layers": layer_budgets([WIDE, BUDGET]),
    "progressive": lambda _: ProgressiveSelector(
        sparsification(WIDE, BUDGET, switch_step=1), maximum=5
    ),
    "sequence": lambda _: SequenceSelector(BUDGET),
    "top-p": lambda _: TopPSelector(0.3, minimum=1, maximum=4),
    "threshold": lambda _: ThresholdSelector(0.125, minimum=1, maximum=4),
    "quantile": lambda _: QuantileSelector(BUDGET),
    "expert-quantiles": lambda place: QuantileSelector(BUDGET, num_experts=place.num_experts),
}
every_selection = pytest.mark.parametrize("name", FACTORIES)


def tokens(*, seed=0):
    return torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(seed))


def attached(name):
    model = tiny_olmoe(
        vocabulary_size=40,
        hidden_size=16,
        expert_size=16,
        num_layers=2,
        num_heads=2,
        seed=0,
    ).train()
    with torch.no_grad():  # scores that are far enough apart to differ between tokens
        for layer in model.model.layers:
            layer.mlp.gate.weight *= 20
    attachment = attach(
        model,
        selector=FACTORIES[name],
        controller=lambda num_experts, device: QuantileBalancing(num_experts, device=device),
    )
    return model, attachment


def trained(name):
    model, attachment = attached(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        with attachment.record() as records:
            logits = model(input_ids=tokens(seed=seed), use_cache=False).logits
        logits.logsumexp(-1).mean().backward()
        attachment.observe(records)
        optimizer.step()
        optimizer.zero_grad()
        attachment.update()
    return model, attachment


def routes(records):
    """The experts of every token by layer: masks (T, E)."""
    masks = []
    for record in records:
        mask = torch.zeros(record.scores.shape, dtype=torch.bool)
        masks.append(mask.scatter(1, record.plan.expert_ids, record.plan.keep))
    return masks


@every_selection
def test_decoding_token_by_token_routes_as_one_pass(name):
    model, attachment = trained(name)
    model.eval()
    ids = tokens(seed=9)
    with torch.no_grad(), attachment.record() as records:
        whole = model(input_ids=ids, use_cache=False).logits
    expected = routes(records)
    cache, parts, logits = None, [[], []], []
    for position in range(ids.shape[1]):
        with torch.no_grad(), attachment.record() as records:
            output = model(
                input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True
            )
        cache = output.past_key_values
        logits.append(output.logits)
        for part, mask in zip(parts, routes(records), strict=True):
            part.append(mask)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-5)
    for part, mask in zip(parts, expected, strict=True):
        assert torch.equal(torch.stack(part, dim=1).flatten(0, 1), mask)
    # Else there was nothing to get wrong.
    assert len(torch.cat(expected).sum(dim=1).unique()) > 1


@every_selection
def test_later_tokens_and_other_sequences_change_no_route_at_evaluation(name):
    model, attachment = trained(name)
    model.eval()
    ids, other = tokens(seed=9), tokens(seed=10)
    other[0, :5] = ids[0, :5]
    masks = []
    for batch in (ids, other):
        with torch.no_grad(), attachment.record() as records:
            model(input_ids=batch, use_cache=False)
        masks.append(torch.stack(routes(records)))
    assert torch.equal(masks[0][:, :5], masks[1][:, :5])
    assert not torch.equal(masks[0], masks[1])


@every_selection
def test_a_recomputed_pass_has_the_same_gradient_and_counts_once(name):
    gradients, states = [], []
    for checkpointed in (False, True):
        model, attachment = attached(name)
        if checkpointed:
            enable_checkpointing(model)
        with attachment.record() as records:
            logits = model(input_ids=tokens(), use_cache=False).logits
        attachment.observe(records)
        logits.square().mean().backward()
        attachment.update()
        gradients.append([parameter.grad for parameter in model.parameters()])
        states.append(attachment.state_dict())
        assert len(records) == 2
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*states)


@every_selection
def test_the_state_is_saved_and_restored(tmp_path, name):
    model, attachment = trained(name)
    attachment.save(tmp_path)
    other, again = attached(name)
    again.load(tmp_path)
    torch.testing.assert_close(again.state_dict(), attachment.state_dict())
    other.load_state_dict(model.state_dict())
    outputs = [one.eval()(input_ids=tokens(), use_cache=False).logits for one in (model, other)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_the_state_of_another_selection_is_refused(tmp_path):
    _, attachment = attached("budgeted")
    attachment.save(tmp_path)
    _, other = attached("top-p")
    with pytest.raises(ValueError, match=r"TopPSelector must hold \[\], got \['price'\]"):
        other.load(tmp_path)


def test_padding_gets_no_expert_in_any_selection():
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    for name in FACTORIES:
        model, attachment = attached(name)
        with attachment.record() as records:
            model(input_ids=tokens(), attention_mask=mask, use_cache=False)
        for routing in records:
            assert not routing.plan.keep[mask.flatten() == 0].any()
            assert routing.plan.keep[mask.flatten() == 1].any(dim=1).all()
