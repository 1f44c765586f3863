"""Passes of the outer loop over a few sequences of every domain, routed as in evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from drgr.ambiguity import domain_sums
from drgr.budgets.flops import FORWARD_PASSES_PER_STEP, FlopModel, forward_flops
from drgr.collectives import rank, sum_over_processes, world_size
from drgr.data import Batch, Corpus, draw_batch
from drgr.errors import NonFiniteLossError
from drgr.evaluation import token_losses
from drgr.integrations.transformers import Attachment
from drgr.routing import LayerRouting
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


Routes = list[list[LayerRouting]]
"""How the parts of a batch that this process runs one after the other were routed."""


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

    def gradient(
        self, batch: Batch, factors: Tensor, *, routes: Routes | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiates ``sum_d factors_d * mean loss of d``.

        Args:
            batch: Sequences.
            factors: Shape ``(G,)``.
            routes: How its tokens route; by what the layers decide if None.

        Returns:
            The gradient in the inner parameters and in the outer tensors as vectors, and the mean
            losses by domain in nats, shape ``(G,)``, float64, on the CPU.
        """
        tensors = [*self.inner, *self.outer]
        total = [wide(torch.zeros_like(tensor)) for tensor in tensors]
        rows = torch.arange(len(batch.domain))
        losses, _ = self._run(batch, rows, factors, total, routes=routes)
        vector = self._summed(total)
        size = sum(tensor.numel() for tensor in self.inner)
        return vector[:size], vector[size:], losses

    def gradients_by_domain(self, batch: Batch) -> Iterator[Tensor]:
        """Yields the gradient of each domain's mean loss in the inner parameters, in order."""
        for domain in range(self.num_domains):
            rows = (batch.domain == domain).nonzero().flatten()
            total = [wide(torch.zeros_like(tensor)) for tensor in self.inner]
            self._run(batch, rows, torch.ones(self.num_domains), total)
            yield self._summed(total)

    def losses(self, batch: Batch, *, routes: Routes | None = None) -> Tensor:
        """Returns the mean loss of each domain in nats, shape ``(G,)``, float64, on the CPU."""
        return self._run(batch, torch.arange(len(batch.domain)), None, [], routes=routes)[0]

    def routes(self, batch: Batch) -> Routes:
        """Returns how the batch routes now; a forward pass."""
        return self._run(batch, torch.arange(len(batch.domain)), None, [])[1]

    def along(
        self,
        batch: Batch,
        direction: Tensor,
        factors: Tensor,
        *,
        routes: Routes,
        with_gradients: bool,
    ) -> DirectionalDerivative:
        """Differentiates along a direction of the inner parameters by a central difference.

        Two forward passes, or two gradients where those are wanted; no second derivatives, so that
        grouped and fused kernels will do. Tokens keep to ``routes``: where one changes, the loss
        jumps, and a difference quotient of that is no derivative.
        """
        step = difference_step(self.inner, direction)
        ends = []
        for signed in (step, -step):
            with displaced(self.inner, signed * direction):
                if with_gradients:
                    ends.append(self.gradient(batch, factors, routes=routes))
                else:
                    empty = direction.new_zeros(0)
                    ends.append((empty, empty, self.losses(batch, routes=routes)))
        (inner, outer, losses), (inner_behind, outer_behind, losses_behind) = ends
        return DirectionalDerivative(
            losses=(losses - losses_behind) / (2 * step),
            inner=(inner - inner_behind) / (2 * step) if with_gradients else None,
            outer=(outer - outer_behind) / (2 * step) if with_gradients else None,
        )

    def gauss_newton(
        self, batch: Batch, direction: Tensor, factors: Tensor, *, routes: Routes
    ) -> Tensor:
        r"""Returns the product of a direction with the Gauss-Newton matrix of the weighted loss.

        ``sum_t f_t J_t' (diag p_t - p_t p_t') J_t`` with ``J_t`` the derivative of a token's logits
        and ``p_t`` its predicted probabilities: the Hessian without the curvature of the network
        itself, and never negative. ``J z`` is a central difference of logits, so a product costs
        two forward passes and a gradient.
        """
        step = difference_step(self.inner, direction)
        total = [wide(torch.zeros_like(tensor)) for tensor in self.inner]
        rows = torch.arange(len(batch.domain))
        factor_of_domain = factors / self._tokens(batch)
        assignments = torch.zeros(1, dtype=torch.float64, device=self.inner[0].device)
        for part, replay in zip(self._parts(rows), routes, strict=True):
            ends = []
            for signed in (step, -step):
                with displaced(self.inner, signed * direction):
                    logits, _ = self._forward(batch, part, with_graph=False, replay=replay)
                    ends.append(logits.float())
            change = (ends[0] - ends[1]) / (2 * step)
            logits, records = self._forward(batch, part, with_graph=True, replay=replay)
            shares = logits.detach().float().softmax(dim=-1)
            change = change - (shares * change).sum(dim=-1, keepdim=True)
            scale = factor_of_domain[batch.domain[part]].to(change).view(-1, 1, 1)
            self._accumulate((logits.float() * (scale * shares * change)).sum(), total)
            assignments += _spend(records)
        spent = float(sum_over_processes(assignments, self._settings.group))
        self._count(len(rows), spent, passes=FORWARD_PASSES_PER_STEP + 2)
        return self._summed(total)

    def _run(
        self,
        batch: Batch,
        rows: Tensor,
        factors: Tensor | None,
        total: list[Tensor],
        *,
        routes: Routes | None = None,
    ) -> tuple[Tensor, Routes]:
        """Runs this process's part of some rows; adds gradients to ``total`` if it has entries.

        Returns:
            Mean losses by domain over all processes, and the routes of a pass without gradient.
        """
        device, group = self.inner[0].device, self._settings.group
        tokens = self._tokens(batch).to(device)
        sums = torch.zeros(2, self.num_domains, dtype=torch.float64, device=device)
        routed = []
        for number, part in enumerate(self._parts(rows)):
            replay = None if routes is None else routes[number]
            logits, records = self._forward(batch, part, with_graph=bool(total), replay=replay)
            losses = token_losses(logits, batch.labels[part].to(device))
            loss_sums, _ = domain_sums(losses, batch.domain[part].to(device), self.num_domains)
            if factors is not None and total:
                self._accumulate((factors.to(loss_sums) * loss_sums / tokens).sum(), total)
            else:
                routed.append(records)
            sums[0] += loss_sums.detach()
            sums[1, 0] += _spend(records)
        loss_sums, assignments = sum_over_processes(sums, group)
        passes = FORWARD_PASSES_PER_STEP if total else 1
        self._count(len(rows), float(assignments[0]), passes=passes)
        return (loss_sums / tokens).cpu(), routed

    def _summed(self, total: list[Tensor]) -> Tensor:
        """Returns gradients of all processes as one vector."""
        vector = sum_over_processes(flat(total), self._settings.group)
        if not bool(vector.isfinite().all()):
            raise NonFiniteLossError(
                "a gradient of the outer loop is not finite; lower training.learning_rate or "
                "training.clip_norm, or look for broken text in the validation split"
            )
        return vector

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Returns this process's share of some rows, in parts that fit its memory."""
        settings, size = self._settings, world_size(self._settings.group)
        mine = rows[rank(settings.group) :: size]
        chunk = max(1, settings.batch_size // (settings.accumulation * size))
        return mine.split(chunk) if len(mine) else ()

    def _tokens(self, batch: Batch) -> Tensor:
        """Returns the tokens of each domain in a batch, at least 1, shape ``(G,)``."""
        counts = torch.bincount(batch.domain, minlength=self.num_domains)
        return (counts * self._settings.sequence_length).clamp_min(1)

    def _forward(
        self, batch: Batch, part: Tensor, *, with_graph: bool, replay: list[LayerRouting] | None
    ) -> tuple[Tensor, list[LayerRouting]]:
        """Returns the logits of some rows, and how they were routed."""
        settings, attachment = self._settings, self._attachment
        device, model = self.inner[0].device, self._attachment.model
        was_training = model.training
        model.eval()
        with (
            torch.set_grad_enabled(with_graph),
            torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None),
            attachment.from_source(batch.domain[part]),
            nullcontext() if replay is None else attachment.replay(replay),
            attachment.record() as records,
        ):
            output: Any = model(input_ids=batch.input_ids[part].to(device), use_cache=False)
        model.train(was_training)
        return output.logits, records

    def _accumulate(self, objective: Tensor, total: list[Tensor]) -> None:
        tensors = [*self.inner, *self.outer][: len(total)]
        found = torch.autograd.grad(objective, tensors, allow_unused=True)
        for place, gradient in zip(total, found, strict=True):
            if gradient is not None:  # an expert that no token chose
                place.add_(gradient)

    def _count(self, rows: int, assignments: float, *, passes: int) -> None:
        length = self._settings.sequence_length
        self.flops += passes * forward_flops(
            self._costs, tokens=rows * length, sequence_length=length, assignments=assignments
        )


def _spend(records: list[LayerRouting]) -> Tensor:
    return torch.stack([routing.selection.spend for routing in records]).sum()
