"""Scores: how much each expert suits each token, and the combine weights that follow.

``scorer`` has the interface; every other file is one method, with its formula at the top.
"""

from drgr.routing.scores.bernoulli_gates import GateEstimator, StochasticGates
from drgr.routing.scores.cosine import CosineScores
from drgr.routing.scores.gaussian import GaussianScores
from drgr.routing.scores.k_means import KMeansScores
from drgr.routing.scores.linear import SigmoidScores, SoftmaxScores
from drgr.routing.scores.noisy import NoisyScores
from drgr.routing.scores.norm import NormScores, norm_constant
from drgr.routing.scores.relu_rms import ReluRmsScores
from drgr.routing.scores.scorer import (
    RouterScores,
    Scorer,
    ScorerFactory,
    at_least_float32,
    chosen_scores,
    cosines,
    normalised_weights,
    unit_rows,
)
from drgr.routing.scores.tsallis_hybrid import TsallisHybridScores

__all__ = [
    "CosineScores",
    "GateEstimator",
    "GaussianScores",
    "KMeansScores",
    "NoisyScores",
    "NormScores",
    "ReluRmsScores",
    "RouterScores",
    "Scorer",
    "ScorerFactory",
    "SigmoidScores",
    "SoftmaxScores",
    "StochasticGates",
    "TsallisHybridScores",
    "at_least_float32",
    "chosen_scores",
    "cosines",
    "norm_constant",
    "normalised_weights",
    "unit_rows",
]
