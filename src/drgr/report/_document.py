"""The file that holds a page: template, style and scripts, nothing from outside."""

import os
from importlib import resources
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from drgr.errors import ConfigError
from drgr.report._html import Html, text


def write_document(output: Path, *, title: str, navigation: Html, content: Html) -> Path:
    """Writes a self-contained page under a temporary name and renames it.

    Args:
        output: The file; missing parent directories are made.
        title: Of the window.
        navigation: Links in the page's head.
        content: Sections.

    Returns:
        ``output``.
    """
    folder = resources.files("drgr.report")
    template = Template(folder.joinpath("template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=text(title),
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        plotly=_inline_script(get_plotlyjs()),
        script=_inline_script(folder.joinpath("report.js").read_text(encoding="utf-8")),
        navigation=navigation,
        content=content,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(output, page)
    return output


def check_output(output: Path) -> None:
    """Raises ``ConfigError`` if ``output`` is a directory."""
    if output.is_dir():
        raise ConfigError(f"output must be a file, got the directory '{output}'; name a file in it")


def _inline_script(source: str) -> str:
    # In JavaScript strings, "\/" is "/"; in HTML, "</script" would end the element.
    return source.replace("</script", "<\\/script")


def _write_atomically(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
