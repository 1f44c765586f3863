"""Experiment files: what they may hold, and what is said of those that may not."""

import json
from pathlib import Path

import pytest
import yaml

from drgr.errors import ConfigError
from drgr.experiments import build_variants, parse_experiment, read_experiment
from drgr.recipes import RECIPES
from drgr.training import RunConfig

LR = {"kind": "log-uniform", "low": "1e-4", "high": 1e-2}


@pytest.fixture
def refuse(content):
    def check(*parts, **changes):
        with pytest.raises(ConfigError) as caught:
            parse_experiment(content(**changes))
        for part in parts:
            assert part in str(caught.value)

    return check


class TestReading:
    @pytest.mark.parametrize(("suffix", "write"), [("json", json.dumps), ("yml", yaml.safe_dump)])
    def test_a_file(self, content, tmp_path, suffix, write):
        path = tmp_path / f"experiment.{suffix}"
        path.write_text(write(content()))
        found = read_experiment(path)
        assert found.seeds == (0, 1)
        assert found.common == ("training.weight_decay=0.0",)
        assert found.methods["kl"].settings == ("robustness.apply_to=sampling",)
        assert found.methods["uniform"].settings[2] == "robustness.losses=train"
        assert (found.flops, found.tuning) == ("cut", None)

    def test_missing(self, tmp_path):
        with pytest.raises(ConfigError, match="does not exist; name a YAML or JSON file"):
            read_experiment(tmp_path / "none.yaml")

    def test_another_suffix(self, tmp_path):
        with pytest.raises(ConfigError, match=r"must be a file with the suffix \.json, \.yaml"):
            read_experiment(tmp_path / "experiment.toml")

    @pytest.mark.parametrize(
        ("text", "message"), [("{a", "cannot be read: "), ("- 1", "must hold a table, got")]
    )
    def test_broken(self, tmp_path, text, message):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_experiment(path)


EXAMPLE = Path(__file__).parents[2] / "examples" / "comparison.yaml"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the source tree")
def test_the_example():
    experiment = read_experiment(EXAMPLE)
    variants = build_variants(experiment, load=lambda name: RECIPES[name]())
    assert [variant.config.training.batch_size for variant in variants] == [8] * 4
    assert variants[3].config.outer.variables == ("mixture",)
    space = variants[3].space
    assert list(space) == ["training.learning_rate", "robustness.penalty", "outer.every"]
    assert space["training.learning_rate"].low == 5e-4
    shares = variants[1].config.data.sampling
    given = RECIPES["demo"]().data.sampling
    total = sum(share**0.5 for share in given.values())
    for domain, share in shares.items():  # rounded in the file
        assert share / sum(shares.values()) == pytest.approx(
            given[domain] ** 0.5 / total, abs=0.001
        )


class TestRefusals:
    def test_seeds(self, refuse):
        refuse("seeds must be a number above 0 or a list of seeds, got none", seeds=0)
        refuse("seeds must be a number above 0 or a list of seeds, got none", seeds=[])
        refuse("seeds must differ from each other, got [3, 3]", seeds=[3, 3])
        refuse("experiment: seeds.1: ", "got -1", seeds=[3, -1])
        refuse("experiment: seeds: Field required", seeds=None)

    def test_methods_and_reference(self, refuse):
        refuse("methods must name at least one method, got none", methods={})
        message = "reference must be one of the methods ['uniform', 'kl'], got 'erm'"
        refuse(message, reference="erm")
        refuse("settings must be a list of path=value, or a table", methods={"uniform": "a=1"})
        refuse("flops: Input should be 'cut', 'fill' or 'free', got 'equal'", flops="equal")
        refuse("sweep.training.steps: ", "at least 1 item", sweep={"training.steps": []})
        refuse("name: String should match pattern", "got '../x'", name="../x")

    def test_unknown_entry(self, refuse):
        refuse("method is not an entry of an experiment; the entries are name, base", method=1)

    def test_search_kinds(self, refuse):
        for space, parts in (
            ({"kind": "gauss"}, ("tuning.space.training.learning_rate", "'gauss'", "'uniform'")),
            ({"kind": "uniform", "low": 2, "high": 1}, ("low must be below high, got 2 and 1",)),
            ({"kind": "log-uniform", "low": 2, "high": 1}, ("low must be below high, got 2 and",)),
            ({"kind": "log-uniform", "low": 0, "high": 1}, ("low: Input should be greater than",)),
            ({"kind": "categorical", "choices": []}, ("choices: ", "at least 1 item")),
        ):
            tuning = {"trials": 1, "space": {"training.learning_rate": space}}
            refuse(*parts, tuning=tuning)

    def test_tuning(self, refuse):
        space = {"training.learning_rate": LR}
        refuse(
            "tuning has nothing to search for the methods ['uniform']; give tuning.space",
            tuning={"trials": 1, "methods": {"kl": space}},
        )
        refuse(
            "tuning.methods must be among the methods ['uniform', 'kl'], got ['erm']",
            tuning={"trials": 1, "space": space, "methods": {"erm": space}},
        )
        refuse(
            "tuning.objective must be of the figures ('worst_bits_per_byte'",
            "got ['loss']",
            tuning={"trials": 1, "space": space, "objective": "loss"},
        )
        refuse(
            "tuning.objective must name at least one figure, got none",
            tuning={"trials": 1, "space": space, "objective": {}},
        )
        refuse(
            "tuning.seed must be none of the final seeds [0, 1], got 1; the final runs are to be",
            tuning={"trials": 1, "space": space, "seed": 1},
        )
        refuse("tuning.trials: ", "got 0", tuning={"trials": 0, "space": space})


class TestVariants:
    def test_a_method_may_have_a_recipe_of_its_own(self, content):
        def load(name):
            assert name == "other"
            return RunConfig(name="other", data={"vocabulary_size": 999})

        methods = {"uniform": [], "own": {"recipe": "other", "training.steps": 7}}
        experiment = parse_experiment(content(methods=methods))
        first, second = build_variants(experiment, load=load)
        assert first.config.data.vocabulary_size == 512
        assert second.config.data.vocabulary_size == 999
        assert second.config.training.steps == 7
        assert second.config.training.weight_decay == 0.0  # the common settings are for it too
        assert second.settings == ("training.steps=7",)

    def test_a_methods_settings_come_after_the_common_ones(self, content):
        methods = {"uniform": {"training.weight_decay": 0.25}}
        (only,) = build_variants(parse_experiment(content(methods=methods)), load=None)
        assert only.config.training.weight_decay == 0.25
