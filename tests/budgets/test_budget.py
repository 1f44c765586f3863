"""The set of plans within given costs: what it takes, and what it refuses and why."""

import math
import re

import pytest
import torch

from drgr.budgets.budget import Budget
from drgr.errors import InfeasibleBudgetError

COSTS = torch.tensor([1.0, 2.0, 4.0])


def test_defaults_bound_nothing():
    budget = Budget(COSTS)
    assert budget.per_token == (0.0, math.inf)
    assert budget.per_batch == math.inf
    assert budget.per_expert is None
    assert budget.num_experts == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_takes_numbers_and_tensors(dtype):
    low = torch.tensor([0.0, 1.0], dtype=dtype)
    total = torch.tensor(5.0, dtype=dtype, requires_grad=True)
    budget = Budget(
        COSTS.to(dtype), per_token=(low, 7), per_batch=total, per_expert=COSTS.to(dtype)
    )
    assert budget.per_batch is total
    assert budget.per_token[0] is low


@pytest.mark.parametrize("high", [7.0, torch.tensor(7.0), torch.tensor([7.0, math.inf])])
def test_lower_bound_may_equal_the_upper_and_the_cost_of_all_experts(high):
    assert Budget(COSTS, per_token=(7.0, high)).per_token[1] is high


def test_bounds_of_experts_may_be_zero_or_infinite():
    bounds = torch.tensor([0.0, math.inf, 1.0])
    assert Budget(COSTS, per_expert=bounds).per_expert is bounds


REFUSED = [
    (
        TypeError,
        {"costs": [1.0, 2.0]},
        "costs must be a floating-point tensor, got list; convert it",
    ),
    (
        TypeError,
        {"costs": torch.tensor([1, 2])},
        "costs must be a floating-point tensor, got torch.int64; convert it",
    ),
    (
        TypeError,
        {"costs": COSTS, "per_expert": 3.0},
        "per_expert must be a floating-point tensor, got float; convert it",
    ),
    (
        ValueError,
        {"costs": torch.ones(2, 2)},
        "costs must have shape (E,) with E >= 1, got (2, 2)",
    ),
    (ValueError, {"costs": torch.ones(0)}, "costs must have shape (E,) with E >= 1, got (0,)"),
    (
        ValueError,
        {"costs": torch.tensor([1.0, 0.0])},
        "costs must be above 0 and finite, got 0.0 for expert 1; "
        "costs and bounds are amounts of compute",
    ),
    (
        ValueError,
        {"costs": torch.tensor([math.inf, 1.0])},
        "costs must be above 0 and finite, got inf for expert 0",
    ),
    (
        ValueError,
        {"costs": torch.tensor([1.0, math.nan])},
        "costs must be above 0 and finite, got nan for expert 1",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_expert": torch.tensor([1.0, 1.0, -1.0])},
        "per_expert must be at least 0, got -1.0 for expert 2",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_expert": torch.ones(2)},
        "per_expert must have the shape of costs (3,), got (2,); give one bound for each expert",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_token": (torch.zeros(2, 2), 1.0)},
        "per_token low must have shape () or (T,), got (2, 2)",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_batch": torch.ones(2)},
        "per_batch must have shape (), got (2,)",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_token": (-0.5, 1.0)},
        "per_token low must be a finite number of at least 0, got -0.5; "
        "bounds are amounts of compute",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_token": (math.inf, math.inf)},
        "per_token low must be a finite number of at least 0, got inf",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_token": (0.0, torch.tensor([1.0, math.nan]))},
        "per_token high must be at least 0, got nan",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_batch": -1.0},
        "per_batch must be at least 0, got -1.0; bounds are amounts of compute",
    ),
    (
        ValueError,
        {"costs": COSTS, "per_token": (torch.zeros(2), torch.ones(3))},
        "per_token low and high must have one length, got 2 and 3",
    ),
    (
        InfeasibleBudgetError,
        {"costs": COSTS, "per_token": (2.0, 1.0)},
        "per_token low must be at most high, got low 2.0 and high 1.0; "
        "lower the one or raise the other",
    ),
    (
        InfeasibleBudgetError,
        {"costs": COSTS, "per_token": (torch.tensor([0.0, 8.0]), math.inf)},
        "per_token low must be at most the cost of all experts, 7, got 8; lower it",
    ),
]


@pytest.mark.parametrize(("error", "arguments", "message"), REFUSED)
def test_refuses_with_name_value_and_remedy(error, arguments, message):
    with pytest.raises(error, match=re.escape(message)):
        Budget(**arguments)
