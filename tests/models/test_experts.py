"""Both ways to compute gated experts against the formula written out token by token."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from drgr.models import GatedExperts, SharedExpert, grouped_experts, reference_experts
from drgr.routing import RoutingPlan

PATHS = pytest.mark.parametrize("compute", [grouped_experts, reference_experts])
NAMES = ("hidden", "weights", "gate_up", "down")


def plan_of(expert_ids, weights, keep, num_experts):
    load = torch.bincount(expert_ids[keep], minlength=num_experts)
    return RoutingPlan(expert_ids=expert_ids, combine_weights=weights, keep=keep, expert_load=load)


def problem(*, tokens=9, experts=4, top_k=2, width=5, inner=3, share=0.6, seed=0, dtype=None):
    """Returns a plan and the four tensors that have gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype or torch.float64).requires_grad_()

    expert_ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    keep = torch.rand(tokens, top_k, generator=generator) < share
    tensors = (
        normal(tokens, width),
        normal(tokens, top_k),
        normal(experts, 2 * inner, width),
        normal(experts, width, inner),
    )
    return plan_of(expert_ids, tensors[1], keep, experts), tensors


def run(compute, plan, tensors):
    hidden, weights, gate_up, down = tensors
    return compute(hidden, replace(plan, combine_weights=weights), gate_up, down)


def written_out(plan, tensors):
    """One token, one candidate and one matrix product at a time."""
    hidden, weights, gate_up, down = tensors
    inner = down.shape[2]
    rows = []
    for token, vector in enumerate(hidden):
        row = 0 * vector
        for rank in range(plan.keep.shape[1]):
            if plan.keep[token, rank]:
                expert = int(plan.expert_ids[token, rank])
                gate = gate_up[expert, :inner] @ vector
                up = gate_up[expert, inner:] @ vector
                row = row + weights[token, rank] * (
                    down[expert] @ (gate / (1 + (-gate).exp()) * up)
                )
        rows.append(row)
    return torch.stack(rows) if rows else hidden * 1.0


def output_and_gradients(output, tensors, *, seed=1):
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(output, tensors, direction.to(output), materialize_grads=True)
    return dict(zip(("output", *NAMES), (output.detach(), *gradients), strict=True))


def assert_close(mine, expected, tolerance):
    for name, value in expected.items():
        assert mine[name].dtype == value.dtype, name
        scale = 1 + float(value.abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(mine[name], value, rtol=0, atol=tolerance * scale, msg=name)


SIZES = {
    "tokens": st.integers(0, 9),
    "experts": st.integers(1, 6),
    "top_k": st.integers(1, 6),
    "width": st.integers(1, 5),
    "inner": st.integers(1, 4),
    "share": st.sampled_from([0.0, 0.3, 1.0]),
    "seed": st.integers(0, 1000),
}


@PATHS
@given(sizes=st.fixed_dictionaries(SIZES))
@settings(deadline=None, max_examples=60)
def test_values_and_gradients_are_those_of_the_formula(compute, sizes):
    sizes["top_k"] = min(sizes["top_k"], sizes["experts"])
    plan, tensors = problem(**sizes)
    expected = output_and_gradients(written_out(plan, tensors), tensors)
    mine = output_and_gradients(run(compute, plan, tensors), tensors)
    assert_close(mine, expected, 1e-12)


@pytest.mark.parametrize("top_k", [1, 3])
def test_many_tokens(top_k):
    plan, tensors = problem(tokens=700, experts=3, top_k=top_k, share=0.9)
    plan.expert_ids[:, 0] = 1
    expected = output_and_gradients(run(reference_experts, plan, tensors), tensors)
    mine = output_and_gradients(run(grouped_experts, plan, tensors), tensors)
    assert_close(mine, expected, 1e-12)


@PATHS
def test_single_precision(compute):
    sizes = {"tokens": 200, "experts": 8, "top_k": 3, "width": 32, "inner": 24}
    plan, tensors = problem(**sizes)
    _, singles = problem(**sizes, dtype=torch.float32)
    expected = output_and_gradients(run(reference_experts, plan, tensors), tensors)
    mine = output_and_gradients(run(compute, plan, singles), singles)
    assert_close(mine, {name: value.float() for name, value in expected.items()}, 1e-5)


@PATHS
def test_all_tokens_of_one_expert(compute):
    plan, tensors = problem(share=1.0, top_k=1)
    plan = plan_of(torch.full_like(plan.expert_ids, 2), tensors[1], plan.keep, 4)
    expected = output_and_gradients(written_out(plan, tensors), tensors)
    mine = output_and_gradients(run(compute, plan, tensors), tensors)
    assert_close(mine, expected, 1e-12)
    for name in ("gate_up", "down"):
        assert mine[name][[0, 1, 3]].count_nonzero() == 0
        assert mine[name][2].count_nonzero() > 0


@PATHS
def test_what_is_not_kept_is_not_read(compute):
    plan, tensors = problem()
    plan.keep[3] = False
    expected = output_and_gradients(run(compute, plan, tensors), tensors)
    hidden, weights, gate_up, down = (tensor.detach().clone() for tensor in tensors)
    hidden[3] = torch.nan
    weights[~plan.keep] = torch.nan
    spoiled = tuple(part.requires_grad_() for part in (hidden, weights, gate_up, down))
    ids = plan.expert_ids.masked_fill(~plan.keep, 99)
    mine = output_and_gradients(run(compute, replace(plan, expert_ids=ids), spoiled), spoiled)
    assert_close(mine, expected, 0.0)
    assert mine["output"][3].count_nonzero() == 0
    assert mine["weights"][~plan.keep].count_nonzero() == 0


@PATHS
def test_first_and_second_derivatives(compute):
    plan, tensors = problem(tokens=4, width=2, inner=2)

    def function(*parts):
        return run(compute, plan, parts)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_second_derivatives_by_function_transforms():
    plan, tensors = problem()
    hidden, *rest = (tensor.detach() for tensor in tensors)

    def slope_norm(compute):
        def loss(hidden):
            return run(compute, plan, (hidden, *rest)).square().sum()

        return torch.func.grad(lambda hidden: torch.func.grad(loss)(hidden).square().sum())

    expected = slope_norm(reference_experts)(hidden)
    torch.testing.assert_close(slope_norm(grouped_experts)(hidden), expected)


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_changes_no_other_gradient(frozen):
    plan, tensors = problem()
    full = output_and_gradients(run(grouped_experts, plan, tensors), tensors)
    tensors[frozen].requires_grad_(False)
    rest = [tensor for tensor in tensors if tensor.requires_grad]
    output = run(grouped_experts, plan, tensors)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, rest, direction.double())
    names = [name for number, name in enumerate(NAMES) if number != frozen]
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.equal(gradient, full[name]), name


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_only_what_is_kept_is_paid_for(share):
    plan, tensors = problem(tokens=50, share=share)
    with FlopCounterMode(display=False) as forward:
        output = run(grouped_experts, plan, tensors)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    kept, width, inner = int(plan.keep.sum()), 5, 3
    assert forward.get_total_flops() == kept * 6 * width * inner
    assert backward.get_total_flops() == 2 * kept * 6 * width * inner


@PATHS
@pytest.mark.parametrize("is_half", [False, True])
def test_half_precision_by_autocast_or_by_weights(compute, is_half):
    sizes = {"tokens": 60, "top_k": 3, "width": 32, "inner": 16}
    plan, tensors = problem(**sizes, dtype=torch.float32)
    expected = output_and_gradients(run(compute, plan, tensors), tensors)
    dtype = torch.bfloat16 if is_half else torch.float32
    parts = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_half):
        output = run(compute, plan, parts)
    mine = output_and_gradients(output, parts)
    for name, value in expected.items():
        assert mine[name].dtype == dtype
        error = float((mine[name].float() - value).norm() / value.norm())
        assert 0 < error < 0.03, (name, error)


@PATHS
def test_sums_over_experts_are_not_in_half_precision(compute):
    """Each of 300 experts adds 1; in bfloat16, 256 + 1 is 256."""
    experts = torch.arange(300)
    keep = torch.ones(1, 300, dtype=torch.bool)
    plan = plan_of(experts.unsqueeze(0), torch.ones(1, 300), keep, 300)
    gate_up = torch.tensor([[8.0], [0.125]], dtype=torch.bfloat16).expand(300, 2, 1)
    down = torch.ones(300, 1, 1, dtype=torch.bfloat16)
    assert compute(torch.ones(1, 1, dtype=torch.bfloat16), plan, gate_up, down).item() == 300


def test_gradients_inside_of_autocast():
    plan, tensors = problem(dtype=torch.float32)
    expected = output_and_gradients(run(grouped_experts, plan, tensors), tensors)
    output = run(grouped_experts, plan, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        mine = output_and_gradients(output, tensors)
    assert_close(mine, expected, 0.0)


@PATHS
def test_the_module_computes_with_its_weights(compute):
    experts = GatedExperts(4, width=5, expert_width=3, compute=compute, dtype=torch.float64)
    assert (experts.num_experts, experts.width) == (4, 5)
    plan, (hidden, *_) = problem()
    expected = written_out(plan, (hidden, plan.combine_weights, experts.gate_up, experts.down))
    torch.testing.assert_close(experts(hidden, plan), expected)
    assert float(experts.gate_up.detach().abs().max()) <= 5**-0.5
    assert 0.5 * 3**-0.5 < float(experts.down.detach().abs().max()) <= 3**-0.5


def test_shapes_that_do_not_fit_are_named():
    experts = GatedExperts(4, width=5, expert_width=3, dtype=torch.float64)
    plan, (hidden, *_) = problem()
    with pytest.raises(ValueError, match=r"hidden must have shape \(9, 5\), got \(9, 4\)"):
        experts(hidden[:, :4], plan)
    with pytest.raises(ValueError, match=r"hidden must have shape \('any', 'any'\), got \(5,\)"):
        experts(hidden[0], plan)
    with pytest.raises(ValueError, match=r"plan.expert_ids must have shape \(8, 'any'\)"):
        experts(hidden[:8], plan)
    with pytest.raises(ValueError, match=r"plan.keep must have shape \(9, 2\), got \(9, 1\)"):
        experts(hidden, replace(plan, keep=plan.keep[:, :1]))
    with pytest.raises(ValueError, match=r"plan.combine_weights must have shape \(9, 2\)"):
        experts(hidden, replace(plan, combine_weights=plan.combine_weights[:, :1]))
    with pytest.raises(
        ValueError, match=r"dtype of the experts, got torch.float32 for torch.float64"
    ):
        experts(hidden.float(), plan)
    with pytest.raises(ValueError, match=r"below the number of experts, got 7 for 4 experts"):
        experts(hidden, replace(plan, expert_ids=plan.expert_ids.masked_fill(plan.keep, 7)))


@pytest.mark.parametrize("name", ["num_experts", "width", "expert_width"])
def test_sizes_are_positive(name):
    sizes = {"num_experts": 2, "width": 3, "expert_width": 4} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a finite number above 0, got 0"):
        GatedExperts(sizes.pop("num_experts"), **sizes)
    if name != "num_experts":
        with pytest.raises(ValueError, match=f"{name} must be a finite number above 0, got 0"):
            SharedExpert(sizes["width"], sizes["expert_width"])


@pytest.mark.parametrize("has_gate", [False, True])
def test_the_shared_expert_is_its_formula(has_gate):
    shared = SharedExpert(5, 3, has_gate=has_gate, dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    gate, up = shared.gate_up.weight[:3], shared.gate_up.weight[3:]
    for row, found in zip(x.reshape(-1, 5), shared(x).reshape(-1, 5), strict=True):
        a = gate @ row
        expected = shared.down.weight @ (a / (1 + (-a).exp()) * (up @ row))
        if has_gate:
            expected = expected / (1 + (-(shared.gate.weight[0] @ row)).exp())
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [32, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype, width):
    """By grouped products, or one by one where dtype or width are not theirs."""
    sizes = {"tokens": 200, "experts": 8, "top_k": 3, "width": width, "inner": 16}
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for share in (0.0, 0.5, 1.0):
        plan, tensors = problem(**sizes, share=share, dtype=dtype)
        expected = output_and_gradients(run(reference_experts, plan, tensors), tensors)
        parts = tuple(tensor.detach().cuda().requires_grad_() for tensor in tensors)
        placed = plan_of(plan.expert_ids.cuda(), parts[1], plan.keep.cuda(), 8)
        mine = output_and_gradients(run(grouped_experts, placed, parts), parts)
        for name, value in expected.items():
            error = float((mine[name].cpu() - value).norm() / value.norm().clamp_min(1e-6))
            assert error <= tolerance, (name, share, error)
