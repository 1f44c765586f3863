"""Speed of ``drgr.models.MoELayer`` beside the MoE block of transformers with grouped_mm experts.

Forward and backward of whole blocks, router and selection included, on the same weights and tokens,
float32, balanced random routing, a fixed number of experts for each token. The bound is what the
matrix products of the experts would take at the best rate of ``F.linear`` in the same round. Times
of a round are taken in turn: CPU seconds of the process with one thread, which other work on the
machine disturbs least; wall seconds with more. Ratios are of one round each; their median counts.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.moe_layer.run

(A thread that waits actively takes the processor from what it waits for where others use it too.)
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.provenance import describe_source, write_result
from drgr.budgets import TokenBudget
from drgr.models import GatedExperts, MoELayer
from drgr.routing import NoPrices, RoutingPolicy
from drgr.routing.selection import BudgetedSelector

# Width, experts, experts a token, inner width.
SHAPES = (
    (256, 8, 1, 1024),
    (256, 8, 2, 512),
    (256, 64, 8, 128),
    (512, 16, 2, 512),
    (512, 32, 4, 256),
    (512, 64, 8, 128),
    (1024, 8, 2, 1024),
    (1024, 64, 8, 256),
)
LEAST_RATIO = 0.95
LEAST_SHARE = 0.45
# Rows, inner and outer width of the products whose best rate is the bound.
PRODUCTS = ((2048, 1024, 1024), (1024, 512, 512))
TOLERANCE = 1e-4

Step = Callable[[], Tensor]


def blocks(shape: tuple[int, int, int, int]) -> tuple[torch.nn.Module, MoELayer]:
    """Returns transformers' block and the layer with the same weights."""
    width, num_experts, top_k, expert_width = shape
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=expert_width,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "grouped_mm"
    theirs = MixtralSparseMoeBlock(config)
    budget = TokenBudget(minimum=top_k, maximum=top_k, average=top_k)
    ours = MoELayer(
        GatedExperts(num_experts, width=width, expert_width=expert_width),
        policy=RoutingPolicy(selector=BudgetedSelector(budget), controller=NoPrices(num_experts)),
    )
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up)
        theirs.experts.down_proj.copy_(ours.experts.down)
    return theirs, ours


def step_of(block: torch.nn.Module, hidden: Tensor, direction: Tensor) -> Step:
    """Returns forward and backward of a block; gradients are dropped before, as in training."""

    def step() -> Tensor:
        block.zero_grad(set_to_none=True)
        hidden.grad = None
        found = block(hidden)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        output.backward(direction)
        return output.detach()

    return step


def difference(mine: Step, theirs: Step, hidden: Tensor) -> float:
    """Returns the largest difference of outputs and input gradients, relative to the largest."""
    errors = []
    found = []
    for step in (mine, theirs):
        output = step()
        assert hidden.grad is not None
        found.append((output, hidden.grad.clone()))
    for one, other in zip(*found, strict=True):
        errors.append(float((one - other).abs().max() / other.abs().max()))
    return max(errors)


def best_rate(clock: Callable[[], float], repeats: int = 3) -> float:
    """Returns the best rate of ``F.linear`` now, in FLOP a second."""
    rates = []
    for rows, inner, outer in PRODUCTS:
        left, weight = torch.randn(rows, inner), torch.randn(outer, inner)
        for _ in range(repeats):
            started = clock()
            F.linear(left, weight)
            rates.append(2.0 * rows * inner * outer / max(clock() - started, 1e-9))
    return max(rates)


def measure_shape(
    shape: tuple[int, int, int, int], *, num_tokens: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Returns times, throughputs and ratios of one shape."""
    torch.manual_seed(0)
    width, num_experts, top_k, expert_width = shape
    theirs, ours = blocks(shape)
    hidden = torch.randn(1, num_tokens, width, requires_grad=True)
    direction = torch.randn(1, num_tokens, width)
    steps = {
        "MoELayer": step_of(ours, hidden, direction),
        "grouped_mm block": step_of(theirs, hidden, direction),
    }
    error = difference(steps["MoELayer"], steps["grouped_mm block"], hidden)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    bounds = []
    flops = 3.0 * top_k * 6 * width * expert_width * num_tokens
    for number in range(rounds):
        # In turns, so that neither is always the one after the other's memory was freed.
        names = list(steps) if number % 2 == 0 else list(steps)[::-1]
        for name in names:
            started = clock()
            steps[name]()
            seconds[name].append(clock() - started)
        bounds.append(flops / best_rate(clock))
    mine, other = seconds["MoELayer"], seconds["grouped_mm block"]
    ratios = [theirs / ours for ours, theirs in zip(mine, other, strict=True)]
    # The best rate of any round: a bound that no other work on the machine lowered.
    bound = min(bounds)
    return {
        "width": width,
        "experts": num_experts,
        "experts_per_token": top_k,
        "expert_width": expert_width,
        "threads": threads,
        "relative_difference": error,
        "tokens_per_second": {name: num_tokens / min(times) for name, times in seconds.items()},
        "throughput_ratio": {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "of_best_times": min(other) / min(mine),
        },
        "share_of_bound": {name: bound / min(times) for name, times in seconds.items()},
        "bound_tokens_per_second": num_tokens / bound,
        "seconds": seconds,
    }


def claims(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns what the layer must hold."""
    ratios = [row["throughput_ratio"]["median"] for row in rows]
    shares = [row["share_of_bound"]["MoELayer"] for row in rows if row["threads"] == 1]
    return {
        f"outputs and input gradients agree within {TOLERANCE:g}": all(
            row["relative_difference"] < TOLERANCE for row in rows
        ),
        f"throughput at least {LEAST_RATIO} of the grouped_mm block on every shape": all(
            ratio >= LEAST_RATIO for ratio in ratios
        ),
        f"no shape under {LEAST_SHARE} of the bound, one thread": all(
            share >= LEAST_SHARE for share in shares
        ),
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for number in arguments.shapes:
            row = measure_shape(
                SHAPES[number],
                num_tokens=arguments.tokens,
                rounds=arguments.rounds,
                threads=threads,
            )
            rows.append(row)
            ratio, share = row["throughput_ratio"], row["share_of_bound"]
            print(
                f"{threads} thread(s) {SHAPES[number]!s:<22}"
                f"{row['tokens_per_second']['MoELayer']:8.0f} tokens/s, "
                f"{ratio['median']:.2f} [{ratio['lowest']:.2f}, {ratio['highest']:.2f}] times "
                f"grouped_mm, {share['MoELayer']:.2f} of the bound "
                f"({share['grouped_mm block']:.2f})",
                flush=True,
            )
    holds = claims(rows)
    content = {
        "claims": holds,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "dtype": "float32",
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "shapes": rows,
    }
    write_result(arguments.output, environment, content)
    for claim, kept in holds.items():
        print("holds" if kept else "FAILS", claim)


if __name__ == "__main__":
    main()
