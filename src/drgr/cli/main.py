"""Entry point: exit codes, and a clear message where an optional part is not installed.

Exit codes: 0 done, 2 usage or configuration, 3 the run failed, 130 and 143 stopped by SIGINT or
SIGTERM.
"""

import importlib.util
import sys

_PARTS = ("typer", "rich", "pydantic", "transformers", "tokenizers", "datasets", "plotly", "yaml")


def main() -> None:
    """Runs the command line."""
    missing = [name for name in _PARTS if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"drgr: the command line needs {', '.join(missing)}; install it with "
            f"pip install 'drgr[train]'\n"
        )
        raise SystemExit(2)
    from drgr.cli.commands import run  # noqa: PLC0415 - the parts are optional

    raise SystemExit(run())
