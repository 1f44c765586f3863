"""Empirical risk with an auxiliary loss against group weights (KL) with a budget, at equal compute.

Every method trains the same model from the same initialisation on the same corpus, with unequal
domain sampling given. FLOPs are counted in full, held-out passes of the adversary included; a
method that spends more in a step takes fewer steps, so that no run exceeds the FLOPs of the first
method.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.provenance import describe_source, write_result
from drgr.data import prepare_corpus
from drgr.recipes import demo
from drgr.training import RunConfig, override, resolve_cache

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
# One held-out pass costs a third of a training pass over as many tokens.
BACKWARD_SHARE = 3


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
            "summary": {method: summarise(runs, method) for method in METHODS},
            "runs": runs,
        },
    )
    for method in METHODS:
        print(method, json.dumps(summarise(runs, method)))
    print(arguments.output)


def run_method(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one method with one seed as ``drgr train`` does, and returns its key figures."""
    directory = arguments.work / f"{list(METHODS).index(method)}-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    settings = [
        *METHODS[method],
        f"data.corpus={arguments.corpus}",
        f"training.seed={seed}",
        f"training.batch_size={arguments.batch_size}",
        f"training.steps={affordable_steps(method, arguments)}",
        *arguments.set,
    ]
    command = [sys.executable, "-m", "drgr", "train", "demo", "--run-dir", str(directory)]
    command += ["--no-report"]
    for setting in settings:
        command += ["--set", setting]
    if arguments.cache:
        command += ["--cache", arguments.cache]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        return {"failed": result.stderr[-2000:]}
    record = json.loads((directory / "evaluation.json").read_text())
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
    held_out_windows = robustness.windows * num_domains(arguments)
    # The frozen price may spend more than the average in a held-out pass; 5 % covers it.
    update = 1.05 * held_out_windows / (BACKWARD_SHARE * arguments.batch_size)
    per_step = update / robustness.every
    affordable = (arguments.steps + per_step * robustness.begin - update) / (1 + per_step)
    return min(int(arguments.steps), int(affordable))


def base_config(arguments: argparse.Namespace) -> RunConfig:
    return override(demo(), [f"data.corpus={arguments.corpus}", *arguments.set])


def num_domains(arguments: argparse.Namespace) -> int:
    config = base_config(arguments)
    corpus = prepare_corpus(
        arguments.corpus,
        cache=resolve_cache(Path(arguments.cache) if arguments.cache else None),
        vocabulary_size=config.data.vocabulary_size,
    )
    return len(corpus.domains)


def summarise(runs: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Returns mean and standard deviation over seeds; failed runs are counted, not hidden."""
    mine = [run for run in runs if run["method"] == method]
    finished = [run for run in mine if "failed" not in run]
    summary: dict[str, Any] = {"seeds": len(mine), "failed": len(mine) - len(finished)}
    for key in ("worst_bits_per_byte", "mean_bits_per_byte", "flops"):
        values = [run[key] for run in finished]
        if values:
            summary[key] = {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
    return summary


if __name__ == "__main__":
    main()
