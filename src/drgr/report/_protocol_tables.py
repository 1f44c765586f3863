"""Tables of the protocol: domains, totals, layers."""

from collections.abc import Mapping, Sequence

from drgr.report._html import (
    MISSING,
    Html,
    flops,
    number,
    percent,
    size,
    styled,
    swatch,
    tag,
    text,
)
from drgr.report._protocol_records import Points, ProtocolDomain, ProtocolRecord
from drgr.report._style import SeriesStyle, layer_labels
from drgr.report._tables import number_cell

Entry = tuple[str, float | None, str]


def protocol_domains(record: ProtocolRecord, styles: Mapping[str, SeriesStyle]) -> Html:
    """Builds the table of domains with standard errors and tails, worst first."""
    levels = [level for level, _ in record.fairness.tails]
    heads = ["Domain", "Bits per byte", "Loss (nats)"]
    heads += [f"Worst {percent(level, 0)} of tokens" for level in levels]
    heads += ["Experts per token", "Without expert"]
    excess = record.robustness.excess
    heads += ["Excess"] if excess else []
    order = sorted(
        record.domains, key=lambda name: -(record.domains[name].bits_per_byte or -float("inf"))
    )
    rows = [
        _domain_row(record.domains[name], styles[name], name, len(levels))
        + ([number_cell(excess.get(name), _signed(excess.get(name)))] if excess else [])
        for name in order
    ]
    caption = (
        "Bits per byte and loss with their standard errors over windows; tails are means, in nats"
    )
    return _table(heads, rows, caption=caption, style="protocol-domains")


def protocol_totals(record: ProtocolRecord) -> Html:
    """Builds the list beside the table."""
    entries = [*_robustness(record), *_fairness(record), *_compute(record)]
    return styled("dl", "totals", *(_entry(*entry) for entry in entries))


def protocol_layers(record: ProtocolRecord) -> Html:
    """Builds the table of expert balance on the evaluated split."""
    labels = layer_labels([layer.name for layer in record.layers])
    heads = ["Layer", "Routing entropy", "Dead experts", "Overload", "Congestion of load"]
    rows = [
        [
            tag("th", text(labels[layer.name]), attributes={"scope": "row", "title": layer.name}),
            number_cell(layer.routing_entropy, number(layer.routing_entropy, 3)),
            number_cell(layer.dead_experts, number(layer.dead_experts)),
            number_cell(layer.overload, number(layer.overload, 2)),
            number_cell(layer.congestion, number(layer.congestion, 2)),
        ]
        for layer in record.layers
    ]
    caption = "Entropy: 0 is decided, 1 is flat; overload: the busiest expert over the mean one"
    return _table(heads, rows, caption=caption, style="protocol-layers")


def _domain_row(
    domain: ProtocolDomain, style: SeriesStyle, name: str, num_levels: int
) -> list[Html]:
    badge = Html("")
    if domain.held_out:
        badge = styled("strong", "badge", text("not trained on"))
    first = tag(
        "th",
        swatch(style.colour, style.dash),
        styled("span", "name", text(name)),
        badge,
        attributes={"scope": "row", "title": name},
    )
    tails = [value for _, value in domain.tails][:num_levels]
    tails += [None] * (num_levels - len(tails))
    return [
        first,
        number_cell(
            domain.bits_per_byte, _with_error(domain.bits_per_byte, domain.bits_per_byte_error)
        ),
        number_cell(domain.loss, _with_error(domain.loss, domain.loss_error)),
        *(number_cell(value, number(value, 2)) for value in tails),
        number_cell(domain.experts_per_token, number(domain.experts_per_token, 2)),
        number_cell(domain.dropped_share, percent(domain.dropped_share)),
    ]


def _robustness(record: ProtocolRecord) -> list[Entry]:
    robust = record.robustness
    worst = f"{number(robust.worst, 4)} ({robust.worst_domain or MISSING})"
    entries: list[Entry] = [
        ("Mean over domains", robust.mean, f"{number(robust.mean, 4)} bits per byte"),
        *_tails("of domains", robust.cvar, 4),
        ("Worst domain", robust.worst, worst),
    ]
    entries += [
        (f"Random mixtures, {percent(share, 0)} below", value, number(value, 4))
        for share, value in robust.mixtures
    ]
    if robust.reference is not None:
        entries.append(("Excess over", None, robust.reference))
    return entries


def _fairness(record: ProtocolRecord) -> list[Entry]:
    fairness = record.fairness
    sampled = fairness.kept != fairness.of
    note = f" (from {number(fairness.kept)} of {number(fairness.of)})" if sampled else ""
    return [
        ("Gini of the domains", fairness.gini, number(fairness.gini, 4)),
        ("Largest less smallest", fairness.max_minus_min, number(fairness.max_minus_min, 4)),
        *(
            (name, value, f"{shown} nats{note}")
            for name, value, shown in _tails("of all tokens", fairness.tails, 3)
        ),
    ]


def _compute(record: ProtocolRecord) -> list[Entry]:
    compute = record.compute
    spend = f"{number(compute.assignments)} assignments"
    if compute.budget is not None:
        spend += f" of {number(compute.budget)}, {number(compute.layers_over)} layers over"
    return [
        ("Forward compute a token", compute.flops_per_token, flops(compute.flops_per_token)),
        ("Formula less counter", compute.flops_difference, _agreement(record)),
        ("Forward pass, median", compute.p50_seconds, _milliseconds(compute.p50_seconds)),
        ("Forward pass, 95 % within", compute.p95_seconds, _milliseconds(compute.p95_seconds)),
        (
            "Forward speed",
            compute.tokens_per_second,
            f"{number(compute.tokens_per_second)} tokens/s on {compute.device or MISSING}",
        ),
        (
            "Peak memory",
            compute.peak_bytes,
            f"{size(compute.peak_bytes)} ({compute.peak_kind or MISSING})",
        ),
        ("Spend", compute.assignments, spend),
        ("Exchange a token", compute.exchanged_per_token, size(compute.exchanged_per_token)),
    ]


def _agreement(record: ProtocolRecord) -> str:
    compute = record.compute
    if compute.flops_difference is None:
        return "no formula for this model"
    verdict = "they agree" if compute.flops_agree else "they DISAGREE"
    return f"{percent(compute.flops_difference, 2)}, {verdict}"


def _tails(what: str, points: Points, digits: int) -> list[Entry]:
    return [
        (f"Worst {percent(level, 0)} {what}", value, number(value, digits))
        for level, value in points
    ]


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[Html]], *, caption: str, style: str
) -> Html:
    head = tag("tr", *(tag("th", text(name), attributes={"scope": "col"}) for name in heads))
    body = [tag("tr", *cells) for cells in rows]
    table = tag(
        "table",
        tag("caption", text(caption)),
        tag("thead", head),
        tag("tbody", *body),
        attributes={"class": style},
    )
    return styled("div", "scroll", table)


def _entry(name: str, value: float | None, shown: str) -> Html:
    exact = {} if value is None else {"data-value": repr(value)}
    return tag("div", tag("dt", text(name)), tag("dd", text(shown), attributes=exact))


def _with_error(value: float | None, error: float | None) -> str:
    shown = number(value, 3)
    if error is None:
        return shown
    return f"{shown}\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}{number(error, 3)}"


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.3f}"


def _milliseconds(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{1e3 * seconds:,.1f} ms"
