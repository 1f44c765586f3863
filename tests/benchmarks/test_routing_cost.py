"""The marks of slow methods are those that the committed measurement asks for."""

import json
from pathlib import Path

import pytest

from drgr.routing.methods import METHODS

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "routing_cost" / "result.json"

pytestmark = pytest.mark.skipif(
    not RESULT.exists(), reason="the benchmarks are not part of the wheel"
)


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text())


def test_every_method_that_routes_is_measured_at_full_size(result):
    measured = {(row["kind"], row["method"]) for row in result["rows"]}
    assert measured == {(one.kind, one.name) for one in METHODS if one.kind != "loss"}
    size = result["size"]
    assert [size[name] for name in ("tokens", "experts", "top_k", "width")] == [4096, 64, 8, 512]


def test_exactly_what_is_over_a_tenth_is_marked_slow(result):
    over = {(row["kind"], row["method"]) for row in result["rows"] if row["share"]["median"] > 0.1}
    assert over == {(one.kind, one.name) for one in METHODS if one.slow is not None}
    assert all(result["claims"].values())
