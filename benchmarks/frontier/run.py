"""Worst against mean: how mixtures chosen by held-out losses and by hypergradients compare.

Every method trains the same model from the same initialisation inside the same budget, from very
unequal sampling or from uniform sampling. FLOPs are counted in full, held-out passes and outer
steps included; a method that spends more takes fewer steps, so that no run exceeds the FLOPs of the
first.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.provenance import describe_source, write_result
from benchmarks.training_runs import (
    BACKWARD_SHARE,
    MARGIN,
    opened_corpus,
    summarise,
    trained,
)
from drgr.recipes import demo
from drgr.training import RunConfig, override

OUTER = ["robustness.apply_to=nothing", "outer.variables=[mixture]"]
GRADIENT = [*OUTER, "outer.update=gradient"]
METHODS: dict[str, list[str]] = {
    "uniform sampling": [
        "data.sampling=uniform",
        "robustness.apply_to=nothing",
        "robustness.losses=train",
    ],
    "sampling as given": ["robustness.apply_to=nothing", "robustness.losses=train"],
    "KL weights of held-out losses": ["robustness.apply_to=sampling"],
    "lookahead": OUTER,
    "lookahead, two sequences of a domain": [*OUTER, "outer.windows=2"],
    "lookahead, strong anchor": [*OUTER, "outer.anchor_strength=1"],
    "lookahead, long averages": [*OUTER, "outer.smoothing=0.8"],
    "hypergradient, identity metric": [*GRADIENT, "outer.metric=identity"],
    "hypergradient, Adam metric": GRADIENT,
    "hypergradient, Adam metric, short steps": [*GRADIENT, "outer.rate=0.5"],
    "hypergradient, Adam metric, strong anchor": [*GRADIENT, "outer.anchor_strength=1"],
    "hypergradient, Gauss-Newton by CG": [*GRADIENT, "outer.solver={kind: cg, max_steps: 3}"],
    "hypergradient, Gauss-Newton by CG, more damping": [
        *GRADIENT,
        "outer.solver={kind: cg, max_steps: 3}",
        "outer.horizon=2",
    ],
}
# In forward passes over the outer batch: two gradients; a gradient, the routes and a difference.
LOOKAHEAD_PASSES, GRADIENT_PASSES = 6, 6
PRODUCT_PASSES = 5
FIGURES = ("worst_bits_per_byte", "mean_bits_per_byte", "flops", "outer_flops", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="drgr-8")
    parser.add_argument("--cache")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--set", action="append", default=[], help="further settings for all")
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    jobs = [(method, seed) for seed in range(arguments.seeds) for method in arguments.methods]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        runs = list(pool.map(lambda job: run_method(job[0], job[1], arguments), jobs))
    summary = {method: summarise(runs, method, FIGURES) for method in arguments.methods}
    write_result(
        arguments.output,
        environment,
        {
            "question": "worst-domain and mean bits per byte on the test split at equal FLOPs",
            "setting": {"corpus": arguments.corpus, "further": arguments.set},
            "methods": {method: METHODS[method] for method in arguments.methods},
            "steps_of_first": arguments.steps,
            "summary": summary,
            "runs": runs,
        },
    )
    for method, row in summary.items():
        print(method, json.dumps(row))


def run_method(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one method with one seed as ``drgr train`` does, and returns its key figures."""
    directory = arguments.work / f"{list(METHODS).index(method)}-{seed}"
    settings = [
        *METHODS[method],
        *common(arguments),
        f"training.seed={seed}",
        f"training.steps={affordable_steps(method, arguments)}",
    ]
    record = trained(directory, settings, cache=arguments.cache)
    start = {"method": method, "seed": seed}
    if "failed" in record:
        return start | record
    return start | {
        "steps": record["step"],
        "flops": record["flops"],
        "outer_flops": record["outer_flops"],
        "seconds": record["seconds"],
        "mean_bits_per_byte": record["mean_bits_per_byte"],
        "worst_bits_per_byte": record["worst_bits_per_byte"],
        "worst_domain": record["worst_domain"],
        "bits_per_byte": {k: v["bits_per_byte"] for k, v in record["domains"].items()},
        "average_share": {k: v["average_share"] for k, v in record["domains"].items()},
        "batches_over_budget": record["budget"]["training"]["batches_over"],
    }


def common(arguments: argparse.Namespace) -> list[str]:
    return [f"data.corpus={arguments.corpus}", *arguments.set]


def affordable_steps(method: str, arguments: argparse.Namespace) -> int:
    """Returns the steps that cost no more FLOPs than those of the first method."""
    config = override(demo(), [*METHODS[method], *common(arguments)])
    per_step = BACKWARD_SHARE * config.training.batch_size
    sequences = MARGIN * len(opened_corpus(config, cache=arguments.cache).domains)
    robustness, outer = config.robustness, config.outer
    steps = int(arguments.steps)
    while steps > 1:
        spent = float(steps * per_step)
        if robustness.losses == "validation":
            updates = times(steps, begin=robustness.begin, every=robustness.every)
            spent += updates * sequences * robustness.windows
        if outer.variables:
            outer_steps = times(steps, begin=outer.begin, every=outer.every)
            spent += outer_steps * sequences * outer.windows * outer_passes(config)
        if spent <= arguments.steps * per_step:
            break
        steps -= 1
    return steps


def times(steps: int, *, begin: int, every: int) -> int:
    """Returns how often something is due in a run."""
    return len(range(begin, steps, every))


def outer_passes(config: RunConfig) -> int:
    """Returns the forward passes of an outer step over its batch."""
    outer = config.outer
    passes = LOOKAHEAD_PASSES if outer.update == "lookahead" else GRADIENT_PASSES
    if outer.solver.kind == "cg":
        passes += PRODUCT_PASSES * (outer.solver.max_steps + 1)
    return passes


if __name__ == "__main__":
    main()
