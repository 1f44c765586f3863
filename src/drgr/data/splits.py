"""Exact deduplication and the split by document into train, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedRandom
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np

from drgr.data.cleaning import whole_characters
from drgr.data.storage import writing
from drgr.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Largest size of each split of a domain, in bytes of UTF-8; ``None`` means no cap."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


class Span(NamedTuple):
    """A document inside a spool: digest of its content, and where it lies, in bytes."""

    digest: bytes
    start: int
    length: int


class DocumentSpool:
    """Collects the distinct documents of one domain in a file; memory holds only their digests.

    Documents are compared by content, without surrounding white space. It is a context manager.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BufferedRandom
        self._digests: set[bytes] = set()
        self._size = 0
        self.spans: list[Span] = []
        self.duplicates = 0
        self.blank = 0
        self.seen = 0

    def __enter__(self) -> Self:
        self._file = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes of text collected so far."""
        return self._size

    def add(self, document: str) -> None:
        """Adds a document, unless it is blank or was added before.

        Raises:
            DataError: If the text cannot be encoded in UTF-8, or the disk is full.
        """
        self.seen += 1
        content = _encoded(document.strip())
        digest = blake2b(content, digest_size=16).digest()
        if not content:
            self.blank += 1
            return
        if digest in self._digests:
            self.duplicates += 1
            return
        with writing(self._path):
            self._file.write(content)
        self._digests.add(digest)
        self.spans.append(Span(digest, self._size, len(content)))
        self._size += len(content)

    def forget_after(self, documents: int) -> None:
        """Forgets all but the first ``documents``: undoes a source that proved unreadable."""
        for span in self.spans[documents:]:
            self._digests.discard(span.digest)
        del self.spans[documents:]
        self._size = sum(self.spans[-1][1:]) if self.spans else 0
        self._file.seek(self._size)
        self._file.truncate()

    def read(self, span: Span) -> bytes:
        """Returns the content of a document; a shortened one ends between characters."""
        self._file.seek(span.start)
        content = self._file.read(min(span.length + 1, self._size - span.start))
        return content[: whole_characters(content, span.length)]


def _encoded(document: str) -> bytes:
    try:
        return document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text holds the lone surrogate {document[error.start]!r} at character "
            f"{error.start}; correct it, or prepare with skip_unreadable"
        ) from error


def assign_splits(spans: Sequence[Span], *, caps: Caps) -> dict[Split, list[Span]]:
    """Divides distinct documents into test, validation and train.

    The documents are ordered by the digest of their content, which depends neither on the order of
    the files nor on the machine. The first of them fill the test split up to a tenth of the bytes
    or its cap, the next the validation split, the rest train. Each split gets at least one
    document. The document that crosses a cap is shortened to fit; its rest is in no split.

    Args:
        spans: At least three documents.
        caps: Largest splits, in bytes.

    Returns:
        The documents of each split, in digest order.
    """
    ordered = sorted(spans)
    share = int(sum(span.length for span in spans) * HELD_OUT_SHARE)
    test, ordered = _take(ordered, share=share, cap=caps.test, leave=2)
    validation, ordered = _take(ordered, share=share, cap=caps.validation, leave=1)
    train, _ = _take(ordered, share=None, cap=caps.train, leave=0)
    return {"train": train, "validation": validation, "test": test}


def _take(
    spans: list[Span], *, share: int | None, cap: int | None, leave: int
) -> tuple[list[Span], list[Span]]:
    ends = np.cumsum([span.length for span in spans])
    limits = [limit for limit in (share, cap) if limit is not None]
    count = int(np.searchsorted(ends, min(limits))) + 1 if limits else len(spans)
    count = max(1, min(count, len(spans) - leave))
    taken = spans[:count]
    if cap is not None and ends[count - 1] > cap:
        last = taken[-1]
        taken[-1] = last._replace(length=last.length - int(ends[count - 1]) + cap)
    return taken, spans[count:]
