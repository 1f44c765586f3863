"""The documents say what is true of the code."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the source tree")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_commands_of_the_readme_are_understood():
    from typer.main import get_command

    from drgr.cli.commands import app

    lines = [line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("drgr ")]
    assert len(lines) >= 5
    for line in lines:
        words = line.split("#")[0].split()[1:]
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)


def test_the_domain_file_of_the_readme_is_valid(tmp_path):
    from drgr.data import load_domain_file

    (content,) = blocks("toml")
    path = tmp_path / "my-domains.toml"
    path.write_text(content)
    spec = load_domain_file(path)
    assert spec.name == tomllib.loads(content)["name"]


def test_the_loop_of_the_readme_runs(build_family):
    import torch

    code = blocks("python")[0]
    model = build_family("olmoe")
    ids = torch.randint(2, 64, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"model": model, "ids": ids, "optimizer": optimizer}
    exec(compile(code, "README.md", "exec"), names)
    assert all(policy.selector.price is not None for policy in names["routing"].policies)


def test_the_numerics_of_the_readme_run():
    names = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    exec(compile(blocks("python")[2], "README.md", "exec"), names)
    assert names["found"].status.succeeded
    assert names["worst"].status.succeeded
    assert names["losses"].grad.equal(names["worst"].weights)
    assert names["soft"].spend <= 600 * (1 + 1e-6)
    assert names["hard"].spend <= 600


@pytest.mark.parametrize(
    "module", ["benchmarks.readme", "benchmarks.results", "benchmarks.leaderboard.page"]
)
def test_results_in_documents_are_those_of_the_committed_files(module):
    command = [sys.executable, "-m", module, "--check"]
    subprocess.run(command, check=True, cwd=ROOT)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run_and_are_short(path, capsys):
    assert len(path.read_text().splitlines()) <= 80
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_links_between_documents_lead_somewhere():
    for document in [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_architecture_page_shows_the_enforced_layers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = configuration["tool"]["importlinter"]["contracts"][0]["layers"]
    assert "\n".join(layers) in page
    for room in sorted((ROOT / "src" / "drgr").iterdir()):
        if room.is_dir() and room.name != "__pycache__":
            assert f"{room.name}/" in page, room.name


def public_modules():
    return sorted((ROOT / "src" / "drgr").rglob("*.py"))


@pytest.mark.parametrize("path", public_modules(), ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_functions_and_files_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[1 if documented and len(node.body) > 1 else 0]
            signature = node.body[0].lineno - node.lineno
            length = signature + node.end_lineno - first.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
