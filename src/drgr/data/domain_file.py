"""Reading and checking a domain file (TOML or YAML): which texts make up which domain.

The format is described in the docstring of :mod:`drgr.data`.
"""

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from drgr.data.splits import Caps
from drgr.errors import DataError

Format = Literal["text", "jsonl", "parquet"]
_FORMATS: tuple[Format, ...] = ("text", "jsonl", "parquet")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SHARED_KEYS = ("licence", "weight", "train_bytes", "validation_bytes", "test_bytes", "block_bytes")
_FILE_KEYS = ("files", "format", "field")
_HUB_KEYS = ("dataset", "config", "split", "field", "revision")
DEFAULT_BLOCK_BYTES = 32 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """Local files.

    Attributes:
        patterns: Absolute glob patterns, in the order given.
        format: How to read them; ``None`` decides by each file's suffix.
        field: The column that holds the text (JSON lines and Parquet).
    """

    patterns: tuple[str, ...]
    format: Format | None = None
    field: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A Hugging Face dataset, by hub name or as a local directory.

    Attributes:
        dataset: Its name or absolute path.
        config: Its configuration, if it has several.
        split: The split to read; the corpus makes its own splits of it.
        field: The column that holds the text.
        revision: Commit or tag, so that the text is pinned.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSpec:
    """One domain of a user's corpus.

    Attributes:
        name: Letters, digits, ``_``, ``-`` and ``.``.
        source: Where its text comes from.
        caps: Largest splits, in bytes.
        block_bytes: Documents longer than this are cut into blocks, which are then split like
            documents; 0 never cuts.
        licence: Stated by the user, kept in the manifest.
        weight: Share of sampling relative to the other domains; ``None`` where the user gave none.
    """

    name: str
    source: FileSource | HubSource
    caps: Caps
    block_bytes: int = DEFAULT_BLOCK_BYTES
    licence: str = "not stated"
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSpec:
    """A user's corpus: its name and its domains, in the order of the file."""

    name: str
    domains: tuple[DomainSpec, ...]


def load_domain_file(path: Path | str) -> CorpusSpec:
    """Reads a domain file and checks every entry.

    Args:
        path: A ``.toml``, ``.yaml`` or ``.yml`` file. Relative globs start from its folder.

    Raises:
        DataError: If the file is missing or malformed, has an unknown key (the nearest known one is
            named) or a value that cannot be used.
    """
    path = Path(path)
    table = _parse(path)
    _check_keys(table, ("name", "domains"), where=str(path))
    name = _text(table, "name", str(path), default=path.stem)
    _check_name(name, f"{path}: name")
    domains = table.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise DataError(f"{path}: domains is {domains!r}; give at least one table [domains.NAME]")
    folder = path.resolve().parent
    specs = tuple(_domain(str(key), value, path, folder) for key, value in domains.items())
    _check_weights(specs, path)
    return CorpusSpec(name=name, domains=specs)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = path.read_text(encoding="utf-8")
        table = tomllib.loads(content) if path.suffix == ".toml" else yaml.safe_load(content)
    except FileNotFoundError as error:
        raise DataError(f"domain file {path} does not exist; check its path") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"domain file {path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise DataError(f"domain file {path} holds a {type(table).__name__}, not a table of keys")
    return table


def _domain(name: str, table: object, path: Path, folder: Path) -> DomainSpec:
    where = f"{path}: domains.{name}"
    _check_name(name, where)
    if not isinstance(table, dict):
        raise DataError(f"{where} is {table!r}; it must be a table with 'files' or 'dataset'")
    if ("files" in table) == ("dataset" in table):
        raise DataError(f"{where} must have exactly one of 'files' (a glob) and 'dataset' (a name)")
    from_files = "files" in table
    _check_keys(table, _SHARED_KEYS + (_FILE_KEYS if from_files else _HUB_KEYS), where=where)
    return DomainSpec(
        name=name,
        source=_file_source(table, where, folder)
        if from_files
        else _hub_source(table, where, folder),
        caps=Caps(
            train=_size(table, "train_bytes", where),
            validation=_size(table, "validation_bytes", where),
            test=_size(table, "test_bytes", where),
        ),
        block_bytes=_block_bytes(table, where),
        licence=_text(table, "licence", where, default="not stated"),
        weight=_weight(table, where),
    )


def _file_source(table: Mapping[str, Any], where: str, folder: Path) -> FileSource:
    files = [table["files"]] if isinstance(table["files"], str) else table["files"]
    if not isinstance(files, list) or not files or not all(isinstance(x, str) and x for x in files):
        raise DataError(
            f"{where}.files is {table['files']!r}; it must be a glob or a list of globs"
        )
    kind = table.get("format")
    if kind is not None and kind not in _FORMATS:
        raise DataError(f"{where}.format is {kind!r}; choose one of {', '.join(_FORMATS)}")
    return FileSource(
        patterns=tuple(str(folder / Path(pattern).expanduser()) for pattern in files),
        format=kind,
        field=_text(table, "field", where, default="text"),
    )


def _hub_source(table: Mapping[str, Any], where: str, folder: Path) -> HubSource:
    name = _text(table, "dataset", where, default="")
    if not name:
        raise DataError(f"{where}.dataset is empty; give a hub name or a directory")
    local = folder / Path(name).expanduser()
    return HubSource(
        dataset=str(local) if local.is_dir() else name,
        config=_text(table, "config", where, default="") or None,
        split=_text(table, "split", where, default="train"),
        field=_text(table, "field", where, default="text"),
        revision=_text(table, "revision", where, default="") or None,
    )


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], *, where: str) -> None:
    for key in table:
        if key not in known:
            raise DataError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")


def nearest(value: str, known: tuple[str, ...]) -> str:
    """Returns the end of an error message: the known name nearest to ``value``, or all of them."""
    close = get_close_matches(value, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{where}: the name {name!r} must be letters, digits, '_', '-' and '.' only"
        )


def _text(table: Mapping[str, Any], key: str, where: str, *, default: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise DataError(f"{where}.{key} is {value!r}; it must be a text in quotes")
    return value


def _number(
    table: Mapping[str, Any], key: str, where: str, good: Callable[[float], bool], wanted: str
) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
        raise DataError(f"{where}.{key} is {value!r}; it must be {wanted}")
    return value


def _size(table: Mapping[str, Any], key: str, where: str) -> int | None:
    value = _number(
        table, key, where, lambda x: x >= 1 and float(x).is_integer(), "a whole number of bytes"
    )
    return None if value is None else int(value)


def _block_bytes(table: Mapping[str, Any], where: str) -> int:
    value = _number(
        table,
        "block_bytes",
        where,
        lambda x: x == 0 or (x >= 1024 and float(x).is_integer()),
        "0 (never cut) or a whole number of at least 1024 bytes",
    )
    return DEFAULT_BLOCK_BYTES if value is None else int(value)


def _weight(table: Mapping[str, Any], where: str) -> float | None:
    return _number(
        table, "weight", where, lambda x: math.isfinite(x) and x >= 0, "a finite number, 0 or more"
    )


def _check_weights(domains: tuple[DomainSpec, ...], path: Path) -> None:
    given = [domain for domain in domains if domain.weight is not None]
    if given and len(given) < len(domains):
        without = next(domain.name for domain in domains if domain.weight is None)
        raise DataError(f"{path}: domains.{without} has no weight; give all domains one, or none")
    if given and not any(domain.weight for domain in given):
        raise DataError(f"{path}: every weight is 0; give at least one domain a positive weight")
