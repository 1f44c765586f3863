"""Makes the problems importable as fixtures."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "bilevel_problems", Path(__file__).with_name("problems.py")
)
assert _SPEC
assert _SPEC.loader
_PROBLEMS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_PROBLEMS)


@pytest.fixture(scope="session")
def ridge():
    return _PROBLEMS.ridge


@pytest.fixture(scope="session")
def quadratic_sum():
    return _PROBLEMS.quadratic_sum


@pytest.fixture(scope="session")
def drawn():
    return _PROBLEMS.drawn
