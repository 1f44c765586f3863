"""What maps of experts share: ratios as colours, axes, sizes."""

import math
from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go

from drgr.report._records import Counts

# Loads are drawn on a scale of doublings, as wide as the data need: from half to twice the mean, or
# from a quarter to four times it. Beyond, colours end.
_LEAST_DOUBLINGS, _MOST_DOUBLINGS = 1.0, 2.0


def relative(load: Counts) -> Counts:
    """Returns the load over the mean of the layer's known loads."""
    known = [value for value in load if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return tuple(None if value is None or mean <= 0 else value / mean for value in load)


def doublings(ratio: float | None) -> float | None:
    """Returns the ratio on the scale of doublings, ended where colours end."""
    if ratio is None:
        return None
    if ratio <= 0:
        return -_MOST_DOUBLINGS
    return round(min(_MOST_DOUBLINGS, max(-_MOST_DOUBLINGS, math.log2(ratio))), 4)


def reach(shades: Sequence[Sequence[float | None]]) -> float:
    """Returns how many doublings the scale of a map needs."""
    furthest = max((abs(v) for row in shades for v in row if v is not None), default=0.0)
    return _LEAST_DOUBLINGS if furthest <= _LEAST_DOUBLINGS else _MOST_DOUBLINGS


def ratio_ticks(widest: float) -> dict[str, object]:
    """Returns the colour bar's ticks, as ratios."""
    if widest == _LEAST_DOUBLINGS:
        return {"tickvals": [-1, -0.5, 0, 0.5, 1], "ticktext": ["0.5", "0.71", "1", "1.41", "2"]}
    return {"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["\u2264 0.25", "0.5", "1", "2", "\u2265 4"]}


def expert_numbers(rows: Iterable[Counts]) -> list[int]:
    """Numbers the columns of a map."""
    return list(range(max((len(row) for row in rows), default=0)))


def gaps(rows: Iterable[Counts]) -> dict[str, int]:
    """Returns gaps between cells, narrower where there are many."""
    count = len(expert_numbers(rows))
    gap = 2 if count <= 16 else 1 if count <= 64 else 0
    return {"xgap": gap, "ygap": gap}


def map_height(rows: int, *, per_row: int) -> int:
    """Returns the height in pixels that so many rows take."""
    return max(330, min(900, 130 + per_row * rows))


def colour_bar(ticks: Mapping[str, object]) -> dict[str, object]:
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


def finish_map(figure: go.Figure) -> None:
    """Puts the first row on top and makes room for the colour bar."""
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_xaxes(showgrid=False)
    # The colour bar hangs on the figure's upper edge and takes no part in automatic margins.
    figure.update_layout(margin_t=56)
