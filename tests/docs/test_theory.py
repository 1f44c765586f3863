"""The page of proofs names what exists, and what exists names the page."""

import contextlib
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "theory.md"
TESTS = {
    "drgr.bilevel.bounds": "bilevel/test_bounds.py",
    "drgr.bilevel.descent_bounds": "bilevel/test_bounds.py",
    "drgr.ambiguity.bounds": "ambiguity/test_bounds.py",
    "drgr.routing.bounds": "routing/test_bounds.py",
    "drgr.evaluation.guarantees": "evaluation/test_guarantees.py",
}
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


def functions(module):
    found = importlib.import_module(module)
    return [
        name
        for name, entry in vars(found).items()
        if inspect.isfunction(entry) and entry.__module__ == module and not name.startswith("_")
    ]


def all_functions():
    return [(module, name) for module in TESTS for name in functions(module)]


def numbers(text):
    return re.findall(r"\b\d\.\d\b", text)


@pytest.mark.parametrize(("module", "name"), all_functions(), ids=str)
def test_every_bound_names_its_statement_and_is_named_there(page, module, name):
    documented = inspect.getdoc(getattr(importlib.import_module(module), name))
    assert "Examples:" in documented
    named = numbers(documented.split("(theory.md ")[1].split(")")[0])
    assert named
    table = page.split("## Statements, functions, tests")[1]
    for number in named:
        assert re.search(rf"^### {re.escape(number)} ", page, flags=re.MULTILINE), number
        rows = [row for row in table.splitlines() if number in numbers(row)]
        assert any(re.search(rf"[`.]{name}`", row) for row in rows), number
        tests = (ROOT / "tests" / TESTS[module]).read_text(encoding="utf-8")
        tested = " ".join(re.findall(r"^def (test_\w+)", tests, flags=re.MULTILINE))
        assert number.replace(".", "_") in tested, number


def test_every_name_of_the_table_exists(page):
    table = page.split("## Statements, functions, tests")[1]
    rows = [row for row in table.splitlines() if row.startswith("| ")]
    named = {name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", "\n".join(rows))}
    assert named == {name for _, name in all_functions()}


def test_every_numbered_statement_has_a_proof(page):
    for section in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        body = section.split("\n## ")[0]
        assert "Proof." in body, section.splitlines()[0]
        assert "∎" in body, section.splitlines()[0]


def test_tests_that_the_page_names_exist(page):
    for name in re.findall(r"`(test_\w+)`", page):
        found = [p for p in (ROOT / "tests").rglob("test_*.py") if f"def {name}(" in p.read_text()]
        assert found, name


def test_the_code_of_the_page_runs_and_prints_what_it_shows(page):
    ((code, shown),) = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", page, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, PAGE.name, "exec"), {})
    assert printed.getvalue() == shown


def test_the_page_fits_its_width(page):
    assert max(len(line) for line in page.splitlines()) <= 120
