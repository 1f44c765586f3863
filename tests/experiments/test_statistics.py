"""Statistics against oracles that share no code with them."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from drgr.experiments.statistics import (
    frontier,
    holm,
    mean_interval,
    mean_ranks,
    sign_flip_p,
    student_p,
)

FINITE = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))


class TestInterval:
    def test_percentile_against_every_resample(self):
        values = [0.3, -0.1, 0.7, 1.9]
        means = sorted(statistics.fmean(one) for one in itertools.product(values, repeat=4))
        found = mean_interval(values, confidence=0.9)
        assert found.method == "percentile"
        assert found.mean == pytest.approx(0.7)
        # Of 256 resamples; 9,999 drawn ones come this close.
        assert means[8] <= found.low <= means[18]
        assert means[237] <= found.high <= means[247]

    def test_student_against_its_table(self):
        found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
        half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
        assert found.student_low == pytest.approx(3 - half, abs=1e-6)
        assert found.student_high == pytest.approx(3 + half, abs=1e-6)

    def test_paired_is_the_bootstrap_of_differences(self):
        generator = np.random.default_rng(3)
        first, second = generator.normal(size=(2, 12))
        found = mean_interval(list(first - second))
        expected = stats.bootstrap(
            (first, second),
            lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
            paired=True,
            vectorized=True,
            method="BCa",
            rng=np.random.default_rng(5),
        ).confidence_interval
        assert found.method == "bca"
        assert found.low == pytest.approx(expected.low, abs=0.03)
        assert found.high == pytest.approx(expected.high, abs=0.03)

    def test_coverage_on_simulated_runs(self):
        generator = np.random.default_rng(0)
        covered = {"few": 0, "student": 0}
        for _ in range(300):
            few = mean_interval(list(generator.normal(1, 2, size=5)))
            covered["few"] += few.low <= 1 <= few.high
            covered["student"] += few.student_low <= 1 <= few.student_high
        # With five values a percentile interval is too narrow, Student's is right.
        assert 0.76 < covered["few"] / 300 < 0.90
        assert 0.91 < covered["student"] / 300 < 0.98

    def test_values_without_spread(self):
        found = mean_interval([2.0, 2.0, 2.0])
        assert (found.method, found.low, found.high) == ("constant", 2.0, 2.0)
        assert (found.student_low, found.student_high) == (2.0, 2.0)
        single = mean_interval([2.0])
        assert (single.method, single.low, single.student_high) == ("none", None, None)

    @given(st.lists(FINITE, min_size=2, max_size=4))
    @settings(max_examples=20, deadline=None)
    def test_bounds_are_numbers_around_the_mean(self, values):
        found = mean_interval(values)
        assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
        assert found.low <= found.mean + 1e-9
        assert found.high >= found.mean - 1e-9

    @pytest.mark.parametrize("values", [[], [1.0, math.nan]])
    def test_refuses(self, values):
        with pytest.raises(ValueError, match="values must be at least one finite number, got"):
            mean_interval(values)


class TestTests:
    @given(st.lists(FINITE, min_size=1, max_size=7))
    @settings(max_examples=50, deadline=None)
    def test_sign_flips_one_by_one(self, differences):
        observed = abs(sum(differences))
        count = 0
        for signs in itertools.product((-1, 1), repeat=len(differences)):
            flipped = abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            count += flipped >= observed - 1e-9
        assert sign_flip_p(differences) == count / 2 ** len(differences)

    def test_five_seeds_cannot_reach_five_percent(self):
        assert sign_flip_p([1.0, 1.1, 0.9, 1.2, 0.8]) == 2 / 32

    def test_many_differences_are_sampled(self):
        differences = list(np.random.default_rng(1).normal(0.5, 1, size=20))
        assert sign_flip_p(differences) == pytest.approx(student_p(differences), abs=0.02)
        assert sign_flip_p([1.0] * 40) == 1 / 10000  # the observed one counts

    def test_student(self):
        assert student_p([1.0, 2.0, 3.0]) == pytest.approx(0.0741799, abs=1e-6)
        assert student_p([0.0, 0.0]) == 1.0
        assert student_p([1.0, 1.0]) is None
        assert student_p([1.0]) is None

    def test_refuses(self):
        with pytest.raises(ValueError, match="differences must be at least one finite number"):
            sign_flip_p([])


class TestHolm:
    def test_by_hand(self):
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.9, 0.6]) == [1.0, 1.0]
        assert holm([]) == []

    @given(st.lists(st.integers(0, 40).map(lambda n: n / 40), max_size=6), st.integers(1, 39))
    def test_rejects_what_the_step_down_procedure_rejects(self, p_values, tick):
        level = tick / 40 + 1e-6
        left = dict(enumerate(p_values))
        rejected = set()
        while left:
            index = min(left, key=left.get)
            if left[index] > level / len(left):
                break
            rejected.add(index)
            del left[index]
        assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"p-values must lie in \[0, 1\], got \[1.5\]"):
            holm([1.5])


class TestFrontier:
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9))
    def test_every_point_against_every_other(self, points):
        expected = [
            not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points
        ]
        assert frontier(points) == expected

    def test_refuses(self):
        with pytest.raises(ValueError, match="points must be numbers"):
            frontier([(math.nan, 1.0)])


class TestRanks:
    @given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
    def test_by_counting(self, seeds):
        values = {name: [row[i] for row in seeds] for i, name in enumerate("abc")}
        for i, name in enumerate("abc"):
            ranks = []
            for row in seeds:
                lower = sum(other < row[i] for other in row)
                equal = sum(other == row[i] for other in row)
                ranks.append(lower + (equal + 1) / 2)
            assert mean_ranks(values)[name] == pytest.approx(statistics.fmean(ranks))

    def test_refuses(self):
        with pytest.raises(ValueError, match="must have a value for each seed, got"):
            mean_ranks({"a": [1.0], "b": [1.0, 2.0]})
