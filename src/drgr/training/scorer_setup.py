"""From the settings of the scores to what builds each layer's scorer."""

from collections.abc import Callable
from functools import partial
from typing import assert_never

from drgr.errors import ConfigError
from drgr.routing import LayerPlace
from drgr.routing.scores import (
    CosineScores,
    GaussianScores,
    KMeansScores,
    NoisyScores,
    NormScores,
    ReluRmsScores,
    Scorer,
    ScorerFactory,
    SigmoidScores,
    SoftmaxScores,
    StochasticGates,
    TsallisHybridScores,
)
from drgr.training.scores_config import (
    CosineConfig,
    CountedScoresConfig,
    GaussianConfig,
    KMeansConfig,
    ModelScoresConfig,
    NoisyConfig,
    NormConfig,
    OwnScoresConfig,
    PlainScoresConfig,
    ReluRmsConfig,
    ScoresConfig,
    SigmoidConfig,
    SoftmaxConfig,
    StochasticConfig,
    TsallisHybridConfig,
    WideScoresConfig,
)


def build_scorer(config: ScoresConfig) -> ScorerFactory | None:
    """Returns what builds a layer's scorer; ``None`` for the model's own rule.

    What it returns raises :class:`~drgr.errors.ConfigError` where the settings do not fit the
    layer.
    """
    if isinstance(config, ModelScoresConfig):
        return None
    # Settings are named as the arguments of their scorer.
    options = config.model_dump(exclude={"kind"})

    def build(place: LayerPlace) -> Scorer:
        try:
            return _constructor(config, place)(**options)
        except ValueError as error:
            raise ConfigError(f"routing.scores: {error}") from error

    return build


def _constructor(config: OwnScoresConfig, place: LayerPlace) -> Callable[..., Scorer]:
    """Returns the constructor of a scorer, its sizes given."""
    match config:
        case NormConfig() | ReluRmsConfig() | StochasticConfig():
            return partial(_counted_class(config), place.num_experts)
        case NoisyConfig() | KMeansConfig():
            return partial(_wide_class(config), place.num_experts, place.width)
        case _:
            return _plain_class(config)


def _plain_class(config: PlainScoresConfig) -> Callable[..., Scorer]:
    match config:
        case SoftmaxConfig():
            return SoftmaxScores
        case SigmoidConfig():
            return SigmoidScores
        case CosineConfig():
            return CosineScores
        case TsallisHybridConfig():
            return TsallisHybridScores
        case GaussianConfig():
            return GaussianScores
        case _:
            assert_never(config)


def _counted_class(config: CountedScoresConfig) -> Callable[..., Scorer]:
    match config:
        case NormConfig():
            return NormScores
        case ReluRmsConfig():
            return ReluRmsScores
        case StochasticConfig():
            return StochasticGates
        case _:
            assert_never(config)


def _wide_class(config: WideScoresConfig) -> Callable[..., Scorer]:
    match config:
        case NoisyConfig():
            return NoisyScores
        case KMeansConfig():
            return KMeansScores
        case _:
            assert_never(config)
