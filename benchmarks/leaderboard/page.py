"""Writes docs/choosing-a-router.md and its figure; --check compares the page with the results.

The page exists where ``leaderboard.json`` does, which is collected from the comparison beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.leaderboard.choice import Row, choices, rows
from benchmarks.results.comparison import (
    ROOT,
    Json,
    about,
    interval_cells,
    unfinished_line,
)

PAGE = ROOT / "docs" / "choosing-a-router.md"
FIGURE = ROOT / "docs" / "leaderboard.svg"
RESULT = Path(__file__).with_name("leaderboard.json")
COST = ROOT / "benchmarks" / "routing_cost" / "result.json"
COLUMNS = (
    ("#", "--:"),
    ("method", "---"),
    ("worst domain", "--:"),
    ("less reference", "--:"),
    ("95 %", "--:"),
    ("mean", "--:"),
    ("less reference", "--:"),
    ("95 %", "--:"),
    ("MaxVio", "--:"),
    ("entropy", "--:"),
    ("dead", "--:"),
    ("congestion", "--:"),
    ("routing", "--:"),
    ("time", "--:"),
    ("over budget", "--:"),
    ("seeds", "--:"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leaderboard.page", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="fail if the page differs")
    arguments = parser.parse_args()
    problem = check(RESULT, PAGE)
    if arguments.check:
        if problem is not None:
            raise SystemExit(problem)
        return
    if not RESULT.exists():
        raise SystemExit(f"{RESULT} does not exist; collect the comparison beside it first")
    result, cost = (json.loads(path.read_text()) for path in (RESULT, COST))
    PAGE.write_text(page(result, cost))
    draw(rows(result, cost))


def check(source: Path, written: Path) -> str | None:
    """Returns what is wrong with a page; None where it is as the results say."""
    command = "run python -m benchmarks.leaderboard.page"
    if not source.exists():
        return (
            f"{written.name} has no {source.name} to be written from" if written.exists() else None
        )
    result, cost = (json.loads(path.read_text()) for path in (source, COST))
    if not written.exists() or page(result, cost) != written.read_text():
        return f"{written.name} differs from the results; {command}"
    return None


def page(result: Json, cost: Json) -> str:
    """Returns the page."""
    table = rows(result, cost)
    reference = result["reference"]
    lines = [
        "# Choosing a router",
        "",
        "Written by `python -m benchmarks.leaderboard.page` from committed results; nothing here "
        "is typed by hand.",
        "",
        f"{len(table)} routers learn the eight domains of `drgr-8`, drawn equally often, from the "
        f"same text with the same model, at the FLOPs of the reference at most: *{reference}*. "
        f"{about(result)}",
        "",
        "    drgr compare benchmarks/leaderboard/experiment.yaml --parallel 2",
        "    python -m benchmarks.headline.collect runs/leaderboard \\",
        f"        --of-interest '{reference}' --output benchmarks/leaderboard/leaderboard.json",
        "",
        "## What to pick when",
        "",
        *choices(table, reference=reference),
        "",
        "## All of them",
        "",
        "![Worst domain against balance, by router](leaderboard.svg)",
        "",
        *table_lines(table),
        *unfinished_line(result),
        "",
        *legend(cost),
    ]
    return "\n".join(lines) + "\n"


def table_lines(table: list[Row]) -> list[str]:
    """Returns the table, by the worst domain."""
    lines = [
        f"| {' | '.join(name for name, _ in COLUMNS)} |",
        f"| {' | '.join(side for _, side in COLUMNS)} |",
    ]
    for number, row in enumerate(table, start=1):
        differences = [
            "reference | " if found is None else interval_cells(found)
            for found in (row.worst_difference, row.mean_difference)
        ]
        cells = [
            str(number),
            row.name,
            row.shown_worst,
            differences[0],
            row.shown_mean,
            differences[1],
            _number(row.max_violation, ".2f"),
            _number(row.entropy, ".2f"),
            _number(row.dead_experts, ".1f"),
            _number(row.congestion, ".1f"),
            _number(row.cost_share, ".1%"),
            _number(row.time_ratio, ".2f"),
            f"{row.over_budget:.0f}",
            str(row.seeds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def legend(cost: Json) -> list[str]:
    """Says what the columns are."""
    found = cost["size"]
    return [
        "Worst domain and mean of domains in bits per byte of the test split, mean ± standard "
        "deviation over seeds; differences are paired by the "
        "seeds that both finished, with Student's interval. MaxVio is "
        "the largest load of an expert over the mean load, less 1, and entropy that of a token's "
        "scores over the largest possible, both averaged over layers of the evaluation; dead "
        "experts are counted over layers and averaged over seeds. Congestion is the gradient "
        "traffic of the busiest link (domain, expert) over the mean link. Routing is the share of "
        "a layer's forward and backward pass that goes to routing, where it was timed: in a layer "
        f"of {found['experts']} experts with {found['tokens']:,} tokens "
        "(`benchmarks/routing_cost`), not in these runs. Time is that of a training step over the "
        "reference's, median over seeds; runs shared a machine, so it is rough.",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(table: list[Row]) -> None:
    """Draws the worst domain against balance; numbers are those of the table."""
    mpl.rcParams.update({"svg.hashsalt": "drgr", "svg.fonttype": "none", "font.size": 8.5})
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes: Any = figure.add_subplot()
    for number, row in enumerate(table, start=1):
        if row.max_violation is None:
            continue
        color = "#D55E00" if row.worst_difference is None else "#0072B2"
        axes.plot(row.max_violation, row.worst, "o", color=color, markersize=3)
        axes.annotate(
            str(number),
            (row.max_violation, row.worst),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlabel("MaxVio at evaluation, mean of layers")
    axes.set_ylabel("worst domain, bits per byte")
    axes.set_title("Routers by number of the table; the reference is orange")
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
