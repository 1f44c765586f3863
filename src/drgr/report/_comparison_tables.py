"""Tables that set several runs side by side: results with differences, and differing settings."""

import json
from collections.abc import Callable, Mapping, Sequence

from drgr.report._comparison import ComparedRun, common_order
from drgr.report._html import MISSING, Html, flops, number, percent, styled, swatch, tag, text
from drgr.report._style import SeriesStyle
from drgr.report._summary import highest_violation
from drgr.report._tables import number_cell

_Format = Callable[[float | None], str]


def comparison_table(runs: Sequence[ComparedRun], domain_styles: Mapping[str, SeriesStyle]) -> Html:
    """Builds the table of results: a column per run, with the difference from the first run.

    Args:
        runs: at least two runs; the first is the baseline.
        domain_styles: domain -> look.

    Returns:
        The table. Differences of losses say in words whether they are better or worse.
    """
    body = [
        _row("Mean bits per byte", [r.summary.mean_bits_per_byte for r in runs]),
        _row(
            "Worst bits per byte",
            [r.summary.worst_bits_per_byte for r in runs],
            notes=[r.summary.worst_domain or "" for r in runs],
            style="worst",
        ),
        *(_domain_row(name, runs, domain_styles[name]) for name in common_order(runs)),
        *_resource_rows(runs),
    ]
    heads = [tag("th", text("Result"), attributes={"scope": "col"})]
    heads += [_run_head(run, is_baseline=index == 0) for index, run in enumerate(runs)]
    table = tag(
        "table",
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        attributes={"class": "comparison"},
    )
    return styled("div", "scroll", table)


def settings_table(runs: Sequence[ComparedRun]) -> Html:
    """Builds the table of configuration entries whose values differ between the runs."""
    flat = [dict(_leaves(run.record.config, "")) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for leaves in flat for key in leaves)
        if len({leaves.get(key) for leaves in flat}) > 1
    ]
    if not keys:
        return tag("p", text("The configurations are equal."))
    head = tag(
        "tr", tag("th", text("Setting")), *(_run_head(run, is_baseline=False) for run in runs)
    )
    rows = [
        tag(
            "tr",
            tag("th", tag("code", text(key)), attributes={"scope": "row"}),
            *(tag("td", tag("code", text(leaves.get(key, MISSING)))) for leaves in flat),
        )
        for key in keys
    ]
    table = tag("table", tag("thead", head), tag("tbody", *rows), attributes={"class": "settings"})
    return styled("div", "scroll", table)


def _run_head(run: ComparedRun, *, is_baseline: bool) -> Html:
    name = styled("span", "name", text(run.label))
    note = styled("span", "note", text("baseline")) if is_baseline else Html("")
    return tag(
        "th",
        swatch(run.style.colour, run.style.dash),
        name,
        note,
        attributes={"scope": "col", "title": run.label},
    )


def _domain_row(name: str, runs: Sequence[ComparedRun], style: SeriesStyle) -> Html:
    found = [{d.name: d for d in run.summary.domains}.get(name) for run in runs]
    return _row(
        name,
        [None if domain is None else domain.bits_per_byte for domain in found],
        notes=["worst" if domain is not None and domain.is_worst else "" for domain in found],
        look=style,
    )


def _resource_rows(runs: Sequence[ComparedRun]) -> list[Html]:
    summaries = [run.summary for run in runs]
    spends = [
        None
        if not s.budget.training_budget or s.budget.training_spend is None
        else s.budget.training_spend / s.budget.training_budget
        for s in summaries
    ]
    violations = [highest_violation(s.layers) for s in summaries]
    return [
        _row(
            "Effective number of domains",
            [s.effective_domains for s in summaries],
            shown=lambda v: number(v, 2),
            lower_is_better=None,
        ),
        _row(
            "Training spend / budget",
            spends,
            shown=lambda v: percent(v, 2),
            lower_is_better=None,
        ),
        _row("MaxVio, highest layer", violations),
        _row(
            "Training compute",
            [s.flops for s in summaries],
            shown=flops,
            is_relative=True,
            lower_is_better=None,
        ),
        _row(
            "Tokens per second",
            [s.tokens_per_second for s in summaries],
            shown=number,
            is_relative=True,
            lower_is_better=False,
        ),
    ]


def _row(
    name: str,
    values: Sequence[float | None],
    *,
    notes: Sequence[str] = (),
    shown: _Format = lambda value: number(value, 3),
    is_relative: bool = False,
    lower_is_better: bool | None = True,
    look: SeriesStyle | None = None,
    style: str = "",
) -> Html:
    mark = Html("") if look is None else swatch(look.colour, look.dash)
    cells = []
    for index, value in enumerate(values):
        difference = Html("")
        if index > 0:
            difference = _difference(
                value,
                values[0],
                shown=shown,
                is_relative=is_relative,
                lower_is_better=lower_is_better,
            )
        note = notes[index] if notes else ""
        cells.append(_cell(value, shown(value), note=note, difference=difference))
    head = tag(
        "th",
        mark,
        styled("span", "name", text(name)),
        attributes={"scope": "row", "title": name},
    )
    return tag("tr", head, *cells, attributes={"class": style} if style else None)


def _cell(value: float | None, shown: str, *, note: str, difference: Html) -> Html:
    # The note stands first, so that numbers stay aligned.
    before = styled("span", "note", text(note)) if note else Html("")
    return number_cell(value, shown, before=before, after=difference)


def _difference(
    value: float | None,
    baseline: float | None,
    *,
    shown: _Format,
    is_relative: bool,
    lower_is_better: bool | None,
) -> Html:
    if value is None or baseline is None or (is_relative and baseline == 0):
        return Html("")
    change = value - baseline
    amount = percent(abs(change) / abs(baseline)) if is_relative else shown(abs(change))
    if amount == (percent(0.0) if is_relative else shown(0.0)):
        return styled("span", "difference same", text("same"))
    sign = "+" if change > 0 else "\N{MINUS SIGN}"
    if lower_is_better is None:
        return styled("span", "difference same", text(f"{sign}{amount}"))
    verdict = "better" if (change < 0) == lower_is_better else "worse"
    return styled("span", f"difference {verdict}", text(f"{sign}{amount} {verdict}"))


def _leaves(value: object, prefix: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [
            leaf
            for key, inner in value.items()
            for leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, json.dumps(value, ensure_ascii=False))]
