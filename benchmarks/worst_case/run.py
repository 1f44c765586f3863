"""Worst-case weights against CVXPY with Clarabel, a NumPy prototype, a sort, and a Python loop.

One thread; all ratios of one row are measured in one run. The losses are ``Exp(1) + 0.1 N(0, 1)^2``
with a uniform nominal. A solver that fails counts as failed, not as slow.
"""

import argparse
import contextlib
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from benchmarks.provenance import describe_source, write_result
from benchmarks.timing import interleaved
from benchmarks.worst_case.prototypes import PROTOTYPES
from drgr.ambiguity import (
    KL,
    Burg,
    ChiSquare,
    CressieRead,
    CVaR,
    Hellinger,
    JensenShannon,
    KLCVaR,
    Neyman,
    TotalVariation,
    worst_case,
)

# Fastest times in seconds at n = 1e5 of an earlier NumPy prototype, on another machine.
PUBLISHED_PROTOTYPE = {"KL": 0.029, "ChiSquare": 0.026, "CVaR": 0.020, "TotalVariation": 0.017}
SLOWEST_TO_PROTOTYPE = 1.5
FASTEST_SOLVER_RATIO = 50
MOST_SORTS = 10
LOWEST_BATCH_GAIN = 100
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "KL": (KL(), {"radius": 0.1}),
    "ChiSquare": (ChiSquare(), {"radius": 0.1}),
    "CVaR": (CVaR(0.1), {}),
    "TotalVariation": (TotalVariation(), {"radius": 0.1}),
    "Hellinger": (Hellinger(), {"radius": 0.1}),
    "CressieRead(1.5)": (CressieRead(1.5), {"radius": 0.1}),
    "Burg": (Burg(), {"radius": 0.1}),
    "Neyman": (Neyman(), {"radius": 0.1}),
    "JensenShannon": (JensenShannon(), {"radius": 0.1}),
    "KLCVaR(0.1)": (KLCVaR(0.1), {"radius": 0.1}),
}
WITHIN_SORTS = ("JensenShannon", "Burg", "Hellinger")


def divergence_in_cvxpy(name: str, q: cp.Variable, n: int) -> cp.Expression:
    """Returns ``D(q||p)`` for the uniform nominal as a CVXPY expression."""
    p = np.full(n, 1 / n)
    half = (p + q) / 2
    return {
        "KL": lambda: cp.sum(cp.rel_entr(q, p)),
        "ChiSquare": lambda: cp.sum_squares(q - p) * n / 2,
        "TotalVariation": lambda: cp.norm1(q - p) / 2,
        "Hellinger": lambda: 1 - cp.sum(cp.sqrt(q)) / np.sqrt(n),
        "CressieRead(1.5)": lambda: (cp.sum(cp.power(q * n, 1.5)) / n - 1) / 0.75,
        "Burg": lambda: cp.sum(cp.rel_entr(p, q)),
        "Neyman": lambda: (cp.sum(cp.inv_pos(q * n)) / n - 1) / 2,
        "JensenShannon": lambda: (cp.sum(cp.rel_entr(q, half)) + cp.sum(cp.rel_entr(p, half))) / 2,
        "KLCVaR(0.1)": lambda: cp.sum(cp.rel_entr(q, p)),
    }[name]()


def solve_in_cvxpy(name: str, losses: np.ndarray, radius: float) -> dict[str, Any]:
    """Builds and solves one worst case; says so where the solver fails."""
    n = len(losses)
    started = time.process_time()
    q = cp.Variable(n, nonneg=True)
    constraints = [cp.sum(q) == 1]
    if "CVaR" in name:
        constraints.append(q * n <= 10)
    if name != "CVaR":
        constraints.append(divergence_in_cvxpy(name, q, n) <= radius)
    problem = cp.Problem(cp.Maximize(losses @ q), constraints)
    with warnings.catch_warnings(), contextlib.suppress(cp.error.SolverError):
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL)
    seconds = time.process_time() - started
    solved = problem.status in ("optimal", "optimal_inaccurate")
    value = float(problem.value) if solved else None
    return {"seconds": seconds, "status": problem.status or "failed", "value": value}


def measure_large(losses: Tensor, *, rounds: int, solver: bool) -> dict[str, Any]:
    """Times each divergence on one large problem."""
    array, nominal = losses.numpy(), np.full(len(losses), 1 / len(losses))
    functions: dict[str, Callable[[], Any]] = {"sort": losses.sort}
    for name, (divergence, level) in CASES.items():
        functions[name] = partial(worst_case, losses, divergence=divergence, **level)
    for name, prototype in PROTOTYPES.items():
        functions[f"prototype {name}"] = partial(prototype, array, nominal)
    times = interleaved(functions, rounds=rounds)
    rows = {}
    for name, (divergence, level) in CASES.items():
        result = worst_case(losses, divergence=divergence, **level)
        seconds = times[name]["median"]
        row: dict[str, Any] = {
            "seconds": times[name],
            "sorts": seconds / times["sort"]["median"],
            "status": result.status.name,
            "relative_gap": (result.gap / (losses.max() - losses.min())).item(),
        }
        if f"prototype {name}" in times:
            row["to_prototype"] = seconds / times[f"prototype {name}"]["median"]
            row["to_published_prototype"] = seconds / PUBLISHED_PROTOTYPE[name]
            weights = PROTOTYPES[name](array, nominal)
            row["prototype_value_error"] = abs(weights @ array - result.value.item())
        if solver:
            rival = solve_in_cvxpy(name, array, level.get("radius", 0.0))
            row["cvxpy"] = rival
            if rival["value"] is not None:
                row["cvxpy"]["ratio"] = rival["seconds"] / seconds
                row["cvxpy"]["value_difference"] = rival["value"] - result.value.item()
        rows[name] = row
    return {"sort": times["sort"], "divergences": rows}


def measure_batched(problems: Tensor, *, rounds: int, looped: int) -> dict[str, Any]:
    """Times many small problems in one call against a loop over some of them."""
    rows = {}
    for name, (divergence, level) in CASES.items():
        times = interleaved(
            {
                "batched": partial(worst_case, problems, divergence=divergence, **level),
                "loop": partial(one_by_one, problems[:looped], divergence, level),
            },
            rounds=rounds,
        )
        batched = times["batched"]["median"] / len(problems)
        alone = times["loop"]["median"] / looped
        rows[name] = {
            "seconds_each_batched": batched,
            "seconds_each_looped": alone,
            "ratio": alone / batched,
        }
    return rows


def one_by_one(problems: Tensor, divergence: Any, level: dict[str, Any]) -> None:
    """Solves each problem in a call of its own."""
    for row in problems:
        worst_case(row, divergence=divergence, **level)


def claims(large: dict[str, Any], batched: dict[str, Any]) -> dict[str, bool]:
    """Returns which of the stated speeds hold."""
    rows = large["divergences"]
    solved = [row["cvxpy"] for row in rows.values() if "ratio" in row.get("cvxpy", {})]
    prototypes = [row["to_prototype"] for row in rows.values() if "to_prototype" in row]
    return {
        f"at least {FASTEST_SOLVER_RATIO}x faster than CVXPY with Clarabel": all(
            rival["ratio"] >= FASTEST_SOLVER_RATIO for rival in solved
        ),
        f"at most {SLOWEST_TO_PROTOTYPE}x a NumPy prototype": all(
            ratio <= SLOWEST_TO_PROTOTYPE for ratio in prototypes
        ),
        f"at most {SLOWEST_TO_PROTOTYPE}x the published prototype": all(
            row["to_published_prototype"] <= SLOWEST_TO_PROTOTYPE
            for row in rows.values()
            if "to_published_prototype" in row
        ),
        f"{', '.join(WITHIN_SORTS)} within {MOST_SORTS} sorts": all(
            rows[name]["sorts"] <= MOST_SORTS for name in WITHIN_SORTS
        ),
        f"batched at least {LOWEST_BATCH_GAIN}x a loop": all(
            row["ratio"] >= LOWEST_BATCH_GAIN for row in batched.values()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atoms", type=int, default=100_000)
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--looped", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-solver", action="store_true", help="leave CVXPY out")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=arguments.atoms) + 0.1 * rng.normal(size=arguments.atoms) ** 2
    problems = rng.exponential(size=(arguments.problems, 22))
    large = measure_large(
        torch.from_numpy(losses), rounds=arguments.rounds, solver=not arguments.no_solver
    )
    batched = measure_batched(
        torch.from_numpy(problems),
        rounds=max(arguments.rounds // 3, 1),
        looped=min(arguments.looped, arguments.problems),
    )
    holds = claims(large, batched)
    content = {
        "claims": holds,
        "atoms": arguments.atoms,
        "problems_of_22": arguments.problems,
        "seed": 0,
        "threads": 1,
        **large,
        "batched": batched,
    }
    write_result(arguments.output, environment, content)
    for name, row in large["divergences"].items():
        rival = row.get("cvxpy", {}).get("ratio")
        print(
            f"{name:<18}{row['seconds']['median'] * 1e3:8.1f} ms {row['sorts']:6.1f} sorts "
            f"{row.get('to_prototype', float('nan')):6.2f} x prototype "
            f"{rival if rival is None else round(rival)!s:>6} x faster than CVXPY "
            f"{batched[name]['ratio']:6.0f} x batched"
        )
    for claim, kept in holds.items():
        print("holds" if kept else "FAILS", claim)


if __name__ == "__main__":
    main()
