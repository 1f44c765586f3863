"""Checkpoints that are whole or absent, whatever happens while they are written.

A checkpoint is a directory ``step-00000100`` that holds

- ``tensors-00000.safetensors``, ...: the tensors;
- ``state.json``: everything else, and where each tensor belongs;
- ``manifest.json``: format version, step, fingerprint of the configuration, and size and SHA-256 of
  the other files.

It is written as ``.step-00000100.new``, every file and the directory are flushed to disk, and one
rename publishes it, which the file system does entirely or not at all. So a directory with a
checkpoint's name is whole unless something damaged it later, and loading detects that. Removal runs
the other way round: a rename takes the name away, then the files go.

One process at a time may save into a directory (rank 0 of a run); any number may read.
Needs a POSIX file system (atomic rename, flush of directories).
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.errors import CheckpointError
from drgr.training._manifest import (
    MANIFEST,
    SKELETON,
    FileRecord,
    Manifest,
    decode_manifest,
    encode_manifest,
    file_record,
)
from drgr.training._state_file import (
    PackedState,
    State,
    pack_state,
    read_shard,
    tensor_shards,
    unpack_state,
)

__all__ = ["State", "latest_checkpoint", "load_checkpoint", "read_step", "save_checkpoint"]

# Marks the former checkpoint of a step that is being saved again. It stays a valid checkpoint until
# the new one has taken its name, so that at no moment there is none.
_REPLACED = ".replaced"
_WHOLE = re.compile(r"step-[0-9]{8,}(\.replaced)?")
_TEMPORARY = re.compile(r"\.step-[0-9]{8,}(\.replaced)?\.(new|old)")


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    state: State,
    fingerprint: str,
    keep: int,
    shard_bytes: int = 2**27,
) -> Path:
    """Writes the checkpoint of ``step`` so that it appears whole or not at all.

    Older checkpoints are removed only once the new one is on disk, so there must be room for
    ``keep + 1`` of them. A checkpoint of the same step is replaced: at every moment either the old
    or the new one can be loaded. What a killed save left behind is removed first.

    Args:
        directory: Where checkpoints live; created if absent.
        step: Number of finished training steps.
        state: What to save; tensors may be on any device. Nothing may change it meanwhile.
        fingerprint: Identifies the configuration; loading asks for the same one.
        keep: How many checkpoints stay: this one and the ``keep - 1`` others of the highest steps.
        shard_bytes: About how many bytes of tensors go into one file. A save needs about four times
            as much memory besides the state.

    Returns:
        The new checkpoint, ``directory / "step-00000100"`` for step 100.

    Raises:
        ValueError: If ``step`` is negative or ``keep`` or ``shard_bytes`` is not positive, or a
            text in the state is not valid Unicode. Nothing was written.
        TypeError: If the state holds something else than ``State`` allows, naming its dotted path.
            Nothing was written.
        CheckpointError: If the disk is full or a write failed (the cause is attached). The partial
            checkpoint is removed; the earlier ones are intact.
    """
    check_not_negative("step", step)
    check_positive("keep", keep)
    check_positive("shard_bytes", shard_bytes)
    packed = pack_state(state)
    final = directory / f"step-{step:08d}"
    try:
        _prepare(directory)
        _write_checkpoint(final, packed, step, fingerprint, shard_bytes=shard_bytes)
    except OSError as error:
        raise CheckpointError(_write_failure(final, packed.size_bytes, error)) from error
    try:
        _retire(directory, [*_superseded(directory), *_outdated(final, keep)])
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final} is whole, but older ones could not be removed: {error}; "
            f"make {directory} writable or remove them, then resume"
        ) from error
    return final


def latest_checkpoint(directory: Path) -> Path | None:
    """Returns the whole checkpoint of the highest step, or ``None`` where there is none.

    Goes by names alone: temporary ones do not count. Damage after the save is found by loading.
    """
    whole = _whole_checkpoints(directory)
    return whole[-1] if whole else None


def read_step(path: Path) -> int:
    """Returns the number of finished steps of the checkpoint ``path``, from its manifest.

    Raises:
        CheckpointError: If the manifest is absent, damaged, or of another format version.
    """
    return _read_manifest(path).step


def load_checkpoint(path: Path, *, fingerprint: str) -> State:
    """Reads a checkpoint back, every bit of it; executes nothing that the files contain.

    Tensors come back on CPU, contiguous, without gradient history. One view that was saved under
    several names (tied weights) comes back as one tensor object under all of them; different views
    of one memory become independent tensors. Parameters become plain tensors, subclasses of dict
    plain dicts, and every NaN of a Python float (not of a tensor) the same NaN.

    Args:
        path: The checkpoint, for instance from ``latest_checkpoint``.
        fingerprint: The fingerprint of the configuration that wants to resume.

    Returns:
        A state equal to the saved one.

    Raises:
        CheckpointError: If the checkpoint is absent, damaged (naming the file and what differs), of
            another configuration, or of another format version.
    """
    manifest = _read_manifest(path)
    if manifest.fingerprint != fingerprint:
        raise CheckpointError(
            f"checkpoint {path} belongs to another configuration: its fingerprint is "
            f"{manifest.fingerprint}, this run's is {fingerprint}; resume with the configuration "
            "that wrote it, or start this one in another run directory"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(manifest.files.keys() - {SKELETON}):
        tensors |= _read_tensors(path, name, manifest.files[name])
    skeleton = _read_payload(path, SKELETON, manifest.files[SKELETON])
    try:
        return unpack_state(skeleton, tensors)
    except ValueError as error:
        raise _damaged(path, SKELETON, f"does not hold a state ({error})") from error


def _prepare(directory: Path) -> None:
    """Creates the directory and frees the space that dead saves still occupy."""
    if not directory.is_dir():
        directory.mkdir(parents=True)
        _sync(directory.parent)
    for path in sorted(directory.iterdir()):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)
    _retire(directory, _superseded(directory))


def _write_checkpoint(
    final: Path, packed: PackedState, step: int, fingerprint: str, *, shard_bytes: int
) -> None:
    temporary = final.with_name(f".{final.name}.new")
    try:
        temporary.mkdir()
        files = {
            name: _write_file(temporary / name, data)
            for name, data in _payloads(packed, shard_bytes)
        }
        manifest = Manifest(step=step, fingerprint=fingerprint, files=files)
        _write_file(temporary / MANIFEST, encode_manifest(manifest))
        _sync(temporary)
        if final.exists():
            final.rename(final.with_name(final.name + _REPLACED))
        temporary.rename(final)
        _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # absent where the rename succeeded


def _payloads(packed: PackedState, shard_bytes: int) -> Iterator[tuple[str, bytes]]:
    for index, data in enumerate(tensor_shards(packed.tensors, shard_bytes=shard_bytes)):
        yield f"tensors-{index:05d}.safetensors", data
    yield SKELETON, packed.skeleton


def _write_file(path: Path, data: bytes) -> FileRecord:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return file_record(data)


def _sync(directory: Path) -> None:
    """Flushes the names in ``directory``; without it a rename may not outlive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retire(directory: Path, paths: Iterable[Path]) -> None:
    """Removes whole checkpoints: first the names, so that none ever denotes a partial one."""
    hidden = [path.rename(path.with_name(f".{path.name}.old")) for path in paths]
    if hidden:
        _sync(directory)
    for path in hidden:
        shutil.rmtree(path)


def _named_checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if _WHOLE.fullmatch(p.name) and p.is_dir())


def _whole_checkpoints(directory: Path) -> list[Path]:
    """Returns one checkpoint per step, oldest first."""
    by_step: dict[int, Path] = {}
    for path in reversed(_named_checkpoints(directory)):  # the plain name comes last and wins
        by_step[int(path.name.removeprefix("step-").removesuffix(_REPLACED))] = path
    return [by_step[step] for step in sorted(by_step)]


def _superseded(directory: Path) -> list[Path]:
    """Returns the replaced checkpoints whose successors are in place."""
    named = _named_checkpoints(directory)
    successors = {path.name + _REPLACED for path in named}
    return [path for path in named if path.name in successors]


def _outdated(newest: Path, keep: int) -> list[Path]:
    others = [path for path in _whole_checkpoints(newest.parent) if path != newest]
    return others[: max(0, len(others) - (keep - 1))]


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        present = ", ".join(p.name for p in _whole_checkpoints(path.parent)) or "none"
        raise CheckpointError(
            f"checkpoint {path} does not exist; choose one that does (present: {present})"
        )
    data = _read_bytes(path, MANIFEST)
    try:
        return decode_manifest(data, checkpoint=path)
    except ValueError as error:
        raise _damaged(path, MANIFEST, str(error)) from error


def _read_tensors(path: Path, name: str, expected: FileRecord) -> dict[str, Tensor]:
    data = _read_payload(path, name, expected)
    try:
        return read_shard(data)
    except ValueError as error:
        raise _damaged(path, name, f"is {error}") from error


def _read_payload(path: Path, name: str, expected: FileRecord) -> bytes:
    data = _read_bytes(path, name)
    found = file_record(data)
    if found.size_bytes != expected.size_bytes:
        raise _damaged(path, name, f"has {found.size_bytes} bytes, expected {expected.size_bytes}")
    if found.sha256 != expected.sha256:
        raise _damaged(path, name, f"has SHA-256 {found.sha256}, expected {expected.sha256}")
    return data


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except FileNotFoundError as error:
        raise _damaged(path, name, "is missing") from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {error}; check its permissions and the disk"
        ) from error


def _damaged(path: Path, name: str, what: str) -> CheckpointError:
    whole = _whole_checkpoints(path.parent)
    earlier = whole[: whole.index(path)] if path in whole else whole
    previous = f"the previous checkpoint is {earlier[-1].name}" if earlier else "no earlier exists"
    return CheckpointError(
        f"checkpoint {path} is damaged: {name} {what}; "
        f"delete that directory, then resume ({previous})"
    )


def _write_failure(final: Path, size_bytes: int, error: OSError) -> str:
    last = latest_checkpoint(final.parent)
    kept = f"the last whole checkpoint {last.name} is intact" if last else "no earlier one exists"
    existing = next(parent for parent in final.parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    return (
        f"checkpoint {final} of about {_mebibytes(size_bytes)} could not be written: {error}; "
        f"{_mebibytes(free_bytes)} are free there and {kept}; "
        "free space or choose another disk, then resume"
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
