"""Gated experts computed one after another, as the formula says."""

import torch
import torch.nn.functional as F
from torch import Tensor

from drgr.routing import RoutingPlan


def reference_experts(hidden: Tensor, plan: RoutingPlan, gate_up: Tensor, down: Tensor) -> Tensor:
    r"""Adds up the outputs of each token's experts.

    .. math:: y_t = \sum_{k:\, keep_{tk}} w_{tk} f_{i_{tk}}(x_t), \qquad
              f_e(x) = D_e \big(\operatorname{silu}(G_e x) \odot U_e x\big) .

    Args:
        hidden: Tokens ``x``, shape ``(T, D)``.
        plan: Expert ids ``i`` in ``[0, E)``, weights ``w`` and ``keep`` of ``K`` candidates for
            each token. What is not kept is not read.
        gate_up: ``G_e`` above ``U_e``, shape ``(E, 2I, D)``.
        down: ``D_e``, shape ``(E, D, I)``.

    Returns:
        Shape ``(T, D)``, dtype of ``hidden``; zeros for a token without experts.

    Gradients:
        Of any order, in forward mode too, for tokens, weights and matrices.

    Numerics:
        In the dtype of the arguments, float64 included, or that of autocast; sums over experts in
        float32 at least.

    Complexity:
        Time in the number of candidates kept; the host reads their places once an expert.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros_like(hidden, dtype=dtype)
    for expert, (inner_weight, outer_weight) in enumerate(zip(gate_up, down, strict=True)):
        token, rank = torch.where((plan.expert_ids == expert) & plan.keep)
        gate, up = F.linear(hidden[token], inner_weight).chunk(2, dim=1)
        output = F.linear(F.silu(gate) * up, outer_weight)
        weight = plan.combine_weights[token, rank].unsqueeze(1)
        total = total.index_add(0, token, (weight * output).to(dtype))
    return total.to(hidden.dtype)
