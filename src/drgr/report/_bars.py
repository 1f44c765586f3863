"""Horizontal bars of one number per domain, with the numbers in a column of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from drgr.report._style import (
    ACCENT,
    NEUTRAL,
    SeriesStyle,
    empty_figure,
    number_column,
    plain,
    rounded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar; a marked one stands out from the others, which are then drawn paler.

    Attributes:
        value: its length.
        shown: the number as written beside it.
        style: look of the domain.
        is_marked: whether it is the one to look at.
    """

    value: float
    shown: str
    style: SeriesStyle
    is_marked: bool = False


def ranked_bars(bars: Sequence[Bar], *, x_title: str, unit: str) -> go.Figure:
    """Draws bars from top to bottom in the given order.

    Args:
        bars: at least one bar.
        x_title: title of the axis of values, with unit.
        unit: unit for the hover text.

    Returns:
        The figure. Numbers stand in a column to the right, where no line or bar crosses them.
    """
    figure = empty_figure(x_title=x_title, y_title="", height=bars_height(len(bars)))
    has_marked = any(bar.is_marked for bar in bars)
    for position, bar in enumerate(bars):
        figure.add_bar(
            x=rounded([bar.value]),
            y=[position],
            orientation="h",
            name=plain(bar.style.label),
            marker={
                "color": bar.style.colour,
                "opacity": 0.5 if has_marked and not bar.is_marked else 1.0,
                "pattern": {"shape": bar.style.pattern},
                "line": {"color": ACCENT, "width": 2.5 if bar.is_marked else 0},
            },
            meta={"series": bar.style.key, "choice": None},
            hovertemplate=f"%{{fullData.name}}: %{{x:.4f}} {unit}<extra></extra>",
        )
    figure.update_layout(bargap=0.3)
    number_column(
        figure,
        labels=[_emphasised(plain(bar.style.label), bar.is_marked) for bar in bars],
        numbers=[_emphasised(bar.shown, bar.is_marked) for bar in bars],
    )
    return figure


def bars_height(count: int) -> int:
    """Returns the height in pixels that so many bars take."""
    return max(220, 100 + 34 * count)


def add_reference(figure: go.Figure, value: float, label: str) -> None:
    """Adds a dotted vertical line with its name above the bars."""
    figure.add_shape(
        type="line",
        x0=value,
        x1=value,
        y0=0,
        y1=1,
        yref="paper",
        line={"color": NEUTRAL, "width": 2, "dash": "dot"},
    )
    figure.add_annotation(
        x=value, y=1, yref="paper", yanchor="bottom", showarrow=False, text=plain(label)
    )
    figure.update_layout(margin_t=30)


def _emphasised(label: str, is_marked: bool) -> str:
    return f"<b>{label}</b>" if is_marked else label
