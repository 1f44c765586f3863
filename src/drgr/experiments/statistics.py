r"""What a few paired runs say: intervals, exact tests, corrected p-values, frontiers and ranks.

Two methods are compared by the differences of runs that share a seed, which share initialisation
and draws. Nothing here knows where the numbers come from; all is for lower-is-better figures.

With few seeds much cannot be known, and the results say so. The sign-flip test of ``n`` differences
has no p-value below ``2^(1 - n)``: 0.0625 with five. Bootstrap intervals are too narrow: with five
normal differences a percentile interval of 95 % covers the truth in about 83 % of samples, so
Student's interval stands beside it, which is exact for normal differences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from scipy import stats

Method = Literal["none", "constant", "percentile", "bca"]
"""How a bootstrap interval was made: ``none`` with one value, ``constant`` where all are equal."""

_RESAMPLES = 9999
_SEED = 0
# Bias and acceleration are estimated from the values themselves, which fewer do not allow.
_FEWEST_FOR_BCA = 10
# Flips of signs beyond which they are sampled: 2^14.
_MOST_EXACT = 14


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bounds of a mean.

    Attributes:
        mean: The mean of the values.
        count: Number of values.
        method: How the bootstrap bounds were made.
        low: Lower bootstrap bound; None where there is none.
        high: Upper bootstrap bound.
        student_low: Lower bound of Student's interval; None where there is none.
        student_high: Its upper bound.
    """

    mean: float
    count: int
    method: Method
    low: float | None = None
    high: float | None = None
    student_low: float | None = None
    student_high: float | None = None


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Returns an interval of the mean of values, such as paired differences over seeds.

    Resampling pairs and taking the difference of means is resampling differences and taking their
    mean, so this is the paired bootstrap where ``values`` are differences. Fewer than ten values
    get percentile intervals, more get BCa (Efron, *Better bootstrap confidence intervals*, 1987).
    Where all are equal the interval is that one value. The resamples are the same in every call.

    Args:
        values: At least one finite number.
        confidence: Coverage that is aimed at.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"values must be at least one finite number, got {list(values)}")
    mean, count = float(array.mean()), len(array)
    if count == 1:
        return Interval(mean=mean, count=count, method="none")
    if float(np.ptp(array)) == 0:
        return Interval(
            mean=mean,
            count=count,
            method="constant",
            low=mean,
            high=mean,
            student_low=mean,
            student_high=mean,
        )
    method: Method = "bca" if count >= _FEWEST_FOR_BCA else "percentile"
    found = stats.bootstrap(
        (array,),
        np.mean,
        confidence_level=confidence,
        n_resamples=_RESAMPLES,
        method="BCa" if method == "bca" else "percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    half = quantile * float(array.std(ddof=1)) / math.sqrt(count)
    return Interval(
        mean=mean,
        count=count,
        method=method,
        low=float(found.low),
        high=float(found.high),
        student_low=mean - half,
        student_high=mean + half,
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of the paired permutation test that differences have mean 0.

    Under the hypothesis that the two methods may be exchanged within a seed, each of the ``2^n``
    ways to flip signs is equally likely; the p-value is the share whose mean is at least as far
    from 0. Exact up to 14 differences, sampled beyond, in which case the observed one counts too.

    Raises:
        ValueError: If there is no difference, or one is not finite.
    """
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"differences must be at least one finite number, got {list(differences)}")
    count = len(array)
    if count <= _MOST_EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        added = 0
    else:
        signs = np.random.default_rng(_SEED).choice([-1, 1], size=(_RESAMPLES, count))
        added = 1
    sums = np.abs(signs @ array)
    # Sums that are equal but for the order of rounding count as equal.
    observed = abs(float(array.sum())) - 1e-12 * float(np.abs(array).sum())
    return float((np.count_nonzero(sums >= observed) + added) / (len(sums) + added))


def student_p(differences: Sequence[float]) -> float | None:
    """Returns the p-value of the paired t-test; None with one difference, or where all are equal.

    All equal to 0 is 1: nothing differs.
    """
    array = np.asarray(differences, dtype=np.float64)
    if len(array) and not array.any():
        return 1.0
    if len(array) < 2 or float(np.ptp(array)) == 0:
        return None
    return float(stats.ttest_1samp(array, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number, each at most 1, in the given order.

    The ``i``-th smallest of ``m`` becomes ``max over j <= i of (m - j + 1) p_(j)``: the family-wise
    error stays below a level at which a corrected value is rejected, whatever depends on what
    (Holm, *A simple sequentially rejective multiple test procedure*, 1979).

    Raises:
        ValueError: If one is not in [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}")
    corrected, highest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for position, index in enumerate(order):
        highest = max(highest, (len(p_values) - position) * p_values[index])
        corrected[index] = min(1.0, highest)
    return corrected


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Returns which points no other point dominates, both coordinates being better when lower.

    A point is dominated by one that is nowhere higher and somewhere lower; equal points are on the
    frontier together. Time ``O(n log n)``.

    Raises:
        ValueError: If a coordinate is not a number.
    """
    if any(math.isnan(value) for point in points for value in point):
        raise ValueError(f"points must be numbers, got {list(points)}")
    on = [False] * len(points)
    lowest, at = math.inf, math.inf
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        first, second = points[index]
        if second < lowest:
            lowest, at = second, first
            on[index] = True
        elif second == lowest and first == at:
            on[index] = True
    return on


def mean_ranks(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the mean rank of each method over seeds; 1 is lowest, ties share their mean rank.

    Args:
        values: Method -> a value for each seed, in the same order.

    Raises:
        ValueError: If methods have different numbers of values, or none.
    """
    if len({len(entries) for entries in values.values()}) != 1 or not all(values.values()):
        counts = {name: len(entries) for name, entries in values.items()}
        raise ValueError(f"every method must have a value for each seed, got {counts}")
    table = np.array(list(values.values()), dtype=np.float64)
    ranks: Any = stats.rankdata(table, axis=0).mean(axis=1)
    return dict(zip(values, map(float, ranks), strict=True))
