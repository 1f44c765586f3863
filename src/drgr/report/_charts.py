"""A chart as the page places it: figure, words around it, legend and selector."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from drgr.report._style import SeriesStyle


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One card of the page.

    Attributes:
        kind: what is drawn, a fixed word such as ``"final-bars"``.
        title: what is seen, in plain text.
        caption: one line on how to read it.
        figure: the figure; ``None`` if the run has no data for it, which the card then says.
        scale: what the colours of a map mean, with unit.
        legend: entries for the card's own legend; domains are in the run's common legend instead.
        choices: entries of the selector; traces name theirs by ``meta.choice``.
        is_wide: whether the card takes the full width of the page.
    """

    kind: str
    title: str
    caption: str
    figure: go.Figure | None
    scale: str = ""
    legend: Sequence[SeriesStyle] = ()
    choices: Sequence[str] = ()
    is_wide: bool = False
