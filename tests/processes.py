"""Runs a module-level function of a test in several processes joined by gloo.

The processes are forked from a server that has imported torch and nothing else: threads of the test
process do no harm, and a start costs a fraction of a second after the first. A process loads the
test's file by its path, so test files need not be importable by name. The rendezvous is a file:
there are no ports to search, and parallel test runs do not meet.

Tests reach :func:`run_processes` through the fixture of the same name in ``conftest.py``.
"""

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOADED = ["torch", "torch.distributed", "hypothesis", "pytest"]
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 2.0


def run_processes(
    function: Callable[..., Any], num_processes: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Calls ``function(*args)`` in every process of a group and returns the results by rank.

    Args:
        function: A function at module level. Its process is a member of the default gloo group and
            has one thread; its warnings are errors.
        num_processes: Size of the group.
        *args: Arguments, the same for every process; pickled, as is each result.
        timeout: Seconds after which all processes are killed.

    Raises:
        AssertionError: If a process fails or time runs out; it holds what the process wrote.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = (inspect.getfile(function), function.__qualname__, num_processes, timeout, args)
        (folder / "job").write_bytes(pickle.dumps(job))
        processes = [
            # The target is one of Python's own functions, so that a process can import it by name.
            context.Process(
                target=runpy.run_path,
                args=(__file__, {"PLACE": (name, rank)}, "__main__"),
                daemon=True,
            )
            for rank in range(num_processes)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
                process.close()
        return [_read(folder / f"result{rank}") for rank in range(num_processes)]


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> None:
    """Returns when all processes have succeeded, and raises what the others wrote if not."""
    deadline = time.monotonic() + timeout
    failed: list[int] = []
    while (running := _ranks(processes, lambda code: code is None)) and time.monotonic() < deadline:
        if not failed and (failed := _ranks(processes, lambda code: code not in (None, 0))):
            # The rest mostly fail for want of the first: wait a little, to show its reason as well.
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)
    failed = _ranks(processes, lambda code: code not in (None, 0))
    if failed:
        raise AssertionError(f"ranks {failed} failed:\n{_outputs(folder, failed)}")
    if running:
        outputs = _outputs(folder, running)
        raise AssertionError(f"ranks {running} did not end within {timeout} s:\n{outputs}")


def _ranks(processes: Sequence[BaseProcess], matches: Callable[[int | None], bool]) -> list[int]:
    return [rank for rank, process in enumerate(processes) if matches(process.exitcode)]


def _outputs(folder: Path, ranks: Sequence[int]) -> str:
    paths = [folder / f"output{rank}" for rank in ranks]
    return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _load(source: str, name: str) -> Callable[..., Any]:
    """Imports the file of the function under a name of its own."""
    spec = importlib.util.spec_from_file_location("module_of_test", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _run(folder: Path, rank: int) -> None:
    """Does one process's share of the job in ``folder``."""
    with (folder / f"output{rank}").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if sys.platform == "linux":
        # The loopback interface: a machine's own name need not resolve.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    source, name, num_processes, timeout, args = _read(folder / "job")
    function = _load(source, name)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=timeout),
    )
    result = function(*args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    # Leave together: a process that closes its sockets early makes the others fail.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _folder, _rank = globals()["PLACE"]
    _run(Path(_folder), _rank)
