"""A fixed probe of the data: means over its batches, and how far chance may move them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from drgr._checks import check_not_negative
from drgr.bilevel.alternation import State
from drgr.bilevel.hypergradient import ParameterLoss
from drgr.bilevel.products import gradients, leaf
from drgr.bilevel.structures import Parameters, layout_of

Batch = Any
"""What the losses take: indices, a tuple of tensors, ..."""

BatchLoss = Callable[[Parameters, Parameters, Batch], Tensor]
"""A scalar of the outer and the inner parameters, a mean over a batch."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Batches that judge every step, and what a step may raise the merit on them by."""

    outer_loss: BatchLoss
    inner_loss: BatchLoss
    batches: Sequence[Batch]
    merit_weight: float
    allowance: float | None

    def __post_init__(self) -> None:
        if len(self.batches) == 0:
            raise ValueError("probe must hold a batch, got none; pass samples to judge steps by")
        if self.allowance is not None:
            check_not_negative("allowance", self.allowance)
        elif len(self.batches) == 1:
            raise ValueError(
                "probe must hold at least 2 batches to estimate an allowance, got 1; "
                "split it, or give an allowance"
            )

    def mean(self, loss: BatchLoss) -> ParameterLoss:
        """Returns the mean of a loss over the batches."""
        if len(self.batches) == 1:
            return lambda outer, inner: loss(outer, inner, self.batches[0])
        return lambda outer, inner: torch.stack(
            [loss(outer, inner, batch) for batch in self.batches]
        ).mean()

    def allowed(self, outer: tuple[Parameters, Parameters], before: State, after: State) -> float:
        """Returns the given allowance, or a standard error of the change of the merit.

        Args:
            outer: The outer parameters of both states.
            before: Where a step began.
            after: Where it led.
        """
        if self.allowance is not None:
            return self.allowance
        change = self._influences(outer[1], after) - self._influences(outer[0], before)
        return (change.std() / math.sqrt(len(change))).item()

    def _influences(self, outer: Parameters, state: State) -> Tensor:
        """Returns each batch's part in the merit, up to one constant, shape ``(batches,)``.

        The merit is a function of means over batches. To first order in them, with ``s_i`` the
        inner gradient of a batch and ``s`` their mean, a batch counts for ``F_i + (weight s - z)'
        s_i``; the linear residual is kept too small to matter.
        """
        layout = layout_of("inner_params", state.inner)
        inner, values, slopes = layout.vector(state.inner), [], []
        for batch in self.batches:

            def inner_loss(_: Tensor, vector: Tensor, batch: Batch = batch) -> Tensor:
                return self.inner_loss(outer, layout.structure(vector), batch)

            with torch.no_grad():
                values.append(self.outer_loss(outer, state.inner, batch))
            _, _, slope = gradients(inner_loss, leaf(state.outer), leaf(inner))
            slopes.append(torch.zeros_like(inner) if slope is None else slope)
        every = torch.stack(slopes)
        along = self.merit_weight * every.mean(dim=0) - layout.vector(state.found.auxiliary)
        return torch.stack(values) + every @ along
