"""Saves that are killed, refused by the disk, or cut off by a power failure.

The kill tests run this file as a program: it forks one child per kill, so that importing torch is
paid for once. The program is single-threaded, which makes forking safe.
"""

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from drgr.errors import CheckpointError
from drgr.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

CHANGING_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def make_state(step, version="first", *, numel=2000):
    """A state that is a function of ``(step, version)``, so that a mixture of two is recognised."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": torch.rand(numel, generator=generator),
        "moments": [torch.rand(numel // 2, generator=generator), torch.tensor(step)],
        "version": version,
    }


def save(directory, step, version="first", *, keep=1, **options):
    state = make_state(step, version, **options)
    half = state["weights"].nbytes  # makes two files of tensors
    return save_checkpoint(
        directory, step=step, state=state, fingerprint="abc", keep=keep, shard_bytes=half
    )


def read_latest(directory, **options):
    """Returns ``[step, version]`` of the latest checkpoint after comparing all of it; else None."""
    path = latest_checkpoint(directory)
    if path is None:
        return None
    state = load_checkpoint(path, fingerprint="abc")
    step, version = state["moments"][1].item(), state["version"]
    expected = make_state(step, version, **options)
    assert torch.equal(state["weights"], expected["weights"])
    assert torch.equal(state["moments"][0], expected["moments"][0])
    assert path.name.startswith(f"step-{step:08d}")
    return [step, version]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# --- the program that kills ---------------------------------------------------------------------


def prepare_first(directory):
    """Nothing there yet."""
    directory.rmdir()


def prepare_next(directory):
    """An older checkpoint, to be removed afterwards."""
    save(directory, 1)


def prepare_same(directory):
    """A checkpoint of the same step, to be replaced."""
    save(directory, 2, "before")


def prepare_dirty(directory):
    """What earlier kills left: partial temporaries and a replaced checkpoint with its successor."""
    save(directory, 1, "before")
    shutil.copytree(directory / "step-00000001", directory / "step-00000001.replaced")
    shutil.copytree(directory / "step-00000001", directory / ".step-00000000.old")
    shutil.copytree(directory / "step-00000001", directory / ".step-00000002.new")
    (directory / ".step-00000002.new" / "manifest.json").unlink()


SCENARIOS = {
    "first": (prepare_first, [None, [2, "first"]]),
    "next": (prepare_next, [[1, "first"], [2, "first"]]),
    "same": (prepare_same, [[2, "before"], [2, "first"]]),
    "dirty": (prepare_dirty, [[1, "before"], [2, "first"]]),
}


def kill_at_operation(count):
    """Arranges that this process dies at its ``count``-th operation on the file system.

    Audit events come before the operation, so dying at each covers the state after the one before.
    A write dies half done.
    """
    operations = itertools.count(1)
    plain_write = os.write

    def die_if_due():
        if next(operations) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(descriptor, data):
        written = plain_write(descriptor, data[: len(data) // 2] if len(data) > 2000 else data)
        die_if_due()
        return written

    def on_event(event, args):
        if event in CHANGING_EVENTS or (event == "open" and args[2] & os.O_CREAT):
            die_if_due()

    sys.addaudithook(on_event)
    os.write = write
    os.fsync = lambda _: die_if_due()


def in_child(work):
    """Runs ``work`` in a forked process; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        raise AssertionError("the child failed without being killed")
    return False


def kill_at_every_operation(folder, scenario):
    """Returns one record per kill of a save of step 2, until a save outlives its limit."""
    prepare, _ = SCENARIOS[scenario]
    start = folder / "start"
    start.mkdir(parents=True)
    prepare(start)
    records = []
    for count in itertools.count(1):
        directory = folder / f"run-{count}"
        if start.exists():
            shutil.copytree(start, directory)

        def work(directory=directory, count=count):
            kill_at_operation(count)
            save(directory, 2)

        killed = in_child(work)
        found = read_latest(directory)
        for path in directory.glob("step-*"):
            load_checkpoint(path, fingerprint="abc")
        save(directory, 3)
        records.append({"killed": killed, "found": found, "afterwards": names(directory)})
        if not killed:
            return records
    raise AssertionError("unreachable")


def kill_at_many_times(folder, kills):
    """Kills a process that saves again and again, at delays spread over the length of a save."""
    options = {"numel": 400_000}
    started = time.perf_counter()
    save(folder, 1, **options)
    seconds = min(time.perf_counter() - started, 0.1)  # a busy disk must not stretch the test
    records = []
    for index in range(kills):
        first = read_latest(folder, **options)[0] + 1
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.write(writer, b"%d\n" % 0)
            for step in itertools.count(first):
                save(folder, step, keep=2, **options)
                os.write(writer, b"%d\n" % step)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            pipe.readline()
            try:
                wait_for(folder / f".step-{first:08d}.new")
                time.sleep(seconds * index / kills)
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            done = max([int(line) for line in pipe], default=0) or first - 1
        partial = any(name.startswith(".") for name in names(folder))
        found = read_latest(folder, **options)[0]
        records.append({"done": done, "found": found, "partial": partial})
    return records


def wait_for(path):
    deadline = time.perf_counter() + 30
    while not path.exists():
        assert time.perf_counter() < deadline, f"{path} did not appear"
        time.sleep(0.0002)


def main(folder):
    torch.set_num_threads(1)
    (folder / "times").mkdir()
    times = kill_at_many_times(folder / "times", 40)
    os.fsync = lambda _: None  # a kill keeps what was written, flushed or not
    operations = {name: kill_at_every_operation(folder / name, name) for name in SCENARIOS}
    json.dump({"times": times, "operations": operations}, sys.stdout)


# --- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_saves(tmp_path_factory):
    """The records of the program above."""
    search_path = os.pathsep.join(entry for entry in sys.path if entry)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path_factory.mktemp("kills"))],
        env={**os.environ, **threads, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_checkpoint(killed_saves, scenario):
    old, new = SCENARIOS[scenario][1]
    records = killed_saves["operations"][scenario]
    kills = [record for record in records if record["killed"]]
    assert len(kills) >= 20
    found = [record["found"] for record in kills]
    switch = found.index(new)
    assert 10 <= switch < len(found)
    assert found == [old] * switch + [new] * (len(found) - switch)
    assert records[-1]["found"] == new
    assert all(record["afterwards"] == ["step-00000003"] for record in records)


def test_a_kill_at_any_time_keeps_every_finished_checkpoint(killed_saves):
    records = killed_saves["times"]
    assert len(records) == 40
    # A save may be whole before the process could report it.
    assert all(record["found"] - record["done"] in {0, 1} for record in records)
    assert any(record["partial"] for record in records)


def test_a_file_system_that_refuses_more_bytes_leaves_the_last_checkpoint(tmp_path):
    save(tmp_path, 1)
    with _file_size_limit(5000), pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert names(tmp_path) == ["step-00000001"]
    assert read_latest(tmp_path) == [1, "first"]
    save(tmp_path, 2)
    assert read_latest(tmp_path) == [2, "first"]


@contextlib.contextmanager
def _file_size_limit(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class _FullDisk:
    """Lets the first calls that need space through and refuses all later ones."""

    def __init__(self, monkeypatch, allowed):
        self.left = allowed
        for name in ("mkdir", "open", "write", "fsync", "rename"):
            monkeypatch.setattr(os, name, self._limited(getattr(os, name)))

    def _limited(self, function):
        def call(*args, **kwargs):
            # Looking at directories and removing files needs no space.
            if function.__name__ != "open" or args[1] & os.O_CREAT:
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call


def save_on_full_disk(monkeypatch, directory, allowed):
    """Saves step 2; returns the error, or None where ``allowed`` operations were enough."""
    with monkeypatch.context() as patch:
        _FullDisk(patch, allowed)
        try:
            save(directory, 2, "after")
        except CheckpointError as error:
            return error
    return None


@pytest.mark.parametrize("existing", [None, 1, 2])
def test_a_full_disk_at_any_operation_leaves_the_last_checkpoint(tmp_path, monkeypatch, existing):
    old = [existing, "before"] if existing else None
    messages = []
    for allowed in itertools.count():
        directory = tmp_path / str(allowed)
        if existing:
            save(directory, existing, "before")
        error = save_on_full_disk(monkeypatch, directory, allowed)
        if error is None:
            break
        messages.append(str(error))
        assert error.__cause__.errno == errno.ENOSPC
        if "step-00000002 is whole, but older ones could not be removed" in messages[-1]:
            assert read_latest(directory) == [2, "after"]
            continue
        assert f"could not be written: {error.__cause__}; " in messages[-1]
        assert " MiB are free there and " in messages[-1]
        last = latest_checkpoint(directory)
        kept = f"whole checkpoint {last.name} is intact" if last else "no earlier one exists"
        assert kept in messages[-1]
        assert read_latest(directory) in [old, [2, "after"]]
        assert not any(path.name.startswith(".") for path in directory.glob("*"))
    assert len(messages) >= 12
    removals = [text for text in messages if "is whole, but older ones could not be" in text]
    assert bool(removals) == bool(existing)
    assert names(directory) == ["step-00000002"]


def test_a_path_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written: .*exists.*no earlier one"):
        save(tmp_path / "checkpoints", 1)


def test_an_interrupt_removes_the_partial_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_everything_is_flushed_before_the_rename_and_before_old_ones_go(tmp_path, monkeypatch):
    save(tmp_path, 1)
    log = _record_operations(monkeypatch, tmp_path)
    new = save(tmp_path, 2)
    monkeypatch.undo()
    published = log.index(("rename", "step-00000002"))
    hidden = log.index(("rename", ".step-00000001.old"))
    before, between, after = log[:published], log[published:hidden], log[hidden:]
    for file in new.iterdir():
        last_write = max(i for i, entry in enumerate(before) if entry == ("write", file.name))
        assert ("fsync", file.name) in before[last_write:]
    assert before[-1] == ("fsync", ".step-00000002.new")
    assert ("fsync", tmp_path.name) in between
    removal = next(i for i, entry in enumerate(after) if entry[0] in {"unlink", "rmdir"})
    assert ("fsync", tmp_path.name) in after[:removal]
    assert not any(entry[0] in {"unlink", "rmdir"} for entry in before + between)


def _record_operations(monkeypatch, directory):
    """Logs ``(operation, name of the file or directory)`` in order."""
    log = []

    def name_of(target):
        if not isinstance(target, int):
            return Path(target).name
        node = os.fstat(target).st_ino
        everything = [directory, *directory.rglob("*")]
        return next(path.name for path in everything if path.stat().st_ino == node)

    def recorded(name, function):
        def call(*args, **kwargs):
            log.append((name, name_of(args[1 if name == "rename" else 0])))
            return function(*args, **kwargs)

        return call

    for name in ("write", "fsync", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    return log


if __name__ == "__main__":
    main(Path(sys.argv[1]))
