"""From settings to objects: what only shows when settings meet data and model."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drgr.data import Corpus
from drgr.errors import ConfigError, DataError
from drgr.routing import (
    BipBalancing,
    CongestionPrice,
    DecayingSubgradient,
    NoPrices,
    QuantileBalancing,
    RmsBias,
    SelectiveSinkhorn,
    SignBias,
    SinkhornPrices,
)
from drgr.training import build_run, resolve_cache
from drgr.training.setup import sampling_weights


class TestSampling:
    def test_shares_are_normalised_in_the_order_of_the_corpus(self, runs, corpus: Corpus):
        assert corpus.domains == ("speech", "factbook", "fiction", "verse")
        sampling = {"verse": 1, "fiction": 2, "factbook": 3, "speech": 2}
        weights = sampling_weights(runs.small_config(data__sampling=sampling), corpus)
        assert weights.tolist() == [0.25, 0.375, 0.25, 0.125]

    def test_uniform_and_natural(self, runs, corpus: Corpus):
        uniform = sampling_weights(runs.small_config(data__sampling="uniform"), corpus)
        assert uniform.tolist() == [0.25] * 4
        natural = sampling_weights(runs.small_config(data__sampling="natural"), corpus)
        tokens = [len(corpus.tokens("train", domain)) for domain in corpus.domains]
        assert natural.tolist() == pytest.approx([count / sum(tokens) for count in tokens])

    @pytest.mark.parametrize(
        ("sampling", "message"),
        [
            ({"speech": 1}, r"must name the domains of corpus fixture.*'verse'.*got \['speech'\]"),
            (dict.fromkeys(("speech", "factbook", "fiction", "verse"), 0), "share above 0"),
            (
                dict.fromkeys(("speech", "factbook", "fiction", "verse", "prose"), 1),
                "must name the domains",
            ),
        ],
    )
    def test_refusals(self, runs, corpus: Corpus, sampling, message):
        with pytest.raises(ConfigError, match=message):
            build_run(runs.small_config(data__sampling=sampling), corpus)


@pytest.mark.parametrize(
    ("controller", "kind"),
    [
        ({"kind": "none"}, NoPrices),
        ({"kind": "sign-bias", "step_size": 0.25}, SignBias),
        ({"kind": "quantile", "smoothing": 0.5}, QuantileBalancing),
        ({"kind": "rms-bias", "step_size": 0.25}, RmsBias),
        ({"kind": "subgradient", "step_size": 0.25, "decay": 0.75}, DecayingSubgradient),
        ({"kind": "congestion", "strength": 0.25, "smoothing": 0.5}, CongestionPrice),
        ({"kind": "bip", "num_iterations": 3}, BipBalancing),
        (
            {
                "kind": "sinkhorn",
                "regularization": 0.25,
                "cost": "log-scores",
                "tolerance": 0.5,
                "max_iterations": 7,
            },
            SinkhornPrices,
        ),
        ({"kind": "selective-sinkhorn", "probability": 0.25, "seed": 3}, SelectiveSinkhorn),
    ],
)
def test_controllers(runs: ModuleType, corpus: Corpus, controller, kind):
    run = build_run(runs.small_config(routing__controller=controller), corpus)
    assert [type(policy.controller) for policy in run.attachment.policies] == [kind, kind]
    for key, value in controller.items():
        if key != "kind":
            assert getattr(run.attachment.policies[0].controller, f"_{key}") == value


def test_a_target_reaches_every_layer(runs: ModuleType, corpus: Corpus):
    controller = {"kind": "sign-bias", "target": [1, 1, 2, 4, 1, 1, 2, 4]}
    run = build_run(runs.small_config(routing__controller=controller), corpus)
    for policy in run.attachment.policies:
        assert (policy.controller._load._shares * 16).tolist() == controller["target"]


def test_a_target_of_another_length_is_refused(runs: ModuleType, corpus: Corpus):
    controller = {"kind": "quantile", "target": [1, 2]}
    message = r"routing\.controller: target must have one load for each of the 8 experts, got 2"
    with pytest.raises(ConfigError, match=message):
        build_run(runs.small_config(routing__controller=controller), corpus)


def test_seed_decides_the_parameters(runs: ModuleType, corpus: Corpus):
    built = [
        build_run(runs.small_config(training__seed=seed), corpus).attachment.model.state_dict()
        for seed in (1, 1, 2)
    ]
    runs.assert_same(dict(built[0]), dict(built[1]))
    with pytest.raises(AssertionError):
        runs.assert_same(dict(built[0]), dict(built[2]))


def test_the_adversary_compares_bits_per_byte(runs: ModuleType, corpus: Corpus):
    for unit, factors in (
        ("nats-per-token", [1.0] * 4),
        (
            "bits-per-byte",
            [1 / (0.6931471805599453 * corpus.bytes_per_token("train", d)) for d in corpus.domains],
        ),
    ):
        run = build_run(runs.small_config(robustness__unit=unit), corpus)
        run.adversary.observe(torch.full((4,), 30.0), torch.full((4,), 10))
        losses = run.adversary.state_dict()["losses"]
        estimate = losses["loss_sums"] / losses["token_counts"]
        assert estimate.tolist() == pytest.approx([3 * factor for factor in factors])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__batch_size": 5, "training__accumulation": 2}, "got 5 for 1 x 2"),
        ({"model__num_heads": 3}, "model: hidden_size must be a multiple of 2 .* got 32"),
        ({"model__num_experts": 1}, "model: experts_per_token must be at most"),
        (
            {"routing__budget": {"minimum": 1, "maximum": 9, "average": 2}},
            "routing.budget: budget.maximum must be at most the 8 experts .* got 9",
        ),
        (
            {
                "routing__budget": {
                    "unit": "flops",
                    "minimum": 7000,
                    "maximum": 12000,
                    "average": 9000,
                }
            },
            "routing.budget in FLOPs, at 6144 an expert: budget.minimum must be at most",
        ),
        ({"model": {"kind": "pretrained", "path": "./nowhere"}}, "model must be an existing"),
    ],
)
def test_refusals(runs: ModuleType, corpus: Corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_run(runs.small_config(**changes), corpus)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(runs: ModuleType, corpus: Corpus):
    with pytest.raises(ConfigError, match=r"training\.device is cuda, but PyTorch finds no CUDA"):
        build_run(runs.small_config(training__device="cuda"), corpus)


def test_sequences_longer_than_a_domain(runs: ModuleType, corpus: Corpus):
    with pytest.raises(DataError, match="sequence_length 8000 needs at least 8001"):
        build_run(runs.small_config(data__sequence_length=8000), corpus)


def test_references_of_a_file(runs: ModuleType, corpus: Corpus, tmp_path: Path):
    path = tmp_path / "losses.json"
    path.write_text(json.dumps({name: {"loss": 2.0} for name in corpus.domains}))
    with pytest.raises(ConfigError, match="must be a finite number of nats"):
        build_run(runs.small_config(robustness__reference=str(path)), corpus)
    path.write_text(json.dumps({"domains": {name: {"loss": 2.0} for name in corpus.domains}}))
    run = build_run(
        runs.small_config(
            robustness__reference=str(path),
            robustness__unit="nats-per-token",
            robustness__smoothing=0.0,
        ),
        corpus,
    )
    run.adversary.observe(torch.full((4,), 20.0), torch.full((4,), 10))
    # Every loss is at its reference: there is no excess to act on.
    assert run.adversary.refresh().adversary.tolist() == pytest.approx([0.25] * 4)


def test_a_vocabulary_that_the_model_does_not_know(
    runs: ModuleType, corpus: Corpus, build_family, tmp_path: Path
):
    build_family("olmoe", vocab_size=300).save_pretrained(tmp_path)
    config = runs.small_config(model={"kind": "pretrained", "path": str(tmp_path)})
    with pytest.raises(ConfigError, match="knows 300 tokens, but corpus fixture has 512"):
        build_run(config, corpus)


def test_where_the_cache_is(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("DRGR_CACHE", str(tmp_path / "configured"))
    assert resolve_cache(tmp_path / "given") == tmp_path / "given"
    assert resolve_cache(None) == tmp_path / "configured"
    monkeypatch.delenv("DRGR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "platform"))
    assert resolve_cache(None).name == "drgr"
