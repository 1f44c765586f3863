"""Worst-group accuracy of a small classifier with experts, by how it is trained.

Three data sets with known groups: attributes of faces, a census, coloured digits. Every method
takes the same number of steps, a pass without gradients counting for its share, inside an exact
budget of two experts a sample in every training batch. Each chooses among five settings by
worst-group accuracy on the validation split, on a seed of its own; fresh seeds then train anew and
are judged on the test split, at the price frozen in training. Seeds change first weights and draws,
not the splits. The last model counts: there is no early stopping.

    python -m benchmarks.real_groups.run
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import describe_source, write_result
from benchmarks.real_groups import model
from benchmarks.real_groups.data import SOURCES, Dataset, load
from benchmarks.real_groups.methods import METHODS, ON_DRAWS, OURS, Method, Setting
from benchmarks.real_groups.model import Training, evaluate
from benchmarks.spread import mean_and_deviation
from drgr.experiments.statistics import mean_interval, sign_flip_p
from drgr.training.setup import resolve_cache

Row = dict[str, Any]
TUNING_SEED = 1000
DEFAULT_SOURCES = ("celeba", "adult", "coloured digits")


def tuned(data: Dataset, method: Method, arguments: argparse.Namespace) -> list[Row]:
    """Returns what each setting reaches on the validation split."""
    training = Training(arguments.steps, arguments.batch_size, seed=TUNING_SEED)
    rows = []
    for setting in method.trials:
        fitted = method.train(data.train, data.num_groups, training, setting)
        scores = evaluate(fitted.model, data.validation, data.num_groups)
        rows.append(
            {
                "data": data.source.name,
                "method": method.name,
                "setting": dict(setting),
                "worst_group_accuracy": scores.worst,
                "average_accuracy": scores.average,
            }
        )
    return rows


def best_setting(rows: Sequence[Row]) -> Setting:
    """Returns the setting of the highest worst-group accuracy, then of the highest average."""
    best: Row = max(rows, key=lambda row: (row["worst_group_accuracy"], row["average_accuracy"]))
    setting: Setting = best["setting"]
    return setting


def judged(data: Dataset, method: Method, setting: Setting, training: Training) -> Row:
    """Trains once with the chosen setting and returns the scores on the test split."""
    fitted = method.train(data.train, data.num_groups, training, setting)
    scores = evaluate(fitted.model, data.test, data.num_groups)
    return {
        "data": data.source.name,
        "method": method.name,
        "seed": training.seed,
        "worst_group_accuracy": scores.worst,
        "worst_group": data.group_names[scores.groups.index(scores.worst)],
        "average_accuracy": scores.average,
        "group_accuracy": scores.groups,
        "steps": fitted.ledger.steps,
        "flops": fitted.ledger.flops,
        "batches_over_budget": fitted.ledger.batches_over_budget,
        "assignments_over_budget": fitted.ledger.assignments_over_budget,
        "assignments_per_test_sample": scores.assignments_per_sample,
    }


def summary(runs: Sequence[Row], trials: Sequence[Row]) -> list[Row]:
    """Returns mean and deviation over seeds of each method on each data set."""
    rows = []
    for source, method in dict.fromkeys((run["data"], run["method"]) for run in runs):
        mine = of(runs, source, method)
        rows.append(
            {
                "data": source,
                "method": method,
                "setting": best_setting(of(trials, source, method)),
                "assignments_over_budget": sum(run["assignments_over_budget"] for run in mine),
                **{
                    figure: mean_and_deviation([run[figure] for run in mine])
                    for figure in (
                        "worst_group_accuracy",
                        "average_accuracy",
                        "steps",
                        "flops",
                        "assignments_per_test_sample",
                    )
                },
            }
        )
    return rows


def of(rows: Sequence[Row], source: str, method: str) -> list[Row]:
    return [row for row in rows if row["data"] == source and row["method"] == method]


def comparisons(runs: Sequence[Row]) -> list[Row]:
    """Returns by how much DRGR's worst group is better than that of each other method, paired."""
    rows = []
    for source, method in dict.fromkeys((run["data"], run["method"]) for run in runs):
        if method == OURS:
            continue
        theirs = {run["seed"]: run for run in of(runs, source, method)}
        differences = [
            run["worst_group_accuracy"] - theirs[run["seed"]]["worst_group_accuracy"]
            for run in of(runs, source, OURS)
        ]
        interval = mean_interval(differences)
        rows.append(
            {
                "data": source,
                "other": method,
                "mean": interval.mean,
                "seeds": interval.count,
                "student_low": interval.student_low,
                "student_high": interval.student_high,
                "bootstrap_low": interval.low,
                "bootstrap_high": interval.high,
                "sign_flip_p": sign_flip_p(differences),
            }
        )
    return rows


def claims(runs: Sequence[Row]) -> dict[str, bool]:
    """Returns what must hold of the measurements."""
    limits = {run["data"]: run["flops"] for run in runs if run["method"] == "ERM"}
    return {
        "no training batch exceeds its budget": all(
            run["batches_over_budget"] == 0 for run in runs
        ),
        "no method spends more FLOPs than ERM": all(
            run["flops"] <= limits[run["data"]] for run in runs
        ),
    }


def observations(rows: Sequence[Row]) -> dict[str, bool]:
    """Returns what is worth knowing, whichever way it comes out."""
    seen = {}
    for source in dict.fromkeys(row["data"] for row in rows):
        worst = {
            row["method"]: row["worst_group_accuracy"]["mean"]
            for row in rows
            if row["data"] == source
        }
        others = [value for method, value in worst.items() if method not in (OURS, ON_DRAWS)]
        seen[f"{source}: DRGR's worst group is better than that of ERM"] = (
            worst[OURS] > worst["ERM"]
        )
        seen[f"{source}: DRGR's worst group is better than that of every baseline"] = worst[
            OURS
        ] > max(others)
    return seen


def settings(arguments: argparse.Namespace) -> Row:
    """Returns what all runs share."""
    budget = model.BUDGET
    return {
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seeds": arguments.seeds,
        "tuning_seed": TUNING_SEED,
        "width": model.WIDTH,
        "experts": model.EXPERTS,
        "expert_width": model.EXPERT_WIDTH,
        "budget": {
            "minimum": budget.minimum,
            "maximum": budget.maximum,
            "average": budget.average,
        },
        "learning_rate": model.LEARNING_RATE,
        "trials": {method.name: [dict(trial) for trial in method.trials] for method in METHODS},
        "knows_groups": {method.name: method.knows_groups for method in METHODS},
    }


def measure(arguments: argparse.Namespace) -> Row:
    """Tunes and trains every method on every data set."""
    described, trials, runs = [], [], []
    for name in arguments.data:
        data = load(SOURCES[name], resolve_cache(arguments.cache) / "archives")
        described.append(data.describe())
        for method in METHODS:
            rows = tuned(data, method, arguments)
            trials += rows
            for seed in range(arguments.seeds):
                training = Training(arguments.steps, arguments.batch_size, seed=seed)
                runs.append(judged(data, method, best_setting(rows), training))
            print(f"{name}: {method.name} done", flush=True)
    rows = summary(runs, trials)
    return {
        "claims": claims(runs),
        "observations": observations(rows),
        "settings": settings(arguments),
        "data": described,
        "summary": rows,
        "comparisons": comparisons(runs),
        "trials": trials,
        "runs": runs,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=list(SOURCES), default=DEFAULT_SOURCES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--cache", type=Path, help="where archives are kept; as for drgr train")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    result = measure(arguments)
    write_result(arguments.output, environment, result)
    for row in result["summary"]:
        worst, average = row["worst_group_accuracy"], row["average_accuracy"]
        print(
            f"{row['data']:<16}{row['method']:<25}worst {worst['mean']:.1%} "
            f"({worst['deviation']:.1%})  average {average['mean']:.1%}  {row['setting']}"
        )
    for claim, kept in result["claims"].items():
        print("holds" if kept else "FAILS", claim)
    for observation, is_so in result["observations"].items():
        print("yes" if is_so else "no", observation)


if __name__ == "__main__":
    main()
