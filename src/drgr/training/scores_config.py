"""Settings of what scores experts."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from drgr.training.field_types import STRICT


class ModelScoresConfig(BaseModel):
    """The rule of the model's own router."""

    model_config = STRICT

    kind: Literal["model"] = "model"


class SoftmaxConfig(BaseModel):
    """See :class:`drgr.routing.scores.SoftmaxScores`."""

    model_config = STRICT

    kind: Literal["softmax"]
    normalised: bool = True


class SigmoidConfig(BaseModel):
    """See :class:`drgr.routing.scores.SigmoidScores`."""

    model_config = STRICT

    kind: Literal["sigmoid"]


OwnScoresConfig = SoftmaxConfig | SigmoidConfig
"""Settings of every scorer that takes the place of the model's rule."""

ScoresConfig = Annotated[ModelScoresConfig | OwnScoresConfig, Field(discriminator="kind")]
