"""The rows of the leaderboard, and what to pick when, as its numbers say."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from benchmarks.results.comparison import (
    MEAN,
    WORST,
    Json,
    average,
    finished,
    known_average,
    listed,
    paired,
    runs_of,
    seeds_of,
    sides,
    spread,
    values,
)
from drgr.experiments.statistics import Interval

# What benchmarks/routing_cost timed of a method: kind and label, and whether a token's number of
# experts is fixed. Scores were timed without prices, selections with scores of a softmax.
TIMED = {
    "softmax, quantile prices, batch budget": ("price", "quantile", False),
    "softmax renormalised": ("score", "softmax", False),
    "sigmoid": ("score", "sigmoid", False),
    "cosine": ("score", "cosine", False),
    "k-means": ("score", "k-means", False),
    "NormRouter": ("score", "norm", False),
    "ReLU + RMSNorm": ("score", "ReLU with RMS norm", False),
    "noisy": ("score", "noisy", False),
    "stochastic gates": ("score", "stochastic gates, straight through", False),
    "no prices": ("price", "none", False),
    "sign bias": ("price", "sign, u 0.001", False),
    "RMS bias": ("price", "RMS, u 0.01", False),
    "decaying subgradient": ("price", "subgradient, 1/sqrt(n)", False),
    "BIP": ("price", "BIP, 8 iterations", False),
    "Sinkhorn prices": ("price", "Sinkhorn, scores", False),
    "Selective Sinkhorn": ("price", "Selective Sinkhorn", False),
    "congestion price": ("price", "congestion, 0.2", False),
    "fixed top-2": ("price", "quantile", True),
    "top-p": ("selection", "top-p", False),
    "learned threshold": ("selection", "learned threshold", False),
    "budget by sequence": ("selection", "budget by sequence", False),
    "budget by layer, descending": ("selection", "budget by layer", False),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A router of the leaderboard; what was not measured is None.

    Attributes:
        name: Its name.
        worst: Bits per byte of the worst domain, mean over seeds.
        mean: Mean of domains.
        shown_worst: The same with its deviation.
        shown_mean: The same with its deviation.
        worst_difference: Less the reference, paired; None for the reference.
        mean_difference: The same of the mean.
        max_violation: Imbalance of the evaluated load, mean of layers.
        entropy: Routing entropy, mean of layers.
        dead_experts: Experts without an assignment, of all layers.
        congestion: Of gradient traffic, mean of layers.
        cost_share: Share of routing in a layer's forward and backward.
        time_ratio: Time of a training step over the reference's.
        over_budget: Batches over the budget, all seeds.
        seeds: Finished seeds.
    """

    name: str
    worst: float
    mean: float
    shown_worst: str
    shown_mean: str
    worst_difference: Interval | None
    mean_difference: Interval | None
    max_violation: float | None
    entropy: float | None
    dead_experts: float | None
    congestion: float | None
    cost_share: float | None
    time_ratio: float | None
    over_budget: float
    seeds: int


def rows(result: Json, cost: Json) -> list[Row]:
    """Returns the routers by their worst domain, lowest first."""
    found = [_row(result, cost, name) for name in finished(result)]
    return sorted(found, key=lambda row: row.worst)


def _row(result: Json, cost: Json, name: str) -> Row:
    reference, seeds = result["reference"], seeds_of(result, name)
    is_other = name != reference
    return Row(
        name=name,
        worst=average(result, name, WORST, seeds),
        mean=average(result, name, MEAN, seeds),
        shown_worst=spread(result, name, WORST, seeds),
        shown_mean=spread(result, name, MEAN, seeds),
        worst_difference=paired(result, WORST, name, reference) if is_other else None,
        mean_difference=paired(result, MEAN, name, reference) if is_other else None,
        max_violation=known_average(result, name, "max_violation"),
        entropy=known_average(result, name, "routing_entropy"),
        dead_experts=known_average(result, name, "dead_experts"),
        congestion=known_average(result, name, "congestion"),
        cost_share=_cost_share(cost, name),
        time_ratio=_time_ratio(result, name),
        over_budget=sum(values(result, name, "batches_over_budget", seeds)),
        seeds=len(seeds),
    )


def _cost_share(cost: Json, name: str) -> float | None:
    if name not in TIMED:
        return None
    kind, label, is_fixed = TIMED[name]
    shares = [
        float(row["share"]["median"])
        for row in cost["rows"]
        if (row["kind"], row["label"]) == (kind, label)
        and row["budget"].endswith(" each") == is_fixed
    ]
    return shares[0] if shares else None


def _time_ratio(result: Json, name: str) -> float | None:
    reference = result["reference"]
    seeds = sorted(set(seeds_of(result, name)) & set(seeds_of(result, reference)))
    both = zip(runs_of(result, name, seeds), runs_of(result, reference, seeds), strict=True)
    ratios = [
        mine["seconds"] / mine["steps"] / (theirs["seconds"] / theirs["steps"])
        for mine, theirs in both
        if "seconds" in mine and "seconds" in theirs
    ]
    return statistics.median(ratios) if ratios else None


def choices(table: Sequence[Row], *, reference: str) -> list[str]:
    """Says what to pick when, and what does not help."""
    worst = {row.name: row.worst_difference for row in table if row.worst_difference is not None}
    mean = {row.name: row.mean_difference for row in table if row.mean_difference is not None}
    worse, better, neither = sides(worst)
    worse_mean, better_mean, _ = sides(mean)
    hurts = [name for name in worse if name in worse_mean]
    lines = [
        f"- *The worst domain matters most*: {_advice(better, table, reference)}",
        _least(table, "Fewest bits per byte on the mean", lambda row: row.mean, "{:.3f}"),
        _least(table, "Best balance (MaxVio)", lambda row: row.max_violation, "{:.2f}"),
        _least(table, "Least congestion of traffic", lambda row: row.congestion, "{:.1f}"),
        _least(
            [row for row in table if row.name not in worse],
            "Cheapest routing, of those timed and not worse on the worst domain",
            lambda row: row.cost_share,
            "{:.1%}",
        ),
        _least(table, "Most decided tokens (entropy)", lambda row: row.entropy, "{:.2f}"),
        f"- *Better than {reference} by more than the interval*: on the worst domain: "
        f"{listed(better)}. On the mean: {listed(better_mean)}.",
        f"- *Not told apart from it by the worst domain*: {listed(neither)}.",
        f"- *Does not help*: worse by more than the interval on the worst domain: {listed(worse)}. "
        f"On the mean: {listed(worse_mean)}. On both: {listed(hurts)}.",
        f"- {len(worst)} comparisons at 95 % put about {0.05 * len(worst):.1f} of them outside "
        "of their interval by chance alone, and few seeds tell only large differences apart.",
    ]
    dead = [row.name for row in table if row.dead_experts]
    over = [row.name for row in table if row.over_budget]
    lines.append(f"- *Leaves experts without a token*: {listed(dead)}.")
    lines.append(f"- *Spends more than its budget in some batch*: {listed(over)}.")
    return [line for line in lines if line]


def _advice(better: Sequence[str], table: Sequence[Row], reference: str) -> str:
    """Says what to take for the worst domain."""
    first = table[0]
    lowest = f"{first.name} has the lowest, {first.worst:.3f} bits per byte"
    if better:
        best = next(row.name for row in table if row.name in better)
        return f"{best}, which is below {reference} by more than the interval; {lowest}."
    if first.name == reference:
        return f"{reference}; no other is below it at all."
    return f"{lowest}, but none is below {reference} by more than its interval: keep that."


def _least(
    table: Sequence[Row], what: str, figure: Callable[[Row], float | None], form: str
) -> str:
    """Names the router with the least of a figure; an empty line where none has it."""
    known = [(value, row.name) for row in table if (value := figure(row)) is not None]
    if not known:
        return ""
    value, _ = min(known)
    names = [name for other, name in known if other == value]
    return f"- *{what}*: {listed(names)}, {form.format(value)}."
