"""Exact projection and selection against ``torch.topk`` and a sort of the same matrix.

One thread on the CPU; all times of one run are taken in turn. With ``--device cuda`` the same on an
accelerator, where any host synchronisation inside a call is an error. Memory is the growth of the
process's peak in a process of its own, in matrices of the size of the gates.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import describe_source, write_result
from benchmarks.timing import interleaved
from drgr.budgets import Budget, project, project_entropic, select

TOP = 8
MOST_PROJECT = 15
MOST_SELECT = 3
MEMORY_SIZES = (1, 4)
LARGEST_MEMORY_GROWTH = 1.5


def gates_of(tokens: int, experts: int) -> Tensor:
    """Returns sigmoid gates, some tokens wanting much and others little, shape ``(T, E)``."""
    generator = torch.Generator().manual_seed(0)
    wanted = 2 * torch.randn(tokens, 1, generator=generator)
    return torch.sigmoid(wanted + 2 * torch.randn(tokens, experts, generator=generator) - 2)


def budgets_of(tokens: int, experts: int, device: torch.device) -> dict[str, Budget]:
    """Returns budgets of which both the token's and the batch's bounds bind."""
    generator = torch.Generator().manual_seed(1)
    unequal = (0.5 + 1.5 * torch.rand(experts, generator=generator)).to(device)
    equal = torch.ones(experts, device=device)
    return {
        "unequal": Budget(unequal, per_token=(2.0, 6.0), per_batch=4.0 * tokens),
        "equal": Budget(equal, per_token=(1, TOP), per_batch=4.0 * tokens),
    }


def project_and_back(gates: Tensor, budget: Budget) -> None:
    """Projects with gradients and takes them."""
    leaf = gates.detach().requires_grad_()
    project(leaf, budget).gates.square().sum().backward()


def functions_of(gates: Tensor, budgets: dict[str, Budget]) -> dict[str, Callable[[], Any]]:
    """Returns what is timed."""
    return {
        "topk": partial(gates.topk, TOP, dim=1),
        "sort": partial(gates.sort, dim=1),
        "project, unequal costs": partial(project, gates, budgets["unequal"]),
        "project, equal costs": partial(project, gates, budgets["equal"]),
        "project and backward, unequal costs": partial(project_and_back, gates, budgets["unequal"]),
        "project_entropic, unequal costs": partial(project_entropic, gates, budgets["unequal"]),
        "select, equal costs": partial(select, gates, budgets["equal"]),
        "select, unequal costs": partial(select, gates, budgets["unequal"]),
    }


def quality(gates: Tensor, budgets: dict[str, Budget]) -> dict[str, Any]:
    """Returns how exact the timed results are."""
    projected, chosen = project(gates, budgets["unequal"]), select(gates, budgets["equal"])
    rounded = select(gates, budgets["unequal"])
    return {
        "project_status": projected.status.name,
        "project_spend_over_budget": (projected.spend / budgets["unequal"].per_batch).item(),
        "tokens_at_a_bound": int((projected.token_price != 0).sum()),
        "select_equal_gap": chosen.gap.item(),
        "select_unequal_relative_gap": (rounded.gap / rounded.value).item(),
        "select_unequal_status": rounded.status.name,
    }


def refuse_synchronisation(functions: dict[str, Callable[[], Any]]) -> dict[str, bool]:
    """Returns which functions run without any host synchronisation on an accelerator."""
    silent = {}
    for name, function in functions.items():
        function()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
            silent[name] = True
        except RuntimeError:
            silent[name] = False
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return silent


def peak_in_matrices(name: str, tokens: int, experts: int) -> float:
    """Returns the growth of the peak memory of one call, in matrices of the gates' size."""
    command = [sys.executable, "-m", "benchmarks.budgets.memory", name, str(tokens), str(experts)]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    gates = gates_of(arguments.tokens, arguments.experts).to(device)
    budgets = budgets_of(arguments.tokens, arguments.experts, device)
    functions = functions_of(gates, budgets)
    times = interleaved(functions, rounds=arguments.rounds)
    topk, sort = times["topk"]["median"], times["sort"]["median"]
    ratios = {name: row["median"] / topk for name, row in times.items()}
    memory = {
        name: [
            peak_in_matrices(name, factor * arguments.tokens, arguments.experts)
            for factor in MEMORY_SIZES
        ]
        for name in ("project", "select")
    }
    projecting = times["project, unequal costs"]["median"]
    claims = {
        f"project takes at most {MOST_PROJECT} topk and one sort": projecting
        <= MOST_PROJECT * topk + sort,
        f"select at equal costs takes at most {MOST_SELECT} topk": ratios["select, equal costs"]
        <= MOST_SELECT,
        "memory grows like the gates": all(
            large <= LARGEST_MEMORY_GROWTH * small for small, large in memory.values()
        ),
    }
    content: dict[str, Any] = {
        "claims": claims,
        "tokens": arguments.tokens,
        "experts": arguments.experts,
        "device": arguments.device,
        "dtype": "float32",
        "threads": 1,
        "seed": 0,
        "seconds": times,
        "ratio_to_topk": ratios,
        "project_to_topk_and_sort": projecting / (topk + sort),
        "peak_memory_in_matrices": memory,
        "quality": quality(gates, budgets),
    }
    if device.type == "cuda":
        content["without_synchronisation"] = refuse_synchronisation(functions)
    write_result(arguments.output, environment, content)
    for name, row in times.items():
        print(f"{name:<38}{row['median'] * 1e3:8.2f} ms {ratios[name]:7.2f} x topk")
    for claim, kept in claims.items():
        print("holds" if kept else "FAILS", claim)


if __name__ == "__main__":
    main()
