"""What all charts share: colours, the empty figure, and text that Plotly takes literally."""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import plotly.graph_objects as go

# Six hues after Okabe and Ito, and two added where simulated protanopia and deuteranopia leave the
# widest gap; tests/report/test_style.py measures the gaps.
_DOMAIN_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8844EE",
    "#8A4420",
)
_CYCLES = (("solid", "circle", ""), ("dash", "diamond", "/"), ("dot", "square", "x"))
_RUN_COLOURS = ("#8C95A5", "#BE185D", "#0E8A9A", "#A16207", "#4F6BED", "#4D7C0F")
_RUN_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")

ACCENT = "#C81E4A"
NEUTRAL = "#8C95A5"
SEQUENTIAL = "Cividis"
DIVERGING = (
    (0.0, "#2166AC"),
    (0.25, "#92C5DE"),
    (0.5, "#F4F4F4"),
    (0.75, "#F4A582"),
    (1.0, "#B2182B"),
)

MAX_POINTS = 800

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesStyle:
    """How one domain, run or layer looks in every chart.

    Attributes:
        key: name for the page's scripts, free of anything that a run chose.
        label: text for people, shortened, not escaped.
        colour: hexadecimal colour.
        dash: Plotly line dash.
        symbol: Plotly marker symbol.
        pattern: Plotly bar pattern.
    """

    key: str
    label: str
    colour: str
    dash: str
    symbol: str
    pattern: str


def domain_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """Gives each domain a colour; beyond eight, dash, symbol and pattern tell them apart."""
    styles = {}
    labels = short_labels(names)
    for index, name in enumerate(names):
        dash, symbol, pattern = _CYCLES[index // len(_DOMAIN_COLOURS) % len(_CYCLES)]
        styles[name] = SeriesStyle(
            key=f"domain-{index}",
            label=labels[name],
            colour=_DOMAIN_COLOURS[index % len(_DOMAIN_COLOURS)],
            dash=dash,
            symbol=symbol,
            pattern=pattern,
        )
    return styles


def run_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """Gives each run a colour apart from the domains' colours; the first, the baseline, is grey."""
    labels = short_labels(names, longest=32)
    return {
        name: SeriesStyle(
            key=f"run-{index}",
            label=labels[name],
            colour=_RUN_COLOURS[index % len(_RUN_COLOURS)],
            dash=_CYCLES[index // len(_RUN_COLOURS) % len(_CYCLES)][0],
            symbol=_RUN_SYMBOLS[index % len(_RUN_SYMBOLS)],
            pattern=_CYCLES[index // len(_RUN_COLOURS) % len(_CYCLES)][2],
        )
        for index, name in enumerate(names)
    }


def layer_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """Shades layers from the first (violet) to the last (green) on one scale."""
    low, high = (96, 82, 208), (38, 170, 150)
    labels = layer_labels(names)
    styles = {}
    for index, name in enumerate(names):
        part = index / max(1, len(names) - 1)
        mixed = [round(a + part * (b - a)) for a, b in zip(low, high, strict=True)]
        styles[name] = SeriesStyle(
            key=f"layer-{index}",
            label=labels[name],
            colour="#{:02X}{:02X}{:02X}".format(*mixed),
            dash=_CYCLES[index % len(_CYCLES)][0],
            symbol="circle",
            pattern="",
        )
    return styles


def layer_labels(names: Sequence[str]) -> dict[str, str]:
    """Returns ``layer N`` if the one number in each name tells the layers apart, else names."""
    numbers = [re.findall(r"\d+", name) for name in names]
    if all(len(found) == 1 for found in numbers) and len({n[0] for n in numbers}) == len(names):
        return {name: f"layer {found[0]}" for name, found in zip(names, numbers, strict=True)}
    return short_labels(names, longest=32)


def short_labels(names: Sequence[str], *, longest: int = 22) -> dict[str, str]:
    """Cuts long names in the middle; names that would look alike get their number appended."""
    cut = {name: _shortened(name, longest) for name in names}
    uses = Counter(cut.values())
    return {
        name: label if uses[label] == 1 else f"{label} ({index + 1})"
        for index, (name, label) in enumerate(cut.items())
    }


def _shortened(name: str, longest: int) -> str:
    flat = " ".join(name.split()) or "(blank)"
    if len(flat) <= longest:
        return flat
    head = (longest - 1) * 2 // 3
    return flat[:head] + "\N{HORIZONTAL ELLIPSIS}" + flat[head + 1 - longest :]


def plain(label: str) -> str:
    """Escapes a text so that Plotly shows it literally instead of as its subset of HTML."""
    return html.escape(label, quote=False)


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Rounds to six significant digits, which no chart can show more of, to keep the file small."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


def thinned(records: Sequence[_Item]) -> list[_Item]:
    """Keeps at most ``MAX_POINTS`` evenly spaced records, the first and the last among them."""
    count = len(records)
    if count <= MAX_POINTS:
        return list(records)
    picks = {round(index * (count - 1) / (MAX_POINTS - 1)) for index in range(MAX_POINTS)}
    return [record for index, record in enumerate(records) if index in picks]


def empty_figure(*, x_title: str, y_title: str, height: int = 340) -> go.Figure:
    """Returns a figure without traces, with axes named and everything theme-dependent left open.

    Colours of text, grid and background belong to the page, which sets them for light or dark.
    """
    axis: Mapping[str, object] = {"automargin": True, "ticks": "", "zeroline": False}
    figure = go.Figure(layout_template="none")
    figure.update_layout(
        height=height,
        autosize=True,
        showlegend=False,
        hovermode="closest",
        hoverlabel={"namelength": -1, "align": "left"},
        margin={"l": 8, "r": 16, "t": 12, "b": 8},
        font={"size": 13},
        xaxis={**axis, "title": {"text": x_title, "standoff": 8, "font": {"size": 13}}},
        yaxis={**axis, "title": {"text": y_title, "standoff": 8, "font": {"size": 13}}},
        modebar={"remove": ["lasso2d", "select2d", "autoScale2d"]},
    )
    return figure


def number_column(figure: go.Figure, *, labels: Sequence[str], numbers: Sequence[str]) -> None:
    """Names the rows of horizontal bars at 0, 1, ... on the left and their numbers on the right.

    Args:
        figure: changed in place; the first row comes on top.
        labels: row names, already literal for Plotly.
        numbers: what to write on the right of each row.
    """
    rows: dict[str, object] = {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "range": [len(labels) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        "fixedrange": True,
    }
    figure.update_layout(
        yaxis={**rows, "ticktext": list(labels)},
        yaxis2={**rows, "ticktext": list(numbers), "side": "right", "overlaying": "y"},
    )
    # Plotly leaves out an axis that no trace uses.
    figure.add_scatter(x=[None], y=[None], yaxis="y2", hoverinfo="skip")


def add_curve(
    figure: go.Figure,
    points: Sequence[tuple[int, float | None]],
    *,
    style: SeriesStyle,
    width: float = 2.0,
    value_format: str = ".3f",
    choice: int | None = None,
    visible: bool = True,
) -> bool:
    """Adds the line of one domain, run or layer over steps.

    Steps without a value are not drawn; the line joins their neighbours.

    Args:
        figure: changed in place.
        points: ``(step, value)`` by increasing step.
        style: colour, dash and key.
        width: line width in pixels.
        value_format: d3 format of the value in the hover text.
        choice: index of the chart's selector entry that the line belongs to.
        visible: whether the line is shown at first.

    Returns:
        Whether there was anything to draw.
    """
    known = thinned([(step, value) for step, value in points if value is not None])
    if not known:
        return False
    figure.add_scatter(
        x=[step for step, _ in known],
        y=rounded([value for _, value in known]),
        name=plain(style.label),
        mode="lines+markers" if len(known) <= 12 else "lines",
        line={"color": style.colour, "dash": style.dash, "width": width},
        marker={"symbol": style.symbol, "size": 6, "color": style.colour},
        meta={"series": style.key, "choice": choice},
        visible=visible,
        hovertemplate=f"%{{y:{value_format}}}",
    )
    return True
