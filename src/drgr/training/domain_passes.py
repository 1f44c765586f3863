"""Passes of the outer loop over a few sequences of every domain, routed as in evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from drgr.ambiguity import domain_sums
from drgr.budgets.flops import FORWARD_PASSES_PER_STEP, FlopModel, forward_flops
from drgr.collectives import rank, sum_over_processes, world_size
from drgr.data import Batch, Corpus, draw_batch
from drgr.evaluation import token_losses
from drgr.integrations.transformers import Attachment
from drgr.training.displacement import difference_step, displaced, flat, wide
from drgr.training.step import StepSettings

# Keeps the outer loop's sequences apart from those of the steps and of the adversary.
_SEED_OFFSET = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionalDerivative:
    """How things change along a direction of the inner parameters.

    Attributes:
        losses: Of each domain's mean loss, in nats, shape ``(G,)``, float64, on the CPU.
        inner: Of the weighted loss's gradient in the inner parameters: ``H z``.
        outer: Of its gradient in the outer tensors: ``J z``.
    """

    losses: Tensor
    inner: Tensor | None
    outer: Tensor | None


@final
class DomainPasses:
    """Losses and gradients by domain, the same on every process, with their FLOPs counted.

    Tokens route by themselves at the frozen batch price, so that a small move of the parameters
    changes few routes, and none through other tokens.

    Args:
        attachment: The attached model; training mode is restored after each pass.
        corpus: Where sequences come from.
        settings: Sequence length, seed, precision and processes.
        flops: What the model costs.
        windows: Sequences of each domain in a batch.
        inner: Parameters of the inner level.
        outer: Tensors of the outer level that the losses depend on; may be none.
    """

    def __init__(
        self,
        attachment: Attachment,
        corpus: Corpus,
        settings: StepSettings,
        flops: FlopModel,
        *,
        windows: int,
        inner: Sequence[Tensor],
        outer: Sequence[Tensor] = (),
    ) -> None:
        self._attachment, self._corpus = attachment, corpus
        self._settings, self._costs = settings, flops
        self._windows = windows
        self.inner, self.outer = list(inner), list(outer)
        self.flops = 0.0

    @property
    def num_domains(self) -> int:
        """Number of domains ``G``."""
        return len(self._corpus.domains)

    def draw(self, split: str, step: int) -> Batch:
        """Draws ``windows`` sequences of each domain."""
        uniform = torch.full((self.num_domains,), 1 / self.num_domains, dtype=torch.float64)
        return draw_batch(
            self._corpus,
            split=split,
            step=step,
            seed=self._settings.seed + _SEED_OFFSET,
            weights=uniform.numpy(),
            batch_size=self.num_domains * self._windows,
            sequence_length=self._settings.sequence_length,
        )

    def gradient(self, batch: Batch, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiates ``sum_d factors_d * mean loss of d``.

        Returns:
            The gradient in the inner parameters and in the outer tensors as vectors, and the mean
            losses by domain in nats, shape ``(G,)``, float64, on the CPU.
        """
        tensors = [*self.inner, *self.outer]
        total = [wide(torch.zeros_like(tensor)) for tensor in tensors]
        sums = self._sums(batch, torch.arange(len(batch.domain)), factors, total)
        vector = sum_over_processes(flat(total), self._settings.group)
        size = sum(tensor.numel() for tensor in self.inner)
        return vector[:size], vector[size:], sums

    def gradients_by_domain(self, batch: Batch) -> Iterator[Tensor]:
        """Yields the gradient of each domain's mean loss in the inner parameters, in order."""
        for domain in range(self.num_domains):
            rows = (batch.domain == domain).nonzero().flatten()
            total = [wide(torch.zeros_like(tensor)) for tensor in self.inner]
            self._sums(batch, rows, torch.ones(self.num_domains), total)
            yield sum_over_processes(flat(total), self._settings.group)

    def losses(self, batch: Batch) -> Tensor:
        """Returns the mean loss of each domain in nats, shape ``(G,)``, float64, on the CPU."""
        return self._sums(batch, torch.arange(len(batch.domain)), None, [])

    def along(
        self, batch: Batch, direction: Tensor, factors: Tensor, *, with_gradients: bool
    ) -> DirectionalDerivative:
        """Differentiates along a direction of the inner parameters by a central difference.

        Two forward passes, or two gradients where those are wanted; no second derivatives, so that
        grouped and fused kernels will do.
        """
        step = difference_step(self.inner, direction)
        ends = []
        for signed in (step, -step):
            with displaced(self.inner, signed * direction):
                if with_gradients:
                    ends.append(self.gradient(batch, factors))
                else:
                    empty = direction.new_zeros(0)
                    ends.append((empty, empty, self.losses(batch)))
        (inner, outer, losses), (inner_behind, outer_behind, losses_behind) = ends
        return DirectionalDerivative(
            losses=(losses - losses_behind) / (2 * step),
            inner=(inner - inner_behind) / (2 * step) if with_gradients else None,
            outer=(outer - outer_behind) / (2 * step) if with_gradients else None,
        )

    def _sums(
        self, batch: Batch, rows: Tensor, factors: Tensor | None, total: list[Tensor]
    ) -> Tensor:
        """Runs this process's part of some rows; adds gradients to ``total`` if it has entries."""
        settings, model = self._settings, self._attachment.model
        device = self.inner[0].device
        mine = rows[rank(settings.group) :: world_size(settings.group)]
        counts = torch.bincount(batch.domain, minlength=self.num_domains).to(device)
        tokens = counts * settings.sequence_length
        sums = torch.zeros(2, self.num_domains, dtype=torch.float64, device=device)
        chunk = max(1, settings.batch_size // (settings.accumulation * world_size(settings.group)))
        was_training = model.training
        model.eval()
        for part in mine.split(chunk) if len(mine) else ():
            losses, assignments = self._forward(batch, part, device, with_graph=bool(total))
            loss_sums, _ = domain_sums(losses, batch.domain[part].to(device), self.num_domains)
            if factors is not None and total:
                objective = (factors.to(loss_sums) * loss_sums / tokens.clamp_min(1)).sum()
                self._accumulate(objective, total)
            sums[0] += loss_sums.detach()
            sums[1, 0] += assignments
        model.train(was_training)
        loss_sums, assignments = sum_over_processes(sums, settings.group)
        self._count(len(rows), float(assignments[0]), with_gradients=bool(total))
        means: Tensor = (loss_sums / tokens.clamp_min(1)).cpu()
        return means

    def _forward(
        self, batch: Batch, part: Tensor, device: torch.device, *, with_graph: bool
    ) -> tuple[Tensor, Tensor]:
        settings = self._settings
        with (
            torch.set_grad_enabled(with_graph),
            torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None),
            self._attachment.record() as records,
        ):
            output: Any = self._attachment.model(
                input_ids=batch.input_ids[part].to(device), use_cache=False
            )
            losses = token_losses(output.logits, batch.labels[part].to(device))
        return losses, torch.stack([routing.selection.spend for routing in records]).sum()

    def _accumulate(self, objective: Tensor, total: list[Tensor]) -> None:
        tensors = [*self.inner, *self.outer][: len(total)]
        found = torch.autograd.grad(objective, tensors, allow_unused=True)
        for place, gradient in zip(total, found, strict=True):
            if gradient is not None:  # an expert that no token chose
                place.add_(gradient)

    def _count(self, rows: int, assignments: float, *, with_gradients: bool) -> None:
        length = self._settings.sequence_length
        passes = FORWARD_PASSES_PER_STEP if with_gradients else 1
        self.flops += passes * forward_flops(
            self._costs, tokens=rows * length, sequence_length=length, assignments=assignments
        )
