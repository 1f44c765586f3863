"""Commands that succeed: what they write and what they print."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import drgr as package
from drgr.data import BUILT_IN_CORPORA, Corpus
from drgr.recipes import RECIPES
from drgr.routing.methods import METHODS
from drgr.training import known_keys


@pytest.fixture(scope="module")
def finished(runs: ModuleType, corpus: Corpus, tmp_path_factory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    runs.run_small(runs.small_config(), corpus, path)
    return path


class TestTrain:
    def test_writes_what_the_documentation_says(
        self, drgr, config_file, cache, tmp_path, runs: ModuleType, finished
    ):
        path = tmp_path / "run"
        answer = drgr("train", config_file(), "--run-dir", path, "--cache", cache)
        assert answer.code == 0, answer.err
        assert {entry.name for entry in path.iterdir()} == {
            "config.json",
            "environment.json",
            "metrics.jsonl",
            "evaluation.json",
            "checkpoints",
            "model",
            "tensorboard",
            "report.html",
        }
        # The command adds nothing of its own to what the library computes.
        runs.assert_same(runs.results(path), runs.results(finished))
        environment = json.loads((path / "environment.json").read_text())
        assert environment["command"].startswith("drgr train ")
        assert environment["processes"] == 1
        assert str(path / "report.html") in answer.out.replace("\n", "")

    def test_shows_the_table(self, drgr, config_file, cache, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        path = tmp_path / "run"
        answer = drgr("train", config_file(), "--run-dir", path, "--cache", cache, "--no-report")
        assert not (path / "report.html").exists()
        record = json.loads((path / "evaluation.json").read_text())
        for name, domain in record["domains"].items():
            shown = f"{name} (worst)" if name == record["worst_domain"] else name
            pattern = (
                rf"{re.escape(shown)} .*\b{domain['train_tokens']:,}\b"
                rf".* {domain['bits_per_byte']:.3f}.* {domain['adversarial_weight']:.3f}"
                rf".* {domain['experts_per_token']:.2f}"
            )
            assert re.search(pattern, answer.out), (pattern, answer.out)
        training = record["budget"]["training"]
        for line in (
            f"mean bits per byte    {record['mean_bits_per_byte']:.3f}",
            f"worst domain          {record['worst_domain']} at ",
            f" at {record['worst_bits_per_byte']:.3f}",
            f"effective domains     {record['effective_domains']:.2f} of 4",
            "budget                1 to 4 experts a token, 1.7 on average",
            f"{training['spend']:,} of {training['budget']:,} assignments, 0 batches over",
            f"training FLOPs        {record['flops']:.3e}",
        ):
            assert line in answer.out
        assert answer.out.count("MaxVio") == answer.out.count("MinVio") == 2
        # Without a terminal each record has a line on the error stream.
        assert re.search(r"step 3: loss \d\.\d{3}, spend 1,302 of 1,302, ", answer.err)
        assert re.search(r"step 5: held-out bits per byte, mean \d\.\d{3}, worst", answer.err)

    def test_a_recipe_of_ones_own(self, drgr, cache, tmp_path, monkeypatch, runs: ModuleType):
        (tmp_path / "my_recipes").mkdir()
        (tmp_path / "my_recipes" / "__init__.py").write_text("")
        (tmp_path / "my_recipes" / "small.py").write_text(
            "from drgr.training import parse_config\n"
            f"def mine():\n    return parse_config({runs.small_content(name='own')!r})\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
        answer = drgr(
            "train", "my_recipes.small:mine", "--set", "training.steps=2", "--cache", cache
        )
        assert answer.code == 0, answer.err
        config = json.loads((tmp_path / "runs" / "own" / "config.json").read_text())
        assert config["training"]["steps"] == 2
        record = json.loads((tmp_path / "runs" / "own" / "evaluation.json").read_text())
        assert record["step"] == 2

    def test_resume_and_overwrite(self, drgr, config_file, cache, tmp_path, runs: ModuleType):
        path = config_file(training__steps=3)
        arguments = ("train", path, "--run-dir", tmp_path / "run", "--cache", cache, "--no-report")
        assert drgr(*arguments).code == 0
        expected = runs.results(tmp_path / "run")
        (tmp_path / "run" / "leftover").write_text("x")
        assert drgr(*arguments, "--resume").code == 0
        assert (tmp_path / "run" / "leftover").exists()
        assert drgr(*arguments, "--overwrite").code == 0
        assert not (tmp_path / "run" / "leftover").exists()
        runs.assert_same(runs.results(tmp_path / "run"), expected)


class TestEvaluate:
    def test_equals_the_evaluation_of_training(
        self, drgr, cache, tmp_path, finished, runs: ModuleType
    ):
        before = runs.listing(finished)
        output = tmp_path / "again.json"
        answer = drgr("evaluate", finished, "--windows", 3, "--output", output, "--cache", cache)
        assert answer.code == 0, answer.err
        expected = json.loads((finished / "evaluation.json").read_text())
        assert json.loads(output.read_text()) == expected
        assert f"worst domain          {expected['worst_domain']}" in answer.out
        protocol = finished / "protocol.json"
        assert json.loads(protocol.read_text())["subject"]["kind"] == "run"
        protocol.unlink()
        assert runs.listing(finished) == before

    def test_other_splits_and_all_windows(self, drgr, cache, tmp_path, finished, corpus: Corpus):
        output = tmp_path / "validation.json"
        answer = drgr(
            "evaluate", finished, "--split", "validation", "--output", output, "--cache", cache
        )
        assert answer.code == 0, answer.err
        record = json.loads(output.read_text())
        assert record["split"] == "validation"
        for name, domain in record["domains"].items():
            windows = (len(corpus.tokens("validation", name)) - 1) // 32
            assert domain["validation_tokens"] == windows * 32


def test_report_of_two_runs(drgr, finished, tmp_path):
    output = tmp_path / "side-by-side.html"
    answer = drgr("report", finished, finished, "--output", output)
    assert answer.code == 0, answer.err
    assert "<html" in output.read_text()[:500]
    assert str(output) in answer.out.replace("\n", "")


def test_a_comparison_does_not_replace_the_report_of_a_run(drgr, finished):
    own, comparison = finished / "report.html", finished / "comparison.html"
    drgr("report", finished)
    before = own.read_bytes()
    try:
        assert drgr("report", finished, finished).code == 0
        assert comparison.exists()
        assert own.read_bytes() == before
    finally:
        comparison.unlink(missing_ok=True)


class TestInformation:
    def test_version(self, drgr):
        answer = drgr("--version")
        assert (answer.code, answer.out) == (0, f"drgr {package.__version__}\n")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--help"], ["train", "evaluate", "report", "recipes", "settings", "data", "--debug"]),
            (["train", "--help"], ["--run-dir", "--set", "--resume", "--overwrite", "torchrun"]),
            (["evaluate", "--help"], ["--split", "--windows", "--output"]),
            (["report", "--help"], ["--output"]),
            (["compare", "--help"], ["--parallel", "--retry-failed", "--allow-dirty", "--export"]),
            (["data", "--help"], ["prepare", "list"]),
            (["data", "prepare", "--help"], ["--vocabulary-size", "--skip-unreadable"]),
        ],
    )
    def test_help(self, drgr, monkeypatch, arguments, words):
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("NO_COLOR", "1")
        answer = drgr(*arguments)
        assert answer.code == 0
        for word in words:
            assert word in answer.out

    def test_recipes(self, drgr):
        answer = drgr("recipes")
        assert answer.code == 0
        assert [line.split()[0] for line in answer.out.splitlines()] == list(RECIPES)
        assert all(len(line.split()) > 3 for line in answer.out.splitlines())

    def test_one_recipe_is_shown_as_a_file_that_can_be_trained(self, drgr, tmp_path):
        answer = drgr("recipes", "erm")
        assert json.loads(answer.out) == RECIPES["erm"]().model_dump(mode="json")
        (tmp_path / "erm.json").write_text(answer.out)
        assert drgr("recipes", tmp_path / "erm.json").out == answer.out

    def test_settings(self, drgr):
        assert drgr("settings").out.split() == known_keys()

    def test_methods(self, drgr):
        answer = drgr("methods", "price")
        assert answer.code == 0
        for method in METHODS:
            shown = f" {method.name} " in answer.out
            assert shown == (method.kind == "price"), method.name
        refused = drgr("methods", "router")
        assert refused.code == 2
        assert "kind must be one of loss, price, score, selection, got router" in refused.err

    def test_data_list(self, drgr):
        assert drgr("data", "list").out.split() == list(BUILT_IN_CORPORA)

    def test_data_prepare(self, drgr, cache, runs: ModuleType, corpus: Corpus):
        answer = drgr(
            "data", "prepare", runs.DOMAIN_FILE, "--cache", cache, "--vocabulary-size", 512
        )
        assert answer.code == 0, answer.err
        assert str(corpus.directory) in answer.out.replace("\n", "")
        for domain in corpus.domains:
            line = next(line for line in answer.out.splitlines() if line.startswith(domain))
            assert f"train {len(corpus.tokens('train', domain)):>9,}" in line
            assert f"{corpus.bytes_per_token('train', domain):.2f} bytes/token" in line


def test_help_does_not_wait_for_torch():
    code = "import sys, drgr.cli.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
