"""The page about an experiment, from its ``summary.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drgr.report._document import check_output, write_document
from drgr.report._experiment_figures import worst_flops_frontier, worst_mean_frontier
from drgr.report._html import (
    MISSING,
    Html,
    flops,
    join,
    number,
    percent,
    pretty_json,
    styled,
    swatch,
    tag,
    text,
)
from drgr.report._sections import cards
from drgr.report._style import SeriesStyle, run_styles
from drgr.report._tables import number_cell

Json = Mapping[str, Any]
_NAMES = {"worst_bits_per_byte": "worst domain", "mean_bits_per_byte": "mean of domains"}


def write_experiment_report(summary: Json, *, output: Path) -> Path:
    """Writes one HTML file about an experiment.

    Args:
        summary: What ``summary.json`` holds, see ``docs/comparing-methods.md``.
        output: The file to write; missing parent directories are made.

    Returns:
        ``output``.

    Raises:
        ConfigError: If ``output`` is a directory.
    """
    check_output(output)
    methods = summary["methods"]
    styles = run_styles([one["name"] for one in methods])
    charts = [worst_mean_frontier(methods, styles), worst_flops_frontier(methods, styles)]
    section = tag(
        "section",
        tag("h2", text(summary["name"])),
        _state(summary),
        _card(_results(summary, styles)),
        cards(charts),
        *_titled("Domains, bits per byte", _domains(methods, styles)),
        *_titled("Methods two by two", _pairs(summary), _pairs_note(summary)),
        *_titled("Runs that failed or exceeded their FLOPs", _failures(summary["failures"])),
        *_titled("Tuning", _trials(summary["trials"])),
        *_titled("Settings", _settings(methods)),
        tag("h3", text("Environment")),
        styled("div", "card wide config", tag("pre", text(pretty_json(summary["environment"])))),
        attributes={"id": "experiment"},
    )
    title = f"drgr experiment: {summary['name']}"
    return write_document(output, title=title, navigation=Html(""), content=section)


def _state(summary: Json) -> Html:
    """Says what the results are of, and what is missing from them."""
    seeds, reference = len(summary["seeds"]), summary["reference"]
    rules = {
        "cut": f"No method takes more FLOPs than {reference}.",
        "fill": f"Every method takes the FLOPs of {reference}, in whole steps.",
        "free": "FLOPs are not equal: every method takes its own steps.",
    }
    said = [tag("p", text(f"{seeds} seeds, test split. {rules[summary['flops_rule']]}"))]
    if not summary["complete"]:
        warning = "Not every run finished within its FLOPs: see the column of runs."
        said.append(styled("p", "warning", text(warning)))
    environment = summary["environment"]
    if environment["dirty"] or len(environment["commits"]) > 1:
        warning = "Source that differs from its commit, or several commits: see the environment."
        said.append(styled("p", "warning", text(warning)))
    left_out = summary["ranks"]["seeds_left_out"]
    if left_out:
        warning = f"Not ranked, as not every method finished them: seeds {left_out}."
        said.append(styled("p", "warning", text(warning)))
    return join(*said)


def _results(summary: Json, styles: Mapping[str, SeriesStyle]) -> Html:
    heads = ["Method", "Worst domain", "Mean of domains", "Mean rank, worst", "Mean rank, mean"]
    heads += ["Steps", "FLOPs", "In the outer loop", "Runs"]
    ranks = summary["ranks"]
    rows = []
    for one in summary["methods"]:
        figures = one["figures"]
        outer, total = figures["outer_flops"], figures["flops"]
        share = None if total is None else outer["mean"] / total["mean"]
        rows.append(
            [
                _method_head(one["name"], styles),
                _interval_cell(figures["worst_bits_per_byte"]),
                _interval_cell(figures["mean_bits_per_byte"]),
                *(_number_cell(ranks[figure].get(one["name"]), 2) for figure in _NAMES),
                tag("td", text(", ".join(map(str, one["steps"])) or MISSING)),
                number_cell(_mean(total), flops(_mean(total))),
                number_cell(share, percent(share)),
                tag("td", text(_counts(one["runs"]))),
            ]
        )
    caption = f"Bits per byte: mean and {summary['confidence']:.0%} bootstrap interval over seeds"
    return _table("experiment-results", heads, rows, caption=caption)


def _domains(methods: Sequence[Json], styles: Mapping[str, SeriesStyle]) -> Html:
    names = list(dict.fromkeys(name for one in methods for name in one["domains"]))
    rows = [
        [
            _method_head(one["name"], styles),
            *(_interval_cell(one["domains"].get(name)) for name in names),
        ]
        for one in methods
    ]
    return _table("experiment-domains", ["Method", *names], rows)


def _pairs(summary: Json) -> Html:
    heads = ["Figure", "Methods", "Difference", "Bootstrap interval", "Student's interval"]
    heads += ["p, sign flips", "Holm", "p, Student", "Holm", "Seeds"]
    rows = []
    for pair in summary["pairs"]:
        found = pair["difference"]
        rows.append(
            [
                tag("td", text(_NAMES[pair["figure"]])),
                tag("td", text(f"{pair['a']} \N{MINUS SIGN} {pair['b']}")),
                _number_cell(_mean(found), 4),
                tag("td", text(_bounds(found, "low", "high"))),
                tag("td", text(_bounds(found, "student_low", "student_high"))),
                *(
                    _number_cell(pair[key], 4)
                    for key in ("p_sign_flip", "p_sign_flip_holm", "p_student", "p_student_holm")
                ),
                tag("td", text(str(len(pair["seeds"])))),
            ]
        )
    return _table("experiment-pairs", heads, rows)


def _pairs_note(summary: Json) -> Html:
    count = len(summary["seeds"])
    note = (
        f"Paired by seed; below 0 the first is better. With {count} seeds the exact test of sign "
        f"flips has no p-value below {2.0 ** (1 - count):.4g}, and bootstrap intervals are too "
        f"narrow where seeds are few; Student's take differences to be normal. Holm corrects for "
        f"the number of pairs of a figure."
    )
    return tag("p", text(note))


def _failures(failures: Sequence[Json]) -> Html:
    if not failures:
        return tag("p", text("None."))
    rows = [
        [
            tag("td", text(str(one[key])))
            for key in ("name", "method", "attempt", "status", "error", "finished")
        ]
        for one in failures
    ]
    heads = ["Run", "Method", "Attempt", "What", "Error", "When"]
    return _table("experiment-failures words", heads, rows)


def _trials(trials: Sequence[Json]) -> Html:
    if not trials:
        return tag("p", text("None: settings are as the file gives them."))
    rows = [
        [
            tag("td", text(one["method"])),
            tag("td", text(str(one["trial"]))),
            tag("td", tag("code", text(_shown(one["settings"])))),
            _number_cell(one["objective"], 4),
            tag("td", text(one["error"] or one["status"])),
        ]
        for one in trials
    ]
    heads = ["Method", "Trial", "Settings", "Objective", "Status"]
    return _table("experiment-trials words", heads, rows)


def _settings(methods: Sequence[Json]) -> Html:
    rows = [
        [
            tag("td", text(one["name"])),
            tag("td", *(tag("div", tag("code", text(entry))) for entry in one["settings"])),
            tag("td", tag("code", text(_shown(one["tuned"] or {})))),
        ]
        for one in methods
    ]
    return _table("experiment-settings words", ["Method", "Settings", "Found by tuning"], rows)


def _table(
    style: str, heads: Sequence[str], rows: Sequence[Sequence[Html]], *, caption: str = ""
) -> Html:
    head = tag("tr", *(tag("th", text(name), attributes={"scope": "col"}) for name in heads))
    table = tag(
        "table",
        tag("caption", text(caption)) if caption else Html(""),
        tag("thead", head),
        tag("tbody", *(tag("tr", *cells) for cells in rows)),
        attributes={"class": style},
    )
    return styled("div", "scroll", table)


def _titled(title: str, *parts: Html) -> list[Html]:
    return [tag("h3", text(title)), _card(*parts)]


def _card(*parts: Html) -> Html:
    return styled("div", "card wide", *parts)


def _method_head(name: str, styles: Mapping[str, SeriesStyle]) -> Html:
    style = styles[name]
    return tag(
        "th",
        swatch(style.colour, style.dash),
        styled("span", "name", text(name)),
        attributes={"scope": "row", "title": name},
    )


def _interval_cell(found: Json | None) -> Html:
    if found is None:
        return number_cell(None, MISSING)
    note = styled("span", "difference same", text(_bounds(found, "low", "high")))
    return number_cell(found["mean"], number(found["mean"], 4), after=note)


def _number_cell(value: float | None, digits: int) -> Html:
    return number_cell(value, number(value, digits))


def _bounds(found: Json | None, low: str, high: str) -> str:
    if found is None or found[low] is None:
        return MISSING
    return f"[{found[low]:.4f}, {found[high]:.4f}]"


def _mean(found: Json | None) -> float | None:
    return None if found is None else found["mean"]


def _counts(runs: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in runs.items() if count) or "none"


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}"
        for path, value in settings.items()
    )
