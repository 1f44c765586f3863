"""Mean and deviation over seeds, as result files hold them."""

import statistics
from collections.abc import Iterable


def mean_and_deviation(values: Iterable[float]) -> dict[str, float]:
    """Returns ``mean`` and sample ``deviation``; the latter is 0 with one value."""
    found = list(values)
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return {"mean": statistics.fmean(found), "deviation": deviation}
