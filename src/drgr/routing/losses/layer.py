"""What a loss sees of one layer's routing, and the weighted sum of several losses.

A loss is any callable that turns :class:`LossInputs` into a scalar. ``terms.py`` has one for each
loss of a single layer; losses that need weights, activations or several layers are called directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_not_negative
from drgr.routing.plan import RoutingPlan


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """One layer's routing of one micro-batch, as losses need it.

    Attributes:
        scores: Router scores of all experts, non-negative, shape ``(T, E)``, with gradient.
        plan: The routing plan.
        valid: Which tokens are real, shape ``(T,)``, bool; ``None`` where all are.
        group: Processes that share the batch.
        logits: Router logits with gradient, shape ``(T, E)``; ``None`` where no loss needs them.
        step_load: Assignments per expert on this process in the optimizer step so far, this
            micro-batch included, shape ``(E,)``; ``None`` where a step is one micro-batch.
        sequence_length: Tokens of each sequence, padding included; ``None`` where no loss needs it.
    """

    scores: Tensor
    plan: RoutingPlan
    valid: Tensor | None = None
    group: ProcessGroup | None = None
    logits: Tensor | None = None
    step_load: Tensor | None = None
    sequence_length: int | None = None


class RoutingLoss(Protocol):
    """A loss of one layer's routing."""

    def __call__(self, layer: LossInputs, /) -> Tensor:
        """Returns a scalar whose mean over processes is the loss of the whole batch."""
        ...


def routing_loss(
    layers: Sequence[LossInputs], terms: Sequence[tuple[float, RoutingLoss]]
) -> tuple[Tensor, Tensor]:
    """Adds up losses, each averaged over layers and multiplied by its coefficient.

    Args:
        layers: The layers of one forward pass, at least one.
        terms: Pairs of a coefficient of at least 0 and a loss. A loss with coefficient 0 is
            computed too, to be watched.

    Returns:
        The sum, scalar, with gradient; and each loss as averaged over layers, without its
        coefficient, shape ``(number of terms,)``, float64, detached.

    Raises:
        ValueError: If there is no layer, or a coefficient is negative or not finite.
    """
    if not layers:
        raise ValueError("layers must not be empty, got 0; a model without MoE layers has no loss")
    total = layers[0].scores.new_zeros((), dtype=torch.float32)
    values = []
    for coefficient, loss in terms:
        check_not_negative("coefficient", coefficient)
        value = torch.stack([loss(layer) for layer in layers]).mean()
        values.append(value.detach().double())
        if coefficient > 0:
            total = total + coefficient * value
    return total, torch.stack(values) if values else total.new_zeros(0, dtype=torch.float64)
