"""Bad input: exit code 2, a clear message with name, value and remedy, nothing written or lost."""

import gzip
import json
import resource
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from drgr.data import Corpus
from drgr.training import setup
from drgr.training.checkpoint import latest_checkpoint, load_checkpoint


def assert_refused(answer, *parts: str) -> None:
    """Exit code 2 and one message that holds the parts: name, value, remedy."""
    assert answer.code == 2, answer
    assert answer.err.count("drgr: ") == 1
    message = answer.err[answer.err.index("drgr: ") :]
    for part in parts:
        assert part in message, message
    assert "Traceback" not in answer.err + answer.out


@pytest.fixture
def refuse(drgr, config_file, cache: Path, tmp_path: Path, runs: ModuleType):
    """Trains with changed settings and expects a refusal that writes no run."""

    def train(*parts: str, settings: tuple[str, ...] = (), **changes: Any) -> None:
        target = tmp_path / "run"
        before = runs.listing(tmp_path)
        path = config_file(**changes)
        options = [option for setting in settings for option in ("--set", setting)]
        answer = drgr("train", path, "--run-dir", target, "--cache", cache, *options)
        assert_refused(answer, *parts)
        assert not target.exists()
        assert {k: v for k, v in runs.listing(tmp_path).items() if k in before} == before

    return train


class TestSettings:
    def test_unknown_key(self, refuse):
        refuse(
            "training.stepz is not a setting; the nearest is training.steps",
            settings=("training.stepz=3",),
        )

    def test_unknown_key_in_the_file(self, refuse):
        refuse(
            "routing.budget.averag is not a setting; the nearest is routing.budget.average",
            routing__budget={"averag": 2},
        )

    def test_minimum_above_maximum(self, refuse):
        refuse(
            "routing.budget: minimum must be at most maximum, got 3 and 2",
            "lower the minimum or raise the maximum",
            routing__budget={"minimum": 3, "maximum": 2, "average": 2},
        )

    @pytest.mark.parametrize(
        ("average", "what"),
        [(0.5, "at least minimum, got 0.5 and 1"), (4.5, "at most maximum, got 4.5 and 4")],
    )
    def test_budget_outside_its_bounds(self, refuse, average, what):
        refuse(
            f"routing.budget: average must be {what}",
            routing__budget={"minimum": 1, "maximum": 4, "average": average},
        )

    def test_budget_in_flops_below_one_expert(self, refuse):
        refuse(
            "routing.budget in FLOPs, at 6144 an expert: ",
            "got minimum 1 and maximum 0; lower the minimum or raise the maximum",
            routing__budget={"unit": "flops", "minimum": 1, "maximum": 100, "average": 50},
        )

    def test_no_yaml(self, refuse):
        refuse(
            "'training.steps=[1' is not YAML",
            "put text into quotes",
            settings=("training.steps=[1",),
        )

    def test_sampling_of_another_corpus(self, refuse):
        refuse(
            "data.sampling must name the domains of corpus fixture",
            "'email'",
            data__sampling={"email": 1},
        )

    def test_model_sizes_that_do_not_fit(self, refuse):
        refuse("model: ", "got 32", model__num_heads=3)

    def test_more_experts_than_there_are(self, refuse):
        refuse(
            "routing.budget: budget.maximum must be at most the 8 experts",
            "got 9; lower it",
            routing__budget={"minimum": 1, "maximum": 9, "average": 2},
        )


class TestData:
    @pytest.fixture
    def domains(self, tmp_path: Path):
        """Writes a corpus of two domains; files and extra lines may be added."""

        def write(extra: str = "", files: dict[str, bytes] | None = None) -> str:
            contents = {
                f"{name}/{number}.txt": f"{name} document {number}. ".encode() * 60
                for name in ("plants", "stones")
                for number in range(12)
            }
            for name, content in (contents | (files or {})).items():
                path = tmp_path / "user" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            file = tmp_path / "user" / "domains.toml"
            file.write_text(
                '[domains.plants]\nfiles = "plants/*"\n[domains.stones]\nfiles = "stones/*"\n'
                + extra
            )
            return str(file)

        return write

    @pytest.fixture
    def refuse_corpus(self, refuse, domains):
        """Trains on a user's corpus and expects a refusal."""

        def train(*parts: str, extra: str = "", files=None, **changes) -> None:
            refuse(
                *parts,
                data__corpus=domains(extra, files),
                data__sampling="uniform",
                data__vocabulary_size=300,
                **changes,
            )

        return train

    def test_missing_domain(self, refuse_corpus):
        refuse_corpus(
            "domain 'metals': no file matches",
            "metals/*.txt",
            "correct 'files'",
            extra='[domains.metals]\nfiles = "metals/*.txt"\n',
        )

    def test_empty_domain(self, refuse_corpus):
        refuse_corpus(
            "'metals'", extra='[domains.metals]\nfiles = "metals/*"\n', files={"metals/a.txt": b""}
        )

    def test_domain_shorter_than_a_sequence(self, refuse_corpus):
        refuse_corpus("sequence_length 9000 needs at least 9001", data__sequence_length=9000)

    def test_file_that_is_not_utf8(self, refuse_corpus):
        refuse_corpus(
            "plants/bad.txt cannot be read: byte 4 (0xff) is not valid UTF-8",
            "skip_unreadable",
            files={"plants/bad.txt": b"abc \xff\xfe"},
        )

    def test_truncated_file(self, refuse_corpus):
        refuse_corpus(
            "plants/bad.txt.gz cannot be read",
            "skip_unreadable",
            files={"plants/bad.txt.gz": gzip.compress(b"some text " * 99)[:-20]},
        )

    def test_unreadable_files_can_be_skipped(self, drgr, config_file, domains, tmp_path):
        path = config_file(
            data__corpus=domains(files={"plants/bad.txt": b"abc \xff"}),
            data__sampling="uniform",
            data__vocabulary_size=300,
            data__skip_unreadable=True,
            training__steps=2,
        )
        answer = drgr(
            "train", path, "--run-dir", tmp_path / "run", "--cache", tmp_path / "c", "--no-report"
        )
        assert answer.code == 0, answer.err

    def test_unknown_corpus(self, refuse):
        refuse("unknown corpus 'drgr-9'; did you mean 'drgr-8'", data__corpus="drgr-9")

    def test_missing_domain_file(self, refuse):
        refuse("domain file nowhere.toml does not exist", data__corpus="nowhere.toml")

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"2.0"'])
    def test_reference_losses_that_are_no_numbers(self, refuse, tmp_path, corpus: Corpus, value):
        path = tmp_path / "losses.json"
        losses = dict.fromkeys(corpus.domains, "2.0") | {"fiction": value}
        path.write_text("{" + ", ".join(f'"{name}": {loss}' for name, loss in losses.items()) + "}")
        refuse(
            f"reference loss of domain 'fiction' in {path} must be a finite number",
            robustness__reference=str(path),
        )


class TestModels:
    def test_without_moe_layers(self, refuse, tmp_path):
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
        refuse(
            "LlamaForCausalLM",
            "no MoE layer",
            model={"kind": "pretrained", "path": str(tmp_path / "dense")},
        )

    def test_with_an_unknown_router(self, refuse, build_family, monkeypatch):
        model = build_family("olmoe", vocab_size=512)
        router = model.model.layers[1].mlp.gate
        forward = type(router).forward

        class Other(type(router)):
            def forward(self, hidden_states):
                logits, weights, ids = forward(self, hidden_states)
                return logits, weights.square(), ids

        router.__class__ = Other
        monkeypatch.setattr(setup, "load_pretrained", lambda _: model)
        refuse(
            "model.layers.1.mlp",
            "none of the known rules",
            model={"kind": "pretrained", "path": "somewhere"},
        )

    def test_that_is_not_there(self, refuse):
        refuse("'./nowhere'", model={"kind": "pretrained", "path": "./nowhere"})


@pytest.fixture(scope="module")
def stopped_run(runs: ModuleType, corpus: Corpus, tmp_path_factory) -> Path:
    """A run that was stopped after 4 of 12 steps, with checkpoints of steps 3 and 4."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    watcher = runs.Watcher(signal_after={4: signal.SIGTERM})
    runs.run_small(runs.small_config(), corpus, path, watcher=watcher)
    return path


@pytest.fixture
def old_run(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run that a test may damage."""
    import shutil

    return Path(shutil.copytree(stopped_run, tmp_path / "old"))


class TestRunDirectories:
    @pytest.fixture
    def refuse_run(self, drgr, config_file, cache: Path, runs: ModuleType):
        """Trains into a directory and expects a refusal that leaves it as it is."""

        def train(path: Path, *parts: str, options=(), **changes) -> None:
            before = runs.listing(path)
            answer = drgr(
                "train", config_file(**changes), "--run-dir", path, "--cache", cache, *options
            )
            assert_refused(answer, *parts)
            assert runs.listing(path) == before

        return train

    def test_that_exist(self, refuse_run, old_run):
        refuse_run(old_run, f"run directory {old_run} exists already", "--resume", "--overwrite")

    def test_resuming_nothing(self, refuse_run, tmp_path):
        refuse_run(
            tmp_path / "new", "holds no run to resume; leave out --resume", options=["--resume"]
        )

    def test_resuming_and_overwriting(self, refuse_run, old_run):
        refuse_run(
            old_run,
            "--resume and --overwrite exclude each other",
            options=["--resume", "--overwrite"],
        )

    def test_overwriting_what_is_not_a_run(self, refuse_run, tmp_path):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.txt").write_text("x")
        refuse_run(tmp_path / "thesis", "is not a run directory", options=["--overwrite"])

    def test_another_configuration(self, refuse_run, old_run):
        refuse_run(
            old_run,
            "belongs to another configuration",
            str(old_run / "checkpoints" / "step-00000004"),
            options=["--resume"],
            training__seed=1,
        )

    @pytest.mark.parametrize("name", ["tensors-00000.safetensors", "state.json", "manifest.json"])
    def test_truncated_checkpoint(self, refuse_run, old_run, name):
        file = old_run / "checkpoints" / "step-00000004" / name
        file.write_bytes(file.read_bytes()[:-7])
        refuse_run(
            old_run,
            f"{file.parent} is damaged: {name}",
            "delete that directory, then resume (the previous checkpoint is step-00000003)",
            options=["--resume"],
        )

    def test_evaluating_a_truncated_checkpoint(self, drgr, old_run, cache):
        file = old_run / "checkpoints" / "step-00000004" / "state.json"
        file.write_bytes(b"")
        assert_refused(drgr("evaluate", old_run, "--cache", cache), "is damaged: state.json")

    @pytest.mark.parametrize(
        "changes",
        [
            {"data__corpus": "nowhere.toml"},
            {"model__num_heads": 3},
            {"data__sequence_length": 9000},
            {"training__batch_size": 3, "training__accumulation": 2},
        ],
    )
    def test_overwriting_with_settings_that_cannot_start(self, refuse_run, old_run, changes):
        """The old run is worth more than a run that never begins."""
        refuse_run(old_run, options=["--overwrite"], **changes)

    def test_below_a_file(self, drgr, config_file, cache, tmp_path):
        (tmp_path / "file").write_text("x")
        answer = drgr(
            "train", config_file(), "--run-dir", tmp_path / "file" / "run", "--cache", cache
        )
        assert_refused(answer, f"run directory {tmp_path / 'file' / 'run'} could not be written")

    @pytest.mark.parametrize("command", ["evaluate", "report"])
    def test_commands_on_what_is_not_a_run(self, drgr, tmp_path, command):
        assert_refused(drgr(command, tmp_path), f"{tmp_path} is not a run directory", "name one")

    def test_evaluating_without_a_checkpoint(self, drgr, config_file, cache, tmp_path):
        path = tmp_path / "run"
        path.mkdir()
        (path / "config.json").write_bytes(config_file().read_bytes())
        answer = drgr("evaluate", path, "--cache", cache)
        assert answer.code == 2
        assert "has no whole checkpoint to evaluate; train it first" in answer.err

    def test_evaluating_an_unknown_split(self, drgr, old_run, cache):
        answer = drgr("evaluate", old_run, "--split", "tests", "--cache", cache)
        assert_refused(answer, "unknown split 'tests'; did you mean 'test'?")


class TestFullDisk:
    """A limit on the size of a file stands for the disk: writes fail as on a full one."""

    @pytest.fixture
    def limited(self):
        """Sets the largest size of a file for the rest of the test."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(num_bytes: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

        yield limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_checkpoint(
        self, drgr, config_file, cache, old_run, limited, runs: ModuleType, corpus: Corpus, tmp_path
    ):
        arguments = (
            "train",
            config_file(),
            "--run-dir",
            old_run,
            "--cache",
            cache,
            "--resume",
            "--no-report",
        )
        limited(200_000)
        answer = drgr(*arguments)
        limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        assert answer.code == 3
        assert "step-00000006 of about" in answer.err
        assert "the last whole checkpoint step-00000004 is intact" in answer.err
        assert "free space" in answer.err
        assert "Traceback" not in answer.err
        path = latest_checkpoint(old_run / "checkpoints")
        assert path is not None
        assert path.name == "step-00000004"
        load_checkpoint(path, fingerprint=runs.fingerprint(runs.small_config(), corpus))
        # With room again the run goes on, and ends where it would have.
        assert drgr(*arguments).code == 0
        runs.run_small(runs.small_config(), corpus, tmp_path / "straight")
        runs.assert_same(runs.results(old_run), runs.results(tmp_path / "straight"))

    def test_metrics(self, drgr, config_file, cache, tmp_path, limited, runs: ModuleType):
        path = config_file(training__log_every=1, training__checkpoint_every=50)
        limited(9_000)
        answer = drgr("train", path, "--run-dir", tmp_path / "run", "--cache", cache)
        limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        assert answer.code == 3
        assert f"run directory {tmp_path / 'run'} could not be written" in answer.err
        assert "free space there" in answer.err
        assert "Traceback" not in answer.err
        answer = drgr(
            "train",
            path,
            "--run-dir",
            tmp_path / "run",
            "--cache",
            cache,
            "--resume",
            "--no-report",
        )
        assert answer.code == 0
        steps = [r["step"] for r in runs.read_records(tmp_path / "run") if r["kind"] == "train"]
        assert steps == list(range(1, 13))


def test_non_finite_loss(drgr, config_file, cache, tmp_path):
    path = config_file(training__learning_rate=1e36, training__warmup_steps=0)
    answer = drgr("train", path, "--run-dir", tmp_path / "run", "--cache", cache)
    assert answer.code == 3
    assert "is not finite at step" in answer.err
    assert "last good checkpoint" in answer.err
    assert "Traceback" not in answer.err


def test_debug_shows_where_an_error_came_from(drgr, tmp_path):
    from drgr.errors import ConfigError

    with pytest.raises(ConfigError, match="is not a run directory"):
        drgr("--debug", "evaluate", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train"], "Missing argument"),
        (["trian", "demo"], "No such command"),
        (["train", "demo", "--stepz=3"], "No such option"),
        (["train", "demo3"], "recipe 'demo3' is unknown; use one of demo, drgr, drgr-bilevel, erm"),
        (["train", "no.such.module:f"], "cannot be imported"),
        (["train", ":f"], "cannot be imported"),
        (["train", "json:nothing"], "cannot be imported"),
        (["train", "json:dumps"], "recipe 'json:dumps' is not valid"),
        (["train", "nowhere.toml"], "configuration nowhere.toml does not exist"),
        (["data", "prepare", "drgr-9"], "unknown corpus 'drgr-9'"),
        (["data", "prepare", "--vocabulary-size=10"], "258"),
        (["evaluate", "x", "--windows=0"], "windows"),
    ],
)
def test_arguments(drgr, monkeypatch, tmp_path, arguments, part):
    import re

    monkeypatch.chdir(tmp_path)
    answer = drgr(*arguments)
    assert answer.code == 2, answer
    assert re.search(part, answer.err), answer.err
    assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == []


def test_settings_of_a_recipe_function_are_checked(drgr, monkeypatch, tmp_path):
    (tmp_path / "mine_invalid.py").write_text(
        "from drgr.training.config import BudgetConfig, RunConfig\n"
        "def recipe():\n"
        "    return BudgetConfig(minimum=3, maximum=2)\n"
        "def other():\n"
        "    return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = drgr("train", "mine_invalid:recipe")
    assert answer.code == 2
    assert "minimum must be at most maximum, got 3 and 2" in answer.err
    answer = drgr("train", "mine_invalid:other")
    assert answer.code == 2
    assert "must return a RunConfig, got dict" in answer.err
    assert json.dumps({}) not in answer.err
