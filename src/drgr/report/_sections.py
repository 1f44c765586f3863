"""One run's section of the page: headline, tables, charts by topic, configuration, alarms."""

from collections.abc import Mapping, Sequence

from drgr.report._budget_figures import experts_bars, experts_curves, spend_curves
from drgr.report._charts import Chart
from drgr.report._comparison import ComparedRun
from drgr.report._expert_figures import domain_maps, load_map, violation_curves
from drgr.report._html import (
    Html,
    data_script,
    join,
    number,
    pretty_json,
    styled,
    swatch,
    tag,
    text,
)
from drgr.report._loss_figures import final_bars, loss_curves, objective_curves
from drgr.report._protocol_figures import decile_curves, robust_curve
from drgr.report._protocol_tables import protocol_domains, protocol_layers, protocol_totals
from drgr.report._records import RunRecord
from drgr.report._style import SeriesStyle
from drgr.report._summary import RunSummary
from drgr.report._tables import (
    domain_table,
    environment_list,
    layer_table,
    loss_table,
    tiles,
    totals,
)
from drgr.report._traffic_figures import congestion_curves, traffic_maps
from drgr.report._weight_figures import adversary_curves, effective_domains, sampling_curves

_MAX_NOTES = 30


def run_section(run: ComparedRun, styles: Mapping[str, SeriesStyle], *, anchor: str) -> Html:
    """Builds everything that the page says about one run.

    Args:
        run: the run with its summary.
        styles: domain -> look, shared by all runs of the page.
        anchor: id of the section.

    Returns:
        The section.
    """
    record, summary = run.record, run.summary
    own = {domain.name: styles[domain.name] for domain in summary.domains}
    return tag(
        "section",
        tag("h2", text(run.label)),
        styled("div", "card run-head", environment_list(record)),
        _warnings(record),
        tiles(summary, num_domains=len(own)),
        styled(
            "div",
            "columns",
            styled("div", "card", domain_table(summary, styles)),
            styled("div", "card", totals(summary)),
        ),
        _domain_legend(summary, own),
        *_topics(record, summary, own),
        _protocol(record, styles),
        _alarms(record),
        tag("h3", text("Configuration")),
        _details("Full configuration (JSON)", pretty_json(record.config)),
        attributes={"id": anchor, "class": "run scope"},
    )


def cards(charts: Sequence[Chart]) -> Html:
    """Builds the grid of charts."""
    return styled("div", "grid", *(card(chart) for chart in charts))


def _topics(
    record: RunRecord, summary: RunSummary, styles: Mapping[str, SeriesStyle]
) -> list[Html]:
    topics = {
        "Domains": (
            final_bars(summary, styles),
            loss_curves(record, summary, styles),
        ),
        "Adversary": (
            adversary_curves(record, styles),
            sampling_curves(record, styles),
            effective_domains(record, num_domains=len(styles)),
            objective_curves(record),
        ),
        "Budget": (
            experts_bars(summary, styles),
            experts_curves(record, styles),
            spend_curves(record, summary),
        ),
        "Gradient traffic": (
            traffic_maps(record, summary, styles),
            congestion_curves(record),
        ),
        "Experts": (
            load_map(record),
            domain_maps(record, summary, styles),
        ),
    }
    balance = styled(
        "div",
        "columns below",
        card(violation_curves(record)),
        styled("div", "card", layer_table(summary)),
    )
    return [
        *(join(tag("h3", text(topic)), cards(charts)) for topic, charts in topics.items()),
        balance,
        _losses(record),
    ]


def _protocol(record: RunRecord, styles: Mapping[str, SeriesStyle]) -> Html:
    """Builds what ``drgr evaluate`` measured, where it did."""
    protocol = record.protocol
    if protocol is None:
        return Html("")
    windows = "all windows"
    if protocol.max_windows is not None:
        windows = f"at most {number(protocol.max_windows)} windows of each domain"
    # A model whose training is not known has no steps.
    after = "" if protocol.step is None else f" after {number(protocol.step)} steps"
    source = f"{protocol.split} split of {protocol.corpus}{after}, {windows}"
    return join(
        tag("h3", text("Evaluation protocol")),
        tag("p", text(source)),
        styled(
            "div",
            "columns",
            styled("div", "card", protocol_domains(protocol, styles), protocol_layers(protocol)),
            styled("div", "card", protocol_totals(protocol)),
        ),
        cards((robust_curve(protocol), decile_curves(protocol, styles))),
    )


def _losses(record: RunRecord) -> Html:
    """Builds the table of routing losses; nothing for a run without one."""
    first, last = (
        ({}, {})
        if not record.train
        else (record.train[0].routing_losses, record.train[-1].routing_losses)
    )
    both = {name: (first[name], last[name]) for name in first if name in last}
    if not both:
        return Html("")
    return styled("div", "columns below", styled("div", "card", loss_table(both)))


def card(chart: Chart) -> Html:
    """Builds a chart with its title, selector, legend and caption."""
    style = "card wide scope" if chart.is_wide else "card scope"
    selector = _selector(chart) if len(chart.choices) > 1 and chart.figure is not None else Html("")
    legend = Html("")
    if len(chart.legend) > 1 and chart.figure is not None:
        legend = styled("div", "legend", *(_chip(entry) for entry in chart.legend))
    return tag(
        "figure",
        styled("div", "card-head", tag("h4", text(chart.title)), selector),
        legend,
        styled("p", "scale", text(chart.scale)) if chart.scale else Html(""),
        _plot(chart),
        tag("figcaption", text(chart.caption)),
        attributes={"class": style, "data-kind": chart.kind},
    )


def _plot(chart: Chart) -> Html:
    if chart.figure is None:
        return styled("p", "nothing", text("This run has no data for this chart."))
    return styled(
        "div",
        "chart",
        data_script(chart.figure.to_json(engine="json"), style="figure-data"),
    )


def _selector(chart: Chart) -> Html:
    options = [
        tag("option", text(name), attributes={"value": str(index)})
        for index, name in enumerate(chart.choices)
    ]
    # Browsers restore form fields on reload, but not what the chart shows.
    attributes = {"aria-label": f"{chart.title}: choose", "autocomplete": "off"}
    return tag("select", *options, attributes=attributes)


def _domain_legend(summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Html:
    chips = [_chip(styles[domain.name], is_worst=domain.is_worst) for domain in summary.domains]
    return styled("div", "legend domain-legend", *chips) if chips else Html("")


def _chip(style: SeriesStyle, *, is_worst: bool = False) -> Html:
    mark = styled("strong", "badge", text("worst")) if is_worst else Html("")
    return tag(
        "button",
        swatch(style.colour, style.dash),
        styled("span", "name", text(style.label)),
        mark,
        attributes={
            "type": "button",
            "class": "chip",
            "data-series": style.key,
            "aria-pressed": "true",
            "title": "Show or hide",
        },
    )


def _warnings(record: RunRecord) -> Html:
    parts = []
    if record.evaluation is None:
        parts.append(
            styled(
                "p",
                "warning",
                text(
                    "This run has no evaluation.json: it was interrupted, or is still running. The "
                    "numbers below are from its last validation and training records."
                ),
            )
        )
    if record.notes:
        shown = [tag("li", text(note)) for note in record.notes[:_MAX_NOTES]]
        more = len(record.notes) - len(shown)
        if more:
            shown.append(tag("li", text(f"and {more} more")))
        summary = tag("summary", text(f"{len(record.notes)} note(s) on what was left out"))
        parts.append(
            tag("details", summary, tag("ul", *shown), attributes={"class": "warning", "open": ""})
        )
    return join(*parts)


def _alarms(record: RunRecord) -> Html:
    heading = tag("h3", text("Alarms"))
    if not record.alarms:
        return join(heading, tag("p", text("None.")))
    rows = [
        tag("li", styled("strong", "step", text(f"step {alarm.step:,}")), text(" " + alarm.message))
        for alarm in record.alarms
    ]
    summary = tag("summary", text(f"{len(rows)} alarm(s)"))
    folded = {"class": "warning", "open": ""} if len(rows) <= 5 else {"class": "warning"}
    return join(heading, tag("details", summary, tag("ul", *rows), attributes=folded))


def _details(title: str, content: str) -> Html:
    return tag(
        "details",
        tag("summary", text(title)),
        tag("pre", text(content)),
        attributes={"class": "card wide config"},
    )
