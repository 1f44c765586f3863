"""The schedule: linear warm-up from above 0 to the peak, then half a cosine to the final share."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drgr.training.config import TrainingConfig
from drgr.training.loop import learning_rate


def test_points_of_a_schedule_by_hand():
    config = TrainingConfig(steps=104, warmup_steps=4, learning_rate=0.1, final_learning_rate=0.2)
    assert [learning_rate(config, step) for step in range(4)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1]
    )
    # 99 steps of half a cosine between the peak 0.1 and 0.02; its mean is at a third of a turn.
    assert learning_rate(config, 4) == pytest.approx(0.1)
    assert learning_rate(config, 4 + 33) == pytest.approx(0.02 + 0.08 * 0.75)
    assert learning_rate(config, 4 + 66) == pytest.approx(0.02 + 0.08 * 0.25)
    assert learning_rate(config, 103) == pytest.approx(0.02)


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    final=st.floats(0, 0.99),
    peak=st.floats(1e-6, 10),
)
def test_shape(steps, warmup, final, peak):
    config = TrainingConfig(
        steps=steps, warmup_steps=warmup, final_learning_rate=final, learning_rate=peak
    )
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    for step, rate in enumerate(rising):
        assert math.isclose(rate, peak * (step + 1) / warmup)
    if len(falling) > 1:
        assert math.isclose(falling[0], peak)
        assert math.isclose(falling[-1], peak * final, abs_tol=peak * 1e-12)
    # Cosine: symmetric about its middle.
    for early, late in zip(falling, reversed(falling), strict=True):
        if len(falling) > 1:
            assert math.isclose(early + late, peak * (1 + final), rel_tol=1e-9)
