"""Writing so that a killed or failed preparation never leaves a half file under its final name."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drgr.errors import DataError

TEMPORARY_PREFIX = ".tmp-"
Json = dict[str, Any]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the body, such as a full disk, into an error that names ``path``."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; "
            "free some space, check its permissions, or choose another cache directory"
        ) from error


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``target`` only when the body has succeeded.

    Every file is flushed to the disk before the rename, so that ``target`` is either absent or
    whole, whenever the process or the machine stops. Any failure removes the temporary directory.

    Raises:
        DataError: If something cannot be written.
    """
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        with writing(target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(source: Path, target: Path) -> None:
    """Flushes all that is under ``source`` to the disk, then renames it to ``target``."""
    for folder, _, names in os.walk(source, topdown=False):
        for name in names:
            _flush(Path(folder) / name)
        _flush(Path(folder))
    source.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(*folders: Path) -> None:
    """Removes temporary entries that a killed preparation left directly inside ``folders``."""
    for folder in folders:
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, content: Json) -> None:
    """Writes ``content`` as readable JSON with a stable key order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, *, remedy: str) -> Json:
    """Reads a JSON object.

    Args:
        path: The file.
        remedy: What the user can do when the file cannot be used; ends the error's message.

    Raises:
        DataError: If the file is missing, truncated, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; {remedy}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object; {remedy}")
    return content
