"""Empirical risk with an auxiliary loss against group weights (KL) with a budget, at equal compute.

Every method trains the same model from the same initialisation on the same corpus, with unequal
domain sampling given. FLOPs are counted in full, held-out passes of the adversary included; a
method that spends more in a step takes fewer steps, so that no run exceeds the FLOPs of the first
method.
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

# Settings that turn the demo recipe into each method. The first one sets the FLOPs for all.
ERM_ROUTING = (
    "routing={budget: {minimum: 2, maximum: 2, average: 2}, controller: {kind: none}, "
    "auxiliary_coefficient: 0.01}"
)
METHODS: dict[str, list[str]] = {
    "erm + auxiliary loss": [ERM_ROUTING, "robustness.apply_to=nothing", "robustness.losses=train"],
    "uniform sampling + auxiliary loss": [
        ERM_ROUTING,
        "data.sampling=uniform",
        "robustness.apply_to=nothing",
        "robustness.losses=train",
    ],
    "KL weights of training losses on the objective + budget": [
        "robustness.apply_to=objective",
        "robustness.losses=train",
    ],
    "KL weights of held-out losses as sampling + budget": [
        "robustness.apply_to=sampling",
        "robustness.losses=validation",
    ],
}
FIGURES = ("worst_bits_per_byte", "mean_bits_per_byte", "flops")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="drgr-8")
    parser.add_argument("--cache")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], help="further settings for all")
    parser.add_argument("--work", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    jobs = [(method, seed) for seed in range(arguments.seeds) for method in METHODS]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        records = list(pool.map(lambda job: run_method(job[0], job[1], arguments), jobs))
    runs = [
        {"method": method, "seed": seed, **record}
        for (method, seed), record in zip(jobs, records, strict=True)
    ]
    write_result(
        arguments.output,
        environment,
        {
            "question": "worst-domain and mean bits per byte on the test split at equal FLOPs",
            "setting": {
                "corpus": arguments.corpus,
                "tokens_per_step": arguments.batch_size
                * base_config(arguments).data.sequence_length,
                "further": arguments.set,
            },
            "methods": METHODS,
            "steps_of_first": arguments.steps,
            "summary": {method: summarise(runs, method, FIGURES) for method in METHODS},
            "runs": runs,
        },
    )
    for method in METHODS:
        print(method, json.dumps(summarise(runs, method, FIGURES)))
    print(arguments.output)


def run_method(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one method with one seed as ``drgr train`` does, and returns its key figures."""
    directory = arguments.work / f"{list(METHODS).index(method)}-{seed}"
    settings = [
        *METHODS[method],
        f"data.corpus={arguments.corpus}",
        f"training.seed={seed}",
        f"training.batch_size={arguments.batch_size}",
        f"training.steps={affordable_steps(method, arguments)}",
        *arguments.set,
    ]
    record = trained(directory, settings, cache=arguments.cache)
    if "failed" in record:
        return record
    return {
        "steps": record["step"],
        "flops": record["flops"],
        "mean_bits_per_byte": record["mean_bits_per_byte"],
        "worst_bits_per_byte": record["worst_bits_per_byte"],
        "worst_domain": record["worst_domain"],
        "bits_per_byte": {k: v["bits_per_byte"] for k, v in record["domains"].items()},
        "effective_domains": record["effective_domains"],
        "batches_over_budget": record["budget"]["training"]["batches_over"],
        "training_spend": record["budget"]["training"],
        "evaluation_spend": record["budget"]["evaluation"],
        "max_violation": [layer["max_violation"] for layer in record["layers"]],
    }


def affordable_steps(method: str, arguments: argparse.Namespace) -> int:
    """Returns the steps that cost no more FLOPs than those of the first method.

    Models and assignments per token are equal, so a step differs by the held-out passes alone.
    """
    if "robustness.losses=validation" not in METHODS[method]:
        return int(arguments.steps)
    robustness = base_config(arguments).robustness
    corpus = opened_corpus(base_config(arguments), cache=arguments.cache)
    held_out_windows = robustness.windows * len(corpus.domains)
    update = MARGIN * held_out_windows / (BACKWARD_SHARE * arguments.batch_size)
    per_step = update / robustness.every
    affordable = (arguments.steps + per_step * robustness.begin - update) / (1 + per_step)
    return min(int(arguments.steps), int(affordable))


def base_config(arguments: argparse.Namespace) -> RunConfig:
    return override(demo(), [f"data.corpus={arguments.corpus}", *arguments.set])


if __name__ == "__main__":
    main()
