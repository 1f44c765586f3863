"""The divergences under test, one fixture for each kind, and their oracles."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    """Loads a file of this folder by its path: tests are not importable by name."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_of_ambiguity", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_ORACLES = _load("oracles")
_CASES, _SIZED = _ORACLES.CASES, _ORACLES.SIZED


@pytest.fixture(scope="session")
def oracles() -> ModuleType:
    """The file of that name."""
    return _ORACLES


def _one_of(candidates, is_wanted=bool):
    """Returns a fixture that runs a test once for each of the candidates that are wanted."""
    wanted = [candidate for candidate in candidates if is_wanted(candidate)]

    @pytest.fixture(scope="session", params=wanted, ids=[each.name for each in wanted])
    def chosen(request):
        return request.param

    return chosen


# Every divergence: ``case.divergence``, its oracle ``case.exact``, and those of one kind.
case = _one_of(_CASES)
f_case = _one_of(_CASES, lambda case: not case.is_spectral)
bounded = _one_of(_CASES, lambda case: not case.is_spectral and case.exact.slope_end < math.inf)
capped = _one_of(_CASES, lambda case: not case.is_spectral and case.exact.cap < math.inf)
ball = _one_of(_CASES, lambda case: "radius" in case.modes)
saturating = _one_of(_CASES, lambda case: "radius" in case.modes and case.exact.at_zero < math.inf)
endless = _one_of(_CASES, lambda case: "radius" in case.modes and case.exact.at_zero == math.inf)
smooth_ball = _one_of(_CASES, lambda case: "radius" in case.modes and case.is_smooth)
priced = _one_of(_CASES, lambda case: "penalty" in case.modes)
smooth = _one_of(_CASES, lambda case: case.is_smooth)
rough = _one_of(_CASES, lambda case: not case.is_smooth)
plain_spectral = _one_of(_CASES, lambda case: case.is_spectral and not case.modes)
smoothed_spectral = _one_of(_CASES, lambda case: case.is_spectral and case.modes)

# Every divergence in every mode that it takes: ``sized.case``, ``sized.level(radius=, penalty=)``.
sized = _one_of(_SIZED)
smooth_sized = _one_of(_SIZED, lambda sized: sized.case.is_smooth)
