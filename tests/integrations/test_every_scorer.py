"""Every scorer in an attached model: what it trains, what it leaves alone, what it keeps."""

import copy

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.integrations.transformers import attach, enable_checkpointing
from drgr.models import tiny_olmoe
from drgr.routing import SignBias, load_balancing_loss
from drgr.routing.scores import (
    CosineScores,
    GaussianScores,
    KMeansScores,
    NoisyScores,
    NormScores,
    ReluRmsScores,
    SigmoidScores,
    SoftmaxScores,
    StochasticGates,
    TsallisHybridScores,
)
from drgr.routing.selection import BudgetedSelector, OpenExperts

SIZES = {
    "vocabulary_size": 40,
    "hidden_size": 16,
    "expert_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 8,
    "seed": 0,
}


def stochastic(estimator):
    return lambda place: StochasticGates(place.num_experts, estimator=estimator)


# A builder for each scorer; those that open experts themselves are followed.
BUDGETED = {
    "softmax": lambda _: SoftmaxScores(),
    "sigmoid": lambda _: SigmoidScores(),
    "cosine": lambda _: CosineScores(),
    "k-means": lambda place: KMeansScores(
        place.num_experts, place.width, dead_after=1, centred=True
    ),
    "norm": lambda place: NormScores(place.num_experts),
    "noisy": lambda place: NoisyScores(place.num_experts, place.width),
    "gaussian": lambda _: GaussianScores(),
}
FOLLOWED = {
    "relu-rms": lambda place: ReluRmsScores(place.num_experts),
    "tsallis-hybrid": lambda _: TsallisHybridScores(),
    "stochastic-times-smooth": stochastic("stochastic-times-smooth"),
    "noisy-rectifier": stochastic("noisy-rectifier"),
    "straight-through": stochastic("straight-through"),
    "reinforce": stochastic("reinforce"),
}
EVERY = BUDGETED | FOLLOWED
DRAWS = {"noisy", "gaussian", "stochastic-times-smooth", "noisy-rectifier", "straight-through"}
DRAWS |= {"reinforce"}


def build(kind, *, followed=None):
    """A tiny model whose router has logits of a useful size, and its attachment."""
    model = tiny_olmoe(**SIZES).train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(30)
    follow = kind in FOLLOWED if followed is None else followed

    def selector(place):
        if follow:
            return OpenExperts(place.num_experts)
        budget = TokenBudget(minimum=1, maximum=4, average=2.3)
        return BudgetedSelector(budget, device=place.device)

    return model, attach(
        model,
        scorer=EVERY[kind],
        selector=selector,
        controller=lambda experts, device: SignBias(experts, device=device),
    )


def gates_of(model):
    return [layer.mlp.gate for layer in model.model.layers]


def tokens(*, seed=0):
    return torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(seed))


def loss_of(model, attachment, *, mask=None, input_ids=None):
    """A training loss with all that a scorer may want, and its records."""
    input_ids = tokens() if input_ids is None else input_ids
    with attachment.record() as records:
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    if mask is not None:
        logits = logits[mask.bool()]
    loss = logits.logsumexp(-1).mean() - logits[..., 0].mean()
    for gate, routing in zip(gates_of(model), records, strict=True):
        if routing.scores.requires_grad:
            balance = load_balancing_loss(
                routing.scores, routing.plan.expert_load, valid=routing.valid
            )
            loss = loss + 0.1 * balance
        if isinstance(gate.scorer, StochasticGates) and gate.scorer._estimator == "reinforce":
            loss = loss + 0.1 * gate.scorer.surrogate(routing, loss.detach())
    return loss, records


def seeded_gradients(kind, *, checkpointed=False, mask=None, input_ids=None, seed=7):
    model, attachment = build(kind)
    if checkpointed:
        enable_checkpointing(model)
    torch.manual_seed(seed)
    loss, records = loss_of(model, attachment, mask=mask, input_ids=input_ids)
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return model, attachment, records, gradients


@pytest.mark.parametrize("kind", EVERY)
def test_gradients_reach_the_router_and_all_of_the_scorer_and_steps_help(kind):
    model, attachment = build(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        torch.manual_seed(step)
        loss, records = loss_of(model, attachment)
        loss.backward()
        if step == 0:
            for gate in gates_of(model):
                for name, parameter in gate.named_parameters():
                    assert parameter.grad is not None, name
                    assert parameter.grad.isfinite().all(), name
                    assert parameter.grad.any(), name
        attachment.observe(records)
        optimizer.step()
        optimizer.zero_grad()
        attachment.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(policy.controller.prices.any() for policy in attachment.policies)


@pytest.mark.parametrize("kind", EVERY)
def test_a_checkpointed_pass_has_the_same_gradients(kind):
    _, _, plain_records, plain = seeded_gradients(kind)
    _, _, records, checkpointed = seeded_gradients(kind, checkpointed=True)
    assert len(records) == len(plain_records) == 2
    assert any("gate" in name for name in plain)
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("kind", EVERY)
def test_what_padding_holds_changes_nothing(kind):
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    mask[2, 2:] = 0
    other = torch.where(mask.bool(), tokens(), tokens(seed=1))
    assert not torch.equal(other, tokens())
    found = []
    for input_ids in (tokens(), other):
        _, attachment, records, gradients = seeded_gradients(kind, mask=mask, input_ids=input_ids)
        attachment.observe(records)
        attachment.update()
        for routing in records:
            assert not routing.plan.keep[~mask.reshape(-1).bool()].any()
        found.append((gradients, attachment.state_dict()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", sorted(set(EVERY) - DRAWS))
def test_padding_at_the_end_is_as_no_padding(kind):
    """Not so for draws, which are one for each token, padding included."""
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[:, 6:] = 0
    outputs = []
    for input_ids, given in ((tokens(), mask), (tokens()[:, :6], None)):
        _, attachment, records, gradients = seeded_gradients(kind, mask=given, input_ids=input_ids)
        attachment.observe(records)
        attachment.update()
        outputs.append((gradients, attachment.state_dict()))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", EVERY)
def test_evaluation_leaves_state_and_randomness_alone_and_decodes_the_same_routes(kind):
    model, attachment = build(kind)
    for step in range(2):
        torch.manual_seed(step)
        _, records = loss_of(model, attachment)
        attachment.observe(records)
        attachment.update()
    model.eval()
    kept = copy.deepcopy((attachment.state_dict(), dict(model.state_dict())))
    random_state = torch.get_rng_state()
    with torch.no_grad(), attachment.record() as whole:
        outputs = model(input_ids=tokens(), use_cache=False).logits
    parts, past = [], None
    for position in range(8):
        with torch.no_grad(), attachment.record() as records:
            output = model(
                input_ids=tokens()[:, position : position + 1], past_key_values=past, use_cache=True
            )
        past = output.past_key_values
        parts.append(records)
        torch.testing.assert_close(output.logits[:, 0], outputs[:, position], atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close((attachment.state_dict(), dict(model.state_dict())), kept)
    for number, routing in enumerate(whole):
        masks = [kept_experts(records[number]) for records in parts]
        together = torch.stack(masks, dim=1).reshape(24, 8)
        assert torch.equal(kept_experts(routing), together)


def kept_experts(routing):
    mask = torch.zeros_like(routing.scores, dtype=torch.bool)
    return mask.scatter(1, routing.plan.expert_ids, routing.plan.keep)


@pytest.mark.parametrize("kind", EVERY)
def test_state_round_trip(kind, tmp_path):
    model, attachment = build(kind)
    other, again = build(kind)
    for step in range(2):
        torch.manual_seed(step)
        _, records = loss_of(model, attachment)
        attachment.observe(records)
        attachment.update()
    attachment.save(tmp_path)
    again.load(tmp_path)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.state_dict(), attachment.state_dict())
    found = []
    for one, its in ((model, attachment), (other, again)):
        torch.manual_seed(3)
        loss, records = loss_of(one, its)
        its.observe(records)
        its.update()
        found.append((loss.detach(), its.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("whole_model", [False, True])
def test_finite_in_half_precision(kind, whole_model):
    model, attachment = build(kind)
    if whole_model:
        for name, parameter in model.named_parameters():
            if "scorer" not in name:
                parameter.data = parameter.data.bfloat16()
        model.model.rotary_emb.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole_model):
        loss, records = loss_of(model, attachment)
    loss.backward()
    attachment.observe(records)
    attachment.update()
    for routing in records:
        assert routing.scores.dtype == torch.float32
        assert routing.scores.isfinite().all()
        assert (routing.scores >= 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    for policy in attachment.policies:
        assert policy.controller.prices.isfinite().all()


@pytest.mark.parametrize("kind", sorted(set(FOLLOWED) - {"tsallis-hybrid"}))
def test_open_experts_run_and_no_others(kind):
    _, _, records, _ = seeded_gradients(kind)
    counts = set()
    for routing in records:
        is_open = routing.values > (0 if kind == "relu-rms" else 0.5)
        has_open = is_open.any(dim=1)
        assert torch.equal(kept_experts(routing)[has_open], is_open[has_open])
        assert (kept_experts(routing)[~has_open].sum(dim=1) == 1).all()
        counts |= set(kept_experts(routing).sum(dim=1).tolist())
    assert len(counts) > 2


@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_budget_takes_open_experts_first(kind):
    model, attachment = build(kind, followed=False)
    loss, records = loss_of(model, attachment)
    loss.backward()
    for routing in records:
        assert int(routing.selection.spend) == int(routing.selection.limit)
        weights = routing.plan.combine_weights
        assert (weights >= 0).all()
        # Weights of 0, of closed experts, come after those of open ones.
        assert (weights[:, 1:][weights[:, :-1] == 0] == 0).all()
