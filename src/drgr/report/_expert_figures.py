"""Charts of experts: load by layer, which domain uses which, and balance over training."""

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
    finish_map,
    gaps,
    map_height,
    ratio_ticks,
    reach,
    relative,
)
from drgr.report._records import Counts, RunRecord
from drgr.report._style import (
    DIVERGING,
    SEQUENTIAL,
    SeriesStyle,
    empty_figure,
    layer_labels,
    plain,
    rounded,
)
from drgr.report._summary import RunSummary


def load_map(run: RunRecord) -> Chart:
    """Draws each expert's load relative to its layer's mean; layers are rows."""
    loads, source = _final_loads(run)
    ratios = [relative(load) for load in loads.values()]
    shades = [[doublings(value) for value in row] for row in ratios]
    widest = reach(shades)
    labels = layer_labels(tuple(loads))
    figure = empty_figure(x_title="expert", y_title="", height=map_height(len(loads), per_row=34))
    figure.add_heatmap(
        z=shades,
        x=expert_numbers(loads.values()),
        y=[plain(labels[name]) for name in loads],
        customdata=[
            [[number(count), number(share, 2)] for count, share in zip(load, row, strict=True)]
            for load, row in zip(loads.values(), ratios, strict=True)
        ],
        zmin=-widest,
        zmax=widest,
        colorscale=[list(stop) for stop in DIVERGING],
        colorbar=colour_bar(ratio_ticks(widest)),
        hovertemplate="%{y}, expert %{x}<br>%{customdata[1]} x the mean, %{customdata[0]} "
        "assignments<extra></extra>",
        **gaps(loads.values()),
    )
    finish_map(figure)
    return Chart(
        kind="load-map",
        scale="Colour: load divided by the layer's mean",
        title=_load_title(ratios),
        caption=f"White is the layer's mean, red above, blue below; unused experts are darkest "
        "blue "
        f"({source}).",
        figure=figure if any(ratios) else None,
    )


def domain_maps(run: RunRecord, summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws, for a selectable layer, the share of each domain's assignments by expert."""
    return layer_maps(
        run,
        summary,
        lambda layer, order: {
            name: layer.domain_load[name] for name in order if name in layer.domain_load
        },
        partial(_add_domain_map, styles=styles),
        kind="domain-map",
        scale="Colour: share of the domain's assignments",
        title="Which experts each domain uses",
        caption="Each row sums to 100 %: the share of the domain's assignments that an expert "
        "gets. Equal rows mean no specialisation.",
    )


def violation_curves(run: RunRecord) -> Chart:
    """Draws MaxVio, the relative excess of the busiest expert, by layer over training."""
    return layer_curves(
        run,
        lambda layer: layer.max_violation,
        kind="violation",
        title="Imbalance of each layer during training (MaxVio)",
        caption="Load of the busiest expert over the layer's mean, minus one: 0 is perfect "
        "balance.",
        y_title="MaxVio",
        from_zero=True,
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
    figure: go.Figure, rows: Rows, index: int, *, styles: Mapping[str, SeriesStyle]
) -> None:
    shares = [_shares(counts) for counts in rows.values()]
    figure.add_heatmap(
        z=[rounded(row) for row in shares],
        x=expert_numbers(rows.values()),
        y=[plain(styles[name].label) for name in rows],
        customdata=[[number(count) for count in counts] for counts in rows.values()],
        zmin=0,
        zmax=_highest(shares),
        colorscale=SEQUENTIAL,
        colorbar=colour_bar({"tickformat": ".0%"}),
        hovertemplate="%{y}, expert %{x}<br>%{z:.1%} of the domain, %{customdata} assignments"
        "<extra></extra>",
        meta={"series": None, "choice": index},
        visible=index == 0,
        **gaps(rows.values()),
    )


def _highest(shares: Sequence[Counts]) -> float:
    return max((value for row in shares for value in row if value is not None), default=1.0)


def _shares(counts: Counts) -> Counts:
    total = sum(value for value in counts if value is not None)
    return tuple(None if value is None or total <= 0 else value / total for value in counts)


def _load_title(ratios: Sequence[Counts]) -> str:
    known = [value for row in ratios for value in row if value is not None]
    if not known:
        return "Load of each expert"
    unused = sum(value == 0 for value in known)
    return f"Load of each expert: {min(known):.2f} to {max(known):.2f} times the layer's mean, " + (
        f"{unused} unused" if unused else "none unused"
    )
