"""Turning bytes into clean text, cutting long texts, and dropping repeated blocks."""

import html
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

_CONTROL = dict.fromkeys(set(range(32)) - {9, 10})
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_INVISIBLE = re.compile(r"<!--.*?-->|<(style|script|title)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_LINE_BREAK = re.compile(r"<(?:br|p|/p|div|/div|tr|/tr|li|h\d)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]{1,2000}>")
_QUOTE_MARKS = re.compile(r"^[>|\s]+", re.MULTILINE)
_SPACES = re.compile(r"[ \t]+")


def decode(content: bytes) -> str:
    """Decodes text of a pinned archive: UTF-8, else Latin-1; line ends become line feeds.

    Latin-1 is right for the few members of the pinned archives that are not UTF-8; user files are
    never decoded this way.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text.translate(_CONTROL).strip()


def text_of_html(markup: str) -> str:
    """Returns the visible text of an HTML message, one line a block."""
    text = _LINE_BREAK.sub("\n", _INVISIBLE.sub(" ", markup))
    lines = (
        _SPACES.sub(" ", line).strip() for line in html.unescape(_TAG.sub("", text)).split("\n")
    )
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


def cut_into_blocks(text: str, block_bytes: int) -> Iterator[str]:
    """Cuts a long text into consecutive blocks of at most ``block_bytes`` bytes of UTF-8.

    A cut falls after the last blank line of the block's second half, else after its last line, else
    after its last space, else between two characters. The blocks joined give the text again.

    Args:
        text: Any text.
        block_bytes: Largest block, in bytes, at least 4 (the longest character).
    """
    content = text.encode("utf-8")
    start = 0
    while len(content) - start > block_bytes:
        end = _cut(content, start, start + block_bytes)
        yield content[start:end].decode("utf-8")
        start = end
    if start < len(content):
        yield content[start:].decode("utf-8")


def _cut(content: bytes, start: int, limit: int) -> int:
    middle = (start + limit) // 2
    for mark in (b"\n\n", b"\n", b" "):
        found = content.rfind(mark, middle, limit)
        if found >= 0:
            return found + len(mark)
    return whole_characters(content, limit)


def whole_characters(content: bytes, limit: int) -> int:
    """Returns the largest end ``<= limit`` that cuts UTF-8 ``content`` between characters."""
    while limit < len(content) and content[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def paragraphs(text: str) -> list[str]:
    """Returns the blocks of ``text`` that blank lines separate."""
    return [block for block in _BLANK_LINES.split(text) if block.strip()]


def drop_repeated_blocks(documents: Iterable[str], *, shortest: int = 60) -> Iterator[str]:
    """Yields the documents without the blocks that occurred before in any of them.

    Quotations of earlier mails, signatures, licence headers: what repeats would otherwise be in
    train and test alike. Blocks are compared without quote marks and runs of spaces.

    Args:
        documents: Texts whose blocks are separated by blank lines.
        shortest: Blocks with fewer characters are always kept.
    """
    seen: set[bytes] = set()
    for document in documents:
        kept = [block for block in paragraphs(document) if _is_new(block, seen, shortest)]
        if kept:
            yield "\n\n".join(kept)


def _is_new(block: str, seen: set[bytes], shortest: int) -> bool:
    plain = " ".join(_QUOTE_MARKS.sub("", block).split())
    if len(plain) < shortest:
        return True
    digest = blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    new = digest not in seen
    seen.add(digest)
    return new
