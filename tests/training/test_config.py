"""Configurations: round trips, overrides, errors that name key, value and remedy, fingerprints."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.errors import ConfigError
from drgr.recipes import RECIPES
from drgr.training import RunConfig, known_keys, override, parse_config, read_config

DEFAULT = parse_config({})
LOSSES: list[dict[str, Any]] = [
    {"kind": "global-balance"},
    {"kind": "micro-balance"},
    {"kind": "sequence-balance"},
    {"kind": "top1-balance", "temperature": 0.5},
    {"kind": "router-z"},
    {"kind": "tsallis", "order": 2.0},
    {"kind": "specialisation-balance", "entropy_coefficient": -0.1},
    {"kind": "routing-information"},
    {"kind": "activation-locality", "sharpness": 10.0},
    {"kind": "chunk-sparsity", "chunk_length": 8, "adaptive": {"warmup": 20, "window": 5}},
    {"kind": "expert-router-coupling", "tolerance": 0.5, "noise": False},
    {"kind": "expert-specialisation"},
    {"kind": "layer-coupling"},
    {"kind": "pool-balance"},
]
ALTERNATIVES = [
    DEFAULT,
    parse_config({"model": {"kind": "pretrained", "path": "somewhere"}}),
    parse_config({"routing": {"controller": {"kind": "sign-bias"}}}),
    parse_config({"routing": {"controller": {"kind": "none"}}}),
    parse_config({"routing": {"controller": {"kind": "rms-bias"}}}),
    parse_config({"routing": {"controller": {"kind": "subgradient"}}}),
    parse_config({"routing": {"controller": {"kind": "congestion"}}}),
    parse_config({"routing": {"controller": {"kind": "bip"}}}),
    parse_config({"routing": {"controller": {"kind": "sinkhorn"}}}),
    parse_config({"routing": {"controller": {"kind": "selective-sinkhorn"}}}),
    parse_config({"routing": {"scores": {"kind": "softmax"}}}),
    parse_config({"routing": {"scores": {"kind": "sigmoid"}}}),
    parse_config({"routing": {"scores": {"kind": "cosine"}}}),
    parse_config({"routing": {"scores": {"kind": "k-means"}}}),
    parse_config({"routing": {"scores": {"kind": "norm"}}}),
    parse_config({"routing": {"scores": {"kind": "relu-rms"}}}),
    parse_config({"routing": {"scores": {"kind": "tsallis-hybrid"}}}),
    parse_config({"routing": {"scores": {"kind": "noisy"}}}),
    parse_config({"routing": {"scores": {"kind": "gaussian"}}}),
    parse_config({"routing": {"scores": {"kind": "stochastic"}}}),
    parse_config({"routing": {"selection": {"kind": "top-p"}}}),
    parse_config({"routing": {"selection": {"kind": "open"}, "scores": {"kind": "norm"}}}),
    parse_config({"routing": {"selection": {"kind": "threshold"}}}),
    parse_config({"routing": {"selection": {"kind": "sequence"}}}),
    parse_config({"routing": {"selection": {"kind": "layers", "averages": [1, 2, 3, 2]}}}),
    parse_config(
        {"routing": {"selection": {"kind": "progressive", "first": [4], "switch_step": 9}}}
    ),
    parse_config({"outer": {"solver": {"kind": "cg"}}}),
    parse_config({"outer": {"solver": {"kind": "neumann"}}}),
    *(parse_config({"routing": {"losses": [{"coefficient": 0.5, **loss}]}}) for loss in LOSSES),
]

# Another valid value of every setting of the default configuration. A new setting must be added
# here, and by that somebody decides whether a run may be resumed with another value of it.
OTHER_VALUES: dict[str, Any] = {
    "name": "other",
    "data.corpus": "drgr-16",
    "data.vocabulary_size": 4096,
    "data.tokenizer": "gpt2",
    "data.sequence_length": 128,
    "data.skip_unreadable": True,
    "data.sampling": "uniform",
    "data.unseen": ["chem"],
    "model.kind": "tiny-qwen3-moe",
    "model.hidden_size": 64,
    "model.expert_size": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_experts": 16,
    "routing.budget.unit": "flops",
    "routing.budget.minimum": 2,
    "routing.budget.maximum": 8,
    "routing.budget.average": 2.5,
    "routing.scores.kind": "sigmoid",
    "routing.selection.kind": "sequence",
    "routing.controller.kind": "none",
    "routing.controller.smoothing": 0.5,
    "routing.controller.target": [1.0, 2.0],
    "outer.variables": ["mixture"],
    "outer.every": 10,
    "outer.begin": 30,
    "outer.windows": 3,
    "outer.update": "gradient",
    "outer.metric": "identity",
    "outer.solver.kind": "cg",
    "outer.curvature": "hessian",
    "outer.horizon": 5.0,
    "outer.rate": 1.0,
    "outer.anchor_strength": 0.5,
    "outer.anchor": "sampling",
    "outer.smoothing": 0.25,
    "outer.learning_rate": 0.01,
    "outer.gates.rate": 1.0,
    "outer.gates.penalty": 0.5,
    "outer.gates.group": "expert",
    "routing.auxiliary_coefficient": 0.01,
    "routing.losses": [{"kind": "router-z", "coefficient": 1e-3}],
    "routing.price_smoothing": 0.5,
    "routing.link_gates": True,
    "routing.traffic.measure": False,
    "routing.traffic.coefficient": 0.01,
    "robustness.groups": "experts",
    "robustness.apply_to": "objective",
    "robustness.divergence": "chi-square",
    "robustness.penalty": 0.125,
    "robustness.radius": None,
    "robustness.losses": "train",
    "robustness.unit": "nats-per-token",
    "robustness.reference": "losses.json",
    "robustness.nominal": "sampling",
    "robustness.clip_excess": True,
    "robustness.uniform_share": 0.1,
    "robustness.smoothing": 0.5,
    "robustness.begin": 10,
    "robustness.every": 5,
    "robustness.windows": 4,
    "robustness.alarm_below": 2.0,
    "training.steps": 100,
    "training.batch_size": 8,
    "training.accumulation": 2,
    "training.learning_rate": 1e-3,
    "training.final_learning_rate": 0.5,
    "training.warmup_steps": 5,
    "training.weight_decay": 0.0,
    "training.beta1": 0.8,
    "training.beta2": 0.99,
    "training.clip_norm": 0.5,
    "training.seed": 1,
    "training.device": "cpu",
    "training.precision": "float32",
    "training.compile": True,
    "training.gradient_checkpointing": True,
    "training.log_every": 5,
    "training.evaluate_every": 50,
    "training.evaluation_windows": 4,
    "training.test_windows": 32,
    "training.checkpoint_every": 50,
    "training.keep": 3,
}
PRESENTATION = {"name", "training.log_every", "training.checkpoint_every", "training.keep"}


def leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested table by dotted path."""
    found = {}
    for key, value in table.items():
        path = f"{prefix}{key}"
        found |= leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def at(config: RunConfig, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config.model_dump(mode="json")
    for key in path.split("."):
        if not isinstance(value, dict | list) or (isinstance(value, list) and not value):
            raise KeyError(path)
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


class TestFiles:
    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
    @pytest.mark.parametrize("suffix", [".json", ".yaml"])
    def test_round_trip_of_recipes(self, tmp_path, recipe, suffix):
        config = recipe()
        path = tmp_path / f"config{suffix}"
        path.write_text(
            config.to_json() if suffix == ".json" else yaml.safe_dump(json.loads(config.to_json()))
        )
        assert read_config(path) == config
        assert json.loads(config.to_json()) == config.model_dump(mode="json")

    def test_toml(self, tmp_path):
        path = tmp_path / "run.toml"
        path.write_text(
            'name = "mine"\n[data]\nsampling = {email = 0.5, chem = 2}\n'
            "[training]\nlearning_rate = 1e-3\ncompile = true\n"
            '[routing.controller]\nkind = "sign-bias"\nstep_size = 0.5\n'
        )
        config = read_config(path)
        assert config.name == "mine"
        assert config.data.sampling == {"email": 0.5, "chem": 2}
        assert config.training.learning_rate == 1e-3
        assert config.routing.controller.kind == "sign-bias"

    text = st.text(min_size=1, max_size=20)
    share = st.floats(0, 1, exclude_max=True)

    @settings(max_examples=50, deadline=None)
    @given(
        name=text,
        rate=st.floats(min_value=0, exclude_min=True, max_value=1e300),
        share=share,
        sampling=st.one_of(
            st.just("natural"), st.dictionaries(text, st.floats(0, 1e300), min_size=1, max_size=3)
        ),
        budget=st.tuples(st.integers(0, 3), st.floats(0, 1), st.integers(1, 4)),
        flag=st.booleans(),
        radius=st.one_of(st.none(), st.floats(0, 1e6)),
    )
    def test_json_keeps_every_value(
        self, tmp_path_factory, name, rate, share, sampling, budget, flag, radius
    ):
        minimum, fraction, more = budget
        content = {
            "name": name,
            "data": {"sampling": sampling, "skip_unreadable": flag},
            "routing": {
                "budget": {
                    "minimum": minimum,
                    "maximum": minimum + more,
                    "average": max(minimum + fraction * more, 1e-9),
                },
                "price_smoothing": share,
            },
            "robustness": {"radius": radius, "penalty": 1.0 if radius is None else None},
            "training": {"learning_rate": rate},
        }
        config = parse_config(content)
        path = tmp_path_factory.mktemp("config") / "config.json"
        path.write_text(config.to_json(), encoding="utf-8")
        assert read_config(path) == config
        assert read_config(path).fingerprint("c") == config.fingerprint("c")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.json", b'{"name": ', "cannot be read"),
            ("a.toml", b"name = ", "cannot be read"),
            ("a.yaml", b"name: [1", "cannot be read"),
            ("a.yaml", b"\xff\xfe\x00name", "cannot be read"),
            ("a.json", b"[1, 2]", r"must hold a table of settings, got \[1, 2\]"),
            ("a.yaml", b"", "must hold a table of settings, got None"),
        ],
    )
    def test_broken_files(self, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            read_config(path)
        assert str(path) in str(caught.value)

    def test_missing_file_and_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="does not exist; name a recipe or a file"):
            read_config(tmp_path / "no.toml")
        (tmp_path / "folder.json").mkdir()
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(tmp_path / "folder.json")


class TestOverride:
    @pytest.mark.parametrize(
        ("assignment", "path", "value"),
        [
            ("training.steps=7", "training.steps", 7),
            ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
            ("training.learning_rate=0.5", "training.learning_rate", 0.5),
            ("training.compile=true", "training.compile", True),
            ("name=with = sign", "name", "with = sign"),
            ("data.sampling=uniform", "data.sampling", "uniform"),
            ("data.sampling={a: 1, b: 0.5}", "data.sampling", {"a": 1.0, "b": 0.5}),
            ("data.tokenizer=some/tokenizer", "data.tokenizer", "some/tokenizer"),
            ("data.tokenizer=null", "data.tokenizer", None),
            ("robustness.reference=a/b.json", "robustness.reference", "a/b.json"),
            (" training.steps = 7", "training.steps", 7),
        ],
    )
    def test_kinds_of_values(self, assignment, path, value):
        assert at(override(DEFAULT, [assignment]), path) == value

    def test_whole_tables_exchange_alternatives(self):
        changed = override(
            DEFAULT,
            [
                "model={kind: pretrained, path: somewhere}",
                "routing.controller={kind: sign-bias, step_size: 0.1}",
                "robustness={penalty: null, radius: 0.3}",
            ],
        )
        assert at(changed, "model") == {"kind": "pretrained", "path": "somewhere"}
        controller = {"kind": "sign-bias", "step_size": 0.1, "target": None}
        assert at(changed, "routing.controller") == controller
        assert at(changed, "robustness.radius") == 0.3

    def test_entries_of_lists_have_numbers(self):
        losses = ["{kind: router-z, coefficient: 1}", "{kind: tsallis, coefficient: 2}"]
        listed = override(DEFAULT, [f"routing.losses=[{', '.join(losses)}]"])
        changed = override(listed, ["routing.losses.1.order=3", "routing.losses.1.coefficient=4"])
        assert at(changed, "routing.losses.0") == {"kind": "router-z", "coefficient": 1.0}
        tsallis = {"kind": "tsallis", "coefficient": 4.0, "order": 3.0}
        assert at(changed, "routing.losses.1") == tsallis
        with pytest.raises(ConfigError, match=r"routing.losses.2 is not a setting"):
            override(listed, ["routing.losses.2.order=3"])

    def test_the_short_form_of_a_loss(self):
        short = parse_config({"routing": {"auxiliary_coefficient": 0.5}}).routing
        entry = {"kind": "global-balance", "coefficient": 0.5}
        long = parse_config({"routing": {"losses": [entry]}}).routing
        assert short.all_losses == long.all_losses == long.losses
        assert short.losses == ()

    def test_later_assignments_win_and_the_original_stays(self):
        changed = override(DEFAULT, ["training.steps=1", "training.steps=2"])
        assert changed.training.steps == 2
        assert DEFAULT.training.steps != 2
        assert override(DEFAULT, []) == DEFAULT

    def test_every_known_key_can_be_set(self):
        """Each key is reachable in some alternative; its own value changes nothing."""
        for path in known_keys():
            reached = 0
            for config in ALTERNATIVES:
                try:
                    value = at(config, path)
                except KeyError:
                    continue
                assert override(config, [f"{path}={json.dumps(value)}"]) == config
                reached += 1
            assert reached, path

    def test_known_keys_are_all_there(self):
        reached = itertools.chain.from_iterable(leaves(c.model_dump()) for c in ALTERNATIVES)
        assert set(reached) <= set(known_keys())
        assert known_keys() == sorted(set(known_keys()))

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("training.steps", r"must have the form path=value, got 'training.steps'"),
            ("=3", "must have the form path=value"),
            ("training.stepz=3", "training.stepz is not a setting; the nearest is training.steps"),
            ("trainin.steps=3", "trainin is not a setting; the nearest is training"),
            ("name.x=3", "name holds one value, no settings of its own"),
            ("data.sampling.email=3", "data.sampling holds one value"),
            ("routing.losses.0.coefficient=1", "routing.losses.0 is not a setting"),
            ("routing.losses.0=1", "routing.losses.0 is not a setting"),
            ("training.steps=[1", r"'training.steps=\[1' is not YAML"),
            ("routing.controller=quantile", "routing.controller: "),
        ],
    )
    def test_refusals(self, assignment, message):
        with pytest.raises(ConfigError, match=message):
            override(DEFAULT, [assignment])

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from(known_keys()), st.sampled_from(["x", "_", "0"]))
    def test_a_misspelt_key_names_the_one_meant(self, path, suffix):
        config = next(c for c in ALTERNATIVES if path in leaves(c.model_dump()) or _has(c, path))
        with pytest.raises(ConfigError) as caught:
            override(config, [f"{path}{suffix}=1"])
        assert f"{path}{suffix} is not a setting; the nearest is {path}" in str(caught.value)


def _has(config: RunConfig, path: str) -> bool:
    try:
        at(config, path)
    except KeyError:
        return False
    return True


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            (
                {"routing": {"budget": {"minimum": 3, "maximum": 2, "average": 2}}},
                ["routing.budget: minimum must be at most maximum, got 3 and 2", "raise the max"],
            ),
            (
                {"routing": {"budget": {"minimum": 2, "average": 1.5}}},
                ["routing.budget: average must be at least minimum, got 1.5 and 2"],
            ),
            (
                {"routing": {"budget": {"maximum": 4, "average": 5}}},
                ["routing.budget: average must be at most maximum, got 5 and 4"],
            ),
            (
                {"routing": {"budget": {"minimum": 1.5}}},
                ["routing.budget: minimum and maximum must be whole numbers", "1.5"],
            ),
            (
                {"routing": {"traffic": {"measure": False, "coefficient": 0.5}}},
                ["routing.traffic: coefficient must be 0 where nothing is measured, got 0.5"],
            ),
            (
                {"routing": {"selection": {"kind": "threshold", "level": 0.5, "per_expert": True}}},
                ["routing.selection: per_expert needs learned thresholds, got level 0.5; set"],
            ),
            (
                {"routing": {"selection": {"kind": "top-p", "p": 1.5}}},
                ["routing.selection.p: ", "less than or equal to 1", "got 1.5"],
            ),
            (
                {"routing": {"selection": {"kind": "layers"}}},
                ["routing.selection: either averages or both shape and total must be set, got"],
            ),
            (
                {"routing": {"selection": {"kind": "layers", "shape": "wave"}}},
                ["routing.selection: either averages or both", "shape wave and total None"],
            ),
            (
                {"routing": {"selection": {"kind": "layers", "averages": [2], "total": 4}}},
                ["routing.selection: either averages or both", "total 4; set the others to null"],
            ),
            (
                {"routing": {"losses": [{"kind": "router-q", "coefficient": 1}]}},
                ["routing.losses.0: ", "'router-q'", "'router-z'"],
            ),
            (
                {"routing": {"losses": [{"kind": "router-z"}]}},
                ["routing.losses.0.coefficient: Field required"],
            ),
            (
                {"routing": {"losses": [{"kind": "tsallis", "coefficient": 1, "ordr": 2}]}},
                ["routing.losses.0.ordr is not a setting; the nearest is routing.losses.0.order"],
            ),
            (
                {"routing": {"losses": [{"kind": "tsallis", "coefficient": 1, "order": 0}]}},
                ["routing.losses.0.order: ", "greater than 0", "got 0"],
            ),
            (
                {"routing": {"losses": [{"kind": "router-z", "coefficient": 1}] * 2}},
                ["routing: losses must hold one entry of a kind, got more of router-z"],
            ),
            (
                {
                    "routing": {
                        "auxiliary_coefficient": 1,
                        "losses": [{"kind": "global-balance", "coefficient": 1}],
                    }
                },
                ["got more of global-balance", "auxiliary_coefficient counts as global-balance"],
            ),
            (
                {
                    "routing": {
                        "losses": [{"kind": "chunk-sparsity", "coefficient": 0, "adaptive": {}}]
                    }
                },
                ["routing.losses.0: coefficient must be above 0 where it is adaptive, got 0"],
            ),
            (
                {
                    "routing": {
                        "losses": [
                            {"kind": "chunk-sparsity", "coefficient": 1, "adaptive": {"warmup": 9}}
                        ]
                    }
                },
                ["routing.losses.0.adaptive: warmup must be at least two windows, 200 steps, got"],
            ),
            (
                {"robustness": {"penalty": 2.0, "radius": 0.1}},
                ["robustness: exactly one of penalty and radius", "penalty 2.0 and radius 0.1"],
            ),
            ({"robustness": {"penalty": None}}, ["robustness: exactly one of"]),
            ({"training": {"steps": 0}}, ["training.steps: ", "greater than 0", "got 0"]),
            ({"training": {"learning_rate": math.nan}}, ["training.learning_rate: ", "got nan"]),
            ({"training": {"learning_rate": math.inf}}, ["training.learning_rate: ", "got inf"]),
            ({"training": {"beta1": 1.0}}, ["training.beta1: ", "less than 1", "got 1.0"]),
            ({"training": {"device": "tpu"}}, ["training.device: ", "'cuda'", "got 'tpu'"]),
            ({"data": {"sampling": {"a": -1}}}, ["data.sampling", "got -1"]),
            # A domain may bear the name of a kind of controller or model.
            ({"data": {"sampling": {"none": -1}}}, ["data.sampling.none: ", "got -1"]),
            ({"data": {"sampling": "equal"}}, ["data.sampling", "'uniform'", "got 'equal'"]),
            ({"data": {"vocabulary_size": 100}}, ["data.vocabulary_size: ", "258", "got 100"]),
            ({"model": {"kind": "dense"}}, ["model: ", "tiny-olmoe"]),
            ({"model": {"kind": "pretrained"}}, ["model.path: "]),
            (
                {"model": {"kind": "tiny-olmoe", "hiden_size": 4}},
                ["model.hiden_size is not a setting; the nearest is model.hidden_size"],
            ),
            (
                {"routing": {"controller": {"kind": "none", "smoothing": 0.1}}},
                ["routing.controller.smoothing is not a setting"],
            ),
            ({"trainig": {}}, ["trainig is not a setting; the nearest is training"]),
        ],
    )
    def test_path_value_and_remedy_are_named(self, content, parts):
        with pytest.raises(ConfigError) as caught:
            parse_config(content)
        for part in parts:
            assert part in str(caught.value)

    def test_every_problem_has_a_line(self):
        with pytest.raises(ConfigError) as caught:
            parse_config({"name": 3, "training": {"steps": -1, "keep": 0}})
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0] for line in lines] == ["name", "training.steps", "training.keep"]


class TestFingerprint:
    def test_another_value_of_every_setting_is_known(self):
        assert set(OTHER_VALUES) == set(leaves(DEFAULT.model_dump(mode="json")))

    @pytest.mark.parametrize("path", [p for p, v in OTHER_VALUES.items() if v is not None])
    def test_only_presentation_is_left_out(self, path):
        content = DEFAULT.model_dump(mode="json")
        *parents, key = path.split(".")
        table = content
        for parent in parents:
            table = table[parent]
        table[key] = OTHER_VALUES[path]
        if path == "routing.controller.kind":
            del table["smoothing"], table["target"]
        changed = parse_config(content)
        assert changed != DEFAULT
        is_same = changed.fingerprint("content") == DEFAULT.fingerprint("content")
        # The name or path of a corpus may change; its content may not.
        assert is_same == (path in PRESENTATION or path == "data.corpus")

    def test_the_corpus_counts(self):
        assert DEFAULT.fingerprint("a") != DEFAULT.fingerprint("b")

    def test_configurations_cannot_be_changed(self):
        with pytest.raises(ValueError, match="frozen"):
            DEFAULT.training.steps = 5  # type: ignore[misc]


def test_paths_of_references_are_kept(tmp_path: Path):
    config = parse_config({"robustness": {"reference": str(tmp_path / "losses.json")}})
    assert config.robustness.reference == tmp_path / "losses.json"
    assert json.loads(config.to_json())["robustness"]["reference"] == str(tmp_path / "losses.json")
