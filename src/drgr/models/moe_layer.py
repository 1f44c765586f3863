"""A layer of experts that routes inside a budget, for models of one's own."""

from typing import Any, final

import torch
from torch import Tensor, nn

from drgr._checks import check_shape
from drgr.models.experts import GatedExperts, SharedExpert
from drgr.routing import LayerRouting, RoutingPlan, RoutingPolicy, expert_load
from drgr.routing.scores import RouterScores, Scorer, SoftmaxScores


@final
class MoELayer(nn.Module):
    """Experts behind a router, with an exact budget in training and a frozen price at evaluation.

    The record of a pass is returned, and nothing is kept of it: losses are functions of the record,
    and prices move when it is shown to :meth:`observe` and the step ends with :meth:`update`.
    Recomputing a pass therefore counts nothing. Prices are part of ``state_dict``.

    Args:
        experts: The routed experts.
        policy: Prices and selection, on the device of the layer; it is not moved with it.
        scorer: The rule from tokens and router weight to scores and combine weights.
        shared: An expert that every token passes through as well.
        name: Name of the layer in its records.

    Attributes:
        router: Holds the router weight, shape ``(E, D)``, in ``router.weight``.

    Raises:
        ValueError: If prices, selection or the shared expert do not fit the experts.

    Examples:
        >>> import torch
        >>> from drgr.budgets import TokenBudget
        >>> from drgr.models import GatedExperts, MoELayer
        >>> from drgr.routing import NoPrices, RoutingPolicy
        >>> from drgr.routing.selection import BudgetedSelector
        >>> budget = TokenBudget(minimum=1, maximum=4, average=2.5)
        >>> layer = MoELayer(
        ...     GatedExperts(8, width=16, expert_width=32),
        ...     policy=RoutingPolicy(selector=BudgetedSelector(budget), controller=NoPrices(8)),
        ... )
        >>> output, routing = layer(torch.randn(2, 10, 16))
        >>> output.shape, int(routing.selection.spend)
        (torch.Size([2, 10, 16]), 50)
        >>> layer.observe(routing)
        >>> layer.update()
    """

    def __init__(
        self,
        experts: GatedExperts,
        *,
        policy: RoutingPolicy,
        scorer: Scorer | None = None,
        shared: SharedExpert | None = None,
        name: str = "moe",
    ) -> None:
        super().__init__()
        num_experts, width = experts.num_experts, experts.width
        check_shape("policy.controller.prices", policy.controller.prices, (num_experts,))
        if policy.selector.maximum > num_experts:
            raise ValueError(
                f"policy.selector.maximum must be at most the number of experts, got "
                f"{policy.selector.maximum} for {num_experts} experts; lower the maximum"
            )
        if shared is not None:
            check_shape("shared.down.weight", shared.down.weight, (width, None))
        place: dict[str, Any] = {"dtype": experts.down.dtype, "device": experts.down.device}
        self.router = nn.Linear(width, num_experts, bias=False, **place)
        self.scorer = SoftmaxScores() if scorer is None else scorer.to(experts.down.device)
        self.experts = experts
        self.shared = shared
        self.policy = policy
        self.name = name

    def forward(
        self, hidden: Tensor, *, valid: Tensor | None = None
    ) -> tuple[Tensor, LayerRouting]:
        """Routes the tokens and adds up the outputs of their experts.

        Args:
            hidden: Tokens, shape ``(..., D)``; with three dimensions or more the last but one is
                that of positions in a sequence.
            valid: Which tokens are real, bool, shape ``(...)``; ``None`` where all are. Padding
                reaches no weight, no other token and no count, NaN included.

        Returns:
            The output, shape and dtype of ``hidden``, 0 for padding, and the record of the pass. A
            token without experts gets the output of the shared expert only, or 0.

        Raises:
            ValueError: If ``hidden`` or ``valid`` is of another shape, or ``hidden`` has not the
                dtype of the experts and there is no autocast.

        Complexity:
            That of the selection, of ``E D`` a token, and of the experts that run.
        """
        self.experts.check_tokens(hidden)
        tokens = hidden.reshape(-1, self.experts.width)
        real = None
        if valid is not None:
            check_shape("valid", valid, hidden.shape[:-1])
            real = valid.reshape(-1)
            tokens = torch.where(real.unsqueeze(1), tokens, 0.0)
        length = hidden.shape[-2] if hidden.dim() > 2 else None
        routing = self.route(tokens, valid=real, sequence_length=length)
        output: Tensor = self.experts(tokens, routing.plan)
        if self.shared is not None:
            output = output + self.shared(tokens)
        return output.view(hidden.shape), routing

    def route(
        self, tokens: Tensor, *, valid: Tensor | None = None, sequence_length: int | None = None
    ) -> LayerRouting:
        """Decides who processes each token, without processing any.

        Args:
            tokens: Shape ``(T, D)``; rows of padding must be finite.
            valid: Which tokens are real, bool, shape ``(T,)``; ``None`` where all are.
            sequence_length: Tokens of each sequence, padding included; ``None`` where not known.
        """
        read: RouterScores = self.scorer(tokens, self.router.weight)
        values = self.policy.price_scores(read.selectable)
        selection = self.policy.select(
            values,
            scores=read.scores,
            valid=valid,
            exact=self.training,
            is_open=read.is_open,
            sequence_length=sequence_length,
        )
        expert_ids, keep = selection.expert_ids, selection.keep
        plan = RoutingPlan(
            expert_ids=expert_ids,
            combine_weights=self.scorer.weights(read.scores, expert_ids, keep),
            keep=keep,
            expert_load=expert_load(expert_ids, keep, self.experts.num_experts),
        )
        return LayerRouting(
            name=self.name,
            scores=read.scores,
            values=values,
            plan=plan,
            selection=selection,
            valid=valid,
            logits=read.logits,
            sequence_length=sequence_length,
            hidden=tokens.detach() if self.scorer.observes else None,
        )

    def observe(self, routing: LayerRouting) -> None:
        """Shows the record of one training micro-batch to policy and scorer."""
        self.policy.observe(routing)
        self.scorer.observe(routing)

    def update(self) -> None:
        """Moves prices and what the scorer learns without gradients, once an optimizer step."""
        self.policy.update()
        self.scorer.update(self.policy.group)

    def get_extra_state(self) -> dict[str, dict[str, Tensor]]:
        """Returns the prices, for ``state_dict``."""
        return self.policy.state_dict()

    def set_extra_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restores the prices, for ``load_state_dict``."""
        self.policy.load_state_dict(state)
