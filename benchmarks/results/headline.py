"""The headline comparison: equal total FLOPs, on a GPU, on two cores, and with a larger model."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results.comparison import (
    MEAN,
    OURS,
    ROOT,
    SIMPLE,
    WORST,
    average,
    command,
    common_seeds,
    finished,
    interval_cells,
    known_average,
    paired,
    provenance,
    size,
    spread,
    unfinished_line,
    values,
    verdict,
)
from benchmarks.results.mixtures import mixture_lines

FIGURE = ROOT / "docs" / "headline.svg"
SMALL_FIGURE = ROOT / "docs" / "headline-small.svg"
HEADLINE = "benchmarks/headline/headline.json"
RIVAL = "held-out adversary as sampling"
UNBALANCED = "as given + auxiliary loss"
BILEVEL = OURS + " + hypergradient mixture"
FIRST_LATER_SEED = 6
EXPLORED = "benchmarks/headline/explored-{}.json"
MARKERS = "osD^v<>phX*Pd8H"
INTRODUCTION = """# Results: does DRGR beat its baselines at equal compute?

Written by `python -m benchmarks.results` from committed results; nothing here is typed by hand.

A model of 4 layers of 8 experts (recipe `demo`) learns eight domains of text of very unequal
natural share. Every method has the total FLOPs of the reference at most, held-out passes, outer
steps and proxies included; what costs more takes fewer steps. Every method had {trials} trials on
the validation split for its own knob, chosen by worst plus twice the mean bits per byte, and fresh
seeds for the runs below, on the test split. DRGR here is: KL weights of the training losses as
sampling, from a later step on, inside the exact batch budget of 2 experts a token. Its search
ranges, unlike those of the baselines, came from eleven exploratory runs on another seed at a
quarter of the batch.

    drgr compare benchmarks/headline/experiment.yaml --parallel 13
    python -m benchmarks.headline.collect runs/headline --output benchmarks/headline/headline.json

{done}

![Worst domain against mean of domains, by method](headline.svg)
"""


def section(result: dict[str, Any]) -> list[str]:
    """Returns the title of the page and the section on the headline."""
    seeds = common_seeds(result)
    trials = max(trial["trial"] for trial in result["trials"]) + 1
    return [
        INTRODUCTION.format(trials=trials, done=done(result, seeds)),
        *comparison_lines(result, seeds, level="##"),
    ]


def small(result: dict[str, Any]) -> list[str]:
    """Returns the section on the same comparison in the size of two CPU cores."""
    seeds = common_seeds(result)
    trials = max((trial["trial"] + 1 for trial in result["trials"]), default=0)
    tuning = f"{trials} trials for each method's own knob." if trials else "Nothing is tuned."
    return [
        "## The same on two CPU cores",
        "",
        f"{size(result['setting'])} {tuning} DRGR here sets {_settings_of_ours(result)} on top of "
        f"what all methods share; its price on traffic and its growing budget were found in "
        f"{explored()} exploratory runs with two other seeds "
        f"(`{EXPLORED.format('*')}`). {done(result, seeds)}{command(result)}",
        "",
        f"![Worst domain against mean of domains, by method]({SMALL_FIGURE.name})",
        "",
        *comparison_lines(result, seeds, level="###", later=later_line(result)),
    ]


def explored() -> int:
    """Returns how many runs there were before the settings of DRGR were fixed."""
    paths = [ROOT / EXPLORED.format(number) for number in (1, 2, 3)]
    return sum(len(json.loads(path.read_text())["runs"]) for path in paths)


def _settings_of_ours(result: dict[str, Any]) -> str:
    method = next(one for one in result["methods"] if one["name"] == OURS)
    return ", ".join(f"`{setting}`" for setting in method["settings"]) or "nothing"


def large(result: dict[str, Any]) -> list[str]:
    """Returns the section on the larger model."""
    return [
        "## A model of 110 million parameters",
        "",
        "8 layers of 16 experts, bfloat16, 300 steps of 8,192 tokens, settings not tuned. "
        + provenance(result)
        + " `drgr compare benchmarks/headline/large.yaml --parallel 2`",
        "",
        *table(result, common_seeds(result)),
        "",
        *large_lines(result),
    ]


def comparison_lines(
    result: dict[str, Any], seeds: list[int], *, level: str, later: Sequence[str] = ()
) -> list[str]:
    """Returns the table, the claims, the mixtures and the differences of a comparison."""
    return [
        *table(result, seeds),
        *unfinished_line(result),
        "",
        *later,
        "Congestion is the gradient traffic of the busiest link (domain, expert) over the mean "
        "link, averaged over layers. " + provenance(result),
        "",
        f"{level} What it was meant to show",
        "",
        *claims(result, seeds),
        "",
        *mixture_lines(result, seeds, level=level),
        "",
        f"{level} What DRGR differs from, seed by seed",
        "",
        *pairs(result),
    ]


def done(result: dict[str, Any], seeds: list[int]) -> str:
    """Says how many of the seeds that were asked for every method finished."""
    if result["complete"]:
        return f"All {len(seeds)} seeds finished."
    return (
        f"Of the {len(result['seeds'])} seeds asked for, every method finished {len(seeds)} "
        f"({', '.join(map(str, seeds))}) in the time that there was on the machine; only these are "
        f"shown."
    )


def table(result: dict[str, Any], seeds: list[int]) -> list[str]:
    """Returns the methods by their worst domain, mean and standard deviation over seeds."""
    lines = [
        f"| method | worst domain, bits per byte | mean of domains | congestion | over budget "
        f"| steps | FLOPs | tuned ({len(seeds)} seeds) |",
        "| --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    names = finished(result)
    for name in sorted(names, key=lambda one: average(result, one, WORST, seeds)):
        method = next(one for one in result["methods"] if one["name"] == name)
        shown = f"**{name}**" if name == OURS else name
        over = sum(values(result, name, "batches_over_budget", seeds))
        lines.append(
            f"| {shown} | {spread(result, name, WORST, seeds)} | "
            f"{spread(result, name, MEAN, seeds)} | "
            f"{average(result, name, 'congestion', seeds):.1f} | {over:.0f} | "
            f"{method['steps'][0]} | {average(result, name, 'flops', seeds):.2e} | "
            f"{tuned(method['tuned'])} |"
        )
    return lines


def tuned(settings: dict[str, Any]) -> str:
    """Shows what tuning chose, shortly."""
    parts = [
        f"`{path.split('.')[-1]}` {value:.3g}"
        for path, value in settings.items()
        if isinstance(value, int | float)
    ]
    return ", ".join(parts) or ("mixture" if settings else "")


def claims(result: dict[str, Any], seeds: list[int]) -> list[str]:
    """Returns what the comparison was meant to show, and whether it does.

    What a comparison has no method for is left out.
    """
    return [f"- *{claim}*: {verdict(holds)}. {why}" for claim, holds, why in _claims(result, seeds)]


def _claims(result: dict[str, Any], seeds: list[int]) -> Iterator[tuple[str, bool, str]]:
    names = finished(result)
    yield _worst_claim(result, seeds)
    if SIMPLE in names:
        mean = average(result, OURS, MEAN, seeds) / average(result, SIMPLE, MEAN, seeds) - 1
        yield "Mean at most 1 % above uniform sampling", mean <= 0.01, f"It is {mean:+.1%}."
    yield _frontier_claim(result, seeds)
    if UNBALANCED in names:
        ours, theirs = (average(result, one, "congestion", seeds) for one in (OURS, UNBALANCED))
        price = known_average(result, OURS, "traffic_price") or 0.0
        yield (
            "Congestion at least 30 % below ERM with an auxiliary loss",
            ours <= 0.7 * theirs,
            f"It is {ours:.1f} against {theirs:.1f} ({ours / theirs - 1:+.0%}); the price on "
            f"gradient traffic is {f'{price:g}' if price else 'off'}.",
        )
    over = sum(run["batches_over_budget"] for run in result["runs"])
    yield (
        "No assignment over budget in any batch of any run",
        over == 0,
        f"{over:.0f} batches in {len(result['runs'])} runs.",
    )
    if BILEVEL in names:
        better = is_better(result, seeds)
        yield (
            "The hypergradient pays for its FLOPs",
            better,
            f"With it the worst domain is at {average(result, BILEVEL, WORST, seeds):.3f} and the "
            f"mean at {average(result, BILEVEL, MEAN, seeds):.3f}"
            + ("." if better else ", so it is off by default."),
        )


def _worst_claim(result: dict[str, Any], seeds: list[int]) -> tuple[str, bool, str]:
    best = best_rival(result, seeds)
    pair, sign = difference(result, WORST, best)
    claim = "Worst domain below the best baseline, with a 95 % interval without zero"
    gap = f"Against {best} the difference is {sign * pair['mean']:+.3f} bits per byte, "
    if pair["student_low"] is None:
        return claim, False, gap + "with one seed and so without an interval."
    low, high = sorted((sign * pair["student_low"], sign * pair["student_high"]))
    return (
        claim,
        high < 0,
        f"{gap}Student interval [{low:+.4f}, {high:+.4f}] over {len(seeds)} paired seeds; "
        f"corrected for all comparisons of the table (Holm) p = {corrected(result, best):.2g}.",
    )


def best_rival(result: dict[str, Any], seeds: list[int]) -> str:
    """Returns the method that is not DRGR with the lowest worst domain."""
    rivals = [name for name in finished(result) if not name.startswith(OURS)]
    return min(rivals, key=lambda one: average(result, one, WORST, seeds))


def later_line(result: dict[str, Any]) -> list[str]:
    """Says what the seeds say that were added when the results of the others were known."""
    later = [seed for seed in common_seeds(result) if seed >= FIRST_LATER_SEED]
    if not later:
        return []
    best = best_rival(result, common_seeds(result))
    worst, interval = interval_cells(paired(result, WORST, OURS, best, seeds=later)).split(" | ")
    mean = average(result, OURS, MEAN, later) / average(result, SIMPLE, MEAN, later) - 1
    return [
        f"Seeds from {FIRST_LATER_SEED} on were added when the results of the others were known, "
        f"with nothing changed. On these {len(later)} alone the difference from {best} is {worst} "
        f"bits per byte, interval {interval}, and the mean is {mean:+.1%} from that of uniform "
        "sampling.",
        "",
    ]


def _frontier_claim(result: dict[str, Any], seeds: list[int]) -> tuple[str, bool, str]:
    ours = [average(result, OURS, figure, seeds) for figure in (WORST, MEAN)]
    ahead = [
        name
        for name in finished(result)
        if not name.startswith(OURS)
        and average(result, name, WORST, seeds) <= ours[0]
        and average(result, name, MEAN, seeds) <= ours[1]
    ]
    return (
        "No baseline at least as good on both the worst domain and the mean",
        not ahead,
        f"{', '.join(ahead) or 'None'} of {sum(not n.startswith(OURS) for n in finished(result))}.",
    )


def is_better(result: dict[str, Any], seeds: list[int]) -> bool:
    return all(
        average(result, BILEVEL, figure, seeds) <= average(result, OURS, figure, seeds)
        for figure in (WORST, MEAN)
    )


def difference(result: dict[str, Any], figure: str, other: str) -> tuple[dict[str, Any], int]:
    """Returns the paired difference of DRGR and another method, and the sign that makes it ours."""
    for pair in result["pairs"]:
        if pair["figure"] == figure and {pair["a"], pair["b"]} == {OURS, other}:
            return pair["difference"], 1 if pair["a"] == OURS else -1
    raise SystemExit(f"the comparison {result['name']} has no pair of {OURS} and {other}")


def corrected(result: dict[str, Any], other: str) -> float:
    """Returns the p-value of DRGR against another method on the worst domain, Holm-corrected."""
    return next(
        float(pair["p_student_holm"])
        for pair in result["pairs"]
        if pair["figure"] == WORST and {pair["a"], pair["b"]} == {OURS, other}
    )


def pairs(result: dict[str, Any]) -> list[str]:
    """Returns the paired differences of DRGR and every other method."""
    lines = [
        "| DRGR less | worst domain | 95 % | Holm p | mean of domains | 95 % |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name in finished(result):
        if name == OURS:
            continue
        parts = []
        for figure in (WORST, MEAN):
            found, sign = difference(result, figure, name)
            shown = "one seed"
            if found["student_low"] is not None:
                low, high = sorted((sign * found["student_low"], sign * found["student_high"]))
                shown = f"[{low:+.3f}, {high:+.3f}]"
            parts.append((f"{sign * found['mean']:+.3f}", shown))
        lines.append(
            f"| {name} | {parts[0][0]} | {parts[0][1]} | {corrected(result, name):.2g} | "
            f"{parts[1][0]} | {parts[1][1]} |"
        )
    return lines


def large_lines(result: dict[str, Any]) -> list[str]:
    """Says what the large model shows."""
    seeds = common_seeds(result)
    ours, rival, simple = (average(result, name, WORST, seeds) for name in (OURS, RIVAL, SIMPLE))
    mean = average(result, OURS, MEAN, seeds) / average(result, SIMPLE, MEAN, seeds) - 1
    return [
        f"Both adversaries take {simple - min(ours, rival):.2f} bits per byte off the worst domain "
        f"of uniform sampling; DRGR and the held-out adversary differ by {ours - rival:+.3f}, and "
        f"the mean of DRGR is {mean:+.1%} from that of uniform sampling."
    ]


def draw_small(result: dict[str, Any]) -> None:
    """Draws the same for two CPU cores."""
    draw(result, SMALL_FIGURE)


def draw(result: dict[str, Any], path: Path = FIGURE) -> None:
    """Draws worst against mean; methods far away are left to the table."""
    seeds = common_seeds(result)
    mpl.rcParams.update({"svg.hashsalt": "drgr", "svg.fonttype": "none", "font.size": 8.5})
    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    limit = 1.2 * average(result, OURS, WORST, seeds)
    shown = [name for name in finished(result) if average(result, name, WORST, seeds) <= limit]
    for number, name in enumerate(
        sorted(shown, key=lambda one: average(result, one, WORST, seeds))
    ):
        mean, worst = (average(result, name, key, seeds) for key in (MEAN, WORST))
        errors = [statistics.stdev(values(result, name, key, seeds)) for key in (MEAN, WORST)]
        axes.errorbar(
            mean,
            worst,
            xerr=errors[0],
            yerr=errors[1],
            fmt=MARKERS[number % len(MARKERS)],
            color="#D55E00" if name.startswith(OURS) else "#0072B2",
            markerfacecolor="none" if name != OURS else None,
            linewidth=0.6,
            label=name,
        )
    figure.legend(loc="outside right upper", frameon=False)
    axes.set_xlabel("mean of domains, bits per byte")
    axes.set_ylabel("worst domain, bits per byte")
    axes.set_title(f"Equal total FLOPs, {len(seeds)} seeds, mean and standard deviation")
    axes.margins(0.1)
    figure.savefig(path, metadata={"Date": None})
