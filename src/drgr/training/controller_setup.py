"""From the settings of a balance controller to what builds it for each layer."""

from collections.abc import Callable
from functools import partial
from typing import assert_never

import torch

from drgr.errors import ConfigError
from drgr.routing import (
    BipBalancing,
    CongestionPrice,
    ControllerFactory,
    DecayingSubgradient,
    NoPrices,
    PriceController,
    QuantileBalancing,
    RmsBias,
    SelectiveSinkhorn,
    SignBias,
    SinkhornPrices,
)
from drgr.training.routing_config import (
    BipConfig,
    CongestionConfig,
    ControllerConfig,
    NoControllerConfig,
    PricedConfig,
    QuantileConfig,
    RmsBiasConfig,
    SelectiveSinkhornConfig,
    SignBiasConfig,
    SinkhornConfig,
    SubgradientConfig,
)


def build_controller(config: ControllerConfig) -> ControllerFactory:
    """Returns what builds a layer's controller of expert prices.

    What it returns raises :class:`~drgr.errors.ConfigError` where the settings do not fit the
    layer, as a target of another length does.
    """
    if isinstance(config, NoControllerConfig):
        return lambda experts, device: NoPrices(experts, device=device)
    # Settings are named as the arguments of their controller.
    construct = partial(_controller_class(config), **config.model_dump(exclude={"kind"}))

    def build(num_experts: int, device: torch.device) -> PriceController:
        try:
            return construct(num_experts, device=device)
        except ValueError as error:
            raise ConfigError(f"routing.controller: {error}") from error

    return build


def _controller_class(config: PricedConfig) -> Callable[..., PriceController]:
    match config:
        case SignBiasConfig() | RmsBiasConfig() | SubgradientConfig() | CongestionConfig():
            return _step_rule(config)
        case QuantileConfig():
            return QuantileBalancing
        case BipConfig():
            return BipBalancing
        case SinkhornConfig():
            return SinkhornPrices
        case SelectiveSinkhornConfig():
            return SelectiveSinkhorn
        case _:
            assert_never(config)


def _step_rule(
    config: SignBiasConfig | RmsBiasConfig | SubgradientConfig | CongestionConfig,
) -> Callable[..., PriceController]:
    """Returns the constructor of a controller that needs loads only."""
    match config:
        case SignBiasConfig():
            return SignBias
        case RmsBiasConfig():
            return RmsBias
        case SubgradientConfig():
            return DecayingSubgradient
        case CongestionConfig():
            return CongestionPrice
        case _:
            assert_never(config)
