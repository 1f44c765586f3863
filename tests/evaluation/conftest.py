import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from drgr.data import Corpus


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The helpers of ``tests/small_runs.py``."""
    return _load()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the whole session: the corpus is prepared once."""
    return tmp_path_factory.getbasetemp() / "drgr-cache"


@pytest.fixture(scope="session")
def corpus(runs: ModuleType, cache: Path) -> Corpus:
    """The committed fixture corpus of four domains."""
    return runs.prepare(cache)
