"""From the settings of the scores to what builds each layer's scorer."""

from collections.abc import Callable
from functools import partial
from typing import assert_never

from drgr.errors import ConfigError
from drgr.routing import LayerPlace
from drgr.routing.scores import Scorer, ScorerFactory, SigmoidScores, SoftmaxScores
from drgr.training.scores_config import (
    ModelScoresConfig,
    OwnScoresConfig,
    ScoresConfig,
    SigmoidConfig,
    SoftmaxConfig,
)


def build_scorer(config: ScoresConfig) -> ScorerFactory | None:
    """Returns what builds a layer's scorer; ``None`` for the model's own rule.

    What it returns raises :class:`~drgr.errors.ConfigError` where the settings do not fit the
    layer.
    """
    if isinstance(config, ModelScoresConfig):
        return None
    # Settings are named as the arguments of their scorer.
    construct = partial(_scorer_class(config), **config.model_dump(exclude={"kind"}))

    def build(place: LayerPlace) -> Scorer:
        del place
        try:
            return construct()
        except ValueError as error:
            raise ConfigError(f"routing.scores: {error}") from error

    return build


def _scorer_class(config: OwnScoresConfig) -> Callable[..., Scorer]:
    match config:
        case SoftmaxConfig():
            return SoftmaxScores
        case SigmoidConfig():
            return SigmoidScores
        case _:
            assert_never(config)
