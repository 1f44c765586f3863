"""The layer against loops written out, and what it promises of budgets, padding and state."""

import doctest
import io
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from drgr.budgets import TokenBudget
from drgr.models import GatedExperts, MoELayer, SharedExpert, moe_layer, reference_experts
from drgr.routing import NoPrices, RoutingPolicy, SignBias
from drgr.routing.scores import Scorer, SigmoidScores, SoftmaxScores
from drgr.routing.selection import BudgetedSelector

BUDGET = TokenBudget(minimum=1, maximum=4, average=2.3)
SPARSE = TokenBudget(minimum=0, maximum=3, average=0.5)


def layer_with(
    budget=BUDGET, *, experts=6, width=8, shared=None, dtype=torch.float64, seed=0, **options
):
    torch.manual_seed(seed)
    scorer = options.pop("scorer", None)
    controller = options.pop("controller", NoPrices)(experts)
    return MoELayer(
        GatedExperts(experts, width=width, expert_width=5, dtype=dtype, **options),
        policy=RoutingPolicy(selector=BudgetedSelector(budget), controller=controller),
        scorer=scorer,
        shared=shared,
        name="block",
    )


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def silu(x):
    return x / (1 + (-x).exp())


def written_out(layer, tokens, routing):
    """The routed output of each token, weights from the router's logits of that token alone."""
    rows = []
    for token, vector in enumerate(tokens):
        odds = (layer.router.weight @ vector).exp()
        chosen = routing.plan.expert_ids[token][routing.plan.keep[token]].tolist()
        row = 0 * vector
        for expert in chosen:
            gate, up = layer.experts.gate_up[expert].split(5)
            inner = silu(gate @ vector) * (up @ vector)
            weight = odds[expert] / sum(odds[other] for other in chosen)
            row = row + weight * (layer.experts.down[expert] @ inner)
        rows.append(row)
    return torch.stack(rows)


def gradients_of(output, layer, *inputs):
    direction = draw(*output.shape, seed=7)
    parameters = list(layer.parameters())
    total = (output * direction).sum()
    return torch.autograd.grad(total, [*inputs, *parameters], materialize_grads=True)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("budget", [BUDGET, SPARSE])
@pytest.mark.parametrize("compute", [None, reference_experts])
def test_output_and_gradients_are_those_of_the_formula(is_training, budget, compute):
    options = {} if compute is None else {"compute": compute}
    layer = layer_with(budget, **options).train(is_training)
    hidden = draw(3, 7, 8).requires_grad_()
    output, routing = layer(hidden)
    expected = written_out(layer, hidden.reshape(-1, 8), routing).view(3, 7, 8)
    torch.testing.assert_close(output, expected)
    mine = gradients_of(output, layer, hidden)
    for one, other in zip(mine, gradients_of(expected, layer, hidden), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_by_finite_differences():
    layer = layer_with(experts=3, width=3, budget=TokenBudget(minimum=1, maximum=2, average=1.5))
    names = [name for name, _ in layer.named_parameters()]

    def function(hidden, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), hidden)[0]

    inputs = (draw(4, 3).requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(function, inputs)


def test_the_record_says_what_was_done():
    layer = layer_with(controller=SignBias)
    layer.policy.controller.load_state_dict({"prices": torch.linspace(-0.2, 0.2, 6)})
    hidden = draw(3, 7, 8)
    _, routing = layer(hidden)
    logits = hidden.reshape(-1, 8) @ layer.router.weight.T
    torch.testing.assert_close(routing.logits, logits)
    torch.testing.assert_close(routing.scores, logits.softmax(dim=1))
    assert routing.scores.requires_grad
    values = routing.scores.detach().float() - torch.linspace(-0.2, 0.2, 6)
    torch.testing.assert_close(routing.values, values)
    plan = routing.plan
    assert torch.equal(plan.expert_ids, values.topk(4, dim=1).indices)
    assert plan.expert_load.tolist() == plan.expert_ids[plan.keep].bincount(minlength=6).tolist()
    assert (routing.name, routing.sequence_length, routing.hidden) == ("block", 7, None)
    assert layer(hidden[0])[1].sequence_length is None


def test_the_budget_holds_exactly_in_training():
    layer = layer_with()
    valid = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    for mask, tokens in ((None, 45), (valid, int(valid.sum()))):
        routing = layer(draw(5, 9, 8), valid=mask)[1]
        assert int(routing.plan.keep.sum()) == int(routing.selection.spend) == int(2.3 * tokens)
        counts = routing.plan.keep.sum(dim=1)
        counts = counts if mask is None else counts[mask.reshape(-1)]
        assert 1 <= int(counts.min()) < int(counts.max()) <= 4


def test_evaluation_routes_each_token_alone_at_the_learned_price():
    layer = layer_with()
    for step in range(20):
        layer.observe(layer(draw(64, 8, seed=step))[1])
        layer.update()
    layer.eval()
    hidden = draw(400, 8, seed=99)
    output, routing = layer(hidden)
    assert float(routing.selection.spend) / 400 == pytest.approx(2.3, rel=0.15)
    for token in range(0, 400, 40):
        alone, record = layer(hidden[token : token + 1])
        torch.testing.assert_close(alone[0], output[token])
        assert torch.equal(record.plan.keep[0], routing.plan.keep[token])


@pytest.mark.parametrize("has_shared", [False, True])
def test_a_token_without_experts_gets_the_shared_output_only(has_shared):
    shared = SharedExpert(8, 3, has_gate=True, dtype=torch.float64) if has_shared else None
    layer = layer_with(SPARSE, shared=shared)
    hidden = draw(40, 8)
    output, routing = layer(hidden)
    has_none = ~routing.plan.keep.any(dim=1)
    assert 0 < int(has_none.sum()) < 40
    rest = shared(hidden) if has_shared else torch.zeros_like(hidden)
    assert torch.equal(output[has_none], rest[has_none])
    assert (output - rest)[~has_none].abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("filling", [5.0, torch.nan])
def test_padding_changes_nothing(is_training, filling):
    shared = SharedExpert(8, 3, has_gate=True, dtype=torch.float64)
    layer = layer_with(shared=shared).train(is_training)
    valid = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.6
    hidden = draw(4, 6, 8)
    real = hidden[valid].requires_grad_()
    padded = hidden.masked_fill(~valid.unsqueeze(-1), filling).requires_grad_()
    expected, alone = layer(real)
    output, routing = layer(padded, valid=valid)
    torch.testing.assert_close(output[valid], expected)
    assert output[~valid].count_nonzero() == 0
    assert torch.equal(routing.plan.expert_load, alone.plan.expert_load)
    assert not routing.plan.keep[~valid.reshape(-1)].any()
    into_real, *of_real = gradients_of(expected, layer, real)
    direction = torch.zeros_like(output).masked_scatter(
        valid.unsqueeze(-1), draw(*expected.shape, seed=7)
    )
    direction[~valid] = 3.0
    into_padded, *of_padded = torch.autograd.grad(
        (output * direction).sum(), [padded, *layer.parameters()]
    )
    torch.testing.assert_close(into_padded[valid], into_real)
    assert into_padded[~valid].count_nonzero() == 0
    for one, other in zip(of_padded, of_real, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_tokens(shape):
    layer = layer_with(shared=SharedExpert(8, 3, dtype=torch.float64))
    hidden = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    for is_training in (True, False):
        output, routing = layer.train(is_training)(hidden)
        assert output.shape == shape
        assert int(routing.selection.spend) == 0
        assert all(part.count_nonzero() == 0 for part in gradients_of(output, layer, hidden))


def test_permuting_tokens_permutes_outputs():
    layer = layer_with()
    hidden, order = draw(30, 8), torch.randperm(30, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(hidden[order])[0], layer(hidden)[0][order])


def test_permuting_experts_changes_no_output():
    layer, other = layer_with(controller=SignBias), layer_with(controller=SignBias)
    prices = torch.linspace(-0.1, 0.1, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    layer.policy.controller.load_state_dict({"prices": prices})
    other.policy.controller.load_state_dict({"prices": prices[order]})
    with torch.no_grad():
        for parameter in (other.router.weight, other.experts.gate_up, other.experts.down):
            parameter.copy_(parameter[order].clone())
    hidden = draw(30, 8)
    (expected, routing), (output, permuted) = layer(hidden), other(hidden)
    torch.testing.assert_close(output, expected)
    assert torch.equal(permuted.plan.expert_load, routing.plan.expert_load[order])


def test_passes_move_no_state_and_a_step_does():
    layer = layer_with(controller=SignBias)

    def state():
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        return buffer.getvalue()

    before = state()
    for is_training in (True, False):
        _, routing = layer.train(is_training)(draw(30, 8))
        layer.update()
        assert state() == before
    layer.observe(routing)
    layer.update()
    assert state() != before


def test_state_goes_through_a_file():
    layer, other = layer_with(controller=SignBias), layer_with(controller=SignBias, seed=5)
    for step in range(3):
        layer.observe(layer(draw(40, 8, seed=step))[1])
        layer.update()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    layer.eval()
    other.eval()
    hidden = draw(40, 8, seed=9)
    (expected, routing), (output, again) = layer(hidden), other(hidden)
    assert torch.equal(output, expected)
    assert torch.equal(again.values, routing.values)
    assert torch.equal(other.policy.controller.prices, layer.policy.controller.prices)
    with pytest.raises(RuntimeError, match="_extra_state"):
        other.load_state_dict(dict(layer.named_parameters()))


def test_recomputation_gives_the_same_gradients():
    layer = layer_with(shared=SharedExpert(8, 3, dtype=torch.float64))
    hidden = draw(30, 8).requires_grad_()
    expected = gradients_of(layer(hidden)[0], layer, hidden)
    output = checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=False)
    for one, other in zip(gradients_of(output, layer, hidden), expected, strict=True):
        assert torch.equal(one, other)


def test_another_scorer_gives_the_weights_and_sees_each_step():
    class Watching(Scorer):
        observes = True

        def __init__(self):
            super().__init__()
            self.rule = SigmoidScores()
            self.seen = []

        def forward(self, hidden, weight):
            return self.rule(hidden, weight)

        def observe(self, routing):
            self.seen.append(routing.hidden)

        def update(self, group=None):
            self.seen.append(group)

    scorer = Watching()
    layer = layer_with(scorer=scorer)
    hidden = draw(30, 8).requires_grad_()
    _, routing = layer(hidden)
    scores = 1 / (1 + (-hidden @ layer.router.weight.T).exp())
    torch.testing.assert_close(routing.scores, scores)
    chosen = scores.gather(1, routing.plan.expert_ids) * routing.plan.keep
    torch.testing.assert_close(routing.plan.combine_weights, chosen / chosen.sum(1, keepdim=True))
    layer.observe(routing)
    layer.update()
    assert torch.equal(scorer.seen[0], hidden)
    assert not scorer.seen[0].requires_grad
    assert scorer.seen[1] is None
    assert isinstance(layer_with().scorer, SoftmaxScores)


def test_the_selection_is_told_what_is_known():
    class Opening(Scorer):
        def forward(self, hidden, weight):
            return replace(SigmoidScores()(hidden, weight), is_open=hidden[:, :6] > 0)

    layer = layer_with(scorer=Opening())
    selector, told = layer.policy.selector, []

    def select(inputs):
        told.append(inputs)
        return BudgetedSelector.select(selector, inputs)

    layer.policy.selector = SimpleNamespace(maximum=4, select=select)
    hidden, valid = draw(3, 7, 8), draw(3, 7) > 0
    _, routing = layer(hidden, valid=valid)
    (inputs,) = told
    real = torch.where(valid.unsqueeze(-1), hidden, 0.0).reshape(-1, 8)
    assert torch.equal(inputs.is_open, real[:, :6] > 0)
    assert torch.equal(inputs.scores, routing.scores)
    assert torch.equal(inputs.valid, valid.reshape(-1))
    assert (inputs.exact, inputs.sequence_length) == (True, 7)


def test_finite_in_autocast_and_in_half_precision():
    shared = SharedExpert(8, 3, has_gate=True, dtype=torch.float32)
    layer = layer_with(dtype=torch.float32, shared=shared)
    hidden = draw(30, 8, dtype=torch.float32).requires_grad_()
    expected, _ = layer(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        output, routing = layer(hidden)
    assert output.dtype == routing.scores.dtype == torch.float32
    assert ((output - expected).norm() / expected.norm()).detach() < 0.2
    gradients = gradients_of(output, layer, hidden)
    assert all(part.isfinite().all() and part.dtype == torch.float32 for part in gradients)
    half, _ = layer.to(torch.bfloat16)(hidden.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


# PyTorch's own tracing looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled():
    layer = layer_with(dtype=torch.float32, shared=SharedExpert(8, 3))
    compiled = torch.compile(layer, backend="aot_eager")
    hidden = draw(2, 10, 8, dtype=torch.float32).requires_grad_()
    (expected, routing), (output, again) = layer(hidden), compiled(hidden)
    torch.testing.assert_close(output, expected)
    assert torch.equal(again.plan.expert_load, routing.plan.expert_load)
    mine = gradients_of(output, layer, hidden)
    for one, other in zip(mine, gradients_of(expected, layer, hidden), strict=True):
        torch.testing.assert_close(one, other)


def test_what_does_not_fit_is_named():
    layer = layer_with()
    with pytest.raises(ValueError, match=r"hidden must have shape \(5, 8\), got \(5, 7\)"):
        layer(draw(5, 7))
    with pytest.raises(ValueError, match=r"valid must have shape \(2, 5\), got \(10,\)"):
        layer(draw(2, 5, 8), valid=torch.ones(10, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"dtype of the experts, got torch.float32 for .*float64"):
        layer(draw(5, 8).float())
    experts = GatedExperts(6, width=8, expert_width=5)
    selector = BudgetedSelector(BUDGET)
    with pytest.raises(ValueError, match=r"prices must have shape \(6,\), got \(5,\)"):
        MoELayer(experts, policy=RoutingPolicy(selector=selector, controller=NoPrices(5)))
    policy = RoutingPolicy(selector=selector, controller=NoPrices(6))
    with pytest.raises(ValueError, match=r"shared.down.weight must have shape \(8, 'any'\)"):
        MoELayer(experts, policy=policy, shared=SharedExpert(9, 3))
    few = GatedExperts(3, width=8, expert_width=5)
    with pytest.raises(ValueError, match=r"maximum must be at most .* got 4 for 3 experts"):
        MoELayer(few, policy=RoutingPolicy(selector=selector, controller=NoPrices(3)))


def test_the_example_runs():
    result = doctest.testmod(moe_layer)
    assert result.failed == 0
    assert result.attempted > 0


def test_the_layer_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from drgr.models import MoELayer, measure_flops\n"
        "import drgr.models\n"
        "try: drgr.models.tiny_olmoe\n"
        "except ImportError as error: print(MoELayer.__name__, error.name)\n"
        "try: drgr.models.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == "MoELayer transformers"
    assert second == "module 'drgr.models' has no attribute 'nothing'"
