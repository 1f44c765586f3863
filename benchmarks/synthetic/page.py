"""The section of the results page on synthetic problems: tables and sentences from a result."""

from typing import Any

HEADING = "## Synthetic problems with known truth"
UNIFORM = "uniform sampling"
AUXILIARY = "auxiliary loss, top 2"

Row = dict[str, Any]


def section(result: dict[str, Any]) -> list[str]:
    """Returns the lines of the section for the content of ``benchmarks/synthetic/result.json``."""
    mixture = [row for row in result["summary"] if row["part"] == "mixture"]
    routing = [row for row in result["summary"] if row["part"] == "routing"]
    setting = result["setting"]
    lines = [
        HEADING,
        "",
        "`python -m benchmarks.synthetic.run`. Settings are the same at every size and were not "
        "tuned by method. Numbers are means over seeds, deviations of several in parentheses.",
        "",
        "![Quality and cost as domains and experts grow](synthetic.svg)",
    ]
    if mixture:
        lines += _mixture_lines(mixture, setting)
    if routing:
        lines += _routing_lines(routing, setting)
    return [*lines, "", *_verdicts(result)]


def _mixture_lines(rows: list[Row], setting: dict[str, Any]) -> list[str]:
    sizes = sorted({row["domains"] for row in rows})
    lines = [
        "",
        "### Regret to the optimal mixture",
        "",
        "Domains of a regression with a spurious feature that misleads in rare ones, and noise "
        "that differs by domain. Regret is the worst domain's population risk over that of the "
        "minimax predictor, both exact: above each domain's own floor for methods that compare "
        "excess losses (and those without an adversary), as it is for methods on raw losses. "
        f"{setting['samples']:,} samples for every method; {_seeds(rows, 'domains')}.",
        "",
        *_table(rows, "domains", "Regret", lambda row: _cell(row, f"regret_{_target(row)}")),
        "",
        "The mixture's own regret, that of the best predictor for the mean shares of the second "
        "half of a run, and its total variation distance to the optimal mixture:",
        "",
        *_table(
            rows,
            "domains",
            "Regret of the mixture; distance",
            lambda row: (
                f"{_number(row[f'mixture_regret_{_target(row)}']['mean'])}; "
                f"{row[f'mixture_distance_{_target(row)}']['mean']:.2f}"
            ),
        ),
        "",
        "Seconds a step over those of uniform sampling, held-out work included:",
        "",
        *_table(rows, "domains", "Cost", lambda row: _cell(row, "ratio_to_uniform", digits=2)),
        "",
    ]
    for size in (sizes[0], sizes[-1]):
        chosen = [
            row
            for row in rows
            if row["domains"] == size
            and _target(row) == "excess"
            and not row["method"].startswith("oracle")
        ]
        best = min(chosen, key=lambda row: row["regret_excess"]["mean"])
        plain = next(row for row in chosen if row["method"] == UNIFORM)
        lines.append(
            f"With {size} domains the least excess regret without the oracle is that of "
            f"*{best['method']}*, {_cell(best, 'regret_excess')}; that of {UNIFORM} is "
            f"{_cell(plain, 'regret_excess')}."
        )
    return [*lines, _growth(rows, "domains", "adversary as sampling (excess)")]


def _routing_lines(rows: list[Row], setting: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "### Recovery of planted routing",
        "",
        "As many experts as clusters, each cluster with an expert of its own that the layer must "
        "find; common clusters occur more often than rare ones. All methods spend two experts a "
        "token in training; evaluation has every cluster equally often, at frozen prices, so that "
        "its spend, shown with the losses, may be another. "
        f"{setting['steps']} steps of {setting['tokens']} tokens, "
        f"{_seeds(rows, 'experts')}. Information is normalised mutual information of cluster and "
        "first expert above chance; matched is the share of tokens at the expert of their "
        "cluster. A loss of 0 is the noise floor, 1 that of an output of 0, by each cluster's own "
        "outputs. A router tells clusters apart before it is trained, hence the first line.",
        "",
        *_table(
            rows,
            "experts",
            "Information; matched",
            lambda row: f"{_cell(row, 'information')}; {row['matched']['mean']:.3f}",
        ),
        "",
        *_table(
            rows,
            "experts",
            "Mean loss; worst cluster; experts a token",
            lambda row: (
                f"{_cell(row, 'mean_loss')}; {row['worst_loss']['mean']:.3f}; "
                f"{row['experts_per_token']['mean']:.2f}"
            ),
        ),
        "",
        f"Seconds a step over those of *{AUXILIARY}*, and routing's share of a step (scores, "
        "selection and prices, without the backward pass):",
        "",
        *_table(
            [row for row in rows if "routing_share" in row],
            "experts",
            "Cost; routing's share",
            lambda row: (
                f"{row['ratio_to_auxiliary_loss']['mean']:.2f}; {row['routing_share']['mean']:.0%}"
            ),
        ),
        "",
    ]
    sizes = sorted({row["experts"] for row in rows})
    for size in (sizes[0], sizes[-1]):
        chosen = [row for row in rows if row["experts"] == size]
        found = max(chosen, key=lambda row: row["information"]["mean"])
        least = min(chosen, key=lambda row: row["worst_loss"]["mean"])
        lines.append(
            f"With {size} experts *{found['method']}* recovers most information "
            f"({_cell(found, 'information')}), and *{least['method']}* has the least loss in its "
            f"worst cluster ({_cell(least, 'worst_loss')})."
        )
    return [*lines, _growth(rows, "experts", "quantile prices, batch budget")]


def _growth(rows: list[Row], size: str, method: str) -> str:
    """Returns a sentence on how the cost of a step grows from the smallest size to the largest."""
    times = {row[size]: row["seconds_per_step"]["mean"] for row in rows if row["method"] == method}
    first, last = min(times), max(times)
    return (
        f"A step of *{method}* takes {times[last] / times[first]:.1f} times the CPU seconds with "
        f"{last} {size} that it takes with {first}, measured at different times of one run."
    )


def _target(row: Row) -> str:
    """Returns what a mixture's method is judged by: the losses that it compares."""
    return "raw" if row["method"].endswith("(raw)") else "excess"


def _seeds(rows: list[Row], size: str) -> str:
    counts = {row[size]: row["seeds"] for row in rows}
    if len(set(counts.values())) == 1:
        return f"seeds: {next(iter(counts.values()))}"
    return "seeds: " + ", ".join(f"{count} of {of} {size}" for of, count in counts.items())


def _table(rows: list[Row], size: str, title: str, cell: Any) -> list[str]:
    """Returns a table with a line for each method and a column for each size."""
    sizes = sorted({row[size] for row in rows})
    cells = {(row["method"], row[size]): cell(row) for row in rows}
    header = " | ".join(f"{one} {size}" for one in sizes)
    lines = [f"| {title} | {header} |", "| --- |" + " ---: |" * len(sizes)]
    for method in dict.fromkeys(row["method"] for row in rows):
        line = " | ".join(cells.get((method, one), "") for one in sizes)
        lines.append(f"| {method} | {line} |")
    return lines


def _cell(row: Row, field: str, *, digits: int = 3) -> str:
    """Returns the mean and, of several seeds, the deviation."""
    mean = _number(row[field]["mean"], digits)
    if row["seeds"] == 1:
        return mean
    return f"{mean} ({row[field]['deviation']:.{digits}f})"


def _number(value: float, digits: int = 3) -> str:
    """Returns a rounded number, without the sign of one that rounds to 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _verdicts(result: dict[str, Any]) -> list[str]:
    """Returns what had to hold, and what was seen either way, one line each."""
    lines = ["What had to hold:", ""]
    lines += [
        f"- {'holds' if kept else 'FAILS'}: {name}" for name, kept in result["claims"].items()
    ]
    lines += ["", "What was seen:", ""]
    seen = result["observations"].items()
    return lines + [f"- {'yes' if is_so else 'no'}: {name}" for name, is_so in seen]
