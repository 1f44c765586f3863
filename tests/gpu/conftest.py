"""Every test of this folder needs a CUDA device, and is skipped with a message without one."""

import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location(
    "small_runs", Path(__file__).parents[1] / "small_runs.py"
)
_small_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_small_runs)


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")


@pytest.fixture
def small_runs():
    return _small_runs
