"""Extractor of manual pages in several languages: roff sources, made readable."""

import gzip
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from drgr.data.cleaning import decode, drop_repeated_blocks
from drgr.data.members import debian_members

_COMMENT = re.compile(r"^['.]\s*\\\".*$|\\\".*$", re.MULTILINE)
_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\[,/&%:|^]|\\c$", re.MULTILINE)
_PARAGRAPH = re.compile(r"^\.\s*(?:PP|P|LP|sp|Pp|TP|IP)\b", re.MULTILINE)
_HEADING = re.compile(r"^\.\s*(?:SH|SS|Sh|Ss)\s+(.*)$", re.MULTILINE)
_STYLED = re.compile(r"^\.\s*(?:B|I|BR|RB|IR|RI|BI|IB|SM|SB)\s+", re.MULTILINE)
_MACRO = re.compile(r"^['.].*\n?", re.MULTILINE)
_SYMBOLS = (("\\-", "-"), ("\\(aq", "'"), ("\\(cq", "'"), ("\\(oq", "'"), ("\\(lq", '"'))
_MORE_SYMBOLS = (("\\(rq", '"'), ("\\(bu", "*"), ("\\(em", "--"), ("\\e", "\\"), ("\\ ", " "))


def manual_pages(archives: Sequence[Path], *, language: str) -> Iterator[str]:
    """Yields the manual pages of one language, less repeated blocks.

    Args:
        archives: Debian packages of manual pages.
        language: Their folder under ``usr/share/man``, such as ``de``.
    """
    return drop_repeated_blocks(_pages(archives, f"usr/share/man/{language}*/man*/*.gz"))


man_de = partial(manual_pages, language="de")
man_fr = partial(manual_pages, language="fr")
man_ja = partial(manual_pages, language="ja")
man_zh = partial(manual_pages, language="zh")


def _pages(archives: Sequence[Path], pattern: str) -> Iterator[str]:
    for archive in archives:
        for _, content in debian_members(archive, pattern):
            yield _readable(decode(gzip.decompress(content)))


def _readable(roff: str) -> str:
    text = _FONT.sub("", _COMMENT.sub("", roff))
    text = _HEADING.sub(r"\n\n\1\n", _PARAGRAPH.sub("\n", text))
    text = _MACRO.sub("", _STYLED.sub("", text))
    for escape, symbol in (*_SYMBOLS, *_MORE_SYMBOLS):
        text = text.replace(escape, symbol)
    return text.strip()
