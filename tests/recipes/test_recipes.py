"""Every recipe is a complete, valid configuration, and the baselines differ only where they say."""

import json

import pytest

from drgr.data import BUILT_IN_CORPORA
from drgr.recipes import RECIPES
from drgr.training import RunConfig, parse_config


def differences(first: RunConfig, second: RunConfig) -> set[str]:
    a, b = first.model_dump(), second.model_dump()
    return {
        f"{part}.{key}" if isinstance(a[part], dict) else part
        for part in a
        if a[part] != b[part]
        for key in (a[part] if isinstance(a[part], dict) else [""])
        if not isinstance(a[part], dict) or a[part][key] != b[part][key]
    }


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_named_as_they_are_called(name):
    config = RECIPES[name]()
    assert config.name == name
    assert config.data.corpus in BUILT_IN_CORPORA
    # model_copy does not validate; parsing does.
    assert parse_config(json.loads(config.to_json())) == config
    assert (RECIPES[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "drgr"])
def test_the_same_steps_data_and_compute(name):
    demo, other = RECIPES["demo"](), RECIPES[name]()
    assert other.training == demo.training
    assert other.routing.budget.average == demo.routing.budget.average
    assert other.data.corpus == demo.data.corpus


def test_sampling_is_unequal_and_sums_to_one():
    sampling = RECIPES["demo"]().data.sampling
    assert isinstance(sampling, dict)
    assert len(sampling) == 8
    assert sum(sampling.values()) == pytest.approx(1)
    assert max(sampling.values()) > 20 * min(sampling.values())


def test_what_the_recipes_change():
    demo, erm, uniform = RECIPES["demo"](), RECIPES["erm"](), RECIPES["uniform"]()
    qwen = RECIPES["qwen3-moe"]()
    assert differences(demo, qwen) == {"name", "model.kind"}
    assert differences(erm, uniform) == {"name", "data.sampling"}
    assert erm.routing.budget.minimum == erm.routing.budget.maximum == 2
    assert erm.routing.controller.kind == "none"
    assert erm.routing.auxiliary_coefficient > 0
    assert erm.robustness.apply_to == "nothing"
    assert demo.robustness.apply_to == "sampling"
    assert demo.routing.auxiliary_coefficient == 0
