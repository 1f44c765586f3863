"""From a comparison's directory to the result file that documents are written from.

It keeps what ``summary.json`` says of each method and of the pairs with one method of interest, and
adds from every run's evaluation what the comparison does not count as a figure: congestion of
gradient traffic, and batches over the budget.
"""

import argparse
import json
import sqlite3
import statistics
from pathlib import Path
from typing import Any

from drgr.training import write_json

FIGURES = ("worst_bits_per_byte", "mean_bits_per_byte", "flops", "outer_flops")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="of drgr compare")
    parser.add_argument("--of-interest", default="DRGR")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    summary = json.loads((arguments.directory / "summary.json").read_text())
    extra = evaluated(arguments.directory / "results.sqlite")
    write_json(arguments.output, collected(summary, extra, arguments.of_interest))


def collected(
    summary: dict[str, Any], extra: dict[str, dict[str, float]], name: str
) -> dict[str, Any]:
    """Returns what documents need of a comparison."""
    kept = ("name", "reference", "flops_rule", "confidence", "seeds", "complete", "environment")
    return {key: summary[key] for key in kept} | {
        "ranks": summary["ranks"],
        "methods": [
            {key: method[key] for key in ("name", "tuned", "steps", "runs")}
            for method in summary["methods"]
        ],
        "pairs": [
            pair
            for pair in summary["pairs"]
            if name in (pair["a"], pair["b"]) and pair["figure"] in FIGURES[:2]
        ],
        "trials": summary["trials"],
        "runs": [
            {
                "method": run["method"],
                "seed": run["seed"],
                "status": run["status"],
                "steps": run["steps"],
                **{key: run["figures"][key] for key in FIGURES},
                "worst_domain": run["worst_domain"],
                "bits_per_byte": run["bits_per_byte"],
                **extra[run["name"]],
            }
            for run in summary["runs"]
            if run["name"] in extra
        ],
    }


def evaluated(store: Path) -> dict[str, dict[str, float]]:
    """Returns congestion, averaged over layers, and batches over the budget of each final run."""
    found = {}
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT name, evaluation FROM runs WHERE stage = 'final' AND evaluation IS NOT NULL"
        )
        for name, text in rows:
            evaluation = json.loads(text)
            found[name] = {
                "congestion": statistics.fmean(
                    layer["congestion"] for layer in evaluation["layers"]
                ),
                "batches_over_budget": evaluation["budget"]["training"]["batches_over"],
            }
    return found


if __name__ == "__main__":
    main()
