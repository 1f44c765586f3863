"""Scorers in place of a model's own rule: equal where they should be, trained, kept and removed."""

import copy

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.integrations.transformers import attach, enable_checkpointing
from drgr.models import tiny_olmoe, tiny_qwen3_moe
from drgr.routing.scores import RouterScores, Scorer, SigmoidScores, SoftmaxScores

BUDGET = TokenBudget(minimum=1, maximum=4, average=2.3)
SIZES = {
    "vocabulary_size": 40,
    "hidden_size": 16,
    "expert_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "seed": 0,
}


class Tempered(Scorer):
    """A scorer with a parameter, a buffer that training moves, and a wish to see the tokens."""

    observes = True

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))
        self.pending = 0

    def forward(self, hidden, weight):
        logits = hidden.float() @ weight.float().T / self.temperature
        scores = logits.softmax(dim=-1)
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())

    def observe(self, routing):
        self.pending += routing.hidden.shape[0]

    def update(self, group=None):
        del group
        self.seen += self.pending
        self.pending = 0


def tokens(*, seed=0):
    return torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(seed))


def train_step(model, attachment, optimizer):
    with attachment.record() as records:
        logits = model(input_ids=tokens(), use_cache=False).logits
    logits.logsumexp(-1).mean().backward()
    attachment.observe(records)
    optimizer.step()
    optimizer.zero_grad()
    attachment.update()
    return records


@pytest.mark.parametrize(("build", "normalised"), [(tiny_olmoe, False), (tiny_qwen3_moe, True)])
@pytest.mark.parametrize("training", [True, False])
def test_softmax_scores_are_the_rule_of_the_softmax_families(build, normalised, training):
    model = build(**SIZES).train(training)
    other = copy.deepcopy(model)
    attach(model, budget=BUDGET)
    attach(other, budget=BUDGET, scorer=lambda _: SoftmaxScores(normalised=normalised))
    outputs = [one(input_ids=tokens(), use_cache=False).logits for one in (model, other)]
    torch.testing.assert_close(*outputs)
    gradients = []
    for one, output in zip((model, other), outputs, strict=True):
        output.square().mean().backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_sigmoid_scores_route_by_the_router_weight_and_weigh_by_their_share():
    model = tiny_olmoe(**SIZES).train()
    seen = []
    attachment = attach(model, budget=BUDGET, scorer=lambda _: SigmoidScores())
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with attachment.record() as records:
        model(input_ids=tokens(), use_cache=False)
    handle.remove()
    scores = torch.sigmoid(seen[0].reshape(-1, 16) @ router.weight.T)
    routing = records[0]
    torch.testing.assert_close(routing.scores, scores)
    for row in range(len(scores)):
        chosen = routing.plan.expert_ids[row][routing.plan.keep[row]]
        best = scores[row].argsort(descending=True)[: len(chosen)]
        assert set(chosen.tolist()) == set(best.tolist())
        expected = scores[row, chosen] / scores[row, chosen].sum()
        torch.testing.assert_close(routing.plan.combine_weights[row][: len(chosen)], expected)


def test_a_scorer_trains_with_the_model_and_sees_what_it_asked_for():
    model = tiny_olmoe(**SIZES).train()
    attachment = attach(model, budget=BUDGET, scorer=lambda _: Tempered())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    records = train_step(model, attachment, optimizer)
    scorers = [model.model.layers[layer].mlp.gate.scorer for layer in range(2)]
    assert all(scorer.temperature != 1 for scorer in scorers)
    assert all(scorer.seen == tokens().numel() for scorer in scorers)
    assert all(not record.hidden.requires_grad for record in records)
    model.eval()
    with attachment.record() as records:
        model(input_ids=tokens(), use_cache=False)
    assert all(scorer.seen == tokens().numel() for scorer in scorers)


def test_the_scorer_is_saved_restored_and_removed(tmp_path):
    model = tiny_olmoe(**SIZES).train()
    keys = set(model.state_dict())
    attachment = attach(model, budget=BUDGET, scorer=lambda _: Tempered())
    train_step(model, attachment, torch.optim.SGD(model.parameters(), lr=0.1))
    attachment.save(tmp_path)
    other = tiny_olmoe(**SIZES)
    again = attach(other, budget=BUDGET, scorer=lambda _: Tempered())
    again.load(tmp_path)
    torch.testing.assert_close(again.state_dict(), attachment.state_dict())
    plain = attach(tiny_olmoe(**SIZES), budget=BUDGET)
    with pytest.raises(ValueError, match="attach with the scorer that it was saved with"):
        plain.load(tmp_path)
    with pytest.raises(ValueError, match="attach with the scorer that it was saved with"):
        again.load_state_dict(plain.state_dict())
    attachment.detach()
    assert set(model.state_dict()) == keys
    attach(model, budget=BUDGET)


def test_a_checkpointed_pass_scores_again_without_counting_again():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_olmoe(**SIZES).train()
        if checkpointed:
            enable_checkpointing(model)
        attachment = attach(model, budget=BUDGET, scorer=lambda _: Tempered())
        with attachment.record() as records:
            logits = model(input_ids=tokens(), use_cache=False).logits
        logits.square().mean().backward()
        assert len(records) == 2
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_exactly_one_of_budget_and_selector():
    with pytest.raises(ValueError, match="exactly one of budget and selector must be given, got n"):
        attach(tiny_olmoe(**SIZES))
    with pytest.raises(ValueError, match="exactly one of budget and selector must be given, got b"):
        attach(tiny_olmoe(**SIZES), budget=BUDGET, selector=lambda _: None)
