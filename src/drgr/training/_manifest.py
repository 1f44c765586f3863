"""The manifest of a checkpoint: what it is, and size and SHA-256 of each of its files.

The manifest carries a SHA-256 of its own content, so that damage to it is found as well. SHA-256
rather than CRC-32: it also tells apart files that were exchanged between checkpoints, and it costs
less than the flush to disk that it goes with.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from drgr.errors import CheckpointError

MANIFEST = "manifest.json"
SKELETON = "state.json"

_FORMAT = "drgr-checkpoint"
_VERSION = 1
_PAYLOAD = re.compile(r"state\.json|tensors-[0-9]{5,}\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 (lower-case hexadecimal) of one file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Step, fingerprint of the configuration, and the files (by name) of a checkpoint."""

    step: int
    fingerprint: str
    files: dict[str, FileRecord]


def file_record(data: bytes) -> FileRecord:
    """Returns the record of a file with the content ``data``."""
    return FileRecord(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def encode_manifest(manifest: Manifest) -> bytes:
    """Returns the JSON text of ``manifest`` with its own hash."""
    body = asdict(manifest)
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "sha256": _digest(body),
        "manifest": body,
    }
    return json.dumps(document, indent=1).encode()


def decode_manifest(data: bytes, *, checkpoint: Path) -> Manifest:
    """Returns the manifest in ``data``.

    Args:
        data: The content of the manifest file.
        checkpoint: Where it came from, for messages.

    Raises:
        ValueError: If it is damaged, saying how; the text continues "manifest.json ...".
        CheckpointError: If it is of a format version that this release cannot read.
    """
    match _load_json(data):
        case {
            "format": str(kind),
            "version": int(version),
            "sha256": str(expected),
            "manifest": body,
        }:
            _check_version(kind, version, checkpoint)
            if _digest(body) != expected:
                raise ValueError(f"has SHA-256 {_digest(body)}, expected {expected}")
            return _parse_body(body)
    raise ValueError("lacks its format, version, sha256 or manifest")


def _load_json(data: bytes) -> object:
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    return document


def _digest(body: object) -> str:
    """Hashes the canonical text of the content, so that the file's layout does not matter."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_version(kind: str, version: int, checkpoint: Path) -> None:
    if (kind, version) != (_FORMAT, _VERSION):
        raise CheckpointError(
            f"checkpoint {checkpoint} has format {kind!r} version {version}, this release reads "
            f"{_FORMAT!r} version {_VERSION}; resume with the release that wrote it"
        )


def _parse_body(body: object) -> Manifest:
    match body:
        case {"step": int(step), "fingerprint": str(fingerprint), "files": dict(entries)}:
            files = {name: _parse_record(name, entry) for name, entry in entries.items()}
            if SKELETON in files:
                return Manifest(step=step, fingerprint=fingerprint, files=files)
    raise ValueError("lacks its step, fingerprint or files")


def _parse_record(name: str, entry: object) -> FileRecord:
    match entry:
        # The name check keeps a forged manifest from pointing outside the checkpoint.
        case {"size_bytes": int(size), "sha256": str(digest)} if _PAYLOAD.fullmatch(name):
            return FileRecord(size_bytes=size, sha256=digest)
    raise ValueError(f"has a wrong entry for the file {name!r}")
