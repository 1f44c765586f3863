"""Runs killed by SIGKILL at random moments resume to the straight result.

The test runs this file as a program: it forks one child per kill, so that importing is paid for
once. The program is single-threaded, which makes forking safe.
"""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

import pytest

from drgr.data import Corpus

SETTINGS = {
    "training__steps": 10,
    "training__checkpoint_every": 1,
    "training__log_every": 1,
    "training__evaluate_every": 3,
    "training__test_windows": 2,
}
KILLS = 6


@pytest.mark.slow
def test_kills_at_random_moments(
    runs: ModuleType, corpus: Corpus, cache: Path, tmp_path, seed_from_test_name
):
    config = runs.small_config(**SETTINGS)
    runs.run_small(config, corpus, tmp_path / "straight")
    command = [sys.executable, __file__, str(cache), str(tmp_path / "a"), str(seed_from_test_name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "finished"
    assert done.stdout.split().count("killed") == KILLS
    runs.assert_same(runs.results(tmp_path / "a"), runs.results(tmp_path / "straight"))
    names = {entry.name for entry in (tmp_path / "a" / "checkpoints").iterdir()}
    assert names == {"step-00000009", "step-00000010"}


def main(cache: Path, path: Path, seed: int) -> None:
    """Trains in children until one is not killed; each is killed soon after a checkpoint."""
    import torch

    torch.set_num_threads(1)
    source = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_program", source)
    assert spec is not None
    assert spec.loader is not None
    runs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = runs
    spec.loader.exec_module(runs)
    corpus = runs.prepare(cache)
    config = runs.small_config(**SETTINGS)
    generator = random.Random(seed)
    for number in range(KILLS + 1):
        child = os.fork()
        if child == 0:
            train_and_leave(runs, config, corpus, path)
        if number < KILLS:
            wait_for_change(path / "checkpoints")
            # A step and its save take about 50 ms, so the kill comes anywhere in the next one.
            time.sleep(generator.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        print("killed" if killed else "finished", flush=True)  # noqa: T201 - the program's answer
        if not killed and os.waitstatus_to_exitcode(status) != 0:
            raise SystemExit(1)


def train_and_leave(runs: ModuleType, config, corpus: Corpus, path: Path) -> None:
    """The child: trains on from the last checkpoint and exits."""
    code = 1
    try:
        runs.run_small(config, corpus, path, resume=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for_change(checkpoints: Path, timeout: float = 30.0) -> None:
    """Returns when another checkpoint has appeared."""
    deadline = time.monotonic() + timeout
    before = names_in(checkpoints)
    while names_in(checkpoints) == before and time.monotonic() < deadline:
        time.sleep(0.001)


def names_in(checkpoints: Path) -> set[str]:
    try:
        return {name for name in os.listdir(checkpoints) if name.startswith("step-")}
    except FileNotFoundError:
        return set()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
