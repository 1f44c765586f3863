"""Experts of a transformers model computed by :func:`drgr.models.grouped_experts`."""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from drgr.errors import UnknownRouterError
from drgr.integrations.transformers.experts import check_skipping, sparse_experts_forward
from drgr.models import grouped_experts
from drgr.routing import RoutingPlan

GROUPED_IMPLEMENTATION = "drgr-grouped"
"""Name under which transformers finds :func:`grouped_experts_forward`."""


def register_grouped() -> None:
    """Makes the implementation known to transformers; calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(GROUPED_IMPLEMENTATION, grouped_experts_forward)


def grouped_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes what :func:`sparse_experts_forward` does, with the same weights and arguments.

    While activations are recorded it is that function itself.
    """
    if getattr(experts, "watch_activations", None) is not None:
        return sparse_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    keep = top_k_index < experts.num_experts
    plan = RoutingPlan(
        expert_ids=top_k_index,
        combine_weights=top_k_weights,
        keep=keep,
        expert_load=torch.bincount(top_k_index[keep], minlength=experts.num_experts),
    )
    output: Tensor = grouped_experts(hidden_states, plan, experts.gate_up_proj, experts.down_proj)
    return output


def check_grouped(experts: Any, name: str) -> None:
    """Compares the grouped computation with the model's own code, in outputs and all gradients.

    Args:
        experts: The experts module of one MoE block.
        name: Its dotted name, for messages.

    Raises:
        UnknownRouterError: If its experts are not gated by a SiLU, without biases, or hold their
            weights in another order.
    """
    unlike = {
        "no gate": not experts.has_gate,
        "biases": experts.has_bias,
        "transposed weights": experts.is_transposed,
        "a norm after each expert": getattr(experts, "has_post_expert_norm", False),
    }
    found = [what for what, is_so in unlike.items() if is_so]
    if found:
        raise UnknownRouterError(
            f"{name} ({type(experts).__name__}) has {', '.join(found)}, which the grouped "
            f"computation does not know; attach with grouped=False"
        )
    check_skipping(experts, name, implementation=GROUPED_IMPLEMENTATION)
