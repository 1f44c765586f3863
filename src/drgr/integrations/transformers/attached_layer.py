"""One MoE block of an attached model: from its router's logits to a routing decision."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from drgr.integrations.transformers.rules import RouterRule
from drgr.integrations.transformers.sites import MoeSite
from drgr.routing import LayerGates, LayerRouting, RoutingPlan, RoutingPolicy, expert_load


@final
class AttachedLayer:
    """One attached MoE block: where it is, how its router scores, and its policy."""

    def __init__(self, site: MoeSite, rule: RouterRule, policy: RoutingPolicy) -> None:
        self.site = site
        self.rule = rule
        self.policy = policy
        self._observes_hidden = rule.scorer is not None and rule.scorer.observes
        self.pending: list[tuple[Tensor, LayerRouting]] = []
        self.replayed: LayerRouting | None = None

    def decide(
        self,
        hidden: Tensor,
        logits: Tensor,
        *,
        valid: Tensor | None,
        source: Tensor | None,
        gates: LayerGates | None,
        sequence_length: int | None,
    ) -> LayerRouting:
        """Selects the experts of each token of a forward pass.

        Args:
            hidden: What the router saw, shape ``(T, D)``.
            logits: The router's own logits, shape ``(T, E)``.
            valid: Which tokens are real, shape ``(T,)``; ``None`` where all are.
            source: Source of each token, shape ``(T,)``; ``None`` where it is not known.
            gates: Gates of the links; ``None`` where there are none.
            sequence_length: Tokens of each sequence; ``None`` where it is not known.

        Raises:
            ValueError: If the attention mask or the sources are of another number of tokens.
        """
        for name, given in (("attention mask", valid), ("source", source)):
            if given is not None and given.shape[0] != logits.shape[0]:
                raise ValueError(
                    f"{self.site.name} routes {logits.shape[0]} tokens, but the {name} has "
                    f"{given.shape[0]}; pass a {name.split()[-1]} of the batch's own tokens"
                )
        usable = None if gates is None else gates.usable(source)
        read = self.rule.read(hidden, logits, usable)
        if self.replayed is not None:
            return self._replay(self.replayed, read.scores)
        values = self.policy.price_scores(read.selectable)
        selection = self.policy.select(
            values,
            scores=read.scores,
            valid=valid,
            exact=self.site.router.training,
            is_open=read.is_open,
            sequence_length=sequence_length,
        )
        weights = self.rule.weights(read.scores, selection.expert_ids, selection.keep)
        plan = RoutingPlan(
            expert_ids=selection.expert_ids,
            combine_weights=_gated(weights, selection.expert_ids, source, gates),
            keep=selection.keep,
            expert_load=expert_load(selection.expert_ids, selection.keep, self.site.num_experts),
        )
        return LayerRouting(
            name=self.site.name,
            scores=read.scores,
            values=values,
            plan=plan,
            selection=selection,
            valid=valid,
            source=source,
            gates=gates,
            logits=read.logits,
            sequence_length=sequence_length,
            hidden=hidden.detach() if self._observes_hidden else None,
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

    def recomputed_weights(self, hidden: Tensor, logits: Tensor, routing: LayerRouting) -> Tensor:
        """Returns the combine weights of a decision whose forward pass is computed again."""
        return self.weights_again(self.rule.read(hidden, logits, None).scores, routing)

    def weights_again(self, scores: Tensor, routing: LayerRouting) -> Tensor:
        """Returns the combine weights of a decision, from scores that are computed again."""
        plan = routing.plan
        weights = self.rule.weights(scores, plan.expert_ids, plan.keep)
        return _gated(weights, plan.expert_ids, routing.source, routing.gates)

    @property
    def needs_losses(self) -> bool:
        """Whether the scorer learns from the value of the loss."""
        return self.rule.scorer is not None and self.rule.scorer.needs_losses

    def surrogate(self, routing: LayerRouting, losses: Tensor) -> Tensor:
        """Returns the scorer's surrogate loss, see :meth:`drgr.routing.scores.Scorer.surrogate`."""
        assert self.rule.scorer is not None
        return self.rule.scorer.surrogate(routing, losses)

    def observe(self, routing: LayerRouting) -> None:
        """Takes in one training micro-batch."""
        self.policy.observe(routing)
        if self.rule.scorer is not None:
            self.rule.scorer.observe(routing)

    def update(self) -> None:
        """Moves prices, and what the scorer learns without gradients."""
        self.policy.update()
        if self.rule.scorer is not None:
            self.rule.scorer.update(self.policy.group)
        self.pending.clear()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the state of the policy and of the scorer, if there is one."""
        state = self.policy.state_dict()
        if self.rule.scorer is not None:
            state["scorer"] = dict(self.rule.scorer.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Restores :meth:`state_dict`."""
        self.policy.load_state_dict(state)
        kept, scorer = state.get("scorer", {}), self.rule.scorer
        own = {} if scorer is None else scorer.state_dict()
        if set(kept) != set(own):
            raise ValueError(
                f"routing state of {self.site.name} must hold the scorer's {sorted(own)}, got "
                f"{sorted(kept)}; attach with the scorer that it was saved with"
            )
        if scorer is not None:
            scorer.load_state_dict(kept)

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
