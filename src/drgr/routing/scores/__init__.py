"""Scores: how much each expert suits each token, and the combine weights that follow."""

from drgr.routing.scores.linear import SigmoidScores, SoftmaxScores
from drgr.routing.scores.scorer import (
    RouterScores,
    Scorer,
    ScorerFactory,
    at_least_float32,
    chosen_scores,
    normalised_weights,
)

__all__ = [
    "RouterScores",
    "Scorer",
    "ScorerFactory",
    "SigmoidScores",
    "SoftmaxScores",
    "at_least_float32",
    "chosen_scores",
    "normalised_weights",
]
