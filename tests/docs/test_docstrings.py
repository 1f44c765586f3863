"""The examples of the mathematical core run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from drgr import ambiguity, bilevel, budgets, numerics
from drgr.budgets import static

PACKAGES = (numerics, budgets, ambiguity, bilevel)

# Returned by a function that has an example, or what others implement: nothing to call.
RECORDS = {
    "Allocation",
    "BilevelSolution",
    "BudgetProjection",
    "BudgetSelection",
    "Certificate",
    "Choice",
    "DescentState",
    "Directions",
    "Divergence",
    "Estimator",
    "HvpMode",
    "GumbelChoice",
    "Hypergradient",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "MiniBatchSolution",
    "Oracle",
    "OracleCalls",
    "Point",
    "Problem",
    "Pruning",
    "Retraction",
    "Root",
    "SaddlePoint",
    "SecondDerivatives",
    "Selection",
    "SingleLoopResult",
    "SingleLoopRun",
    "SmoothDivergence",
    "SolveStatus",
    "Start",
    "Status",
    "StopReason",
    "WorstCase",
}


def modules():
    found = []
    for package in PACKAGES:
        inside = pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")
        found += [package.__name__, *(entry.name for entry in inside)]
    return found


def public_names():
    return [(package, name) for package in (*PACKAGES, static) for name in package.__all__]


def label(entry):
    return getattr(entry, "__name__", entry)


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, raise_on_error=False)
    assert result.failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for name in modules() for test in finder.find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in tests) >= 35


@pytest.mark.parametrize(("package", "name"), public_names(), ids=label)
def test_public_names_have_an_example(package, name):
    entry = getattr(package, name)
    assert callable(entry), "the core exports functions and classes"
    documented = inspect.getdoc(entry) or ""
    has_example = "Examples:" in documented and ">>> " in documented
    assert has_example != (name in RECORDS), "give an example, or name it as a plain record"


def test_records_are_exported():
    assert {name for _, name in public_names()} >= RECORDS
