"""Tables of one run: domains, totals, layers, environment."""

from collections.abc import Mapping, Sequence

from drgr.report._html import (
    MISSING,
    Html,
    duration,
    flops,
    join,
    number,
    percent,
    size,
    styled,
    swatch,
    tag,
    text,
)
from drgr.report._records import LossWindow, Repulsion, RunRecord
from drgr.report._style import SeriesStyle, layer_labels
from drgr.report._summary import (
    BudgetSummary,
    DomainSummary,
    RunSummary,
    highest_congestion,
    highest_violation,
    lowest_violation,
)

_NOTHING = Html("")


def number_cell(
    value: float | None, shown: str, *, before: Html = _NOTHING, after: Html = _NOTHING
) -> Html:
    """Builds a table cell that keeps the exact value in ``data-value`` beside the rounded text."""
    exact = {} if value is None else {"data-value": repr(value)}
    return tag("td", before, text(shown), after, attributes={"class": "number", **exact})


def domain_table(summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Html:
    """Builds the table of domains, worst first and marked."""
    heads = (
        "Domain",
        "Train tokens",
        "Held-out bits per byte",
        "Adversarial weight",
        "Experts per token",
    )
    head = tag("tr", *(tag("th", text(name), attributes={"scope": "col"}) for name in heads))
    rows = [_domain_row(domain, styles[domain.name]) for domain in summary.domains]
    apart = [f"{name} {number(bits, 3)}" for name, bits in summary.unseen.items()]
    shown = f"; unseen in training, in no other number: {', '.join(apart)}" if apart else ""
    caption = tag("caption", text(f"Held-out: {summary.source}{shown}"))
    table = tag(
        "table", caption, tag("thead", head), tag("tbody", *rows), attributes={"class": "domains"}
    )
    return styled("div", "scroll", table)


def tiles(summary: RunSummary, *, num_domains: int) -> Html:
    """Builds the row of headline numbers."""
    budget = summary.budget
    over = "log windows" if budget.over_is_windows else "steps"
    share = percent(_share(budget.training_spend, budget.training_budget), 2)
    return styled(
        "div",
        "tiles",
        _tile(
            "Worst domain",
            number(summary.worst_bits_per_byte, 3),
            f"bits per byte, {summary.worst_domain or 'unknown'}",
            style="tile worst",
        ),
        _tile("Mean over domains", number(summary.mean_bits_per_byte, 3), "bits per byte"),
        _tile("Effective domains", number(summary.effective_domains, 2), f"of {num_domains}"),
        _tile("Training spend", share, f"of the budget, {number(budget.over)} {over} over it"),
    )


def totals(summary: RunSummary) -> Html:
    """Builds the list below the domain table."""
    budget = summary.budget
    highest, lowest = highest_violation(summary.layers), lowest_violation(summary.layers)
    congestion = highest_congestion(summary.layers)
    over = "Log windows over budget" if budget.over_is_windows else "Training steps over budget"
    entries: list[tuple[str, float | None, str]] = [
        ("Mean bits per byte", summary.mean_bits_per_byte, number(summary.mean_bits_per_byte, 4)),
        ("Worst bits per byte", summary.worst_bits_per_byte, _worst(summary)),
        (
            "Effective number of domains",
            summary.effective_domains,
            number(summary.effective_domains, 2),
        ),
        ("Budget rule", None, _rule(budget)),
        (
            "Training spend",
            budget.training_spend,
            _of(budget.training_spend, budget.training_budget),
        ),
        (over, budget.over, number(budget.over)),
        (
            "Evaluation spend",
            budget.evaluation_spend,
            _of(budget.evaluation_spend, budget.evaluation_budget),
        ),
        ("MaxVio, highest layer", highest, number(highest, 3)),
        ("MinVio, lowest layer", lowest, number(lowest, 3)),
        ("Congestion, highest layer", congestion, number(congestion, 2)),
        ("Exchange a step, forward", summary.exchanged_forward, size(summary.exchanged_forward)),
        ("Exchange a step, backward", summary.exchanged_backward, size(summary.exchanged_backward)),
        ("Training compute", summary.flops, flops(summary.flops)),
        ("Of that the outer loop", summary.outer_flops, flops(summary.outer_flops)),
        ("Throughput", summary.tokens_per_second, f"{number(summary.tokens_per_second)} tokens/s"),
        ("Training time", summary.seconds, duration(summary.seconds)),
    ]
    return styled("dl", "totals", *(_entry(name, value, shown) for name, value, shown in entries))


def layer_table(summary: RunSummary) -> Html:
    """Builds the table of expert balance by layer."""
    heads = ["Layer", "MaxVio", "MinVio", "AvgVio", "Dead", "Entropy", "Similarity", "Congestion"]
    heads += ["Repulsion", "Phases"]
    head = tag("tr", *(tag("th", text(name), attributes={"scope": "col"}) for name in heads))
    labels = layer_labels([layer.name for layer in summary.layers])
    rows = [
        tag(
            "tr",
            tag("th", text(labels[layer.name]), attributes={"scope": "row", "title": layer.name}),
            number_cell(layer.max_violation, number(layer.max_violation, 3)),
            number_cell(layer.min_violation, number(layer.min_violation, 3)),
            number_cell(layer.mean_violation, number(layer.mean_violation, 3)),
            number_cell(layer.dead_experts, number(layer.dead_experts)),
            number_cell(layer.routing_entropy, number(layer.routing_entropy, 3)),
            number_cell(layer.router_similarity, number(layer.router_similarity, 3)),
            number_cell(layer.congestion, number(layer.congestion, 2)),
            number_cell(layer.repulsion.estimate, _interval(layer.repulsion)),
            tag("td", text(_phases(layer.repulsion)), attributes={"class": "number"}),
        )
        for layer in summary.layers
    ]
    caption = tag(
        "caption",
        text(
            "Expert balance: 0 is even, MinVio of -1 is an unused expert. Entropy: 0 is decided, "
            "1 is flat. Similarity: mean cosine of router rows. Repulsion: effective congestion "
            "coefficient with its interval of 95 %; phases: the steps between its rise, stay and "
            "fall over validations, if there are such"
        ),
    )
    table = tag(
        "table", caption, tag("thead", head), tag("tbody", *rows), attributes={"class": "layers"}
    )
    return styled("div", "scroll tall", table)


def _interval(repulsion: Repulsion) -> str:
    shown = number(repulsion.estimate, 1)
    if repulsion.lower is None or repulsion.upper is None:
        return shown
    return f"{shown} ({number(repulsion.lower, 1)} to {number(repulsion.upper, 1)})"


def _phases(repulsion: Repulsion) -> str:
    if repulsion.has_phases is None:
        return MISSING
    first, second = (number(kink) for kink in repulsion.kinks)
    return f"{first}, {second}" if repulsion.has_phases else "none"


def loss_table(losses: Mapping[str, tuple[LossWindow, LossWindow]]) -> Html:
    """Builds the table of routing losses from the first and the last window of each."""
    heads = ("Routing loss", "First window", "Last window", "Coefficient")
    head = tag("tr", *(tag("th", text(name), attributes={"scope": "col"}) for name in heads))
    rows = [
        tag(
            "tr",
            tag("th", text(name), attributes={"scope": "row"}),
            number_cell(first.value, number(first.value, 4)),
            number_cell(last.value, number(last.value, 4)),
            number_cell(
                last.coefficient, MISSING if last.coefficient is None else f"{last.coefficient:g}"
            ),
        )
        for name, (first, last) in losses.items()
    ]
    caption = tag("caption", text("Losses of routing, without their coefficients"))
    table = tag(
        "table", caption, tag("thead", head), tag("tbody", *rows), attributes={"class": "losses"}
    )
    return styled("div", "scroll", table)


def environment_list(run: RunRecord) -> Html:
    """Builds the list of command, commit, versions and hardware."""
    environment = run.environment
    hardware = [f"{name}: {value}" for name, value in environment.hardware.items()]
    if environment.processes is not None:
        hardware.append(f"processes: {number(environment.processes)}")
    versions = [f"{name} {value}" for name, value in environment.versions.items()]
    return styled(
        "dl",
        "environment",
        _item("Command", styled("code", "command", text(environment.command or MISSING))),
        _item("Commit", _commit(run)),
        _item("Started", text(environment.started or MISSING)),
        _item("Versions", _pills(versions)),
        _item("Hardware", _pills(hardware)),
        _item("Directory", tag("code", text(str(run.directory)))),
    )


def _domain_row(domain: DomainSummary, style: SeriesStyle) -> Html:
    badge = styled("strong", "badge", text("worst")) if domain.is_worst else Html("")
    return tag(
        "tr",
        tag(
            "th",
            swatch(style.colour, style.dash),
            styled("span", "name", text(domain.name)),
            badge,
            attributes={"scope": "row", "title": domain.name},
        ),
        number_cell(domain.train_tokens, number(domain.train_tokens)),
        number_cell(domain.bits_per_byte, number(domain.bits_per_byte, 3)),
        number_cell(domain.adversarial_weight, percent(domain.adversarial_weight)),
        number_cell(domain.experts_per_token, number(domain.experts_per_token, 2)),
        attributes={"class": "worst"} if domain.is_worst else None,
    )


def _tile(name: str, value: str, detail: str, *, style: str = "tile") -> Html:
    return styled(
        "div",
        style,
        styled("span", "tile-name", text(name)),
        styled("span", "tile-value", text(value)),
        styled("span", "tile-detail", text(detail)),
    )


def _entry(name: str, value: float | None, shown: str) -> Html:
    exact = {} if value is None else {"data-value": repr(value)}
    return tag("div", tag("dt", text(name)), tag("dd", text(shown), attributes=exact))


def _item(name: str, content: Html) -> Html:
    return tag("div", tag("dt", text(name)), tag("dd", content))


def _pills(values: Sequence[str]) -> Html:
    if not values:
        return text(MISSING)
    return join(*(styled("span", "pill", text(value)) for value in values))


def _commit(run: RunRecord) -> Html:
    full = run.environment.commit or MISSING
    commit = tag("code", text(full[:12]), attributes={"title": full})
    if run.environment.dirty:
        return join(commit, styled("strong", "badge", text("with uncommitted changes")))
    return commit


def _worst(summary: RunSummary) -> str:
    if summary.worst_bits_per_byte is None:
        return MISSING
    return f"{summary.worst_bits_per_byte:.4f} ({summary.worst_domain})"


def _rule(budget: BudgetSummary) -> str:
    if budget.minimum is None or budget.maximum is None:
        return "see the configuration"
    rule = f"{budget.minimum:g} to {budget.maximum:g} {budget.unit or ''} per token".replace(
        "  ", " "
    )
    return rule if budget.average is None else f"{rule}, {budget.average:g} on average"


def _of(spend: float | None, budget: float | None) -> str:
    shown = f"{number(spend)} of {number(budget)} assignments"
    share = _share(spend, budget)
    return shown if share is None else f"{shown} ({percent(share, 2)})"


def _share(spend: float | None, budget: float | None) -> float | None:
    return None if spend is None or not budget else spend / budget
