"""Charts of gradient traffic: which links carry it, and how unevenly over training."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._html import number
from drgr.report._maps import (
    colour_bar,
    doublings,
    expert_numbers,
    finish_map,
    gaps,
    map_height,
    ratio_ticks,
    reach,
    relative,
)
from drgr.report._records import Counts, LayerEvaluation, RunRecord
from drgr.report._style import (
    DIVERGING,
    SeriesStyle,
    add_curve,
    empty_figure,
    layer_labels,
    layer_styles,
    plain,
)
from drgr.report._summary import RunSummary


def traffic_maps(run: RunRecord, summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws, for a selectable layer, the traffic of each link relative to the mean link."""
    layers = run.evaluation.layers if run.evaluation is not None else ()
    layers = tuple(layer for layer in layers if any(_links(layer, list(styles)).values()))
    order = [domain.name for domain in summary.domains]
    figure = empty_figure(x_title="expert", y_title="", height=map_height(len(order), per_row=34))
    for index, layer in enumerate(layers):
        _add_map(figure, layer, order=order, styles=styles, index=index)
    finish_map(figure)
    labels = layer_labels([layer.name for layer in layers])
    return Chart(
        kind="traffic-map",
        scale="Colour: traffic of the link divided by that of the layer's mean link",
        title="Gradient that flows from each domain to each expert",
        caption="Mean over the steps of training. White is the mean link, red above, blue below; "
        "links without traffic are darkest blue. Domains that were never drawn are left out.",
        figure=figure if layers else None,
        choices=tuple(labels[layer.name] for layer in layers),
    )


def congestion_curves(run: RunRecord) -> Chart:
    """Draws the traffic of the busiest link over the mean link, by layer over training."""
    names = tuple(dict.fromkeys(layer.name for record in run.train for layer in record.layers))
    styles = layer_styles(names)
    figure = empty_figure(x_title="training step", y_title="congestion")
    figure.update_layout(hovermode="x unified")
    drawn = [
        add_curve(
            figure,
            [
                (record.step, layer.congestion)
                for record in run.train
                for layer in record.layers
                if layer.name == name
            ],
            style=style,
        )
        for name, style in styles.items()
    ]
    return Chart(
        kind="congestion",
        title="Congestion of each layer during training",
        caption="Gradient traffic of the busiest link over that of the mean link: 1 is even.",
        figure=figure if any(drawn) else None,
        legend=tuple(styles.values()),
    )


def _links(layer: LayerEvaluation, order: Sequence[str]) -> dict[str, Counts]:
    """Returns the rows of domains with traffic; a domain that was never drawn has none."""
    rows = {name: layer.domain_traffic.get(name, ()) for name in order}
    return {name: row for name, row in rows.items() if any(row)}


def _add_map(
    figure: go.Figure,
    layer: LayerEvaluation,
    *,
    order: Sequence[str],
    styles: Mapping[str, SeriesStyle],
    index: int,
) -> None:
    rows = _links(layer, order)
    ratios = iter(relative(tuple(value for row in rows.values() for value in row)))
    table = [[next(ratios) for _ in row] for row in rows.values()]
    shades = [[doublings(ratio) for ratio in row] for row in table]
    widest = reach(shades)
    figure.add_heatmap(
        z=shades,
        x=expert_numbers(rows.values()),
        y=[plain(styles[name].label) for name in rows],
        customdata=[[number(ratio, 2) for ratio in row] for row in table],
        zmin=-widest,
        zmax=widest,
        colorscale=[list(stop) for stop in DIVERGING],
        colorbar=colour_bar(ratio_ticks(widest)),
        hovertemplate="%{y}, expert %{x}<br>%{customdata} x the mean link<extra></extra>",
        meta={"series": None, "choice": index},
        visible=index == 0,
        **gaps(rows.values()),
    )
