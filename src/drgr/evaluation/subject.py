"""What is evaluated: a model of a run, or any MoE model of transformers, with its routes read."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from drgr.errors import UnknownRouterError
from drgr.integrations.transformers import (
    Attachment,
    MoeSite,
    RouterContract,
    find_contract,
    find_sites,
)

Source = int | Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerUse:
    """What one MoE layer did with the tokens of a forward pass.

    Attributes:
        scores: Router scores of all experts, shape ``(T, E)``; ``None`` where the rule from logits
            to scores is not known.
        expert_ids: Candidate experts, shape ``(T, K)``, int64.
        keep: Which of them ran, shape ``(T, K)``, bool.
        limit: Assignments that the budget allows for these tokens; ``None`` without a budget.
    """

    scores: Tensor | None
    expert_ids: Tensor
    keep: Tensor
    limit: Tensor | None


class Subject(Protocol):
    """A model that is evaluated."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        ...

    @property
    def sites(self) -> tuple[MoeSite, ...]:
        """Its MoE blocks, in order."""
        ...

    @property
    def has_budget(self) -> bool:
        """Whether layers say how much they may spend."""
        ...

    @property
    def experts_are_eager(self) -> bool:
        """Whether its own experts run each as matrix products of their own."""
        ...

    def forward(self, input_ids: Tensor, source: Source) -> tuple[Tensor, list[LayerUse]]:
        """Runs the model; returns logits ``(B, S, V)`` and what each layer did.

        Args:
            input_ids: Token ids, shape ``(B, S)``, on the model's device.
            source: Domain of all sequences, or of each, shape ``(B,)``.
        """
        ...


@final
class AttachedModel:
    """A model with routing policies: it routes at its frozen prices.

    Args:
        attachment: The attached model.
        knows_sources: Whether the evaluated domains are those of training. If not, link gates treat
            every token as one of an unknown source.
    """

    def __init__(self, attachment: Attachment, *, knows_sources: bool = True) -> None:
        self._attachment = attachment
        self._knows_sources = knows_sources
        self.sites = find_sites(attachment.model)
        self.has_budget = True
        self.experts_are_eager = True

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self._attachment.model

    def forward(self, input_ids: Tensor, source: Source) -> tuple[Tensor, list[LayerUse]]:
        """Runs the model, see :class:`Subject`."""
        with ExitStack() as stack:
            if self._knows_sources:
                stack.enter_context(self._attachment.from_source(source))
            records = stack.enter_context(self._attachment.record())
            output: Any = self.model(input_ids=input_ids, use_cache=False)
        uses = [
            LayerUse(
                scores=routing.scores,
                expert_ids=routing.plan.expert_ids,
                keep=routing.plan.keep,
                limit=routing.selection.limit,
            )
            for routing in records
        ]
        return output.logits, uses


@final
class PlainModel:
    """A model as transformers runs it, with its own rule and number of experts a token.

    Its routers are read by hooks that exist during a forward pass only and change nothing.

    Args:
        model: An MoE model that is not attached.

    Raises:
        UnknownRouterError: If it has no MoE layer, or its layers differ in their number of experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = find_sites(model)
        self.has_budget = False
        self.experts_are_eager = False
        sizes = sorted({site.num_experts for site in self.sites})
        if len(sizes) > 1:
            raise UnknownRouterError(
                f"{type(model).__name__} has layers of {sizes} experts; evaluation needs the same "
                "number in all"
            )
        self._contracts = [_contract_or_none(site) for site in self.sites]

    def forward(self, input_ids: Tensor, source: Source) -> tuple[Tensor, list[LayerUse]]:
        """Runs the model, see :class:`Subject`; the source makes no difference."""
        del source
        uses: dict[int, LayerUse] = {}
        with ExitStack() as stack:
            for number, site in enumerate(self.sites):
                hook = site.router.register_forward_hook(partial(self._read, number, uses))
                stack.callback(hook.remove)
            output: Any = self.model(input_ids=input_ids, use_cache=False)
        return output.logits, [uses[number] for number in range(len(self.sites))]

    def _read(
        self,
        number: int,
        uses: dict[int, LayerUse],
        router: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> None:
        """Notes what a router answered."""
        del router, args
        if not (isinstance(output, tuple) and len(output) >= 3):
            raise UnknownRouterError(
                f"{self.sites[number].name} must return (logits, weights, indices) from its "
                f"router, got {type(output).__name__}; its routes cannot be read"
            )
        logits, _, expert_ids, *_ = output
        contract = self._contracts[number]
        uses[number] = LayerUse(
            scores=None if contract is None else contract.scores(logits.detach()),
            expert_ids=expert_ids,
            keep=torch.ones_like(expert_ids, dtype=torch.bool),
            limit=None,
        )


def _contract_or_none(site: MoeSite) -> RouterContract | None:
    """Finds the rule of a router; routes can be counted without it."""
    try:
        return find_contract(site.router, site.name)
    except UnknownRouterError:
        return None
