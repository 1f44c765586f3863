"""Running: what is made, kept, resumed, retried and refused. Runs are made up (fake_drgr.py)."""

import dataclasses
import fcntl
import json
import signal
import sqlite3

import pytest

from drgr.errors import ConfigError, DataError, DrgrError
from drgr.experiments import Store, comparison, parse_experiment, summarize


def stored(ran):
    with Store.open(ran.comparison.store, ran.comparison.content) as store:
        return {run.name: run for run in store.runs()}


def summary_of(ran):
    with Store.open(ran.comparison.store, ran.comparison.content) as store:
        return summarize(ran.comparison, store)


def rewrite(ran, change):
    """Changes the configurations that a store was begun for."""
    with sqlite3.connect(ran.comparison.store) as connection:
        content = json.loads(connection.execute("SELECT value FROM experiment").fetchone()[0])
        for configuration in content["configurations"].values():
            change(configuration)
        connection.execute("UPDATE experiment SET value = ?", (json.dumps(content),))
    connection.close()


def test_methods_times_seeds(compare):
    ran = compare(seeds=[3, 5])
    runs = stored(ran)
    assert list(runs) == ["0-uniform-seed-3", "1-kl-seed-3", "0-uniform-seed-5", "1-kl-seed-5"]
    for run in runs.values():
        assert run.status == "finished"
        assert run.attempts == 1
        assert run.config["training"]["seed"] == run.seed
        assert run.config["training"]["steps"] == run.steps == run.evaluation["step"]
        assert run.config["training"]["weight_decay"] == 0.0
        assert run.config["name"] == run.method
        assert run.environment["commit"] == "abc"
    assert runs["0-uniform-seed-3"].config["robustness"]["apply_to"] == "nothing"
    assert runs["1-kl-seed-3"].config["robustness"]["apply_to"] == "sampling"
    assert runs["0-uniform-seed-3"].steps == 8
    assert runs["1-kl-seed-3"].steps == 6  # held-out passes cost two of them
    assert sum("worst" in line for line in ran.lines) == len(ran.lines) == 4
    assert {entry[2] for entry in ran.began} == {"1"}


def test_what_is_finished_is_not_made_again(compare):
    before = compare()
    files = stored(before)
    again = compare()
    assert stored(again) == files
    assert again.lines == []
    assert len(again.began) == 4


def test_figures_are_in_tables_of_their_own(compare):
    ran = compare(seeds=1)
    with sqlite3.connect(ran.comparison.store) as connection:
        rows = connection.execute(
            "SELECT method, figures.value, domain, domain_figures.value FROM runs "
            "JOIN figures ON figures.run = runs.id JOIN domain_figures "
            "ON domain_figures.run = runs.id WHERE figures.name = 'worst_bits_per_byte' "
            "AND domain_figures.name = 'bits_per_byte' ORDER BY runs.id, domain"
        ).fetchall()
    connection.close()
    assert [row[0] for row in rows] == ["uniform", "uniform", "kl", "kl"]
    for row in rows[:2]:
        assert row[1] == pytest.approx(3)
        assert row[3] == pytest.approx({"speech": 2, "factbook": 3}[row[2]])


def test_a_failed_run_is_kept_and_stops_no_other(compare):
    ran = compare(runs={"kl": {"fail": "the loss is not finite"}})
    runs = stored(ran)
    assert [run.status for run in runs.values()] == ["finished", "failed"] * 2
    assert runs["1-kl-seed-0"].error == "exit code 1: drgr: the loss is not finite"
    assert any("failed: exit code 1: drgr: the loss is not finite" in line for line in ran.lines)
    assert len(compare().began) == 4  # not made again unless asked for
    found = summary_of(ran)
    assert not found["complete"]
    assert [entry["method"] for entry in found["failures"]] == ["kl", "kl"]
    assert found["ranks"]["methods_left_out"] == ["kl"]
    assert found["pairs"][0]["difference"] is None


def test_failed_runs_are_made_anew_when_asked_for(compare):
    compare(runs={"kl": {"fail": "no"}})
    ran = compare(retry_failed=True)
    runs = stored(ran)
    assert {run.status for run in runs.values()} == {"finished"}
    assert [run.attempts for run in runs.values()] == [1, 2, 1, 2]
    assert [entry[1] for entry in ran.began] == ["False"] * 6
    found = summary_of(ran)
    assert found["complete"]
    # What went wrong before is still told.
    assert [(entry["attempt"], entry["error"]) for entry in found["failures"]] == [
        (1, "exit code 1: drgr: no")
    ] * 2


@pytest.mark.parametrize(
    ("acts", "error"),
    [
        ({"kill": int(signal.SIGKILL)}, "killed by SIGKILL"),
        ({"empty": True}, "the run left no results that can be read: "),
    ],
)
def test_other_ends(compare, acts, error):
    assert stored(compare(seeds=1, runs={"kl": acts}))["1-kl-seed-0"].error.startswith(error)


def test_a_run_over_its_flops_does_not_count(compare):
    ran = compare(seeds=1, runs={"kl": {"flops": 1e9}})
    run = stored(ran)["1-kl-seed-0"]
    assert run.status == "over"
    assert f"took 6.000000e+09 FLOPs, {6e9 / run.flops_limit - 1:.2%} more" in run.error
    found = summary_of(ran)
    assert found["methods"][1]["figures"]["flops"] is None
    assert found["methods"][1]["runs"]["over"] == 1
    again = compare(seeds=1, runs={"kl": {"flops": run.flops_limit / 5}}, retry_failed=True)
    changed = stored(again)["1-kl-seed-0"]
    assert (changed.status, changed.attempts) == ("finished", 2)
    assert changed.steps == changed.config["training"]["steps"] == 1
    assert changed.evaluation["flops"] <= changed.flops_limit


def test_steps_are_free_where_nothing_is_enforced(compare):
    runs = stored(compare(seeds=1, flops="free", runs={"kl": {"flops": 1e9}}))
    assert [(run.steps, run.status) for run in runs.values()] == [(8, "finished")] * 2


def test_fill_gives_steps_to_what_costs_less(compare):
    methods = {"dear": {"robustness.every": 1}, "cheap": {"robustness.losses": "train"}}
    for rule, steps in (("cut", 8), ("fill", 10)):
        ran = compare(seeds=1, methods=methods, reference="dear", flops=rule, name=rule)
        assert stored(ran)["1-cheap-seed-0"].steps == steps
        ran.comparison.store.unlink()


def test_flops_of_earlier_runs_count(compare, tmp_path):
    limit = stored(compare(seeds=1))["1-kl-seed-0"].flops_limit
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"flops": limit / 2}))
    methods = {"uniform": {"robustness.losses": "train"}, "proxy": {"prior": [str(path)]}}
    (tmp_path / "toy").rename(tmp_path / "before")
    run = stored(compare(seeds=1, methods=methods))["1-proxy-seed-0"]
    assert run.steps == 3  # of 6
    assert run.evaluation["prior_flops"] == limit / 2
    assert run.evaluation["flops"] == limit / 2 + 3
    with pytest.raises(ConfigError, match=r"'proxy': prior must name evaluation\.json files"):
        compare(methods={**methods, "proxy": {"prior": ["nowhere.json"]}})


def test_a_sweep_multiplies_methods(compare):
    ran = compare(seeds=1, sweep={"training.learning_rate": [0.001, "1e-2"]})
    runs = stored(ran)
    names = [run.method for run in runs.values()]
    assert names == [
        "uniform [learning_rate=0.001]",
        "uniform [learning_rate=1e-2]",
        "kl [learning_rate=0.001]",
        "kl [learning_rate=1e-2]",
    ]
    rates = [run.config["training"]["learning_rate"] for run in runs.values()]
    assert rates == [0.001, 0.01] * 2
    assert summary_of(ran)["reference"] == names[0]


class TestStore:
    def test_changed_experiment(self, compare):
        compare(seeds=1)
        with pytest.raises(ConfigError) as caught:
            compare(seeds=[1], common={"training.weight_decay": 0.5})
        message = str(caught.value)
        assert "the experiment has changed since" in message
        assert "seeds was [0] and is [1]" in message
        assert (
            'common was ["training.weight_decay=0.0"] and is ["training.weight_decay=0.5"]'
            in message
        )
        assert "--directory" in message

    def test_new_seeds(self, compare):
        before = stored(compare(seeds=1))
        ran = compare(seeds=[3, 0])
        runs = stored(ran)
        assert {name: run for name, run in runs.items() if run.seed == 0} == before
        assert sorted(set(runs) - set(before)) == ["0-uniform-seed-3", "1-kl-seed-3"]
        for old, new in (("0-uniform", runs["0-uniform-seed-3"]), ("1-kl", runs["1-kl-seed-3"])):
            first = before[f"{old}-seed-0"]
            config = first.config | {"training": first.config["training"] | {"seed": 3}}
            assert new.config == config
            assert (new.steps, new.flops_limit) == (first.steps, first.flops_limit)
            assert (new.status, new.settings) == ("finished", first.settings)
        assert sorted(name for name, *_ in ran.began[2:]) == ["0-uniform-seed-3", "1-kl-seed-3"]
        with pytest.raises(ConfigError, match=r"seeds was \[3, 0\] and is \[0\]"):
            compare(seeds=1)

    def test_new_methods(self, compare, content):
        methods = content()["methods"]
        late = {"late": {"robustness.apply_to": "sampling", "robustness.begin": 4}}
        before = stored(compare(seeds=1))
        ran = compare(seeds=2, methods=methods | late)
        runs = stored(ran)
        assert {name: runs[name] for name in before} == before
        assert [name for name in runs if name not in before] == [
            "2-late-seed-0",
            "2-late-seed-1",
            "0-uniform-seed-1",
            "1-kl-seed-1",
        ]
        assert {run.status for run in runs.values()} == {"finished"}
        assert runs["2-late-seed-0"].config["robustness"]["begin"] == 4
        assert len(summary_of(ran)["methods"]) == 3
        with pytest.raises(ConfigError, match=r"methods\.late was .* and is gone"):
            compare(seeds=2)

    def test_new_methods_come_last(self, compare, content):
        compare(seeds=1)
        late = {"late": {"robustness.apply_to": "sampling", "robustness.begin": 4}}
        with pytest.raises(ConfigError, match=r"methods\.late is new"):
            compare(seeds=1, methods=late | content()["methods"])

    def test_new_methods_are_tuned(self, compare, content):
        space = {"training.learning_rate": {"kind": "log-uniform", "low": 1e-4, "high": 1e-2}}
        tuning = {"trials": 2, "seed": 77, "objective": {"worst_bits_per_byte": 1.0}}
        methods = content()["methods"]
        known = tuning | {"methods": dict.fromkeys(methods, space)}
        before = stored(compare(seeds=1, tuning=known))
        methods |= {"late": {"robustness.apply_to": "sampling", "robustness.begin": 4}}
        runs = stored(
            compare(
                seeds=1, methods=methods, tuning=tuning | {"methods": dict.fromkeys(methods, space)}
            )
        )
        new = {name: run.stage for name, run in runs.items() if name not in before}
        assert new == {
            "2-late-trial-0": "tuning",
            "2-late-trial-1": "tuning",
            "2-late-seed-0": "final",
        }
        assert {name: runs[name] for name in before} == before
        wider = space | {"training.weight_decay": {"kind": "uniform", "low": 0.0, "high": 0.1}}
        with pytest.raises(ConfigError, match=r"tuning\.methods\.kl\.training\.weight_decay"):
            compare(
                seeds=1,
                methods=methods,
                tuning=tuning | {"methods": {**dict.fromkeys(methods, space), "kl": wider}},
            )

    def test_new_seeds_take_what_tuning_found(self, compare):
        tuning = {
            "trials": 2,
            "seed": 77,
            "objective": {"worst_bits_per_byte": 1.0},
            "space": {"training.learning_rate": {"kind": "log-uniform", "low": 1e-4, "high": 1e-2}},
        }
        before = stored(compare(seeds=1, tuning=tuning))
        after = stored(compare(seeds=2, tuning=tuning))
        assert sum(run.stage == "tuning" for run in after.values()) == 4
        for name in ("0-uniform", "1-kl"):
            assert after[f"{name}-seed-1"].settings == before[f"{name}-seed-0"].settings != {}

    def test_a_setting_that_an_earlier_version_did_not_have(self, compare):
        ran = compare(seeds=1)
        rewrite(ran, lambda configuration: configuration["data"].pop("unseen"))
        assert len(stored(compare(seeds=2))) == 4
        rewrite(ran, lambda configuration: configuration["data"].update(unseen=["a"]))
        with pytest.raises(ConfigError, match=r"uniform\.data\.unseen was \[\"a\"\] and is \[\]"):
            compare(seeds=2)

    def test_a_setting_that_is_gone(self, compare):
        ran = compare(seeds=1)
        rewrite(ran, lambda configuration: configuration["data"].update(former=3))
        with pytest.raises(ConfigError, match=r"uniform\.data\.former was 3 and is gone"):
            compare(seeds=1)

    def test_reading_adds_no_seeds(self, compare, content):
        ran = compare(seeds=1)
        more = dataclasses.replace(ran.comparison, experiment=parse_experiment(content(seeds=2)))
        with Store.read(more.store, more.content) as store:
            assert len(store.runs()) == 2
        compare(seeds=1)

    def test_changed_recipe(self, compare, runs):
        compare(seeds=1)
        with pytest.raises(ConfigError) as caught:
            compare(seeds=1, base=runs.small_content(training__steps=9))
        assert "base.training.steps was 8 and is 9" in str(caught.value)

    def test_new_method(self, compare):
        compare(seeds=1)
        with pytest.raises(ConfigError, match=r"methods\.kl was .* and is gone"):
            compare(seeds=1, methods={"uniform": ["data.sampling=uniform"]})

    def test_another_experiment(self, compare):
        compare(seeds=1)
        with pytest.raises(ConfigError, match="is the store of experiment 'toy', not of 'other'"):
            compare(seeds=1, name="other")

    def test_no_store(self, compare, tmp_path):
        (tmp_path / "toy").mkdir()
        (tmp_path / "toy" / "results.sqlite").write_text("not a database" * 100)
        with pytest.raises(DataError, match="is not a store of results: file is not a database"):
            compare()

    def test_store_of_another_version(self, compare):
        ran = compare(seeds=1)
        with sqlite3.connect(ran.comparison.store) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
        with pytest.raises(DataError, match="it has version 99, not 1"):
            compare(seeds=1)

    def test_another_process_at_work(self, compare, tmp_path):
        (tmp_path / "toy").mkdir()
        with (tmp_path / "toy" / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(ConfigError, match="another process is comparing in"):
                compare()

    def test_nothing_to_export(self, compare, tmp_path):
        ran = compare(seeds=1)
        with (
            pytest.raises(ConfigError, match="does not exist; run the comparison before"),
            Store.read(tmp_path / "nowhere", ran.comparison.content),
        ):
            pass


class TestRefusals:
    def test_settings_of_a_method(self, compare):
        with pytest.raises(ConfigError) as caught:
            compare(methods={"uniform": [], "kl": ["robustness.penalti=1"]})
        assert str(caught.value) == (
            "method 'kl': robustness.penalti is not a setting; the nearest is robustness.penalty"
        )

    def test_settings_that_clash_with_the_corpus(self, compare):
        methods = {"uniform": [], "kl": {"data.sampling": {"email": 1.0}}}
        with pytest.raises(ConfigError, match=r"method 'kl': data\.sampling must name the domains"):
            compare(methods=methods)

    @pytest.mark.parametrize("setting", ["training.seed=3", "name=mine"])
    def test_settings_of_the_machine(self, compare, setting):
        with pytest.raises(ConfigError, match="cannot be set in an experiment, got") as caught:
            compare(methods={"uniform": [setting]})
        assert setting in str(caught.value)

    def test_one_step_is_too_dear(self, compare):
        methods = {"uniform": {"training.steps": 1}, "big": {"training.batch_size": 64}}
        with pytest.raises(ConfigError, match=r"'big': one step takes .* FLOPs, more than the"):
            compare(methods=methods)

    def test_source_that_was_changed(self, monkeypatch):
        monkeypatch.setattr(comparison, "source_commit", lambda: ("abc", True))
        with pytest.raises(ConfigError, match="the source differs from its commit abc"):
            comparison.check_source(allow_dirty=False)
        comparison.check_source(allow_dirty=True)
        monkeypatch.setattr(comparison, "source_commit", lambda: ("abc", False))
        comparison.check_source(allow_dirty=False)


TUNING = {
    "trials": 4,
    "space": {"training.learning_rate": {"kind": "log-uniform", "low": 1e-3, "high": 1e-1}},
    "methods": {"kl": {"robustness.every": {"kind": "categorical", "choices": [1, 2]}}},
    "windows": 2,
}


class TestTuning:
    def test_equal_trials_then_the_best(self, compare):
        ran = compare(tuning=TUNING, parallel=3)
        runs = stored(ran)
        for method in ("uniform", "kl"):
            trials = [r for r in runs.values() if (r.method, r.stage) == (method, "tuning")]
            assert [run.trial for run in trials] == [0, 1, 2, 3]
            assert {run.seed for run in trials} == {1000}
            assert {run.config["training"]["test_windows"] for run in trials} == {1}
            assert all(run.evaluation["split"] == "validation" for run in trials)
            assert len({json.dumps(run.settings) for run in trials}) == 4
            best = min(trials, key=lambda run: run.objective)
            assert best.objective == best.evaluation["worst_bits_per_byte"]
            final = [r for r in runs.values() if (r.method, r.stage) == (method, "final")]
            assert [run.seed for run in final] == [0, 1]
            for run in final:
                assert run.settings == best.settings
                assert run.evaluation["split"] == "test"
                rate = best.settings["training.learning_rate"]
                assert run.config["training"]["learning_rate"] == pytest.approx(rate)
        # Of a trial nobody reads the model, of a final run somebody may.
        directory = ran.comparison.directory / "runs"
        assert not (directory / "1-kl-trial-0" / "model").exists()
        assert (directory / "1-kl-seed-0" / "model").exists()

    def test_the_same_at_any_number_of_processes(self, compare):
        tuning = {**TUNING, "trials": 3}
        first = compare(seeds=1, tuning=tuning, parallel=3)
        proposed = {name: run.settings for name, run in stored(first).items()}
        first.comparison.store.rename(first.comparison.store.with_name("first"))
        for folder in ("runs", "locks"):
            (first.comparison.directory / folder).rename(first.comparison.directory / f"_{folder}")
        second = compare(seeds=1, tuning=tuning, parallel=1)
        assert {name: run.settings for name, run in stored(second).items()} == proposed

    def test_an_objective_of_several_figures(self, compare):
        weights = {"worst_bits_per_byte": 0.5, "mean_bits_per_byte": 2.0}
        ran = compare(seeds=1, tuning={**TUNING, "trials": 1, "objective": weights})
        run = stored(ran)["0-uniform-trial-0"]
        worst = run.evaluation["worst_bits_per_byte"]
        assert run.objective == pytest.approx(0.5 * worst + 2 * (worst - 0.5))

    def test_a_method_without_a_good_trial_has_no_final_run(self, compare):
        ran = compare(seeds=1, tuning={**TUNING, "trials": 2}, runs={"kl": {"fail": "no"}})
        runs = stored(ran)
        assert [run.method for run in runs.values() if run.stage == "final"] == ["uniform"]
        found = summary_of(ran)
        assert not found["complete"]
        assert [trial["status"] for trial in found["trials"] if trial["method"] == "kl"] == [
            "failed"
        ] * 2
        again = compare(seeds=1, tuning={**TUNING, "trials": 2}, retry_failed=True)
        assert summary_of(again)["complete"]

    def test_no_trial_of_the_reference_is_good(self, compare):
        with pytest.raises(DrgrError, match="every trial of the reference 'uniform' failed"):
            compare(tuning={**TUNING, "trials": 1}, runs={"uniform": {"fail": "no"}})

    def test_optuna_is_missing(self, compare, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", {}.get)
        with pytest.raises(ConfigError, match="tuning needs optuna; install it with pip install"):
            compare(tuning=TUNING)
