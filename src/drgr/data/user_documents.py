"""Reading a user's texts: local files and Hugging Face datasets, streamed, each failure named."""

import codecs
import glob
import gzip
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from drgr.data.cleaning import cut_into_blocks
from drgr.data.domain_file import DomainSpec, FileSource, Format, HubSource
from drgr.errors import DataError

_CHUNK_BYTES = 1 << 20
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_AMBIGUOUS = (".json", ".csv", ".tsv")


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentSource:
    """A file or dataset that is read, or skipped, as a whole.

    Attributes:
        label: Its path or name, for messages and the manifest.
        documents: Starts reading it; raises ``DataError`` where it cannot be read.
    """

    label: str
    documents: Callable[[], Iterator[str]]


def matching_files(domain: str, source: FileSource) -> list[Path]:
    """Returns the files that the globs match, without repetition, in sorted order.

    Raises:
        DataError: If there are none.
    """
    found = {name for pattern in source.patterns for name in glob.glob(pattern, recursive=True)}
    files = sorted(path for path in map(Path, found) if path.is_file())
    if not files:
        raise DataError(
            f"domain {domain!r}: no file matches {', '.join(source.patterns)}; correct 'files' "
            "(relative globs start from the domain file's folder)"
        )
    return files


def document_sources(spec: DomainSpec) -> Iterator[DocumentSource]:
    """Yields what a domain reads, in a stable order; nothing is opened yet.

    One file of plain text is divided at its blank lines; of several, each is a document. Documents
    longer than ``spec.block_bytes`` are cut.
    """
    if isinstance(spec.source, HubSource):
        sources = [_hub_source(spec.source)]
    else:
        files = matching_files(spec.name, spec.source)
        sources = [_file_source(path, spec.source, alone=len(files) == 1) for path in files]
    for source in sources:
        documents = partial(_cut, source.documents, spec.block_bytes)
        yield DocumentSource(label=source.label, documents=documents)


def _cut(documents: Callable[[], Iterator[str]], block_bytes: int) -> Iterator[str]:
    for document in documents():
        if block_bytes:
            yield from cut_into_blocks(document, block_bytes)
        else:
            yield document


def _file_source(path: Path, source: FileSource, *, alone: bool) -> DocumentSource:
    kind = source.format or _format_by_suffix(path)
    if kind == "text":
        read = _paragraphs if alone else _whole_text
        return DocumentSource(label=str(path), documents=partial(read, path))
    return DocumentSource(label=str(path), documents=partial(_records, path, kind, source.field))


def _format_by_suffix(path: Path) -> Format:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix in _AMBIGUOUS:
        raise DataError(
            f"{path}: the suffix {suffix!r} does not say how to read it; set format to 'jsonl' "
            "(one JSON object a line) or 'text'"
        )
    return _SUFFIXES.get(suffix, "text")


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _unreadable(label: object, reason: object) -> DataError:
    return DataError(
        f"{label} cannot be read: {reason}; repair or remove it, or prepare with skip_unreadable"
    )


def _not_utf8(path: Path, position: int, byte: int) -> DataError:
    return _unreadable(path, f"byte {position} (0x{byte:02x}) is not valid UTF-8")


def _whole_text(path: Path) -> Iterator[str]:
    try:
        with _open(path) as stream:
            content = stream.read()
        yield content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start, error.object[error.start]) from error
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    yield "".join(lines)


def _lines(path: Path) -> Iterator[str]:
    position = 0
    try:
        with _open(path) as stream:
            for line in stream:
                yield line.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
                position += len(line)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, position + error.start, error.object[error.start]) from error
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _check_utf8(path: Path) -> None:
    """Reads the whole file once: the JSON reader reports positions within its own chunks only."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        with _open(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                pending = len(decoder.getstate()[0])
                decoder.decode(chunk)
                position += len(chunk)
            pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = position - pending + error.start
        raise _not_utf8(path, at, error.object[error.start]) from error
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _records(path: Path, kind: Format, field: str) -> Iterator[str]:
    from datasets import load_dataset  # noqa: PLC0415 - slow to import, needed for these files only

    if kind == "jsonl":
        _check_utf8(path)
    builder = "json" if kind == "jsonl" else "parquet"
    files = glob.escape(str(path.resolve()))
    open_rows = partial(load_dataset, builder, data_files=files, split="train", streaming=True)
    return _field_values(open_rows, str(path), field)


def _hub_source(source: HubSource) -> DocumentSource:
    name = f"dataset {source.dataset} ({source.config or 'default'}, {source.split})"
    return DocumentSource(label=name, documents=partial(_hub_records, source, name))


def _hub_records(source: HubSource, label: str) -> Iterator[str]:
    from datasets import load_dataset  # noqa: PLC0415 - slow to import, needed for datasets only

    open_rows = partial(
        load_dataset,
        source.dataset,
        source.config,
        split=source.split,
        revision=source.revision,
        streaming=True,
    )
    return _field_values(open_rows, label, source.field)


def _field_values(open_rows: Callable[[], Iterable[Any]], label: str, field: str) -> Iterator[str]:
    try:
        for number, row in enumerate(open_rows()):
            value = row.get(field)
            if value is None and field not in row:
                raise DataError(
                    f"{label}: row {number} has no field {field!r}, only {', '.join(row)}; "
                    "set 'field' to the column that holds the text"
                )
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{label}: field {field!r} of row {number} is a {type(value).__name__}, "
                    "not text; set 'field' to the column that holds the text"
                )
            yield value or ""
    except DataError:
        raise
    except Exception as error:  # the readers below raise classes of many libraries
        raise _unreadable(label, f"{type(error).__name__}: {error}") from error
