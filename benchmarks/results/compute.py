"""Worst-domain loss against active experts: a fixed number for every token, or a batch budget."""

import statistics
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results.comparison import (
    MEAN,
    ROOT,
    WORST,
    Json,
    about,
    average,
    command,
    common_seeds,
    finished,
    interval_cells,
    is_above,
    is_below,
    paired,
    runs_of,
    seeds_of,
    spread,
    unfinished_line,
    values,
)

FIGURE = ROOT / "docs" / "compute.svg"


def by_experts(result: Json) -> dict[bool, dict[float, str]]:
    """Returns methods by whether a token has a fixed number of experts, then by their average."""
    found: dict[bool, dict[float, str]] = {True: {}, False: {}}
    for name in finished(result):
        budget = runs_of(result, name, seeds_of(result, name))[0]["budget"]
        is_fixed = budget["minimum"] == budget["maximum"]
        found[is_fixed][float(budget["average"])] = name
    return {kind: dict(sorted(names.items())) for kind, names in found.items()}


def section(result: Json) -> list[str]:
    """Returns the section on compute."""
    kinds = by_experts(result)
    lines = [
        "## What an expert more buys",
        "",
        "DRGR with a fixed number of experts for every token, and with a budget for the batch that "
        "gives tokens different numbers, at equal total FLOPs: fewer experts buy more steps. "
        f"{len(common_seeds(result))} seeds. {about(result)}{command(result)}",
        "",
        "![Worst domain against active experts](compute.svg)",
        "",
        "| experts a token | fixed, worst domain | budget, worst domain | budget less fixed | 95 % "
        "| fixed, mean | budget, mean | FLOPs |",
        "| --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    rows = [
        _row(result, experts, kinds[True].get(experts), kinds[False].get(experts))
        for experts in sorted({*kinds[True], *kinds[False]})
    ]
    return [*lines, *rows, *unfinished_line(result), "", *_sentences(result, kinds)]


def _row(result: Json, experts: float, fixed: str | None, budget: str | None) -> str:
    def cell(name: str | None, figure: str) -> str:
        return "" if name is None else spread(result, name, figure, seeds_of(result, name))

    difference = " | "
    if fixed is not None and budget is not None:
        difference = interval_cells(paired(result, WORST, budget, fixed))
    known = budget or fixed
    assert known is not None
    flops = average(result, known, "flops", seeds_of(result, known))
    return (
        f"| {experts:g} | {cell(fixed, WORST)} | {cell(budget, WORST)} | {difference} | "
        f"{cell(fixed, MEAN)} | {cell(budget, MEAN)} | {flops:.2e} |"
    )


def _sentences(result: Json, kinds: dict[bool, dict[float, str]]) -> list[str]:
    both = sorted(set(kinds[True]) & set(kinds[False]))
    differences = [paired(result, WORST, kinds[False][at], kinds[True][at]) for at in both]
    below = [f"{at:g}" for at, found in zip(both, differences, strict=True) if is_below(found)]
    above = [f"{at:g}" for at, found in zip(both, differences, strict=True) if is_above(found)]
    lower = sum(found.mean < 0 for found in differences)
    lines = [
        f"At an equal average the budget has the lower worst domain at {lower} of {len(both)} "
        f"averages; by more than its interval it is lower at {' and '.join(below) or 'none'}, "
        f"higher at {' and '.join(above) or 'none'}."
    ]
    averages = {
        at: average(result, name, WORST, seeds_of(result, name))
        for at, name in kinds[False].items()
    }
    if averages:
        best = min(averages, key=averages.__getitem__)
        lines[0] += f" Of the budgets, {best:g} experts a token have the lowest worst domain."
    return lines


def draw(result: Json) -> None:
    """Draws the worst domain against active experts."""
    mpl.rcParams.update({"svg.hashsalt": "drgr", "svg.fonttype": "none", "font.size": 8.5})
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes: Any = figure.add_subplot()
    styles = {True: ("fixed number", "#0072B2", "s"), False: ("batch budget", "#D55E00", "o")}
    for is_fixed, names in by_experts(result).items():
        label, color, marker = styles[is_fixed]
        found = [values(result, name, WORST, seeds_of(result, name)) for name in names.values()]
        axes.errorbar(
            list(names),
            [statistics.fmean(one) for one in found],
            yerr=[statistics.stdev(one) if len(one) > 1 else 0.0 for one in found],
            marker=marker,
            color=color,
            linewidth=1.0,
            capsize=2,
            label=label,
        )
    axes.set_xlabel("experts a token, average")
    axes.set_ylabel("worst domain, bits per byte")
    axes.legend(frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})
