"""From a comparison's directory to the result file that documents are written from.

It keeps what ``summary.json`` says of each method and of the pairs with one method of interest, and
adds from every run's evaluation what the comparison does not count as a figure: congestion of
gradient traffic, balance, entropy, time, the budget and batches over it, and unseen domains. The
size of the runs comes from their configuration.
"""

import argparse
import json
import sqlite3
import statistics
from pathlib import Path
from typing import Any

from drgr.training import write_json

MODEL_SIZE = ("num_layers", "hidden_size", "expert_size", "num_experts")
FIGURES = ("worst_bits_per_byte", "mean_bits_per_byte", "flops", "outer_flops")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="of drgr compare")
    parser.add_argument("--of-interest", default="DRGR")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    summary = json.loads((arguments.directory / "summary.json").read_text())
    store = arguments.directory / "results.sqlite"
    result = collected(summary, evaluated(store), arguments.of_interest)
    write_json(arguments.output, result | {"setting": setting(store)})


def collected(
    summary: dict[str, Any], extra: dict[str, dict[str, Any]], name: str
) -> dict[str, Any]:
    """Returns what documents need of a comparison."""
    kept = ("name", "reference", "flops_rule", "confidence", "seeds", "complete", "environment")
    return {key: summary[key] for key in kept} | {
        "ranks": summary["ranks"],
        "methods": [
            {key: method[key] for key in ("name", "settings", "tuned", "steps", "runs")}
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


def evaluated(store: Path) -> dict[str, dict[str, Any]]:
    """Returns what the evaluation of each final run holds beside the figures of a comparison."""
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT name, evaluation, config FROM runs "
            "WHERE stage = 'final' AND evaluation IS NOT NULL"
        ).fetchall()
    return {
        name: described(json.loads(evaluation))
        | {"traffic_price": json.loads(config)["routing"]["traffic"]["coefficient"]}
        for name, evaluation, config in rows
    }


def described(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Returns what documents need of an evaluation; what it does not hold is left out.

    Of layers the mean, but for dead experts, whose number is that of all layers.
    """
    layers, budget = evaluation["layers"], evaluation["budget"]
    found: dict[str, Any] = {"batches_over_budget": budget["training"]["batches_over"]}
    for key in ("congestion", "max_violation", "routing_entropy"):
        known = [layer[key] for layer in layers if layer.get(key) is not None]
        if len(known) == len(layers):
            found[key] = statistics.fmean(known)
    if all("dead_experts" in layer for layer in layers):
        found["dead_experts"] = sum(layer["dead_experts"] for layer in layers)
    if "average" in budget:
        found["budget"] = {key: budget[key] for key in ("minimum", "maximum", "average")}
    if "seconds" in evaluation:
        found["seconds"] = evaluation["seconds"]
    if evaluation.get("unseen"):
        found["unseen"] = {
            name: entry["bits_per_byte"] for name, entry in evaluation["unseen"].items()
        }
    return found


def setting(store: Path) -> dict[str, Any] | None:
    """Returns the size of model and run that all final runs share; None where they differ.

    Steps are those of the longest run: methods that cost more take fewer.
    """
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT config FROM runs WHERE stage = 'final'").fetchall()
    configs = [json.loads(text) for (text,) in rows]
    sizes = [
        {
            **{key: config["model"].get(key) for key in MODEL_SIZE},
            "batch_size": config["training"]["batch_size"],
            "sequence_length": config["data"]["sequence_length"],
        }
        for config in configs
    ]
    if not sizes or any(size != sizes[0] for size in sizes):
        return None
    return sizes[0] | {"steps": max(config["training"]["steps"] for config in configs)}


if __name__ == "__main__":
    main()
