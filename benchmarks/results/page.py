"""docs/results.md: sections, each from a result file; a section without its file is left out."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

from benchmarks.results import ablation, compute, headline, medium, unseen
from benchmarks.results.comparison import ROOT, finished
from benchmarks.synthetic import figure as synthetic

PAGE = ROOT / "docs" / "results.md"
Writer = Callable[[dict[str, Any]], list[str]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        result: The file that it is written from, below the root of the repository.
        write: From what the file holds to lines.
        draw: What writes its figure, if it has one.
    """

    result: str
    write: Writer
    draw: Callable[[dict[str, Any]], None] | None = None


def written_by(module: str) -> Writer:
    """Returns the ``section`` of a module, which is imported when there is something to write."""

    def write(result: dict[str, Any]) -> list[str]:
        return cast(list[str], importlib.import_module(module).section(result))

    return write


def routers(result: dict[str, Any]) -> list[str]:
    """Returns the section that leads to the leaderboard of routers."""
    return [
        "## Routers",
        "",
        f"{len(finished(result))} score functions, price controllers, selections and routing "
        "losses on the same model: [choosing-a-router.md](choosing-a-router.md).",
    ]


SECTIONS = (
    Section(result=headline.HEADLINE, write=headline.section, draw=headline.draw),
    Section(result="benchmarks/headline/large.json", write=headline.large),
    Section(
        result="benchmarks/headline/small.json", write=headline.small, draw=headline.draw_small
    ),
    Section(result="benchmarks/headline/medium.json", write=medium.section),
    Section(result="benchmarks/headline/ablation.json", write=ablation.section),
    Section(result="benchmarks/headline/compute.json", write=compute.section, draw=compute.draw),
    Section(result="benchmarks/headline/unseen.json", write=unseen.section),
    Section(result="benchmarks/leaderboard/leaderboard.json", write=routers),
    Section(
        result="benchmarks/synthetic/result.json",
        write=written_by("benchmarks.synthetic.page"),
        draw=synthetic.draw,
    ),
    Section(
        result="benchmarks/real_groups/result.json", write=written_by("benchmarks.real_groups.page")
    ),
)


def page(sections: tuple[Section, ...] = SECTIONS, *, root: Path = ROOT) -> str:
    """Returns the page, of those sections whose result file exists."""
    parts = [
        "\n".join(section.write(result)).rstrip("\n") for section, result in present(sections, root)
    ]
    return "\n\n".join(parts) + "\n"


def present(sections: tuple[Section, ...], root: Path) -> list[tuple[Section, dict[str, Any]]]:
    """Returns the sections whose result file exists, each with what it holds."""
    return [
        (section, json.loads((root / section.result).read_text()))
        for section in sections
        if (root / section.result).exists()
    ]
