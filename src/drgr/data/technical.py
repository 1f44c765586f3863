"""Extractors of chemistry, program code, formal mathematics and the ontology."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from drgr.data.cleaning import decode, drop_repeated_blocks
from drgr.data.members import debian_members, tar_members, zip_members

_NOT_LIBRARY_CODE = re.compile(r"(^|/)(tests?|testing|benchmarks?)/")
_C_FILE = re.compile(r"^/\*+ Begin file ", re.MULTILINE)
_METAMATH_END = re.compile(r"(?<=\$\.)\s*\n\s*\n|\n\s*\n(?=\s*\$[({])")
_OBO_FIELDS = ("name: ", "def: ", "comment: ", "synonym: ")


def chem(archives: Sequence[Path]) -> Iterator[str]:
    """Yields one document a compound: IUPAC name, formula, SMILES and InChI."""
    pattern = "chemicals/Identifiers/chemical identifiers pubchem large.tsv"
    for _, content in zip_members(archives[0], pattern):
        for line in content.decode("utf-8").splitlines():
            _, _, formula, _, smiles, inchi, _, name = line.split("\t")[:8]
            yield f"{name}\nformula {formula}\nSMILES {smiles}\nInChI=1S/{inchi}"


def python(archives: Sequence[Path]) -> Iterator[str]:
    """Yields the modules of SymPy, less tests and benchmarks."""
    for name, content in zip_members(archives[0], "sympy/*.py"):
        if not _NOT_LIBRARY_CODE.search(name):
            yield decode(content)


def javascript(archives: Sequence[Path]) -> Iterator[str]:
    """Yields the modules of three.js, less bundled libraries and repeated blocks."""
    files = tar_members(archives[0], "src/*.js", "examples/jsm/*.js")
    return drop_repeated_blocks(
        decode(content) for name, content in files if not name.startswith("examples/jsm/libs/")
    )


def c(archives: Sequence[Path]) -> Iterator[str]:
    """Yields the source files that SQLite's amalgamation joins."""
    for _, content in tar_members(archives[0], "deps/sqlite3/sqlite3.c"):
        for part in _C_FILE.split(decode(content)):
            yield part.strip()


def math(archives: Sequence[Path]) -> Iterator[str]:
    """Yields the statements of Metamath's set.mm, each with its comment and proof."""
    for _, content in debian_members(archives[0], "*/databases/set.mm"):
        for statement in _METAMATH_END.split(decode(content)):
            yield statement.strip()


def hol(archives: Sequence[Path]) -> Iterator[str]:
    """Yields the theories of HOL Light, one file a document."""
    for _, content in debian_members(archives[0], "usr/share/hol-light/*.ml"):
        yield decode(content)


def ontology(archives: Sequence[Path]) -> Iterator[str]:
    """Yields one document a Gene Ontology term: name, definition, comment and synonyms."""
    for _, content in debian_members(archives[0], "*/OBO/go.obo"):
        for stanza in decode(content).split("\n\n"):
            if stanza.startswith("[Term]"):
                yield "\n".join(x for x in stanza.split("\n") if x.startswith(_OBO_FIELDS))
