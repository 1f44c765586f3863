"""Draws the pictures of the guide to divergences and budgets from what the functions return.

``python docs/figures.py`` writes ``figures/*.svg`` and the numbers behind them,
``figures/data.json``. With ``--check`` it draws nothing and fails when a number is no longer what
the committed file says; SVG files differ between versions of matplotlib and are not compared.
``--png FOLDER`` writes bitmaps into that folder instead, to look at.
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from drgr import ambiguity as dro
from drgr.ambiguity import effective_number, worst_case
from drgr.budgets import Budget, BudgetProjection, project, project_entropic, select

Numbers = dict[str, Any]
Case = tuple[dro.Divergence | dro.Spectral, dict[str, Any]]

FOLDER = Path(__file__).with_name("figures")
GREY, BLACK = "#767676", "#222222"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", BLACK)
STYLE: Any = {
    "svg.hashsalt": "drgr",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.monospace": ["DejaVu Sans Mono"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}

# Losses of nine domains in nats; gates of six tokens for four experts; costs of these.
LOSSES = torch.tensor([1.0, 1.2, 1.5, 1.8, 2.0, 2.3, 2.6, 3.2, 4.0], dtype=torch.float64)
GATES = torch.tensor(
    [
        [0.95, 0.60, 0.30, 0.10],
        [0.80, 0.75, 0.55, 0.20],
        [0.20, 0.15, 0.10, 0.05],
        [0.90, 0.85, 0.70, 0.65],
        [0.50, 0.40, 0.05, 0.02],
        [0.70, 0.10, 0.60, 0.35],
    ],
    dtype=torch.float64,
)
EQUAL = torch.ones(4, dtype=torch.float64)
UNEQUAL = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64)

# Each divergence with f''(1).
SMOOTH: dict[str, tuple[dro.Divergence, float]] = {
    "KL()": (dro.KL(), 1.0),
    "ChiSquare()": (dro.ChiSquare(), 1.0),
    "CressieRead(3)": (dro.CressieRead(3.0), 1.0),
    "AlphaDivergence(0.5)": (dro.AlphaDivergence(0.5), 1.0),
    "Hellinger()": (dro.Hellinger(), 0.25),
    "JensenShannon()": (dro.JensenShannon(), 0.25),
    "Burg()": (dro.Burg(), 1.0),
    "Neyman()": (dro.Neyman(), 1.0),
}


def weights_of(divergence: dro.Divergence | dro.Spectral, **level: Any) -> Any:
    """Returns the worst-case weights of the nine losses."""
    return plain(worst_case(LOSSES, divergence=divergence, **level).weights)


def plain(tensor: Tensor) -> Any:
    """Returns a tensor as nested lists."""
    return tensor.detach().tolist()


def smooth_weights() -> Numbers:
    """Weights of the divergences with a second derivative, at three comparable radii."""
    return {
        name: {
            f"radius {relative:g} f''(1)": weights_of(divergence, radius=relative * curvature)
            for relative in (0.05, 0.3, 1.0)
        }
        for name, (divergence, curvature) in SMOOTH.items()
    }


def tail_weights() -> Numbers:
    """Weights of the sets that cut, cap or rank."""
    variation, tail, ranks = dro.TotalVariation(), dro.KLCVaR(0.3), dro.Spectral
    smoothed = ranks.extremile(4.0, dro.KL())
    return {
        "TotalVariation()": {
            f"radius {size}": weights_of(variation, radius=size) for size in (0.05, 0.2, 0.5)
        },
        "CVaR(level)": {f"level {size}": weights_of(dro.CVaR(size)) for size in (0.6, 0.3, 0.15)},
        "KLCVaR(0.3)": {
            f"penalty {size}": weights_of(tail, penalty=size) for size in (2.0, 0.5, 0.1)
        },
        "Spectral, plain": {
            "extremile(2)": weights_of(ranks.extremile(2.0)),
            "exponential(4)": weights_of(ranks.exponential(4.0)),
            "superquantile(0.3)": weights_of(ranks.superquantile(0.3)),
        },
        "Spectral.extremile(4, KL())": {
            f"penalty {size}": weights_of(smoothed, penalty=size) for size in (4.0, 1.0, 0.1)
        },
        "one penalty, three divergences": {
            f"{name}, penalty 1": weights_of(SMOOTH[name][0], penalty=1.0)
            for name in ("ChiSquare()", "KL()", "Burg()")
        },
    }


def rises() -> Numbers:
    """Rise of the worst case over the mean, in standard deviations, against the radius."""
    radii = torch.logspace(-2, 0.75, 23, dtype=torch.float64)

    def rise(divergence: dro.Divergence, curvature: float) -> Any:
        losses = LOSSES.expand(len(radii), -1)
        value = worst_case(losses, divergence=divergence, radius=curvature * radii).value
        return plain((value - LOSSES.mean()) / LOSSES.std(correction=0))

    shown = ("ChiSquare()", "KL()", "JensenShannon()", "Burg()", "Neyman()")
    return {
        "positions": plain(radii),
        "dashed": plain((2 * radii).sqrt()),
        "curves": {name: rise(*SMOOTH[name]) for name in shown},
    }


def noise() -> Numbers:
    """Effective number of domains as the spread of their losses shrinks."""
    spreads = torch.logspace(-3, 0.5, 29, dtype=torch.float64)
    standard = (LOSSES - LOSSES.mean()) / LOSSES.std(correction=0)
    losses = 2 + spreads.unsqueeze(1) * standard
    cases: dict[str, Case] = {
        "KL(), radius 0.5": (dro.KL(), {"radius": 0.5}),
        "CVaR(0.3)": (dro.CVaR(0.3), {}),
        "KL(), penalty 0.5": (dro.KL(), {"penalty": 0.5}),
        "ChiSquare(), penalty 0.5": (dro.ChiSquare(), {"penalty": 0.5}),
    }

    def number(divergence: dro.Divergence | dro.Spectral, level: dict[str, Any]) -> Any:
        return plain(effective_number(worst_case(losses, divergence=divergence, **level).weights))

    curves = {name: number(*case) for name, case in cases.items()}
    return {"positions": plain(spreads), "curves": curves}


def batches() -> Numbers:
    """Mean worst case of batches of exponential losses, as a share of that of all samples."""
    losses = torch.from_numpy(-np.log1p(-np.random.default_rng(0).random(2**15)))
    sizes = [2**exponent for exponent in range(3, 12)]
    cases: dict[str, Case] = {
        "KL(), penalty 1.5": (dro.KL(), {"penalty": 1.5}),
        "ChiSquare(), radius 1": (dro.ChiSquare(), {"radius": 1.0}),
        "CVaR(0.1)": (dro.CVaR(0.1), {}),
        "Burg(), radius 0.1": (dro.Burg(), {"radius": 0.1}),
    }

    def share(divergence: dro.Divergence | dro.Spectral, level: dict[str, Any]) -> list[float]:
        def mean(rows: Tensor) -> float:
            return worst_case(rows, divergence=divergence, **level).value.mean().item()

        return [mean(losses.reshape(-1, size)) / mean(losses) for size in sizes]

    return {"positions": sizes, "curves": {name: share(*case) for name, case in cases.items()}}


def numbers_of(plan: BudgetProjection, costs: Tensor) -> Numbers:
    """Returns gates, plan and prices."""
    return {
        "before": plain(GATES),
        "after": plain(plan.gates),
        "costs": plain(costs),
        "token_price": plain(plan.token_price),
        "batch_price": plain(plan.batch_price),
        "expert_price": plain(plan.expert_price),
    }


def projected(costs: Tensor, **bounds: Any) -> Numbers:
    """Returns the projection of the gates and its prices."""
    return numbers_of(project(GATES, Budget(costs, **bounds)), costs)


def geometries() -> Numbers:
    """The Euclidean and the entropic plan in the same budget."""
    budget = Budget(UNEQUAL, per_batch=8.0)
    return {
        "Euclidean": numbers_of(project(GATES, budget), UNEQUAL),
        "entropic": numbers_of(project_entropic(GATES, budget), UNEQUAL),
    }


def hard_selection(limit: float = 12.0) -> Numbers:
    """The best two experts a token, and the best plan inside a budget of the batch."""
    top = torch.zeros_like(GATES).scatter(1, GATES.topk(2, dim=1).indices, 1.0)
    chosen = select(GATES, Budget(UNEQUAL, per_token=(1.0, 4.0), per_batch=limit))
    return {
        "scores": plain(GATES),
        "costs": plain(UNEQUAL),
        "limit": limit,
        "top-2": plain(top),
        "select": plain(chosen.mask.double()),
        "token_price": plain(chosen.token_price),
        "batch_price": plain(chosen.batch_price),
        "gap": plain(chosen.gap),
    }


def draw_weights(panels: Numbers) -> Figure:
    """Draws weights against losses; a hollow mark is a weight of exactly 0."""
    columns = len(panels) // 2
    shared = {"sharex": True, "sharey": True}
    figure, grid = new_figure(columns * 2.75, 5.0, rows=2, columns=columns, **shared)
    has_one_legend = len({tuple(curves) for curves in panels.values()}) == 1
    for index, (axes, (title, curves)) in enumerate(zip(grid.flat, panels.items(), strict=True)):
        axes.axhline(1 / len(LOSSES), color=GREY, linestyle=":", linewidth=1)
        for color, (label, weights) in zip(COLORS, curves.items(), strict=False):
            axes.plot(LOSSES, weights, color=color, linewidth=1.2, label=label)
            draw_marks(axes, LOSSES.numpy(), np.array(weights), color)
        axes.set_title(title, family="monospace" if "(" in title else None)
        if not has_one_legend or index == 0:
            axes.legend(loc="upper left")
    for axes in grid[-1]:
        axes.set_xlabel("loss")
    for axes in grid[:, 0]:
        axes.set_ylabel("weight")
    return figure


def draw_marks(axes: Any, positions: Any, values: Any, color: str) -> None:
    """Draws points, hollow where the value is 0."""
    is_zero = values == 0
    axes.plot(positions[~is_zero], values[~is_zero], "o", color=color, mew=0, markersize=4.8)
    axes.plot(positions[is_zero], values[is_zero], "o", color=color, mfc="white", markersize=3.8)


def curves_of(labels: tuple[str, str], legend: str, limits: tuple[float, float]) -> Any:
    """Returns a function that draws named curves on a logarithmic axis."""

    def draw(numbers: Numbers) -> Figure:
        figure, grid = new_figure(5.6, 3.3)
        axes = grid[0, 0]
        if "dashed" in numbers:
            label = "sqrt(2 rho / f''(1))"
            axes.plot(numbers["positions"], numbers["dashed"], "--", color=GREY, label=label)
        for color, (name, values) in zip(COLORS, numbers["curves"].items(), strict=False):
            axes.plot(numbers["positions"], values, color=color, linewidth=1.4, label=name)
        is_size = labels[0] == "batch size"
        axes.set_xscale("log", base=2 if is_size else 10)
        if is_size:
            positions = numbers["positions"]
            axes.set_xticks(positions, labels=[f"{size:g}" for size in positions])
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_ylim(*limits)
        axes.legend(loc=legend)
        return figure

    return draw


def draw_table(
    axes: Any, title: str, values: Any, fill: Any, *, rows: Numbers, columns: Numbers
) -> None:
    """Draws a heat map of tokens and experts; ``rows`` stand at its right, ``columns`` below."""
    num_tokens, num_experts = values.shape
    middle = {"ha": "center", "va": "center"}
    axes.pcolormesh(fill, cmap="Blues", vmin=0, vmax=1.15, edgecolors="white", linewidth=1.5)
    for (row, column), value in np.ndenumerate(values):
        depth = fill[row, column]
        color = GREY if depth == 0 else "white" if depth > 0.62 else BLACK
        text = "0" if value == 0 else f"{value:.2f}"
        axes.text(column + 0.5, row + 0.5, text, color=color, **middle)
    for shift, (head, entries) in enumerate(rows.items()):
        place = num_experts + 0.55 + 1.05 * shift
        for row, entry in enumerate(entries):
            axes.text(place, row + 0.5, entry, color=BLACK, **middle)
        axes.text(place, -0.35, head, color=BLACK, **middle)
    names = {f"token {row + 1}": row + 0.5 for row in range(num_tokens)}
    for shift, (head, entries) in enumerate(columns.items()):
        place = num_tokens + 0.4 + 0.65 * shift
        for column, entry in enumerate(entries):
            axes.text(column + 0.5, place, entry, color=BLACK, **middle)
        names[head] = place
    for name, place in names.items():
        axes.text(-0.12, place, name, color=BLACK, ha="right", va="center")
    axes.set_xlim(0, num_experts + 1.05 * len(rows))
    axes.set_ylim(num_tokens + 0.65 * len(columns), -0.7)
    axes.set_axis_off()
    axes.set_title(title, loc="left")


def two_digits(values: Any) -> list[str]:
    """Formats prices, with a dash for 0."""
    return ["-" if abs(value) < 1e-9 else f"{value:.2f}" for value in np.asarray(values)]


def draw_plan(numbers: Numbers) -> Figure:
    """Gates and plan side by side, with spends and the prices that are not 0."""
    costs, batch_price = np.array(numbers["costs"]), numbers["batch_price"]
    figure, grid = new_figure(8.2, 3.2, columns=2)
    title = f"plan, batch price {batch_price:.2f}" if batch_price > 1e-9 else "plan"
    for axes, key, name in zip(grid.flat, ("before", "after"), ("gates", title), strict=True):
        values = np.array(numbers[key])
        rows, columns = {"spend": [f"{cost:.2f}" for cost in values @ costs]}, {}
        if costs.max() > costs.min():
            columns["cost"] = [f"{cost:g}" for cost in costs]
        columns["spend"] = [f"{cost:.2f}" for cost in values.sum(axis=0) * costs]
        # Empty ones keep both tables at one size.
        head = "price" if key == "after" else ""
        for place, prices in ((rows, "token_price"), (columns, "expert_price")):
            if np.abs(numbers[prices]).max() > 1e-9:
                place[head] = two_digits(numbers[prices]) if head else []
        total = f"{name}; spend {(values @ costs).sum():.2f}"
        draw_table(axes, total, values, values, rows=rows, columns=columns)
    return figure


def draw_geometries(numbers: Numbers) -> Figure:
    """Every gate before and after, by the cost of its expert."""
    figure, grid = new_figure(8.2, 3.4, columns=2, sharex=True, sharey=True)
    positions = np.linspace(0, 1, 201)
    for axes, (name, part) in zip(grid.flat, numbers.items(), strict=True):
        axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
        before, after, costs = (np.array(part[key]) for key in ("before", "after", "costs"))
        price = part["batch_price"]
        for color, cost in zip(COLORS, np.unique(costs), strict=False):
            shifted = np.clip(positions - cost * price, 0, 1)
            scaled = positions * math.exp(-cost * price)
            curve = shifted if name == "Euclidean" else scaled
            axes.plot(positions, curve, color=color, linewidth=1, label=f"cost {cost:g}")
            same = costs == cost
            draw_marks(axes, before[:, same].ravel(), after[:, same].ravel(), color)
        axes.set_title(f"{name}, batch price {price:.2f}")
        axes.set_xlabel("gate before")
        axes.legend(loc="upper left")
    grid[0, 0].set_ylabel("gate after")
    return figure


def draw_hard_selection(numbers: Numbers) -> Figure:
    """Two plans in whole experts."""
    costs, scores = np.array(numbers["costs"]), np.array(numbers["scores"])
    figure, grid = new_figure(8.2, 3.2, columns=2)
    certificate = f", batch price {numbers['batch_price']:.2f}, gap {numbers['gap']:.2f}"
    for axes, key in zip(grid.flat, ("top-2", "select"), strict=True):
        mask = np.array(numbers[key])
        spends = {"spend": [f"{cost:g}" for cost in mask @ costs]}
        prices = {"price": two_digits(numbers["token_price"])} if key == "select" else {"": []}
        columns = {"cost": costs, "spend": mask.sum(axis=0) * costs}
        total = f"spend {(mask @ costs).sum():g} of {numbers['limit']:g}"
        title = f"{key}{certificate if key == 'select' else ''}; {total}"
        texts = {head: [f"{entry:g}" for entry in entries] for head, entries in columns.items()}
        draw_table(axes, title, scores, 0.45 * mask, rows={**spends, **prices}, columns=texts)
    return figure


FIGURES: dict[str, tuple[Callable[[], Numbers], Callable[[Numbers], Figure]]] = {
    "weights-smooth": (smooth_weights, draw_weights),
    "weights-tail": (tail_weights, draw_weights),
    "radius-rule": (
        rises,
        curves_of(("rho / f''(1)", "(V - mean) / standard deviation"), "upper left", (0, 2.3)),
    ),
    "radius-or-penalty": (
        noise,
        curves_of(
            ("standard deviation of the domain losses", "effective number of 9 domains"),
            "lower left",
            (0, 9.5),
        ),
    ),
    "batch-size": (
        batches,
        curves_of(("batch size", "mean worst case / that of all"), "lower right", (0.5, 1.03)),
    ),
    "budget-token-bounds": (lambda: projected(EQUAL, per_token=(1.0, 1.5)), draw_plan),
    "budget-batch-bound": (lambda: projected(EQUAL, per_batch=6.0), draw_plan),
    "budget-unequal-costs": (lambda: projected(UNEQUAL, per_batch=9.0), draw_plan),
    "budget-expert-capacity": (lambda: projected(EQUAL, per_expert=2 * EQUAL), draw_plan),
    "budget-geometries": (geometries, draw_geometries),
    "budget-hard-selection": (hard_selection, draw_hard_selection),
}


def new_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Returns a figure of a size in inches, and its grid of axes."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def rounded(value: Any) -> Any:
    """Returns nested numbers with six significant digits; what rounding left of 0 is 0."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return 0.0 if abs(value) < 1e-12 else float(f"{value:.6g}")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yields the path and value of every number."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(entry, f"{path}/{key}")


def differences(old: Numbers, new: Numbers) -> list[str]:
    """Returns which numbers differ by more than the rounding of the file."""
    before, after = dict(leaves(old)), dict(leaves(new))
    changed = [
        f"{path}: {before[path]} is now {after[path]}"
        for path in sorted(set(before) & set(after))
        if not math.isclose(before[path], after[path], rel_tol=2e-5, abs_tol=1e-9)
    ]
    return [f"{path}: only in one" for path in sorted(set(before) ^ set(after))] + changed


def main() -> None:
    """Draws, or checks."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the guide.")
    parser.add_argument("--check", action="store_true", help="compare the numbers, draw nothing")
    parser.add_argument("--png", type=Path, help="write bitmaps into this folder instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = rounded({name: compute() for name, (compute, _) in FIGURES.items()})
    file = FOLDER / "data.json"
    if arguments.check:
        found = differences(json.loads(file.read_text(encoding="utf-8")), data)
        if found:
            sys.exit("\n".join([*found[:20], "run python docs/figures.py, look at the pictures"]))
        return
    mpl.rcParams.update(STYLE)
    for name, (_, draw) in FIGURES.items():
        figure = draw(data[name])
        if arguments.png:
            figure.savefig(arguments.png / f"{name}.png", dpi=130)
        else:
            (FOLDER / f"{name}.svg").write_text(svg_of(figure), encoding="utf-8")
    if not arguments.png:
        file.write_text(json.dumps(data) + "\n", encoding="utf-8")


def svg_of(figure: Figure) -> str:
    """Returns a figure as SVG without a date, with positions in hundredths of a point."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    lines = re.sub(r"(\.\d\d)\d+", r"\1", text.getvalue()).splitlines()
    return "\n".join(line.strip() for line in lines) + "\n"


if __name__ == "__main__":
    main()
