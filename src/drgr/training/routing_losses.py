"""The losses of routing that a run adds to its objective, and their coefficients."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.integrations.transformers import Attachment, ExpertActivations
from drgr.routing import (
    AdaptiveWeight,
    CoupledWeights,
    JointLoss,
    LayerRouting,
    LossInputs,
    RoutingLoss,
    routing_loss,
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeight:
    """The coefficient of one loss.

    Attributes:
        name: The kind of the loss, unique in a run.
        initial: The coefficient, or the first one where it adapts.
        adaptive: What moves it; ``None`` where it is constant.
    """

    name: str
    initial: float
    adaptive: AdaptiveWeight | None = None

    @property
    def value(self) -> float:
        """The coefficient of the next step."""
        return self.initial if self.adaptive is None else self.adaptive.value


@final
class RoutingLosses:
    """Computes the losses of each micro-batch and moves adaptive coefficients once a step.

    Args:
        terms: Losses of one layer with their coefficients.
        joint_terms: Losses of all layers with theirs.
        seed: Seed of the noise on router rows.
        couples_weights: Whether a loss needs the weights of routers and experts.
        has_noise: Whether router rows are perturbed for it.
        needs_activations: Whether a loss needs what experts compute inside.
    """

    def __init__(
        self,
        terms: Sequence[tuple[LossWeight, RoutingLoss]],
        *,
        joint_terms: Sequence[tuple[LossWeight, JointLoss]] = (),
        seed: int = 0,
        couples_weights: bool = False,
        has_noise: bool = False,
        needs_activations: bool = False,
    ) -> None:
        self._terms, self._joint_terms = tuple(terms), tuple(joint_terms)
        self._weights = [weight for weight, _ in (*self._terms, *self._joint_terms)]
        self._seed = seed
        self._couples_weights, self._has_noise = couples_weights, has_noise
        self._needs_activations = needs_activations

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses, those of all layers last."""
        return tuple(weight.name for weight in self._weights)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Coefficients of the next step, in the order of :attr:`names`."""
        return tuple(weight.value for weight in self._weights)

    def watch(
        self, attachment: Attachment
    ) -> AbstractContextManager[Sequence[ExpertActivations] | None]:
        """Records what the losses need of the forward pass inside, beside its routing."""
        return attachment.record_activations() if self._needs_activations else nullcontext()

    def of_micro_batch(
        self,
        records: Sequence[LayerRouting],
        step_loads: Tensor,
        attachment: Attachment,
        *,
        activations: Sequence[ExpertActivations] | None,
        step: int,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the losses of one micro-batch of this process.

        Args:
            records: What each layer did.
            step_loads: Assignments by layer and expert on this process in the step so far, this
                micro-batch included, shape ``(L, E)``.
            attachment: The attachment of the model.
            activations: What :meth:`watch` recorded.
            step: Number of steps taken before; determines the noise.
            group: Processes that share the batch.

        Returns:
            The weighted sum, with gradient, and each loss without its coefficient in the order of
            :attr:`names`, float64. The means of both over processes are those of the whole batch.
        """
        weights = self._coupled_weights(attachment, step)
        inside = (
            [None] * len(records) if activations is None else [a.by_token() for a in activations]
        )
        layers = [
            LossInputs(
                scores=routing.scores,
                plan=routing.plan,
                valid=routing.valid,
                group=group,
                logits=routing.logits,
                step_load=load,
                sequence_length=routing.sequence_length,
                weights=coupled,
                activations=inner,
            )
            for routing, load, coupled, inner in zip(
                records, step_loads, weights, inside, strict=True
            )
        ]
        return routing_loss(
            layers,
            [(weight.value, loss) for weight, loss in self._terms],
            joint_terms=[(weight.value, loss) for weight, loss in self._joint_terms],
        )

    def update(self, values: Tensor) -> None:
        """Shows one optimizer step to the adaptive coefficients.

        Args:
            values: Each loss of the step, the same on every process.
        """
        for weight, value in zip(self._weights, values.tolist(), strict=True):
            if weight.adaptive is not None:
                weight.adaptive.update(value)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the adaptive coefficients by the names of their losses."""
        return {w.name: w.adaptive.state_dict() for w in self._weights if w.adaptive is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for weight in self._weights:
            if weight.adaptive is not None:
                weight.adaptive.load_state_dict(state[weight.name])

    def _coupled_weights(
        self, attachment: Attachment, step: int
    ) -> Sequence[CoupledWeights | None]:
        if not self._couples_weights:
            return [None] * len(attachment.layer_names)
        # A generator for each step, alike on every process and after a resumption.
        generator = np.random.default_rng((self._seed, step))
        return [
            CoupledWeights(
                router=router,
                gates=gates,
                noise=_noise_like(router, generator) if self._has_noise else None,
            )
            for router, gates in attachment.coupled_weights()
        ]


def _noise_like(router: Tensor, generator: np.random.Generator) -> Tensor:
    drawn = torch.from_numpy(generator.uniform(-1, 1, tuple(router.shape)))
    return drawn.to(router.device, torch.promote_types(router.dtype, torch.float32))
