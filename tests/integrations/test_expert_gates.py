"""Gate projections: the half of the packed weight that the activation acts on."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drgr.budgets import TokenBudget
from drgr.errors import UnknownRouterError
from drgr.integrations.transformers import attach
from drgr.integrations.transformers.expert_gates import expert_gates
from drgr.models import tiny_olmoe, tiny_qwen3_moe


def experts_of(apply_gate, *, transposed: bool = False, gated: bool = True) -> SimpleNamespace:
    weight = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    packed = weight.transpose(1, 2) if transposed else weight
    return SimpleNamespace(
        has_gate=gated, is_transposed=transposed, gate_up_proj=packed, _apply_gate=apply_gate
    )


def halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    return packed[..., :4], packed[..., 4:]


def gate_first(packed: Tensor) -> Tensor:
    gate, up = halves(packed)
    return F.silu(gate) * up


def gate_last(packed: Tensor) -> Tensor:
    up, gate = halves(packed)
    return F.relu(gate) * up


def shifted(packed: Tensor) -> Tensor:
    gate, up = halves(packed)
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("apply_gate", "rows"),
    [(gate_first, slice(0, 4)), (gate_last, slice(4, 8)), (shifted, slice(0, 4))],
)
def test_the_half_that_is_bent(apply_gate, rows, transposed):
    experts = experts_of(apply_gate, transposed=transposed)
    found = expert_gates(experts, "block")
    weight = experts.gate_up_proj.transpose(1, 2) if transposed else experts.gate_up_proj
    assert torch.equal(found, weight[:, rows])
    assert found.requires_grad


@pytest.mark.parametrize(
    "apply_gate",
    [
        lambda packed: F.silu(packed[..., ::2]) * packed[..., 1::2],  # interleaved
        lambda packed: halves(packed)[0] * halves(packed)[1],  # linear in both
    ],
)
def test_what_cannot_be_told_is_refused(apply_gate):
    with pytest.raises(UnknownRouterError, match=r"block .* in an order that its output does not"):
        expert_gates(experts_of(apply_gate), "block")


def test_experts_without_a_gate_are_refused():
    with pytest.raises(UnknownRouterError, match="experts without a gate projection"):
        expert_gates(experts_of(gate_first, gated=False), "block")


@pytest.mark.parametrize("build", [tiny_olmoe, tiny_qwen3_moe])
def test_the_weights_of_a_model_reach_router_and_experts(build):
    model = build(
        vocabulary_size=32,
        hidden_size=8,
        expert_size=4,
        num_layers=2,
        num_heads=2,
        num_experts=4,
        max_positions=16,
        seed=0,
    )
    attachment = attach(model, budget=TokenBudget(minimum=1, maximum=2, average=1.5))
    pairs = attachment.coupled_weights()
    assert [(tuple(r.shape), tuple(g.shape)) for r, g in pairs] == [((4, 8), (4, 4, 8))] * 2
    sum(router.sum() + gates.sum() for router, gates in pairs).backward()
    for name in attachment.layer_names:
        block = model.get_submodule(name)
        assert (block.gate.weight.grad == 1).all()
        assert (block.experts.gate_up_proj.grad[:, :4] == 1).all()
        assert (block.experts.gate_up_proj.grad[:, 4:] == 0).all()
        assert block.experts.down_proj.grad is None
    attachment.detach()
