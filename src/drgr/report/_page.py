"""The page about runs: sections in reading order."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drgr.errors import ConfigError
from drgr.report._comparison import (
    ComparedRun,
    final_bars_by_run,
    overlaid_curves,
    worst_against_mean,
)
from drgr.report._comparison_tables import comparison_table, settings_table
from drgr.report._document import check_output, write_document
from drgr.report._html import Html, join, styled, tag, text
from drgr.report._loading import load_run
from drgr.report._records import RunRecord
from drgr.report._sections import card, cards, run_section
from drgr.report._style import SeriesStyle, domain_styles, run_styles
from drgr.report._summary import domain_names, summarize


def write_report(runs: Sequence[Path], *, output: Path) -> Path:
    """Writes one HTML file about one run, or about several side by side.

    The file holds everything it shows, scripts included, and forbids itself any network access. It
    is written under a temporary name and renamed, so that a failure leaves an older report whole.

    Args:
        runs: run directories; with several, the first is the baseline of the differences.
        output: the file to write; missing parent directories are made.

    Returns:
        ``output``.

    Raises:
        ConfigError: if ``runs`` is empty, ``output`` is a directory, or a run directory is none.
        DataError: if a file of a run cannot be read.
    """
    if not runs:
        raise ConfigError("runs must name at least one run directory, got none; give one or more")
    check_output(output)
    compared, styles = _compared([load_run(directory) for directory in runs])
    labels = [run.label for run in compared]
    sections = [_comparison_section(compared, styles)] if len(compared) > 1 else []
    sections += [
        run_section(run, styles, anchor=f"run-{index}") for index, run in enumerate(compared)
    ]
    return write_document(
        output,
        title="drgr report: " + ", ".join(labels),
        navigation=_navigation(labels),
        content=join(*sections),
    )


def _compared(
    records: Sequence[RunRecord],
) -> tuple[list[ComparedRun], dict[str, SeriesStyle]]:
    labels = _distinct_names([record.directory for record in records])
    looks = run_styles(labels)
    names = dict.fromkeys(name for record in records for name in domain_names(record))
    runs = [
        ComparedRun(label=label, record=record, summary=summarize(record), style=looks[label])
        for label, record in zip(labels, records, strict=True)
    ]
    return runs, domain_styles(tuple(names))


def _comparison_section(runs: Sequence[ComparedRun], styles: dict[str, SeriesStyle]) -> Html:
    unfinished = [run.label for run in runs if run.record.evaluation is None]
    warning = Html("")
    if unfinished:
        warning = styled(
            "p",
            "warning",
            text(
                f"Without a final evaluation: {', '.join(unfinished)}. Their numbers are from "
                "their last validation, so compare with care."
            ),
        )
    return tag(
        "section",
        tag("h2", text(f"{len(runs)} runs side by side")),
        warning,
        *_comparison_body(runs, styles),
        tag("h3", text("Settings that differ")),
        styled("div", "card wide", settings_table(runs)),
        attributes={"id": "comparison"},
    )


def _comparison_body(runs: Sequence[ComparedRun], styles: dict[str, SeriesStyle]) -> list[Html]:
    table = styled("div", "card", comparison_table(runs, styles))
    points, bars = worst_against_mean(runs), final_bars_by_run(runs, styles)
    curves = overlaid_curves(runs, styles)
    if len(runs) == 2:
        return [styled("div", "columns", table, card(points)), cards([bars, curves])]
    return [table, cards([points, curves, replace(bars, is_wide=True)])]


def _navigation(labels: Sequence[str]) -> Html:
    if len(labels) < 2:
        return Html("")
    links = [("#comparison", "Side by side")]
    links += [(f"#run-{index}", label) for index, label in enumerate(labels)]
    return tag(
        "nav", *(tag("a", text(name), attributes={"href": target}) for target, name in links)
    )


def _distinct_names(directories: Sequence[Path]) -> list[str]:
    """Names each run by the shortest end of its path that no other run shares."""
    parts = [directory.resolve().parts for directory in directories]
    for length in range(1, max(len(path) for path in parts) + 1):
        names = ["/".join(path[-length:]).lstrip("/") for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path[-1]} ({index + 1})" for index, path in enumerate(parts)]
