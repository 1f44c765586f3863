"""A comparison killed by SIGKILL, or stopped, goes on where it was and makes no finished run again.

The first test runs this file as a program, which forks one comparison per kill, so that importing
is paid for once; it is single-threaded, which makes forking safe.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

KILLS = 4


@pytest.mark.slow
def test_kills_at_random_moments(content, corpus, cache, tmp_path, seed_from_test_name):
    entries = content(seeds=5)
    (tmp_path / "content.json").write_text(json.dumps(entries))
    (tmp_path / "acts.json").write_text(json.dumps({"uniform": {"seconds": 0.2}}))
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(cache), str(seed_from_test_name)],
        env={**os.environ, "FAKE_RUNS": str(tmp_path / "acts.json")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["killed"] * KILLS + ["finished"]
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert len(runs) == 10
    assert {run["status"] for run in runs} == {"finished"}
    assert {run["attempts"] for run in runs} == {1}
    # The fake run refuses to begin anew where it was begun, and to resume where it was not. At most
    # the two that were under way at a kill were started again.
    began = [line.split() for line in (tmp_path / "toy" / "began.txt").read_text().splitlines()]
    starts = Counter(name for name, *_ in began)
    assert len(starts) == 10
    assert sum(starts.values()) <= 10 + 2 * KILLS
    finished_before = json.loads((tmp_path / "finished.json").read_text())
    assert finished_before  # or the kills came too early to show anything
    for name, count in finished_before.items():
        assert starts[name] == count


def test_a_signal_stops_runs_and_is_told(compare, tmp_path):
    def stop() -> None:
        wait_for_a_start(tmp_path / "toy" / "began.txt")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    ran = compare(runs={"uniform": {"seconds": 30.0}}, parallel=1)
    thread.join()
    assert ran.stopped == signal.SIGTERM
    assert ran.lines == []
    again = compare()
    assert again.stopped == 0
    assert sorted(entry[:2] for entry in again.began) == [
        ["0-uniform-seed-0", "False"],
        ["0-uniform-seed-0", "True"],
        *([name, "False"] for name in ("0-uniform-seed-1", "1-kl-seed-0", "1-kl-seed-1")),
    ]


@pytest.mark.parametrize("parallel", [1, 4])
def test_threads_are_shared(monkeypatch, parallel):
    from drgr.experiments import processes

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert processes.threads_each(parallel) == {1: 6, 4: 1}[parallel]


def main(path: Path, cache: Path, seed: int) -> None:
    """Compares in children until one is not killed."""
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(
        "conftest_of_program", Path(__file__).with_name("conftest.py")
    )
    assert spec is not None
    assert spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    entries = json.loads((path / "content.json").read_text())
    comparison = tools.comparison_of(entries, path / "toy", cache)
    generator = random.Random(seed)
    for number in range(KILLS + 1):
        child = os.fork()
        if child == 0:
            compare_and_leave(tools, comparison)
        if number < KILLS:
            wait_for_a_start(path / "toy" / "began.txt")
            time.sleep(generator.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "finished", flush=True)  # noqa: T201
        if number == KILLS - 1:
            keep_finished(comparison, path)
    with tools.Store.open(comparison.store, comparison.content) as store:
        runs = [{"status": run.status, "attempts": run.attempts} for run in store.runs()]
    (path / "runs.json").write_text(json.dumps(runs))


def keep_finished(comparison, path: Path) -> None:
    """Writes how often each run that the store calls finished was started by now."""
    from drgr.experiments import Store

    began = [line.split()[0] for line in (path / "toy" / "began.txt").read_text().splitlines()]
    with Store.open(comparison.store, comparison.content) as store:
        names = [run.name for run in store.runs() if run.status == "finished"]
    (path / "finished.json").write_text(json.dumps({name: began.count(name) for name in names}))


def compare_and_leave(tools, comparison) -> None:
    code = 1
    try:
        tools.run_comparison(comparison, parallel=2, retry_failed=False, report=lambda _: None)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for_a_start(path: Path, timeout: float = 30.0) -> None:
    """Returns when another run has begun."""
    deadline = time.monotonic() + timeout
    before = path.stat().st_size if path.exists() else 0
    while time.monotonic() < deadline:
        if path.exists() and path.stat().st_size > before:
            return
        time.sleep(0.005)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
