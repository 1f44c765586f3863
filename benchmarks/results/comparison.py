"""What page writers read from a comparison, in the form of ``benchmarks.headline.collect``."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drgr.experiments.statistics import Interval, mean_interval

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
OURS, SIMPLE = "DRGR", "uniform + auxiliary loss"
WORST, MEAN = "worst_bits_per_byte", "mean_bits_per_byte"


def finished(result: Json) -> list[str]:
    """Returns the methods that have a finished run, in the order of the experiment."""
    ran = {run["method"] for run in result["runs"] if run["status"] == "finished"}
    return [method["name"] for method in result["methods"] if method["name"] in ran]


def unfinished_line(result: Json) -> list[str]:
    """Names the methods of which no run finished; nothing where there are none."""
    ran = finished(result)
    left = [method["name"] for method in result["methods"] if method["name"] not in ran]
    return ["", f"Without a finished run: {listed(left)}."] if left else []


def seeds_of(result: Json, method: str) -> list[int]:
    """Returns the seeds that a method finished."""
    return [
        run["seed"]
        for run in result["runs"]
        if run["method"] == method and run["status"] == "finished"
    ]


def common_seeds(result: Json) -> list[int]:
    """Returns the seeds that every method finished, of those that finished any."""
    by_method = [set(seeds_of(result, name)) for name in finished(result)]
    return sorted(by_method[0].intersection(*by_method[1:]))


def runs_of(result: Json, method: str, seeds: Sequence[int]) -> list[Json]:
    """Returns a method's finished runs of some seeds, in their order."""
    found = {
        run["seed"]: run
        for run in result["runs"]
        if run["method"] == method and run["status"] == "finished"
    }
    return [found[seed] for seed in seeds]


def values(result: Json, method: str, figure: str, seeds: Sequence[int]) -> list[float]:
    """Returns a figure of a method on some seeds."""
    return [run[figure] for run in runs_of(result, method, seeds)]


def average(result: Json, method: str, figure: str, seeds: Sequence[int]) -> float:
    """Returns the mean of a figure of a method over some seeds."""
    return statistics.fmean(values(result, method, figure, seeds))


def known_average(result: Json, method: str, figure: str) -> float | None:
    """Returns the mean of a figure over a method's seeds; None where a run lacks it."""
    found = [run.get(figure) for run in runs_of(result, method, seeds_of(result, method))]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if found and len(known) == len(found) else None


def spread(result: Json, method: str, figure: str, seeds: Sequence[int]) -> str:
    """Returns mean and standard deviation over seeds."""
    return mean_and_deviation(values(result, method, figure, seeds))


def mean_and_deviation(found: Sequence[float]) -> str:
    """Shows a mean, with the standard deviation where there are several values."""
    if len(found) < 2:
        return f"{statistics.fmean(found):.3f}"
    return f"{statistics.fmean(found):.3f} ± {statistics.stdev(found):.3f}"


def paired(
    result: Json, figure: str, method: str, base: str, *, seeds: Sequence[int] | None = None
) -> Interval:
    """Returns the difference method - base over some seeds, or all that both finished."""
    if seeds is None:
        seeds = sorted(set(seeds_of(result, method)) & set(seeds_of(result, base)))
    both = (values(result, name, figure, seeds) for name in (method, base))
    differences = [mine - theirs for mine, theirs in zip(*both, strict=True)]
    return mean_interval(differences, confidence=result["confidence"])


def interval_cells(found: Interval) -> str:
    """Shows a difference and Student's interval as two cells."""
    if found.student_low is None:
        return f"{found.mean:+.3f} | one seed"
    return f"{found.mean:+.3f} | [{found.student_low:+.3f}, {found.student_high:+.3f}]"


def is_above(found: Interval) -> bool:
    """Whether all of Student's interval is above 0."""
    return found.student_low is not None and found.student_low > 0


def is_below(found: Interval) -> bool:
    """Whether all of Student's interval is below 0."""
    return found.student_high is not None and found.student_high < 0


def listed(names: Sequence[str]) -> str:
    """Returns names, which may have commas, as a list for a sentence."""
    return "; ".join(names) if names else "none"


def sides(differences: dict[str, Interval]) -> tuple[list[str], list[str], list[str]]:
    """Divides methods into those above 0 by more than the interval, below 0, and neither."""

    def where(holds: Callable[[Interval], bool]) -> list[str]:
        return [name for name, found in differences.items() if holds(found)]

    above, below = where(is_above), where(is_below)
    return above, below, [name for name in differences if name not in {*above, *below}]


def provenance(result: Json) -> str:
    """Says on what and of which commit a comparison was run."""
    machines = dict.fromkeys(
        one["accelerator"] or one["processor"] for one in result["environment"]["hardware"]
    )
    commits = [commit[:8] for commit in result["environment"]["commits"]]
    what = "commit" if len(commits) == 1 else "commits"
    return f"Measured on one {' and one '.join(machines)}, {what} {' and '.join(commits)}."


def about(result: Json) -> str:
    """Says how large the runs were, where the result holds it, and where they ran."""
    found = result.get("setting")
    if found is None:
        return provenance(result)
    return f"{size(found)} {provenance(result)}"


def size(found: Json) -> str:
    """Says how large the runs of a setting were."""
    return (
        f"{found['num_layers']} layers of {found['num_experts']} experts, width "
        f"{found['hidden_size']}, at most {found['steps']} steps of {found['batch_size']} "
        f"sequences of {found['sequence_length']} tokens."
    )


def command(result: Json) -> str:
    """Returns how the comparison is run again, where its file is beside the result."""
    path = f"benchmarks/headline/{result['name']}.yaml"
    return f" `drgr compare {path}`" if (ROOT / path).exists() else ""


def verdict(holds: bool) -> str:
    """Shows whether a claim holds."""
    return "yes" if holds else "**no**"
