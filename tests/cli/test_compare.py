"""The command ``drgr compare``: real runs, killed and continued; what it shows and refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drgr.cli import comparing
from drgr.experiments import comparison

UNIFORM = ["data.sampling=uniform", "robustness.apply_to=nothing", "robustness.losses=train"]


@pytest.fixture
def experiment_file(runs, tmp_path) -> Path:
    content = {
        "name": "toy",
        "base": runs.small_content(training__steps=8, training__checkpoint_every=1),
        "methods": {"uniform": UNIFORM, "kl": {"robustness.apply_to": "sampling"}},
        "seeds": [0, 7],
        "reference": "uniform",
    }
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def clean_source(monkeypatch):
    monkeypatch.setattr(comparison, "source_commit", lambda: ("abc", False))


@pytest.mark.slow
def test_real_runs_killed_once_and_continued(
    drgr, runs, corpus, cache, experiment_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "out"
    words = ["compare", experiment_file, "--directory", path, "--cache", cache, "--allow-dirty"]
    words += ["--parallel", "2"]
    command = [sys.executable, "-m", "drgr", *map(str, words)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(path.glob("runs/*/checkpoints/step-*")) and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    answer = drgr(*words)
    assert answer.code == 0, answer.err
    summary = json.loads((path / "summary.json").read_text())
    assert summary["complete"]
    assert [run["attempts"] for run in summary["runs"]] == [1] * 4
    limit = summary["methods"][1]["flops_limit"]
    for run in summary["runs"]:
        config = json.loads((path / "configs" / f"{run['name']}.json").read_text())
        straight, _ = runs.run_small(
            runs.parse_config(config), corpus, tmp_path / "straight" / run["name"]
        )
        for figure in ("worst_bits_per_byte", "mean_bits_per_byte", "flops"):
            assert run["figures"][figure] == straight.evaluation[figure]
        assert run["figures"]["flops"] <= limit
    assert [run["steps"] for run in summary["runs"]] == [8, 6, 8, 6]
    assert "uniform (reference)" in answer.out
    assert str(path / "report.html") in answer.out.replace("\n", "")
    # Nothing is left to do, and the results can be had in other forms.
    assert drgr(*words).err == ""
    exported = drgr(*words, "--export", "csv")
    assert len(exported.out.splitlines()) == 5
    target = tmp_path / "tables" / "toy.md"
    assert drgr(*words, "--export", "markdown", "--output", target).code == 0
    assert target.read_text().count("\n") == 4


class TestRefusals:
    def test_dirty_source(self, drgr, experiment_file, tmp_path, monkeypatch):
        monkeypatch.setattr(comparison, "source_commit", lambda: ("abc", True))
        answer = drgr("compare", experiment_file, "--directory", tmp_path / "out")
        assert answer.code == 2
        assert "the source differs from its commit abc" in answer.err
        assert "--allow-dirty" in answer.err
        assert not (tmp_path / "out").exists()

    def test_no_experiment(self, drgr, tmp_path):
        answer = drgr("compare", tmp_path / "none.yaml")
        assert answer.code == 2
        assert "none.yaml does not exist; name a YAML or JSON file" in answer.err

    def test_unknown_recipe(self, drgr, experiment_file):
        content = json.loads(experiment_file.read_text())
        content["methods"]["kl"] = {"recipe": "nothing-such"}
        experiment_file.write_text(json.dumps(content))
        answer = drgr("compare", experiment_file)
        assert answer.code == 2
        assert "recipe 'nothing-such' is unknown; use one of" in answer.err

    def test_no_scipy(self, drgr, experiment_file, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", {}.get)
        answer = drgr("compare", experiment_file)
        assert answer.code == 2
        assert "drgr compare needs scipy; install it with pip install 'drgr[compare]'" in answer.err

    def test_export_before_anything_ran(self, drgr, experiment_file, tmp_path):
        words = ("compare", experiment_file, "--directory", tmp_path / "out", "--export", "csv")
        answer = drgr(*words)
        assert answer.code == 2
        assert "does not exist; run the comparison before it is exported" in answer.err


@pytest.fixture
def made_up(monkeypatch, tmp_path, clean_source):
    """Makes the command run nothing, and end as a test says."""

    def install(stopped: int = 0) -> None:
        def run(chosen, *, parallel, retry_failed, report):
            with comparing.Store.open(chosen.store, chosen.content):
                pass
            return stopped

        monkeypatch.setattr(comparing, "run_comparison", run)

    return install


def test_what_a_stopped_comparison_says(drgr, made_up, experiment_file, tmp_path):
    made_up(stopped=signal.SIGTERM)
    answer = drgr("compare", experiment_file, "--directory", tmp_path / "out")
    assert answer.code == 128 + signal.SIGTERM
    assert answer.err == "drgr: stopped by SIGTERM; the same command continues\n"
    assert (tmp_path / "out" / "report.html").exists()


def test_what_an_incomplete_comparison_says(drgr, made_up, experiment_file, tmp_path):
    made_up()
    answer = drgr("compare", experiment_file, "--directory", tmp_path / "out")
    assert answer.code == 3
    assert "use --retry-failed" in answer.err
    wrong = drgr("compare", experiment_file, "--directory", tmp_path / "out", "--export", "excel")
    assert wrong.code == 2
    assert "--export must be one of csv, latex, markdown, got excel" in wrong.err
