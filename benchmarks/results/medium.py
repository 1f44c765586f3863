"""DRGR as it became on two cores, at the size of the comparison on a GPU."""

from benchmarks.results.comparison import Json, about, command, common_seeds
from benchmarks.results.headline import claims, done, pairs, table


def section(result: Json) -> list[str]:
    """Returns the section on the middle size."""
    seeds = common_seeds(result)
    return [
        "## The size of the GPU comparison, with the price and the growing budget",
        "",
        "The first comparison above was made before DRGR had its price on gradient traffic and its "
        "growing budget. Here both are at the size of that comparison, against its two best "
        "baselines, the best one of two cores, and sampling as given. Nothing is tuned: each "
        f"method has what those comparisons chose for it. {done(result, seeds)} {about(result)}"
        f"{command(result)}",
        "",
        *table(result, seeds),
        "",
        *claims(result, seeds),
        "",
        *pairs(result),
    ]
