"""What measuring gradient traffic costs, and what its penalty buys.

Cost: CPU time of a training step with the measurement, and with the penalty, over one without, in
turn on the same batches. Effect: the same model trained from the same seeds at growing
coefficients, with and without a balance controller; congestion is that of the last quarter of the
steps, losses are of the validation split.

    python -m benchmarks.traffic.run
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import describe_source, write_result
from drgr.data import Corpus, prepare_corpus
from drgr.evaluation import evaluate_domains
from drgr.recipes import demo
from drgr.routing import congestion, max_violation
from drgr.training import RunConfig, RunObjects, build_run, override, resolve_cache
from drgr.training.loop import learning_rate
from drgr.training.step import StepSettings, train_step
from drgr.training.step_totals import StepTotals, is_finite

LIMIT = 1.05
COEFFICIENTS = (0.0, 0.01, 0.1, 1.0)
CONTROLLERS = ("none", "quantile")
EVALUATION_WINDOWS = 16


def measure_cost(config: RunConfig, corpus: Corpus, *, rounds: int) -> dict[str, Any]:
    """Returns the ratios of step times to those without measurement, and the times."""
    run = build_run(config, corpus)
    coefficients = {"not measured": None, "measured": 0.0, "penalised": 0.01}
    seconds: dict[str, list[float]] = {name: [] for name in coefficients}
    for number in range(rounds + 1):
        for name, coefficient in coefficients.items():
            settings = dataclasses.replace(run.settings, traffic_coefficient=coefficient)
            started = time.process_time()
            _step(run, corpus, settings, number)
            if number:
                seconds[name].append(time.process_time() - started)
    base = seconds["not measured"]
    ratios = {
        name: [mine / plain for mine, plain in zip(times, base, strict=True)]
        for name, times in seconds.items()
    }
    return {
        "rounds": rounds,
        "ratio": {
            name: {
                "median": statistics.median(values),
                "lower_quartile": _quantile(values, 0.25),
                "upper_quartile": _quantile(values, 0.75),
            }
            for name, values in ratios.items()
        },
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
    }


def measure_effect(config: RunConfig, corpus: Corpus, *, seeds: int) -> list[dict[str, Any]]:
    """Returns a row per controller, coefficient and seed."""
    return [
        {"controller": controller, "coefficient": coefficient, "seed": seed}
        | _trained(
            override(
                config,
                [
                    f"routing.controller={{kind: {controller}}}",
                    f"routing.traffic.coefficient={coefficient}",
                    f"training.seed={seed}",
                ],
            ),
            corpus,
        )
        for controller in CONTROLLERS
        for coefficient in COEFFICIENTS
        for seed in range(seeds)
    ]


def _trained(config: RunConfig, corpus: Corpus) -> dict[str, float]:
    run = build_run(config, corpus)
    steps = config.training.steps
    late: StepTotals | None = None
    for number in range(steps):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(config.training, number)
        totals = _step(run, corpus, run.settings, number)
        if number >= steps - max(1, steps // 4):
            if late is None:
                late = totals
            else:
                late.add_(totals)
    assert late is not None
    scores = evaluate_domains(
        run.attachment,
        corpus,
        split="validation",
        max_windows=EVALUATION_WINDOWS,
        sequence_length=config.data.sequence_length,
        batch_size=config.training.batch_size,
    )
    return {
        "congestion": float(congestion(late.traffic).mean()),
        "expert_congestion": float(congestion(late.traffic.sum(dim=1, keepdim=True)).mean()),
        "max_violation": float(max_violation(late.expert_load).mean()),
        "mean_bits_per_byte": float(scores.bits_per_byte.mean()),
        "worst_bits_per_byte": float(scores.bits_per_byte.max()),
    }


def _step(run: RunObjects, corpus: Corpus, settings: StepSettings, number: int) -> StepTotals:
    totals = train_step(
        run.forward_model,
        run.attachment,
        run.optimizer,
        corpus,
        settings,
        step=number,
        weights=run.adversary.weights,
    )
    if not is_finite(totals):
        raise SystemExit(f"step {number} is not finite")
    return totals


def _quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns means over seeds."""
    names = [name for name in rows[0] if name not in ("controller", "coefficient", "seed")]
    summary = []
    for controller in CONTROLLERS:
        for coefficient in COEFFICIENTS:
            alike = [
                row
                for row in rows
                if (row["controller"], row["coefficient"]) == (controller, coefficient)
            ]
            means = {name: statistics.mean(row[name] for row in alike) for name in names}
            summary.append({"controller": controller, "coefficient": coefficient} | means)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="drgr-8")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--set", action="append", default=[], help="settings of the demo recipe")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    shared = [f"data.corpus={arguments.corpus}", "robustness.apply_to=nothing", *arguments.set]
    config = override(demo(), shared)
    corpus = prepare_corpus(
        arguments.corpus,
        cache=resolve_cache(arguments.cache),
        vocabulary_size=config.data.vocabulary_size,
    )
    cost = measure_cost(config, corpus, rounds=arguments.rounds)
    rows = measure_effect(config, corpus, seeds=arguments.seeds)
    summary = summarised(rows)
    write_result(
        arguments.output,
        environment,
        {
            "claim": f"a measured step takes at most {LIMIT} times one that is not measured",
            "holds": cost["ratio"]["measured"]["median"] <= LIMIT,
            "cost": cost,
            "effect": summary,
            "runs": rows,
            "config": config.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
        },
    )
    for name, ratio in cost["ratio"].items():
        print(f"{name:<16}{ratio['median']:.3f}")
    for row in summary:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(arguments.output)


if __name__ == "__main__":
    main()
