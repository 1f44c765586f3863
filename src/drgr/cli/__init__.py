"""The command line: arguments and exit codes only."""

from drgr.cli.main import main

__all__ = ["main"]
