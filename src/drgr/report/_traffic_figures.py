"""Charts of gradient traffic: which links carry it, and how unevenly over training."""

from collections.abc import Mapping, Sequence
from functools import partial

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._html import number
from drgr.report._layer_figures import Rows, layer_curves, layer_maps
from drgr.report._maps import (
    colour_bar,
    doublings,
    expert_numbers,
    gaps,
    ratio_ticks,
    reach,
    relative,
)
from drgr.report._records import LayerEvaluation, RunRecord
from drgr.report._style import DIVERGING, SeriesStyle, plain
from drgr.report._summary import RunSummary


def traffic_maps(run: RunRecord, summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws, for a selectable layer, the traffic of each link relative to the mean link."""
    return layer_maps(
        run,
        summary,
        _links,
        partial(_add_map, styles=styles),
        kind="traffic-map",
        scale="Colour: traffic of the link divided by that of the layer's mean link",
        title="Gradient that flows from each domain to each expert",
        caption="Mean over the steps of training. White is the mean link, red above, blue below; "
        "links without traffic are darkest blue. Domains that were never drawn are left out.",
    )


def congestion_curves(run: RunRecord) -> Chart:
    """Draws the traffic of the busiest link over the mean link, by layer over training."""
    return layer_curves(
        run,
        lambda layer: layer.congestion,
        kind="congestion",
        title="Congestion of each layer during training",
        caption="Gradient traffic of the busiest link over that of the mean link: 1 is even.",
        y_title="congestion",
        from_zero=False,
    )


def _links(layer: LayerEvaluation, order: Sequence[str]) -> Rows:
    """Returns the rows of domains with traffic; a domain that was never drawn has none."""
    rows = {name: layer.domain_traffic.get(name, ()) for name in order}
    return {name: row for name, row in rows.items() if any(row)}


def _add_map(
    figure: go.Figure, rows: Rows, index: int, *, styles: Mapping[str, SeriesStyle]
) -> None:
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
