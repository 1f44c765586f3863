"""The part of the page of results that shows worst groups of real data."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.real_groups.methods import ON_DRAWS, OURS

Row = dict[str, Any]


def section(result: Row) -> list[str]:
    """Returns the lines of a section in Markdown; every number in it comes from the result."""
    shared = result["settings"]
    trials = len(next(iter(shared["trials"].values())))
    budget = shared["budget"]
    over = sum(row["assignments_over_budget"] for row in result["summary"])
    lines = [
        "## Real groups",
        "",
        f"A classifier with one layer of {shared['experts']} experts, each training batch "
        f"inside an exact budget of {budget['average']} experts a sample on average, "
        f"{budget['minimum']} to {budget['maximum']} each. Every method takes {shared['steps']} "
        f"steps of {shared['batch_size']} samples, the first stage of JTT included, and chose one "
        f"of {trials} settings by the worst group of the validation split. Mean and standard "
        f"deviation over {shared['seeds']} fresh seeds, test split. Assignments over the budget "
        f"of a training batch: {over}. Groups of few samples make the worst group noisy: the "
        f"seeds share splits, so this noise is not in the intervals. {OURS} weighs the objective "
        f"by groups, from a tenth of the steps on, which was chosen on the validation splits with "
        f"two other seeds; the row on draws has its weights where they are on text. "
        f"`python -m benchmarks.real_groups.run`",
    ]
    for data in result["data"]:
        lines += ["", *part(result, data)]
    return [*lines, "", *overall(result)]


def overall(result: Row) -> list[str]:
    """Returns the worst groups of all data sets together: how good, and how far behind at most."""
    worst: dict[str, dict[str, float]] = {}
    for row in result["summary"]:
        figure = 100 * row["worst_group_accuracy"]["mean"]
        worst.setdefault(row["method"], {})[row["data"]] = figure
    best = {name: max(found[name] for found in worst.values()) for name in worst[OURS]}
    behind = {
        method: max(best[name] - value for name, value in found.items())
        for method, found in worst.items()
    }
    means = {method: statistics.fmean(found.values()) for method, found in worst.items()}
    return [
        "**All together**: the mean of the worst groups above, and by how much a method is behind "
        "the best one where it is furthest behind.",
        "",
        "| method | worst group, mean, % | furthest behind, points |",
        "| --- | --: | --: |",
        *[
            f"| {method} | {means[method]:.1f} | {behind[method]:.1f} |"
            for method in sorted(means, key=lambda one: -means[one])
        ],
    ]


def part(result: Row, data: Row) -> list[str]:
    """Returns the table of one data set and what it says."""
    rows = [row for row in result["summary"] if row["data"] == data["name"]]
    rows.sort(key=lambda row: -row["worst_group_accuracy"]["mean"])
    smallest = min(data["groups"], key=lambda group: group["test"])
    train = sum(group["train"] for group in data["groups"])
    return [
        f"**{data['name']}** ({data['kind']}): {data['notes']}. {train} training "
        f"samples, {len(data['groups'])} groups; the smallest, {smallest['name']}, has "
        f"{smallest['train']} of them and {smallest['test']} test samples. {data['licence']}.",
        "",
        "| method | groups in training | worst group, % | average, % "
        "| experts a test sample | chosen |",
        "| --- | --- | --: | --: | --: | --- |",
        *[table_row(row, result["settings"]["knows_groups"]) for row in rows],
        "",
        *sentences(result, rows),
    ]


def table_row(row: Row, knows_groups: dict[str, bool]) -> str:
    chosen = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
    return (
        f"| {row['method']} | {'yes' if knows_groups[row['method']] else 'no'} "
        f"| {percent(row['worst_group_accuracy'])} | {percent(row['average_accuracy'])} "
        f"| {row['assignments_per_test_sample']['mean']:.2f} | {chosen.replace('_', ' ')} |"
    )


def percent(figure: dict[str, float]) -> str:
    return f"{100 * figure['mean']:.1f} ± {100 * figure['deviation']:.1f}"


def sentences(result: Row, rows: Sequence[Row]) -> list[str]:
    """Says how DRGR's worst group compares with that of the best baseline, of ERM and of draws.

    The best is the best on the test split, which favours it.
    """
    best = next(row["method"] for row in rows if row["method"] not in (OURS, ON_DRAWS))
    pairs = {
        pair["other"]: pair for pair in result["comparisons"] if pair["data"] == rows[0]["data"]
    }
    return [compared(pairs[name]) for name in dict.fromkeys((best, "ERM", ON_DRAWS))]


def compared(pair: Row) -> str:
    """Returns one paired comparison as a line of a list."""
    side = "above" if pair["mean"] > 0 else "below"
    line = (
        f"- {OURS}'s worst group is {100 * abs(pair['mean']):.1f} points {side} that of "
        f"{pair['other']}"
    )
    if pair["student_low"] is None:
        return f"{line} (one seed, no interval)."
    low, high = 100 * pair["student_low"], 100 * pair["student_high"]
    told = "they differ" if low > 0 or high < 0 else "not told apart"
    return (
        f"{line} (paired, 95 % interval {low:+.1f} to {high:+.1f}, {pair['seeds']} seeds): {told}."
    )
