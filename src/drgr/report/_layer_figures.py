"""Figures of every layer: a number over training, and a map of domains and experts to choose."""

from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._maps import finish_map, map_height
from drgr.report._records import Counts, LayerEvaluation, LayerWindow, RunRecord
from drgr.report._style import add_curve, empty_figure, layer_labels, layer_styles
from drgr.report._summary import RunSummary

Rows = Mapping[str, Counts]
"""One number for each expert, by domain."""


def layer_curves(
    run: RunRecord,
    value: Callable[[LayerWindow], float | None],
    *,
    kind: str,
    title: str,
    caption: str,
    y_title: str,
    from_zero: bool,
) -> Chart:
    """Draws a number of each layer over training."""
    names = tuple(dict.fromkeys(layer.name for record in run.train for layer in record.layers))
    styles = layer_styles(names)
    figure = empty_figure(x_title="training step", y_title=y_title)
    figure.update_layout(hovermode="x unified")
    drawn = [
        add_curve(
            figure,
            [
                (record.step, value(layer))
                for record in run.train
                for layer in record.layers
                if layer.name == name
            ],
            style=style,
        )
        for name, style in styles.items()
    ]
    if from_zero:
        figure.update_yaxes(rangemode="tozero")
    return Chart(
        kind=kind,
        title=title,
        caption=caption,
        figure=figure if any(drawn) else None,
        legend=tuple(styles.values()),
    )


def layer_maps(
    run: RunRecord,
    summary: RunSummary,
    rows: Callable[[LayerEvaluation, Sequence[str]], Rows],
    draw: Callable[[go.Figure, Rows, int], None],
    *,
    kind: str,
    title: str,
    caption: str,
    scale: str,
) -> Chart:
    """Draws, for a selectable layer, a map of domains and experts.

    Args:
        run: The run.
        summary: Its summary, for the order of the domains.
        rows: The rows of a layer in an order of domains; a layer of none with numbers is left out.
        draw: Adds the map of such rows as the choice of an index to the figure.
        kind: See :class:`Chart`.
        title: The same.
        caption: The same.
        scale: The same.
    """
    order = [domain.name for domain in summary.domains]
    layers = run.evaluation.layers if run.evaluation is not None else ()
    shown = {layer.name: rows(layer, order) for layer in layers}
    shown = {name: found for name, found in shown.items() if any(found.values())}
    figure = empty_figure(x_title="expert", y_title="", height=map_height(len(order), per_row=34))
    for index, found in enumerate(shown.values()):
        draw(figure, found, index)
    finish_map(figure)
    labels = layer_labels(tuple(shown))
    return Chart(
        kind=kind,
        scale=scale,
        title=title,
        caption=caption,
        figure=figure if shown else None,
        choices=tuple(labels.values()),
    )
