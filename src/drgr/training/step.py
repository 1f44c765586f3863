"""One optimizer step: forward and backward over the micro-batches of every process."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from drgr.ambiguity import domain_sums
from drgr.collectives import rank, world_size
from drgr.data import Batch, Corpus, draw_batch
from drgr.evaluation import token_losses
from drgr.integrations.transformers import Attachment
from drgr.routing import LayerRouting
from drgr.training.adversary import DomainWeights, as_array
from drgr.training.draw_losses import surrogate_loss
from drgr.training.expert_groups import expert_sums, expert_token_weights
from drgr.training.routing_losses import RoutingLosses
from drgr.training.step_totals import LocalSums, StepTotals, is_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What stays the same from step to step.

    Attributes:
        batch_size: Sequences per step over all processes and micro-batches.
        accumulation: Micro-batches per step and process.
        sequence_length: Tokens of a sequence.
        seed: Seed of the batches.
        losses: The losses of routing; adaptive coefficients among them move with each step.
        traffic_coefficient: Weight of the penalty on uneven gradient traffic, averaged over layers;
            ``None`` where traffic is not measured.
        clip_norm: Largest norm of the gradient.
        autocast: Dtype of matrix products, or ``None`` for that of the weights.
        routed_alone: Whether every token is routed by itself in training; see
            :mod:`drgr.training.draw_losses`.
        group: Processes of the run.
    """

    batch_size: int
    accumulation: int
    sequence_length: int
    seed: int
    losses: RoutingLosses
    traffic_coefficient: float | None
    clip_norm: float
    autocast: torch.dtype | None
    routed_alone: bool
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
    plus the weighted routing losses; scorers that learn from its value add the gradient that they
    estimate. Splitting a batch over processes or micro-batches changes
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
    sums = LocalSums(
        attachment, num_domains=len(corpus.domains), num_losses=len(settings.losses.names)
    )
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
            step=step,
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
        settings.losses.update(totals.routing_losses)
    return totals


def _micro_batch(
    forward_model: nn.Module,
    attachment: Attachment,
    batch: Batch,
    *,
    settings: StepSettings,
    step: int,
    weights: DomainWeights,
    expert_weights: Tensor | None,
    sums: LocalSums,
    is_last: bool,
) -> None:
    """Adds the gradient of one micro-batch, and its sums."""
    device, group = sums.local.device, settings.group
    if isinstance(forward_model, DistributedDataParallel):
        forward_model.require_backward_grad_sync = is_last
    domain = batch.domain.to(device)
    with torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None):
        with (
            attachment.from_source(domain),
            attachment.record() as records,
            settings.losses.watch(attachment) as activations,
            _traffic(attachment, settings, sums) as traffic,
        ):
            output: Any = forward_model(input_ids=batch.input_ids.to(device), use_cache=False)
        losses = token_losses(output.logits, batch.labels.to(device))
        num_domains = sums.local.shape[1]
        loss_sums, num_tokens = domain_sums(losses, domain, num_domains)
        tokens_per_step = settings.batch_size * settings.sequence_length
        weighted, factored = loss_sums, losses
        if expert_weights is not None:
            factors = expert_token_weights(records, expert_weights.to(device))
            factored = losses * factors.view_as(losses)
            weighted, _ = domain_sums(factored, domain, num_domains)
            sums.experts += torch.stack(expert_sums(records, losses, sums.load.shape[1]))
        objective = (weights.objective.to(weighted) * weighted).sum() / tokens_per_step
    _add_records(records, domain, batch.labels.shape[1], sums)
    attachment.observe(records)
    # Outside of autocast: products of losses stay in the precision of their inputs.
    auxiliary, values = settings.losses.of_micro_batch(
        records, sums.load, attachment, activations=activations, step=step, group=group
    )
    auxiliary = auxiliary / settings.accumulation
    shares = weights.objective.to(factored)[domain].unsqueeze(1) / tokens_per_step
    parts, alone = factored * shares, settings.routed_alone
    drawn = surrogate_loss(attachment, records, parts, auxiliary, alone=alone, group=group)
    # Data parallelism averages gradients over processes; the objective is a sum over them.
    ((objective + drawn) * world_size(group) + auxiliary).backward()
    sums.traffic += traffic
    sums.local[0] += loss_sums.detach()
    sums.local[1] += num_tokens
    sums.scalars[0] += objective.detach()
    sums.scalars[1] += auxiliary.detach()
    sums.losses += values / settings.accumulation


def _traffic(
    attachment: Attachment, settings: StepSettings, sums: LocalSums
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
    records: list[LayerRouting], domain: Tensor, sequence_length: int, sums: LocalSums
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
