"""How right hypergradients are, and how the merit makes step sizes harmless.

Exactness: the relative error of every solver on ridge regressions of growing condition number,
against a dense solve, beside what the solver says of it. Robustness: the value that proximal
alternating minimisation and the plain single loop (SOBA) reach from the same first step sizes.

    python -m benchmarks.hypergradient.run
"""

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hypergradient.problems import Problem, curved, exact_value, ridge
from benchmarks.provenance import describe_source, write_result
from benchmarks.timing import interleaved
from drgr.bilevel import (
    CG,
    Exact,
    Identity,
    LinearSolver,
    Neumann,
    ProximalAlternating,
    hypergradient,
)

CONDITIONS = (10.0, 5e2, 1e3, 1e5)
TOLERANCES = (1e-4, 1e-8)
STEP_SIZES = (1e-3, 1e-2, 0.05, 0.2, 0.5, 1.0, 2.0, 10.0, 100.0)
INNER_RATE = 0.4
MERIT_WEIGHT = 30.0

SOLVERS: dict[str, Callable[[float], LinearSolver]] = {
    "CG": lambda rtol: CG(rtol=rtol),
    "Neumann, 100 terms": lambda rtol: Neumann(num_terms=100, rtol=rtol),
    "Exact": lambda rtol: Exact(rtol=rtol),
    "Identity": lambda rtol: Identity(rtol=rtol),
}


def measure_exactness(dimension: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row per precision, condition number, solver and tolerance."""
    rows = []
    for dtype in (torch.float64, torch.float32):
        for condition in CONDITIONS:
            problem, exact = ridge(dimension, condition, dtype)
            for name, make in SOLVERS.items():
                for rtol in TOLERANCES:
                    label = {"dtype": str(dtype)[6:], "condition": condition, "solver": name}
                    rows.append(label | _judged(problem, exact, make(rtol), rtol, rounds))
    return rows


def _judged(
    problem: Problem, exact: Tensor, solver: LinearSolver, rtol: float, rounds: int
) -> dict[str, Any]:
    def solve() -> Any:
        return hypergradient(*problem, solver=solver)

    found = solve()
    grads: Tensor = found.grads
    return {
        "rtol": rtol,
        "error": ((grads.double() - exact).norm() / exact.norm()).item(),
        "residual": found.residual,
        "error_estimate": found.error_estimate,
        "num_hvps": found.num_hvps,
        "status": str(found.status),
        "seconds": interleaved({"solve": solve}, rounds=rounds)["solve"],
    }


def measure_robustness(inner_size: int, outer_size: int, max_steps: int) -> list[dict[str, Any]]:
    """Returns the values reached from each first step size, with the merit and without."""
    problem = curved(inner_size, outer_size)
    rows = []
    for step_size in STEP_SIZES:
        method = ProximalAlternating(
            inner_optimizer=lambda params: torch.optim.SGD(params, lr=INNER_RATE),
            step_size=step_size,
            merit_weight=MERIT_WEIGHT,
        )
        solution = method.minimize(*problem, max_steps=max_steps)
        merits = solution.merits
        rise = max(after - before for before, after in pairwise(merits))
        rows.append(
            {
                "step_size": step_size,
                "value": exact_value(problem, solution.outer_params),
                "status": str(solution.status),
                "stationarity": solution.stationarity,
                "largest_rise_of_merit": max(rise, 0.0),
                "outer_steps": solution.num_steps,
                "inner_steps": solution.num_inner_steps,
                "num_hvps": solution.num_hvps,
                "plain_value": _single_loop(problem, step_size, solution.num_hvps),
            }
        )
    return rows


def _single_loop(problem: Problem, step_size: float, num_steps: int) -> float | None:
    """Returns the value of SOBA after as many Hessian products, None where it diverges."""
    x, y = problem.outer, problem.inner
    z = torch.zeros_like(y)
    for _ in range(num_steps):
        leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
        by_outer, by_inner = torch.autograd.grad(problem.outer_loss(*leaves), leaves)
        (slope,) = torch.autograd.grad(problem.inner_loss(*leaves), leaves[1], create_graph=True)
        cross, product = torch.autograd.grad(slope, leaves, z)
        x = x - step_size * (by_outer - cross)
        y = y - INNER_RATE * slope.detach()
        z = z - INNER_RATE * (product - by_inner)
        if not bool(x.isfinite().all()) or x.norm().item() > 1e6:
            return None
    return exact_value(problem, x)


def claims(exactness: list[dict[str, Any]], robustness: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns what must hold of the measurements."""
    best = min(row["value"] for row in robustness)
    return {
        "no result that counts as converged has an error above 10 times its tolerance": all(
            row["error"] <= 10 * row["rtol"] for row in exactness if row["status"] == "converged"
        ),
        "conjugate gradients converge in float64 at every condition number": all(
            row["status"] == "converged"
            for row in exactness
            if row["solver"] == "CG" and row["dtype"] == "float64"
        ),
        "nothing is NaN": all(
            math.isfinite(row["error"]) and math.isfinite(row["residual"]) for row in exactness
        ),
        "every first step size reaches the same value": all(
            row["value"] <= best + 1e-6 * abs(best) for row in robustness
        ),
        "the merit rises by no more than rounding": all(
            row["largest_rise_of_merit"] <= 1e-12 * abs(best) for row in robustness
        ),
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=200)
    parser.add_argument("--inner", type=int, default=50)
    parser.add_argument("--outer", type=int, default=10)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    exactness = measure_exactness(arguments.dimension, arguments.rounds)
    robustness = measure_robustness(arguments.inner, arguments.outer, arguments.max_steps)
    holds = claims(exactness, robustness)
    content = {
        "claims": holds,
        "dimension": arguments.dimension,
        "seed": 0,
        "threads": 1,
        "exactness": exactness,
        "robustness": robustness,
    }
    write_result(arguments.output, environment, content)
    for row in exactness:
        print(
            f"{row['dtype']} {row['condition']:8.0f} {row['solver']:<20}rtol {row['rtol']:.0e} "
            f"error {row['error']:.1e} {row['num_hvps']:5d} products "
            f"{row['seconds']['median'] * 1e3:7.1f} ms  {row['status']}"
        )
    for row in robustness:
        print(
            f"step {row['step_size']:<7g}value {row['value']:.9f} ({row['status']}), plain "
            f"{row['plain_value']}"
        )
    for claim, kept in holds.items():
        print("holds" if kept else "FAILS", claim)


if __name__ == "__main__":
    main()
