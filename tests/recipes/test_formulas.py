"""Each recipe, run on the small corpus, does what its formula says, step by step."""

import importlib.util
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from drgr.experiments.compute import measure_costs
from drgr.recipes import RECIPES
from drgr.training import override, parse_config

DOMAINS = 4


@pytest.fixture(scope="module")
def runs():
    path = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_recipes", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(runs, tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("cache"))


def small(runs, name, **changes):
    """The recipe's method on the small model and corpus, every step written down."""
    recipe = RECIPES[name]().model_dump(mode="json")
    content = runs.small_content(training__log_every=1, training__steps=6, training__batch_size=8)
    for part in ("robustness", "outer", "routing"):
        content[part] = recipe[part]
    sampling = recipe["data"]["sampling"]
    content["data"]["sampling"] = "uniform" if sampling == "uniform" else "natural"
    for path, value in changes.items():
        part, key = path.split("__")
        content[part][key] = value
    return parse_config(content)


def trained(runs, corpus, path, config):
    _, run = runs.run_small(config, corpus, path)
    steps = [record for record in runs.read_records(path) if record["kind"] == "train"]
    return run, steps


def normalised(weights):
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def test_erm_minimises_the_mean(runs, corpus, tmp_path):
    run, steps = trained(runs, corpus, tmp_path, small(runs, "erm"))
    for record in steps:
        assert record["objective"] == pytest.approx(record["loss"], rel=1e-6)
        assert record["sampling"] == steps[0]["sampling"]
    assert run.outer is None
    assert run.experts is None


def test_uniform_draws_every_domain_alike(runs, corpus, tmp_path):
    _, steps = trained(runs, corpus, tmp_path, small(runs, "uniform"))
    for record in steps:
        assert record["sampling"] == dict.fromkeys(corpus.domains, 0.25)
        assert record["objective"] == pytest.approx(record["loss"], rel=1e-6)


def test_group_dro_takes_exponentiated_gradient_steps(runs, corpus, tmp_path):
    _, steps = trained(runs, corpus, tmp_path, small(runs, "group-dro"))
    assert steps[0]["adversary"] == dict.fromkeys(corpus.domains, 0.25)
    for before, after in pairwise(steps):
        by_hand = normalised(
            {
                name: weight * math.exp(before["domain_loss"][name] / 20.0)
                for name, weight in before["adversary"].items()
            }
        )
        assert after["adversary"] == pytest.approx(by_hand, rel=1e-9)
        # Two of eight sequences are of each domain: the batch weighs domains by q alone.
        weighted = sum(after["adversary"][d] * after["domain_loss"][d] for d in corpus.domains)
        assert after["objective"] == pytest.approx(weighted, rel=1e-5)


def test_doremi_clips_the_excess_and_smoothes(runs, corpus, tmp_path):
    reference = dict(zip(corpus.domains, [0.5, 7.0, 6.0, 1.0], strict=True))
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(reference))
    config = small(runs, "doremi", robustness__reference=str(path))
    _, steps = trained(runs, corpus, tmp_path / "run", config)
    for before, after in pairwise(steps):
        raised = normalised(
            {
                name: weight * math.exp(max(before["domain_loss"][name] - reference[name], 0.0))
                for name, weight in before["adversary"].items()
            }
        )
        by_hand = {name: 0.999 * weight + 0.001 / DOMAINS for name, weight in raised.items()}
        assert after["adversary"] == pytest.approx(by_hand, rel=1e-9)
    assert min(before["domain_loss"][corpus.domains[1]] for before in steps) < 7.0

    # Its result is the average weight, which another run can draw by.
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    averages = {name: entry["average_share"] for name, entry in evaluation["domains"].items()}
    weights = [record["adversary"] for record in steps]
    assert averages == pytest.approx(
        {name: sum(w[name] for w in weights) / len(weights) for name in corpus.domains}
    )
    again = small(runs, "erm", data__sampling=str(tmp_path / "run" / "evaluation.json"))
    _, steps = trained(runs, corpus, tmp_path / "again", again)
    assert steps[0]["sampling"] == pytest.approx(averages)


def test_doge_is_the_identity_metric_without_an_adversary(runs, corpus, tmp_path):
    """The step itself is compared with its formula where outer steps are tested."""
    config = small(
        runs, "doge", outer__begin=2, outer__every=2, robustness__begin=1, robustness__every=2
    )
    run, _ = trained(runs, corpus, tmp_path, config)
    settings = run.outer.settings
    assert not settings.adam_metric
    assert settings.solver is None
    assert not settings.lookahead
    assert settings.anchor_strength == settings.smoothing == 0
    assert run.adversary.weights.adversary.tolist() == pytest.approx([0.25] * 4)
    steps = [r for r in runs.read_records(tmp_path) if r["kind"] == "outer"]
    for before, after in pairwise(steps):
        by_hand = normalised(
            {d: w * math.exp(2.0 * after["gain"][d]) for d, w in before["mixture"].items()}
        )
        assert after["mixture"] == pytest.approx(by_hand, rel=1e-6)


def test_drmoet_weighs_experts_by_their_mean_losses(runs, corpus, tmp_path):
    run, steps = trained(runs, corpus, tmp_path, small(runs, "drmoet"))
    weights = run.experts.weights
    assert weights.shape == (2, 8)
    assert weights.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert weights.std(dim=1).min() > 0
    assert any(abs(r["objective"] - r["loss"]) > 1e-7 for r in steps[2:])


def test_drgr_draws_by_kl_weights_of_training_losses_from_a_later_step_on(runs, corpus, tmp_path):
    config = small(runs, "drgr", robustness__begin=4, robustness__every=2)
    run, steps = trained(runs, corpus, tmp_path, config)
    tokens = config.training.batch_size * config.data.sequence_length
    layers = len(run.attachment.layer_names)
    assert [record["spend"] / (layers * tokens) for record in steps] == [1] * 6
    assert run.config.routing.traffic.coefficient > 0
    assert run.outer is None
    assert all(record["batches_over"] == 0 for record in steps)
    uniform = 1 / len(corpus.domains)
    assert all(share == uniform for share in steps[0]["sampling"].values())
    adversary = run.adversary
    adversary.refresh()
    tilts = [math.exp(float(loss) / 0.38) for loss in adversary.losses]
    expected = [tilt / sum(tilts) for tilt in tilts]
    assert adversary.weights.sampling.tolist() == pytest.approx(expected, rel=1e-6)
    assert max(expected) > 1.05 * uniform


def test_drgr_has_the_flops_of_erm_in_more_steps(corpus):
    erm, ours = RECIPES["erm"](), RECIPES["drgr"]()
    costs = {
        config.name: measure_costs(override(config, ["data.sampling=uniform"]), corpus)
        for config in (erm, ours)
    }
    limit = costs["erm"].least(erm.training.steps)
    assert 0.95 * limit < costs["drgr"].most(ours.training.steps) <= limit
    assert ours.training.steps > erm.training.steps
    only_steps = ours.training.model_copy(update={"steps": erm.training.steps})
    assert only_steps == erm.training
    assert ours.data == RECIPES["demo"]().data


def test_drgr_bilevel_looks_ahead_inside_its_budget(runs, corpus, tmp_path):
    config = small(
        runs,
        "drgr-bilevel",
        outer__begin=2,
        outer__every=2,
        robustness__begin=1,
        robustness__every=2,
    )
    run, steps = trained(runs, corpus, tmp_path, config)
    assert run.outer.settings.lookahead
    assert run.outer.settings.adam_metric
    assert all(record["batches_over"] == 0 for record in steps)
    outer = [r for r in runs.read_records(tmp_path) if r["kind"] == "outer"]
    assert outer[-1]["mixture"] != outer[0]["mixture"]
    assert steps[-1]["sampling"] == outer[-1]["mixture"]
