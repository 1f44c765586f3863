"""Writes docs/results.md and its figures from committed results; --check compares the page."""

import argparse

from benchmarks.results.comparison import ROOT
from benchmarks.results.page import PAGE, SECTIONS, page, present


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page differs")
    arguments = parser.parse_args()
    written = page()
    if arguments.check:
        if not PAGE.exists() or written != PAGE.read_text():
            raise SystemExit(
                f"{PAGE.name} differs from the results; run python -m benchmarks.results"
            )
        return
    PAGE.write_text(written)
    for section, result in present(SECTIONS, ROOT):
        if section.draw is not None:
            section.draw(result)


if __name__ == "__main__":
    main()
