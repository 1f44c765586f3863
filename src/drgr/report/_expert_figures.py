"""Charts of experts: load by layer, which domain uses which, and balance over training."""

import math
from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._html import number
from drgr.report._records import Counts, LayerEvaluation, RunRecord
from drgr.report._style import (
    DIVERGING,
    SEQUENTIAL,
    SeriesStyle,
    add_curve,
    empty_figure,
    layer_labels,
    layer_styles,
    plain,
    rounded,
)
from drgr.report._summary import RunSummary

# Loads are drawn on a scale of doublings, as wide as the data need: from half to twice the mean, or
# from a quarter to four times it. Beyond, colours end.
_LEAST_DOUBLINGS, _MOST_DOUBLINGS = 1.0, 2.0


def load_map(run: RunRecord) -> Chart:
    """Draws each expert's load relative to its layer's mean; layers are rows."""
    loads, source = _final_loads(run)
    relative = [_relative(load) for load in loads.values()]
    doublings = [[_doublings(value) for value in row] for row in relative]
    reach = _reach(doublings)
    labels = layer_labels(tuple(loads))
    figure = empty_figure(x_title="expert", y_title="", height=_map_height(len(loads), per_row=34))
    figure.add_heatmap(
        z=doublings,
        x=_expert_numbers(loads.values()),
        y=[plain(labels[name]) for name in loads],
        customdata=[
            [[number(count), number(share, 2)] for count, share in zip(load, row, strict=True)]
            for load, row in zip(loads.values(), relative, strict=True)
        ],
        zmin=-reach,
        zmax=reach,
        colorscale=[list(stop) for stop in DIVERGING],
        colorbar=_colour_bar(_ratio_ticks(reach)),
        hovertemplate="%{y}, expert %{x}<br>%{customdata[1]} x the mean, %{customdata[0]} "
        "assignments<extra></extra>",
        **_gaps(loads.values()),
    )
    _finish_map(figure)
    return Chart(
        kind="load-map",
        scale="Colour: load divided by the layer's mean",
        title=_load_title(relative),
        caption=f"White is the layer's mean, red above, blue below; unused experts are darkest "
        "blue "
        f"({source}).",
        figure=figure if any(relative) else None,
    )


def domain_maps(run: RunRecord, summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws, for a selectable layer, the share of each domain's assignments by expert."""
    layers = run.evaluation.layers if run.evaluation is not None else ()
    layers = tuple(layer for layer in layers if any(layer.domain_load.values()))
    order = [domain.name for domain in summary.domains]
    figure = empty_figure(x_title="expert", y_title="", height=_map_height(len(order), per_row=34))
    for index, layer in enumerate(layers):
        _add_domain_map(figure, layer, order=order, styles=styles, index=index)
    _finish_map(figure)
    labels = layer_labels([layer.name for layer in layers])
    return Chart(
        kind="domain-map",
        scale="Colour: share of the domain's assignments",
        title="Which experts each domain uses",
        caption="Each row sums to 100 %: the share of the domain's assignments that an expert "
        "gets. Equal rows mean no specialisation.",
        figure=figure if layers else None,
        choices=tuple(labels[layer.name] for layer in layers),
    )


def violation_curves(run: RunRecord) -> Chart:
    """Draws MaxVio, the relative excess of the busiest expert, by layer over training."""
    names = tuple(dict.fromkeys(layer.name for record in run.train for layer in record.layers))
    styles = layer_styles(names)
    figure = empty_figure(x_title="training step", y_title="MaxVio")
    figure.update_layout(hovermode="x unified")
    drawn = [
        add_curve(
            figure,
            [
                (record.step, layer.max_violation)
                for record in run.train
                for layer in record.layers
                if layer.name == name
            ],
            style=style,
        )
        for name, style in styles.items()
    ]
    figure.update_yaxes(rangemode="tozero")
    return Chart(
        kind="violation",
        title="Imbalance of each layer during training (MaxVio)",
        caption="Load of the busiest expert over the layer's mean, minus one: 0 is perfect "
        "balance.",
        figure=figure if any(drawn) else None,
        legend=tuple(styles.values()),
    )


def _final_loads(run: RunRecord) -> tuple[dict[str, Counts], str]:
    if run.evaluation is not None and any(layer.load for layer in run.evaluation.layers):
        loads = {layer.name: layer.load for layer in run.evaluation.layers}
        return loads, f"{run.evaluation.split or 'held-out'} split"
    if run.train:
        last = run.train[-1]
        return {
            layer.name: layer.load for layer in last.layers
        }, f"training, up to step {last.step}"
    return {}, "no data"


def _add_domain_map(
    figure: go.Figure,
    layer: LayerEvaluation,
    *,
    order: Sequence[str],
    styles: Mapping[str, SeriesStyle],
    index: int,
) -> None:
    rows = {name: layer.domain_load[name] for name in order if name in layer.domain_load}
    shares = [_shares(counts) for counts in rows.values()]
    figure.add_heatmap(
        z=[rounded(row) for row in shares],
        x=_expert_numbers(rows.values()),
        y=[plain(styles[name].label) for name in rows],
        customdata=[[number(count) for count in counts] for counts in rows.values()],
        zmin=0,
        zmax=_highest(shares),
        colorscale=SEQUENTIAL,
        colorbar=_colour_bar({"tickformat": ".0%"}),
        hovertemplate="%{y}, expert %{x}<br>%{z:.1%} of the domain, %{customdata} assignments"
        "<extra></extra>",
        meta={"series": None, "choice": index},
        visible=index == 0,
        **_gaps(rows.values()),
    )


def _highest(shares: Sequence[Counts]) -> float:
    return max((value for row in shares for value in row if value is not None), default=1.0)


def _relative(load: Counts) -> Counts:
    """Returns the load over the mean of the layer's known loads."""
    known = [value for value in load if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return tuple(None if value is None or mean <= 0 else value / mean for value in load)


def _shares(counts: Counts) -> Counts:
    total = sum(value for value in counts if value is not None)
    return tuple(None if value is None or total <= 0 else value / total for value in counts)


def _doublings(ratio: float | None) -> float | None:
    if ratio is None:
        return None
    if ratio <= 0:
        return -_MOST_DOUBLINGS
    return round(min(_MOST_DOUBLINGS, max(-_MOST_DOUBLINGS, math.log2(ratio))), 4)


def _reach(doublings: Sequence[Sequence[float | None]]) -> float:
    furthest = max((abs(v) for row in doublings for v in row if v is not None), default=0.0)
    return _LEAST_DOUBLINGS if furthest <= _LEAST_DOUBLINGS else _MOST_DOUBLINGS


def _ratio_ticks(reach: float) -> dict[str, object]:
    if reach == _LEAST_DOUBLINGS:
        return {"tickvals": [-1, -0.5, 0, 0.5, 1], "ticktext": ["0.5", "0.71", "1", "1.41", "2"]}
    return {"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["\u2264 0.25", "0.5", "1", "2", "\u2265 4"]}


def _load_title(relative: Sequence[Counts]) -> str:
    known = [value for row in relative for value in row if value is not None]
    if not known:
        return "Load of each expert"
    unused = sum(value == 0 for value in known)
    return f"Load of each expert: {min(known):.2f} to {max(known):.2f} times the layer's mean, " + (
        f"{unused} unused" if unused else "none unused"
    )


def _expert_numbers(rows: Iterable[Counts]) -> list[int]:
    return list(range(max((len(row) for row in rows), default=0)))


def _gaps(rows: Iterable[Counts]) -> dict[str, int]:
    count = len(_expert_numbers(rows))
    gap = 2 if count <= 16 else 1 if count <= 64 else 0
    return {"xgap": gap, "ygap": gap}


def _map_height(rows: int, *, per_row: int) -> int:
    return max(330, min(900, 130 + per_row * rows))


def _colour_bar(ticks: Mapping[str, object]) -> dict[str, object]:
    """Hangs the colour bar under the map's title, so that a narrow screen keeps its width."""
    return {
        "orientation": "h",
        "x": 0.5,
        "xanchor": "center",
        "yref": "container",
        "y": 1.0,
        "yanchor": "top",
        "ypad": 6,
        "len": 0.9,
        "thickness": 10,
        "outlinewidth": 0,
        **ticks,
    }


def _finish_map(figure: go.Figure) -> None:
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_xaxes(showgrid=False)
    # The colour bar hangs on the figure's upper edge and takes no part in automatic margins.
    figure.update_layout(margin_t=56)
