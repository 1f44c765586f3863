"""What routing costs: router, prices and selection as a share of a layer's forward and backward.

For each controller and budget, a training step of the whole ``drgr.models.MoELayer`` and one of its
routing alone, with a given gradient of the combine weights: scores, prices, selection, weights,
their backward pass, and the controller's observation and update. Both are timed in turn, in CPU
seconds of the process; the share is of one round, and its median counts.

    python -m benchmarks.routing_cost.run
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import describe_source, write_result
from benchmarks.skew.run import CONTROLLERS
from drgr.budgets import TokenBudget
from drgr.models import GatedExperts, MoELayer
from drgr.routing import RoutingPolicy
from drgr.routing.selection import BudgetedSelector

LIMIT = 0.10
# Controllers that may take more, and why.
SLOW = {"BIP, 8 iterations": "eight passes over all scores in each step"}


def budgets(top_k: int, num_experts: int) -> dict[str, TokenBudget]:
    """Returns a fixed number of experts, and one that differs from token to token."""
    least, most = top_k // 2, min(2 * top_k, num_experts)
    return {
        f"{top_k} each": TokenBudget(minimum=top_k, maximum=top_k, average=top_k),
        f"{least} to {most}, {top_k} on average": TokenBudget(
            minimum=least, maximum=most, average=top_k
        ),
    }


def steps_of(layer: MoELayer, *, num_tokens: int) -> dict[str, Callable[[], None]]:
    """Returns a training step of the layer, and one of its routing alone."""
    width = layer.experts.width
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    direction = torch.randn(num_tokens, width)
    into_weights = torch.randn(num_tokens, layer.policy.selector.maximum)

    def whole() -> None:
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        output, routing = layer(hidden)
        output.backward(direction)
        layer.observe(routing)
        layer.update()

    def routing_alone() -> None:
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        routing = layer.route(hidden)
        routing.plan.combine_weights.backward(into_weights)
        layer.observe(routing)
        layer.update()

    return {"whole": whole, "routing": routing_alone}


def measure(
    controller: str, budget: TokenBudget, size: argparse.Namespace, rounds: int
) -> dict[str, Any]:
    """Returns the share of routing of one controller and budget."""
    torch.manual_seed(0)
    layer = MoELayer(
        GatedExperts(size.experts, width=size.width, expert_width=size.expert_width),
        policy=RoutingPolicy(
            selector=BudgetedSelector(budget), controller=CONTROLLERS[controller](size.experts)
        ),
    )
    steps = steps_of(layer, num_tokens=size.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - started)
    shares = [part / all_ for part, all_ in zip(seconds["routing"], seconds["whole"], strict=True)]
    return {
        "share": {
            "median": statistics.median(shares),
            "lowest": min(shares),
            "highest": max(shares),
            "of_best_times": min(seconds["routing"]) / min(seconds["whole"]),
        },
        "seconds": seconds,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--expert-width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    rows = []
    for label, budget in budgets(arguments.top_k, arguments.experts).items():
        for controller in CONTROLLERS:
            row = measure(controller, budget, arguments, arguments.rounds)
            rows.append({"controller": controller, "budget": label} | row)
            share = row["share"]
            print(
                f"{label:<26}{controller:<24}{share['median']:7.1%} "
                f"[{share['lowest']:.1%}, {share['highest']:.1%}]",
                flush=True,
            )
    claim = f"routing takes at most {LIMIT:.0%} of forward and backward, but for what is slow"
    kept = all(row["share"]["median"] <= LIMIT for row in rows if row["controller"] not in SLOW)
    size = {
        name: getattr(arguments, name)
        for name in ("tokens", "experts", "top_k", "width", "expert_width", "rounds")
    }
    content = {
        "claims": {claim: kept},
        "slow": SLOW,
        "threads": 1,
        "size": size,
        "rows": rows,
    }
    write_result(arguments.output, environment, content)
    print("holds" if kept else "FAILS", claim)


if __name__ == "__main__":
    main()
