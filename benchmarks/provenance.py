"""What every result file carries: where it came from, and how it is written."""

import sys
from pathlib import Path
from typing import Any

from drgr.training import describe_environment, write_json

ROOT = Path(__file__).resolve().parents[1]


def describe_source(*, allow_dirty: bool) -> dict[str, Any]:
    """Returns command, commit, versions and hardware; call it before anything is measured.

    Raises:
        SystemExit: If the package's source differs from its commit and that was not allowed: a
            result must be reproducible from the commit that it names.
    """
    module = Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("")
    command = ["python", "-m", ".".join(module.parts), *without_output(sys.argv[1:])]
    environment = describe_environment(command, processes=1)
    if environment["dirty"] and not allow_dirty:
        raise SystemExit("the source differs from its commit; commit first, or pass --allow-dirty")
    return environment


def without_output(arguments: list[str]) -> list[str]:
    """Returns arguments less ``--output PATH``: where a result went does not make it again."""
    if "--output" not in arguments:
        return arguments
    place = arguments.index("--output")
    return [*arguments[:place], *arguments[place + 2 :]]


def write_result(path: Path, environment: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes a result with where it came from."""
    write_json(path, {"environment": environment, **content})
