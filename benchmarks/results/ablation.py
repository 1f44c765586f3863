"""What each part of DRGR adds."""

from benchmarks.results.comparison import (
    MEAN,
    OURS,
    WORST,
    Json,
    about,
    average,
    command,
    finished,
    interval_cells,
    listed,
    paired,
    seeds_of,
    sides,
    spread,
    unfinished_line,
)


def section(result: Json) -> list[str]:
    """Returns the section on the ablation."""
    changes = [name for name in finished(result) if name != OURS]
    seeds = seeds_of(result, OURS)
    differences = {
        figure: {name: paired(result, figure, name, OURS) for name in changes}
        for figure in (WORST, MEAN)
    }
    lines = [
        "## What each part adds",
        "",
        "DRGR with one part off, or on where it is off by default, in turn, at the FLOPs of DRGR "
        f"at most. {about(result)}{command(result)}",
        "",
        f"DRGR as it is: worst domain {spread(result, OURS, WORST, seeds)}, mean "
        f"{spread(result, OURS, MEAN, seeds)} bits per byte ({len(seeds)} seeds). Below: the "
        "change less DRGR, paired by seed, with Student's interval of 95 %; above 0 is worse.",
        "",
        "| change | worst domain | 95 % | mean of domains | 95 % | congestion |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name in sorted(changes, key=lambda one: -differences[WORST][one].mean):
        cells = [interval_cells(differences[figure][name]) for figure in (WORST, MEAN)]
        busy = average(result, name, "congestion", seeds_of(result, name))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {busy:.1f} |")
    lines += [*unfinished_line(result), ""]
    for figure, what in ((WORST, "worst domain"), (MEAN, "mean")):
        worse, better, neither = sides(differences[figure])
        lines.append(
            f"- *{what.capitalize()}*: worse than DRGR by more than the interval: {listed(worse)}. "
            f"Better: {listed(better)}. Not told apart: {listed(neither)}."
        )
    return lines
