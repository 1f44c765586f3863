"""Hypergradients of this package beside those of other PyTorch libraries, in one run.

Optional: run it in an environment that has the libraries too; one that is missing is left out.

    pip install '.[train]' torchopt==0.7.3 betty-ml==0.1.1
    python -m benchmarks.hypergradient.rivals

Every problem is given at its exact inner solution, so that only the differentiation is compared.
Calls are timed in turn on one thread; the least time of many counts, since other work on the
machine only adds to it.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.hypergradient.problems import DOUBLE, Problem, ridge
from benchmarks.provenance import describe_source, write_result
from benchmarks.timing import interleaved
from drgr.bilevel import CG, Exact, hypergradient

CONDITIONS = (10.0, 502.0)
RTOL = 1e-8
# An error of so many tolerances is a right answer.
RIGHT = 10.0
LIBRARIES = {"torchopt": "torchopt", "betty": "betty-ml"}

Solve = Callable[[], Tensor]


def isotropic(size: int) -> tuple[Problem, Tensor]:
    """``g = |y - x|^2 / 2``, where conjugate gradients end in one step."""
    generator = torch.Generator().manual_seed(0)
    outer = torch.randn(size, generator=generator, dtype=DOUBLE)
    target = torch.randn(size, generator=generator, dtype=DOUBLE)
    problem = Problem(
        lambda _x, y: (y - target).square().sum() / 2,
        lambda x, y: (y - x).square().sum() / 2,
        outer,
        outer.clone(),
    )
    return problem, outer - target


def scalar() -> tuple[Problem, Tensor]:
    """``grad_y g = x y^3 - y - 2`` at its largest root, with tensors of shape ``()``."""
    outer, root = torch.tensor(1.5, dtype=DOUBLE), torch.tensor(1.5, dtype=DOUBLE)
    for _ in range(50):
        root = root - (outer * root**3 - root - 2) / (3 * outer * root**2 - 1)
    problem = Problem(
        lambda _x, y: 1 * y,
        lambda x, y: x * y**4 / 4 - y.square() / 2 - 2 * y,
        outer,
        root,
    )
    return problem, -(root**3) / (3 * outer * root**2 - 1)


def ours(problem: Problem) -> dict[str, Solve]:
    return {
        "drgr, CG": lambda: hypergradient(*problem, solver=CG(rtol=RTOL)).grads,
        "drgr, Exact": lambda: hypergradient(*problem, solver=Exact(rtol=RTOL)).grads,
    }


def of_torchopt(problem: Problem) -> dict[str, Solve]:
    """Implicit differentiation of a root of the inner gradient."""
    import torchopt  # noqa: PLC0415

    solvers = torchopt.linear_solve
    solves = {
        "torchopt, solve_cg": solvers.solve_cg(rtol=RTOL),
        "torchopt, solve_normal_cg (default)": solvers.solve_normal_cg(),
        "torchopt, solve_inv": solvers.solve_inv(),
    }

    def using(solve: Any) -> Solve:
        def solution(_start: Tensor, _x: Tensor) -> Tensor:
            return problem.inner.clone()

        root = torchopt.diff.implicit.custom_root(
            torch.func.grad(lambda y, x: problem.inner_loss(x, y)), argnums=1, solve=solve
        )
        differentiable: Callable[[Tensor, Tensor], Tensor] = root(solution)

        def run() -> Tensor:
            x = problem.outer.detach().clone().requires_grad_()
            value = problem.outer_loss(x, differentiable(problem.inner, x))
            (slope,) = torch.autograd.grad(value, x)
            return slope

        return run

    return {name: using(solve) for name, solve in solves.items()}


def of_betty(problem: Problem) -> dict[str, Solve]:
    """Its conjugate gradients for a fixed number of steps: it has no tolerance."""
    from betty.hypergradient.cg import cg  # noqa: PLC0415

    def using(steps: int) -> Solve:
        def run() -> Tensor:
            x = problem.outer.detach().clone().requires_grad_()
            y = problem.inner.detach().clone().requires_grad_()
            (vector,) = torch.autograd.grad(problem.outer_loss(x, y), y)
            lower = SimpleNamespace(
                paths=[],
                config=SimpleNamespace(cg_iterations=steps, cg_alpha=1.0),
                cur_batch=None,
                training_step_exec=lambda _batch: problem.inner_loss(x, y),
                trainable_parameters=lambda: [y],
                parameters=lambda: [y],
            )
            upper = SimpleNamespace(trainable_parameters=lambda: [x])
            slope: Tensor = cg([vector], lower, upper)[0]
            return slope

        return run

    return {f"betty, CG of {steps} steps": using(steps) for steps in (20, 200)}


def compare(
    problem: Problem, exact: Tensor, libraries: Mapping[str, bool], rounds: int
) -> list[dict[str, Any]]:
    """Returns a row for each way to the hypergradient, its error and its time."""
    solves = ours(problem)
    if libraries["torchopt"]:
        solves |= of_torchopt(problem)
    if libraries["betty"]:
        solves |= of_betty(problem)
    rows, works = [], {}
    for name, solve in solves.items():
        row: dict[str, Any] = {"solver": name}
        try:
            gradient = solve().detach()
            error = ((gradient - exact).norm() / exact.norm()).item()
            row["error"] = error if math.isfinite(error) else None
            works[name] = solve
        except Exception as failure:  # whatever another library raises is its result
            row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
        rows.append(row)
    seconds = interleaved(works, rounds=rounds)
    for row in rows:
        row["seconds"] = seconds.get(row["solver"])
    return rows


def claims(problems: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns what must hold of the measurements."""
    answers = [row for problem in problems for row in problem["rows"]]
    found = {
        "every answer of this package is right": all(
            _is_right(row) for row in answers if row["solver"].startswith("drgr")
        )
    }
    own, rivals = _at_the_hardest(problems)
    same = [row["seconds"]["lowest"] for row in rivals if "cg" in row["solver"].lower()]
    if same:
        name = "conjugate gradients take at most the time of the fastest others that are right"
        found[name] = own["seconds"]["lowest"] <= min(same)
    return found


def observations(problems: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns what is worth knowing, whichever way it comes out."""
    own, rivals = _at_the_hardest(problems)
    if not rivals:
        return {}
    fastest = min(row["seconds"]["lowest"] for row in rivals)
    name = "conjugate gradients take at most the time of any other that is right, dense ones too"
    return {name: own["seconds"]["lowest"] <= fastest}


def _at_the_hardest(problems: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the row of our conjugate gradients, and those of others that are right."""
    rows = next(part["rows"] for part in problems if part["condition"] == CONDITIONS[-1])
    own = next(row for row in rows if row["solver"] == "drgr, CG")
    others = [row for row in rows if not row["solver"].startswith("drgr") and _is_right(row)]
    return own, others


def _is_right(row: dict[str, Any]) -> bool:
    error = row.get("error")
    return error is not None and error <= RIGHT * RTOL


def versions() -> dict[str, str | None]:
    """Returns the version of each library, None for one that is missing."""
    return {
        package: importlib.metadata.version(package) if importlib.util.find_spec(module) else None
        for module, package in LIBRARIES.items()
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("rivals.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of functorch, which torchopt calls
    found = versions()
    libraries = {module: found[package] is not None for module, package in LIBRARIES.items()}
    problems: list[dict[str, Any]] = []
    cases: list[tuple[str, float | None, tuple[Problem, Tensor]]] = [
        ("ridge", condition, ridge(arguments.dimension, condition, DOUBLE))
        for condition in CONDITIONS
    ]
    cases += [("isotropic", None, isotropic(50)), ("scalar", None, scalar())]
    for name, condition, (problem, exact) in cases:
        rows = compare(problem, exact, libraries, arguments.rounds)
        problems.append({"problem": name, "condition": condition, "rows": rows})
    holds = claims(problems)
    seen = observations(problems)
    content = {
        "claims": holds,
        "observations": seen,
        "libraries": found,
        "rtol": RTOL,
        "dimension": arguments.dimension,
        "threads": 1,
        "problems": problems,
    }
    write_result(arguments.output, environment, content)
    for problem_rows in problems:
        for row in problem_rows["rows"]:
            label = f"{problem_rows['problem']} {problem_rows['condition'] or '':<8}"
            error = row.get("error")
            outcome = row.get("failed", "not a number" if error is None else f"error {error:.1e}")
            time = f"{1e3 * row['seconds']['lowest']:8.2f} ms" if row["seconds"] else " " * 11
            print(f"{label:<18}{row['solver']:<38}{time}  {outcome}")
    for claim, kept in holds.items():
        print("holds" if kept else "FAILS", claim)
    for observation, is_so in seen.items():
        print("yes" if is_so else "no", observation)


if __name__ == "__main__":
    main()
