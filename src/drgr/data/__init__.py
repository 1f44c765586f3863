"""Corpora of several domains: preparing them once, and drawing deterministic batches.

Reading order: ``batches`` (what training sees), ``corpus`` (what is kept), ``prepare`` with
``extraction`` and ``tokenization`` (how it is made), ``catalogue`` with ``prose``, ``technical``
and ``manuals`` (the built-in text), ``domain_file`` and ``user_documents`` (a user's own text).

A domain file names the domains of a user's corpus, in TOML or YAML::

    name = "support"

    [domains.tickets]
    files = "tickets/**/*.jsonl.gz"     # a glob or a list of globs; relative to this file's folder
    field = "body"                      # column of JSON lines and Parquet; "text" by default
    licence = "internal"                # kept in the corpus's manifest
    weight = 0.8                        # share of sampling; give it for all domains or for none

    [domains.handbook]
    files = ["handbook/*.md", "notes.txt"]   # a file is a document; a lone file: blank-line blocks
    train_bytes = 4_000_000             # optional caps, also validation_bytes and test_bytes
    block_bytes = 32768                 # longer documents are cut before the split; 0 never cuts
    weight = 0.1

    [domains.wiki]
    dataset = "owner/name"              # a Hugging Face dataset, by hub name or local directory
    config = "en"                       # optional, as are split ("train") and revision
    field = "text"
    weight = 0.1

``format`` (``"text"``, ``"jsonl"`` or ``"parquet"``) is taken from the suffix if it is not given.
Exact duplicates are dropped; documents are divided into train, validation and test by a hash of
their content, a tenth of the bytes for each held-out split. Files must be UTF-8; ``.gz`` is read as
well.
"""

from drgr.data.batches import (
    Batch,
    check_sequence_length,
    draw_batch,
    evaluation_batches,
    evaluation_windows,
)
from drgr.data.catalogue import BUILT_IN_CORPORA
from drgr.data.corpus import Corpus, open_corpus
from drgr.data.domain_file import CorpusSpec, load_domain_file
from drgr.data.prepare import prepare_corpus
from drgr.data.progress import Progress, silent

__all__ = [
    "BUILT_IN_CORPORA",
    "Batch",
    "Corpus",
    "CorpusSpec",
    "Progress",
    "check_sequence_length",
    "draw_batch",
    "evaluation_batches",
    "evaluation_windows",
    "load_domain_file",
    "open_corpus",
    "prepare_corpus",
    "silent",
]
