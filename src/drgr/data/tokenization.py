"""Training a byte-level BPE once per corpus, and turning documents into tokens quickly."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drgr.errors import DataError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
_PLAIN_TEXT = "a plain sentence"
_CHUNK_CHARACTERS = 1 << 18
_PARALLELISM = "TOKENIZERS_PARALLELISM"
Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """What encoding needs of a tokenizer.

    Attributes:
        encode: Token ids of several texts, without special tokens; text that spells a special token
            is encoded as ordinary text.
        vocabulary_size: Number of token ids; every id is below it.
        end_of_text: The id put after each document.
    """

    encode: Encode
    vocabulary_size: int
    end_of_text: int


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int, directory: Path) -> None:
    """Trains a byte-level BPE and saves it in the layout of the transformers library.

    Args:
        texts: A sample of the corpus, balanced over its domains.
        vocabulary_size: Number of tokens, the end-of-text token included; at least 257. A sample
            too small for that many merges gives fewer tokens.
        directory: Where ``tokenizer.json`` and ``tokenizer_config.json`` are written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - slow to import

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _serial_tokenizers():
        tokenizer.train_from_iterator(texts, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    wrapper(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    ).save_pretrained(directory)


def copy_tokenizer(name: str, directory: Path) -> None:
    """Loads any Hugging Face tokenizer by name or local path and saves it in ``directory``.

    Raises:
        DataError: If it cannot be loaded. Code that comes with a tokenizer is never executed.
    """
    _load(name).save_pretrained(directory)


def load_encoder(directory: Path) -> Encoder:
    """Loads a saved tokenizer for encoding.

    Raises:
        DataError: If it cannot be loaded, has no end-of-text (or separator) token, or no
            vocabulary.
    """
    tokenizer = _load(str(directory))
    end_of_text = tokenizer.eos_token_id
    if end_of_text is None:
        end_of_text = tokenizer.sep_token_id
    if end_of_text is None:
        raise DataError(
            "the tokenizer has no end-of-text token to put between documents; choose one with an "
            "eos_token, or let the corpus train its own"
        )
    largest = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    encode = _fast(tokenizer) if tokenizer.is_fast else _slow(tokenizer)
    # Given a model's config.json alone, transformers makes a tokenizer of its kind that knows
    # special tokens only.
    if not encode([_PLAIN_TEXT])[0]:
        raise DataError(
            f"the tokenizer has no token for {_PLAIN_TEXT!r}: its files are missing; name another "
            "one, or let the corpus train its own"
        )
    return Encoder(
        encode=encode,
        vocabulary_size=largest,
        end_of_text=int(end_of_text),
    )


def _load(name: str) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise DataError(
            f"tokenizer {name!r} cannot be loaded: {(reason or [type(error).__name__])[0]}; "
            "give a Hugging Face name or the path of a saved tokenizer"
        ) from error


def _fast(tokenizer: Any) -> Encode:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode


def _slow(tokenizer: Any) -> Encode:
    def encode(texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[list[int]] = tokenizer(texts, **options)["input_ids"]
        return ids

    return encode


def encode_documents(
    documents: Iterable[str], encoder: Encoder, *, dtype: np.dtype[Any]
) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """Yields the tokens of consecutive documents, each followed by the end-of-text token.

    Chunks of about a quarter of a million characters are encoded by a few threads (the tokenizer
    releases the interpreter lock); memory stays bounded whatever the number of documents.

    Args:
        documents: Texts, in order.
        encoder: The loaded tokenizer.
        dtype: Unsigned type that holds every id.

    Yields:
        One-dimensional arrays; joined they are the token stream.
    """

    def encode(chunk: list[str]) -> NDArray[np.unsignedinteger[Any]]:
        ends = [encoder.end_of_text]
        return np.concatenate([np.array(ids + ends, dtype) for ids in encoder.encode(chunk)])

    workers = min(4, os.cpu_count() or 1)
    chunks = _chunks(documents)
    with _serial_tokenizers(), ThreadPoolExecutor(workers) as pool:
        while some := list(islice(chunks, 2 * workers)):
            yield from pool.map(encode, some)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Turns the library's own threads off, so that it does not warn when a process forks."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def smallest_unsigned(vocabulary_size: int) -> np.dtype[Any]:
    """Returns ``uint16`` where every token id fits in it, else ``uint32``."""
    return np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)
