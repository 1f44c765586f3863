"""Experts by layer under one total, and experts of a token over training."""

import itertools
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets import (
    TokenBudget,
    layer_counts,
    layer_profile,
    progressive_budgets,
    select_exactly,
)
from drgr.errors import InfeasibleBudgetError

SHAPES = ["uniform", "ascending", "descending", "pyramid", "valley", "wave"]
properties = settings(deadline=None, derandomize=True, max_examples=150)


@st.composite
def sizes(draw, most_layers=40, widest=20):
    num_layers, minimum = draw(st.integers(1, most_layers)), draw(st.integers(0, 5))
    maximum = minimum + draw(st.integers(0, widest))
    total = draw(st.integers(num_layers * minimum, num_layers * maximum))
    return {
        "num_layers": num_layers,
        "minimum": minimum,
        "maximum": maximum,
        "total": total,
    }


def profile_of(shape, num_layers, low, high):
    """The formulas in exact fractions; the sine aside."""
    heights = []
    for layer in range(num_layers):
        u = Fraction(layer, num_layers - 1) if num_layers > 1 else Fraction(0)
        tent = 2 * u if u <= Fraction(1, 2) else 2 - 2 * u
        heights.append(
            {
                "uniform": Fraction(1, 2),
                "ascending": u,
                "descending": 1 - u,
                "pyramid": tent,
                "valley": 1 - tent,
                "wave": Fraction(0.5 + 0.5 * math.sin(2 * math.pi * u)),
            }[shape]
        )
    return [low + (high - low) * height for height in heights]


def distance(counts, profile):
    return float(sum((count - goal) ** 2 for count, goal in zip(counts, profile, strict=True)))


class TestCounts:
    @pytest.mark.parametrize("shape", SHAPES)
    @properties
    @given(size=sizes())
    def test_add_up_to_the_total_within_bounds(self, shape, size):
        counts = layer_counts(shape, **size)
        assert len(counts) == size["num_layers"]
        assert sum(counts) == size["total"]
        assert all(size["minimum"] <= count <= size["maximum"] for count in counts)
        if shape in ("ascending", "uniform", "descending"):
            expected = sorted(counts, reverse=shape != "ascending")
            assert list(counts) == expected

    @pytest.mark.parametrize("shape", SHAPES)
    @settings(deadline=None, derandomize=True, max_examples=25)
    @given(size=sizes(most_layers=4, widest=4))
    def test_are_the_nearest_of_all(self, shape, size):
        choices = itertools.product(
            range(size["minimum"], size["maximum"] + 1), repeat=size["num_layers"]
        )
        profile = profile_of(shape, size["num_layers"], size["minimum"], size["maximum"])
        best = min(distance(c, profile) for c in choices if sum(c) == size["total"])
        assert distance(layer_counts(shape, **size), profile) == pytest.approx(best, abs=1e-9)

    @pytest.mark.parametrize("shape", SHAPES)
    @properties
    @given(size=sizes())
    def test_round_by_largest_remainders_where_the_shape_has_the_total(self, shape, size):
        profile = profile_of(shape, size["num_layers"], size["minimum"], size["maximum"])
        total = round(sum(profile))
        if abs(sum(profile) - total) > 1e-9:
            return
        floors = [math.floor(goal + Fraction(1, 10**10)) for goal in profile]
        rest = [goal - floor for goal, floor in zip(profile, floors, strict=True)]
        order = sorted(range(len(rest)), key=lambda layer: (-round(float(rest[layer]), 9), layer))
        for layer in order[: total - sum(floors)]:
            floors[layer] += 1
        assert list(layer_counts(shape, **{**size, "total": total})) == floors

    def test_by_hand(self):
        size = {"num_layers": 5, "minimum": 2, "maximum": 6}
        assert layer_counts("ascending", total=20, **size) == (2, 3, 4, 5, 6)
        assert layer_counts("descending", total=20, **size) == (6, 5, 4, 3, 2)
        assert layer_counts("uniform", total=22, **size) == (5, 5, 4, 4, 4)
        assert layer_counts("pyramid", total=18, **size) == (2, 4, 6, 4, 2)
        assert layer_counts("valley", total=22, **size) == (6, 4, 2, 4, 6)
        assert layer_counts("wave", total=20, **size) == (4, 6, 4, 2, 4)
        assert layer_counts("wave", total=20, frequency=2.0, **size) == (4, 4, 4, 4, 4)

    def test_only_layer_has_depth_zero(self):
        size = {"num_layers": 1, "minimum": 2, "maximum": 6}
        found = [layer_profile(shape, **size)[0] for shape in SHAPES]
        assert found == [4.0, 2.0, 6.0, 2.0, 6.0, 4.0]
        assert layer_counts("ascending", total=5, **size) == (5,)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"shape": "random"}, ValueError, "shape must be uniform, ascending, descending, pyr"),
            ({"num_layers": 0}, ValueError, "num_layers must be a finite number above 0, got 0"),
            ({"frequency": 0.0}, ValueError, "frequency must be a finite number above 0, got 0.0"),
            ({"minimum": -1}, ValueError, "0 <= minimum <= maximum, got -1 and 4"),
            ({"minimum": 5}, ValueError, "0 <= minimum <= maximum, got 5 and 4"),
            ({"total": 2}, InfeasibleBudgetError, "minimum and maximum, 3 and 12, got 2; change"),
            ({"total": 13}, InfeasibleBudgetError, "minimum and maximum, 3 and 12, got 13"),
        ],
    )
    def test_refuse(self, change, error, message):
        size = {"shape": "wave", "num_layers": 3, "total": 6, "minimum": 1, "maximum": 4, **change}
        with pytest.raises(error, match=re.escape(message)):
            layer_counts(size.pop("shape"), **size)


SIZE = {"num_layers": 6, "switch_step": 100, "first": [8, 6, 6, 2], "target": 2}


class TestProgress:
    def test_lower_layers_begin_with_more_and_fall_at_the_switch(self):
        for step, expected in [(0, [8, 6, 6, 2, 2, 2]), (99, [8, 6, 6, 2, 2, 2]), (100, [2] * 6)]:
            budgets = progressive_budgets(step, **SIZE)
            assert budgets == tuple(TokenBudget(minimum=k, maximum=k, average=k) for k in expected)

    def test_budgets_select_just_so_many(self):
        import torch

        scores = torch.rand(10, 8)
        for budget in progressive_budgets(0, **SIZE):
            mask = select_exactly(scores, budget)
            assert int(mask.spend) == 10 * budget.maximum

    def test_no_first_list_is_the_target_throughout(self):
        budgets = progressive_budgets(0, num_layers=2, switch_step=5, first=[])
        assert [budget.maximum for budget in budgets] == [1, 1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"step": -1}, "step must be at least 0, got -1"),
            ({"switch_step": -1}, "switch_step must be at least 0, got -1"),
            ({"num_layers": 0}, "num_layers must be a finite number above 0, got 0"),
            ({"target": 0}, "target must be a finite number above 0, got 0"),
            ({"num_layers": 3}, "first must have at most num_layers = 3 entries, got 4"),
            ({"first": [6, 8]}, "first must never rise from layer to layer nor go below target"),
            ({"first": [6, 1]}, "nor go below target = 2, got [6, 1]"),
        ],
    )
    def test_refuses(self, change, message):
        size = {"step": 0, **SIZE, **change}
        with pytest.raises(ValueError, match=re.escape(message)):
            progressive_budgets(size.pop("step"), **size)
