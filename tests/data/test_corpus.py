import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from drgr.data import open_corpus
from drgr.data.splits import SPLITS
from drgr.errors import DataError

FOLDER = Path(__file__).parents[1] / "fixtures" / "corpus"


@pytest.fixture
def copy(corpus, tmp_path):
    return Path(shutil.copytree(corpus.directory, tmp_path / "copy"))


def documents(corpus, split, domain):
    """Decodes every document of a split, by way of the saved tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_directory)
    tokens = corpus.tokens(split, domain)
    ends = np.flatnonzero(tokens == corpus.manifest["end_of_text"])
    assert ends[-1] == len(tokens) - 1
    starts = [0, *(ends[:-1] + 1)]
    parts = [tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    return [tokenizer.decode(part) for part in parts]


def test_the_splits_together_hold_every_document_once(corpus):
    for domain in corpus.domains:
        texts = [text for split in SPLITS for text in documents(corpus, split, domain)]
        assert len(set(texts)) == len(texts)
        joined = "".join(path.read_text() for path in (FOLDER / domain).glob("*.txt"))
        assert all(text in joined for text in texts)
        assert sum(map(len, texts)) > 0.99 * len(joined)


def test_counts_and_bytes_per_token_agree_with_the_decoded_text(corpus):
    for split in SPLITS:
        texts = documents(corpus, split, "speech")
        counts = corpus.manifest["domains"]["speech"]["splits"][split]
        size = sum(len(text.encode()) for text in texts)
        tokens = len(corpus.tokens(split, "speech"))
        assert (counts["documents"], counts["bytes"]) == (len(texts), size)
        assert counts["tokens"] == tokens
        assert math.isclose(corpus.bytes_per_token(split, "speech"), size / tokens)


def test_natural_weights_are_the_shares_of_train_tokens(corpus):
    lengths = np.array([len(corpus.tokens("train", domain)) for domain in corpus.domains])
    np.testing.assert_allclose(corpus.natural_weights(), lengths / lengths.sum(), rtol=1e-12)
    assert corpus.declared_weights() is None


def test_tokens_are_a_read_only_map_of_small_integers(corpus):
    tokens = corpus.tokens("train", "verse")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.max() < corpus.vocabulary_size == 512
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_the_manifest_states_licence_and_origin(corpus):
    entry = corpus.manifest["domains"]["fiction"]
    assert entry["licence"] == "public domain (published 1865)"
    assert entry["origin"].startswith("11 files matching ")
    assert entry["skipped"] == []


def test_reopening_gives_the_same_corpus_anywhere(corpus, copy):
    again, moved = open_corpus(corpus.directory), open_corpus(copy)
    assert again == corpus
    assert hash(again) == hash(corpus)
    assert (moved.fingerprint, moved.domains) == (corpus.fingerprint, corpus.domains)
    assert np.array_equal(moved.tokens("test", "verse"), corpus.tokens("test", "verse"))


def test_unknown_split_and_domain_name_the_nearest(corpus):
    with pytest.raises(DataError, match=r"unknown split 'valid'; did you mean 'validation'\?"):
        corpus.tokens("valid", "verse")
    with pytest.raises(DataError, match=r"'fixture' has no domain 'vers'; did you mean 'verse'\?"):
        corpus.bytes_per_token("train", "vers")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*no/manifest\.json: .*prepare the corpus"):
        open_corpus(tmp_path / "no")


def test_truncated_tokens_are_noticed(copy):
    path = copy / "tokens" / "verse" / "test.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"verse/test\.bin has \d+ bytes, expected \d+; prepare"):
        open_corpus(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"verse/test\.bin has None bytes"):
        open_corpus(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), r"has format 99, not 1; prepare the corpus again"),
        (lambda m: m.pop("dtype"), r"lacks or garbles the entry 'dtype'"),
        (lambda m: m.pop("fingerprint"), r"lacks or garbles the entry 'fingerprint'"),
        (lambda m: m.update(domains=[1]), r"lacks or garbles"),
        (lambda m: m["domains"].update({"../up": {}}), r"'\.\./up' is not a domain name"),
    ],
)
def test_a_garbled_manifest_is_refused(copy, change, message):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        open_corpus(copy)


@pytest.mark.parametrize("content", ['{"format": 1', "[1]"])
def test_a_truncated_manifest_is_refused(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json(:| holds a list, not an object)"):
        open_corpus(copy)
