"""What a loss sees of one layer's routing, and the weighted sum of several losses.

A loss is any callable that turns :class:`LossInputs` into a scalar; a joint loss turns those of all
layers into one. ``terms.py`` has one of either form for each loss of this folder.
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
class CoupledWeights:
    """The weights of one layer that couple its router and its experts, with gradient.

    Attributes:
        router: Router rows, shape ``(E, d)``.
        gates: Gate projections of the experts, shape ``(E, D, d)``.
        noise: Numbers in ``[-1, 1]``, drawn anew each step and alike on every process, shape
            ``(E, d)``; ``None`` for none.
    """

    router: Tensor
    gates: Tensor
    noise: Tensor | None = None


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
        weights: Weights of router and experts; ``None`` where no loss needs them.
        activations: What the experts of each token compute inside, before their down-projection,
            with gradient, shape ``(T, K, D)``; ``None`` where no loss needs it.
    """

    scores: Tensor
    plan: RoutingPlan
    valid: Tensor | None = None
    group: ProcessGroup | None = None
    logits: Tensor | None = None
    step_load: Tensor | None = None
    sequence_length: int | None = None
    weights: CoupledWeights | None = None
    activations: Tensor | None = None


class RoutingLoss(Protocol):
    """A loss of one layer's routing."""

    def __call__(self, layer: LossInputs, /) -> Tensor:
        """Returns a scalar whose mean over processes is the loss of the whole batch."""
        ...


class JointLoss(Protocol):
    """A loss of the routing of all layers together."""

    def __call__(self, layers: Sequence[LossInputs], /) -> Tensor:
        """Returns a scalar whose mean over processes is the loss of the whole batch."""
        ...


def routing_loss(
    layers: Sequence[LossInputs],
    terms: Sequence[tuple[float, RoutingLoss]],
    *,
    joint_terms: Sequence[tuple[float, JointLoss]] = (),
) -> tuple[Tensor, Tensor]:
    """Adds up losses, each multiplied by its coefficient.

    Args:
        layers: The layers of one forward pass, at least one.
        terms: Pairs of a coefficient of at least 0 and a loss of one layer, which is averaged over
            layers. A loss with coefficient 0 is computed too, to be watched.
        joint_terms: Pairs of a coefficient of at least 0 and a loss of all layers.

    Returns:
        The sum, scalar, with gradient; and each loss without its coefficient, joint ones last,
        shape ``(number of losses,)``, float64, detached.

    Raises:
        ValueError: If there is no layer, or a coefficient is negative or not finite.
    """
    if not layers:
        raise ValueError("layers must not be empty, got 0; a model without MoE layers has no loss")
    losses = [(weight, torch.stack([loss(one) for one in layers]).mean()) for weight, loss in terms]
    losses += [(weight, loss(layers)) for weight, loss in joint_terms]
    total = layers[0].scores.new_zeros((), dtype=torch.float32)
    for coefficient, value in losses:
        check_not_negative("coefficient", coefficient)
        if coefficient > 0:
            total = total + coefficient * value
    if not losses:
        return total, total.new_zeros(0, dtype=torch.float64)
    return total, torch.stack([value.detach().double() for _, value in losses])
