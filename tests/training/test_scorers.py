"""Scorers from settings to a trained model."""

from types import ModuleType

import pytest
import torch

from drgr.data import Corpus
from drgr.errors import ConfigError
from drgr.routing.scores import (
    CosineScores,
    GaussianScores,
    KMeansScores,
    NoisyScores,
    NormScores,
    ReluRmsScores,
    StochasticGates,
    TsallisHybridScores,
)
from drgr.training import build_run

# Each kind with a value other than its default for every setting.
KINDS = [
    ({"kind": "cosine", "temperature": 0.2, "learned": False, "normalised": False}, CosineScores),
    (
        {"kind": "k-means", "decay": 0.5, "temperature": 0.3, "centred": True, "dead_after": 3},
        KMeansScores,
    ),
    ({"kind": "norm", "experts_per_token": 3, "epsilon": 1e-4}, NormScores),
    ({"kind": "relu-rms", "epsilon": 1e-4}, ReluRmsScores),
    (
        {
            "kind": "tsallis-hybrid",
            "order": 2.0,
            "threshold": 0.5,
            "top_p": 0.5,
            "keep_top": 1,
            "takes_crossing": True,
        },
        TsallisHybridScores,
    ),
    ({"kind": "noisy"}, NoisyScores),
    ({"kind": "gaussian", "temperature": 2.0, "deviation": 0.3}, GaussianScores),
    (
        {
            "kind": "stochastic",
            "estimator": "noisy-rectifier",
            "deviation": 0.5,
            "sigmoid_slope": True,
        },
        StochasticGates,
    ),
]


def scorers_of(run):
    return [layer.mlp.gate.scorer for layer in run.attachment.model.model.layers]


@pytest.mark.parametrize(("scores", "kind"), KINDS, ids=[scores["kind"] for scores, _ in KINDS])
def test_settings_reach_every_layer_and_the_run_trains(
    runs: ModuleType, corpus: Corpus, tmp_path, scores, kind
):
    config = runs.small_config(routing__scores=scores, training__steps=4)
    outcome, run = runs.run_small(config, corpus, tmp_path / "run")
    assert outcome.step == 4
    assert [type(scorer) for scorer in scorers_of(run)] == [kind, kind]
    for key, value in scores.items():
        if key not in {"kind", "experts_per_token", "learned"}:
            assert getattr(scorers_of(run)[0], f"_{key}") == value
    fresh = scorers_of(build_run(config, corpus))[0].state_dict()
    for name, value in scorers_of(run)[0].state_dict().items():
        assert value.isfinite().all()
        # Every parameter and every buffer has moved, save the count of idle steps.
        assert name == "idle" or not torch.equal(value, fresh[name]), name


def test_sizes_come_from_the_layer(runs: ModuleType, corpus: Corpus):
    config = runs.small_config(routing__scores={"kind": "norm", "experts_per_token": 9})
    message = r"routing\.scores: experts_per_token must be from 1 to the 8 experts, got 9"
    with pytest.raises(ConfigError, match=message):
        build_run(config, corpus)


def test_learned_noise_costs_what_a_router_does(runs: ModuleType, corpus: Corpus):
    plain, noisy = (
        build_run(runs.small_config(routing__scores={"kind": kind}), corpus).flops.dense_per_token
        for kind in ("softmax", "noisy")
    )
    assert noisy - plain == 2 * (2 * 32 * 8)  # two layers, width 32, 8 experts
