"""The three phases of a track: known kinks, a brute-force fit in numpy, and refusals."""

import math
from itertools import combinations

import numpy as np
import pytest

from drgr.routing import three_phase_track


def track(steps, kinks, slopes, start=14.0):
    first, second = kinks
    return [
        start
        + slopes[0] * min(s, first)
        + slopes[1] * (min(s, second) - min(s, first))
        + slopes[2] * (s - min(s, second))
        for s in steps
    ]


def test_known_kinks_and_slopes_are_found():
    steps = list(range(0, 1200, 50))
    values = track(steps, (150, 400), (0.15, -0.02, -0.025))
    found = three_phase_track(steps, values)
    assert (found.first_kink, found.second_kink) == (150, 400)
    assert found.slopes == pytest.approx((0.15, -0.02, -0.025))
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.straight_error > 1
    assert found.has_three_phases
    assert (found.peak_step, found.peak) == (150, pytest.approx(36.5))


def fit_by_numpy(steps, values):
    best = math.inf
    s = np.array(steps, dtype=float)
    for first, second in combinations(s[1:-1], 2):
        columns = [np.ones_like(s), s, np.maximum(s - first, 0), np.maximum(s - second, 0)]
        design = np.stack(columns, axis=1)
        residual = design @ np.linalg.lstsq(design, values, rcond=None)[0] - values
        best = min(best, math.sqrt(np.mean(residual**2)))
    return best


def test_the_fit_is_the_best_of_all_pairs_of_kinks():
    generator = np.random.default_rng(0)
    for _ in range(5):
        steps = np.cumsum(generator.uniform(0.1, 2, size=9))
        values = generator.normal(size=9)
        found = three_phase_track(steps.tolist(), values.tolist())
        assert found.error == pytest.approx(fit_by_numpy(steps, values), rel=1e-8)
        line = np.polyval(np.polyfit(steps, values, 1), steps) - values
        assert found.straight_error == pytest.approx(math.sqrt(np.mean(line**2)), rel=1e-8)


def test_a_straight_line_has_no_phases():
    found = three_phase_track(range(8), [2.0 * s for s in range(8)])
    assert not found.has_three_phases
    assert found.straight_error == pytest.approx(0, abs=1e-9)


def test_wrong_tracks_are_refused():
    with pytest.raises(ValueError, match="one length, got 6 and 5"):
        three_phase_track(range(6), [0.0] * 5)
    with pytest.raises(ValueError, match="at least 6 checkpoints, got 5"):
        three_phase_track(range(5), [0.0] * 5)
    with pytest.raises(ValueError, match="steps must increase, got 2 before 2"):
        three_phase_track([0, 1, 2, 2, 3, 4], [0.0] * 6)
    with pytest.raises(ValueError, match="coefficients must be finite, got nan"):
        three_phase_track(range(6), [0.0] * 5 + [math.nan])
