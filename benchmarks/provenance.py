"""What every result file carries: where it came from, and how it is written."""

import sys
from pathlib import Path
from typing import Any

from drgr.training import describe_environment, write_json

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, content: dict[str, Any], *, allow_dirty: bool) -> Path:
    """Writes ``results/NAME.json`` with command, commit, versions and hardware.

    Raises:
        SystemExit: If the source differs from its commit and that was not allowed: a result must be
            reproducible from the commit that it names.
    """
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    environment = describe_environment(command, processes=1)
    if environment["dirty"] and not allow_dirty:
        raise SystemExit("the source differs from its commit; commit first, or pass --allow-dirty")
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment, **content})
    return path
