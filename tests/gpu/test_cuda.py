"""What runs on a GPU is the same code: results equal those of the CPU, without waiting for it."""

import json
from contextlib import contextmanager

import pytest
import torch

from drgr import ambiguity
from drgr.bilevel import CG, hypergradient
from drgr.budgets import (
    Budget,
    TokenBudget,
    project,
    project_entropic,
    select,
    select_at_price,
    select_exactly,
)
from drgr.integrations.transformers import attach, enable_checkpointing
from drgr.models import tiny_olmoe
from drgr.routing import (
    BipBalancing,
    CongestionPrice,
    DecayingSubgradient,
    QuantileBalancing,
    RmsBias,
    SignBias,
    SinkhornPrices,
)

pytestmark = pytest.mark.gpu

BUDGET = TokenBudget(minimum=1, maximum=4, average=2.3)
DIVERGENCES = [
    ambiguity.KL(),
    ambiguity.ChiSquare(),
    ambiguity.Burg(),
    ambiguity.Hellinger(),
    ambiguity.JensenShannon(),
    ambiguity.Neyman(),
    ambiguity.CressieRead(1.5),
    ambiguity.TotalVariation(),
]
CONTROLLERS = [
    SignBias,
    RmsBias,
    DecayingSubgradient,
    CongestionPrice,
    QuantileBalancing,
    BipBalancing,
    SinkhornPrices,
]
SIZES = {
    "vocabulary_size": 64,
    "hidden_size": 32,
    "expert_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "seed": 0,
}


@contextmanager
def no_synchronisation():
    """Fails where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, shape, generator=generator)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("strength", [{"radius": 0.1}, {"penalty": 0.3}], ids=str)
def test_worst_cases_equal_those_of_the_cpu(divergence, strength):
    if isinstance(divergence, ambiguity.TotalVariation) and "penalty" in strength:
        pytest.skip("total variation has a radius only")
    losses = torch.randn(64, 16, dtype=torch.float64)
    here = ambiguity.worst_case(losses, divergence=divergence, **strength)
    there = ambiguity.worst_case(losses.cuda(), divergence=divergence, **strength)
    assert there.weights.is_cuda
    torch.testing.assert_close(there.weights.cpu(), here.weights, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(there.value.cpu(), here.value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solve", [project, project_entropic])
def test_projections_equal_those_of_the_cpu(solve):
    gates = torch.rand(128, 8, dtype=torch.float64)
    costs = torch.rand(8, dtype=torch.float64) + 0.5
    results, gradients = [], []
    for device in ("cpu", "cuda"):
        at = gates.to(device, copy=True).requires_grad_()
        budget = Budget(costs.to(device), per_token=(0.5, 2.0), per_batch=150.0)
        result = solve(at, budget)
        result.gates.square().sum().backward()
        results.append(result.gates.detach().cpu())
        gradients.append(at.grad.cpu())
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("costs", [torch.ones(8), torch.rand(8) + 0.5], ids=["equal", "unequal"])
def test_selections_equal_those_of_the_cpu(costs):
    scores = torch.rand(64, 8)
    plans = []
    for device in ("cpu", "cuda"):
        budget = Budget(costs.to(device), per_token=(0.5, 3.0), per_batch=100.0)
        plans.append(select(scores.to(device), budget))
    assert plans[1].mask.is_cuda
    torch.testing.assert_close(plans[1].value.cpu(), plans[0].value)
    torch.testing.assert_close(plans[1].mask.cpu(), plans[0].mask)


def test_the_budgeted_selection_never_waits_for_the_device():
    values = torch.rand(4096, 64)
    valid = torch.rand(4096) < 0.9
    here = select_exactly(values, BUDGET, valid=valid)
    at, mask = values.cuda(), valid.cuda()
    select_exactly(at, BUDGET, valid=mask)  # the first call loads kernels
    select_at_price(at, BUDGET, price=here.price.cuda(), valid=mask)
    with no_synchronisation():
        there = select_exactly(at, BUDGET, valid=mask)
        frozen = select_at_price(at, BUDGET, price=there.price, valid=mask)
    assert torch.equal(there.keep.cpu(), here.keep)
    assert int(there.spend) == int(there.limit) == int(here.spend)
    assert torch.equal(frozen.keep.cpu(), here.keep)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers_move_as_on_the_cpu(controller):
    prices = []
    for device in ("cpu", "cuda"):
        model = tiny_olmoe(**SIZES).to(device).train()
        attachment = attach(
            model, budget=BUDGET, controller=lambda n, where: controller(n, device=where)
        )
        for step in range(3):
            with attachment.record() as records:
                model(input_ids=tokens(4, 32, seed=step).to(device), use_cache=False)
            attachment.observe(records)
            attachment.update()
        prices.append(attachment.policies[0].controller.prices.cpu())
    torch.testing.assert_close(*prices, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_pass_has_the_gradients_of_the_cpu(checkpointed):
    gradients = []
    for device in ("cpu", "cuda"):
        model = tiny_olmoe(**SIZES).to(device).train()
        if checkpointed:
            enable_checkpointing(model)
        attachment = attach(model, budget=BUDGET)
        at = tokens(4, 32).to(device)
        with attachment.record() as records:
            model(input_ids=at, labels=at, use_cache=False).loss.backward()
        assert int(records[0].selection.spend) == BUDGET.total(128)
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_half_precision_is_finite_and_inside_the_budget():
    model = tiny_olmoe(**SIZES).cuda().train()
    attachment = attach(model, budget=BUDGET)
    at = tokens(4, 32).cuda()
    with torch.autocast("cuda", torch.bfloat16), attachment.record() as records:
        loss = model(input_ids=at, labels=at, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert all(int(one.selection.spend) <= int(one.selection.limit) for one in records)


def test_decoding_token_by_token_routes_as_one_pass():
    model = tiny_olmoe(**SIZES).cuda().train()
    attachment = attach(model, budget=BUDGET)
    at = tokens(1, 24).cuda()
    with attachment.record() as records:
        model(input_ids=at, use_cache=False)
    attachment.observe(records)
    attachment.update()
    model.eval()
    with torch.no_grad(), attachment.record() as whole:
        model(input_ids=at, use_cache=False)
    cache, steps = None, []
    with torch.no_grad(), attachment.record() as parts:
        for position in range(at.shape[1]):
            output = model(
                input_ids=at[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
    for layer, routing in enumerate(whole):
        steps = torch.cat([one.plan.keep for one in parts[layer :: len(whole)]])
        assert torch.equal(steps, routing.plan.keep)


def test_hypergradients_are_those_of_ridge_regression():
    design = torch.randn(40, 10, dtype=torch.float64).cuda()
    target = torch.randn(40, dtype=torch.float64).cuda()
    penalty = torch.full((10,), 0.5, dtype=torch.float64).cuda().requires_grad_()

    def inner(outer, inner_params):
        residual = design @ inner_params - target
        return 0.5 * residual.square().sum() + 0.5 * (outer * inner_params.square()).sum()

    def outer_loss(outer, inner_params):
        del outer
        return 0.5 * inner_params.square().sum()

    hessian = design.T @ design + torch.diag(penalty.detach())
    solution = torch.linalg.solve(hessian, design.T @ target).requires_grad_()
    result = hypergradient(outer_loss, inner, penalty, solution, solver=CG(rtol=1e-10))
    expected = -solution * torch.linalg.solve(hessian, solution)
    torch.testing.assert_close(result.grads, expected.detach(), rtol=1e-7, atol=1e-10)
    assert str(result.status) == "converged"


@pytest.mark.parametrize("outer", [[], ["mixture"]], ids=["plain", "mixture"])
def test_a_run_on_the_gpu_keeps_its_budget_and_resumes(small_runs, tmp_path, outer):
    changes = {"training__device": "cuda", "training__steps": 8, "training__checkpoint_every": 4}
    if outer:
        changes |= {
            "robustness__apply_to": "nothing",
            "outer": {"variables": outer, "begin": 2, "every": 2, "windows": 1},
        }
    config = small_runs.small_config(**changes)
    corpus = small_runs.prepare(tmp_path / "cache")
    small_runs.run_small(config, corpus, tmp_path / "straight")
    watcher = small_runs.Watcher(kill_after=6)
    with pytest.raises(small_runs.Killed):
        small_runs.run_small(config, corpus, tmp_path / "resumed", watcher=watcher)
    small_runs.run_small(config, corpus, tmp_path / "resumed", resume=True)
    straight, resumed = (
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("straight", "resumed")
    )
    assert straight["budget"]["training"]["batches_over"] == 0
    assert resumed["step"] == straight["step"] == 8
    # Sums by atomic additions are in no fixed order on a GPU, so equality is not bit for bit.
    for name, domain in straight["domains"].items():
        assert resumed["domains"][name]["loss"] == pytest.approx(domain["loss"], rel=2e-2)
