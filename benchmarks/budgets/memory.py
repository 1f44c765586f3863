"""Prints the growth of this process's peak memory over one call, in matrices of the gates' size."""

import sys
from pathlib import Path

import torch

from drgr.budgets import Budget, project, select


def main() -> None:
    name, tokens, experts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    function = {"project": project, "select": select}[name]
    # Code and libraries are loaded by a small call first.
    for size in (8, tokens):
        gates = torch.rand(size, experts, generator=generator)
        costs = torch.linspace(0.5, 2.0, experts) if name == "project" else torch.ones(experts)
        forget_peak()
        before = peak_bytes()
        function(gates, Budget(costs, per_token=(1.0, 8.0), per_batch=4.0 * size))
    print((peak_bytes() - before) / (4 * tokens * experts))


def forget_peak() -> None:
    """Starts a new peak at what is in memory now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
