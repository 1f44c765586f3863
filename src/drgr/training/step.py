"""One optimizer step: forward and backward over the micro-batches of every process."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from drgr.ambiguity import domain_sums
from drgr.collectives import rank, sum_over_processes, world_size
from drgr.data import Batch, Corpus, draw_batch
from drgr.evaluation import token_losses
from drgr.integrations.transformers import Attachment
from drgr.routing import LayerRouting, load_balancing_loss
from drgr.training.adversary import DomainWeights, as_array
from drgr.training.expert_groups import expert_sums, expert_token_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What stays the same from step to step.

    Attributes:
        batch_size: Sequences per step over all processes and micro-batches.
        accumulation: Micro-batches per step and process.
        sequence_length: Tokens of a sequence.
        seed: Seed of the batches.
        auxiliary_coefficient: Weight of the load-balancing loss, averaged over layers.
        traffic_coefficient: Weight of the penalty on uneven gradient traffic, averaged over layers;
            ``None`` where traffic is not measured.
        clip_norm: Largest norm of the gradient.
        autocast: Dtype of matrix products, or ``None`` for that of the weights.
        group: Processes of the run.
    """

    batch_size: int
    accumulation: int
    sequence_length: int
    seed: int
    auxiliary_coefficient: float
    traffic_coefficient: float | None
    clip_norm: float
    autocast: torch.dtype | None
    group: ProcessGroup | None

    @property
    def rows(self) -> tuple[range, ...]:
        """The rows of the global batch that each micro-batch of this process holds."""
        size = self.batch_size // (world_size(self.group) * self.accumulation)
        first = rank(self.group) * size * self.accumulation
        return tuple(
            range(first + number * size, first + (number + 1) * size)
            for number in range(self.accumulation)
        )


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
        auxiliary: Sum over steps of the weighted load-balancing loss, scalar.
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
    gradient_norm: Tensor
    steps: Tensor

    @classmethod
    def zeros(cls, *, num_domains: int, num_layers: int, num_experts: int) -> "StepTotals":
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


def train_step(
    forward_model: nn.Module,
    attachment: Attachment,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    settings: StepSettings,
    *,
    step: int,
    weights: DomainWeights,
    expert_weights: Tensor | None = None,
) -> StepTotals:
    """Takes one optimizer step, unless its loss or gradient is not finite.

    The objective is ``(1/N) sum_t w_d(t) l_t`` over the ``N`` tokens of the step in all processes,
    plus the weighted load-balancing loss. Splitting a batch over processes or micro-batches changes
    nothing but rounding, save that an exact batch budget holds in each micro-batch.

    Args:
        forward_model: The model, or its data-parallel wrapper.
        attachment: The attachment of the model.
        optimizer: Optimizer over the parameters to train; its learning rate is set.
        corpus: Where batches are drawn from.
        settings: See :class:`StepSettings`.
        step: Number of steps taken before; determines the batch.
        weights: Sampling and objective weights.
        expert_weights: Weights of the experts as groups, shape ``(L, E)``, see
            :mod:`drgr.training.expert_groups`; their loss is measured then. None for domains.

    Returns:
        The totals of the step. If ``is_finite`` says no, the parameters were not changed.
    """
    sums = _LocalSums(attachment, len(corpus.domains))
    forward_model.train()
    # All of them: parameters of an outer level get gradients here and have another optimizer.
    attachment.model.zero_grad(set_to_none=True)
    if attachment.link_gates is not None:
        # They move by held-out losses; gradients of training steps must not add up on them.
        attachment.link_gates.values.grad = None
    for number, rows in enumerate(settings.rows):
        batch = draw_batch(
            corpus,
            step=step,
            seed=settings.seed,
            weights=as_array(weights.sampling),
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            rows=rows,
        )
        _micro_batch(
            forward_model,
            attachment,
            batch,
            settings=settings,
            weights=weights,
            expert_weights=expert_weights,
            sums=sums,
            is_last=number == settings.accumulation - 1,
        )
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, settings.clip_norm)
    totals = sums.totals(norm, settings.group)
    if is_finite(totals):
        optimizer.step()
        attachment.update()
    return totals


def is_finite(totals: StepTotals) -> bool:
    """Whether all losses and the gradient of the steps are finite numbers."""
    values = (totals.loss_sums.sum(), totals.objective, totals.auxiliary, totals.gradient_norm)
    return all(math.isfinite(float(value)) for value in values)


class _LocalSums:
    """What this process adds up over its micro-batches."""

    def __init__(self, attachment: Attachment, num_domains: int) -> None:
        device = next(attachment.model.parameters()).device
        num_layers = len(attachment.layer_names)
        num_experts = attachment.num_experts
        self.local = torch.zeros(3, num_domains, dtype=torch.float64, device=device)
        self.load = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        shape = (num_layers, num_domains, num_experts)
        self.traffic = torch.zeros(shape, dtype=torch.float64, device=device)
        self.experts = torch.zeros(2, *self.load.shape, dtype=torch.float64, device=device)
        self.scalars = torch.zeros(2, dtype=torch.float64, device=device)
        # Spend and limit are those of the whole batch already, on every process.
        self.shared = torch.zeros(2, num_layers, dtype=torch.int64, device=device)
        self.over = torch.zeros((), dtype=torch.int64, device=device)

    def totals(self, gradient_norm: Tensor, group: ProcessGroup | None) -> StepTotals:
        """Sums over processes, in one collective."""
        parts = [self.local, self.load.double(), self.traffic, self.experts, self.scalars]
        packed = torch.cat([part.flatten() for part in parts])
        packed = sum_over_processes(packed, group).cpu()
        local, load, traffic, experts, scalars = packed.split([part.numel() for part in parts])
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
            gradient_norm=gradient_norm.detach().double().cpu(),
            steps=torch.ones((), dtype=torch.float64),
        )


def _micro_batch(
    forward_model: nn.Module,
    attachment: Attachment,
    batch: Batch,
    *,
    settings: StepSettings,
    weights: DomainWeights,
    expert_weights: Tensor | None,
    sums: _LocalSums,
    is_last: bool,
) -> None:
    """Adds the gradient of one micro-batch, and its sums."""
    device = sums.local.device
    if isinstance(forward_model, DistributedDataParallel):
        forward_model.require_backward_grad_sync = is_last
    domain = batch.domain.to(device)
    with torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None):
        with (
            attachment.from_source(domain),
            attachment.record() as records,
            _traffic(attachment, settings, sums) as traffic,
        ):
            output: Any = forward_model(input_ids=batch.input_ids.to(device), use_cache=False)
        losses = token_losses(output.logits, batch.labels.to(device))
        num_domains = sums.local.shape[1]
        loss_sums, num_tokens = domain_sums(losses, domain, num_domains)
        tokens_per_step = settings.batch_size * settings.sequence_length
        weighted = loss_sums
        if expert_weights is not None:
            factors = expert_token_weights(records, expert_weights.to(device))
            weighted, _ = domain_sums(losses * factors.view_as(losses), domain, num_domains)
            sums.experts += torch.stack(expert_sums(records, losses, sums.load.shape[1]))
        objective = (weights.objective.to(weighted) * weighted).sum() / tokens_per_step
        _add_records(records, domain, batch.labels.shape[1], sums)
        attachment.observe(records)
        auxiliary = _auxiliary(records, settings, sums) / settings.accumulation
        # Data parallelism averages gradients over processes; the objective is a sum over them.
        (objective * world_size(settings.group) + auxiliary).backward()
    sums.traffic += traffic
    sums.local[0] += loss_sums.detach()
    sums.local[1] += num_tokens
    sums.scalars[0] += objective.detach()
    sums.scalars[1] += auxiliary.detach()


def _traffic(
    attachment: Attachment, settings: StepSettings, sums: _LocalSums
) -> AbstractContextManager[Tensor | float]:
    """Measures the gradient traffic of a micro-batch, if at all, and prices it."""
    if settings.traffic_coefficient is None:
        return nullcontext(0.0)
    num_layers, num_domains, _ = sums.traffic.shape
    return attachment.record_traffic(
        num_sources=num_domains,
        coefficient=settings.traffic_coefficient / (num_layers * settings.accumulation),
    )


def _add_records(
    records: list[LayerRouting], domain: Tensor, sequence_length: int, sums: _LocalSums
) -> None:
    """Adds up loads, compute by domain, and spend against limit."""
    domain_of_token = domain.repeat_interleave(sequence_length)
    for layer, routing in enumerate(records):
        sums.load[layer] += routing.plan.expert_load
        experts = routing.plan.keep.sum(dim=1).double()
        sums.local[2].index_add_(0, domain_of_token, experts)
        sums.shared[0, layer] += routing.selection.spend
        sums.shared[1, layer] += routing.selection.limit
        sums.over += routing.selection.spend > routing.selection.limit


def _auxiliary(records: list[LayerRouting], settings: StepSettings, sums: _LocalSums) -> Tensor:
    """Averages the load-balancing loss over layers, with the counts of the step so far."""
    if settings.auxiliary_coefficient == 0:
        return sums.scalars.new_zeros(())
    losses = [
        load_balancing_loss(
            routing.scores, sums.load[layer], valid=routing.valid, group=settings.group
        )
        for layer, routing in enumerate(records)
    ]
    return settings.auxiliary_coefficient * torch.stack(losses).mean()
