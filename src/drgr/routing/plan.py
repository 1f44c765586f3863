"""The records that pass between a router and the rest: what a layer decided, and from what."""

from dataclasses import dataclass

from torch import Tensor

from drgr.budgets import Selection
from drgr.routing.link_gates import LayerGates


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPlan:
    """Who processes each token, and with which weight.

    Attributes:
        expert_ids: Candidate experts, shape ``(T, K)``, int64, best first.
        combine_weights: Weight of each expert's output, shape ``(T, K)``; 0 where not kept.
        keep: Which candidates run, shape ``(T, K)``, bool.
        expert_load: Assignments per expert, shape ``(E,)``, int64.
    """

    expert_ids: Tensor
    combine_weights: Tensor
    keep: Tensor
    expert_load: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRouting:
    """What one MoE layer did in one training or evaluation forward pass.

    Attributes:
        name: Dotted name of the MoE block in its model.
        scores: Router scores of all experts in (0, 1), shape ``(T, E)``, with gradient.
        values: Worth of each assignment as selected on (scores less prices), ``(T, E)``, detached.
        plan: The routing plan.
        selection: The selection behind the plan, with spend, limit and price.
        valid: Which tokens are real, shape ``(T,)``, bool; ``None`` where all are.
        source: Source of each token, shape ``(T,)``, int64; ``None`` where it is not known.
        gates: Gates of the layer's links; ``None`` where it has none.
        logits: Router logits that the scores follow from, shape ``(T, E)``, with gradient.
        sequence_length: Tokens of each sequence, padding included; ``None`` where not known.
        hidden: What the router saw, shape ``(T, D)``, detached; ``None`` unless a scorer observes.
    """

    name: str
    scores: Tensor
    values: Tensor
    plan: RoutingPlan
    selection: Selection
    valid: Tensor | None
    source: Tensor | None = None
    gates: LayerGates | None = None
    logits: Tensor | None = None
    sequence_length: int | None = None
    hidden: Tensor | None = None
