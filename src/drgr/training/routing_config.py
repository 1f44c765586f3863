"""Settings of the MoE layers: their budget, their balance and their links."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from drgr.routing import SinkhornCost
from drgr.training.field_types import STRICT, Count, NotNegative, Positive, Share
from drgr.training.losses_config import GlobalBalanceConfig, LossConfig
from drgr.training.scores_config import ModelScoresConfig, ScoresConfig
from drgr.training.selection_config import BudgetSelectionConfig, SelectionConfig


class BudgetConfig(BaseModel):
    """Bounds on each layer's compute, see :class:`drgr.budgets.TokenBudget`."""

    model_config = STRICT

    unit: Literal["experts", "flops"] = "experts"
    """Experts per token, or forward FLOPs of a layer's experts per token."""
    minimum: NotNegative = 1
    maximum: Positive = 4
    average: Positive = 2

    @model_validator(mode="after")
    def _check_order(self) -> "BudgetConfig":
        if self.minimum > self.maximum:
            raise ValueError(
                f"minimum must be at most maximum, got {self.minimum:g} and {self.maximum:g}; "
                f"lower the minimum or raise the maximum"
            )
        if self.average < self.minimum:
            raise ValueError(
                f"average must be at least minimum, got {self.average:g} and {self.minimum:g}; "
                f"every token costs the minimum already"
            )
        if self.average > self.maximum:
            raise ValueError(
                f"average must be at most maximum, got {self.average:g} and {self.maximum:g}; "
                f"tokens cannot use the rest"
            )
        if self.unit == "experts" and (self.minimum % 1 or self.maximum % 1):
            raise ValueError(
                f"minimum and maximum must be whole numbers of experts, got {self.minimum:g} and "
                f"{self.maximum:g}; only the average may be fractional"
            )
        return self


class NoControllerConfig(BaseModel):
    """No expert prices."""

    model_config = STRICT

    kind: Literal["none"] = "none"


class _TargetConfig(BaseModel):
    """What every controller that aims at a load has."""

    model_config = STRICT

    target: tuple[Positive, ...] | None = None
    """Loads wanted, one for each expert in any unit; equal where not given."""


class SignBiasConfig(_TargetConfig):
    """See :class:`drgr.routing.SignBias`."""

    kind: Literal["sign-bias"]
    step_size: Positive = 1e-3


class RmsBiasConfig(_TargetConfig):
    """See :class:`drgr.routing.RmsBias`."""

    kind: Literal["rms-bias"]
    step_size: Positive = 1e-3


class SubgradientConfig(_TargetConfig):
    """See :class:`drgr.routing.DecayingSubgradient`."""

    kind: Literal["subgradient"]
    step_size: Positive = 0.1
    decay: Annotated[float, Field(ge=0, le=1)] = 0.5


class CongestionConfig(_TargetConfig):
    """See :class:`drgr.routing.CongestionPrice`."""

    kind: Literal["congestion"]
    strength: Positive = 1.0
    smoothing: Share = 0.9


class QuantileConfig(_TargetConfig):
    """See :class:`drgr.routing.QuantileBalancing`."""

    kind: Literal["quantile"] = "quantile"
    smoothing: Share = 0.0


class BipConfig(_TargetConfig):
    """See :class:`drgr.routing.BipBalancing`."""

    kind: Literal["bip"]
    num_iterations: Count = 8


class SinkhornConfig(_TargetConfig):
    """See :class:`drgr.routing.SinkhornPrices`."""

    kind: Literal["sinkhorn"]
    regularization: Positive = 0.05
    cost: SinkhornCost = "scores"
    tolerance: Positive = 1e-3
    max_iterations: Count = 100


class SelectiveSinkhornConfig(_TargetConfig):
    """See :class:`drgr.routing.SelectiveSinkhorn`."""

    kind: Literal["selective-sinkhorn"]
    probability: Annotated[float, Field(ge=0, le=1)] = 0.01
    seed: Annotated[int, Field(ge=0)] = 0
    regularization: Positive = 0.05
    cost: SinkhornCost = "scores"
    tolerance: Positive = 1e-3
    max_iterations: Count = 100


PricedConfig = (
    SignBiasConfig
    | RmsBiasConfig
    | SubgradientConfig
    | CongestionConfig
    | QuantileConfig
    | BipConfig
    | SinkhornConfig
    | SelectiveSinkhornConfig
)
"""Settings of every controller that moves prices."""

ControllerConfig = Annotated[NoControllerConfig | PricedConfig, Field(discriminator="kind")]


class TrafficConfig(BaseModel):
    """Gradient that flows from domains to experts, see :mod:`drgr.routing.traffic`."""

    model_config = STRICT

    measure: bool = True
    """Whether it is measured in every step and reported."""
    coefficient: NotNegative = 0.0
    """Weight of the penalty on uneven traffic, averaged over layers, micro-batches and processes.
    Its gradient is added in the backward pass; no reported loss holds it."""

    @model_validator(mode="after")
    def _check_measured(self) -> "TrafficConfig":
        if self.coefficient > 0 and not self.measure:
            raise ValueError(
                f"coefficient must be 0 where nothing is measured, got {self.coefficient:g} with "
                f"measure false; the penalty needs the measurement"
            )
        return self


class RoutingConfig(BaseModel):
    """Budget and balance of every MoE layer."""

    model_config = STRICT

    budget: BudgetConfig = BudgetConfig()
    scores: ScoresConfig = ModelScoresConfig()
    """What an expert suits a token; by default what the model's router says."""
    controller: ControllerConfig = QuantileConfig()
    selection: SelectionConfig = BudgetSelectionConfig()
    """Which of a token's experts run; the bounds of a token are the budget's in all of them."""
    auxiliary_coefficient: NotNegative = 0.0
    """Weight of the Switch load-balancing loss, averaged over layers: short for the entry
    ``{kind: global-balance}`` of ``losses``."""
    losses: tuple[LossConfig, ...] = ()
    """Losses of routing, one of a kind."""
    price_smoothing: Share = 0.9
    """Share of the old price, or learned threshold, of an extra expert that a step keeps."""
    traffic: TrafficConfig = TrafficConfig()
    link_gates: bool = False
    """Whether each link (domain, expert) has a gate, all open and 1 to begin with; what moves them
    is an outer loop. See :mod:`drgr.routing.link_gates`."""

    @property
    def all_losses(self) -> tuple[LossConfig, ...]:
        """The losses, the one that has a short form included."""
        if self.auxiliary_coefficient == 0:
            return self.losses
        short = GlobalBalanceConfig(kind="global-balance", coefficient=self.auxiliary_coefficient)
        return (short, *self.losses)

    @model_validator(mode="after")
    def _check_losses(self) -> "RoutingConfig":
        kinds = [loss.kind for loss in self.all_losses]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(
                f"losses must hold one entry of a kind, got more of {', '.join(twice)}; keep one "
                f"(auxiliary_coefficient counts as global-balance)"
            )
        return self
