"""Average mixtures of earlier runs: read, normalised, and refused where they are none."""

import json

import pytest

from drgr.errors import ConfigError
from drgr.evaluation import average_mixture


def write(path, shares):
    domains = {name: {"average_share": share} for name, share in shares.items()}
    path.write_text(json.dumps({"domains": domains}))
    return path


def test_shares_are_read_in_order_and_sum_to_one(tmp_path):
    path = write(tmp_path / "evaluation.json", {"a": 1.0, "b": 3.0, "other": 9.0})
    assert average_mixture(path, ["b", "a"]).tolist() == [0.75, 0.25]


@pytest.mark.parametrize("shares", [{"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 2.0}])
def test_shares_that_are_none_are_refused(tmp_path, shares):
    path = write(tmp_path / "evaluation.json", shares)
    with pytest.raises(ConfigError, match="finite, not negative and not all 0"):
        average_mixture(path, ["a", "b"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"domains": {"a": {}}}', '{"domains": 1}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"evaluation.json of a run on the domains \['a'\]"):
        average_mixture(path, ["a"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.json"):
        average_mixture(tmp_path / "missing.json", ["a"])
