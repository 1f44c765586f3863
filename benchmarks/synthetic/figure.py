"""The picture of the synthetic problems: quality and cost as domains and experts grow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "synthetic.svg"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
MARKERS = "osD^v<>p"

Row = dict[str, Any]


def draw(result: dict[str, Any], path: Path = FIGURE) -> None:
    """Draws what methods reach and what a step takes, against the size of the problem."""
    mpl.rcParams.update({"svg.hashsalt": "drgr", "svg.fonttype": "none", "font.size": 8.0})
    figure = Figure(figsize=(9.4, 6.0), layout="constrained")
    panels: Any = figure.subplots(2, 2)
    mixture = [
        row
        for row in result["summary"]
        if row["part"] == "mixture" and not row["method"].endswith("(raw)")
    ]
    routing = [row for row in result["summary"] if row["part"] == "routing"]
    _panel(panels[0][0], mixture, "domains", "regret_excess", _mean("regret_excess"))
    panels[0][0].set(yscale="log", ylabel="excess regret to the optimal mixture")
    _panel(panels[0][1], mixture, "domains", "seconds_per_step", _milliseconds)
    _panel(panels[1][0], routing, "experts", "information", _mean("information"))
    panels[1][0].set(ylabel="planted routing recovered (information)")
    _panel(panels[1][1], routing, "experts", "seconds_per_step", _milliseconds)
    panels[0][1].set_ylim(bottom=0)
    panels[1][1].set_yscale("log")
    for left, right in panels:
        right.set_ylabel("milliseconds a step")
        known = left.get_legend_handles_labels()
        right.legend(*known, frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.savefig(path, metadata={"Date": None})


def _panel(
    axes: Any, rows: list[Row], size: str, field: str, value: Callable[[Row], float]
) -> None:
    """Draws a line for each method that has the field; a method looks alike in both panels."""
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = sorted(
            (row for row in rows if row["method"] == method and field in row),
            key=lambda row: int(row[size]),
        )
        if mine:
            axes.plot(
                [row[size] for row in mine],
                [value(row) for row in mine],
                marker=MARKERS[number],
                color=COLOURS[number],
                markersize=4,
                linewidth=1.0,
                label=method.removesuffix(" (excess)"),
            )
    axes.set_xscale("log", base=2)
    sizes = sorted({row[size] for row in rows})
    axes.set_xticks(sizes, [str(one) for one in sizes])
    axes.set_xlabel(size)


def _mean(field: str) -> Callable[[Row], float]:
    return lambda row: float(row[field]["mean"])


def _milliseconds(row: Row) -> float:
    return 1000 * float(row["seconds_per_step"]["mean"])
