"""Gradient traffic of whole models, against the gradients that hooks of the test see."""

import pytest
import torch
from torch import nn

from drgr.budgets import TokenBudget
from drgr.integrations.transformers import attach, enable_checkpointing

BUDGET = TokenBudget(minimum=1, maximum=4, average=1.7)
SOURCES, EXPERTS = 3, 8


def tokens(batch=4, length=10):
    return torch.randint(2, 64, (batch, length))


def loss_of(model, ids, **kwargs):
    logits = model(input_ids=ids, use_cache=False, **kwargs).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    mask = kwargs.get("attention_mask")
    if mask is not None:
        losses = losses * mask[:, 1:].flatten()
    return losses.mean()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Watch:
    """Keeps the gradients that arrive at the experts' outputs, without the package's help."""

    def __init__(self, model, attachment):
        self.arriving = {}
        self.handles = [
            model.get_submodule(f"{name}.experts").register_forward_hook(self.keep(name))
            for name in attachment.layer_names
        ]

    def keep(self, name):
        def hook(module, args, output):
            if torch._C._current_graph_task_id() == -1 and output.requires_grad:
                output.register_hook(lambda gradient: self.arriving.__setitem__(name, gradient))

        return hook


def explicit_traffic(routing, arriving, source):
    """The definition for one layer, from its record; differentiable in the combine weights."""
    norms = arriving.double().square().sum(dim=1).sqrt()
    dense = torch.zeros(len(norms), EXPERTS, dtype=torch.float64)
    weights = (routing.plan.combine_weights * routing.plan.keep).double()
    dense = dense.scatter_add(1, routing.plan.expert_ids, weights)
    rows = [(norms.unsqueeze(1) * dense)[source == place].sum(dim=0) for place in range(SOURCES)]
    return torch.stack(rows)


def measured(model, attachment, ids, source, *, coefficient=0.0, **kwargs):
    """Traffic, records and gradients at the experts of one step."""
    watch = Watch(model, attachment)
    with (
        attachment.from_source(source),
        attachment.record() as records,
        attachment.record_traffic(num_sources=SOURCES, coefficient=coefficient) as traffic,
    ):
        loss = loss_of(model, ids, **kwargs)
    assert not traffic.any()
    loss.backward()
    for handle in watch.handles:
        handle.remove()
    return traffic, records, [watch.arriving[name] for name in attachment.layer_names]


def test_traffic_is_what_hooks_of_the_test_see(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET)
    source = torch.tensor([0, 2, 2, 0])
    traffic, records, arriving = measured(model, attachment, tokens(), source)
    assert traffic.shape == (2, SOURCES, EXPERTS)
    for layer, routing, gradient in zip(traffic, records, arriving, strict=True):
        expected = explicit_traffic(routing, gradient, source.repeat_interleave(10))
        torch.testing.assert_close(layer, expected.detach(), rtol=1e-5, atol=1e-9)
        assert not layer[1].any()
        assert layer.sum() > 0


def test_a_coefficient_of_zero_changes_no_bit_of_any_gradient(build_family, family):
    model, other = build_family(family), build_family(family)
    attachment = attach(model, budget=BUDGET)
    attach(other, budget=BUDGET)
    ids = tokens()
    measured(model, attachment, ids, 1)
    loss_of(other, ids).backward()
    expected = gradients(other)
    assert all(torch.equal(gradient, expected[key]) for key, gradient in gradients(model).items())


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_the_penalty_is_that_of_the_definition(build_family, family):
    """With one layer, so that no gradient of a later layer's penalty arrives at its output."""
    model, other = (build_family(family, num_hidden_layers=1).double() for _ in range(2))
    attachment, reference = attach(model, budget=BUDGET), attach(other, budget=BUDGET)
    ids, source = tokens(), torch.tensor([0, 1, 2, 0])
    traffic, _, arriving = measured(model, attachment, ids, source, coefficient=0.4)

    with reference.record() as records:
        loss = loss_of(other, ids)
    amounts = explicit_traffic(records[0], arriving[0], source.repeat_interleave(10))
    penalty = 0.4 / 2 * (amounts / amounts.mean()).square().mean()
    (loss + penalty).backward()
    torch.testing.assert_close(traffic[0], amounts.detach())
    expected, ours = gradients(other), gradients(model)
    for key, gradient in expected.items():
        # Norms of these models run in float32 whatever the dtype of the weights.
        error = (ours[key] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, key
    plain = build_family(family, num_hidden_layers=1).double()
    attach(plain, budget=BUDGET)
    loss_of(plain, ids).backward()
    name = next(key for key in expected if "gate.weight" in key or "router.weight" in key)
    moved = (expected[name] - plain.get_parameter(name).grad).abs().max()
    assert moved > 1e-3 * expected[name].abs().max()


def test_gradient_checkpointing_counts_once(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET)
    ids, source = tokens(), torch.tensor([0, 1, 2, 0])
    plain, _, _ = measured(model, attachment, ids, source, coefficient=0.1)
    reference = gradients(model)
    model.zero_grad()
    enable_checkpointing(model)
    with (
        attachment.from_source(source),
        attachment.record_traffic(num_sources=SOURCES, coefficient=0.1) as traffic,
    ):
        loss = loss_of(model, ids)
    loss.backward()
    torch.testing.assert_close(traffic, plain, rtol=1e-5, atol=1e-9)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, reference[key], rtol=1e-4, atol=1e-6)


def test_padding_has_no_traffic(build_family, family):
    model = build_family(family)
    attachment = attach(model, budget=BUDGET)
    ids, source = tokens(2, 8), torch.tensor([0, 1])
    padded = torch.cat([ids, torch.full((2, 4), 3)], dim=1)
    mask = torch.cat([torch.ones(2, 8), torch.zeros(2, 4)], dim=1).long()
    full = torch.ones(2, 8, dtype=torch.long)
    plain, _, _ = measured(model, attachment, ids, source, attention_mask=full)
    traffic, _, _ = measured(model, attachment, padded, source, attention_mask=mask)
    # Means over 2 x 7 and 2 x 11 predictions.
    torch.testing.assert_close(traffic * 22, plain * 14, rtol=1e-3, atol=1e-6)


def test_autocast_is_close_to_full_precision(build_family):
    model = build_family("olmoe")
    attachment = attach(model, budget=TokenBudget(minimum=8, maximum=8, average=8))
    ids, source = tokens(), torch.tensor([0, 1, 2, 0])
    plain, _, _ = measured(model, attachment, ids, source)
    with torch.autocast("cpu", torch.bfloat16):
        low, _, _ = measured(model, attachment, ids, source)
    torch.testing.assert_close(low, plain, rtol=0.1, atol=1e-4)
    assert not torch.equal(low, plain)


def test_micro_batches_add_up_to_their_batch(build_family):
    model = build_family("olmoe")
    attachment = attach(model, budget=TokenBudget(minimum=2, maximum=2, average=2))
    ids, source = tokens(), torch.tensor([0, 1, 2, 0])
    whole, _, _ = measured(model, attachment, ids, source)
    with attachment.record_traffic(num_sources=SOURCES) as parts:
        for rows in (slice(0, 1), slice(1, 4)):
            with attachment.from_source(source[rows]):
                loss = loss_of(model, ids[rows]) * len(ids[rows]) / 4
            loss.backward()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_sources_of_single_tokens(build_family):
    model = build_family("olmoe")
    attachment = attach(model, budget=BUDGET)
    ids, source = tokens(), torch.randint(SOURCES, (4, 10))
    traffic, records, arriving = measured(model, attachment, ids, source)
    expected = explicit_traffic(records[0], arriving[0], source.flatten())
    torch.testing.assert_close(traffic[0], expected.detach(), rtol=1e-5, atol=1e-9)


def test_recordings_may_overlap(build_family):
    model = build_family("olmoe")
    attachment = attach(model, budget=BUDGET)
    with attachment.from_source(0), attachment.record_traffic(num_sources=2) as outer:
        with attachment.record_traffic(num_sources=1) as inner:
            loss_of(model, tokens()).backward()
        loss_of(model, tokens()).backward()
    assert inner.sum() > 0
    assert (outer[:, 0].sum() > inner.sum()).all()
    assert not outer[:, 1].any()


def test_evaluation_measures_nothing(build_family):
    model = build_family("olmoe").eval()
    attachment = attach(model, budget=BUDGET)
    with (
        torch.no_grad(),
        attachment.from_source(0),
        attachment.record_traffic(num_sources=1) as traffic,
    ):
        model(tokens())
    assert not traffic.any()


class TestRefusals:
    def test_no_source(self, build_family):
        model = build_family("olmoe")
        attachment = attach(model, budget=BUDGET)
        with (
            attachment.record_traffic(num_sources=SOURCES),
            pytest.raises(ValueError, match=r"inside of attachment\.from_source"),
        ):
            model(tokens())

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (3, r"source must lie in \[0, 3\), got values from 3 to 3"),
            (torch.tensor([0, 1, 2, -1]), r"source must lie in \[0, 3\), got values from -1 to 2"),
            (torch.tensor([0, 1]), r"one entry for each of the 4 sequences.* got shape \(2,\)"),
            (torch.zeros(4, 9).long(), r"or shape \(4, 10\), got shape \(4, 9\)"),
        ],
    )
    def test_sources_that_do_not_fit_the_batch(self, build_family, source, message):
        model = build_family("olmoe")
        attachment = attach(model, budget=BUDGET)
        with (
            attachment.from_source(source),
            attachment.record_traffic(num_sources=SOURCES),
            pytest.raises(ValueError, match=message),
        ):
            model(tokens())

    def test_sources_of_another_kind(self, build_family):
        attachment = attach(build_family("olmoe"), budget=BUDGET)
        with (
            pytest.raises(TypeError, match=r"int64 tensor, got torch\.float32; convert it"),
            attachment.from_source(torch.zeros(4)),
        ):
            pass
        with (
            pytest.raises(TypeError, match="int64 tensor, got str"),
            attachment.from_source("law"),
        ):
            pass
        with (
            pytest.raises(ValueError, match=r"\(batch,\) or \(batch, length\), got \(1, 1, 1\)"),
            attachment.from_source(torch.zeros(1, 1, 1).long()),
        ):
            pass

    def test_a_call_without_tokens(self, build_family):
        model = build_family("olmoe")
        attachment = attach(model, budget=BUDGET)
        with (
            attachment.from_source(0),
            pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"),
        ):
            model.base_model(input_ids=None)

    def test_reentrant_checkpointing(self, build_family):
        model = build_family("olmoe")
        attachment = attach(model, budget=BUDGET)
        enable_checkpointing(model, use_reentrant=True)
        with (
            attachment.from_source(0),
            attachment.record_traffic(num_sources=1),
            pytest.raises(ValueError, match="must not be reentrant"),
        ):
            model(inputs_embeds=torch.randn(1, 4, 32, requires_grad=True))

    def test_contexts_end_with_their_block(self, build_family):
        model = build_family("olmoe")
        attachment = attach(model, budget=BUDGET)
        with attachment.from_source(0):
            with attachment.from_source(1):
                pass
            assert attachment._given_source == 0
        assert attachment._given_source is None
        with attachment.record_traffic(num_sources=1):
            pass
        model(tokens())
