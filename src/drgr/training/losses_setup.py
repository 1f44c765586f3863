"""From the settings of routing losses to the losses."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from drgr.errors import ConfigError, UnknownRouterError
from drgr.integrations.transformers import Attachment
from drgr.routing import (
    AdaptiveWeight,
    JointLoss,
    RoutingLoss,
    activation_locality_term,
    chunk_sparsity_term,
    expert_router_coupling_term,
    expert_specialisation_term,
    global_balance_term,
    layer_coupling_term,
    micro_balance_term,
    pool_balance_term,
    router_z_term,
    routing_information_term,
    sequence_balance_term,
    specialisation_balance_term,
    top1_balance_term,
    tsallis_term,
)
from drgr.training.losses_config import (
    ActivationLocalityConfig,
    ChunkSparsityConfig,
    ExpertRouterCouplingConfig,
    ExpertSpecialisationConfig,
    GlobalBalanceConfig,
    LayerCouplingConfig,
    LossConfig,
    MicroBalanceConfig,
    PoolBalanceConfig,
    RouterZConfig,
    RoutingInformationConfig,
    SequenceBalanceConfig,
    SpecialisationBalanceConfig,
    Top1BalanceConfig,
    TsallisConfig,
)
from drgr.training.routing_config import RoutingConfig
from drgr.training.routing_losses import LossWeight, RoutingLosses

_TERMS: Mapping[type, Callable[..., Tensor]] = {
    GlobalBalanceConfig: global_balance_term,
    MicroBalanceConfig: micro_balance_term,
    SequenceBalanceConfig: sequence_balance_term,
    Top1BalanceConfig: top1_balance_term,
    RouterZConfig: router_z_term,
    TsallisConfig: tsallis_term,
    SpecialisationBalanceConfig: specialisation_balance_term,
    RoutingInformationConfig: routing_information_term,
    ActivationLocalityConfig: activation_locality_term,
    ChunkSparsityConfig: chunk_sparsity_term,
    ExpertRouterCouplingConfig: expert_router_coupling_term,
    ExpertSpecialisationConfig: expert_specialisation_term,
}
"""The losses of one layer."""

_JOINT_TERMS: Mapping[type, Callable[..., Tensor]] = {
    LayerCouplingConfig: layer_coupling_term,
    PoolBalanceConfig: pool_balance_term,
}
"""The losses of all layers together."""


def build_losses(config: RoutingConfig, attachment: Attachment, *, seed: int) -> RoutingLosses:
    """Returns the losses of a run.

    Args:
        config: Their settings.
        attachment: The attachment of the model.
        seed: Seed of the run.

    Raises:
        ConfigError: If the model lacks what a loss needs.
    """
    losses = config.all_losses
    terms: list[tuple[LossWeight, RoutingLoss]] = []
    joint_terms: list[tuple[LossWeight, JointLoss]] = []
    for loss in losses:
        _check_needs(loss, attachment)
        if type(loss) in _JOINT_TERMS:
            joint_terms.append((_weight(loss), partial(_JOINT_TERMS[type(loss)], **loss.options)))
        else:
            terms.append((_weight(loss), partial(_TERMS[type(loss)], **loss.options)))
    coupling = [loss for loss in losses if isinstance(loss, ExpertRouterCouplingConfig)]
    return RoutingLosses(
        terms,
        joint_terms=joint_terms,
        seed=seed,
        couples_weights=bool(coupling),
        has_noise=any(loss.noise for loss in coupling),
        needs_activations=any(isinstance(loss, ExpertSpecialisationConfig) for loss in losses),
    )


def _weight(config: LossConfig) -> LossWeight:
    adaptive = None
    if isinstance(config, ChunkSparsityConfig) and config.adaptive is not None:
        adaptive = AdaptiveWeight(config.coefficient, **config.adaptive.model_dump())
    return LossWeight(name=config.kind, initial=config.coefficient, adaptive=adaptive)


def _check_needs(config: LossConfig, attachment: Attachment) -> None:
    """Raises where the model lacks what a loss needs."""
    num_layers = len(attachment.layer_names)
    if isinstance(config, LayerCouplingConfig) and num_layers < 2:
        raise ConfigError(
            f"routing.losses: {config.kind} needs at least two MoE layers, got {num_layers}; "
            f"remove it or take a deeper model"
        )
    if isinstance(config, ExpertRouterCouplingConfig):
        try:
            attachment.coupled_weights()
        except UnknownRouterError as error:
            raise ConfigError(f"routing.losses: {config.kind}: {error}") from error
