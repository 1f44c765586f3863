"""All losses in the forms of :class:`drgr.routing.losses.layer.RoutingLoss` and ``JointLoss``.

Parameters are bound with :func:`functools.partial`, ``partial(tsallis_term, order=2.0)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drgr.routing.losses.activation_locality import activation_locality_loss
from drgr.routing.losses.chunk_sparsity import chunk_sparsity_loss
from drgr.routing.losses.expert_router_coupling import expert_router_coupling_loss
from drgr.routing.losses.layer import LossInputs
from drgr.routing.losses.layer_coupling import layer_coupling_loss, selected_mass
from drgr.routing.losses.load_balancing import (
    load_balancing_loss,
    micro_balancing_loss,
    sequence_balancing_loss,
)
from drgr.routing.losses.pool_balancing import pool_balancing_loss, pool_fractions
from drgr.routing.losses.specialisation import expert_specialisation_loss
from drgr.routing.losses.specialisation_balance import (
    routing_information_loss,
    specialisation_balance_loss,
)
from drgr.routing.losses.top1_balancing import top1_balancing_loss
from drgr.routing.losses.tsallis import tsallis_entropy_loss
from drgr.routing.losses.z_loss import router_z_loss


def global_balance_term(layer: LossInputs, /) -> Tensor:
    """Returns :func:`load_balancing_loss` with the counts of the step so far."""
    return load_balancing_loss(
        layer.scores, _step_load(layer), valid=layer.valid, group=layer.group
    )


def micro_balance_term(layer: LossInputs, /) -> Tensor:
    """Returns :func:`micro_balancing_loss`."""
    return micro_balancing_loss(layer.scores, layer.plan.expert_load, valid=layer.valid)


def sequence_balance_term(layer: LossInputs, /) -> Tensor:
    """Returns :func:`sequence_balancing_loss`; needs ``sequence_length``."""
    return sequence_balancing_loss(
        layer.scores,
        layer.plan.expert_ids,
        layer.plan.keep,
        sequence_length=_sequence_length(layer),
        valid=layer.valid,
        group=layer.group,
    )


def top1_balance_term(layer: LossInputs, /, *, temperature: float = 1.0) -> Tensor:
    """Returns :func:`top1_balancing_loss`; needs ``logits``."""
    return top1_balancing_loss(
        _logits(layer), temperature=temperature, valid=layer.valid, group=layer.group
    )


def router_z_term(layer: LossInputs, /) -> Tensor:
    """Returns :func:`router_z_loss`; needs ``logits``."""
    return router_z_loss(_logits(layer), valid=layer.valid, group=layer.group)


def tsallis_term(layer: LossInputs, /, *, order: float = 1.1) -> Tensor:
    """Returns :func:`tsallis_entropy_loss`."""
    return tsallis_entropy_loss(layer.scores, order=order, valid=layer.valid, group=layer.group)


def specialisation_balance_term(layer: LossInputs, /, *, entropy_coefficient: float) -> Tensor:
    """Returns :func:`specialisation_balance_loss` with the counts of the step so far."""
    return specialisation_balance_loss(
        layer.scores,
        _step_load(layer),
        entropy_coefficient=entropy_coefficient,
        valid=layer.valid,
        group=layer.group,
    )


def routing_information_term(layer: LossInputs, /) -> Tensor:
    """Returns :func:`routing_information_loss`."""
    return routing_information_loss(layer.scores, valid=layer.valid, group=layer.group)


def activation_locality_term(layer: LossInputs, /, *, sharpness: float = 100.0) -> Tensor:
    """Returns :func:`activation_locality_loss`; needs ``logits`` and ``sequence_length``."""
    return activation_locality_loss(
        _logits(layer),
        sequence_length=_sequence_length(layer),
        sharpness=sharpness,
        valid=layer.valid,
        group=layer.group,
    )


def chunk_sparsity_term(layer: LossInputs, /, *, chunk_length: int = 64) -> Tensor:
    """Returns :func:`chunk_sparsity_loss`; needs ``sequence_length``."""
    return chunk_sparsity_loss(
        layer.scores,
        sequence_length=_sequence_length(layer),
        chunk_length=chunk_length,
        valid=layer.valid,
        group=layer.group,
    )


def expert_router_coupling_term(layer: LossInputs, /, *, tolerance: float = 1.0) -> Tensor:
    """Returns :func:`expert_router_coupling_loss`; needs ``weights``."""
    weights = layer.weights
    if weights is None:
        raise _missing("weights")
    return expert_router_coupling_loss(
        weights.router, weights.gates, noise=weights.noise, tolerance=tolerance
    )


def expert_specialisation_term(layer: LossInputs, /) -> Tensor:
    """Returns :func:`expert_specialisation_loss`; needs ``activations``."""
    if layer.activations is None:
        raise _missing("activations")
    return expert_specialisation_loss(
        layer.activations, layer.plan.keep, valid=layer.valid, group=layer.group
    )


def layer_coupling_term(layers: Sequence[LossInputs], /) -> Tensor:
    """Returns :func:`layer_coupling_loss`; 0 for fewer than two layers."""
    masses = [
        selected_mass(layer.scores, layer.plan.expert_ids, layer.plan.keep, valid=layer.valid)
        for layer in layers
    ]
    return layer_coupling_loss(torch.stack(masses), valid=layers[0].valid, group=layers[0].group)


def pool_balance_term(layers: Sequence[LossInputs], /) -> Tensor:
    """Returns the mean of :func:`pool_balancing_loss`, with the counts of the step so far."""
    loads = torch.stack([_step_load(layer) for layer in layers])
    fractions = pool_fractions(loads, layers[0].group)
    losses = [
        pool_balancing_loss(layer.scores, fractions, valid=layer.valid, group=layer.group)
        for layer in layers
    ]
    return torch.stack(losses).mean()


def _step_load(layer: LossInputs) -> Tensor:
    return layer.plan.expert_load if layer.step_load is None else layer.step_load


def _logits(layer: LossInputs) -> Tensor:
    if layer.logits is None:
        raise _missing("logits")
    return layer.logits


def _sequence_length(layer: LossInputs) -> int:
    if layer.sequence_length is None:
        raise _missing("sequence_length")
    return layer.sequence_length


def _missing(name: str) -> ValueError:
    return ValueError(f"{name} must be given for this loss, got None; pass LossInputs({name}=...)")
