"""Charts of the budget: what is spent of it, and which domains spend it."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from drgr.report._bars import Bar, add_reference, ranked_bars
from drgr.report._charts import Chart
from drgr.report._html import number
from drgr.report._records import RunRecord, TrainRecord, ValidationRecord
from drgr.report._style import (
    ACCENT,
    SeriesStyle,
    add_curve,
    empty_figure,
    rounded,
    thinned,
)
from drgr.report._summary import RunSummary

_TRAINING = SeriesStyle(
    key="spend-training",
    label="training",
    colour="#0E8A9A",
    dash="solid",
    symbol="circle",
    pattern="",
)
_VALIDATION = SeriesStyle(
    key="spend-validation",
    label="validation",
    colour="#A16207",
    dash="dash",
    symbol="diamond",
    pattern="",
)


def spend_curves(run: RunRecord, summary: RunSummary) -> Chart:
    """Draws spend as a percentage of the budget; every window over the budget stays visible."""
    figure = empty_figure(x_title="training step", y_title="spend, % of budget")
    shares = [
        *_add_spend(figure, run.train, style=_TRAINING),
        *_add_spend(figure, run.validation, style=_VALIDATION),
    ]
    if shares:
        _mark_limit(figure, shares)
    return Chart(
        kind="spend",
        title=f"Spend against budget{_verdict(summary)}",
        caption="At 100 % the whole budget is used; in the shaded area above it would be exceeded. "
        "Hover for assignments.",
        figure=figure if shares else None,
        legend=(_TRAINING, _VALIDATION),
        is_wide=True,
    )


def experts_curves(run: RunRecord, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws experts per token of each domain over training."""
    figure = empty_figure(x_title="training step", y_title="experts per token")
    figure.update_layout(hovermode="x unified")
    drawn = [
        add_curve(
            figure,
            [(record.step, record.experts_per_token.get(name)) for record in run.train],
            style=style,
            value_format=".2f",
        )
        for name, style in styles.items()
    ]
    return Chart(
        kind="experts-curves",
        title="Experts per token of each domain during training",
        caption="Where the budget goes: a domain that climbs takes experts from the others.",
        figure=figure if any(drawn) else None,
    )


def experts_bars(summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws final experts per token of each domain, in the order of the final losses."""
    bars = [
        Bar(
            value=domain.experts_per_token,
            shown=number(domain.experts_per_token, 2),
            style=styles[domain.name],
        )
        for domain in summary.domains
        if domain.experts_per_token is not None
    ]
    figure = ranked_bars(bars, x_title="experts per token", unit="experts per token")
    average = summary.budget.average
    if average is not None and summary.budget.unit == "experts":
        add_reference(figure, average, f"budget {average:g}")
    return Chart(
        kind="experts-bars",
        title="Final experts per token of each domain",
        caption=f"Domains in the order of their loss, worst on top ({summary.source}).",
        figure=figure if bars else None,
    )


def _add_spend(
    figure: go.Figure,
    records: Sequence[TrainRecord] | Sequence[ValidationRecord],
    *,
    style: SeriesStyle,
) -> list[float]:
    known = [
        (record.step, record.spend, record.budget)
        for record in records
        if record.spend is not None and record.budget
    ]
    if not known:
        return []
    # Thinning must never hide an excess.
    kept = {point[0] for point in thinned(known)}
    points = [point for point in known if point[0] in kept or point[1] > point[2]]
    shares = [100 * spend / budget for _, spend, budget in points]
    figure.add_scatter(
        x=[step for step, _, _ in points],
        y=rounded(shares),
        mode="lines+markers",
        name=style.label,
        line={"color": style.colour, "dash": style.dash, "width": 2},
        marker={"symbol": style.symbol, "size": 5},
        customdata=[[spend, budget] for _, spend, budget in points],
        meta={"series": style.key, "choice": None},
        hovertemplate="step %{x}: %{y:.3f} %<br>%{customdata[0]:,} of %{customdata[1]:,} "
        f"assignments<extra>{style.label}</extra>",
    )
    return shares


def _mark_limit(figure: go.Figure, shares: Sequence[float]) -> None:
    low, high = min(shares), max(shares)
    room = max(1.0, 0.12 * (max(high, 100.0) - low))
    top = max(high, 100.0) + room
    figure.update_yaxes(range=[low - room, top])
    figure.add_shape(
        type="rect",
        x0=0,
        x1=1,
        xref="paper",
        y0=100,
        y1=top,
        fillcolor=ACCENT,
        opacity=0.12,
        line={"width": 0},
        layer="below",
    )
    figure.add_shape(
        type="line", x0=0, x1=1, xref="paper", y0=100, y1=100, line={"color": ACCENT, "width": 1.5}
    )


def _verdict(summary: RunSummary) -> str:
    budget = summary.budget
    if budget.over is None:
        return ""
    what = "log window" if budget.over_is_windows else "step"
    if budget.over == 0:
        return f": no training {what} over it"
    return f": {number(budget.over)} training {what}(s) over it"
