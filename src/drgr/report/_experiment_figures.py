"""Charts of an experiment: one point a method, and the frontier that no other method dominates."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._style import ACCENT, SeriesStyle, empty_figure, plain, rounded

Json = Mapping[str, Any]
_WORST = "worst_bits_per_byte"


def worst_mean_frontier(methods: Sequence[Json], styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws the mean over seeds of the worst domain against that of the mean of domains."""
    return Chart(
        kind="experiment-worst-mean",
        title="Worst domain against the mean",
        caption="Lower left is better. Bars are the intervals over seeds; the line joins the "
        "methods that no other beats in both.",
        figure=_scatter(
            methods,
            styles,
            across="mean_bits_per_byte",
            mark="on_worst_mean_frontier",
            x_title="mean bits per byte",
        ),
        legend=tuple(styles.values()),
    )


def worst_flops_frontier(methods: Sequence[Json], styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws the worst domain against the total FLOPs of training."""
    return Chart(
        kind="experiment-worst-flops",
        title="Worst domain against compute",
        caption="Total FLOPs of training, held-out passes and outer loop included. Lower left is "
        "better; the line joins the methods that no other beats in both.",
        figure=_scatter(
            methods,
            styles,
            across="flops",
            mark="on_worst_flops_frontier",
            x_title="FLOPs of training",
        ),
        legend=tuple(styles.values()),
    )


def _scatter(
    methods: Sequence[Json],
    styles: Mapping[str, SeriesStyle],
    *,
    across: str,
    mark: str,
    x_title: str,
) -> go.Figure | None:
    known = [one for one in methods if one["figures"][_WORST] is not None]
    if not known:
        return None
    figure = empty_figure(x_title=x_title, y_title="worst domain, bits per byte", height=420)
    on = sorted(
        (one["figures"][across]["mean"], one["figures"][_WORST]["mean"])
        for one in known
        if one[mark]
    )
    figure.add_scatter(
        x=rounded([x for x, _ in on]),
        y=rounded([y for _, y in on]),
        mode="lines",
        line={"color": ACCENT, "width": 2, "dash": "dot"},
        hoverinfo="skip",
        name="frontier",
    )
    for one in known:
        _add_method(figure, one, styles[one["name"]], across)
    return figure


def _add_method(figure: go.Figure, method: Json, style: SeriesStyle, across: str) -> None:
    x, y = method["figures"][across], method["figures"][_WORST]
    figure.add_scatter(
        x=rounded([x["mean"]]),
        y=rounded([y["mean"]]),
        error_x=_bars(x),
        error_y=_bars(y),
        mode="markers",
        name=plain(style.label),
        marker={"color": style.colour, "symbol": style.symbol, "size": 14},
        cliponaxis=False,
        meta={"series": style.key, "choice": None},
        hovertemplate="%{x:.6g}, worst %{y:.4f}<extra>%{fullData.name}</extra>",
    )


def _bars(interval: Json) -> dict[str, Any]:
    if interval["low"] is None:
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": rounded([max(0.0, interval["high"] - interval["mean"])]),
        "arrayminus": rounded([max(0.0, interval["mean"] - interval["low"])]),
        "thickness": 1.5,
        "width": 5,
    }
