"""DRGR as it became on two cores, at the size of the comparison on a GPU."""

from benchmarks.results.comparison import (
    MEAN,
    OURS,
    WORST,
    Json,
    about,
    average,
    command,
    common_seeds,
    finished,
    verdict,
)
from benchmarks.results.headline import claims, done, pairs, table

ONE_EXPERT = OURS + ", one expert"


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
        *[f"- {line}" for line in second_expert(result)],
        "",
        *pairs(result),
    ]


def second_expert(result: Json) -> list[str]:
    """Says whether a second expert is worth the steps that it costs, where that was measured."""
    if ONE_EXPERT not in finished(result):
        return []
    seeds = common_seeds(result)
    worst, mean = (average(result, ONE_EXPERT, figure, seeds) for figure in (WORST, MEAN))
    pays = any(
        average(result, OURS, figure, seeds) < one for figure, one in ((WORST, worst), (MEAN, mean))
    )
    return [
        f"*A second expert in the last steps pays for its FLOPs*: {verdict(pays)}. With one expert "
        f"throughout, and more steps, DRGR has {worst:.3f} in the worst domain and {mean:.3f} on "
        "average" + ("." if pays else ", so the recipe `drgr` has one.")
    ]
