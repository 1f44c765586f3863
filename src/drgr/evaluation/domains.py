"""Held-out losses, expert use and compute of each domain."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drgr.collectives import rank, sum_over_processes, world_size
from drgr.data import Batch, Corpus, evaluation_batches
from drgr.evaluation.congestion import RoutingSamples
from drgr.integrations.transformers import Attachment
from drgr.routing import router_similarity, tsallis_entropy
from drgr.routing.tokens import expert_probabilities


def entropy_sum(scores: Tensor) -> Tensor:
    """Sums the routing entropy of each token of this process, as a share of its largest value."""
    return tsallis_entropy(expert_probabilities(scores.double()), order=1.0).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScores:
    """Sums over the evaluated tokens of each domain, over all processes.

    Attributes:
        domains: Names, ``G`` of them.
        layer_names: Names of the MoE layers, ``L`` of them.
        loss_sums: Summed token losses in nats, shape ``(G,)``, float64.
        num_tokens: Tokens predicted, shape ``(G,)``, int64.
        expert_load: Assignments by layer, domain and expert, shape ``(L, G, E)``, int64.
        entropy_sums: Summed routing entropies of tokens by layer and domain, each in [0, 1], shape
            ``(L, G)``, float64; NaN where scores are not known.
        router_similarity: Mean cosine of two router rows by layer, shape ``(L,)``, float64.
        bytes_per_token: UTF-8 bytes per token of each domain's split, shape ``(G,)``, float64.
        limit: Assignments that the budget allows for these tokens, over all layers.
        samples: Loads and probabilities by batch of windows, for the congestion coefficient.
    """

    domains: tuple[str, ...]
    layer_names: tuple[str, ...]
    loss_sums: Tensor
    num_tokens: Tensor
    expert_load: Tensor
    entropy_sums: Tensor
    router_similarity: Tensor
    bytes_per_token: Tensor
    limit: int
    samples: RoutingSamples

    @property
    def losses(self) -> Tensor:
        """Mean token loss in nats, shape ``(G,)``; NaN for a domain without tokens."""
        return self.loss_sums / self.num_tokens

    @property
    def bits_per_byte(self) -> Tensor:
        """Mean loss in bits per UTF-8 byte, shape ``(G,)``."""
        return self.losses / math.log(2) / self.bytes_per_token

    @property
    def experts_per_token(self) -> Tensor:
        """Mean experts of a token and layer, shape ``(G,)``."""
        num_layers = self.expert_load.shape[0]
        return self.expert_load.sum(dim=(0, 2)) / (self.num_tokens * num_layers)

    @property
    def routing_entropy(self) -> Tensor:
        """Mean routing entropy of a token over its largest value, by layer, shape ``(L,)``."""
        return self.entropy_sums.sum(dim=1) / self.num_tokens.sum()

    @property
    def spend(self) -> int:
        """Assignments that ran, over all layers."""
        return int(self.expert_load.sum())

    @property
    def worst(self) -> int:
        """Index of the domain with the most bits per byte."""
        return int(self.bits_per_byte.argmax())


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy of each token in nats, ``(B, S)``, computed in float32 at least."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)


def evaluate_domains(
    attachment: Attachment,
    corpus: Corpus,
    *,
    split: str,
    max_windows: int | None,
    sequence_length: int,
    batch_size: int,
    group: ProcessGroup | None = None,
    autocast: torch.dtype | None = None,
    knows_sources: bool = True,
) -> DomainScores:
    """Evaluates a model on fixed windows of every domain of a split.

    Tokens route by themselves at the frozen batch price. Nothing of the model or its routing
    changes.

    Args:
        attachment: The attached model.
        corpus: Where the windows come from.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        max_windows: Windows of each domain at most, evenly spread; all by default.
        sequence_length: Tokens predicted in a window.
        batch_size: Windows in a forward pass.
        group: Processes that share the work; each evaluates a part, all return the whole.
        autocast: Dtype of matrix products, or ``None`` for that of the weights.
        knows_sources: Whether the corpus's domains are those of training. If not, link gates treat
            every token as one of an unknown source.

    Returns:
        Sums over all processes.
    """
    model = attachment.model
    device = next(model.parameters()).device
    totals = _Totals(attachment, len(corpus.domains), device, knows_sources=knows_sources)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            for index, first, batch in own_batches(
                corpus, split, max_windows, shape=(batch_size, sequence_length), group=group
            ):
                totals.add(model, index, first, batch)
    finally:
        model.train(was_training)
    return totals.summed(corpus, split, group)


def own_batches(
    corpus: Corpus,
    split: str,
    max_windows: int | None,
    *,
    shape: tuple[int, int],
    group: ProcessGroup | None,
) -> Iterator[tuple[int, int, Batch]]:
    """Yields this process's batches with their domain and the number of their first window.

    ``shape`` is that of a batch: windows, and tokens of each.
    """
    batch_size, sequence_length = shape
    first = 0
    for index, domain in enumerate(corpus.domains):
        batches = evaluation_batches(
            corpus,
            split=split,
            domain=domain,
            batch_size=batch_size,
            sequence_length=sequence_length,
            max_windows=max_windows,
        )
        for number, batch in enumerate(batches):
            if number % world_size(group) == rank(group):
                yield index, first, batch
            first += len(batch.labels)


class _Totals:
    """Running sums of one evaluation."""

    def __init__(
        self,
        attachment: Attachment,
        num_domains: int,
        device: torch.device,
        *,
        knows_sources: bool,
    ) -> None:
        self._attachment, self._knows_sources = attachment, knows_sources
        num_experts = attachment.policies[0].controller.prices.shape[0]
        shape = (len(attachment.layer_names), num_domains, num_experts)
        self._device = device
        self._loss_sums = torch.zeros(num_domains, dtype=torch.float64, device=device)
        self._num_tokens = torch.zeros(num_domains, dtype=torch.int64, device=device)
        self._load = torch.zeros(shape, dtype=torch.int64, device=device)
        self._entropy_sums = torch.zeros(shape[:2], dtype=torch.float64, device=device)
        self._limit = torch.zeros((), dtype=torch.int64, device=device)
        self._samples = RoutingSamples.zeros(
            num_layers=shape[0], num_experts=num_experts, device=device
        )

    def add(self, model: nn.Module, domain: int, first: int, batch: Batch) -> None:
        """Adds one batch of a single domain, whose first window has the number ``first``."""
        known = self._attachment.from_source(domain) if self._knows_sources else nullcontext()
        with known, self._attachment.record() as records:
            output: Any = model(input_ids=batch.input_ids.to(self._device), use_cache=False)
        losses = token_losses(output.logits, batch.labels.to(self._device))
        self._loss_sums[domain] += losses.double().sum()
        self._num_tokens[domain] += losses.numel()
        for layer, routing in enumerate(records):
            self._load[layer, domain] += routing.plan.expert_load
            self._entropy_sums[layer, domain] += entropy_sum(routing.scores)
            self._limit += routing.selection.limit
            self._samples.add(
                layer,
                (first, len(batch.labels)),
                expert_ids=routing.plan.expert_ids,
                keep=routing.plan.keep,
                scores=routing.scores,
            )

    def summed(self, corpus: Corpus, split: str, group: ProcessGroup | None) -> DomainScores:
        """Returns the sums over all processes, on the CPU."""
        ratios = [corpus.bytes_per_token(split, domain) for domain in corpus.domains]
        return DomainScores(
            domains=tuple(corpus.domains),
            layer_names=self._attachment.layer_names,
            loss_sums=sum_over_processes(self._loss_sums, group).cpu(),
            num_tokens=sum_over_processes(self._num_tokens, group).cpu(),
            expert_load=sum_over_processes(self._load, group).cpu(),
            entropy_sums=sum_over_processes(self._entropy_sums, group).cpu(),
            router_similarity=torch.stack(
                [router_similarity(rows).cpu() for rows in self._attachment.router_weights]
            ),
            bytes_per_token=torch.tensor(ratios, dtype=torch.float64),
            limit=int(sum_over_processes(self._limit, group)),
            samples=self._samples.summed(group),
        )
