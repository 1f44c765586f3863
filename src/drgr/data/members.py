"""Reading the members of an archive in place: nothing is unpacked to the disk or executed."""

import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from drgr.errors import DataError

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error)
Member = tuple[str, bytes]


def tar_members(path: Path, *patterns: str) -> Iterator[Member]:
    """Yields name and content of the files of a compressed npm archive that match a pattern.

    Args:
        path: The archive.
        patterns: Shell patterns on the name without its first folder; ``*`` crosses folders.

    Raises:
        DataError: If the archive is truncated or damaged.
    """
    try:
        with path.open("rb") as stream:
            yield from _tar_stream(stream, "r|gz", patterns)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def zip_members(path: Path, *patterns: str) -> Iterator[Member]:
    """Yields name and content of a wheel's files that match; see :func:`tar_members`."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if _matches(name, patterns):
                    yield name, archive.read(name)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def debian_members(path: Path, *patterns: str) -> Iterator[Member]:
    """Yields name and content of the files of a Debian package that match a pattern.

    Raises:
        DataError: If ``dpkg`` is absent, or the package is truncated or damaged.
    """
    command = ["dpkg", "--fsys-tarfile", str(path)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise DataError(f"drgr-16 needs Debian's dpkg to read {path.name}; use 'drgr-8'") from error
    with process:
        assert process.stdout is not None
        try:
            yield from _tar_stream(process.stdout, "r|", patterns)
        except _DAMAGE as error:
            raise _damaged(path, error) from error
    if process.returncode > 0:
        raise _damaged(path, f"dpkg ended with status {process.returncode}")


def _tar_stream(stream: IO[bytes], mode: str, patterns: tuple[str, ...]) -> Iterator[Member]:
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and _matches(name, patterns):
                content = archive.extractfile(member)
                yield name, content.read() if content else b""


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _damaged(path: Path, reason: object) -> DataError:
    return DataError(
        f"archive {path} is truncated or damaged ({reason}); delete it and prepare again"
    )
