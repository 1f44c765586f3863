"""Settings of the losses of routing."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from drgr.training.field_types import STRICT, Count, NotNegative, Positive


class AdaptiveConfig(BaseModel):
    """See :class:`drgr.routing.AdaptiveWeight`."""

    model_config = STRICT

    warmup: Count = 1000
    window: Count = 100
    smallest_rise: NotNegative = 0.025
    largest: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0

    @model_validator(mode="after")
    def _check_warmup(self) -> "AdaptiveConfig":
        if self.warmup < 2 * self.window:
            raise ValueError(
                f"warmup must be at least two windows, {2 * self.window} steps, got "
                f"{self.warmup}; raise it or shorten the window"
            )
        return self


class _LossConfig(BaseModel):
    """What every loss has."""

    model_config = STRICT

    coefficient: NotNegative
    """Weight of the loss, which is a mean over layers; at 0 it is only watched."""

    @property
    def options(self) -> dict[str, Any]:
        """The settings of the loss itself, named as the arguments of its function."""
        return self.model_dump(exclude={"kind", "coefficient", "adaptive", "noise"})


class GlobalBalanceConfig(_LossConfig):
    """See :func:`drgr.routing.load_balancing_loss`; counts are those of the step so far."""

    kind: Literal["global-balance"]


class MicroBalanceConfig(_LossConfig):
    """See :func:`drgr.routing.micro_balancing_loss`."""

    kind: Literal["micro-balance"]


class SequenceBalanceConfig(_LossConfig):
    """See :func:`drgr.routing.sequence_balancing_loss`."""

    kind: Literal["sequence-balance"]


class Top1BalanceConfig(_LossConfig):
    """See :func:`drgr.routing.top1_balancing_loss`."""

    kind: Literal["top1-balance"]
    temperature: Positive = 1.0


class RouterZConfig(_LossConfig):
    """See :func:`drgr.routing.router_z_loss`."""

    kind: Literal["router-z"]


class TsallisConfig(_LossConfig):
    """See :func:`drgr.routing.tsallis_entropy_loss`."""

    kind: Literal["tsallis"]
    order: Positive = 1.1


class SpecialisationBalanceConfig(_LossConfig):
    """See :func:`drgr.routing.specialisation_balance_loss`."""

    kind: Literal["specialisation-balance"]
    entropy_coefficient: Annotated[float, Field(allow_inf_nan=False)]


class RoutingInformationConfig(_LossConfig):
    """See :func:`drgr.routing.routing_information_loss`."""

    kind: Literal["routing-information"]


class ActivationLocalityConfig(_LossConfig):
    """See :func:`drgr.routing.activation_locality_loss`."""

    kind: Literal["activation-locality"]
    sharpness: Positive = 100.0


class ChunkSparsityConfig(_LossConfig):
    """See :func:`drgr.routing.chunk_sparsity_loss`."""

    kind: Literal["chunk-sparsity"]
    chunk_length: Count = 64
    adaptive: AdaptiveConfig | None = None
    """Moves the coefficient with the loss, beginning at ``coefficient``; constant where absent."""

    @model_validator(mode="after")
    def _check_coefficient(self) -> "ChunkSparsityConfig":
        if self.adaptive is not None and self.coefficient == 0:
            raise ValueError(
                "coefficient must be above 0 where it is adaptive, got 0; set adaptive to null "
                "to watch the loss only"
            )
        return self


class ExpertRouterCouplingConfig(_LossConfig):
    """See :func:`drgr.routing.expert_router_coupling_loss`."""

    kind: Literal["expert-router-coupling"]
    tolerance: NotNegative = 1.0
    noise: bool = True
    """Whether router rows are perturbed, anew in each step."""


class ExpertSpecialisationConfig(_LossConfig):
    """See :func:`drgr.routing.expert_specialisation_loss`.

    It needs memory for what the experts of each token compute inside.
    """

    kind: Literal["expert-specialisation"]


class LayerCouplingConfig(_LossConfig):
    """See :func:`drgr.routing.layer_coupling_loss`."""

    kind: Literal["layer-coupling"]


class PoolBalanceConfig(_LossConfig):
    """See :func:`drgr.routing.pool_balancing_loss`; counts are those of the step so far."""

    kind: Literal["pool-balance"]


LossConfig = Annotated[
    GlobalBalanceConfig
    | MicroBalanceConfig
    | SequenceBalanceConfig
    | Top1BalanceConfig
    | RouterZConfig
    | TsallisConfig
    | SpecialisationBalanceConfig
    | RoutingInformationConfig
    | ActivationLocalityConfig
    | ChunkSparsityConfig
    | ExpertRouterCouplingConfig
    | ExpertSpecialisationConfig
    | LayerCouplingConfig
    | PoolBalanceConfig,
    Field(discriminator="kind"),
]
