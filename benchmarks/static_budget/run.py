"""Which experts to keep inside a budget: the search along the budget beside simpler choices.

A planted sum of experts (the right set is known), experts of unequal sizes (every set is tried),
and the experts of a small trained MoE (every set is tried). Random search gets as many losses as
the search; greedy choices take what they need, which is counted.

    python -m benchmarks.static_budget.run
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import describe_source, write_result
from benchmarks.static_budget import rivals
from benchmarks.static_budget.problems import (
    PruningProblem,
    planted_sum,
    trained_moe,
    unequal_costs,
)
from benchmarks.timing import interleaved
from drgr.budgets.static import Pruning, SearchSettings, prune_experts

SEARCH = "search along the budget"


def methods(
    problem: PruningProblem, settings: SearchSettings, seed: int
) -> dict[str, Callable[[rivals.Loss], Tensor]]:
    """Returns each method as a function from a loss to the set that it keeps."""
    costs, limit = problem.costs, problem.limit
    tries = settings.num_steps * settings.num_samples
    draw = torch.Generator().manual_seed(seed)
    return {
        "magnitude": lambda _: rivals.largest(problem.magnitude, costs, limit),
        "first order": lambda loss: rivals.first_order(loss, costs, limit),
        "greedy removal": lambda loss: rivals.greedy_removal(loss, costs, limit),
        "greedy addition": lambda loss: rivals.greedy_addition(loss, costs, limit),
        "penalty": lambda loss: rivals.penalty(loss, costs, limit, tries),
        "random search": lambda loss: rivals.random_search(loss, costs, limit, tries, draw),
    }


def compare(
    problem: PruningProblem, settings: SearchSettings, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Returns a row for each method, and the sets."""
    rows, sets = [], {}
    for name, choose in methods(problem, settings, seed).items():
        counted = rivals.CountedLoss(problem.loss)
        sets[name] = choose(counted)
        rows.append(_row(problem, name, sets[name], counted.count))
    counted = rivals.CountedLoss(problem.loss)
    found = _searched(counted, problem, settings, seed)
    sets[SEARCH] = found.kept
    rows.append(_row(problem, SEARCH, found.kept, counted.count) | _certified(found))
    return [{"seed": seed, **row} for row in rows], sets


def _searched(
    loss: rivals.Loss, problem: PruningProblem, settings: SearchSettings, seed: int
) -> Pruning:
    draw = torch.Generator().manual_seed(seed)
    return prune_experts(loss, problem.costs, problem.limit, generator=draw, settings=settings)


def _certified(found: Pruning) -> dict[str, Any]:
    certificate = found.certificate
    return {
        "status": certificate.status.name,
        "residual": certificate.residual,
        "lower_bound": certificate.lower_bound,
        "relaxed_loss": certificate.relaxed_loss,
        "decided": certificate.decided,
    }


def _row(problem: PruningProblem, name: str, kept: Tensor, num_losses: int) -> dict[str, Any]:
    row = {
        "method": name,
        "loss": problem.loss(kept.double()).item(),
        "spend": int((kept * problem.costs).sum()),
        "limit": problem.limit,
        "num_losses": num_losses,
    }
    if problem.planted is not None:
        row["recovered"] = float((kept & problem.planted).sum() / problem.planted.sum())
    return row


def best_of_all(problem: PruningProblem) -> float:
    """Returns the least loss of every set inside the budget."""
    size = problem.costs.numel()
    costs = problem.costs.flatten()
    best = math.inf
    with torch.no_grad():
        for kept in itertools.product((0.0, 1.0), repeat=size):
            gates = torch.tensor(kept, dtype=torch.float64)
            if (gates * costs).sum() <= problem.limit:
                best = min(best, problem.loss(gates.view(problem.costs.shape)).item())
    return best


def measure_planted(
    num_experts: int, num_planted: int, seeds: int, settings: SearchSettings
) -> list[dict[str, Any]]:
    """Returns a row for each seed and method on planted sums."""
    rows = []
    for seed in range(seeds):
        rows += compare(planted_sum(num_experts, num_planted, seed), settings, seed)[0]
    return rows


def measure_unequal(num_experts: int, seeds: int, settings: SearchSettings) -> list[dict[str, Any]]:
    """Returns a row for each seed and method under unequal costs, with the optimum."""
    rows = []
    for seed in range(seeds):
        problem = unequal_costs(num_experts, seed)
        best = best_of_all(problem)
        rows += [row | {"best": best} for row in compare(problem, settings, seed)[0]]
    return rows


def measure_trained(
    num_experts: int, num_steps: int, seeds: int, settings: SearchSettings
) -> list[dict[str, Any]]:
    """Returns a row for each seed and method on trained models, with the optimum."""
    rows = []
    for seed in range(seeds):
        model = trained_moe(num_layers=2, num_experts=num_experts, num_steps=num_steps, seed=seed)
        best = best_of_all(model.problem)
        whole = torch.ones_like(model.problem.costs, dtype=torch.bool)
        compared, sets = compare(model.problem, settings, seed)
        for row in compared:
            deployed = model.deployed_loss(sets[row["method"]])
            rows.append(
                row
                | {
                    "best": best,
                    "deployed_loss": deployed if math.isfinite(deployed) else None,
                    "whole_model_loss": model.deployed_loss(whole),
                }
            )
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over seeds by method."""
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        means = {
            key: statistics.mean(row[key] for row in own)
            for key in ("loss", "num_losses", "recovered", "deployed_loss")
            if all(row.get(key) is not None for row in own)
        }
        if "best" in own[0]:
            means["mean_ratio_to_best"] = statistics.mean(row["loss"] / row["best"] for row in own)
            means["seeds_at_best"] = sum(row["loss"] <= row["best"] * (1 + 1e-9) for row in own)
        summary[name] = means | {"seeds": len(own)}
    return summary


def measure_cost(settings: SearchSettings, rounds: int) -> dict[str, Any]:
    """Returns the time of a search over a loss that costs next to nothing, by number of experts."""
    few, many = (_searching(count, settings) for count in (64, 1024))
    seconds = interleaved({"64 experts": few, "1024 experts": many}, rounds=rounds)
    per_sample = settings.num_steps * settings.num_samples
    return {
        name: {"seconds_per_sample": times["median"] / per_sample, **times}
        for name, times in seconds.items()
    }


def _searching(num_experts: int, settings: SearchSettings) -> Callable[[], Pruning]:
    worth = torch.linspace(0, 1, num_experts, dtype=torch.float64).view(1, -1)
    problem = PruningProblem(
        loss=lambda gates: -(gates * worth).sum(),
        costs=torch.ones_like(worth),
        limit=num_experts // 2,
        magnitude=worth,
    )
    return lambda: _searched(problem.loss, problem, settings, 0)


def claims(parts: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """Returns what must hold of the measurements."""
    rows = [row for part in parts.values() for row in part]
    searched = [row for row in rows if row["method"] == SEARCH]
    return {
        "no set is over its budget": all(row["spend"] <= row["limit"] for row in rows),
        "every retraction converged": all(row["status"] == "CONVERGED" for row in searched),
        "bounds of convex losses are below the best of all sets": all(
            row["lower_bound"] <= row["best"] * (1 + 1e-9)
            for row in parts["unequal"]
            if row["method"] == SEARCH
        ),
        "the search finds the planted set for every seed": all(
            row["recovered"] == 1 for row in parts["planted"] if row["method"] == SEARCH
        ),
        "the search is within 5 % of the best of all sets on average, unequal costs": (
            _ratio(parts["unequal"]) <= 1.05
        ),
        "the search is within 5 % of the best of all sets on average, trained models": (
            _ratio(parts["trained"]) <= 1.05
        ),
    }


def _ratio(rows: list[dict[str, Any]]) -> float:
    return float(summarize(rows)[SEARCH]["mean_ratio_to_best"])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--planted", type=int, default=8)
    parser.add_argument("--unequal-experts", type=int, default=14)
    parser.add_argument("--model-experts", type=int, default=7)
    parser.add_argument("--model-seeds", type=int, default=3)
    parser.add_argument("--training-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    settings = SearchSettings(num_steps=arguments.steps)
    parts = {
        "planted": measure_planted(arguments.experts, arguments.planted, arguments.seeds, settings),
        "unequal": measure_unequal(arguments.unequal_experts, arguments.seeds, settings),
        "trained": measure_trained(
            arguments.model_experts, arguments.training_steps, arguments.model_seeds, settings
        ),
    }
    holds = claims(parts)
    summary = {name: summarize(rows) for name, rows in parts.items()}
    content = {
        "claims": holds,
        "threads": 1,
        "summary": summary,
        "cost": measure_cost(settings, arguments.rounds),
        **parts,
    }
    write_result(arguments.output, environment, content)
    for part, means in summary.items():
        for name, row in means.items():
            shown = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
            print(f"{part:<8} {name:<24} {shown}")
    for claim, kept in holds.items():
        print("holds" if kept else "FAILS", claim)


if __name__ == "__main__":
    main()
