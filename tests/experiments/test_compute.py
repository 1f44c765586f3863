"""Predicted FLOPs against what training runs count, and the steps that follow from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drgr.errors import ConfigError
from drgr.experiments.compute import (
    Recurring,
    RunCosts,
    Stage,
    affordable_steps,
    measure_costs,
    steps_within,
)

TRAIN_LOSSES = {"robustness__apply_to": "nothing", "robustness__losses": "train"}
MIXTURE = {"robustness__apply_to": "nothing", "robustness__begin": 0, "robustness__every": 2}
# The outer loop's settings, and its passes over a sequence: counted by hand from its formulas.
OUTER = {
    "lookahead": {"variables": ["mixture"], "begin": 2, "every": 4},
    "gradient": {"variables": ["mixture"], "begin": 2, "every": 4, "update": "gradient"},
    "cg": {
        "variables": ["mixture"],
        "begin": 2,
        "every": 4,
        "update": "gradient",
        "solver": {"kind": "cg", "max_steps": 2, "rtol": 1e-9},
    },
    "hessian": {
        "variables": ["mixture"],
        "begin": 2,
        "every": 4,
        "update": "gradient",
        "solver": {"kind": "cg", "max_steps": 1, "rtol": 1e-9},
        "curvature": "hessian",
    },
    "neumann": {
        "variables": ["mixture"],
        "begin": 2,
        "every": 4,
        "update": "gradient",
        "solver": {"kind": "neumann", "num_terms": 2, "step_size": 1e-3},
    },
    "router": {"variables": ["router"], "begin": 2, "every": 4, "update": "gradient"},
}


def recorded(runs, corpus, path, config):
    outcome, _ = runs.run_small(config, corpus, path)
    return outcome.evaluation


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_alone_is_predicted_exactly(runs, corpus, tmp_path, accumulation):
    changes = {"training__steps": 3, "training__accumulation": accumulation, **TRAIN_LOSSES}
    config = runs.small_config(**changes)
    costs = measure_costs(config, corpus)
    assert costs.recurring == ()
    expected = recorded(runs, corpus, tmp_path / "run", config)["flops"]
    assert costs.least(3) == costs.most(3) == pytest.approx(expected, rel=1e-12)


def test_a_budget_that_grows_is_predicted_exactly(runs, corpus, tmp_path):
    growing = {"kind": "progressive", "first": [1], "switch_step": 2}
    config = runs.small_config(training__steps=5, routing__selection=growing, **TRAIN_LOSSES)
    costs = measure_costs(config, corpus)
    assert [stage.begin for stage in costs.stages] == [0, 2]
    assert costs.stages[0].step < costs.stages[1].step
    expected = recorded(runs, corpus, tmp_path / "run", config)["flops"]
    assert costs.least(5) == pytest.approx(expected, rel=1e-12)


def test_held_out_passes_lie_between_the_bounds(runs, corpus, tmp_path):
    fixed = {"minimum": 2, "maximum": 2, "average": 2}  # a pass at the frozen price spends as much
    config = runs.small_config(training__steps=5, routing__budget=fixed)
    costs = measure_costs(config, corpus)
    expected = recorded(runs, corpus, tmp_path / "fixed", config)["flops"]
    assert costs.least(5) == pytest.approx(expected, rel=1e-12)
    assert costs.most(5) == pytest.approx(expected, rel=1e-12)
    config = runs.small_config(training__steps=5)
    found = recorded(runs, corpus, tmp_path / "free", config)["flops"]
    assert found <= measure_costs(config, corpus).most(5)


@pytest.mark.parametrize("kind", OUTER)
def test_outer_steps_are_predicted(runs, corpus, tmp_path, kind):
    fixed = {"minimum": 2, "maximum": 2, "average": 2}
    config = runs.small_config(
        training__steps=7, routing__budget=fixed, outer=OUTER[kind], **MIXTURE
    )
    found = recorded(runs, corpus, tmp_path / "run", config)
    costs = measure_costs(config, corpus)
    _, outer = costs.recurring
    assert outer.times(7) == 2
    assert found["outer_flops"] <= 2 * outer.most * (1 + 1e-12)
    assert found["flops"] <= costs.most(7) * (1 + 1e-12)
    if kind in ("lookahead", "gradient", "router"):
        assert found["outer_flops"] == pytest.approx(2 * outer.most, rel=1e-12)
    else:  # the first solve has no warm start, and no solve takes all that it may
        assert found["outer_flops"] >= 0.6 * 2 * outer.most


@given(
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.integers(1, 60),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.floats(0, 20)), max_size=3),
    st.floats(0, 200),
)
def test_steps_within_a_limit_are_the_most_there_are(step, late, switch, parts, limit):
    recurring = tuple(Recurring(begin=b, every=e, least=0, most=m) for b, e, m in parts)
    costs = RunCosts(
        stages=(Stage(begin=0, step=step), Stage(begin=switch, step=late)), recurring=recurring
    )
    found = steps_within(costs, limit)
    taken = 0.0
    for number in range(found + 1):  # step by step, as the loop takes them
        due = sum(m for b, e, m in parts if number >= b and (number - b) % e == 0)
        cost = step if number < switch else late
        if number == found:
            assert taken <= limit * (1 + 1e-9)
            assert taken + due + cost > limit * (1 - 1e-9)
        taken += due + cost


def test_steps_grow_only_where_they_may():
    costs = RunCosts(stages=(Stage(begin=0, step=2.0),), recurring=())
    assert affordable_steps("m", costs, wanted=3, limit=20, may_grow=False) == 3
    assert affordable_steps("m", costs, wanted=3, limit=20, may_grow=True) == 10
    assert affordable_steps("m", costs, wanted=30, limit=20, may_grow=False) == 10
    with pytest.raises(
        ConfigError, match="method 'm': one step takes 2 FLOPs, more than the 1 that"
    ):
        affordable_steps("m", costs, wanted=3, limit=1, may_grow=False)
