"""What methods know of a domain that their training had no part of."""

import statistics

from benchmarks.results.comparison import (
    OURS,
    WORST,
    Json,
    about,
    command,
    common_seeds,
    finished,
    mean_and_deviation,
    runs_of,
    seeds_of,
    unfinished_line,
)

Figures = dict[str, dict[str, dict[int, tuple[float, float]]]]
"""Method, unseen domain, seed: bits per byte on the unseen domain, and worst of the seen ones."""


def figures(result: Json) -> Figures:
    """Returns the two figures of every run; methods are named ``METHOD, DOMAIN unseen``."""
    found: Figures = {}
    for name in finished(result):
        method = name.rpartition(", ")[0]
        for run in runs_of(result, name, seeds_of(result, name)):
            ((domain, bits),) = run["unseen"].items()
            by_seed = found.setdefault(method, {}).setdefault(domain, {})
            by_seed[run["seed"]] = (bits, run[WORST])
    return found


def section(result: Json) -> list[str]:
    """Returns the section on unseen domains."""
    found = figures(result)
    domains = list(dict.fromkeys(domain for rows in found.values() for domain in rows))
    lines = [
        "## A domain held out entirely",
        "",
        "One domain at a time is left out of everything: not drawn, not weighed, in no validation "
        "pass (`data.unseen`). Bits per byte on its test text, and the worst of the domains that "
        f"were seen. Total FLOPs are at most those of uniform sampling, so that steps differ. "
        f"{len(common_seeds(result))} seeds. {about(result)}{command(result)}",
        "",
        f"| method | {' | '.join(f'{name} unseen' for name in domains)} | mean of unseen "
        "| worst of seen, mean |",
        f"| --- | {' | '.join('--:' for _ in domains)} | --: | --: |",
    ]
    for method in sorted(found, key=lambda one: _mean(found[one], 0)):
        shown = f"**{method}**" if method == OURS else method
        cells = [_cell(found[method].get(domain)) for domain in domains]
        lines.append(
            f"| {shown} | {' | '.join(cells)} | {_mean(found[method], 0):.3f} | "
            f"{_mean(found[method], 1):.3f} |"
        )
    return [*lines, *unfinished_line(result), "", *_sentences(found, domains)]


def _cell(by_seed: dict[int, tuple[float, float]] | None) -> str:
    return "" if by_seed is None else mean_and_deviation([bits for bits, _ in by_seed.values()])


def _mean(rows: dict[str, dict[int, tuple[float, float]]], part: int) -> float:
    return statistics.fmean(pair[part] for by_seed in rows.values() for pair in by_seed.values())


def _sentences(found: Figures, domains: list[str]) -> list[str]:
    """Says who is lowest on each domain, and what DRGR differs from by."""
    best = []
    for domain in domains:
        means = {
            method: statistics.fmean(bits for bits, _ in rows[domain].values())
            for method, rows in found.items()
            if domain in rows
        }
        best.append(f"{domain} {min(means, key=means.__getitem__)}")
    lines = [f"- Lowest on the unseen domain: {', '.join(best)}."]
    for method in found if OURS in found else ():
        if method == OURS:
            continue
        differences = [
            found[OURS][domain][seed][0] - found[method][domain][seed][0]
            for domain in domains
            for seed in found[OURS].get(domain, {})
            if seed in found[method].get(domain, {})
        ]
        if not differences:
            continue
        lower = sum(difference < 0 for difference in differences)
        lines.append(
            f"- DRGR less {method} on what neither saw: {statistics.fmean(differences):+.3f} bits "
            f"per byte, lower in {lower} of {len(differences)} pairs of runs."
        )
    return lines
