"""Several commands at a time, each in a process of its own.

A run holds a lock on a file beside its directory, and its processes inherit it: where the program
was killed and its processes live on, the next one waits for them instead of writing between them.
"""

import fcntl
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from drgr.errors import ConfigError
from drgr.training.signals import deferred_signals

_POLL_SECONDS = 0.05
Command = Sequence[str]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Commands of one run, one after another.

    Attributes:
        name: The run's name.
        lock: The file that is locked while one of them runs.
        log: Where their output goes.
        commands: Returns them, once the lock is held: what is left to do, looking at the files.
    """

    name: str
    lock: Path
    log: Path
    commands: Callable[[], Sequence[Command]]


@final
class _Active:
    """A job whose lock is held, and its process."""

    def __init__(self, job: Job, lock: IO[str], environment: dict[str, str]) -> None:
        self.job, self._lock, self._environment = job, lock, environment
        self._left = deque(job.commands())
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._log = job.log.open("w", encoding="utf-8")
        self.process: subprocess.Popen[bytes] | None = None

    def ended(self) -> int | None:
        """Returns the exit code of the last command; None as long as there is something to do."""
        code = 0 if self.process is None else self.process.poll()
        if code is None:
            return None
        if code == 0 and self._left:
            self.process = subprocess.Popen(
                self._left.popleft(),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=(self._lock.fileno(),),
            )
            return None
        return code

    def close(self) -> None:
        self._log.close()
        self._lock.close()


def run_jobs(
    jobs: Iterable[Job],
    *,
    parallel: int,
    begun: Callable[[Job], None],
    ended: Callable[[Job, int], Iterable[Job]],
) -> int:
    """Runs jobs, so many at a time, until none is left or a signal asks to stop.

    On SIGINT or SIGTERM the processes are asked to stop, which saves what they have, and are waited
    for; what they end with is then not reported.

    Args:
        jobs: What to run first.
        parallel: How many at a time.
        begun: Called when a job starts.
        ended: Called with a job and its exit code; returns what is to be run after it.

    Returns:
        The signal that stopped it, or 0.
    """
    waiting, active = deque(jobs), list[_Active]()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_each(parallel))}
    with deferred_signals() as request:
        try:
            while (waiting or active) and not request.signal:
                _start(waiting, active, parallel - len(active), environment, begun)
                for one in list(active):
                    code = one.ended()
                    if code is not None and not request.signal:
                        active.remove(one)
                        one.close()
                        waiting.extend(ended(one.job, code))
                time.sleep(_POLL_SECONDS)
        finally:
            _stop(active)
        return request.signal


def threads_each(parallel: int) -> int:
    """Returns the threads of one of so many processes, at least 1."""
    # Not every system says which cores a process may use.
    mine = getattr(os, "sched_getaffinity", None)
    cores = len(mine(0)) if mine else os.cpu_count() or 1
    return max(1, cores // parallel)


def _start(
    waiting: deque[Job],
    active: list[_Active],
    places: int,
    environment: dict[str, str],
    begun: Callable[[Job], None],
) -> None:
    """Fills free places with jobs whose lock is free; the others keep their order."""
    busy = []
    while waiting and places > 0:
        job = waiting.popleft()
        lock = _locked(job.lock)
        if lock is None:
            busy.append(job)
            continue
        begun(job)
        active.append(_Active(job, lock, environment))
        places -= 1
    waiting.extendleft(reversed(busy))


def _stop(active: Sequence[_Active]) -> None:
    running = [one.process for one in active if one.process is not None]
    for process in running:
        process.terminate()
    for process in running:
        process.wait()
    for one in active:
        one.close()


def _locked(path: Path) -> IO[str] | None:
    """Returns the open file whose lock is now held; None if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Makes sure that one program at a time works on what ``path`` stands for.

    Raises:
        ConfigError: If another one does.
    """
    lock = _locked(path)
    if lock is None:
        raise ConfigError(
            f"another process is comparing in {path.parent}; wait for it, or name another "
            f"directory with --directory"
        )
    try:
        yield
    finally:
        lock.close()
