"""What the outer loop costs: steps of ``drgr train`` with it against the same steps without.

All variants run in turn in one process on the same batches; times are CPU seconds, which other work
on the machine disturbs least, or wall seconds with an accelerator. One round is ``every`` steps
and, with an outer loop, one outer step.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import describe_source, write_result
from benchmarks.timing import now
from benchmarks.training_runs import opened_corpus, stepper
from drgr.recipes import drgr_bilevel
from drgr.training import RunConfig, build_run, override

LIMIT = 1.30
VARIANTS: dict[str, list[str]] = {
    "no outer loop": ["outer.variables=[]"],
    "lookahead": [],
    "hypergradient": ["outer.update=gradient"],
    "hypergradient, 3 CG steps": [
        "outer.update=gradient",
        "outer.solver={kind: cg, max_steps: 3}",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="drgr-8")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--set", action="append", default=[], help="settings of drgr-bilevel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    base = override(drgr_bilevel(), [f"data.corpus={arguments.corpus}", *arguments.set])
    corpus = opened_corpus(base, cache=arguments.cache)
    variants = {
        name: one_round(override(base, settings), corpus) for name, settings in VARIANTS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds + 1):
        for name, run_round in variants.items():
            started = now()
            run_round(number)
            if number:  # the first round warms up
                seconds[name].append(now() - started)
    plain = seconds["no outer loop"]
    ratios = {
        name: [mine / other for mine, other in zip(times, plain, strict=True)]
        for name, times in seconds.items()
    }
    summary = {
        name: {"median": statistics.median(r), "lowest": min(r), "highest": max(r)}
        for name, r in ratios.items()
    }
    write_result(
        arguments.output,
        environment,
        {
            "claim": f"a step with the outer loop of drgr-bilevel takes at most {LIMIT} times "
            f"one without, at outer.every = {base.outer.every}",
            "holds": summary["lookahead"]["median"] <= LIMIT,
            "ratio_to_no_outer_loop": summary,
            "seconds_per_round": seconds,
            "config": base.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
        },
    )
    for name, values in summary.items():
        print(f"{name:<32}{values['median']:.3f} [{values['lowest']:.3f}, {values['highest']:.3f}]")


def one_round(config: RunConfig, corpus: Any) -> Callable[[int], None]:
    """Returns ``every`` steps of ``drgr train`` with their held-out passes and one outer step."""
    run = build_run(config, corpus)
    step, every = stepper(run, held_out=True), config.outer.every

    def run_round(number: int) -> None:
        for offset in range(every):
            step(number * every + offset)
        if run.outer is not None:
            adversary = run.adversary
            report = run.outer.step(
                adversary.worst_case,
                adversary.losses,
                adversary.weights,
                step=(number + 1) * every,
            )
            adversary.set_mixture(report.mixture)

    return run_round


if __name__ == "__main__":
    main()
