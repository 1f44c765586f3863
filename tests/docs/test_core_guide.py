"""The guide to divergences and budgets runs, shows what it says, and leaves nothing out."""

import contextlib
import dataclasses
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drgr import ambiguity, budgets, numerics
from drgr.ambiguity import KL, Burg, Hellinger, JensenShannon, Neyman, worst_case

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "which-divergence-which-budget.md"
FIGURES = DOCS / "figures"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data():
    return json.loads((FIGURES / "data.json").read_text(encoding="utf-8"))


@pytest.fixture
def print_options():
    yield
    torch.set_printoptions(profile="default")


def divergences():
    """Names of the public classes with which a worst case can be computed."""
    exported = {name: getattr(ambiguity, name) for name in ambiguity.__all__}
    return [
        name
        for name, entry in exported.items()
        if hasattr(entry, "has_level") or "has_level" in getattr(entry, "__annotations__", {})
        if not getattr(entry, "_is_protocol", False)
    ]


@pytest.mark.usefixtures("print_options")
def test_the_code_of_the_page_runs_and_prints_what_it_shows(page):
    blocks = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", page, flags=re.DOTALL)
    assert len(blocks) >= 15
    names = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, PAGE.name, "exec"), names)
        lines = [line.rstrip() for line in printed.getvalue().splitlines()]
        assert lines == shown.splitlines(), code
    assert sum(bool(shown) for _, shown in blocks) >= 10


def test_the_page_fits_its_width(page):
    assert max(len(line) for line in page.splitlines()) <= 120


@pytest.mark.slow
def test_the_numbers_behind_the_pictures_are_those_of_the_code():
    subprocess.run([sys.executable, DOCS / "figures.py", "--check"], check=True)


def test_a_changed_number_is_noticed(data):
    differences = runpy.run_path(str(DOCS / "figures.py"), run_name="figures")["differences"]
    assert differences(data, data) == []
    changed = json.loads(json.dumps(data))
    changed["budget-batch-bound"]["batch_price"] *= 1.001
    del changed["radius-rule"]["curves"]["KL()"][-1]
    found = differences(data, changed)
    assert [line.split(":")[0] for line in found] == [
        "/radius-rule/curves/KL()/22",
        "/budget-batch-bound/batch_price",
    ]


def test_every_picture_is_shown_small_and_fit_for_dark_pages(page, data):
    shown = re.findall(r"!\[[^\]]+\]\(figures/([\w-]+)\.svg\)", page)
    assert sorted(shown) == sorted(path.stem for path in FIGURES.glob("*.svg")) == sorted(data)
    for name in shown:
        text = (FIGURES / f"{name}.svg").read_text(encoding="utf-8")
        assert len(text.encode()) < 60_000, name
        assert 'style="fill: #ffffff"' in text, "the background is white"
        assert "<dc:date>" not in text
        assert "<image" not in text


@pytest.mark.parametrize("name", divergences())
def test_every_divergence_has_a_panel_and_a_row(name, page, data):
    panels = [*data["weights-smooth"], *data["weights-tail"]]
    assert any(title.startswith(name) and title[len(name)] in "(.," for title in panels)
    assert page.count(f"`{name}") >= 2


def test_every_bound_has_a_picture(data):
    pictures = {
        "per_token": "budget-token-bounds",
        "per_batch": "budget-batch-bound",
        "costs": "budget-unequal-costs",
        "per_expert": "budget-expert-capacity",
    }
    arguments = {field.name for field in dataclasses.fields(budgets.Budget) if field.init}
    assert arguments == set(pictures)
    assert set(pictures.values()) <= set(data)


def test_every_function_of_numerics_is_listed(page):
    for name in numerics.__all__:
        if name[0].islower():
            assert f"`{name}" in page, name


def test_saturation_radii_of_the_table_are_those_of_the_code(page):
    table = page.split("| | saturates at | eight equal domains |")[1].split("\n\n")[0]
    printed = re.search(r"```text\n(2\.079 .*)\n```", page)[1].split()
    assert re.findall(r"\d\.\d{3}", table)[: len(printed)] == printed


FLOORS = {
    KL(): lambda x: (-x).exp(),
    JensenShannon(): lambda x: 1 / (2 * (2 * x).exp() - 1),
    Hellinger(): lambda x: (1 + 2 * x) ** -2,
    Burg(): lambda x: 1 / (1 + x),
    Neyman(): lambda x: (1 + 2 * x) ** -0.5,
}


@pytest.mark.parametrize("divergence", FLOORS, ids=str)
@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_floors_of_the_table_hold_and_are_nearly_reached(divergence, penalty):
    losses = torch.cat([torch.zeros(50, 1), torch.rand(50, 8), torch.ones(50, 1)], dim=1).double()
    nominal = torch.full((10,), 0.01 / 9, dtype=torch.float64)
    nominal[-1] = 1 - nominal[:-1].sum()
    worst = worst_case(losses, divergence=divergence, penalty=penalty, nominal=nominal)
    lowest = (worst.weights / nominal).amin(dim=-1)
    floor = FLOORS[divergence](torch.tensor(1 / penalty, dtype=torch.float64))
    assert (lowest >= floor * (1 - 1e-9)).all()
    assert (lowest <= floor * 1.3).all()


def test_floors_of_the_table_are_printed_right(page):
    table = page.split("at comparable penalties |")[1].split("\n\n")[0]
    curvature = {"KL": 1.0, "JensenShannon": 0.25, "Hellinger": 0.25, "Burg": 1.0, "Neyman": 1.0}
    for divergence, floor in FLOORS.items():
        name = type(divergence).__name__
        shown = re.search(rf"`{name}\(\)` \| [^|]+ \| (\d\.\d+)", table)[1]
        assert f"{floor(torch.tensor(3.0 * curvature[name])):.3f}" == shown
