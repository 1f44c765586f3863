"""What one optimizer step adds up, on one process and over all of them."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes, world_size
from drgr.integrations.transformers import Attachment


@dataclass(slots=True, kw_only=True)
class StepTotals:
    """Sums of one step, or of several; float64 on the CPU, over all processes.

    Attributes:
        loss_sums: Token losses in nats by domain, shape ``(G,)``.
        num_tokens: Tokens by domain, shape ``(G,)``.
        assignments: Assignments by domain over all layers, shape ``(G,)``.
        expert_load: Assignments by layer and expert, shape ``(L, E)``.
        expert_losses: Credited token losses in nats by layer and expert, shape ``(L, E)``; 0 unless
            experts are groups.
        expert_credit: Credit by layer and expert, shape ``(L, E)``, likewise.
        spend: Assignments by layer, shape ``(L,)``.
        traffic: Gradient traffic by layer, domain and expert in nats per unit of an expert's
            output, shape ``(L, G, E)``; 0 where it is not measured.
        limit: Assignments allowed by layer, shape ``(L,)``.
        over: Selections that exceeded their limit, scalar. 0 where the selection holds a budget, as
            all do but a learned threshold.
        objective: Sum over steps of the weighted loss in nats, scalar.
        auxiliary: Sum over steps of the weighted routing losses, scalar.
        routing_losses: Sum over steps of each routing loss without its coefficient, one for each.
        gradient_norm: Sum over steps of the gradient's norm before clipping, scalar.
        steps: Number of steps, scalar.
    """

    loss_sums: Tensor
    num_tokens: Tensor
    assignments: Tensor
    expert_load: Tensor
    expert_losses: Tensor
    expert_credit: Tensor
    traffic: Tensor
    spend: Tensor
    limit: Tensor
    over: Tensor
    objective: Tensor
    auxiliary: Tensor
    routing_losses: Tensor
    gradient_norm: Tensor
    steps: Tensor

    @classmethod
    def zeros(
        cls, *, num_domains: int, num_layers: int, num_experts: int, num_losses: int
    ) -> "StepTotals":
        """Returns the totals of no step."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(
            loss_sums=zeros(num_domains),
            num_tokens=zeros(num_domains),
            assignments=zeros(num_domains),
            expert_load=zeros(num_layers, num_experts),
            expert_losses=zeros(num_layers, num_experts),
            expert_credit=zeros(num_layers, num_experts),
            traffic=zeros(num_layers, num_domains, num_experts),
            spend=zeros(num_layers),
            limit=zeros(num_layers),
            over=zeros(),
            objective=zeros(),
            auxiliary=zeros(),
            routing_losses=zeros(num_losses),
            gradient_norm=zeros(),
            steps=zeros(),
        )

    def to_dict(self) -> dict[str, Tensor]:
        """Returns the fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def add_(self, other: "StepTotals") -> None:
        """Adds other steps to these."""
        for name, value in self.to_dict().items():
            value.add_(getattr(other, name))


def is_finite(totals: StepTotals) -> bool:
    """Whether all losses and the gradient of the steps are finite numbers."""
    values = (
        totals.loss_sums.sum(),
        totals.objective,
        totals.auxiliary,
        totals.routing_losses.sum(),
        totals.gradient_norm,
    )
    return all(math.isfinite(float(value)) for value in values)


@final
class LocalSums:
    """What this process adds up over its micro-batches.

    Args:
        attachment: The attachment of the model.
        num_domains: Number of domains ``G``.
        num_losses: Number of routing losses.
    """

    def __init__(self, attachment: Attachment, *, num_domains: int, num_losses: int) -> None:
        device = next(attachment.model.parameters()).device
        num_layers = len(attachment.layer_names)
        num_experts = attachment.num_experts
        self.local = torch.zeros(3, num_domains, dtype=torch.float64, device=device)
        self.load = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        shape = (num_layers, num_domains, num_experts)
        self.traffic = torch.zeros(shape, dtype=torch.float64, device=device)
        self.experts = torch.zeros(2, *self.load.shape, dtype=torch.float64, device=device)
        self.scalars = torch.zeros(2, dtype=torch.float64, device=device)
        self.losses = torch.zeros(num_losses, dtype=torch.float64, device=device)
        # Spend and limit are those of the whole batch already, on every process.
        self.shared = torch.zeros(2, num_layers, dtype=torch.int64, device=device)
        self.over = torch.zeros((), dtype=torch.int64, device=device)

    def totals(self, gradient_norm: Tensor, group: ProcessGroup | None) -> StepTotals:
        """Sums over processes, in one collective."""
        parts = [self.local, self.load.double(), self.traffic]
        parts += [self.experts, self.scalars, self.losses]
        packed = torch.cat([part.flatten() for part in parts])
        packed = sum_over_processes(packed, group).cpu()
        sizes = [part.numel() for part in parts]
        local, load, traffic, experts, scalars, losses = packed.split(sizes)
        expert_losses, expert_credit = experts.view_as(self.experts)
        loss_sums, num_tokens, assignments = local.view_as(self.local)
        spend, limit = self.shared.double().cpu()
        return StepTotals(
            loss_sums=loss_sums,
            num_tokens=num_tokens,
            assignments=assignments,
            expert_load=load.view_as(self.load),
            # The loss of a process is multiplied by their number.
            traffic=traffic.view_as(self.traffic) / world_size(group),
            expert_losses=expert_losses,
            expert_credit=expert_credit,
            spend=spend,
            limit=limit,
            over=self.over.double().cpu(),
            objective=scalars[0],
            auxiliary=scalars[1] / world_size(group),
            routing_losses=losses / world_size(group),
            gradient_norm=gradient_norm.detach().double().cpu(),
            steps=torch.ones((), dtype=torch.float64),
        )
