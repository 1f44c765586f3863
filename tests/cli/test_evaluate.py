"""``drgr evaluate`` on runs, other corpora and plain models, and what it refuses."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drgr.data import Corpus
from drgr.evaluation import SCHEMA


@pytest.fixture(scope="module")
def finished(runs: ModuleType, corpus: Corpus, tmp_path_factory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    runs.run_small(runs.small_config(training__steps=2), corpus, path)
    return path


@pytest.fixture
def evaluate(drgr, cache):
    """Evaluates a little, with a fast timing."""

    def run(target, *options):
        return drgr("evaluate", target, "--windows", 2, "--repeats", 1, "--cache", cache, *options)

    return run


def test_a_saved_model_needs_no_run(evaluate, runs: ModuleType, finished, tmp_path, monkeypatch):
    """The model of a run as transformers has it: two experts a token, no budget."""
    monkeypatch.setenv("COLUMNS", "160")
    before = runs.listing(finished)
    options = ("--data", runs.DOMAIN_FILE, "--sequence-length", 32, "--batch-size", 4)
    answer = evaluate(
        finished / "model", *options, "--protocol", tmp_path / "model.json", "--reference", finished
    )
    assert answer.code == 0, answer.err
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["schema"] == SCHEMA
    assert record["subject"]["kind"] == "model"
    assert record["environment"]["command"].startswith("drgr evaluate ")
    assert {d["experts_per_token"] for d in record["domains"].values()} == {2.0}
    assert record["robustness"]["excess"]["reference"] == str(finished / "evaluation.json")
    for layer in record["balance"]:
        assert sum(layer["load"]) == 2 * 2 * 32 * 4
    worst = record["robustness"]["worst_domain"]
    assert f"{worst} (worst)" in answer.out
    for part in ("worst case in a ball", "random mixtures", "loss by frequency", "agree", "p95"):
        assert part in answer.out
    assert runs.listing(finished) == before


def test_a_model_can_be_reported_on(evaluate, drgr, runs: ModuleType, finished, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    options = ("--data", runs.DOMAIN_FILE, "--sequence-length", 32)
    answer = evaluate(model, *options, "--protocol", model / "protocol.json")
    assert answer.code == 0, answer.err
    assert drgr("report", model).code == 0
    page = (model / "report.html").read_text()
    assert "Evaluation protocol" in page
    assert "test split of fixture, at most 2 windows of each domain" in page


def test_a_run_on_other_text_keeps_its_tokenizer(
    evaluate, drgr, finished, tmp_path, corpus: Corpus
):
    for name, word in (("one", "lorem"), ("two", "ipsum")):
        (tmp_path / name).mkdir()
        for number in range(30):
            text = f"{word} dolor {number} sit amet consectetur " * 12
            (tmp_path / name / f"{number}.txt").write_text(text + str(number))
    path = tmp_path / "other.toml"
    path.write_text(
        'name = "other"\n'
        + "".join(
            f'[domains.{name}]\nfiles = "{name}/*.txt"\nlicence = "CC0-1.0"\n'
            for name in ("one", "two")
        )
    )
    answer = evaluate(finished, "--data", path, "--protocol", tmp_path / "other.json")
    assert answer.code == 0, answer.err
    record = json.loads((tmp_path / "other.json").read_text())
    assert list(record["domains"]) == ["one", "two"]
    assert record["training"] is None
    assert record["compute"]["spend"]["budget"] is not None
    assert "training tokens" not in answer.out
    assert not (finished / "protocol.json").exists()


class TestRefusals:
    def refused(self, answer, *parts):
        assert answer.code == 2, answer
        assert "Traceback" not in answer.err
        for part in parts:
            assert part in answer.err

    def test_what_is_neither(self, evaluate, tmp_path):
        self.refused(evaluate(tmp_path), f"{tmp_path} is not a run directory", "nor a saved model")
        nowhere = tmp_path / "nowhere"
        self.refused(evaluate(nowhere), "is not a run directory")
        self.refused(evaluate(nowhere, "--data", "drgr-8"), "which is no directory; check the path")

    def test_a_model_without_data(self, evaluate, finished):
        self.refused(evaluate(finished / "model"), "is a model, not a run", "--data CORPUS")

    def test_options_of_the_other_kind(self, evaluate, finished, runs: ModuleType, tmp_path):
        output = ("--output", tmp_path / "x.json")
        data = ("--data", runs.DOMAIN_FILE)
        self.refused(evaluate(finished / "model", *data, *output), "use --protocol FILE")
        self.refused(evaluate(finished, *data, *output), "use --protocol FILE")
        self.refused(evaluate(finished, "--tokenizer", "x"), "--tokenizer is for models")

    def test_a_model_without_experts(self, evaluate, runs: ModuleType, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=600,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
        answer = evaluate(tmp_path / "dense", "--data", runs.DOMAIN_FILE)
        self.refused(answer, "LlamaForCausalLM has no MoE layer")

    def test_a_vocabulary_that_does_not_fit(self, evaluate, runs, finished, tmp_path):
        from drgr.models import tiny_olmoe

        model = tiny_olmoe(
            vocabulary_size=40, hidden_size=16, expert_size=16, num_layers=1, num_heads=2, seed=0
        )
        model.save_pretrained(tmp_path / "small")
        answer = evaluate(
            tmp_path / "small", "--data", runs.DOMAIN_FILE, "--tokenizer", finished / "model"
        )
        self.refused(answer, "knows 40 tokens, but corpus fixture has", "--tokenizer")

    def test_a_model_without_a_tokenizer(self, evaluate, runs, finished, tmp_path):
        (tmp_path / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "bare" / name).write_bytes((finished / "model" / name).read_bytes())
        answer = evaluate(tmp_path / "bare", "--data", runs.DOMAIN_FILE)
        self.refused(answer, "the tokenizer has no token for", "its files are missing")

    def test_splits_and_lengths(self, evaluate, finished):
        self.refused(evaluate(finished, "--split", "tests"), "did you mean 'test'?")
        self.refused(evaluate(finished, "--sequence-length", 10**6), "needs at least")
        self.refused(evaluate(finished, "--sequence-length", 600), "at most the model's 512")
        self.refused(evaluate(finished, "--reference", "nowhere.json"), "reference nowhere.json")

    def test_a_loss_that_is_not_finite(self, evaluate, runs: ModuleType, finished, tmp_path):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(finished / "model")
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
        model.save_pretrained(tmp_path / "broken")
        options = ("--tokenizer", finished / "model", "--sequence-length", 32)
        answer = evaluate(tmp_path / "broken", "--data", runs.DOMAIN_FILE, *options)
        assert answer.code == 3
        assert "the test loss of domain" in answer.err
