import json

import pytest
import torch

from drgr.ambiguity import load_reference_losses
from drgr.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def save(content) -> str:
        path = tmp_path / "reference.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return str(path)

    return save


def test_flat_file_in_the_order_asked_for(write):
    path = write({"email": 2.5, "chem": 3, "unused": 9.0})
    losses = load_reference_losses(path, ["chem", "email"])
    assert losses.dtype == torch.float64
    assert losses.tolist() == [3.0, 2.5]


def test_evaluation_of_an_earlier_run(write):
    evaluation = {
        "step": 3,
        "domains": {"email": {"loss": 4.0, "bits_per_byte": 1.6}, "chem": {"loss": 2}},
    }
    assert load_reference_losses(write(evaluation), ["email", "chem"]).tolist() == [4.0, 2.0]


def test_a_domain_may_be_called_domains(write):
    assert load_reference_losses(write({"domains": 1.5}), ["domains"]).tolist() == [1.5]


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        ("NaN", "nan"),
        ("-Infinity", "-inf"),
        ("Infinity", "inf"),
        ("null", "None"),
        ('"2.0"', "'2.0'"),
        ("true", "True"),
        ("[1]", r"\[1\]"),
    ],
)
@pytest.mark.parametrize("form", ['{{"email": {}}}', '{{"domains": {{"email": {{"loss": {}}}}}}}'])
def test_a_loss_that_is_no_finite_number_is_named(write, loss, shown, form):
    with pytest.raises(
        ConfigError, match=rf"domain 'email' in .* must be a finite number .* {shown};"
    ):
        load_reference_losses(write(form.format(loss)), ["email"])


def test_a_missing_domain_is_named(write):
    with pytest.raises(ConfigError, match=r"no domain 'law', it has \['chem', 'email'\]; add"):
        load_reference_losses(write({"email": 1.0, "chem": 2.0}), ["email", "law"])


def test_an_evaluation_without_a_loss_is_named(write):
    with pytest.raises(ConfigError, match=r"domain 'email' .* got None; evaluate"):
        load_reference_losses(write({"domains": {"email": {"bits_per_byte": 1.0}}}), ["email"])


@pytest.mark.parametrize("content", ["{", "", "not json"])
def test_a_broken_file(write, content):
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_reference_losses(write(content), ["email"])


def test_a_file_of_another_kind(write, tmp_path):
    with pytest.raises(ConfigError, match=r"must hold an object .* got list"):
        load_reference_losses(write([1.0]), ["email"])
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_reference_losses(binary, ["email"])
    with pytest.raises(ConfigError, match=r"missing.json cannot be read"):
        load_reference_losses(tmp_path / "missing.json", ["email"])
