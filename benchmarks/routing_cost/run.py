"""What routing costs: router, prices and selection as a share of a layer's forward and backward.

For each score, controller and selection, a training step of the whole ``drgr.models.MoELayer`` and
one of its routing alone, with a given gradient of the combine weights: scores, prices, selection,
weights, their backward pass, and what observes and updates. Both are timed in turn, in CPU seconds
of the process; the share is of one round, and its median counts.

    python -m benchmarks.routing_cost.run
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import describe_source, write_result
from benchmarks.routing_cost.cases import Case, Size, cases
from drgr.models import MoELayer
from drgr.routing import LayerRouting

LIMIT = 0.10


def steps_of(layer: MoELayer, size: Size) -> dict[str, Callable[[], LayerRouting]]:
    """Returns a training step of the layer, and one of its routing alone."""
    length = size.sequence_length
    hidden = torch.randn(size.tokens // length, length, size.width, requires_grad=True)
    direction = torch.randn_like(hidden)
    into_weights = torch.randn(size.tokens, layer.policy.selector.maximum)
    losses = torch.randn(size.tokens)

    def forget() -> None:
        layer.zero_grad(set_to_none=True)
        hidden.grad = None

    def finish(routing: LayerRouting, reached: list[Tensor]) -> LayerRouting:
        if layer.scorer.needs_losses:
            reached.append(layer.scorer.surrogate(routing, losses))
        torch.autograd.backward(reached)
        layer.observe(routing)
        layer.update()
        return routing

    def whole() -> LayerRouting:
        forget()
        output, routing = layer(hidden)
        return finish(routing, [(output * direction).sum()])

    def routing_alone() -> LayerRouting:
        forget()
        routing = layer.route(hidden.view(-1, size.width), sequence_length=length)
        weights = routing.plan.combine_weights
        # Gates that are drawn have no gradient of their own.
        has_gradient = weights.requires_grad
        return finish(routing, [(weights * into_weights).sum()] if has_gradient else [])

    return {"whole": whole, "routing": routing_alone}


def measure(case: Case, size: Size, rounds: int) -> dict[str, Any]:
    """Returns the share of routing of one case."""
    layer = case.build()
    method = case.method_of(layer)
    steps = steps_of(layer, size)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    spend = 0
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            routing = step()
            if number:
                seconds[name].append(time.process_time() - started)
        spend = int(routing.selection.spend)
    shares = [part / all_ for part, all_ in zip(seconds["routing"], seconds["whole"], strict=True)]
    return {
        "kind": case.kind,
        "method": method.name,
        "label": case.label,
        "budget": case.budget,
        "marked_slow": method.slow,
        "experts_per_token": spend / size.tokens,
        "share": {
            "median": statistics.median(shares),
            "lowest": min(shares),
            "highest": max(shares),
            "of_best_times": min(seconds["routing"]) / min(seconds["whole"]),
        },
        "seconds": seconds,
    }


def claims(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns what must hold of the shares and of the marks in the table of methods."""
    over = {(row["kind"], row["method"]) for row in rows if row["share"]["median"] > LIMIT}
    marked = {(row["kind"], row["method"]) for row in rows if row["marked_slow"] is not None}
    return {
        f"routing takes at most {LIMIT:.0%} of forward and backward, but for what is marked slow": (
            over <= marked
        ),
        f"what is marked slow takes more than {LIMIT:.0%}": marked <= over,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--expert-width", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    size = Size(**{name: getattr(arguments, name) for name in Size.__slots__})
    rows = []
    for case in cases(size):
        row = measure(case, size, arguments.rounds)
        rows.append(row)
        share = row["share"]
        print(
            f"{case.kind:<11}{case.budget:<26}{case.label:<36}"
            f"{row['experts_per_token']:6.2f} experts {share['median']:7.1%} "
            f"[{share['lowest']:.1%}, {share['highest']:.1%}]",
            flush=True,
        )
    held = claims(rows)
    content = {
        "claims": held,
        "limit": LIMIT,
        "over_limit": sorted({row["label"] for row in rows if row["share"]["median"] > LIMIT}),
        "threads": 1,
        "size": asdict(size) | {"rounds": arguments.rounds},
        "rows": rows,
    }
    write_result(arguments.output, environment, content)
    for claim, kept in held.items():
        print("holds" if kept else "FAILS", claim)


if __name__ == "__main__":
    main()
