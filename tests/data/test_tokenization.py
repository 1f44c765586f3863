import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from drgr.data.tokenization import (
    END_OF_TEXT,
    Encoder,
    copy_tokenizer,
    encode_documents,
    load_encoder,
    smallest_unsigned,
    train_tokenizer,
)
from drgr.errors import DataError

SAMPLE = ["the cat sat on the mat " * 40, "the dog sat on the log " * 40]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SAMPLE, vocabulary_size=300, directory=path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def encoder(directory):
    return load_encoder(directory)


def test_the_trained_vocabulary_has_the_size_asked_for_at_most(tmp_path, encoder):
    assert encoder.vocabulary_size <= 300
    train_tokenizer(SAMPLE, vocabulary_size=260, directory=tmp_path)
    assert load_encoder(tmp_path).vocabulary_size == 260


@given(st.text(max_size=60))
def test_any_text_survives_the_round_trip(encoder, tokenizer, text):
    (ids,) = encoder.encode([text])
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < encoder.vocabulary_size for number in ids)


def test_text_that_spells_the_end_token_is_ordinary_text(encoder, tokenizer):
    (ids,) = encoder.encode([f"a{END_OF_TEXT}b"])
    assert encoder.end_of_text not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_training_is_deterministic(tmp_path, directory):
    train_tokenizer(SAMPLE, vocabulary_size=300, directory=tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_documents_are_joined_in_order_each_with_its_end(encoder):
    texts = [f"the cat number {n} sat " * (n % 50) for n in range(600)]
    chunks = list(encode_documents(texts, encoder, dtype=np.dtype(np.uint16)))
    expected = [id_ for text in texts for id_ in [*encoder.encode([text])[0], encoder.end_of_text]]
    assert len(chunks) > 1
    assert np.concatenate(chunks).tolist() == expected
    assert {chunk.dtype for chunk in chunks} == {np.dtype(np.uint16)}


@pytest.mark.parametrize("before", [None, "true"])
def test_the_environment_is_left_as_it_was(encoder, monkeypatch, before):
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    list(encode_documents(SAMPLE, encoder, dtype=np.dtype(np.uint16)))
    assert os.environ.get(name) == before


def test_the_library_starts_no_threads_of_its_own_while_encoding():
    seen = []

    def encode(texts):
        seen.append(os.environ["TOKENIZERS_PARALLELISM"])
        return [[1] for _ in texts]

    encoder = Encoder(encode=encode, vocabulary_size=2, end_of_text=0)
    list(encode_documents(SAMPLE, encoder, dtype=np.dtype(np.uint16)))
    assert seen == ["false"]


def test_a_saved_tokenizer_is_copied(tmp_path, directory, encoder):
    copy_tokenizer(str(directory), tmp_path)
    assert load_encoder(tmp_path).encode(SAMPLE) == encoder.encode(SAMPLE)


def test_truncation_and_padding_of_a_saved_tokenizer_are_ignored(tmp_path, directory, encoder):
    copy_tokenizer(str(directory), tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    saved["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    texts = ["the cat sat on the mat", "a"]
    assert load_encoder(tmp_path).encode(texts) == encoder.encode(texts)


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer '.*nowhere' cannot be loaded: .*saved tok"):
        copy_tokenizer(str(tmp_path / "nowhere"), tmp_path / "copy")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, directory):
    copy_tokenizer(str(directory), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("eos_token")
    path.write_text(json.dumps(config))
    with pytest.raises(
        DataError, match=r"has no end-of-text token .* choose one with an eos_token"
    ):
        load_encoder(tmp_path)


def test_the_smallest_type_holds_every_id():
    assert smallest_unsigned(1 << 16) == np.uint16
    assert smallest_unsigned((1 << 16) + 1) == np.uint32
