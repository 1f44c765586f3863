"""Settings of which of a token's experts run."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from drgr.budgets.schedules import LayerShape
from drgr.training.field_types import STRICT, Count, Finite, Positive


class BudgetSelectionConfig(BaseModel):
    """The best plan inside the budget, see :class:`drgr.routing.selection.BudgetedSelector`."""

    model_config = STRICT

    kind: Literal["budget"] = "budget"


class TopPConfig(BaseModel):
    """See :class:`drgr.routing.selection.TopPSelector`; the budget's average is not used."""

    model_config = STRICT

    kind: Literal["top-p"]
    p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the scores that a token's experts reach."""


class ThresholdConfig(BaseModel):
    """A fixed threshold, or one that is learned to keep to the budget's average.

    See :class:`drgr.routing.selection.ThresholdSelector` and
    :class:`drgr.routing.selection.QuantileSelector`.
    """

    model_config = STRICT

    kind: Literal["threshold"]
    level: Finite | None = None
    """What an expert's score less its price must exceed; learned where not given."""
    per_expert: bool = False
    """Whether each expert has a threshold of its own, which balances loads; learned ones only."""

    @model_validator(mode="after")
    def _check_learned(self) -> "ThresholdConfig":
        if self.per_expert and self.level is not None:
            raise ValueError(
                f"per_expert needs learned thresholds, got level {self.level:g}; set it to null"
            )
        return self


class OpenSelectionConfig(BaseModel):
    """The experts that the scorer opens, see :class:`drgr.routing.selection.OpenExperts`.

    Needs scores that open experts; the budget's average is not used.
    """

    model_config = STRICT

    kind: Literal["open"]


class SequenceSelectionConfig(BaseModel):
    """The budget in each sequence, see :class:`drgr.routing.selection.SequenceSelector`."""

    model_config = STRICT

    kind: Literal["sequence"]


class LayersConfig(BaseModel):
    """A budget for each layer, see :func:`drgr.routing.selection.layer_budgets`.

    Either their averages, or a shape over depth and a total, see
    :func:`drgr.budgets.layer_counts`. Bounds of a token are the budget's.
    """

    model_config = STRICT

    kind: Literal["layers"]
    averages: tuple[Positive, ...] | None = None
    """For each MoE layer, lowest first, what takes the place of the budget's average."""
    shape: LayerShape | None = None
    total: Count | None = None
    """Sum over layers of the whole experts a token has on average."""

    @model_validator(mode="after")
    def _check_given(self) -> "LayersConfig":
        by_shape = (self.shape is not None, self.total is not None)
        if by_shape != (self.averages is None,) * 2:
            raise ValueError(
                f"either averages or both shape and total must be set, got averages "
                f"{self.averages}, shape {self.shape} and total {self.total}; set the others to "
                f"null"
            )
        return self


class ProgressiveConfig(BaseModel):
    """Another number of experts until some step, then the budget.

    More in the lowest layers, as published, or fewer everywhere: cheap steps first. See
    :class:`drgr.routing.selection.ProgressiveSelector`.
    """

    model_config = STRICT

    kind: Literal["progressive"]
    first: Count | Annotated[tuple[Count, ...], Field(min_length=1)]
    """Experts of every token until the switch: one number for all MoE layers, or one for each of
    the lowest."""
    switch_step: Count
    """Optimizer steps before every layer has the budget."""


SelectionConfig = Annotated[
    BudgetSelectionConfig
    | TopPConfig
    | ThresholdConfig
    | SequenceSelectionConfig
    | OpenSelectionConfig
    | LayersConfig
    | ProgressiveConfig,
    Field(discriminator="kind"),
]
