"""Records of loads and losses."""

import math

import pytest
import torch

from drgr.evaluation import layer_record, named


def test_what_is_no_number_becomes_null():
    values = torch.tensor([1.5, math.nan, math.inf, -math.inf])
    assert named("abcd", values) == {"a": 1.5, "b": None, "c": None, "d": None}
    with pytest.raises(ValueError, match="argument 2 is"):
        named("abc", values)


def test_layers():
    record = layer_record("layer", torch.tensor([3, 1, 0, 4]))
    assert record == {
        "name": "layer",
        "load": [3, 1, 0, 4],
        "max_violation": 1.0,
        "min_violation": -1.0,
        "mean_violation": 0.75,
        "dead_experts": 1,
    }
    even = layer_record("layer", torch.tensor([2, 2]))
    assert (even["max_violation"], even["min_violation"]) == (0.0, 0.0)
