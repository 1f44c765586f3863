"""The table of methods is complete, and every entry says where it comes from."""

import inspect

import pytest

from drgr import routing
from drgr.routing import losses, scores, selection
from drgr.routing.methods import METHODS, PRICES
from drgr.routing.scores import Scorer

# Public, but no method of its own.
NOT_METHODS = {"AdaptiveWeight", "routing_loss"}


def implementations(kind):
    return {method.implementation for method in METHODS if method.kind == kind}


def classes(module):
    found = (getattr(module, name) for name in module.__all__)
    return {one for one in found if inspect.isclass(one)}


def test_every_scorer_is_listed():
    concrete = {
        one for one in classes(scores) if issubclass(one, Scorer) and not inspect.isabstract(one)
    }
    assert implementations("score") == concrete


def test_every_controller_is_listed():
    promised = {"prices", "observe", "update", "state_dict", "load_state_dict"}
    concrete = {
        one
        for one in classes(routing)
        if promised <= set(dir(one)) and not getattr(one, "_is_protocol", False)
    }
    assert implementations("price") == concrete


def test_every_selector_is_listed():
    promised = {"select", "observe", "update", "load_state_dict"}
    concrete = {
        one
        for one in classes(selection)
        if promised <= set(dir(one)) and not getattr(one, "_is_protocol", False)
    }
    assert implementations("selection") == concrete


def test_every_loss_is_listed():
    functions = {
        getattr(losses, name)
        for name in losses.__all__
        if name.endswith("_loss") and name not in NOT_METHODS
    }
    assert implementations("loss") == functions


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_says_what_it_is(method):
    assert method.summary.endswith((".", ":")) or len(method.summary) > 20
    assert method.source
    assert method.status
    assert "`" not in method.summary


def test_names_are_those_of_the_settings():
    from pydantic import TypeAdapter

    from drgr.training.routing_config import ControllerConfig

    adapter = TypeAdapter(ControllerConfig)
    for method in PRICES:
        assert adapter.validate_python({"kind": method.name}).kind == method.name


def test_names_are_unique():
    names = [(method.kind, method.name) for method in METHODS]
    assert len(set(names)) == len(names)
