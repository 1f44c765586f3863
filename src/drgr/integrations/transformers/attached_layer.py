"""One MoE block of an attached model: from its router's logits to a routing decision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from drgr.integrations.transformers.contract import RouterContract
from drgr.integrations.transformers.sites import MoeSite
from drgr.routing import LayerGates, LayerRouting, RoutingPlan, RoutingPolicy, expert_load


@final
class AttachedLayer:
    """One attached MoE block: where it is, what its router computes, and its policy."""

    def __init__(self, site: MoeSite, contract: RouterContract, policy: RoutingPolicy) -> None:
        self.site = site
        self.contract = contract
        self.policy = policy
        self.pending: list[tuple[Tensor, LayerRouting]] = []
        self.replayed: LayerRouting | None = None

    def decide(
        self,
        scores: Tensor,
        *,
        valid: Tensor | None,
        source: Tensor | None,
        gates: LayerGates | None,
    ) -> LayerRouting:
        """Selects the experts of each token of a forward pass.

        Args:
            scores: Router scores, shape ``(T, E)``.
            valid: Which tokens are real, shape ``(T,)``; ``None`` where all are.
            source: Source of each token, shape ``(T,)``; ``None`` where it is not known.
            gates: Gates of the links; ``None`` where there are none.

        Raises:
            ValueError: If the attention mask or the sources are of another number of tokens.
        """
        for name, given in (("attention mask", valid), ("source", source)):
            if given is not None and given.shape[0] != scores.shape[0]:
                raise ValueError(
                    f"{self.site.name} routes {scores.shape[0]} tokens, but the {name} has "
                    f"{given.shape[0]}; pass a {name.split()[-1]} of the batch's own tokens"
                )
        if self.replayed is not None:
            return self._replay(self.replayed, scores)
        router = self.site.router
        usable = None if gates is None else gates.usable(source)
        values = self.policy.price_scores(self.contract.selectable(scores, router, usable))
        selection = self.policy.select(values, valid=valid, exact=router.training)
        weights = self.contract.weights(scores, selection.expert_ids, selection.keep)
        plan = RoutingPlan(
            expert_ids=selection.expert_ids,
            combine_weights=_gated(weights, selection.expert_ids, source, gates),
            keep=selection.keep,
            expert_load=expert_load(selection.expert_ids, selection.keep, self.site.num_experts),
        )
        return LayerRouting(
            name=self.site.name,
            scores=scores,
            values=values,
            plan=plan,
            selection=selection,
            valid=valid,
            source=source,
            gates=gates,
        )

    def _replay(self, routing: LayerRouting, scores: Tensor) -> LayerRouting:
        """Returns an earlier decision with the weights that follow from other scores."""
        if routing.scores.shape != scores.shape:
            raise ValueError(
                f"{self.site.name} routes {scores.shape[0]} tokens, but the pass to replay had "
                f"{routing.scores.shape[0]}; replay it on its own batch"
            )
        plan = replace(routing.plan, combine_weights=self.weights_again(scores, routing))
        return replace(routing, scores=scores, plan=plan)

    def weights_again(self, scores: Tensor, routing: LayerRouting) -> Tensor:
        """Returns the combine weights of a decision, from scores that are computed again."""
        plan = routing.plan
        weights = self.contract.weights(scores, plan.expert_ids, plan.keep)
        return _gated(weights, plan.expert_ids, routing.source, routing.gates)

    def take_pending(self, logits: Tensor) -> LayerRouting:
        """Returns the decision of the forward pass that is being recomputed, told by its logits.

        Deciding again would be wrong where processes share a batch: the others are not listening.
        """
        for index, (seen, _) in enumerate(self.pending):
            if torch.equal(seen, logits.detach()):
                return self.pending.pop(index)[1]
        raise RuntimeError(
            f"{self.site.name}: a forward pass is recomputed whose routing is not known; the "
            f"router must see the same input again (deterministic layers, preserved random state)"
        )


@contextmanager
def replayed(layers: Sequence[AttachedLayer], records: Sequence[LayerRouting]) -> Iterator[None]:
    """Makes every layer decide as in a recorded pass."""
    for layer, routing in zip(layers, records, strict=True):
        layer.replayed = routing
    try:
        yield
    finally:
        for layer in layers:
            layer.replayed = None


def _gated(
    weights: Tensor, expert_ids: Tensor, source: Tensor | None, gates: LayerGates | None
) -> Tensor:
    return weights if gates is None else gates.scale(weights, expert_ids, source)
