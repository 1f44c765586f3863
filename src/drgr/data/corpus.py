"""A prepared corpus: domain names, sizes, and read-only memory-mapped tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drgr.data.domain_file import nearest
from drgr.data.splits import SPLITS
from drgr.data.storage import Json, read_json
from drgr.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1
_REMEDY = "prepare the corpus again"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A prepared corpus; cheap to hold and to pass to other processes.

    Attributes:
        name: The built-in name, or the one in the domain file.
        directory: Where it lies; nothing in it is executed when it is read.
        domains: Domain names; a batch's ``domain`` counts in this order.
        vocabulary_size: Number of token ids.
        fingerprint: Hash of the domains, their tokens and the vocabulary size: equal wherever the
            same corpus is prepared.
        tokenizer_directory: Readable by ``AutoTokenizer.from_pretrained``.
        manifest: Licence and origin of each domain; documents, bytes and tokens of each split.
    """

    name: str
    directory: Path
    domains: tuple[str, ...]
    vocabulary_size: int
    fingerprint: str
    tokenizer_directory: Path
    manifest: Json = field(repr=False, compare=False)

    def tokens(self, split: str, domain: str) -> Tokens:
        """Returns the token stream of one domain as a read-only memory map.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            domain: One of ``domains``.

        Returns:
            One-dimensional ``uint16`` or ``uint32``; each document ends in the end-of-text token.

        Raises:
            DataError: If the split or the domain is unknown.
        """
        self._counts(split, domain)
        path = token_file(self.directory, domain, split)
        little_endian = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        return np.memmap(path, dtype=little_endian, mode="r")

    def bytes_per_token(self, split: str, domain: str) -> float:
        """Returns the mean bytes of UTF-8 text a token stands for, end-of-text tokens counted."""
        counts = self._counts(split, domain)
        return float(counts["bytes"] / counts["tokens"])

    def restricted(self, domains: Sequence[str]) -> "Corpus":
        """Returns the same corpus with some of its domains only; the others are unknown to it.

        Tokenizer, vocabulary size and fingerprint stay those of the whole corpus.

        Args:
            domains: Names of the domains to keep; the order stays that of the corpus.

        Raises:
            DataError: If a domain is unknown.
        """
        for domain in domains:
            self._counts("train", domain)
        return replace(self, domains=tuple(name for name in self.domains if name in domains))

    def natural_weights(self) -> NDArray[np.float64]:
        """Returns each domain's share of the train tokens, shape ``(G,)``, summing to 1."""
        counts = [self._counts("train", domain)["tokens"] for domain in self.domains]
        return np.asarray(counts, np.float64) / float(sum(counts))

    def declared_weights(self) -> NDArray[np.float64] | None:
        """Returns the sampling weights of the user's domain file, shape ``(G,)``, or ``None``.

        Raises:
            DataError: If all of these domains have weight 0, as a part of a corpus can.
        """
        weights = [self.manifest["domains"][domain]["weight"] for domain in self.domains]
        if weights[0] is None:
            return None
        if not any(weights):
            raise DataError(
                f"the domain file of corpus {self.name!r} gives the domains {list(self.domains)} "
                f"no weight; give one of them a weight above 0, or set data.sampling"
            )
        return np.asarray(weights, np.float64) / float(sum(weights))

    def _counts(self, split: str, domain: str) -> Json:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; {nearest(split, SPLITS)}")
        if domain not in self.domains:
            message = f"corpus {self.name!r} has no domain {domain!r}"
            raise DataError(f"{message}; {nearest(domain, self.domains)}")
        counts: Json = self.manifest["domains"][domain]["splits"][split]
        return counts


def token_file(directory: Path, domain: str, split: str) -> Path:
    """Returns where a corpus keeps one token stream."""
    return directory / "tokens" / domain / f"{split}.bin"


def open_corpus(directory: Path) -> Corpus:
    """Opens a prepared corpus and checks that it is whole.

    Args:
        directory: What ``prepare_corpus(...).directory`` was.

    Raises:
        DataError: If it is missing, truncated, or of another format.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    manifest = read_json(path, remedy=_REMEDY)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} has format {manifest.get('format')!r}, not {FORMAT}; {_REMEDY}")
    try:
        _check_files(directory, manifest)
        return Corpus(
            name=manifest["name"],
            directory=directory,
            domains=tuple(manifest["domains"]),
            vocabulary_size=manifest["vocabulary_size"],
            fingerprint=manifest["fingerprint"],
            tokenizer_directory=directory / "tokenizer",
            manifest=manifest,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} lacks or garbles the entry {error}; {_REMEDY}") from error


def _check_files(directory: Path, manifest: Json) -> None:
    width = {"uint16": 2, "uint32": 4}[manifest["dtype"]]
    for domain, entry in manifest["domains"].items():
        if not _SAFE_NAME.fullmatch(domain):
            raise DataError(f"{directory / MANIFEST}: {domain!r} is not a domain name; {_REMEDY}")
        for split in SPLITS:
            path = token_file(directory, domain, split)
            expected = width * entry["splits"][split]["tokens"]
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                raise DataError(f"{path} has {found} bytes, expected {expected}; {_REMEDY}")
