"""Settings of what scores experts."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from drgr.routing.scores import GateEstimator
from drgr.training.field_types import STRICT, Count, NotNegative, Positive, Share


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


class CosineConfig(BaseModel):
    """See :class:`drgr.routing.scores.CosineScores`."""

    model_config = STRICT

    kind: Literal["cosine"]
    temperature: Positive = 0.07
    learned: bool = True
    normalised: bool = True


class KMeansConfig(BaseModel):
    """See :class:`drgr.routing.scores.KMeansScores`."""

    model_config = STRICT

    kind: Literal["k-means"]
    decay: Share = 0.99
    temperature: Positive = 0.1
    centred: bool = False
    dead_after: Count = 100


class NormConfig(BaseModel):
    """See :class:`drgr.routing.scores.NormScores`."""

    model_config = STRICT

    kind: Literal["norm"]
    experts_per_token: Count = 2
    epsilon: Positive = 1e-8


class ReluRmsConfig(BaseModel):
    """See :class:`drgr.routing.scores.ReluRmsScores`."""

    model_config = STRICT

    kind: Literal["relu-rms"]
    epsilon: Positive = 1e-5


class TsallisHybridConfig(BaseModel):
    """See :class:`drgr.routing.scores.TsallisHybridScores`."""

    model_config = STRICT

    kind: Literal["tsallis-hybrid"]
    order: Positive = 1.1
    threshold: Positive = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.75
    keep_top: Count = 2
    takes_crossing: bool = False


class NoisyConfig(BaseModel):
    """See :class:`drgr.routing.scores.NoisyScores`."""

    model_config = STRICT

    kind: Literal["noisy"]


class GaussianConfig(BaseModel):
    """See :class:`drgr.routing.scores.GaussianScores`."""

    model_config = STRICT

    kind: Literal["gaussian"]
    temperature: Positive = 0.5
    deviation: NotNegative = 0.1


class StochasticConfig(BaseModel):
    """See :class:`drgr.routing.scores.StochasticGates`."""

    model_config = STRICT

    kind: Literal["stochastic"]
    estimator: GateEstimator = "straight-through"
    """With REINFORCE steps add its surrogate of the loss, see :mod:`drgr.training.draw_losses`."""
    deviation: Positive = 1.0
    sigmoid_slope: bool = False
    decay: Share = 0.99
    """Share of the old baseline that a step keeps; REINFORCE only."""


PlainScoresConfig = (
    SoftmaxConfig | SigmoidConfig | CosineConfig | TsallisHybridConfig | GaussianConfig
)
"""Settings of scorers that need no size."""

CountedScoresConfig = NormConfig | ReluRmsConfig | StochasticConfig
"""Settings of scorers that need the number of experts."""

WideScoresConfig = NoisyConfig | KMeansConfig
"""Settings of scorers that need the number of experts and the width of a token."""

OwnScoresConfig = PlainScoresConfig | CountedScoresConfig | WideScoresConfig
"""Settings of every scorer that takes the place of the model's rule."""

ScoresConfig = Annotated[ModelScoresConfig | OwnScoresConfig, Field(discriminator="kind")]
