"""A stopped, killed and resumed run is the straight run, bit for bit."""

import signal
from types import ModuleType

import pytest

from drgr.data import Corpus
from drgr.errors import CheckpointError
from drgr.training import build_run

VARIANTS = {
    "quantile-sampling": {},
    "sign-bias-objective": {
        "routing__controller": {"kind": "sign-bias", "step_size": 0.01},
        "robustness__apply_to": "objective",
        "robustness__losses": "train",
        "robustness__divergence": "chi-square",
        "robustness__penalty": None,
        "robustness__radius": 0.5,
    },
    "subgradient-target": {
        "routing__controller": {"kind": "subgradient", "target": [1, 2, 3, 4, 1, 2, 3, 4]},
    },
    "selective-sinkhorn": {
        "routing__controller": {"kind": "selective-sinkhorn", "probability": 0.5},
        "training__accumulation": 2,
    },
    "learned-noise": {"routing__scores": {"kind": "noisy"}},
    "k-means": {
        "routing__scores": {"kind": "k-means", "dead_after": 2, "centred": True},
        "routing__controller": {"kind": "sign-bias"},
        "training__accumulation": 2,
    },
    "outer-lookahead": {
        "robustness__apply_to": "nothing",
        "outer": {"variables": ["mixture"], "begin": 1, "every": 2, "windows": 1},
    },
    "outer-router-cg": {
        "robustness__apply_to": "nothing",
        "routing__link_gates": True,
        "outer": {
            "variables": ["mixture", "router", "link-gates"],
            "begin": 1,
            "every": 2,
            "windows": 1,
            "update": "gradient",
            "solver": {"kind": "cg", "max_steps": 2},
        },
    },
    "experts-as-groups": {
        "robustness__groups": "experts",
        "robustness__apply_to": "objective",
        "robustness__losses": "train",
        "robustness__unit": "nats-per-token",
        "robustness__nominal": "previous",
    },
    "previous-nominal": {
        "robustness__apply_to": "objective",
        "robustness__nominal": "previous",
        "robustness__uniform_share": 0.01,
        "robustness__losses": "train",
    },
    "losses-adaptive": {
        "routing__losses": [
            {
                "kind": "chunk-sparsity",
                "coefficient": 0.1,
                "chunk_length": 8,
                "adaptive": {"warmup": 4, "window": 2},
            },
            {"kind": "expert-router-coupling", "coefficient": 0.1},
        ],
    },
    "auxiliary-accumulation": {
        "routing__controller": {"kind": "none"},
        "routing__auxiliary_coefficient": 0.01,
        "training__accumulation": 2,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_is_the_straight_run(runs: ModuleType, corpus: Corpus, tmp_path, variant):
    config = runs.small_config(**VARIANTS[variant])
    _, straight = runs.run_small(config, corpus, tmp_path / "straight")
    broken = tmp_path / "broken"
    outcome, _ = runs.run_small(
        config, corpus, broken, watcher=runs.Watcher(signal_after={5: signal.SIGTERM})
    )
    assert (outcome.step, outcome.signal, outcome.evaluation) == (5, signal.SIGTERM, None)
    # Step 8 is two steps after a checkpoint: they are taken again.
    with pytest.raises(runs.Killed):
        runs.run_small(config, corpus, broken, resume=True, watcher=runs.Watcher(kill_after=8))
    watcher = runs.Watcher()
    outcome, resumed = runs.run_small(config, corpus, broken, resume=True, watcher=watcher)
    assert outcome.step == 12
    assert [view.step for view in watcher.views] == [7, 8, 9, 10, 11, 12]
    runs.assert_same(runs.final_state(resumed), runs.final_state(straight))
    runs.assert_same(runs.results(broken), runs.results(tmp_path / "straight"))


def test_training_changes_what_is_compared(runs: ModuleType, corpus: Corpus, tmp_path):
    """The comparison above would mean little if training left the state as it was built."""
    config = runs.small_config()
    _, run = runs.run_small(config, corpus, tmp_path)
    fresh = runs.final_state(build_run(config, corpus))
    trained = runs.final_state(run)
    assert trained.pop("outer") is fresh["outer"] is None  # the small run has no outer loop
    for part in trained:
        with pytest.raises(AssertionError):
            runs.assert_same(trained[part], fresh[part])


def test_a_stop_at_the_last_step_leaves_the_evaluation_to_the_resumed_run(
    runs: ModuleType, corpus: Corpus, tmp_path
):
    config = runs.small_config(training__steps=4)
    watcher = runs.Watcher(signal_after={4: signal.SIGINT})
    outcome, _ = runs.run_small(config, corpus, tmp_path / "a", watcher=watcher)
    assert (outcome.step, outcome.signal) == (4, signal.SIGINT)
    assert not (tmp_path / "a" / "evaluation.json").exists()
    resumed, _ = runs.run_small(config, corpus, tmp_path / "a", resume=True)
    assert (resumed.step, resumed.signal) == (4, 0)
    runs.run_small(config, corpus, tmp_path / "b")
    runs.assert_same(runs.results(tmp_path / "a"), runs.results(tmp_path / "b"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    runs: ModuleType, corpus: Corpus, tmp_path
):
    killed = runs.small_config(training__steps=4, training__seed=1)
    with pytest.raises(runs.Killed):
        runs.run_small(killed, corpus, tmp_path / "a", watcher=runs.Watcher(kill_after=2))
    # There is nothing that another configuration would clash with: it takes the directory over.
    config = runs.small_config(training__steps=4)
    runs.run_small(config, corpus, tmp_path / "a", resume=True)
    runs.run_small(config, corpus, tmp_path / "b")
    runs.assert_same(runs.results(tmp_path / "a"), runs.results(tmp_path / "b"))
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_resuming_a_finished_run_writes_the_same_evaluation(
    runs: ModuleType, corpus: Corpus, tmp_path
):
    config = runs.small_config(training__steps=3)
    runs.run_small(config, corpus, tmp_path)
    expected = runs.results(tmp_path)
    runs.run_small(config, corpus, tmp_path, resume=True)
    runs.assert_same(runs.results(tmp_path), expected)


def test_an_alarm_at_the_checkpoint_is_not_written_twice(
    runs: ModuleType, corpus: Corpus, tmp_path
):
    config = runs.small_config(
        robustness__penalty=0.1,
        robustness__every=3,
        robustness__alarm_below=1.7,
        training__steps=5,
    )
    runs.run_small(config, corpus, tmp_path / "straight")
    alarms = [r for r in runs.read_records(tmp_path / "straight") if r["kind"] == "alarm"]
    # The first weights of the run are not alarming, those from step 4 on are.
    assert [alarm["step"] for alarm in alarms] == [4]
    assert "nearly on the one domain" in alarms[0]["message"]
    # The adversary moves right after the checkpoint of step 3, then the run is killed.
    with pytest.raises(runs.Killed):
        runs.run_small(config, corpus, tmp_path / "a", watcher=runs.Watcher(kill_after=4))
    runs.run_small(config, corpus, tmp_path / "a", resume=True)
    runs.assert_same(runs.results(tmp_path / "a"), runs.results(tmp_path / "straight"))


def test_the_adversary_begins_when_it_is_told_to(runs: ModuleType, corpus: Corpus, tmp_path):
    config = runs.small_config(
        robustness__begin=3, training__log_every=1, training__steps=7, training__evaluate_every=50
    )
    runs.run_small(config, corpus, tmp_path)
    weights = [record["adversary"] for record in runs.read_records(tmp_path)]
    # Nominal in the steps 1 to 3; then it moves before the steps 4 and 6.
    assert [set(weight.values()) for weight in weights[:3]] == [{0.25}] * 3
    assert weights[3] != weights[2]
    assert weights[4] == weights[3]
    assert weights[5] != weights[4]


def test_settings_of_presentation_may_change_and_others_may_not(
    runs: ModuleType, corpus: Corpus, tmp_path
):
    config = runs.small_config()
    _, straight = runs.run_small(config, corpus, tmp_path / "straight")
    with pytest.raises(runs.Killed):
        runs.run_small(config, corpus, tmp_path / "a", watcher=runs.Watcher(kill_after=7))
    before = runs.listing(tmp_path / "a")
    other = runs.small_config(training__learning_rate=1e-3)
    with pytest.raises(CheckpointError, match="another configuration"):
        runs.run_small(other, corpus, tmp_path / "a", resume=True)
    assert runs.listing(tmp_path / "a") == before
    changed = runs.small_config(
        name="renamed", training__log_every=5, training__checkpoint_every=4, training__keep=1
    )
    _, resumed = runs.run_small(changed, corpus, tmp_path / "a", resume=True)
    runs.assert_same(runs.final_state(resumed), runs.final_state(straight))
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["step-00000012"]
