"""HTML fragments that cannot be mistaken for text, and numbers as people read them."""

import html
import json
from typing import NewType

Html = NewType("Html", str)

MISSING = "\N{EN DASH}"


def text(value: str) -> Html:
    """Returns ``value`` escaped for element content and for quoted attributes."""
    return Html(html.escape(value, quote=True))


def join(*parts: Html) -> Html:
    """Concatenates fragments."""
    return Html("".join(parts))


def tag(name: str, *children: Html, attributes: dict[str, str] | None = None) -> Html:
    """Builds ``<name attributes>children</name>``.

    Args:
        name: element name, written by the programmer, never taken from a run.
        children: fragments; plain strings go through ``text`` first.
        attributes: name -> plain value; values are escaped here.

    Returns:
        The element.
    """
    written = "".join(f' {key}="{text(value)}"' for key, value in (attributes or {}).items())
    return Html(f"<{name}{written}>{''.join(children)}</{name}>")


def styled(name: str, style: str, *children: Html) -> Html:
    """Builds an element with a CSS class."""
    return tag(name, *children, attributes={"class": style})


def swatch(colour: str, dash: str = "solid") -> Html:
    """Builds the coloured square that stands for a domain, run or layer."""
    return tag("span", attributes={"class": f"swatch {dash}", "style": f"--series:{colour}"})


def data_script(value: str, *, style: str) -> Html:
    """Embeds JSON so that no content of it can end the script element.

    Args:
        value: JSON text.
        style: CSS class to find the element by.

    Returns:
        A script element of type ``application/json``; ``<``, ``>`` and ``&`` are written as JSON
        escapes, which leaves the decoded value unchanged.
    """
    safe = value.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Html(f'<script type="application/json" class="{text(style)}">{safe}</script>')


def pretty_json(value: object) -> str:
    """Returns indented JSON for reading."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def number(value: float | None, digits: int = 0) -> str:
    """Formats with thousands separators and a fixed number of decimals; a dash for ``None``."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Formats a share in [0, 1] as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def flops(value: float | None) -> str:
    """Formats a count of floating point operations with a metric prefix."""
    if value is None:
        return MISSING
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:,.2f} {prefix}FLOP"
    return f"{value:,.0f} FLOP"


def size(value: float | None) -> str:
    """Formats a count of bytes with a decimal prefix."""
    if value is None:
        return MISSING
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:,.2f} {prefix}B"
    return f"{value:,.0f} B"


def duration(seconds: float | None) -> str:
    """Formats seconds as the two largest units that matter."""
    if seconds is None:
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
